"""Does a reward prefer some kinds of prompts? The coefficient of variation of its mean scores over
clusters of them, as in Self-Paced GRPO (arXiv 2511.19356, eq 3 and figures 2, 4, 5, 8, 9).

    python -m evaluation.bias wan2.1-1.3b --reward videoalign judge:quality --real clips.txt  # of clips that you have
    python -m evaluation.bias runs/bpgo-tiny-flux-1 --reward verifier jpeg                    # of samples of a run's model

Captions become vectors (the model's own text encoder, mean over the tokens, unit length), k-means
makes clusters:

    mu_c    = mean score of the captions in cluster c
    kappa   = 100 * std(mu_1 ... mu_k) / |mean(mu_1 ... mu_k)|          over the clusters, as the figures have it
    kappa_c = 100 * std(scores in c) / |mu_c|                           within each, as eq 3 is printed

Chance alone makes kappa larger than 0: the captions, dealt out anew to clusters of these sizes 1000
times, say how much. `beyond_chance` is sqrt(kappa^2 - the mean of those kappa^2), and p how often
chance reaches kappa. What the samples show counts as well as the reward: a model that draws some
prompts badly looks like a reward that dislikes them. So for a reward alone give --real pictures of
one quality. And kappa divides by a mean: of scores around 0 it says nothing."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import imageio.v3 as imageio
import numpy as np
import torch
import tyro

from common import cli, errors, models, rewards
from common.errors import InputError
from common.prompts import caption_of, files, image_of, prompts_of_step, read_prompts
from common.reporting.report import pyplot
from common.trainer import heldout

if TYPE_CHECKING:
    from common.models.family import Family

DEALT = 1000  # times that the captions are dealt out anew
MOVING = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")


@dataclass
class Args:
    model: tyro.conf.Positional[str]
    """A named model, the folder of a pipeline, a hub id, or a run's folder."""
    reward: tuple[str, ...] = ()
    """Rewards to look at, as for training; without: the model's own."""
    prompts: str = ""
    """Prompts to sample, as for training; without: the model's own."""
    real: str = ""
    """Instead of samples: a text file with lines FILE <tab> CAPTION of pictures or clips, counted
    from its folder."""
    number: Annotated[int, cli.From(0, 1e9)] = 2000
    """How many of them, chosen by the seed; 0: all."""
    samples: Annotated[int, cli.From(1, 1000)] = 1
    """Samples of each prompt, whose scores are averaged."""
    clusters: Annotated[tuple[int, ...], cli.From(2, 1e6)] = (10, 15, 20)
    """Numbers of clusters to try; the tables show the last."""
    reward_path: tuple[str, ...] = ()
    """Weights of rewards that do not come from the hub: NAME=FILE."""
    judge_url: str = ""
    """OpenAI-compatible server of the judge; none: it is loaded here."""
    judge_model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """The judge."""
    seed: Annotated[int, cli.From(0, 2**31)] = 0
    """Chooses prompts, starts k-means, deals out."""
    output: str = "runs/bias"
    """Folder for bias.png, bias.json and bias.csv."""


# --- The numbers ---


def kappa(scores: np.ndarray, labels: np.ndarray, number: int) -> float:
    """Scores [n] and the cluster of each [n] -> per cent: the spread of the clusters' means over
    their mean."""
    means = cluster_means(scores, labels, number)
    return 100 * np.nanstd(means) / abs(np.nanmean(means))


def cluster_means(scores: np.ndarray, labels: np.ndarray, number: int) -> np.ndarray:
    """[k], of the scores that are there: what a judge could not score is NaN, as is a cluster
    without any."""
    known = np.isfinite(scores)
    with np.errstate(invalid="ignore"):
        sums = np.bincount(labels[known], scores[known], number)
        return sums / np.bincount(labels[known], minlength=number)


