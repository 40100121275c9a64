"""The command `siglip`: classify, embed, demo and info."""
