"""Attacks that could go wrong silently: a run that ended well is compared with what was intended.

The kinds are those of public reports: prompt files as people keep them, files that change before
--resume, folders that hold another model, variables that a launch leaves in the environment, and
rewards that change global state. benchmarks.attacks draws them.
"""

import csv
import dataclasses
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers.utils import load_image
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks import servers
from common import models
from common.prompts import read_prompts
from common.prompts.files import one_line
from common.prompts.pictures import read_image


@dataclasses.dataclass
class Attack:
    """Describe a run of script.py with these flags, in its own folder."""

    what: str
    flags: list
    script: str = "grpo_base"
    before: Callable | None = None  # called first in the attack's process; returns more flags
    own: bool = False  # whether it gets a new process, not a fork
    environment: dict = dataclasses.field(default_factory=dict)
    stdout: str = ""  # a file; "|": a pipe that nobody reads
    saved: bool = True  # whether what is finished can be saved
    kept: tuple = ()  # (path, its bytes): files that must not change
    start: "Attack | None" = None  # a run that has already ended in the folder
    twin: "Attack | None" = None  # a run with the numbers that this one must have
    wrong: Callable | None = None  # folder -> what is wrong with a run that ended well, or ""


def of_list(rng: random.Random, folder: Path) -> Attack:
    """Give a flag with a list of values twice."""
    flag, values = rng.choice(
        [
            ("reward", ["jpeg", "verifier", "verifier:quality", "verifier:layout=0.5"]),
            ("watch", ["jpeg", "verifier:quality", "verifier:layout"]),
        ]
    )
    given = rng.sample(values, rng.choice([2, 3]))
    words = []
    for value in given:
        words += rng.choice([[f"--{flag}", value], [f"--{flag}={value}"]])
        words += rng.choice([[], ["--seed=0"]])

    def wrong(folder: Path) -> str:
        kept = json.loads((folder / "run/config.json").read_text(encoding="utf-8"))[flag]
        return "" if kept == given else f"{kept} of {given}"

    return Attack(" ".join(words), words, wrong=wrong)


CAPTIONS = (
    "a dog, running", '"STOP" on a sign', 'a 5" red circle', 'he said "go', "50% off; $3, a|b",
    "línea única", "# a heading", "a = b", "a\tred\tcircle", "  two blanks  ", "a red circle",
    "'quoted'", "prompt", "été 🦊", "a \\n b", "1,2,3", "[a] {b}", "-- a dash", "null", "12",
)  # fmt: skip


def prompt_file(rng: random.Random, folder: Path) -> Attack:
    """Write captions to a file as people and programs do."""
    meant = rng.sample(CAPTIONS, rng.choice([1, 2, 3, 5]))
    kind = rng.choice(list(WAYS))
    ending = rng.choice(["\n", "\n", "\r\n", "\r"])
    text = WAYS[kind](meant).replace("\n", ending)
    mark = rng.choice(["", "", "\ufeff"])
    name = f"p{kind.split()[0]}"
    (folder / name).write_bytes((mark + text).encode())

    def wrong(folder: Path) -> str:
        read = read_prompts(folder / name)
        wanted = [one_line(caption) for caption in meant]
        return "" if read == wanted else f"{read} instead of {wanted}"

    words = ["--prompts", name, "--reward=jpeg", "--eval-prompts="]
    return Attack(f"{kind}, {ending!a}{mark!a}: {meant}", words, wrong=wrong)


def _by_csv(delimiter: str, **more: str) -> Callable[[list[str]], str]:
    """Return a writer of tables as the csv module writes them, with other columns."""

    def write(captions: list[str]) -> str:
        lines = []
        writer = csv.writer(SimpleNamespace(write=lines.append), delimiter=delimiter)
        writer.writerow(["prompt", *more])
        writer.writerows([caption, *more.values()] for caption in captions)
        return "".join(lines).replace("\r\n", "\n")

    return write


def _of_one_column(captions: list[str]) -> str:
    return "\n".join(["prompt", *captions]) + "\n"


def _without_quotes(captions: list[str]) -> str:
    return "\n".join(["prompt,style", *(f"{caption},oil" for caption in captions)]) + "\n"


def _json_lines(captions: list[str]) -> str:
    return "".join(json.dumps({"prompt": caption}) + "\n" for caption in captions)


