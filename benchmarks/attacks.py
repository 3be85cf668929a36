"""Attacks runs from a seed: bad flags, prompts, pictures, folders, checkpoints, servers, rewards,
machines.

    python -m benchmarks.attacks     # 300, in under 20 minutes on two cores; prints the table
    python -m benchmarks.attacks --only folders --number 40 --seed 7

Each attack is a small run that ends well: it comes to its end, or says in one line what is wrong;
without a traceback, with 60 seconds of computing and 4 GiB, and whatever it had finished is saved.
If benchmarks/silent.py knows what was intended, a run that came to its end is compared with that.
One process imports everything and forks for each attack, which calls the script's own main through
errors.run; one in fifteen is a process of its own."""

import dataclasses
import importlib
import json
import os
import random
import resource
import shutil
import signal
import string
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from PIL import Image
from safetensors.torch import load_file, save_file

import bpgo
import grpo_base
import self_paced
import slas
from benchmarks import servers, silent
from benchmarks.silent import Attack
from common import cli, errors, models, rewards
from common.trainer import checkpoint_files

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"grpo_base": grpo_base, "bpgo": bpgo, "slas": slas, "self_paced": self_paced}
STEPS = 2
SMALL = (
    f"--steps={STEPS} --prompts-per-step=2 --group-size=2 --sampling-steps=3 --micro-batch=4 "
    "--minibatches=1 "
    "--save-every=0 --eval-every=0 --sample-every=0 --tracker=none --learning-rate=1e-4"
).split()
LIMIT, WAIT = 60, 300.0  # seconds that an attack computes, and that it waits; most take two in all
MEMORY = 4 * 2**30  # bytes


@dataclasses.dataclass
class Args:
    number: int = 300
    """Attacks."""
    first: int = 0
    """The first one's number: `--first 59 --number 1` repeats one alone."""
    seed: int = 0
    """Of all that is random about them."""
    only: str = ""
    """Of one kind alone."""
    workers: int = 2
    """Attacks at the same time."""
    verbose: bool = False
    """Print every attack with what it got."""


# --- What is attacked ---


def flags(rng, folder):
    name = rng.choice(list(SCRIPTS))
    fields = [field.name for field in dataclasses.fields(SCRIPTS[name].Args)]
    flag = rng.choice(
        [field for field in fields if field not in ("steps", "prompts_per_step", "output")]
    )
    bad = [
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1e400",
        str(10**30),
        "five",
        "",
        "½",
        "0x10",
        "1e-400",
        "é",
        "\udcff",
        "٣",
    ]
    word = rng.choice([*bad, "$HOME", "../..", "\x1b[2J", "a" * 5000, "latest", "nobody/nothing"])
    return Attack(f"--{flag} {word[:30]!a}", [f"--{flag.replace('_', '-')}={word}"], name)


def prompts(rng, folder):
    letters = string.printable + "$\\_^{}%é中ثעلب🦊\u0301\u202e\x00\x07\u2028\ufeff"
    line = "".join(
        rng.choice(letters.replace("\n", "").replace("\t", ""))
        for _ in range(rng.choice([1, 9, 90, 900]))
    )
    contents = {
        "bytes": rng.randbytes(200), "UTF-16": line.encode("utf-16"),
        "Latin-1": "é".encode("latin-1"), "nothing": b"", "blank lines": b"\n \n\t\n",
        "NUL": b"\0" * 50, "one line of 3 "
                                                                        "MB": b"red " * 750_000,
        "letters": line.encode(), "dollars": b"a $x_1$ \\frac{1}{2$ for $5",
        "tabs": b"a\tb\tc\n\t\n", "CR": b"a\rb\r", "many": b"a red circle\n" * 50_000,
        "JSON nested deep": b"[" * 200_000, "rows": b'{"prompt": 5}\n[]\n"a"\n',
        "columns": b"a,b\n1,2\n", "half a JSON": b'[{"prompt": "a', "a quote": b'prompt\n"a red',
    }  # fmt: skip
    what, ending = (
        rng.choice(list(contents)),
        rng.choice([".txt"] * 4 + [".jsonl", ".json", ".csv", ".tsv", ".parquet"]),
    )
    (folder / f"p{ending}").write_bytes(contents[what])
    shown = ["--eval-prompts", f"p{ending}", "--sample-every=1"] if rng.random() < 0.7 else []
    model = rng.choice(["tiny-flux", "tiny-flux", "tiny-sd", "tiny-wan"])
    words = ["--model", model, "--prompts", f"p{ending}", "--reward", "jpeg", *shown]
    return Attack(f"{what} as {ending}", words, rng.choice(["grpo_base", "bpgo", "slas"]))


