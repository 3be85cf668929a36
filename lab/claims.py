"""What the study asks: claims of the three papers, and some of ours, each as a comparison that can
be computed.

A claim has a source, a measure of a run, the setting that it speaks for and those that it is
compared with. Its verdict comes from the interval alone (lab/verdicts.py): *holds* where the whole
interval of the paired differences lies on the claimed side of 0, *does not hold* where it lies on
the other side, else *undecided at this scale*.

Image claims are put to tiny-flux and tiny-sd, video claims to tiny-wan and tiny-wan-i2v and, marked
so, to images, on which more seeds can be had. TASKS are what is rewarded:

    proxy       the tiny CLIP, a learned reward with some errors (SLAS); the verifier is watched
    doubtful    the verifier with noise, and unsure of vague captions (BPGO); the verifier is
                watched
    truth       the verifier itself
    stages      quality, then layout (clips: smoothness), then the verifier itself (Self-Paced)

REMARKS says why a verdict may be as it is and what scale would change it; the table prints them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common import cli
from common.args import defaults

SEEDS, MAIN_SEEDS = 5, 8  # of a comparison, and of those that the papers' first figures make
SEARCH_SEEDS = (100, 101)  # that no claim uses

IMAGES, CLIPS = ("tiny-flux", "tiny-sd"), ("tiny-wan", "tiny-wan-i2v")
OWN = "lab/study_rewards.py:"
PRIORS = {
    "tiny-flux": "running-mean",
    "tiny-sd": "running-mean",
    "tiny-wan": "sft",
    "tiny-wan-i2v": "first-frame",
}

# A run's size, the same for all that it is compared with: 64 samples a step (tiny-wan 48), and of
# the noisy denoising steps the share that all three papers train on, where there are more than
# three.
_SIZE = dict(timestep_fraction=0.6, steps=30, eval_every=5, sample_every=0, reward_batch=64)
SIZE = {
    "tiny-flux": dict(_SIZE, prompts_per_step=8, group_size=8, minibatches=2),
    "tiny-sd": dict(_SIZE, prompts_per_step=8, group_size=8, minibatches=2),
    "tiny-wan": dict(_SIZE, prompts_per_step=6, group_size=8, minibatches=1, eval_every=6),
    "tiny-wan-i2v": dict(
        _SIZE, prompts_per_step=16, group_size=4, minibatches=1, eval_every=6, timestep_fraction=1.0
    ),
}
_IMAGE_TASKS = {
    "truth": dict(
        reward=("verifier",), watch=("verifier:quality", "verifier:layout", f"{OWN}Vague")
    ),
    "proxy": dict(
        reward=("clip",), reward_path=("clip=assets/tiny-clip",),
        watch=("verifier", "verifier:quality")
    ),
    "doubtful": dict(
        reward=(f"{OWN}NoisyAmbiguous",), watch=("verifier", "verifier:quality", f"{OWN}Vague")
    ),
    "stages": dict(reward=("verifier:quality", "verifier:layout", "verifier")),
}  # fmt: skip
_CLIP_TASKS = {
    "truth": dict(
        reward=("motion",), watch=("motion:quality", "motion:smooth", f"{OWN}MotionVague")
    ),
    "doubtful": dict(
        reward=(f"{OWN}MotionNoisyAmbiguous",),
        watch=("motion", "motion:quality", f"{OWN}MotionVague"),
    ),
    "stages": dict(reward=("motion:quality", "motion:smooth", "motion")),
}
TASKS = {**dict.fromkeys(IMAGES, _IMAGE_TASKS), **dict.fromkeys(CLIPS, _CLIP_TASKS)}

# --- What is run ---


@dataclass(frozen=True)
class Setting:
    """A script with flags on a model: what differs by its seed alone. Or, in the place of a script,
    a probe:NAME, which trains nothing (lab/probes.py)."""

    script: str
    model: str
    task: str = ""
    flags: tuple = ()  # ((name, value), ...), beyond those of size, task and search

    def settings(self, tuned=None):
        """All that tells it from others: {name: value}, as JSON has it. tuned: {name: value} of the
        search."""
        if self.script.startswith("probe:"):
            return {"script": self.script, "model": self.model}
        chosen = {
            **STARTS[self.model],
            **(tuned or {}),
            **SIZE[self.model],
            **TASKS[self.model][self.task],
        }
        chosen |= dict(self.flags)
        chosen = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in chosen.items()
        }
        return {"script": self.script, "model": self.model, "task": self.task, **chosen}

    @property
    def searched(self):
        """Whose search it takes its settings from: its own script's, or else the baseline's, on
        this model and task."""
        own = (self.method, self.model, self.task)
        return own if own in SEARCHED else ("grpo_base", *own[1:])

    @property
    def method(self):
        """The name of the variant that its flags make of its script, or the script's own."""
        for name, (script, flags) in VARIANTS.items():
            if script == self.script and flags.items() <= dict(self.flags).items():
                return name
        return self.script


