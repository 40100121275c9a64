"""Arguments of transformers' `from_pretrained` that change nothing here, and those whose effect is not supported."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping
from typing import Any

from siglip_kernels.errors import unsupported
from siglip_model.checkpoints.fields import shown

# No effect at any value: no pickle is opened, no code from a checkpoint is run, weights are always mapped, and the rest
# is transformers' bookkeeping.
_WITHOUT_EFFECT = {
    "weights_only",
    "code_revision",
    "low_cpu_mem_usage",
    "disable_mmap",
    "offload_state_dict",
    "offload_buffers",
    "mirror",
    "tqdm_class",
    "adapter_name",
    "_fast_init",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
}

# What to do instead of asking for the effect. None, False and empty values ask for nothing.
_UNSUPPORTED = {
    "quantization_config": "None: quantise the loaded model, for instance with torchao's quantize_",
    "offload_folder": "None: the whole model is on one device",
    "tp_plan": "None: use torch.distributed.tensor.parallel.parallelize_module on the loaded model",
    "tp_size": "None: use torch.distributed.tensor.parallel.parallelize_module on the loaded model",
    "device_mesh": "None: use torch.distributed.tensor.parallel.parallelize_module on the loaded model",
    "distributed_config": "None: wrap the loaded model in DDP or FSDP",
    "use_kernels": "False: choose the kernels with backend=",
    "kernel_config": "None: choose the kernels with backend=",
    "allow_all_kernels": "False: choose the kernels with backend=",
    "experts_implementation": "None: SigLIP has no experts",
    "fusion_config": "None: the backends fuse by themselves",
    "key_mapping": "None: rename the tensors and give them as state_dict=",
    "gguf_file": "None: safetensors only",
    "generation_config": "None: SigLIP generates no text",
    "adapter_kwargs": "None: load adapters with peft.PeftModel.from_pretrained",
    "from_tf": "False: safetensors only",
    "from_flax": "False: safetensors only",
}


def split_unused(arguments: Mapping[str, Any], known: Container[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The arguments, and None. With return_unused_kwargs=True among them: the known ones, and the others."""
    left = dict(arguments)
    if not left.pop("return_unused_kwargs", False):
        return left, None
    unused = {name: left.pop(name) for name in list(left) if name not in known}
    return left, unused


def supported_arguments(where: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those of the two kinds above.

    Raises ValueError, naming the argument, for an effect that is not supported. Warns for trust_remote_code=True: code
    from a checkpoint is never run.
    """
    left = {}
    for name, value in arguments.items():
        if name in _UNSUPPORTED:
            if value is not None and value is not False and value != {}:
                raise unsupported(where, name, f"is {shown(value)}", _UNSUPPORTED[name])
        elif name == "use_safetensors":
            if value is False:
                raise unsupported(where, name, "is False", "True (no pickle is ever opened)")
        elif name == "trust_remote_code":
            if value:
                warnings.warn(
                    "trust_remote_code has no effect: code from a checkpoint is never run", UserWarning, stacklevel=3
                )
        elif name not in _WITHOUT_EFFECT:
            left[name] = value
    return left
