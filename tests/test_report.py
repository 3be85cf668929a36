"""What a run shows: report.html in one file, whatever the run's folder holds, and its samples in
the trackers."""

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

import bpgo
from common import errors
from common.args import Args
from common.errors import InputError, RunError
from common.reporting import files, page
from common.trainer import Processes
from common.trainer.log import Log

HOSTILE = [
    "</title><script>alert(1)</script>",
    'a "red" circle | & <img src=http://x/y.png onerror=alert(1)>',
]


def together(here, action):
    """Processes.together of a single process."""
    return Processes.together(SimpleNamespace(first=lambda reason: reason), here, action)


PROCESSES = SimpleNamespace(is_main=True, print=print, together=together)


class Tags(HTMLParser):
    """What a browser would find: the tags that are open, all addresses, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attributes if name in ("src", "href", "data", "action")
        ]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.words.append(data)


def read(folder):
    return Tags((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A file of hostile prompts."""
    path = tmp_path_factory.mktemp("few") / "few.txt"
    path.write_text("\n".join(HOSTILE) + "\n")
    return str(path)


@pytest.fixture
def shown(train, few, monkeypatch):
    """shown(tracker) -> the folder of a run of one step that shows the samples before and after
    it."""

    def run(tracker, **settings):
        settings |= dict(
            reward=("jpeg",), prompts=few, eval_prompts=few, steps=1, sample_every=1, eval_every=1
        )
        return train(bpgo, "a <b> run", tracker=tracker, learning_rate=1e-5, **settings)[0]

    return run


# --- The page ---


def test_a_run_leaves_one_page_with_its_curves_samples_and_settings(shown):
    folder = shown("none", watch=("jpeg",))
    html = read(folder)
    assert html.addresses and all(
        address.startswith("data:image/png;base64,") for address in html.addresses
    )
    # reward, prior, trust; samples before and after
    assert html.tags.count("img") == 5 and "script" not in html.tags and "link" not in html.tags
    words = " ".join(html.words)
    for expected in (
        "a <b> run",
        "bpgo.py · tiny-flux · jpeg",
        "1 of 1",
        "step 0",
        "step 1",
        "group_size",
        "jpeg_mean",
    ):
        assert expected in words, expected
    assert sorted(path.stem for path in folder.glob("*.png")) == ["prior", "reward", "trust"]


def test_whatever_the_folder_holds_is_escaped_and_half_a_run_has_a_page(tmp_path):
    folder = tmp_path / "<script>alert(0)<"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"script": HOSTILE[0], "model": HOSTILE[1], "reward": HOSTILE})
    )
    html = read(page.write(folder).parent)  # killed before its first step
    assert {"script", "img"}.isdisjoint(html.tags) and html.addresses == []
    rows = [
        {"step": 0, "reward_mean": None, HOSTILE[0]: 1.0},
        {"step": 1, "reward_mean": 0.5, "eval_reward": 0.25},
    ]
    half = '{"step": 2, "reward_me'  # killed while it wrote
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + half)
    (folder / "samples").mkdir()
    (folder / "samples/step_000000.png").write_bytes(b"\x89PNG cut short")
    (folder / "samples/step_000020.png").write_bytes(b"")
    html = read(page.write(folder).parent)
    assert "script" not in html.tags and html.tags.count("img") == 1
    words = " ".join(html.words)
    assert (
        HOSTILE[0] in words
        and HOSTILE[1] in words
        and "0.250 → 0.250" in words
        and "2 of None" in words
    )


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[1")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no run"):
            page.main([str(folder)])
    with pytest.raises(InputError, match="RUN"):
        page.main([])


def test_clips_move_on_the_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    log = Log(Args(fps=5.0, tracker="none"), tmp_path, PROCESSES, 0)
    log.samples(20, torch.rand(2, 5, 3, 32, 32), HOSTILE, torch.rand(2))
    html = read(tmp_path)
    assert [address[:14] for address in html.addresses] == [
        "data:image/png",
        "data:image/png",
        "data:video/mp4",
    ]


