"""A Hub that does not answer is an error within seconds, and a name that looks like a path is said to."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from siglip_model.checkpoints import hub
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.checkpoints.hub import resolve_file


@pytest.fixture(autouse=True)
def never_asked(monkeypatch):
    monkeypatch.setattr(hub, "_last_failure", -1e9)
    monkeypatch.setattr(hub, "_last_answer", -1e9)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)


@contextmanager
def server(answer):
    """A server on this machine; `answer(connection)` runs for each connection. Yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections = []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=_answer, args=(answer, connection), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
        for connection in connections:
            connection.close()


def _answer(answer, connection):
    with suppress(OSError):  # the client, or the test, has closed it
        answer(connection)


def silence(connection):
    connection.recv(1)
    time.sleep(30)


def byte_by_byte(connection):
    connection.recv(65536)
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 300:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def status(line, *headers):
    def answer(connection):
        connection.recv(65536)
        text = "\r\n".join([f"HTTP/1.1 {line}", *headers, "Content-Length: 0", "Connection: close", "", ""])
        connection.sendall(text.encode())

    return answer


@contextmanager
def hub_at(monkeypatch, url, seconds=0.4):
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *arguments, **options: f"{url}/config.json")
    monkeypatch.setattr(hub, "_SECONDS_TO_ANSWER", seconds)

    def download(*arguments, local_files_only, **options):
        assert local_files_only, "a Hub that does not answer was used"
        raise errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds + 2.0


@pytest.mark.parametrize("answer, reason", [(silence, "Timeout"), (byte_by_byte, "Timeout")])
def test_hub_that_does_not_answer(monkeypatch, tmp_path, answer, reason):
    with server(answer) as url, hub_at(monkeypatch, url), pytest.raises(CheckpointError) as caught:
        resolve_file("owner/name", "config.json", cache_dir=tmp_path)
    assert reason in str(caught.value) and "owner/name" in str(caught.value) and "\n" not in str(caught.value)


def test_address_that_leads_nowhere(monkeypatch, tmp_path):
    """192.0.2.0/24 is reserved for documentation (RFC 5737)."""
    with hub_at(monkeypatch, "http://192.0.2.1"), pytest.raises(CheckpointError, match="owner/name"):
        resolve_file("owner/name", "config.json", cache_dir=tmp_path)


def test_refused_connection(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with hub_at(monkeypatch, f"http://127.0.0.1:{port}"), pytest.raises(CheckpointError, match="nor reachable"):
        resolve_file("owner/name", "config.json", cache_dir=tmp_path)


@pytest.mark.parametrize("line", ["429 Too Many Requests", "500 Oops", "502 Bad Gateway", "503 Service Unavailable"])
def test_hub_that_is_unavailable(monkeypatch, tmp_path, line):
    with server(status(line)) as url, hub_at(monkeypatch, url), pytest.raises(CheckpointError) as caught:
        resolve_file("owner/name", "config.json", cache_dir=tmp_path)
    assert line[:3] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["200 OK", "401 Unauthorized", "404 Not Found"])
def test_any_other_answer_is_the_hub(monkeypatch, tmp_path, line):
    asked = []

    def download(*arguments, **options):
        asked.append(options["local_files_only"])
        raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)

    with server(status(line)) as url, hub_at(monkeypatch, url, seconds=5):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="nor a hub repository that can be read"):
                resolve_file("owner/name", "config.json", cache_dir=tmp_path)
    assert asked == [False, False] and time.monotonic() - hub._last_answer < 60


