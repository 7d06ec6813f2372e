"""Errors that a user can meet. Each message names the key, the value and the fix."""


class PeptrainError(Exception):
    """Base class of errors that the user can fix. The command prints them without a traceback."""


class ConfigError(PeptrainError):
    """A setting is unknown, of the wrong type, or impossible together with the others."""


class DataError(PeptrainError):
    """Text, tokens or a prepared corpus cannot be used."""


class CheckpointError(PeptrainError):
    """A run or checkpoint cannot be read, written, or continued with these settings."""


class Unsupported(PeptrainError):
    """The model, device or platform does not support what was requested."""


class Diverged(PeptrainError):
    """The loss or the gradient is no longer finite."""


class Interrupted(PeptrainError):
    """A signal such as Ctrl-C or SIGTERM ended the training, after a checkpoint was saved."""

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message, code)
        self.code = code
        """Exit code of the command (training/signals.py)."""

    def __str__(self) -> str:
        return str(self.args[0])