def pictures(rng, folder):
    kind, size = (
        rng.choice(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]),
        (rng.randint(1, 90), rng.randint(1, 90)),
    )
    file = folder / f"picture.{rng.choice(['png', kind.lower()])}"
    image = Image.effect_noise(size, 90).convert(
        rng.choice(["RGB", "L", "1"] if kind != "WEBP" else ["RGB"])
    )
    image.save(file, kind)
    how = rng.choice(
        [
            "as it is",
            "cut short",
            "cut short",
            "bits",
            "bits",
            "a bomb",
            "empty",
            "words",
            "gone",
            "a loop",
        ]
    )
    data = bytearray(file.read_bytes())
    if how == "cut short":
        data = data[: rng.randrange(len(data))]
    elif how == "bits":
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "a bomb":
        image.convert("L").save(file, "PNG")
        data = bytearray(file.read_bytes())
        data[16:24] = struct.pack(
            ">II", *rng.choice([(100_000, 100_000), (2**31 - 1, 1), (12_000, 12_000)])
        )
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes({"empty": b"", "words": b"no picture"}.get(how, data))
    if how in ("gone", "a loop"):
        file.unlink()
    if how == "a loop":
        file.symlink_to(file)
    (folder / "p.txt").write_text(f"{file.name}\ta red circle moving left\n", encoding="utf-8")
    words = [
        "--model",
        "tiny-wan-i2v",
        "--prompts",
        "p.txt",
        "--reward",
        "jpeg",
        "--eval-prompts=",
        "--sde-steps=0",
    ]
    return Attack(f"a {kind} {how}", words)


VALUES = (
    None,
    "x",
    "",
    -1,
    0,
    1,
    10**9,
    10**30,
    1e308,
    0.5,
    True,
    [],
    {},
    [1, 2],
    {"a": {"b": []}},
    [None, None],
)


