"""Models: what a checkpoint describes (`spec`), built as Megatron-core modules (`build`)."""
