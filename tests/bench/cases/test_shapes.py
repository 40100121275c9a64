"""FLOPs and bytes against numbers computed by hand, and against the published roofline of one H200."""

import dataclasses

import pytest
import torch

from bench.cases import checked
from bench.cases.operations import OPERATIONS
from bench.cases.shapes import (
    MODELS,
    AttentionShape,
    LinearShape,
    LossShape,
    MLPShape,
    ModelShape,
    NormShape,
    PatchShape,
    PoolShape,
    PreNormAttentionShape,
    QKVShape,
    ResizeShape,
    SequencesShape,
    TrainShape,
    parse,
)
from bench.cases.suites import SUITES


@pytest.mark.parametrize(
    ("model", "tokens", "head_dim", "gigaflops", "microseconds", "images_per_second"),
    [
        ("base-224", 196, 64, 34.9, 44.2, 22_609),
        ("base-512", 1024, 64, 213.8, 270.6, 3_695),
        ("large-384", 576, 64, 381.4, 482.8, 2_071),
        ("so400m-224", 256, 72, 219.0, 277.2, 3_608),
        ("so400m-384", 729, 72, 666.4, 843.6, 1_185),
    ],
)
def test_vision_towers_at_790_tflops(model, tokens, head_dim, gigaflops, microseconds, images_per_second):
    tower = MODELS[model].vision
    assert (tower.tokens, tower.head_dim) == (tokens, head_dim)
    flops = ModelShape("", model, 1).flops("fwd")
    assert flops / 1e9 == pytest.approx(gigaflops, abs=0.06)
    assert flops / 790e12 * 1e6 == pytest.approx(microseconds, abs=0.06)
    assert 790e12 / flops == pytest.approx(images_per_second, rel=5e-4)
    assert ModelShape("", model, 8).flops("fwd") == 8 * flops


@pytest.mark.parametrize(
    ("pairs", "width", "milliseconds"),
    [(16_384, 768, 1.6), (32_768, 1152, 9.4), (65_536, 768, 25.1), (2**20, 768, 6400)],
)
def test_the_loss_is_three_products(pairs, width, milliseconds):
    shape = LossShape("", pairs, width)
    assert shape.flops("fwd+bwd") == 6 * pairs**2 * width == shape.flops("fwd") + shape.flops("bwd")
    assert shape.flops("fwd+bwd") / 790e12 * 1e3 == pytest.approx(milliseconds, rel=0.03)


def test_losses_of_every_kind():
    several = LossShape("", 4, 768, captions=2, negatives=3)
    assert several.texts == 11 and several.flops("fwd") == 2 * 4 * 11 * 768
    assert several.prefixes == [64, 128, 256, 512, 768]
    assert [LossShape("", 4, width).prefixes for width in (40, 64, 72)] == [[40], [64], [64, 72]]
    kinds = [case.shape for case in SUITES["losses"].cases if case.cpu]
    assert len(kinds) == 7 and {shape.texts for shape in kinds} == {4096}


def test_attention_of_so400m_384_at_batch_64():
    shape = AttentionShape("", 64, 729, 16, 72)
    assert shape.flops("fwd") / 1e9 == pytest.approx(157, abs=0.5)
    assert shape.flops("fwd") / 790e12 * 1e6 == pytest.approx(198, abs=1)
    assert shape.bytes("fwd", 2) / 4.3e12 * 1e6 == pytest.approx(100, abs=1)
    assert shape.flops("bwd") == 2.5 * shape.flops("fwd")


def test_sequences_count_without_their_padding():
    shape = SequencesShape("", 3, 40, 2, 8)
    lengths = shape.lengths()
    assert len(lengths) == 3 and lengths[0] == 40 and all(10 <= length <= 40 for length in lengths)
    assert shape.flops("fwd") == sum(4 * 2 * 8 * length**2 for length in lengths)
    assert shape.bytes("fwd+bwd", 2) == 2 * 12 * 2 * 8 * sum(lengths)
    packed, padded = (
        OPERATIONS[f"{name}_attention"].inputs(shape, torch.float32, "cpu", torch.Generator())
        for name in ("packed", "padded")
    )
    assert packed.constants["cu_seqlens"].diff().tolist() == lengths == padded.constants["lengths"].tolist()
    assert packed.tensors["q"].shape == (sum(lengths), 2, 8) and padded.last(1).tensors["q"].shape == (1, 40, 2, 8)


def test_levels_to_resize_are_bytes():
    shape = ResizeShape("", 2, 5, 7, 3)
    assert shape.bytes("fwd", 4) == 2 * 3 * (5 * 7 + 4 * 3 * 3)
    inputs = OPERATIONS["resize_normalize"].inputs(shape, torch.bfloat16, "cpu", torch.Generator())
    assert inputs.bytes() == 2 * 3 * 5 * 7 + 2 * 3 * 4


