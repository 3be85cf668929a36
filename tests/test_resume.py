"""--resume: in which folder, with which settings, from which checkpoint."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, metrics, weights

import bpgo
import grpo_base
import self_paced
import slas
from common import cli, errors, models, rewards
from common.args import defaults
from common.prompts import prompts_of_step, read_prompts
from common.trainer import checkpoint_files, export, run_folder

SMALL = (
    "--prompts-per-step=1 --group-size=4 --sampling-steps=3 --micro-batch=4 --minibatches=1 "
    "--tracker=none "
    "--eval-every=0 --sample-every=0 --learning-rate=1e-3 --save-every=1"
).split()
SCRIPTS = {script.__name__: script for script in (grpo_base, bpgo, slas, self_paced)}


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """A script's command line, run here in an empty folder; returns what it said. A mistake raises
    SystemExit."""
    monkeypatch.chdir(tmp_path)

    def run(words, script=grpo_base):
        monkeypatch.setattr(
            sys, "argv", [script.__file__, *(words.split() if isinstance(words, str) else words)]
        )
        capfd.readouterr()
        errors.run(script.main, cli.parse(script.Args, script.__doc__))
        return capfd.readouterr().out

    def refused(words, script=grpo_base):
        with pytest.raises(SystemExit) as ended:
            run(words, script)
        (line,) = [
            line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")
        ]
        assert ended.value.code == 2
        return line

    run.refused = refused
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{script: the folder of a run of three steps}, each made when it is first asked for."""
    folders = {}

    def folder(script=grpo_base):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp(script.__name__) / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    sys,
                    "argv",
                    [script.__file__, *SMALL, "--steps=3", f"--output={folders[script]}"],
                )
                script.main(cli.parse(script.Args, ""))
        return folders[script]

    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of such a run, as runs/NAME."""

    def copy(name="one", script=grpo_base):
        shutil.copytree(finished(script), tmp_path / "runs" / name)
        return tmp_path / "runs" / name

    return copy


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def moved(folder, before, after, other=None):
    """The largest change of a weight from one step's checkpoint to another's."""
    old, new = weights(folder, before), weights(other or folder, after)
    return max((new[name] - value).abs().max().item() for name, value in old.items())


def same_weights(left, right, step):
    old, new = weights(left, step), weights(right, step)
    return old.keys() == new.keys() and all(
        torch.equal(new[name], value) for name, value in old.items()
    )


# --- The folder ---


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_newest_run_continues(command, copied, script):
    """It comes to the numbers and weights of the run that nothing interrupted."""
    whole = copied(f"{script.__name__}-tiny-flux-1", script)
    run = copied(f"{script.__name__}-tiny-flux-2", script)
    shutil.rmtree(run / "checkpoints/step_000003")
    before = contents(whole)
    said = command("--resume", script)
    assert f"resuming runs/{run.name} at step 2" in said
    assert contents(whole) == before
    assert metrics(run) == metrics(whole) and same_weights(run, whole, 3)


def test_the_newest_run_is_one_of_that_model(command, copied):
    copied("grpo_base-tiny-flux-1")
    copied("grpo_base-tiny-flux-small-7")
    copied("grpo_base-tiny-flux-1_from_20")
    assert "resuming runs/grpo_base-tiny-flux-1 at step 3" in command("--resume")
    assert not (copied("x").with_name("grpo_base-tiny-flux-7")).exists()


def test_a_checkpoint_does_not_continue_in_another_run(command, copied):
    copied("one")
    before = contents(copied("two"))
    line = command.refused("--output runs/two --resume runs/one/checkpoints/step_000002")
    assert "--output runs/two holds a run" in line and "--resume latest" in line
    line = command.refused("--output runs/one --resume runs/one/checkpoints/step_000002")
    assert "--output runs/one holds a run" in line
    assert contents(copied("three")) == before  # the runs are copies of one


def test_a_checkpoint_needs_a_new_folder(command, copied, tmp_path):
    run = copied()
    (run / "checkpoints/step_000002").rename(tmp_path / "kept")
    for checkpoint in ("kept", "runs/one/checkpoints/step_000001"):
        line = command.refused([*SMALL, "--resume", checkpoint])
        assert f"--resume {checkpoint}: " in line and "--output" in line
    said = command([*SMALL, "--steps", "3", "--resume", "kept", "--output", "new"])
    assert "resuming new at step 2" in said
    assert same_weights(run, tmp_path / "new", 3)


# --- The settings ---


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_new_learning_rate_and_weight_decay_are_those_of_the_next_step(command, copied, script):
    run = copied("one", script)
    said = command(
        "--output runs/one --resume --steps 4 --learning-rate 1e-12 --weight-decay 0.9", script
    )
    assert (
        "from now on with learning_rate 1e-12 instead of 0.001, weight_decay 0.9 instead of 0.0001"
        in said
    )
    assert 0 < moved(run, 3, 4) < 1e-9
    (group,) = weights(run, 4, "optimizer")["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (1e-12, 0.9)


def test_a_higher_learning_rate_is_that_of_the_next_step(command, copied):
    run = copied()
    command("--output runs/one --resume --steps 4 --learning-rate 0.5 --weight-decay 0")
    assert moved(run, 3, 4) > 0.1


def test_the_settings_of_a_run_are_the_defaults_of_its_command_line(command, copied):
    run = copied()
    before = json.loads((run / "config.json").read_text())
    shutil.rmtree(run / "checkpoints/step_000003")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '[3]\n{"step": "two"}\n{"step": null, "x": 1}\n{}\n{"step": 2'
        )  # of a killed process
    command("--output runs/one --resume latest --save-every 2")
    assert [row["step"] for row in metrics(run)] == [0, 1, 2]
    after = json.loads((run / "config.json").read_text())
    assert {name for name in before if before[name] != after[name]} == {
        "resume",
        "save_every",
        "output",
    }
    assert after["group_size"] == 4 and after["save_every"] == 2 and after["steps"] == 3


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_all_settings_of_all_models_are_taken_over_as_they_are(tmp_path, monkeypatch, script):
    monkeypatch.setattr(sys, "argv", [script.__file__])
    for model in models.MODELS:
        args = defaults(script.Args, model, seed=3, watch=("jpeg",), output=str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps(run_folder.settings(args)))
        other = defaults(script.Args, "tiny-sd" if model != "tiny-sd" else "tiny-flux")
        assert run_folder.inherit(other, "latest", str(tmp_path)) == args


FIXED = {
    "--seed 1": "seed 0, now it is 1",
    "--group-size 8": "group_size 4, now it is 8",
    "--lora-rank 2": "lora_rank 0, now it is 2",
    "--kl-coef 1": "kl_coef 0.0, now it is 1.0",
    "--model tiny-sd": "model 'tiny-flux', now it is 'tiny-sd'",
    "--reward jpeg": "reward ['verifier'], now it is ['jpeg']",
}


@pytest.mark.parametrize("flags", FIXED)
def test_what_may_not_change_is_one_line(command, copied, flags):
    before = contents(copied())
    line = command.refused(f"--output runs/one --resume {flags}")
    assert line == f"error: --resume: runs/one was started with {FIXED[flags]}."
    assert contents(copied("two")) == before


def test_every_setting_that_may_change_is_one():
    names = set(vars(cli.Args()))
    free = run_folder.FREE + run_folder.FREE_IN_A_NEW_RUN
    assert set(free + run_folder.NOT_INHERITED) <= names
    assert len(set(free)) == len(free)


def test_other_micro_batches_go_on_with_the_same_numbers_up_to_rounding(command, copied):
    run, whole = copied(), copied("whole")
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoints/step_00000{step}")
    command("--output runs/one --resume --micro-batch 2 --gradient-checkpointing --decode-batch 1")
    for row, other in zip(metrics(run), metrics(whole), strict=True):
        assert row["reward_mean"] == pytest.approx(other["reward_mean"], abs=1e-5)
    # AdamW's first steps turn rounding of gradients near 0 into steps of any size up to the
    # learning rate
    assert moved(whole, 3, 3, other=run) < 2e-4


def test_code_is_trusted_by_a_flag_and_by_no_file(command, copied, monkeypatch):
    config = copied() / "config.json"
    config.write_text(
        config.read_text().replace('"trust_remote_code": false', '"trust_remote_code": true')
    )
    monkeypatch.setattr(sys, "argv", ["grpo_base.py", "--output", "runs/one", "--resume"])
    assert not cli.parse(grpo_base.Args, "").trust_remote_code


ODD = {
    "no dictionary": ("[1]", "runs/one: config.json does not load"),
    "empty": ("{}", "runs/one: config.json does not load"),
    "nested deep": ("[" * 100_000, "runs/one: config.json does not load"),
    "a word for a number": ({"group_size": "four"}, "group_size 'four', now it is 12"),
    "a number for a list": ({"reward": 3}, "reward 3, now it is ['verifier']"),
    "another script's": ({"script": "bpgo", "alpha": 0.5}, "script 'bpgo', now it is 'grpo_base'"),
    "a setting more": ({"temperature": 1}, "another version, as the setting temperature shows"),
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_config_is_one_line(command, copied, what):
    text, mention = ODD[what]
    config = copied() / "config.json"
    if isinstance(text, dict):
        kept = {**json.loads(config.read_text()), **text}
        text = json.dumps({name: value for name, value in kept.items() if value is not None})
    config.write_text(text)
    assert mention in command.refused("--output runs/one --resume")


# --- An earlier checkpoint ---


def test_an_earlier_checkpoint_becomes_a_new_run(command, copied):
    """With what may change there; the old run stays as it is; the same command once more continues
    the new one."""
    run = copied()
    before = contents(run)
    line = (
        "--resume runs/one/checkpoints/step_000001 --output runs/new --learning-rate 1e-4 --seed 5"
    )
    assert "resuming runs/new at step 1" in command(line)
    new = run.with_name("new")
    assert contents(run) == before
    assert [row["step"] for row in metrics(new)] == [0, 1, 2]
    assert metrics(new)[0] == metrics(run)[0] and metrics(new)[1] != metrics(run)[1]
    assert same_weights(run, new, 1) and 0 < moved(new, 1, 2) < 2e-4
    assert (new / "checkpoints/step_000001/optimizer.pt").samefile(
        run / "checkpoints/step_000001/optimizer.pt"
    )

    shutil.rmtree(new / "checkpoints/step_000003")
    rows, kept = metrics(new), (new / "config.json").read_text()
    assert "resuming runs/new at step 2" in command(line)
    assert metrics(new) == rows and (new / "config.json").read_text() == kept
    assert "resuming runs/new at step 3" in command("--output runs/new --resume")
    assert "resuming runs/new at step 3" in command(line)
    assert "group_size 4, now it is 8" in command.refused(
        "--resume runs/one/checkpoints/step_000001 --output runs/newer --group-size 8"
    )
    assert not run.with_name("newer").exists()


@pytest.mark.parametrize("place", ["write_rows", "write_text"])
def test_a_killed_beginning_is_begun_again(command, copied, monkeypatch, place):
    """The checkpoint is copied first, and config.json is written last."""
    run = copied()
    line = "--resume runs/one/checkpoints/step_000002 --output runs/new"

    def die(*_):
        raise SystemExit(9)

    monkeypatch.setattr(run_folder, place, die)
    with pytest.raises(SystemExit):
        command(line)
    monkeypatch.undo()
    monkeypatch.chdir(run.parents[1])
    command(line)
    new = run.with_name("new")
    assert metrics(new) == metrics(run) and same_weights(run, new, 3)


def test_an_earlier_step_is_exported_by_a_command(command, copied):
    run = copied()
    before = contents(run)
    said = command("--resume runs/one/checkpoints/step_000002 --steps 2 --output runs/step_2")
    assert 'FluxPipeline.from_pretrained("runs/step_2/export")' in said
    assert contents(run) == before
    exported = models.load("runs/step_2/export", torch.float32, height=32, width=32)
    for name, value in weights(run, 2).items():
        assert torch.equal(exported.pipe.transformer.state_dict()[name], value)
    line = command.refused("--output runs/one --resume latest --steps 2")
    assert "--steps 2: runs/one/checkpoints/step_000003 is already at step 3" in line


# --- Which checkpoints there are ---


def test_the_latest_is_that_of_the_highest_number(command, copied):
    """Beyond 999999 they do not sort as text."""
    run = copied()
    for name, step in (("step_000003", 1_000_002), ("step_000002", 999_999)):
        folder = (run / "checkpoints" / name).rename(run / f"checkpoints/step_{step}")
        about = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps({**about, "step": step}))
    assert [path.name for path in checkpoint_files.newest_first(run)] == [
        "step_1000002",
        "step_999999",
        "step_000001",
    ]
    assert "resuming runs/one at step 1000002" in command(
        "--output runs/one --resume --steps 1000002"
    )


def test_only_checkpoints_are_removed(command, copied):
    run = copied()
    for name in ("step_000001_best", "step_old"):  # a user's copies
        shutil.copytree(run / "checkpoints/step_000001", run / "checkpoints" / name)
    command("--output runs/one --resume --steps 5 --keep-checkpoints 1")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_000001_best", "step_000005", "step_old"]


# --- Checkpoints that are none ---


def rewrite(name, change):
    def spoil(folder):
        state = torch.load(folder / f"{name}.pt", weights_only=True)
        torch.save(change(state), folder / f"{name}.pt")

    return spoil


def listed(**changes):
    def spoil(folder):
        about = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps({**about, **changes}))

    return spoil


def not_a_number(state):
    next(iter(state.values()))[0] = torch.nan
    return state


def infinite(state):
    state["state"][0]["exp_avg_sq"][0] = torch.inf
    return state


SPOILT = {
    "weights that are not finite": rewrite("transformer", not_a_number),
    "moments that are infinite": rewrite("optimizer", infinite),
    "None for weights": rewrite("transformer", lambda state: None),
    "a list for a state": rewrite("optimizer", lambda state: [1]),
    "a step that is text": listed(step="3"),
    "a step that is true": listed(step=True),
    "a step below 0": listed(step=-3),
    "another step": listed(step=2),
    "parts that are a list": listed(parts=["transformer"]),
    "parts that are text": listed(parts={"transformer": "0", "optimizer": 0}),
    "no parts": listed(parts={}),
    "a list that is none": lambda folder: (folder / "checkpoint.json").write_text("3"),
    "a file cut short": lambda folder: os.truncate(folder / "transformer.pt", 5000),
    "an empty file": lambda folder: os.truncate(folder / "optimizer.pt", 0),
    "nonsense": lambda folder: (folder / "optimizer.pt").write_bytes(b"nonsense" * 9),
    "a file less": lambda folder: (folder / "optimizer.pt").unlink(),
    "without a list": lambda folder: (folder / "checkpoint.json").unlink(),
    "a broken list": lambda folder: (folder / "checkpoint.json").write_text('{"step": 4, '),
    "a list nested deep": lambda folder: (folder / "checkpoint.json").write_text("[" * 100_000),
}


def test_the_latest_passes_over_what_is_no_checkpoint(command, copied):
    """All of them lie above a good one, in one run."""
    run, whole = copied(), copied("whole")
    for number, spoil in enumerate(SPOILT.values(), 3):
        folder = run / f"checkpoints/step_{number:06d}"
        shutil.copytree(whole / "checkpoints/step_000003", folder, dirs_exist_ok=True)
        listed(step=number)(folder)
        spoil(folder)
    said = command("--output runs/one --resume")
    for number in range(3, 3 + len(SPOILT)):
        assert f"passing over runs/one/checkpoints/step_{number:06d}: " in said
    assert "resuming runs/one at step 2" in said
    assert metrics(run) == metrics(whole) and same_weights(run, whole, 3)


def test_a_run_without_a_good_checkpoint_is_one_line(command, copied):
    run = copied()
    for name in ("step_000001", "step_000002", "step_000003"):
        SPOILT["weights that are not finite"](run / "checkpoints" / name)
    before = contents(run)
    line = command.refused("--output runs/one --resume")
    assert "--resume latest: no checkpoint can be loaded" in line
    spoilt = "runs/one/checkpoints/step_000002"
    line = command.refused(f"--output runs/new --resume {spoilt}")
    assert f"--resume {spoilt}: no checkpoint can be loaded" in line
    assert contents(run) == before and not run.with_name("new").exists()


MISFITS = {
    "moments of other weights": (
        "optimizer",
        lambda state: {**state, "state": {0: {"step": torch.ones(())}}},
    ),
    "no groups": ("optimizer", lambda state: {**state, "param_groups": None}),
    "weights of another shape": (
        "transformer",
        lambda state: {name: torch.ones(3) for name in state},
    ),
    "texts for weights": ("transformer", lambda state: dict.fromkeys(state, "one")),
    "numbers for weights": ("transformer", lambda state: dict(enumerate(state.values()))),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_state_that_does_not_fit_is_one_line(command, copied, what):
    name, change = MISFITS[what]
    run = copied()
    rewrite(name, change)(run / "checkpoints/step_000003")
    line = command.refused("--output runs/one --resume --steps 4")
    assert f"step_000003/{name}.pt does not load" in line and len(line) < 800


@pytest.mark.parametrize("change", [{"mean": None}, {"steps": "3"}], ids=str)
def test_a_methods_state_that_does_not_fit_is_one_line(command, copied, change):
    run = copied("one", bpgo)
    rewrite("prior", lambda state: {**state, **change})(run / "checkpoints/step_000003")
    line = command.refused("--output runs/one --resume --steps 4", bpgo)
    assert "step_000003/prior.pt does not load" in line


# --- Rewards that a run cannot be trained on ---


class Poisoned:
    """Finite rewards from which no advantages follow, of one caption."""

    scale, range, caption = 1.0, (None, None), ""

    def score(self, media, prompts):
        values = media.mean((1, 2, 3))
        poison = torch.tensor([prompt == Poisoned.caption for prompt in prompts])
        return torch.where(poison, values.sub(values.median()).sign() * 3.4e38, values)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_reward_that_poisons_a_step_is_named_with_its_prompt(
    command, monkeypatch, capfd, tmp_path, script
):
    monkeypatch.setitem(rewards.REWARDS, "poisoned", "poisoned:Poisoned")
    monkeypatch.setitem(sys.modules, "poisoned", type("poisoned", (), {"Poisoned": Poisoned}))
    Poisoned.range = (0.0, 1.0) if script is self_paced else (None, None)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green triangle\n")
    prompts = read_prompts(tmp_path / "prompts.txt")
    Poisoned.caption = prompts_of_step(prompts, 1, 1, 0)[0]
    words = [
        *SMALL,
        "--prompts=prompts.txt",
        "--eval-prompts=",
        "--steps=3",
        "--save-every=0",
        "--output=run",
    ]
    words += ["--reward", "poisoned"]
    words += (
        ["verifier", "--thresholds", "0.5", "0.5", "--only-stage", "1"]
        if script is self_paced
        else []
    )
    with pytest.raises(SystemExit) as ended:
        command(words, script)
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if "error: " in line]
    assert ended.value.code == 1
    assert "error: step 1: the gradient is not finite" in line
    assert f"{Poisoned.caption!r} (" in line and "poisoned -3.4e+38 to 3.4e+38" in line
    assert "1 steps are saved; continue with --output run --resume latest" in said.out
    if script is not grpo_base:
        return
    Poisoned.caption = "mended"
    command("--output run --resume", script)
    assert len(metrics(tmp_path / "run")) == 3


# --- What else a run leaves ---


@pytest.mark.parametrize("flags", [[], ["--lora-rank=2"]], ids=["full", "lora"])
def test_exported_files_can_be_read_by_whom_the_run_can(command, flags, tmp_path):
    before = os.umask(0o027)
    try:
        command([*SMALL, "--steps=1", "--output=run", *flags])
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run/export").rglob("*") if path.is_file()]
    assert files and {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    assert not list((tmp_path / "run").glob(".*"))


def test_an_export_that_does_not_fit_is_one_line_and_can_be_done_again(
    command, copied, monkeypatch, capfd
):
    run = copied()
    before = contents(run / "export")
    real = export._save_pipeline

    def full(*words):
        real(*words)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_save_pipeline", full)
    with pytest.raises(SystemExit) as ended:
        command("--output runs/one --resume")
    monkeypatch.undo()
    assert ended.value.code == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert "cannot write runs/one/export ([Errno 28] No space left on device)" in line
    assert contents(run / "export") == before and not (run / ".export.tmp").exists()


def test_the_last_line_names_what_there_is(command, tmp_path):
    said = command([*SMALL, "--steps=1", "--output=run"])
    assert (
        "look at run/report.html; the trained model: " in said
        and not (tmp_path / "run/samples").exists()
    )
    said = command("--output=run --resume --sample-every=1")
    assert "look at run/report.html and run/samples; the trained model: " in said


@pytest.mark.parametrize(
    "words, last", [([], ["--resume", "latest"]), (["--resume", "x/step_1"], [])]
)
def test_the_cluster_job_keeps_the_words_as_they_are(tmp_path, words, last):
    commands = {
        "srun": 'exec "$@"', "scontrol": "echo first; echo second",
        "accelerate": """printf '%s\n' "$@" > words""",
    }  # fmt: skip
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = [
        "bpgo.py",
        "--output",
        "a folder/x",
        "--lora-targets",
        r"(^|\.)to_[qkv]*$ $HOME `ls`",
        "*",
        *words,
    ]
    job = dict(
        SLURM_JOB_NODELIST="x",
        SLURM_NNODES="2",
        SLURM_NODEID="1",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    subprocess.run(["bash", ROOT / "configs/slurm.sh", *given], cwd=tmp_path, env=job, check=True)
    came = (tmp_path / "words").read_text().splitlines()
    assert came[came.index("bpgo.py") :] == [*given, *last]
    assert (
        came[came.index("--main_process_ip") + 1] == "first"
        and came[came.index("--num_processes") + 1] == "16"
    )
