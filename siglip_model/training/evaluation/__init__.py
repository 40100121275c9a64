"""Zero-shot accuracy and retrieval of a model."""
