"""The exceptions a user of tokenworks may see.

Each message names the argument at fault and says what to do about it. The command line prints the message
without a stack trace and exits with `exit_code`.
"""


class TokenworksError(Exception):
    """Base of every error that tokenworks raises on purpose."""

    exit_code = 1


class InputError(TokenworksError, ValueError):
    """An argument has the wrong value, shape or type; the message names it."""

    exit_code = 2


class ModelNotFoundError(TokenworksError):
    """A model name is unknown, or its files are not there or cannot be fetched."""

    exit_code = 3


class UnsupportedModelError(TokenworksError):
    """The model's architecture cannot do what the method needs."""

    exit_code = 4


class CacheError(TokenworksError):
    """The cache folder cannot be written (full disk, no permission), or a file in it is damaged."""

    exit_code = 5


class NumericalError(TokenworksError):
    """A model returned NaN or infinite logits where finite ones are needed."""

    exit_code = 6
