"""Each optional peer's adapter against a fake with the package's signature, which computes what the package promises.

Signatures are those of siglip-kernel 0.1.2, inf-cl 1.2.1, memeff 0.3.1, open-clip-torch 3.3.0, liger-kernel 0.8.5,
fa3-fwd 0.0.3, flash-attn 2.8.3 and flash-attn-4 4.0.0b36.
"""

import sys
import types
from dataclasses import replace

import pytest
import torch
from bench_helpers import SHAPE

from bench.cases.losses import siglip_plus_loss
from bench.cases.operations import OPERATIONS, Setting
from bench.cases.shapes import LinearShape, LossShape, MLPShape, NormShape
from bench.measure.accuracy import Judge
from bench.peers import Unsupported, peers_of
from bench.peers.loss import softmax_loss
from siglip_kernels import reference


def stand_in(monkeypatch, **modules):
    """Modules by dotted name, with "__" for the dots."""
    for name, members in modules.items():
        parts = name.split("__")
        for depth in range(1, len(parts) + 1):
            dotted = ".".join(parts[:depth])
            if depth == len(parts) or dotted not in sys.modules:
                module = types.ModuleType(dotted)
                module.__path__ = []
                vars(module).update(members if depth == len(parts) else {})
                monkeypatch.setitem(sys.modules, dotted, module)


def judged(operation, name, shape, direction="fwd", dtype=torch.bfloat16):
    """A setting for a GPU, computed on the CPU."""
    entry = replace(peers_of(operation)[name], cuda=False)
    setting = Setting(OPERATIONS[operation], shape, dtype, "cpu", direction)
    return Judge(setting, setting.inputs()).judge(replace(entry, dtypes=None), entry.prepare(setting))


LOSS = LossShape("tiny", 24, 32)


def fused_siglip_loss(img_features, txt_features, log_temperature, bias, use_fp8=False, backend="auto"):
    assert backend in ("auto", "chunked_bf16", "chunked_bf16_pipelined", "chunked_bf16_fp8", "chunked_epilogue",
                       "hopper", "fused", "fused_v2")  # fmt: skip
    return reference.sigmoid_loss(img_features, txt_features, log_temperature.exp(), bias)


def fused_chunked_bf16_siglip_loss(
    img_features, txt_features, log_temperature, bias, chunk_size=0, use_fp8=False, diag_offset=0
):
    assert chunk_size == 1024
    return reference.sigmoid_loss(img_features, txt_features, log_temperature.exp(), bias)


@pytest.mark.parametrize("name", [name for name in peers_of("sigmoid_loss") if name.startswith("siglip_kernel")])
def test_siglip_kernel(monkeypatch, name):
    members = dict(fused_siglip_loss=fused_siglip_loss, fused_chunked_bf16_siglip_loss=fused_chunked_bf16_siglip_loss)
    stand_in(monkeypatch, siglip_kernel=members)
    assert judged("sigmoid_loss", name, LOSS, "fwd+bwd").problem == ""


def fused_siglip_plus_loss(
    img_features, txt_features, log_temperature, bias, img_gid=None, txt_gid=None, symmetric=True, soft_label=False,
    chunk_size=0, num_groups=None,
):  # fmt: skip
    return siglip_plus_loss(img_features, txt_features, log_temperature.exp(), bias, img_gid, txt_gid)


def test_siglip_kernel_plus(monkeypatch):
    stand_in(monkeypatch, siglip_kernel=dict(fused_siglip_plus_loss=fused_siglip_plus_loss))
    shape = LossShape("tiny", 12, 32, captions=3)
    assert judged("siglip_plus_loss", "siglip_kernel", shape, "fwd+bwd", torch.float32).problem == ""


def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
    assert q.shape[1] % head_dim == 0
    labels = torch.arange(len(q)) if labels is None else labels
    return torch.nn.functional.cross_entropy(scale * q.float() @ k.float().T, labels, reduction="none")


