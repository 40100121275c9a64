"""Recognises, in any model of transformers, the modules that compute what SigLIP's compute, whatever their class.

A module is recognised if all of these hold for the instance and its class:

1. Structure: its submodules have the roles of SigLIP's, and it has no further submodule, parameter or buffer.
2. Source: its `forward` is a straight line of shape operations, arithmetic and calls of its submodules and of
   transformers' attention interface. Nothing in it depends on sizes or values, so one run shows what all runs do.
3. Semantics: that run, in fp64 on random numbers with random functions in place of its submodules and of attention,
   gives exactly what the same composition gives here, in evaluation and in training, with a mask and without.

So post-norm, parallel or scaled residuals, rotary positions, normalised queries, soft caps, windows, causal masks and
packed sequences are not mistaken for SigLIP's form. What is wrong is returned as a remark for the report.
"""

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from siglip_kernels.fusable import is_unhooked
from siglip_kernels.integrations.patching import original_class

# Names of the submodules by role, SigLIP's first.
NAMES = {
    "norm1": ("layer_norm1", "norm1", "layernorm_before", "rms_norm1", "input_layernorm"),
    "attention": ("self_attn", "attention", "attn"),
    "norm2": ("layer_norm2", "norm2", "layernorm_after", "rms_norm2", "post_attention_layernorm"),
    "mlp": ("mlp", "ffn"),
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "out": ("out_proj", "o_proj", "projection_layer", "proj"),
    "fc1": ("fc1", "linear_fc1", "up_proj"),
    "activation": ("activation_fn", "act_fn", "act", "activation"),
    "fc2": ("fc2", "linear_fc2", "down_proj"),
}
LAYER = ("norm1", "attention", "norm2", "mlp")
ATTENTION = ("q", "k", "v", "out")
MLP = ("fc1", "activation", "fc2")
# Attributes that the forward may read: those that every call asks for again, and sizes, which fit the weights or fail.
_ATTRIBUTES = {
    LAYER: frozenset({"training"}),
    MLP: frozenset({"training"}),
    ATTENTION: frozenset({"training", "config", "scale", "scaling", "dropout", "attention_dropout", "is_causal"})
    | frozenset({"head_dim", "num_heads", "num_attention_heads", "embed_dim", "hidden_size"}),
}
_ALL_NAMES = frozenset(name for names in NAMES.values() for name in names)

# What arguments that SigLIP's modules do not need are for.
_PURPOSES = {
    "cu_seqlens": "packed sequences",
    "position_embeddings": "rotary positions",
    "encoder_hidden_states": "cross-attention",
}
_CACHES = {"cache", "past_key_values", "past_key_value", "layer_past"}  # the first from transformers 5.24 on


def name_of(module: Any, role: str) -> str:
    """The name of the submodule with this role, or an empty string."""
    modules = module.__dict__["_modules"]
    for name in NAMES[role]:
        if modules.get(name) is not None:
            return name
    return ""


def part(module: Any, role: str) -> Any:
    return getattr(module, name_of(module, role))


def passes_through(module: Any) -> bool:
    """Whether the submodules without a role change nothing in this call: nn.Identity, and nn.Dropout if it is off."""
    for name, child in module.__dict__["_modules"].items():
        if name in _ALL_NAMES or child is None:
            continue
        off = type(child) is nn.Dropout and not (child.training and child.p)
        if not (off or type(child) is nn.Identity) or not is_unhooked(child):
            return False
    return True


def attention_scale(attention: Any) -> float | None:
    return next((getattr(attention, name) for name in ("scale", "scaling") if hasattr(attention, name)), None)


def attention_dropout(attention: Any) -> float:
    """The probability in training."""
    return next((getattr(attention, name) for name in ("dropout", "attention_dropout") if hasattr(attention, name)), 0)


# Where to look --------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> list[str]:
    """Paths of what may be layers of an encoder: two norms, attention and an MLP, without a cache for decoding."""
    return [path for path, module in model.named_modules() if _may_be_layer(module)]


