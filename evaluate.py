"""Evaluate and compare: the base model and runs on the same prompts from the same noise, noise-free as a user samples.

    python evaluate.py RUN [RUN ...]             # on GPUs: accelerate launch evaluate.py RUN --prompts hpsv2:all ...

A RUN is a training run's folder (its newest checkpoint, or else its export), RUN/checkpoints/step_NNNNNN, RUN/export or
RUN/export_ema: all weights, LoRA or sharded alike. The flags' defaults are the first run's settings, so that a
checkpoint gets its own exam's reward once more (eval_reward in metrics.jsonl). Without a RUN, --model is looked at.

On the screen, in results.json and results.csv: of each reward the mean over prompts, a 95% interval (bootstrap over
prompts), and how often a run's sample beats the base's of the same prompt and noise, ties counted half. Scores are kept
as they come: the same command goes on after a kill, on any number of processes, to the same table bit for bit.

Shapes: S samples of each of P prompts, each from noise of its own; a part, the unit of work, are n of these P * S.
"""

import dataclasses
import json
import signal
from dataclasses import dataclass
from typing import Annotated

import torch
from tqdm import tqdm
from tyro.conf import Positional, arg

from common import arguments, errors, evaluation, heldout, models, rewards, run_folder, scores, trained
from common.arguments import Above, From
from common.errors import InputError, RunError
from common.prompts import read_prompts
from common.rewards.verifier import parse
from common.runtime import Processes


@dataclass
class Args(arguments.Scored):
    SETTINGS = {}

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="[RUN ...]")] = ()
    """RUN, RUN/checkpoints/step_NNNNNN, RUN/export or RUN/export_ema, several separated by spaces, before all flags."""
    averaged: bool = False
    """Of each run the moving average of the weights (--ema) instead of the weights."""

    # --- Samples ---
    prompts: str = ""
    """Prompts, named as for training, or a benchmark's: hpsv2:STYLE, geneval, unigenbench, unigenbench:long, vbench.
    Default: the run's --eval-prompts."""
    samples: Annotated[int, From(1, 1000)] = 1
    """Samples of each prompt."""
    seed: Annotated[int, From(0, 2**31)] = 0
    """Of the noise that samples start from; 0 is that of the training's exams."""
    sampling_steps: Annotated[int, From(2, 1000)] = 16
    """Denoising steps."""
    shift: Annotated[float, Above(0, 100)] = 3.0
    """Shift of the sigmas."""
    guidance: Annotated[float, From(0, 1000)] = 3.5
    """Guidance scale."""
    guidance_2: Annotated[float, From(0, 1000)] = 0.0
    """Guidance scale of the second expert of a model that has two; 0: the same."""
    batched_guidance: bool = False
    """Both halves of classifier-free guidance in one forward pass."""
    height: Annotated[int, From(0, 1e5)] = 0
    """Height of the samples in pixels; 0: the model's own."""
    width: Annotated[int, From(0, 1e5)] = 0
    """Width of the samples in pixels; 0: the model's own."""
    frames: Annotated[int, From(0, 1e4)] = 0
    """Frames of a clip; 0: the model's own."""
    fps: Annotated[float, Above(0, 1000)] = 15.0
    """Frames a second at which clips are saved and scored."""

    # --- What is left of it ---
    output: str = ""
    """Folder of the evaluation, in which it goes on; more runs may join. Default: one by the settings, below runs/."""
    shown: Annotated[int, From(0, 64)] = 8
    """Prompts in the picture of the models side by side."""
    micro_batch: Annotated[int, From(1, 1e6)] = 8
    """Rows of one forward pass."""
    decode_batch: Annotated[int, From(0, 1e6)] = 0
    """Rows that the VAE decodes at once; 0: a micro-batch."""
    offload_encoders: bool = False
    """Keep the text and image encoders off the accelerator except when a new prompt has to be encoded."""
    process_timeout: Annotated[float, Above(0, 1e5)] = 60.0
    """Minutes that processes wait for one another."""
    trust_remote_code: bool = False
    """Run the Python code that the repository of a --model or --judge-model brings along; else it is refused."""


