"""Vary the premises of the papers from absent to strong, and test when each method helps.

A dial is a premise with its values. Thousands of trainings in worlds of points (lab/points.py) take
minutes. The statistics were declared before any run:

  outcome       the true score of held-out samples at the end: a method's minus GRPO's, paired by
                seed
  rates         learning rates are searched in other worlds, for GRPO as for every method. The
                reward that is trained on decides. If the best rate is at an edge of those tried,
                the next rate beyond the edge is tried too
  intervals     95%, jointly for all values of a dial, by the bootstrap of the largest |t|
  verdicts      no difference: the interval is within 0.01 of 0; helps, hurts: it does not contain
                0; open: anything else
  A/A           "GRPO again" is GRPO with another search, other prompts and other noise in the same
                worlds

    python -m lab.dials                           # every dial that is not finished, then figures
    python -m lab.dials --quick --only slas       # few seeds, dials whose names begin with "slas"
    python -m lab.dials --methods my_method.py    # adds your method to every dial
"""

import importlib.util
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.func import vmap

import bpgo
import grpo_base
import self_paced
import slas
from common.errors import InputError, one_line
from lab.points import Judge, Ladder, Setting, train

RESULTS = Path(__file__).with_name("dial_results")
MARGIN = 0.01  # of the truth, which is in [0, 1]: smaller differences do not matter
RATES = (0.002, 0.004, 0.008, 0.016)
LOWEST, HIGHEST = 0.0005, 0.064  # rates at which a search ends
SEARCH, FINAL, AGAIN = 1, 2, 3  # banks of worlds: of searches, of verdicts, of the A/A searches
SEEDS, QUICK_SEEDS = (16, 64), (4, 12)  # of a search, of a verdict
VARIANT_SEEDS = (8, 32)  # variants decide on the sign alone
CLIP = 5.0  # --adv-clip-max


# --- Methods: ({reward: [E, P, G]}, Known) -> [advantages [E, P, G]] ---


def each_run(function, *values):
    """Call a function of one run for each of E runs, and stack what it returns."""
    return torch.stack([function(*one) for one in zip(*values)])


def grpo(rewards, known, name=""):
    """Return GRPO's advantages for one reward, by default the world's trained reward."""
    reward = rewards[name or known.world.trained]
    return [grpo_base.compute_advantages(reward.flatten(0, 1), CLIP).view_as(reward)]


def grpo_clear(rewards, known):
    """Return GRPO's advantages, 0 for vague prompts. No real method knows which these are."""
    clear = 1 - known.again(known.prompts.vague)
    return [grpo(rewards, known)[0] * clear[..., None]]


def slas_by(rewards, known, gamma=0.5):
    """Return SLAS's advantages. gamma 0 is GRPO with the standard deviation of the batch."""
    shape = partial(slas.compute_advantages, gamma=gamma, adv_clip_max=CLIP)
    return [vmap(shape)(known.reward)]


def slas_auto(rewards, known, limit=4e-5):
    """Return SLAS's advantages with --gamma auto.

    limit: largest KL of an update, per dimension. It is that of images; KLs of points are larger.
    """
    shaped = {g: slas_by(rewards, known, gamma=g)[0] for g in slas.GAMMAS}
    regions = known.memory.setdefault(
        "regions", [slas.TrustRegion(limit, (0.9, 0.999)) for _ in known.reward]
    )
    powers = torch.stack([value.square().mean((1, 2)) for value in shaped.values()], 1)  # [E, n]
    updates = known.setting.minibatches
    gammas = [
        region.choose_gamma(dict(zip(slas.GAMMAS, power)), updates)
        for region, power in zip(regions, powers)
    ]
    advantages = torch.stack([shaped[gamma][run] for run, gamma in enumerate(gammas)])

    def observe(rows, kl):
        for region, own, row, cost in zip(regions, advantages, rows, kl):
            region.observe(own[row].square().mean(), cost)

    known.observe = observe
    known.memory.setdefault("gamma", []).append(sum(gammas) / len(gammas))
    return [advantages]