def plain(settings):
    """Whether a run has no flags of its own, beyond those that belong to its script: the methods as
    they are."""
    shared = setting("grpo_base", settings["model"], settings["task"]).settings()
    own = settings.keys() - shared.keys() - {"source", "prior", "thresholds", "gate"}
    if own or settings.get("gate", "previous") != "previous":
        return False
    return settings.get("prior", PRIORS[settings["model"]]) == PRIORS[settings["model"]]


# Other equations of a script: {name: (script, flags)}, each with a search of its own. The runs of
# `self_paced` have --gate previous, once the default.
VARIANTS = {
    "bpgo released": ("bpgo", {"variant": "released"}),
    "self_paced own": ("self_paced", {"gate": "own"}),
    "self_paced v4": ("self_paced", {"variant": "v4"}),
}


def setting(method, model, task, **flags):
    """The Setting of a script or of one of VARIANTS, with further flags."""
    script, own = VARIANTS.get(method, (method, {}))
    if method == "self_paced":
        own = {"gate": "previous"}
    flags = {**own, **flags}
    if script == "self_paced":  # thresholds are the model's; a change of them makes other runs
        import self_paced

        tau = defaults(self_paced.Args, model).thresholds
        if own == {"gate": "previous"}:
            tau = tau[:-1]
        flags = {"thresholds": tau, **flags}
    if script == "bpgo":
        flags = {"prior": PRIORS[model], **flags}
    return Setting(script, model, task, tuple(sorted(flags.items())))


# --- The search ---

# Of learning rate and clip range, each on its own, from the model's own values: the same points for
# every method, and the best of them taken. With one optimizer update a rollout nothing is ever
# clipped.
STARTS = {
    model: {
        name: getattr(defaults(cli.Args, model), name) for name in ("learning_rate", "clip_range")
    }
    for model in IMAGES + CLIPS
}
RATES, LOWER = (0.5, 1, 2, 4), (0.25, 0.5, 1, 2)
LOW = [
    ("tiny-sd", "doubtful"),
    ("tiny-wan", "doubtful"),
    ("tiny-wan", "stages"),
]  # four times the rate unlearns
CLIPPED = {"tiny-flux": (5,)}
SEARCHED = [
    *((script, "tiny-flux", "proxy") for script in ("grpo_base", "slas")),
    *((script, "tiny-flux", "doubtful") for script in ("grpo_base", "bpgo")),
    ("grpo_base", "tiny-flux", "truth"),
    ("self_paced", "tiny-flux", "stages"),
    *((script, "tiny-sd", "proxy") for script in ("grpo_base", "slas")),
    *((script, "tiny-sd", "doubtful") for script in ("grpo_base", "bpgo")),
    *((script, "tiny-wan", "doubtful") for script in ("grpo_base", "bpgo")),
    ("self_paced", "tiny-wan", "stages"),
    *((script, "tiny-wan-i2v", "doubtful") for script in ("grpo_base", "bpgo")),
    *(("bpgo released", model, "doubtful") for model in ("tiny-flux", "tiny-wan")),
    *(("self_paced own", model, "stages") for model in ("tiny-flux", "tiny-wan")),
    *(("self_paced v4", model, "stages") for model in ("tiny-flux", "tiny-wan")),
]


