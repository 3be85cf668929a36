"""The folder of a run: whose it is, who may write into it, and what the run is made of."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, launched, metrics
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import grpo_base
from common import errors, models, sde
from common.args import defaults
from common.errors import InputError, RunError
from common.trainer import Policy, inputs, lock, log, run_folder
from common.trainer.lock import Lock

SMALL = (
    "--prompts-per-step 1 --group-size 2 --sampling-steps 2 --minibatches 1 --tracker none "
    "--eval-every 0 --sample-every 0 --steps 1"
).split()


@pytest.fixture(autouse=True)
def free():
    """The locks of this process end with its test."""
    yield
    if errors.release:
        errors.release()


def start(folder, *flags):
    """A script in a process of its own, in this working directory."""
    command = [sys.executable, str(ROOT / "grpo_base.py"), *SMALL, *flags]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(process):
    out, error = process.communicate(timeout=300)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    return process.returncode, out, lines


# --- Two at once ---


def test_two_seeds_that_start_together_have_their_own_folders(tmp_path):
    """Each with its own settings, rows and export."""
    (tmp_path / "runs/grpo_base-tiny-flux-4").mkdir(parents=True)
    both = [start(tmp_path, "--seed", str(seed)) for seed in (3, 4)]
    for process in both:
        code, out, _ = ended(process)
        assert code == 0, out
    folders = [tmp_path / f"runs/grpo_base-tiny-flux-{number}" for number in (5, 6)]
    seeds = {json.loads((folder / "config.json").read_text())["seed"] for folder in folders}
    assert seeds == {3, 4}
    for folder in folders:
        assert len(metrics(folder)) == 1 and (folder / "export").exists()
        assert not (folder / lock.NAME).exists()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir())[1:] == [
        folder.name for folder in folders
    ]


@pytest.mark.parametrize("second", [[], ["--resume", "latest"]], ids=["the same", "resumed"])
def test_a_folder_that_is_in_use_is_refused(tmp_path, second):
    """From before the model is loaded on. After a kill it is free again."""
    first = start(tmp_path, "--output", "out", "--steps", "1000")
    while not (tmp_path / "out" / lock.NAME).exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    code, _, (line,) = ended(start(tmp_path, "--output", "out", *second))
    assert code == 2
    owner = json.loads((tmp_path / "out" / lock.NAME).read_text())
    assert line == (
        f"error: --output out: is in use by process {first.pid} on {owner['host']} since "
        f"{owner['since']}. Wait for it, or choose another folder."
    )
    first.send_signal(signal.SIGKILL)  # a zombie until it is waited for
    time.sleep(0.2)
    code, out, lines = ended(start(tmp_path, "--output", "out", "--resume", "latest"))
    assert code == 0 and not lines, (out, lines)
    assert len(metrics(tmp_path / "out")) == 1 and not (tmp_path / "out" / lock.NAME).exists()
    first.communicate()


@pytest.mark.long
def test_a_launch_takes_one_lock_and_all_its_processes_refuse(tmp_path):
    words = [str(ROOT / "grpo_base.py"), *SMALL, "--steps", "1000"]
    first = launched(2, *words, "--output", str(tmp_path / "out"))
    while not (tmp_path / "out" / lock.NAME).exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = launched(2, *words, "--resume", "latest", "--output", str(tmp_path / "out"))
    _, said = second.communicate(timeout=200)
    assert second.returncode != 0 and "is in use by process" in said
    assert "[rank0]: Traceback" not in said and "[rank1]: Traceback" not in said
    while not (tmp_path / "out/metrics.jsonl").exists() or not metrics(tmp_path / "out"):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.terminate()  # it saves, and frees the folder
    first.communicate(timeout=200)
    assert not (tmp_path / "out" / lock.NAME).exists()


RACE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from common import errors
from common.errors import InputError
from common.trainer.lock import Lock
time.sleep(max(0, float(sys.argv[3]) - time.time()))
try:
    Lock(Path(sys.argv[2]), "out")
    print("taken", flush=True)
    time.sleep(float(sys.argv[4]))
    errors.release()
except InputError as error:
    print("refused" if "is in use by process" in str(error) else error, flush=True)
"""


