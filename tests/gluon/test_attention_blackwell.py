"""Attention's forward kernel for Blackwell, emulated: numbers, ragged shapes, lengths, marks, strides, dispatch."""

import contextlib
import dataclasses
import math

import pytest
import torch
from attention_cases import check_attention, random_inputs, scores_of
from hopper_emulator.faults import Fault
from hopper_emulator.launch import emulating

from bench.compiled.ahead_of_time import GPUS
from siglip_kernels import UnsupportedInputError, attention, reference
from siglip_kernels.attention import blackwell, blackwell_forward, hopper_forward
from siglip_kernels.attention.blackwell import attention_forward_blackwell
from siglip_kernels.device import pretend

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the portable kernels on CPU tensors: interpreter")
# Few multiprocessors, so that each program has several tiles.
BLACKWELL = dataclasses.replace(GPUS["b200"], multiprocessors=2)


@pytest.fixture(autouse=True)
def poison():
    """torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def on_blackwell(seed=0):
    with pretend(BLACKWELL), emulating(seed):
        yield


def run(q, k, v, seed=0, scale=None, lengths=None):
    """out, and the natural logarithm of the sum of exponentials."""
    with on_blackwell(seed):
        out, log_sum_exp = attention_forward_blackwell(q, k, v, lengths, scale or q.shape[3] ** -0.5, True)
    return out, log_sum_exp * math.log(2)


def check(q, k, v, seed=0, scale=None, lengths=None):
    out, log_sum_exp = run(q, k, v, seed, scale, lengths)
    check_attention(out, log_sum_exp, q, k, v, scale, lengths)
    return out


@pytest.mark.parametrize("tokens", [1, 65, 128, 200])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_lengths_and_head_dims(tokens, head_dim):
    dtype = torch.float16 if (tokens + head_dim) % 3 == 0 else torch.bfloat16
    check(*random_inputs(1, tokens, tokens, 1, head_dim, dtype), seed=tokens)


@pytest.mark.parametrize(("tokens", "head_dim"), [(729, 72), (577, 64)])
def test_the_lengths_of_models(tokens, head_dim):
    check(*random_inputs(1, tokens, tokens, 1, head_dim))


@pytest.mark.parametrize(("query_tokens", "key_tokens", "head_dim"), [(150, 300, 72), (260, 130, 64)])
def test_every_interleaving_gives_the_same(query_tokens, key_tokens, head_dim):
    """Bitwise, for three heads on two programs."""
    inputs = random_inputs(1, query_tokens, key_tokens, 3, head_dim)
    first = run(*inputs, seed=100)
    assert not first[0].isnan().any()
    for seed in range(4):
        again = run(*inputs, seed=seed)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize(("query_tokens", "key_tokens"), [(1, 130), (130, 1), (257, 129), (7, 256), (129, 17)])
def test_ragged_tails(query_tokens, key_tokens):
    check(*random_inputs(2, query_tokens, key_tokens, 1, 72))


@pytest.mark.parametrize("head_dim", [8, 40, 88, 120])
def test_every_other_head_dim(head_dim):
    check(*random_inputs(1, 66, 150, 1, head_dim, torch.float16))


@pytest.mark.parametrize("head_dim", [64, 72])
def test_keys_beyond_the_length_are_not_read(head_dim):
    q, k, v = random_inputs(8, 66, 300, 1, head_dim)
    lengths = torch.tensor([0, 1, 63, 128, 129, 256, 300, 299], dtype=torch.int32)
    packed = torch.stack([k, v], 2)
    packed[torch.arange(300) >= lengths[:, None]] = float("nan")
    want = check(q, k, v, lengths=lengths)
    out, _ = run(q, *packed.unbind(2), seed=1, lengths=lengths)
    assert torch.equal(out, want) and not out[0].any()


def test_lengths_are_taken_into_the_range():
    q, k, v = random_inputs(2, 66, 140, 1, 72)
    out, _ = run(q, k, v, lengths=torch.tensor([-5, 900], dtype=torch.int32))
    want, _ = run(q, k, v, lengths=torch.tensor([0, 140], dtype=torch.int32))
    assert torch.equal(out, want)


def test_no_keys_and_no_batch():
    out, log_sum_exp = run(*random_inputs(2, 66, 0, 1, 72))
    assert not out.any() and (log_sum_exp == float("inf")).all()
    assert run(*random_inputs(0, 66, 80, 1, 72))[0].shape == (0, 66, 1, 72)


def test_packed_expanded_and_misaligned_tensors():
    q, k, v = torch.randn(2, 100, 3, 2, 72, generator=torch.Generator().manual_seed(1)).bfloat16().unbind(2)
    want = check(q, k, v)
    assert torch.equal(want, run(q.contiguous(), k.contiguous(), v.contiguous())[0])
    odd = torch.zeros(2, 100, 2, 75, dtype=torch.bfloat16)[..., 1:73].copy_(k)
    assert torch.equal(want, run(q, odd, v)[0])
    expanded = v[:1].expand(2, -1, -1, -1)
    assert torch.equal(run(q, k, expanded)[0], run(q, k, expanded.contiguous())[0])


@pytest.mark.parametrize("scale", [-0.3, 1e-30, 3.0])
def test_scales(scale):
    check(*random_inputs(1, 70, 150, 1, 64), scale=scale)


@pytest.mark.parametrize("size", [80.0, 1e4])
def test_extreme_logits(size):
    q, k, v = random_inputs(1, 70, 150, 1, 72, torch.bfloat16)
    scale = size / scores_of(q, k, 1.0).abs().max().item()
    out, _ = run(q, k, v, scale=scale)
    truth = reference.attention(q.double(), k.double(), v.double(), scale=scale)
    assert (out.double() - truth).norm() <= 2**-7 * truth.norm()


@pytest.mark.parametrize("keys", [slice(128, 150), slice(0, 128)])
def test_keys_that_are_infinitely_far_weigh_nothing(keys):
    """All scores of a step are -inf, in the first step or a later one."""
    q, k, v = random_inputs(1, 70, 150, 1, 64)
    q, k = q.abs(), k.clone()
    k[0, keys, 0, 0] = float("-inf")
    check(q, k, v)


def test_an_outlier():
    q, k, v = random_inputs(1, 70, 150, 1, 72, torch.float16)
    q[0, 3], k[0, 140] = 6.0, 6.0
    check(q, k, v)


@interpreted
def test_through_the_public_operation_with_gradients(monkeypatch):
    """The portable backward takes the log-sum-exp of the emulated forward, with the marks of rows with a large weight;
    some rows have one."""
    q, k, v = random_inputs(1, 70, 130, 1, 72)
    q[0, ::7] *= 6
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out_grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    portable = attention(*inputs)
    want = torch.autograd.grad(portable, inputs, out_grad)
    monkeypatch.setenv("SIGLIP_KERNELS_BLACKWELL", "1")
    with on_blackwell():
        out = attention(*inputs)
    found = torch.autograd.grad(out, inputs, out_grad)
    for one, other in zip((out, *found), (portable, *want), strict=True):
        assert (one.double() - other.double()).norm() <= 2**-7 * other.double().norm()


@interpreted
def test_rows_are_marked_as_by_the_portable_kernel():
    from siglip_kernels.attention.forward import attention_forward

    q, k, v = random_inputs(1, 70, 130, 1, 64)
    q[0, ::7] *= 6
    with on_blackwell():
        _, found = attention_forward_blackwell(q, k, v, None, 0.125, True)
    _, want = attention_forward(q, k, v, None, 0.125, True)
    weights = scores_of(q, k, 0.125).softmax(-1).amax(-1)
    clear = (weights - 0.125).abs() > 1e-3
    marks = found.view(torch.int32) & 1
    assert torch.equal(marks[clear], (weights > 0.125)[clear].int()) and 0 < int(marks.sum()) < marks.numel()
    assert torch.equal(marks[clear], (want.view(torch.int32) & 1)[clear])


@interpreted
def test_lengths_are_served_by_the_portable_kernel(monkeypatch):
    """A Gluon kernel could not run outside of the emulator."""
    monkeypatch.setenv("SIGLIP_KERNELS_BLACKWELL", "1")
    q, k, v = random_inputs(2, 70, 70, 1, 64)
    with pretend(BLACKWELL):
        out = attention(q, k, v, lengths=torch.tensor([0, 30], dtype=torch.int32))
    assert not out[0].any() and out[1].isfinite().all()


@interpreted
def test_chosen_only_where_asked_for(monkeypatch):
    inputs = random_inputs(1, 70, 70, 1, 64)
    with pretend(BLACKWELL):
        attention(*inputs)  # the portable kernel: a Gluon kernel cannot run outside of the emulator
    monkeypatch.setenv("SIGLIP_KERNELS_BLACKWELL", "1")
    with pytest.raises(
        UnsupportedInputError, match=r"q is on interpreter; supported: data-centre Blackwell \(sm_100\)"
    ):
        attention(*inputs)
    with on_blackwell(), pytest.raises(UnsupportedInputError, match=r"attention: q has dtype torch.float32"):
        attention(*(x.float() for x in inputs))


# A line of the kernel or of what it shares with Hopper's, and what breaks it.
BROKEN = {
    "the producer does not wait": ("    mbarrier.wait(empty.index(index), phase ^ 1)\n", ""),
    "the producer counts the main part alone": ("main_bytes + tail_bytes)", "main_bytes)"),
    "products do not wait for the values": (
        "            mbarrier.wait(v_full.index(stage), phase)\n            mbarrier.wait(k_full.index(k_stage)",
        "            mbarrier.wait(k_full.index(k_stage)",
    ),
    "products do not wait for the keys": (
        "            mbarrier.wait(k_full.index(k_stage), k_phase, pred=goes_on)\n",
        "",
    ),
    "products do not wait for the queries": ("mbarrier.wait(q_full.index(i), q_phase, pred=ends)", "pass"),
    "products do not wait for the weights": ("                mbarrier.wait(weighed.index(i), step_phase)\n", ""),
    "products do not wait for the rescaled output": (
        "                mbarrier.wait(rescaled.index(i), step_phase)\n",
        "",
    ),
    "queries are released early": ("gl.where(ends, next_whole == 0, step + 1 == whole)", "step + 2 == whole"),
    "values are released by an arrival": (
        "tcgen05_commit(v_empty.index(stage))",
        "mbarrier.arrive(v_empty.index(stage), count=1)",
    ),
    "keys are never released": (
        "            if goes_on:\n                tcgen05_commit(k_empty.index(k_stage))\n",
        "",
    ),
    "the output starts from what is there": ("use_acc=step > 0", "use_acc=True"),
    "scores are announced before they are computed": (
        "    tcgen05_commit(scored.index(TILE))",
        "    mbarrier.arrive(scored.index(TILE), count=1)",
    ),
    "scores are read before they are computed": (
        "            mbarrier.wait(scored.index(TILE), phase)\n            phase ^= 1\n            left",
        "            phase ^= 1\n            left",
    ),
    "weights are announced before they are stored": (
        "        running_sum = store_weights(left, right, weights, exponent_scale, running_max)\n"
        "        mbarrier.arrive(weighed.index(TILE), count=1)\n",
        "        mbarrier.arrive(weighed.index(TILE), count=1)\n"
        "        running_sum = store_weights(left, right, weights, exponent_scale, running_max)\n",
    ),
    "a factor is overwritten": ("    mbarrier.wait(spent.index(TILE), phase ^ 1)\n", ""),
    "a factor is read too early": ("    mbarrier.wait(factored.index(TILE), phase)\n", ""),
    "the output is rescaled under its product": (
        "                mbarrier.wait(summed.index(i), phase)\n                for part",
        "                for part",
    ),
    "the output is stored before its last product": (
        "            mbarrier.wait(summed.index(i), phase)\n            tma",
        "            tma",
    ),
    "the output is staged over a store": ("            tma.store_wait(0)\n            row", "            row"),
    "the output is handed back before it is read": (
        "    tma.store_wait(0)\n\n\n@gluon.jit\ndef accumulators",
        "\n\n@gluon.jit\ndef accumulators",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_fault_in_the_kernel_is_found(broken, plant):
    """Each of these is found under every seed, by a fault or by its numbers."""
    plant(BROKEN[broken], [hopper_forward, blackwell_forward], blackwell, "attention_forward_blackwell_kernel")
    inputs = random_inputs(1, 70, 690, 3, 72)
    for seed in range(2):
        with pytest.raises((Fault, AssertionError)):
            check(*inputs, seed=seed)
