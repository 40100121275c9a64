"""What every model class shares: backend, device, dtype, files, and transformers' calling conventions."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from siglip_kernels.errors import unsupported
from siglip_model import backends
from siglip_model.checkpoints.arguments import supported_arguments
from siglip_model.checkpoints.commit import CONFIG_NAME
from siglip_model.checkpoints.errors import naming
from siglip_model.checkpoints.files import split_hub_arguments, to_json, write_file
from siglip_model.config import PretrainedConfig
from siglip_model.devices import resolve_device_map
from siglip_model.encoder import Encoder
from siglip_model.layers import UsesBackend, weights_of
from siglip_model.outputs import ModelOutput
from siglip_model.trainer import save_config_with_weights

DEFAULT_BACKEND = "sdpa"  # as in transformers
MOST_NEW_VALUES = 2**26  # that a checkpoint's own config.json may add to its weights; a caller's may add any number


class PreTrainedModel(nn.Module):
    """Base class of the models.

    backend (alias attn_implementation): eager, sdpa, flash_attention_2, triton, triton_fp8, or auto.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "input_ids"
    input_modalities: ClassVar[tuple[str, ...]] = ("image", "text")
    supports_gradient_checkpointing: ClassVar[bool] = True
    is_parallelizable: ClassVar[bool] = False
    # Asked by accelerate, peft and transformers' Trainer.
    _no_split_modules: ClassVar[list[str]] = [
        "TextEmbeddings",
        "VisionEmbeddings",
        "NaFlexEmbeddings",
        "EncoderLayer",
        "PoolingHead",
    ]
    _supports_sdpa: ClassVar[bool] = True
    _supports_flash_attn: ClassVar[bool] = True
    _supports_flex_attn: ClassVar[bool] = False
    _supports_attention_backend: ClassVar[bool] = True
    _can_compile_fullgraph: ClassVar[bool] = True
    _keep_in_fp32_modules: ClassVar[frozenset[str]] = frozenset()
    _keep_in_fp32_modules_strict: ClassVar[frozenset[str]] = frozenset()
    _keys_to_ignore_on_save: ClassVar[None] = None
    _tied_weights_keys: ClassVar[None] = None
    all_tied_weights_keys: ClassVar[dict[str, str]] = {}
    new_parameters: ClassVar[tuple[str, ...]] = ()  # prefixes of parameters that a checkpoint may lack

    def __init__(self, config: PretrainedConfig, *, backend: str | None = None, attn_implementation: str | None = None):
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__}: config is a {type(config).__name__}; supported: {self.config_class.__name__}"
            )
        self.config: Any = config
        self.name_or_path = config.name_or_path
        default = DEFAULT_BACKEND if config._attn_implementation is None else config._attn_implementation
        self._requested_backend = _one_of("backend", backend, "attn_implementation", attn_implementation, default)
        # Before any weight is allocated and initialised, which takes up to a minute.
        self._backend = backends.resolve(self._requested_backend, torch.get_default_device())

    def post_init(self) -> None:
        """Initialise the weights, unless they are on the meta device and will be loaded. Each __init__ ends with it."""
        if next(self.parameters()).device.type != "meta":
            with torch.no_grad():
                self.init_weights()
            self.config.dtype = self.dtype
        if vars(self.config).pop("gradient_checkpointing", False):  # how older scripts ask for it
            self.activation_checkpointing_enable()
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

    def set_backend(self, name: str | Mapping[str, str]) -> None:
        """Switch the backend: of the whole model, or by part, as in {"vision_config": "eager", "": "sdpa"}.

        In a mapping the towers have the names of their configurations, and "" is the model itself. Raises ValueError
        for an unknown name or part, MissingBackendError if the backend cannot run here.
        """
        parts = self.config.parts
        by_part = name if isinstance(name, Mapping) else dict.fromkeys(parts, name)
        for part in by_part:
            if part not in parts:
                supported = ", ".join(map(repr, parts))
                raise unsupported(type(self).__name__, "backend", f"is for the part {part!r}", supported)
        chosen = {part: backends.resolve(requested, self.device) for part, requested in by_part.items()}
        modules = {"": self, **{tower.config.base_config_key: tower for tower in self._towers()}}
        for part, backend in chosen.items():
            if part in modules:  # a classifier has no text tower
                modules[part]._backend, modules[part]._requested_backend = backend, by_part[part]
            else:
                getattr(self.config, part)._attn_implementation = backend.name
        self._apply_backend()
        for backend in dict.fromkeys(chosen.values()):
            backend.prepare(self)

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, str]) -> None:
        """transformers' name for `set_backend`."""
        given = attn_implementation
        for name in given.values() if isinstance(given, Mapping) else (given,):
            if name not in (*backends.BACKENDS, "auto"):
                supported = ", ".join((*backends.BACKENDS, "auto"))
                raise ValueError(f'Specified `attn_implementation="{name}"` is not supported; supported: {supported}')
        self.set_backend(given)

    def _towers(self) -> list[PreTrainedModel]:
        return [module for module in self.modules() if isinstance(module, PreTrainedModel) and module is not self]

    def _apply_backend(self) -> None:
        for module in self.modules():
            if isinstance(module, UsesBackend):
                module.ops = self._backend
        self.config._backend = self.backend
        for tower in self._towers():
            tower._apply_backend()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._follow_weights()
        return self

    def _follow_weights(self) -> None:
        """What depends on the weights' dtype and device, after they may have changed."""
        self.config.dtype = self.dtype
        if self._requested_backend == "auto":
            self._backend = backends.resolve("auto", self.device)
            self._apply_backend()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_weights()  # a pickle may be loaded on another device

    def _check_backend(self) -> None:
        """Raises where the backend's operations cannot be exported or trained. Each tower's forward calls it."""
        if self.training and not self._backend.trains:
            training = (name for name, backend in backends.BACKENDS.items() if backend.trains)
            got = f"is {self.backend!r}, which is for inference, and the model is in training mode"
            raise unsupported(type(self).__name__, "backend", got, f"model.eval(), or {', '.join(training)} to train")
        if torch.onnx.is_in_onnx_export() and not self._backend.exports_to_onnx:
            exportable = (name for name, backend in backends.BACKENDS.items() if backend.exports_to_onnx)
            got = f"is {self.backend!r}, whose operations ONNX does not have"
            raise unsupported("ONNX export", "backend", got, f"{', '.join(exportable)}: model.set_backend(...)")

    # Embeddings --------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> Any:
        """The module that receives `main_input_name` first."""
        holder, name = self._input_embeddings()
        return getattr(holder, name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace that module."""
        holder, name = self._input_embeddings()
        setattr(holder, name, value)

    def _input_embeddings(self) -> tuple[nn.Module, str]:
        """The module that has the input embeddings as an attribute, and the attribute's name."""
        raise NotImplementedError(f"{type(self).__name__} has no input embeddings")

    def get_output_embeddings(self) -> None:
        """None: SigLIP predicts no tokens."""
        return None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the number of tokens, in place, and `vocab_size` of the configuration. Returns the new embedding.

        new_num_tokens: by default the present number. pad_to_multiple_of: rounds it up. New rows are the mean of the
        present ones, or with mean_resizing=False drawn as for a new model. Raises ValueError for a model without texts.
        """
        table = self.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise unsupported(type(self).__name__, "resize_token_embeddings", "needs a text tower", "SiglipTextModel")
        old = table.weight
        rows = len(old) if new_num_tokens is None else new_num_tokens
        for name, size in (("new_num_tokens", rows), ("pad_to_multiple_of", pad_to_multiple_of or 1)):
            if not isinstance(size, int) or size < 1:
                raise unsupported("resize_token_embeddings", name, f"is {size!r}", "an integer from 1")
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        self.config.get_text_config().vocab_size = rows
        if rows == len(old):
            return table
        new = nn.Embedding(rows, old.shape[1], device=old.device, dtype=old.dtype)
        with torch.no_grad():
            new.weight.copy_(old.mean(0)) if mean_resizing else nn.init.normal_(new.weight, std=old.shape[1] ** -0.5)
            new.weight[: len(old)] = old[:rows]
        new.weight.requires_grad_(old.requires_grad)
        self.set_input_embeddings(new.train(table.training))
        return new

    def enable_input_require_grads(self) -> None:
        """Let the outputs of the input embeddings require gradients, for adapters on a frozen model."""
        self.disable_input_require_grads()
        self._input_hooks: list[Any] = [
            part.get_input_embeddings().register_forward_hook(_require_gradients) for part in self._towers() or [self]
        ]

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        for hook in getattr(self, "_input_hooks", []):
            hook.remove()
        self._input_hooks = []

    # What libraries ask ------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> PreTrainedModel:
        """The model itself, which no head wraps."""
        return self

    @property
    def accepts_loss_kwargs(self) -> bool:
        """False: the loss is a mean over the batch, so transformers' Trainer divides accumulated losses.

        Every Trainer asks this when it is built; from then on it also saves config.json.
        """
        save_config_with_weights()
        return False

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Arguments of a forward pass, a batch of three, on the model's device: those of its towers."""
        return {name: value for tower in self._towers() for name, value in tower.dummy_inputs.items()}

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Raises NotImplementedError: PEFT wraps the model itself, and saves and loads its adapters."""
        raise NotImplementedError(f"{type(self).__name__}.add_adapter; supported: peft.get_peft_model(model, config)")

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: see `add_adapter`."""
        supported = "peft.PeftModel.from_pretrained(model, path)"
        raise NotImplementedError(f"{type(self).__name__}.load_adapter; supported: {supported}")

    @classmethod
    def can_generate(cls) -> bool:
        """False: SigLIP generates no text."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: no weights are tied."""

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    # Device, dtype, sizes ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(weights_of(self)).device

    @property
    def dtype(self) -> torch.dtype:
        weights = list(weights_of(self))
        return next((each.dtype for each in weights if each.is_floating_point()), weights[0].dtype)

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
        """transformers' older name for `is_activation_checkpointing`."""
        return self.is_activation_checkpointing

    @property
    def is_activation_checkpointing(self) -> bool:
        return any(isinstance(module, Encoder) and module.checkpointing is not None for module in self.modules())

    def _set_checkpointing(self, arguments: dict[str, Any] | None, every_n_layers: int = 1) -> None:
        for module in self.modules():
            if isinstance(module, Encoder):
                module.checkpointing, module.checkpointed_every = arguments, every_n_layers

    def _default(self, asked: Any, what: str) -> Any:
        return getattr(self.config, f"output_{what}") if asked is None else asked

    # Files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *,
        config: PretrainedConfig | str | Path | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        variant: str | None = None,
        backend: str | Mapping[str, str] | None = None,
        attn_implementation: str | Mapping[str, str] | None = None,
        check: bool = False,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | int | dict[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint that transformers or this package saved, in evaluation mode.

        pretrained_model_name_or_path: a directory or a Hugging Face Hub id; None with both config and state_dict.
        config: replaces the checkpoint's config.json: a configuration, or the directory, file or id to load one from.
        state_dict: replaces the checkpoint's tensors, which are then not read.
        variant: of the weights' file names, such as "fp16" for model.fp16.safetensors.
        backend (alias attn_implementation): eager, sdpa, flash_attention_2, triton, triton_fp8 or auto; or one per
            part, see `set_backend`.
        check: compare the image embeddings of triton_fp8 with those of sdpa, see `siglip_model.fp8.check`.
        dtype (alias torch_dtype): of the weights; None and "auto" keep the checkpoint's dtype.
        device_map: one device; "auto" is CUDA where available.
        max_memory: bytes, or a string such as "10GB", by ordinal of a GPU or "cpu"; the model's device must be among
            them and hold the weights.
        ignore_mismatched_sizes: re-initialise tensors whose shape differs from the checkpoint's, e.g. a classification
            head for another number of labels, with a warning that names them. Otherwise they raise an error.
        output_loading_info: return also a dict of missing_keys, unexpected_keys, mismatched_keys and error_msgs.
        revision, cache_dir, local_files_only, token, subfolder, force_download: as in huggingface_hub. Other arguments
            override config fields, and for towers' configurations those that a dict names.
        Tensors that the model does not have are not loaded; a warning names them unless they are another tower's.
        Raises CheckpointError (an OSError and ValueError), naming file, tensor and shapes, for missing or damaged
        tensors, TypeError for unknown arguments, ValueError for transformers' arguments whose effect is not supported,
        MissingBackendError if the backend cannot run here.
        """
        from siglip_model.checkpoints.loading import load_weights
        from siglip_model.checkpoints.sizes import buildable, differing_sizes, memory_limit
        from siglip_model.checkpoints.weights import find_weights, given_weights

        backend = _one_of("backend", backend, "attn_implementation", attn_implementation, None)
        dtype = _one_of("dtype", _as_dtype(dtype), "torch_dtype", _as_dtype(torch_dtype), None)
        hub, kwargs = split_hub_arguments(supported_arguments(f"{cls.__name__}.from_pretrained", kwargs))
        stored_config = config is None and not kwargs
        config = cls._loaded_config(pretrained_model_name_or_path, config, state_dict, hub, kwargs)
        device = resolve_device_map(device_map)
        if device.type == "meta" and device_map is None:
            raise RuntimeError(
                "You are using `from_pretrained` with a meta device context manager or meta as the default device;"
                " weights can be loaded to a device that holds values"
            )
        config_file = os.path.join(pretrained_model_name_or_path or "", hub.get("subfolder") or "", CONFIG_NAME)
        configured = {part: (getattr(config, part) if part else config)._attn_implementation for part in config.parts}
        wanted = {part: DEFAULT_BACKEND if name is None else name for part, name in configured.items()}
        if isinstance(backend, Mapping):
            wanted |= backend
        elif backend is not None:
            wanted = dict.fromkeys(wanted, backend)
        with naming(config_file) if stored_config and backend is None else nullcontext():
            for name in wanted.values():
                backends.resolve(name, device)  # before any file of the weights is opened
        weights = given_weights(state_dict) if state_dict is not None else None
        if weights is None:
            weights = find_weights(pretrained_model_name_or_path, hub, variant)  # type: ignore[arg-type]
        in_file = naming(config_file) if stored_config else nullcontext()
        with torch.device("meta"), _WithoutInitialisation(), in_file:
            model = cls(buildable(config, weights), backend="eager")
        loading_info = load_weights(
            model,
            weights,
            dtype=dtype,
            device=device,
            new_parameters=cls.new_parameters,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            most_new_values=MOST_NEW_VALUES if stored_config else math.inf,
            most_bytes=memory_limit(max_memory, device),
            differing_sizes=differing_sizes(config, weights),
            config_file=config_file if stored_config else None,
        )
        model.set_backend(wanted)
        for part in (model, *model._towers()):
            part._follow_weights()
        model.name_or_path = str(pretrained_model_name_or_path or "")
        model.eval()
        if check:
            from siglip_model import fp8

            fp8.check(model)
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def _loaded_config(
        cls,
        path_or_id: str | Path | None,
        config: PretrainedConfig | str | Path | None,
        state_dict: Any,
        hub: dict[str, Any],
        overrides: dict[str, Any],
    ) -> PretrainedConfig:
        """The configuration of `from_pretrained`: the model's own object."""
        if path_or_id is None and (config is None or state_dict is None):
            raise ValueError(
                f"{cls.__name__}.from_pretrained: pretrained_model_name_or_path is None; supported: None with both "
                "config and state_dict"
            )
        if config is None or isinstance(config, (str, os.PathLike)):
            found = cls.config_class.from_pretrained(config or path_or_id, **hub)  # type: ignore[arg-type]
        else:
            found = copy.deepcopy(config)
        for name in overrides:
            if name != "num_labels" and name not in vars(found):
                raise TypeError(f"{cls.__name__}.from_pretrained got an unexpected argument {name!r}")
        return type(found).from_dict(found.to_dict(), **overrides) if overrides else found

    @classmethod
    def _from_config(
        cls,
        config: PretrainedConfig,
        *,
        backend: str | Mapping[str, str] | None = None,
        attn_implementation: str | Mapping[str, str] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A model with new weights; what `AutoModel.from_config` calls. Arguments: see `from_pretrained`."""
        backend = _one_of("backend", backend, "attn_implementation", attn_implementation, None)
        dtype = _one_of("dtype", _as_dtype(dtype), "torch_dtype", _as_dtype(torch_dtype), _as_dtype(config.dtype))
        unknown = supported_arguments(f"{cls.__name__}.from_config", kwargs)
        if unknown:
            raise TypeError(f"{cls.__name__}.from_config got an unexpected argument {next(iter(unknown))!r}")
        model = cls(copy.deepcopy(config))
        if backend is not None:
            model.set_backend(backend)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]

    def init_new_parameters(self, names: list[str]) -> None:
        """Initialise only these parameters, as `init_weights` does."""
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]  # self and its towers
        with torch.no_grad(), _InitialisingOnly([self.get_parameter(name) for name in names]):
            for model in models:
                model.init_weights()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write config.json and model.safetensors, or shards, as transformers does.

        is_main_process: of several processes that call this, the one that writes; the others do nothing.
        state_dict: tensors to write instead of the model's, such as those that accelerate or FSDP gathered.
        save_function: ignored, as in transformers 5; accelerate's documentation passes `accelerator.save`.
        push_to_hub: also upload the files. token, and `push_to_hub`'s arguments in kwargs, say where to.
        max_shard_size: bytes, or a string such as "5GB". variant: "fp16" writes model.fp16.safetensors.
        The files of an older checkpoint are replaced atomically: interrupted, a whole checkpoint remains.
        Raises ValueError for safe_serialization=False: safetensors only.
        """
        from siglip_model.checkpoints.saving import save_checkpoint
        from siglip_model.checkpoints.upload import FILES, upload

        if safe_serialization is False:
            raise ValueError("save_pretrained: safe_serialization is False; supported: True (safetensors only)")
        for name, neutral in (("save_peft_format", True), ("save_original_format", True)):
            kwargs.pop(name, neutral)  # of transformers' adapters and renamed tensors, which are not used here
        if kwargs.pop("distributed_checkpoint", False):
            raise unsupported("save_pretrained", "distributed_checkpoint", "is True", "False: pass state_dict")
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained got unexpected arguments: {', '.join(kwargs)}")
        if not is_main_process:
            return
        tensors = self.state_dict() if state_dict is None else state_dict
        save_checkpoint(save_directory, tensors, self._config_to_save(), max_shard_size=max_shard_size, variant=variant)
        if push_to_hub:
            upload(save_directory, FILES, token=token, **kwargs)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> Any:
        """Write the model to a repository of the Hugging Face Hub. Arguments: see `checkpoints.upload.upload`."""
        from siglip_model.checkpoints.upload import save_and_upload

        return save_and_upload(partial(self.save_pretrained, max_shard_size=max_shard_size), repo_id, **kwargs)

    def save_config(self, save_directory: str | Path) -> None:
        """Write config.json alone, as `save_pretrained` does."""
        write_file(save_directory, CONFIG_NAME, to_json(self._config_to_save()))

    def _config_to_save(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            **self.config.to_dict(),
            "architectures": [type(self).__name__.removeprefix("FSDP")],  # which fully_shard adds
            "dtype": str(self.dtype).removeprefix("torch."),
        }


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


def _require_gradients(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


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