def expected(known, prior):
    """Return the expected reward of each prompt, [E, P or 1, 1].

    prior: running-mean, sft and constant as in bpgo.py; known: nearly the base model's mean reward;
    still: the reward of one sample without noise, as first-frame has that of one image.
    """
    if prior in ("sft", "known"):
        samples = known.setting.group_size if prior == "sft" else 64
        return known.base_reward(samples)[..., None]
    if prior == "still":
        scores = known.world.score(known.prompts.mean[:, :, None], known.prompts, torch.zeros(()))
        return known.again(scores[known.world.trained])
    if prior == "constant":
        return known.start + known.world.prior_error
    priors = known.memory.setdefault("priors", [bpgo.RunningMeanPrior() for _ in known.reward])
    return torch.stack([one.expect([], own) for one, own in zip(priors, known.reward)])


def bpgo_by(rewards, known, alpha=0.5, k=1.0, beta=0.5, lam=1.0, prior="running-mean", alone=False):
    """Return BPGO's advantages as printed, one for each of its two surrogates.

    beta 0: RAS alone; alpha 0: GRPO and CRT; alone: CRT's surrogate alone.
    """
    reward, prior = known.reward, expected(known, prior)
    mean = reward.nanmean(2, keepdim=True)
    trust = bpgo.reliability_weights(mean, prior, alpha, k / known.scale)
    stretched = bpgo.contrastive_rewards(reward - prior, 0, lam / known.scale)
    contrast = bpgo.compute_advantages(stretched.flatten(0, 1), CLIP).view_as(reward)
    if alone:  # eq 5
        return [contrast]
    return [trust * grpo(rewards, known)[0], beta * contrast]


def bpgo_released(rewards, known, prior="running-mean"):
    """Return BPGO's advantages by the equations and defaults of its authors' code."""
    reward = known.reward
    prior = expected(known, prior).expand_as(reward[..., :1]).flatten(0, 1)
    contrasted = bpgo.released_contrastive_rewards(reward.flatten(0, 1), prior, 50.0, 5.0)
    trust = bpgo.released_reliability_weights(contrasted, prior, 1.0, 1.0, (0.5, 1.5))
    return [(trust * bpgo.compute_advantages(contrasted, CLIP)).view_as(reward)]


def paced(rewards, known, variant="v1", alpha=4.0, only=0, names=(), beta=0.5, **settings):
    """Return Self-Paced GRPO's advantages.

    alpha 0 mixes all stages equally; names: the stages, by default all.
    """
    names = names or known.world.rewards
    stages = torch.stack([rewards[name].flatten(0, 1) for name in names])  # [K, E * P, G]
    thresholds = tuple(known.world.thresholds[name] for name in names)
    if variant == "v4":
        gates = self_paced.stage_utilities(stages, thresholds, beta, 10.0)
    else:
        gates = self_paced.stage_gates(stages, thresholds, beta, 10.0, **settings)
    weights = self_paced.stage_weights(gates, alpha, only)  # [K, E * P]
    known.reward = (weights[..., None] * stages).sum(0).view_as(known.reward)
    known.memory.setdefault("weights", []).append(weights.mean(1).tolist())
    return [self_paced.compute_advantages(known.reward.flatten(0, 1), CLIP).view_as(known.reward)]


def calibrated(world, setting):
    """Return the thresholds {stage: tau} as --calibrate measures them (self_paced.calibrate)."""
    thresholds = {}
    for name in world.rewards:
        seen = []
        train(world, partial(grpo, name=name), (0.004,), replace(setting, steps=50), watch=seen)
        means = [rewards[name].mean().item() for rewards, _, _ in seen]
        first, last = np.mean(means[:5]), np.mean(means[-5:])
        thresholds[name] = float(first + 0.7 * (last - first))
    return thresholds


# --- Dials: what varies, its values from absent to strong, and the methods ---


@dataclass(frozen=True)
class Method:
    """Hold how a method makes advantages, and which settings of a run it changes."""

    advantages: Callable
    changes: dict = field(default_factory=dict)
    again: bool = False
    """Whether this is the A/A check, with another search, other prompts and other noise."""


