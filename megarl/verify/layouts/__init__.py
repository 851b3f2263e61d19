"""The layout oracle: any layout must give the losses, gradients and weights of one process."""
