"""`siglip export` and what it writes: ONNX Runtime returns the checkpoint's embeddings, and commands take the file."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from siglip_kernels.errors import UnsupportedInputError
from siglip_model import onnx
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.cli import main
from siglip_model.demo import CHECKPOINT, PICTURES
from siglip_model.embed import load_embeddings
from siglip_model.embed.run import model_digest
from siglip_model.onnx import exporting, signed
from siglip_model.outputs import pooled
from siglip_model.zero_shot import pipeline

onnx_package = pytest.importorskip("onnx", reason="the extra `test` installs it")
pytest.importorskip("onnxscript", reason="the extra `test` installs it")
pytest.importorskip("onnxruntime", reason="the extra `test` installs it")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU")
IMAGES = sorted(map(str, PICTURES.glob("*.png")))
NAMES = [Path(image).stem.replace("-", " ") for image in IMAGES]


def siglip(*arguments):
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments], prog_name="siglip")


@pytest.fixture(scope="module")
def checkpoint():
    return pipeline(model=str(CHECKPOINT), backend="sdpa", device="cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    result = siglip("export", "--out", path, "--json")
    assert result.exit_code == 0, result.stderr
    assert not result.stderr  # of the exporter's advice
    report = json.loads(result.stdout)
    assert report["least_cosine"].keys() == {"vision", "text"} and min(report["least_cosine"].values()) > 0.999999
    assert report["bytes"] == path.stat().st_size + Path(f"{path}.data").stat().st_size
    return path


@pytest.fixture
def export_copies(exported, monkeypatch):
    """Lets `export` copy the graphs instead of tracing them again."""

    def copy(model, path, towers):
        graphs = onnx_package.load(exported)
        onnx_package.save(graphs, path, save_as_external_data=True, location=f"{path.name}.data")

    monkeypatch.setattr(exporting, "_write_float32", copy)


def write(checkpoint, out, **options):
    parts = checkpoint.model, checkpoint.tokenizer, checkpoint.image_processor
    return onnx.export(*parts, out, images=IMAGES, texts=NAMES, **options)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_after_use(exported, again):
    model, pixels = onnx.load(exported), torch.randn(1, 3, 64, 64)
    right = pooled(model.get_image_features(pixels))
    assert torch.equal(pooled(again(model).get_image_features(pixels)), right)


@pytest.mark.parametrize("images", [1, 5])
def test_images(exported, checkpoint, images):
    pixels = torch.randn(images, 3, 64, 64)
    found, right = (pooled(model.get_image_features(pixels)) for model in (onnx.load(exported), checkpoint.model))
    torch.testing.assert_close(found, right.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 64)])
def test_texts_of_any_length(exported, checkpoint, shape):
    ids = torch.randint(2, 1000, shape)
    found, right = (pooled(model.get_text_features(ids)) for model in (onnx.load(exported), checkpoint.model))
    torch.testing.assert_close(found, right.detach(), rtol=0, atol=2e-5)


def test_the_pipeline_of_a_file_has_the_scores_of_the_checkpoint(exported, checkpoint):
    found = pipeline(model=exported)
    assert repr(found) == repr(checkpoint).replace("sdpa", "onnxruntime")
    for one, other in zip(found(IMAGES, NAMES), checkpoint(IMAGES, NAMES), strict=True):
        assert one[0]["label"] == other[0]["label"]
        assert one[0]["score"] == pytest.approx(other[0]["score"], abs=1e-4)


def test_commands_take_a_file_in_any_folder(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(exported.parent)
    out = tmp_path / "images.safetensors"
    result = siglip("embed", *IMAGES, "--model", exported.name, "--out", out)
    assert result.exit_code == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    assert load_embeddings(out).embeddings.shape == (len(IMAGES), 160)
    result = siglip("search", out, "This is a photo of rocket.", "--json", "--top", 1)
    assert result.exit_code == 0, result.stderr
    assert Path(json.loads(result.stdout)[0]["results"][0]["name"]).name == "rocket.png"
    result = siglip("demo", "--model", exported, "--json")
    assert json.loads(result.stdout)["right"] == len(IMAGES)
    result = siglip("search", out, "rocket", "--model", CHECKPOINT)
    assert result.exit_code == 2 and "is another model" in result.stderr


def test_int8_keeps_the_embeddings_within_its_bound(export_copies, exported, checkpoint, tmp_path):
    written = write(checkpoint, tmp_path / "int8.onnx", int8=True)
    found = onnx.load(tmp_path / "int8.onnx")
    assert found.precision == "int8" and written.size < 0.4 * Path(f"{exported}.data").stat().st_size
    assert found.logit_scale.item() == pytest.approx(checkpoint.model.logit_scale.item())
    pixels = torch.cat([checkpoint.prepare(image)["pixel_values"] for image in IMAGES])
    embeds, right = (pooled(model.get_image_features(pixels)) for model in (found, checkpoint.model))
    cosines = torch.nn.functional.cosine_similarity(embeds, right.detach())
    assert cosines.min().item() == pytest.approx(written.cosines["vision"], abs=1e-6) and 0.999 <= cosines.min() < 1


def test_weights_with_a_sign_change_no_bit(export_copies, checkpoint, tmp_path, monkeypatch):
    write(checkpoint, tmp_path / "int8.onnx", int8=True)
    pixels = torch.cat([checkpoint.prepare(image)["pixel_values"] for image in IMAGES])
    given = []
    give_sign = signed.give_sign
    monkeypatch.setattr(signed, "give_sign", lambda graphs, folder: (given.append(graphs), give_sign(graphs, folder)))
    monkeypatch.setattr(signed, "faster", lambda: False)
    right = pooled(onnx.load(tmp_path / "int8.onnx").get_image_features(pixels))
    assert not given
    monkeypatch.setattr(signed, "faster", lambda: True)
    found = pooled(onnx.load(tmp_path / "int8.onnx").get_image_features(pixels))
    (graphs,) = given
    types = {tensor.name: tensor.data_type for tensor in graphs.graph.initializer}
    products = [node.input for node in graphs.graph.node if node.op_type == "MatMulInteger"]
    assert products and all(types[each[k]] == onnx_package.TensorProto.INT8 for each in products for k in (1, 3))
    if torch.cpu._is_vnni_supported():  # without, such products saturate
        assert torch.equal(found, right)


def test_an_export_that_differs_from_the_model_is_not_written(export_copies, checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match=r"least cosine of vision embeddings .* is 0\.999.*supported: from 0\.99999, as"
    ):
        write(checkpoint, tmp_path / "int8.onnx", int8=True, least_cosine=0.99999)
    with pytest.raises(ValueError, match=r"supported: from 0\.999999999, as least_cosine \(--least-cosine\) says"):
        write(checkpoint, tmp_path / "int8.onnx", int8=True, least_cosine=0.999999999)
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_are_kept(export_copies, exported, checkpoint, tmp_path):
    out = tmp_path / "model.onnx"
    write(checkpoint, out)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "spiece.model", "preprocessor_config.json"} <= written
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # whoever can read one file can read all
    with pytest.raises(FileExistsError, match=r"model\.onnx exists; choose another name, or overwrite \(--overwrite\)"):
        write(checkpoint, out)
    write(checkpoint, out, overwrite=True)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"preprocessor_config\.json exists and differs"):
        write(checkpoint, tmp_path / "other.onnx")
    assert {path.name for path in tmp_path.iterdir()} == written
    assert (tmp_path / "preprocessor_config.json").read_text() == "{}"


def test_one_tower_says_that_it_lacks_the_other(checkpoint, tmp_path):
    checkpoint.model.set_backend("eager")
    try:
        assert write(checkpoint, tmp_path / "text.onnx", towers=("text",)).cosines.keys() == {"text"}
    finally:
        checkpoint.model.set_backend("sdpa")
    found = onnx.load(tmp_path / "text.onnx")
    assert pooled(found.get_text_features(torch.zeros(2, 4, dtype=torch.long))).shape == (2, 160)
    assert not (tmp_path / "preprocessor_config.json").exists()
    with pytest.raises(UnsupportedInputError, match="towers of .* are text; .* with the vision tower"):
        found.get_image_features(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_files_may_be_links(export_copies, exported, checkpoint, tmp_path, monkeypatch, int8):
    """As in a cache of the Hub; with VNNI the weights of int8 files are read to give them a sign."""
    write(checkpoint, tmp_path / "model.onnx", int8=int8)
    monkeypatch.setattr(signed, "faster", lambda: True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "hard").mkdir()
    for number, path in enumerate(sorted(tmp_path.glob("*.*"))):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number}")
        (tmp_path / "hard" / path.name).hardlink_to(path)
    pixels, ids = torch.randn(2, 3, 64, 64), torch.tensor([[3, 4]])
    plain = onnx.load(tmp_path / "model.onnx")
    for folder in ("snapshot", "hard"):
        found = onnx.load(tmp_path / folder / "model.onnx")
        assert torch.equal(*(pooled(model.get_image_features(pixels)) for model in (found, plain)))
        assert torch.equal(*(pooled(model.get_text_features(ids)) for model in (found, plain)))
        assert model_digest(found) == model_digest(plain)
    result = siglip("embed", *IMAGES[:1], "--model", tmp_path / "snapshot" / "model.onnx", "--out", tmp_path / "o.npy")
    assert result.exit_code == 0, result.stderr


def test_damaged_weights_are_named(exported, tmp_path):
    for suffix in ("", ".data"):
        shutil.copy(f"{exported}{suffix}", tmp_path / f"{exported.name}{suffix}")
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data is damaged: it has .* bytes, and the tensor .* ends"):
        onnx.load(path)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data, the weights of model\.onnx, is missing"):
        onnx.load(path)
    data.write_bytes(content)
    for key, value, message in (
        (
            "location",
            "../model.onnx.data",
            r"names weights in \['\.\./model\.onnx\.data', .*supported: one file",
        ),
        ("length", "8", "model.onnx is damaged: the tensor .* has 8 bytes"),
        ("offset", "no number", "does not say where in model.onnx.data"),
    ):
        graphs = onnx_package.load(exported, load_external_data=False)
        places = [entry for tensor in graphs.graph.initializer for entry in tensor.external_data]
        next(entry for entry in places if entry.key == key).value = value
        path.write_bytes(graphs.SerializeToString())
        with pytest.raises(CheckpointError, match=message):
            onnx.load(path)


def test_bad_input(exported, checkpoint, tmp_path, monkeypatch):
    model = onnx.load(exported)
    for call, message in {
        lambda: model.get_image_features(torch.zeros(1, 3, 32, 32)): "pixel_values has shape .* 3, 64, 64",
        lambda: model.get_text_features(torch.zeros(1, 99, dtype=torch.long)): "input_ids has shape .* 1 to 64 tokens",
        lambda: model.get_text_features(torch.tensor([[0, -1]])): "input_ids reaches from -1 to 0",
        lambda: model.to("cuda"): "device is cuda",
        lambda: write(checkpoint, tmp_path / "model.bin"): r"out is .* ends in \.onnx",
        lambda: write(checkpoint, tmp_path / "model.onnx", towers=["image"]): "towers is .* vision and text",
        lambda: write(checkpoint, tmp_path / "none" / "model.onnx"): "which is not a folder",
        lambda: onnx.load(exported, num_threads=0): "num_threads is 0",
        lambda: onnx.load(tmp_path / "model.onnx"): "no such file",
        lambda: pipeline("image-classification", model=exported): "is the ONNX file",
        lambda: pipeline(model=exported, backend="triton"): "backend is 'triton' with an ONNX file; supported: auto$",
        lambda: pipeline(model=exported, device="cuda"): "device is 'cuda' with an ONNX file; supported: auto, cpu",
        lambda: pipeline(model=exported, revision="main"): "revision is 'main' with an ONNX file; supported: none",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            call()
    for content, message in ((b"no protobuf", "is not an ONNX file"), (b"", "was not written by `siglip export`")):
        (tmp_path / "other.onnx").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            onnx.load(tmp_path / "other.onnx")
    for option, value in {"--dtype": "bfloat16", "--backend": "sdpa", "--device": "cuda"}.items():
        said = siglip("demo", "--model", exported, option, value).stderr
        assert f"error: {option} is '{value}' with an ONNX file; supported: auto" in said and "torch." not in said
    assert "give one of them" in siglip("export", "--out", tmp_path / "a.onnx", "--text", "--both").stderr
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'siglip-triton\[onnx\]'"):
        onnx.load(exported)
