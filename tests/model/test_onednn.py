"""Linear layers by oneDNN on a CPU: equal to PyTorch's, never where a derivative or a trace is needed, and chosen by a
check that refuses a wrong and a slow product."""

import copy
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import TINY_TEXT, TINY_VISION
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import siglip_model
from siglip_kernels import MissingBackendError, reference
from siglip_model import onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """oneDNN as if it had won; a product adds its activation to the list."""
    calls: list[str] = []
    multiply = onednn._product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", form: str = "") -> Tensor:
        calls.append(activation)
        return multiply(x, weight, bias, activation, form)

    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(onednn, "_product", counted)
    return calls


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights() -> tuple[Tensor, Tensor]:
    return drawn(48, 32) * 32**-0.5, drawn(48)


INPUTS = {
    "three dimensions": drawn(2, 7, 32),
    "a strided view": drawn(9, 5, 32)[:, -1],
    "transposed": drawn(32, 9).T,
    "overlapping": drawn(1, 32).expand(6, 32),
}


@torch.no_grad()
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_linear_as_pytorch(x: Tensor, with_bias: bool, products: list[str]) -> None:
    weight, bias = weights()
    arguments = (x, weight, bias if with_bias else None)
    residual = drawn(*x.shape[:-1], 48)
    for given in ((), (residual,)):
        found, expected = onednn.linear(*arguments, *given), reference.linear(*arguments, *given)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert products == ["none", "none"]


@torch.no_grad()
@pytest.mark.parametrize("bias", [drawn(96)[::2], drawn(1).expand(48)], ids=["strided", "expanded"])
def test_biases_that_are_not_contiguous(bias: Tensor, products: list[str]) -> None:
    """oneDNN reads what lies behind their first value."""
    weight, _ = weights()
    assert torch.equal(
        onednn.linear(INPUTS["three dimensions"], weight, bias), F.linear(INPUTS["three dimensions"], weight, bias)
    )
    assert not products


@torch.no_grad()
def test_operations_as_the_reference(products: list[str]) -> None:
    x, square, fc1, fc2 = drawn(2, 7, 32), drawn(32, 32) * 32**-0.5, weights(), (drawn(32, 48) * 48**-0.5, drawn(32))
    norm, projections = (drawn(32), drawn(32), 1e-6), (square, drawn(32)) * 3
    cases: list[tuple[str, tuple[Any, ...], list[str]]] = [
        ("mlp", (x, *fc1, *fc2, x), ["gelu", "none"]),
        ("pre_norm_mlp", (x, *norm, *fc1, *fc2), ["gelu", "none"]),
        ("pre_norm_qkv", (x, *norm, *projections, 4), ["none"] * 3),
    ]
    for name, arguments, expected_products in cases:
        products.clear()
        found, expected = getattr(onednn, name)(*arguments), getattr(reference, name)(*arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert products == expected_products, name


@torch.no_grad()
def test_as_exact_as_pytorch(products: list[str]) -> None:
    """Of so400m's widest sum, in inference mode as well."""
    x, weight = drawn(64, 4304), drawn(1152, 4304) * 4304**-0.5
    exact, rounding = x.double() @ weight.double().T, torch.finfo(torch.float32).eps
    error = (F.linear(x, weight) - exact).norm() / exact.norm()
    with torch.inference_mode():
        found = onednn.linear(x, weight)
    assert (found - exact).norm() / exact.norm() < 2 * error + rounding
    assert products == ["none"]


class Wrapping(Tensor):
    pass


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return onednn.linear(x, weight, bias)


def under_vmap(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.func.vmap(lambda each: onednn.linear(each, weight, bias))(x)


def in_forward_mode(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.func.jvp(lambda each: onednn.linear(each, weight, bias), (x,), (x,))[1]


def traced(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    program = torch.jit.trace(
        onednn.linear, (x, weight, bias), check_trace=False
    )  # the check calls the function untraced
    assert "mkldnn" not in str(program.graph)
    return program(x, weight, bias)


class Layer(nn.Module):
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return onednn.linear(x, weight, bias)


def exported(strict: bool) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        program = torch.export.export(Layer(), arguments, strict=strict)
        assert "mkldnn" not in str(program.graph)
        return program.module()(*arguments)

    return run


def compiled(*arguments: Tensor) -> Tensor:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    result = torch.compile(onednn.linear, backend=backend, fullgraph=True)(*arguments)
    assert len(graphs) == 1 and "mkldnn" not in graphs[0]
    return result


class Recomputing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        return onednn.linear(*arguments)


def in_custom_forward(*arguments: Tensor) -> Tensor:
    return Recomputing.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


REFUSED: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], Callable[[], AbstractContextManager[Any]]]]
REFUSED = {
    "gradients of the input": (plain, lambda x: x.clone().requires_grad_(), nullcontext),
    "a reentrant checkpoint": (in_custom_forward, lambda x: x, nullcontext),
    "autocast": (plain, lambda x: x, lambda: torch.autocast("cpu", torch.bfloat16)),
    "a dispatch mode": (plain, lambda x: x, Watching),
    "oneDNN turned off": (plain, lambda x: x, lambda: torch.backends.mkldnn.flags(enabled=False)),
    "a subclass": (plain, lambda x: x.as_subclass(Wrapping), torch.no_grad),
    "float64": (plain, lambda x: x.double(), torch.no_grad),
    "bfloat16": (plain, lambda x: x.bfloat16(), torch.no_grad),
    "few rows": (plain, lambda x: x[:1, :3], torch.no_grad),
    "no rows": (plain, lambda x: x[:0], torch.no_grad),
    "vmap": (under_vmap, lambda x: x, torch.no_grad),
    "forward mode": (in_forward_mode, lambda x: x, torch.no_grad),
    "torch.jit.trace": (traced, lambda x: x, torch.no_grad),
    "torch.export, strict": (exported(True), lambda x: x, torch.no_grad),
    "torch.export": (exported(False), lambda x: x, torch.no_grad),
    "torch.compile": (compiled, lambda x: x, torch.no_grad),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_never_where_it_does_not_serve(
    case: tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], Callable[[], AbstractContextManager[Any]]],
    products: list[str],
) -> None:
    call, change, context = case
    x = change(INPUTS["three dimensions"])
    weight, bias = (each.to(x.dtype) for each in weights())
    with context():
        found, expected = call(x, weight, bias), F.linear(x, weight, bias)
        if call is in_forward_mode:
            expected = expected - bias
    torch.testing.assert_close(found, expected)
    assert not products


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_parameters_get_their_gradients(which: str, products: list[str]) -> None:
    given = dict(zip(("weight", "bias"), weights(), strict=True))
    given[which].requires_grad_()
    onednn.linear(INPUTS["three dimensions"], **given).sum().backward()
    assert given[which].grad is not None and not products
    with torch.no_grad():
        onednn.linear(INPUTS["three dimensions"], **given)
    assert products


