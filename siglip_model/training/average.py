"""An exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_weights(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the module's weights; the decay grows to its value over the first updates.

    Its `module` is a second module, a deep copy in eval mode, with the averages as weights.
    """

    def update(averages: Any, weights: Any, count: Any) -> None:
        count = int(count)
        get_ema_multi_avg_fn(min(decay, count / (9 + count)))(averages, weights, count)

    average = AveragedModel(module, multi_avg_fn=update).eval()
    average.requires_grad_(False)
    average.n_averaged.fill_(1)  # the initial weights are the first of the average; from 0, an update would drop them
    return average
