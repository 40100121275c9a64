"""The command `siglip`: classify, embed, search, demo and info."""