WAYS = {  # ending of the file, and what is odd about it: captions -> text
    ".txt": lambda captions: "\n".join(captions) + "\n",
    ".txt with gaps": lambda captions: "\n\n".join(captions),
    ".txt of JSON": _json_lines,
    ".csv quoted": _by_csv(",", style="a, b"),
    ".csv of one column": _of_one_column,
    ".csv without quotes": _without_quotes,
    ".tsv quoted": _by_csv("\t", style="oil"),
    ".tsv of one column": _of_one_column,
    ".jsonl": _json_lines,
    ".ndjson": lambda captions: "".join(json.dumps(caption) + "\n" for caption in captions),
    ".json": lambda captions: json.dumps([{"prompt": c, "id": 1} for c in captions], indent=1),
}


def photograph(rng: random.Random, folder: Path) -> Attack:
    """Save a conditioning image in an odd mode, or turned by its EXIF orientation."""
    ending, mode = rng.choice(
        [("jpg", "RGB"), ("jpg", "L"), ("jpg", "CMYK"), ("png", "P"), ("png", "RGBA")]
        + [("webp", "RGBA"), ("png", "LA"), ("png", "I;16"), ("tiff", "F"), ("gif", "P")]
    )
    size, orientation = (rng.randint(8, 90), rng.randint(8, 90)), rng.randint(1, 8)
    noise = np.random.default_rng(rng.randrange(1000)).integers(0, 256, (*size, 4), np.uint8)
    image = Image.fromarray(noise, "RGBA")
    deep = {"I;16": np.uint16, "F": np.float32}
    if mode in deep:
        image = Image.fromarray(noise[..., 0].astype(deep[mode]) * 200)
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    name = rng.choice(["a b", "ü 画", "a"]) + f".{ending}"
    image.save(folder / name, **({} if ending == "gif" else {"exif": exif}))
    (folder / "p.txt").write_text(f"{name}\ta red circle moving left\n", encoding="utf-8")

    def wrong(folder: Path) -> str:
        path = str(folder / name)
        same = np.array_equal(read_image(path), load_image(path))
        return "" if same and mode not in deep else "other pixels than diffusers sees"

    words = ["--model=tiny-wan-i2v", "--prompts=p.txt", "--reward=jpeg", "--eval-prompts="]
    words += ["--sde-steps=0"]
    return Attack(f"{ending} in {mode}, orientation {orientation}", words, wrong=wrong)


# --- What a run is made of ---

OWN = """
class Own:
    scale, range, video = 1.0, (0.0, 1.0), True

    def score(self, media, prompts):
        return media.flatten(1).mean(1) * 1.0
"""


def _begin_with_own_files() -> list[str]:
    """Write a run's prompts, model and reward into its working directory."""
    Path("p.txt").write_text("a red circle\na blue square\na green star\n", encoding="utf-8")
    Path("own.py").write_text(OWN, encoding="utf-8")
    shutil.copytree(models.ASSETS / "tiny-flux", "model")
    return []


MADE_OF = ["--model=model", "--prompts=p.txt", "--eval-prompts=", "--reward=own.py:Own"]
MADE_OF += ["--lora-rank=4", "--save-every=1", "--height=32", "--width=32"]


def changed(rng: random.Random, folder: Path) -> Attack:
    """Change the files that a run was made from, then --resume it."""
    what = rng.choice(list(CHANGES))
    is_other = what not in ("nothing", "times", "a blank line")
    words = [*MADE_OF, "--resume=latest", "--steps=3"]
    return Attack(
        f"{what} of a run changed, then --resume",
        words,
        before=CHANGES[what],
        start=Attack("own files", MADE_OF, before=_begin_with_own_files),
        wrong=lambda folder: "it was resumed" if is_other else "",
    )


def _edit(name: str, old: str, new: str) -> Callable[[], list]:
    def edit() -> list:
        path = Path(name)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(old, new), encoding="utf-8")
        return []

    return edit


def _weights_changed() -> list:
    file = Path("model/transformer/diffusion_pytorch_model.safetensors")
    state = load_file(file)
    state = {key: value + 0.01 for key, value in state.items()}
    save_file(state, file, metadata={"format": "pt"})
    return []


def _touched() -> list:
    for path in Path().rglob("*"):
        os.utime(path, (1e9, 1e9))  # as after a copy to another machine, or with a wrong clock
    return []


CHANGES = {
    "nothing": lambda: [],
    "times": _touched,
    "a blank line": _edit("p.txt", "\na blue", "\n\na blue"),
    "a word": _edit("p.txt", "blue", "navy"),
    "order": _edit("p.txt", "a red circle\na blue square", "a blue square\na red circle"),
    "number": _edit("p.txt", "a green star\n", ""),
    "reward": _edit("own.py", "1.0\n", "-1.0\n"),
    "weights": _weights_changed,
    "scheduler": _edit("model/scheduler/scheduler_config.json", '"shift": 1.0', '"shift": 3.0'),
}


