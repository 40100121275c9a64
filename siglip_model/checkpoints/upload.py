"""Uploading saved files to the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILES = ("config.json", "model*.safetensors", "model.safetensors.index*.json")


def save_and_upload(save: Callable[[str], Any], repo_id: str, **upload_arguments: Any) -> Any:
    """Upload the files that `save(folder)` writes into a temporary folder. Returns and raises as `upload`."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return upload(folder, os.listdir(folder), repo_id=repo_id, **upload_arguments)


def check_upload_arguments(push_to_hub: bool, upload_arguments: Mapping[str, Any]) -> None:
    """Raises TypeError, naming one, for further arguments of a `save_pretrained` that uploads nothing."""
    if upload_arguments and not push_to_hub:
        raise TypeError(f"save_pretrained got an unexpected keyword argument {next(iter(upload_arguments))!r}")


def upload(
    directory: str | os.PathLike[str],
    patterns: tuple[str, ...] | list[str],
    *,
    repo_id: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Commit the directory's files of these names or patterns to a repository, created if it does not exist.

    repo_id: by default the directory's name, in the user's namespace. Other arguments: as in huggingface_hub; revision
    is a branch, created if it does not exist. Returns huggingface_hub's CommitInfo. Raises its errors.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repository = api.create_repo(
        repo_id or Path(directory).expanduser().resolve().name, private=private, exist_ok=True
    ).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repository, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repository,
        folder_path=os.fspath(directory),
        allow_patterns=list(patterns),
        commit_message=commit_message or "Upload SigLIP",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