def points(model, task):
    """The settings that a search tries: [{name: value}], the model's own among them."""
    start, factors = STARTS[model], LOWER if (model, task) in LOW else RATES
    rates = [{**start, "learning_rate": start["learning_rate"] * factor} for factor in factors]
    return rates + [
        {**start, "clip_range": start["clip_range"] * factor} for factor in CLIPPED.get(model, ())
    ]


# --- Measures of a run ---
# A run is {"steps", "evaluations": {name: [...]}, "training": {name: [...]}, "numbers": {name: x}}.


@dataclass(frozen=True)
class Measure:
    words: str
    of: Callable


NAMES = {
    "truth": "verifier", "reward": "reward trained on", "quality": "quality",
    "vague": "verifier, vague captions"
}  # fmt: skip


def end(name):
    return Measure(f"{NAMES[name]}, last evaluation", lambda run: run["evaluations"][name][-1])


def change(name):
    return Measure(
        f"{NAMES[name]}, last evaluation less the first",
        lambda run: run["evaluations"][name][-1] - run["evaluations"][name][0],
    )


def area(name, share=1.0):
    """The mean of the curve of evaluations over the first share of the steps: who rises faster has
    the larger one."""

    def mean(run):
        steps, values = run["steps"], run["evaluations"][name]
        last = math.ceil(share * (len(steps) - 1))
        parts = [(steps[i + 1] - steps[i]) * (values[i] + values[i + 1]) / 2 for i in range(last)]
        return sum(parts) / (steps[last] - steps[0])

    return Measure(f"{NAMES[name]}, mean over the {'run' if share == 1 else 'first half'}", mean)


def unsteadiness(name):
    """How far the evaluations lie from a smooth curve, the parabola that fits them best: the root
    of the mean square. Falls alone would favour whoever rises faster."""

    def distance(run):
        fit = np.polynomial.Polynomial.fit(run["steps"], run["evaluations"][name], 2)
        return float(
            np.sqrt(np.mean((run["evaluations"][name] - fit(np.array(run["steps"]))) ** 2))
        )

    return Measure(f"{NAMES[name]}, distance of evaluations from a smooth curve", distance)


def late_over_early(name, words):
    """The logarithm of the one over the other."""

    def of(run):
        early, late = _ends(run["training"][name])
        return math.log(late / early)

    return Measure(words, of)


def shift(name, words):
    return Measure(
        words, lambda run: _ends(run["training"][name])[1] - _ends(run["training"][name])[0]
    )