def within(scores: np.ndarray, labels: np.ndarray, number: int) -> np.ndarray:
    """Eq 3 as printed: per cent [k], the spread of the scores in each cluster over their mean."""
    means = cluster_means(scores, labels, number)
    return 100 * np.sqrt(cluster_means((scores - means[labels]) ** 2, labels, number)) / abs(means)


def against_chance(
    scores: np.ndarray, labels: np.ndarray, number: int, seed: int = 0, dealt: int = DEALT
) -> dict[str, float]:
    """{kappa, chance: what 95% of the deals stay below, beyond_chance, p}"""
    scores, labels = scores[np.isfinite(scores)], labels[np.isfinite(scores)]
    random, found = np.random.default_rng(seed), kappa(scores, labels, number)
    by_chance = np.array([kappa(scores, random.permutation(labels), number) for _ in range(dealt)])
    return {
        "kappa": float(found),
        "chance": float(np.quantile(by_chance, 0.95)),
        "beyond_chance": float(np.sqrt(max(0.0, found**2 - np.mean(by_chance**2)))),
        "p": float((1 + np.sum(by_chance >= found)) / (1 + dealt)),
    }


def clustered(vectors: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Vectors [n, D] -> the cluster of each [n]; raises InputError where there is no k-means, or
    too few of them."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise InputError(
            "evaluation.bias takes its k-means from scikit-learn: pip install scikit-learn"
        ) from None
    if not 2 <= number <= len(np.unique(vectors, axis=0)):
        raise InputError(
            f"--clusters {number}: from 2 to the number of different prompts, here {len(vectors)}"
        )
    return KMeans(number, n_init=10, random_state=seed).fit_predict(vectors)


# --- What they are of ---


def run_of(model: str) -> dict:
    """config.json of a run's folder, {} for any other model."""
    config = Path(model) / "config.json"
    return (
        json.loads(config.read_text())
        if config.is_file() and (Path(model) / "export").is_dir()
        else {}
    )