def test_of_many_that_find_the_lock_of_a_dead_process_one_takes_it(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner = {**lock._this_process(), "pid": gone.pid}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).write_text(json.dumps(owner))
    moment = time.time() + 15  # all have imported torch by then, also on a slow machine
    words = [sys.executable, "-c", RACE, str(ROOT), str(tmp_path / "run"), str(moment), "10"]
    racers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = sorted(racer.communicate(timeout=200)[0].strip() for racer in racers)
    assert said == ["refused"] * 5 + ["taken"]
    assert os.listdir(tmp_path) == []  # it was empty


# --- Whose lock it is ---


def owned(folder, **changes):
    """Write the lock of another process that lives, with some values changed."""
    parent = psutil.Process(os.getppid())
    owner = {**lock._this_process(), "pid": parent.pid, "started": parent.create_time(), **changes}
    folder.mkdir(exist_ok=True)
    (folder / lock.NAME).write_text(json.dumps(owner))
    return owner


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "HALF_WRITTEN", 0.2)


def test_a_living_process_keeps_its_folder_and_a_number_used_again_does_not(tmp_path):
    owned(tmp_path / "run")
    with pytest.raises(InputError, match=f"in use by process {os.getppid()} on "):
        Lock(tmp_path / "run", "run")
    owned(tmp_path / "run", started=1.0e9)
    Lock(tmp_path / "run", "run").check()


NO_LOCKS = """
import errno, fcntl

def refuses(*words):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = fcntl.lockf = fcntl.fcntl = refuses
"""


def test_a_file_system_without_flock_keeps_a_folder_as_well(tmp_path):
    """As NFS without its lock daemon, and FUSE."""
    words = [sys.executable, "-c", NO_LOCKS + RACE, str(ROOT), str(tmp_path / "run"), "0"]
    first = subprocess.Popen([*words, "60"], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "taken\n"
    assert subprocess.check_output([*words, "0"], text=True) == "refused\n"
    first.kill()
    first.communicate()
    assert subprocess.check_output([*words, "0"], text=True) == "taken\n"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x"}', '{"pid": 1e9}', "\0" * 200])
def test_a_lock_that_a_power_failure_cut_is_taken_over(tmp_path, hasty, content):
    (tmp_path / lock.NAME).write_text(content)
    Lock(tmp_path, "run").check()


def test_another_machine_keeps_its_folder_while_it_gives_signs_of_life(
    tmp_path, hasty, monkeypatch, capsys
):
    owned(tmp_path, place="node7 boot pid:[1]", host="node7", pid=12)
    toucher = (
        "import os, sys, time\nfor _ in range(200):\n    time.sleep(0.1)\n    os.utime(sys.argv[1])"
    )
    words = [sys.executable, "-c", toucher, str(tmp_path / lock.NAME)]
    with subprocess.Popen(words) as process:
        monkeypatch.setattr(lock, "SILENCE", 20.0)
        with pytest.raises(InputError, match="in use by process 12 on node7 since"):
            Lock(tmp_path, "run")
        process.kill()
    assert "waiting up to 20 s for a sign of life from node7" in capsys.readouterr().out
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    Lock(tmp_path, "run").check()


def test_a_run_gives_signs_of_life_and_stops_when_its_folder_was_taken_over(
    tmp_path, train, monkeypatch
):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    held = Lock(tmp_path / "run", "run")
    os.utime(held.path, (1, 1))
    end = time.time() + 20
    while held.path.stat().st_mtime == 1 and time.time() < end:
        time.sleep(0.05)
    assert held.path.stat().st_mtime > 1
    honest = log.Log.row

    def row(self, step, metrics):
        owned(tmp_path / "run")
        honest(self, step, metrics)

    monkeypatch.setattr(log.Log, "row", row)
    with pytest.raises(RunError, match="another process has taken this folder over"):
        train(steps=2, save_every=1)
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))
    errors.release()
    assert (tmp_path / "run" / lock.NAME).exists(), "it is the other's"


