"""Whether our kernels are right, on this GPU or in Triton's interpreter: against fp64, beside eager and SDPA.

Results, results without gradients and every gradient may be off by twice what the definition is in the same dtype plus
one rounding; a second run has to give the same bits; fresh memory is full of NaN, so that what is not written is seen.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.cases import shapes
from bench.cases.operations import DTYPES, OPERATIONS, Contender, Setting, ours
from bench.cases.shapes import Shape
from bench.cases.suites import SUITES, dtype_name
from bench.environment import device
from bench.measure.accuracy import OURS, Found, Judge, allowed_distance, distance, forward, gradients
from bench.measure.measure import DEADLY, DeadDevice, device_is_dead, free
from bench.peers import peers_of

# Beside ours in the table: what else could be run instead.
BESIDE = {"attention": "sdpa"}


@dataclass
class Checked:
    """One operation on one shape in one dtype. Errors are relative to fp64, those of the worst result or gradient."""

    op: str
    shape: dict[str, Any]
    dtype: str
    ok: bool
    kernels: str = "triton"  # or "triton:hopper"
    problem: str = ""
    what: str = ""  # the result or gradient that is furthest from what is allowed
    error: float | None = None
    allowed: float | None = None
    eager_error: float | None = None
    sdpa_error: float | None = None


def kernels_can_run() -> str | None:
    """Why not, or None where they can: on a CUDA device, or in the interpreter."""
    from siglip_kernels.device import interpreting

    if device() == "cuda" or interpreting():
        return None
    return (
        "Triton kernels need a CUDA device, and this machine has none; "
        "TRITON_INTERPRET=1 checks them on small shapes in Triton's interpreter"
    )


def kernel_operations(suites: Iterable[str]) -> list[str]:
    """The operations of the suites that are kernels of ours, each once."""
    named = (case.operation for suite in suites for case in SUITES[suite].cases)
    return list(dict.fromkeys(name for name in named if ours(name) is not None))


def settings(operation: str, quick: bool, dtypes: Sequence[str] = ()) -> list[Setting]:
    """What is checked of an operation: models' sizes and awkward ones on a GPU, tiny ones in the interpreter."""
    place = device()
    if place == "cuda":
        chosen = _QUICK[operation] if quick else _QUICK[operation] + _THOROUGH.get(operation, ())
    else:
        chosen = _TINY[operation][: 1 if quick else None]
    wanted = dtypes or (("bf16",) if quick else ("fp32", "fp16", "bf16"))
    return [
        Setting(OPERATIONS[operation], shape, DTYPES[dtype], place, "fwd+bwd")
        for shape, dtype in itertools.product(chosen, wanted)
    ]


def beyond_31_bits(operation: str) -> list[Setting]:
    """Forward on a tensor of more than 2^31 elements, where an offset of 32 bits would turn negative."""
    place = device()
    if place != "cuda" or operation not in _HUGE:
        return []
    return [Setting(OPERATIONS[operation], _HUGE[operation], torch.bfloat16, place, "fwd")]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def check(setting: Setting, kernels: Callable[..., Any] | None = None) -> Checked:
    """Our kernels, or `kernels` in their place, on one setting."""
    name = setting.operation.name
    kernels = kernels or ours(name)
    result = Checked(name, setting.shape.sizes(), dtype_name(setting.dtype), ok=False)
    if kernels is None:
        return replace(result, problem=f"siglip_kernels has no {name}")
    try:
        return _check_huge(setting, result) if setting.direction == "fwd" else _check(setting, kernels, result)
    except torch.OutOfMemoryError as error:
        return replace(result, ok=True, problem=f"not checked: {' '.join(str(error).split())[:100]}")
    except Exception as error:  # a kernel that does not run is as red as one that is wrong
        return replace(result, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        free()


def _check(setting: Setting, kernels: Callable[..., Any], result: Checked) -> Checked:
    inputs = setting.inputs(seed=2)
    exact = gradients(
        setting.operation.definition(setting, torch.float64), inputs.map(torch.Tensor.double), setting.dtype
    )
    plain = gradients(setting.operation.definition(setting, setting.dtype), inputs, setting.dtype)
    contender = Contender(kernels)
    with poisoned():
        found = gradients(contender, inputs, setting.dtype)
        again = gradients(contender, inputs, setting.dtype)
        inference = forward(contender, inputs)
    excess = -1.0
    for name in exact:
        error, eager_error = distance(found[name], exact[name]), distance(plain[name], exact[name])
        if name == "results":
            error = max(error, distance(inference, exact[name]), key=lambda value: (value != value, value))
        allowed = allowed_distance(plain[name], exact[name], setting.dtype, OURS)
        if not error / allowed <= excess:
            excess = error / allowed
            result = replace(result, what=name, error=error, allowed=allowed, eager_error=eager_error)
        if not error <= allowed:
            return replace(result, problem=f"{name} is off by {error:.1e}, {allowed:.1e} is allowed")
    if not _same_bits(found, again):
        return replace(result, problem="a second run gave other bits")
    return replace(result, ok=True, sdpa_error=_beside(setting, inputs, exact, result.what))


def _same_bits(first: Found, second: Found) -> bool:
    return all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))


