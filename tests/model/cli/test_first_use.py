"""What users expect of any command: help, completion, - for stdin, --, NO_COLOR, pipes, and limits of --max-pixels."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing

import pytest
from command_line import LABELS, one_line
from tiny_checkpoint import random_image

from siglip_model.backends import BACKENDS
from siglip_model.cli import classify, main, options, terminal
from siglip_model.embed import load_embeddings
from siglip_model.images.files import DOWNLOAD_SECONDS
from siglip_model.images.tensor import SiglipImageProcessor

COMMANDS = ("classify", "embed", "search", "train", "evaluate", "export", "demo", "info")


@pytest.mark.parametrize("columns", [52, 60, 100])
@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=lambda words: " ".join(words))
def test_help_fits_narrow_terminals_and_cuts_nothing(capsys, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = []
    for option in ("--help", "-h"):  # typer's CliRunner has a width of its own
        main.app([*command, option], prog_name="siglip", standalone_mode=False)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and max(map(len, shown[0].splitlines())) <= columns
    assert "…" not in shown[0] and not re.search(r"\w\.\.\.$", shown[0], re.MULTILINE)
    words = re.sub(r"\s+", " ", shown[0])
    for option in {"classify": ["--labels LABEL...", "--max-pixels N"], "embed": ["--normalize / --no-normalize"]}.get(
        command[0] if command else "", ["--help Show this message and exit."]
    ):
        assert option in words


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("siglip cl", {"classify"}),
        ("siglip ", set(COMMANDS)),
        ("siglip embed --max", {"--max-pixels", "--max-num-patches"}),
        ("siglip classify x.png --dtype b", {"bfloat16"}),
        ("siglip demo --backend ", {"auto", *BACKENDS}),
    ],
)
def test_shell_completion(siglip, monkeypatch, typed, completed):
    monkeypatch.setenv("_SIGLIP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    assert set(siglip().stdout.split()) == completed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(siglip, monkeypatch, shell):
    monkeypatch.setenv("_SIGLIP_COMPLETE", f"source_{shell}")
    script = siglip().stdout
    assert "siglip" in script and f"complete_{shell}" in script


def test_completion_under_python_is_of_siglip():
    """Not of `python`, whose own completion it would replace."""
    environment = {**os.environ, "_SIGLIP_COMPLETE": "source_bash"}
    command = [sys.executable, "-m", "siglip_model"]
    script = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert script.rstrip().endswith("siglip") and "python" not in script


def test_completion_in_an_unknown_shell_is_a_setup_error():
    script = (
        "import shellingham, sys; from siglip_model.cli import main; shellingham.detect_shell = lambda: ('tcsh', '');"
        " sys.argv = ['siglip', '--install-completion']; main.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "tcsh is not supported" in done.stdout  # 1 says that images failed


def names_in(result):
    assert result.exit_code == 0, result.stderr
    return [os.path.basename(entry["image"]) for entry in json.loads(result.stdout)]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\0"])
def test_a_list_on_stdin(siglip, images, tmp_path, ending):
    (images / "below").mkdir()
    random_image(9).save(images / "below" / "x y.png")
    listed = [*(str(images / f"{number}.png") for number in (3, 1)), str(images / "below")]
    if ending == "\0":
        random_image(8).save(images / "new\nline.png")
        listed.append(str(images / "new\nline.png"))
    expected = ["3.png", "1.png", "x y.png", *["new\nline.png"][: len(listed) - 3]]
    for stdin in (ending.join(listed), ending.join(listed) + ending):
        result = siglip("classify", "-", str(images / "0.png"), "--labels", *LABELS, "--json", stdin=stdin)
        assert names_in(result) == [*expected, "0.png"]
    out = tmp_path / "x.safetensors"
    assert siglip("embed", "--out", out, "--", "-", stdin=ending.join(listed)).exit_code == 0
    assert [os.path.basename(path) for path in load_embeddings(out).files] == expected


def test_a_list_on_stdin_that_holds_nothing_or_what_does_not_exist(siglip, images, tmp_path):
    out = tmp_path / "x.safetensors"
    for stdin in ("", "\n\n"):
        for command in (["classify", "-", "--labels", "a"], ["embed", "-", "--out", out]):
            result = siglip(*command, stdin=stdin)
            assert (
                result.exit_code == 2 and one_line(result.stderr) and "no images in the list on stdin" in result.stderr
            )
    result = siglip("embed", "-", "-", "--out", out, stdin="x")
    assert result.exit_code == 2 and one_line(result.stderr) and "- is given twice" in result.stderr
    result = siglip("embed", "-", "--out", out, stdin=f"{images}/gone.png\n{images}/0.png\n")
    assert result.exit_code == 1 and "gone.png: no such file" in result.stderr
    assert len(load_embeddings(out).files) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_a_list_on_stdin_is_read_in_pieces(monkeypatch, size):
    monkeypatch.setattr(options, "READ_AT_ONCE", size)
    for content in (b"a\nbc\n\n\xff\xfe\r\nlast", b"a\nbc\n\n\xff\xfe\r\nlast\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert list(options.listed_on_stdin()) == ["a", "bc", os.fsdecode(b"\xff\xfe"), "last"]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="stdin, which is closed"):
        list(options.listed_on_stdin())


def test_two_dashes_end_the_options_of_every_command(siglip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_image(0).save("-x.png")
    os.mkdir("--out")
    random_image(1).save("--out/y.png")
    words = ["classify", "--json", "--labels", *LABELS[:1], "--", "-x.png", "--out"]
    assert names_in(siglip(*words)) == ["-x.png", "y.png"]
    assert names_in(siglip("--", *words)) == ["-x.png", "y.png"]
    result = siglip("embed", "--out", "x.safetensors", "--", "-x.png", "--out")
    assert result.exit_code == 0 and len(load_embeddings("x.safetensors").files) == 2
    assert siglip("info", "--json", "--").exit_code == 0
    for command in ("info", "demo"):
        result = siglip(command, "--", "--json")
        assert result.exit_code == 2 and result.stdout == "" and "--json" in result.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


PREDICTIONS = [{"score": 0.9, "label": "a"}, {"score": 0.1, "label": "b"}]


def show_everything():
    terminal.print_predictions([{"image": "/x.png", "predictions": PREDICTIONS}])
    terminal.print_demo([{"name": "a", "right": True, "predictions": PREDICTIONS}], 1)
    terminal.print_machine({"versions": {"x": "1", "y": None}, "backends": {"eager": None, "triton": "no GPU"}})
    with terminal.progress(2, "embed", hidden=False) as progress:
        progress.advance()
        progress.say("failed")


@pytest.mark.parametrize("variable", ["NO_COLOR", None])
def test_no_color(monkeypatch, variable):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if variable:
        monkeypatch.setenv(variable, "1")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    show_everything()
    style = re.compile(r"\x1b\[[\d;]*m")
    assert "failed" in err.getvalue() and "embed" in err.getvalue()  # the bar is shown either way
    assert bool(style.search(out.getvalue())) is bool(style.search(err.getvalue())) is (variable is None)
    assert ("\x1b" in out.getvalue()) is (variable is None)


def test_where_there_is_no_terminal_there_are_no_control_codes(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    show_everything()
    assert "\x1b" not in out.getvalue() + err.getvalue() and err.getvalue() == "siglip: failed\n"


@pytest.mark.parametrize("command", [["--version"], ["--help"], ["classify", "IMAGES", "--labels", "a"]])
def test_a_reader_that_has_seen_enough(images, checkpoint, command):
    words = [str(images) if word == "IMAGES" else word for word in command]
    words += ["--model", str(checkpoint)] * (command[0] == "classify")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run([sys.executable, "-m", "siglip_model", *words], stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("option", ["--version", "--help"])
def test_a_full_disk_under_stdout_is_an_error(option, unbuffered):
    with open("/dev/full", "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "siglip_model", option],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (2, "siglip: error: No space left on device\n")


def test_closed_streams_end_nothing():
    command = f"'{sys.executable}' -m siglip_model --version >&- 2>&-"
    assert subprocess.run(["bash", "-c", command]).returncode == 0


def test_control_characters_in_names_are_shown_as_escapes(capsys):
    name = "\x1b[31m\x9b2Jx\ny" + os.fsdecode(b"\xff") + "👩\u200d🚀"
    terminal.say(name)
    terminal.print_predictions([{"image": f"/{name}", "predictions": []}])
    shown = capsys.readouterr()
    escaped = r"\x1b[31m\x9b2Jx\ny\udcff" + "👩\u200d🚀\n"
    assert shown.err == f"siglip: {escaped}" and shown.out.startswith(escaped)


def test_an_error_without_words_still_names_file_and_type(siglip, images, tmp_path, monkeypatch):
    process = SiglipImageProcessor._process

    def process_some(self, images, options, device):
        if images[0].size == (42, 50):
            raise MemoryError
        return process(self, images, options, device)

    monkeypatch.setattr(SiglipImageProcessor, "_process", process_some)
    for command in (["classify", images, "--labels", "a"], ["embed", images, "--out", tmp_path / "x.safetensors"]):
        result = siglip(*command)
        assert result.exit_code == 1 and f"failed: {images}/2.png: MemoryError\n" in result.stderr
        assert "1 of 5 images failed" in result.stderr


@pytest.mark.parametrize("error", [KeyError("weights"), MemoryError(), AttributeError("x"), OverflowError()])
def test_an_unexpected_error_is_one_line_and_not_some_failed_images(siglip, images, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(classify, "load_classifier", fail)
    result = siglip("classify", images, "--labels", "a")
    assert result.exit_code == 2 and one_line(result.stderr) and type(error).__name__ in result.stderr
    monkeypatch.setenv("SIGLIP_TRACEBACK", "1")
    assert siglip("classify", images, "--labels", "a").exception is error


def test_ctrl_c_does_not_wait_for_a_download(checkpoint):
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        words = ["classify", url, "--labels", "a", "--model", str(checkpoint), "--device", "cpu"]
        process = subprocess.Popen([sys.executable, "-m", "siglip_model", *words], stderr=subprocess.PIPE, text=True)
        connection, _ = listener.accept()
        with closing(connection):  # which answers nothing
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and one_line(stderr) and "interrupted after 0 of 1" in stderr
    assert time.monotonic() - start < DOWNLOAD_SECONDS / 3


def test_max_pixels_names_the_file_and_leaves_the_others(siglip, images, tmp_path):
    limit = 42 * 50  # images are (40 + number) x 50 pixels
    out = tmp_path / "x.safetensors"
    for command in (["classify", images, "--labels", "a"], ["embed", images, "--out", out]):
        result = siglip(*command, "--max-pixels", limit, "--json")
        assert result.exit_code == 1 and "2 of 5 images failed" in result.stderr
        for number in (3, 4):
            size = f"{40 + number} x 50 pixels exceed the limit of 2,100; raise it with --max-pixels"
            assert f"{images}/{number}.png: {size}" in result.stderr
        assert siglip(*command, "--max-pixels", 0).exit_code == 2
    assert len(load_embeddings(out).files) == 3