def test_a_folder_that_nothing_was_written_into_is_removed_with_those_above(tmp_path):
    Lock(tmp_path / "a/b/c", "a/b/c").release()
    assert not (tmp_path / "a").exists() and tmp_path.exists()
    Lock(tmp_path / "a/b", "a/b")
    (tmp_path / "a/b/file").touch()
    Lock(tmp_path / "d", "d").release()  # it releases the one before
    assert os.listdir(tmp_path / "a/b") == ["file"]


# --- A run that failed before its first step ---


EARLY = {  # what fails after config.json is written: (its owner, its name, exit code)
    "the tracker": (log, "start_tracker", 2),
    "the first rollout": (sde, "random_window", 1),
    "the first update": (Policy, "backward", 1),
}


@pytest.mark.parametrize("what", EARLY)
def test_the_same_command_begins_anew_after_a_failure_before_the_first_step(
    tmp_path, train, monkeypatch, capfd, what
):
    owner, name, code = EARLY[what]

    def fails(*words, **settings):
        raise (InputError if code == 2 else RuntimeError)(f"{what}: no such thing")

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda _: train(steps=1), None)
    assert ended.value.code == code and f"{what}: no such thing" in capfd.readouterr().err
    before = json.loads((tmp_path / "run/config.json").read_text())["run"]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["grpo_base.py"])
    folder, rows = train(steps=1, seed=7)  # also with another setting: nothing is lost
    config = json.loads((folder / "config.json").read_text())
    assert len(rows) == 1 and config["seed"] == 7 and config["run"] != before
    for lost in ("checkpoints", "export"):  # its row alone is a run
        shutil.rmtree(folder / lost)
    with pytest.raises(InputError, match="already holds a run"):
        train(steps=1, seed=7)


def test_latest_is_a_run_and_no_folder_of_a_failed_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo_base.py"])
    folder = tmp_path / "runs/grpo_base-tiny-flux-3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "runs/grpo_base-tiny-flux-4").mkdir()
    monkeypatch.chdir(tmp_path)
    args = grpo_base.Args(model="tiny-flux", resume="latest")
    assert run_folder.choose(args) == Path("runs/grpo_base-tiny-flux-3")


# --- The working directory ---


def test_a_run_stays_in_its_folder_when_the_working_directory_changes(
    tmp_path, train, monkeypatch, capfd
):
    """A relative --output is that of the start, and messages have it as it was given."""
    monkeypatch.chdir(tmp_path)
    honest, elsewhere = log.Log.row, tmp_path / "elsewhere"
    elsewhere.mkdir()

    def row(self, step, metrics):
        os.chdir(elsewhere)
        honest(self, step, metrics)

    monkeypatch.setattr(log.Log, "row", row)
    train(output="x", steps=1)  # makes tmp_path/x, absolute
    os.chdir(tmp_path)
    small = dict(prompts_per_step=1, group_size=2, sampling_steps=2, minibatches=1, steps=2)
    small |= dict(tracker="none", eval_every=0, sample_every=0, save_every=1, reward=("verifier",))
    small |= dict(prompts=str(ROOT / "assets/prompts/shapes.txt"))
    capfd.readouterr()
    grpo_base.main(grpo_base.Args(output="runs/mine", **small))
    said = capfd.readouterr().out
    assert "writing into runs/mine\n" in said and "look at runs/mine/report.html" in said
    assert 'from_pretrained("runs/mine/export")' in said
    assert os.listdir(elsewhere) == []
    names = {path.name for path in (tmp_path / "runs/mine").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "export", "report.html"} <= names
    assert json.loads((tmp_path / "runs/mine/config.json").read_text())["output"] == "runs/mine"
    os.chdir(tmp_path)
    checkpoint = "runs/mine/checkpoints/step_000001"
    grpo_base.main(grpo_base.Args(output="runs/new", **{**small, "resume": checkpoint}))
    assert len(metrics(tmp_path / "runs/new")) == 2 and os.listdir(elsewhere) == []


