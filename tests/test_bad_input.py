"""Every mistake that a person can make on the command line or in a file gets one clear line, and no
traceback."""

import os
import resource
import struct
import subprocess
import sys
import zlib

import pytest
from conftest import ROOT
from PIL import Image

import bpgo
import grpo_base
import self_paced
import slas
from common import cli, errors

# what is wrong -> (script, flags, what the line has to mention); {tmp} is a folder with the files
# below
VALUES = {
    "steps 0": (grpo_base, "--steps 0", "--steps"),
    "steps negative": (grpo_base, "--steps -5", "--steps"),
    "steps a word": (grpo_base, "--steps five", "five"),
    "steps without a number": (grpo_base, "--steps", "--steps"),
    "no such flag": (grpo_base, "--stepz 5", "--stepz"),
    "a flag by its initials": (grpo_base, "--lr 1e-4", "--learning-rate"),
    "a number of 400 digits": (grpo_base, f"--steps {10**400}", "--steps"),
    "a number of 5000 letters": (grpo_base, f"--timestep-fraction={'a' * 5000}", "5020 characters"),
    "a name that is no UTF-8": (grpo_base, "--output run\udcff", "UTF-8"),
    "no such word": (grpo_base, "train", "train"),
    "another method's flag": (grpo_base, "--gamma 0.5", "--gamma"),
    "no prompts a step": (grpo_base, "--prompts-per-step 0", "--prompts-per-step"),
    "a group of one": (grpo_base, "--group-size 1", "--group-size"),
    "one denoising step": (grpo_base, "--sampling-steps 1", "--sampling-steps"),
    "no noise": (grpo_base, "--noise-level 0", "--noise-level"),
    "noise nan": (grpo_base, "--noise-level nan", "--noise-level"),
    "noise inf": (grpo_base, "--noise-level inf", "--noise-level"),
    "no such schedule": (grpo_base, "--sde vp", "vp"),
    "ddim with eta above 1": (grpo_base, "--sde ddim --noise-level 1.5", "--noise-level"),
    "shift 0": (grpo_base, "--shift 0", "--shift"),
    "guidance negative": (grpo_base, "--guidance -1", "--guidance"),
    "guidance nan": (grpo_base, "--guidance nan", "--guidance"),
    "guidance of a second expert that is not there": (grpo_base, "--guidance-2 3", "--guidance-2"),
    "batched guidance where there is one pass": (
        grpo_base,
        "--batched-guidance",
        "--batched-guidance",
    ),
    "window longer than where it lies": (
        grpo_base,
        "--sde-window 3 --sde-steps 2",
        "--sde-steps 2",
    ),
    "noise in all steps": (grpo_base, "--sde-steps 8", "--sde-steps 8: must be at most 7"),
    "window as long as the steps": (grpo_base, "--sde-window 8", "--sde-window"),
    "fraction 0": (grpo_base, "--timestep-fraction 0", "--timestep-fraction"),
    "fraction above 1": (grpo_base, "--timestep-fraction 1.5", "--timestep-fraction"),
    "best of an odd number": (grpo_base, "--best-of 3", "--best-of"),
    "best of more than the group": (grpo_base, "--best-of 14", "--best-of"),
    "no updates": (grpo_base, "--updates-per-step 0", "--updates-per-step"),
    "micro-batch 0": (grpo_base, "--micro-batch 0", "--micro-batch"),
    "clip range 0": (grpo_base, "--clip-range 0", "--clip-range"),
    "clip range above 1": (grpo_base, "--clip-range 1.5", "--clip-range"),
    "advantages clamped to 0": (grpo_base, "--adv-clip-max 0", "--adv-clip-max"),
    "learning rate 0": (grpo_base, "--learning-rate 0", "--learning-rate"),
    "learning rate nan": (grpo_base, "--learning-rate nan", "--learning-rate"),
    "learning rate 2": (grpo_base, "--learning-rate 2", "--learning-rate"),
    "weight decay negative": (grpo_base, "--weight-decay -1", "--weight-decay"),
    "gradient norm 0": (grpo_base, "--max-grad-norm 0", "--max-grad-norm"),
    "rank negative": (grpo_base, "--lora-rank -1", "--lora-rank"),
    "targets without a rank": (grpo_base, "--lora-targets to_q", "--lora-rank"),
    "KL negative": (grpo_base, "--kl-coef -0.1", "--kl-coef"),
    "seed negative": (grpo_base, "--seed -1", "--seed"),
    "seed a fraction": (grpo_base, "--seed 0.5", "0.5"),
    "checkpoints every -1 steps": (grpo_base, "--save-every -1", "--save-every"),
    "keep -1 checkpoints": (grpo_base, "--keep-checkpoints -1", "--keep-checkpoints"),
    "no such tracker": (grpo_base, "--tracker mlflow", "mlflow"),
    "a tracker that is not installed": (grpo_base, "--tracker wandb", "pip install wandb"),
    "reward batch 0": (grpo_base, "--reward-batch 0", "--reward-batch"),
    "no such frames": (grpo_base, "--reward-frames last", "last"),
    "no frames": (grpo_base, "--reward-frames 0", "--reward-frames"),
    "fps 0": (grpo_base, "--fps 0", "--fps"),
    "judge at 0 fps": (grpo_base, "--judge-fps 0", "--judge-fps"),
    "judge without time": (grpo_base, "--judge-timeout 0", "--judge-timeout"),
    "judge with negative retries": (grpo_base, "--judge-retries -1", "--judge-retries"),
    "judge without requests": (grpo_base, "--judge-concurrency 0", "--judge-concurrency"),
    "trust above 1": (bpgo, "--alpha 2", "--alpha"),
    "no such prior": (bpgo, "--prior median", "median"),
    "a prior beyond float32": (bpgo, "--prior constant --prior-value 1e39", "--prior-value"),
    "a prior beyond float": (bpgo, "--prior constant --prior-value 1e400", "--prior-value inf"),
    "reward scale negative": (bpgo, "--reward-scale -1", "--reward-scale"),
    "gamma too large": (slas, "--gamma 11", "--gamma"),
    "gamma a word": (slas, "--gamma much", "much"),
    "KL limit 0": (slas, "--kl-limit 0", "--kl-limit"),
    "no such order": (slas, "--normalize never", "never"),
    "a threshold beyond float32": (self_paced, "--thresholds 0.5 1e39", "--thresholds"),
    "slope negative": (self_paced, "--slope -1", "--slope"),
    "no such saturation": (self_paced, "--saturation gini", "gini"),
}
FILES = {
    "no such model": (grpo_base, "--model tiny-flax", "tiny-flux"),
    "a folder without a pipeline": (grpo_base, "--model {tmp}", "model_index.json"),
    "a pipeline of another class": (grpo_base, "--model {tmp}/toaster", "ToasterPipeline"),
    "a broken pipeline": (grpo_base, "--model {tmp}/broken", "broken"),
    "a model without default prompts": (grpo_base, "--model {tmp}/sd --reward jpeg", "--prompts"),
    "a model without a default reward": (grpo_base, "--model {tmp}/sd --prompts "
                                                    "{tmp}/fine.txt", "--reward"),
    "height that the model cannot make": (grpo_base, "--height 30", "30"),
    "frames of an image model": (grpo_base, "--frames 5", "--frames"),
    "frames that the model cannot make": (grpo_base, "--model tiny-wan --frames 4", "frames"),
    "targets that are no expression": (grpo_base, "--lora-rank 4 --lora-targets (",
                                       "--lora-targets"),
    "targets that match nothing": (grpo_base, "--lora-rank 4 --lora-targets nothing",
                                   "--lora-targets"),
    "no such reward": (grpo_base, "--reward verifyer", "verifier"),
    "no reward at all": (grpo_base, "--model flux --prompts {tmp}/fine.txt --reward", "--reward"),
    "a weight that is no number": (grpo_base, "--reward verifier=much", "verifier=much"),
    "a weight that is missing": (grpo_base, "--reward verifier=", "verifier="),
    "a weight nan": (grpo_base, "--reward verifier=nan", "finite"),
    "a weight beyond float32": (grpo_base, "--reward verifier=1e300", "1e300"),
    "a weight that stands alone": (grpo_base, "--reward hpsv2.1 0.7", "Write hpsv2.1=0.7"),
    "no reward to train on": (grpo_base, "--reward jpeg=0", "--watch NAME"),
    "a reward twice": (grpo_base, "--reward jpeg jpeg=2", "twice"),
    "a reward of clips on images": (grpo_base, "--reward motion", "motion scores clips"),
    "no such watched reward": (grpo_base, "--watch verifyer", "verifier"),
    "a path without a name": (grpo_base, "--reward-path {tmp}", "NAME=FILE"),
    "a path of no reward": (grpo_base, "--reward-path klip={tmp}", "clip"),
    "a path that is not there": (grpo_base, "--reward clip --reward-path "
                                            "clip={tmp}/nowhere", "nowhere"),
    "a checkpoint that is none": (grpo_base, "--reward clip --reward-path "
                                             "clip={tmp}/garbage.pt", "garbage.pt"),
    "weights that are not there": (grpo_base, "--reward hpsv2 --reward-path "
                                              "hpsv2={tmp}", "HPS_v2_compressed.pt"),
    "a reward with a broken configuration": (
        grpo_base, "--reward pickscore --reward-path pickscore={tmp}/pick", "--reward-path "
                                                                            "pickscore=",
    ),
    "prompts nested deep": (grpo_base, "--prompts {tmp}/deep.json", "RecursionError"),
    "no prompt file": (grpo_base, "--prompts {tmp}/nowhere.txt", "nowhere.txt"),
    "a folder of prompts": (grpo_base, "--prompts {tmp}", "prompts"),
    "prompts without a prompt": (grpo_base, "--prompts {tmp}/empty.txt", "no prompt"),
    "prompts in another encoding": (grpo_base, "--prompts {tmp}/latin.txt", "position 5"),
    "prompts of another world": (grpo_base, "--prompts {tmp}/dog.txt", "a photo of a dog"),
    "prompts with images": (grpo_base, "--prompts {tmp}/images.txt --reward jpeg", "image"),
    "training on a benchmark": (grpo_base, "--prompts hpsv2:photo", "--eval-prompts"),
    "no such set of prompts": (grpo_base, "--prompts dancegrpo:picture", "dancegrpo:images"),
    "no such column": (grpo_base, "--prompts {tmp}/table.csv:text", "'caption'"),
    "a benchmark that is not there": (grpo_base, "--eval-prompts geneval:short", "geneval"),
    "no such style of HPSv2": (grpo_base, "--eval-prompts hpsv2:cartoon", "concept-art"),
    "no held-out file": (grpo_base, "--eval-prompts {tmp}/nowhere.txt", "nowhere.txt"),
    "a home of nobody": (grpo_base, "--prompts=~nobody.of.this.name/a.txt", "is no user's folder"),
    "an output that is a file": (grpo_base, "--output {tmp}/fine.txt", "fine.txt"),
    "an output in a file": (grpo_base, "--output {tmp}/fine.txt/run", "fine.txt"),
    "an output that holds a run": (grpo_base, "--output {tmp}/begun", "--resume latest"),
    "an output that holds a model": (grpo_base, "--output {tmp}/toy",
                                     "does not hold the settings of a run"),
    "an output with a broken config": (grpo_base, "--output {tmp}/run", "config.json"),
    "a run with a broken config": (grpo_base, "--output {tmp}/run --resume latest", "config.json"),
    "a checkpoint that is not there": (grpo_base, "--output {tmp}/new --resume "
                                                  "{tmp}/step_000009", "step_000009"),
    "a run that is not there": (grpo_base, "--model tiny-flux --resume latest", "--output"),
    "no server": (grpo_base, "--reward judge:quality --judge-url http://127.0.0.1:9/v1 "
                             "--judge-retries 0", ":9/v1"),
    "a server that is no URL": (grpo_base, "--reward judge:quality --judge-url nowhere "
                                           "--judge-retries 0", "nowhere"),
    "a judge that is not there": (grpo_base, "--reward judge:quality --judge-model "
                                             "{tmp}/nowhere", "--judge-model"),
    "a prior of an image that is not there": (bpgo, "--prior first-frame", "conditioning image"),
    "thresholds too many": (self_paced, "--thresholds 0.1 0.2 0.3 0.4", "which need 3, got 4"),
    "a stage that is not there": (self_paced, "--only-stage 4", "--only-stage"),
    "stages with weights": (self_paced, "--reward verifier:quality=2 verifier --thresholds "
                                        "0.5", "=WEIGHT"),
    "a stage without bounds": (self_paced, "--reward jpeg verifier --thresholds 0.5 0.5", "bounds"),
    "image to video without images": (grpo_base, "--model tiny-wan-i2v --prompts "
                                                 "{tmp}/motion.txt", "no image"),
    "an image that is not there": (grpo_base, "--model tiny-wan-i2v --prompts "
                                              "{tmp}/lost.txt", "lost.png"),
    "an image cut short": (grpo_base, "--model tiny-wan-i2v --prompts {tmp}/cut.txt",
                           "cut.png does not load"),
    "a photograph cut short": (grpo_base, "--model tiny-wan-i2v --prompts "
                                          "{tmp}/photo.txt", "photo.jpg does not load"),
    "an image that fills the memory": (grpo_base, "--model tiny-wan-i2v --prompts "
                                                  "{tmp}/bomb.txt", "bomb.png does not load"),
    "an image that is none": (grpo_base, "--model tiny-wan-i2v --prompts "
                                         "{tmp}/nopicture.txt", "fine.txt does not load"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    texts = {
        "fine.txt": "a red circle\n", "empty.txt": "\n  \n", "dog.txt": "a photo of a dog\n",
        "garbage.pt": "garbage",
        "images.txt": "picture.png\ta red circle\n", "motion.txt": "a red circle moving left\n",
        "lost.txt": "lost.png\ta red circle moving left\n",
        "nopicture.txt": "fine.txt\ta red circle moving left\n",
        "toaster/model_index.json": '{"_class_name": "ToasterPipeline"}',
        "broken/model_index.json": "{",
        "sd/model_index.json": '{"_class_name": "StableDiffusionPipeline"}', "run/config.json": "{",
        "begun/config.json": '{"script": "grpo_base"}',
        "begun/metrics.jsonl": '{"step": 0, "reward_mean": 0.5}\n',
        "toy/config.json": '{"architectures": ["CLIPModel"]}',
        "table.csv": "caption\na dog\n", "deep.json": "[" * 100_000,
        "pick/config.json": '{"vision_config": 5}', "pick/model.safetensors": "",
    }  # fmt: skip
    for name in ("cut.png", "photo.jpg", "bomb.png"):
        texts[name.replace(".png", ".txt").replace(".jpg", ".txt")] = (
            f"{name}\ta red circle moving left\n"
        )
        image = Image.effect_noise((64, 64), 99)
        image.save(folder / name, quality=95)
        os.truncate(folder / name, (folder / name).stat().st_size * 2 // 3)
    png = bytearray((folder / "cut.png").read_bytes())
    png[16:24] = struct.pack(">II", 100_000, 100_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (folder / "bomb.png").write_bytes(png)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes("a café\n".encode("latin-1"))
    return folder


@pytest.mark.parametrize("what", [*VALUES, *FILES])
def test_a_mistake_gets_one_clear_line(what, tmp, tmp_path, monkeypatch, capfd):
    script, flags, mention = {**VALUES, **FILES}[what]
    if "tiny-wan-i2v" in flags and not (ROOT / "assets/tiny-wan-i2v").is_dir():
        pytest.skip("not built yet")
    words = flags.format(tmp=tmp).split()
    words += (
        []
        if "--output" in words or what == "a run that is not there"
        else ["--output", str(tmp_path / "run")]
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__file__, *words])
    with pytest.raises(SystemExit) as ended:
        errors.run(script.main, cli.parse(script.Args, script.__doc__))
    said = capfd.readouterr()
    assert ended.value.code == 2
    assert "Traceback" not in said.err + said.out
    if "error:" in said.err:  # ours, one line
        (line,) = [line for line in said.err.splitlines() if line.startswith("error:")]
    else:  # tyro's, in a box
        line = " ".join(said.err.replace("│", " ").split())
        assert "For full helptext" in line, said.err
    assert mention in line
    assert len(line) < 1000


@pytest.mark.parametrize(
    "flags", ["--height 99968 --width 99968", "--prompts-per-step 1000000 --group-size 100000"]
)
def test_samples_that_do_not_fit_into_memory_are_one_line(flags, tmp_path):
    """With 12 GiB, so that the rest of the machine does not notice."""
    limit = 12 * 2**30
    done = subprocess.run(
        [sys.executable, grpo_base.__file__, *flags.split(), "--output", str(tmp_path / "run")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "memory" in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_there_are_more_than_sixty():
    assert len(VALUES) + len(FILES) >= 100


@pytest.mark.parametrize(
    "text, number",
    [
        ("\ufeffa red circle\r\na blue square\r\n", 2),
        ("\n\na red circle\n\n\n", 1),
        ("a red circle\na red circle\na red circle\n", 3),
        ("a red circle " + "x" * 10_000 + "\nb\n", 2),
        ("🦊 runs\nثعلب أحمر\nשועל\n", 3),
        ("one prompt", 1),
    ],
)
def test_odd_prompt_files_are_trained_on(text, number, train, tmp_path):
    """Empty lines, a byte-order mark, 10,000 characters, emoji, right-to-left text, duplicates, a
    single prompt."""
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    folder, rows = train(
        prompts=str(tmp_path / "prompts.txt"), eval_prompts="", reward=("jpeg",), steps=1
    )
    assert len(rows) == 1 and rows[0]["ratio_error"] == 0
