"""Training and evaluating SigLIP 2 at native resolution (NaFlex), on images of different shapes."""

import json

import pytest
import torch
import transformers
from captioned import save_folder, save_shard, shard_files
from coloured_squares import log_of
from tiny_checkpoint import random_image, shared_tiny_checkpoint
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.testing import CliRunner

from siglip_model import Siglip2Config, Siglip2ImageProcessor, Siglip2Model, Siglip2Processor, SiglipTokenizer
from siglip_model.cli import main
from siglip_model.encoder import EncoderLayer
from siglip_model.training.batch import Batch
from siglip_model.training.run import run
from siglip_model.training.settings import RunSettings

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
PATCH, PATCHES = 8, 20


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    tokenizer = SiglipTokenizer.from_pretrained(shared_tiny_checkpoint(tmp_path_factory))
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Siglip2Config(
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 8},
        vision_config={**tower, "patch_size": PATCH, "num_patches": 16},
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("native")
    Siglip2Model(config).save_pretrained(folder)
    processor = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=PATCHES)
    Siglip2Processor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images, of which some are wide and some are high."""
    folder = save_folder(tmp_path_factory.mktemp("captioned"), 12)
    for number in range(0, 12, 3):
        random_image(number, size=(16 * (number + 1), 24)).save(folder / f"{number}.png")
    return folder


def settings(data, native, out, **more) -> RunSettings:
    fixed = dict(steps=3, batch_size=6, warmup_steps=0, log_every=1, num_workers=0, device="cpu", average_decay=0.0)
    return RunSettings(data=str(data), model=str(native), out=str(out), **{**fixed, **more})


def test_packed_micro_batches_train_as_a_padded_batch_does(folder, native, tmp_path):
    batches: dict[str, set[int]] = {"eager": set(), "sdpa": set()}

    def note(module, inputs):
        if isinstance(module, EncoderLayer) and inputs[0].shape[1] != 8 and not inputs[0].is_meta:  # not of texts
            batches[module.ops.name].add(len(inputs[0]))

    ways = {"eager": {}, "sdpa": {"micro_batch": 4, "recompute": True, "peak_tflops": 1.0}}
    with register_module_forward_pre_hook(note):
        for backend, more in ways.items():
            found = run(settings(folder, native, tmp_path / backend, backend=backend, **more), show_progress=False)
    eager, sdpa = (log_of(tmp_path / backend) for backend in ways)
    assert [one["loss"] for one in sdpa] == pytest.approx([one["loss"] for one in eager], rel=1e-5)
    assert batches["eager"] == {6} and 1 in batches["sdpa"]
    assert json.loads((tmp_path / "sdpa" / "log.jsonl").read_text().splitlines()[0])["mfu"] > 0
    theirs = transformers.Siglip2Model.from_pretrained(tmp_path / "sdpa" / "model").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in found.model.state_dict().items())


def test_shards_and_a_later_evaluation(folder, native, tmp_path):
    pytest.importorskip("webdataset")
    shard = save_shard(tmp_path / "a.tar", shard_files(range(8)))
    more = {"evaluation_data": str(folder), "weights": "random", "crop_scale": 0.5, "flip": True}
    run(settings(shard, native, tmp_path / "run", **more), show_progress=False)
    assert (tmp_path / "run" / "predictions" / "step-00000003.png").exists()
    words = ["evaluate", "--data", folder, "--model", tmp_path / "run" / "model", "--device", "cpu", "--json"]
    done = CliRunner().invoke(main.app, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == log_of(tmp_path / "run")[-1]["evaluation"]


def test_a_batch_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match=r"pixel_values \(2, 5, 4, 192\) for 5 texts; supported: \(N, P, values\)"):
        Batch(torch.ones(5, 8, dtype=torch.int64), torch.zeros(2, 5, 4, 192), spatial_shapes=torch.ones(5, 2))
