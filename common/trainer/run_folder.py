"""The output folder of a run: which one it is, the settings that make it that run's and no other's,
and what --resume makes of both."""

import contextlib
import dataclasses
import json
import math
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from common.args import Args
from common.errors import InputError
from common.rewards import own
from common.trainer import checkpoints

if TYPE_CHECKING:
    from common.trainer.runtime import Runtime
# Settings that change none of a run's numbers, or round them otherwise
NEUTRAL = (
    "output", "resume", "steps", "save_every", "keep_checkpoints", "sample_every", "eval_every", "tracker", "watch",
    "process_timeout", "judge_url", "judge_timeout", "judge_retries", "judge_concurrency", "trust_remote_code",
    "offload_encoders", "gradient_checkpointing", "push_to_hub",
    # these round (what measures on a micro-batch, as --gamma auto does, sees other rows)
    "micro_batch", "decode_batch", "reward_batch", "batched_guidance", "exchange_often", "compile", "attention",
)  # fmt: skip
# Settings that may change when a run goes on, how far an update goes besides; any other makes it
# another run.
FREE = (*NEUTRAL, "learning_rate", "weight_decay", "max_grad_norm")
# Those that may besides, when a checkpoint becomes the beginning of a run in a new folder: no state
# depends on them.
FREE_IN_A_NEW_FOLDER = ("seed", "prompts", "eval_prompts", "kl_coef", "clip_range", "adv_clip_max")
# Those that a resumed run does not take from its config.json: a folder from elsewhere must not make
# code run.
NOT_INHERITED = ("output", "resume", "trust_remote_code")  # nor rewards in files of code


def choose(args: Args) -> str:
    """--output; or the run whose checkpoint --resume names; or runs/SCRIPT-MODEL-N: the next free
    N, and with `latest` the newest that exists. Raises InputError if that is none."""
    if args.output or of_checkpoint(args.resume):
        return args.output or str(of_checkpoint(args.resume))
    name = f"{script()}-{Path(args.model).name}"
    names = [
        re.fullmatch(rf"{re.escape(name)}-([0-9]+)", path.name) for path in Path("runs").glob("*")
    ]
    taken = [int(match[1]) for match in names if match]
    if args.resume not in ("", "latest"):
        raise InputError(
            f"--resume {args.resume}: it is in no run's checkpoints/; name the folder with --output"
        )
    if args.resume and not taken:
        raise InputError(f"--resume: there is no runs/{name}-N; name the run with --output")
    return f"runs/{name}-{max(taken, default=0) + (not args.resume)}"


def of_checkpoint(resume: str) -> Path | None:
    """RUN of a --resume RUN/checkpoints/step_NNNNNN; None for `latest`, and for what is in no run's
    folder."""
    folder = Path(resume)
    if folder.parent.name != "checkpoints":
        folder = Path(os.path.abspath(folder))
    run = folder.parent.parent
    known = resume not in ("", "latest") and folder.parent.name == "checkpoints"
    return run if known and os.path.exists(run / "config.json") else None


def goes_on(folder: Path, resume: str) -> bool:
    """Whether --resume means the newest checkpoint of a folder: by `latest`, or by the checkpoint
    that the run in it began with, in the same command line once more. Raises InputError for a
    config.json that cannot be read."""
    return resume == "latest" or (_config(folder) or {}).get("from") == os.path.abspath(resume)


def inherit(default: Args, resume: str, output: str) -> Args:
    """What the flags of a command line with this --resume and --output change: the settings of the
    run that it goes on with, where there is one by this script, else `default`. What is wrong with
    it, `check` says."""
    try:
        output = choose(dataclasses.replace(default, resume=resume, output=output))
        config = _config(of_checkpoint(resume) or Path(output)) or {}
    except InputError:
        return default
    default = dataclasses.replace(default, output=output)
    return taken_over(default, config) if config.get("script") == script() else default


def taken_over(default: Args, config: dict[str, Any]) -> Args:
    """`default` with the settings of a config.json that are of the right kind and make no code run
    (NOT_INHERITED)."""
    values, hints = {}, get_type_hints(type(default))
    names = {field.name for field in dataclasses.fields(default)} - set(NOT_INHERITED)
    for name in names & config.keys():
        if name in ("reward", "watch") and own.MARK in str(config[name]):
            continue
        with contextlib.suppress(ValueError):
            values[name] = _as(config[name], hints[name])
    return dataclasses.replace(default, **values)


