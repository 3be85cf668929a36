"""The output folder of a run: which one it is, and the settings that make it that run's and no other's."""

import dataclasses
import json
import os
import sys
from pathlib import Path

from common.errors import InputError

# Settings that may change when a run goes on; any other difference makes it another run.
FREE = (
    "output", "resume", "steps", "save_every", "keep_checkpoints", "sample_every", "eval_every", "tracker", "watch",
    "reward_batch", "judge_url", "judge_timeout", "judge_retries", "judge_concurrency", "exchange_often",
)  # fmt: skip


def choose(args):
    """--output, or runs/SCRIPT-MODEL-N: the next free N, and with --resume the newest that exists."""
    if args.output:
        return args.output
    name = f"{script()}-{Path(args.model).name}"
    numbers = [path.name.rpartition("-")[2] for path in Path("runs").glob(f"{name}-*")]
    taken = [int(number) for number in numbers if number.isdigit()]
    if args.resume and not taken:
        raise InputError(f"--resume: there is no runs/{name}-N; name the run with --output")
    return f"runs/{name}-{max(taken, default=0) + (not args.resume)}"


def before(folder, args):
    """The settings with which the run in a folder was started, {} if there is none; raises InputError, also if there is
    one and no --resume."""
    config = folder / "config.json"
    if not os.path.exists(config):
        return {}
    if not args.resume:
        raise InputError(f"--output {folder} already holds a run: go on with --resume latest, or choose another folder")
    try:
        return json.loads(config.read_text())
    except (OSError, ValueError):
        raise InputError(f"--output {folder}: its config.json cannot be read; choose another folder") from None


def check(folder, args):
    """A folder that holds a run needs --resume, and the same settings as before; raises InputError."""
    now = settings(args)
    then = before(folder, args) or now
    for name in sorted({*then, *now} - set(FREE)):
        if then.get(name) != now.get(name):
            raise InputError(
                f"--resume: {folder} was started with {name} {then.get(name)!r}, now it is {now.get(name)!r}"
            )


def claim(folder, args):
    """Writes config.json: from here on the folder is this run's. Raises InputError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(settings(args), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--output {folder}: cannot write there ({error.strerror})") from None


def settings(args):
    return {"script": script(), **json.loads(json.dumps(dataclasses.asdict(args)))}


def script():
    return Path(sys.argv[0]).stem


def write_text(path, text):
    """Writes beside and renames: a killed process leaves the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    os.replace(beside, path)
