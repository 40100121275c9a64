"""Attention's forward kernel for Hopper, emulated: numbers, ragged shapes, lengths, strides, dispatch."""

import math

import pytest
import torch
from attention_cases import check_attention, random_inputs, scores_of
from hopper_emulator.faults import Fault
from hopper_emulator.gpu import HOPPER, on_hopper

from siglip_kernels import MissingBackendError, UnsupportedInputError, attention, reference
from siglip_kernels.attention import hopper, hopper_forward
from siglip_kernels.attention.hopper import attention_forward_hopper, forward_tile, last_keys
from siglip_kernels.device import pretend

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the portable kernels on CPU tensors: interpreter")


@pytest.fixture(autouse=True)
def poison():
    """torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(q, k, v, seed=0, scale=None, lengths=None):
    """out, and the natural logarithm of the sum of exponentials."""
    with on_hopper(seed):
        out, log_sum_exp = attention_forward_hopper(q, k, v, lengths, scale or q.shape[3] ** -0.5, True)
    return out, log_sum_exp * math.log(2)


def check(q, k, v, seed=0, scale=None, lengths=None):
    """The error budget; the statistics as fp32 makes them."""
    out, log_sum_exp = run(q, k, v, seed, scale, lengths)
    check_attention(out, log_sum_exp, q, k, v, scale, lengths)
    return out


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_marks_of_rows_in_which_one_key_has_most_of_the_weight(scale):
    """The backward makes their delta exact. lengths: a sample without keys, one with a single key, one with all."""
    q, k, v = random_inputs(3, 70, 150, 2, 64)
    q[:, ::3] *= 4
    lengths = torch.tensor([0, 1, 150], dtype=torch.int32)
    with on_hopper():
        _, log_sum_exp = attention_forward_hopper(q, k, v, lengths, scale, True)
    hidden = torch.arange(150) >= lengths[:, None]
    largest = scores_of(q, k, scale).masked_fill(hidden[:, None, None], float("-inf")).softmax(-1).amax(-1).nan_to_num()
    marked = log_sum_exp.view(torch.int32) % 2 == 1
    assert marked[largest > 0.126].all() and not marked[largest < 0.124].any()
    assert marked[2].any() and not marked[2].all() and log_sum_exp[0].isinf().all()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_lengths_and_head_dims(tokens, head_dim):
    dtype = torch.float16 if (tokens + head_dim) % 3 == 0 else torch.bfloat16
    check(*random_inputs(1, tokens, tokens, 2, head_dim, dtype), seed=tokens)


@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(729, 64), (729, 72), (729, 80), (729, 96), (729, 128), (577, 64), (1024, 128)]
)
def test_the_lengths_of_models(tokens, head_dim):
    check(*random_inputs(1, tokens, tokens, 1, head_dim))


@pytest.mark.parametrize(("query_tokens", "key_tokens", "head_dim"), [(150, 300, 72), (190, 257, 64), (260, 130, 128)])
def test_every_interleaving_gives_the_same(query_tokens, key_tokens, head_dim):
    """Bitwise, for three heads on two programs; 190 queries at head dim 64 take three consumers."""
    inputs = random_inputs(1, query_tokens, key_tokens, 3, head_dim)
    first = run(*inputs, seed=100)
    assert not first[0].isnan().any()
    for seed in range(8):
        again = run(*inputs, seed=seed)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize(("query_tokens", "key_tokens"), [(1, 130), (130, 1), (65, 129), (7, 256), (129, 17)])
def test_ragged_tails(query_tokens, key_tokens):
    check(*random_inputs(2, query_tokens, key_tokens, 2, 72))


@pytest.mark.parametrize("head_dim", [8, 24, 40, 56, 88, 104, 120])
def test_every_other_head_dim(head_dim):
    check(*random_inputs(1, 66, 150, 1, head_dim, torch.float16))


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("seed", range(2))
def test_keys_beyond_the_length_are_not_read(head_dim, seed):
    q, k, v = random_inputs(8, 66, 300, 1, head_dim)
    lengths = torch.tensor([0, 1, 63, 128, 129, 256, 300, 299], dtype=torch.int32)
    packed = torch.stack([k, v], 2)
    packed[torch.arange(300) >= lengths[:, None]] = float("nan")
    want = check(q, k, v, seed, lengths=lengths)
    out, _ = run(q, *packed.unbind(2), seed=seed, lengths=lengths)
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
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(want, run(*heads_first)[0])
    odd = torch.zeros(2, 100, 2, 75, dtype=torch.bfloat16)[..., 1:73].copy_(k)
    assert torch.equal(want, run(q, odd, v)[0])
    off = torch.zeros(v.numel() + 1, dtype=torch.bfloat16)[1:].view(v.shape).copy_(v)
    assert off.is_contiguous() and torch.equal(want, run(q, k, off)[0])
    alone = torch.as_strided(torch.zeros(20_000, dtype=torch.bfloat16), (1, *v.shape[1:]), (14_403, 144, 72, 1))
    assert torch.equal(want[:1], run(q[:1], k[:1], alone.copy_(v[:1]))[0])
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


def test_equal_rows_and_an_outlier():
    q, k, v = random_inputs(1, 70, 150, 1, 72, torch.float16)
    k[:] = k[:, :1]
    check(q, k, v)
    q, k, v = random_inputs(1, 70, 150, 1, 72, torch.float16)
    q[0, 3], k[0, 140] = 6.0, 6.0
    check(q, k, v)


@interpreted
def test_through_the_public_operation_with_gradients(monkeypatch):
    """The portable backward takes the log-sum-exp of the emulated forward."""
    inputs = [x.requires_grad_() for x in random_inputs(1, 70, 130, 1, 72)]
    out_grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "0")
    portable = attention(*inputs)
    want = torch.autograd.grad(portable, inputs, out_grad)
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "1")
    with on_hopper():
        out = attention(*inputs)
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "0")
    found = torch.autograd.grad(out, inputs, out_grad)
    for one, other in zip((out, *found), (portable, *want), strict=True):
        assert (one.double() - other.double()).norm() <= 2**-7 * other.double().norm()


@interpreted
def test_chosen_only_where_asked_for(monkeypatch):
    inputs = random_inputs(1, 70, 70, 1, 64)
    with pretend(HOPPER):
        attention(*inputs)  # the portable kernel: a Gluon kernel cannot run outside of the emulator
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "1")
    with pytest.raises(UnsupportedInputError, match=r"attention: q is on interpreter; supported: Hopper \(sm_90\)"):
        attention(*inputs)
    with on_hopper(), pytest.raises(UnsupportedInputError, match=r"attention: q has dtype torch.float32"):
        attention(*(x.float() for x in inputs))
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "yes")
    with pytest.raises(MissingBackendError, match="SIGLIP_KERNELS_HOPPER is 'yes'"):
        attention(*inputs)


def test_columns_follow_the_keys():
    """729 keys cost 736 columns and 577 cost 592; FlashAttention-3's tiles of 144 would cost 864 and 720."""
    for tokens, columns in ((729, 736), (577, 592), (576, 576), (1024, 1024), (196, 208), (1, 16), (127, 128)):
        last, first_part = last_keys(tokens, 128, False)
        whole = tokens // 128 if last == 0 else (tokens - 1) // 128
        assert whole * 128 + last == columns
        assert last == 0 or (first_part in (16, 32, 64, 128) and last - first_part in (0, 16, 32, 64))
    assert last_keys(729, 128, True) == (128, 128)


