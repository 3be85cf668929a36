"""Compare the base model and runs on the same prompts and initial noise.

Samples are made without noise in the denoising steps, as users make them.

    python evaluate.py RUN [RUN ...]
    accelerate launch evaluate.py RUN --prompts hpsv2:all ...     # on several GPUs

A RUN is the folder of a training run (its newest checkpoint, or else its export),
RUN/checkpoints/step_NNNNNN, RUN/export or RUN/export_ema. Full weights, LoRAs and sharded
checkpoints can be compared. The defaults of the flags are the settings of the first run, so a
checkpoint gets the eval_reward that metrics.jsonl has for it. Without a RUN, --model is evaluated.

The results are printed and written to results.json and results.csv. For each reward they hold the
mean over prompts, a 95% interval (bootstrap over prompts), and the win rate: how often a run's
sample beats the base's for the same prompt and noise, with ties counted half. Scores are saved
after every part. The same command continues after a kill, on any number of processes, and gives
the same table bit for bit.

Shapes: S samples of each of P prompts, each with its own noise; a part, the unit of work, has n of
these P * S.
"""

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

from common import cli, errors, models
from common.args import From, Scored, check_bounds, rows_of, score_batch
from common.args import defaults as defaults_of
from common.errors import InputError
from common.prompts import fields_of, read_prompts
from common.reporting.files import write_text
from common.rewards import Rewards, weighted_sum
from common.trainer import Processes
from common.trainer.evaluator import load_to_sample
from evaluation import layouts, tables, trained
from evaluation.folder import Folder, digest
from evaluation.sampler import Sampler
from evaluation.trained import Trained
from worlds.scene import parse


@dataclass
class Args(Scored):
    SETTINGS = models.MODELS

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="[RUN ...]")] = ()
    """Runs to evaluate: RUN, RUN/checkpoints/step_NNNNNN, RUN/export or RUN/export_ema, separated
    by spaces, before all flags. None: evaluate --model alone."""
    averaged: bool = False
    """Evaluate the moving average of each run's weights (--ema) instead of the weights."""

    # --- Samples ---
    prompts: str = ""
    """Prompts to evaluate on: a file or set as for training, or a benchmark: hpsv2:STYLE, geneval,
    unigenbench, unigenbench:long, vbench. Default: the --eval-prompts of the first run."""
    samples: Annotated[int, From(1, 1000)] = 1
    """Number of samples per prompt."""
    seed: Annotated[int, From(0, 2**31)] = 0
    """Seed of the initial noise of the samples. 0: the noise of the evaluations during training."""

    # --- Results ---
    layout: Literal["", "geneval", "vbench", "unigenbench", "hpsv2"] = ""
    """Write the samples in the folders that this benchmark's official tool reads, and print the
    tool's command. The benchmark sets the prompts (--prompts may name a file in its format) and the
    number of samples. Add --reward to score them as well. Empty: no such folders."""
    output: str = ""
    """Folder of the evaluation. The same command continues it, and may name more runs. Default:
    runs/evaluation-XXXXXXXX, a hash of the settings and runs."""
    shown: Annotated[int, From(0, 64)] = 8
    """Number of prompts in the picture that shows the models side by side. 0: no picture."""


# Settings that change no number, so an evaluation continues with other values of them.
FREE = (
    *("runs", "averaged", "output", "shown", "offload_encoders", "process_timeout"),
    *("trust_remote_code", "judge_url", "judge_timeout", "judge_retries", "judge_concurrency"),
)
# Settings that are not taken from the first run, or from the model.
OWN = ("prompts", "seed", "output", "trust_remote_code")
PASSED = "verifier:passed"  # the reward that makes a table of GenEval's tasks


# --- Settings ---


