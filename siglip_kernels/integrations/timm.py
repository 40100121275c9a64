"""SigLIP's vision towers in timm (`vit_so400m_patch14_siglip_384` and all other models of its VisionTransformer).

from siglip_kernels.integrations import timm as siglip_timm

report = siglip_timm.accelerate(model)
siglip_timm.restore(model)
"""

from typing import Any

import timm  # noqa: F401  so that importing this integration fails without timm
import torch
from torch import Tensor, nn

import siglip_kernels
from siglip_kernels.fusable import is_fusable, is_unhooked
from siglip_kernels.integrations.blocks import (
    LayerNorm,
    add_linear,
    add_pre_norm_attention,
    add_pre_norm_mlp,
    describe_called,
    describe_mlp,
    describe_pre_norm_attention,
    describe_pre_norm_mlp,
    fuses_mlp,
    is_fusable_norm,
    joined,
    mlp,
    packed,
    why_not_head_dim,
    why_not_patches,
)
from siglip_kernels.integrations.patching import (
    Accelerated,
    Description,
    accelerate_modules,
    full_name,
    is_replaced,
    operations_of,
    original_class,
    require_version,
    restore,
    runs,
)
from siglip_kernels.integrations.report import Report

__all__ = ["accelerate", "restore"]


def accelerate(model: nn.Module, fp8: bool = False) -> Report:
    """Compute timm's VisionTransformers in this model instance with the kernels: attention, MLP, LayerNorm, attention
    pool and patch embedding.

    Results differ only by rounding; timm computes what the kernels cannot (see
    `siglip_kernels.integrations.transformers.accelerate`). timm's SigLIP has the exact GELU unless it is created with
    act_layer="gelu_tanh": PyTorch computes the exact one, the kernels compute the linear layers around it.
    torch.jit.script cannot compile replacements: restore the model first.

    fp8: as there. timm creates models in training mode, which fp8 refuses: call model.eval().

    Returns a report of what was replaced and what was not, and why. `restore(model)` undoes it.
    Raises MissingBackendError, and changes nothing, unless timm is version 1 and Triton is installed, and
    if no GPU of this machine runs the kernels, or fp8.
    """
    version = require_version("timm", "timm", *VERSIONS)
    towers = paths_of_towers(model)
    return accelerate_modules(
        model,
        f"timm {version}",
        lambda path, module: replacement(towers, path, module),
        "no VisionTransformer is in it",
        fp8,
    )


VERSIONS = ((1, 0), (2,))


def paths_of_towers(model: Any) -> list[str]:
    if not isinstance(model, nn.Module):
        return []
    return [path for path, module in model.named_modules() if _is_tower(original_class(module))]


def _is_tower(kind: type) -> bool:
    return any(full_name(base) == "timm.models.vision_transformer.VisionTransformer" for base in kind.__mro__)


def replacement(towers: list[str], path: str, module: nn.Module) -> type[Accelerated] | str | None:
    """The replacement of a module; see `accelerate_modules`."""
    if not any(not tower or path.startswith(f"{tower}.") for tower in towers):
        return None
    kind = original_class(module)
    if kind is nn.LayerNorm:
        return LayerNorm
    known = [full_name(base) for base in kind.__mro__ if full_name(base) in REPLACEMENTS]
    if known and known[0] == full_name(kind):
        return REPLACEMENTS[known[0]]
    return f"{full_name(kind)} is a subclass of {known[0]} with its own code" if known else None


def drops_nothing(module: Any) -> bool:
    """Whether a dropout, a stochastic depth or an identity in its place returns its input unchanged."""
    if not is_unhooked(module):
        return False
    kind = type(module)
    if kind is nn.Dropout:
        return not (module.training and module.p)
    if kind.__name__ == "DropPath":
        return not (module.training and module.drop_prob)
    return kind is nn.Identity


