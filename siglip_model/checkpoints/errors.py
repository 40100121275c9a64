"""The exception for a checkpoint's files."""


class CheckpointError(OSError, ValueError):
    """A checkpoint is missing, incomplete, damaged or does not fit the model; the message names file and tensor."""
