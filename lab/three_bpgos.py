"""Draw docs/methods/three_bpgos.png: the weight and the contrast of BPGO's three forms.

    python -m lab.three_bpgos

Left: the weight of a group of 8 samples against its mean reward less the prior. Right: the
advantages that the contrast alone gives to a group of rewards spread evenly around its prior.
"""

from pathlib import Path

import torch

import bpgo
from common.reporting.pictures import pyplot
from lab.figures import STYLE

FIGURE = Path(__file__).resolve().parents[1] / "docs/methods/three_bpgos.png"
GROUP = 8
COLOURS = {"printed": "#D55E00", "intermediate": "#8C8C8C", "released": "#0072B2"}


def group(mean: torch.Tensor, spread: float) -> torch.Tensor:
    """Return rewards [P, GROUP] with these means [P, 1] and this sample standard deviation."""
    shape = torch.linspace(-1, 1, GROUP, dtype=torch.float64)
    return mean + spread * shape / shape.std()


def draw_weights(axis) -> None:
    """Draw the weight of a group against its mean less the prior, in units of its spread."""
    units = torch.linspace(-3, 3, 601, dtype=torch.float64)[:, None]
    printed = bpgo.reliability_weights(units, 0.0, alpha=0.5, k=1.0)
    label = "printed: alpha 0.5, k 1 per unit of spread"
    axis.plot(units, printed, color=COLOURS["printed"], label=label)
    for spread, style in ((0.01, "-"), (1.0, "--"), (3.0, ":")):
        rewards = group(spread * units, spread)
        weight = bpgo.released_reliability_weights(rewards, 0.0, 1.0, 1.0, (0.5, 1.5))
        label = f"released, spread {spread:g}"
        axis.plot(units, weight, style, color=COLOURS["released"], label=label)
        if spread < 3:
            verbatim = bpgo.reliability_weights(spread * units, 0.0, alpha=1.0, k=1.0)
            label = f"intermediate, spread {spread:g}"
            axis.plot(units, verbatim, style, color=COLOURS["intermediate"], label=label)
    axis.set(title="weight of a group (RAS)", xlabel="(mean reward - prior) / spread", ylim=(0, 2))
    axis.legend(fontsize=7)


def draw_contrasts(axis, prior: float) -> None:
    """Draw the contrast of each form against R - prior, scaled to a largest value of 1."""
    rewards = torch.linspace(-0.5, 2 * prior, 801, dtype=torch.float64)
    forms = {
        "printed": bpgo.contrastive_rewards(rewards, prior, lam=1.0),
        "released": bpgo.released_contrastive_rewards(rewards, prior, 50.0, 5.0),
    }
    labels = {"printed": "printed and intermediate", "released": "released"}
    for name, contrast in forms.items():
        scaled = contrast / contrast.abs().max()
        axis.plot(rewards - prior, scaled, color=COLOURS[name], label=labels[name])
    axis.axvline(-prior / 2, color="#BBBBBB", lw=0.8)
    axis.annotate("R = prior / 2", (-prior / 2, -0.25), fontsize=7, color="#666666")
    axis.set(title=f"contrast of a sample (CRT), prior {prior:g}", xlabel="R - prior")
    axis.set_ylabel("stretched reward, largest = 1")
    axis.legend(fontsize=7)


def main() -> None:
    """Draw the figure and save it."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        draw_weights(left)
        draw_contrasts(right, prior=1.0)
        figure.savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    main()
