"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685) in the layers of both towers, by PEFT."""

from __future__ import annotations

import copy
from typing import Any

from siglip_model.model import SiglipModel

TARGETS = r".*encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


def add_adapters(model: SiglipModel, rank: int) -> None:
    """Adapters in place, scaled by 2; they, t' and b alone are trained. Raises RuntimeError without PEFT."""
    config = _peft().LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    _peft().inject_adapter_in_model(config, model)
    model.logit_scale.requires_grad_(True)
    model.logit_bias.requires_grad_(True)


def add_same_adapters(model: SiglipModel, source: SiglipModel) -> None:
    """Gives the model adapters where `source` has them, if it has any, with weights of their own."""
    for config in getattr(source, "peft_config", {}).values():
        _peft().inject_adapter_in_model(config, model)


def merged(model: SiglipModel) -> SiglipModel:
    """A copy with the adapters added to the weights, under the names of a model without."""
    whole = copy.deepcopy(model)
    for name, module in list(whole.named_modules()):
        if isinstance(module, _peft().tuners.tuners_utils.BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(whole.get_submodule(parent), child, module.get_base_layer())
    return whole


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name == "peft":
            raise RuntimeError("lora_rank (--lora-rank) needs pip install 'siglip-triton[lora]'") from error
        raise RuntimeError(f"lora_rank (--lora-rank): PEFT cannot be imported: {_first_cause(error)}") from error
    return peft


def _first_cause(error: BaseException) -> BaseException:
    """What transformers, which PEFT imports, could not import: it raises another error, which names a class instead."""
    before = error.__cause__ or error.__context__
    return error if before is None else _first_cause(before)
