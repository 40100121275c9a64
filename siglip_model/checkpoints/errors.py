"""What can be wrong with a checkpoint's files."""


class CheckpointError(OSError, ValueError):
    """A checkpoint that is absent, incomplete, damaged or not for this model; the message names file and tensor."""
