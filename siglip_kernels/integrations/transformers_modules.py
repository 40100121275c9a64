"""Replacements for the modules of SigLIP towers in transformers, 4.50 to 5.

The classes of SigLIP, SigLIP 2, and of the towers of Idefics 2, Idefics 3 and SmolVLM, which are copies, are replaced
by name. `Attention`, `MLP`, `EncoderLayer` and `Encoder` also fit the classes that `transformers_structure` recognises:
the names of their submodules differ, and arguments may reach their attention that SigLIP's ignores.
"""

import inspect
from typing import Any

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
    is_fusable_attention,
    is_fusable_norm,
    joined,
    mlp,
    why_not_head_dim,
    why_not_patches,
)
from siglip_kernels.integrations.key_padding import as_given, attend, is_served, read_key_padding
from siglip_kernels.integrations.patching import (
    Accelerated,
    Description,
    full_name,
    is_replaced,
    operations_of,
    original_class,
    runs,
    why_not_fusable,
)
from siglip_kernels.integrations.transformers_structure import (
    attention_dropout,
    attention_scale,
    is_encoder,
    is_in,
    layers_of,
    name_of,
    part,
    passes_through,
    read_layer,
    tower_of,
    why_not_attention,
    why_not_mlp,
)
from siglip_kernels.sigmoid_loss.api import LARGEST_WIDTH


