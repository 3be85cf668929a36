"""lab.study: intervals against scipy and an enumeration, verdicts, the plan and its budget, the
search, a run that goes on, a method of one's own, and the table of lab/README.md, which is that of
the committed results."""

import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import tarfile
import threading
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import papers
from common import models, sde
from common.errors import InputError
from common.prompts import read_prompts
from evaluation import tables
from lab import claims, figures, probes, study, study_rewards, verdicts
from lab.study_results import FOLDER, Results, name_of
from worlds import motion, scene, verifier
from worlds.moving import captions as moving_captions

SMALL = dict(steps=1, eval_every=1, prompts_per_step=2, group_size=4, minibatches=1)


# --- Statistics ---


@pytest.mark.parametrize(
    "values", [[0.1, -0.2, 0.3, 0.35, 0.02], [1.0, 2.0, 4.0, 8.0], [-0.3, -0.1, -0.12]]
)
def test_the_interval_is_that_of_all_resamples(values):
    """Enumerated: every way to draw n of n, each as likely. Its percentiles are Hesterberg's, by
    scipy."""
    stats = pytest.importorskip("scipy.stats")
    n = len(values)
    means = np.array(list(itertools.product(values, repeat=n))).mean(1)
    outside = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    expected = np.quantile(means, [outside, 1 - outside])
    assert verdicts.interval(values) == pytest.approx(
        expected, abs=0.02 * (max(values) - min(values))
    )


def test_the_interval_is_scipys_at_these_percentiles():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).normal(0.01, 0.02, 8)
    outside = stats.norm.cdf(-math.sqrt(8 / 7) * stats.t.ppf(0.975, 7))
    settings = dict(
        method="percentile", n_resamples=100_000, random_state=1, confidence_level=1 - 2 * outside
    )
    found = stats.bootstrap((values,), np.mean, **settings).confidence_interval
    assert verdicts.interval(values) == pytest.approx((found.low, found.high), abs=4e-4)


def test_students_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    found = [tables.students_t(freedom) for freedom in range(1, 200)]
    assert found == pytest.approx(stats.t.ppf(0.975, np.arange(1, 200)), abs=5e-5)


def test_five_seeds_are_covered_more_often_than_by_plain_percentiles():
    """The mean of five normal numbers: in 92.1% of cases, and never in more than 15 of 16, as no
    resample is above the largest number; plain percentiles in 83.9%."""
    samples, index = (
        np.random.default_rng(0).normal(size=(400, 5)),
        np.random.default_rng(1).integers(5, size=(4000, 5)),
    )
    ours = np.array([verdicts.interval(values, draws=4000) for values in samples])
    plain = np.array([np.quantile(values[index].mean(1), [0.025, 0.975]) for values in samples])
    covered, before = (((low < 0) & (high > 0)).mean() for low, high in (ours.T, plain.T))
    assert 0.89 <= covered <= 0.96 and 0.80 <= before <= 0.89 and covered > before + 0.04


def test_the_stated_coverage_is_that_of_all_resamples_of_five():
    """Without draws: a resample is how often each of the five was drawn. 100,000 times five normal
    numbers; the standard error is .001."""
    counts = [c for c in itertools.product(range(6), repeat=5) if sum(c) == 5]
    ways = np.array([120 / math.prod(map(math.factorial, count)) for count in counts]) / 5**5
    samples = np.random.default_rng(0).normal(size=(100_000, 5))
    below = (samples @ (np.array(counts).T / 5) < 0) @ ways  # share of resamples with mean < 0
    outside = NormalDist().cdf(-tables.students_t(4) * math.sqrt(5 / 4))
    for tail, stated in ((outside, 0.921), (0.025, 0.839)):
        assert ((below > tail) & (below < 1 - tail)).mean() == pytest.approx(stated, abs=0.003)


