"""Resolving a checkpoint's files, in a directory or in a repository of the Hugging Face Hub."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NoReturn

from siglip_kernels.errors import unsupported
from siglip_model.checkpoints.commit import current_file
from siglip_model.checkpoints.errors import CheckpointError

# One or two parts ("gpt2", "google/siglip-base-patch16-224") of letters, digits, "_", "-" and ".", as the Hub allows.
_REPOSITORY_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_FILE_SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".model")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# huggingface_hub retries a connection for 20 s and more. Here the Hub is asked once whether it answers; afterwards,
# for a while, it is used without asking or, if it did not answer, the cache alone is used.
_SECONDS_TO_ANSWER = 2.0
_SECONDS_BETWEEN_ATTEMPTS = 60.0
_last_failure = _last_answer = -_SECONDS_BETWEEN_ATTEMPTS


def is_local(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether the argument is a path. The Hub is then not queried, even if the path does not exist."""
    if isinstance(path_or_id, os.PathLike):
        return True
    if path_or_id.startswith((".", "~", os.sep)) or "\\" in path_or_id or Path(path_or_id).is_absolute():
        return True
    return os.path.exists(path_or_id)


def resolve_file(
    path_or_id: str | os.PathLike[str],
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    subfolder: str | None = None,
    force_download: bool = False,
    proxies: None = None,
) -> Path | None:
    """The path of one file of a directory or Hub repository; None if that directory or repository lacks the file.

    A repository's file is downloaded once into huggingface_hub's cache (``HF_HOME``, ``cache_dir``). With
    ``local_files_only`` or ``HF_HUB_OFFLINE=1``, and for a minute after a connection failed, only the cache is read.
    The Hub has 2 seconds to answer, or as many as ``HF_HUB_ETAG_TIMEOUT`` says; on a terminal, stderr says so.

    Args:
        path_or_id: a directory or a Hub id.
        filename: in it, or in its ``subfolder``.
        revision, cache_dir, token: as in huggingface_hub.
        force_download: download the file again even if it is cached. No cached file stands in for it.

    Raises:
        CheckpointError: no such directory, repository or revision; or no network and nothing in the cache.
        TypeError: the argument is neither a str nor a PathLike.
        ValueError: proxies (see the message), or force_download without the Hub.
    """
    if proxies:
        raise unsupported("loading", "proxies", f"is {proxies!r}", "None: set HTTP_PROXY and HTTPS_PROXY instead")
    if force_download and local_files_only:
        raise unsupported("loading", "force_download", "is True, as is local_files_only", "one of both")
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise TypeError(f"expected a directory or a Hub id, as str or PathLike; got {type(path_or_id).__name__}")
    if is_local(path_or_id):
        directory = Path(os.path.expanduser(path_or_id), subfolder or "")
        if os.path.isdir(directory):
            return current_file(directory, filename)
        if os.path.exists(directory):
            raise CheckpointError(f"{directory} is a file; give the directory that holds it")
        raise CheckpointError(f"there is no directory {directory}{_similar_directory(str(directory))}")
    repository = os.fspath(path_or_id)
    if not _REPOSITORY_ID.fullmatch(repository) or repository.endswith(_FILE_SUFFIXES):
        raise CheckpointError(
            f"{repository!r} is neither an existing directory nor a Hub id such as 'owner/name'{_path_hint(repository)}"
        )
    if subfolder:
        filename = f"{subfolder.strip('/')}/{filename}"
    return _resolve_on_hub(repository, filename, revision, cache_dir, local_files_only, token, force_download)


def _path_hint(name: str) -> str:
    """Why a name that may be a Hub id looks like a path, and the directory that was perhaps meant; else empty."""
    parent, _, last = name.rstrip("/").rpartition("/")
    signs = []
    if name.endswith(_FILE_SUFFIXES):
        signs.append("it ends like a file, and a checkpoint is the directory that holds it")
    elif name.count("/") > 1:
        signs.append("it has more than one slash")
    if parent and os.path.isdir(parent):
        signs.append(f"the directory {parent} exists and has no {last}")
    return (f"; it looks like a path: {', '.join(signs)}" if signs else "") + _similar_directory(name)


def _similar_directory(name: str) -> str:
    """The directory whose name is most similar, or nothing."""
    parent, last = os.path.split(name.rstrip(os.sep))
    try:
        with os.scandir(parent or ".") as entries:
            beside = [entry.name for entry in islice(entries, 1000) if entry.is_dir()]
    except OSError:
        return ""
    similar = difflib.get_close_matches(last, beside, n=1)
    return f"; there is a directory {os.path.join(parent, similar[0])}" if similar else ""


def checkpoint_within(path_or_id: str | os.PathLike[str]) -> str:
    """For an error: the checkpoint that a directory without one holds, as a run's does in model/; or nothing."""
    directory = os.path.expanduser(path_or_id)
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in islice(entries, 1000) if entry.is_dir())
    except OSError:  # of a Hub id
        return ""
    found = (path for name in names if os.path.isfile((path := os.path.join(directory, name)) + "/config.json"))
    return next((f"; there is a checkpoint in {path}" for path in found), "")


