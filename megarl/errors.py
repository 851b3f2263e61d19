"""The two ways a command ends badly; `megarl.cli` turns them into one line and an exit code."""

EXIT_CODES = (
    "Exit codes: 0 done. 1 ran and failed: one line names the rank, the step and the phase; resume=auto goes on from the last "
    "checkpoint. 2 bad input: one line says what to set. 130, 143, 138, 129 stopped by SIGINT (Ctrl-C), SIGTERM, SIGUSR1, "
    "SIGHUP, with a checkpoint if the end of the step came in time: resume=auto goes on."
)


class BadInput(Exception):
    """What the user gave cannot work: one line with the value and what to set instead. Exit code 2."""


class RunFailed(Exception):
    """The run started and could not go on: one line that names the phase and what to do. Exit code 1."""
