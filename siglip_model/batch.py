"""The result of tokenizers and processors: a mapping of lists or tensors with attribute access."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import torch

TENSOR_KINDS = ("pt", "np")
_TARGETS = "BatchFeature.to: got {}; supported: a device, then a torch.dtype, or one of them"


class BatchFeature(UserDict[str, Any]):
    """A mapping, so that `model(**batch)` works, with attribute access and `to`; `batch.data` is the dict within.

    A UserDict, as in transformers, whose pipelines tell tokens by it. `batch[start:stop]` is a plain dict with that
    slice of every value. tensor_type: see `convert_to_tensors`.
    """

    def __init__(self, data: Any = None, tensor_type: Any = None, **fields: Any) -> None:
        super().__init__({} if data is None else data, **fields)
        self.convert_to_tensors(tensor_type)

    def convert_to_tensors(self, tensor_type: Any = None) -> BatchFeature:
        """Replaces numbers, lists and arrays by tensors ("pt") or arrays ("np"); None changes nothing. Returns self."""
        kind = check_tensor_kind(tensor_type)
        for name, value in self.items() if kind else ():
            self[name] = _as_tensor(name, value, str(kind))
        return self

    def __getattr__(self, name: str) -> Any:
        fields = vars(self).get("data", {})  # which a copy lacks at first
        if name not in fields:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it holds {list(fields)}")
        return fields[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            super().__setattr__(name, dict(value))
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it holds {list(self)}")
        del self[name]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.items()}
        return super().__getitem__(key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.data,)

    def copy(self) -> BatchFeature:
        return type(self)(self)

    def to(
        self,
        *target: str | int | torch.device | torch.dtype,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> BatchFeature:
        """Moves every tensor to a device and casts floating tensors to a dtype, in place; returns self.

        `batch.to("cuda")`, `batch.to(torch.float16)`, `batch.to("cuda", torch.float16)`, or by name: device=, dtype=.
        Integer tensors (token ids, masks) keep their dtype; tensors within lists and tuples are included, other values
        are kept. Raises TypeError for an argument that is neither a device nor a dtype.
        """
        for argument in target:
            if isinstance(argument, torch.dtype) and dtype is None:
                dtype = argument
            elif isinstance(argument, (str, int, torch.device)) and not isinstance(argument, bool) and device is None:
                if dtype is not None and len(target) > 1:
                    raise TypeError(_TARGETS.format(target))
                device = argument
            else:
                raise TypeError(_TARGETS.format(target))

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                cast = dtype if value.is_floating_point() else None
                return value.to(device=device, dtype=cast, non_blocking=non_blocking)
            if type(value) in (list, tuple):
                return type(value)(move(item) for item in value)
            return value

        for name, value in self.items():
            self[name] = move(value)
        return self


def check_tensor_kind(return_tensors: Any) -> str | None:
    """Normalises `return_tensors` (also transformers' enumeration) to None, "pt" or "np". Raises ValueError."""
    if return_tensors is None:
        return None
    for kind in TENSOR_KINDS:
        if return_tensors == kind:
            return kind
    raise ValueError(f"return_tensors is {return_tensors!r}; supported: 'pt', 'np', None")


def _as_tensor(name: str, value: Any, kind: str) -> torch.Tensor | np.ndarray:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        value = torch.stack(list(value))
    if isinstance(value, (torch.Tensor, int, float, np.ndarray, np.generic)):
        if kind == "np":
            return value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
        return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    return tokens_to_tensor(name, value, kind)


def tokens_to_tensor(name: str, value: Any, kind: str) -> torch.Tensor | np.ndarray:
    """Integers in lists of equal lengths as an int64 tensor or array; with "np", unequal lengths as an object array.

    Raises ValueError, with a remedy, if lengths differ and a torch tensor was requested.
    """
    if isinstance(value, torch.Tensor):
        return value if kind == "pt" else value.numpy(force=True)
    lengths = {len(row) if isinstance(row, (list, tuple, np.ndarray)) else None for row in value}
    if kind == "np" and len(lengths) > 1 and None not in lengths:
        ragged = np.empty(len(value), dtype=object)
        ragged[:] = [np.asarray(row) for row in value]
        return ragged
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype == object:
        raise ValueError(
            f"{name}: sequences of lengths {sorted(n for n in lengths if n is not None)} cannot be stacked; "
            "give padding=True (and truncation=True), or return_tensors=None for lists"
        )
    if array.size == 0:
        array = array.astype(np.int64)
    return torch.from_numpy(array) if kind == "pt" else array