@pytest.mark.parametrize(
    "low, high, lower, said",
    [(0.1, 0.2, False, "holds"), (-0.2, -0.1, False, "does not hold"),
     (-0.1, 0.2, False, "undecided at this scale"),
     (0.1, 0.2, True, "does not hold"), (-0.2, -0.1, True, "holds"),
     (0.0, 0.2, False, "undecided at this scale"),
     (-math.inf, math.inf, True, "undecided at this scale"),
     (0.0, 0.0, False, "undecided at this scale")],
)  # fmt: skip
def test_the_verdict_comes_from_the_interval_alone(low, high, lower, said):
    assert verdicts.verdict(low, high, 5, lower) == said
    assert verdicts.verdict(low, high, 4, lower) == "too few seeds"
    assert verdicts.verdict(low, high, 0, lower) == "no runs yet"


def made(truth, reward=None, steps=(0, 5, 10), **training):
    return {
        "steps": list(steps),
        "evaluations": {"truth": truth, "reward": reward or truth},
        "training": training,
    }


def test_differences_are_paired_by_the_seeds_that_all_have():
    ours, a, b = (claims.Setting("grpo_base", "tiny-flux", "truth", ((name, 1),)) for name in "oab")
    runs = {
        ours: {
            0: made([0, 0, 0.5]),
            1: made([0, 0, 0.9]),
            2: made([0, 0, 0.1]),
            3: made([0, 0, 7.0]),
        },
        a: {2: made([0, 0, 0.3]), 1: made([0, 0, 0.6]), 0: made([0, 0, 0.2])},
        b: {0: made([0, 0, 0.4]), 1: made([0, 0, 0.4]), 2: made([0, 0, 0.1]), 9: made([0, 0, 9.0])},
    }
    claim = claims.Claim("x", "ours", "", "", claims.end("truth"), ours, (a, b))
    found = verdicts.found(claim, runs.get)
    assert found.seeds == [0, 1, 2] and found.differences == pytest.approx([0.2, 0.4, -0.1])
    assert (found.ours, found.others) == pytest.approx(
        (0.5, 1 / 3)
    ) and found.verdict == verdicts.FEW
    alone = verdicts.found(dataclasses.replace(claim, others=()), runs.get)
    assert alone.others is None and alone.differences == pytest.approx([0.5, 0.9, 0.1, 7.0])
    assert alone.verdict == verdicts.FEW
    gain = claims.Measure("", lambda run: run["evaluations"]["truth"][-1])
    other = dataclasses.replace(claim, others=(a,), lower=True, than=gain)
    assert verdicts.found(other, runs.get).differences == pytest.approx([0.3, 0.3, -0.2])
    assert verdicts.found(claim, lambda setting: {}).verdict == verdicts.NONE
    pairs = dataclasses.replace(claim, others=(a,), pairs=((b, a),))  # two rates of both methods
    means = [(0.5 + 0.4) / 2 - 0.2, (0.9 + 0.4) / 2 - 0.6, (0.1 + 0.1) / 2 - 0.3]
    assert verdicts.found(pairs, runs.get).differences == pytest.approx(means)


def test_measures_by_hand():
    run = made([0.4, 0.5, 0.45])
    run["numbers"] = {"grpo": 3.0}
    assert claims.end("truth").of(run) == 0.45
    assert claims.number("grpo", "").of(run) == 3.0


# --- The plan ---


def test_the_full_study_fits_into_a_night_and_quick_into_twenty_minutes(tmp_path):
    results = Results(tmp_path)
    asked = study.plan(study.Args(), results)
    minutes = sum(study.seconds(job.settings) for _, jobs in asked for job in jobs) / 60
    assert minutes <= 2 * 6.5 * 60  # two cores
    quick = study.plan(
        study.Args(quick=True), Results(tmp_path, searched=False, shrink=study.quick)
    )
    assert sum(study.seconds(job.settings) for _, jobs in quick for job in jobs) / 60 <= 2 * 20
    assert [title for title, _ in quick if not title.startswith("search")] == [
        title for title, _ in asked if not title.startswith("search")
    ]
    shown = study.show(asked, results).splitlines()
    assert shown[-2].split()[:3] == ["together", str(sum(len(jobs) for _, jobs in asked)), "0"]