@dataclass(frozen=True)
class Dial:
    """Hold a premise with its values."""

    title: str
    axis: str
    turned: str
    """What varies: a setting of a run, or else an argument of the world."""
    values: tuple
    methods: dict
    world: type = Judge
    fixed: dict = field(default_factory=dict)
    """Other arguments of the world."""
    setting: Setting = Setting()
    added: bool = True
    """Whether the methods of --methods are trained here. False if the dial is about the settings of
    one method, or its worlds are those of another dial."""

    def setting_at(self, value, changes):
        """Return the settings of a run at a value."""
        turned = {self.turned: value} if hasattr(self.setting, self.turned) else {}
        return replace(self.setting, **changes, **turned)

    def world_at(self, value, bank, seeds, dimensions):
        """Return a bank's worlds at a value."""
        turned = {} if hasattr(self.setting, self.turned) else {self.turned: value}
        return self.world(bank, seeds, dimensions, **self.fixed, **turned)


GRPO = Method(grpo)
A_A = {"GRPO again": Method(grpo, again=True)}
IDEAL = {"vague prompts left out": Method(grpo_clear)}
GAMMAS = {f"gamma {g:g}": Method(partial(slas_by, gamma=g)) for g in (0, 0.25, 0.5, 1, 2, 3)}
SOME = {name: GAMMAS[name] for name in ("gamma 0", "gamma 0.5", "gamma 1")}
RAS, CRT = partial(bpgo_by, beta=0.0), partial(bpgo_by, alpha=0.0)
PARTS = {"RAS": Method(RAS), "CRT": Method(CRT), "RAS and CRT": Method(bpgo_by)}
ALPHAS = {f"alpha {a:g}": Method(partial(RAS, alpha=a)) for a in (0.1, 0.3, 0.5, 0.7, 0.9)}
PRIORS = {
    f"{form}, {prior}": Method(partial(function, prior=prior))
    for form, function in (("printed", bpgo_by), ("released", bpgo_released))
    for prior in ("running-mean", "known", "sft", "still")
}
PREVIOUS = partial(paced, gate="previous")
PACED = {
    "v1 as printed": Method(partial(paced, gate="own")),
    "v1, previous mean": Method(PREVIOUS),
    "v1, previous mean, 1 - Hoyer": Method(partial(PREVIOUS, saturation="one-minus-hoyer")),
    "v4": Method(partial(paced, variant="v4", alpha=1.0)),
    "equal weights": Method(partial(paced, alpha=0.0)),
}
STAGES = {
    "stages 1 and 3": Method(partial(paced, gate="own", names=("quality", "truth"))),
    "stage 2 alone": Method(partial(paced, only=2)),
}
LONG = Setting(steps=160)
ERROR = "standard deviation of the error (0: premise absent)"
LIKING = "size of the preference (0: none)"
UNSURE = "score of vague prompts (low: the premise, high: its opposite)"