def foreign(rng: random.Random, folder: Path) -> Attack:
    """Put something else in the place of a model's scheduler, weights or folder."""
    name = rng.choice(["tiny-flux", "tiny-sd", "tiny-wan"])
    shutil.copytree(models.ASSETS / name, folder / "model")
    what = rng.choice(list(INSTEAD))
    kind, content = INSTEAD[what]
    given = "model"
    if kind == "scheduler":
        content = next(iter(content[name == "tiny-sd"]))
        what = f"{content} as scheduler"
        place = folder / "model/scheduler/scheduler_config.json"
        place.write_text(json.dumps(content), encoding="utf-8")
    else:
        files = sorted((folder / "model").rglob("*.safetensors"))
        file = rng.choice(files)
        what = f"{what} as {file.relative_to(folder / 'model')}"
        if kind == "variant":
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
        elif kind == "alone":
            given = str(file.relative_to(folder))
        elif callable(content):
            content(file)
        else:
            file.write_bytes(content)
    own = models.settings(name)
    words = ["--model", given, "--prompts", own["prompts"], "--reward=jpeg", "--eval-prompts="]
    words += ["--height=32", "--width=32"]
    words += ["--shift=1"] if name == "tiny-sd" else ["--frames=5"] if name == "tiny-wan" else []
    is_good = kind == "variant"
    return Attack(
        f"{name}: {what}", words, wrong=lambda folder: "" if is_good else "it was trained on"
    )


def _as_int8(file: Path) -> None:
    state = load_file(file)
    key = max(state, key=lambda name: state[name].numel())
    save_file({**state, key: state[key].to(torch.int8)}, file, metadata={"format": "pt"})


def _as_torchscript(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.ones(1)), str(file))