def _may_be_layer(module: Any) -> bool:
    if not all(name_of(module, role) for role in LAYER):
        return False
    attention = part(module, "attention")
    if not all(name_of(attention, role) for role in ATTENTION):
        return False
    return not _CACHES & _parameters(attention).keys()


def tower_of(model: nn.Module, path: str) -> str:
    """The path of the tower that a layer belongs to: a model of transformers, else what holds the list of layers."""
    found = model_around(model, path)
    return ".".join(path.split(".")[:-2]) if found is None else found


def model_around(model: nn.Module, path: str) -> str | None:
    """The path of the innermost model of transformers around a module, or None."""
    parts = path.split(".")
    for prefix in (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)):
        if isinstance(model.get_submodule(prefix), PreTrainedModel):
            return prefix
    return None


def is_in(tower: str, model: nn.Module, path: str) -> bool:
    """Whether a module belongs to this tower and not to another model within it, such as a language model."""
    around = model_around(model, path)
    return around == tower or (around is None and (not tower or path.startswith(f"{tower}.")))


# What a module computes -----------------------------------------------------------------------------------------------


def read_layer(layer: Any) -> tuple[list[str], int]:
    """Remarks on why the layer may not be x = x + attention(norm1(x)), x + mlp(norm2(x)), or an empty list; and how
    many arguments its attention gets by position."""
    if remarks := _why_not_form(layer, LAYER):
        return remarks, 0
    width, positional = 6, 0
    for training in (False, True):
        for x, mask in _inputs(width):
            norm1, norm2, mlp = _Function(width, width), _Function(width, width), _Function(width, width)
            attention = _Function(width, width, results=2)
            shadow = _shadow(layer, dict(norm1=norm1, attention=attention, norm2=norm2, mlp=mlp), training)
            found = _call(shadow, x, mask)
            if isinstance(found, str):
                return [found], 0
            found = found[0] if isinstance(found, tuple) else found  # transformers before 4.56
            half = x + attention.of(norm1.of(x))
            if not (_equal(found, half + mlp.of(norm2.of(half))) and attention.was_given(norm1.of(x), mask)):
                return ["its forward does not compute x = x + attention(norm1(x)), x + mlp(norm2(x))"], 0
            positional = len(attention.calls[0][0])
    return [], positional


def why_not_mlp(mlp: Any) -> list[str]:
    """Remarks on why the module may not be fc2(activation(fc1(x))), or an empty list."""
    if remarks := _why_not_form(mlp, MLP):
        return remarks
    x = _random(2, 3, 6)
    for training in (False, True):
        fc1, activation, fc2 = _Function(6, 8), _Function(8, 8), _Function(8, 6)
        found = _call(_shadow(mlp, dict(fc1=fc1, activation=activation, fc2=fc2), training), x)
        if isinstance(found, str):
            return [found]
        if not _equal(found, fc2.of(activation.of(fc1.of(x)))):
            return ["its forward does not compute fc2(activation(fc1(x)))"]
    return []


def why_not_attention(attention: Any) -> list[str]:
    """Remarks on why the module may not be out(attention(q(x), k(x), v(x), mask)) through transformers' attention
    interface, or an empty list. Whether the interface computes softmax attention is asked at every call."""
    if remarks := _why_not_form(attention, ATTENTION):
        return remarks
    width, out_width = _features(part(attention, "q"), "out"), _features(part(attention, "out"), "out")
    heads, rest = divmod(width, getattr(attention, "head_dim", 0) or 1)
    widths = {_features(part(attention, role), "out") for role in ("q", "k", "v")}
    if not hasattr(getattr(attention, "config", None), "_attn_implementation"):
        return ["it has no config that selects transformers' attention interface"]
    if not width or rest or not hasattr(attention, "head_dim"):
        return ["its head dim is not known"]
    if widths != {width} or _features(part(attention, "out"), "in") != width:
        return ["its queries, keys and values differ in width"]
    for training in (False, True):
        for x, given in _inputs(_features(part(attention, "q"), "in")):
            remark = _why_not_call(attention, x, given, training, heads, out_width)
            if remark:
                return [remark]
    return []


