"""The names of siglip-kernel: what its README and docstrings publish, on small cases computed pair by pair."""

import math
from pathlib import Path

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import UnsupportedInputError
from siglip_kernels.integrations import siglip_kernel

LOG_T, BIAS = 1.2, -2.0


def features(images: int, texts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, 12, generator=generator), dim=-1) for n in (images, texts))
    return x, y


def pair_loss(x: Tensor, y: Tensor, positive: bool, log_t: float = LOG_T, bias: float = BIAS) -> float:
    logit = math.exp(log_t) * float(x @ y) + bias
    return math.log1p(math.exp(-logit if positive else logit))


def test_the_loss_takes_the_logarithm_of_the_temperature_and_divides_by_the_batch() -> None:
    x, y = features(5, 5)
    expected = sum(pair_loss(x[i], y[j], i == j) for i in range(5) for j in range(5)) / 5
    log_t, bias = torch.tensor(LOG_T), torch.tensor(BIAS)
    for backend in ("auto", "hopper", "chunked_bf16", "reference"):
        found = siglip_kernel.fused_siglip_loss(x, y, log_t, bias, backend=backend)
        assert found.item() == pytest.approx(expected, rel=1e-6)
    assert siglip_kernel.siglip_loss_reference(x, y, log_t.exp(), bias).item() == pytest.approx(expected, rel=1e-6)
    found = siglip_kernel.DistributedSigLIPLoss(strategy="local")(x, y, log_t.exp(), bias)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert siglip_kernel.fused_distributed_siglip_loss(x, y, log_t.exp(), bias) == found


@pytest.mark.parametrize("offset", [0, 2, -3, None])
def test_the_offset_of_the_diagonal(offset: int | None) -> None:
    x, y = features(5, 5)
    positives = {(i, i + offset) for i in range(5)} if offset is not None else set()
    expected = sum(pair_loss(x[i], y[j], (i, j) in positives) for i in range(5) for j in range(5)) / 5
    found = siglip_kernel.fused_chunked_bf16_siglip_loss(
        x, y, torch.tensor(LOG_T), torch.tensor(BIAS), chunk_size=2, diag_offset=offset
    )
    assert found.item() == pytest.approx(expected, rel=1e-6)


def plus_loss(
    x: Tensor, y: Tensor, images: list[int], texts: list[int], symmetric: bool, log_t: float = LOG_T
) -> float:
    """Positives weigh 1/k by rows, averaged with 1/k' by columns if symmetric; divided by N·M."""
    total = 0.0
    for i, group in enumerate(images):
        for j, other in enumerate(texts):
            weight = 1.0
            if group == other:
                weight = 1 / texts.count(group)
                weight = (weight + 1 / images.count(other)) / 2 if symmetric else weight
            total += weight * pair_loss(x[i], y[j], group == other, log_t)
    return total / (len(images) * len(texts))


@pytest.mark.parametrize("symmetric", [True, False])
def test_plus_weights_positives_by_their_number(symmetric: bool) -> None:
    x, y = features(4, 6)
    images, texts = [0, 1, 1, 7], [1, 0, 1, 1, 5, 0]
    groups = torch.tensor(images, dtype=torch.int32), torch.tensor(texts)
    found = siglip_kernel.fused_siglip_plus_loss(
        x, y, torch.tensor(LOG_T), torch.tensor(BIAS), *groups, symmetric=symmetric
    )
    assert found.item() == pytest.approx(plus_loss(x, y, images, texts, symmetric), rel=1e-6)
    module = siglip_kernel.SigLIPPlusLoss(temperature=0.25, symmetric=symmetric, bias_init=BIAS)
    found = module((3 * x, 2 * y), *groups)
    assert found["total_loss"].item() == pytest.approx(plus_loss(x, y, images, texts, symmetric, math.log(4)), rel=1e-5)
    assert found["logit_scale"].item() == pytest.approx(4)
    assert found["n_positives"] == 2 + 2 * 3
    found["total_loss"].backward()
    assert module.logit_scale.grad is not None and module.logit_bias.grad is not None


