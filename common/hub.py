"""Download files from Hugging Face repositories, and upload a folder to one."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common import errors
from common.errors import InputError, SetupError

PATIENCE = 5.0  # seconds in which the hub has to answer at all
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the first one that is set counts


class NoSuchFile(OSError):
    """The hub has the repository, and not the file."""


def find(repository: str, file: str, kind: Literal["model", "dataset"] = "model") -> Path:
    """Return the path of a file of OWNER/NAME in the cache, after a download if necessary.

    A cached file is used without asking the hub. Raises OSError, ValueError for a wrong id,
    NoSuchFile if the hub has the repository and not the file, and SetupError.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, repo_type=kind, local_files_only=True))
    except LocalEntryNotFoundError:
        settle()
        try:
            return Path(hf_hub_download(repository, file, repo_type=kind))
        except LocalEntryNotFoundError as error:
            why = settle() or f"{constants.ENDPOINT} does not answer"
            raise OSError(f"{why}, and {constants.HF_HUB_CACHE} does not have {file}") from error
        except EntryNotFoundError as error:
            raise NoSuchFile(errors.text(error)) from error


@functools.cache
def settle() -> str:
    """Check once whether the hub answers; if it does not, set its client to offline.

    Otherwise the client, and so transformers and diffusers, would try five times for every file,
    half a minute long. Returns why the hub cannot be asked, "" if it answers. Raises SetupError for
    an address, a token or a proxy that the client cannot use.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return f"{' and '.join(filter(os.environ.get, OFFLINE)) or 'HF_HUB_OFFLINE'} is set"
    _check_address(constants.ENDPOINT)
    _check_token()
    with proxies():
        session = get_session()
    try:
        session.head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of whichever HTTP library the client uses
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer ({errors.described(error)})"
    return ""


def _check_address(endpoint: str) -> None:
    if not re.match(r"https?://[^/\s]", endpoint):
        raise SetupError(
            f"HF_ENDPOINT {endpoint} is not an address. Write https://HOST, or unset HF_ENDPOINT."
        )


def _check_token() -> None:
    """Raise SetupError for a token that cannot be sent: with blanks, quotes or letters like é."""
    from huggingface_hub import constants, get_token

    token = get_token() or ""
    if re.fullmatch(r"[A-Za-z0-9._~+/=-]*", token):  # the letters of RFC 6750
        return
    names = [name for name in TOKENS if os.environ.get(name)]
    place = names[0] if names else constants.HF_TOKEN_PATH
    raise SetupError(
        f"the token in {place} has letters that no token has, such as blanks or quotes. Copy it "
        "again, or run `hf auth login`."
    )


@contextlib.contextmanager
def proxies() -> Iterator[None]:
    """Raise SetupError if an HTTP client made inside cannot use a proxy of the environment."""
    try:
        yield
    except Exception as error:  # ImportError, ValueError or a class of the HTTP library
        names = [name for upper in PROXIES for name in (upper, upper.lower())]
        named = [name for name in names if os.environ.get(name)]
        if not named:
            raise
        if isinstance(error, ImportError):
            socks = [name for name in named if os.environ[name].lower().startswith("socks")]
            given = ", ".join(socks or named)
            raise SetupError(
                f"the proxy in {given} needs the package socksio: pip install 'httpx[socks]', or "
                f"unset {given}."
            ) from error
        given = ", ".join(named)
        raise SetupError(
            f"the proxy in {given} cannot be used ({errors.described(error)}). Write "
            f"http://HOST:PORT, or unset {given}."
        ) from error


def check_push(repository: str) -> None:
    """Raise InputError if `push` cannot work: a name that is not OWNER/NAME, or no valid token."""
    from huggingface_hub import HfApi, constants, get_session
    from huggingface_hub.utils import validate_repo_id

    if not all(repository.partition("/")):
        raise InputError(f"--push-to-hub {repository}: it is not a repository. Write OWNER/NAME.")
    do = f"run `hf auth login`, or push later: `hf upload {repository} RUN/export`"
    with errors.loading("--push-to-hub", repository, do=do):
        validate_repo_id(repository)
        _check_address(constants.ENDPOINT)
        _check_token()
        with proxies():
            get_session()
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
