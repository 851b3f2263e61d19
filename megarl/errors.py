"""The two ways a command ends badly; `megarl.cli` turns them into one line and an exit code."""


class BadInput(Exception):
    """What the user gave cannot work: one line with the value and what to set instead. Exit code 2."""


class RunFailed(Exception):
    """The run started and could not go on: one line that names the phase and what to do. Exit code 1."""
