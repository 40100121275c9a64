"""The triton backend under DDP and FSDP2: two processes end where one with the whole batch does."""

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import siglip_model
from siglip_kernels.device import interpreting
from siglip_model.encoder import Attention, EncoderLayer

BATCH, STEPS = 4, 3
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": None, "eos_token_id": 1}
VISION = {**TOWER, "image_size": 32, "patch_size": 16}

pytestmark = pytest.mark.skipif(not interpreting(), reason="two processes on the CPU, in Triton's interpreter")


def fresh(backend: str = "triton") -> siglip_model.SiglipModel:
    torch.manual_seed(0)
    return siglip_model.SiglipModel(siglip_model.SiglipConfig(text_config=TEXT, vision_config=VISION), backend=backend)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (BATCH, 8), generator=generator)
    return {"input_ids": ids, "pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator)}


def train(model: Any, inputs: dict[str, torch.Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(model: siglip_model.SiglipModel, kinds: tuple[type, ...], **policy: Any) -> siglip_model.SiglipModel:
    mesh = init_device_mesh("cpu", (2,))
    for module in reversed(list(model.modules())):  # the inner ones first
        if type(module) in kinds:  # not a subclass: nn.MultiheadAttention does not call its out_proj
            fully_shard(module, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    return model


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}


def one_of_two(rank: int) -> dict[str, dict[str, Any]]:
    """The weights and losses of each way to train, by its name."""
    half = {name: tensor.chunk(2)[rank] for name, tensor in batch().items()}
    found = {}

    def keep(name: str, model: torch.nn.Module, losses: list[float]) -> None:
        shared = torch.tensor(losses)
        dist.all_reduce(shared)  # a rank's loss is of its own images; the mean is the loss of the batch
        found[name] = {"weights": whole(model), "losses": (shared / 2).tolist()}

    model = fresh()
    model.use_global_loss()
    keep("ddp", model, train(DistributedDataParallel(model), half))

    model = fresh()
    model.use_global_loss()
    for tower in (model.text_model, model.vision_model):
        tower.gradient_checkpointing_enable()
    keep("fsdp, checkpointed", model, train(sharded(model.train(), (EncoderLayer,)), half))

    model = fresh()  # parts of a layer are sharded alone: an operation must not bypass their hooks
    model.use_global_loss()
    keep("fsdp of parts", model, train(sharded(model, (torch.nn.Linear, Attention, torch.nn.MultiheadAttention)), half))

    model = fresh()
    model.use_global_loss()
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    keep("fsdp, bf16", model, train(sharded(model, (EncoderLayer,), mp_policy=bf16), half))

    model = fresh()  # plans of tensor parallelism look for nn.Linear
    for tower in (model.text_model, model.vision_model):
        plan = {"layers.*.mlp.fc1": ColwiseParallel(), "layers.*.mlp.fc2": RowwiseParallel()}
        parallelize_module(tower.encoder, init_device_mesh("cpu", (2,)), plan)
    keep("tensor parallel", model, train(model, batch()))
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return ranks.run(one_of_two, 2, tmp_path_factory.mktemp("together"))[0]


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, torch.Tensor], list[float]]:
    model = fresh()
    losses = train(model, batch())
    return model.state_dict(), losses


@pytest.mark.parametrize("name", ["ddp", "fsdp, checkpointed", "fsdp of parts", "tensor parallel"])
def test_two_processes_train_as_one(name: str, together: dict, alone: tuple[dict, list]) -> None:
    weights, losses = alone
    found = together[name]
    assert found["weights"].keys() == weights.keys()
    before = fresh().state_dict()
    assert max((weights[key] - before[key]).abs().max().item() for key in weights) > 1e-3  # it learned
    for key, expected in weights.items():
        torch.testing.assert_close(found["weights"][key], expected, rtol=0, atol=2e-6, msg=key)
    assert found["losses"] == pytest.approx(losses, rel=1e-5)


def test_mixed_precision_stays_near(together: dict, alone: tuple[dict, list]) -> None:
    found = together["fsdp, bf16"]
    assert {tensor.dtype for tensor in found["weights"].values()} == {torch.float32}
    assert found["losses"] == pytest.approx(alone[1], rel=0.02)
