"""SigLIP in open_clip: timm's vision tower, open_clip's text transformer, and the loss of its training script.

    from siglip_kernels.integrations import open_clip as siglip_open_clip

    report = siglip_open_clip.accelerate(model)
    siglip_open_clip.restore(model)

    siglip_open_clip.register_loss()   # the loss of open_clip's create_loss and create_task is now SigLipLoss from here
    siglip_open_clip.restore_loss()

The training script with both, arguments as for `python -m open_clip_train.main`:

    python -m siglip_kernels.integrations.open_clip --siglip --model ViT-SO400M-14-SigLIP ...
"""

import sys
from typing import Any

import open_clip
import open_clip.factory
import open_clip.loss
from torch import Tensor, nn

import siglip_kernels
from siglip_kernels import SigLipLoss
from siglip_kernels.fusable import is_unhooked
from siglip_kernels.integrations import timm as siglip_timm
from siglip_kernels.integrations.blocks import (
    LayerNorm,
    add_linear,
    add_pre_norm_attention,
    add_pre_norm_mlp,
    describe_called,
    describe_pre_norm_attention,
    describe_pre_norm_mlp,
    is_fusable_attention,
    is_fusable_norm,
    joined,
    packed,
    takes_norm,
    why_not_head_dim,
)
from siglip_kernels.integrations.patching import (
    Accelerated,
    accelerate_modules,
    full_name,
    operations_of,
    original_class,
    require_version,
    restore,
    runs,
)
from siglip_kernels.integrations.report import Report

__all__ = ["SigLipLoss", "accelerate", "register_loss", "restore", "restore_loss"]


def accelerate(model: nn.Module, fp8: bool = False) -> Report:
    """Compute the towers of a SigLIP model instance with the kernels: the timm tower (see
    `siglip_kernels.integrations.timm`) and the blocks and LayerNorms of open_clip's text transformer.

    Results differ only by rounding. A causal text transformer, such as CLIP's, is not changed.

    fp8: as in `siglip_kernels.integrations.transformers.accelerate`. open_clip creates models in training mode, which
    fp8 refuses: call model.eval().

    Returns a report of what was replaced and what was not, and why. `restore(model)` undoes it.
    Raises MissingBackendError, and changes nothing, unless open_clip is version 3 and Triton is installed, and
    if no GPU of this machine runs the kernels, or fp8.
    """
    version = require_version("open_clip", "open_clip_torch", (3,), (4,))
    require_version("open_clip", "timm", *siglip_timm.VERSIONS)
    towers = siglip_timm.paths_of_towers(model)
    texts = [] if not isinstance(model, nn.Module) else list(_text_transformers(model))

    def replacement(path: str, module: nn.Module) -> type[Accelerated] | str | None:
        name = full_name(original_class(module))
        if name in _LEFT:
            return _LEFT[name]
        if path in texts and module.attn_mask is not None:
            return "its attention is causal"
        for text in texts:
            if (path.startswith(f"{text}.") or not text) and model.get_submodule(text).attn_mask is None:
                return _REPLACEMENTS.get(name)
        return siglip_timm.replacement(towers, path, module)

    return accelerate_modules(model, f"open_clip {version}", replacement, "no SigLIP tower is in it", fp8)


def _text_transformers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if full_name(type(module)) == f"{_MODULE}.TextTransformer"]


_MODULE = "open_clip.transformer"


