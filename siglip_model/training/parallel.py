"""One model on several processes: DDP copies it, FSDP2 shards it. Both average the gradients of the ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from siglip_kernels import SigLipLoss
from siglip_model.model import SiglipModel
from siglip_model.training.lora import add_same_adapters
from siglip_model.training.objective import Embedder
from siglip_model.training.processes import Processes
from siglip_model.training.settings import TrainingConfig, refusal


def make_loss(config: TrainingConfig, processes: Processes) -> SigLipLoss:
    """The loss of the global batch, whose texts travel a ring, or of each process's own."""
    if config.global_loss and processes.world > 1:
        return SigLipLoss(rank=processes.rank, world_size=processes.world)
    return SigLipLoss()


def shard(embedder: Embedder, config: TrainingConfig, processes: Processes) -> None:
    """FSDP2, in place: one shard per layer, in bfloat16 if asked; what is left, t' and b among it, stays in fp32.

    Raises ValueError in a single process.
    """
    if processes.world == 1:
        raise refusal("parallel", "fsdp", "ddp in a single process; fsdp under torchrun")
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    policy = MixedPrecisionPolicy()
    if config.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for tower in (embedder.model.vision_model, embedder.model.text_model):
        for layer in tower.encoder.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(embedder, mesh=mesh)


def copy_to_ranks(embedder: Embedder, config: TrainingConfig, processes: Processes) -> nn.Module:
    """The embedder under DDP, or itself in a single process or if it is sharded."""
    if processes.world == 1 or config.parallel == "fsdp":
        return embedder
    return DistributedDataParallel(embedder)


def without_exchange(parallel: nn.Module, last: bool) -> AbstractContextManager:
    """DDP exchanges gradients after the last micro-batch alone; FSDP after each, so that they stay sharded."""
    if isinstance(parallel, DistributedDataParallel) and not last:
        return parallel.no_sync()
    return nullcontext()


def whole_model(embedder: Embedder) -> SiglipModel:
    """The model in eval mode: the embedder's own, or on every rank a copy of a sharded one. A collective."""
    if not isinstance(embedder, FSDPModule):
        return embedder.model.eval()
    sharded = embedder.model
    tensors = {name: _whole(tensor) for name, tensor in sharded.state_dict().items()}
    plain = type(sharded)(sharded.config, backend=sharded.backend)
    add_same_adapters(plain, sharded)
    plain.load_state_dict(tensors)
    return plain.to(sharded.device).eval()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
