"""Files of Hugging Face repositories."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

ERRORS = (HfHubHTTPError, OSError)  # what `find` raises; the first line says what happened


def find(repository, file, kind="model"):
    """The path of a file of a "model" or "dataset": in the cache, where what is there is not looked up again, or else
    downloaded into it."""
    try:
        return Path(hf_hub_download(repository, file, repo_type=kind, local_files_only=True))
    except LocalEntryNotFoundError:
        return Path(hf_hub_download(repository, file, repo_type=kind))
