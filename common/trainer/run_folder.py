"""The folder of a run: which one it is, its config.json, and what --resume may continue.

No --resume                  a new folder: --output, or runs/SCRIPT-MODEL-N with the next free N
--resume latest              the run in --output, or the newest of runs/SCRIPT-MODEL-N, continues
--resume RUN/checkpoints/X   a new run in a new --output begins with that checkpoint; the same
                             command again continues the new run
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import secrets
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common.args import Args, flag_of
from common.errors import InputError, loading, text
from common.reporting.files import rows_before, write_rows, write_text
from common.rewards import own, table
from common.trainer import checkpoint_files, inputs
from common.trainer.inputs import Inputs

# Settings that do not change a run's numbers, or only how they are rounded.
NEUTRAL = (
    *("output", "resume", "resume_anyway", "steps", "save_every", "keep_checkpoints"),
    *("sample_every", "eval_every", "tracker", "watch", "process_timeout"),
    *("trust_remote_code", "push_to_hub"),
    *("judge_url", "judge_timeout", "judge_retries", "judge_concurrency"),
    *("offload_encoders", "gradient_checkpointing"),
    # these change the rounding
    *("micro_batch", "decode_batch", "reward_batch", "batched_guidance", "exchange_often"),
    *("compile", "attention"),
)
# Settings that may change when a run continues. Any other setting makes it another run.
FREE = (*NEUTRAL, "learning_rate", "adam_eps", "weight_decay", "max_grad_norm")
# Settings that may also change when a checkpoint begins a new run: no saved state depends on them.
FREE_IN_A_NEW_RUN = (
    *("seed", "prompts", "eval_prompts", "eval_height", "eval_width", "eval_steps"),
    *("kl_coef", "clip_range", "adv_clip_max"),
)
# Settings that --resume does not take from config.json. A folder from elsewhere must not run code,
# so rewards in files of code are not taken either.
NOT_INHERITED = ("output", "resume", "resume_anyway", "trust_remote_code")


# --- Which folder ---


def choose(args: Args) -> Path:
    """Return the run's folder, as the user knows it; a new name's folder is made.

    Raises InputError if --output and --resume do not allow it.
    """
    if not args.output:
        return _newest(args) if args.resume else _new(args)
    folder = Path(args.output)
    if not args.resume and _began(folder):
        raise InputError(
            f"--output {folder} already holds a run. Add --resume latest, or choose another folder."
        )
    return folder


def shown(args: Args, folder: Path) -> Path:
    """Return a run's absolute folder as the user knows it: --output, or runs/NAME."""
    return Path(args.output) if args.output else Path("runs") / folder.name


def _began(folder: Path) -> bool:
    """Return whether a run in this folder has come so far that something would be lost.

    One that failed before its first step, because of the tracker or the memory, is started anew.
    Raises InputError if config.json is not a run's: the folder of a model has one, too.
    """
    if not config_of(folder):
        return False
    done = (folder / "export").exists() or bool(checkpoint_files.newest_first(folder))
    return done or bool(rows_before(folder / "metrics.jsonl", math.inf))


