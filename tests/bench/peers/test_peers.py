"""The registry: its entries, lazy loading, and what the row of a missing package says."""

import builtins
import sys
from dataclasses import replace

import pytest
import torch
import torch._functorch.config
from bench_helpers import setting

from bench.cases.operations import OPERATIONS, Setting
from bench.cases.shapes import AttentionShape, LossShape, MLPShape, ModelShape
from bench.peers import Missing, Unsupported, everyone, names, peers_of
from bench.peers.attention import has_kernel, heads_first, pinned
from bench.peers.registry import FAMILIES

OPTIONAL = (
    "transformers", "flash_attn", "fa3_fwd_interface", "fa3_fwd", "siglip_kernel", "open_clip", "inf_cl", "memeff",
    "liger_kernel", "torchao",
)  # fmt: skip


@pytest.fixture
def nothing_optional(monkeypatch):
    """Hides all optional packages."""
    from importlib import metadata, util

    import_module, find_spec, version = builtins.__import__, util.find_spec, metadata.version

    def refuse(name, *arguments, **more):
        if name.split(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name, *arguments, **more)

    def no_version(distribution):
        if distribution.replace("-", "_").lower() in {*OPTIONAL, "fa3_fwd", "flash_attn_4", "open_clip_torch"}:
            raise metadata.PackageNotFoundError(distribution)
        return version(distribution)

    for name in [name for name in sys.modules if name.split(".")[0] in OPTIONAL]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name in OPTIONAL else find_spec(name, *a))
    monkeypatch.setattr(metadata, "version", no_version)


def test_every_peer_is_registered():
    wanted = {
        "attention": "triton eager sdpa sdpa:math sdpa:flash sdpa:cudnn sdpa:efficient flex flash_attn_2 flash_attn_3 "
        "flash_attn_4",
        "packed_attention": "triton eager varlen_attn flash_attn_2 flash_attn_3",
        "padded_attention": "triton triton:hopper eager sdpa",
        "resize_normalize": "triton eager torchvision",
        "image_losses": "triton chunked eager",
        "linear": "triton eager compile max-autotune cublaslt",
        "mlp": "triton eager compile max-autotune cublaslt",
        "fp8_pre_norm_attention": "triton scaled_mm torchao:float8",
        "layer_norm": "triton eager compile liger",
        "attention_pool": "triton eager folded",
        "patch_embed": "triton eager",
        "sigmoid_loss": "triton chunked eager compile siglip_kernel siglip_kernel:chunk_size=1024 open_clip "
        "open_clip:chunk_size=1024 inf_cl memeff",
        "vision_tower": "triton triton:fp8 triton:graph siglip_model:sdpa siglip_model:eager torchao:float8 "
        "transformers:eager transformers:sdpa transformers:flash_attention_2 "
        "transformers:sdpa:flash transformers:sdpa:cudnn transformers:sdpa:cudnn:compile "
        "transformers:sdpa:compile transformers:sdpa:reduce-overhead transformers:sdpa:max-autotune "
        "transformers:flash_attention_2:max-autotune",
        "training_step": "triton siglip_model:sdpa transformers:sdpa transformers:sdpa:max-autotune",
    }
    for operation, expected in wanted.items():
        assert set(expected.split()) <= set(peers_of(operation)), operation
        assert next(iter(peers_of(operation))).startswith("triton")
    assert all(operation in OPERATIONS for operation, _ in everyone())
    assert len(names()) == len(set(names()))


def test_without_any_optional_package(nothing_optional):
    """On a machine with CUDA each missing peer says how to install it, and the others are unaffected."""
    shape = LossShape("tiny", 4, 16)
    messages = {}
    for name in ("siglip_kernel", "siglip_kernel:chunk_size=1024", "open_clip", "inf_cl", "memeff"):
        entry = peers_of("sigmoid_loss")[name]
        assert entry.version() is None
        with pytest.raises(Missing) as missing:
            entry.prepare(Setting(OPERATIONS["sigmoid_loss"], shape, torch.bfloat16, "cuda", "fwd"))
        messages[name] = str(missing.value)
    assert messages["siglip_kernel"] == "pip install siglip-kernel"
    assert messages["open_clip"] == "pip install open-clip-torch"
    for operation, name in (
        ("attention", "flash_attn_2"),
        ("attention", "flash_attn_3"),
        ("attention", "flash_attn_4"),
    ):
        with pytest.raises(Missing, match="pip install"):
            peers_of(operation)[name].prepare(
                Setting(OPERATIONS[operation], setting().shape, torch.bfloat16, "cuda", "fwd")
            )
    model = Setting(OPERATIONS["vision_tower"], ModelShape("tiny", "base-224", 1, 1), torch.bfloat16, "cuda", "fwd")
    for name in ("transformers:flash_attention_2", "siglip_model:flash_attention_2"):
        with pytest.raises(Missing, match="pip install flash-attn"):
            peers_of("vision_tower")[name].prepare(model)
    assert callable(peers_of("sigmoid_loss")["eager"].prepare(setting("sigmoid_loss", shape)).call)


