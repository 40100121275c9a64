"""Attention's backward kernels for Hopper, emulated: gradients, ragged shapes, lengths, strides, and their barriers."""

import pytest
import torch
from error_budget import check_error
from hopper_emulator.faults import Fault
from test_attention_hopper import interpreted, on_hopper, random_inputs

from siglip_kernels import attention, reference
from siglip_kernels.attention import hopper, hopper_backward
from siglip_kernels.attention.hopper import attention_backward_hopper, attention_forward_hopper

pytestmark = interpreted  # the kernel that makes delta exact is portable


@pytest.fixture(autouse=True)
def poison():
    """torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gradient_of(q, seed=7):
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)).to(q.dtype)


def run(q, k, v, out_grad, seed=0, scale=None, lengths=None, needs_q=True, needs_k_or_v=True, packed_grad=None):
    scale = scale or q.shape[3] ** -0.5
    with on_hopper(seed):
        out, log_sum_exp = attention_forward_hopper(q, k, v, lengths, scale, True)
        return attention_backward_hopper(
            out_grad, q, k, v, out, log_sum_exp, lengths, scale, needs_q, needs_k_or_v, packed_grad
        )  # fmt: skip


def of_reference(q, k, v, out_grad, dtype, **options):
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(reference.attention(*inputs, **options), inputs, out_grad.to(dtype))


def check(q, k, v, seed=0, **options):
    """The error budget of each gradient."""
    out_grad = gradient_of(q)
    found = run(q, k, v, out_grad, seed, **options)
    truth = of_reference(q, k, v, out_grad, torch.float64, **options)
    eager = of_reference(q, k, v, out_grad, q.dtype, **options)
    for name, one, exact, other in zip(("dq", "dk", "dv"), found, truth, eager, strict=True):
        slack = 0.0
        if exact.norm() == 0:  # one key: terms that cancel exactly in eager's order, and to fp32 rounding in any other
            slack = torch.finfo(torch.float32).eps * v.double().norm() * out_grad.double().norm()
            other = exact
        assert one.dtype == q.dtype
        check_error(one, other, exact, name, slack=slack)
    return found


@pytest.mark.parametrize(
    ("tokens", "head_dim"),
    [(tokens, head_dim) for tokens in (1, 63, 65) for head_dim in (64, 72, 80, 96, 128)] + [(64, 72), (200, 72)],
)
def test_lengths_and_head_dims(tokens, head_dim):
    dtype = torch.float16 if (tokens + head_dim) % 3 == 0 else torch.bfloat16
    check(*random_inputs(1, tokens, tokens, 1, head_dim, dtype), seed=tokens)


@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_the_length_of_a_model(head_dim):
    check(*random_inputs(1, 729, 729, 1, head_dim))


def test_every_interleaving_gives_the_same():
    """Bitwise, for three heads on two programs."""
    inputs = random_inputs(1, 150, 200, 3, 72)
    out_grad = gradient_of(inputs[0])
    first = run(*inputs, out_grad, seed=100)
    for seed in range(5):
        for one, again in zip(first, run(*inputs, out_grad, seed=seed), strict=True):
            assert torch.equal(one, again) and not one.isnan().any()


@pytest.mark.parametrize(("query_tokens", "key_tokens"), [(1, 130), (130, 1), (65, 129), (7, 256), (129, 17)])
def test_ragged_tails(query_tokens, key_tokens):
    check(*random_inputs(2, query_tokens, key_tokens, 2, 72))


@pytest.mark.parametrize("query_tokens", [1, 63, 65, 257])
def test_a_head_does_not_see_the_statistics_of_the_next(query_tokens):
    """2^-log_sum_exp is infinite in the second head: infinity · 0 would be NaN in the tile with the first's end."""
    q, k, v = random_inputs(1, query_tokens, 70, 2, 64)
    q[:, :, 1] = q[:, :, 1].abs() * 16
    k[:, :, 1] = -k[:, :, 1].abs()
    out_grad = gradient_of(q)
    found = check(q, k, v)
    alone = run(*(x[:, :, :1] for x in (q, k, v, out_grad)))
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one[:, :, :1], other)