def _new(args: Args) -> Path:
    """Make and return runs/SCRIPT-MODEL-N, with an N above all others. Raises InputError.

    Of several processes that try the same name at once, the file system gives it to one.
    """
    name = f"{script()}-{Path(args.model).name}"
    number = max(_numbers(name), default=0)
    while True:
        number += 1
        folder = Path(f"runs/{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.exists():  # "runs" is a file
                raise InputError("runs: it is not a folder. Name one with --output.") from None
        except OSError as error:
            reason = error.strerror or text(error)
            raise InputError(f"{folder}: cannot write there ({reason}). Give --output.") from error


def _newest(args: Args) -> Path:
    """Return the runs/SCRIPT-MODEL-N with the highest N that holds a run, for --resume latest."""
    if args.resume != "latest":
        raise InputError(
            f"--resume {args.resume}: a checkpoint begins a new run. Name its folder with "
            "--output, or use --resume latest to continue the run that has the checkpoint."
        )
    name = f"{script()}-{Path(args.model).name}"
    held = [n for n in _numbers(name) if os.path.exists(f"runs/{name}-{n}/config.json")]
    if not held:
        raise InputError(f"--resume latest: there is no runs/{name}-N. Name the run with --output.")
    return Path(f"runs/{name}-{max(held)}")


def _numbers(name: str) -> list[int]:
    """Return the N of all runs/NAME-N."""
    matches = [re.fullmatch(rf"{re.escape(name)}-([0-9]+)", p.name) for p in Path("runs").glob("*")]
    return [int(match[1]) for match in matches if match]


def run_of(resume: str) -> Path | None:
    """Return RUN of --resume RUN/checkpoints/step_NNNNNN; None if it is not in a run's folder."""
    folder = Path(os.path.abspath(resume))
    known = folder.parent.name == "checkpoints" and resume not in ("", "latest")
    run = folder.parent.parent
    return run if known and os.path.exists(run / "config.json") else None


def config_of(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder, {} without one. Raises InputError if it is broken."""
    path = folder / "config.json"
    if not os.path.exists(path):
        return {}
    with loading(f"--output {folder}: config.json", do="choose another folder"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "script" not in config:
            raise ValueError("it does not hold the settings of a run")
    return completed(config)


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with the settings that its version did not have.

    The alpha of a LoRA was its rank then.
    """
    return {"lora_alpha": config.get("lora_rank", 0), **config}


# --- What may continue ---


def check(folder: Path, args: Args) -> str:
    """Return the settings that changed since the run began, as a line. Raises InputError.

    A run continues by --resume latest with the settings that it was started with, except FREE ones,
    and with the same contents of what they name (inputs.py), wherever that is now.
    """
    config = config_of(folder) if args.resume else {}  # `choose`: what is there has not begun
    new = not config
    if config and args.resume != "latest" and not _began_with(config, args.resume):
        raise InputError(
            f"--output {folder} holds a run. --resume latest continues it; another checkpoint "
            "begins a new run in a new folder."
        )
    source = run_of(args.resume)
    if new and source:
        config = config_of(source)
    free = (*FREE, *FREE_IN_A_NEW_RUN) if new else FREE
    began = inputs.read(source if new else folder) if config else {}
    now_inputs = inputs.found(args) if began else {}
    then = {name: value for name, value in config.items() if name not in ("run", "from")}
    now = settings(args) if then else {}
    if then:  # an older version acted by the defaults of the settings that it did not have
        then = {**settings(type(args)()), **then}
    changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    moved = [name for name in changed if _moved(name, then, now, began, now_inputs)]
    free = (*free, *moved)
    for name in sorted(changed, key=lambda name: name != "script"):
        if name not in free:
            _refuse(source if new else folder, name, then, now)
    hidden = ("output", "resume", "resume_anyway", "steps")
    shown = [name for name in changed if name not in hidden]
    words = [f"{name} {now.get(name)!r} instead of {then.get(name)!r}" for name in shown]
    if others := _other_contents(source if new else folder, args, began, now_inputs, new):
        words.append(f"other contents of {others}")
    return ", ".join(words)


def _moved(name: str, then: dict, now: dict, began: Inputs, now_inputs: Inputs) -> bool:
    """Return whether a setting names another place of the same contents."""
    held_by = "model" if name == "source" else name
    if name == "reward" and _without_folders(then.get(name)) != _without_folders(now.get(name)):
        return False
    return bool(began.get(held_by)) and began[held_by] == now_inputs.get(held_by)


def _without_folders(specs: Any) -> list[tuple[str, str | None]]:
    """Return (name, weight) of each word of --reward in a config.json."""
    return [table.split(str(spec))[1:] for spec in specs] if isinstance(specs, list) else []


def _other_contents(folder: Path, args: Args, began: Inputs, now: Inputs, new: bool) -> str:
    """Return the flags whose contents changed, "" if none did. Raises InputError.

    folder: of the run that is continued, or with whose checkpoint a `new` run begins.
    """
    found = inputs.changed(began, now)
    if new:
        found = {name: part for name, part in found.items() if name not in FREE_IN_A_NEW_RUN}
    words = ", ".join(f"{flag_of(name)} ({part})" for name, part in found.items())
    if words and not args.resume_anyway:
        raise InputError(
            f"--resume: {folder} was started with other contents of {words}. Put them back, or add "
            "--resume-anyway to continue with what is there now."
        )
    return words


def _refuse(folder: Path, name: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    if name not in then or name not in now:
        raise InputError(
            f"--resume: {folder} was started by another version, as the setting {name} shows. "
            "Resume it with that version."
        )
    code = ""
    if own.MARK in str(then[name]):
        code = " Name it again: a run's folder alone does not run code."
    raise InputError(
        f"--resume: {folder} was started with {name} {then[name]!r}, now it is {now[name]!r}.{code}"
    )


def _began_with(config: dict[str, Any], resume: str) -> bool:
    return config.get("from") == os.path.abspath(resume)


def find_checkpoint(folder: Path, args: Args) -> list[Path]:
    """Return the checkpoints that --resume may load, the first choice first."""
    if not args.resume:
        return []
    if args.resume == "latest" or config_of(folder):
        return checkpoint_files.newest_first(folder)
    return [Path(args.resume)]


# --- Claiming the folder ---


def claim(folder: Path, args: Args, checkpoint: Path | None, step: int) -> None:
    """Write config.json; a new run that begins with a checkpoint gets a copy of it.

    args: the settings as the user gave them; checkpoint: absolute. Raises InputError if the folder
    is not writable.
    """
    config = config_of(folder) if args.resume else {}
    begins = bool(checkpoint) and not config and args.resume != "latest"
    source = run_of(str(checkpoint)) if begins else None
    began = inputs.read(source or folder) if args.resume else {}
    now = inputs.found(args)
    # a model of the hub was perhaps not on this machine when `check` looked
    _other_contents(source or folder, args, began, now, new=begins)
    origin = {"run": secrets.token_hex(8)}  # W&B knows a run by it
    origin.update({name: config[name] for name in ("run", "from") if name in config})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if begins:
            origin["from"] = os.path.abspath(checkpoint)
            checkpoint_files.copy(checkpoint, folder, step)
            if source:
                write_rows(folder / "metrics.jsonl", rows_before(source / "metrics.jsonl", step))
        write_text(folder / inputs.NAME, json.dumps({**began, **now}, indent=2) + "\n")
        content = json.dumps({**settings(args), **origin}, indent=2)
        write_text(folder / "config.json", content + "\n")
    except OSError as error:
        reason = error.strerror or text(error)
        raise InputError(f"--output {folder}: cannot write there ({reason}).") from error


def settings(args: Args) -> dict[str, Any]:
    """Return what config.json holds: the settings and the script's name."""
    return {"script": script(), **json.loads(json.dumps(dataclasses.asdict(args)))}


def script() -> str:
    """Return the name of the script that was started, without its ending."""
    return Path(sys.argv[0]).stem


# --- Settings of a run that continues ---


def inherit(default: Args, resume: str, output: str) -> Args:
    """Return the defaults of a command line with --resume: the settings of the run it continues.

    What is wrong with --resume or --output is reported later, by `choose` and `check`.
    """
    try:
        output = output or str(choose(dataclasses.replace(default, resume=resume, output="")))
        source = run_of(resume)
        config = config_of(Path(output))
        if not config and source:
            config = config_of(source)
    except InputError:
        return default
    default = dataclasses.replace(default, output=output)
    return taken_over(default, config) if config.get("script") == script() else default


def taken_over(default: Args, config: dict[str, Any]) -> Args:
    """Return `default` with the settings of a config.json that have the right type."""
    hints = get_type_hints(type(default))
    names = {field.name for field in dataclasses.fields(default)} - set(NOT_INHERITED)
    values = {}
    for name in names & config.keys():
        if name in ("reward", "watch") and own.MARK in str(config[name]):
            continue
        with contextlib.suppress(ValueError):
            values[name] = _as(config[name], hints[name])
    return dataclasses.replace(default, **values)


def _as(value: Any, hint: Any) -> Any:
    """Return a value of JSON as a setting of this type. Raises ValueError."""
    kinds, origin = get_args(hint), get_origin(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(_as(part, kinds[0]) for part in value)
    if origin in (Union, UnionType):
        for kind in kinds:
            with contextlib.suppress(ValueError):
                return _as(value, kind)
    if type(value) is hint:
        return value
    if origin is Literal and value in kinds:
        return value
    if hint is float and type(value) is int:
        return float(value)
    raise ValueError