def spoilt(rng, folder):
    """What was done to a file of a folder, or to a part of it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = rng.choice(files)
    configs = [
        path
        for path in files
        if path.name in ("config.json", "model_index.json", "scheduler_config.json")
    ]
    tensors = [path for path in files if path.suffix == ".safetensors"]
    how = rng.choice(
        ["cut", "cut", "gone", "gone", "bytes", "empty", "folder", "loop", "value", "value",
         "value", "value", "tensor", "tensor", "numbers", "type", "code", "swap", "half a JSON",
         "pointer"]
    )  # fmt: skip
    if how == "cut":
        os.truncate(file, rng.randrange(file.stat().st_size + 1))
    elif how in ("gone", "folder", "loop"):
        file.unlink()
        (
            file.mkdir
            if how == "folder"
            else lambda: file.symlink_to(file) if how == "loop" else None
        )()
    elif how == "bytes":
        data = bytearray(file.read_bytes())
        for _ in range(rng.choice([1, 10, 1000])):
            data[
                rng.randrange(len(data))
                if rng.random() < 0.5
                else rng.randrange(min(len(data), 200))
            ] = rng.randrange(256)
        file.write_bytes(data)
    elif how == "value" and configs:
        file = rng.choice(configs)
        content = json.loads(file.read_text(encoding="utf-8"))
        key, value = rng.choice(sorted(content)), rng.choice(VALUES)
        file.write_text(json.dumps({**content, key: value}), encoding="utf-8")
        how = f"{key} = {value!r:.30} in"
    elif how in ("tensor", "numbers", "type") and tensors:
        file = rng.choice(tensors)
        state = load_file(file)
        key = rng.choice(sorted(state))
        whole = state.pop(key)
        state |= {
            "tensor": rng.choice(
                [{}, {key: whole.flatten()[:-1].clone()}, {key: whole[None].clone()}]
            ),
            "numbers": {key: torch.full_like(whole, rng.choice([torch.nan, torch.inf]))},
            "type": {key: whole.to(torch.int64)},
        }[how]
        save_file(state, file, metadata={"format": "pt"})
    elif how == "code" and tensors:
        file = rng.choice(tensors)
        file.unlink()
        stem = {"model": "pytorch_model"}.get(file.stem, file.stem)
        torch.save({"weight": Evil()}, file.with_name(f"{stem}.bin"))
    elif how == "swap":
        other = rng.choice(
            [path for path in models.ASSETS.rglob(file.name) if path.is_file()] or [file]
        )
        file.unlink()
        shutil.copy(other, file)
    else:
        how = {"pointer": "pointer"}.get(how, "half a JSON")
        file.write_text(
            "version https://git-lfs.github.com/spec/v1\n" if how == "pointer" else '{"a": [',
            encoding="utf-8",
        )
    return f"{how} {file.relative_to(folder)}"


class Evil:
    def __reduce__(self):
        return os.system, ("touch RAN",)


def folders(rng, folder):
    name = rng.choice(["tiny-flux", "tiny-flux", "tiny-sd", "tiny-wan", "tiny-wan-i2v"])
    shutil.copytree(models.ASSETS / name, folder / "model")
    what = ", ".join(spoilt(rng, folder / "model") for _ in range(rng.choice([1, 1, 1, 2])))
    own = models.settings(name)
    words = [
        "--model",
        "model",
        "--prompts",
        own["prompts"],
        "--reward",
        "jpeg",
        "--height=32",
        "--width=32",
    ]
    words += ["--shift=1"] if name == "tiny-sd" else ["--frames=5"] if "wan" in name else []
    words += ["--lora-rank=4"] if rng.random() < 0.3 else []
    return Attack(f"{name}: {what}", words, rng.choice(list(SCRIPTS)[:3]))


def weights(rng, folder):
    shutil.copytree(models.ASSETS / "tiny-clip", folder / "clip")
    what = spoilt(rng, folder / "clip")
    return Attack(f"tiny-clip: {what}", ["--reward", "clip", "--reward-path", "clip=clip"])


def server(rng, folder):
    harm = rng.choice(list(servers.HARM))
    number = rng.choice(
        [0, 0, 1, 3, 5, 7]
    )  # the question from which it does harm; 0: the greeting too

    def begin():
        def behave(handler, asked, body):
            servers.HARM[harm](handler) if asked >= number else handler.say(
                f"{1 + asked % 9}", {f"{asked % 9}": 0.9}
            )

        url, _ = servers.start(behave, None if number else servers.HARM[harm])
        return [f"--judge-url={url}"]

    words = [
        "--reward",
        "judge:quality",
        "judge:alignment",
        "--thresholds",
        "0.5",
        "0.5",
        "--judge-model=m",
        "--judge-timeout=0.5",
    ]
    words += [f"--judge-retries={rng.choice([0, 0, 1])}", "--judge-concurrency=4"]
    words += ["--judge-expected"] if "chances" in harm or rng.random() < 0.2 else []
    return Attack(f"{harm}, from question {number}", words, "self_paced", begin)


def reward(rng, folder):
    when, raises = rng.choice([1, 2, 3, 4]), rng.random() < 0.5
    error = rng.choice(
        [ValueError("x"), KeyboardInterrupt(), SystemExit(0), MemoryError(),
         OSError(28, "No space left on device"), RecursionError(), StopIteration(),
         GeneratorExit(), ValueError("\x1b[2J" * 99)]
    )  # fmt: skip
    returned = {
        "None": lambda m: None, "words": lambda m: ["a"] * len(m), "a scalar": lambda m: 0.5,
        "a graph": lambda m: m.flatten(1).mean(1).requires_grad_(),
        "a list": lambda m: [0.5] * len(m), "NaN": lambda m: torch.full((len(m),), torch.nan),
        "too many": lambda m: torch.zeros(len(m) + 1),
        "infinite": lambda m: torch.full((len(m),), 1e400),
        "complex": lambda m: torch.zeros(len(m)) * 1j,
        "elsewhere": lambda m: torch.zeros(len(m), device="meta"),
        "large": lambda m: torch.arange(len(m)) * 1e37,
        "changed media": lambda m: m.zero_().flatten(1).mean(1),
    }  # fmt: skip
    kind = rng.choice(list(returned))

    class Odd:
        scale, range, video, calls = 1.0, (0.0, 1.0), True, 0

        def score(self, media, prompts):
            Odd.calls += 1
            if Odd.calls == when and raises:
                raise error
            return returned[kind](media) if Odd.calls >= when else media.flatten(1).mean(1)

    def begin():
        rewards.REWARDS["odd"] = "odd:Odd"
        sys.modules["odd"] = SimpleNamespace(Odd=Odd)
        return []

    what = f"raises {type(error).__name__}" if raises else f"returns {kind}"
    return Attack(
        f"{what}, when asked for time {when}", ["--reward", "odd", "--steps=4"], "slas", begin
    )


def machine(rng, folder):
    how = rng.choice(["full", "closed", "ASCII", "files", "memory", "SIGINT", "SIGTERM", "signals"])
    words, attack = ["--steps=4", "--save-every=2"], None
    if how in ("full", "closed"):
        attack = Attack(f"{how} output", words, stdout="/dev/full" if how == "full" else "|")
    elif how == "ASCII":
        (folder / "pé.txt").write_text("a réd circle\n", encoding="utf-8")
        words += ["--prompts=pé.txt", "--reward", "jpeg", "--output=rüns"]
        attack = Attack(
            "an ASCII terminal",
            words,
            environment={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
            own=True,
        )
    elif how == "files":
        size = rng.choice([10, 1_000, 100_000, 1_000_000, 8_000_000, 20_000_000])
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)) or []  # noqa: E731
        attack = Attack(f"no file above {size} bytes", words, before=limit, saved=False)
    elif how == "memory":
        more = rng.choice([50, 200, 500, 1000]) * 2**20
        words = [*words, f"--group-size={rng.choice([8, 512])}", "--micro-batch=512"]
        attack = Attack(
            f"{more >> 20} MiB more memory", words, before=lambda: _little_memory(more), saved=False
        )
    else:
        numbers = [signal.SIGINT if how == "SIGINT" else signal.SIGTERM] * (1 + (how == "signals"))
        after = rng.uniform(0.2, 4.0)
        attack = Attack(
            f"{how} after {after:.1f} s", words, before=lambda: _signals(numbers, after)
        )
    return attack


def _little_memory(more):
    used = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        * resource.getpagesize()
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
    return []


def _signals(numbers, after):
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(after)
        for number in numbers:
            with_suppressed(os.kill, victim, number)
            time.sleep(0.3)
        os._exit(0)
    return []


def with_suppressed(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        pass


def resumed(rng, folder):
    shutil.copytree(template(), folder / "run")
    place = folder / "run" / "checkpoints" / f"step_{STEPS:06d}"
    file = rng.choice(
        [*sorted(place.iterdir()), folder / "run/config.json", folder / "run/metrics.jsonl"]
    )
    how = rng.choice(["cut", "bytes", "gone", "empty", "value", "text", "folder"])
    earlier = folder / "run/checkpoints/step_000001"
    kept = tuple((path, path.read_bytes()) for path in sorted(earlier.iterdir()))
    if how == "cut":
        os.truncate(file, rng.randrange(file.stat().st_size))
    elif how == "bytes":
        data = bytearray(file.read_bytes())
        for _ in range(100):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
    elif how in ("gone", "folder"):
        file.unlink()
        file.mkdir() if how == "folder" else None
    elif how == "value":
        file = place / "checkpoint.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(
            json.dumps({**content, rng.choice(sorted(content)): rng.choice(VALUES)}),
            encoding="utf-8",
        )
    else:
        file.write_text("" if how == "empty" else '{"step": ["x"]}\n', encoding="utf-8")
    words = [
        "--output=run",
        "--resume=latest",
        f"--steps={STEPS + 1}",
        "--lora-rank=4",
        "--save-every=1",
    ]
    return Attack(f"{how} {file.relative_to(folder / 'run')}, then --resume", words, kept=kept)


KINDS = {
    "flags": flags, "prompts": prompts, "pictures": pictures, "folders": folders,
    "rewards' weights": weights, "servers": server, "rewards": reward, "the machine": machine,
    "checkpoints": resumed, **silent.KINDS,
}  # fmt: skip
ROUND = (
    ["flags"] * 4
    + ["folders"] * 5
    + ["prompts"] * 3
    + ["pictures"] * 3
    + ["servers"] * 3
    + ["rewards"] * 2
)
ROUND += ["the machine"] * 3 + ["checkpoints"] * 2 + ["rewards' weights"] + list(silent.KINDS)


# --- One attack ---


def begin(attack, folder):
    """Starts an attack in its folder; returns the process' number."""
    if attack.start:
        shutil.copytree(finished(attack.start), folder, dirs_exist_ok=True)
    if attack.twin:
        finished(attack.twin)  # run it now, so that its time does not count for the attack
    words = [
        *SMALL,
        *([] if any("--output" in word for word in attack.flags) else ["--output=run"]),
        *attack.flags,
    ]
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.environ.update(attack.environment)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        reader, writer = os.pipe()
        os.close(reader)
        out = (
            writer
            if attack.stdout == "|"
            else os.open(attack.stdout or "stdout.txt", os.O_WRONLY | os.O_CREAT)
        )
        os.dup2(out, 1)
        os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT), 2)
        if attack.own and not attack.before:
            os.execv(sys.executable, [sys.executable, str(ROOT / f"{attack.script}.py"), *words])
        sys.stdout, sys.stderr = (
            open(1, "w", closefd=False, encoding="utf-8"),
            open(2, "w", closefd=False, encoding="utf-8"),
        )
        words += attack.before() if attack.before else []
        sys.argv = [f"{attack.script}.py", *words]
        script = SCRIPTS[attack.script]
        errors.run(script.main, cli.parse(script.Args, script.__doc__))
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with_suppressed(sys.stderr.flush)
        os._exit(code)


