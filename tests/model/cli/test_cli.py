"""The command `siglip`: what it prints, writes and returns."""

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import transformers
from PIL import Image
from tiny_checkpoint import random_image, shared_tiny_checkpoint
from typer.testing import CliRunner

from siglip_model.cli import classify, main, terminal
from siglip_model.cli import demo as demo_command
from siglip_model.cli.plot import ROWS_AT_MOST, PlotRow, format_score, plot_predictions
from siglip_model.demo import CHECKPOINT
from siglip_model.embed import load_embeddings
from siglip_model.embed import run as embed_run

LABELS = ["2 cats", "a plane", "a remote"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture
def siglip(checkpoint):
    """Runs the command in this process, on the tiny checkpoint unless told otherwise."""

    def run(*arguments):
        words = [str(argument) for argument in arguments]
        if words[0] in ("classify", "embed") and "--model" not in words:
            words[1:1] = ["--model", str(checkpoint), *([] if "--device" in words else ["--device", "cpu"])]
        return CliRunner().invoke(main.app, words, prog_name="siglip")

    return run


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        random_image(number, size=(40 + number, 50)).save(folder / f"{number}.png")
    return folder


def one_line(text):
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text


def test_classify_in_json_equals_transformers(siglip, images, checkpoint):
    paths = sorted(images.iterdir())
    result = siglip("classify", *paths, "--labels", *LABELS, "--json", "--batch-size", 2)
    assert result.exit_code == 0 and result.stderr == ""
    pillow = transformers.SiglipImageProcessorPil.from_pretrained(checkpoint)  # not torchvision's, which differs
    task = "zero-shot-image-classification"
    theirs = transformers.pipeline(task, model=str(checkpoint), image_processor=pillow, device=-1)
    expected = theirs([str(path) for path in paths], candidate_labels=LABELS)
    ours = json.loads(result.stdout)
    assert [entry["image"] for entry in ours] == [str(path) for path in paths]
    for entry, predictions in zip(ours, expected, strict=True):
        assert [one["label"] for one in entry["predictions"]] == [one["label"] for one in predictions]
        scores = [one["score"] for one in predictions]
        assert [one["score"] for one in entry["predictions"]] == pytest.approx(scores, abs=1e-5)


def test_classify_prints_every_image_with_its_labels_best_first(siglip, images):
    as_json = json.loads(siglip("classify", images, "--labels", *LABELS, "--json").stdout)
    shown = siglip("classify", images, "--labels", *LABELS, "--top-k", 2).stdout
    lines = shown.splitlines()
    for entry in as_json:
        start = lines.index(os.path.basename(entry["image"]))
        for line, prediction in zip(lines[start + 1 : start + 3], entry["predictions"][:2], strict=True):
            assert prediction["label"] in line and format_score(prediction["score"]) in line
    assert len([line for line in lines if "░" in line or "█" in line]) == 2 * 5


@pytest.mark.parametrize(
    "words",
    [
        ["IMAGE", "--labels", "2 cats", "a plane", "a remote"],
        ["IMAGE", "--labels", "2 cats,a plane, a remote,"],
        ["IMAGE", "--labels", "2 cats", "--labels", "a plane", "--labels=a remote"],
        ["--labels", "2 cats", "--labels", "a plane,a remote", "IMAGE"],
        ["--labels", "2 cats,a plane,a remote", "IMAGE"],
        ["--labels", "2 cats,a plane,a remote", "--", "IMAGE"],
        ["--top-k", "3", "IMAGE", "--labels", "2 cats", "a plane", "--batch-size", "1", "--labels", "a remote"],
        ["IMAGE", "--labels", "2 cats", "a plane", "a remote", "a plane"],
    ],
)
def test_ways_to_write_labels(siglip, images, words):
    image = str(images / "0.png")
    result = siglip("classify", "--json", *[image if word == "IMAGE" else word for word in words])
    assert result.exit_code == 0, result.stderr
    (entry,) = json.loads(result.stdout)
    assert entry["image"] == image
    assert {one["label"] for one in entry["predictions"]} == set(LABELS)


def test_commas_within_labels_and_template():
    assert classify.split_labels(["red\\, round, a dog", "a cat", " ", "a dog"]) == ["red, round", "a dog", "a cat"]


def test_the_template_reaches_the_model(siglip, images):
    image = images / "0.png"
    scores = []
    for template in ("This is a photo of {}.", "{}", "{{on}} the sofa: {}"):
        result = siglip("classify", image, "--labels", "a {cat}", "--template", template, "--json")
        scores.append(json.loads(result.stdout)[0]["predictions"][0]["score"])
    assert len({round(score, 5) for score in scores}) == 3
    result = siglip("classify", image, "--labels", "a cat", "--template", "no place")
    assert result.exit_code == 2 and one_line(result.stderr) and "hypothesis_template is 'no place'" in result.stderr


def test_one_unreadable_image_among_many(siglip, images):
    (images / "2.png").write_text("no image")
    arguments = ("classify", images, images / "gone.png", images / "0.png", "--labels", *LABELS, "--batch-size", 4)
    result = siglip(*arguments, "--json")
    assert result.exit_code == 1
    entries = json.loads(result.stdout)
    assert [os.path.basename(entry["image"]) for entry in entries] == [
        "0.png", "1.png", "2.png", "3.png", "4.png", "gone.png", "0.png",
    ]  # fmt: skip
    assert [index for index, entry in enumerate(entries) if "error" in entry] == [2, 5]
    first, again = entries[0]["predictions"], entries[6]["predictions"]
    assert [one["label"] for one in first] == [one["label"] for one in again]
    assert [one["score"] for one in first] == pytest.approx([one["score"] for one in again], abs=1e-6)
    shown = siglip(*arguments)
    assert shown.exit_code == 1
    for text in (result.stderr, shown.stderr):
        assert "2.png: not an image" in text and "gone.png: no such file" in text
        assert "2 of 7 images failed" in text and "Traceback" not in text
    assert "2.png" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "IMAGE", "--labels", ","], "--labels has no label"),
        (["classify", "IMAGE", "--labels", "a", "--plot", "x.docx"], "--plot x.docx ends in .docx; supported: "),
        (["classify", "IMAGE", "--labels", "a", "--plot", "/no/such/x.png"], "the folder /no/such does not exist"),
        (["classify", "nowhere.png", "--labels", "a"], "no such file or folder: nowhere.png"),
        (["classify", "EMPTY", "--labels", "a"], "no images in"),
        (["classify", "IMAGE", "--labels", "a", "--model", "/no/such/model"], "/no/such/model"),
        (["classify", "IMAGE", "--labels", "a", "--device", "gpu"], "device is 'gpu'; supported: 'cpu', 'cuda'"),
        (["classify", "IMAGE", "--labels", "a", "--backend", "cuda"], "backend is 'cuda'; supported: eager, sdpa"),
        (["classify", "IMAGE", "--labels", "a", "--dtype", "int8"], "--dtype is 'int8'; supported: auto, float32"),
        (["embed", "IMAGE", "--out", "/no/such/x.safetensors"], "--out: the folder /no/such does not exist"),
        (["embed", "IMAGE", "--out", "EMPTY"], "is a folder; supported: a file name"),
        (["embed", "IMAGE", "--out", "x.npy"], "x.npy does not end in .safetensors"),
        (["embed", "EMPTY", "--out", "x.safetensors"], "no images in"),
        (["embed", "nowhere", "--out", "x.safetensors"], "no such file or folder: nowhere"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(siglip, images, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"IMAGE": str(images / "0.png"), "EMPTY": str(tmp_path / "empty")}
    result = siglip(*[places.get(word, word) for word in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and one_line(result.stderr)
    assert message in result.stderr and result.stderr.startswith("siglip: error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "images"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["classify", "x.png"],
        ["classify", "--labels", "a"],
        ["classify", "x.png", "--labels", "a", "--top-k", "0"],
        ["classify", "x.png", "--labels", "a", "--batch-size", "0"],
        ["embed", "x.png"],
        ["embed", "--out", "x.safetensors"],
        ["paint"],
    ],
)
def test_unknown_or_missing_arguments_exit_with_2(siglip, arguments):
    result = siglip(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output and result.stdout == ""


def test_a_backend_that_is_not_there_is_refused_by_name(siglip, images):
    result = siglip("classify", images, "--labels", "a", "--backend", "flash_attention_2")
    assert result.exit_code == 2 and one_line(result.stderr)
    assert "flash" in result.stderr


@pytest.mark.parametrize("suffix", [".png", ".svg", ".jpg"])
def test_plot_shows_images_beside_bars(siglip, images, tmp_path, suffix):
    (images / "1.png").write_text("no image")
    picture = tmp_path / f"bars{suffix}"
    result = siglip("classify", images, "--labels", *LABELS, "--plot", picture, "--json")
    assert result.exit_code == 1 and picture.stat().st_size > 5000
    assert len(json.loads(result.stdout)) == 5
    if suffix == ".png":
        with Image.open(picture) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        height, width, _ = pixels.shape
        assert height > width  # four rows
        assert len(np.unique(pixels[:, : width // 3].reshape(-1, 3), axis=0)) > 1000  # the images
        blue = (pixels == (0x2F, 0x6F, 0xDB)).all(axis=-1)
        assert blue[:, : width // 3].sum() == 0
        assert blue[:, width // 3 :].any(axis=1).sum() > 4 * 10  # a best bar in each row


def test_the_bars_are_as_long_as_the_scores(tmp_path):
    lengths = []
    for score in (0.9, 0.45):
        path = tmp_path / f"{score}.png"
        row = PlotRow(random_image(0), "x", [{"score": score, "label": "a $label$"}, {"score": 0.91, "label": "{}"}])
        plot_predictions([row], path)
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        lengths.append((pixels == (0x2F, 0x6F, 0xDB)).all(axis=-1).sum(axis=1).max())
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.02)


def test_characters_without_a_font_are_said_once(tmp_path):
    row = PlotRow(random_image(0), "x", [{"score": 0.5, "label": "\U0010fffd \U0010fffc"}])
    with pytest.warns(UserWarning, match="no installed font has") as caught:
        plot_predictions([row], tmp_path / "x.png")
    assert len(caught) == 1


def test_wrong_use_of_plot(tmp_path):
    with pytest.raises(ValueError, match=f"0 images; supported: 1 to {ROWS_AT_MOST}"):
        plot_predictions([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="ends in no suffix"):
        plot_predictions([PlotRow(random_image(0), "x", [])], tmp_path / "x")


def test_scores_as_text():
    texts = [format_score(score) for score in (0.0, 1.0, 0.8731, 0.0123, 0.00213, 0.00004)]
    assert texts == ["0.000", "1.000", "0.873", "0.012", "0.0021", "4e-05"]


def test_embed_and_going_on(siglip, images, tmp_path):
    out = tmp_path / "out.safetensors"
    (images / "3.png").write_text("no image")
    result = siglip("embed", images, "--out", out)
    assert result.exit_code == 1
    assert "4 rows of 32; 4 embedded now" in result.stdout and "1 failed" in result.stdout
    assert "3.png: not an image" in result.stderr and "1 of 5 images failed" in result.stderr
    random_image(3).save(images / "3.png")
    result = siglip("embed", images, "--out", out, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert (report["embedded"], report["skipped"], report["rows"], report["failures"]) == (1, 4, 5, [])
    assert load_embeddings(out).embeddings.norm(dim=-1).sub(1).abs().max() < 1e-5
    result = siglip("embed", images, "--out", out, "--no-normalize")
    assert result.exit_code == 2 and one_line(result.stderr) and "normalize was true and is now false" in result.stderr
    result = siglip("embed", images, "--out", out, "--no-normalize", "--overwrite", "--dtype", "bfloat16")
    assert result.exit_code == 0
    stored = load_embeddings(out)
    assert str(stored.embeddings.dtype) == "torch.bfloat16" and stored.settings["computed_in"] == "bfloat16"


def test_info_names_every_backend_and_why(siglip):
    from siglip_model.backends import availability

    facts = json.loads(siglip("info", "--json").stdout)
    assert facts["backends"] == availability()
    assert facts["backends"]["eager"] is None and facts["backends"]["sdpa"] is None
    assert set(facts["backends"]) >= {"eager", "sdpa", "flash_attention_2", "triton"}
    assert facts["versions"]["transformers"] == transformers.__version__ and "cpu" in facts["devices"]
    shown = siglip("info")
    assert shown.exit_code == 0
    for name, reason in facts["backends"].items():
        backends = shown.stdout.partition("\nbackends")[2]
        (line,) = [line for line in backends.splitlines() if line.split()[:1] == [name]]
        assert ("yes" in line) if reason is None else (reason in line)


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(40):
        random_image(index).save(folder / f"{index:02}.png")
    return folder


STOPPED_RUN = """
import sys, time
from siglip_model.cli import main as cli
from siglip_model.cli import terminal
from siglip_model.embed import run as embed_run
note = embed_run._Run._note
def note_and_say(self, *arguments, **options):
    note(self, *arguments, **options)
    print("noted", flush=True)
    time.sleep(0.05)
embed_run._Run._note = note_and_say
sys.argv = ["siglip", *sys.argv[1:]]
cli.main()
"""


def test_ctrl_c_leaves_what_is_done_usable(siglip, many, tmp_path, checkpoint):
    out = tmp_path / "out.safetensors"
    arguments = ["embed", str(many), "--out", str(out), "--model", str(checkpoint), "--batch-size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED_RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(7):
        assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert one_line(stderr) and "of 40 images; run the same command again to resume" in stderr
    rows = len(load_embeddings(out).files)
    assert 6 <= rows < 40
    report = json.loads(siglip("embed", many, "--out", out, "--json").stdout)
    assert (report["skipped"], report["rows"]) == (rows, 40)


STOPPED_START = """
import signal, sys
class Impatient:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Impatient())
from siglip_model.cli import main as cli
sys.argv = ["siglip", *sys.argv[1:]]
cli.main()
"""


def test_ctrl_c_while_pytorch_is_imported(images):
    command = [sys.executable, "-c", STOPPED_START, "classify", str(images / "0.png"), "--labels", "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "siglip: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_an_embedding_with_130_and_what_is_done(siglip, many, tmp_path, number, monkeypatch):
    out = tmp_path / "out.safetensors"
    note, handler = embed_run._Run._note, signal.getsignal(signal.SIGTERM)

    def note_and_stop(run, *arguments, **options):
        note(run, *arguments, **options)
        if run.embedded == 6:
            signal.raise_signal(number)

    monkeypatch.setattr(embed_run._Run, "_note", note_and_stop)
    result = siglip("embed", many, "--out", out, "--batch-size", 2, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 130 and one_line(result.stderr) and "interrupted after 6 of 40" in result.stderr
    assert (report["rows"], report["complete"]) == (6, False) and len(load_embeddings(out).files) == 6
    assert signal.getsignal(signal.SIGTERM) is handler


def test_ctrl_c_while_classifying_prints_what_is_done(siglip, many, monkeypatch):
    score = classify._ClassifyRun._score

    def score_and_stop(run, *arguments):
        score(run, *arguments)
        if len(run.results) >= 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(classify._ClassifyRun, "_score", score_and_stop)
    result = siglip("classify", many, "--labels", "a", "--batch-size", 2, "--json")
    assert result.exit_code == 130 and "interrupted after 4 of 40 images" in result.stderr
    names = [os.path.basename(entry["image"]) for entry in json.loads(result.stdout)]
    assert names == ["00.png", "01.png", "02.png", "03.png"]


def test_help_is_complete(siglip):
    for command in ("classify", "embed", "demo", "info"):
        result = siglip(command, "--help")
        assert result.exit_code == 0 and "Usage: siglip" in result.stdout


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("on_terminal", [True, False])
@pytest.mark.parametrize("as_json", [True, False])
def test_the_progress_bar_shows_images_per_second_on_a_terminal_only(monkeypatch, on_terminal, as_json):
    stderr = Terminal() if on_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with terminal.progress(5, "classify", hidden=as_json) as progress:
        for _ in range(5):
            progress.advance()
        progress.say("failed: [bold]/x.png[/]: no image")
    shown = stderr.getvalue()
    assert "siglip: failed: [bold]/x.png[/]: no image\n" in shown
    assert ("images/s" in shown and "5/5" in shown) is (on_terminal and not as_json)


@pytest.fixture
def own_demo(monkeypatch, tmp_path, checkpoint):
    """A demo of three pictures, two of them the same: one of the two must come out wrong."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, seed in (("red-apple", 0), ("two-cats", 1), ("a-plane", 1)):
        random_image(seed).save(pictures / f"{name}.png")
    monkeypatch.setattr(demo_command, "PICTURES", pictures)
    return ["demo", "--model", str(checkpoint), "--device", "cpu"]


def test_demo_marks_right_and_wrong_and_names_the_way_on(siglip, own_demo, tmp_path):
    report = json.loads(siglip(*own_demo, "--json").stdout)
    assert [picture["name"] for picture in report["pictures"]] == ["a plane", "red apple", "two cats"]
    for picture in report["pictures"]:
        scores = {entry["label"]: entry["score"] for entry in picture["predictions"]}
        assert set(scores) == {"a plane", "red apple", "two cats"}
        assert picture["right"] == (max(scores, key=scores.__getitem__) == picture["name"])
    twins = [picture["predictions"] for picture in report["pictures"] if picture["name"] != "red apple"]
    assert twins[0] == twins[1] and report["right"] == sum(picture["right"] for picture in report["pictures"]) < 3
    result = siglip(*own_demo, "--plot", tmp_path / "demo.png")
    assert result.exit_code == 0 and (tmp_path / "demo.png").stat().st_size > 5000
    assert result.stdout.count("✓") == report["right"] and result.stdout.count("✗") == 3 - report["right"]
    assert f"{report['right']} of 3 right, each among 3 names" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "google/siglip-so400m-patch14-384" in line]
    assert "siglip classify IMAGE --model google/siglip-so400m-patch14-384 --labels" in line


def test_demo_without_pictures(siglip, own_demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_command, "PICTURES", tmp_path / "none")
    result = siglip(*own_demo)
    assert result.exit_code == 2 and one_line(result.stderr) and "no images in" in result.stderr


@pytest.mark.skipif(not (CHECKPOINT / "config.json").exists(), reason="the demo's checkpoint is not built yet")
def test_the_demo_that_ships_is_mostly_right():
    result = subprocess.run(
        [sys.executable, "-m", "siglip_model.cli", "demo", "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(result.stdout)
    assert result.stderr == "" and report["of"] >= 5
    assert report["right"] >= 0.7 * report["of"]