# --- What a run is made of ---

OWN = """
class Bright:
    scale, range, video = 0.1, (0.0, 1.0), False

    def score(self, media, prompts):
        return media.mean((1, 2, 3))
"""
ROWS = ["a red circle", "a blue square", "a green triangle", "a yellow cross"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished step of a LoRA with a model, prompts, a reward and a LoRA in files of one folder,
    and its settings."""
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(models.ASSETS / "tiny-flux", place / "model")
    (place / "prompts.txt").write_text("\n".join(ROWS))
    (place / "eval.txt").write_text("a red square\na blue circle\n")
    (place / "mine.py").write_text(OWN)
    settings = dict(steps=1, lora_rank=2, save_every=1, resume="", output="run")
    settings |= dict(prompts_per_step=1, group_size=2, sampling_steps=2, minibatches=1, ema=0.0)
    settings |= dict(tracker="none", eval_every=0, sample_every=0, learning_rate=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["grpo_base.py"])
        patch.chdir(place)
        first = defaults(
            grpo_base.Args, **{**settings, "output": "first", **named(Path()), "init_lora": ""}
        )
        grpo_base.main(first)
        shutil.copytree(place / "first/export", place / "lora")
        grpo_base.main(defaults(grpo_base.Args, **settings, **named(Path())))
    return place, settings


def named(place):
    return dict(
        model=str(place / "model"),
        prompts=str(place / "prompts.txt"),
        eval_prompts=str(place / "eval.txt"),
        reward=(f"{place / 'mine.py'}:Bright", "clip=0.5"),
        reward_path=(f"clip={models.ASSETS / 'tiny-clip'}",),
        init_lora=str(place / "lora"),
        lora_alpha=4.0,
    )


@pytest.fixture
def again(made, tmp_path, monkeypatch):
    """A copy of it, and again(**changes): the run continued there, by relative paths as before."""
    place, settings = made
    shutil.copytree(place, tmp_path / "there")
    monkeypatch.setattr(sys, "argv", ["grpo_base.py"])
    there = tmp_path / "there"
    monkeypatch.chdir(there)

    def run(**changes):
        values = {**settings, **named(Path()), "steps": 2, "resume": "latest"}
        grpo_base.main(defaults(grpo_base.Args, **{**values, **changes}))
        return metrics(there / "run")

    return tmp_path / "there", run


def rewritten(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def finetuned(place):
    """Every weight moves a little, as in another fine-tuning of the same architecture."""
    for path in (place / "model/transformer").glob("*.safetensors"):
        rewritten(path, lambda weights: [weight.mul_(1.001) for weight in weights.values()])


def relearned(place):
    path = place / "lora/pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    weights = {name: weight * 1.01 for name, weight in load_file(path).items()}
    save_file(weights, path, metadata=about)


def setting(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


CHANGED = {
    "a prompt more": (
        lambda place: (place / "prompts.txt").write_text("\n".join([*ROWS, "a star"])),
        "--prompts (contents)",
    ),
    "another order": (
        lambda place: (place / "prompts.txt").write_text("\n".join(ROWS[::-1])),
        "--prompts (order)",
    ),
    "another held-out prompt": (
        lambda place: (place / "eval.txt").write_text("a red square\na blue cross\n"),
        "--eval-prompts (contents)",
    ),
    "another fine-tuning": (
        finetuned,
        "--model (transformer/diffusion_pytorch_model.safetensors)",
    ),
    "another scheduler": (
        lambda place: setting(place / "model/scheduler/scheduler_config.json", shift=2.5),
        "--model (scheduler/scheduler_config.json)",
    ),
    "another formula": (
        lambda place: (place / "mine.py").write_text(OWN.replace("mean(", "amax(")),
        "--reward (mine.py:Bright)",
    ),
    "another LoRA": (relearned, "--init-lora (LoRA)"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_run_with_other_contents_is_refused_unless_told(again, what, capfd):
    place, run = again
    change, named_part = CHANGED[what]
    change(place)
    line = (
        f"--resume: run was started with other contents of {named_part}. Put them back, or "
        "add --resume-anyway to continue with what is there now."
    )
    with pytest.raises(InputError) as refused:
        run()
    assert str(refused.value) == line
    if what not in ("another order", "another fine-tuning"):
        return
    assert len(run(resume_anyway=True)) == 2
    assert f"other contents of {named_part}\n" in capfd.readouterr().out
    assert len(run(steps=3)) == 3, "the new contents are the run's now"


def test_a_run_that_moved_continues_and_one_of_an_older_version_too(again, capfd):
    place, run = again
    assert len(run(**named(place))) == 2
    assert f"model '{place}/model' instead of 'model'" in capfd.readouterr().out
    with pytest.raises(InputError, match="was started with prompts .* now it is 'eval.txt'"):
        run(**{**named(place), "prompts": "eval.txt"})
    (place / "run/inputs.json").unlink()
    with pytest.raises(InputError, match="was started with .* now it is"):  # the path alone counts
        run()
    (place / "prompts.txt").write_text("\n".join(ROWS[::-1]))
    assert len(run(**named(place), steps=3)) == 3 and (place / "run/inputs.json").exists()


def test_another_working_directory_has_other_files_of_the_same_names(again, tmp_path, monkeypatch):
    """The settings are equal, letter for letter; the prompts are not."""
    place, run = again
    shutil.copytree(place, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("run", "first"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(run(output=str(place / "run"))) == 2
    for change, part in (("a grey cube\na grey cone\n", "contents"), (None, "order")):
        Path("prompts.txt").write_text(change or "\n".join([*ROWS[1:], ROWS[0]]))
        with pytest.raises(InputError, match=rf"other contents of --prompts \({part}\)"):
            run(output=str(place / "run"), steps=3)
    assert len(metrics(place / "run")) == 2


def test_another_reward_of_a_moved_run_is_another_reward(again):
    place, run = again
    with pytest.raises(InputError, match="was started with reward .* now it is"):
        run(reward=(f"{place / 'mine.py'}:Bright", "clip=0.7"))


def test_a_new_run_may_have_other_prompts_and_no_other_model(again):
    place, run = again
    (place / "prompts.txt").write_text("a star")
    checkpoint = "run/checkpoints/step_000001"
    run(resume=checkpoint, output="new")
    assert len(metrics(place / "new")) == 2
    finetuned(place)
    with pytest.raises(InputError, match="run was started with other contents of --model"):
        run(resume=checkpoint, output="newer")
    assert not (place / "newer").exists()


@pytest.mark.parametrize("content", ["{", "[1]", '{"model": 3}', "[" * 100_000])
def test_odd_inputs_are_one_line(again, content):
    place, run = again
    (place / "run/inputs.json").write_text(content)
    with pytest.raises(InputError, match="inputs.json does not load"):
        run()


def test_a_digest_covers_large_files_at_places(tmp_path):
    """The size, both ends, and any change of a weight in each of 64 parts."""
    path = tmp_path / "weights"
    data = bytearray(os.urandom(2**20 + 12345))
    path.write_bytes(data)
    before = inputs.digest(path)
    assert inputs.digest(shutil.copy(path, tmp_path / "copy")) == before
    for change in (0, len(data) - 1):
        other = bytearray(data)
        other[change] ^= 1
        path.write_bytes(other)
        assert inputs.digest(path) != before
    path.write_bytes(data + b"x")
    assert inputs.digest(path) != before
    path.write_bytes(bytes(byte ^ 1 for byte in data))
    assert inputs.digest(path) != before
