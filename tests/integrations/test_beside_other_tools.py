"""An accelerated model under torch.compile, DDP, PEFT, transformers' pipeline and Trainer."""

from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from acceleration import assert_bitwise, assert_close, run
from PIL import Image
from tiny_transformers import contrastive, inputs, naflex_inputs, pooled, siglip, siglip2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import siglip_model
from siglip_kernels.integrations.patching import Accelerated
from siglip_kernels.integrations.transformers import accelerate, restore

DEMO = Path(siglip_model.__file__).parent / "demo"


def test_compiled_without_a_break():
    """The whole tower with its gradients, and again after `restore`."""
    model, call = siglip().vision_model, pooled(inputs()["pixel_values"])
    expected = run(model, call)
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(run(model, lambda _: dict(pooled=compiled(inputs()["pixel_values"]).pooler_output)), expected)
    restore(model)
    assert torch.equal(run(compiled, call).outputs["pooled"], expected.outputs["pooled"])


def run_compiled(model, arguments, **options):
    """The output of the compiled model, and the names of the operators in its graphs."""
    operators = []

    def backend(graph, example_inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, **options)(**arguments), operators


@pytest.mark.parametrize("flipped", [False, True])
def test_text_with_padding_compiles_without_a_break(flipped):
    model = siglip().text_model
    mask = torch.arange(8) < torch.tensor([8, 3, 5])[:, None]
    arguments = dict(input_ids=inputs()["input_ids"], attention_mask=(mask.flip(1) if flipped else mask).long())
    expected = model(**arguments).pooler_output
    accelerate(model)
    output, operators = run_compiled(model, arguments, fullgraph=True)
    torch.testing.assert_close(output.pooler_output, expected)
    assert any("siglip_kernels.attention." in name for name in operators)
    assert not any("scaled_dot_product" in name for name in operators)


def test_padded_patches_compile():
    """With the graph break that transformers has where it reads the shapes."""
    model, arguments = siglip2().vision_model, naflex_inputs()
    del arguments["input_ids"]
    expected = model(**arguments).pooler_output
    accelerate(model)
    output, operators = run_compiled(model, arguments)
    torch.testing.assert_close(output.pooler_output, expected)
    assert any("siglip_kernels.attention." in name for name in operators)
    assert any("siglip_kernels" in name and "pool" in name for name in operators)
    assert not any("scaled_dot_product" in name for name in operators)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(process_group):
    """Gradients through DDP's hooks; accelerated through the wrapper, and restored through it."""
    model, call = siglip(), contrastive(**inputs())
    accelerate(model)
    expected = run(model, call)
    restore(model)
    parallel = DistributedDataParallel(model)
    report = accelerate(parallel)
    assert report.replaced and all(entry.path.startswith("module") for entry in report.replaced)

    def through_ddp(model):
        parallel.dtype = torch.float32
        return call(parallel)

    assert_bitwise(run(model, through_ddp), expected)
    restore(parallel)
    assert not any(isinstance(module, Accelerated) for module in parallel.modules())


LORA = dict(r=4, target_modules=["q_proj", "v_proj", "fc1"], init_lora_weights=False)


@pytest.mark.parametrize("first", ["peft", "accelerate"])
def test_lora(first):
    """LoRA changes the result and is trained, whether it came before or after; merged, the layers are fused again."""
    torch.manual_seed(0)
    model, pixels = siglip().vision_model, inputs()["pixel_values"]
    if first == "accelerate":
        accelerate(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    report = accelerate(adapted)
    layer = next(entry for entry in report.replaced if entry.module == "SiglipEncoderLayer")
    assert layer.operations == ("layer_norm", "attention", "linear")
    assert any("q_proj is a peft.tuners.lora.layer.Linear" in remark for remark in layer.remarks)

    def call(model):
        return dict(pooled=model(pixels).pooler_output)

    project = run(adapted, call)
    restore(adapted)
    peer = run(adapted, call)
    assert peer.gradients and all("lora_" in name for name in peer.gradients)
    assert_close(project, peer)
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(pixels).pooler_output, peer.outputs["pooled"], atol=1e-2)
    accelerate(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(pixels).pooler_output, peer.outputs["pooled"], atol=1e-5, rtol=1e-4)
    report = accelerate(merged)
    assert any(entry.operations[:1] == ("pre_norm_attention",) for entry in report.replaced)


def test_quantised_and_parametrised_linears_are_called():
    class Int8Linear(nn.Linear):
        """An 8-bit weight with its own product, as in quantised layers."""

        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features)
            self.scale = linear.weight.detach().abs().amax() / 127
            self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
            self.bias = linear.bias

        def forward(self, x):
            return nn.functional.linear(x, self.weight * self.scale, self.bias)

    model, pixels = siglip().vision_model, inputs()["pixel_values"]
    layer = model.encoder.layers[0]

    def call(model):
        return dict(pooled=model(pixels).pooler_output)

    layer.mlp.fc2 = Int8Linear(layer.mlp.fc2)
    layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj)
    nn.utils.parametrizations.weight_norm(layer.self_attn.out_proj)
    before = run(model, call)
    report = accelerate(model)
    assert_close(run(model, call), before)
    shown = str(report)
    assert all(name in shown for name in ("Int8Linear", "ParametrizedLinear"))


def test_zero_shot_pipeline_on_the_shipped_checkpoint():
    model = transformers.SiglipModel.from_pretrained(DEMO / "checkpoint")
    pictures = [Image.open(DEMO / "pictures" / "rocket.png")]
    parts = dict(
        tokenizer=transformers.SiglipTokenizer.from_pretrained(DEMO / "checkpoint"),
        image_processor=transformers.SiglipImageProcessor.from_pretrained(DEMO / "checkpoint"),
    )
    labels = ["guitar", "rocket"]
    classify = transformers.pipeline("zero-shot-image-classification", model=model, **parts)
    before = classify(pictures, candidate_labels=labels)
    report = accelerate(model)
    assert len(report.left) == 0
    classify = transformers.pipeline("zero-shot-image-classification", model=model, **parts)
    after = classify(pictures, candidate_labels=labels)
    assert after[0][0]["label"] == "rocket"
    for one, other in zip(before, after, strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        scores = [entry["score"] for entry in one]
        assert [entry["score"] for entry in other] == pytest.approx(scores, rel=1e-4, abs=1e-7)


class Pairs(torch.utils.data.Dataset):
    """Images and texts, with a column that the model does not take."""

    def __init__(self):
        self.columns = inputs(batch=4)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {**{name: column[index] for name, column in self.columns.items()}, "unknown": 1}


def test_trainer(tmp_path):
    """It reads the signature to choose columns, wraps, checkpoints and saves."""
    losses, models = [], []
    for accelerated in (False, True):
        model = siglip()
        if accelerated:
            accelerate(model)

        def collate(rows):
            assert "unknown" not in rows[0]
            columns = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "pixel_values")}
            return {**columns, "return_loss": True}

        arguments = transformers.TrainingArguments(
            tmp_path / str(accelerated),
            max_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Pairs(), data_collator=collate)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        models.append(model)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 2
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)  # Adam's first steps turn rounding into its step size
