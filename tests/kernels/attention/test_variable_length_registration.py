"""Attention over packed sequences as an operator of PyTorch: registration, compilation, flash-attn's names, errors."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from siglip_kernels import UnsupportedInputError, attention, reference
from siglip_kernels.attention import flash_attn_varlen_func
from siglip_kernels.errors import MissingBackendError

OPERATORS = torch.ops.siglip_kernels
HALF = torch.float16


def tensors(tokens: int, device: str, dtype: torch.dtype = HALF, grad: bool = True) -> list[Tensor]:
    return [torch.randn(tokens, 2, 24, device=device, dtype=dtype).requires_grad_(grad) for _ in range(3)]


def boundaries(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_operators_check(device):
    cu_seqlens, cu_seqlens_k = boundaries(0, 5, 70, device=device), boundaries(0, 60, 62, device=device)
    q, k, v = tensors(70, device)
    operator = OPERATORS.attention_variable_length
    torch.library.opcheck(operator.default, (q, k, v, cu_seqlens, cu_seqlens_k, 65, None, None, True))
    q, k, v = tensors(70, device, grad=False)
    out, kept = operator(q, k, v, cu_seqlens, None, 65, 65, 0.2, True)
    assert kept.shape == (2, 70)
    arguments = (torch.ones_like(out), q, k, v, out, kept, cu_seqlens, None, 65, 65, 0.2, True, True)
    backward = OPERATORS.attention_variable_length_backward.default
    torch.library.opcheck(backward, arguments)
    torch.library.opcheck(backward, (*arguments[:-2], False, True), test_utils=("test_schema", "test_faketensor"))
    assert operator(q, k, v, cu_seqlens, None, None, None, None, False)[1].numel() == 0


def test_compiles_once_for_any_number_of_tokens_and_sequences(device):
    def block(q, k, v, cu_seqlens, max_seqlen):
        return attention(2 * q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen).sin()

    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=frames)
    for lengths in ([5, 65], [3, 20, 40, 9], [40, 0, 31]):
        cu_seqlens = boundaries(0, *torch.tensor(lengths).cumsum(0).tolist(), device=device)
        inputs = tensors(sum(lengths) + 2, device)
        found = torch.autograd.grad(compiled(*inputs, cu_seqlens, max(lengths)).sum(), inputs)
        expected = torch.autograd.grad(block(*inputs, cu_seqlens, max(lengths)).sum(), inputs)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert frames.frame_count == 1


def test_autocast(device):
    q, k, v = tensors(9, device, torch.float32)
    cu_seqlens = boundaries(0, 4, 9, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = attention(q, k, v, cu_seqlens=cu_seqlens)
        flash = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(*(t.bfloat16() for t in (q, k, v)), cu_seqlens=cu_seqlens))
    assert torch.equal(out, flash)
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


def test_second_derivatives_are_refused(device):
    q, k, v = tensors(9, device, torch.float32)
    out = attention(q, k, v, cu_seqlens=boundaries(0, 4, 9, device=device))
    (gradient,) = torch.autograd.grad((out**2).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedInputError, match=r"second derivatives.*eager"):
        gradient.sum().backward()


def test_forward_mode_is_refused(device):
    q, k, v = tensors(9, device, torch.float32, grad=False)
    cu_seqlens = boundaries(0, 9, device=device)
    with pytest.raises(UnsupportedInputError, match="^attention: q has a tangent"):
        torch.func.jvp(lambda q: attention(q, k, v, cu_seqlens=cu_seqlens), (q,), (q,))


def test_a_forward_that_kept_nothing_has_no_backward(device):
    q, k, v = tensors(9, device)
    cu_seqlens = boundaries(0, 9, device=device)
    out, _ = OPERATORS.attention_variable_length(q, k, v, cu_seqlens, None, None, None, None, False)
    with pytest.raises(UnsupportedInputError, match="keep_for_backward was False"):
        out.sum().backward()


def test_shapes_without_data():
    q, k, v = (torch.empty(70, 2, 72, device="meta", dtype=torch.bfloat16) for _ in range(3))
    out = attention(q, k, v, cu_seqlens=torch.empty(3, dtype=torch.int32, device="meta"), max_seqlen=60)
    assert out.is_meta and out.shape == q.shape and out.dtype == q.dtype


def test_flash_attn_s_function_is_the_same_attention(device):
    q, k, v = tensors(20, device, grad=False)
    cu_seqlens = boundaries(0, 7, 20, device=device)
    expected = attention(q, k, v, cu_seqlens=cu_seqlens, scale=0.3)
    arguments = dict(dropout_p=0.0, softmax_scale=0.3, causal=False, window_size=(-1, -1), deterministic=True)
    for longest in (13, torch.tensor(13), None):
        found = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **arguments)
        assert torch.equal(found, expected)


def good() -> dict[str, object]:
    return {**{name: torch.zeros(5, 2, 24, dtype=HALF) for name in "qkv"}, "cu_seqlens": boundaries(0, 2, 5)}


BAD = {
    "rank": ({"q": torch.zeros(1, 5, 2, 24, dtype=HALF)}, r"q has 4 dimensions; supported: 3: \(T, H, D\)"),
    "heads": ({"k": torch.zeros(5, 1, 24, dtype=HALF)}, "k has number of heads 1 while q has 2"),
    "head dim": ({name: torch.zeros(5, 2, 20) for name in "qkv"}, "q has head dim 20; supported: multiples of 8"),
    "tokens of v": ({"v": torch.zeros(6, 2, 24, dtype=HALF)}, "v has 6 tokens while k has 5"),
    "tokens of k": (
        {name: torch.zeros(6, 2, 24, dtype=HALF) for name in "kv"},
        "k has 6 tokens while q has 5; supported: as many as q; flash_attn_varlen_func takes",
    ),
    "mixed": ({"k": torch.zeros(5, 2, 24)}, "k has dtype torch.float32 while q has torch.float16"),
    "scale": ({"scale": float("nan")}, "scale is nan"),
    "a list": ({"cu_seqlens": [0, 5]}, "cu_seqlens is list; supported: a tensor"),
    "dtype of boundaries": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens has dtype torch.float32; supported"),
    "two axes": ({"cu_seqlens": boundaries(0, 5)[None]}, r"cu_seqlens has shape \(1, 2\); supported: \(N \+ 1,\)"),
    "no boundary": ({"cu_seqlens": boundaries()}, r"cu_seqlens has shape \(0,\); supported: \(N \+ 1,\)"),
    "strided": ({"cu_seqlens": boundaries(0, 1, 5, 6)[::2]}, "cu_seqlens has stride 2; supported: contiguous"),
    "device": ({"cu_seqlens": boundaries(0, 5).to("meta")}, "cu_seqlens is on meta while q is on cpu"),
    "lengths": ({"lengths": boundaries(2, 3)}, "lengths is given with cu_seqlens; supported: one of them"),
    "longest as a float": ({"max_seqlen": 3.0}, "max_seqlen is 3.0; supported: integers from 0 on"),
    "negative longest": ({"max_seqlen": -1}, "max_seqlen is -1; supported: integers from 0 on"),
    "no boundaries": ({"cu_seqlens": None, "max_seqlen": 3}, "max_seqlen is given without cu_seqlens"),
}
VALUES = {
    "start": ({"cu_seqlens": boundaries(1, 5)}, "cu_seqlens starts with 1; supported: 0 to the 5 tokens"),
    "decrease": ({"cu_seqlens": boundaries(0, 4, 2)}, "cu_seqlens decreases from 4 to 2 at index 2"),
    "overrun": ({"cu_seqlens": boundaries(0, 6)}, "cu_seqlens ends with 6; supported: 0 to the 5 tokens"),
    "longer": ({"max_seqlen": 2}, "cu_seqlens has a sequence of 3 tokens while max_seqlen is 2"),
}


@pytest.mark.parametrize(("change", "message"), [*BAD.values(), *VALUES.values()], ids=[*BAD, *VALUES])
def test_bad_input_is_named(change, message):
    with pytest.raises(UnsupportedInputError, match="^attention: " + message):
        attention(**{**good(), **change})


@pytest.mark.parametrize("name", ["rank", "tokens of k", "dtype of boundaries", "no boundary", "negative longest"])
def test_bad_input_is_named_by_compiled_code(name):
    change, message = BAD[name]
    torch._dynamo.reset()
    with pytest.raises(UnsupportedInputError, match="^attention: " + message):
        torch.compile(attention, backend="eager")(**{**good(), **change})


def test_a_gpu_s_boundaries_are_read_if_the_environment_asks(monkeypatch):
    from siglip_kernels.attention.boundaries import check_values

    class OnGpu:
        """What a tensor on a GPU answers, and whether it was read."""

        is_cuda, is_meta = True, False
        read = False

        def tolist(self) -> list[int]:
            self.read = True
            return [0, 9]

    for value, read in ((None, False), ("", False), ("0", False), ("1", True)):
        if value is not None:
            monkeypatch.setenv("SIGLIP_KERNELS_CHECK", value)
        on_gpu = OnGpu()
        if read:
            with pytest.raises(UnsupportedInputError, match="cu_seqlens ends with 9"):
                check_values("attention", on_gpu, 5, None)
        else:
            check_values("attention", on_gpu, 5, None)
        assert on_gpu.read == read
    monkeypatch.setenv("SIGLIP_KERNELS_CHECK", "yes")
    with pytest.raises(MissingBackendError, match="SIGLIP_KERNELS_CHECK is 'yes'; supported: 1"):
        check_values("attention", OnGpu(), 5, None)


BAD_FLASH = {
    "dropout_p": ({"dropout_p": 0.1}, "dropout_p is 0.1; supported: 0.0"),
    "causal": ({"causal": True}, "causal is True; supported: False"),
    "window_size": ({"window_size": (8, 8)}, r"window_size is \(8, 8\); supported: \(-1, -1\)"),
    "softcap": ({"softcap": 30.0}, "softcap is 30.0; supported: 0.0"),
    "alibi_slopes": ({"alibi_slopes": torch.ones(2)}, "alibi_slopes is Tensor; supported: None"),
    "an array": ({"alibi_slopes": np.ones(2)}, "alibi_slopes is ndarray; supported: None"),
    "return_attn_probs": ({"return_attn_probs": True}, "return_attn_probs is True; supported: False"),
    "block_table": ({"block_table": boundaries(0)}, "block_table is Tensor; supported: None"),
    "heads": ({"k": torch.zeros(5, 1, 24, dtype=HALF)}, "k has number of heads 1 while q has 2"),
    "softmax_scale": ({"softmax_scale": "1"}, "softmax_scale is a str; supported: numbers"),
    "cu_seqlens_q": ({"cu_seqlens_q": None}, "cu_seqlens_q is NoneType; supported: a tensor"),
    "cu_seqlens_k": (
        {"cu_seqlens_k": boundaries(0, 5)},
        r"cu_seqlens_k has shape \(2,\) while cu_seqlens_q has \(3,\); supported: as many sequences",
    ),
    "max_seqlen_k": ({"max_seqlen_k": "3"}, "max_seqlen_k is '3'; supported: integers"),
}


@pytest.mark.parametrize(("change", "message"), BAD_FLASH.values(), ids=BAD_FLASH.keys())
def test_what_flash_attn_s_function_does_not_support_is_named(change, message):
    arguments = good()
    arguments["cu_seqlens_q"] = arguments["cu_seqlens_k"] = arguments.pop("cu_seqlens")
    with pytest.raises(UnsupportedInputError, match="^flash_attn_varlen_func: " + message):
        flash_attn_varlen_func(**{**arguments, **change})


def test_boundaries_of_keys_are_named(device):
    q, k, v = tensors(5, device, grad=False)
    right, wrong = boundaries(0, 2, 5, device=device), boundaries(0, 2, 6, device=device)
    with pytest.raises(UnsupportedInputError, match="^flash_attn_varlen_func: cu_seqlens_k ends with 6"):
        flash_attn_varlen_func(q, k, v, right, wrong)


def test_the_reference_takes_one_of_boundaries_lengths_and_masks():
    q, k, v = tensors(5, "cpu", torch.float32, grad=False)
    for other in ({"lengths": boundaries(2)}, {"mask": torch.ones(5, 5)}):
        with pytest.raises(ValueError, match="supported: one of them"):
            reference.attention(q, k, v, cu_seqlens=boundaries(0, 5), **other)
