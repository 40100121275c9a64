"""Optimizers and the learning rate: warm-up and cosine, by layer, with weight decay for matrices alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from siglip_model.model import SiglipModel
from siglip_model.training.settings import TrainingConfig

_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.")


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """What the learning rate is multiplied by at a step, 0 for the first update: linear warm-up, then half a cosine.

    As SigLIP 2 was trained (Tschannen et al. 2025, arXiv 2502.14786).
    """
    warmup = config.warmup_steps or 0
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizers: Iterable[Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def layer_factor(name: str, model: SiglipModel, decay: float) -> float:
    """decay^d for a parameter d layers before the end of its tower; embeddings are before the first layer."""
    tower = name.split(".", 1)[0]
    if decay == 1 or tower not in ("text_model", "vision_model"):
        return 1.0
    layers = len(getattr(model, tower).encoder.layers)
    if f"{tower}.embeddings." in name:
        return decay ** (layers + 1)
    layer = _LAYER.match(name)
    return 1.0 if layer is None else decay ** (layers - int(layer[2]))


def make_optimizers(model: SiglipModel, config: TrainingConfig) -> list[Optimizer]:
    """AdamW (Loshchilov & Hutter 2019), and with optimizer="muon" Muon (Jordan et al. 2024) for the layers' matrices.

    Vectors and scalars (biases, norms, t' and b) are not decayed. Muon's updates are scaled to those of AdamW, so that
    both have one learning rate. A group's `initial_lr` is its peak.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            muon = config.optimizer == "muon" and parameter.ndim == 2 and _LAYER.match(name) is not None
            rate = config.learning_rate * layer_factor(name, model, config.layer_decay)
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((muon, rate, decay), []).append(parameter)
    settings = {
        muon: [
            {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (kind, rate, decay), parameters in groups.items()
            if kind is muon
        ]
        for muon in (False, True)
    }
    optimizers: list[Optimizer] = [torch.optim.AdamW(settings[False], betas=(config.beta1, config.beta2))]
    if settings[True]:
        optimizers.append(torch.optim.Muon(settings[True], adjust_lr_fn="match_rms_adamw"))
    return optimizers
