"""Evaluate and compare: the base model and runs on the same prompts from the same noise, noise-free
as a user samples.

    python evaluate.py RUN [RUN ...]             # on GPUs: accelerate launch evaluate.py RUN --prompts hpsv2:all ...

A RUN is a training run's folder (its newest checkpoint, or else its export),
RUN/checkpoints/step_NNNNNN, RUN/export or RUN/export_ema: all weights, LoRA or sharded alike. The
flags' defaults are the first run's settings, so that a checkpoint gets the reward of its own
evaluation once more (eval_reward in metrics.jsonl). Without a RUN, --model is looked at.

On the screen, in results.json and results.csv: of each reward the mean over prompts, a 95% interval
(bootstrap over prompts), and how often a run's sample beats the base's of the same prompt and
noise, ties counted half. Scores are kept as they come: the same command goes on after a kill, on
any number of processes, to the same table bit for bit.

Shapes: S samples of each of P prompts, each from noise of its own; a part, the unit of work, are n
of these P * S."""

import dataclasses
import json
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from tqdm import tqdm
from tyro.conf import Positional, arg

from common import cli, errors, models, rewards
from common.cli import From
from common.errors import InputError
from common.prompts import fields_of, read_prompts
from common.trainer import placing, run_folder
from common.trainer.processes import Processes
from evaluation import layouts, tables, trained
from evaluation.folder import Evaluator, Folder, digest
from worlds.scene import parse


@dataclass
class Args(cli.Scored):
    SETTINGS = {}

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="[RUN ...]")] = ()
    """RUN, RUN/checkpoints/step_NNNNNN, RUN/export or RUN/export_ema, several separated by spaces,
    before all flags."""
    averaged: bool = False
    """Of each run the moving average of the weights (--ema) instead of the weights."""

    # --- Samples ---
    prompts: str = ""
    """Prompts, named as for training, or a benchmark's: hpsv2:STYLE, geneval, unigenbench,
    unigenbench:long, vbench. Default: the run's --eval-prompts."""
    samples: Annotated[int, From(1, 1000)] = 1
    """Samples of each prompt."""
    seed: Annotated[int, From(0, 2**31)] = 0
    """Of the noise that samples start from; 0 is that of the training's evaluations."""

    # --- What is left of it ---
    layout: Literal["", "geneval", "vbench", "unigenbench", "hpsv2"] = ""
    """Write the samples as this benchmark's own tool reads them, of its own prompts (or a file like
    its own, --prompts) and as many as it wants; then print its command. Scores only by the --reward
    that is given."""
    output: str = ""
    """Folder of the evaluation, in which it goes on; more runs may join. Default: one by the
    settings, below runs/."""
    shown: Annotated[int, From(0, 64)] = 8
    """Prompts in the picture of the models side by side."""


# What changes no number: an evaluation goes on with others of these.
FREE = (
    "runs",
    "averaged",
    "output",
    "shown",
    "offload_encoders",
    "process_timeout",
    "trust_remote_code",
    "judge_url",
)
FREE += ("judge_timeout", "judge_retries", "judge_concurrency")
PASSED = "verifier:passed"  # the reward that makes a table of GenEval's tasks


def defaults(words: list[str]) -> Args:
    """What a flag is that the command line does not have: the first run's setting, or that of
    --model. Raises InputError for what is no run."""
    if words and not words[0].startswith("-"):
        run = trained.find(words[0])
        own = run.settings()
        if [*own.reward] != run.config.get(
            "reward"
        ):  # code in a file, which a run's folder alone does not make run
            own.reward = ()
    else:
        own = cli.defaults(cli.Args, *cli.given(words, "--model"))
    names = {field.name for field in dataclasses.fields(Args)} & {
        field.name for field in dataclasses.fields(own)
    }
    values = {
        name: getattr(own, name)
        for name in names
        if name not in ("seed", "output", "trust_remote_code")
    }
    of_layout = dict(prompts="", reward=()) if any(cli.given(words, "--layout")) else {}
    return Args(**{**values, "prompts": own.eval_prompts, **of_layout})


def check(args: Args, run: Processes, runs: list[trained.Trained]) -> None:
    """Raises InputError for what flags, runs and launch cannot mean together."""
    cli.check_bounds(args)
    if runs and sys.argv[1].startswith("-"):
        raise InputError(
            "name runs before flags, which have the first one's settings: evaluate.py "
            f"{args.runs[0]} ..."
        )
    if args.averaged and not runs:
        raise InputError(
            "--averaged belongs to a run, before all flags: evaluate.py RUN --averaged"
        )
    if run.sharding:
        raise InputError(
            "evaluate.py does not shard the model; launch it with configs/ddp.yaml: it reads "
            "sharded runs"
        )
    if runs and runs[0].config["model"] != args.model:
        raise InputError(
            f"--model {args.model}: {args.runs[0]} trained {runs[0].config['model']}; name runs "
            "before flags"
        )
    if not args.prompts and not args.layout:
        raise InputError(
            "--prompts is missing: the run has no --eval-prompts; give a file or the name of a set"
        )
    if not args.reward and not args.layout:
        raise InputError(
            "--reward is missing: the run's own is code in a file, or it has none; name it, or "
            "others"
        )
    if args.layout and args.samples > 1:
        raise InputError(
            f"--samples {args.samples}: --layout {args.layout} says how many there are of each "
            "prompt"
        )
    if args.layout and models.family_of(args.model, args.source).video != (args.layout == "vbench"):
        raise InputError(
            f"--layout {args.layout}: it takes {'clips' if args.layout == 'vbench' else 'images'}"
        )


