"""Wrapped, replaced or hooked modules are called under every backend; otherwise a layer is two operations, or four."""

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import TINY_TEXT, TINY_VISION, project_model, randomised, transformers_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import siglip_model
from siglip_model import backends
from siglip_model.checkpoints.errors import CheckpointError

BACKENDS = ["eager", "sdpa", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE_LAYER = {"num_hidden_layers": 1}
LAYER = ("layer_norm1", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
         "layer_norm2", "mlp", "mlp.fc1", "mlp.fc2")  # fmt: skip
HEAD = ("attention", "attention.out_proj", "layernorm", "mlp", "mlp.fc1", "mlp.fc2")
MODULES = (
    *(f"vision_model.encoder.layers.0.{name}" for name in LAYER),
    *(f"vision_model.head.{name}" for name in HEAD),
    *(f"{tower}_model.embeddings.position_embedding" for tower in ("vision", "text")),
    "vision_model.embeddings.patch_embedding",
    "vision_model.encoder.layers.0",
    "vision_model.post_layernorm",
    "vision_model.head",
    "text_model.embeddings.token_embedding",
    "text_model.final_layer_norm",
    "text_model.head",
)
LINEARS = [name for name in MODULES if name.endswith(("proj", "fc1", "fc2"))]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def model(backend: str = "eager", kind: str = "SiglipModel") -> Any:
    config = siglip_model.SiglipConfig(
        text_config={**TINY_TEXT, **ONE_LAYER}, vision_config={**TINY_VISION, **ONE_LAYER}
    )
    return randomised(getattr(siglip_model, kind)(config, backend=backend)).to(DEVICE)


def run(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 99, (2, 16), generator=generator).to(DEVICE)
    pixels = torch.randn(2, 3, 48, 48, generator=generator).to(DEVICE)
    return model(ids, pixels).logits_per_image


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def replace_module(model: Any, name: str, make: Callable[[Any], nn.Module]) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))