def test_cached_files_are_used_without_an_answer(monkeypatch, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    with server(silence) as url, hub_at(monkeypatch, url):
        assert resolve_file("owner/name", "config.json", cache_dir=tmp_path) == snapshot / "config.json"
    start = time.monotonic()  # the next file, and one of a commit, which never changes: without waiting
    assert resolve_file("owner/name", "absent.json", cache_dir=tmp_path) is None
    monkeypatch.setattr(hub, "_last_failure", -1e9)
    assert resolve_file("owner/name", "config.json", cache_dir=tmp_path, revision=commit) == snapshot / "config.json"
    assert time.monotonic() - start < 0.3


def test_huggingface_hubs_variable_waits_longer(monkeypatch):
    assert hub._seconds_to_answer() == hub._SECONDS_TO_ANSWER
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 30)
    assert hub._seconds_to_answer() == 30


@pytest.mark.parametrize("terminal", [True, False])
def test_waiting_is_shown_on_a_terminal_alone(monkeypatch, tmp_path, capsys, terminal):
    with server(silence) as url, hub_at(monkeypatch, url, seconds=0.8):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        with pytest.raises(CheckpointError):
            resolve_file("owner/name", "config.json", cache_dir=tmp_path)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == terminal * (
        "waiting for the Hugging Face Hub to find owner/name (at most 0.8 s, or as many as HF_HUB_ETAG_TIMEOUT says) "
        "...\n"
    )


def test_a_new_process_waits_two_and_a_half_seconds_at_most(tmp_path):
    """With nothing replaced. Beyond a process that does not ask, whose time is the machine's; the quickest of three."""
    code = "from siglip_model.checkpoints.hub import resolve_file; resolve_file('owner/name', 'config.json')"

    def seconds(**variables: str) -> tuple[float, str]:
        environment = {**os.environ, "HF_HOME": str(tmp_path), **variables}
        start = time.monotonic()
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        return time.monotonic() - start, run.stderr

    with server(silence) as url:
        offline, _ = min(seconds(HF_HUB_OFFLINE="1") for _ in range(3))
        waiting, shown = min(seconds(HF_ENDPOINT=url) for _ in range(3))
    assert waiting - offline < 2.5
    assert "CheckpointError: 'owner/name' is not an existing directory" in shown
    assert "waiting for" not in shown  # no terminal


@pytest.mark.parametrize(
    "name, hint",
    [
        ("a/b/c", "it looks like a path: it has more than one slash"),
        ("runs/checkpoint.safetensors", "it looks like a path: it ends like a file"),
        ("model.safetensors", "it ends like a file, and a checkpoint is the directory that holds it"),
        ("./runs/chekpoint", "there is no directory runs/chekpoint; there is a directory runs/checkpoint"),
        ("./run", "there is no directory run; there is a directory runs"),
        ("runs/checkpoint/", None),
        ("runs/chekpoint/", "the directory runs exists and has no chekpoint; there is a directory runs/checkpoint"),
        (Path("runs/chekpoint"), "there is a directory runs/checkpoint"),
        ("~no-such-user/such", "there is no directory ~no-such-user/such"),
        ("/" + "long" * 1000, "there is no directory /longlong"),
    ],
)
def test_names_that_look_like_a_path(tmp_path, monkeypatch, name, hint):
    (tmp_path / "runs" / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_resolve_on_hub", lambda *arguments: pytest.fail("the hub was asked"))
    if hint is None:
        assert resolve_file(name, "config.json") is None
        return
    with pytest.raises(CheckpointError) as caught:
        resolve_file(name, "config.json")
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("runs/chekpoint", "it looks like a path: the directory runs exists and has no chekpoint"),
        ("runs/chekpoint", "there is a directory runs/checkpoint"),
        ("rnus", "there is a directory runs"),
    ],
)
@pytest.mark.parametrize("error", [ConnectionError, errors.RepositoryNotFoundError])
def test_names_that_may_be_either(tmp_path, monkeypatch, name, hint, error):
    """The Hub is asked, and if it has no such repository the error says what else was perhaps meant."""
    (tmp_path / "runs" / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_last_answer", time.monotonic())

    def download(*arguments, **options):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError) as caught:
        resolve_file(name, "config.json", cache_dir=tmp_path / "cache")
    assert hint in str(caught.value)