class Attention(Accelerated):
    """Replaces SiglipAttention: calls its linear layers, wrapped or not, around siglip_kernels.attention."""

    ignores_arguments = False  # True for SigLIP's own, which keep their keyword arguments from attention

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if cls.original is not None:
            cls.ignores_arguments = full_name(cls.original) in REPLACEMENTS

    @staticmethod
    def describe(module):
        refusal = why_not_head_dim(module.head_dim)
        if not _is_softmax_attention(module.config):
            implementation = module.config._attn_implementation
            refusal.append(f"its attention is {implementation!r}, which may not be softmax attention")
        if refusal:
            return Description((), tuple(refusal))
        remarks = []
        if dropout := attention_dropout(module):
            remarks.append(f"attention_dropout is {dropout}, which PyTorch's attention applies in training")
        if _is_causal_without_mask(module):
            remarks.append("its is_causal is True, so transformers computes calls without a mask")
        return Description(("attention",), tuple(remarks))

    @staticmethod
    def example(module, drawn):
        width = getattr(part(module, "q"), "in_features", None)
        return None if width is None else (drawn(2, 5, width),)

    def attends(self: Any, x: Tensor, padding: Any, arguments: dict[str, Any]) -> bool:
        """Whether siglip_kernels.attention can compute this call; it returns no attention weights."""
        return (
            runs(x)
            and is_served(padding)
            and _is_softmax_attention(self.config)
            and not (self.training and attention_dropout(self))
            and not (arguments.get("output_attentions") or getattr(self.config, "output_attentions", False))
            and (self.ignores_arguments or not changes_attention(arguments))
            and not (_is_causal_without_mask(self) and (padding is None or not _is_sdpa_or_eager(self.config)))
            and passes_through(self)
        )

    def key_padding(self: Any, x: Tensor, mask: Any, arguments: dict[str, Any]) -> Any:
        """What `read_key_padding` returns, or the mask unread if the library computes the call."""
        if self.ignores_arguments or not changes_attention(arguments):
            return read_key_padding(mask, *x.shape[:2])
        return mask

    def project(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, S, width). Returns q, k and v, each (B, S, H, D)."""
        heads = (-1, self.head_dim)
        return (
            self.q_proj(x).unflatten(-1, heads),
            self.k_proj(x).unflatten(-1, heads),
            self.v_proj(x).unflatten(-1, heads),
        )

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **arguments: Any):
        padding = self.key_padding(hidden_states, attention_mask, arguments)
        if not self.attends(hidden_states, padding, arguments):
            return super().forward(hidden_states=hidden_states, attention_mask=as_given(attention_mask), **arguments)
        out = attend(self.project(hidden_states), attention_scale(self), padding)
        return part(self, "out")(out.flatten(2)), None


# Arguments that transformers passes through a model and that leave attention as it is.
_INERT = {"output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"}


def changes_attention(arguments: dict[str, Any]) -> bool:
    """Whether an argument beside the mask may change attention, such as is_causal or position_embeddings."""
    return any(value is not None and value is not False and name not in _INERT for name, value in arguments.items())


def _is_causal_without_mask(attention: Any) -> bool:
    """Whether PyTorch's attention is causal where there is no mask, because transformers takes it for a decoder's."""
    return bool(getattr(attention, "is_causal", False))


def _is_sdpa_or_eager(config: Any) -> bool:
    """Whether the implementation is never causal where there is a mask."""
    return config._attn_implementation in (None, "sdpa", "eager")


_SOFTMAX_ATTENTIONS = {
    *(None, "eager", "sdpa", "flex_attention", "siglip_triton", "siglip_triton_flash"),
    *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
}


def _is_softmax_attention(config: Any) -> bool:
    """Whether the configured implementation is softmax attention; one that a user registered may not be."""
    return config._attn_implementation in _SOFTMAX_ATTENTIONS


class MLP(Accelerated):
    """Replaces SiglipMLP."""

    @staticmethod
    def describe(module):
        return describe_mlp(_named(module, "fc1"), part(module, "activation"), _named(module, "fc2"))

    @staticmethod
    def example(module, drawn):
        return (drawn(2, 5, part(module, "fc1").in_features),)

    def forward(self: Any, *arguments: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*arguments, *named.values())  # whose name differs between classes
        fc1, fc2 = part(self, "fc1"), part(self, "fc2")
        if fuses_mlp(fc1, part(self, "activation"), fc2, x) and passes_through(self):
            return mlp(operations_of(self), x, fc1, fc2)
        return super().forward(x)


def _named(module: Any, role: str, prefix: str = "") -> tuple[str, Any]:
    """A submodule with its path in a report."""
    name = name_of(module, role)
    return prefix + name, getattr(module, name)


class EncoderLayer(Accelerated):
    """Replaces SiglipEncoderLayer: two operations, or calls of modules that were replaced, wrapped or hooked."""

    returns_tuple = False  # True for transformers before 4.56
    positional = 0  # how many arguments its attention gets by position: hooks see the difference

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if cls.original is not None:
            cls.returns_tuple = "output_attentions" in inspect.signature(cls.original.forward).parameters

    @staticmethod
    def describe(module):
        norm1, norm2 = _named(module, "norm1"), _named(module, "norm2")
        name, attention = _named(module, "attention")
        if is_replaced(attention, Attention) and is_unhooked(attention):
            projections = [_named(attention, role, f"{name}.") for role in ("q", "k", "v")]
            remarks = Attention.describe(attention).remarks
            out = _named(attention, "out", f"{name}.")
            first = describe_pre_norm_attention(norm1, projections, out, *remarks)
        else:
            first = describe_called(norm1[1], f"{name} has hooks or is not replaced, and is called normally")
        name, mlp = _named(module, "mlp")
        if _is_known_mlp(mlp):
            fc1, fc2 = _named(mlp, "fc1", f"{name}."), _named(mlp, "fc2", f"{name}.")
            second = describe_pre_norm_mlp(norm2, fc1, part(mlp, "activation"), fc2)
        else:
            second = describe_called(norm2[1], f"{name} has hooks or is not replaced, and is called normally")
        return joined(first, second)

    @staticmethod
    def example(module, drawn):
        x = Attention.example(part(module, "attention"), drawn)
        return None if x is None else (*x, None)

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, *arguments: Any, **named: Any):
        if arguments:  # transformers before 4.56 passes it by position when it checkpoints
            named["output_attentions"] = arguments[0]
        if not runs(hidden_states) or named.get("output_attentions") or not passes_through(self):
            return super().forward(hidden_states, as_given(attention_mask), **named)
        x = self._add_attention(hidden_states, attention_mask, named)
        norm, module = part(self, "norm2"), part(self, "mlp")
        if _is_known_mlp(module):
            fc1, activation, fc2 = part(module, "fc1"), part(module, "activation"), part(module, "fc2")
            x = add_pre_norm_mlp(operations_of(self), x, norm, fc1, activation, fc2)
        else:
            x = x + module(norm(x))
        return (x,) if self.returns_tuple else x

    def _add_attention(self: Any, x: Tensor, mask: Any, arguments: dict[str, Any]) -> Tensor:
        norm, attention = part(self, "norm1"), part(self, "attention")
        replaced = is_replaced(attention, Attention) and is_unhooked(attention)
        padding = attention.key_padding(x, mask, arguments) if replaced else mask
        if not (replaced and attention.attends(x, padding, arguments)):
            given = {"hidden_states": norm(x), "attention_mask": as_given(mask)}
            placed = [given.pop(name) for name in list(given)[: self.positional]]
            return x + attention(*placed, **given, **arguments)[0]
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        fusable = is_fusable(q, nn.Linear) and is_fusable(k, nn.Linear) and is_fusable(v, nn.Linear)
        if fusable and is_fusable_norm(norm, x) and runs(x, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias):
            weights, biases, out = (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias), part(attention, "out")
            heads, scale = q.out_features // attention.head_dim, attention_scale(attention)
            return add_pre_norm_attention(operations_of(self), x, norm, weights, biases, out, heads, scale, padding)
        projected = attention.project(norm(x))
        return add_linear(x, part(attention, "out"), attend(projected, attention_scale(attention), padding).flatten(2))


class EncoderLayerWithPositionalInput(EncoderLayer):
    """Replaces layers that call attention(x, attention_mask=mask)."""

    positional = 1


class EncoderLayerWithPositionalMask(EncoderLayer):
    """Replaces layers that call attention(x, mask)."""

    positional = 2


def _is_known_mlp(module: nn.Module) -> bool:
    """Whether an MLP may be computed from its layers: also a SiglipMLP that is not replaced for its activation."""
    known = is_replaced(module, MLP) or (REPLACEMENTS.get(full_name(type(module))) is MLP and is_intact(type(module)))
    return known and is_unhooked(module) and passes_through(module)


class Encoder(Accelerated):
    """Replaces SiglipEncoder: reads the mask once for all layers."""

    @staticmethod
    def describe(module):
        return Description(("attention",))

    def forward(self: Any, inputs_embeds: Tensor, attention_mask: Any = None, *arguments: Any, **named: Any):
        served = attention_mask is not None and not named.get("is_causal")
        if served and runs(inputs_embeds) and all(_takes_key_padding(layer) for layer in self.layers):
            attention_mask = read_key_padding(attention_mask, *inputs_embeds.shape[:2])
        return super().forward(inputs_embeds, attention_mask, *arguments, **named)


def _takes_key_padding(layer: nn.Module) -> bool:
    return is_replaced(layer, EncoderLayer) and is_unhooked(layer)


class PoolingHead(Accelerated):
    """Replaces SiglipMultiheadAttentionPoolingHead, and SigLIP 2's, which takes a mask."""

    @staticmethod
    def describe(module):
        if not is_fusable_attention(module.attention):
            kind = full_name(type(module.attention))
            return Description((), (f"its attention, a {kind}, is wrapped, hooked or not of SigLIP's form",))
        if not _is_known_mlp(module.mlp):
            return Description(("attention_pool",), ("mlp has hooks or is not replaced, and is called normally",))
        fc1, fc2 = ("mlp.fc1", module.mlp.fc1), ("mlp.fc2", module.mlp.fc2)
        mlp = describe_pre_norm_mlp(("layernorm", module.layernorm), fc1, module.mlp.activation_fn, fc2)
        return joined(Description(("attention_pool",)), mlp)

    @staticmethod
    def example(module, drawn):
        return (drawn(2, 5, module.probe.shape[-1]),)

    def forward(self: Any, hidden_state: Tensor, attention_mask: Any = None) -> Tensor:
        padding = read_key_padding(attention_mask, *hidden_state.shape[:2])
        pool = self.attention
        if (
            not runs(hidden_state, self.probe)
            or not is_served(padding)
            or not is_fusable_attention(pool)
            or not runs(hidden_state, pool.in_proj_weight)
        ):
            return super().forward(hidden_state, *(() if attention_mask is None else (attention_mask,)))
        lengths = None
        if padding is not None:
            hidden_state, lengths = padding.valid_first(hidden_state), padding.lengths.expand(hidden_state.shape[0])
        x = siglip_kernels.attention_pool(
            hidden_state,
            self.probe,
            pool.in_proj_weight,
            pool.in_proj_bias,
            pool.out_proj.weight,
            pool.out_proj.bias,
            pool.num_heads,
            lengths=lengths,
        )
        module = self.mlp
        if _is_known_mlp(module):
            layers = module.fc1, module.activation_fn, module.fc2
            return add_pre_norm_mlp(operations_of(self), x, self.layernorm, *layers)
        return x + module(self.layernorm(x))