DIALS = {
    "slas-chance": Dial(
        "SLAS: random errors; half of the groups nearly equal", ERROR, "noise",
        (0, 0.025, 0.05, 0.1, 0.2, 0.4),
        {**SOME, "gamma auto": Method(slas_auto), **IDEAL, **A_A},
    ),
    "slas-exploit": Dial(
        "SLAS: the judge prefers one direction", LIKING, "noise",
        (0, 0.0125, 0.025, 0.05, 0.1),
        {**SOME, "gamma 2": GAMMAS["gamma 2"], **A_A}, fixed={"kind": "style"},
    ),
    "bpgo-unsure": Dial(
        "BPGO: samples of vague prompts score alike", UNSURE, "unsure",
        (0, 0.2, 0.4, 0.6, 0.9),
        {**PARTS, "RAS and CRT, sft prior": Method(partial(bpgo_by, prior="sft")), **A_A},
    ),
    "paced-floor": Dial(
        "Self-Paced: the last stage is flat for the base model",
        "floor of the last stage (0: premise absent)", "floor",
        (0, 0.2, 0.3, 0.4, 0.5), {**PACED, **A_A}, world=Ladder, setting=LONG,
    ),
    "slas-signal": Dial(
        "SLAS: how far the judge separates samples",
        "share of the truth in their scores (1: premise absent)", "signal",
        (1, 0.5, 0.25, 0.1, 0), SOME, fixed={"noise": 0.05},
    ),
    "slas-gamma": Dial(
        "SLAS: over gamma", "share of prompts with scores that are error alone", "vague",
        (0, 0.5, 0.8), GAMMAS, fixed={"noise": 0.05, "signal": 0.0}, added=False,
    ),
    "bpgo-priors": Dial(
        "BPGO: printed and released, with four priors", UNSURE, "unsure", (0, 0.4, 0.9),
        PRIORS, added=False,
    ),
    "bpgo-wrong-prior": Dial(
        "BPGO: a wrong constant prior, vague prompts score low",
        "prior minus the base model's mean reward", "prior_error", (-0.4, -0.2, 0, 0.2, 0.4),
        {
            "RAS": Method(partial(RAS, prior="constant")),
            "CRT": Method(partial(CRT, prior="constant")),
            "released": Method(partial(bpgo_released, prior="constant")),
        },
        fixed={"unsure": 0.0}, added=False,
    ),
    "bpgo-vague-error": Dial(
        "BPGO: vague prompts score low, with random errors", "standard deviation of these errors",
        "noise_vague", (0, 0.05, 0.1, 0.2, 0.4), {**PARTS, **IDEAL},
        fixed={"unsure": 0.0, "noise": 0.02},
    ),
    "bpgo-bad-error": Dial(
        "BPGO's CRT: errors are largest for bad samples",
        "additional error of the worst samples (0: none)", "noise_bad", (0, 0.1, 0.3, 0.6),
        {
            "CRT": Method(CRT), "CRT, beta 2": Method(partial(CRT, beta=2.0)),
            "CRT alone (eq 5)": Method(partial(bpgo_by, alone=True)),
        },
        fixed={"vague": 0.0, "noise": 0.02},
    ),
    "bpgo-alpha": Dial(
        "BPGO: over alpha, RAS alone", "score of vague prompts", "unsure", (0, 0.4, 0.9), ALPHAS,
        added=False,
    ),
    "bpgo-second": Dial(
        "BPGO: two right answers, the judge knows one", "distance between them",
        "second", (0, 0.5, 1.0), PARTS, fixed={"unsure": 0.0},
    ),
    "paced-conflict": Dial(
        "Self-Paced: the easy stages have another target",
        "distance between the targets (floor 0.4)", "conflict",
        (0, 0.25, 0.5), {**PACED, **STAGES}, world=Ladder, fixed={"floor": 0.4}, setting=LONG,
    ),
    "paced-steps": Dial(
        "Self-Paced: a head start or a better end", "training steps (floor 0.4)", "steps",
        (80, 160, 640),
        {name: PACED[name] for name in ("v1, previous mean, 1 - Hoyer", "equal weights")},
        world=Ladder, fixed={"floor": 0.4}, setting=LONG, added=False,
    ),
    "grpo-groups": Dial(
        "Do larger groups replace the methods?", "samples per prompt", "group_size",
        (4, 8, 16), {"gamma 0": GAMMAS["gamma 0"], **PARTS}, fixed={"unsure": 0.0, "noise": 0.1},
    ),
    "grpo-choices": Dial(
        "GRPO: choices without a paper's claim", LIKING, "noise",
        (0, 0.1, 0.4),
        {
            "same noise": Method(grpo, {"same_noise": True}),
            "best 4 of 8": Method(grpo, {"best_of": 4}),
            "one update": Method(grpo, {"minibatches": 1}),
            "KL 0.01": Method(grpo, {"kl_coef": 0.01}),
            "dance": Method(grpo, {"sde": "dance", "noise_level": 0.5}),
            "ddim": Method(grpo, {"sde": "ddim"}),
            "cps": Method(grpo, {"sde": "cps"}),
        },
        fixed={"kind": "style"}, added=False,
    ),
}  # fmt: skip
QUICK = {  # dial: values and methods of --quick
    "slas-chance": ((0, 0.05, 0.4), ("gamma 0", "gamma 0.5")),
    "slas-exploit": ((0, 0.05, 0.1), ("gamma 0", "gamma 2")),
    "bpgo-unsure": ((0, 0.4, 0.9), ("RAS", "CRT")),
    "paced-floor": ((0, 0.4), ("v1, previous mean, 1 - Hoyer", "equal weights")),
}
# Cells that must keep their sign in other sizes, samplers and budgets: {dial: (values, methods)}
KEY = {
    "slas-chance": ((0, 0.05), ("gamma 0", "gamma 0.5")),
    "slas-exploit": ((0.05,), ("gamma 0", "gamma 0.5", "gamma 2")),
    "bpgo-unsure": ((0, 0.9), tuple(PARTS)),
    "paced-floor": ((0.4,), tuple(PACED)),
}
VARIANTS = {
    "groups of 16": {"prompts_per_step": 4, "group_size": 16},
    "one update": {"minibatches": 1},
    "dance noise": {"sde": "dance", "noise_level": 0.5},
    "width 96": {"hidden": 96},
    "16 dimensions": {"dimensions": 16},
    "four times the steps": {"steps": 4},  # times those of the dial
}