def _ends(values, number=5):
    number = min(number, len(values) // 2) or 1
    return sum(values[:number]) / number, sum(values[-number:]) / number


def number(name, words):
    return Measure(words, lambda run: run["numbers"][name])


# --- The claims ---


@dataclass(frozen=True)
class Claim:
    """text holds if measure(ours) - mean of measure(others), by seed, is above 0; below 0 with
    `lower`."""

    key: str
    paper: str
    source: str
    text: str
    measure: Measure
    ours: Setting
    others: tuple = ()
    lower: bool = False
    seeds: int = SEEDS
    than: Measure | None = None  # of the others, where it is another one

    @property
    def name(self):
        return f"{self.key}:{self.ours.model}"

    @property
    def settings(self):
        return (self.ours, *self.others)


def slas():
    found = []
    for model in IMAGES:
        probe = Setting("probe:loudness", model)
        low_high = "mean |A| of the tightest quarter of groups over that of the widest"
        found += [
            Claim("loud", "SLAS", "proposition 1: follows from eq 1 and 20",
                  "a std for each prompt makes groups of tiny spread as loud as any",
                  number("grpo", low_high), probe, (probe,), than=number("slas", low_high)),
            Claim("misled", "SLAS", "section 1's example, section 5",
                  "in groups of tiny spread the proxy ranks less truly",
                  number("true_low", "correlation of proxy and verifier within the tightest "
                                     "quarter, and the widest"),
                  probe, (probe,), lower=True, than=number("true_high", "")),
        ]  # fmt: skip
    for model, seeds in (("tiny-flux", MAIN_SEEDS), ("tiny-sd", SEEDS)):
        grpo, slas = (setting(script, model, "proxy") for script in ("grpo_base", "slas"))
        figure = "figure 2" if model == "tiny-flux" else "figure 2 is of FLUX"
        hacks = (  # GenEval with and without GRPO: FLUX .66 -> .54, Stable Diffusion 1.4 .42 -> .51
            ("GRPO on the proxy loses of what the base model could", True)
            if model == "tiny-flux" else ("GRPO on the proxy gains truth", False)
        )  # fmt: skip
        found += [
            Claim("slas-faster", "SLAS", figure, "SLAS rises faster than GRPO on the proxy",
                  area("reward"), slas, (grpo,), seeds=seeds),
            Claim("slas-higher", "SLAS", figure, "SLAS ends higher than GRPO on the proxy",
                  end("reward"), slas, (grpo,), seeds=seeds),
            Claim("grpo-hacks", "SLAS", "table 1", hacks[0],
                  change("truth"), grpo, lower=hacks[1], seeds=seeds),
            Claim("slas-keeps", "SLAS", "table 1", "SLAS on the proxy ends with more truth than "
                                                   "GRPO",
                  end("truth"), slas, (grpo,), seeds=seeds),
            Claim("slas-gains", "SLAS", "table 1", "SLAS on the proxy gains truth",
                  change("truth"), slas, seeds=seeds),
        ]  # fmt: skip
    model, half = "tiny-flux", setting("slas", "tiny-flux", "proxy")
    for gamma in (0.0, 0.25, 1.0, "auto"):  # the paper prints none; that it is not 0 is its claim
        other = setting("slas", model, "proxy", gamma=gamma)
        text, source = (
            f"gamma 0.5 ends with more truth than gamma {gamma}",
            "ours" if gamma else "section 5",
        )
        found.append(Claim(f"gamma-{gamma}", "SLAS", source, text, end("truth"), half, (other,)))
    linear, grpo = setting("slas", model, "proxy", gamma=0.0), setting("grpo_base", model, "proxy")
    text = "the batch's std alone (gamma 0) ends with more truth than GRPO"
    found.append(Claim("gamma-grpo", "SLAS", "section 4.2", text, end("truth"), linear, (grpo,)))
    none = setting("slas", model, "proxy", normalize="none")
    found.append(
        Claim(
            "batch-std",
            "SLAS",
            "section 5",
            "the batch's std is better than none",
            area("reward"),
            half,
            (none,),
        )
    )
    return found


# BPGO's sources, by model. By the reward trained on, its table 1 has it above GRPO on videos and
# below on images, its table 2 CRT alone above GRPO on text-to-video and below on the others.
IMAGE_TRAINED = "section 4.2 (table 1 has HPSv2 .2434, GRPO .2564)"
CRT = {
    "tiny-flux": "section 4.3, of videos (table 2 has HPSv2 .2562, GRPO .2564)",
    "tiny-wan": "table 2",
    "tiny-wan-i2v": "section 4.3 (table 2 has VideoCLIP-XL 2.0682, GRPO 2.0713)",
}
# Its curves are of videos, figure 6 of text-to-video and figure 7 of image-to-video, and of the
# reward trained on.
CURVES = {
    "tiny-wan": ("figure 6", "figure 7, of image-to-video"),
    "tiny-wan-i2v": ("section 4.3, as figure 6", "figure 7"),
}
TABLE_2 = "section 4.3 (in table 2, both are best in 3 of 9)"


def bpgo():
    found = []
    for model in PRIORS:
        source, shown = CURVES.get(
            model, ("abstract; figure 6 is of videos", "figure 7, of videos")
        )
        seeds = MAIN_SEEDS if model == "tiny-flux" else SEEDS
        grpo, both = (setting(script, model, "doubtful") for script in ("grpo_base", "bpgo"))
        ras, crt = (
            setting("bpgo", model, "doubtful", **flags) for flags in ({"beta": 0.0}, {"alpha": 0.0})
        )
        found += [
            Claim("bpgo-faster", "BPGO", source, "BPGO rises faster than GRPO under a doubtful "
                                                 "reward",
                  area("truth"), both, (grpo,), seeds=seeds),
            Claim("bpgo-smoother", "BPGO", source, "BPGO rises more smoothly than GRPO under a "
                                                   "doubtful reward",
                  unsteadiness("truth"), both, (grpo,), lower=True, seeds=seeds),
            Claim("bpgo-higher", "BPGO", source, "BPGO ends higher than GRPO under a doubtful "
                                                 "reward",
                  end("truth"), both, (grpo,), seeds=seeds),
            Claim("bpgo-trained", "BPGO", "table 1" if model in CLIPS else IMAGE_TRAINED,
                  "BPGO ends higher than GRPO on the doubtful reward itself",
                  end("reward"), both, (grpo,), seeds=seeds),
            Claim("vague", "BPGO", "ours", "BPGO is better on vague captions, too",
                  end("vague"), both, (grpo,), seeds=seeds),
        ]  # fmt: skip
        if model != "tiny-sd":
            found += [
                Claim("crt-fast", "BPGO", shown, "CRT alone is faster than RAS alone",
                      area("truth", 0.5), crt, (ras,)),
                Claim("crt-unsteady", "BPGO", shown, "CRT alone is less steady than RAS alone",
                      unsteadiness("truth"), crt, (ras,)),
                Claim("ras-grpo", "BPGO", "section 4.3", "RAS alone ends higher than "
                                                         "GRPO", end("truth"), ras, (grpo,)),
                Claim("crt-grpo", "BPGO", CRT[model], "CRT alone ends higher than GRPO",
                      end("truth"), crt, (grpo,)),
                Claim("both-ras", "BPGO", TABLE_2, "both end higher than RAS alone",
                      end("truth"), both, (ras,)),
                Claim("both-crt", "BPGO", TABLE_2, "both end higher than CRT alone",
                      end("truth"), both, (crt,)),
            ]  # fmt: skip
    alone = setting("bpgo", "tiny-flux", "doubtful", crt_alone=True)
    both = setting("bpgo", "tiny-flux", "doubtful")
    found.append(
        Claim(
            "both-eq5",
            "BPGO",
            TABLE_2,
            "both end higher than eq 5 by itself",
            end("truth"),
            both,
            (alone,),
        )
    )
    for model, source in (("tiny-flux", "table 3, of videos"), ("tiny-wan", "table 3")):
        half = setting(
            "bpgo", model, "doubtful", beta=0.0
        )  # of RAS alone: its row 0.5 is table 2's row RAS
        for a in (0.1, 0.7, 0.9):  # a peak at 0.5 needs the first two
            other = setting("bpgo", model, "doubtful", beta=0.0, alpha=a)
            text = f"of RAS alone, alpha 0.5 is better than {a}"
            found.append(Claim(f"alpha-{a}", "BPGO", source, text, end("truth"), half, (other,)))
    for model, others in (
        ("tiny-flux", ("sft",)),
        ("tiny-wan", ("running-mean",)),
        ("tiny-wan-i2v", ("running-mean", "sft")),
    ):
        own = setting("bpgo", model, "doubtful")
        for prior in others:
            text = (
                f"the paper's choice of prior for the task, {PRIORS[model]}, is better than {prior}"
            )
            other = setting("bpgo", model, "doubtful", prior=prior)
            found.append(
                Claim(f"prior-{prior}", "BPGO", "section 4.1", text, end("truth"), own, (other,))
            )
    return found


def self_paced():
    found = []
    for model in ("tiny-wan", "tiny-flux"):
        first = "motion:quality" if model in CLIPS else "verifier:quality"
        last = "motion" if model in CLIPS else "verifier"
        paced = setting("self_paced", model, "stages")
        one, two = (setting("self_paced", model, "stages", only_stage=stage) for stage in (1, 2))
        joint = setting("self_paced", model, "stages", alpha=0.0)
        videos = "" if model in CLIPS else ", of videos"
        table, text, figure = (f"{part}{videos}" for part in ("table 3", "section 4.2", "figure 1"))
        meant = setting("self_paced", model, "stages", saturation="one-minus-hoyer")
        found += [
            Claim("paced-one", "Self-Paced", table, "progressive beats the first stage alone",
                  end("truth"), paced, (one,)),
            Claim("paced-two", "Self-Paced", table, "progressive beats the second stage, which "
                                                    "holds the first",
                  end("truth"), paced, (two,)),
            Claim("paced-joint", "Self-Paced", table, "progressive beats all stages at once",
                  end("truth"), paced, (joint,)),
            *(
                Claim(f"quality-{name}", "Self-Paced", table, "progressive keeps more quality "
                                                              f"than {words}",
                      end("quality"), paced, (other,))
                for name, words, other in (("one", "the first stage alone", one),
                                           ("two", "the second stage", two),
                                           ("joint", "all stages at once", joint))
            ),
            Claim("paced-moves", "Self-Paced", text, "the last stage's weight grows with "
                                                     "competence",
                  shift(f"weight_{last}", "its weight, last 5 steps less first 5"), paced),
            Claim("paced-leaves", "Self-Paced", text, "the first stage's weight shrinks",
                  shift(f"weight_{first}", "its weight, last 5 steps less first 5"), paced,
                  lower=True),
            Claim("hoyer", "Self-Paced", "ours: eq 8",
                  "Hoyer's index as printed is better than what the prose says of it", end("truth"),
                  paced, (meant,)),
            Claim("saturates", "Self-Paced", figure, "a static easy reward tells samples apart "
                                                     "less and less",
                  late_over_early("reward_std", "log of spread in a group, last 5 steps over "
                                                "first 5"), one,
                  lower=True),
        ]  # fmt: skip
    flux, truth = (
        setting("self_paced", "tiny-flux", "stages"),
        setting("grpo_base", "tiny-flux", "truth"),
    )
    text = "progressive beats GRPO on the last stage from the start"
    return [
        *found,
        Claim("paced-grpo", "Self-Paced", "section 1", text, end("truth"), flux, (truth,)),
    ]


def variants():
    """The authors' later equations against the printed ones, each at its own search's rate."""
    found = []
    for model in ("tiny-flux", "tiny-wan"):
        printed = setting("bpgo", model, "doubtful")
        released = setting("bpgo released", model, "doubtful")
        previous, own, v4 = (
            setting(name, model, "stages")
            for name in ("self_paced", "self_paced own", "self_paced v4")
        )
        source = "2511.19356 v1 eq 9, v4 eq 6"
        found += [
            Claim("released-printed", "BPGO", "TeleBoost d4279ac",
                  "BPGO as released ends higher than as printed",
                  end("truth"), released, (printed,)),
            Claim("own-previous", "Self-Paced", source,
                  "v1's printed gates (own) end higher than those of its text (previous)",
                  end("truth"), own, (previous,)),
            Claim("v4-own", "Self-Paced", source,
                  "v4 ends higher than v1's printed gates", end("truth"), v4, (own,)),
            Claim("v4-previous", "Self-Paced", source,
                  "v4 ends higher than the gates of v1's text", end("truth"), v4, (previous,)),
        ]  # fmt: skip
    return found


def bias():
    probe, found = Setting("probe:bias", "tiny-flux"), []
    for clusters in (10, 20):
        words = f"coefficient of variation over {clusters} clusters, beyond chance, %"
        honest = number(f"verifier_{clusters}", words)
        found += [
            Claim(f"bias-clip-{clusters}", "Self-Paced", "eq 3; figures 4, 5 and 8",
                  f"over {clusters} clusters a learned reward has more of a preference than the "
                  "verifier",
                  number(f"clip_{clusters}", words), probe, (probe,), than=honest),
            Claim(f"bias-judge-{clusters}", "Self-Paced", "ours: does eq 3 find a known one",
                  f"over {clusters} clusters the measure finds a judge that likes one kind by .1",
                  number(f"biased_{clusters}", words), probe, (probe,), than=honest),
        ]  # fmt: skip
    return found


def ours():
    truth, proxy = (setting("grpo_base", "tiny-flux", task) for task in ("truth", "proxy"))

    def factor(key, text, **flags):
        return Claim(
            key,
            "ours",
            "one factor",
            text,
            end("truth"),
            setting("grpo_base", "tiny-flux", "truth", **flags),
            (truth,),
        )

    kl = setting("grpo_base", "tiny-flux", "proxy", kl_coef=KL)
    return [
        factor("dance", "equal noise in all steps (DanceGRPO) is better than most at first "
                        "(Flow-GRPO)", sde="dance"),
        factor("same-noise", "one initial noise for a group is better than its own for each "
                             "sample", same_noise=True),
        factor("best-of", "the best 3 and worst 3 of 12 teach more than all 8 of 8",
               group_size=12, best_of=6),
        factor("window", "4 noisy steps at random places, all trained on, are better than 7 of "
                         "which 4 are",
               sde_window=4, timestep_fraction=1.0),
        Claim("kl", "ours", "one factor", f"a KL term of weight {KL:g} keeps more truth on the "
                                          "proxy",
              end("truth"), kl, (proxy,)),
        Claim("kl-costs", "ours", "one factor", f"a KL term of weight {KL:g} costs reward on the "
                                                "proxy",
              end("reward"), kl, (proxy,), lower=True),
    ]  # fmt: skip


KL = 1.0
CLAIMS = [*slas(), *bpgo(), *self_paced(), *variants(), *bias(), *ours()]

# What a reader's own method is compared by, with --methods: the baseline's settings, its own
# script.
SIDE_BY_SIDE = [("tiny-flux", "truth"), ("tiny-flux", "proxy"), ("tiny-flux", "doubtful")]

# {Claim.name, "KEY:MODEL": the likely reason, and what scale would change it}
REMARKS = {
    "slas-faster:tiny-flux": "likely because this proxy tells samples of tight groups apart, too "
    "(correlation .55 with "
    "the verifier there, .70 in wide ones), so that what SLAS makes quieter is mostly signal. It "
    "would take a reward "
    "whose small differences are noise, as between samples of a large model that hardly differ.",
    "gamma-0.0:tiny-flux": "likely as for the rise on the proxy, and it would take the same "
    "reward. The interval ends"
    " at 0, and five seeds are few for it.",
    "gamma-auto:tiny-flux": "auto was 0 in every step of every seed, so this is the comparison "
    "with 0 once more. "
    "These runs are of version 0.2, which bounded the KL by theorem 4: in the worst direction and "
    "at the least noisy "
    "step. Since then auto measures the KL. It was not compared again.",
    "grpo-hacks:tiny-sd": "the search sees the proxy alone and gave GRPO a LoRA rate of .006, at "
    "which the proxy is "
    "hacked; its points are not monotone (.003 was the worst of the first three): two seeds may "
    "have misled it. It "
    "would take a search by more seeds, or a lower rate and more steps.",
    "slas-higher:tiny-sd": "each method at the rate that its search took: SLAS .003, GRPO .006. "
    "Of the difference it "
    "is not known what is the rate's and what the method's; most of it is one seed, .074, in "
    "which GRPO loses the "
    "proxy, too.",
    "bpgo-smoother:tiny-flux": "likely the rate: the search took .0004 for BPGO and .0002 for "
    "GRPO, and with the rate "
    "both get less smooth (by the search's two seeds GRPO .007 and .009, BPGO .007 and .010). A "
    "step's trust lies "
    "between .87 and 1.18 in the mean, so that BPGO is nearly GRPO here. It would take prompts "
    "whose rewards "
    "differ more in what they are worth, and both methods at one rate.",
    "crt-unsteady:tiny-flux": "no reason is known. RAS alone is GRPO with weights between .87 "
    "and 1.16, at twice the "
    "rate that GRPO's own search took, and as unsteady (.010) as GRPO was there; CRT alone, at "
    "the same rate, is not "
    "(.005). The interval ends at 0, and the paper shows one curve of each: it would take more "
    "seeds, and more "
    "evaluations in a run than seven.",
    "bpgo-smoother:tiny-sd": "in part the rate: the search took .003 for BPGO, which falls there "
    "(.430 to .418), and "
    ".00075 for GRPO, as two means of two seeds lay .003 apart. At one rate BPGO is not smoother "
    "either, but for the "
    "largest (by the search's seeds, over its four rates, GRPO .002, .005, .007, .015, BPGO "
    ".002, .006, .012, .008). "
    "It would take five seeds of both at each rate.",
    "bpgo-smoother:tiny-wan": "GRPO, at a rate of .00005, hardly moves (.287 to .292) and is "
    "smooth for that reason; "
    "BPGO, at .0001, falls (to .268). At one rate BPGO is the smoother of the two but for the "
    "lowest (by the search's "
    "two seeds, over its four rates, GRPO .001, .004, .009, .018, BPGO .002, .002, .008, .007). "
    "The reward's error is "
    "too much for 30 steps of 48 clips: it would take both at one rate, a longer run and larger "
    "groups, in which both "
    "rise.",
    "ras-grpo:tiny-wan-i2v": "both at one rate. Likely the judge's error: the prior is one still "
    "of each prompt and "
    "has an error of .2 like any sample, twice that of the mean of a group of 4, so that of what "
    "sets the trust "
    "(between .65 and 1.27) about half is chance, by our estimate. Against it: the running mean, "
    "which has hardly any "
    "error, ends no higher (.528, the first frame .536, both with CRT). It would take a judge "
    "that errs less, and "
    "larger groups.",
    "crt-grpo:tiny-wan-i2v": "as for RAS, as the second term, too, is measured from that prior; "
    "the interval ends at "
    "0. The paper's table 2 has CRT alone below GRPO here, too, by the reward trained on.",
    "quality-one:tiny-wan": "the first stage alone is trained on this quality and on nothing "
    "else, and 30 steps do not "
    "exhaust it: its groups' spread falls by 21%. It would take a run so long that the first "
    "stage has no more to "
    "teach.",
    "quality-one:tiny-flux": "trained on this quality alone, as on tiny-wan, and it would take "
    "the same; it pays with"
    " the truth, which falls from .454 to .348.",
    "paced-grpo:tiny-flux": "the last stage is not too hard here: its verifier gives .454 to the "
    "base model and tells "
    "its samples apart from the first step (spread .21 within a group), so that every step on an "
    "easier stage is one "
    "less on the truth. It would take a last reward that is flat for a beginner.",
    "dance:tiny-flux": "both at a noise level of .7, Flow-GRPO's; DanceGRPO's own is .3. Likely "
    "because equal noise "
    "has less of it in the early steps, which decide what is where, and more in the late ones. A "
    "level for each would "
    "tell.",
    "own-previous:tiny-flux": "likely because each gate gives the last stage, the truth, another "
    "weight: own .20 in the first five steps and .24 in the last five, previous .28 and .31. Both "
    "train at .0004. It would take a last stage that a beginner's scores do not tell apart, so "
    "that a low weight at first costs nothing.",
    "v4-own:tiny-flux": "likely for the same reason: v4 gives the last stage a weight of .33 to "
    ".34 in the whole run and is nearly the mean of the three stages.",
    "paced-moves:tiny-wan": "from .23 to .30, while the first stage's falls from .54 to .47 and "
    "stays the largest: 30"
    " steps do not reach the end of the curriculum.",
}
