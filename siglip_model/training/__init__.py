"""Training with the sigmoid loss."""

from siglip_model.training.loop import Batch, TrainingConfig, WeightAverage, initialise_logits, train

__all__ = ["Batch", "TrainingConfig", "WeightAverage", "initialise_logits", "train"]
