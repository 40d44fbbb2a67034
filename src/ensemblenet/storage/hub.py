"""Saved models that lie elsewhere: on the Hugging Face Hub, and runs and models in a bucket.

Safetensors, JSON and a card go to the Hub, and nothing else comes back.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from ensemblenet.errors import LoadError
from ensemblenet.extras import require
from ensemblenet.storage.bucket import is_address

__all__ = ["PREFIX", "download", "local_folder", "upload"]

PREFIX = "hf://"

_FILES = ["*.safetensors", "*.json", "README.md"]  # no pickles, no code
_ADDRESS = re.compile(re.escape(PREFIX) + r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def local_folder(directory: str | os.PathLike[str]) -> Path:
    """A directory on this machine, downloaded if it is an address such as `hf://owner/name` or `s3://bucket/run`.

    Raises:
        LoadError: there is nothing at the address, or the hub cannot be reached.
        DataError: a bucket cannot be read.
    """
    if not isinstance(directory, str) or not is_address(directory):
        return Path(directory)
    if directory.startswith(PREFIX):
        return download(directory)
    from ensemblenet.data.remote import checked_place, find_below, folder_of

    url = str(checked_place(directory)).rstrip("/")
    files = {name: file for name, file in find_below(url).items() if _is_of_model(PurePosixPath(name))}
    if not files:
        raise LoadError(f"{url} holds no saved model: there is no such folder in the bucket.")
    name = PurePosixPath(url).name
    return folder_of({f"{name}/{inner}": file for inner, file in files.items()}) / name


def _is_of_model(name: PurePosixPath) -> bool:
    """Whether a file of a run or saved model is of use when the run is over."""
    is_kept = name.suffix in (".safetensors", ".json", ".yaml", ".csv")
    return is_kept and name.parts[0] in (name.name, "model", "csv")  # no checkpoints and logs of other programs


def download(address: str) -> Path:
    """Fetch a model's files into the hub's cache, or find them there.

    Args:
        address: `hf://owner/name`, or `hf://owner/name@revision` for one branch, tag or commit.

    Returns:
        The folder that holds them.

    Raises:
        LoadError: no such address, no such repository, or no connection.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise LoadError(f"An address on the hub is hf://owner/name or hf://owner/name@revision, got {address!r}.")
    hub = _library()
    try:
        return Path(hub.snapshot_download(match["repo"], revision=match["revision"], allow_patterns=_FILES))
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        raise LoadError(f"{address} cannot be fetched: {error}") from error


def upload(folder: Path, repo_id: str, private: bool, message: str) -> str:
    """Put a folder's files into a repository, which is created if it does not exist.

    Returns:
        The address to load it by.

    Raises:
        LoadError: the hub refuses, or there is no connection.
    """
    address = PREFIX + repo_id
    if _ADDRESS.fullmatch(address) is None or "@" in repo_id:
        raise LoadError(f"A repository is named owner/name, got {repo_id!r}.")
    hub = _library()
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=_FILES, commit_message=message)
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        raise LoadError(
            f"{repo_id} cannot be written: {error}. Is there a token? `hf auth login` asks for one."
        ) from error
    return address


def _library() -> Any:
    require("hub")
    import huggingface_hub

    return huggingface_hub