class Attention(Accelerated):
    """Replaces timm's Attention without masks, gates and normalised queries and keys."""

    @staticmethod
    def describe(module):
        remarks = [*why_not_head_dim(module.head_dim), *_why_not_simple(module)]
        if remarks:
            return Description((), tuple(remarks))
        rate = module.attn_drop.p
        remarks = [f"attention dropout is {rate}: in training timm computes attention"] if rate else []
        return Description(("attention",), tuple(remarks))

    def attends(self: Any, x: Tensor, attn_mask: Any, is_causal: bool) -> bool:
        return runs(x) and attn_mask is None and not is_causal and drops_nothing(self.attn_drop) and _is_simple(self)

    def forward(self: Any, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        if not self.attends(x, attn_mask, is_causal):
            return super().forward(x, **_masks(attn_mask, is_causal))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return self.proj_drop(self.proj(siglip_kernels.attention(q, k, v, scale=self.scale).flatten(2)))


def _is_simple(attention: Any) -> bool:
    norms = (attention.q_norm, attention.k_norm, getattr(attention, "norm", None))  # the last since timm 1.0.17
    gate = getattr(attention, "gate", None)
    return gate is None and all(norm is None or (type(norm) is nn.Identity and is_unhooked(norm)) for norm in norms)


def _why_not_simple(attention: Any) -> list[str]:
    return [] if _is_simple(attention) else ["it normalises queries, keys or outputs, or has a gate"]


def _masks(attn_mask: Any, is_causal: bool) -> dict[str, Any]:
    """The arguments to pass on, if given: older versions do not have them."""
    given = {} if attn_mask is None else {"attn_mask": attn_mask}
    return {**given, "is_causal": True} if is_causal else given


class MLP(Accelerated):
    """Replaces timm's Mlp of linear layers."""

    @staticmethod
    def describe(module):
        remarks = [] if type(module.norm) is nn.Identity else ["it has a norm"]
        return describe_mlp(("fc1", module.fc1), module.act, ("fc2", module.fc2), *remarks)

    def forward(self: Any, x: Tensor) -> Tensor:
        if fuses_mlp(self.fc1, self.act, self.fc2, x) and _only_linears(self):
            return mlp(operations_of(self), x, self.fc1, self.fc2)
        return super().forward(x)


def _only_linears(module: Any) -> bool:
    """Whether an Mlp computes fc2(act(fc1(x))) without dropout and normalisation."""
    return drops_nothing(module.drop1) and drops_nothing(module.norm) and drops_nothing(module.drop2)


def _is_known_mlp(module: nn.Module) -> bool:
    return is_unhooked(module) and REPLACEMENTS.get(full_name(original_class(module))) is MLP and _only_linears(module)


class Block(Accelerated):
    """Replaces timm's pre-norm Block; halves with LayerScale or active stochastic depth call their modules."""

    @staticmethod
    def describe(module):
        attention, mlp, norm1, norm2 = module.attn, module.mlp, module.norm1, module.norm2
        if is_replaced(attention, Attention) and is_unhooked(attention) and type(module.ls1) is nn.Identity:
            qkv, proj = ("attn.qkv", attention.qkv), ("attn.proj", attention.proj)
            remarks = Attention.describe(attention).remarks
            first = describe_pre_norm_attention(("norm1", norm1), [qkv], proj, *remarks)
        else:
            remark = "its attention has hooks, a LayerScale or is not replaced, and is called normally"
            first = describe_called(norm1, remark)
        if type(module.ls2) is nn.Identity and _is_known_mlp(mlp):
            second = describe_pre_norm_mlp(("norm2", norm2), ("mlp.fc1", mlp.fc1), mlp.act, ("mlp.fc2", mlp.fc2))
        else:
            remark = "its MLP has hooks, dropout, a LayerScale or is not replaced, and is called normally"
            second = describe_called(norm2, remark)
        return joined(first, second)

    def forward(self: Any, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        if not runs(x):
            return super().forward(x, **_masks(attn_mask, is_causal))
        x = self._add_attention(x, attn_mask, is_causal)
        module = self.mlp
        if _is_known_mlp(module) and drops_nothing(self.ls2) and drops_nothing(self.drop_path2):
            return add_pre_norm_mlp(operations_of(self), x, self.norm2, module.fc1, module.act, module.fc2)
        return x + self.drop_path2(self.ls2(module(self.norm2(x))))

    def _add_attention(self: Any, x: Tensor, attn_mask: Any, is_causal: bool) -> Tensor:
        norm, attention = self.norm1, self.attn
        fusable = (
            is_replaced(attention, Attention)
            and is_unhooked(attention)
            and attention.attends(x, attn_mask, is_causal)
            and drops_nothing(attention.proj_drop)
            and drops_nothing(self.ls1)
            and drops_nothing(self.drop_path1)
        )
        if not fusable:
            return x + self.drop_path1(self.ls1(attention(norm(x), **_masks(attn_mask, is_causal))))
        qkv, heads = attention.qkv, attention.num_heads
        if is_fusable_norm(norm, x) and is_fusable(qkv, nn.Linear) and runs(x, qkv.weight, qkv.bias):
            operations, out = operations_of(self), attention.proj
            parameters = packed(operations, qkv.weight, qkv.bias)
            return add_pre_norm_attention(operations, x, norm, *parameters, out, heads, attention.scale)
        q, k, v = qkv(norm(x)).unflatten(-1, (3, heads, attention.head_dim)).unbind(2)
        return add_linear(x, attention.proj, siglip_kernels.attention(q, k, v, scale=attention.scale).flatten(2))


class AttentionPool(Accelerated):
    """Replaces timm's AttentionPoolLatent with one latent: SigLIP's MAP head."""

    @staticmethod
    def describe(module):
        if not _is_poolable(module):
            return Description((), ("its layers are wrapped, hooked or not of SigLIP's form",))
        if module.mlp is None:
            return Description(("attention_pool",))
        if not _is_known_mlp(module.mlp):
            return Description(("attention_pool",), ("its MLP has hooks or dropout, and is called normally",))
        fc1, fc2 = ("mlp.fc1", module.mlp.fc1), ("mlp.fc2", module.mlp.fc2)
        mlp = describe_pre_norm_mlp(("norm", module.norm), fc1, module.mlp.act, fc2)
        return joined(Description(("attention_pool",)), mlp)

    def forward(self: Any, x: Tensor, attn_mask: Any = None) -> Tensor:
        if attn_mask is not None or not _is_poolable(self) or not runs(x, self.latent, self.q.weight, self.kv.weight):
            return super().forward(x, **_masks(attn_mask, False))
        x = siglip_kernels.attention_pool(
            x,
            self.latent,
            torch.cat([self.q.weight, self.kv.weight]),
            torch.cat([self.q.bias, self.kv.bias]),
            self.proj.weight,
            self.proj.bias,
            self.num_heads,
        )
        module = self.mlp
        if module is None:
            return x
        if _is_known_mlp(module):
            return add_pre_norm_mlp(operations_of(self), x, self.norm, module.fc1, module.act, module.fc2)
        return x + module(self.norm(x))


def _is_poolable(pool: Any) -> bool:
    return (
        pool.latent_len == 1
        and pool.pool == "token"
        and pool.pos_embed is None
        and all(is_fusable(linear, nn.Linear) for linear in (pool.q, pool.kv, pool.proj))
        and pool.q.in_features == pool.q.out_features == pool.kv.in_features == pool.proj.out_features
        and all(type(norm) is nn.Identity and is_unhooked(norm) for norm in (pool.q_norm, pool.k_norm))
        and drops_nothing(pool.proj_drop)
    )


class PatchEmbed(Accelerated):
    """Replaces timm's PatchEmbed; timm adds the positions afterwards."""

    @staticmethod
    def describe(module):
        remarks = why_not_patches("proj", module.proj)
        if not (module.flatten and type(module.norm) is nn.Identity and not module.dynamic_img_pad):
            remarks = [*remarks, "it has a norm, pads images or does not flatten them"]
        return Description((), tuple(remarks)) if remarks else Description(("patch_embed",))

    def forward(self: Any, x: Tensor) -> Tensor:
        convolution = self.proj
        if (
            why_not_patches("proj", convolution)
            or not runs(x, convolution.weight)
            or not (self.flatten and drops_nothing(self.norm) and not self.dynamic_img_pad)
            or (self.img_size is not None and tuple(x.shape[-2:]) != tuple(self.img_size))
        ):
            return super().forward(x)
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        nowhere = x.new_zeros(1, convolution.out_channels, dtype=dtype)
        return siglip_kernels.patch_embed(x, convolution.weight, convolution.bias, nowhere)


REPLACEMENTS: dict[str, type[Accelerated]] = {
    "timm.layers.attention.Attention": Attention,
    "timm.models.vision_transformer.Attention": Attention,  # until timm 1.0.16
    "timm.layers.mlp.Mlp": MLP,
    "timm.models.vision_transformer.Block": Block,
    "timm.layers.attention_pool.AttentionPoolLatent": AttentionPool,
    "timm.layers.patch_embed.PatchEmbed": PatchEmbed,
    "timm.layers.norm.LayerNorm": LayerNorm,
}