@torch.no_grad()
def test_sizes_that_do_not_fit_are_pytorchs_errors(products: list[str]) -> None:
    weight, bias = weights()
    for arguments in (
        (drawn(7, 31), weight, bias),
        (drawn(7, 32), weight, bias[:-1]),
        (drawn(7, 32), weight[None], None),
    ):
        with pytest.raises(RuntimeError) as expected:
            F.linear(*arguments)
        with pytest.raises(RuntimeError) as found:
            onednn.linear(*arguments)
        assert str(found.value) == str(expected.value)
    assert not products


def model(backend: str = "sdpa") -> siglip_model.SiglipModel:
    torch.manual_seed(0)
    config = siglip_model.SiglipConfig(text_config=TINY_TEXT, vision_config=TINY_VISION)
    return siglip_model.SiglipModel(config, backend=backend).eval()


def logits(model: Any) -> Tensor:
    ids, pixels = torch.arange(32).view(2, 16), torch.linspace(-1, 1, 13824).view(2, 3, 48, 48)
    with torch.no_grad():
        return model(ids, pixels).logits_per_image


def test_the_default_backend_and_no_other_on_a_cpu(products: list[str]) -> None:
    found = model("auto")
    assert found.backend == "sdpa"
    expected = logits(model("eager"))
    assert not products
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-5)
    layers = TINY_TEXT["num_hidden_layers"] + TINY_VISION["num_hidden_layers"]
    assert products.count("gelu") == layers and products.count("none") == 5 * layers


def test_changed_weights_and_copies(products: list[str]) -> None:
    """Nothing of the weights is kept: they may change in place, move and be replaced, and a copy has nothing more."""
    changed, other = model(), model()
    before, keys = logits(changed), list(changed.state_dict())
    with torch.no_grad():
        for parameter in [*changed.parameters(), *other.parameters()]:
            parameter.mul_(1.5)
    other.set_backend("eager")
    assert (logits(changed) - before).abs().max() > 1e-3
    for twin in (changed, copy.deepcopy(changed), pickle.loads(pickle.dumps(changed)), changed.share_memory()):
        torch.testing.assert_close(logits(twin), logits(other), rtol=0, atol=1e-5)
        assert list(twin.state_dict()) == keys
    changed.load_state_dict(model().state_dict())
    torch.testing.assert_close(logits(changed), before)
    assert products


@pytest.fixture
def forgotten() -> Iterator[None]:
    onednn.is_faster.cache_clear()
    yield
    onednn.is_faster.cache_clear()


def test_a_faster_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the check leaves random numbers as they are."""
    times = {onednn._product: 1.0, F.linear: 1.2}
    monkeypatch.setattr(onednn, "_seconds", lambda multiply, *arguments: times[multiply])
    state = torch.get_rng_state()
    assert onednn._wins()
    times[F.linear] = 1.05
    assert not onednn._wins()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_slow_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> Tensor:
        time.sleep(0.2)
        return F.linear(*arguments)

    monkeypatch.setattr(onednn, "_product", slow)
    assert not onednn._wins()


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_product_is_refused(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Tensor:
        result = F.linear(*arguments)
        result[-1, -1] += error
        return result

    monkeypatch.setattr(onednn, "_product", wrong)
    monkeypatch.setattr(onednn, "_seconds", lambda multiply, *_: float(multiply is F.linear))
    assert not onednn._wins()


@pytest.mark.parametrize("error", [AttributeError("no such operator"), RuntimeError("PyTorch without oneDNN")])
def test_a_missing_operator_is_no_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Tensor:
        raise error

    monkeypatch.setattr(onednn, "_product", missing)
    assert not onednn._wins()


@pytest.mark.usefixtures("forgotten")
def test_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGLIP_ONEDNN", raising=False)
    checks: list[bool] = []
    monkeypatch.setattr(onednn, "_wins", lambda: checks.append(True) or True)
    with torch.no_grad():
        for _ in range(3):
            onednn.linear(INPUTS["three dimensions"], *weights())
    assert checks == [True]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_decides(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGLIP_ONEDNN", value)
    monkeypatch.setattr(onednn, "_wins", lambda: pytest.fail("measured"))
    assert onednn.is_faster() is (value == "1")


@pytest.mark.usefixtures("forgotten")
def test_another_value_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGLIP_ONEDNN", "yes")
    with pytest.raises(MissingBackendError, match="SIGLIP_ONEDNN is 'yes'; supported: 1 .*, 0 .* or unset"):
        logits(model())