# What changes no number: an evaluation goes on with others of these.
FREE = ("runs", "averaged", "output", "shown", "offload_encoders", "process_timeout", "trust_remote_code", "judge_url")
FREE += ("judge_timeout", "judge_retries", "judge_concurrency")
PASSED = "verifier:passed"  # the reward that makes a table of GenEval's tasks


def defaults(words):
    """What a flag is that the command line does not have: the first run's setting, or that of --model."""
    if words and not words[0].startswith("-"):
        own = trained.find(words[0]).settings()
    else:
        own = arguments.defaults(arguments.Args, *arguments.given(words, "--model"))
    names = {field.name for field in dataclasses.fields(Args)} & {field.name for field in dataclasses.fields(own)}
    values = {name: getattr(own, name) for name in names if name not in ("seed", "output", "trust_remote_code")}
    return Args(**{**values, "prompts": own.eval_prompts})


def check(args, run, runs):
    """Raises InputError for what flags, runs and launch cannot mean together."""
    arguments.check_bounds(args)
    if run.sharding:
        raise InputError("evaluate.py does not shard the model; launch it with configs/ddp.yaml: it reads sharded runs")
    if runs and runs[0].config["model"] != args.model:
        raise InputError(
            f"--model {args.model}: {args.runs[0]} trained {runs[0].config['model']}; name runs before flags"
        )
    if not args.prompts:
        raise InputError("--prompts is missing: the run has no --eval-prompts; give a file or the name of a set")


def evaluate(args):
    # --- Setup ---
    run, runs = Processes(args), trained.find_all(args.runs, args.averaged)
    check(args, run, runs)
    prompts, reward_weights = read_prompts(args.prompts), rewards.parse(args.reward)
    scorers = rewards.load(reward_weights, prompts, **arguments.of_rewards(args))
    found = {"base": None, **{weights.name: weights for weights in runs}}
    whose = {name: weights.identity() if weights else {"base": args.model} for name, weights in found.items()}
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in FREE}
    folder = evaluation.Folder(args.output, {**settings, "prompts_sha256": evaluation.digest(prompts)}, whose)
    P, S = len(prompts), args.samples
    samples = torch.cartesian_prod(torch.arange(S), torch.arange(P)).flip(1)  # [N, 2]: prompt, which
    parts = samples.split(run.score_batch)
    model = models.load(args.model, run.dtype, prompts, **arguments.of_model(args))
    sigmas = model.sigmas(args.sampling_steps, args.shift)  # [T+1]
    run.place(model)
    rewards.try_out(scorers, model, prompts[0])
    todo = {name: [n for n, part in enumerate(parts) if lacks(args, folder, name, n, part)] for name in found}
    together(run, folder, folder.begin)

    # --- Samples and scores ---
    total, left = len(found) * len(samples), sum(len(parts[n]) for numbers in todo.values() for n in numbers)
    bar = tqdm(total=total, initial=total - left, disable=not run.is_main, dynamic_ncols=True, unit="sample")
    for name in sorted(found, key=lambda name: trains_all(found[name])):
        if found[name] and todo[name]:
            trained.load(run, model, found[name])
        for start in range(0, len(todo[name]), run.world):
            turn = todo[name][start : start + run.world]  # a part for each process
            mine = [parts[n] for n in turn[run.index :][:1]]
            mine = [score_part(run, model, scorers, sigmas, folder, name, prompts, part) for part in mine]
            scored = [part for of_process in run.together(mine) for part in of_process]
            check_scored(scored, scorers, [prompts[prompt] for n in turn for prompt in parts[n][:, 0]])
            together(run, folder, folder.add, name, {n: given for n, (given, _) in zip(turn, scored)})
            bar.update(sum(len(parts[n]) for n in turn))
    bar.close()

    # --- Table ---
    if run.is_main:
        tell(args, folder, prompts, reward_weights, found, parts)


def trains_all(weights):
    """Whether they are all weights of the model and no LoRA: these come last, as nothing brings the base's back."""
    return bool(weights) and not weights.config.get("lora_rank")