def defaults(words: list[str]) -> Args:
    """Return the default of every flag: the first run's setting, or that of --model.

    words: the command line. Raises InputError if its first word is neither a flag nor a run.
    """
    if words and not words[0].startswith("-"):
        found = trained.find(words[0])
        source = found.settings()
        if list(source.reward) != found.config.get("reward"):
            source.reward = ()  # a reward in a file of code: a run's folder alone does not run code
        source.height = source.eval_height or source.height
        source.width = source.eval_width or source.width
        source.sampling_steps = source.eval_steps or source.sampling_steps
    else:
        source = defaults_of(cli.Args, cli.given(words, "--model") or "tiny-flux")
    shared = {field.name for field in dataclasses.fields(cli.Args)} - {*OWN}
    values = {}
    for field in dataclasses.fields(Args):
        if field.name in shared:
            values[field.name] = getattr(source, field.name)
    if cli.given(words, "--layout"):
        values["reward"] = ()
    else:
        values["prompts"] = source.eval_prompts
    return Args(**values)


def check(args: Args, runs: list[Trained]) -> None:
    """Raise InputError for flags and runs that do not fit together."""
    check_bounds(args)
    if runs and sys.argv[1].startswith("-"):
        raise InputError(
            f"{args.runs[0]}: runs come before flags, whose defaults are the first run's settings. "
            "Move it to the front."
        )
    if args.averaged and not runs:
        raise InputError("--averaged: needs a run. Name it before all flags.")
    if runs and runs[0].config["model"] != args.model:
        raise InputError(
            f"--model {args.model}: {args.runs[0]} trained {runs[0].config['model']}. Leave it out."
        )
    if args.layout:
        _check_layout(args)
        return
    if not args.prompts:
        raise InputError("--prompts: the run has no --eval-prompts. Give a file or a set's name.")
    if not args.reward:
        raise InputError("--reward: the run has none, or one in a file of code. Name a reward.")


def _check_layout(args: Args) -> None:
    if args.samples > 1:
        raise InputError(
            f"--samples {args.samples}: --layout {args.layout} sets the number of samples of each "
            "prompt. Leave it out."
        )
    if models.family_of(args.model, args.source).video != (args.layout == "vbench"):
        media = "clips" if args.layout == "vbench" else "images"
        raise InputError(f"--layout {args.layout}: takes {media}. Choose another --model.")


# --- The evaluation ---


def evaluate(args: Args) -> None:
    """Score base and runs, and write tables and pictures. Raises InputError or RunError."""
    # --- Setup ---
    processes = Processes(args.process_timeout)
    if processes.fsdp:
        raise InputError("evaluate.py: does not shard the model. Launch it with configs/ddp.yaml.")
    runs = trained.find_all(args.runs, args.averaged)
    args = dataclasses.replace(args, micro_batch=rows_of(args.micro_batch))
    check(args, runs)
    layout = layouts.plan(args.layout, args.prompts) if args.layout else None
    prompts = layout.prompts if layout else read_prompts(args.prompts)
    rewards = Rewards(args, prompts, clips=models.family_of(args.model, args.source).video)
    weights = {"base": None, **{run.name: run for run in runs}}  # {model: Trained}
    folder = _folder(args, prompts, weights)
    model = load_to_sample(args.model, prompts, processes, **args.model_settings())
    rewards.smoke_test(model.try_out(prompts[0]), prompts[0])
    sampler = Sampler(
        model,
        rewards,
        prompts,
        sigmas=model.sigmas(args.sampling_steps, args.shift),
        micro_batch=args.micro_batch,
        device=processes.device,
        seed=args.seed,
        folder=folder,
        layout=layout,
        fps=args.fps,
        pictured=args.shown,
    )
    samples = [(p, which) for which in range(args.samples) for p in range(len(prompts))]
    if layout:
        samples = layout.samples()
    parts = torch.tensor(samples).split(score_batch(args.micro_batch, args.reward_batch))
    with folder.writing(processes):
        if processes.is_main:
            sampler.begin()
    todo = {}  # {model: numbers of parts}
    for name in weights:
        todo[name] = [n for n, part in enumerate(parts) if sampler.lacks(name, n, part)]
    processes.collect(None)  # all have looked before one writes

    # --- Samples and scores ---
    left = sum(len(parts[n]) for numbers in todo.values() for n in numbers)
    total = len(weights) * len(samples)
    bar = tqdm(
        total=total,
        initial=total - left,
        disable=not processes.is_main,
        dynamic_ncols=True,
        unit="sample",
    )
    with bar:  # an error's line is not written behind it
        for name in sorted(weights, key=lambda name: trains_all(weights[name])):
            if weights[name] and todo[name]:
                trained.load(model, weights[name], autocast=processes.precision != "no")
            for start in range(0, len(todo[name]), processes.world):
                numbers = todo[name][start : start + processes.world]  # a part for each process
                found = []  # this process's, none if there are fewer parts
                with folder.writing(processes):
                    for number in numbers[processes.rank :][:1]:
                        media = sampler.sample(name, parts[number])
                        found.append(sampler.score(media, parts[number]))
                        sampler.keep(name, media, parts[number])
                scores = [one for of_process in processes.collect(found) for one in of_process]
                sampler.check(scores, torch.cat([parts[n] for n in numbers]))
                with folder.writing(processes):
                    if processes.is_main:
                        for number, one in zip(numbers, scores):
                            folder.add(name, number, one)
                bar.update(sum(len(parts[n]) for n in numbers))

    # --- Results ---
    with folder.writing(processes):
        if processes.is_main and layout:
            print_layout(layout, folder, weights)
        if processes.is_main and rewards.scorers:
            write_results(args, folder, prompts, rewards.weights, names=weights, parts=parts)


