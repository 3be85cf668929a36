"""The folder of a run: which one it is, its config.json, and what --resume may continue.

No --resume                  a new folder: --output, or runs/SCRIPT-MODEL-N with the next free N
--resume latest              the run in --output, or the newest of runs/SCRIPT-MODEL-N, continues
--resume RUN/checkpoints/X   a new run in a new --output begins with that checkpoint; the same
                             command again continues the new run
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common.args import Args
from common.errors import InputError, loading, text
from common.reporting.files import rows_before, write_rows, write_text
from common.rewards import own
from common.trainer import checkpoint_files

# Settings that do not change a run's numbers, or only how they are rounded.
NEUTRAL = (
    *("output", "resume", "steps", "save_every", "keep_checkpoints", "sample_every", "eval_every"),
    *("tracker", "watch", "process_timeout", "trust_remote_code", "push_to_hub"),
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
NOT_INHERITED = ("output", "resume", "trust_remote_code")


# --- Which folder ---


def choose(args: Args) -> Path:
    """Return the run's folder. Raises InputError if --output and --resume do not allow it."""
    if args.output:
        folder = Path(args.output)
    else:
        folder = _next_free(args)
    if not args.resume and os.path.exists(folder / "config.json"):  # False for a name too long
        raise InputError(
            f"--output {folder} already holds a run. Add --resume latest, or choose another folder."
        )
    return folder


def _next_free(args: Args) -> Path:
    """Return runs/SCRIPT-MODEL-N: the next free N, or the newest with --resume latest."""
    if args.resume not in ("", "latest"):
        raise InputError(
            f"--resume {args.resume}: a checkpoint begins a new run. Name its folder with "
            "--output, or use --resume latest to continue the run that has the checkpoint."
        )
    name = f"{script()}-{Path(args.model).name}"
    matches = [re.fullmatch(rf"{re.escape(name)}-([0-9]+)", p.name) for p in Path("runs").glob("*")]
    newest = max((int(match[1]) for match in matches if match), default=0)
    if args.resume and not newest:
        raise InputError(f"--resume latest: there is no runs/{name}-N. Name the run with --output.")
    return Path(f"runs/{name}-{newest if args.resume else newest + 1}")


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
        if not isinstance(config, dict) or not config:
            raise ValueError("it is not a dictionary of settings")
    return completed(config)


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json with those added that its version did not have.

    Before --lora-alpha existed, alpha was the rank.
    """
    return {"lora_alpha": config.get("lora_rank", 0), **config}


# --- What may continue ---


def check(folder: Path, args: Args) -> str:
    """Return the settings that changed since the run began, as a line. Raises InputError.

    A run continues by --resume latest with the settings that it was started with, except FREE ones.
    """
    config = config_of(folder)
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
    then = {name: value for name, value in config.items() if name not in ("run", "from")}
    now = settings(args) if then else {}
    if then:  # settings that an older version did not have count as their defaults
        then = {**settings(type(args)()), **then}
    changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    for name in sorted(changed, key=lambda name: name != "script"):
        if name not in free:
            _refuse(source if new else folder, name, then, now)
    shown = [name for name in changed if name not in ("output", "resume", "steps")]
    return ", ".join(f"{name} {now.get(name)!r} instead of {then.get(name)!r}" for name in shown)


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

    args: the settings as the user gave them. Raises InputError if the folder is not writable.
    """
    config = config_of(folder)
    begins = bool(checkpoint) and not config and args.resume != "latest"
    origin = {"run": secrets.token_hex(8)}  # W&B knows a run by it
    origin.update({name: config[name] for name in ("run", "from") if name in config})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if begins:
            origin["from"] = os.path.abspath(args.resume)
            checkpoint_files.copy(checkpoint, folder, step)
            source = run_of(args.resume)
            if source:
                write_rows(folder / "metrics.jsonl", rows_before(source / "metrics.jsonl", step))
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