def test_every_run_of_a_claim_is_planned_and_once():
    results = Results(FOLDER / "none")
    jobs = [(job.name, job.seed) for _, jobs in study.plan(study.Args(), results) for job in jobs]
    assert len(jobs) == len(set(jobs))
    assert len({claim.name for claim in claims.CLAIMS}) == len(claims.CLAIMS)
    for claim in claims.CLAIMS:
        assert claim.seeds >= 5
        for setting in claim.settings:
            assert {(name_of(setting.settings()), seed) for seed in range(claim.seeds)} <= set(
                jobs
            ), claim.name


def test_the_baseline_is_searched_as_the_methods_are_on_seeds_of_its_own():
    own = str(ROOT / "grpo_base.py")
    plan = study.plan(study.Args(search=True, methods=(own,)), Results(FOLDER / "none"))
    plan = [(title, jobs) for title, jobs in plan if title.startswith("search")]
    assert {job.seed for _, jobs in plan for job in jobs} == set(claims.SEARCH_SEEDS)
    assert not set(claims.SEARCH_SEEDS) & set(range(max(claim.seeds for claim in claims.CLAIMS)))
    tried = {}
    for _, jobs in plan:
        (key,) = {  # of the search: a variant of a script has its own
            tuple(job.settings.get(name) for name in ("model", "script", "task", "variant", "gate"))
            for job in jobs
        }
        points = {
            (job.settings["learning_rate"], job.settings["clip_range"], job.seed) for job in jobs
        }
        tried[key] = points
        assert len(points) == len(jobs) >= 3 * len(claims.SEARCH_SEEDS)
    for (model, _, task, *_), points in tried.items():
        assert points == tried.get((model, "grpo_base", task, None, None), points)
    for claim in claims.CLAIMS:
        for setting in claim.settings:
            free = setting.searched is None or setting.script.startswith("probe:")
            assert free or setting.searched in claims.SEARCHED, claim.name


def test_the_transfer_check_is_what_it_declares():
    """Both methods at the same rates, 20 seeds or more, eight evaluation noises, no search."""
    transfer = [claim for claim in claims.CLAIMS if claim.paper == "Transfer"]
    assert 3 <= len(transfer) <= 5
    for claim in transfer:
        pairs = [(claim.ours, *claim.others), *claim.pairs]
        assert claim.seeds >= 20 and 2 <= len(pairs) <= 3
        rates = [[one.settings()["learning_rate"] for one in pair] for pair in pairs]
        assert all(ours == other for ours, other in rates) and len(set(map(tuple, rates))) > 1
        for setting in claim.settings:
            assert setting.searched is None and setting.model == "tiny-flux"
            assert setting.settings()["eval_prompts"] == claims.HELD_OUT
    once = read_prompts(ROOT / "assets/prompts/shapes_heldout.txt")
    assert read_prompts(ROOT / claims.HELD_OUT) == once * claims.EVALUATION_NOISES
    assert len(claims.WITHDRAWN) == 12


def test_the_name_of_a_run_stays_what_it_is():
    """Who changes it makes all committed runs other runs."""
    setting = claims.setting("grpo_base", "tiny-flux", "proxy")
    assert name_of(setting.settings()) == name_of(dict(reversed(setting.settings().items())))
    assert name_of(setting.settings()) == "tiny-flux-grpo_base-b862516d"
    assert name_of(setting.settings({"learning_rate": 1e-3})) != name_of(setting.settings())


# --- The search ---


def add(results, settings, seeds, end):
    for seed in seeds:
        run = made([0.4, 0.5, end], steps=range(3))
        results.add(settings, seed, {}, run)


