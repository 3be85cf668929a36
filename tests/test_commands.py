"""The owner's commands, word for word and offline: `accelerate launch SCRIPT.py --model NAME`,
nothing more.

The cache is the test's own, in the real layout: small pipelines and rewards under the real hub ids
(HPSv2 at its real size), prompts in their place. So sizes, prompts, rewards, groups and steps are
the ones that the command has; what is small is the models. A run takes hours even so: the test ends
it after its first step, when metrics.jsonl has a line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from conftest import ROOT
from huggingface_hub import constants
from PIL import Image
from test_rewards_videoalign import save as save_videoalign

import bpgo
import grpo_base
import self_paced
import slas
from common import models
from common.args import defaults
from common.prompts import files, sets

SCRIPTS = {"grpo_base": grpo_base, "bpgo": bpgo, "slas": slas, "self_paced": self_paced}
CAPTIONS = [
    "A red fox runs through the snow, \t slow motion",
    "two cats on a wall",
    "a city at night, from above",
]
REWARDS = {  # what puts them into the cache
    "hpsv2": hub.put_hpsv2,
    "videoclip-xl": hub.put_videoclip_xl,
    "videoalign": lambda home, tmp: put_videoalign(home, tmp),
}
COMMANDS = {  # what each logs besides
    "accelerate launch bpgo.py --model flux": ("hpsv2", {"hpsv2_mean", "trust_mean", "prior"}),
    "accelerate launch bpgo.py --model wan2.1-1.3b": (
        "videoclip-xl",
        {"videoclip-xl_mean", "trust_mean", "prior"},
    ),
    "accelerate launch bpgo.py --model wan2.2-i2v": (
        "videoclip-xl",
        {"videoclip-xl_mean", "trust_mean", "prior"},
    ),
    "accelerate launch slas.py --model wan2.1-14b": (
        "videoalign",
        {"videoalign_mean", "gamma", "batch_std"},
    ),
    "accelerate launch self_paced.py --model wan2.1-1.3b": ("judge", {"weight_judge:quality"}),
    "accelerate launch self_paced.py --model hunyuan": ("judge", {"weight_judge:alignment"}),
    "accelerate launch self_paced.py --model sd1.4": ("judge", {"weight_judge:alignment"}),
}


def put_videoalign(home, tmp):
    tmp.mkdir()
    save_videoalign(tmp, 3)
    (tmp / "base").mkdir()
    for file in [path for path in tmp.iterdir() if path.is_file()]:
        file.rename(tmp / "base" / file.name)
    hub.put(home, "Qwen/Qwen2-VL-2B-Instruct", tmp / "base")
    hub.put(home, "KwaiVGI/VideoReward", tmp)


def checkout(folder, home):
    """A copy of the code that knows the git blobs of the test's own small prompt files, which lie
    in the cache."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(
        ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = folder / "common/prompts/sets.py"
    data = "\n".join(CAPTIONS * 20).encode() + b"\n"
    for name in ("dancegrpo:images", "dancegrpo:videos"):
        item = sets.PUBLISHED[name]
        assert item.blob in code.read_text()
        code.write_text(code.read_text().replace(item.blob, sets.blob_id(data + name.encode())))
        place = home / "vgrpo" / sets.blob_id(data + name.encode()) / Path(item.path).name
        place.parent.mkdir(parents=True)
        place.write_bytes(data + name.encode())
    frames = folder / "first_frames"
    frames.mkdir()
    for i in range(3):
        Image.fromarray(np.full((48, 80, 3), 60 * i, np.uint8)).save(frames / f"{i}.png")
    lines = [f"{i}.png\t{' '.join(caption.split())}\n" for i, caption in enumerate(CAPTIONS)]
    (frames / "prompts.txt").write_text("".join(lines))


def first_line(command, folder, home, seconds):
    """Starts the command in the folder and ends it when metrics.jsonl has a line; returns that and
    the run's folder."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "PYTHONPATH"))
    }
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with open(folder / "said.txt", "w") as said:
        process = subprocess.Popen(
            command.split(),
            cwd=folder,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            started = time.monotonic()
            while not (
                found := [
                    path for path in folder.glob("runs/*/metrics.jsonl") if "\n" in path.read_text()
                ]
            ):
                assert process.poll() is None, (folder / "said.txt").read_text()[-3000:]
                assert time.monotonic() - started < seconds, (folder / "said.txt").read_text()[
                    -3000:
                ]
                time.sleep(1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return json.loads(found[0].read_text().splitlines()[0]), found[0].parent


@pytest.mark.parametrize("name", hub.PIPELINES)
def test_named_models_load_offline_from_the_cache_at_their_own_sizes(name, tmp_path, monkeypatch):
    for constant, value in {
        "HF_HOME": tmp_path,
        "HF_HUB_CACHE": tmp_path / "hub",
        "HF_HUB_OFFLINE": True,
    }.items():
        monkeypatch.setattr(constants, constant, value)
    hub.put_model(tmp_path, name, tmp_path / "model")
    for script in SCRIPTS.values():
        args = defaults(script.Args, name)
        model = models.load(name, torch.float32, **args.model_settings())
        assert len(model.sigmas(args.sampling_steps, args.shift)) == args.sampling_steps + 1
        assert (model.height, model.width) == (args.height, args.width)
        assert model.video == bool(args.frames) and model.images == (name == "wan2.2-i2v")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_owners_command_trains_word_for_word(command, tmp_path):
    script, name = re.fullmatch(r"accelerate launch (\w+)\.py --model (\S+)", command).groups()
    home, folder = tmp_path / "cache", tmp_path / "vgrpo"
    folder.mkdir()
    reward, logged = COMMANDS[command]
    hub.put_model(home, name, tmp_path / "model")
    if reward == "judge":
        hub.put_judge(
            home, tmp_path / "judge", name, [files.one_line(caption) for caption in CAPTIONS]
        )
    else:
        REWARDS[reward](home, tmp_path / "reward")
    checkout(folder, home)
    row, output = first_line(command, folder, home, seconds=3 * 3600)
    print({key: value for key, value in row.items()})
    config = json.loads((output / "config.json").read_text())
    expected = defaults(SCRIPTS[script].Args, name)
    for setting, value in vars(expected).items():
        assert config[setting] == (list(value) if isinstance(value, tuple) else value), setting
    assert output.name == f"{script}-{name}-1" and row["step"] == 0 and logged <= row.keys()
    assert row["ratio_error"] < 1e-5 and row["grad_norm"] > 0 and row["masked_samples"] == 0
    assert all(np.isfinite(value) for value in row.values())