class VisionEmbeddings(Accelerated):
    """Replaces SiglipVisionEmbeddings."""

    @staticmethod
    def describe(module):
        remarks = why_not_patches("patch_embedding", module.patch_embedding)
        return Description((), tuple(remarks)) if remarks else Description(("patch_embed",))

    @staticmethod
    def example(module, drawn):
        side = round(module.num_positions**0.5) * module.patch_size
        return (drawn(2, module.patch_embedding.in_channels, side, side),)

    def forward(self: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        convolution = self.patch_embedding
        if why_not_patches("patch_embedding", convolution) or not is_unhooked(self.position_embedding):
            return super().forward(pixel_values, interpolate_pos_encoding)
        pixels = pixel_values.to(dtype=convolution.weight.dtype)
        height, width = pixels.shape[-2:]
        count = (height // convolution.kernel_size[0]) * (width // convolution.kernel_size[1])
        if not runs(pixels, convolution.weight) or not (interpolate_pos_encoding or count == self.num_positions):
            return super().forward(pixel_values, interpolate_pos_encoding)
        if interpolate_pos_encoding:  # which reads only the shape of the embeddings
            shape_of_embeddings = convolution.bias.detach().expand(1, count, -1)
            position = self.interpolate_pos_encoding(shape_of_embeddings, height, width)
        else:
            position = self.position_embedding(self.position_ids)
        return siglip_kernels.patch_embed(pixels, convolution.weight, convolution.bias, position[0])


class NaflexVisionEmbeddings(Accelerated):
    """Replaces Siglip2VisionEmbeddings: the input is padded patches, and positions are resized per image."""

    @staticmethod
    def describe(module):
        remarks = why_not_fusable("patch_embedding", module.patch_embedding, nn.Linear)
        return Description((), tuple(remarks)) if remarks else Description(("linear",))

    def forward(self: Any, pixel_values: Tensor, spatial_shapes: Tensor) -> Tensor:
        linear = self.patch_embedding
        if not is_fusable(linear, nn.Linear) or not is_unhooked(self.position_embedding):
            return super().forward(pixel_values, spatial_shapes)
        patches = pixel_values.to(dtype=linear.weight.dtype)
        if not runs(patches, linear.weight, linear.bias):
            return super().forward(pixel_values, spatial_shapes)
        side = self.position_embedding_size
        grid = self.position_embedding.weight.reshape(side, side, -1)
        positions = self.resize_positional_embeddings(grid, spatial_shapes, max_length=patches.shape[1])
        return siglip_kernels.linear(patches, linear.weight, linear.bias, positions)


class _TakesArguments(Accelerated):
    """Base of the replacements of whole models, whose arguments may be passed by position or by name."""

    argument_names: tuple[str, ...] = ()

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if cls.original is not None:
            parameters = tuple(inspect.signature(cls.original.forward).parameters.values())[1:]
            cls.argument_names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)

    def by_name(self, arguments: tuple, named: dict[str, Any]) -> dict[str, Any] | None:
        """All arguments by name, or None if there are too many or one is passed twice."""
        placed = dict(zip(self.argument_names, arguments, strict=False))
        return {**named, **placed} if len(placed) == len(arguments) and not placed.keys() & named.keys() else None


class MaskedTower(_TakesArguments):
    """Replaces the towers that take a mask. Under torch.compile, transformers expands it to one row per query, which
    cannot be distinguished from other masks without reading it. Here it keeps one row for all queries, which the graph
    converts to lengths."""

    @staticmethod
    def describe(module):
        return Description(("attention",))

    def forward(self: Any, *arguments: Any, **named: Any):
        given = self.by_name(arguments, named)
        if given is None or not torch.compiler.is_compiling() or self.config._attn_implementation != "sdpa":
            return super().forward(*arguments, **named)
        for name in ("attention_mask", "pixel_attention_mask"):
            mask = given.get(name)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                given[name] = (mask != 0)[:, None, None]
        return super().forward(**given)


class Model(_TakesArguments):
    """Replaces the loss of SiglipModel and Siglip2Model: from embeddings, not from the logits, which are returned."""

    @staticmethod
    def describe(module):
        return Description(("sigmoid_loss",))

    def forward(self: Any, *arguments: Any, **named: Any):
        given = self.by_name(arguments, named)
        if given is None or not given.get("return_loss"):
            return super().forward(*arguments, **named)
        return_dict = given.pop("return_dict", None)
        output = super().forward(**{**given, "return_loss": None, "return_dict": True})
        loss = self._loss(output)
        output = type(output)(loss=loss, **output)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _loss(self: Any, output: Any) -> Tensor:
        image, text = output.image_embeds, output.text_embeds
        fits = image.shape == text.shape and image.shape[-1] <= LARGEST_WIDTH
        if fits and image.device == text.device and runs(image, text):
            scale, bias = self.logit_scale.to(text.device).exp(), self.logit_bias.to(text.device)
            return siglip_kernels.sigmoid_loss(image, text, scale, bias)
        logits = output.logits_per_text
        # transformers' formula, which raises its error for unequal numbers of images and texts.
        signs = 2 * torch.eye(logits.shape[0], device=logits.device) - torch.ones_like(logits)
        return -nn.functional.logsigmoid(signs * logits).sum(-1).mean()


def _tower(package: str, prefix: str, attention: str, mlp: str) -> dict[str, type[Accelerated]]:
    classes = {
        f"{attention}Attention": Attention,
        f"{attention}SdpaAttention": Attention,  # this and the next in transformers before 4.51
        f"{attention}FlashAttention2": Attention,
        mlp: MLP,
        f"{prefix}EncoderLayer": EncoderLayer,
        f"{prefix}Encoder": Encoder,
    }
    return {f"transformers.models.{package}.modeling_{package}.{name}": kind for name, kind in classes.items()}


# By name, so that using one model does not import the files of the others.
REPLACEMENTS: dict[str, type[Accelerated]] = {
    **_tower("siglip", "Siglip", "Siglip", "SiglipMLP"),
    **_tower("siglip2", "Siglip2", "Siglip2", "Siglip2MLP"),
    **_tower("idefics2", "Idefics2", "Idefics2Vision", "Idefics2VisionMLP"),
    **_tower("idefics3", "Idefics3", "Idefics3Vision", "Idefics3VisionMLP"),
    **_tower("smolvlm", "SmolVLM", "SmolVLMVision", "SmolVLMVisionMLP"),
    "transformers.models.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead": PoolingHead,
    "transformers.models.siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead": PoolingHead,
    "transformers.models.siglip.modeling_siglip.SiglipVisionEmbeddings": VisionEmbeddings,
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionEmbeddings": NaflexVisionEmbeddings,
    "transformers.models.siglip.modeling_siglip.SiglipTextModel": MaskedTower,
    "transformers.models.siglip2.modeling_siglip2.Siglip2TextModel": MaskedTower,
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel": MaskedTower,
    "transformers.models.siglip.modeling_siglip.SiglipModel": Model,
    "transformers.models.siglip2.modeling_siglip2.Siglip2Model": Model,
}


def is_intact(kind: type) -> bool:
    """Whether a class has the forward of its own file, and not one that another package has set."""
    return kind.forward.__module__ == kind.__module__  # type: ignore[attr-defined]


# Modules whose LayerNorms, direct or nested, are replaced.
TOWERS = frozenset(
    f"transformers.models.{package}.modeling_{package}.{name}"
    for package, names in {
        "siglip": ("SiglipVisionModel", "SiglipVisionTransformer", "SiglipTextModel", "SiglipTextTransformer"),
        "siglip2": ("Siglip2VisionModel", "Siglip2VisionTransformer", "Siglip2TextModel", "Siglip2TextTransformer"),
        "idefics2": ("Idefics2VisionTransformer",),
        "idefics3": ("Idefics3VisionTransformer",),
        "smolvlm": ("SmolVLMVisionTransformer",),
    }.items()
    for name in names
)

LEFT = {
    f"transformers.models.{package}.modeling_{package}.{name}VisionEmbeddings": (
        "its positions differ per image; siglip_kernels.patch_embed adds the same positions to all"
    )
    for package, name in (("idefics2", "Idefics2"), ("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
}

# By the number of arguments that attention gets by position.
LAYERS = (EncoderLayer, EncoderLayerWithPositionalInput, EncoderLayerWithPositionalMask)


def has_backends(module: nn.Module) -> bool:
    """Whether it is a module of siglip_model, which selects the kernels itself and would not fuse what is replaced."""
    return type(module).__module__.partition(".")[0] == "siglip_model"


def recognised(model: nn.Module) -> dict[str, type[Accelerated] | str]:
    """The replacements of what `transformers_structure` recognises, by path, or why it is left.

    These are attention, MLP, layer and encoder of each tower, and all LayerNorms of a tower.
    """
    found: dict[str, type[Accelerated] | str] = {}
    towers = set()
    for path in layers_of(model):
        layer = model.get_submodule(path)
        if full_name(original_class(layer)) in REPLACEMENTS or has_backends(layer):
            continue
        remarks, positional = read_layer(layer)
        attention = _or_why(Attention, why_not_attention(part(layer, "attention")))
        found[f"{path}.{name_of(layer, 'attention')}"] = attention
        found[f"{path}.{name_of(layer, 'mlp')}"] = _or_why(MLP, why_not_mlp(part(layer, "mlp")))
        found[path] = _or_why(LAYERS[positional], remarks)
        towers.add(tower_of(model, path))
        encoder = ".".join(path.split(".")[:-2])
        if attention is Attention and not remarks and is_encoder(model.get_submodule(encoder)):
            found[encoder] = Encoder
    for path, module in model.named_modules():
        if original_class(module) is nn.LayerNorm and any(is_in(tower, model, path) for tower in towers):
            found[path] = LayerNorm
    return found


def _or_why(replacement: type[Accelerated], remarks: list[str]) -> type[Accelerated] | str:
    return "; ".join(remarks) or replacement