# --- Search and cells ---


def best_rate(mean_of, rates=RATES):
    """Return the rate with the highest reward, and {rate: reward} of those tried.

    mean_of: rates -> rewards. While the best rate is at an edge, one more rate is tried there. The
    result is the peak of the parabola through the best rate and its neighbours, on a log scale.
    """

    def rewards(rates):  # a run that diverged is the worst
        return [-math.inf if math.isnan(reward) else reward for reward in mean_of(rates)]

    tried = dict(zip(rates, rewards(rates)))
    while True:
        best = max(tried, key=tried.get)
        ordered = sorted(tried)
        more = {ordered[0]: best / 2, ordered[-1]: best * 2}.get(best)
        if more is None or not LOWEST <= more <= HIGHEST:
            break
        tried[more] = rewards((more,))[0]
    if more is not None:
        return best, tried
    left, middle, right = (tried[best * factor] for factor in (0.5, 1, 2))
    bend = left - 2 * middle + right
    if not bend or math.isinf(bend):
        return best, tried
    return best * 2 ** (0.5 * (left - right) / bend), tried


def of_file(path):
    """Return the method of a file: its `dial(rewards, known)`, or else its compute_advantages."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "dial"):
        return Method(module.dial)

    def advantages(rewards, known):
        return [each_run(lambda reward: module.compute_advantages(reward, CLIP), known.reward)]

    return Method(advantages)


def cell(dial, value, method, seeds, changes, thresholds):
    """Search a rate for one method at one value, train the verdict's seeds with it, return a cell.

    changes: settings that a variant changes. thresholds: those of the stages of a Ladder.
    """
    begun = time.process_time()
    setting = dial.setting_at(value, {**changes, **method.changes})
    banks = (AGAIN if method.again else SEARCH, FINAL)
    search, final = (dial.world_at(value, *bank, setting.dimensions) for bank in zip(banks, seeds))
    search.thresholds = final.thresholds = thresholds

    def mean_of(rates):
        found = train(search, method.advantages, rates, setting)
        return found[search.trained][..., -1].mean(1).tolist()

    rate, tried = best_rate(mean_of)
    watch = []
    chance = int(method.again)
    found = train(final, method.advantages, (rate,), setting, chance=chance, watch=watch)
    memory = watch[-1][2].memory
    ends = {name: values[0, :, 1].double().numpy() for name, values in found.items()}
    row = {
        "rate": round(rate, 6),
        "tried": tried,
        "base": round(found["truth"][0, :, 0].mean().item(), 5),
        "mean": round(ends["truth"].mean(), 5),
        "error": round(ends["truth"].std(ddof=1) / math.sqrt(seeds[1]), 5),
        "ends": {name: np.round(values, 5).tolist() for name, values in ends.items()},
    }
    kept = {name: memory[name] for name in ("weights", "gamma") if name in memory}
    row |= {name: np.round(values, 3).tolist() for name, values in kept.items()}
    return {**row, "seconds": round(time.process_time() - begun, 1)}


def cells_of(name, value, methods, seeds, changes, files):
    """Return the cells of a dial's value, [{value, method, ...}]: one job of a process."""
    torch.set_num_threads(1)
    dial, thresholds = DIALS[name], {}
    if dial.world is Ladder:
        setting = dial.setting_at(value, changes)
        world = dial.world_at(value, SEARCH, seeds[0], setting.dimensions)
        thresholds = calibrated(world, setting)
    known = {"GRPO": GRPO, **dial.methods, **{Path(path).stem: of_file(path) for path in files}}
    rows = {
        method: cell(dial, value, known[method], seeds, changes, thresholds) for method in methods
    }
    return [{"value": value, "method": method, **row} for method, row in rows.items()]