def test_inf_cl(monkeypatch):
    stand_in(monkeypatch, inf_cl=dict(cal_flash_loss=cal_flash_loss))
    assert judged("sigmoid_loss", "inf_cl", LOSS, "fwd+bwd", torch.float32).problem == ""


class MemoryEfficientCLIPLoss(torch.nn.Module):
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True, tau_plus=0.0, label_smoothing=0.0):
        super().__init__()
        assert normalized_inputs and not stable
        self.temperature = temperature

    def forward(self, image_features, text_features, tau_plus=None):
        return softmax_loss(image_features, text_features, 1 / self.temperature, None)


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_memeff(monkeypatch, direction):
    stand_in(monkeypatch, memeff=dict(MemoryEfficientCLIPLoss=MemoryEfficientCLIPLoss))
    assert judged("sigmoid_loss", "memeff", LOSS, direction, torch.float32).problem == ""


OPEN_CLIP = """
import torch
import torch.nn.functional as F

class SigLipLoss(torch.nn.Module):
    def __init__(self, cache_labels=False, rank=0, world_size=1, dist_impl=None{more}):
        super().__init__()

    def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
        logits = logit_scale * image_features @ text_features.T + logit_bias
        labels = 2 * torch.eye(*logits.shape) - 1
        return -F.logsigmoid(labels * logits).sum() / len(logits)
"""


@pytest.mark.parametrize("more", ["", ", chunk_size=0"])
def test_open_clip(monkeypatch, tmp_path, more):
    """The version on PyPI has no chunk_size, unlike the main branch."""
    (tmp_path / "loss.py").write_text(OPEN_CLIP.format(more=more))
    found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("bench.peers.loss.importlib.util.find_spec", lambda name: found)
    assert judged("sigmoid_loss", "open_clip", LOSS, "fwd+bwd", torch.float32).problem == ""
    further = replace(LOSS, negatives=7)
    with pytest.raises(Unsupported, match="needs as many texts as images"):
        judged("sigmoid_loss", "open_clip", further)
    with pytest.raises(Unsupported, match="has no matryoshka_sigmoid_loss"):
        judged("matryoshka_sigmoid_loss", "open_clip", LOSS)
    if more:
        for shape in (LOSS, further):
            assert judged("sigmoid_loss", "open_clip:chunk_size=1024", shape, "fwd", torch.float32).problem == ""
    else:
        with pytest.raises(Exception, match="has no chunk_size"):
            judged("sigmoid_loss", "open_clip:chunk_size=1024", LOSS, "fwd", torch.float32)


class LigerLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, B, eps):
        return reference.layer_norm(X, W, B, eps)


def test_liger(monkeypatch):
    stand_in(monkeypatch, liger_kernel__ops__layer_norm=dict(LigerLayerNormFunction=LigerLayerNormFunction))
    assert judged("layer_norm", "liger", NormShape("tiny", 5, 16)).problem == ""


def flash_attn_2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    return reference.attention(q, k, v, scale=softmax_scale)


def flash_attn_3(q, k, v, softmax_scale=None, causal=False, qv=None):
    return reference.attention(q, k, v, scale=softmax_scale)


def flash_attn_4(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False):
    return reference.attention(q, k, v, scale=softmax_scale), None


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("flash_attn_2", "flash_attn__flash_attn_interface", flash_attn_2),
        ("flash_attn_3", "fa3_fwd_interface", flash_attn_3),
        ("flash_attn_4", "flash_attn__cute", flash_attn_4),
    ],
)
def test_flash_attention(monkeypatch, name, module, function):
    stand_in(monkeypatch, **{module: dict(flash_attn_func=function)})
    assert judged("attention", name, SHAPE).problem == ""


@pytest.mark.parametrize("shape", [LinearShape("tiny", 5, 8, 6, True), MLPShape("tiny", 5, 8, 12)])
def test_cublaslt(shape):
    """On a CPU its GELU is the exact one, which is within ten times the error of bf16."""
    operation = "linear" if isinstance(shape, LinearShape) else "mlp"
    assert judged(operation, "cublaslt", shape).problem == ""