def verdict(attack, folder, status, seconds, memory):
    """(what came of an attack: "its end", "one line", or what went wrong, the line that it said)"""
    said = (
        (folder / "stderr.txt").read_text(errors="replace", encoding="utf-8")
        if (folder / "stderr.txt").exists()
        else ""
    )
    lines = [line for line in said.splitlines() if line.startswith(("error: ", "stopped: "))]
    if "For full helptext" in said:  # tyro's box
        lines = [" ".join(said.replace("│", " ").split())]
    code, line = os.waitstatus_to_exitcode(status), (lines or [""])[-1]
    if seconds > WAIT or code == -signal.SIGXCPU:
        return "a hang", f"{seconds:.0f} s"
    if "Traceback (most recent call last)" in said:
        return "a traceback", said[-2000:]
    if memory > MEMORY:
        return "too much memory", f"{memory / 2**30:.1f} GiB"
    if (folder / "RAN").exists():
        return "code that ran", line
    for path, content in attack.kept:
        if not path.exists() or path.read_bytes() != content:
            return "a loss", f"{path} is another"
    if code < 0:
        killed = -code == signal.SIGTERM and attack.what.startswith(("SIGTERM", "signals"))
        return (
            ("one line", "")
            if killed
            else ("an end by signal", f"{signal.Signals(-code).name} {said[-500:]}")
        )
    if code and (len(lines) != 1 or len(line) > 1500):
        return f"{len(lines)} lines", said[-1500:]
    if not code and (wrong := unseen(attack, folder)):
        return "wrong in silence", wrong
    return lost(attack, folder, code, line) or ("one line" if code else "its end", line)