# --- Statistics ---


def intervals(differences, draws=4000):
    """Return (mean, low, high) of each row of paired differences [values, seeds].

    The intervals hold for all rows together with a probability of 95%. Seeds are resampled, and the
    half width is the 95% quantile of the largest |t| over the rows, in standard errors.
    """
    differences = np.asarray(differences)
    number = differences.shape[1]
    mean = differences.mean(1)
    error = differences.std(1, ddof=1) / math.sqrt(number) + 1e-12
    index = np.random.default_rng(0).integers(number, size=(draws, number))
    again = differences[:, index]  # [values, draws, seeds]
    spread = again.std(2, ddof=1) / math.sqrt(number) + 1e-12
    largest = np.abs((again.mean(2) - mean[:, None]) / spread).max(0)
    half = np.quantile(largest, 0.95) * error
    return [(m, m - h, m + h) for m, h in zip(mean.tolist(), half.tolist())]


def verdict(low, high):
    """Return the verdict on a difference with this interval."""
    if -MARGIN <= low and high <= MARGIN:
        return "no difference"
    if low > 0:
        return "helps"
    return "hurts" if high < 0 else "open"


def findings(result):
    """Return {method: {value: (mean, low, high, verdict)}} of a dial's results."""
    ends = {(row["method"], row["value"]): row["ends"]["truth"] for row in result["cells"]}
    values = [value for method, value in ends if method == "GRPO"]
    found = {}
    for method in dict.fromkeys(method for method, _ in ends):
        own = [value for value in values if (method, value) in ends]
        if method != "GRPO" and own:
            pairs = [np.subtract(ends[method, value], ends["GRPO", value]) for value in own]
            rows = [(*one, verdict(*one[1:])) for one in intervals(pairs)]
            found[method] = dict(zip(own, rows))
    return found


def read(folder, name):
    """Return the results of a dial, or None."""
    path = Path(folder) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# --- The command ---


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """Beginnings of names of dials, such as slas or bpgo-unsure. Default: all."""
    quick: bool = False
    """Few values, methods and seeds, into runs/dials-quick: a minute or two."""
    variants: bool = False
    """Train the main cells of four dials instead, in six variants of sizes, sampler and budget,
    with half of the seeds."""
    methods: tuple[str, ...] = ()
    """Files of your own methods, each with compute_advantages(reward [P, G], adv_clip_max) or with
    dial(rewards, known), as docs/dials.md explains. Results go to runs/dials."""
    figures: bool = False
    """Draw figures and print tables of the saved results, without training."""
    output: str = ""
    """Folder of the results. Default: lab/dial_results; runs/dials-quick with --quick, else
    runs/dials with --methods."""
    workers: int = 2
    """Number of processes, each with one thread."""


