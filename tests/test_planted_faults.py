"""Plants one fault at a time in a copy of siglip_kernels; the default tests of the faulty operation must catch it.

    pytest -m thorough -rP tests/test_planted_faults.py      # -rP reports which test caught each fault

Each case runs pytest on the copy until the first failure. A fault that no default test catches fails. That each text
to replace still occurs once in the source is a default test.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from planting import package_with_fault
from pytest_forks import PytestForks

ROOT = Path(__file__).parent.parent


class Planted(NamedTuple):
    file: str  # in siglip_kernels
    text: str  # occurs in it exactly once
    replacement: str
    tests: str  # in tests


ATTENTION = "kernels/attention/test_attention.py"
PACKED = "kernels/attention/test_variable_length.py"
PACKED_REGISTRATION = "kernels/attention/test_variable_length_registration.py"
LINEAR, MLP = "kernels/linear/test_linear.py", "kernels/mlp/test_mlp.py"
SMALL_BATCHES = "kernels/linear/test_linear_small_batches.py"
FP8, FP8_WEIGHTS = "kernels/fp8/test_fp8_operations.py", "kernels/fp8/test_fp8_weights.py"
LAYER_NORM = "kernels/layer_norm/test_layer_norm.py"
PRE_NORM_ATTENTION = "kernels/pre_norm_attention/test_pre_norm_attention.py"
PACKED_PRE_NORM_ATTENTION = "kernels/pre_norm_attention/test_packed_pre_norm_attention.py"
RESIZE = "kernels/resize_normalize/test_resize_normalize.py"
PATCH_EMBED = "kernels/patch_embed/test_patch_embed.py"
POOL = "kernels/attention_pool/test_attention_pool.py"
LOSS = "kernels/sigmoid_loss/test_sigmoid_loss.py"
LOSS_OPTIONS = "kernels/sigmoid_loss/test_sigmoid_loss_options.py"
ATTENTION_HOPPER = "gluon/test_attention_hopper.py"
ATTENTION_HOPPER_BACKWARD = "gluon/test_attention_hopper_backward.py"
LINEAR_HOPPER = "gluon/test_linear_hopper.py"
FP8_HOPPER = "gluon/test_fp8_hopper.py"
LOSS_HOPPER = "gluon/test_sigmoid_loss_hopper.py"
LINEAR_BLACKWELL = "gluon/test_linear_blackwell.py"
ATTENTION_BLACKWELL = "gluon/test_attention_blackwell.py"

CONSTANTS = {
    "attention forward: normaliser": Planted(
        "attention/forward.py", "1.0 / running_sum", "1.01 / running_sum", ATTENTION
    ),
    "attention forward: log-sum-exp": Planted(
        "attention/forward.py", "running_max + tl.log2(running_sum)", "running_max + tl.log(running_sum)", ATTENTION
    ),
    "attention backward, queries: scale": Planted(
        "attention/backward.py", "q_grad_main * scale", "q_grad_main * scale * 1.01", ATTENTION
    ),
    "attention backward, keys: scale": Planted(
        "attention/backward.py", "k_grad_main * scale", "k_grad_main * scale * 1.01", ATTENTION
    ),
    "attention backward: what counts as rounding": Planted(
        "attention/backward.py", "tl.abs(row_delta) * 2**-16", "tl.abs(row_delta) * 2**-4", ATTENTION
    ),
    "short attention forward: normaliser": Planted(
        "attention/short.py", "out_main *= normaliser[:, None]", "out_main *= normaliser[:, None] * 1.01", ATTENTION
    ),
    "short attention backward, queries: scale": Planted(
        "attention/short.py", "grad_main *= scale", "grad_main *= scale * 1.01", ATTENTION
    ),
    "short attention backward, keys: scale": Planted(
        "attention/short.py", "grad_main * scale, 0.0)", "grad_main * scale * 1.01, 0.0)", ATTENTION
    ),
    "packed sequences: number of slots": Planted(
        "attention/sequences.py", "tokens // block + len(", "tokens // block - 1 + len(", PACKED
    ),
    "packed sequences: the sequence of a slot": Planted(
        "attention/sequences.py", "+ candidate <= slot", "+ candidate < slot", PACKED
    ),
    "packed sequences: the second step of the search": Planted(
        "attention/sequences.py", "first += passed", "first = passed", PACKED
    ),
    "packed sequences: the tile of a slot": Planted(
        "attention/sequences.py", "tile -= start // BLOCK + sequence", "tile -= start // BLOCK", PACKED
    ),
    "packed sequences: the end of the keys": Planted(
        "attention/sequences.py", "maximum(other_end - other_start, 0)", "maximum(other_end - other_start - 1, 0)",
        PACKED,
    ),
    "packed sequences: negative starts": Planted(
        "attention/sequences.py", "tl.load(starts + index), 0)", "tl.load(starts + index), -9)", PACKED
    ),
    "packed sequences: boundaries of keys": Planted(
        "attention/dispatch.py", "cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k", "cu_seqlens_q", PACKED
    ),
    "packed sequences: the gradient of the values alone": Planted(
        "attention/variable_length.py", "needs_q, needs_k or needs_v\n", "needs_q, needs_k\n", PACKED
    ),
    "packed sequences: what is kept": Planted(
        "attention/variable_length.py", "= wants_gradients(q, k, v)", "= wants_gradients(q, k)", PACKED
    ),
    "packed sequences: the longest sequence": Planted(
        "attention/boundaries.py", "end - start > longest", "end - start > longest + 1", PACKED_REGISTRATION
    ),
    "packed sequences: the last boundary": Planted(
        "attention/boundaries.py", "values[-1] > tokens", "values[-1] > tokens + 1", PACKED_REGISTRATION
    ),
    "packed pre-norm attention: tokens of no sequence": Planted(
        "pre_norm_attention/api.py", "not (lengths is None and cu_seqlens is None)", "lengths is not None",
        PACKED_PRE_NORM_ATTENTION,
    ),
    "GEMM: products": Planted(
        "gemm/kernels.py", "products = tl.zeros((", "products = 0.01 + tl.zeros((", LINEAR
    ),
    "GEMM: bias": Planted(
        "gemm/kernels.py", "other=0.0))[None, :]", "other=0.0))[None, :] * 1.01", LINEAR
    ),
    "GEMM: residual": Planted(
        "gemm/kernels.py", "value += widen(added)", "value += widen(added) * 1.01", LINEAR
    ),
    "GEMM: GELU": Planted("gemm/gelu.py", "0.7978845608028654 * 0.044715)\n_SLOPE", "0.79 * 0.044715)\n_SLOPE", MLP),
    "GEMM: GELU's derivative": Planted("gemm/gelu.py", "* 3 * 0.044715", "* 2 * 0.044715", MLP),
    "fp8: scale of a row": Planted("fp8/quantise.py", "largest / _LARGEST, mask", "largest / 440, mask", FP8),
    "fp8: bound of the next row": Planted("fp8/quantise.py", "norm * tl.load(gains) +", "0.02 * norm +", FP8),
    "fp8: GELU": Planted("gemm/gelu.py", "_ROOT_CUBIC = tl.constexpr(0.797", "_ROOT_CUBIC = tl.constexpr(0.597", FP8),
    "fp8: scale of the result": Planted("gemm/kernels.py", "half = 0.5 /", "half = 0.51 /", FP8),
    "fp8 on Hopper: scale of the result": Planted(
        "gemm/hopper.py", "half_scales = 0.5 /", "half_scales = 0.51 /", FP8_HOPPER
    ),
    "fp8 on Hopper: scale of a column": Planted(
        "gemm/hopper.py", "* of_columns[None, :]", "* of_columns[None, :] * 1.01", FP8_HOPPER
    ),
    "fp8: weights that changed": Planted("fp8/weights.py", "kept.state == state", "kept.state", FP8_WEIGHTS),
    "GEMM: column sums": Planted("gemm/kernels.py", "tl.sum(value, 0), mask", "tl.sum(value, 0) * 1.01, mask", MLP),
    "GEMM, split depth: where a range starts": Planted(
        "gemm/kernels.py", "first_k = split * SPLIT_DEPTH", "first_k = 0 * split", SMALL_BATCHES
    ),
    "GEMM, split depth: where a range ends": Planted(
        "gemm/kernels.py", "tl.minimum(first_k + SPLIT_DEPTH, DEPTH)", "DEPTH", SMALL_BATCHES
    ),
    "GEMM, split depth: number of partial sums": Planted(
        "gemm/kernels.py", "tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)", SMALL_BATCHES
    ),
    "layer norm forward: eps": Planted(
        "layer_norm/kernels.py", "tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance + 1.1 * eps)", LAYER_NORM
    ),
    "layer norm backward: sums of the residual": Planted(
        "layer_norm/kernels.py", "residual_sums[chunk] + residual", "residual_sums[chunk] + residual * 1.01", LAYER_NORM
    ),
    "pre-norm attention: gradient of the values' bias": Planted(
        "pre_norm_attention/api.py", "out_weight.T.float(), sums", "out_weight.T.float(), sums * 1.01",
        PRE_NORM_ATTENTION,
    ),
    "layer norm backward: projection": Planted(
        "layer_norm/kernels.py", "x_hat * projection[:, None])", "x_hat * projection[:, None] * 1.01)", LAYER_NORM
    ),
    "layer norm: parameter gradients": Planted(
        "layer_norm/kernels.py", "narrow(tl.sum(total, 0), element", "narrow(tl.sum(total, 0) * 1.01, element",
        LAYER_NORM,
    ),
    "layer norm, wide rows: variance": Planted(
        "layer_norm/kernels.py", "squares / WIDTH + eps", "squares / (WIDTH - 1) + eps", LAYER_NORM
    ),
    "layer norm, wide rows: projection": Planted(
        "layer_norm/kernels.py", "tl.sum(product_sum) / WIDTH", "tl.sum(product_sum) / (WIDTH - 99)", LAYER_NORM
    ),
    "patch embedding: position": Planted(
        "patch_embed/forward.py", "products += added.to(tl.float32)", "products += added.to(tl.float32) * 1.01",
        PATCH_EMBED,
    ),
    "patch embedding: products": Planted(
        "patch_embed/forward.py", "products = tl.zeros([", "products = 0.01 + tl.zeros([", PATCH_EMBED
    ),
    "resize: the cubic beyond one pixel": Planted(
        "resize_normalize/forward.py", "- 4.0) * -0.5", "- 4.0) * -0.4", RESIZE
    ),
    "resize: the first pixel": Planted(
        "resize_normalize/forward.py", "(centre - support + 0.5)", "(centre - support + 1.5)", RESIZE
    ),
    "resize: rounding": Planted(
        "resize_normalize/forward.py", "(levels + 8388608.0)", "(levels + 0.2 + 8388608.0)", RESIZE
    ),
    "pooling forward: normaliser": Planted(
        "attention_pool/kernels.py", "sums[chunk] * normaliser[:, None]", "sums[chunk] * normaliser[:, None] * 1.01",
        POOL,
    ),
    "pooling combine: normaliser": Planted(
        "attention_pool/kernels.py", "tl.sum(sums, 0) * normaliser", "tl.sum(sums, 0) * normaliser * 1.01", POOL
    ),
    "pooling backward: scale": Planted(
        "attention_pool/kernels.py", "head_delta[:, None]) * scale", "head_delta[:, None]) * scale * 1.01", POOL
    ),
    "loss: logarithm": Planted("sigmoid_loss/kernels.py", "p * e + 0.9999999403953552", "p * e + 0.9999", LOSS),
    "loss: logit gradient": Planted(
        "sigmoid_loss/kernels.py", "reciprocal(divisor + e * divisor)", "reciprocal(divisor + 1.01 * e * divisor)", LOSS
    ),
    "loss: weight": Planted(
        "sigmoid_loss/kernels.py", "logit_grad *= weight", "logit_grad *= 1.01 * weight", LOSS_OPTIONS
    ),
    "loss: product": Planted(
        "sigmoid_loss/kernels.py", "total *= tl.load(logit_scale_ptr)", "total *= 1.01 * tl.load(logit_scale_ptr)", LOSS
    ),
    "loss: gradients times the upstream gradient": Planted(
        "sigmoid_loss/kernels.py", "(tl.load(scale_ptr) * factor)", "(tl.load(scale_ptr) * factor * 1.01)", LOSS
    ),
}  # fmt: skip

DROPPED_WAITS = {
    "attention forward: a producer's for an empty stage": Planted(
        "attention/hopper_forward.py", "    mbarrier.wait(empty.index(index), phase ^ 1)\n", "", ATTENTION_HOPPER
    ),
    "attention forward: a consumer's for its queries": Planted(
        "attention/hopper_forward.py", "        mbarrier.wait(q_full.index(mine), q_phase)\n", "", ATTENTION_HOPPER
    ),
    "attention backward, queries: for the output": Planted(
        "attention/hopper_backward.py", "        mbarrier.wait(out_full.index(mine), slot_phase)\n", "",
        ATTENTION_HOPPER_BACKWARD,
    ),
    "attention backward, keys: for the keys": Planted(
        "attention/hopper_backward.py", "        mbarrier.wait(k_full.index(mine), slot_phase)\n", "",
        ATTENTION_HOPPER_BACKWARD,
    ),
    "attention backward, keys: for the queries": Planted(
        "attention/hopper_backward.py", "            mbarrier.wait(q_full.index(stage), phase)\n", "",
        ATTENTION_HOPPER_BACKWARD,
    ),
    "GEMM: a producer's for an empty stage": Planted(
        "gemm/ring.py", "            mbarrier.wait(emptied.index(stage), (step // STAGES & 1) ^ 1)\n", "",
        LINEAR_HOPPER,
    ),
    "GEMM: a consumer's for its block": Planted(
        "gemm/hopper_pipeline.py", "    mbarrier.wait(filled.index(stage), step // STAGES & 1)\n", "", LINEAR_HOPPER
    ),
    "GEMM: for the last product": Planted(
        "gemm/hopper_pipeline.py", "num_outstanding=0, deps", "num_outstanding=1, deps", LINEAR_HOPPER
    ),
    "GEMM epilogue: for the residual": Planted(
        "gemm/hopper.py", "mbarrier.wait(landed.index(consumer), done & 1)", "pass", LINEAR_HOPPER
    ),
    "GEMM epilogue: for the last results": Planted(
        "gemm/hopper.py", "    tma.store_wait(pendings=0)\n\n", "\n", LINEAR_HOPPER
    ),
    "attention forward on Blackwell: for the weights": Planted(
        "attention/blackwell_forward.py", "                mbarrier.wait(weighed.index(i), step_phase)\n", "",
        ATTENTION_BLACKWELL,
    ),
    "attention forward on Blackwell: for the scores": Planted(
        "attention/blackwell_forward.py",
        "            mbarrier.wait(scored.index(TILE), phase)\n            phase ^= 1\n            left",
        "            phase ^= 1\n            left",
        ATTENTION_BLACKWELL,
    ),
    "GEMM on Blackwell: for an accumulator that is being read": Planted(
        "gemm/blackwell.py", "        mbarrier.wait(drained.index(which), (done // ACCUMULATORS & 1) ^ 1)\n", "",
        LINEAR_BLACKWELL,
    ),
    "GEMM on Blackwell: for a tile's products": Planted(
        "gemm/blackwell.py", "        mbarrier.wait(finished.index(which), done // ACCUMULATORS & 1)\n", "",
        LINEAR_BLACKWELL,
    ),
    "loss: for a buffer that is being stored": Planted(
        "sigmoid_loss/hopper_kernels.py", "tma.store_wait(pendings=BUFFERS - 1)", "pass", LOSS_HOPPER
    ),
}  # fmt: skip

FAULTS = CONSTANTS | DROPPED_WAITS


@pytest.fixture(scope="session")
def forks() -> Iterator[PytestForks]:
    with PytestForks(ROOT) as forks:
        yield forks


def default_test_that_fails(forks: PytestForks, package: Path, tests: str) -> str:
    """The first default test of a file that fails on the package in this folder; "" if none does.

    An error in a fixture is no failure: it would hide that the package cannot be tested at all.
    Tests that plant faults themselves are left out: they fail on any change of the texts that they replace.
    """
    options = ["-x", "--tb=no", "-rf", "-p", "no:cacheprovider", "-k", "not a_fault_in_the_kernel"]
    options += ["-o", f"pythonpath={package} . tests/support"]
    status = forks.run([*options, f"tests/{tests}"], package / "output")
    output = (package / "output").read_text()
    assert status in (0, 1), output
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", output, re.MULTILINE)
    return failed.group(1) if failed else ""


@pytest.mark.parametrize("fault", FAULTS)
def test_what_it_replaces_occurs_once(fault: str) -> None:
    planted = FAULTS[fault]
    assert (ROOT / "siglip_kernels" / planted.file).read_text().count(planted.text) == 1, planted


@pytest.mark.thorough
@pytest.mark.parametrize("fault", FAULTS)
def test_a_default_test_catches_it(forks: PytestForks, fault: str, tmp_path: Path) -> None:
    planted = FAULTS[fault]
    package_with_fault(planted.file, planted.text, planted.replacement, tmp_path)
    caught_by = default_test_that_fails(forks, tmp_path, planted.tests)
    assert caught_by, f"no default test of {planted.tests} catches {planted.text!r} -> {planted.replacement!r}"
    print(f"{fault}: caught by {caught_by}")


@pytest.mark.thorough
@pytest.mark.parametrize("tests", [ATTENTION_HOPPER, SMALL_BATCHES])
def test_an_unchanged_copy_passes(forks: PytestForks, tests: str, tmp_path: Path) -> None:
    package_with_fault("errors.py", "def unsupported", "def unsupported", tmp_path)
    assert not default_test_that_fails(forks, tmp_path, tests)
