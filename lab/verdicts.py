"""Statistics of the study: paired differences, their interval, the verdict; and the table in
lab/README.md.

    python -m lab.verdicts        # every verdict again from lab/results alone, into lab/README.md

The interval is that of evaluation/tables.py, here of the mean of paired differences (runs of one
seed see the same prompts and start from the same noise). It contains the mean of five normal
numbers in 92.1% of cases, of eight in 94.4%."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import tables
from evaluation.tables import students_t
from lab import claims
from lab.study_results import FOLDER, Results

README = Path(__file__).with_name("README.md")
DRAWS = 100_000
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this scale"
FEW, NONE = "too few seeds", "no runs yet"
# no bootstrap reaches beyond its smallest and largest number: of four these hold the mean in 88% of
# cases
ENOUGH = 5
PICTURES = {  # of lab/figures.py
    "rewards": "held-out rewards over the steps",
    "proxy_verifier": "the proxy against the verifier",
    "samples_proxy": "samples before, after GRPO and after SLAS on the proxy",
    "samples_doubtful": "samples before, after GRPO and after BPGO under a doubtful reward",
    "samples_clips": "the same of clips",
    "stage_weights": "weights of the stages",
    "kinds": "the coefficient of variation over clusters",
}


def interval(differences, draws=DRAWS):
    """n paired differences -> (low, high), 95% of their mean; of one number nothing is known:
    (-inf, inf)."""
    if len(differences) < 2:
        return -math.inf, math.inf
    return tables.interval(differences, draws)


def half_of_t(values):
    """Half of the 95% interval of the mean of n >= 2 numbers by Student's t."""
    return students_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def verdict(low, high, seeds, lower=False):
    """The verdict on a claim that differences are above 0, or below, from their interval, where it
    can be one."""
    if seeds < ENOUGH:
        return FEW if seeds else NONE
    if low > 0 or high < 0:
        return HOLDS if (high < 0) == lower else FAILS
    return UNDECIDED


@dataclass
class Finding:
    """What the runs say of a claim; means over the seeds that all its settings have."""

    claim: claims.Claim
    seeds: list
    ours: float | None
    others: float | None  # None where the claim compares with 0
    differences: list
    low: float
    high: float
    verdict: str

    @property
    def difference(self):
        return sum(self.differences) / len(self.differences)


def found(claim, runs_of):
    """claim, and a function Setting -> {seed: run} -> Finding"""
    runs = [runs_of(setting) for setting in claim.settings]
    seeds = sorted(set(runs[0]).intersection(*runs[1:]))[
        : claim.seeds
    ]  # nobody stops where it looks well
    if not seeds:
        return Finding(claim, [], None, None, [], -math.inf, math.inf, NONE)
    than = claim.than or claim.measure
    number = 1 + len(claim.others)
    mine, theirs = [runs[0]], runs[1:number]  # settings whose mean is compared
    mine, theirs = mine + runs[number::2], theirs + runs[number + 1 :: 2]
    ours = [sum(claim.measure.of(run[seed]) for run in mine) / len(mine) for seed in seeds]
    others = None
    if theirs:
        others = [sum(than.of(run[seed]) for run in theirs) / len(theirs) for seed in seeds]
    differences = [a - b for a, b in zip(ours, others or [0.0] * len(ours))]
    low, high = interval(differences)
    means = [values and sum(values) / len(values) for values in (ours, others)]
    return Finding(
        claim, seeds, *means, differences, low, high, verdict(low, high, len(seeds), claim.lower)
    )


def findings(results):
    return [found(claim, results.of) for claim in claims.CLAIMS]


# --- The table ---


def table(results):
    """Results -> Markdown: a table for each paper, remarks under it, and the methods side by
    side."""
    every, parts = findings(results), []
    for paper in dict.fromkeys(claim.paper for claim in claims.CLAIMS):
        own = [finding for finding in every if finding.claim.paper == paper]
        head = (
            "claim",
            "source",
            "model",
            "measure",
            "seeds",
            "it",
            "against",
            "difference, 95%",
            "verdict",
        )
        parts += [f"### {paper}", markdown(head, map(row, own)), remarks(own)]
    parts += [
        "### Withdrawn",
        withdrawn(),
        "### Methods side by side",
        side_by_side(results),
        pictures(PICTURES),
        "### The search",
        searches(results),
    ]
    return "\n\n".join(part for part in parts if part)