def _why_not_call(attention: Any, x: Tensor, mask: Tensor | None, training: bool, heads: int, out: int) -> str:
    width = heads * attention.head_dim
    q, k, v = (_Function(x.shape[-1], width) for _ in range(3))
    last = _Function(width, out)
    seen: list[tuple[Any, ...]] = []
    answer = _random(*x.shape[:2], heads, attention.head_dim)

    def interface(owner, query, key, value, attention_mask=None, **arguments):
        seen.append((owner, (query, key, value), attention_mask, arguments))
        return answer, None

    shadow = _shadow(attention, dict(q=q, k=k, v=v, out=last), training)
    config = attention.config
    with _registered(interface) as name:
        shadow.__dict__["config"] = _Config(config, name)
        found = _call(shadow, x, mask)
    if isinstance(found, str):
        return found
    if len(seen) != 1:
        return "it does not call transformers' attention interface"
    owner, tensors, used_mask, arguments = seen[0]
    scale, dropout = arguments.pop("scaling", None), arguments.pop("dropout", 0.0)
    causal = arguments.pop("is_causal", None)
    expected = [f.of(x).unflatten(-1, (heads, attention.head_dim)).transpose(1, 2) for f in (q, k, v)]
    if owner is not shadow or not all(_equal(one, other) for one, other in zip(tensors, expected, strict=True)):
        return "its queries, keys and values are not just projections of its input"
    if used_mask is not mask:
        return "it changes the mask"
    given = sorted(argument for argument, value in arguments.items() if value is not None and value is not False)
    if given:
        return f"it passes {', '.join(given)} to transformers' attention interface"
    if scale is None or scale != attention_scale(attention):
        return "its scale is not an attribute"
    if dropout != (attention_dropout(attention) if training else 0):
        return "its dropout is not an attribute"
    if causal or (causal is None and not hasattr(attention, "is_causal")):
        return "its attention is causal"
    if not (isinstance(found, tuple) and len(found) == 2 and _equal(found[0], last.of(answer.flatten(2)))):
        return "its result is not just a projection of attention's"
    if training:
        return ""
    shadow.__dict__["config"] = _Config(config, "eager")  # a function of the model's own file
    found = _call(shadow, x, mask)
    scores = expected[0] @ expected[1].mT * scale
    if mask is not None:
        scores = scores + mask
    answer = last.of((scores.softmax(-1) @ expected[2]).transpose(1, 2).flatten(2))
    close = not isinstance(found, str) and torch.allclose(
        found[0], answer, rtol=1e-4, atol=1e-4
    )  # its softmax is in fp32
    return "" if close else "its eager attention is not softmax attention"


def is_encoder(encoder: Any) -> bool:
    """Whether the module calls its `layers` in turn and passes its mask to each of them as it is."""
    if not isinstance(getattr(encoder, "layers", None), nn.ModuleList) or "attention_mask" not in _parameters(encoder):
        return False
    if list(_parameters(encoder))[:2] != ["inputs_embeds", "attention_mask"]:
        return False
    layers = [_Function(6, 6), _Function(6, 6)]
    shadow = _shadow(encoder, {}, False)
    shadow._modules["layers"] = layers
    x, mask = _random(2, 3, 6), object()
    try:
        with torch.no_grad():
            found = original_class(encoder).forward(shadow, x, mask)[0]
    except Exception:
        return False
    between = layers[0].of(x)
    passed = layers[0].was_given(x, mask) and layers[1].was_given(between, mask)
    return passed and _equal(found, layers[1].of(between))


# Structure and source -------------------------------------------------------------------------------------------------


