"""Resolving a checkpoint's files, in a directory or in a repository of the Hugging Face Hub."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from siglip_model.checkpoints.commit import current_file

# One or two parts ("gpt2", "google/siglip-base-patch16-224") of letters, digits, "_", "-" and ".", as the Hub allows.
_REPOSITORY_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")

# huggingface_hub retries a connection for 20 s. After a failure the cache alone is used for a while, so that the other
# files of the checkpoint do not wait again.
_SECONDS_BETWEEN_ATTEMPTS = 60.0
_last_failure = -_SECONDS_BETWEEN_ATTEMPTS


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
) -> Path | None:
    """The path of one file of a directory or Hub repository; None if that directory or repository lacks the file.

    A repository's file is downloaded once into huggingface_hub's cache (``HF_HOME``, ``cache_dir``). With
    ``local_files_only`` or ``HF_HUB_OFFLINE=1``, and for a minute after a connection failed, only the cache is read.

    Raises:
        OSError: no such directory, repository or revision; or no network and nothing in the cache.
        TypeError: the argument is neither a str nor a PathLike.
    """
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise TypeError(f"expected a directory or a Hub id, as str or PathLike; got {type(path_or_id).__name__}")
    if is_local(path_or_id):
        directory = Path(path_or_id).expanduser()
        if directory.is_dir():
            return current_file(directory, filename)
        if directory.exists():
            raise OSError(f"{directory} is a file; give the directory that holds it")
        raise OSError(f"there is no directory {directory}")
    repository = os.fspath(path_or_id)
    if not _REPOSITORY_ID.fullmatch(repository):
        raise OSError(f"{path_or_id!r} is neither an existing directory nor a Hub id such as 'owner/name'")
    return _resolve_on_hub(repository, filename, revision, cache_dir, local_files_only, token)


def _resolve_on_hub(
    repository: str,
    filename: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path | None:
    global _last_failure
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    local_files_only = local_files_only or time.monotonic() - _last_failure < _SECONDS_BETWEEN_ATTEMPTS
    cache = None if cache_dir is None else os.path.expanduser(cache_dir)
    try:
        with _without_retry_warnings():  # one error below reports their outcome
            return Path(
                hf_hub_download(
                    repository,
                    filename,
                    revision=revision,
                    cache_dir=cache,
                    local_files_only=local_files_only,
                    token=token,
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
    """Raises OSError with one sentence per way in which the Hub can fail."""
    from huggingface_hub import errors

    where = repository if revision is None else f"{repository} (revision {revision})"
    if isinstance(error, errors.GatedRepoError):
        message = f"the hub repository {where} is gated: ask for access on its page, then log in with `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = (
            f"{repository!r} is neither an existing directory nor a hub repository that can be read; "
            "if it is private, give token= or log in with `hf auth login`"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"the hub repository {repository} has no revision {revision!r}"
    elif isinstance(error, errors.HFValidationError):
        message = f"{repository!r} is neither an existing directory nor a Hub id such as 'owner/name'"
    elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) or _is_network_error(error):
        message = (
            f"{repository!r} is not an existing directory, and {filename} of the hub repository {where} is neither "
            f"cached nor reachable without a network: run `hf download {repository}` with a network, or pass the "
            "directory of a downloaded checkpoint"
        )
    else:
        message = f"could not get {filename} of the hub repository {where}: {type(error).__name__}: {error}"
    raise OSError(message) from error


def _is_network_error(error: Exception) -> bool:
    """Connection, proxy and time-out errors, whichever HTTP library the installed huggingface_hub uses."""
    network_errors = {"ConnectionError", "ProxyError", "ConnectError", "TransportError", "Timeout", "TimeoutException"}
    return any(base.__name__ in network_errors for base in type(error).__mro__)


HUB_ARGUMENTS = ("revision", "cache_dir", "local_files_only", "token")