def withdrawn():
    """Return the table of the withdrawn verdicts, with the reasons."""
    lines = [(text, name.split(":")[1], why) for name, (text, why) in claims.WITHDRAWN.items()]
    return markdown(("claim", "model", "why it no longer counts"), lines)


def row(finding):
    claim = finding.claim
    words = (
        claim.text,
        claim.source,
        claim.ours.model,
        claim.measure.words + " (lower)" * claim.lower,
    )
    if not finding.seeds:
        return (*words, "0", "", "", "", NONE)
    others = "0" if finding.others is None else f"{finding.others:.3f}"
    between = f"{finding.difference:+.3f} [{finding.low:+.3f}, {finding.high:+.3f}]"
    return (
        *words,
        str(len(finding.seeds)),
        f"{finding.ours:.3f}",
        others,
        between,
        f"**{finding.verdict}**",
    )


def remarks(own):
    said = [(finding.claim, claims.REMARKS.get(finding.claim.name)) for finding in own]
    return "\n".join(
        f"- *{claim.text}* ({claim.ours.model}): {words}" for claim, words in said if words
    )


def pictures(named):
    """Those of {name: what it shows} that are drawn."""
    drawn = {
        name: words
        for name, words in named.items()
        if (README.parent / f"figures/{name}.png").exists()
    }
    return "\n\n".join(f"![{words}](figures/{name}.png)" for name, words in drawn.items())


def side_by_side(results):
    """A line for each script that a task was given to, a reader's own too."""
    lines, last = [], "last evaluation"
    head = (
        "model",
        "reward",
        "method",
        "seeds",
        f"reward, {last}",
        f"verifier, {last}",
        "against grpo_base",
    )
    for model, task in claims.SIDE_BY_SIDE:
        base = results.of(claims.setting("grpo_base", model, task))
        for script, runs in results.methods(model, task).items():
            seeds = sorted(set(runs) & set(base))
            ends = {
                name: [runs[seed]["evaluations"][name][-1] for seed in seeds]
                for name in ("reward", "truth")
            }
            means = [f"{sum(values) / len(values):.3f}" for values in ends.values() if values]
            more = [
                ours - base[seed]["evaluations"]["truth"][-1]
                for ours, seed in zip(ends["truth"], seeds)
            ]
            if means and script != "grpo_base":
                low, high = interval(more)
                means.append(f"{sum(more) / len(more):+.3f} [{low:+.3f}, {high:+.3f}]")
            if means:
                lines.append(
                    (model, task, script, str(len(seeds)), *means, *[""] * (3 - len(means)))
                )
    return markdown(head, lines)


def searches(results):
    """What the search found: the mean reward of the last evaluation at each point, the chosen
    values in the last."""
    lines = []
    for searched in claims.SEARCHED:
        tried = results.tried(*searched)
        ends = [
            f"{point['learning_rate']:g}, {point['clip_range']:g}: {end:.3f}"
            for point, end in tried
        ]
        tuned, rates = (
            results.tuned(*searched),
            [point["learning_rate"] for point in claims.points(*searched[1:])],
        )
        chosen = f"**{tuned['learning_rate']:g}, {tuned['clip_range']:g}**" if tuned else NONE
        chosen += (
            " (at the end of what was tried)"
            if tuned and tuned["learning_rate"] in (min(rates), max(rates))
            else ""
        )
        lines.append((*searched, "; ".join(ends), chosen))
    return markdown(
        (
            "method",
            "model",
            "reward",
            "learning rate, clip range: reward of the last two evaluations",
            "taken",
        ),
        lines,
    )


def markdown(head, lines):
    def joined(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([joined(head), joined(["---"] * len(head)), *map(joined, lines)])


def with_table(text, results):
    """lab/README.md's text with the tables of these results between its markers."""
    before, _, rest = text.partition("<!-- claims -->")
    _, end, after = rest.partition("<!-- /claims -->")
    assert end, "lab/README.md has no place for the claims"
    return f"{before}<!-- claims -->\n{table(results)}\n<!-- /claims -->{after}"


def write(results):
    README.write_text(with_table(README.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    write(Results(FOLDER))
