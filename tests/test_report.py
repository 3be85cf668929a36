"""What a run shows: report.html in one file, whatever the run's folder holds, and its samples in
the trackers."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import bpgo
from common.errors import InputError
from common.reporting import page, report

HOSTILE = [
    "</title><script>alert(1)</script>",
    'a "red" circle | & <img src=http://x/y.png onerror=alert(1)>',
]


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
    run = SimpleNamespace(
        is_main=True, output=tmp_path, name="", args=SimpleNamespace(fps=5.0, tracker="none")
    )
    run.accelerator = SimpleNamespace(init_trackers=lambda *_: None, trackers=[])
    (tmp_path / "config.json").write_text("{}")
    report.Report(run, 0).samples(20, torch.rand(2, 5, 3, 32, 32), HOSTILE, torch.rand(2))
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
        InputError, match=r"--tracker wandb does not start \(No API key here\); for W&B"
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
