"""Read prompt sets by name: the papers' training sets, and benchmarks.

    dancegrpo:images   50,000 prompts of HPDv2's training set, and
    dancegrpo:videos   50,000 of VidProM, as DanceGRPO (arXiv 2505.07818) publishes them; Apache-2.0
    hpdv2              HPDv2's training set (arXiv 2306.09341), each prompt once; Apache-2.0
    first-frames       images and captions that `python -m lab.first_frames` made
    hub:OWNER/NAME/FILE[:COLUMN]      a column of a file of any data set on the hub

For --eval-prompts only, because training on a benchmark would spoil it:

    hpsv2:STYLE        HPSv2's 3,200, anime, concept-art, paintings, photo or all
    geneval            GenEval's 553 (arXiv 2310.11513); MIT
    unigenbench        UniGenBench++'s 600 short English ones (arXiv 2510.18701);
                       unigenbench:long its long ones
    vbench             VBench's 946 (arXiv 2311.17982); Apache-2.0

Files from GitHub are checked against their git blob and kept in $HF_HOME/vgrpo. $VGRPO_GITHUB may
name a mirror of raw.githubusercontent.com. Files from the hub are kept in the hub's cache
($HF_ENDPOINT, $HF_HUB_OFFLINE).
"""

import contextlib
import hashlib
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from common import errors, hub
from common.errors import InputError
from common.prompts import files

FIRST_FRAMES = Path(__file__).resolve().parents[2] / "first_frames/prompts.txt"
HPSV2 = ("anime", "concept-art", "paintings", "photo")  # its styles, 800 prompts each
INSTEAD = "or give --prompts (--eval-prompts) a file"


class Published(NamedTuple):
    """Describe a file of a GitHub repository.

    commit: a commit, or HEAD; blob: id of the file's git blob; column: that of the prompts, if the
    file is a table.
    """

    repository: str
    commit: str
    path: str
    blob: str
    column: str = files.COLUMN

    def url(self) -> str:
        """Return the address of the file, or of its mirror."""
        base = os.environ.get("VGRPO_GITHUB", "https://raw.githubusercontent.com").rstrip("/")
        return f"{base}/{self.repository}/{self.commit}/{self.path}"

    def place(self) -> Path:
        """Return the path of the file in the cache."""
        return _cache() / self.blob / Path(self.path).name


_DANCE = ("XueZeyue/DanceGRPO", "15cc71d53cc2e6e18a68ee607d5fb6ba9a99e344")
PUBLISHED = {
    "dancegrpo:images": Published(
        *_DANCE, "assets/prompts.txt", "b47234e475645222ca9a0bb7742ebf4d08123855"
    ),
    "dancegrpo:videos": Published(
        *_DANCE, "assets/video_prompts.txt", "2a7457f2d7b59ff7915be588de1ddb8fa95c8028"
    ),
    "geneval": Published(
        "djghosh13/geneval",
        "HEAD",
        "prompts/evaluation_metadata.jsonl",
        "efc21c7e639cd45554a1e44fac87157211f16d51",
    ),
    "unigenbench": Published(
        "CodeGoat24/UniGenBench",
        "HEAD",
        "data/test_prompts_en.csv",
        "000674adb2414b2e5e7558ad7331ee82a945fae1",
        "prompt_en",
    ),
    "unigenbench:long": Published(
        "CodeGoat24/UniGenBench",
        "HEAD",
        "data/test_prompts_en_long.csv",
        "60179ba4330b898fe15070473bfacc76a5413a11",
        "prompt_en",
    ),
    "vbench": Published(
        "Vchitect/VBench",
        "HEAD",
        "vbench/VBench_full_info.json",
        "a3a4f0968c1a15f19518903b98d7cca9ef9cbe5a",
        "prompt_en",
    ),
}
FAMILIES = (
    "hpsv2",
    "hpdv2",
    "first-frames",
    "hub",
    *{name.partition(":")[0] for name in PUBLISHED},
)
BENCHMARKS = ("hpsv2", "geneval", "unigenbench", "vbench")


def is_name(spec: str) -> bool:
    """Return whether `spec` names a set instead of a file."""
    return spec.partition(":")[0] in FAMILIES


def is_benchmark(spec: str) -> bool:
    """Return whether `spec` names the prompts of a benchmark."""
    return spec.partition(":")[0] in BENCHMARKS


