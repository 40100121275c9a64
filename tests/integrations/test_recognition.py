"""Which modules are taken for SigLIP's: those that compute the same under other names, and none that looks alike."""

import dataclasses
import types

import pytest
import torch
from acceleration import check_acceleration, randomise
from tiny_transformers import contrastive, inputs, pooled, siglip
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import siglip_kernels
from siglip_kernels import MissingBackendError
from siglip_kernels.integrations.patching import Accelerated
from siglip_kernels.integrations.transformers import accelerate, restore
from siglip_kernels.integrations.transformers_structure import read_layer, why_not_attention, why_not_mlp

WIDTH = 16


def softmax_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **arguments):
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def scaled_values(module, query, key, value, attention_mask, scaling, **arguments):
    return softmax_attention(module, query, key, 2 * value, attention_mask, scaling)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation="sdpa")
        self.head_dim, self.scaling, self.attention_dropout, self.is_causal = 8, 8**-0.5, 0.0, False
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        batch, length, _ = hidden_states.shape
        shape = (batch, length, -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, softmax_attention)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(out.reshape(batch, length, -1)), weights


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.act = nn.GELU("tanh")

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, attention=Attention, mlp=MLP):
        super().__init__()
        self.attn, self.mlp = attention(), mlp()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.attn(self.norm1(hidden_states), attention_mask)[0] + hidden_states
        return self.mlp(self.norm2(hidden_states)) + hidden_states


class Tower(nn.Module):
    def __init__(self, layer=Layer):
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])
        self.dtype = torch.float32

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, attention_mask=mask)
        return x


def check(tower):
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))
    model = randomise(tower).eval()
    return check_acceleration(model, lambda m: dict(x=m(x.to(m.layers[0].norm1.weight.dtype))), accelerate, restore)


def test_a_class_of_ones_own_is_served():
    report = check(Tower())
    operations = {entry.path: entry.operations for entry in report.replaced}
    assert operations["layers.1"] == ("pre_norm_attention", "pre_norm_mlp")
    assert operations["layers.1.attn"] == ("attention",) and operations["layers.1.mlp"] == ("mlp",)
    assert report.left == () and read_layer(Layer()) == ([], 2)


class PostNorm(Layer):
    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.norm1(self.attn(hidden_states, attention_mask)[0] + hidden_states)
        return self.norm2(self.mlp(hidden_states) + hidden_states)


class Parallel(Layer):
    def forward(self, hidden_states, attention_mask=None):
        attended = self.attn(self.norm1(hidden_states), attention_mask)[0]
        return hidden_states + attended + self.mlp(self.norm2(hidden_states))


class NormsSwapped(Layer):
    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.attn(self.norm2(hidden_states), attention_mask)[0] + hidden_states
        return self.mlp(self.norm1(hidden_states)) + hidden_states


class ResidualDropped(Layer):
    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.attn(self.norm1(hidden_states), attention_mask)[0]
        return self.mlp(self.norm2(hidden_states)) + hidden_states


class ResidualOfTheNorm(Layer):
    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.norm1(hidden_states)
        hidden_states = self.attn(hidden_states, attention_mask)[0] + hidden_states
        return self.mlp(self.norm2(hidden_states)) + hidden_states


class Scaled(Layer):
    factor = 0.5

    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.attn(self.norm1(hidden_states), attention_mask)[0] * self.factor + hidden_states
        return self.mlp(self.norm2(hidden_states)) + hidden_states


class ScaledByLength(Layer):
    def forward(self, hidden_states, attention_mask=None):
        factor = 3 / hidden_states.shape[1]
        hidden_states = self.attn(self.norm1(hidden_states), attention_mask)[0] * factor + hidden_states
        return self.mlp(self.norm2(hidden_states)) + hidden_states


class MaskIgnored(Layer):
    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.attn(self.norm1(hidden_states))[0] + hidden_states
        return self.mlp(self.norm2(hidden_states)) + hidden_states


class Clamped(Layer):
    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.attn(self.norm1(hidden_states), attention_mask)[0] + hidden_states
        return torch.clamp(self.mlp(self.norm2(hidden_states)) + hidden_states, max=1e4)


