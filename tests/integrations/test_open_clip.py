"""accelerate and restore on open_clip's SigLIP models, and the loss of its training script."""

import inspect
import sys
import types

import open_clip
import pytest
import tiny_timm  # noqa: F401  registers the tower that the configurations name
import torch
from acceleration import assert_close, assert_within_budget, check_acceleration, in_fp64, randomise, run

import siglip_kernels
from siglip_kernels import MissingBackendError, UnsupportedInputError
from siglip_kernels.integrations import open_clip as siglip_open_clip
from siglip_kernels.integrations.open_clip import accelerate, register_loss, restore, restore_loss
from siglip_kernels.integrations.patching import Accelerated

TOWER = dict(
    image_size=28, timm_model_name="vit_tiny_siglip", timm_model_pretrained=False, timm_pool="map", timm_proj="none"
)
TEXT = dict(
    context_length=6,
    vocab_size=40,
    width=144,
    heads=2,
    layers=2,
    no_causal_mask=True,
    proj_bias=True,
    pool_type="last",
    norm_kwargs=dict(eps=1e-6),
)
# open_clip's configurations of these names, with smaller sizes.
SO400M = dict(embed_dim=144, init_logit_bias=-10, vision_cfg=TOWER, text_cfg={**TEXT, "mlp_ratio": 3.7362})
BASE = dict(embed_dim=144, init_logit_bias=-10, vision_cfg=TOWER, text_cfg=TEXT)
SIGLIP2 = {**BASE, "text_cfg": {**TEXT, "act_kwargs": dict(approximate="tanh")}}


def siglip(config=BASE, **text):
    config = {**config, "text_cfg": {**config["text_cfg"], **text}}
    return randomise(open_clip.CustomTextCLIP(**config)).eval()


def contrastive(loss=siglip_kernels.SigLipLoss()):  # noqa: B008
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, 3, 28, 28, generator=generator)
    texts = torch.randint(2, 40, (3, 6), generator=generator)

    def call(model):
        image, text, scale, bias = model(images.to(model.logit_scale.dtype), texts)
        return dict(image=image, text=text, loss=loss(image, text, scale, bias))

    return call


def check(model, budget=False):
    return check_acceleration(model, contrastive(), accelerate, restore, budget)


def operations(report, path):
    return next(entry.operations for entry in report.replaced if entry.path == path)


FUSED = ("pre_norm_attention", "pre_norm_mlp")
EXACT_GELU = ("pre_norm_attention", "layer_norm", "linear")


@pytest.mark.parametrize(("config", "expected"), [(SO400M, EXACT_GELU), (BASE, EXACT_GELU), (SIGLIP2, FUSED)])
def test_siglip_models(config, expected):
    report = check(siglip(config), budget=True)
    assert operations(report, "text.transformer.resblocks.1") == expected
    assert operations(report, "text.ln_final") == ("layer_norm",)
    assert operations(report, "visual.trunk.blocks.0") == EXACT_GELU
    assert operations(report, "visual.trunk.attn_pool")[0] == "attention_pool"


def test_bfloat16_beside_norms_in_float32():
    """open_clip's precision bf16: its LayerNorms are LayerNormFp32."""
    model = randomise(open_clip.CustomTextCLIP(**SIGLIP2, cast_dtype=torch.bfloat16)).eval()
    assert type(model.text.ln_final).__name__ == "LayerNormFp32"
    model.to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, open_clip.transformer.LayerNormFp32):
            module.float()
    call = contrastive()
    before = run(model, call)
    report = accelerate(model)
    assert operations(report, "text.transformer.resblocks.0") == FUSED
    after = run(model, call)
    assert [output.dtype for output in after.outputs.values()] == [output.dtype for output in before.outputs.values()]
    for name, output in after.outputs.items():
        torch.testing.assert_close(output, before.outputs[name], atol=0.05, rtol=0.05)


