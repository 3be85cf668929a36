"""evaluate.py: the training's own evaluation once more, tables, kills, processes, bad input."""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import smooth  # noqa: F401, more names for --reward
import torch
from conftest import ROOT, launch

import bpgo
import evaluate
import grpo_base
import self_paced
from common import cli, errors, models, sde
from common.args import defaults
from common.errors import InputError, RunError
from common.prompts import caption_of, image_of, read_prompts
from common.reporting.files import rows_before
from common.trainer.evaluator import NOISE
from evaluation import sampler, tables
from evaluation.folder import Folder

HELD_OUT = read_prompts(models.settings("tiny-flux")["eval_prompts"])
NUMBER = 12


def trained(folder, script, **settings):
    """A small run in a folder, with evaluations before, between and after its two steps."""
    small = dict(
        prompts_per_step=2,
        group_size=4,
        sampling_steps=4,
        micro_batch=8,
        minibatches=1,
        tracker="none",
    )
    small |= dict(
        steps=2, eval_every=1, sample_every=0, eval_prompts=str(folder.parent / "few.txt")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__])
        script.main(defaults(script.Args, **{**small, "output": str(folder), **settings}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of all weights and one of a LoRA, which tests look at and leave as they are."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "few.txt").write_text("\n".join(HELD_OUT[:NUMBER]))
    return SimpleNamespace(
        full=trained(folder / "full", grpo_base, save_every=1, learning_rate=1e-3),
        lora=trained(folder / "lora", bpgo, lora_rank=4, learning_rate=1e-2),
        prompts=folder / "few.txt",
    )


@pytest.fixture
def look(tmp_path, monkeypatch, capsys):
    """evaluate.py with these words, here: (results.json, the output folder)."""

    def run(*words, output="look", shown=0):
        folder = tmp_path / output
        words = [*map(str, words), f"--shown={shown}", f"--output={folder}"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        evaluate.main(cli.parse(evaluate.Args, evaluate.__doc__, evaluate.defaults))
        return json.loads((folder / "results.json").read_text()), folder

    return run


def eval_rewards(folder):
    return [row["eval_reward"] for row in rows_before(folder / "metrics.jsonl", 10**6)]


def answers(folder):
    """What an evaluation says, byte for byte."""
    return {
        name: (folder / name).read_bytes()
        for name in ("results.json", "results.csv", "side_by_side.png")
    }


# --- The training's own evaluation ---


def test_a_checkpoint_gets_its_own_evaluations_reward_once_more(runs, look):
    """All weights and a LoRA, the last checkpoint and a named one; the base as before training."""
    found, folder = look(runs.full, runs.lora, runs.full / "checkpoints/step_000001", shown=2)
    assert list(found["rewards"]) == ["base", "full", "lora", "full-step_000001"]
    means = {name: row["verifier"]["mean"] for name, row in found["rewards"].items()}
    assert means["base"] == eval_rewards(runs.full)[0]
    assert [means["full-step_000001"], means["full"]] == eval_rewards(runs.full)[1:]
    assert means["lora"] == eval_rewards(runs.lora)[-1] and len(set(means.values())) == 4
    assert (folder / "side_by_side.png").read_bytes()[:4] == b"\x89PNG"


def test_in_bf16_a_lora_is_what_it_was_and_all_weights_are_rounded_as_an_export_is(
    bf16, look, tmp_path
):
    """Training keeps float32 beside what the passes see."""
    (tmp_path / "few.txt").write_text("\n".join(HELD_OUT[:4]))
    for rank, rate, off in ((4, 1e-2, 0), (0, 1e-4, 0.02)):
        folder = trained(
            tmp_path / f"run-{rank}",
            grpo_base,
            steps=1,
            lora_rank=rank,
            learning_rate=rate,
            clip_range=0.05,
        )
        found, _ = look(folder, folder / "export", output=f"look-{rank}")
        base, run, export = (row["verifier"]["mean"] for row in found["rewards"].values())
        assert base == pytest.approx(eval_rewards(folder)[0], abs=off)
        assert run == pytest.approx(eval_rewards(folder)[1], abs=off) and abs(run - base) > 1e-4
        assert run == pytest.approx(export, abs=0.02 if rank else 1e-6)


def test_several_rewards_with_weights_and_self_paced_ones(runs, look, tmp_path):
    mixed = trained(runs.full.with_name("mixed"), grpo_base, steps=1, reward=("red=0.5", "green=2"))
    found, _ = look(mixed)
    assert [row["sum"]["mean"] for row in found["rewards"].values()] == eval_rewards(mixed)
    paced = trained(runs.full.with_name("paced"), self_paced, steps=1)
    found, _ = look(paced, output="paced")
    assert [row["verifier"]["mean"] for row in found["rewards"].values()] == eval_rewards(paced)


def test_clips_of_two_experts_and_their_moving_averages(look, tmp_path):
    (tmp_path / "few.txt").write_text(
        "\n".join(read_prompts(models.settings("tiny-wan-i2v")["eval_prompts"])[:3])
    )
    settings = dict(
        model="tiny-wan-i2v", ema=0.5, prompts_per_step=1, sde_steps=0, learning_rate=1e-3
    )
    folder = trained(tmp_path / "run", grpo_base, **settings)
    found, place = look(folder, folder / "export_ema", shown=2)
    means = [row["motion"]["mean"] for row in found["rewards"].values()]
    assert means[:2] == [eval_rewards(folder)[0], eval_rewards(folder)[-1]]
    assert (place / "side_by_side.mp4").stat().st_size and (place / "side_by_side.png").exists()
    averaged, _ = look(folder, "--averaged", output="averaged")
    assert averaged["rewards"]["run-averaged"]["motion"]["mean"] == means[2] not in means[:2]


def test_exports_and_sharded_checkpoints_are_the_same_weights(runs, look, tmp_path):
    sharded = shutil.copytree(runs.full, tmp_path / "sharded")
    share_out(sharded / "checkpoints/step_000002")
    found, _ = look(runs.full, runs.full / "export", sharded, runs.lora, runs.lora / "export")
    means = [row["verifier"]["mean"] for row in found["rewards"].values()]
    assert means[1] == means[2] == means[3] and means[4] == pytest.approx(means[5], abs=1e-6)


def test_a_run_may_lie_in_a_folder_called_checkpoints(runs, look, tmp_path):
    folder = shutil.copytree(runs.lora, tmp_path / "checkpoints/a run")
    found, _ = look(folder, folder / "checkpoints/step_000002")
    means = {name: row["verifier"]["mean"] for name, row in found["rewards"].items()}
    assert means["a run"] == means["a run-step_000002"] == eval_rewards(runs.lora)[-1]


def share_out(folder):
    """Rewrites a checkpoint as two processes leave one whose transformer is sharded."""
    state = torch.load(folder / "transformer.pt", weights_only=True)
    for part in range(2):
        shares = {
            n: {"shard": v.tensor_split(2)[part].clone()} if v.ndim else v for n, v in state.items()
        }
        torch.save(shares, folder / f"transformer.{part}.pt")
    (folder / "transformer.pt").unlink()
    about = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(
        json.dumps({**about, "parts": {**about["parts"], "transformer": 2}})
    )


def test_size_steps_seed_and_samples_are_its_own(runs, look):
    flags = {"--sampling-steps": 6, "--guidance": 1, "--seed": 1, "--width": 48}
    own, _ = look(
        "--model", "tiny-flux", "--prompts", runs.prompts, "--reward", "red", "--sampling-steps", 4
    )
    found = [own["rewards"]["base"]["red"]["mean"]]
    for flag, value in flags.items():
        words = ("--reward", "red", "--prompts", runs.prompts, "--sampling-steps", 4, flag, value)
        other, _ = look("--model", "tiny-flux", *words, output=flag)
        found.append(other["rewards"]["base"]["red"]["mean"])
    assert len(set(found)) == len(found)
    words = ("--reward", "red", "--prompts", runs.prompts, "--sampling-steps", 4, "--samples", 2)
    more, place = look("--model", "tiny-flux", *words, output="more")
    assert more["rewards"]["base"]["red"]["samples"] == 2 * NUMBER
    kept = Folder(place, more["settings"], more["weights"]).parts["base"][0]["red"]
    assert np.mean(kept[:NUMBER]) == pytest.approx(found[0], abs=1e-6), (
        "the first sample's noise stays"
    )


TAKEN = [("tiny-flux", 0), ("tiny-wan-i2v", 2)]
ALL_TAKEN = [
    (f"tiny-{family}", rank) for family in ("flux", "sd", "wan", "wan-i2v") for rank in (0, 2)
]


@pytest.mark.long
@pytest.mark.parametrize(
    "exports", [TAKEN, pytest.param(ALL_TAKEN, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_exports_give_the_evaluators_own_samples_in_plain_diffusers(
    exports, look, tmp_path, monkeypatch
):
    """Loaded by another process that knows nothing of this project: 1e-5 in float32, and not the
    base model's."""
    jobs, true, made = [], sampler.sample, []
    monkeypatch.setattr(
        sampler, "sample", lambda *words, **more: made.append(true(*words, **more)) or made[-1]
    )
    for name, rank in exports:
        prompts = read_prompts(models.settings(name)["eval_prompts"])[:2]
        (tmp_path / "few.txt").write_text("\n".join(prompts))
        settings = dict(model=name, lora_rank=rank, steps=1, prompts_per_step=1, sde_steps=0)
        settings["learning_rate"] = 1e-2 if rank else 1e-4
        folder = trained(tmp_path / f"{name}-{rank}", grpo_base, **settings)
        made.clear()
        found, _ = look(folder, output=f"look-{name}-{rank}")
        base, ours = made
        torch.save(ours, folder / "ours.pt")
        assert (ours - base).abs().max() > 1e-3
        jobs.append(job_of(folder, name, rank, prompts, found["settings"]))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = ROOT / "tests/plain_pipelines.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "jobs.json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for job in jobs:
        theirs = torch.load(job["out"], weights_only=True)
        ours = torch.load(Path(job["out"]).with_name("ours.pt"), weights_only=True)
        assert (theirs - ours).abs().max() <= 1e-5, job["folder"]


def job_of(folder, name, rank, prompts, settings):
    """For plain_pipelines.py: the evaluation's prompts, noise and sigmas."""
    model = models.load(name, torch.float32, prompts)
    torch.save(sde.RowNoise(0, NOISE, range(2))(model.noise_shape), folder / "latents.pt")
    export, experts = str(folder / "export"), "transformer_2" in model.trainable
    return dict(
        pipeline=model.pipeline.__name__,
        folder=models.settings(name)["source"] if rank else export, lora=export if rank else "",
        lora_2=f"{export}/transformer_2" if rank and experts else "",
        prompts=[caption_of(prompt) for prompt in prompts],
        images=[image_of(p) for p in prompts if image_of(p)], latents=str(folder / "latents.pt"),
        sigmas=model.sigmas(4, settings["shift"]).tolist(), guidance=settings["guidance"],
        out=str(folder / "theirs.pt"),
    )  # fmt: skip


# --- Kills, processes ---


@pytest.mark.long
def test_a_killed_evaluation_goes_on_to_the_same_table_bit_for_bit(runs, look, monkeypatch):
    flags = (runs.lora, "--samples", "2", "--micro-batch", "5", "--reward-batch", "5")
    _, whole = look(*flags, output="whole", shown=4)
    left, add, true, made = [3], Folder.add, sampler.sample, []

    def killed(self, *words):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(self, *words)

    def counted(model, prompts, **settings):
        made.append(len(prompts))
        return true(model, prompts, **settings)

    monkeypatch.setattr(sampler, "sample", counted)
    monkeypatch.setattr(Folder, "add", killed)
    with pytest.raises(errors.Stopped, match="the same command continues"):
        look(*flags, output="cut", shown=4)
    monkeypatch.setattr(Folder, "add", add)
    cut = whole.with_name("cut")
    with (cut / "scores/base.jsonl").open("a") as file:
        file.write('{"part": 3, "scores": {"veri')
    made.clear()
    look(*flags, output="cut", shown=4)
    assert sum(made) == 2 * 2 * NUMBER - 15, "what was scored is not scored again"
    assert answers(cut) == answers(whole)
    (cut / "shown/base/00003.pt").unlink()
    made.clear()
    look(*flags, output="cut", shown=4)
    assert made == [5] and answers(cut) == answers(whole)


@pytest.mark.parametrize(
    "edited",
    [
        '{"part": 0}',
        '{"scores": {}}',
        '{"part": [0], "scores": {"verifier": [0.5]}}',
        '{"part": 0, "scores": [1]}',
        '{"part": 0, "scores": {"verifier": 3}}',
        '{"part": 0, "scores": {"verifier": ["a", 1.0]}}',
    ],
)
def test_scores_that_were_edited_count_as_not_there(tmp_path, edited):
    def folder():
        return Folder(str(tmp_path), {"seed": 0}, {"base": {"base": "tiny-flux"}})

    folder().begin()
    file = tmp_path / "scores/base.jsonl"
    file.write_text(
        file.read_text() + edited + "\n" + '{"part": 1, "scores": {"verifier": [0.5, null]}}\n'
    )
    assert folder().parts == {"base": {1: {"verifier": [0.5, None]}}}


def test_parts_whose_scores_are_others_are_scored_again(look, tmp_path):
    two = tmp_path / "prompts.txt"
    two.write_text("a red circle\na blue square\n")
    words = ["--model", "tiny-flux", "--prompts", str(two), "--sampling-steps", "2"]
    before, place = look(*words)
    file = place / "scores/base.jsonl"
    for wrong in ('{"verifier": [0.5]}', '{"jpeg": [0.5, 0.5]}'):
        file.write_text(file.read_text().splitlines()[0] + f'\n{{"part": 0, "scores": {wrong}}}\n')
        assert look(*words)[0] == before


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(
    look, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/look: cannot write there"):
        look("--model", "tiny-flux", "--sampling-steps", "2", output="file/look")


@pytest.mark.long
def test_two_processes_give_the_table_of_one(runs, look, tmp_path):
    words = [
        str(runs.full),
        str(runs.lora),
        "--samples",
        "2",
        "--micro-batch",
        "7",
        "--reward-batch",
        "7",
    ]
    _, one = look(*words, output="one", shown=2)
    done = launch(2, str(ROOT / "evaluate.py"), *words, "--shown=2", f"--output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert answers(tmp_path / "two") == answers(one)


def test_more_runs_join_an_evaluation(runs, look, monkeypatch):
    look(runs.full)
    made, true = [], sampler.sample
    monkeypatch.setattr(
        sampler, "sample", lambda *words, **more: made.append(1) or true(*words, **more)
    )
    found, _ = look(runs.full, runs.lora)
    assert list(found["rewards"]) == ["base", "full", "lora"]
    assert len(made) == 1, "the new run alone"


# --- Numbers ---


def test_means_intervals_and_win_rates_are_those_of_numpy():
    rng = np.random.default_rng(0)
    ours, base = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    base[:5] = ours[:5]  # ties
    ours[7], ours[8, 1], base[9, 2] = np.nan, np.nan, np.nan
    found = tables.summary(torch.tensor(ours), torch.tensor(base))
    with np.errstate(all="ignore"), pytest.warns(RuntimeWarning):
        by_prompt = np.nanmean(ours, 1)
        wins = np.where(np.isnan(ours + base), np.nan, (ours > base) + 0.5 * (ours == base))
        assert found["win_rate"] == pytest.approx(np.nanmean(np.nanmean(wins, 1)), abs=1e-12)
    known = by_prompt[~np.isnan(by_prompt)]
    assert found["mean"] == pytest.approx(known.mean(), abs=1e-12)
    assert (found["prompts"], found["samples"], found["missing"]) == (39, 116, 4)
    means = rng.choice(known, (20_000, len(known))).mean(1)
    outside = NormalDist().cdf(-2.02439 * (39 / 38) ** 0.5)  # Student's t, 38 degrees of freedom
    expected = np.quantile(means, [outside, 1 - outside])
    assert np.allclose([found["low"], found["high"]], expected, atol=0.01)


def test_a_95_percent_interval_holds_the_mean_in_95_of_100():
    generator = torch.Generator().manual_seed(0)
    inside = [
        low <= 0 <= high
        for low, high in (
            tables.interval(torch.randn(50, generator=generator), 1000) for _ in range(300)
        )
    ]
    assert 0.9 < np.mean(inside) < 0.98


def test_the_interval_of_eight_prompts_covers_94_percent_and_plain_percentiles_89():
    """3000 times eight normal numbers; the standard error is .004 and .006."""
    samples = np.random.default_rng(1).normal(size=(3000, 8))
    index = np.random.default_rng(2).integers(8, size=(2000, 8))
    ours = np.array([tables.interval(values, 2000) for values in samples])
    plain = np.array([np.quantile(values[index].mean(1), [0.025, 0.975]) for values in samples])
    covered, before = (((low < 0) & (high > 0)).mean() for low, high in (ours.T, plain.T))
    assert covered == pytest.approx(0.944, abs=0.015) and before == pytest.approx(0.889, abs=0.02)


def test_one_prompt_has_no_interval():
    found = tables.summary(torch.tensor([[0.5, 0.7]]))
    assert (found["mean"], found["low"], found["high"]) == (pytest.approx(0.6), None, None)
    assert tables.cell(found) == "0.6"


def test_a_model_wins_every_second_time_against_itself():
    same = torch.rand(5, 2)
    assert tables.win_rate(same, same) == 0.5
    assert tables.win_rate(same, same + torch.nan) is None


def test_the_six_tasks_of_the_shapes_world(runs, look):
    found, place = look(runs.lora, "--reward", "verifier:passed")
    tasks = found["tasks"]["base"]
    known = {
        task: share for task, share in tasks.items() if share is not None and task != "overall"
    }
    assert set(tasks) == {*tables.TASKS, "overall"} and "vague" not in tasks
    assert tasks["overall"] == pytest.approx(np.mean(list(known.values())))
    lines = list(csv.DictReader((place / "results.csv").open()))
    assert {line["task"] for line in lines} == {"", *tasks} and {
        line["model"] for line in lines
    } == {"base", "lora"}


def test_samples_without_a_score_are_counted_and_left_out(runs, look, tmp_path):
    """Also where all samples of a part have none."""
    (tmp_path / "picky.txt").write_text("a red circle\ntwo shapes\na blue square\na cross")
    words = (
        "--prompts",
        tmp_path / "picky.txt",
        "--reward",
        "picky",
        "--micro-batch",
        "1",
        "--reward-batch",
        "1",
    )
    found, place = look(runs.lora, *words)
    row = found["rewards"]["lora"]["picky"]
    assert (row["prompts"], row["missing"]) == (2, 2) and np.isfinite(row["mean"])
    assert '"picky": [null]' in (place / "scores/lora.jsonl").read_text()


# --- Bad input ---


def test_a_reward_that_fails_in_the_middle_is_one_line(runs, look, monkeypatch, capsys):
    calls, honest = [], smooth._Colour.score

    def broken(self, media, prompts):
        calls.append(1)
        return honest(self, media, prompts) + (torch.inf if len(calls) > 1 else 0)

    monkeypatch.setattr(smooth._Colour, "score", broken)
    with pytest.raises(
        RunError, match="reward red is inf for the prompt"
    ) as raised:  # it holds the progress bar
        look(runs.lora, "--reward", "red")
    assert capsys.readouterr().err.endswith("\n"), f"no line for {raised.value}"


@pytest.mark.parametrize("what", ["shown", "scores", "results"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    what, look, runs, monkeypatch, tmp_path
):
    name = "write_bytes" if what == "shown" else "write_text"
    write = getattr(Path, name)

    def full(self, *words, **settings):
        if what in str(self):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *words, **settings)

    monkeypatch.setattr(Path, name, full)
    words = ("--model", "tiny-flux", "--prompts", runs.prompts, "--sampling-steps", "2")
    with pytest.raises(
        RunError, match="cannot write into .*No space left on device.*The same command continues"
    ):
        look(*words, shown=2)
    monkeypatch.setattr(Path, name, write)
    look(*words, shown=2)


@pytest.fixture(scope="module")
def wrong(runs, tmp_path_factory):
    """Folders that are no runs, or no whole ones."""
    place = tmp_path_factory.mktemp("wrong")
    for name in ("no_run", "empty", "broken", "cut", "other"):
        (place / name).mkdir()
    for name in ("empty", "broken", "cut", "other"):
        shutil.copy(runs.lora / "config.json", place / name)
    (place / "broken/checkpoints/step_000001").mkdir(parents=True)
    shutil.copytree(runs.lora / "checkpoints", place / "cut/checkpoints")
    (place / "cut/checkpoints/step_000002/transformer.pt").write_bytes(b"PK")
    config = json.loads((place / "other/config.json").read_text())
    (place / "other/config.json").write_text(json.dumps({**config, "model": "tiny-sd"}))
    (place / "other/export").mkdir()
    shutil.copytree(runs.lora, place / "code")
    (place / "code/config.json").write_text(json.dumps({**config, "reward": ["mine.py:Reward"]}))
    return place


WRONG = {
    "{wrong}/missing": "is not the folder of a run",
    "{wrong}/no_run": "no_run is not the folder of a run.* Give the --output of a training run",
    "{wrong}/empty": "it has neither a checkpoint nor an export. Train it first",
    "{wrong}/broken": "it has neither a checkpoint nor an export",
    "{wrong}/broken/checkpoints/step_000001": "not a checkpoint .* Name another one, or the run",
    "{wrong}/cut": "step_000002 does not load .*; name another checkpoint",
    "{lora}/checkpoints/step_000009": "there is no such folder. .* has step_000002",
    "{lora}/export_ema": "there is no such folder",
    "{lora} --averaged": "trained without --ema",
    "{lora} {wrong}/other": "was trained from tiny-sd, .* Compare runs of one base model",
    "{lora} --model tiny-sd": "--model tiny-sd: .* trained tiny-flux",
    "--samples 2 {lora}": "runs come before flags",
    "{wrong}/code": "--reward: the run has none, or one in a file of code",
    "{wrong}/broken/checkpoints": "is not the folder of a run",
    "{lora} --reward nonsense": "there is no 'nonsense'",
    "{lora} --prompts {wrong}/none.txt": "none.txt does not load",
    "{lora} --sampling-steps 1": "must be from 2",
    "--model tiny-flux --reward red --prompts=": "--prompts: the run has no --eval-prompts",
    "--model tiny-flux --averaged": "--averaged: needs a run",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_evaluated_is_one_line_that_says_what_to_do(
    words, runs, wrong, look, capsys
):
    with pytest.raises(
        (InputError, SystemExit)
    ) as raised:  # one of the runs' folders while the flags are read
        look(*words.format(lora=runs.lora, wrong=wrong).split())
    said = str(raised.value) if isinstance(raised.value, InputError) else capsys.readouterr().err
    assert re.search(WRONG[words], said) and len(said.splitlines()) == 1, said


def test_a_trainings_flag_is_the_parsers_to_refuse(runs, look, capsys):
    with pytest.raises(SystemExit):
        look(runs.lora, "--resume", "latest")
    assert "--resume" in capsys.readouterr().err


def test_a_folder_of_another_evaluation_is_left_alone(runs, look, tmp_path):
    _, place = look(runs.lora)
    before = {path: path.read_bytes() for path in place.rglob("*.json*")}
    with pytest.raises(
        InputError, match="has an evaluation with seed 0, now it is 1. Choose another folder"
    ):
        look(runs.lora, "--seed", "1")
    again = shutil.copytree(runs.lora, tmp_path / "lora")  # another run of this name
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps({**config, "run": "another"}))
    with pytest.raises(
        InputError, match="has scores of other weights called lora. Choose another folder"
    ):
        look(again)
    assert before == {path: path.read_bytes() for path in place.rglob("*.json*")}


def test_an_export_that_was_written_again_is_scored_anew(runs, look, tmp_path):
    run = shutil.copytree(runs.lora, tmp_path / "lora")
    look(run / "export", "--sampling-steps", "2")
    for path in (run / "export").rglob("*.safetensors"):
        os.utime(path)
    with pytest.raises(
        InputError, match="has scores of other weights called lora-export. Choose another folder"
    ):
        look(run / "export", "--sampling-steps", "2")


def test_without_a_run_the_base_is_looked_at_and_the_folder_follows_from_the_settings(
    runs, monkeypatch, tmp_path
):
    words = [
        "evaluate.py",
        "--model",
        "tiny-flux",
        "--prompts",
        str(runs.prompts),
        "--sampling-steps",
        "2",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    for _ in range(2):
        evaluate.main(cli.parse(evaluate.Args, evaluate.__doc__, evaluate.defaults))
    (folder,) = (tmp_path / "runs").iterdir()
    assert list(json.loads((folder / "results.json").read_text())["rewards"]) == ["base"]


def test_help_explains_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit):
        cli.parse(evaluate.Args, evaluate.__doc__, evaluate.defaults)
    said = capsys.readouterr().out
    for name in evaluate.Args.__dataclass_fields__:
        assert name == "runs" or f"--{name.replace('_', '-')}" in said