def unseen(attack, folder):
    """Return what is wrong with a run that came to its end, "" if nothing."""
    if attack.twin:
        ours, twins = numbers(folder / "run"), numbers(finished(attack.twin) / "run")
        if ours.shape != twins.shape or not torch.allclose(ours, twins, rtol=0.01):
            return f"rewards and gradients {ours.tolist()}, {attack.twin.what} has {twins.tolist()}"
    return attack.wrong(folder) if attack.wrong else ""


def numbers(run):
    """Return each step's mean reward and gradient norm, [steps, 2]. Sharding rounds differently."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [row for row in rows if "reward_mean" in row]
    return torch.tensor([[row["reward_mean"], row["grad_norm"]] for row in steps])


def lost(attack, folder, code, line):
    """("a loss", what) if an attack lost steps that it had finished."""
    for run in folder.glob("r*n*"):
        if not attack.saved or attack.kept or not (run / "metrics.jsonl").is_file():
            continue
        rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        steps = sum(
            "reward_mean" in row for row in rows
        )  # the last evaluation has a row of its own
        done = checkpoint_files.newest_first(run)
        try:
            saved = checkpoint_files.read(done[0])[0] if done else 0
        except checkpoint_files.Broken as error:
            return "a loss", str(error)
        if saved != steps or (code == 0 and not (run / "export").is_dir()):
            return "a loss", f"{steps} steps, {saved} saved: {line}"
    return None


_finished = {}


def finished(attack):
    """Return the folder of a finished run that is not attacked. Each is run once."""
    if attack.what not in _finished:
        folder = Path(tempfile.mkdtemp()) / "place"
        folder.mkdir()
        child = begin(attack, folder)
        said = folder / "stderr.txt"
        assert os.waitpid(child, 0)[1] == 0, said.read_text(encoding="utf-8")
        said.unlink()
        _finished[attack.what] = folder
    return _finished[attack.what]


def template():
    """Return the folder of a finished run with two checkpoints."""
    return finished(Attack("a LoRA", ["--lora-rank=4", "--save-every=1"])) / "run"


# --- All of them ---


def attacks(args, root):
    """(number, kind, attack, its folder), one after the other."""
    for number in range(args.first, args.first + args.number):
        kind = args.only or ROUND[number % len(ROUND)]
        rng = random.Random(f"{args.seed} {number} {kind}")
        folder = root / str(number)
        folder.mkdir()
        attack = KINDS[kind](rng, folder)
        attack.own |= number % 15 == 14
        yield number, kind, attack, folder


def main(args):
    torch.set_num_threads(1)
    for name in (
        "tiny-flux",
        "tiny-sd",
        "tiny-wan",
        "tiny-wan-i2v",
    ):  # once, for all that are forked
        models.load(name, torch.float32)
    for place in rewards.REWARDS.values():
        importlib.import_module(place.partition(":")[0])
    started, running, table, failed = time.time(), {}, Counter(), []
    with tempfile.TemporaryDirectory() as temporary:
        waiting = attacks(args, Path(temporary))
        while True:
            while len(running) < args.workers and (new := next(waiting, None)):
                running[begin(new[2], new[3])] = (*new, time.time())
            if not running:
                break
            for child, (number, kind, attack, folder, began) in list(running.items()):
                done, status, usage = os.wait4(child, os.WNOHANG)
                seconds = time.time() - began
                if not done and seconds > WAIT:
                    with_suppressed(os.killpg, child, signal.SIGKILL)
                    done, status, usage = os.wait4(child, 0)
                if done:
                    del running[child]
                    result, line = verdict(attack, folder, status, seconds, usage.ru_maxrss * 1024)
                    table[kind, result] += 1
                    good = result in ("its end", "one line")
                    failed += [] if good else [number]
                    if args.verbose or not good:
                        print(
                            f"{number} {kind}: {attack.what}\n    {result} ({seconds:.1f} s): "
                            f"{line}",
                            flush=True,
                        )
                    shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.02)
    print_table(table, args, time.time() - started)
    return not failed


def print_table(table, args, seconds):
    bad = sorted({result for _, result in table} - {"its end", "one line"})
    columns = ["one line", "its end", *bad]
    print(f"| attacks on | number | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
    for kind in dict.fromkeys(kind for kind, _ in table):
        counts = [table[kind, column] for column in columns]
        print(f"| {kind} | {sum(counts)} | {' | '.join(map(str, counts))} |")
    good = sum(count for (_, result), count in table.items() if result not in bad)
    print(
        f"\n{good} of {args.number} without traceback, hang or loss; seed {args.seed}, "
        f"{seconds / 60:.0f} minutes"
    )


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.exit(0 if main(tyro.cli(Args, description=__doc__)) else 1)
