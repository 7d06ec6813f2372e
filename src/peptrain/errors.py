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
    """Ctrl-C or SIGTERM ended the training, after a checkpoint was saved."""
