"""Replacing the forward of single instances of a library's modules, and undoing it.

The instance's class becomes a subclass of its class, with the same name: parameters, buffers, hooks, `state_dict`,
`isinstance`, gradient checkpointing and lookups of the class's name work as before, copies and pickles keep the new
class, and `restore` sets the old class again. Nothing is stored on the instance.

Every replacement decides at each call whether the kernels may compute it. If not (a tensor on the CPU, dropout, a
wrapped or hooked linear layer), the library's forward does.
"""

import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import siglip_kernels
from siglip_kernels import device
from siglip_kernels import fp8 as fp8_operations
from siglip_kernels.arguments import KERNEL_DTYPES
from siglip_kernels.device import kernels_run_on
from siglip_kernels.errors import MissingBackendError, unsupported
from siglip_kernels.fusable import has_own_forward, is_fusable, is_unhooked
from siglip_kernels.integrations.report import Left, Replaced, Report
from siglip_kernels.transforms import under_transform


class Description(NamedTuple):
    """What computes a module.

    operations: of siglip_kernels; none if the module is unsupported. remarks: on the rest of it.
    projections: weights and biases of the products that fp8 would compute.
    """

    operations: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    projections: tuple[tuple[Tensor, Tensor | None], ...] = ()


class Accelerated(nn.Module):
    """Base of the replacements, which `accelerated_class` mixes in before a library's class to override `forward`.

    original: the library's class. replacement: the mixed-in class. fp8: whether products are computed in fp8 where it
    has the operation. own: the class made of these.
    """

    original: ClassVar[Any] = None
    replacement: ClassVar[Any] = None
    fp8: ClassVar[bool] = False
    own: ClassVar[Any] = None

    @staticmethod
    def describe(module: Any) -> Description:
        """What would compute the module, without fp8."""
        raise NotImplementedError

    @staticmethod
    def example(module: Any, drawn: Callable[..., Tensor]) -> tuple[Any, ...] | None:
        """Arguments for a comparison with the library's forward, the input first, or None if there is none.

        drawn: random numbers of a shape, in the module's dtype and on its device.
        """
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        made = type(self)
        return _new, (made.replacement, made.original, made.fp8), *super().__reduce_ex__(max(protocol, 2))[2:]  # type: ignore[misc]


def _new(replacement: type[Accelerated], original: type[nn.Module], fp8: bool = False) -> nn.Module:
    made = accelerated_class(replacement, original, fp8)
    return made.__new__(made)


_made: dict[tuple[Any, Any, bool], Any] = {}


def accelerated_class(replacement: type[Accelerated], original: Any, fp8: bool) -> Any:
    """The subclass of `original` with `replacement`'s forward, under the original's name and signature."""
    key = replacement, original, fp8
    if key not in _made:
        _made[key] = _make(*key)
    return _made[key]


def _make(replacement: type[Accelerated], original: Any, fp8: bool) -> Any:

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if not isinstance(self, replacement):  # a hook stored this forward before `restore`
            return original.forward(self, *args, **kwargs)
        return replacement.forward(self, *args, **kwargs)

    made: Any = type(original)(
        original.__name__,
        (replacement, original),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "original": original,
            "replacement": replacement,
            "fp8": fp8,
            "forward": forward,
        },
    )
    made.own = made
    return made


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def original_class(module: Any) -> type[nn.Module]:
    """The library's class of a module, replaced or not."""
    return type(module).original if is_replaced(module) else type(module)


def is_replaced(module: nn.Module, replacement: type[Accelerated] = Accelerated) -> bool:
    """Whether the module's class was made here with this replacement, and not subclassed again since."""
    return isinstance(module, replacement) and type(module).own is type(module)


def _drop_shadow(module: Any) -> None:
    """Removes a forward on the instance that is its class's, and would hide that of a new class."""
    if "forward" in module.__dict__ and not has_own_forward(module):
        del module.__dict__["forward"]


def put_back(module: Any) -> None:
    """Sets the class of a replaced module to its library's again."""
    _drop_shadow(module)
    if is_replaced(module):
        module.__class__ = type(module).original


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module gets its library's class again. Other models are not changed.

    Raises UnsupportedInputError, before anything changes, if a module was subclassed since, as FSDP2 does.
    """
    _check_module("restore", model)
    for path, module in model.named_modules():
        if isinstance(module, Accelerated) and not is_replaced(module):
            got = f"has become a {type(module).__name__} at {path or 'its root'} since it was accelerated"
            raise unsupported("restore", "model", got, "undoing first what was done after accelerate")
    for module in model.modules():
        put_back(module)


# What the kernels may compute -----------------------------------------------------------------------------------------


def why_not_fusable(path: str, module: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """A report's remark on a module that has to be called, or an empty list."""
    if is_fusable(module, *kinds):
        return []
    if type(module) not in kinds:
        return [f"{path} is a {full_name(type(module))} and is called normally"]
    if not is_unhooked(module):
        return [f"{path} has hooks or a forward of its own and is called normally"]
    return [f"{path} lacks a weight or bias, or has one that is made of other tensors, and is called normally"]


