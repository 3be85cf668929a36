"""Prompt sets by name: what the papers trained on, and the benchmarks.

    dancegrpo:images   50,000 prompts of HPDv2's training set, and
    dancegrpo:videos   50,000 of VidProM, as DanceGRPO (arXiv 2505.07818) publishes them; Apache-2.0
    hpdv2              HPDv2's training set (arXiv 2306.09341), each prompt once; Apache-2.0
    first-frames       images to start clips from, and captions: what `python -m lab.first_frames` made
    hub:OWNER/NAME/FILE[:COLUMN]      a column of a file of any data set on the hub

For --eval-prompts alone, as nobody should train on a benchmark:

    hpsv2:STYLE        HPSv2's 3,200, anime, concept-art, paintings, photo or all
    geneval            GenEval's 553 (arXiv 2310.11513); MIT
    unigenbench        UniGenBench++'s 600 short English ones; unigenbench:long its long ones (arXiv 2510.18701)
    vbench             VBench's 946 (arXiv 2311.17982); Apache-2.0

Files of GitHub are told by their git blob and kept in $HF_HOME/vgrpo; $VGRPO_GITHUB names a mirror
of raw.githubusercontent.com. Those of the hub lie in its own cache ($HF_ENDPOINT, $HF_HUB_OFFLINE
as everywhere)."""

import hashlib
import os
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.prompts import files

FIRST_FRAMES = Path(__file__).resolve().parents[2] / "first_frames/prompts.txt"
HPSV2 = ("anime", "concept-art", "paintings", "photo")  # its styles, 800 prompts each
INSTEAD = "or give --prompts (--eval-prompts) a file"


class Published(NamedTuple):
    """A file of a GitHub repository: commit or HEAD, path, the id of its git blob, the column of
    its prompts."""

    repository: str
    commit: str
    path: str
    blob: str
    column: str = files.COLUMN

    def url(self) -> str:
        """Where it is published, or mirrored."""
        base = os.environ.get("VGRPO_GITHUB", "https://raw.githubusercontent.com").rstrip("/")
        return f"{base}/{self.repository}/{self.commit}/{self.path}"

    def place(self) -> Path:
        """Where it is kept."""
        return _cache() / self.blob / Path(self.path).name


_DANCE = ("XueZeyue/DanceGRPO", "15cc71d53cc2e6e18a68ee607d5fb6ba9a99e344")
PUBLISHED = {
    "dancegrpo:images": Published(*_DANCE, "assets/prompts.txt", "b47234e475645222ca9a0bb7742ebf4d08123855"),
    "dancegrpo:videos": Published(*_DANCE, "assets/video_prompts.txt", "2a7457f2d7b59ff7915be588de1ddb8fa95c8028"),
    "geneval": Published(
        "djghosh13/geneval", "HEAD", "prompts/evaluation_metadata.jsonl", "efc21c7e639cd45554a1e44fac87157211f16d51"
    ),
    "unigenbench": Published(
        "CodeGoat24/UniGenBench", "HEAD", "data/test_prompts_en.csv", "000674adb2414b2e5e7558ad7331ee82a945fae1",
        "prompt_en",
    ),
    "unigenbench:long": Published(
        "CodeGoat24/UniGenBench", "HEAD", "data/test_prompts_en_long.csv", "60179ba4330b898fe15070473bfacc76a5413a11",
        "prompt_en",
    ),
    "vbench": Published(
        "Vchitect/VBench", "HEAD", "vbench/VBench_full_info.json", "a3a4f0968c1a15f19518903b98d7cca9ef9cbe5a",
        "prompt_en",
    ),
}  # fmt: skip
FAMILIES = (
    "hpsv2",
    "hpdv2",
    "first-frames",
    "hub",
    *{name.partition(":")[0] for name in PUBLISHED},
)
BENCHMARKS = ("hpsv2", "geneval", "unigenbench", "vbench")


def is_name(spec: str) -> bool:
    """Whether `spec` names a set rather than a file."""
    return spec.partition(":")[0] in FAMILIES


def is_benchmark(spec: str) -> bool:
    """Whether `spec` names a benchmark's prompts, which nobody should train on."""
    return spec.partition(":")[0] in BENCHMARKS


def read(name: str) -> list[str]:
    """The prompts [str] of a set; raises InputError."""
    family, _, part = name.partition(":")
    if name in PUBLISHED:
        return _published(name)
    if family == "hpsv2":
        return _hpsv2(part)
    if family == "hub":
        return _hub(name, part)
    if name == "hpdv2":
        return _hpdv2()
    if name == "first-frames":
        return _first_frames()
    parts = [other for other in PUBLISHED if other.startswith(family)] or [family]
    raise InputError(f"prompts: there is no set {name}; there is {', '.join(parts)}")


