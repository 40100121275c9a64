"""bfloat16 on a CPU: chosen by `auto` for many images if the checkpoint keeps its embeddings, and kept by a file."""

import shutil

import pytest
import torch
from command_line import one_line
from tiny_checkpoint import random_image

from siglip_model import search, zero_shot
from siglip_model.cli import options, precision
from siglip_model.demo import CHECKPOINT
from siglip_model.embed import load_embeddings
from siglip_model.embed.journal import EmbeddingJournal, computed_in
from siglip_model.embed.run import embed_images, model_digest
from siglip_model.embed.shards import Manifest
from siglip_model.outputs import unit_length


@pytest.fixture
def has_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "LONG_RUN", 3)


def loaded(backend="auto", dtype="auto", images=3, model=CHECKPOINT):
    return options.load_classifier(str(model), backend, dtype, "cpu", images=images)


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize("images", [3, None])
def test_chosen_for_many_images(images, capsys):
    classifier = loaded(images=images)
    assert classifier.dtype == torch.bfloat16 and classifier.model.config.dtype == torch.bfloat16
    said = capsys.readouterr().err
    assert one_line(said) and said.startswith("siglip: computing in bfloat16 (cosine to float32 at least 0.999")
    other = zero_shot.pipeline(model=CHECKPOINT, dtype="bfloat16", device="cpu")
    assert model_digest(classifier.model) == model_digest(other.model)  # searching loads it so


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize("choice", [{"backend": "sdpa"}, {"dtype": "float32"}, {"images": 2}, {"images": 0}])
def test_not_chosen_otherwise(choice, capsys, monkeypatch):
    monkeypatch.setattr(precision, "use_bfloat16", lambda classifier: pytest.fail("checked"))
    assert loaded(**choice).dtype == torch.float32
    assert capsys.readouterr().err == ""


def test_not_chosen_without_instructions(capsys):
    assert loaded(images=None).dtype == torch.float32
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("has_bfloat16")
def test_the_library_keeps_the_dtype():
    assert zero_shot.pipeline(model=CHECKPOINT, backend="auto", dtype="auto", device="cpu").dtype == torch.float32


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize("tower", [0, 1], ids=["images", "texts"])
@pytest.mark.parametrize("change", ["opposite", "not finite"])
def test_refused_where_embeddings_change(tower, change, capsys, monkeypatch):
    """By one row of one tower. What was converted has lost its digits, so that the checkpoint is loaded again."""
    embeddings = precision._embeddings

    def changed(classifier, images, names):
        result = embeddings(classifier, images, names)
        if classifier.dtype == torch.bfloat16:
            result[tower][-1] *= -1 if change == "opposite" else float("nan")
        return result

    before = loaded(images=0)
    monkeypatch.setattr(precision, "_embeddings", changed)
    found = loaded()
    assert found.dtype == torch.float32
    assert model_digest(found.model) == model_digest(before.model)
    said = capsys.readouterr().err
    assert one_line(said) and "computing in float32, because bfloat16 changes embeddings (cosine " in said


@pytest.mark.usefixtures("has_bfloat16")
def test_checked_on_a_few_pictures(monkeypatch):
    """On as many as have about 512 patches, and at least on one."""
    sizes = []
    embeddings = precision._embeddings

    def counted(classifier, images, names):
        sizes.append((len(images), len(names)))
        return embeddings(classifier, images, names)

    monkeypatch.setattr(precision, "_embeddings", counted)
    for tokens, pictures in ((512, 8), (48, 3), (1, 1)):  # of 16 patches
        monkeypatch.setattr(precision, "CHECKED_TOKENS", tokens)
        sizes.clear()
        precision.use_bfloat16(loaded(images=0))
        assert sizes == [(pictures, 4)] * 2


@pytest.mark.usefixtures("has_bfloat16")
def test_demo_pictures_keep_their_names(tmp_path, siglip):
    """All eight, and close scores stay apart: they are computed in fp32 from embeddings in bfloat16."""
    exact, half = loaded(images=0), loaded()
    assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    pictures = sorted(str(path) for path in precision.PICTURES.glob("*.png"))
    names = [precision.image_name(path) for path in pictures]
    results = [classifier(pictures, names) for classifier in (exact, half)]
    for rows in results:
        assert [row[0]["label"] for row in rows] == names
    scores = {entry["score"] for row in results[1] for entry in row}
    assert len(scores) > 60  # of 64