_FLOW = [{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}]
_EDM = [{"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}]
_SAMPLE = [{"_class_name": "DDIMScheduler", "prediction_type": "sample"}]
# what: (kind, content). For schedulers: those that no flow model has, those that no SD model has.
INSTEAD = {
    "a scheduler": ("scheduler", (_EDM, _FLOW)),
    "another scheduler": ("scheduler", (_SAMPLE, _EDM)),
    "a pointer of git-lfs": ("weights", b"version https://git-lfs.github.com/spec/v1\noid 1\n"),
    "a web page": ("weights", b"<!DOCTYPE html><html><body>Sign in</body></html>"),
    "JSON of the hub": ("weights", b'{"error": "Access to model is restricted"}'),
    "an empty file": ("weights", b""),
    "GGUF": ("weights", b"GGUF\x03\0\0\0" + bytes(64)),
    "TorchScript": ("weights", _as_torchscript),
    "int8": ("weights", _as_int8),
    "fp16 alone": ("variant", None),
    "a single file": ("alone", None),
}


# --- The surroundings ---

PLAIN = Attack("a plain run", [])
LEFT = {  # what a launcher, a scheduler or a shell leaves in the environment
    "a launch of one": dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="no.such.host"),
    "half a launch": dict(LOCAL_RANK="0", MASTER_ADDR="10.255.255.1", MASTER_PORT="29500"),
    "MPI": dict(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="4"),
    "PMI": dict(PMI_RANK="1", PMI_SIZE="8"),
    "Slurm": dict(SLURM_PROCID="3", SLURM_NTASKS="8", SLURM_LOCALID="3"),
    "accumulation": dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4"),
    "half precision": dict(ACCELERATE_MIXED_PRECISION="fp16"),
    "DeepSpeed": dict(ACCELERATE_USE_DEEPSPEED="true"),
    "FSDP1": dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"),
    "FSDP2": dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"),
    "compilation": dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR"),
    "threads": dict(OMP_NUM_THREADS="0", MKL_NUM_THREADS="all"),
    "a proxy": dict(ALL_PROXY="socks5://localhost:1", https_proxy="proxy:3128"),
    "a language": dict(LC_ALL="C", LANG="de_DE", TZ="Mars/Olympus"),
    "a folder that is gone": dict(TMPDIR="/nowhere", HF_HOME="/nowhere/hub"),
    "a word": dict(WORLD_SIZE="two", RANK=""),
}


def surroundings(rng: random.Random, folder: Path) -> Attack:
    """Leave variables of other programs in the environment."""
    names = rng.sample(list(LEFT), rng.choice([1, 1, 2]))
    environment = {name: value for left in names for name, value in LEFT[left].items()}
    what = "left: " + ", ".join(names)
    return Attack(what, [], environment=environment, twin=PLAIN)


def home(rng: random.Random, folder: Path) -> Attack:
    """Write `~` where the shell does not expand it."""
    (folder / "home").mkdir()
    (folder / "home/p.txt").write_text("a red circle\n", encoding="utf-8")
    (folder / "home/own.py").write_text(OWN, encoding="utf-8")
    shutil.copytree(models.ASSETS / "tiny-flux", folder / "home/model")
    words = rng.choice(
        [
            ["--output=~/run"],
            ["--output", "~/a/run", "--prompts=~/p.txt"],
            ["--prompts=~/p.txt", "--reward=jpeg"],
            ["--reward=~/own.py:Own=0.5"],
            ["--model=~/model", "--height=32", "--width=32", "--reward=jpeg", "--eval-prompts="]
            + ["--prompts=~/p.txt"],
            ["--output=~nobody-is-called-so/run"],
        ]
    )

    def wrong(folder: Path) -> str:
        made = [str(path) for path in folder.glob("**/~*")]
        return f"a folder called {made[0]}" if made else ""

    return Attack(" ".join(words), words, environment={"HOME": str(folder / "home")}, wrong=wrong)


MESS = {  # what a reward touches: its line of code
    "the working directory": 'os.chdir("/")',
    "gradients": "torch.set_grad_enabled(False)",
    "the default dtype": "torch.set_default_dtype(torch.float64)",
    "the default device": 'torch.set_default_device("meta")',
    "torch's seed": "torch.manual_seed(7)",
    "the other seeds": "random.seed(7), np.random.seed(7)",
    "threads": "torch.set_num_threads(2)",
    "numpy's errors": 'np.seterr(all="raise")',
    "the environment": 'os.environ.update(WORLD_SIZE="8", RANK="3")',
    "sys.argv": "sys.argv.clear()",
    "warnings": 'warnings.simplefilter("error")',
    "deterministic algorithms": "torch.use_deterministic_algorithms(True)",
    "inference mode": "torch.inference_mode().__enter__()",
    "stdout": "sys.stdout = None",
}
MODULES = "import os, random, sys, warnings\nimport numpy as np\nimport torch\n"


def _rewarded(what: str, lines: list[str]) -> Attack:
    """Return a run with a reward from a file, whose `score` begins with these lines."""
    body = "".join(f"        {line}\n" for line in lines)
    content = MODULES + OWN.replace("        return", f"{body}        return")

    def begin() -> list:
        Path("own.py").write_text(content, encoding="utf-8")
        return []

    return Attack(what, ["--reward=own.py:Own", "--steps=3"], before=begin)


def mess(rng: random.Random, folder: Path) -> Attack:
    """Let a reward change state of the whole process."""
    names = rng.sample(list(MESS), rng.choice([1, 1, 2, 4]))
    attack = _rewarded(f"it touches {', '.join(names)}", [MESS[name] for name in names])
    attack.twin = _rewarded("a reward that touches nothing", [])
    return attack


FORMS = (
    "{}", "{}/10", "Score: {}", "**{}**", '{{"score": {}}}', '```json\n{{"score": {}}}\n```',
    "<think>is it 3 or 4?</think>\n{}", "{} out of 10", "The final score is {}.", "\\boxed{{{}}}",
)  # fmt: skip


def judge(rng: random.Random, folder: Path) -> Attack:
    """Let a judge answer in the forms of its model."""
    forms = rng.sample(FORMS, rng.choice([1, 2, 4]))

    def begin() -> list[str]:
        def behave(handler, asked, body):
            handler.say(forms[asked % len(forms)].format(1 + asked % 9))

        url, _ = servers.start(behave, None)
        return [f"--judge-url={url}"]

    def wrong(folder: Path) -> str:
        lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        masked = [row["masked_samples"] for row in map(json.loads, lines) if "reward_mean" in row]
        return f"masked samples: {masked}" if any(masked) else ""

    words = ["--reward", "judge:quality", "judge:alignment", "--thresholds", "0.5", "0.5"]
    words += ["--judge-model=m", "--judge-timeout=5", "--judge-retries=0"]
    return Attack(f"a judge that says {forms}", words, "self_paced", begin, wrong=wrong)


KINDS = {
    "lists": of_list, "prompt files": prompt_file, "photographs": photograph, "resumed": changed,
    "foreign models": foreign, "surroundings": surroundings, "home": home, "mess": mess,
    "judges": judge,
}  # fmt: skip