def test_the_search_takes_the_best_point_and_its_runs_are_no_evidence(tmp_path):
    results, searched = Results(tmp_path), ("slas", "tiny-flux", "proxy")
    setting, points = claims.setting(*searched), claims.points("tiny-flux", "proxy")
    assert (
        results.tuned(*searched) is None
        and results.settings(setting) is None
        and results.of(setting) == {}
    )
    for point, end in zip(points, (0.45, 0.5, 0.7, 0.6, 0.4), strict=True):
        assert results.tuned(*searched) is None
        add(results, setting.settings(point), claims.SEARCH_SEEDS, end)
    rates = [point["learning_rate"] for point in points]
    assert rates == pytest.approx([1e-4, 2e-4, 4e-4, 8e-4, 2e-4])
    assert results.tuned(*searched) == points[2]
    ablation = claims.setting("slas", "tiny-flux", "proxy", gamma=1.0)
    assert (
        results.settings(ablation)["learning_rate"] == rates[2]
        and results.settings(ablation)["gamma"] == 1.0
    )
    assert (
        results.runs(results.settings(setting)).keys() == set(claims.SEARCH_SEEDS)
        and results.of(setting) == {}
    )
    again = Results(tmp_path)  # from the files
    assert again.tuned(*searched) == results.tuned(*searched) and again.files == results.files
    add(
        results, setting.settings(points[4]), claims.SEARCH_SEEDS, 0.65
    )  # five times the clip range: better than once,
    assert (
        results.tuned(*searched) == points[2]
    )  # but not than twice the rate, and no point has both
    add(results, setting.settings(points[4]), claims.SEARCH_SEEDS, 0.75)
    assert results.tuned(*searched) == points[4]


def test_two_studies_may_write_into_one_file(tmp_path):
    one, other = Results(tmp_path), Results(tmp_path)
    settings = claims.setting("slas", "tiny-flux", "proxy").settings()
    add(one, settings, [0], 0.5)
    add(other, settings, [2], 0.7)
    add(one, settings, [1], 0.6)
    assert list(Results(tmp_path).runs(settings)) == [0, 1, 2] and list(one.runs(settings)) == [
        0,
        1,
        2,
    ]


def test_no_more_seeds_are_looked_at_than_a_claim_names():
    claim = claims.Claim(
        "x", "ours", "", "", claims.end("truth"), claims.Setting("grpo_base", "tiny-flux", "truth")
    )
    found = verdicts.found(claim, lambda setting: {seed: made([0, seed]) for seed in range(9)})
    assert found.seeds == [0, 1, 2, 3, 4] and found.ours == 2


def test_what_is_there_is_not_run_again(tmp_path):
    results = Results(tmp_path, searched=False)
    args = study.Args(only=("transfer-errors",))
    jobs = [job for _, jobs in study.plan(args, results) for job in jobs]
    add(results, jobs[0].settings, [jobs[0].seed], 0.5)
    assert study.todo(jobs, Results(tmp_path, searched=False)) == jobs[1:]
    with pytest.raises(InputError, match="no claim begins so"):
        study.plan(study.Args(only=("nothing",)), results)
    with pytest.raises(InputError, match="there is no such file"):
        study.plan(study.Args(methods=("nothing.py",)), results)