@pytest.mark.usefixtures("has_bfloat16")
def test_temperature_and_bias_are_not_rounded(tmp_path):
    """In scores of `classify`, and of `search` in a file whose rows were computed in bfloat16."""
    exact, half = loaded(images=0), loaded()
    t, b = exact.model.logit_scale.exp().item(), exact.model.logit_bias.item()
    assert abs(half.model.logit_bias.item() - b) > 1e-3  # as transformers has it in bfloat16
    paths = sorted(map(str, precision.PICTURES.glob("*.png")))[:3]
    inputs = half.join([half.prepare(path) for path in paths])
    names = [precision.image_name(path) for path in paths]
    text = half.encode_labels(names, "{}")
    with torch.no_grad():
        image = unit_length(half.model.get_image_features(**inputs).pooler_output.float())
    expected = torch.sigmoid(t * image @ text.float().T + b)
    assert expected.max() > 0.05
    torch.testing.assert_close(half.score(inputs, text), expected, atol=1e-6, rtol=1e-5)
    out = tmp_path / "half.safetensors"
    embed_images(half.model, half.image_processor, paths, out, model_name=str(CHECKPOINT))
    assert load_embeddings(out).settings["computed_in"] == "bfloat16"
    for hit in (hit for found in search(out, names, device="cpu") for hit in found.hits):
        assert hit.score == pytest.approx(torch.tensor(t * hit.cosine + b).sigmoid().item(), abs=1e-6)


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize("kind", ["safetensors", "npy", "parquet"])
def test_a_file_keeps_its_dtype(kind, siglip, images, tmp_path, monkeypatch):
    """One that was begun in bfloat16 continues on a CPU without, and one in float32 on a CPU with it."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    outs = {"bfloat16": tmp_path / f"half.{kind}", "float32": tmp_path / f"whole.{kind}"}
    for dtype, out in outs.items():
        monkeypatch.setattr(precision, "has_bfloat16", lambda dtype=dtype: dtype == "bfloat16")
        result = siglip("embed", images, "--out", out)
        assert result.exit_code == 0, result.stderr
        assert ("computing in bfloat16 (cosine" in result.stderr) == (dtype == "bfloat16")
    random_image(9).save(images / "9.png")
    for dtype, out in outs.items():
        monkeypatch.setattr(precision, "has_bfloat16", lambda dtype=dtype: dtype != "bfloat16")
        result = siglip("embed", images, "--out", out)
        assert result.exit_code == 0 and "1 embedded now" in result.stdout, result.stderr
        assert result.stderr == (
            f"siglip: computing in bfloat16, as were the rows of {out}\n" if out == outs["bfloat16"] else ""
        )
        stored = load_embeddings(out)
        assert stored.settings["computed_in"] == dtype and stored.embeddings.dtype == torch.float32
    cosines = torch.nn.functional.cosine_similarity(*(load_embeddings(out).embeddings for out in outs.values()))
    assert 0.99 < cosines.min() < 1 - 1e-6
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    result = siglip("embed", images, "--out", outs["bfloat16"], "--overwrite")
    assert result.exit_code == 0 and load_embeddings(outs["bfloat16"]).settings["computed_in"] == "float32"


def test_the_dtype_of_what_there_is(checkpoint, images, tmp_path):
    """Of a file, of an interrupted run's journal, of files by number and by size; None where rows cannot be read."""
    out = tmp_path / "out.safetensors"
    assert computed_in(out) is None and not list(tmp_path.glob("out*"))
    classifier = zero_shot.pipeline(model=checkpoint, dtype="bfloat16", device="cpu")

    def embed(path, **arguments):
        embed_images(classifier.model, classifier.image_processor, [images], path, **arguments)
        return load_embeddings(path).settings

    settings = embed(out)
    assert computed_in(out) == "bfloat16"
    link = tmp_path / "link.safetensors"
    link.symlink_to(out)
    assert computed_in(link) == "bfloat16"
    begun = tmp_path / "begun.safetensors"
    EmbeddingJournal(begun, {**settings, "computed_in": "float16"}).close()
    assert computed_in(begun) == "float16"
    for name, arguments in (("ranks", {"shards": 2}), ("cut", {"shard_size": 1})):
        numbered = tmp_path / f"{name}.safetensors"
        embed(numbered, **arguments)
        assert Manifest.path_of(numbered).exists() and not numbered.exists()
        assert computed_in(numbered) == "bfloat16"
    for damaged in (out, begun.with_name(begun.name + ".part"), Manifest.path_of(tmp_path / "cut.safetensors")):
        damaged.write_text("damaged")
    assert [computed_in(tmp_path / f"{name}.safetensors") for name in ("out", "begun", "cut")] == [None] * 3
    shutil.rmtree(images)
    assert computed_in(images / "out.safetensors") is None
