"""What a user can get wrong, each with the exit code that the command line returns for it."""


class UserError(Exception):
    """Wrong usage or configuration. The message gives the values, the rule and the remedy in one line."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that cannot be run, found before a device is touched."""


class DivergedError(Exception):
    """Numbers went bad: the loss or the gradient is not finite."""

    exit_code = 3


class DamagedError(Exception):
    """Data or a checkpoint that cannot be read as written."""

    exit_code = 4


class SaveError(Exception):
    """A checkpoint that could not be written."""

    exit_code = 1


class PreemptedError(Exception):
    """The run was asked to stop, saved its state, and continues when it is started again."""

    exit_code = 75


def together(error: BaseException) -> bool:
    """Whether all processes of a run raise it alike. Any other error may be one process's own: the others wait for that one."""
    return isinstance(error, UserError | DivergedError | PreemptedError)
