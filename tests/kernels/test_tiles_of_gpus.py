"""Tiles depend on what a GPU has, its matrix unit, TMA, shared memory and multiprocessors, not on its number."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from bench.compiled.launch import GPUS
from siglip_kernels.attention import config as attention
from siglip_kernels.attention_pool import config as attention_pool
from siglip_kernels.device import Facts
from siglip_kernels.layer_norm import config as layer_norm
from siglip_kernels.patch_embed import config as patch_embed
from siglip_kernels.sigmoid_loss import config as sigmoid_loss

CONSUMER_BLACKWELL = GPUS["rtx5090"]
KERNELS = ("forward", "backward_queries", "backward_keys")


def _attention(gpu: Facts) -> Iterator[object]:
    for head_dim in (64, 72, 80, 96, 128):
        for element_bytes in (2, 4):
            for kernel in KERNELS:
                yield attention.tile(kernel, gpu, element_bytes, head_dim, 729, 729)
            for kernel in ("short_forward", "short_backward"):
                yield attention.short(
                    kernel, gpu, element_bytes, head_dim, attention.short_block(element_bytes), 10_000
                )
    yield from (attention.candidates(kernel, gpu) for kernel in KERNELS)


def _attention_pool(gpu: Facts) -> Iterator[object]:
    for kernel in ("forward", "backward"):
        for heads, width in ((12, 768), (16, 1152)):
            yield attention_pool.choose_tile(kernel, gpu, heads, width)


def _layer_norm(gpu: Facts) -> Iterator[object]:
    for rows in (1, 729, 46_656):
        yield layer_norm.forward_tile(1152, rows, gpu.multiprocessors)
        tile = layer_norm.backward_tile(1152, rows, 2, gpu.multiprocessors, aligned=True)
        yield tile, layer_norm.backward_stages(tile, 4, gpu.shared_memory)


def _patch_embed(gpu: Facts) -> Iterator[object]:
    for element_bytes in (2, 4):
        for patches in (196, 729, 46_656):
            yield patch_embed.choose_tile(gpu, element_bytes, False, patches, 1152)


def _sigmoid_loss(gpu: Facts) -> Iterator[object]:
    for dtype in (torch.bfloat16, torch.float32):
        yield sigmoid_loss.choose(dtype, 768, gpu, "tf32")
    yield sigmoid_loss.candidates(2, gpu)


CHOICES = [_attention, _attention_pool, _layer_norm, _patch_embed, _sigmoid_loss]
each_operation = pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: choices.__name__[1:])


def numbered(gpu: str, *capability: int) -> Facts:
    """The GPU with another compute capability and all else equal."""
    major, minor = capability
    return dataclasses.replace(GPUS[gpu], name="another", capability=(major, minor))


@each_operation
@pytest.mark.parametrize(
    ("gpu", "capability"),
    [("rtx5090", (12, 1)), ("b200", (10, 3)), ("rtx4090", (8, 6)), ("rtx3090", (8, 9)), ("a100", (8, 7))],
    ids=str,
)
def test_a_number_alone_changes_nothing(choices: Callable, gpu, capability):
    assert list(choices(numbered(gpu, *capability))) == list(choices(GPUS[gpu]))


@pytest.mark.parametrize("choices", [_attention, _attention_pool, _layer_norm, _patch_embed])
def test_consumer_blackwell_gets_the_tiles_of_ada(choices: Callable):
    """It has Ada's matrix instructions and shared memory. Only the loss's kernels use TMA, which Ada has not."""
    assert list(choices(CONSUMER_BLACKWELL)) == list(choices(numbered("rtx5090", 8, 9)))


@pytest.mark.parametrize("choices", [_attention, _patch_embed, _sigmoid_loss])
def test_a_matrix_unit_has_its_own_tiles(choices: Callable):
    tiles = [list(choices(numbered("rtx5090", *capability))) for capability in ((9, 0), (12, 0))]
    assert tiles[0] != tiles[1]


@pytest.mark.parametrize("gpu", GPUS)
def test_tiles_of_the_loss_fit_shared_memory(gpu):
    facts = GPUS[gpu]
    chosen = sigmoid_loss.choose(torch.bfloat16, 768, facts, "ieee")
    tiles, buffers = [chosen.logit_grad, chosen.product], 0
    if facts.matrix_unit == "mma":  # its operands come through registers, so that one stage has no buffer
        tiles, buffers = tiles + sigmoid_loss.candidates(2, facts), -1
    for tile in tiles:
        used = 2 * (tile.rows + tile.columns) * tile.depth * (tile.num_stages + buffers)
        assert used <= facts.shared_memory, tile


def test_one_image_occupies_more_multiprocessors():
    """196 patches of base: 96 tiles, not 48. A batch has the largest tiles."""
    for facts in GPUS.values():
        one, batch = (patch_embed.choose_tile(facts, 2, False, 196 * images, 768) for images in (1, 64))
        assert (one.rows, one.columns) == (64, 32) and (batch.rows, batch.columns) == (128, 128)