def read(name: str) -> list[str]:
    """Return the prompts of a set. Raises InputError."""
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
    known = [other for other in PUBLISHED if other.startswith(family)] or [family]
    raise InputError(f"prompts: there is no set {name}. Choose one of {', '.join(known)}.")


def path_of(name: str) -> Path:
    """Return the file of a set of PUBLISHED, as its authors made it. Raises InputError."""
    return _fetched(name, PUBLISHED[name])


# --- Files of GitHub ---


def _published(name: str) -> list[str]:
    item, path = PUBLISHED[name], path_of(name)
    if path.suffix in files.TABLES:
        return files.read(path, item.column, name)
    # a tab in these lines is part of the caption, and does not follow an image
    prompts = map(files.one_line, path.read_text(encoding="utf-8-sig").split("\n"))
    return [prompt for prompt in prompts if prompt]


def _fetched(name: str, item: Published) -> Path:
    """Return the path of a published file, which is downloaded once.

    A file with another content is not kept. Raises InputError.
    """
    place, url = item.place(), item.url()
    if place.is_file() and blob_id(place.read_bytes()) == item.blob:
        return place
    with errors.loading(f"prompts: {name}", url, do=f"put the file at {place}, {INSTEAD}"):
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read(files.LONGEST)
        if blob_id(data) != item.blob:
            raise OSError(f"it is another file: git blob {blob_id(data)}, not {item.blob}")
        _keep(place, data)
    return place


def blob_id(data: bytes) -> str:
    """Return the id of git's blob with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "vgrpo"


def _keep(place: Path, data: bytes) -> None:
    """Write a file under another name and rename it: other processes may write the same file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as beside:
        beside.write(data)
    os.chmod(beside.name, 0o644)  # a cache that several people share
    os.replace(beside.name, place)


# --- Files of the hub ---


def _from_hub(name: str, repository: str, file: str) -> Path:
    command = f"hf download --repo-type dataset {repository} {file}"
    advice = f"run `{command}` on a machine with a network, {INSTEAD}"
    with errors.loading(f"prompts: {name}: {file} of the data set", repository, do=advice):
        return hub.find(repository, file, "dataset")


def _hub(name: str, part: str) -> list[str]:
    """Return the prompts of OWNER/NAME/FILE[:COLUMN]."""
    path, _, column = part.partition(":")
    owner, repository, file = (*path.split("/", 2), "", "")[:3]
    if not (owner and repository and file):
        raise InputError(
            f"prompts: {name}: the name is not complete. Write hub:OWNER/NAME/FILE or "
            "hub:OWNER/NAME/FILE:COLUMN."
        )
    return files.read(_from_hub(name, f"{owner}/{repository}", file), column or files.COLUMN, name)


def _hpdv2() -> list[str]:
    """Return the distinct prompts of the 645,090 rows, in their order.

    They are cached as a text file, which is read a hundred times faster.
    """
    path = _from_hub("hpdv2", "ymhao/HPDv2", "train.json")
    place = _cache() / path.parent.name / "hpdv2.txt"  # of this commit
    if place.is_file():
        return files.read(place, called="hpdv2")
    prompts = list(dict.fromkeys(files.read(path, called="hpdv2")))
    with contextlib.suppress(OSError):  # a cache that cannot be written is slow, not wrong
        _keep(place, "\n".join(prompts).encode())
    return prompts


def _hpsv2(style: str) -> list[str]:
    """Return the official prompts of a style, or of all. The hpsv2 package downloads them once."""
    if style not in (*HPSV2, "all"):
        raise InputError(
            f"prompts: hpsv2 has no {style!r}. Choose one of {', '.join(HPSV2)} and all."
        )
    advice = f"pip install hpsv2, start on a machine with a network, {INSTEAD}"
    with errors.loading(f"prompts: hpsv2:{style} (data set zhwang/HPDv2, benchmark/)", do=advice):
        import hpsv2

        hub.settle()
        try:
            prompts = hpsv2.benchmark_prompts(style)
        except FileExistsError:  # another process made its link at the same moment
            prompts = hpsv2.benchmark_prompts(style)
    if style == "all":
        return [prompt for part in prompts.values() for prompt in part]
    return prompts


def _first_frames() -> list[str]:
    if not FIRST_FRAMES.is_file():
        raise InputError(
            f"prompts: there are no first frames in {FIRST_FRAMES.parent}. Make them with `python "
            "-m lab.first_frames`, or give a file with lines IMAGE <tab> CAPTION."
        )
    return files.read(FIRST_FRAMES)