def before(folder: Path, args: Args) -> dict[str, Any]:
    """config.json of the run in a folder, or else of the run whose checkpoint --resume names, {} if
    there is neither; raises InputError, also if the folder holds a run and there is no --resume."""
    if os.path.exists(folder / "config.json") and not args.resume:
        raise InputError(
            f"--output {folder} already holds a run: go on with --resume latest, or choose "
            "another folder"
        )
    source = of_checkpoint(args.resume)
    return _config(folder) or (source and _config(source)) or {}


def check(folder: Path, args: Args) -> str:
    """A folder that holds a run needs --resume, and of that run, with the same settings but for the
    FREE ones; raises InputError. Returns the changes, as a line."""
    config, now, source = before(folder, args), settings(args), of_checkpoint(args.resume)
    new = _config(folder) is None
    if not new and not goes_on(folder, args.resume) and not _same(folder, source):
        raise InputError(
            f"--output {folder} holds another run than that of --resume {args.resume}: go on "
            "with it by --resume "
            "latest, or choose a new folder"
        )
    free, named = (FREE + FREE_IN_A_NEW_FOLDER, source) if new else (FREE, folder)
    then = {name: value for name, value in (config or now).items() if name not in ("run", "from")}
    changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    for name in ["script"] * ("script" in changed) + [name for name in changed if name not in free]:
        if name not in then or name not in now:
            raise InputError(
                f"--resume: {named} was started by another version: its config.json "
                f"{'has' if name in then else 'lacks'} {name}, and this version "
                f"{'has it not' if name in then else 'takes ' + repr(now[name])}; write it as "
                "this version wants it"
            )
        code = "; give it again: a run's folder alone makes no code run" * (
            own.MARK in str(then[name])
        )
        raise InputError(
            f"--resume: {named} was started with {name} {then[name]!r}, now it is "
            f"{now[name]!r}{code}"
        )
    told = [name for name in changed if name not in ("output", "resume", "steps")]
    return ", ".join(f"{name} {now[name]!r} instead of {then[name]!r}" for name in told)


def find_checkpoint(run: "Runtime") -> tuple[Path, int, dict[str, Any]] | None:
    """All processes together: (folder, step, states) of --resume, None before the first save. Of
    the newest ones those that are broken (a machine that died while it wrote) are passed over, with
    a line. Raises InputError."""
    args, newest = run.args, goes_on(run.output, run.args.resume)
    folders = checkpoints.newest_first(run.output) if newest else [Path(args.resume)]
    for folder in folders:
        step, states, reason = 0, {}, ""
        try:
            step, states = checkpoints.read(folder)
            reason = checkpoints.flaw(states, run.accelerator.process_index, run.world)
            if newest and checkpoints.number_of(folder) != step:
                reason = f"its checkpoint.json says step {step}"
        except checkpoints.Broken as error:
            reason = str(error)
        reason = run.first(reason)
        if reason and not newest:
            raise InputError(
                f"--resume: {folder} is no checkpoint ({reason}); give `latest` or a "
                "RUN/checkpoints/step_NNNNNN"
            )
        if reason:
            run.print(f"passing over {folder}: {reason}")
        elif step > args.steps:
            raise InputError(
                f"--steps {args.steps}: {folder} is already at step {step}; --resume "
                "RUN/checkpoints/step_NNNNNN "
                "--output NEW takes an earlier one"
            )
        else:
            return folder, step, states
    if folders:
        raise InputError(
            f"--resume: none of the {len(folders)} checkpoints in {run.output} can be read"
        )
    run.print(f"{run.output} has no checkpoint yet: starting from the beginning")
    return None