def _why_not_form(module: Any, roles: tuple[str, ...]) -> list[str]:
    missing = [role for role in roles if not name_of(module, role)]
    if missing:
        return [f"it has no {', '.join(NAMES[role][0] for role in missing)}"]
    named = {name_of(module, role) for role in roles}
    others = [
        name
        for name, child in module._modules.items()
        if name not in named and child is not None and type(child) not in (nn.Identity, nn.Dropout)
    ]
    others += [name for name, value in (module._parameters | module._buffers).items() if value is not None]
    if others:
        return [f"it also has {', '.join(others)}"]
    needed = [name for name in _needed(module) if name not in ("hidden_states", "attention_mask", "x")]
    if needed:
        shown = [f"{name} ({_PURPOSES[name]})" if name in _PURPOSES else name for name in needed]
        return [f"its forward needs {', '.join(shown)}"]
    places = list(_parameters(module))
    if roles is not MLP and places[:1] != ["hidden_states"]:
        return ["its forward does not take hidden_states first"]
    if roles is not MLP and "attention_mask" not in places:
        return ["its forward takes no attention_mask"]
    if roles is LAYER and places[:2] != ["hidden_states", "attention_mask"]:
        return ["its forward does not take attention_mask after hidden_states"]
    if roles is not LAYER and original_class(module).__call__ is not nn.Module.__call__:  # a layer's is called
        return ["its class has a __call__ of its own"]
    remark = _why_not_straight(original_class(module).forward, frozenset(module._modules), _ATTRIBUTES[roles])
    return [remark] if remark else []


def _parameters(module: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(original_class(module).forward).parameters
    return dict(list(parameters.items())[1:])


def _needed(module: Any) -> list[str]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in _parameters(module).items() if p.default is p.empty and p.kind not in variable]


_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.Return, ast.If, ast.Pass)
_EXPRESSIONS = (
    *(ast.Name, ast.Attribute, ast.Constant, ast.Call, ast.keyword, ast.Starred, ast.Tuple, ast.Subscript, ast.Slice),
    *(ast.BinOp, ast.UnaryOp, ast.IfExp, ast.Compare, ast.BoolOp),
    *(ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context),
)
_METHODS = {"view", "reshape", "transpose", "contiguous", "flatten", "unflatten", "permute", "size"}


@functools.cache
def _why_not_straight(forward: Callable, submodules: frozenset[str], attributes: frozenset[str]) -> str:
    """A remark unless the function is a straight line, as this file's docstring defines it, or an empty string."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return "the source of its forward cannot be read"
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return "the source of its forward cannot be read"
    body = function.body[1:] if ast.get_docstring(function) else function.body
    for statement in body:
        for node in _without_annotations(statement):
            if not isinstance(node, (*_STATEMENTS, *_EXPRESSIONS)):
                return f"its forward has more than calls and arithmetic ({type(node).__name__})"
            condition = node.test if isinstance(node, (ast.If, ast.IfExp)) else node
            is_condition = condition is not node or isinstance(node, (ast.Compare, ast.BoolOp))
            if is_condition and not _is_fixed(condition):
                return f"its forward depends on {ast.unparse(condition)}"
            if _is_of_self(node) and node.attr not in submodules | attributes:
                return f"its forward reads {ast.unparse(node)}, which may change"
            if isinstance(node, ast.Call) and not _is_known_call(node.func, submodules, _interfaces(body)):
                return f"its forward calls {ast.unparse(node.func)}"
    return ""


def _without_annotations(statement: ast.AST) -> Iterator[ast.AST]:
    yield statement
    for name, value in ast.iter_fields(statement):
        if name != "annotation":
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _without_annotations(child)


def _interfaces(body: list[ast.stmt]) -> set[str]:
    """Names that only functions from transformers' attention interface are assigned to."""
    found: set[str] = set()
    others: set[str] = set()
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            is_interface = isinstance(node.value, ast.Call) and _is_interface(node.value.func)
            for target in targets:
                names = {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
                (found if is_interface else others).update(names)
    return found - others


def _is_interface(function: ast.expr) -> bool:
    return ast.unparse(function) == "ALL_ATTENTION_FUNCTIONS.get_interface"


def _is_fixed(test: ast.AST) -> bool:
    """Whether a condition reads only the module's own attributes, constants, and whether an argument is None."""
    if isinstance(test, ast.BoolOp):
        return all(_is_fixed(value) for value in test.values)
    if isinstance(test, ast.UnaryOp):
        return _is_fixed(test.operand)
    if isinstance(test, ast.Compare):
        against_none = all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in test.ops)
        if against_none and all(isinstance(other, ast.Constant) for other in test.comparators):
            return isinstance(test.left, ast.Name) or _is_fixed(test.left)
        return all(_is_fixed(value) for value in (test.left, *test.comparators))
    return _is_of_self(test) or isinstance(test, ast.Constant)