def plan(args, folder):
    """Return the jobs that are not done: [(file, dial, value, methods, changes)]."""
    chosen = {name: dial for name, dial in DIALS.items() if name.startswith(args.only or "")}
    if not chosen:
        raise InputError(f"--only {' '.join(args.only)}: no dial has such a name. The dials are "
                         f"{', '.join(DIALS)}.")  # fmt: skip
    jobs = []
    for name, dial in chosen.items():
        values, methods = dial.values, tuple(dial.methods)
        if args.quick or args.variants:
            values, methods = (QUICK if args.quick else KEY).get(name, ((), ()))
        own = tuple(Path(path).stem for path in args.methods) if dial.added else ()
        for variant, changes in (VARIANTS if args.variants else {"": {}}).items():
            if "steps" in changes:
                changes = {"steps": changes["steps"] * dial.setting.steps}
            file = f"{name}--{variant}" if variant else name
            done = read(folder, file)
            made = made_by(name, seeds_of(args), changes)
            if done and any(done[key] != made[key] for key in ("seeds", "settings", "world")):
                raise InputError(
                    f"{folder / file}.json: it was made with other settings. Remove it, or give "
                    "another --output."
                )
            known = {(row["value"], row["method"]) for row in (done or {"cells": []})["cells"]}
            for value in values:
                every = ("GRPO", *methods, *own)
                left = tuple(method for method in every if (value, method) not in known)
                if left:
                    jobs.append((file, name, value, left, changes))
    return jobs


def seeds_of(args):
    """Return the numbers of seeds (of a search, of a verdict)."""
    if args.quick:
        return QUICK_SEEDS
    return VARIANT_SEEDS if args.variants else SEEDS


def made_by(name, seeds, changes):
    """Return what the results of a dial depend on, {name: value} in the types of JSON."""
    dial = DIALS[name]
    made = {
        "seeds": seeds,
        "settings": asdict(replace(dial.setting, **changes)),
        "world": {"kind": dial.world.__name__, "turned": dial.turned, **dial.fixed},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    return json.loads(json.dumps(made))


def keep(folder, file, name, value, seeds, changes, rows):
    """Add cells to a dial's file."""
    result = read(folder, file) or {**made_by(name, seeds, changes), "cells": []}
    result["cells"] += rows
    values, methods = list(DIALS[name].values), ["GRPO", *DIALS[name].methods]
    methods += sorted({row["method"] for row in result["cells"]} - set(methods))  # a reader's own
    result["cells"].sort(key=lambda row: (values.index(row["value"]), methods.index(row["method"])))
    result["differences"] = findings(result)  # to GRPO: mean, low, high, verdict
    text = json.dumps(result, separators=(",", ":"))
    unfinished = Path(folder) / f".{file}.tmp"
    unfinished.write_text(text.replace('{"value"', '\n{"value"') + "\n", encoding="utf-8")
    unfinished.replace(Path(folder) / f"{file}.json")


def main(args):
    usual = "runs/dials-quick" if args.quick else "runs/dials" if args.methods else RESULTS
    folder = Path(args.output or usual)
    folder.mkdir(parents=True, exist_ok=True)
    if args.methods and not args.quick and folder != RESULTS:
        for path in RESULTS.glob("*.json"):  # results of the other methods
            if not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())
    seeds = seeds_of(args)
    jobs = [] if args.figures else plan(args, folder)
    begun, seconds = time.time(), 0.0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        waiting = {}
        for job in jobs:
            _, name, value, methods, changes = job
            files = tuple(args.methods)
            future = pool.submit(cells_of, name, value, methods, seeds, changes, files)
            waiting[future] = job
        for number, future in enumerate(as_completed(waiting), start=1):
            file, name, value, _, changes = waiting[future]
            rows = future.result()
            keep(folder, file, name, value, seeds, changes, rows)
            seconds += sum(row["seconds"] for row in rows)
            print(
                f"{number}/{len(jobs)} {file} {value:g}: {time.time() - begun:.0f} s, "
                f"{seconds:.0f} core-seconds",
                flush=True,
            )
    from lab import dial_figures, dial_pages

    for path in dial_figures.draw(folder):
        print(path)
    for name in DIALS:
        if read(folder, name):
            print(f"\n{dial_pages.table(folder, name)}")
    if folder == RESULTS:
        dial_pages.write()


if __name__ == "__main__":
    with one_line():
        main(tyro.cli(Args, description=__doc__))