class Counted(nn.Module):
    """A wrapper that passes on its arguments."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # as peft's wrappers do
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


HOOKS: dict[str, Callable[[nn.Module, list], Any]] = {
    "forward hook": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "pre-hook": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward hook": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward pre-hook": lambda module, seen: module.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_of_every_module_runs(hook: str) -> None:
    original = model()
    expected = run(original)
    for name in MODULES:
        hooked, seen = copy.deepcopy(original), []
        handle = HOOKS[hook](hooked.get_submodule(name), seen)
        out = run(hooked)
        out.sum().backward()
        assert len(seen) == 1, name
        close(out, expected)
        handle.remove()
        run(hooked).sum().backward()
        assert len(seen) == 1, name


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_on_all_modules_see_every_module(backend: str, kind: str) -> None:
    hooked, seen = model(backend), []
    expected = run(hooked)
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *_: seen.append(module))
    try:
        out = run(hooked)
        out.sum().backward()
    finally:
        handle.remove()
    close(out, expected)
    for name in MODULES:
        if name != "vision_model.head.attention.out_proj":  # nn.MultiheadAttention takes its parameters
            assert sum(module is hooked.get_submodule(name) for module in seen) == 1, name
    count = len(seen)
    run(hooked).sum().backward()
    assert len(seen) == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrapped_modules_are_called(backend: str) -> None:
    wrapped = model(backend)
    expected = run(wrapped)
    for name in LINEARS:
        replace_module(wrapped, name, Counted)
    close(run(wrapped), expected)
    assert {module.calls for module in wrapped.modules() if isinstance(module, Counted)} == {1}


@pytest.mark.parametrize("name", MODULES)
def test_a_wrapper_around_any_module(name: str) -> None:
    wrapped = model()
    expected = run(wrapped)
    replace_module(wrapped, name, Counted)
    close(run(wrapped), expected)
    assert wrapped.get_submodule(name).calls == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_torch_modules_take_the_places(backend: str) -> None:
    """nn.Linear takes no residual; some libraries put a class with its signature there."""

    def plain(module: nn.Linear) -> nn.Linear:
        new = nn.Linear(module.in_features, module.out_features, device=DEVICE)
        new.load_state_dict(module.state_dict())
        return new

    replaced = model(backend)
    expected = run(replaced)
    for name in LINEARS:
        replace_module(replaced, name, plain)
    close(run(replaced), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parametrized_and_pruned_weights_count(backend: str) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    reference, changed = model("eager"), model(backend)
    changed.load_state_dict(reference.state_dict())
    layer = "vision_model.encoder.layers.0."
    for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "layer_norm1"):
        parametrize.register_parametrization(changed.get_submodule(layer + name), "weight", Half())
        reference.get_submodule(layer + name).weight.data /= 2
    for name in ("self_attn.v_proj", "mlp.fc2"):
        prune.random_unstructured(changed.get_submodule(layer + name), "weight", 0.5)
        reference.get_submodule(layer + name).weight.data *= changed.get_submodule(layer + name).weight_mask
    close(run(changed), run(reference))


def test_a_forward_set_on_the_instance_is_called() -> None:
    changed = model()
    norm = changed.vision_model.encoder.layers[0].layer_norm2
    norm.forward = lambda x: torch.zeros_like(x)  # as accelerate does to load weights on demand
    expected = model()
    expected.load_state_dict(changed.state_dict())
    for parameter in expected.vision_model.encoder.layers[0].layer_norm2.parameters():
        parameter.data.zero_()
    close(run(changed), run(expected))


def test_missing_biases() -> None:
    changed, expected = model(), model()
    expected.load_state_dict(changed.state_dict())
    for name in LINEARS:
        changed.get_submodule(name).bias = None
        expected.get_submodule(name).bias.data.zero_()
    close(run(changed), run(expected))


class Quantised(Tensor):
    """A weight that wraps another tensor and overrides F.linear, as torchao's do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Quantised":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.inner, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Quantised(args[0].inner)
        raise NotImplementedError(f"{func} of a quantised weight")


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_bring_their_own_product(backend: str, tmp_path: Path) -> None:
    changed = model(backend)
    expected = run(changed)
    for name in LINEARS:
        module = changed.get_submodule(name)
        module.weight = nn.Parameter(Quantised(module.weight.detach()), requires_grad=False)
    close(run(changed), expected)
    with pytest.raises(CheckpointError, match="cannot save vision_model.*weight: it is a Quantised of a quantised"):
        changed.save_pretrained(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_of_peft(backend: str) -> None:
    peft = pytest.importorskip("peft")
    base = model(backend)
    expected = run(base)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "out_proj", "fc1", "fc2"], init_lora_weights=False)
    tuned = peft.get_peft_model(base, config).eval()
    out = run(tuned)
    assert (out - expected).abs().max() > 1e-3
    out.sum().backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_" in n and "fc" in n)
    close(run(tuned.merge_and_unload()), out)  # merged, the layers are fused again, with the same result


def seen_by_hooks(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Every module's first argument, its output, and the gradients of both."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, received: str, returned: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for what, value in ((received, args), (returned, output)):
                first = value[0] if isinstance(value, tuple) else value
                if first is not None:
                    seen[f"{name}, {what}"] = first.detach()

        return hook

    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(keep(name, "input", "output"))
        module.register_full_backward_hook(keep(name, "input gradient", "output gradient"))
    run(model).sum().backward()
    return seen


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_see_what_they_see_in_transformers(backend: str) -> None:
    peer = transformers_model({**TINY_TEXT, **ONE_LAYER}, {**TINY_VISION, **ONE_LAYER}).to(DEVICE)
    project = project_model(peer, backend).to(DEVICE)
    hidden = "vision_model.head.attention.out_proj"  # nn.MultiheadAttention takes its parameters
    called_alike = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d)  # others are classes of each library
    names = [name for name, module in peer.named_modules() if isinstance(module, called_alike) and name != hidden]
    found, expected = seen_by_hooks(project, names), seen_by_hooks(peer, names)
    assert found.keys() == expected.keys() and len(expected) > 80
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_modules_of_towers_are_hooked_as_in_transformers() -> None:
    peer = transformers_model({**TINY_TEXT, **ONE_LAYER}, {**TINY_VISION, **ONE_LAYER}).to(DEVICE)
    project = project_model(peer, "sdpa").to(DEVICE)
    hidden = "vision_model.head.attention.out_proj"  # nn.MultiheadAttention takes its parameters
    visible = [name for name in MODULES if name != hidden]
    seen: list[dict[str, Tensor]] = []
    for each in (peer, project):
        outputs: dict[str, Tensor] = {}

        def keep(name: str, outputs: dict[str, Tensor]) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs[name] = (output[0] if isinstance(output, tuple) else output).detach()

            return hook

        for name in visible:
            each.get_submodule(name).register_forward_hook(keep(name, outputs))
        with torch.no_grad():
            run(each)
        seen.append(outputs)
    assert seen[0].keys() == seen[1].keys() == set(visible)
    for name, expected in seen[0].items():
        found = seen[1][name]
        assert found.numel() == expected.numel(), name
        close(found.reshape(expected.shape), expected)


