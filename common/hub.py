"""Files of Hugging Face repositories."""

import functools
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from common.errors import InputError, text

ERRORS = (HfHubHTTPError, OSError)  # what `find` raises; the first line says what happened
PATIENCE = 5.0  # seconds in which the hub has to answer at all


def find(repository: str, file: str, kind: Literal["model", "dataset"] = "model") -> Path:
    """The path of a file of OWNER/NAME: in the cache, where what is there is not looked up again,
    or else downloaded into it. Raises ERRORS, and ValueError for an id that is none."""
    try:
        return Path(hf_hub_download(repository, file, repo_type=kind, local_files_only=True))
    except LocalEntryNotFoundError:
        settle()
        return Path(hf_hub_download(repository, file, repo_type=kind))


@functools.cache
def settle() -> None:
    """Asks once whether there is a hub. Where there is none the hub's own client, and with it
    transformers and diffusers, is told that it is offline: it would try five times, for half a
    minute, for every file."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of whichever client it has
        constants.HF_HUB_OFFLINE = True


def check_push(repository: str) -> None:
    """Before any work: raises InputError where `push` cannot work, by the name OWNER/NAME or the
    token."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        owner, _, name = repository.partition("/")
        if not (owner and name):
            raise InputError(f"--push-to-hub {repository}: write OWNER/NAME")
        HfApi().whoami()
    except InputError:
        raise
    except (
        Exception
    ) as error:  # no name, no token, a wrong one, no network: whatever the client makes of it
        raise InputError(
            f"--push-to-hub {repository}: the hub does not take it ({text(error):.200}); run `hf "
            "auth login`, or push "
            f"the export later: `hf upload {repository} RUN/export`"
        ) from None


def push(repository: str, folder: str | Path) -> str:
    """A folder into a repository of the hub, which is private where it is new; returns its address.
    Raises what the hub's client does."""
    from huggingface_hub import HfApi

    address = HfApi().create_repo(repository, private=True, exist_ok=True)
    HfApi().upload_folder(
        repo_id=repository, folder_path=folder, commit_message="Trained with vgrpo"
    )
    return address
