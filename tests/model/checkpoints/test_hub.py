"""Finding a checkpoint's files in directories and in huggingface_hub's cache, and the errors if they are missing."""

import os
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from siglip_model.checkpoints import hub
from siglip_model.checkpoints.atomic import atomic_write
from siglip_model.checkpoints.hub import resolve_file


@pytest.fixture(autouse=True)
def answering_hub(monkeypatch):
    """No earlier failure, and a Hub that answered just now: what it answers is up to each test."""
    monkeypatch.setattr(hub, "_last_failure", -1e9)
    monkeypatch.setattr(hub, "_last_answer", time.monotonic())


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the hub was asked for {args}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.fixture
def cache(tmp_path):
    """A cache in which one commit of owner/name has config.json, and nothing else is known."""
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    return tmp_path / "cache"


@pytest.mark.parametrize("as_type", [str, Path])
def test_file_of_a_directory(tmp_path, no_hub, as_type):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "folder.json").mkdir()
    assert resolve_file(as_type(tmp_path), "config.json") == tmp_path / "config.json"
    assert resolve_file(as_type(tmp_path), "absent.json") is None
    assert resolve_file(as_type(tmp_path), "folder.json") is None


def test_relative_directory_that_looks_like_a_hub_id(tmp_path, monkeypatch, no_hub):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_file("owner/name", "config.json") == Path("owner/name/config.json")


@pytest.mark.parametrize(
    "path",
    ["/no/such", "./no", "../no", "~/no-such-directory", ".", "a/b/c", "", "two words", "a\\b", "-a", Path("a/b")],
)
def test_paths_are_never_sent_to_the_hub(tmp_path, monkeypatch, no_hub, path):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if path == ".":
        assert resolve_file(path, "config.json") is None
        return
    with pytest.raises(OSError, match=r"there is no directory|neither an existing directory nor a Hub id"):
        resolve_file(path, "config.json")


def test_file_instead_of_directory(tmp_path, no_hub):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="is a file; give the directory"):
        resolve_file(tmp_path / "model.safetensors", "config.json")


def test_wrong_type():
    with pytest.raises(TypeError, match="got int"):
        resolve_file(3, "config.json")


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_cached_repository_without_network(cache, revision):
    arguments = {"cache_dir": cache, "local_files_only": True, "revision": revision}
    found = resolve_file("owner/name", "config.json", **arguments)
    assert found is not None and found.read_text() == "{}"
    assert resolve_file("owner/name", "preprocessor_config.json", **arguments) is None


def test_offline_mode_of_huggingface_hub(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_file("owner/name", "config.json", cache_dir=cache) is not None
    with pytest.raises(OSError, match="neither cached nor reachable without a network: run `hf download owner/other`"):
        resolve_file("owner/other", "config.json", cache_dir=cache)


def test_uncached_revision_is_not_replaced_by_another(cache):
    with pytest.raises(OSError, match=r"owner/name \(revision v2\) is neither cached"):
        resolve_file("owner/name", "config.json", cache_dir=cache, local_files_only=True, revision="v2")


def test_file_that_the_hub_does_not_have(monkeypatch):
    error = (
        errors.RemoteEntryNotFoundError if hasattr(errors, "RemoteEntryNotFoundError") else errors.EntryNotFoundError
    )
    _fail_with(monkeypatch, error)
    assert resolve_file("owner/name", "config.json") is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError, "nor a hub repository that can be read"),
        (errors.GatedRepoError, "is gated"),
        (errors.RevisionNotFoundError, "no revision 'v3'"),
        (errors.OfflineModeIsEnabled, "hf download"),
        (ConnectionError, "hf download"),
        (RuntimeError, "RuntimeError"),
    ],
)
def test_each_failure_of_the_hub_is_one_sentence(tmp_path, monkeypatch, error, message):
    _fail_with(monkeypatch, error)
    with pytest.raises(OSError, match=message) as caught:
        resolve_file("owner/name", "config.json", cache_dir=tmp_path, revision="v3")
    assert "\n" not in str(caught.value) and "owner/name" in str(caught.value)


def test_cache_serves_when_the_connection_fails(cache, monkeypatch):
    _fail_with(monkeypatch, ConnectionError)
    found = resolve_file("owner/name", "config.json", cache_dir=cache)
    assert found is not None and found.read_text() == "{}"


def test_failed_connection_is_not_tried_again_for_each_file(cache, monkeypatch):
    asked = []

    def download(*args, local_files_only, **kwargs):
        asked.append(local_files_only)
        raise errors.LocalEntryNotFoundError("not cached") if local_files_only else ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for _ in range(3):
        assert resolve_file("owner/name", "absent.json", cache_dir=cache) is None
    assert asked == [False, True, True]
    monkeypatch.setattr(hub, "_last_failure", hub._last_failure - 61)
    resolve_file("owner/name", "absent.json", cache_dir=cache)
    assert asked[3:] == [False]


def _fail_with(monkeypatch, error):
    def download(*args, **kwargs):
        raise error.__new__(error)  # huggingface_hub's errors require an HTTP response

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_atomic_write(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    assert path.read_bytes() == b"old"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    path.chmod(0o640)
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o640


def test_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("subfolder", ["part/model", "/part/model/", None, ""])
def test_subfolder_of_a_repository(cache, subfolder):
    folder = next((cache / "models--owner--name/snapshots").iterdir())
    (folder / "part/model").mkdir(parents=True)
    (folder / "part/model/config.json").write_text("part")
    found = resolve_file("owner/name", "config.json", cache_dir=cache, local_files_only=True, subfolder=subfolder)
    assert found.read_text() == ("part" if subfolder else "{}")


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_forced_download(cache, monkeypatch, revision):
    """The Hub is asked although the file is cached, and no cached file stands in for what it does not send."""
    asked = []

    def download(repository, filename, **arguments):
        asked.append((filename, arguments["force_download"], arguments["local_files_only"]))
        if len(asked) > 1:
            raise ConnectionError("the cable")
        return cache / "new.json"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    arguments = {"cache_dir": cache, "revision": revision, "force_download": True}
    monkeypatch.setattr(hub, "_last_failure", time.monotonic())  # which would leave it to the cache
    assert resolve_file("owner/name", "config.json", **arguments) == cache / "new.json"
    with pytest.raises(OSError, match="nor reachable without a network.*the cable"):
        resolve_file("owner/name", "config.json", **arguments)
    assert asked == [("config.json", True, False)] * 2
