"""What `accelerate` did to a model, module by module."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from siglip_kernels.fp8 import Quantised


@dataclass(frozen=True)
class Replaced:
    """A module that now calls the kernels where they run.

    operations: the operations of siglip_kernels that then compute it.
    remarks: which parts PyTorch still computes, and why.
    """

    path: str
    module: str
    operations: tuple[str, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """A module of a SigLIP tower that was not replaced, and why."""

    path: str
    module: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was replaced and what was not; `print(report)` shows equal layers on one line.

    note: on the whole model, such as that it is not on a CUDA device yet. fp8: how much of it is in fp8, if asked for.
    """

    model: str
    library: str
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    note: str = ""
    fp8: Quantised | None = None

    def __str__(self) -> str:
        count = f"{len(self.replaced)} modules replaced, to use siglip_kernels where its kernels run"
        lines = [f"{self.model} ({self.library}): {count}"]
        lines += [f"note: {self.note}"] * bool(self.note)
        lines += [str(self.fp8)] * (self.fp8 is not None)
        rows = [(entry.path, (entry.module, ", ".join(entry.operations), entry.remarks)) for entry in self.replaced]
        for path, (module, operations, remarks) in _collapsed(rows):
            lines.append(f"  {path} ({module}): {operations}")
            lines += [f"    but: {remark}" for remark in remarks]
        if self.left:
            lines.append("not replaced:")
            left = [(entry.path, (entry.module, entry.reason)) for entry in self.left]
            lines += [f"  {path} ({module}): {reason}" for path, (module, reason) in _collapsed(left)]
        return "\n".join(lines)


def _collapsed(rows: Iterable[tuple[str, tuple]]) -> list[tuple[str, tuple]]:
    """Merges rows that differ only in the numbers of their paths: layers.0.mlp, layers.1.mlp → layers.0-1.mlp."""
    groups: dict[tuple, list[tuple[int, ...]]] = {}
    for path, what in rows:
        numbers = tuple(int(number) for number in re.findall(r"\d+", path))
        groups.setdefault((re.sub(r"\d+", "{}", path), what), []).append(numbers)
    return [
        (pattern.format(*(_ranges(set(column)) for column in zip(*numbers, strict=True))) or "(the model)", what)
        for (pattern, what), numbers in groups.items()
    ]


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} → "0-2,5"."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ",".join(f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))
