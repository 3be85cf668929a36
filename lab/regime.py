"""Measure which regime a reward is in: which positions of the dials (lab/dials.py) it resembles.

It reads the scores of an evaluation with several samples per prompt and, for most measures, two
judges that were trained independently of each other:

    python evaluate.py --model flux --prompts hpsv2:photo --samples 8 --reward hpsv2.1 pickscore
    python -m lab.regime runs/evaluation-XXXXXXXX

Measures of the groups, which are the samples of a prompt:

    flat        share of groups whose scores are all equal. Self-Paced GRPO's premise is that the
                last stage is flat for the base model
    tightness   spread of the tightest quarter of the groups over that of the widest. SLAS's premise
                is that some groups have nearly equal scores
    agreement   Kendall's tau of the two judges within a group, averaged. If it is low in the
                tightest groups, their small differences are errors
    unsure      mean score of the quarter of the prompts on which the judges agree least, minus that
                of the others, in spreads of a group. BPGO's premise is that these prompts score low
    kept        if the evaluation has a trained run: gain of the second judge over that of the
                reward, both in spreads. Far below 1: the run exploits its reward

The same measures of the base model at each value of a dial, with as many samples per prompt, give
the position. A position compares these numbers alone. The differences to GRPO that are printed
beside it hold for the worlds of the dial.

Shapes: P prompts, S samples of each.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from common import groups
from common.errors import InputError, loading, one_line
from common.prompts import caption_of, read_prompts
from evaluation.tables import aligned
from lab import dials
from worlds import points

PROMPTS = 64  # of each of 16 worlds, for the reference of a dial's value
WORLDS = 16
ENOUGH = 32  # prompts, with 4 samples: fewer do not fill quarters
DIAL_OF = {  # measure: the dial whose position it gives
    "flat": "paced-floor",
    "tightness": "slas-signal",
    "agreement": "slas-chance",
    "unsure": "bpgo-unsure",
    "kept": "slas-exploit",
}


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """Folder of an evaluation by evaluate.py, with --samples 4 or more."""
    reward: str = ""
    """The reward to measure. Default: the first of the evaluation."""
    second: str = ""
    """A second judge, independent of it. Default: the second reward of the evaluation, if any."""
    run: str = ""
    """The trained run for `kept`. Default: the first run of the evaluation, if any."""


# --- Measures ---


def spread(scores):
    """Return the standard deviation within each group: [P, S] -> [P]."""
    return scores.std(1, unbiased=False)


def agreement(first, second):
    """Return Kendall's tau-a of two judges within each group: [P, S] each -> [P] in [-1, 1]."""
    signs = [torch.sign(scores[:, :, None] - scores[:, None]) for scores in (first, second)]
    number = first.shape[1]
    return (signs[0] * signs[1]).sum((1, 2)) / (number * (number - 1))


def measures(first, second=None):
    """Return {measure: number} of a reward's scores [P, S], and of a second judge's."""
    width, quarter = spread(first), len(first) // 4
    order = width.argsort()
    tight, wide = order[:quarter], order[-quarter:]
    found = {
        "flat": groups.zero_variance(first).float().mean().item(),
        "spread": width.mean().item(),
        "tightness": (width[tight].mean() / width[wide].mean()).item(),
    }
    if second is not None:
        agree = agreement(first, second)
        least, others = agree.argsort().tensor_split([quarter])
        mean = first.mean(1)
        found |= {
            "agreement": agree.mean().item(),
            "agreement, tightest quarter": agree[tight].mean().item(),
            "agreement, widest quarter": agree[wide].mean().item(),
            "unsure": ((mean[least].mean() - mean[others].mean()) / width.mean()).item(),
        }
    return found


def kept(base, run):
    """Return the second judge's gain over the reward's, in spreads of the base model.

    base, run: (scores of the reward, of the second judge), [P, S] each; of a run any shape.
    """
    first, second = (
        (after.mean() - before.mean()) / spread(before).mean() for before, after in zip(base, run)
    )
    return (second / first).item()


# --- Positions ---


def base_groups(dial, value, samples, bank=dials.FINAL):
    """Return the rewards {name: [P, S]} of base samples at a dial's value, by two judges.

    The judges differ in their random errors. bank: a number; another one gives other worlds.
    """
    world = dial.world_at(value, bank, WORLDS, points.D)
    g = points.drawn(bank, "regime")
    prompts = world.prompts(PROMPTS, g)
    mean = prompts.mean[:, :, None].expand(-1, -1, samples, -1)
    x = mean + points.SPREAD**0.5 * torch.randn(mean.shape, generator=g)
    errors = [torch.randn(x.shape[:-1], generator=g) for _ in range(2)]
    judged = [world.score(x, prompts, error) for error in errors]
    return [{name: one.flatten(0, 1) for name, one in rewards.items()} for rewards in judged]