def load(args: Args, prompts: list[str]) -> "tuple[Family, cli.Args]":
    """The model, on a GPU if there is one, and the settings that it samples with: a run's own, or
    its defaults."""
    folder, run = Path(args.model), run_of(args.model)
    lora = run and not (folder / "export/model_index.json").is_file()
    source = args.model if not run else run["model"] if lora else str(folder / "export")
    names = (
        "height",
        "width",
        "frames",
        "guidance",
        "guidance_2",
        "sampling_steps",
        "shift",
        "fps",
        "micro_batch",
    )
    known = {name: run[name] for name in (*names, *["source"] * bool(lora)) if name in run}
    settings = replace(cli.defaults(cli.Args, run.get("model", args.model)), **known, model=source)
    settings.micro_batch = cli.rows_of(settings.micro_batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = models.load(source, dtype, prompts, **cli.of_model(settings))
    if lora:
        model.pipe.load_lora_weights(folder / "export")
    for part in model.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(device).requires_grad_(False).eval()
    return model, settings


@torch.no_grad()
def vectors_of(model: "Family", captions: Iterable[str]) -> np.ndarray:
    """b captions -> [b, D] of unit length: the text encoder's states, mean over the tokens. Padding
    that is zero, or that the model masks, does not count."""
    vectors = []
    for caption in captions:
        cond = model.text(caption)
        states = cond["encoder_hidden_states"].float()  # [S, D]
        mask = cond.get("encoder_attention_mask", states.any(-1)).bool()
        vectors.append(torch.nn.functional.normalize(states[mask].mean(0), dim=0).cpu().numpy())
    return np.stack(vectors)


def scores_of_samples(
    args: Args, model: "Family", settings: cli.Args, scorers: dict, prompts: list[str]
) -> dict[str, np.ndarray]:
    """{reward: [n * samples]} of noise-free samples, from the fixed noise that the evaluations of
    runs start from."""
    sigmas, rows = model.sigmas(settings.sampling_steps, settings.shift), []
    every = [prompt for prompt in prompts for _ in range(args.samples)]
    for part in torch.arange(len(every)).split(settings.micro_batch):
        batch = [every[i] for i in part]
        media = heldout.sample(model, batch, part, sigmas, settings.micro_batch, model.device)
        rows.append(checked(scorers, media, batch))
        print(f"\r{part[-1] + 1} of {len(every)} samples", end="", flush=True)
    print()
    return {name: np.concatenate([row[name] for row in rows]) for name in scorers}


def scores_of_files(
    scorers: dict, prompts: list[str], device: torch.device
) -> dict[str, np.ndarray]:
    """{reward: [n]} of the pictures and clips of lines FILE <tab> CAPTION."""
    rows = [
        checked(scorers, medium(image_of(prompt)).to(device), [caption_of(prompt)])
        for prompt in prompts
    ]
    return {name: np.concatenate([row[name] for row in rows]) for name in scorers}


def checked(scorers: dict, media: torch.Tensor, prompts: list[str]) -> dict[str, np.ndarray]:
    """{reward: [b]} of media [b, ...]; raises RunError where rewards.check_finite does."""
    scores = rewards.score(scorers, media, prompts)
    rewards.check_finite({name: value[:, None] for name, value in scores.items()}, scorers, prompts)
    return {name: value.cpu().numpy().astype(float) for name, value in scores.items()}


def medium(path: str) -> torch.Tensor:
    """A picture [1, 3, H, W] or a clip [1, F, 3, H, W] in [0, 1]; raises InputError."""
    try:
        if Path(path).suffix.lower() in MOVING:
            pixels = np.stack([frame[..., :3] for frame in imageio.imiter(path)])
        else:
            pixels = imageio.imread(path, mode="RGB")
    except Exception as error:  # whatever a broken file makes the readers say
        raise InputError(
            f"--real: {path} is no picture or clip that can be read ({errors.text(error)})"
        ) from None
    return torch.from_numpy(pixels.copy()).movedim(-1, -3)[None].float() / 255


def main(args: Args) -> list[dict]:
    """Chooses, embeds, clusters, scores and writes; returns what `write` does. Raises
    InputError."""
    cli.check_bounds(args)
    if not args.clusters:
        raise InputError("--clusters: name at least one number of clusters")
    base = cli.defaults(cli.Args, run_of(args.model).get("model", args.model))
    if args.real:
        prompts = files.read(args.real)
        if missing := [prompt for prompt in prompts if not image_of(prompt)]:
            raise InputError(
                f"--real: {missing[0][:60]!r} has no file; write lines FILE <tab> CAPTION"
            )
    else:
        prompts = read_prompts(args.prompts or base.prompts or _missing("prompts"))
    if args.number:
        prompts = prompts_of_step(prompts, 0, min(args.number, len(prompts)), args.seed)
    prompts = prompts if args.real else list(dict.fromkeys(prompts))
    captions = [caption_of(prompt) for prompt in prompts]
    model, settings = load(args, captions if args.real else prompts)
    settings = replace(
        settings, **{n: getattr(args, n) for n in ("reward_path", "judge_url", "judge_model")}
    )
    of_rewards = cli.of_rewards(settings) | ({"clips": None} if args.real else {})
    scorers = rewards.load(args.reward or base.reward or _missing("reward"), prompts, **of_rewards)

    distinct, place = np.unique(captions, return_inverse=True)
    vectors = vectors_of(model, map(str, distinct))
    labels = {
        number: clustered(vectors, number, args.seed) for number in args.clusters
    }  # before any sample
    if args.real:
        scores = scores_of_files(scorers, prompts, model.device)
    else:
        scores, place = (
            scores_of_samples(args, model, settings, scorers, prompts),
            np.repeat(place, args.samples),
        )
    # the samples of one caption are not independent: its mean counts
    scores = {name: cluster_means(value, place, len(distinct)) for name, value in scores.items()}
    return write(Path(args.output), distinct, vectors, labels, scores, args.seed)


def _missing(name: str) -> NoReturn:
    raise InputError(f"--{name} is missing: this model has no default for it")


# --- What comes out ---


def write(
    folder: Path,
    captions: np.ndarray,
    vectors: np.ndarray,
    labels: dict[int, np.ndarray],
    scores: dict[str, np.ndarray],
    seed: int,
) -> list[dict]:
    """bias.json, bias.csv, bias.png and the tables on the screen; returns the rows of the first."""
    rows = [
        {"reward": name, "clusters": number, **against_chance(value, found, number, seed)}
        for name, value in scores.items()
        for number, found in labels.items()
    ]
    kinds = [
        {"cluster": cluster, **kind}
        for cluster, kind in enumerate(kinds_of(captions, vectors, labels, scores))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"bias": rows, "clusters": kinds}
    (folder / "bias.json").write_text(json.dumps(tables, indent=1, allow_nan=False) + "\n")
    for name, table in tables.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(table[0]), *(list(row.values()) for row in table)])
        print(f"{markdown(table)}\n")
    draw(folder / "bias.png", rows, kinds, list(scores))
    print(f"{folder}/bias.png, bias.json, bias.csv, clusters.csv")
    return rows


