"""Starting a run on many nodes: scripts for SLURM and torchrun, what the cluster can do, and whether its nodes are well."""
