"""Files of Hugging Face repositories."""

import functools
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

ERRORS = (HfHubHTTPError, OSError)  # what `find` raises; the first line says what happened
PATIENCE = 5.0  # seconds in which the hub has to answer at all


def find(repository, file, kind="model"):
    """The path of a file of a "model" or "dataset": in the cache, where what is there is not looked up again, or else
    downloaded into it."""
    try:
        return Path(hf_hub_download(repository, file, repo_type=kind, local_files_only=True))
    except LocalEntryNotFoundError:
        settle()
        return Path(hf_hub_download(repository, file, repo_type=kind))


@functools.cache
def settle():
    """Asks once whether there is a hub. Where there is none the hub's own client, and with it transformers and
    diffusers, is told that it is offline: it would try five times, for half a minute, for every file."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of whichever client it has
        constants.HF_HUB_OFFLINE = True