class OtherInTraining(Layer):
    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.attn(self.norm1(hidden_states), attention_mask)[0] + hidden_states
        return self.mlp(self.norm2(hidden_states)) + (2 * hidden_states if self.training else hidden_states)


class OtherForLongInput(Layer):
    def forward(self, hidden_states, attention_mask=None):
        mixed = hidden_states if hidden_states.shape[1] > 1000 else self.norm1(hidden_states)
        hidden_states = self.attn(mixed, attention_mask)[0] + hidden_states
        return self.mlp(self.norm2(hidden_states)) + hidden_states


class ByAMethod(Layer):
    def add(self, x, y):
        return x + y if x.shape[0] < 100 else x

    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.add(hidden_states, self.attn(self.norm1(hidden_states), attention_mask)[0])
        return self.mlp(self.norm2(hidden_states)) + hidden_states


class WithLayerScale(Layer):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))


class WithAThirdNorm(Layer):
    def __init__(self):
        super().__init__()
        self.norm3 = nn.LayerNorm(WIDTH)


class WithPositions(Layer):
    def forward(self, hidden_states, attention_mask, position_embeddings):
        raise NotImplementedError


LAYERS = {
    PostNorm: "does not compute",
    Parallel: "does not compute",
    NormsSwapped: "does not compute",
    ResidualDropped: "does not compute",
    ResidualOfTheNorm: "does not compute",
    Scaled: "reads self.factor, which may change",
    ScaledByLength: "does not compute",
    MaskIgnored: "does not compute",
    Clamped: "calls torch.clamp",
    OtherInTraining: "does not compute",
    OtherForLongInput: "depends on hidden_states.shape[1] > 1000",
    ByAMethod: "calls self.add",
    WithLayerScale: "also has gamma",
    WithAThirdNorm: "also has norm3",
    WithPositions: "needs position_embeddings (rotary positions)",
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_look_alike(kind):
    remarks, _ = read_layer(kind())
    assert len(remarks) == 1 and LAYERS[kind] in remarks[0]


# Attention and MLP as text, of which a part is varied.

ATTENTION = """
class Varied(Attention):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = {q}.view(shape).transpose(1, 2)
        k = {k}.view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attend = {attend}
        out, weights = attend(self, q, k, v, {mask}, scaling={scaling}, dropout={dropout}, {more}**kwargs)
        out = self.o_proj({out}.flatten(2))
        return {result}
"""
AS_SIGLIP = dict(
    q="self.q_proj(hidden_states)",
    k="self.k_proj(hidden_states)",
    attend="ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, softmax_attention)",
    mask="attention_mask",
    scaling="self.scaling",
    dropout="self.attention_dropout if self.training else 0.0",
    more="",
    out="out",
    result="out, weights",
)
VARIATIONS = [
    ("q", "(self.q_proj(hidden_states) * 2)", "not just projections"),
    ("q", "self.q_proj(hidden_states + 1)", "not just projections"),
    ("q", "self.k_proj(hidden_states)", "not just projections"),
    ("k", "nn.functional.normalize(self.k_proj(hidden_states))", "calls nn.functional.normalize"),
    ("k", "self.k_proj(hidden_states)[:, :1]", "forward fails"),
    ("attend", "softmax_attention", "calls attend"),
    ("attend", "self.config.attend", "calls attend"),
    ("attend", "ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, scaled_values)", "eager"),
    ("mask", "None", "changes the mask"),
    ("mask", "attention_mask if self.training else None", "changes the mask"),
    ("mask", "attention_mask[..., :1]", "forward fails"),
    ("scaling", "1.0", "scale is not an attribute"),
    ("scaling", "self.scaling if hidden_states.shape[1] < 9 else 1.0", "depends on hidden_states.shape"),
    ("dropout", "0.1", "dropout is not an attribute"),
    ("more", "is_causal=True, ", "is causal"),
    ("more", "sliding_window=4096, ", "passes sliding_window"),
    ("more", "softcap=50.0, s_aux=self.scaling, ", "passes s_aux, softcap"),
    ("out", "(out + hidden_states.view(shape))", "not just a projection of attention's"),
    ("result", "out", "not just a projection of attention's"),
    ("result", "out + hidden_states, weights", "not just a projection of attention's"),
    ("result", "out * self.factor, weights", "reads self.factor, which may change"),
]
FEED_FORWARD = """
class Varied(MLP):
    def forward(self, x):
        return {result}
"""
FEED_FORWARDS = [
    ("self.down_proj(self.act(self.up_proj(x)))", ""),
    ("self.down_proj(self.act(self.up_proj(x))) + x", "does not compute"),
    ("self.down_proj(self.up_proj(x))", "does not compute"),
    ("self.down_proj(self.act(self.act(self.up_proj(x))))", "does not compute"),
    ("self.down_proj(self.act(self.up_proj(x)) * 2)", "does not compute"),
    ("self.down_proj(self.act(self.up_proj(x))) * self.factor", "reads self.factor, which may change"),
    ("self.down_proj(torch.relu(self.up_proj(x)))", "calls torch.relu"),
    ("self.down_proj(self.act(self.up_proj(x))) if x.numel() else x", "depends on x.numel()"),
]


def of_source(tmp_path, source):
    """The class of this source, in a file that `inspect` can read."""
    path = tmp_path / "varied.py"
    path.write_text(source)
    names = {**globals(), "__name__": f"varied_{abs(hash(source))}"}
    exec(compile(source, str(path), "exec"), names)
    return names["Varied"]


def test_the_text_is_recognised(tmp_path):
    assert why_not_attention(of_source(tmp_path, ATTENTION.format(**AS_SIGLIP))()) == []


@pytest.mark.parametrize(("place", "text", "remark"), VARIATIONS)
def test_attention_that_looks_alike(place, text, remark, tmp_path):
    varied = of_source(tmp_path, ATTENTION.format(**{**AS_SIGLIP, place: text}))()
    remarks = why_not_attention(varied)
    assert len(remarks) == 1 and remark in remarks[0]


@pytest.mark.parametrize(("result", "remark"), FEED_FORWARDS)
def test_feed_forwards(result, remark, tmp_path):
    remarks = why_not_mlp(of_source(tmp_path, FEED_FORWARD.format(result=result))())
    assert bool(remarks) == bool(remark) and remark in "".join(remarks)


def test_a_call_of_its_own():
    class CalledAttention(Attention):
        def __call__(self, *arguments, **named):
            out, weights = super().__call__(*arguments, **named)
            return 2 * out, weights

    class CalledMLP(MLP):
        def __call__(self, x):
            return 2 * super().__call__(x)

    assert why_not_attention(CalledAttention()) == ["its class has a __call__ of its own"]
    assert why_not_mlp(CalledMLP()) == ["its class has a __call__ of its own"]


def test_attributes_of_attention():
    def varied(**attributes):
        attention = Attention()
        for name, value in attributes.items():
            setattr(attention, name, value)
        return "".join(why_not_attention(attention))

    assert varied() == "" and varied(scaling=0.5, attention_dropout=0.1) == ""
    assert "head dim" in varied(head_dim=5)
    assert "has no config" in varied(config=None)
    assert "differ in width" in varied(k_proj=nn.Linear(WIDTH, 8))
    assert "also has q_norm" in varied(q_norm=nn.LayerNorm(8))
    assert "also has temperature" in varied(temperature=nn.Parameter(torch.ones(1)))
    assert varied(q_norm=nn.Identity(), drop=nn.Dropout(0.1)) == ""


def test_without_source_nothing_is_recognised():
    names = {**globals(), "__name__": "of_no_file"}
    exec(ATTENTION.format(**AS_SIGLIP), names)
    assert why_not_attention(names["Varied"]()) == ["the source of its forward cannot be read"]


def test_recognition_leaves_no_trace():
    layer, names = Layer(), list(ALL_ATTENTION_FUNCTIONS)
    before = (dict(layer.__dict__), dict(layer.attn.__dict__), torch.get_rng_state())
    read_layer(layer), why_not_attention(layer.attn), why_not_mlp(layer.mlp)
    assert list(ALL_ATTENTION_FUNCTIONS) == names
    assert (layer.__dict__, layer.attn.__dict__) == before[:2] and torch.equal(torch.get_rng_state(), before[2])


def test_a_patched_class_is_not_known_by_its_name(monkeypatch):
    model = siglip()
    kind = type(model.vision_model.encoder.layers[0].mlp)

    def doubled(self, hidden_states):
        return 2 * self.fc2(self.activation_fn(self.fc1(hidden_states)))

    monkeypatch.setattr(kind, "forward", doubled)
    report = check_acceleration(model, contrastive(**inputs()), accelerate, restore)
    assert {entry.module for entry in report.left} == {"SiglipMLP"}
    assert all("the forward of its class was replaced by one of" in entry.reason for entry in report.left)


def test_verification(monkeypatch):
    """Every module of a sound tower stays; one whose kernel errs is put back, and the others call it."""
    model, call = siglip().vision_model, pooled(inputs(batch=1)["pixel_values"])
    expected = call(model)
    report = accelerate(model, verify=True)
    assert report.left == () and "compared with the library on random input: 10 of 11 modules" in report.note
    assert accelerate(model) == dataclasses.replace(report, note="")
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    restore(model)
    sound = siglip_kernels.mlp
    monkeypatch.setattr(siglip_kernels, "mlp", lambda x, *parameters: 1.02 * sound(x, *parameters))
    report = accelerate(model, verify=True)
    left = {entry.path: entry.reason for entry in report.left}
    assert left.keys() == {"encoder.layers.0.mlp", "head.mlp"}
    for path, reason in left.items():
        assert "its result differs from the library's by 0.02, relative" in reason
        assert type(model.get_submodule(path)).__name__ == "SiglipMLP"
    torch.testing.assert_close(call(model), expected)


def test_verification_needs_kernels():
    model = siglip().double()
    with pytest.raises(MissingBackendError, match=r"verify=True .* do not run there: \S+ is float64 on cpu; move"):
        accelerate(model, verify=True)
    assert not any(isinstance(module, Accelerated) for module in model.modules())


class Unlike(Layer):
    """Attention that is not SigLIP's, with an MLP that is."""

    def __init__(self):
        super().__init__(attention=lambda: Windowed())


class Windowed(Attention):
    def forward(self, hidden_states, attention_mask=None):
        near = torch.ones(hidden_states.shape[1], hidden_states.shape[1]).tril(1).triu(-1).log()
        return super().forward(hidden_states, near.to(hidden_states))


@pytest.mark.parametrize("layer", [Unlike, PostNorm, Parallel, Scaled, WithLayerScale])
def test_results_of_what_looks_alike_stay(layer):
    report = check(Tower(layer))
    assert any(entry.path == "layers.0.mlp" for entry in report.replaced)
    assert any(entry.path in ("layers.0", "layers.0.attn") for entry in report.left)


def test_what_changes_after_acceleration_is_noticed():
    """Submodules, arguments, and what the module's attributes say, at every call."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))
    causal = torch.ones(5, 5).tril().log()[None, None]

    def add_a_norm(tower):
        tower.layers[0].attn.q_norm = nn.LayerNorm(8)  # no part of its forward, but its forward may be another now

    def turn_causal(tower):
        tower.layers[0].attn.is_causal = True

    def scale(tower):
        tower.layers[1].attn.scaling = 1.0

    def drop(tower):
        tower.layers[0].attn.attention_dropout = 0.5
        tower.train()

    for change in (add_a_norm, turn_causal, scale, drop):
        for mask in (None, causal):
            tower = randomise(Tower()).eval()
            change(tower)
            torch.manual_seed(3)
            expected = tower(x, mask)
            accelerated = randomise(Tower()).eval()
            accelerate(accelerated)
            change(accelerated)
            torch.manual_seed(3)
            torch.testing.assert_close(accelerated(x, mask), expected)