def _is_of_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _is_known_call(function: ast.expr, submodules: frozenset[str], interfaces: set[str]) -> bool:
    if isinstance(function, ast.Name):
        return function.id in interfaces
    if _is_interface(function):
        return True
    if not isinstance(function, ast.Attribute):
        return False
    if _is_of_self(function):
        return function.attr in submodules
    return function.attr in _METHODS


# Running it -----------------------------------------------------------------------------------------------------------


class _Function:
    """A random function of the last dimension, in place of a submodule, which notes what it was given.

    results: 2 for attention, which also returns weights.
    """

    def __init__(self, width: int, out_width: int, results: int = 1) -> None:
        self.index = torch.randint(width, (out_width,), generator=_generator, device="cpu")
        self.scale, self.shift = _random(out_width), _random(out_width)
        self.results = results
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def of(self, x: Tensor) -> Tensor:
        return x[..., self.index] * self.scale + self.shift

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls.append((arguments, named))
        x = arguments[0] if arguments else named["hidden_states"]
        return (self.of(x), None) if self.results == 2 else self.of(x)

    def was_given(self, x: Tensor, mask: Any) -> bool:
        """Whether it was called once, with x, this very mask, and nothing else."""
        if len(self.calls) != 1:
            return False
        arguments, named = self.calls[0]
        given = dict(zip(("hidden_states", "attention_mask"), arguments, strict=False)) | named
        others = [value for name, value in given.items() if name not in ("hidden_states", "attention_mask")]
        plain = len(arguments) <= 2 and all(value is None or value is False for value in others)
        return plain and _equal(given.get("hidden_states"), x) and given.get("attention_mask") is mask


class _Config:
    """A config with another attention implementation, of which the model's own does not learn."""

    def __init__(self, config: Any, implementation: str) -> None:
        self._config, self._attn_implementation = config, implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


@contextlib.contextmanager
def _registered(function: Callable) -> Iterator[str]:
    """The name under which transformers finds an attention function meanwhile."""
    name = "siglip_kernels_recognition"
    ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield name
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


_generator = torch.Generator(device="cpu").manual_seed(0)  # not the process's, whose numbers are its user's


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.float64, device="cpu")


def _inputs(width: int) -> list[tuple[Tensor, Tensor | None]]:
    """Input and mask, of two lengths."""
    return [(_random(2, 3, width), None), (_random(2, 5, width), _random(2, 1, 5, 5))]


def _equal(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)


def _features(linear: Any, side: str) -> int:
    features = getattr(linear, f"{side}_features", 0)
    return features if isinstance(features, int) else 0


def _shadow(module: Any, functions: dict[str, _Function], training: bool) -> Any:
    """An object of the module's class with its attributes, but with functions in place of its submodules."""
    shadow: Any = nn.Module()
    ordinary = {name: value for name, value in module.__dict__.items() if name not in shadow.__dict__}
    shadow.__class__ = original_class(module)
    shadow.__dict__.update(ordinary)
    shadow.__dict__["training"] = training
    shadow.__dict__.pop("forward", None)  # set on the instance, which accelerate_modules refuses
    for name, child in module.__dict__["_modules"].items():
        shadow.__dict__["_modules"][name] = None if child is None else _nothing
    for role, function in functions.items():
        shadow.__dict__["_modules"][name_of(module, role)] = function
    return shadow


def _nothing(x: Tensor) -> Tensor:
    """In place of nn.Identity and nn.Dropout, which `passes_through` asks about at every call."""
    return x


def _call(shadow: Any, x: Tensor, *mask: Any) -> Any:
    """What forward returns, or a remark if it fails."""
    try:
        with torch.no_grad():
            return type(shadow).forward(shadow, x, **({"attention_mask": mask[0]} if mask else {}))
    except Exception as error:
        return f"its forward fails without further arguments ({type(error).__name__}: {error})"