def _folder(args: Args, prompts: list[str], weights: dict[str, Trained | None]) -> Folder:
    """Return the evaluation's folder, identified by the settings and the weights."""
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in FREE}
    settings["prompts_sha256"] = digest(prompts, map(fields_of, prompts))
    whose = {}
    for name, run in weights.items():
        whose[name] = run.identity() if run else {"base": args.source or args.model}
    return Folder(args.output, settings, whose)


def trains_all(weights: Trained | None) -> bool:
    """Return whether a run trained all weights, not a LoRA. None is the base.

    Such runs are evaluated last, because nothing restores the base's weights after them.
    """
    return weights is not None and not weights.config.get("lora_rank")


# --- Results ---


def print_layout(layout: layouts.Layout, folder: Folder, names: Iterable[str]) -> None:
    """Check each model's files and print the commands of the benchmark's own tool.

    Raises InputError.
    """
    for name in names:
        layout.check(folder.path, name)
        print(*layout.commands(folder.path, name), sep="\n")


def write_results(
    args: Args,
    folder: Folder,
    prompts: list[str],
    reward_weights: dict[str, float],
    names: Iterable[str],
    parts: Sequence[torch.Tensor],
) -> None:
    """Print and write the tables of the models `names`, the base first, and save the picture.

    parts: all parts, each [n, 2]. Raises OSError.
    """
    asked = sum(map(len, parts))
    shape = (len(prompts), 1 + max(int(part[:, 1].max()) for part in parts))  # (P, S)
    first = next(iter(reward_weights))
    table, tasks, marks, base = {}, {}, {}, {}
    for name in names:
        scores = {r: folder.scores(name, r, parts, shape) for r in reward_weights}
        if len(scores) > 1:
            scores["sum"] = weighted_sum(scores, reward_weights)
        table[name] = {r: tables.summary(v, base.get(r), asked) for r, v in scores.items()}
        base = base or scores
        if PASSED in scores:
            tasks[name] = tables.by_task(scores[PASSED], [parse(p).task for p in prompts])
        marks[name] = scores[first][: args.shown, 0]
    write_text(folder.path / "results.csv", tables.as_csv(table, tasks))
    results = {
        "settings": folder.settings,
        "weights": folder.whose,
        "rewards": table,
        "tasks": tasks,
    }
    write_text(folder.path / "results.json", json.dumps(results, indent=2) + "\n")
    print(tables.table(table))
    if tasks:
        print(f"\n{tables.task_table(tasks)}")
    shown = ""
    if args.shown:
        shown = f" and {folder.picture(prompts[: args.shown], marks, args.fps)}"
    print(f"look at {folder.path}/results.csv{shown}")


def main(args: Args) -> None:
    """Run the evaluation. Raises Stopped for Ctrl-C."""
    try:
        evaluate(args)
    except KeyboardInterrupt:
        line = "SIGINT: the scores so far are saved; the same command continues"
        raise errors.Stopped(signal.SIGINT, line) from None


if __name__ == "__main__":
    errors.run(main, cli.parse(Args, __doc__, defaults))