def test_plus_without_groups_is_the_plain_loss_by_pairs() -> None:
    x, y = features(4, 6)
    expected = plus_loss(x, y, list(range(4)), list(range(6)), True)
    scalars = torch.tensor(LOG_T), torch.tensor(BIAS)
    assert siglip_kernel.fused_siglip_plus_loss(x, y, *scalars).item() == pytest.approx(expected, rel=1e-6)
    module = siglip_kernel.SigLIPPlusLoss(temperature=1e-4, use_bias=False)
    assert module((x, y))["logit_scale"].item() == pytest.approx(100)  # clamped
    assert [name for name, _ in module.named_parameters()] == ["logit_scale"]


def test_either_side_of_plus_may_have_groups() -> None:
    x, y = features(4, 6)
    texts = torch.tensor([1, 0, 1, 1, 5, 0])
    found = siglip_kernel.SigLIPPlusLoss(temperature=0.25, bias_init=BIAS)((x, y), txt_gid=texts)
    expected = plus_loss(x, y, list(range(4)), texts.tolist(), True, math.log(4))
    assert found["total_loss"].item() == pytest.approx(expected, rel=1e-6) and found["n_positives"] == 5


def _distributed(rank: int) -> dict[str, Tensor]:
    x, y = features(4, 6)
    groups = torch.tensor([0, 1, 1, 7]), torch.tensor([1, 0, 1, 1, 5, 0])
    here = dict(rank=rank, world_size=2, process_group=torch.distributed.group.WORLD)
    loss = siglip_kernel.DistributedSigLIPPlusLoss(temperature=0.25, bias_init=BIAS, **here)
    mine = [values.chunk(2)[rank] for values in (x, y, *groups)]
    ungrouped = loss((mine[0], mine[1][:2]))["n_positives"]
    found = loss(mine[:2], *mine[2:])
    found["ungrouped"] = ungrouped
    plain = siglip_kernel.DistributedSigLIPLoss(strategy="gather", **here)
    found["plain"] = plain(mine[0], mine[1][:2], torch.tensor(LOG_T).exp(), torch.tensor(BIAS))
    return found


def test_ranks_are_averaged_to_the_global_loss(tmp_path: Path) -> None:
    found = ranks.run(_distributed, 2, tmp_path)
    x, y = features(4, 6)
    expected = plus_loss(x, y, [0, 1, 1, 7], [1, 0, 1, 1, 5, 0], True, math.log(4))
    assert sum(each["total_loss"].item() for each in found) / 2 == pytest.approx(expected, rel=1e-6)
    assert all(each["n_positives"] == 8 and each["ungrouped"] == 4 for each in found)
    y = y[[0, 1, 3, 4]]
    expected = sum(pair_loss(x[i], y[j], i == j) for i in range(4) for j in range(4)) / 4
    assert sum(each["plain"].item() for each in found) / 2 == pytest.approx(expected, rel=1e-6)


def test_what_is_not_supported_is_named() -> None:
    x, y = features(3, 3)
    scalars = torch.tensor(LOG_T), torch.tensor(BIAS)
    with pytest.raises(UnsupportedInputError, match="backend is 'hoper'"):
        siglip_kernel.fused_siglip_loss(x, y, *scalars, backend="hoper")
    with pytest.raises(UnsupportedInputError, match="use_fp8 is True"):
        siglip_kernel.fused_siglip_loss(x, y, *scalars, use_fp8=True)
    with pytest.raises(UnsupportedInputError, match="soft_label is True"):
        siglip_kernel.SigLIPPlusLoss(soft_label=True)
    with pytest.raises(UnsupportedInputError, match="soft_weighting is False"):
        siglip_kernel.SigLIPPlusLoss(soft_weighting=False)
    with pytest.raises(UnsupportedInputError, match="strategy is 'star'"):
        siglip_kernel.DistributedSigLIPLoss(strategy="star")
    with pytest.raises(UnsupportedInputError, match=r"text_groups has shape \(2,\)"):
        siglip_kernel.fused_siglip_plus_loss(x, y, *scalars, torch.arange(3), torch.arange(2))