def evaluate(args: Args) -> None:
    """Scores base and runs, and writes tables and pictures. Raises InputError, RunError."""
    # --- Setup ---
    run, runs = Processes(args), trained.find_all(args.runs, args.averaged)
    args.micro_batch = cli.rows_of(args.micro_batch)
    check(args, run, runs)
    layout = layouts.plan(args.layout, args.prompts) if args.layout else None
    prompts = layout.prompts if layout else read_prompts(args.prompts)
    reward_weights = rewards.parse(args.reward) if args.reward or not layout else {}
    scorers = rewards.load(args.reward, prompts, **cli.of_rewards(args))
    reward_weights = rewards.in_units(args.reward_units, reward_weights, scorers)
    found = {"base": None, **{weights.name: weights for weights in runs}}
    whose = {
        name: weights.identity() if weights else {"base": args.source or args.model}
        for name, weights in found.items()
    }
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in FREE}
    folder = Folder(
        args.output, {**settings, "prompts_sha256": digest(prompts, map(fields_of, prompts))}, whose
    )
    model = models.load(args.model, run.dtype, prompts, **cli.of_model(args))
    placing.place(run, model)
    rewards.try_out(scorers, model, prompts[0])
    sigmas = model.sigmas(args.sampling_steps, args.shift)  # [T+1]
    evaluator = Evaluator(run, model, scorers, sigmas, prompts, folder, layout, args.shown)
    samples = (
        layout.samples()
        if layout
        else [(p, which) for which in range(args.samples) for p in range(len(prompts))]
    )
    parts = torch.tensor(samples).split(run.score_batch)
    folder.together(run, evaluator.begin)
    todo = {
        name: [n for n, part in enumerate(parts) if evaluator.lacks(name, n, part)]
        for name in found
    }
    run.together(None)  # all have looked before anyone writes

    # --- Samples and scores ---
    left = sum(len(parts[n]) for numbers in todo.values() for n in numbers)
    total = len(found) * len(samples)
    bar = tqdm(
        total=total,
        initial=total - left,
        disable=not run.is_main,
        dynamic_ncols=True,
        unit="sample",
    )
    with bar:  # an error's line is not written behind it
        for name in sorted(found, key=lambda name: trains_all(found[name])):
            if found[name] and todo[name]:
                trained.load(run, model, found[name])
            for start in range(0, len(todo[name]), run.world):
                turn = todo[name][start : start + run.world]  # a part for each process
                mine = [evaluator.score(name, parts[n]) for n in turn[run.index :][:1]]
                scored = [part for of_process in run.together(mine) for part in of_process]
                evaluator.check(scored, torch.cat([parts[n] for n in turn]))
                folder.together(
                    run, folder.add, name, {n: given for n, (given, _) in zip(turn, scored)}
                )
                bar.update(sum(len(parts[n]) for n in turn))

    # --- Table ---
    if layout:
        folder.together(run, tell_layout, layout, folder, found)
    if scorers:
        folder.together(run, tell, args, folder, prompts, reward_weights, found, parts)


def trains_all(weights: trained.Trained | None) -> bool:
    """Whether they are all weights of the model and no LoRA: these come last, as nothing brings the
    base's back. None: the base's."""
    return bool(weights) and not weights.config.get("lora_rank")


def tell_layout(layout: layouts.Layout, folder: Folder, names: Iterable[str]) -> None:
    """Checks the samples of each model in the folder and prints what the benchmark's own tool is
    started with. Raises InputError."""
    for name in names:
        layout.check(folder.path, name)
        print(*layout.commands(folder.path, name), sep="\n")


def tell(
    args: Args,
    folder: Folder,
    prompts: list[str],
    reward_weights: dict[str, float],
    names: Iterable[str],
    parts: Sequence[torch.Tensor],
) -> None:
    """The tables on the screen and as files, and the picture, of the models `names`, the base
    first; parts: all of them, each [n, 2]. Raises OSError."""
    shape, asked = (
        (len(prompts), int(max(part[:, 1].max() for part in parts)) + 1),
        sum(map(len, parts)),
    )
    table, tasks, marks, base = {}, {}, {}, {}
    for name in names:  # the base first
        found = {reward: folder.scores(name, reward, parts, shape) for reward in reward_weights}
        if len(found) > 1:
            found["sum"] = rewards.weighted_sum(found, reward_weights)
        table[name] = {r: tables.summary(v, base.get(r), asked) for r, v in found.items()}
        base = base or found
        if PASSED in found:
            tasks[name] = tables.by_task(found[PASSED], [parse(prompt).task for prompt in prompts])
        marks[name] = found[next(iter(reward_weights))][: args.shown, 0]
    run_folder.write_text(folder.path / "results.csv", tables.as_csv(table, tasks))
    results = {
        "settings": folder.settings,
        "weights": folder.whose,
        "rewards": table,
        "tasks": tasks,
    }
    run_folder.write_text(folder.path / "results.json", json.dumps(results, indent=2) + "\n")
    print(tables.table(table), *[tables.task_table(tasks)] * bool(tasks), sep="\n\n")
    shown = f" and {folder.picture(prompts[: args.shown], marks, args.fps)}" if args.shown else ""
    print(f"look at {folder.path}/results.csv{shown}")


def main(args: Args) -> None:
    """`evaluate`; Ctrl-C ends it with a line that says how to go on: raises Stopped."""
    try:
        evaluate(args)
    except KeyboardInterrupt:
        raise errors.Stopped(
            signal.SIGINT, "SIGINT: the scores so far are kept; the same command goes on"
        ) from None


if __name__ == "__main__":
    errors.run(main, cli.parse(Args, __doc__, defaults))