def test_a_wrapped_tower_of_a_classifier_is_called() -> None:
    classifier = model(kind="SiglipForImageClassification")
    pixels = torch.randn(2, 3, 48, 48, device=DEVICE)
    expected, seen = classifier(pixels).logits, []
    classifier.vision_model.register_forward_hook(lambda *_: seen.append(1))
    close(classifier(pixels).logits, expected)
    assert seen == [1]


@pytest.mark.parametrize("hooked", ["head", "head.mlp.fc1"])
def test_a_hook_in_the_unused_head_of_a_classifier_runs(hooked: str) -> None:
    classifier = model(kind="SiglipForImageClassification")
    pixels = torch.randn(2, 3, 48, 48, device=DEVICE)
    expected, seen = classifier(pixels).logits, []
    classifier.vision_model.get_submodule(hooked).register_forward_hook(lambda *_: seen.append(1))
    close(classifier(pixels).logits, expected)
    assert seen == [1]


def counting(ops: backends.Backend, calls: list[str]) -> backends.Backend:
    """The backend, with its calls recorded."""

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return operation(*args, **kwargs)

        return call

    names = [field.name for field in fields(ops) if field.type.startswith("Operation")]
    present = {name: getattr(ops, name) for name in names if getattr(ops, name) is not None}
    return backends.replace(ops, **{name: counted(name, operation) for name, operation in present.items()})


PARTS = ["pre_norm_qkv", "attention", "linear"]


@pytest.mark.parametrize(("backend", "first_half"), [("sdpa", PARTS), ("triton", ["pre_norm_attention"])])
def test_a_half_of_a_layer_is_one_operation_where_the_backend_has_it(backend: str, first_half: list[str]) -> None:
    calls: list[str] = []
    project = model(backend).vision_model
    ops = counting(project._backend, calls)
    for module in project.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    project(torch.randn(1, 3, 48, 48, device=DEVICE))
    layer = [*first_half, "pre_norm_mlp"]
    assert calls == ["patch_embed", *layer, "layer_norm", "attention_pool", "pre_norm_mlp"]
    calls.clear()
    hook = project.encoder.layers[0].self_attn.out_proj.register_forward_hook(lambda *_: None)
    project.encoder.layers[0](torch.randn(1, 9, 64, device=DEVICE), {})
    assert calls == [*PARTS[:2], "pre_norm_mlp"]
    hook.remove()
    calls.clear()
    project.encoder.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    project.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: None)
    project.encoder.layers[0](torch.randn(1, 9, 64, device=DEVICE), {})
    # without the hooked k_proj and fc1, which are called
    assert calls == ["layer_norm", "linear", "linear", "attention", "linear", "layer_norm", "linear"]


def test_the_names_of_transformers() -> None:
    """Libraries that look modules up by name find them."""
    peer = transformers.SiglipModel(
        transformers.SiglipConfig(text_config={**TINY_TEXT, **ONE_LAYER}, vision_config={**TINY_VISION, **ONE_LAYER})
    )
    names = {name for name, _ in model().named_modules()}
    missing = {name for name, _ in peer.named_modules()} - names
    assert all(name.endswith("activation_fn") for name in missing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["SiglipModel", "SiglipForImageClassification"])
def test_the_types_of_transformers(kind: str, backend: str) -> None:
    """Libraries that quantise, shard or adapt models look for exactly torch's classes, not for subclasses."""
    config = transformers.SiglipConfig(
        text_config={**TINY_TEXT, **ONE_LAYER}, vision_config={**TINY_VISION, **ONE_LAYER}
    )
    project = model(backend, kind)
    torch_modules = 0
    for name, module in getattr(transformers, kind)(config).named_modules():
        if type(module).__module__.startswith("torch.nn"):
            assert type(project.get_submodule(name)) is type(module), name
            torch_modules += 1
    assert torch_modules > 15