class TextLayerNorm(LayerNorm):
    """Replaces open_clip's LayerNorm and LayerNormFp32, whose result has the input's dtype even under autocast."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if takes_norm(x, self):
            return siglip_kernels.layer_norm(x, self.weight, self.bias, self.eps).to(x.dtype)
        return super(LayerNorm, self).forward(x)


class ResidualAttentionBlock(Accelerated):
    """Replaces the pre-norm block of open_clip's transformer; PyTorch computes masked and cross-attention."""

    @staticmethod
    def describe(module):
        attention, mlp, norm1, norm2 = module.attn, module.mlp, module.ln_1, module.ln_2
        if not (_is_self_attention(attention) and type(module.ls_1) is nn.Identity):
            remark = "attn is wrapped, hooked, scaled or not of SigLIP's form, and is called normally"
            first = describe_called(norm1, remark)
        elif remarks := why_not_head_dim(attention.head_dim):
            first = describe_called(norm1, *remarks)
        else:
            in_proj = [(attention.in_proj_weight, attention.in_proj_bias)]
            out = ("attn.out_proj", attention.out_proj)
            first = describe_pre_norm_attention(("ln_1", norm1), [], out, in_proj=in_proj)
        if type(module.ls_2) is nn.Identity and _is_known_mlp(mlp):
            fc1, fc2 = ("mlp.c_fc", mlp.c_fc), ("mlp.c_proj", mlp.c_proj)
            second = describe_pre_norm_mlp(("ln_2", norm2), fc1, mlp.gelu, fc2)
        else:
            second = describe_called(norm2, "mlp is wrapped, hooked or scaled, and is called normally")
        return joined(first, second)

    def forward(self: Any, q_x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Any = None) -> Tensor:
        if not runs(q_x) or k_x is not None or v_x is not None:
            return super().forward(q_x, k_x, v_x, attn_mask)
        x = self._add_attention(q_x, attn_mask)
        module = self.mlp
        if _is_known_mlp(module) and siglip_timm.drops_nothing(self.ls_2):
            return add_pre_norm_mlp(operations_of(self), x, self.ln_2, module.c_fc, module.gelu, module.c_proj)
        return x + self.ls_2(module(self.ln_2(x)))

    def _add_attention(self: Any, x: Tensor, attn_mask: Any) -> Tensor:
        norm, attention = self.ln_1, self.attn
        if (
            attn_mask is not None
            or not _is_self_attention(attention)
            or why_not_head_dim(attention.head_dim)
            or not siglip_timm.drops_nothing(self.ls_1)
            or not runs(x, attention.in_proj_weight, attention.in_proj_bias)
        ):
            return x + self.ls_1(self.attention(q_x=norm(x), attn_mask=attn_mask))
        weight, bias, heads = attention.in_proj_weight, attention.in_proj_bias, attention.num_heads
        if is_fusable_norm(norm, x):
            operations = operations_of(self)
            parameters = packed(operations, weight, bias)
            return add_pre_norm_attention(operations, x, norm, *parameters, attention.out_proj, heads)
        projected = siglip_kernels.linear(norm(x), weight, bias)
        q, k, v = projected.unflatten(-1, (3, heads, attention.head_dim)).unbind(2)
        return add_linear(x, attention.out_proj, siglip_kernels.attention(q, k, v).flatten(2))


def _is_self_attention(attention: Any) -> bool:
    return attention.batch_first and is_fusable_attention(attention)


def _is_known_mlp(module: Any) -> bool:
    return type(module) is nn.Sequential and is_unhooked(module) and list(module._modules) == ["c_fc", "gelu", "c_proj"]


_REPLACEMENTS: dict[str, type[Accelerated]] = {
    f"{_MODULE}.ResidualAttentionBlock": ResidualAttentionBlock,
    f"{_MODULE}.LayerNorm": TextLayerNorm,
    f"{_MODULE}.LayerNormFp32": TextLayerNorm,
}

_LEFT = {
    "open_clip.hf_model.HFTextEncoder": "a model of transformers, for siglip_kernels.integrations.transformers",
    f"{_MODULE}.CustomResidualAttentionBlock": "blocks with normalised, scaled or cosine attention are not SigLIP's",
}


# The loss ------------------------------------------------------------------------------------------------------------

_ORIGINAL_LOSS = open_clip.loss.SigLipLoss


def register_loss() -> None:
    """Make open_clip's `create_loss`, and so its training script with --siglip, use siglip_kernels.SigLipLoss.

    In open_clip 4 also `create_task`, whose task takes the loss from open_clip.loss: what is imported from there, or
    made, after this call is siglip_kernels'. Raises MissingBackendError for other versions than 3 and 4.
    """
    require_version("open_clip", "open_clip_torch", (3,), (5,))
    open_clip.factory.SigLipLoss = SigLipLoss
    if hasattr(open_clip, "create_task"):
        open_clip.loss.SigLipLoss = SigLipLoss


def restore_loss() -> None:
    """Undo `register_loss`."""
    open_clip.factory.SigLipLoss = _ORIGINAL_LOSS
    open_clip.loss.SigLipLoss = _ORIGINAL_LOSS


def train(arguments: list[str]) -> None:
    """open_clip's training script with the model accelerated and the loss registered; exits if it lacks a library."""
    try:
        import open_clip_train.main as script
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"open_clip's training script needs {error.name!r}: install open_clip's training requirements"
        ) from error

    create = script.create_model_and_transforms

    def create_accelerated(*args: Any, **named: Any) -> Any:
        model, *transforms = create(*args, **named)
        print(accelerate(model))
        return model, *transforms

    script.create_model_and_transforms = create_accelerated
    register_loss()
    try:
        script.main(arguments)
    finally:
        restore_loss()
        script.create_model_and_transforms = create


if __name__ == "__main__":
    train(sys.argv[1:])
