"""The command `siglip` as a whole: usage errors, help, `siglip info`, progress, and interruption while it starts."""

import importlib.metadata
import io
import json
import subprocess
import sys

import machines
import pytest
import transformers
from command_line import one_line

from siglip_model.cli import terminal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "IMAGE", "--labels", ","], "--labels has no label"),
        (["classify", "IMAGE", "--labels", "a", "--plot", "x.docx"], "--plot: x.docx ends in .docx; supported: "),
        (
            ["classify", "IMAGE", "--labels", "a", "--plot", "/no/such/x.png"],
            "--plot: the folder /no/such does not exist",
        ),
        (["classify", "nowhere.png", "--labels", "a"], "no such file or folder: nowhere.png"),
        (["classify", "EMPTY", "--labels", "a"], "no images in"),
        (["classify", "IMAGE", "--labels", "a", "--model", "/no/such/model"], "/no/such/model"),
        (
            ["classify", "IMAGE", "--labels", "a", "--device", "gpu"],
            "error: --device is 'gpu'; supported: 'auto', 'cpu', 'cuda'",
        ),
        (
            ["classify", "IMAGE", "--labels", "a", "--backend", "cuda"],
            "error: --backend is 'cuda'; supported: eager, sdpa",
        ),
        (["classify", "IMAGE", "--labels", "a", "--dtype", "int8"], "--dtype is 'int8'; supported: auto, float32"),
        (["embed", "IMAGE", "--out", "x.npy", "--token-budget", "4"], "--token-budget is given with a SiglipImage"),
        (["embed", "IMAGE", "--out", "/no/such/x.safetensors"], "--out: the folder /no/such does not exist"),
        (["embed", "IMAGE", "--out", "EMPTY"], "is a folder; supported: a file name"),
        (["embed", "IMAGE", "--out", "x.bin"], "x.bin does not end in .safetensors"),
        (["embed", "EMPTY", "--out", "x.safetensors"], "no images in"),
        (["embed", "nowhere", "--out", "x.safetensors"], "no such file or folder: nowhere"),
        (
            ["embed", "IMAGE", "--out", "x.npy", "--model", "EMPTY"],
            "empty has no config.json; supported: a checkpoint, or in Python its configuration as config=",
        ),
        (["evaluate", "--data", "nowhere"], "data (--data) cannot be used: 'nowhere' is not a folder; supported: "),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(siglip, images, tmp_path, arguments, message, monkeypatch):
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


def test_an_unavailable_backend_is_an_error_naming_it(siglip, images):
    result = siglip("classify", images, "--labels", "a", "--backend", "flash_attention_2")
    assert result.exit_code == 2 and one_line(result.stderr)
    assert "flash" in result.stderr


def test_info_names_every_backend_and_its_reason(siglip):
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


def test_info_says_which_gpus_run_no_kernels(siglip, monkeypatch):
    machines.report(monkeypatch, machines.RTX_2080, machines.H100)
    facts = json.loads(siglip("info", "--json").stdout)
    old, new = facts["devices"]["cuda:0"], facts["devices"]["cuda:1"]
    assert old.startswith("NVIDIA GeForce RTX 2080 Ti, compute capability 7.5, 32 GiB; no triton: NVIDIA GeForce")
    assert new == "NVIDIA H100 80GB HBM3, compute capability 9.0, 32 GiB" and facts["backends"]["triton"] is None
    machines.report(monkeypatch, machines.MI300X, hip="6.4")
    facts = json.loads(siglip("info", "--json").stdout)
    assert facts["devices"]["cuda:0"].startswith("AMD Instinct MI300X (gfx942), 32 GiB; no triton: ")
    assert "is an AMD GPU (ROCm 6.4)" in facts["backends"]["triton"] and facts["versions"]["rocm (of torch)"] == "6.4"
    monkeypatch.setattr("torch.cuda.get_device_properties", machines.broken)
    facts = json.loads(siglip("info", "--json").stdout)
    assert facts["devices"]["cuda:0"].startswith("PyTorch cannot use it: Invalid device id; no triton: cuda:0 is an ")


@pytest.mark.parametrize(
    "command",
    [["siglip"], [sys.executable, "-m", "siglip_model.cli"], [sys.executable, "-m", "siglip_model"]],
    ids=["siglip", "-m cli", "-m"],
)
def test_version(siglip, command):
    expected = f"siglip-triton {importlib.metadata.version('siglip-triton')}\n"
    if command == ["siglip"]:
        result = siglip("--version")
        assert (result.exit_code, result.stdout, result.stderr) == (0, expected, "")
    else:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


INTERRUPTED_START = """
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
    command = [sys.executable, "-c", INTERRUPTED_START, "classify", str(images / "0.png"), "--labels", "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "siglip: interrupted\n")


def test_help_is_complete(siglip):
    for command in ("classify", "embed", "demo", "info"):
        result = siglip(command, "--help")
        assert result.exit_code == 0 and "Usage: siglip" in result.stdout


@pytest.mark.parametrize("command", ["classify", "embed", "demo", "evaluate"])
def test_help_names_bfloat16_for_many_images_where_auto_chooses_it(siglip, command):
    words = siglip(command, "--help").stdout.split()
    assert ("but bfloat16 for many images" in " ".join(words)) is (command in ("classify", "embed"))


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
