"""The loss of the global batch under DDP: two processes train as one with the whole batch does."""

from pathlib import Path

import pytest
import ranks
import torch
from oracle import TINY_TEXT, TINY_VISION
from torch.nn.parallel import DistributedDataParallel

import siglip_model

BATCH, STEPS = 6, 2


def fresh() -> siglip_model.SiglipModel:
    torch.manual_seed(0)
    return siglip_model.SiglipModel(siglip_model.SiglipConfig(text_config=TINY_TEXT, vision_config=TINY_VISION))


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 99, (BATCH, 16), generator=generator)
    return {"input_ids": ids, "pixel_values": torch.randn(BATCH, 3, 48, 48, generator=generator)}


def train(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()


def one_of_two(rank: int) -> dict[str, torch.Tensor]:
    model = fresh()
    model.use_global_loss()
    half = {name: tensor.chunk(2)[rank] for name, tensor in batch().items()}
    train(DistributedDataParallel(model), half)
    return model.state_dict()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    together, _ = ranks.run(one_of_two, 2, tmp_path)
    single, local = fresh(), fresh()
    train(single, batch())
    train(local, {name: tensor[: BATCH // 2] for name, tensor in batch().items()})
    for name, expected in single.state_dict().items():
        torch.testing.assert_close(together[name], expected, rtol=0, atol=2e-6, msg=name)
    assert not torch.allclose(local.logit_bias, single.logit_bias, rtol=0, atol=1e-4)  # the global batch matters


def test_without_a_process_group() -> None:
    model = fresh()
    with pytest.raises(RuntimeError, match="no process group"):
        model.use_global_loss()
    model.use_global_loss(False)
    assert model.global_loss is None
