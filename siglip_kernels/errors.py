"""The two things that can be wrong with a call: what was asked, and what the machine lacks."""


class UnsupportedInputError(ValueError, NotImplementedError):
    """An argument that no configuration of the operation supports. A ValueError, so callers need not import it."""


class MissingBackendError(RuntimeError):
    """The call is fine but this machine, or this installation, cannot run it."""


def unsupported(operation: str, argument: str, got: object, supported: str) -> UnsupportedInputError:
    """The one form of message for bad input: operation, argument, what came and what is supported."""
    return UnsupportedInputError(f"{operation}: {argument} {got}; supported: {supported}")