def claim(folder: Path, args: Args, checkpoint: tuple[Path, int] | None = None) -> tuple[str, str]:
    """Writes config.json: from here on the folder is this run's. Raises InputError where nothing
    can be written.

    checkpoint: (folder, step) of --resume. A new run begins with a copy of it and of the metrics
    before it; what an old one has after it is set aside. Returns what checkpoints call this run,
    and a line that says what was moved."""
    config, said = _config(folder), ""
    own = {
        "run": secrets.token_hex(8),
        **{n: value for n, value in (config or {}).items() if n in ("run", "from")},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint and config is None and args.resume != "latest":
            own["from"] = os.path.abspath(args.resume)
            said = _begin(folder, *checkpoint)
        elif checkpoint and not goes_on(folder, args.resume):
            said = _set_aside(folder, checkpoint[1])
        write_text(folder / "config.json", json.dumps({**settings(args), **own}, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"--output {folder}: cannot write there ({error.strerror or error})"
        ) from None
    return own["run"], said


def new_run(folder: Path, step: int, flag: str, value: float) -> str:
    """The command line of a run in a new folder that begins with a checkpoint of this one, with one
    other setting."""
    new, number = f"{folder}_from_{step}", 1
    while os.path.exists(new):
        new, number = f"{folder}_from_{step}_{number + 1}", number + 1
    words = [
        "--resume",
        f"{folder}/checkpoints/{checkpoints.name_of(step)}",
        "--output",
        new,
        flag,
        f"{value:.9g}",
    ]
    return shlex.join([sys.argv[0], *words])


def rows_before(path: Path, step: float) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl of the steps before this one, NaN where it has null; none where
    there is no file."""
    rows = map(_json, path.read_text(errors="replace").splitlines() if path.exists() else ())
    rows = [
        row
        for row in rows
        if isinstance(row, dict) and type(row.get("step")) is int and row["step"] < step
    ]
    return [
        {name: math.nan if value is None else value for name, value in row.items()} for row in rows
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes metrics.jsonl anew. Raises OSError."""
    write_text(path, "".join(map(line_of, rows)))


def line_of(row: dict[str, Any]) -> str:
    """A row as a line of metrics.jsonl: JSON has no number that is none (NaN, infinity), so it says
    null."""
    no_number = {
        name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)
    }
    return json.dumps({**row, **dict.fromkeys(no_number)}) + "\n"


def settings(args: Args) -> dict[str, Any]:
    """What config.json has of an Args, with the script's name."""
    return {"script": script(), **json.loads(json.dumps(dataclasses.asdict(args)))}


def script() -> str:
    """The name of the script that was started, without its ending."""
    return Path(sys.argv[0]).stem


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames: a killed process leaves the old file or the new one, never half.
    Raises OSError."""
    write_beside(path, lambda beside: beside.write_text(text))


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """The same of what `write` writes to a path, whose name has the same ending."""
    beside = path.with_name(f".tmp-{path.name}")
    write(beside)
    os.replace(beside, path)


def _begin(folder: Path, checkpoint: Path, step: int) -> str:
    """Makes a checkpoint the first of the run in a new folder."""
    checkpoints.copy(checkpoint, folder, step)
    source = of_checkpoint(checkpoint)
    if source and not _same(source, folder):
        write_rows(folder / "metrics.jsonl", rows_before(source / "metrics.jsonl", step))
    return f"{folder} begins with {checkpoint}"


def _set_aside(folder: Path, step: int) -> str:
    """Moves the checkpoints after a step into a folder with the metrics and the settings that
    belong to them, which is a run's like any other."""
    later = [
        path for path in checkpoints.newest_first(folder) if checkpoints.number_of(path) > step
    ]
    if not later:
        return ""
    number = 1
    while os.path.exists(aside := folder / f"after_{checkpoints.name_of(step)}_{number}"):
        number += 1
    (aside / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        if os.path.exists(folder / name):
            shutil.copy(folder / name, aside / name)
    for path in later:
        os.replace(path, aside / "checkpoints" / path.name)
    return f"what {folder} has after step {step} is set aside: --output {aside} --resume latest goes on with that"


def _config(folder: Path) -> dict[str, Any] | None:
    """config.json as it is; None where there is none. Raises InputError."""
    if not os.path.exists(folder / "config.json"):
        return None
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        config = None
    if not config or not isinstance(config, dict):
        raise InputError(
            f"--output {folder}: its config.json cannot be read; choose another folder"
        )
    return config


def _same(folder: Path, other: Path | None) -> bool:
    return other is not None and os.path.realpath(folder) == os.path.realpath(other)


def _as(value: Any, hint: Any) -> Any:
    """A value of JSON as a setting of this type; raises ValueError."""
    kinds, origin = get_args(hint), get_origin(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(_as(part, kinds[0]) for part in value)
    if origin in (Union, UnionType):
        for kind in kinds:
            with contextlib.suppress(ValueError):
                return _as(value, kind)
    if type(value) is hint or origin is Literal and value in kinds:
        return value
    if hint is float and type(value) is int:
        return float(value)
    raise ValueError


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # the last line of a killed process
        return None