def runs(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the kernels support x together with these parameters: their device, dtypes, the current autocast, and
    whether the call is within a transform of torch.func or forward-mode differentiation."""
    if (type(x) is not Tensor and type(x) is not nn.Parameter) or under_transform():
        return False
    if torch.onnx.is_in_onnx_export():  # ONNX has no operators for the kernels
        return False
    dtype = x.dtype
    if dtype not in KERNEL_DTYPES or not kernels_run_on(x.device):
        return False
    autocast = torch.is_autocast_enabled(x.device.type)
    for parameter in parameters:
        if parameter.dtype != dtype and not (autocast and parameter.dtype in KERNEL_DTYPES):
            return False
    return True


# Whole models --------------------------------------------------------------------------------------------------------


def _check_module(operation: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise unsupported(operation, "model", f"is a {type(model).__name__}", "torch.nn.Module")


def accelerate_modules(
    model: nn.Module,
    library: str,
    replacements: Callable[[str, nn.Module], type[Accelerated] | str | None],
    nothing_found: str,
    fp8: bool,
) -> Report:
    """Replaces what can be replaced in `model`, and returns a report.

    replacements: from a module's path and the module, its replacement; or why it is left; or None outside SigLIP.
    fp8: compute in fp8 what has such an operation.
    """
    _check_module("accelerate", model)
    _require_kernels(model, fp8)
    replaced: list[Replaced] = []
    left: list[Left] = []
    for path, module in reversed(list(model.named_modules())):  # children first: parents check what they have become
        if is_replaced(module) and not fp8:  # by an earlier call, and perhaps not by this one
            _leave_fp8(module)
        found = replacements(path, module)
        if found is None:
            continue
        name = original_class(module).__name__
        if isinstance(found, str):
            left.append(Left(path, name, found))
            continue
        _drop_shadow(module)
        if has_own_forward(module):
            left.append(Left(path, name, "a forward was set on the instance, e.g. by hooks that move weights"))
            continue
        described = found.describe(module)
        if not described.operations:
            left.append(Left(path, name, "; ".join(described.remarks)))
            continue
        module.__class__ = accelerated_class(found, original_class(module), fp8)
        replaced.append(entry_of(path, module))
    note = _note(model, fp8) if replaced else f"nothing was replaced: {nothing_found}" if not left else ""
    in_order = tuple(reversed(replaced)), tuple(reversed(left))
    return Report(type(model).__name__, library, *in_order, note, in_fp8(model, replaced) if fp8 else None)


def _leave_fp8(module: Any) -> None:
    kind = type(module)
    if kind.fp8:
        module.__class__ = accelerated_class(kind.replacement, original_class(module), fp8=False)


def entry_of(path: str, module: Any) -> Replaced:
    """A report's line on a replaced module."""
    operations, remarks, _ = type(module).replacement.describe(module)
    if type(module).fp8:
        operations = tuple([f"fp8.{name}" if hasattr(fp8_operations, name) else name for name in operations])
    return Replaced(path, original_class(module).__name__, operations, remarks)


def in_fp8(model: nn.Module, replaced: Iterable[Replaced]) -> fp8_operations.Quantised:
    """What the replaced modules compute in fp8. The same weights may belong to a module and to what contains it."""
    modules: list[Any] = [model.get_submodule(entry.path) for entry in replaced]
    described = [type(module).replacement.describe(module) for module in modules if type(module).fp8]
    projections = {id(weight): (weight, bias) for each in described for weight, bias in each.projections}
    found = fp8_operations.Quantised()
    for weight, bias in projections.values():
        found.add(weight, bias)
    return found


def operations_of(module: Any) -> ModuleType:
    """What computes the products of a replaced module: siglip_kernels, or its fp8, which raises in training mode."""
    if not type(module).fp8:
        return siglip_kernels
    if module.training:
        got = "was True, which is for inference, and the model is in training mode"
        raise unsupported("accelerate", "fp8", got, "model.eval(); to train, accelerate it without fp8")
    return fp8_operations


def _require_kernels(model: nn.Module, fp8: bool) -> None:
    """Raises MissingBackendError if kernels do not run on the GPU of a parameter, or on no GPU of this machine.

    Without any GPU a model may be accelerated: it may be moved, and until then the library computes.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise MissingBackendError("accelerate: the kernels need Triton, which is not installed") from error
    where: ModuleType = fp8_operations if fp8 else device
    devices = {parameter.device for parameter in model.parameters()}
    reasons = [where.why_not(each) for each in devices if each.type == "cuda"]
    if not reasons and not any(kernels_run_on(each) for each in devices):
        reasons = [where.why_no_gpu()]
    for reason in reasons:
        if reason is not None:
            instead = "accelerate the model without fp8, or use it as it is" if fp8 else "use the model as it is"
            raise MissingBackendError(f"accelerate: {reason}; {instead}, without accelerate")


def _note(model: nn.Module, fp8: bool) -> str:
    devices = {parameter.device for parameter in model.parameters()}
    notes = []
    if not any(kernels_run_on(device) for device in devices):
        kinds = ", ".join(sorted({device.type for device in devices}))
        notes.append(
            f"its parameters are on {kinds}, where the library computes; the kernels are used once it is "
            "on a CUDA device"
        )
    wide = sorted({str(parameter.dtype) for parameter in model.parameters()} - {str(dtype) for dtype in KERNEL_DTYPES})
    if wide:
        notes.append(f"the library computes parameters of {', '.join(wide)}")
    if fp8 and any(parameter.dtype == torch.float32 for parameter in model.parameters()):
        notes.append("with parameters of torch.float32 fp8 needs torch.autocast")
    return "; ".join(notes)


def require_version(library: str, distribution: str, at_least: tuple[int, ...], below: tuple[int, ...]) -> str:
    """The library's version. Raises MissingBackendError, naming it, if it is not supported."""
    version = importlib.metadata.version(distribution)
    numbers = tuple(_leading_numbers(version))
    if not at_least <= numbers < below:
        supported = f"{'.'.join(map(str, at_least))} to below {'.'.join(map(str, below))}"
        raise MissingBackendError(
            f"siglip_kernels.integrations.{library}: {distribution} {version} is not supported; supported: {supported}"
        )
    return version


def _leading_numbers(version: str) -> Iterator[int]:
    for part in version.split("."):
        if not part.isdigit():
            return
        yield int(part)
