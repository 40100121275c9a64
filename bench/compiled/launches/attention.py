"""Launches of attention: every configuration that a call may use or tuning may try."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.compiled.launch import GPUS, Launch, precision_name, with_tf32
from siglip_kernels.attention.config import Tile

PUBLISHED = r"^bf16 S=(729 D=72|1024 D=64|64 D=72|64 D=64) \w+$"
HOPPER_PUBLISHED = BLACKWELL_PUBLISHED = r"^bf16 S=(729 D=72|1024 D=64) \w+$"

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def launches() -> Iterator[Launch]:
    """Training on packed q, k and v: published shapes, then other head dims, fp16, padding, smaller tiles,
    packed sequences and fp32.

    Gradients are packed as well, except with padding.
    """
    for tokens, head_dim in ((729, 72), (1024, 64), (64, 72), (64, 64)):
        yield from _training(tokens, head_dim, torch.bfloat16)
    for tokens in (729, 64):
        for head_dim in (80, 96, 128):
            yield from _training(tokens, head_dim, torch.bfloat16)
        yield from _training(tokens, 88, torch.float16)
        for head_dim in (64, 72):
            yield from _training(tokens, head_dim, torch.bfloat16, padded=True)
    for tokens, head_dim in ((32, 64), (32, 72), (32, 128), (16, 72)):
        yield from _training(tokens, head_dim, torch.bfloat16)
    for head_dim in (64, 72, 80, 96, 128):
        for longest in (16, 32, 64, 1024):
            yield from _training_packed(longest, head_dim, torch.bfloat16)
        for longest in (16, 1024):
            yield from _training_packed(longest, head_dim, torch.float32)
    yield from _training_packed(1024, 88, torch.float16)
    for longest in (16, 1024):
        yield from _training_packed(longest, 72, torch.float32, allow_tf32=True)
    for tokens in (729, 16):
        for head_dim in (64, 72, 96, 128):
            yield from _training(tokens, head_dim, torch.float32)
            yield from _training(tokens, head_dim, torch.float32, allow_tf32=True)
    yield from _tuned()
    yield from _candidates()


def _tuned() -> Iterator[Launch]:
    """The shapes that have an entry in a table of tuned configurations."""
    from siglip_kernels.attention.tuned import TUNED

    classes = {shape_class[1:] for table in TUNED.values() for shape_class in table}
    for element_bytes, columns, _, tokens in sorted(classes):
        yield from _training(tokens, 72 if columns == 80 else columns, _DTYPES[element_bytes])


def _candidates() -> Iterator[Launch]:
    """One kernel with one tile each, for the GPUs that the tile is a candidate for."""
    from siglip_kernels.attention.config import candidates

    for kernel in ("forward", "backward_queries", "backward_keys"):
        for tile in dict.fromkeys(tile for gpu in GPUS.values() for tile in candidates(kernel, gpu)):
            for head_dim in (64, 72):
                name = f"candidate D={head_dim} {tile.queries}x{tile.keys} {tile.warps} warps {tile.stages} stages"
                yield Launch(f"{name} {kernel}", _candidate(kernel, tile, head_dim))


def _candidate(kernel: str, tile: Tile, head_dim: int) -> Callable[[], None]:
    from siglip_kernels.attention import config

    heuristic = config.tile
    if kernel == "forward":
        call = _forward(729, head_dim, torch.bfloat16, padded=False)
    else:
        call = _backward(729, head_dim, torch.bfloat16, padded=False, needs=kernel.removeprefix("backward_"))

    def launch() -> None:
        if tile not in config.candidates(kernel):
            return
        chosen = lambda asked, *shape: tile if asked == kernel else heuristic(asked, *shape)  # noqa: E731
        config.tile = chosen  # type: ignore[assignment]
        try:
            call()
        finally:
            config.tile = heuristic

    return launch


def _training(
    tokens: int, head_dim: int, dtype: torch.dtype, padded: bool = False, allow_tf32: bool = False
) -> Iterator[Launch]:
    name = _name(tokens, head_dim, dtype, padded, allow_tf32)
    yield Launch(f"{name} forward", with_tf32(allow_tf32, _forward(tokens, head_dim, dtype, padded)))
    yield Launch(f"{name} backward", with_tf32(allow_tf32, _backward(tokens, head_dim, dtype, padded)))


def _training_packed(longest: int, head_dim: int, dtype: torch.dtype, allow_tf32: bool = False) -> Iterator[Launch]:
    """Packed sequences, the longest of so many tokens; gradients are packed in half precision."""
    name = f"{precision_name(dtype, allow_tf32)} S={longest} D={head_dim} packed"

    def run(backward: bool) -> None:
        from siglip_kernels.attention.dispatch import launch_packed_backward, launch_packed_forward

        q, k, v = torch.empty(16384, 3, 16, head_dim, device="meta", dtype=dtype).unbind(1)
        boundaries = (torch.empty(65, device="meta", dtype=torch.int32), None, longest, longest)
        if backward:
            out, statistics = torch.empty(q.shape, device="meta", dtype=dtype), torch.empty(16, 16384, device="meta")
            packed_grad = torch.empty(16384, 3, 16, head_dim, device="meta", dtype=dtype) if q.itemsize == 2 else None
            kept = (q, k, v, out, statistics)
            launch_packed_backward(out, *kept, *boundaries, None, True, True, packed_grad)
        else:
            launch_packed_forward(q, k, v, *boundaries, None, True)

    yield Launch(f"{name} forward", with_tf32(allow_tf32, lambda: run(False)))
    yield Launch(f"{name} backward", with_tf32(allow_tf32, lambda: run(True)))


def _name(tokens: int, head_dim: int, dtype: torch.dtype, padded: bool, allow_tf32: bool = False) -> str:
    return f"{precision_name(dtype, allow_tf32)} S={tokens} D={head_dim}{' lengths' if padded else ''}"


def _tensors(tokens: int, head_dim: int, dtype: torch.dtype, padded: bool) -> tuple[list[Tensor], Tensor | None]:
    packed = torch.empty(64, tokens, 3, 16, head_dim, device="meta", dtype=dtype)
    return list(packed.unbind(2)), torch.empty(64, device="meta", dtype=torch.int32) if padded else None


def _forward(tokens: int, head_dim: int, dtype: torch.dtype, padded: bool, family: str = "") -> Callable[[], object]:
    from siglip_kernels.attention.blackwell import attention_forward_blackwell
    from siglip_kernels.attention.config import is_short
    from siglip_kernels.attention.forward import attention_forward
    from siglip_kernels.attention.hopper import attention_forward_hopper
    from siglip_kernels.attention.short import attention_short_forward

    (q, k, v), lengths = _tensors(tokens, head_dim, dtype, padded)
    if family:
        special = attention_forward_hopper if family == "hopper" else attention_forward_blackwell
        return lambda: special(q, k, v, lengths, head_dim**-0.5, True)
    if is_short(q, k):
        return lambda: attention_short_forward(q, k, v, lengths, head_dim**-0.5)
    return lambda: attention_forward(q, k, v, lengths, head_dim**-0.5, True)


def _backward(
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    padded: bool,
    needs: str = "queries and keys",
    hopper: bool = False,
) -> Callable[[], object]:
    from siglip_kernels.attention.backward import attention_backward
    from siglip_kernels.attention.config import is_short
    from siglip_kernels.attention.hopper import attention_backward_hopper
    from siglip_kernels.attention.short import attention_short_backward

    (q, k, v), lengths = _tensors(tokens, head_dim, dtype, padded)
    out = torch.empty(q.shape, device="meta", dtype=dtype)
    packed_grad = None if padded else torch.empty(64, tokens, 3, 16, head_dim, device="meta", dtype=dtype)
    scale, needs_q, needs_k_or_v = head_dim**-0.5, "queries" in needs, "keys" in needs
    if not hopper and is_short(q, k):
        return lambda: attention_short_backward(out, q, k, v, lengths, scale, needs_q, needs_k_or_v, packed_grad)
    backward = attention_backward_hopper if hopper else attention_backward
    statistics = torch.empty(q.shape[0], q.shape[2], tokens, device="meta")
    return lambda: backward(out, q, k, v, out, statistics, lengths, scale, needs_q, needs_k_or_v, packed_grad)


def hopper_launches() -> Iterator[Launch]:
    """Each head dim once; two and three consumers; with and without a narrower last step, lengths and statistics."""
    for tokens, head_dim, dtype, padded in (
        (729, 72, torch.bfloat16, False),
        (729, 72, torch.bfloat16, True),
        (1024, 64, torch.bfloat16, False),
        (729, 64, torch.bfloat16, False),
        (729, 64, torch.bfloat16, True),
        (767, 64, torch.bfloat16, False),
        (577, 80, torch.float16, False),
        (577, 96, torch.bfloat16, False),
        (1024, 128, torch.bfloat16, False),
        (729, 128, torch.float16, True),
    ):
        name = _name(tokens, head_dim, dtype, padded)
        yield Launch(f"{name} forward", _forward(tokens, head_dim, dtype, padded, family="hopper"))
        if (tokens, head_dim) not in ((729, 64), (767, 64)):  # the backward always has two consumers
            yield Launch(f"{name} backward", _backward(tokens, head_dim, dtype, padded, hopper=True))


def blackwell_launches() -> Iterator[Launch]:
    """Each head dim once, without lengths, which the portable kernel serves."""
    for tokens, head_dim, dtype in (
        (729, 72, torch.bfloat16),
        (1024, 64, torch.bfloat16),
        (577, 80, torch.float16),
        (577, 96, torch.bfloat16),
        (1024, 128, torch.bfloat16),
        (729, 32, torch.float16),
    ):
        name = _name(tokens, head_dim, dtype, padded=False)
        yield Launch(f"{name} forward", _forward(tokens, head_dim, dtype, padded=False, family="blackwell"))