def test_what_is_too_large_stays_out(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 10)
    (tmp_path / "large.png").write_bytes(b"x" * 11)
    assert page.figure(tmp_path / "large.png", "large") == ""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium")
def test_chromium_shows_it_and_complains_of_nothing(shown, tmp_path):
    picture = tmp_path / "page.png"
    chrome = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
    ]
    flags = [
        f"--user-data-dir={tmp_path}/profile",
        f"--screenshot={picture}",
        "--window-size=1200,1500",
    ]
    done = subprocess.run(
        [*chrome, *flags, (shown("none") / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert (
        len(np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0)) > 100
    )


# --- Trackers ---


def test_tensorboard_has_the_samples_with_prompts_and_rewards_under_the_runs_name(shown):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = shown("tensorboard")
    events = EventAccumulator(str(folder / "a <b> run"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    images = events.Images("samples")
    assert [image.step for image in images] == [0, 1]
    for image in images:
        with Image.open(folder / f"samples/step_{image.step:06d}.png") as picture:
            expected = np.asarray(picture.convert("RGB"))
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), expected
        )
    text = events.Tensors("samples/text_summary")[1].tensor_proto.string_val[0].decode()
    rows = [line for line in text.splitlines() if "red" in line or "alert" in line]
    assert (
        len(rows) == 2
        and "<" not in text
        and all(re.search(r"\| -\d\.\d{3} \|$", row) for row in rows)
    )
    assert events.Scalars("eval_reward")[0].step == 0


def test_a_tracker_that_does_not_start_is_one_line(shown, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(
        wandb,
        "init",
        lambda **_: (_ for _ in ()).throw(wandb.errors.UsageError("No API key\nhere")),
    )
    with pytest.raises(
        InputError, match=r"--tracker wandb does not load \(UsageError: No API key here\); run"
    ):
        shown("wandb")


def test_wandb_has_the_samples_with_prompts_and_rewards_and_the_runs_name(shown, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    begun, logged = [], []
    start, log = wandb.init, wandb.Run.log
    monkeypatch.setattr(wandb, "init", lambda **given: begun.append(start(**given)) or begun[-1])
    monkeypatch.setattr(
        wandb.Run,
        "log",
        lambda run, data, step=None, **more: (
            logged.append((step, data)),
            log(run, data, step, **more),
        ),
    )
    folder = shown("wandb")
    (run,) = begun
    token = json.loads((folder / "config.json").read_text())["run"]
    assert (run.project, run.name, run.id) == ("vgrpo", "a <b> run", token)
    samples = {step: data["samples"] for step, data in logged if "samples" in data}
    assert list(samples) == [0, 1] and len(samples[0]) == 2
    for image, prompt in zip(samples[1], HOSTILE):
        assert re.fullmatch(re.escape(prompt) + r" \(-\d\.\d{3}\)", image._caption)
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) == 4
    assert any("reward_mean" in data for _, data in logged)


def test_what_the_trackers_get_by_a_module_in_the_place_of_wandb(monkeypatch, tmp_path):
    """wandb itself is an optional package: this runs without it."""
    calls = []

    class Run:
        def log(self, values, step=None, **more):
            calls.append((step, values))

        def finish(self, **more):
            calls.append("finish")

    fake = ModuleType("wandb")
    fake.init = lambda **given: calls.append(given) or Run()
    fake.config = SimpleNamespace(update=lambda values, **more: calls.append(values))
    fake.Image = lambda pixels, caption: (pixels.shape, caption)
    fake.Video = lambda path, caption, format: (path, caption)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    PartialState(cpu=True)
    (tmp_path / "config.json").write_text('{"run": "abc"}')
    log = Log(Args(tracker="wandb", fps=5.0), tmp_path, PROCESSES, 0)
    log.row(0, {"reward_mean": torch.tensor(0.5), "ratio_error": 0.0})
    log.samples(1, torch.rand(2, 3, 16, 16), HOSTILE, torch.tensor([0.25, 0.5]))
    log.samples(2, torch.rand(2, 2, 3, 16, 16), HOSTILE, torch.tensor([0.25, 0.5]))
    begun, settings, row, images, video = calls
    own = dict(project="vgrpo", name=tmp_path.name, id="abc", resume="allow", dir=str(tmp_path))
    assert begun == own and settings["group_size"] == "12"
    assert row == (0, {"reward_mean": 0.5, "ratio_error": 0.0})
    shown = [((16, 16, 3), f"{HOSTILE[0]} (0.250)"), ((16, 16, 3), f"{HOSTILE[1]} (0.500)")]
    assert images == (1, {"samples": shown})
    words = f"1: {HOSTILE[0]} (0.250); 2: {HOSTILE[1]} (0.500)"
    assert video == (2, {"samples": (str(tmp_path / "samples/step_000002.mp4"), words)})
    monkeypatch.setattr(fake, "init", lambda **given: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(InputError, match=r"--tracker wandb does not load \(OSError: no network\)"):
        Log(Args(tracker="wandb"), tmp_path, PROCESSES, 0)


# --- The log ---

STEP = {"reward_mean": 0.5, "ratio_error": 0.0}


def test_a_log_keeps_the_rows_before_its_start_and_adds_its_own(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {n}, "reward_mean": {n / 10}}}\n' for n in range(5))
    )
    log = Log(Args(steps=9, tracker="none"), tmp_path, PROCESSES, 3)
    assert [row["step"] for row in log.rows] == [0, 1, 2]
    log.row(3, {**STEP, "kl": torch.tensor(float("nan"))})
    log.row(9, {})  # no evaluation
    log.row(9, {"eval_reward": 0.75})  # the last evaluation is no step
    assert (log.bar.n, log.bar.total) == (4, 9)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[3]) == {"step": 3, **STEP, "kl": None}
    assert json.loads(lines[4]) == {"step": 9, "eval_reward": 0.75}
    assert log.ends("reward_mean", 2) == pytest.approx((0.05, 0.35))
    assert files.rows_before(tmp_path / "metrics.jsonl", 4)[-1]["step"] == 3


def test_other_processes_keep_the_rows_and_write_nothing(tmp_path):
    other = SimpleNamespace(
        is_main=False, print=lambda *words: None, together=lambda here, action: ""
    )
    log = Log(Args(tracker="tensorboard"), tmp_path, other, 0)
    log.row(0, STEP)
    log.samples(0, torch.rand(2, 3, 16, 16), HOSTILE, torch.rand(2))
    model = SimpleNamespace()  # of which the main process alone asks something
    assert log.finish(model, "") is log and log.rows == [{"step": 0, **STEP}]
    assert not list(tmp_path.iterdir())


def test_what_the_main_process_cannot_publish_stops_all(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")  # which names no script
    (tmp_path / "export").mkdir()
    log = Log(Args(tracker="none", output=str(tmp_path)), tmp_path, PROCESSES, 0)
    log.row(0, {**STEP, "eval_reward": 0.25})
    log.row(1, {**STEP, "eval_reward": 0.75})
    model = SimpleNamespace(
        task=lambda: "text-to-image", pipeline=SimpleNamespace, trainable={"transformer": None}
    )
    with pytest.raises(RunError, match="the model card: 'script'. The run itself is complete."):
        log.finish(model, "load it so")
    said = capsys.readouterr().out
    assert "held-out reward 0.250 -> 0.750 (+0.500;" in said
    assert f"look at {tmp_path}/report.html; the trained model: load it so" in said
    other = SimpleNamespace(
        is_main=False, print=print, together=lambda here, action: "somewhere else"
    )
    with pytest.raises(RunError, match="somewhere else"):
        Log(Args(tracker="none"), tmp_path, other, 0).finish(model, "")


def test_an_error_stands_in_a_line_of_its_own_behind_a_bar(tmp_path, capsys):
    with pytest.raises(SystemExit), errors.one_line():
        log = Log(Args(tracker="none", steps=2), tmp_path, PROCESSES, 0)
        log.row(0, STEP)
        raise RunError("that was it")
    del log
    lines = re.split(r"[\r\n]", capsys.readouterr().err.rstrip())
    assert lines[-1] == "error: that was it" and "0/2" in lines[-2]