# --- Runs ---


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Settings -> those of a run of one step; tiny-flux takes two denoising steps and has sixteen
    held-out prompts."""
    lines = read_prompts(ROOT / "assets/prompts/shapes_heldout.txt")[:16]
    (tmp_path / "few.txt").write_text("\n".join(lines) + "\n")
    few = {"eval_prompts": str(tmp_path / "few.txt"), "sampling_steps": 2}
    tables = (models.MODELS, papers.GRPO, papers.BPGO, papers.SLAS, papers.SELF_PACED)
    for table in tables:
        monkeypatch.setitem(table, "tiny-flux", {**table["tiny-flux"], **few})
    return lambda settings: {**settings, **SMALL}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """trained(job) is study.run as a worker has it, into a folder of its own."""
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.chdir(ROOT)
    return lambda job, folder="runs": study.run(job, tmp_path / folder)


def test_two_runs_from_the_plan_to_the_table(trained, small, tmp_path):
    results = Results(tmp_path / "results", searched=False, shrink=small)
    slas, grpo = (claims.setting(name, "tiny-flux", "proxy") for name in ("slas", "grpo_base"))
    claim = claims.Claim("x", "SLAS", "", "", claims.end("truth"), slas, (grpo,))
    pair = [study.job(results.settings(setting), 0) for setting in claim.settings]
    for job in pair:
        found = trained(job)
        assert not isinstance(found, str), found
        assert f"{job.name} seed 0: reward 0." in study.keep(results, job, found)
    found = verdicts.found(claim, Results(tmp_path / "results", searched=False, shrink=small).of)
    assert found.seeds == [0] and found.verdict == verdicts.FEW and math.isinf(found.low)
    file = json.loads((tmp_path / "results" / f"{pair[0].name}.json").read_text())
    run = file["runs"]["0"]
    assert file["config"]["gamma"] == 0.5 and str(ROOT) not in json.dumps(file)
    assert run["steps"] == [0, 1] and set(run["evaluations"]) == {
        "reward",
        "clip",
        "truth",
        "quality",
    }
    assert len(run["training"]["reward_mean"]) == 1 and {"gamma", "batch_std"} <= set(
        run["training"]
    )
    assert run["versions"]["torch"] and run["commit"] and run["seconds"] > 0
    assert len(run["pictures"]["png"]) == 6 and list(results.methods("tiny-flux", "proxy")) == [
        "grpo_base",
        "slas",
    ]
    left = {path.name for path in (tmp_path / "runs" / f"{pair[0].name}-0").iterdir()}
    assert {"metrics.jsonl", "config.json"} <= left and not left & {"checkpoints", "export"}


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(trained, small, tmp_path, monkeypatch):
    setting = claims.setting("bpgo", "tiny-flux", "doubtful")
    job = study.job({**small(setting.settings()), "steps": 2}, 3)
    _, whole = trained(job, "whole")
    honest, calls = sde.rollout, []

    def interrupted(*words, **settings):
        calls.append(words)
        if len(calls) == 4:  # an evaluation, a step, an evaluation; this one is in the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*words, **settings)

    monkeypatch.setattr(sde, "rollout", interrupted)
    assert trained(job) == "Stopped: SIGTERM: stopped after 1 steps"
    monkeypatch.setattr(sde, "rollout", honest)
    _, found = trained(job)
    assert (
        whole["steps"] == [0, 1, 2]
        and whole["evaluations"]["vague"] != whole["evaluations"]["truth"]
    )
    assert all(found[name] == whole[name] for name in ("steps", "evaluations"))
    curves = [{n: v for n, v in run["training"].items()} for run in (found, whole)]
    assert curves[0] == curves[1] and {"prior", "trust_mean"} <= set(curves[0])


def test_a_method_of_ones_own_is_trained_as_the_baseline_is(trained, small, tmp_path):
    own = tmp_path / "gentle.py"
    own.write_text(
        (ROOT / "grpo_base.py").read_text().replace("reward.nanmean(1, keepdim=True)", "0.9", 1)
    )
    results = Results(tmp_path / "results", searched=False, shrink=small)
    asked = study.plan(study.Args(methods=(str(own),), seeds=2), results)
    assert [title for title, _ in asked] == [
        f"gentle.py:tiny-flux:{task}" for task in ("truth", "proxy", "doubtful")
    ]
    base, other, mine, _ = asked[0][1]
    assert (base.seed, other.seed, mine.seed) == (0, 1, 0)
    assert {n: v for n, v in mine.settings.items() if n not in ("script", "source")} == {
        n: v for n, v in base.settings.items() if n != "script"
    }
    ends = {}
    for job in (base, mine):
        found = trained(job)
        assert not isinstance(found, str), found
        study.keep(results, job, found)
        ends[job.settings["script"]] = found[1]["training"]
    assert (
        ends["gentle.py"]["reward_mean"] == ends["grpo_base"]["reward_mean"]
    )  # the same prompts and noise
    assert ends["gentle.py"]["grad_norm"] != ends["grpo_base"]["grad_norm"]
    lines = [line for line in verdicts.side_by_side(results).splitlines() if "| truth |" in line]
    assert [line.split(" | ")[2] for line in lines] == ["grpo_base", "gentle.py"]
    own.write_text(own.read_text() + "\n")
    again = study.plan(study.Args(methods=(str(own),), seeds=2), results)
    assert again[0][1][2].name != mine.name  # another text is another method


def test_a_worker_ends_with_the_study(tmp_path, monkeypatch):
    """Also one that is killed: or the next start would train beside it, in the same folder."""
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    study.start_worker(os.getppid(), tmp_path)
    assert torch.get_num_threads() == 1 and Path.cwd() == ROOT and not ended.wait(0.1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert ended.wait(5)
    sys.stdout.close()
    torch.set_num_threads(threads)


def test_what_fails_is_said_in_a_line_and_kept_nowhere(trained, small, tmp_path, capfd):
    setting = claims.setting("grpo_base", "tiny-flux", "truth", reward=("verifyer",))
    job = study.job(small(setting.settings()), 0)
    found, results = trained(job), Results(tmp_path / "results")
    assert found.startswith("InputError: reward: there is no 'verifyer'") and "\n" not in found
    assert "FAILED" in study.keep(results, job, found) and not results.files


# --- Rewards whose faults are known ---

CAPTIONS = ["a red circle", "a circle", "a shape", "two circles", "a red circle left of a square"]


def test_what_a_caption_leaves_open():
    assert [study_rewards.left_open(caption) for caption in CAPTIONS] == [0, 0.5, 1, 0.5, 0.25]
    moving = [
        "a red circle moving left quickly",
        "a circle moving left",
        "a shape moving up",
        "something red moving up",
    ]
    assert [study_rewards.left_open(caption) for caption in moving] == [0, 0.5, 0.75, 0.5]
    for captions in moving_captions().values():
        assert all(0 <= study_rewards.left_open(caption) <= 0.75 for caption in captions)


def test_faults_are_those_that_the_class_names():
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[0] = scene.draw(*(torch.tensor([[v]]) for v in (0, 0, 16.0, 16.0, 5.0)), 32)[0]
    truth = verifier.verify(images, CAPTIONS)["score"]
    assert truth[0] > 0.9
    open_ = torch.tensor([0.9 * share for share in (0, 0.5, 1, 0.5, 0.25)])
    unsure = (1 - open_) * truth + open_ * 0.3
    noise = torch.tensor([study_rewards.own_error(*pair) for pair in zip(images, CAPTIONS)])
    likes = torch.tensor([0, 0, 0, 0.1, 0])
    for reward, expected in (
        (study_rewards.Noisy(), truth + 0.2 * noise),
        (study_rewards.Unsure(), (1 - 0.9 * torch.tensor([0, 1, 1, 1, 0])) * truth + 0.15 * noise),
        (study_rewards.Flat(), ((truth - 0.95) / 0.05).clamp(min=0)),
        (study_rewards.Ambiguous(), unsure),
        (study_rewards.NoisyAmbiguous(), unsure + 0.2 * noise),
        (study_rewards.Biased(), truth + likes),
        (study_rewards.Vague(), truth * torch.tensor([0, 1, 1, 1, 0])),
    ):
        assert torch.allclose(reward.score(images, CAPTIONS), expected, atol=1e-6), reward
    assert study_rewards.share_of_vague(CAPTIONS) == 0.6


def test_the_error_belongs_to_the_sample():
    """Whatever else is scored beside it, and when: so a run that goes on sees the same. Over
    samples it is normal."""
    images, reward = (
        torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        study_rewards.own_error,
    )
    errors = np.array([reward(image, "a circle") for image in images])
    assert errors.tolist() == [reward(image.clone(), "a circle") for image in images]
    assert abs(errors.mean()) < 0.15 and abs(errors.std() - 1) < 0.1 and len(set(errors)) == 400
    assert (
        reward(images[0], "a square") != errors[0]
        and reward(images[0] + 0.02, "a circle") != errors[0]
    )


def test_a_clip_is_scored_by_the_motion_verifier_with_the_same_faults():
    clips = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captions = ["a red circle moving left quickly", "a shape moving up"]
    truth, open_ = motion.verify(clips, captions)["score"], torch.tensor([0, 0.9 * 0.75])
    noise = torch.tensor([study_rewards.own_error(*pair) for pair in zip(clips, captions)])
    expected = (1 - open_) * truth + open_ * 0.3 + 0.2 * noise
    assert torch.allclose(
        study_rewards.MotionNoisyAmbiguous().score(clips, captions), expected, atol=1e-6
    )
    assert torch.equal(
        study_rewards.MotionVague().score(clips, captions), truth * torch.tensor([0, 1])
    )


def test_loudness_is_numpys():
    random = np.random.default_rng(0)
    spread = np.array([0.01, 0.02, 0.1, 0.3, 0.2, 0.15, 0.4, 0.5])
    proxy = random.normal(size=(8, 12)) * spread[:, None]
    truth = proxy + random.normal(size=(8, 12)) * 0.2
    found = probes.loud(torch.tensor(proxy), torch.tensor(truth))
    low, high = np.argsort(proxy.std(1))[:2], np.argsort(proxy.std(1))[-2:]
    centred = proxy - proxy.mean(1, keepdims=True)
    shaped = np.sign(centred) * (np.abs(centred) / proxy.std()) ** 1.5
    for name, advantages in (
        ("grpo", centred / proxy.std(1, keepdims=True)),
        ("slas", shaped.clip(-5, 5)),
    ):
        assert found[name] == pytest.approx(
            np.abs(advantages[low]).mean() / np.abs(advantages[high]).mean(), rel=1e-5
        )
    for name, rows in (("true_low", low), ("true_high", high)):
        assert found[name] == pytest.approx(
            np.mean([np.corrcoef(proxy[row], truth[row])[0, 1] for row in rows])
        )
    assert found["slas"] < 0.1 < 0.8 < found["grpo"] < 1.2


# --- What is committed ---


def test_the_readme_has_the_table_of_the_committed_results():
    text = verdicts.README.read_text()
    assert verdicts.with_table(text, Results(FOLDER)) == text, "python -m lab.verdicts"


def test_each_verdict_against_a_claim_has_a_remark_and_no_remark_stands_at_what_is_undecided():
    told = {finding.claim.name: finding.verdict for finding in verdicts.findings(Results(FOLDER))}
    against = {name for name, verdict in told.items() if verdict == verdicts.FAILS}
    assert (
        against
        <= set(claims.REMARKS)
        <= against | {n for n, v in told.items() if v == verdicts.HOLDS}
    )


def test_the_numbers_in_remarks_are_those_of_the_results():
    results = Results(FOLDER)

    def weights(method):
        """Mean weight of the last stage in the first five steps and in the last five."""
        runs = results.of(claims.setting(method, "tiny-flux", "stages")).values()
        every = [run["training"]["weight_verifier"] for run in runs]
        parts = [[weight[part] for weight in every] for part in (slice(5), slice(-5, None))]
        return [f"{np.mean(part):.2f}".removeprefix("0") for part in parts]

    rates = {
        f"{results.tuned(method, 'tiny-flux', 'stages')['learning_rate']:.5f}".strip("0")
        for method in ("self_paced", "self_paced own")
    }
    numbers = {
        "own-previous:tiny-flux": [*weights("self_paced own"), *weights("self_paced"), *rates],
        "v4-own:tiny-flux": weights("self_paced v4"),
    }
    assert numbers.keys() == claims.REMARKS.keys()
    for name, values in numbers.items():
        assert all(value in claims.REMARKS[name] for value in values), (name, values)


def test_the_committed_results_are_small_and_whole():
    files = list(FOLDER.glob("*.json"))
    assert sum(path.stat().st_size for path in files) < 2e6
    for path in files:
        assert name_of(json.loads(path.read_text())["settings"]) == path.stem
    for path in figures.FIGURES.glob("*.png"):
        assert path.stem in figures.DRAWN and path.stat().st_size < 150_000


def test_the_archive_has_the_runs_of_version_0_1():
    """It has each setting that is still in lab/results, with the same runs."""
    with tarfile.open(FOLDER.with_name("results_0.1.tar.xz")) as archive:
        files = {
            Path(member.name).stem: json.loads(archive.extractfile(member).read())
            for member in archive.getmembers()
            if member.isfile()
        }
    assert sum(len(file["runs"]) for file in files.values()) == 413
    for name, file in files.items():
        assert name_of(file["settings"]) == name
    assert len({path.stem for path in FOLDER.glob("*.json")} & files.keys()) > 60


@pytest.mark.long
def test_figures_of_made_up_runs(tmp_path):
    """All of them, from two seeds, each a picture below 150 kB; from none there is none."""
    results, random = Results(tmp_path / "results", searched=False), np.random.default_rng(0)
    png = probes.png(torch.rand(3, 32, 32))
    pictures = {
        "captions": ["a red circle", "two circles"],
        "truth": [0.5, 0.25],
        "png": [png, png],
    }
    searched = [results.settings(claims.setting(*one)) for one in claims.SEARCHED]
    plain = [study.job(one, seed) for one in searched for seed in range(2)]
    for _, jobs in [*study.plan(study.Args(seeds=2), results), ("methods side by side", plain)]:
        for job in jobs:
            evaluations = {
                name: np.sort(random.random(3)).tolist()
                for name in ("reward", "truth", "vague", "quality")
            }
            stages = {
                f"weight_{stage}": random.random(6).tolist()
                for stage in job.settings.get("reward", ())
            }
            run = {
                "steps": [0, 15, 30],
                "evaluations": evaluations,
                "training": {"reward_std": random.random(6).tolist(), **stages},
            }
            numbers = {
                f"{n}_{k}{e}": 1.0
                for n in ("verifier", "clip", "biased")
                for k in (10, 15, 20)
                for e in ("", "_kappa")
            }
            numbers |= {"grpo": 1.0, "slas": 0.1, "true_low": 0.2, "true_high": 0.5}
            results.files[job.name] = file = results.files.get(
                job.name, {"settings": job.settings, "runs": {}}
            )
            file["runs"][str(job.seed)] = {**run, "numbers": numbers, "pictures": pictures}
    folder = tmp_path / "figures"
    figures.draw(results, folder)
    assert {path.stem for path in folder.iterdir()} == set(figures.DRAWN)
    for path in folder.iterdir():
        assert path.stat().st_size < 150_000
        with Image.open(path) as picture:
            picture.verify()
    figures.draw(Results(tmp_path / "nothing"), folder)
    assert not list(folder.iterdir()), "what has no runs is not drawn"
    said = verdicts.table(results)
    assert (
        said.count("| 2 |") >= len(claims.CLAIMS)
        and verdicts.NONE not in said.split("### The search")[0]
    )
