"""Errors with a message for the user, and the exit code of each."""


class UniAPLError(Exception):
    """Base class; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(UniAPLError):
    """The configuration, the data, a model directory or the command line is wrong."""

    exit_code = 2


class HealthStop(UniAPLError):
    """A health rule stopped the run after saving a checkpoint."""

    exit_code = 3


class Interrupted(UniAPLError):
    """A signal stopped the run after it finished its step and saved a checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
