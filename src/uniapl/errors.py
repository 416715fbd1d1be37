"""The errors that a user meets, and the exit code of each."""


class UniAPLError(Exception):
    """Something the program can explain in one message; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(UniAPLError):
    """The configuration, the data, the model directory or the command line is wrong; the message says how."""

    exit_code = 2


class HealthStop(UniAPLError):
    """A health rule stopped the run; what was trained is saved."""

    exit_code = 3


class Interrupted(UniAPLError):
    """A signal asked the run to end; the step in progress was finished and saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