def _beside(setting: Setting, inputs: Any, exact: Found, what: str) -> float | None:
    entry = peers_of(setting.operation.name).get(BESIDE.get(setting.operation.name, ""))
    if entry is None:
        return None
    return distance(gradients(entry.prepare(setting), inputs, setting.dtype)[what], exact[what])


def _check_huge(setting: Setting, result: Checked) -> Checked:
    entry = peers_of(setting.operation.name)["triton"]
    verdict = Judge(setting, setting.inputs()).judge(entry, entry.prepare(setting))
    return replace(result, ok=not verdict.problem, problem=verdict.problem, what="results", error=verdict.error)


def check_all(
    operations: Sequence[str],
    quick: bool,
    dtypes: Sequence[str] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Iterator[Checked]:
    """Every setting of the operations. DeadDevice where one, which is given before, broke the CUDA context."""
    wanted = [setting for name in operations for setting in settings(name, quick, dtypes)]
    if not quick:
        wanted += [setting for name in operations for setting in beyond_31_bits(name)]
    for done, setting in enumerate(wanted):
        what = f"{setting.operation.name} {setting.shape.name} {dtype_name(setting.dtype)}"
        progress(done, len(wanted), what)
        checked = check(setting)
        if device_is_dead():
            yield replace(checked, ok=False, problem=DEADLY + checked.problem)
            raise DeadDevice(f"{what} broke the CUDA context: {checked.problem}")
        yield checked
    progress(len(wanted), len(wanted), "")


# What is made of all the operations.
_MODELS = ("vision_tower", "siglip", "training_step")


def red(checked: Iterable[Checked]) -> dict[tuple[str, str], str]:
    """(operation, kernels) that are not to be timed, with the first reason. What models make of them is judged there,
    unless it takes the process down."""
    found: dict[tuple[str, str], str] = {}
    for one in checked:
        if one.ok:
            continue
        reason = f"wrong in check ({one.shape['name']} {one.dtype}): {one.problem}"
        more = spread(one.op, one.kernels, reason) if one.problem.startswith(DEADLY) else {}
        found = {**more, (one.op, one.kernels): reason, **found}
    return found


def spread(operation: str, kernels: str, reason: str) -> dict[tuple[str, str], str]:
    """What takes the process down in one operation is not to be met again in a model."""
    return {(one, kernels): reason if one == operation else f"{operation}: {reason}" for one in (operation, *_MODELS)}


def _attention(tokens: Iterable[int], head_dims: Iterable[int], batch: int = 2, heads: int = 4) -> tuple[Shape, ...]:
    return tuple(
        shapes.AttentionShape(f"s{length}-d{width}", batch, length, heads, width)
        for width, length in itertools.product(head_dims, tokens)
    )


def _linear(*sizes: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple(
        shapes.LinearShape(f"m{m}-k{k}-n{n}{'-residual' * residual}", m, k, n, residual)
        for m, k, n in sizes
        for residual in (False, True)
    )


def _qkv(*sizes: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.QKVShape(f"m{m}-w{width}", m, width, heads) for m, width, heads in sizes)


def _mlp(*sizes: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.MLPShape(f"m{m}-w{width}-h{hidden}", m, width, hidden) for m, width, hidden in sizes)


def _norm(*sizes: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.NormShape(f"m{m}-w{width}", m, width) for m, width in sizes)


def _pool(*sizes: tuple[int, int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.PoolShape(f"b{b}-s{s}-w{width}", b, s, width, heads) for b, s, width, heads in sizes)


def _patch(*sizes: tuple[int, int, int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.PatchShape(f"b{b}-i{i}-p{p}-w{width}", b, i, p, width) for b, i, p, width in sizes)


def _loss(*sizes: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(shapes.LossShape(f"n{n}-d{width}", n, width) for n, width in sizes)


_QUICK: dict[str, tuple[Shape, ...]] = {
    "attention": _attention((64, 729), (64, 72), heads=16),
    "linear": _linear((729, 1152, 4304)),
    "pre_norm_qkv": _qkv((729, 1152, 16)),
    "mlp": _mlp((729, 1152, 4304)),
    "pre_norm_mlp": _mlp((729, 1152, 4304)),
    "layer_norm": _norm((729, 1152)),
    "attention_pool": _pool((3, 729, 1152, 16)),
    "patch_embed": _patch((2, 384, 14, 1152)),
    "sigmoid_loss": _loss((2048, 768), (1000, 1152)),
}
_THOROUGH: dict[str, tuple[Shape, ...]] = {
    "attention": _attention((1, 17, 63, 65, 196, 256, 577, 1024, 1025), (64, 72, 80, 88, 128)),
    "linear": _linear((1, 1152, 1152), (46_656, 1152, 1152), (257, 4304, 1152), (65, 768, 3072), (127, 72, 24)),
    "pre_norm_qkv": _qkv((1, 1152, 16), (513, 768, 12), (46_656, 1152, 16)),
    "mlp": _mlp((1, 1152, 4304), (513, 768, 3072), (65, 1024, 4096), (46_656, 1152, 4304)),
    "pre_norm_mlp": _mlp((1, 1152, 4304), (513, 768, 3072), (46_656, 1152, 4304)),
    "layer_norm": _norm((1, 768), (46_656, 1152), (1025, 1024), (333, 72)),
    "attention_pool": _pool((1, 1, 768, 12), (5, 196, 768, 12), (2, 1025, 1024, 16)),
    "patch_embed": _patch((3, 224, 16, 768), (1, 512, 16, 768)),
    "sigmoid_loss": _loss((1, 768), (511, 72), (4097, 768), (8192, 1152)),
}
_HUGE: dict[str, Shape] = {
    "attention": shapes.AttentionShape("beyond 2^31", 864, 729, 16, 72),
    "linear": shapes.LinearShape("beyond 2^31", 1_900_000, 1152, 1152),
    "layer_norm": shapes.NormShape("beyond 2^31", 1_900_000, 1152),
}
# The interpreter takes its time by the operation: a tile or two of each kernel.
_TINY: dict[str, tuple[Shape, ...]] = {
    "attention": _attention((65, 17), (72,), heads=2),
    "linear": _linear((33, 72, 40)),
    "pre_norm_qkv": _qkv((33, 48, 2)),
    "mlp": _mlp((33, 48, 72)),
    "pre_norm_mlp": _mlp((33, 48, 72)),
    "layer_norm": _norm((33, 72)),
    "attention_pool": _pool((2, 17, 48, 2)),
    "patch_embed": _patch((2, 28, 14, 48)),
    "sigmoid_loss": _loss((65, 72)),
}
