"""Exceptions for unsupported input and for backends this machine cannot run."""


class UnsupportedInputError(ValueError, NotImplementedError):
    """The operation does not support an argument. It is a ValueError, so that callers need not import it."""


class MissingBackendError(RuntimeError):
    """The call is valid, but this machine or installation cannot run it."""


def unsupported(operation: str, argument: str, got: object, supported: str) -> UnsupportedInputError:
    """An error whose message names the operation, the argument, what was given and what is supported."""
    return UnsupportedInputError(f"{operation}: {argument} {got}; supported: {supported}")