@pytest.mark.parametrize(
    ("operation", "shape"),
    [("fp8_mlp", MLPShape("tiny", 4, 16, 16)), ("vision_tower", ModelShape("tiny", "base-224", 1, 1))],
)
def test_fp8_needs_a_gpu_that_multiplies_it(operation, shape, monkeypatch, nothing_optional):
    wanted = Setting(OPERATIONS[operation], shape, torch.bfloat16, "cuda", "fwd")
    of_layers = operation == "fp8_mlp"
    entries = {
        name: entry
        for name, entry in peers_of(operation).items()
        if (of_layers or entry.precision == "fp8") and name not in FAMILIES  # which need one architecture
    }
    assert set(entries) == {*(("triton", "scaled_mm") if of_layers else ("triton:fp8",)), "torchao:float8"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    for entry in entries.values():
        with pytest.raises(Unsupported, match="needs compute capability 8.9; this GPU has 8.0"):
            entry.prepare(wanted)
        with pytest.raises(Unsupported, match="needs a CUDA device"):
            entry.prepare(replace(wanted, device="cpu"))
    if of_layers:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
        with pytest.raises(Missing, match="pip install torchao"):
            entries["torchao:float8"].prepare(wanted)
        assert callable(entries["scaled_mm"].prepare(wanted).call)


def test_compiled_attention_supports_a_second_backward():
    """`bwd` repeats the backward of one graph, whose buffers PyTorch donates by default."""
    shape = setting().shape
    with torch._functorch.config.patch(donated_buffer=True):
        peers_of("attention")["flex"].prepare(Setting(OPERATIONS["attention"], shape, torch.bfloat16, "cuda", "bwd"))
        assert not torch._functorch.config.donated_buffer


def test_short_sequences_have_no_kernel_for_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    entry = peers_of("attention")["triton:hopper"]
    short, longer = (AttentionShape(f"s{tokens}", 1, tokens, 1, 64) for tokens in (64, 65))
    with pytest.raises(Unsupported, match="the same kernel on every GPU"):
        entry.prepare(Setting(OPERATIONS["attention"], short, torch.bfloat16, "cuda", "fwd"))
    contender = entry.prepare(Setting(OPERATIONS["attention"], longer, torch.bfloat16, "cuda", "fwd"))
    assert contender.environment == {"SIGLIP_KERNELS_HOPPER": "1", "SIGLIP_KERNELS_BLACKWELL": "0"}


def test_a_family_has_its_row_whatever_the_environment_selects(monkeypatch):
    """And refuses other GPUs. Blackwell's attention has the backward of `triton`, its layers among others the GEMM."""
    monkeypatch.setenv("SIGLIP_KERNELS_HOPPER", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    shape = AttentionShape("s65", 1, 65, 1, 64)
    forward, backward = (
        Setting(OPERATIONS["attention"], shape, torch.bfloat16, "cuda", direction) for direction in ("fwd", "bwd")
    )
    entries = peers_of("attention")
    assert entries["triton"].prepare(forward).environment == {
        "SIGLIP_KERNELS_HOPPER": "0",
        "SIGLIP_KERNELS_BLACKWELL": "0",
    }
    contender = entries["triton:blackwell"].prepare(forward)
    assert contender.environment == {"SIGLIP_KERNELS_HOPPER": "0", "SIGLIP_KERNELS_BLACKWELL": "1"}
    with pytest.raises(Unsupported, match="row of triton"):
        entries["triton:blackwell"].prepare(backward)
    with pytest.raises(Unsupported, match=r"needs compute capability 9.0; this GPU has 10.0"):
        entries["triton:hopper"].prepare(forward)
    assert "triton:blackwell" not in peers_of("sigmoid_loss")


def test_neighbours_are_marked():
    for name in ("inf_cl", "memeff"):
        entry = peers_of("sigmoid_loss")[name]
        assert "softmax" in entry.note and entry.truth is not None


def test_unsupported_settings_have_a_reason():
    here = setting()
    with pytest.raises(Unsupported, match="CUDA"):
        peers_of("attention")["flex"].prepare(here)
    on_gpu = Setting(OPERATIONS["attention"], here.shape, torch.float32, "cuda", "fwd")
    with pytest.raises(Unsupported, match="supported: bf16"):
        peers_of("attention")["flash_attn_3"].prepare(on_gpu)
    backward = Setting(OPERATIONS["attention"], here.shape, torch.bfloat16, "cuda", "bwd")
    with pytest.raises(Unsupported, match="no bwd; supported: fwd"):
        peers_of("attention")["flash_attn_3"].prepare(backward)


def test_a_pinned_backend_is_part_of_what_is_compiled():
    """PyTorch's caches of compiled code know nothing of a setting around it, and return another backend's code."""
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    tensors = setting().inputs().tensors
    for name in ("MATH", "FLASH_ATTENTION"):
        call = pinned(heads_first(torch.nn.functional.scaled_dot_product_attention), name)
        torch.compile(call, backend=backend, dynamic=False)(**tensors)
    assert sum("sdpa_kernel" in name for name in called) == 4  # set and reset, in both
    assert sum("scaled_dot_product_attention" in name for name in called) == 2


def test_a_backend_without_a_kernel_is_unsupported():
    call = pinned(heads_first(torch.nn.functional.scaled_dot_product_attention), "CUDNN_ATTENTION")
    with pytest.raises(Unsupported, match="PyTorch has no cudnn_attention kernel for this call"):
        has_kernel(call, "CUDNN_ATTENTION", setting().inputs().tensors)


def test_sdpa_says_which_backend_ran():
    assert peers_of("attention")["sdpa"].prepare(setting()).note in (
        "SDPA ran flash_attention", "SDPA ran math", "SDPA ran unknown",
    )  # fmt: skip
    assert peers_of("attention")["sdpa:math"].prepare(setting()).note == "SDPA ran math"
