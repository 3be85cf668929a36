"""Download files from Hugging Face repositories, and upload a folder to one."""

import functools
from pathlib import Path
from typing import Literal

from common import errors
from common.errors import InputError

PATIENCE = 5.0  # seconds in which the hub has to answer at all


def find(repository: str, file: str, kind: Literal["model", "dataset"] = "model") -> Path:
    """Return the path of a file of OWNER/NAME in the cache, after a download if necessary.

    A cached file is used without asking the hub. Raises OSError, and ValueError for a wrong id.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, repo_type=kind, local_files_only=True))
    except LocalEntryNotFoundError:
        settle()
        return Path(hf_hub_download(repository, file, repo_type=kind))


@functools.cache
def settle() -> None:
    """Check once whether the hub answers; if it does not, set its client to offline.

    Otherwise the client, and so transformers and diffusers, would try five times for every file,
    half a minute long.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of whichever HTTP library the client uses
        constants.HF_HUB_OFFLINE = True


def check_push(repository: str) -> None:
    """Raise InputError if `push` cannot work: a name that is not OWNER/NAME, or no valid token."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    if not all(repository.partition("/")):
        raise InputError(f"--push-to-hub {repository}: it is not a repository. Write OWNER/NAME.")
    do = f"run `hf auth login`, or push later: `hf upload {repository} RUN/export`"
    with errors.loading("--push-to-hub", repository, do=do):
        validate_repo_id(repository)
        HfApi().whoami()


def push(repository: str, folder: str | Path) -> str:
    """Upload a folder to a repository of the hub and return its address.

    A new repository is private. Raises any exception of the hub's client.
    """
    from huggingface_hub import HfApi

    address = HfApi().create_repo(repository, private=True, exist_ok=True)
    HfApi().upload_folder(
        repo_id=repository, folder_path=folder, commit_message="Trained with vgrpo"
    )
    return address
