"""Training with the sigmoid loss."""

from siglip_model.training.loop import Batch, TrainingConfig, average_weights, initialise_logits, train

__all__ = ["Batch", "TrainingConfig", "average_weights", "initialise_logits", "train"]