def references(measure, samples, results=dials.RESULTS):
    """Return {value: number} of a measure, for the values of its dial.

    `kept` needs the results of its dial, in which the second judge is the truth.
    """
    dial = dials.DIALS[DIAL_OF[measure]]
    trained = dial.world.trained
    base = {value: base_groups(dial, value, samples) for value in dial.values}
    if measure != "kept":
        return {v: measures(*(one[trained] for one in two))[measure] for v, two in base.items()}
    result = dials.read(results, DIAL_OF[measure]) or {"cells": []}
    found = {}
    for row in result["cells"]:
        if row["method"] == "GRPO":
            both = [(base[row["value"]][0][name], torch.tensor(row["ends"][name]))
                    for name in (trained, "truth")]  # fmt: skip
            found[row["value"]] = kept(*zip(*both))
    return found


def position(number, reference):
    """Return the dial's value at which the measure has this number, between its neighbours.

    reference {value: number}: rising or falling. Numbers beyond its ends get the end.
    """
    values, numbers = zip(*sorted(reference.items(), key=lambda pair: pair[1]))
    return float(np.interp(number, numbers, values))


def advice(measure, place, results=dials.RESULTS):
    """Return what the dial's nearest value found: 'method +0.030 helps, ...', or ''."""
    result = dials.read(results, DIAL_OF[measure])
    if not result:
        return ""
    found = dials.findings(result)
    said = []
    for method, row in found.items():
        nearest = min(row, key=lambda value: abs(value - place))
        mean, _, _, verdict = row[nearest]
        if method in dials.DIALS[DIAL_OF[measure]].methods and "again" not in method:
            said.append(f"{method} {mean:+.3f} {verdict}")
    return f"at {nearest:g}: {', '.join(said)}"


# --- The command ---


def scores_of(folder, model):
    """Return {reward: scores [P, S]} of a model in an evaluation's folder, and its settings.

    Samples without a score are NaN.
    """
    with loading("lab.regime", folder, do="name the folder of an evaluation"):
        settings = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        lines = (folder / f"scores/{model}.jsonl").read_text(encoding="utf-8").splitlines()
        parts = {row["part"]: row["scores"] for row in map(json.loads, lines[1:])}
        rows = [parts[number] for number in range(len(parts))]
    if settings["layout"]:
        raise InputError(f"{folder}: has samples of --layout. Evaluate without it.")
    samples = settings["samples"]
    found = {}
    for reward in rows[0]:
        values = [float("nan") if v is None else v for row in rows for v in row[reward]]
        if len(values) % samples:
            raise InputError(f"{folder}: is not finished. Start the same evaluate.py again.")
        found[reward] = torch.tensor(values).view(samples, -1).T  # evaluate.py has samples first
    return found, settings


def report(args):
    """Return the measures and positions of an evaluation, as lines of text."""
    scores, settings = scores_of(args.folder, "base")
    names = list(scores)
    reward = args.reward or names[0]
    others = [name for name in names if name != reward]
    second = args.second or (others[0] if others else "")
    for name in filter(None, (reward, second)):
        if name not in scores:
            raise InputError(f"--reward {name}: the evaluation has {', '.join(names)}.")
    judges = [scores[name] for name in (reward, second) if name]
    known = ~torch.stack(judges).isnan().any(2).any(0)  # [P]: every sample has its scores
    judges = [scores[known] for scores in judges]
    number, samples = judges[0].shape
    if number < ENOUGH or samples < 4:
        raise InputError(
            f"{args.folder}: {number} prompts of {samples} samples are too few. Evaluate at least "
            f"{ENOUGH} prompts with --samples 4 or more."
        )
    found = measures(*judges)
    runs = sorted(path.stem for path in (args.folder / "scores").glob("*.jsonl"))
    runs = [args.run] if args.run else [name for name in runs if name != "base"]
    if second and runs:
        after, _ = scores_of(args.folder, runs[0])
        found["kept"] = kept(judges, [after[name][known] for name in (reward, second)])
    title = f"{reward}, second judge {second or 'none'}: {number} prompts of {samples} samples"
    rows = [("measure", "number", "dial", "position", "differences to GRPO there")]
    for measure, value in found.items():
        reference = references(measure, samples) if measure in DIAL_OF else {}
        if not reference:
            rows.append((measure, f"{value:.3f}", "", "", ""))
            continue
        place = position(value, reference)
        rows.append((measure, f"{value:.3f}", DIAL_OF[measure], f"{place:.2g}",
                     advice(measure, place)))  # fmt: skip
    lines = [title, aligned(rows)]
    if second:
        prompts = [p for p, one in zip(read_prompts(settings["prompts"]), known.tolist()) if one]
        least = agreement(*judges).argsort()[:3].tolist()
        lines.append(
            "The judges agree least on: " + "; ".join(caption_of(prompts[n]) for n in least)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with one_line():
        print(report(tyro.cli(Args, description=__doc__)))