def path_of(name: str) -> Path:
    """The file of a set of PUBLISHED, as its authors made it; raises InputError."""
    return _fetched(name, PUBLISHED[name])


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "vgrpo"


def _said(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _published(name: str) -> list[str]:
    item = PUBLISHED[name]
    if item.place().suffix in files.TABLES:
        return files.read(_fetched(name, item), item.column, name)
    # as their users wrote them: a tab is no image's
    prompts = map(files.one_line, _fetched(name, item).read_text(encoding="utf-8-sig").split("\n"))
    return [prompt for prompt in prompts if prompt]


def _fetched(name: str, item: Published) -> Path:
    """The path of a published file, downloaded once; of what is broken or another file by now it
    keeps nothing."""
    place, url = item.place(), item.url()
    if place.is_file() and blob_id(place.read_bytes()) == item.blob:
        return place
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in (
            "1",
            "ON",
            "YES",
            "TRUE",
        ):  # the hub's own reading of it
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read(files.LONGEST)
        if blob_id(data) != item.blob:
            raise OSError(
                f"what it gives is another file: git blob {blob_id(data)}, not {item.blob}"
            )
        _keep(place, data)
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(
            f"prompts: {name} is not at {place}, and {url} does not give it ({_said(error)}); "
            "put the file "
            f"there, {INSTEAD}"
        ) from None
    return place


def blob_id(data: bytes) -> str:
    """What git calls a file with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _keep(place: Path, data: bytes) -> None:
    """Other processes, here or elsewhere, may write the same file at the same moment: beside it,
    then renamed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as beside:
        beside.write(data)
    os.chmod(beside.name, 0o644)  # a cache that several people share
    os.replace(beside.name, place)


def _from_hub(name: str, repository: str, file: str) -> Path:
    from common import hub  # and with it its client

    try:
        return hub.find(repository, file, "dataset")
    except (*hub.ERRORS, ValueError) as error:  # an id that is none
        raise InputError(
            f"prompts: {name} is not in the Hugging Face cache ({file} of the data set "
            f"{repository}), and the hub does "
            f"not give it ({type(error).__name__}); where there is a network, run "
            f"`hf download --repo-type dataset {repository} {file}`; {INSTEAD}"
        ) from None


def _hub(name: str, part: str) -> list[str]:
    """OWNER/NAME/FILE[:COLUMN]"""
    path, _, column = part.partition(":")
    owner, repository, file = (*path.split("/", 2), "", "")[:3]
    if not (owner and repository and file):
        raise InputError(
            f"prompts: {name}: write hub:OWNER/NAME/FILE or hub:OWNER/NAME/FILE:COLUMN"
        )
    return files.read(_from_hub(name, f"{owner}/{repository}", file), column or files.COLUMN, name)


def _hpdv2() -> list[str]:
    """Of its 645,090 rows each prompt once, in their order; kept as text, which is read a hundred
    times faster."""
    path = _from_hub("hpdv2", "ymhao/HPDv2", "train.json")
    place = _cache() / path.parent.name / "hpdv2.txt"  # of this commit
    if place.is_file():
        return files.read(place, called="hpdv2")
    prompts = list(dict.fromkeys(files.read(path, called="hpdv2")))
    try:
        _keep(place, "\n".join(prompts).encode())
    except OSError:
        pass  # nowhere to write: next time it takes as long again
    return prompts


def _first_frames() -> list[str]:
    if not FIRST_FRAMES.is_file():
        raise InputError(
            f"prompts: there are no first frames in {FIRST_FRAMES.parent} yet; `python -m "
            "lab.first_frames` makes some "
            "(--help says from what), or give --prompts a file with lines IMAGE <tab> CAPTION"
        )
    return files.read(FIRST_FRAMES)


def _hpsv2(style: str) -> list[str]:
    """The official prompts of a style, or of all, as the hpsv2 package has them; the first time it
    downloads them."""
    if style not in (*HPSV2, "all"):
        raise InputError(f"prompts: hpsv2 has no {style!r}; it has {', '.join(HPSV2)} and all")
    try:
        import hpsv2
    except ImportError as error:
        raise InputError(
            f"prompts: hpsv2:{style} takes the package hpsv2 ({error}); pip install hpsv2"
        ) from None
    from common import hub

    hub.settle()
    try:
        try:
            prompts = hpsv2.benchmark_prompts(style)
        except FileExistsError:  # another process wrote its link at the same moment
            prompts = hpsv2.benchmark_prompts(style)
    except (OSError, ValueError) as error:  # the hub's errors among them
        raise InputError(
            f"prompts: hpsv2:{style} is not in the Hugging Face cache (data set zhwang/HPDv2, "
            "benchmark/), and the "
            f"hub does not give it: {_said(error)}; start where there is a network, {INSTEAD}"
        ) from None
    return [prompt for part in prompts.values() for prompt in part] if style == "all" else prompts