def test_rows_follow_the_queries():
    """As few tiles of 64 queries as two or three consumers allow."""
    for tokens, consumers in ((729, 3), (576, 3), (1024, 2), (256, 2), (196, 2), (577, 2)):
        assert (
            forward_tile(64, tokens, 96, False).consumers == forward_tile(64, tokens, 128, True).consumers == consumers
        )
    assert forward_tile(72, 729, 96, False).consumers == forward_tile(64, 767, 128, False).consumers == 2


# A line of the kernel, and what breaks it. (Keys released too early are no fault: the producer's wait for the stage
# of values before them comes later.)
BROKEN = {
    "values are released before they are read": (
        "                out = wait_for_all(out)\n                mbarrier.arrive(v_empty.index(stage), count=1)\n",
        "                mbarrier.arrive(v_empty.index(stage), count=1)\n                out = wait_for_all(out)\n",
    ),
    "one product too many is left in flight": ("_wait(PARTS, deps=(scores,))", "_wait(PARTS + 1, deps=(scores,))"),
    "the producer does not wait": ("    mbarrier.wait(empty.index(index), phase ^ 1)\n", ""),
    "the producer counts the main part alone": ("main_bytes + tail_bytes)", "main_bytes)"),
    "a consumer does not wait for its queries": ("        mbarrier.wait(q_full.index(mine), q_phase)\n", ""),
    "queries are never released": ("        mbarrier.arrive(q_empty.index(mine), count=1)\n", ""),
    "the phase of the ring does not turn": ("gl.where(wraps, phase ^ 1, phase)", "phase"),
    "a turn is not passed on": (
        "out, 0)\n                mbarrier.arrive(next_turn, count=1)\n", "out, 0)\n"
    ),
    "the output is staged over a store": ("        tma.store_wait(0)\n        store_rows(", "        store_rows("),
    "the output is stored without a fence": ("    fence_async_shared()\n    async_store", "    async_store"),
    "the last store is not waited for": ("query_tokens)\n    tma.store_wait(0)\n", "query_tokens)\n"),
    "one consumer is enough to empty a stage": ("k_empty.index(i), count=CONSUMERS)", "k_empty.index(i), count=1)"),
    "the first consumer waits for a turn that never comes": ("1 if CONSUMER == 0 else 0", "0"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_fault_in_the_kernel_is_found(broken, plant):
    """Each of these compiles, and each is found under every seed."""
    plant(BROKEN[broken], [hopper_forward], hopper, "attention_forward_hopper_kernel")
    q, k, v = random_inputs(1, 70, 690, 5, 72)
    for seed in range(2):
        with pytest.raises(Fault):
            run(q, k, v, seed=seed)