def _resolve_on_hub(
    repository: str,
    filename: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
    force_download: bool,
) -> Path | None:
    global _last_failure
    from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cache = None if cache_dir is None else os.path.expanduser(cache_dir)
    if revision is not None and _COMMIT.fullmatch(revision) and not force_download:  # never changes
        cached = try_to_load_from_cache(repository, filename, cache_dir=cache, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    failed_before = time.monotonic() - _last_failure < _SECONDS_BETWEEN_ATTEMPTS
    local_files_only = not force_download and (local_files_only or constants.HF_HUB_OFFLINE or failed_before)
    try:
        if not local_files_only:
            _require_answer(repository, filename, revision, token)
        with _without_retry_warnings():  # one error below reports their outcome
            return Path(
                hf_hub_download(
                    repository,
                    filename,
                    revision=revision,
                    cache_dir=cache,
                    local_files_only=local_files_only,
                    token=token,
                    etag_timeout=_seconds_to_answer(),
                    force_download=force_download,
                )
            )
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            return None  # the Hub answered: the repository has no such file
        download_error: Exception = error
    except Exception as error:  # requests', httpx' and huggingface_hub's errors have no common base
        download_error = error

    no_connection = isinstance(download_error, LocalEntryNotFoundError) or _is_network_error(download_error)
    if no_connection and not local_files_only:
        _last_failure = time.monotonic()
    if force_download:
        _raise_clearly(download_error, repository, filename, revision)
    # No answer from the Hub: look into the cache.
    try:
        cached = try_to_load_from_cache(repository, filename, cache_dir=cache, revision=revision)
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None  # else: known not to exist in the repository
        snapshot_download(
            repository, revision=revision, cache_dir=cache, local_files_only=True, allow_patterns=[filename]
        )
        if no_connection:
            return None  # the repository is cached, and the cache knows no such file
    except Exception:  # the file is not cached: the first error is the cause
        _raise_clearly(download_error, repository, filename, revision)
    _raise_clearly(download_error, repository, filename, revision)


def _seconds_to_answer() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else _SECONDS_TO_ANSWER


def _require_answer(repository: str, filename: str, revision: str | None, token: str | bool | None) -> None:
    """Raises the network's error, the server's, or TimeoutError if the Hub does not answer in time."""
    global _last_answer
    if time.monotonic() - _last_answer < _SECONDS_BETWEEN_ATTEMPTS:
        return
    seconds = _seconds_to_answer()
    errors: list[Exception] = []
    # In a thread, because no timeout of an HTTP library covers the resolution of names, or an answer byte by byte.
    asking = threading.Thread(
        target=_ask, args=(repository, filename, revision, token, seconds, errors), daemon=True, name="ask_hub"
    )
    asking.start()
    asking.join(min(0.5, seconds))
    if asking.is_alive() and sys.stderr is not None and sys.stderr.isatty():
        limit = f"at most {seconds:g} s, or as many as HF_HUB_ETAG_TIMEOUT says"
        print(f"waiting for the Hugging Face Hub to find {repository} ({limit}) ...", file=sys.stderr, flush=True)
    asking.join(max(0.0, seconds - 0.5))
    if asking.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s; HF_HUB_ETAG_TIMEOUT=30 waits for 30 s")
    if errors:
        raise errors[0]
    _last_answer = time.monotonic()


def _ask(
    repository: str,
    filename: str,
    revision: str | None,
    token: str | bool | None,
    seconds: float,
    errors: list[Exception],
) -> None:
    """Appends the error of a Hub that does not answer, or answers that it is unavailable."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), token=token, timeout=seconds)
    except Exception as error:  # any other error is an answer, which the download repeats
        if _is_network_error(error) or _status(error) in (429, 500, 502, 503, 504):
            errors.append(error)


def _status(error: Exception) -> int | None:
    """The HTTP status of an error of huggingface_hub."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def _without_retry_warnings() -> Iterator[None]:
    http = logging.getLogger("huggingface_hub.utils._http")
    level = http.level
    http.setLevel(logging.ERROR)
    try:
        yield
    finally:
        http.setLevel(level)


def _raise_clearly(error: Exception, repository: str, filename: str, revision: str | None) -> NoReturn:
    """Raises CheckpointError with one sentence per way in which the Hub can fail."""
    from huggingface_hub import errors

    where = repository if revision is None else f"{repository} (revision {revision})"
    if isinstance(error, errors.GatedRepoError):
        message = f"the hub repository {where} is gated: ask for access on its page, then log in with `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = (
            f"{repository!r} is neither an existing directory nor a hub repository that can be read; "
            f"if it is private, give token= or log in with `hf auth login`{_path_hint(repository)}"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"the hub repository {repository} has no revision {revision!r}"
    elif isinstance(error, errors.HFValidationError):
        message = f"{repository!r} is neither an existing directory nor a Hub id such as 'owner/name'"
    elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) or _is_network_error(error):
        message = (
            f"{repository!r} is not an existing directory, and {filename} of the hub repository {where} is neither "
            f"cached nor reachable without a network: run `hf download {repository}` with a network, or pass the "
            f"directory of a downloaded checkpoint, and check the name{_network_reason(error)}{_path_hint(repository)}"
        )
    else:
        message = f"could not get {filename} of the hub repository {where}: {type(error).__name__}: {error}"
    raise CheckpointError(" ".join(message.split())) from error


def _network_reason(error: Exception) -> str:
    return f" ({type(error).__name__}: {error})" if _is_network_error(error) and str(error) else ""


def _is_network_error(error: Exception) -> bool:
    """Connection, proxy and time-out errors, whichever HTTP library the installed huggingface_hub uses."""
    network_errors = {"ConnectionError", "ProxyError", "ConnectError", "TransportError", "Timeout", "TimeoutException",
                      "TimeoutError"}  # fmt: skip
    return any(base.__name__ in network_errors for base in type(error).__mro__)


HUB_ARGUMENTS = ("revision", "cache_dir", "local_files_only", "token", "subfolder", "force_download", "proxies")