def test_autocast():
    """open_clip's precision amp_bf16. Its LayerNorms return the dtype of their input."""
    model, everything = siglip(SIGLIP2, layers=1), contrastive()

    def call(model):
        return {name: output for name, output in everything(model).items() if name != "loss"}

    truth = in_fp64(model, call)
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, call)
        accelerate(model)
        assert model.text.ln_final(torch.zeros(1, 144, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert_within_budget(run(model, call), before, truth, torch.bfloat16)


def test_blocks_of_another_form_are_left_or_called():
    report = check(siglip(ls_init_value=0.1))
    assert any("scaled" in remark for entry in report.replaced for remark in entry.remarks)
    report = check(siglip(qk_norm=True))
    assert any(entry.module == "CustomResidualAttentionBlock" for entry in report.left)
    report = check(siglip(no_causal_mask=False))
    assert [(entry.path, entry.reason) for entry in report.left if entry.path == "text"] == [
        ("text", "its attention is causal")
    ]
    model = siglip()
    model.text.use_pad_mask, model.text.pad_id = True, 3
    check(model)


def test_checkpointing_and_compilation():
    model, call = siglip(SIGLIP2), contrastive()
    accelerate(model)
    plain = run(model, call)
    model.set_grad_checkpointing()
    assert_close(run(model, call), plain, tolerance=1e-6)
    model.set_grad_checkpointing(False)
    texts = torch.randint(2, 40, (3, 6))
    compiled = torch.compile(model.text, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(texts), model.text(texts))


def test_hooks_inside_a_block_see_what_they_saw():
    model = siglip(SIGLIP2)
    texts = torch.randint(2, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    for name in ("ln_1", "attn", "ls_1", "ln_2", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj"):
        seen = []
        module = model.text.transformer.resblocks[0].get_submodule(name)
        handle = module.register_forward_hook(lambda m, a, out, s=seen: s.append(out[0] if type(out) is tuple else out))
        before = model.text(texts)
        accelerate(model)
        after = model.text(texts)
        restore(model)
        handle.remove()
        assert len(seen) == 2, name
        torch.testing.assert_close(seen[1], seen[0])
        torch.testing.assert_close(after, before)


def test_other_versions_are_named(monkeypatch):
    model = siglip()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.24.0")
    with pytest.raises(MissingBackendError, match=r"open_clip_torch 2\.24\.0 is not supported; supported: 3 to"):
        accelerate(model)


def arguments_of_the_script(**changed):
    return types.SimpleNamespace(
        **{**dict(distill=False, model="ViT-B-16-SigLIP", siglip=True, horovod=False), **changed},
        rank=0,
        world_size=1,
        loss_dist_impl=None,
        local_loss=False,
        gather_with_grad=False,
    )


def test_the_training_script_takes_the_loss_and_gives_it_back():
    peer = open_clip.create_loss(arguments_of_the_script())
    try:
        register_loss()
        register_loss()
        project = open_clip.create_loss(arguments_of_the_script())
        assert type(project) is siglip_kernels.SigLipLoss is siglip_open_clip.SigLipLoss
        assert type(open_clip.create_loss(arguments_of_the_script(siglip=False))) is open_clip.ClipLoss
    finally:
        restore_loss()
    assert type(open_clip.create_loss(arguments_of_the_script())) is type(peer) is open_clip.loss.SigLipLoss
    one, other = (run(siglip(), contrastive(loss)) for loss in (project, peer))
    assert_close(one, other)


def create_task(args, model):
    """As open_clip 4's, for version 3, which has none: the task's constructor imports the loss."""
    from open_clip.loss import SigLipLoss

    return types.SimpleNamespace(loss=SigLipLoss(rank=args.rank, world_size=args.world_size, dist_impl=None))


def test_the_task_of_open_clip_4_takes_the_loss_and_gives_it_back(monkeypatch):
    if not hasattr(open_clip, "create_task"):
        monkeypatch.setattr(open_clip, "create_task", create_task, raising=False)
    model = siglip()
    peer = open_clip.create_task(arguments_of_the_script(), model).loss
    try:
        register_loss()
        project = open_clip.create_task(arguments_of_the_script(), model).loss
        assert type(project) is siglip_kernels.SigLipLoss
    finally:
        restore_loss()
    assert type(open_clip.create_task(arguments_of_the_script(), model).loss) is type(peer)
    one, other = (run(siglip(), contrastive(loss)) for loss in (project, peer))
    assert_close(one, other)


def test_the_loss_is_refused_by_version(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.0")
    with pytest.raises(MissingBackendError, match=r"open_clip_torch 5\.0 is not supported; supported: 3 to below 5"):
        register_loss()
    assert open_clip.factory.SigLipLoss is open_clip.loss.SigLipLoss is not siglip_kernels.SigLipLoss


def test_positional_arguments_of_the_loss_are_open_clips():
    """As far as the installed version has them: version 4 added chunk_size."""

    def names(kind):
        return [name for name, p in inspect.signature(kind).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    theirs = names(open_clip.loss.SigLipLoss)
    assert names(siglip_kernels.SigLipLoss)[: len(theirs)] == theirs
    for method in ("get_logits", "get_ground_truth", "_loss", "forward"):
        ours, peers = (names(getattr(loss, method)) for loss in (siglip_kernels.SigLipLoss, open_clip.loss.SigLipLoss))
        assert ours == peers


def two_positives(self, device, dtype, num_logits, negative_only=False):
    labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
    if not negative_only:
        labels.fill_diagonal_(1)
        labels[0, 1] = 1
    return labels


def squared_logits(self, image_features, text_features, logit_scale, logit_bias=None):
    return logit_scale * (image_features @ text_features.T) ** 2 + logit_bias


def smaller_loss(self, image_features, text_features, logit_scale, logit_bias=None, negative_only=False):
    labels = self.get_ground_truth(image_features.device, image_features.dtype, len(image_features))
    return (self.get_logits(image_features, text_features, logit_scale, logit_bias) * labels).mean()


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize(
    ("name", "method"),
    [("get_ground_truth", two_positives), ("get_logits", squared_logits), ("_loss", smaller_loss)],
)
def test_overridden_methods_of_the_loss_are_called(name, method, output_dict):
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=-1) for _ in range(2))
    found, gradients = [], []
    for base in (siglip_kernels.SigLipLoss, open_clip.loss.SigLipLoss):
        for of_class in (True, False):
            loss = type("Own", (base,), {name: method})() if of_class else base()
            if not of_class:
                setattr(loss, name, types.MethodType(method, loss))
            image, scale = x.clone().requires_grad_(), torch.tensor(5.0, requires_grad=True)
            result = loss(image, y, scale, torch.tensor(-5.0), output_dict)
            result = result["contrastive_loss"] if output_dict else result
            found.append(result.detach())
            gradients.append(torch.autograd.grad(result, (image, scale)))
    for result, gradient in zip(found[:2], gradients[:2], strict=True):
        torch.testing.assert_close(result, found[2])
        torch.testing.assert_close(gradient, gradients[2])
    plain = siglip_kernels.SigLipLoss()(x, y, torch.tensor(5.0), torch.tensor(-5.0))
    assert (found[0] - plain).abs() > 1e-3


@pytest.mark.parametrize(("name", "value"), [("backend", "triton"), ("backend", "chunked"), ("chunk_size", 8)])
def test_overridden_methods_leave_no_choice(name, value):
    loss = type("Own", (siglip_kernels.SigLipLoss,), {"get_logits": squared_logits})(**{name: value})
    with pytest.raises(UnsupportedInputError, match=f"{name} is {value!r}, but get_logits is overridden and computes"):
        loss(torch.ones(2, 8), torch.ones(2, 8), 1.0, 0.0)


def test_the_training_script_with_both(monkeypatch, capsys):
    """With a stand-in for open_clip_train.main, which needs further packages: same names, same order."""
    seen = []

    def main(arguments):
        model, preprocess = script.create_model_and_transforms("tiny")
        loss = script.create_loss(arguments_of_the_script())
        seen.append((arguments, any(isinstance(m, Accelerated) for m in model.modules()), type(loss), preprocess))

    def create_model_and_transforms(name):
        return siglip(), "preprocess"

    script = types.ModuleType("open_clip_train.main")
    script.main, script.create_loss = main, open_clip.create_loss
    script.create_model_and_transforms = create_model_and_transforms
    monkeypatch.setitem(sys.modules, "open_clip_train.main", script)
    siglip_open_clip.train(["--siglip"])
    assert seen == [(["--siglip"], True, siglip_kernels.SigLipLoss, "preprocess")]
    assert "CustomTextCLIP (open_clip" in capsys.readouterr().out
    assert script.create_model_and_transforms is create_model_and_transforms
    assert open_clip.factory.SigLipLoss is open_clip.loss.SigLipLoss