@pytest.mark.parametrize("head_dim", [8, 40, 88, 120])
def test_every_other_head_dim(head_dim):
    check(*random_inputs(1, 66, 150, 1, head_dim, torch.float16))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_beyond_the_length_are_nothing(head_dim):
    """Padding is not read, and its gradients are zero."""
    q, k, v = random_inputs(6, 66, 300, 1, head_dim)
    lengths = torch.tensor([0, 1, 63, 128, 257, 300], dtype=torch.int32)
    hidden = torch.arange(300) >= lengths[:, None]
    want = check(q, k, v, lengths=lengths)
    packed = torch.stack([k, v], 2)
    packed[hidden] = float("nan")
    found = run(q, *packed.unbind(2), gradient_of(q), lengths=lengths)
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)
    assert not found[0][0].any() and not found[1][hidden].any() and not found[2][hidden].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_which_one_key_has_most_of_the_weight(dtype):
    """The gradients of their queries alone, which the rounding of the output would harm, in tiles with other rows."""
    q, k, v = random_inputs(1, 150, 200, 1, 72, dtype)
    peaks = [0, 3, 63, 64, 149]
    q[:, peaks] = 2 * k[:, [7 * peak % 200 for peak in peaks]]
    out_grad = gradient_of(q)
    found = check(q, k, v)
    truth = of_reference(q, k, v, out_grad, torch.float64)[0]
    eager = of_reference(q, k, v, out_grad, dtype)[0]
    check_error(found[0][:, peaks], eager[:, peaks], truth[:, peaks])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_eager_s_places(value):
    q, k, v = random_inputs(1, 66, 70, 1, 64)
    v[0, 3, 0, 5] = value
    out_grad = gradient_of(q)
    for one, eager in zip(run(q, k, v, out_grad), of_reference(q, k, v, out_grad, q.dtype), strict=True):
        assert torch.equal(one.isfinite(), eager.isfinite())


def test_packed_expanded_and_misaligned_tensors():
    q, k, v = torch.randn(2, 100, 3, 2, 72, generator=torch.Generator().manual_seed(1)).bfloat16().unbind(2)
    want = run(q.contiguous(), k.contiguous(), v.contiguous(), gradient_of(q))
    odd = torch.zeros(2, 100, 2, 75, dtype=torch.bfloat16)[..., 1:73].copy_(k)
    for k_like in (k, odd):
        for one, other in zip(run(q, k_like, v, gradient_of(q)), want, strict=True):
            assert torch.equal(one, other)
    row = torch.randn(72, generator=torch.Generator().manual_seed(2)).bfloat16()
    expanded = row.expand(q.shape)
    for one, other in zip(run(q, k, v, expanded), run(q, k, v, expanded.contiguous()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [-0.3, 3.0])
def test_scales(scale):
    check(*random_inputs(1, 70, 150, 1, 64), scale=scale)


def test_gradients_are_parts_of_one_tensor():
    """Bit for bit those of separate tensors."""
    inputs = random_inputs(2, 70, 70, 2, 72)
    out_grad, packed_grad = gradient_of(inputs[0]), torch.empty(2, 70, 3, 2, 72, dtype=inputs[0].dtype)
    separate = run(*inputs, out_grad)
    for part, given in zip(run(*inputs, out_grad, packed_grad=packed_grad), packed_grad.unbind(2), strict=True):
        assert part.data_ptr() == given.data_ptr()
    assert all(torch.equal(*pair) for pair in zip(packed_grad.unbind(2), separate, strict=True))


def test_only_what_is_needed():
    q, k, v = random_inputs(1, 70, 150, 1, 72)
    want = run(q, k, v, gradient_of(q))
    q_grad, none, none_either = run(q, k, v, gradient_of(q), needs_k_or_v=False)
    assert torch.equal(q_grad, want[0]) and none.numel() == none_either.numel() == 0
    none, k_grad, v_grad = run(q, k, v, gradient_of(q), needs_q=False)
    assert torch.equal(k_grad, want[1]) and torch.equal(v_grad, want[2]) and none.numel() == 0


def test_no_keys_no_queries_no_batch():
    for batch, query_tokens, key_tokens in ((2, 66, 0), (2, 0, 66), (0, 66, 66)):
        q, k, v = random_inputs(batch, query_tokens, key_tokens, 1, 72)
        for gradient, tensor in zip(run(q, k, v, gradient_of(q)), (q, k, v), strict=True):
            assert gradient.shape == tensor.shape and not gradient.any()


def test_through_the_public_operation(monkeypatch):
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "1")
    inputs = [x.requires_grad_() for x in random_inputs(1, 70, 130, 1, 72)]
    out_grad = gradient_of(inputs[0])
    with on_hopper():
        found = torch.autograd.grad(attention(*inputs), inputs, out_grad)
    want = run(*(x.detach() for x in inputs), out_grad)
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


