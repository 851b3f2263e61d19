"""The planner: bytes, communication and seconds of an RL step on a cluster that is not there."""
