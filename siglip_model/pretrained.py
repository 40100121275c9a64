"""What every model class shares: backend, device, dtype, files, and transformers' calling conventions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from siglip_kernels.errors import unsupported
from siglip_model import backends
from siglip_model.checkpoints.commit import CONFIG_NAME
from siglip_model.checkpoints.errors import naming
from siglip_model.checkpoints.files import split_hub_arguments
from siglip_model.config import PretrainedConfig
from siglip_model.devices import resolve_device_map
from siglip_model.encoder import Encoder
from siglip_model.layers import UsesBackend
from siglip_model.outputs import ModelOutput

DEFAULT_BACKEND = "sdpa"  # as in transformers
MOST_NEW_VALUES = 2**26  # that a checkpoint's own config.json may add to its weights; a caller's may add any number


class PreTrainedModel(nn.Module):
    """Base class of the models.

    backend (alias attn_implementation): eager, sdpa, flash_attention_2, triton, or auto.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "input_ids"
    new_parameters: ClassVar[tuple[str, ...]] = ()  # prefixes of parameters that a checkpoint may lack

    def __init__(self, config: PretrainedConfig, *, backend: str | None = None, attn_implementation: str | None = None):
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__}: config is a {type(config).__name__}; supported: {self.config_class.__name__}"
            )
        self.config: Any = config
        self._requested_backend = _one_of(
            "backend", backend, "attn_implementation", attn_implementation, DEFAULT_BACKEND
        )
        # Before any weight is allocated and initialised, which takes up to a minute.
        self._backend = backends.resolve(self._requested_backend, torch.get_default_device())

    def post_init(self) -> None:
        """Initialise the weights, unless they are on the meta device and will be loaded. Each __init__ ends with it."""
        if next(self.parameters()).device.type != "meta":
            with torch.no_grad():
                self.init_weights()
        self._apply_backend()

    def init_weights(self) -> None:
        """Initialise as transformers does (big_vision's scheme), each submodule by its own `init_weights`."""
        for module in self.modules():
            if module is not self and not isinstance(module, PreTrainedModel) and hasattr(module, "init_weights"):
                module.init_weights()  # type: ignore[operator]

    # Backend -----------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """The name of the backend in use; "auto" is resolved."""
        return self._backend.name

    def set_backend(self, name: str) -> None:
        """Switch the backend. Raises ValueError for an unknown name, MissingBackendError if it cannot run here."""
        self._backend = backends.resolve(name, self.device)
        self._requested_backend = name
        self._apply_backend()

    def set_attn_implementation(self, name: str) -> None:
        """transformers' name for `set_backend`."""
        self.set_backend(name)

    def _apply_backend(self) -> None:
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module._backend, module._requested_backend = self._backend, self._requested_backend
            if isinstance(module, UsesBackend):
                module.ops = self._backend

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._requested_backend == "auto":  # a move to another device may change the backend
            self.set_backend("auto")
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._requested_backend == "auto":  # a pickle may be loaded on another device
            self.set_backend("auto")

    def _check_exporter(self) -> None:
        """Raises where the backend's operations cannot be exported. Each tower's forward calls it."""
        if torch.onnx.is_in_onnx_export() and not self._backend.exports_to_onnx:
            exportable = (name for name, backend in backends.BACKENDS.items() if backend.exports_to_onnx)
            got = f"is {self.backend!r}, whose operations ONNX does not have"
            raise unsupported("ONNX export", "backend", got, f"{', '.join(exportable)}: model.set_backend(...)")

    def get_input_embeddings(self) -> Any:
        """The module that receives `main_input_name` first."""
        raise NotImplementedError(f"{type(self).__name__} has no input embeddings")

    # Device, dtype, sizes ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        tables = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        left_out = {id(table) for table in tables} if exclude_embeddings else set()
        chosen = (p for p in self.parameters() if id(p) not in left_out)
        return sum(p.numel() for p in chosen if p.requires_grad or not only_trainable)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In training, recompute every n-th layer in the backward pass instead of keeping its activations.

        activation_checkpointing_kwargs: for torch.utils.checkpoint.checkpoint, added to use_reentrant=False.
        Raises ValueError for every_n_layers < 1 and for offload=True, which transformers' Trainer can pass.
        """
        if every_n_layers < 1:
            raise unsupported("activation_checkpointing_enable", "every_n_layers", f"is {every_n_layers}", "1 and more")
        if offload:
            raise unsupported("activation_checkpointing_enable", "offload", "is True", "False")
        self._set_checkpointing({"use_reentrant": False, **(activation_checkpointing_kwargs or {})}, every_n_layers)

    def activation_checkpointing_disable(self) -> None:
        self._set_checkpointing(None)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """transformers' older name for `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(isinstance(module, Encoder) and module.checkpointing is not None for module in self.modules())

    def _set_checkpointing(self, arguments: dict[str, Any] | None, every_n_layers: int = 1) -> None:
        for module in self.modules():
            if isinstance(module, Encoder):
                module.checkpointing, module.checkpointed_every = arguments, every_n_layers

    def _default(self, asked: bool | None, what: str) -> bool:
        return getattr(self.config, f"output_{what}") if asked is None else asked

    # Files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: PretrainedConfig | None = None,
        backend: str | None = None,
        attn_implementation: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | int | dict[str, Any] | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint that transformers or this package saved, in evaluation mode.

        pretrained_model_name_or_path: a directory or a Hugging Face Hub id.
        config: replaces the checkpoint's config.json.
        backend (alias attn_implementation): eager, sdpa, flash_attention_2, triton or auto.
        dtype (alias torch_dtype): of the weights; None and "auto" keep the checkpoint's dtype.
        device_map: one device; "auto" is CUDA where available.
        ignore_mismatched_sizes: re-initialise tensors whose shape differs from the checkpoint's, e.g. a classification
            head for another number of labels, with a warning that names them. Otherwise they raise an error.
        revision, cache_dir, local_files_only, token: as in huggingface_hub. Other arguments override config fields.
        Raises CheckpointError (an OSError and ValueError), naming file, tensor and shapes, for missing, unexpected or
        damaged tensors, TypeError for unknown arguments, MissingBackendError if the backend cannot run here.
        """
        from siglip_model.checkpoints.loading import load_weights
        from siglip_model.checkpoints.sizes import buildable, differing_sizes
        from siglip_model.checkpoints.weights import find_weights

        backend = _one_of("backend", backend, "attn_implementation", attn_implementation, None)
        dtype = _one_of("dtype", _as_dtype(dtype), "torch_dtype", _as_dtype(torch_dtype), None)
        hub, kwargs = split_hub_arguments(kwargs)
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError(f"{cls.__name__}: use_safetensors is False; supported: True (no pickle is ever opened)")
        kwargs.pop("low_cpu_mem_usage", None)  # always the case
        stored_config = config is None and not kwargs
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        for name in kwargs:
            if name != "num_labels" and name not in vars(config):
                raise TypeError(f"{cls.__name__}.from_pretrained got an unexpected argument {name!r}")
        if kwargs:
            config = type(config).from_dict(config.to_dict(), **kwargs)
        device = resolve_device_map(device_map)
        name = DEFAULT_BACKEND if backend is None else backend
        backends.resolve(name, device)  # before any file of the weights is opened
        weights = find_weights(pretrained_model_name_or_path, hub)
        config_file = os.path.join(pretrained_model_name_or_path, CONFIG_NAME)
        in_file = naming(config_file) if stored_config else nullcontext()
        with torch.device("meta"), _WithoutInitialisation(), in_file:
            model = cls(buildable(config, weights), backend="eager")
        load_weights(
            model,
            weights,
            dtype=dtype,
            device=device,
            new_parameters=cls.new_parameters,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            most_new_values=MOST_NEW_VALUES if stored_config else math.inf,
            differing_sizes=differing_sizes(config, weights),
            config_source=config_file if stored_config else "its config",
        )
        model.set_backend(name)
        return model.eval()

    def init_new_parameters(self, names: list[str]) -> None:
        """Initialise only these parameters, as `init_weights` does."""
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]  # self and its towers
        with torch.no_grad(), _InitialisingOnly([self.get_parameter(name) for name in names]):
            for model in models:
                model.init_weights()

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: str = "50GB", **kwargs: Any) -> None:
        """Write config.json and model.safetensors, or shards, as transformers does.

        max_shard_size: bytes, or a string such as "5GB". state_dict: tensors to write instead of the model's.
        The files of an older checkpoint are replaced atomically: interrupted, a whole checkpoint remains.
        """
        from siglip_model.checkpoints.saving import save_checkpoint

        if kwargs.pop("safe_serialization", True) is False:
            raise ValueError("save_pretrained: safe_serialization is False; supported: True (safetensors only)")
        state_dict = kwargs.pop("state_dict", None)
        if kwargs:
            raise TypeError(f"save_pretrained got unexpected arguments: {', '.join(kwargs)}")
        config = self.config.to_dict()
        config["architectures"] = [type(self).__name__]
        config.pop("torch_dtype", None)  # the name before transformers 5, kept from an older file
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        save_checkpoint(
            save_directory,
            self.state_dict() if state_dict is None else state_dict,
            config,
            max_shard_size=max_shard_size,
        )


class _WithoutInitialisation(TorchFunctionMode):
    """Skips torch.nn.init: loading replaces its values, and on the meta device it imports the compiler (1.3 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class _InitialisingOnly(TorchFunctionMode):
    """Skips in-place operations on all tensors but these."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
        tensor = args[0] if args else kwargs.get("tensor")
        if in_place and not any(tensor is chosen for chosen in self.tensors):
            return tensor
        return func(*args, **kwargs)


def finish(output: ModelOutput, model: PreTrainedModel, return_dict: bool | None) -> Any:
    """The output, or its tuple if return_dict (by default the configuration's) is False."""
    return output if (model.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _one_of(name: str, value: Any, alias: str, alias_value: Any, default: Any) -> Any:
    if value is not None and alias_value is not None and value != alias_value:
        raise ValueError(f"{name} is {value!r} and its alias {alias} is {alias_value!r}; give one of them")
    return next((given for given in (value, alias_value) if given is not None), default)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise ValueError(f"dtype is {dtype!r}; supported: a floating-point torch.dtype, its name, or 'auto'")