BROKEN = {
    "keys are released before they are read": (
        "    q_grad = wait_for_all(issue_products(scores_grad, k_stages, stage, q_grad, 0))\n"
        "    mbarrier.arrive(k_empty.index(stage), count=1)\n",
        "    q_grad = issue_products(scores_grad, k_stages, stage, q_grad, 0)\n"
        "    mbarrier.arrive(k_empty.index(stage), count=1)\n"
        "    q_grad = wait_for_all(q_grad)\n",
    ),
    "queries are released before they are read": (
        "            v_grad = wait_for_all(v_grad)\n            k_grad = wait_for_all(k_grad)\n"
        "            mbarrier.arrive(grad_empty.index(stage), count=1)\n"
        "            mbarrier.arrive(q_empty.index(stage), count=1)\n",
        "            mbarrier.arrive(grad_empty.index(stage), count=1)\n"
        "            mbarrier.arrive(q_empty.index(stage), count=1)\n"
        "            v_grad = wait_for_all(v_grad)\n            k_grad = wait_for_all(k_grad)\n",
    ),
    "a product is used before it is complete": ("_wait(PARTS, deps=(weights_grad,))", "_wait(3, deps=(weights_grad,))"),
    "the output is not waited for": ("        mbarrier.wait(out_full.index(mine), slot_phase)\n", ""),
    "the output's gradient is released with the output": (
        "        mbarrier.arrive(out_empty.index(mine), count=1)\n",
        "        mbarrier.arrive(out_empty.index(mine), count=1)\n"
        "        mbarrier.arrive(grad_empty.index(mine), count=1)\n",
    ),
    "values are never released": (
        "(values, QUERIES)\n            mbarrier.arrive(v_empty.index(mine), count=1)\n",
        "(values, QUERIES)\n",
    ),
    "a tile of keys is released before it is in registers": (
        "            keys = in_registers(keys, QUERIES)\n            mbarrier.arrive(k_empty.index(mine), count=1)\n",
        "            mbarrier.arrive(k_empty.index(mine), count=1)\n            keys = in_registers(keys, QUERIES)\n",
    ),
    "values go to registers before they are waited for": (
        "        mbarrier.wait(v_full.index(mine), slot_phase)\n        if IN_REGISTERS == 2:\n"
        "            values = in_registers(values, QUERIES)\n",
        "        if IN_REGISTERS == 2:\n            values = in_registers(values, QUERIES)\n"
        "        mbarrier.wait(v_full.index(mine), slot_phase)\n        if IN_REGISTERS == 2:\n",
    ),
    "the bytes of the statistics are not expected": (
        "            mbarrier.expect(q_full.index(stage), statistics.block_type.nbytes)\n",
        "            mbarrier.arrive(q_full.index(stage), count=1)\n",
    ),
    "one load fills a stage of queries": ("make_barriers(STAGES, CONSUMERS, 2)", "make_barriers(STAGES, CONSUMERS)"),
    "statistics are read before they are waited for": (
        "            mbarrier.wait(q_full.index(stage), phase)\n",
        "            statistics_stages.index(stage).load(gl.AutoLayout())\n"
        "            mbarrier.wait(q_full.index(stage), phase)\n",
    ),
    "statistics are read after they are released": (
        "            mbarrier.arrive(q_empty.index(stage), count=1)\n            stage, phase",
        "            mbarrier.arrive(q_empty.index(stage), count=1)\n"
        "            statistics_stages.index(stage).load(gl.AutoLayout())\n            stage, phase",
    ),
    "statistics are loaded before their stage is empty": (
        "            load_rows(q, q_stages, stage, q_full, q_empty, phase, batch, row, head)\n"
        "            mbarrier.expect(",
        "            async_load(statistics, [sequence, 0, row], q_full.index(stage), statistics_stages.index(stage))\n"
        "            load_rows(q, q_stages, stage, q_full, q_empty, phase, batch, row, head)\n"
        "            mbarrier.expect(",
    ),
    "the last store is not waited for": (
        "    tma.store_wait(0)\n\n\n_INTEGERS",
        "\n\n_INTEGERS",
    ),
}  # fmt: skip


KERNELS = "attention_backward_queries_hopper_kernel", "attention_backward_keys_hopper_kernel"


@pytest.mark.parametrize("broken", BROKEN)
def test_a_fault_in_the_kernels_is_found(broken, plant):
    plant(BROKEN[broken], [hopper_backward], hopper, *KERNELS)
    q, k, v = random_inputs(1, 200, 330, 5, 72)  # few queries: a producer that waits for their stages knows more
    for seed in range(2):
        with pytest.raises(Fault):
            run(q, k, v, gradient_of(q), seed=seed)


def test_a_barrier_is_named_as_its_kernel_names_it(plant):
    """A fault names its barrier, although one function allocates ten and calls each of them full or empty."""
    plant(BROKEN["the output is not waited for"], [hopper_backward], hopper, *KERNELS)
    q, k, v = random_inputs(1, 65, 65, 1, 72)
    with pytest.raises(Fault, match=r"barrier out_full\[.*loads allocate\(out, SLOTS \* CONSUMERS\)\.main\["):
        run(q, k, v, gradient_of(q))