def test_small_shapes_by_hand():
    assert LinearShape("", 2, 3, 5).flops("fwd") == 2 * 2 * 3 * 5
    assert LinearShape("", 2, 3, 5).flops("fwd+bwd") == 3 * 60
    assert LinearShape("", 2, 3, 5).bytes("fwd", 2) == 2 * (6 + 15 + 10)
    assert LinearShape("", 2, 3, 5, residual=True).bytes("fwd", 2) == 2 * (6 + 15 + 10 + 10)
    # dy and x and W are read; dx and dW are written
    assert LinearShape("", 2, 3, 5).bytes("bwd", 4) == 4 * (10 + 6 + 15 + 6 + 15)
    assert MLPShape("", 2, 3, 5).flops("fwd") == 2 * (2 * 2 * 3 * 5)
    assert QKVShape("", 2, 4, 2).flops("fwd") == 3 * (2 * 2 * 4 * 4)
    # the four projections, then scores and values; in the backward the projections twice and five products of attention
    half = PreNormAttentionShape("", batch=2, tokens=3, heads=2, head_dim=4)
    assert half.flops("fwd") == 4 * (2 * 2 * 3 * 8 * 8) + 2 * (2 * 2 * 2 * 3 * 3 * 4)
    assert half.flops("bwd") == 8 * (2 * 2 * 3 * 8 * 8) + 5 * (2 * 2 * 2 * 3 * 3 * 4)
    assert half.bytes("fwd+bwd", 2) == 2 * (5 * 2 * 3 * 8 + 12 * 8 * 8)
    assert NormShape("", 2, 3).bytes("fwd", 4) == 4 * 12
    assert NormShape("", 2, 3).bytes("bwd", 4) == 4 * 18
    assert PatchShape("", 2, 28, 14, 5).tokens == 4
    assert PatchShape("", 2, 28, 14, 5).flops("fwd") == 2 * 2 * 4 * (3 * 14 * 14) * 5
    # scores and pooling for each of 2 heads, then the values' and the output projection
    assert PoolShape("", 3, 7, 4, 2).flops("fwd") == 2 * (2 * 3 * 7 * 4 * 2) + 2 * (2 * 3 * 4 * 4)


def test_training_is_three_forwards_of_both_towers_and_the_loss():
    shape = TrainShape("", "base-224", 16)
    towers = 16 * (MODELS["base-224"].vision.flops() + MODELS["base-224"].text.flops())
    assert shape.flops("fwd+bwd") == 3 * towers + 6 * 16**2 * 768
    assert TrainShape("", "base-224", 16, layers=2).flops("fwd+bwd") < shape.flops("fwd+bwd") / 5


def test_every_case_has_a_unique_name_and_a_sample_that_is_no_larger():
    for suite in SUITES.values():
        named = [(case.operation, case.shape.name) for case in suite.cases]
        assert len(named) == len(set(named)), suite.name
        for case in suite.cases:
            assert isinstance(case.shape, OPERATIONS[case.operation].shape_class)
            assert case.shape.sample().flops("fwd") <= case.shape.flops("fwd")
            assert case.shape.sizes() == dataclasses.asdict(case.shape)


def test_parse():
    assert parse(LinearShape, "rows=3,inputs=4,outputs=5,residual=1") == LinearShape(
        "rows=3,inputs=4,outputs=5,residual=1", 3, 4, 5, True
    )
    assert parse(ModelShape, "model=base-224,batch=3").sizes()["layers"] == 0


@pytest.mark.parametrize(
    "text", ["rows=3", "rows=x,inputs=4,outputs=5", "rows=3,inputs=4,outputs=5,width=1", "rows=0,inputs=4,outputs=5"]
)
def test_parse_names_the_fields(text):
    with pytest.raises(ValueError, match="supported"):
        parse(LinearShape, text)


@pytest.mark.parametrize(("peaked", "within"), [(0, (0, 0)), (10, (9, 11)), (25, (24, 26)), (100, (99, 100))])
@pytest.mark.parametrize(("tokens", "head_dim"), [(729, 72), (1024, 64)])
def test_peaked_queries_give_more_than_half_of_their_weight_to_one_key(tokens, head_dim, peaked, within):
    (case,) = SUITES["attention"]._named([f"batch=1,tokens={tokens},heads=2,head_dim={head_dim},peaked={peaked}"])
    operation = OPERATIONS["attention"]
    tensors = operation.inputs(case.shape, torch.bfloat16, "cpu", torch.Generator().manual_seed(0)).tensors
    q, k = (tensors[name].float().transpose(1, 2) for name in "qk")
    heaviest = (q @ k.transpose(-1, -2) * head_dim**-0.5).softmax(-1).amax(-1)
    assert within[0] <= 100 * (heaviest > 0.5).float().mean() <= within[1]


def test_peaked_shapes_have_names_and_are_checked():
    names = SUITES["attention"].shape_names()
    assert "so400m-384-peaked-b64" in names and "so400m-384-b64" in names
    for shapes in (checked.QUICK, checked.THOROUGH, checked.TINY):
        assert any(isinstance(shape, AttentionShape) and shape.peaked for shape in shapes["attention"])
    with pytest.raises(ValueError, match="peaked is 101; supported: 0 to 100"):
        parse(AttentionShape, "batch=1,tokens=9,heads=1,head_dim=8,peaked=101")


def test_parse_lists_the_models():
    with pytest.raises(ValueError, match="so400m-384"):
        parse(ModelShape, "model=huge,batch=1")
