"""The errors a user can meet. Each message names the key, the value and the repair."""


class PeptrainError(Exception):
    """Base of every error that is the user's to mend; the command prints it without a traceback."""


class ConfigError(PeptrainError):
    """A setting is unknown, of the wrong type, or impossible together with the others."""


class DataError(PeptrainError):
    """Text, tokens or a prepared corpus can't be used as they are."""


class CheckpointError(PeptrainError):
    """A run or checkpoint can't be read, written, or continued with these settings."""


class Unsupported(PeptrainError):
    """The model, device or platform can't do what was asked."""


class Diverged(PeptrainError):
    """The loss or the gradient is no longer finite."""


class Interrupted(PeptrainError):
    """Ctrl-C or SIGTERM ended the training, after a checkpoint was saved."""
