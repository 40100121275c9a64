"""Training with the sigmoid loss."""