def lacks(args, folder, name, number, part):
    """Whether scores or pictures of a part [n, 2] of a model's samples are not there yet."""
    return number not in folder.parts[name] or not all(folder.shown(name, p).exists() for p in pictured(args, part))


def pictured(args, part):
    """The prompts whose sample in a part [n, 2] is in the picture."""
    return [prompt for prompt, which in part.tolist() if which == 0 and prompt < args.shown]


def score_part(run, model, scorers, sigmas, folder, name, prompts, part):
    """A part [n, 2] of a model's samples: ({reward: [n]}, ""), or ({}, why there are no scores)."""
    args = run.args
    captions, streams = [prompts[prompt] for prompt in part[:, 0]], part[:, 1] * len(prompts) + part[:, 0]
    try:
        batch = sigmas, args.micro_batch, run.device, args.seed
        found, media = heldout.examine(model, scorers, captions, streams, *batch)
        if not media.isfinite().all():
            return {}, f"the samples of {name} are no numbers: its weights have diverged; name an earlier checkpoint"
        for prompt in pictured(args, part):
            folder.show(name, prompt, media[part[:, 0].tolist().index(prompt)])
        return {name: values.cpu() for name, values in found.items()}, ""
    except Exception as error:
        reason = cannot_write(folder, error) if isinstance(error, OSError) else errors.of_the_machine(error)
        if not reason:
            raise
        return {}, reason


def check_scored(scored, scorers, prompts):
    """All processes together: raises RunError where one of these parts has no scores, or none that can be counted."""
    if reason := next(filter(None, (reason for _, reason in scored)), ""):
        raise RunError(reason)
    for name, scorer in scorers.items():
        values = torch.cat([found[name] for found, _ in scored])[:, None]
        if getattr(scorer, "masks", False):  # here a part may have no score at all
            values = torch.where(values.isnan(), 0.0, values)
        rewards.check_finite({name: values}, scorers, prompts)


def together(run, folder, action, *words):
    """Writes into the folder on the main process, while the others wait; where it fails, all of them stop."""
    reason = ""
    try:
        if run.is_main:
            action(*words)
    except OSError as error:
        reason = cannot_write(folder, error)
    if reason := run.first(reason):
        raise RunError(reason)


def cannot_write(folder, error):
    return f"cannot write into {folder.path} ({errors.text(error)}); is the disk full? The same command goes on"


def tell(args, folder, prompts, reward_weights, names, parts):
    """The tables on the screen and as files, and the picture."""
    table, tasks, marks, shape = {}, {}, {}, (len(prompts), args.samples)
    base = {}
    for name in names:  # the base first
        found = {reward: folder.scores(name, reward, parts, shape) for reward in reward_weights}
        if len(found) > 1:
            found["sum"] = rewards.weighted_sum(found, reward_weights)
        table[name] = {r: scores.summary(v, base.get(r)) for r, v in found.items()}
        base = base or found
        if PASSED in found:
            tasks[name] = scores.by_task(found[PASSED], [parse(prompt).task for prompt in prompts])
        marks[name] = found[next(iter(reward_weights))][: args.shown, 0]
    run_folder.write_text(folder.path / "results.csv", scores.as_csv(table, tasks))
    results = {"settings": folder.settings, "weights": folder.whose, "rewards": table, "tasks": tasks}
    run_folder.write_text(folder.path / "results.json", json.dumps(results, indent=2) + "\n")
    print(scores.table(table), *[scores.task_table(tasks)] * bool(tasks), sep="\n\n")
    shown = f" and {folder.picture(prompts[: args.shown], marks, args.fps)}" if args.shown else ""
    print(f"look at {folder.path}/results.csv{shown}")


def main(args):
    try:
        evaluate(args)
    except KeyboardInterrupt:
        raise errors.Stopped(signal.SIGINT, "SIGINT: the scores so far are kept; the same command goes on") from None


if __name__ == "__main__":
    errors.run(main, arguments.parse(Args, __doc__, defaults))
