"""Write the results of the dials as tables into README.md and docs/dials.md.

python -m lab.dials --figures
"""

from pathlib import Path

import numpy as np

from lab import dials

ROOT = Path(__file__).resolve().parents[1]
PAPERS = {  # the beginnings of the dials' names, and what their figures show
    "slas": "SLAS: random errors, a preference that can be exploited, tight groups, gamma",
    "bpgo": "BPGO: the score of vague prompts, priors, errors, alpha",
    "paced": "Self-Paced GRPO: the floor of the last stage, conflicting stages, steps",
    "grpo": "GRPO: larger groups, and choices without a paper's claim",
}
BY_ITS_TEXT = "v1, previous mean, 1 - Hoyer"
FRONT = (  # the lines of README: method, what the dial varies, dial, name of the method there
    ("SLAS, gamma 2", "a preference of the judge, which is exploited", "slas-exploit", "gamma 2"),
    ("BPGO", "score of ambiguous prompts, low to high", "bpgo-unsure", "RAS and CRT"),
    (
        "Self-Paced GRPO, v1 as printed",
        "how flat the last stage is",
        "paced-floor",
        "v1 as printed",
    ),
    ("Self-Paced GRPO, v1 as its text says", "the same", "paced-floor", BY_ITS_TEXT),
)


def variants(folder, name):
    """Return the findings of a dial's variants that were run."""
    results = [dials.read(folder, f"{name}--{variant}") for variant in dials.VARIANTS]
    return [dials.findings(result) for result in results if result]


def words(method, value, found, others):
    """Return a difference with its interval and verdict, '+0.035 ±0.007 helps 6/6'.

    6/6: it has the same sign in six of six variants. found, others: findings of the dial and of its
    variants. '' if the method was not trained at the value.
    """
    if value not in found.get(method, {}):
        return ""
    mean, low, _, verdict = found[method][value]
    means = [other[method][value][0] for other in others if value in other.get(method, {})]
    if means and verdict in ("helps", "hurts"):
        verdict += f" {sum(one * mean > 0 for one in means)}/{len(means)}"
    return f"{mean:+.3f} ±{mean - low:.3f} {verdict}"


def table(folder, name):
    """Return Markdown: the differences of a dial with their intervals and verdicts."""
    result, dial = dials.read(folder, name), dials.DIALS[name]
    found, others = dials.findings(result), variants(folder, name)
    truth = {
        row["value"]: (row["base"], np.mean(row["ends"]["truth"]))
        for row in result["cells"]
        if row["method"] == "GRPO"
    }
    lines = [f"**{dial.title}** ({dial.axis}; {result['seeds'][1]} seeds)", ""]
    lines.append("| | " + " | ".join(f"{value:g}" for value in truth) + " |")
    lines.append("| --- |" + " --- |" * len(truth))
    ends = " | ".join(f"{base:.3f} -> {end:.3f}" for base, end in truth.values())
    lines.append(f"| GRPO | {ends} |")
    for method in found:
        cells = " | ".join(words(method, value, found, others) for value in truth)
        lines.append(f"| {method} | {cells} |")
    return "\n".join(lines) + "\n"


def front(folder):
    """Return Markdown: the lines of README, with the first and the last value of each dial."""
    lines = []
    for label, varied, name, method in FRONT:
        result = dials.read(folder, name)
        found = dials.findings(result) if result else {}
        if method in found:
            others = variants(folder, name)
            places = (min(found[method]), max(found[method]))
            ends = [f"{words(method, value, found, others)} at {value:g}" for value in places]
            lines.append(f"- {label} ({varied}): {', '.join(ends)}\n")
    return "".join(lines)


def between(text, mark, new):
    """Return a text with `new` between the markers <!-- mark --> and <!-- /mark -->."""
    before, start, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    assert start and end, f"no place for {mark}"
    return before + start + new + end + after


def pages(folder=dials.RESULTS):
    """Return {path: text} of README.md and docs/dials.md with the tables of a folder's results."""
    readme, page = ROOT / "README.md", ROOT / "docs/dials.md"
    text = page.read_text(encoding="utf-8")
    for paper, shown in PAPERS.items():
        names = [name for name in dials.DIALS if name.startswith(f"{paper}-")]
        parts = [table(folder, name) for name in names if dials.read(folder, name)]
        if parts:
            parts.insert(0, f"![{shown}](../lab/dial_results/{paper}.png)\n")
        text = between(text, paper, "\n".join(parts))
    front_page = between(readme.read_text(encoding="utf-8"), "dials", front(folder))
    return {readme: front_page, page: text}


def write():
    """Write the tables of the committed results into the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
