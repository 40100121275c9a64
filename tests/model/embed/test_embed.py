"""Bulk embedding: the file, resuming after every kind of interruption, and rejecting other settings."""

import gc
import itertools
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import tracemalloc

import pytest
import safetensors
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoint import random_image, save_tiny_checkpoint

from siglip_model.embed import EmbeddingFileError, EmbeddingInterrupted, embed_images, load_embeddings
from siglip_model.embed.run import model_digest
from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.tensor import SiglipImageProcessor
from siglip_model.model import SiglipModel


@pytest.fixture
def folder(tmp_path):
    """23 images, one of them in a subfolder with an unusual name; the names sort like the numbers."""
    folder = tmp_path / "images"
    (folder / "ünter ordner").mkdir(parents=True)
    for number in range(22):
        random_image(number).save(folder / f"{number:02}.png")
    random_image(22).save(folder / "ünter ordner" / "zeile\n2 .png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def few_objects():
    """What is there already is not collected, so that a collection takes no second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def embed(model, image_processor, folder, tmp_path):
    def run(inputs=(folder,), **options):
        return embed_images(
            model, image_processor, inputs, tmp_path / "out.safetensors", **{"batch_size": 4, **options}
        )

    run.out = tmp_path / "out.safetensors"
    run.part = tmp_path / "out.safetensors.part"
    return run


def interrupt_after(count):
    """An `on_image` that raises SIGINT after `count` images."""
    seen = []

    def on_image(path, outcome, error):
        seen.append(path)
        if len(seen) == count:
            signal.raise_signal(signal.SIGINT)

    return on_image


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_are_the_models_features(embed, checkpoint, folder, normalize):
    summary = embed(normalize=normalize)
    assert (summary.embedded, summary.failed, summary.skipped, summary.rows) == (23, 0, 0, 23)
    assert summary.complete and summary.width == 32 and summary.images_per_second > 0
    reference = transformers.SiglipModel.from_pretrained(checkpoint)
    processor = transformers.SiglipImageProcessor.from_pretrained(checkpoint)
    stored = load_embeddings(embed.out)
    assert stored.files == sorted(stored.files) and len(stored.files) == 23 and stored.failed == {}
    images = [Image.open(path).convert("RGB") for path in stored.files]
    with torch.no_grad():
        expected = reference.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    if normalize:
        expected = expected / expected.norm(dim=-1, keepdim=True)
    assert expected.std(dim=0).max() > 1e-2
    torch.testing.assert_close(stored.embeddings, expected, atol=1e-5, rtol=0)
    assert not embed.part.exists()


def test_the_file_is_plain_safetensors(embed):
    embed(model_name="tiny")
    tensors = load_file(embed.out)
    assert tensors["embeddings"].dtype == torch.float32 and tensors["embeddings"].shape == (23, 32)
    lines = [json.loads(line) for line in tensors["files"].numpy().tobytes().splitlines()]
    assert [line["file"] for line in lines] == load_embeddings(embed.out).files
    with safetensors.safe_open(embed.out, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["complete"] == "true" and metadata["model_name"] == "tiny"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_dtypes(embed, dtype):
    embed()
    full = load_embeddings(embed.out).embeddings
    embed(dtype=dtype, overwrite=True)
    stored = load_embeddings(embed.out).embeddings
    assert stored.dtype == dtype
    torch.testing.assert_close(stored, full.to(dtype))


def test_unreadable_images_are_recorded_and_the_rest_embedded(embed, folder):
    (folder / "05.png").write_text("no image")
    (folder / "07b.png").symlink_to("nowhere")
    cut = folder / "09.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    told = []
    summary = embed(on_image=lambda path, outcome, error: told.append((os.path.basename(path), outcome)))
    assert (summary.embedded, summary.failed, summary.rows) == (21, 3, 21)
    assert [name for name, outcome in told if outcome == "failed"] == ["05.png", "07b.png", "09.png"]
    assert len(told) == 24
    stored = load_embeddings(embed.out)
    assert {os.path.basename(path) for path in stored.failed} == {"05.png", "07b.png", "09.png"}
    assert "link to a file that does not exist" in stored.failed[str(folder / "07b.png")]
    random_image(5).save(folder / "05.png")  # repaired: retried, and its row comes last
    summary = embed()
    assert (summary.embedded, summary.failed, summary.skipped, summary.rows) == (1, 2, 21, 22)
    assert load_embeddings(embed.out).files[-1] == str(folder / "05.png")


@pytest.mark.parametrize("stop", [1, 9, 22])
def test_interrupted_and_resumed_equals_one_run(embed, stop, tmp_path):
    embed()
    whole = load_embeddings(embed.out)
    embed.out.unlink()
    with pytest.raises(EmbeddingInterrupted) as caught:
        embed(on_image=interrupt_after(stop))
    part = caught.value.summary
    assert not part.complete and 0 < part.rows < 23
    usable = load_embeddings(embed.out)
    assert usable.settings["complete"] == "false"
    assert usable.files == whole.files[: part.rows]
    assert torch.equal(usable.embeddings, whole.embeddings[: part.rows])
    rest = embed(batch_size=5)
    assert (rest.skipped, rest.embedded) == (part.rows, 23 - part.rows)
    resumed = load_embeddings(embed.out)
    assert resumed.files == whole.files and resumed.settings == whole.settings
    torch.testing.assert_close(resumed.embeddings, whole.embeddings, atol=1e-6, rtol=0)


def test_a_complete_file_is_unchanged_and_grows_with_its_folder(embed, folder, monkeypatch, model):
    embed()
    before = embed.out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(model, "get_image_features", lambda *_: pytest.fail("nothing is left to compute"))
        summary = embed()
    assert (summary.embedded, summary.skipped, summary.rows) == (0, 23, 23)
    assert embed.out.read_bytes() == before
    random_image(99).save(folder / "00a.png")
    random_image(98, size=(31, 30)).save(folder / "03.png")  # changed since
    summary = embed()
    assert (summary.embedded, summary.skipped, summary.rows) == (2, 22, 24)
    stored = load_embeddings(embed.out)
    assert len(set(stored.files)) == 24


def test_changed_images_get_their_new_row(embed, model, image_processor, folder, tmp_path):
    embed()
    random_image(98, size=(31, 30)).save(folder / "03.png")
    embed()
    stored = load_embeddings(embed.out)
    embed_images(model, image_processor, [folder / "03.png"], tmp_path / "alone.safetensors")
    alone = load_embeddings(tmp_path / "alone.safetensors")
    row = stored.embeddings[stored.files.index(str(folder / "03.png"))]
    torch.testing.assert_close(row, alone.embeddings[0], atol=1e-6, rtol=0)


def test_the_same_image_twice_is_one_row(embed, folder):
    one, two = folder / "00.png", folder / "01.png"
    summary = embed([one, one, two, folder, os.path.relpath(one), one])
    assert (summary.embedded, summary.rows, summary.skipped) == (23, 23, 5)
    assert len(set(load_embeddings(embed.out).files)) == 23


@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize(
    "change", ["model", "normalize", "dtype", "image_processor", "image_processor:Pil", "computed_in"]
)
def test_other_settings_are_rejected(embed, model, image_processor, folder, tmp_path, change, half_way):
    if half_way:
        with pytest.raises(EmbeddingInterrupted):
            embed(on_image=interrupt_after(9))
    else:
        embed()
    before = embed.out.read_bytes()
    other_model, other_processor, options = model, image_processor, {}
    if change == "model":
        other_model = SiglipModel.from_pretrained(save_tiny_checkpoint(tmp_path / "other", seed=1))
    elif change == "computed_in":
        other_model = SiglipModel(model.config).to(torch.bfloat16)
        other_model.load_state_dict(model.state_dict())
    elif change == "image_processor":
        settings = image_processor.to_dict()
        other_processor = SiglipImageProcessor(size=settings["size"], image_mean=[0.4] * 3)
    elif change == "image_processor:Pil":  # the same settings
        other_processor = SiglipImageProcessorPil.from_dict(image_processor.to_dict())
    else:
        options = {"normalize": False} if change == "normalize" else {"dtype": torch.float16}

    def run(**more):
        return embed_images(other_model, other_processor, [folder], embed.out, **options, **more)

    with pytest.raises(
        EmbeddingFileError, match=rf"other settings.*{change.partition(':')[0]} was .* and is now"
    ) as caught:
        run()
    assert "resample" not in str(caught.value)  # only what differs
    assert embed.out.read_bytes() == before
    assert run(overwrite=True).embedded == 23
    assert load_embeddings(embed.out).settings["complete"] == "true"


def test_the_digest_changes_with_a_single_weight(model):
    before = model_digest(model)
    twin = SiglipModel(model.config)
    twin.load_state_dict(model.state_dict())
    assert model_digest(twin) == before
    with torch.no_grad():
        twin.vision_model.post_layernorm.bias[3] += 1e-3
    assert model_digest(twin) != before


def test_other_files_are_not_overwritten(embed):
    save_file({"weight": torch.ones(3)}, embed.out)
    before = embed.out.read_bytes()
    for content in (before, b"", b"text", struct.pack("<Q", 2**60) + b"{}"):
        embed.out.write_bytes(content)
        with pytest.raises(EmbeddingFileError, match=r"not written by `siglip embed`"):
            embed()
        assert embed.out.read_bytes() == content and not embed.part.exists()
        with pytest.raises(EmbeddingFileError):
            load_embeddings(embed.out)
    assert embed(overwrite=True).rows == 23


def test_a_truncated_file_is_reported(embed):
    embed()
    embed.out.write_bytes(embed.out.read_bytes()[:-10])
    with pytest.raises(EmbeddingFileError, match="truncated"):
        embed()


def test_an_invalid_journal(embed):
    embed.part.write_bytes(b"no database at all, but long enough to be looked at" * 40)
    with pytest.raises(EmbeddingFileError, match="not the journal of an earlier run"):
        embed()
    assert not embed.out.exists()


def test_a_second_run_at_once_is_rejected(embed):
    blocked = []

    def on_image(path, outcome, error):
        if not blocked:
            with pytest.raises(EmbeddingFileError, match="another run is writing it"):
                embed()
            blocked.append(path)

    assert embed(on_image=on_image).rows == 23
    assert blocked


def test_no_row_is_lost_when_the_run_fails(embed, model, monkeypatch):
    """An error in the model ends the run, and the next run resumes from the journal."""
    features = model.get_image_features
    calls = []

    def break_down(pixel_values):
        calls.append(len(pixel_values))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return features(pixel_values)

    monkeypatch.setattr(model, "get_image_features", break_down)
    with pytest.raises(RuntimeError, match="out of memory"):
        embed()
    assert not embed.out.exists() and embed.part.exists()
    summary = embed()
    assert (summary.skipped, summary.embedded, summary.rows) == (8, 15, 23)


def test_embeddings_that_are_not_finite_are_failures(embed, model, monkeypatch):
    features = model.get_image_features

    def overflow(pixel_values):
        output = features(pixel_values)
        output.pooler_output[0] = float("inf")
        return output

    monkeypatch.setattr(model, "get_image_features", overflow)
    summary = embed(batch_size=23)
    assert (summary.failed, summary.rows) == (1, 22)
    assert "not finite" in next(iter(load_embeddings(embed.out).failed.values()))


def test_without_a_readable_image_nothing_is_written(embed, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    summary = embed([bad])
    assert (summary.rows, summary.failed) == (0, 1)
    assert not embed.out.exists() and not embed.part.exists()


def test_names_that_are_not_unicode(embed, folder):
    name = os.path.join(os.fsencode(folder), b"\xff\xfe.png")
    try:
        with open(name, "wb") as file:
            random_image(50).save(file, "png")
    except OSError:
        pytest.skip("this file system only accepts Unicode names")
    embed()
    stored = load_embeddings(embed.out)
    assert os.fsdecode(name) in stored.files
    assert embed().skipped == 24


def test_invalid_arguments(embed, model, image_processor, folder):
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; supported: torch\.float32"):
        embed(dtype=torch.int8)
    with pytest.raises(ValueError, match="batch_size is 0"):
        embed(batch_size=0)
    with pytest.raises(ValueError, match="num_workers is -1; supported: a whole number from 0"):
        embed(num_workers=-1)
    with pytest.raises(ValueError, match="rank is 2 and world_size 2; supported: ranks from 0"):
        embed(rank=2, world_size=2)
    config = type(model.config).from_dict(model.config.to_dict())
    config.vision_config.vision_use_head = False
    with pytest.raises(ValueError, match="no pooling head"):
        embed_images(SiglipModel(config), image_processor, [folder], embed.out)


def test_memory_does_not_grow_with_the_number_of_images(embed, folder, tmp_path, few_objects):
    """Peak of Python's allocations for 150 and 900 images. No threads, whose progress would be random.

    Garbage is collected as images are done: how much of it waits otherwise depends on what ran before.
    """
    source = folder / "00.png"
    peaks = []
    done = itertools.count(1)

    def on_image(*_):
        if next(done) % 10 == 0:
            gc.collect()

    for count in (20, 150, 900):  # the first is a warm-up
        many = tmp_path / f"many{count}"
        many.mkdir()
        for number in range(count):
            os.link(source, many / f"{number:05}.png")
        embed.part.unlink(missing_ok=True)
        tracemalloc.start()
        summary = embed([many], overwrite=True, batch_size=16, num_workers=0, on_image=on_image)
        assert summary.embedded == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 750 * 200  # the sorted names of one folder take about 80 bytes each


KILLED_RUN = """
import os, signal, sys
from siglip_model.embed import run as embed
from siglip_model.images.tensor import SiglipImageProcessor
from siglip_model.model import SiglipModel
embed.COMMIT_SECONDS = 0.0
checkpoint, folder, out, stop = sys.argv[1:]
done = []
def on_image(path, outcome, error):
    done.append(path)
    if len(done) == int(stop):
        os.kill(os.getpid(), signal.SIGKILL)
processor = SiglipImageProcessor.from_pretrained(checkpoint)
embed.embed_images(SiglipModel.from_pretrained(checkpoint), processor, [folder], out, batch_size=4, on_image=on_image)
"""


def test_killed_and_resumed(embed, checkpoint, folder):
    arguments = [sys.executable, "-c", KILLED_RUN, str(checkpoint), str(folder), str(embed.out), "15"]
    assert subprocess.run(arguments, check=False, timeout=120).returncode == -signal.SIGKILL
    assert not embed.out.exists()
    rows = sqlite3.connect(embed.part).execute("SELECT COUNT(embedding) FROM images").fetchone()[0]
    assert rows == 12  # three full batches; the fourth was not committed
    summary = embed()
    assert (summary.skipped, summary.embedded, summary.rows) == (12, 11, 23)
    resumed = load_embeddings(embed.out)
    embed(overwrite=True)
    whole = load_embeddings(embed.out)
    assert resumed.files == whole.files
    torch.testing.assert_close(resumed.embeddings, whole.embeddings, atol=1e-6, rtol=0)
