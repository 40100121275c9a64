"""Training with the sigmoid loss."""

from siglip_model.training.loop import (
    AfterSave,
    Batch,
    BatchSource,
    TrainingConfig,
    average_weights,
    batch_loss,
    initialise_logits,
    learning_rate_factor,
    make_optimizer,
    train,
)

__all__ = [
    "AfterSave",
    "Batch",
    "BatchSource",
    "TrainingConfig",
    "average_weights",
    "batch_loss",
    "initialise_logits",
    "learning_rate_factor",
    "make_optimizer",
    "train",
]