def kinds_of(
    captions: np.ndarray,
    vectors: np.ndarray,
    labels: dict[int, np.ndarray],
    scores: dict[str, np.ndarray],
) -> Iterator[dict]:
    """Of each of the last number of clusters: how many captions, one of them, and by each reward
    mu_c and kappa_c."""
    number, found = list(labels.items())[-1]
    of_rewards = {name: cluster_means(value, found, number) for name, value in scores.items()}
    of_rewards |= {
        f"{name}, kappa within": within(value, found, number) for name, value in scores.items()
    }
    for cluster in range(number):
        values = {name: value[cluster] for name, value in of_rewards.items()}
        about = {
            "captions": int((found == cluster).sum()),
            "typical": typical(captions, vectors, found == cluster),
        }
        yield about | {
            name: float(value) if np.isfinite(value) else None for name, value in values.items()
        }


def typical(captions: np.ndarray, vectors: np.ndarray, members: np.ndarray) -> str:
    """The caption that is nearest to the middle of its cluster: captions [n], vectors [n, D],
    members [n] bool."""
    own = vectors[members]
    return str(captions[members][np.square(own - own.mean(0)).sum(1).argmin()])


def markdown(rows: list[dict]) -> str:
    """The rows as a table, with a column for each key of the first."""

    def cell(value: str | float | None) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows])


def draw(path: Path, rows: list[dict], kinds: list[dict], names: list[str]) -> None:
    """kappa over the number of clusters, with what chance reaches; and the clusters' means, in
    parts of their mean."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4), gridspec_kw={"width_ratios": (1, 2)}
    )
    for i, name in enumerate(names):
        own = [row for row in rows if row["reward"] == name]
        counts = [row["clusters"] for row in own]
        left.plot(counts, [row["kappa"] for row in own], "o-", color=f"C{i % 10}", label=name)
        left.plot(counts, [row["chance"] for row in own], ":", color=f"C{i % 10}")
        means = np.array([kind[name] for kind in kinds], dtype=float)
        at = np.arange(len(kinds)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        right.bar(at, means / abs(np.nanmean(means)), 0.8 / len(names), color=f"C{i % 10}")
    left.set(
        xlabel="clusters",
        ylabel="coefficient of variation, %",
        title="dotted: 95% of chance stay below",
        ylim=0,
    )
    left.legend()
    right.set(
        xlabel="cluster", ylabel="mean score / |mean over the clusters|", xticks=range(len(kinds))
    )
    left.set_xticks([row["clusters"] for row in rows if row["reward"] == names[0]])
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    with errors.one_line():
        given = tyro.cli(Args, description=__doc__, args=sys.argv[1:])
    errors.run(main, given)
