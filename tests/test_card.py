"""What an export brings along for others: its card, file modes, LoRAs in other names, and the push
to a hub."""

import base64
import dataclasses
import json
import os
import stat
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard, constants

import bpgo
import grpo_base
import self_paced
import slas
from common import cli, models
from common.errors import InputError, RunError
from common.reporting import card
from common.reporting.files import rows_before

FLUX = card.Base("assets/tiny-flux", "text-to-image", "FluxPipeline")
WAN = card.Base("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "text-to-video", "WanPipeline")


@pytest.fixture
def hub(monkeypatch):
    """A hub on localhost, as far as its client needs one to push: `files` of its repositories,
    `asked` paths."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            made.asked.append(self.path)
            if self.path == "/api/whoami-v2" and self.headers["Authorization"] == "Bearer hf_right":
                return self.answer({"name": "me", "type": "user"})
            self.answer({"error": "Invalid credentials"}, 401)

        def do_POST(self):
            made.asked.append(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if self.path in made.broken:
                return self.answer({"error": "no room"}, 507)
            if self.path == "/api/repos/create":
                made.created = json.loads(body)
                return self.answer(
                    {"url": f"{made.url}/me/model", "id": "me/model", "name": "me/model"}
                )
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular"}
                    for file in json.loads(body)["files"]
                ]
                return self.answer(
                    {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]}
                )
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        made.files[line["value"]["path"]] = base64.b64decode(
                            line["value"]["content"]
                        )
                return self.answer(
                    {"commitUrl": f"{made.url}/me/model/commit/1", "commitOid": "1" * 40}
                )
            self.answer({"error": "not here"}, 404)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = SimpleNamespace(
        url=f"http://127.0.0.1:{server.server_port}", files={}, asked=[], broken=[], created=None
    )
    threading.Thread(
        target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True
    ).start()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield made
    server.shutdown()
    server.server_close()


# --- The card ---


def test_an_export_has_a_card_that_the_hub_reads(train, tmp_path):
    (tmp_path / "few.txt").write_text("a red circle\ntwo shapes")
    evaluations = dict(sample_every=2, eval_every=2, eval_prompts=str(tmp_path / "few.txt"))
    folder, _ = train(bpgo, lora_rank=4, **evaluations, prior="constant", prior_value=0.5)
    found = ModelCard.load(folder / "export/README.md")
    data = found.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"vgrpo", "grpo", "lora", "arxiv:2511.18919"} <= set(data["tags"])
    assert not {"base_model", "license"} & data.keys(), (
        "an embedded model is no repository; a licence is not invented"
    )
    said = found.text
    assert "# tiny-flux, trained with Bayesian prior-guided optimization (BPGO)" in said
    assert "https://arxiv.org/abs/2511.18919" in said and "load_lora_weights" in said
    evaluations = [
        row["eval_reward"]
        for row in rows_before(folder / "metrics.jsonl", 9)
        if "eval_reward" in row
    ]
    assert f"{evaluations[0]:.4g} -> {evaluations[-1]:.4g}" in said
    assert (
        "--prior constant --prior-value 0.5" in said
        and "--lora-rank 4" in said
        and str(folder) not in said
    )
    for name in ("reward.png", "samples.png"):
        assert (
            f"![{name}]({name})" in said
            and (folder / "export" / name).read_bytes()[:4] == b"\x89PNG"
        )


@pytest.mark.parametrize("script, method", [
    (grpo_base, "GRPO"),
    (slas, "Super-linear advantage shaping (SLAS)"),
    (self_paced, "Self-Paced GRPO"),
])  # fmt: skip
def test_the_command_on_a_card_is_the_run(script, method, monkeypatch):
    """It gives the same settings again, in the order of --help; the hub's id is there where there
    is one."""
    values = dict(
        lora_rank=8, reward=("hpsv2.1=0.7", "clip"), batched_guidance=True, reward_frames=3, seed=2
    )
    args = cli.defaults(script.Args, "wan2.1-1.3b", **values)
    said = card.card(script.__name__, args, WAN, [], [])
    assert f"# wan2.1-1.3b, trained with {method}" in said
    assert (
        "base_model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in said
        and "base_model_relation: adapter" in said
    )
    assert (
        "pipeline_tag: text-to-video" in said
        and 'from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")' in said
    )
    for rate in (args.learning_rate, 5e-6, 1e-3):  # a LoRA's default, that of all weights, another
        args.learning_rate = rate
        words = card.command(script.__name__, args)
        monkeypatch.setattr("sys.argv", words)
        assert cli.parse(script.Args, "") == args


def test_paths_of_the_machine_stay_there():
    args = cli.defaults(
        grpo_base.Args, prompts="/home/somebody/captions.csv", reward_path=("clip=/home/me/clip",)
    )
    said = card.card("grpo_base", args, FLUX, [], [])
    assert (
        "/home" not in said
        and "--prompts captions.csv" in said
        and "--reward-path clip=clip" in said
    )


def test_a_script_of_ones_own_has_a_card_too():
    said = card.card("my_method", cli.defaults(cli.Args), FLUX, [], [])
    assert "trained with my_method.py" in said and "arxiv" not in said


def test_of_two_experts_both_loras_are_loaded_and_all_weights_are_a_pipeline():
    base = card.Base("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "image-to-video", "WanPipeline", True)
    both = card.loading(base, lora=True)
    assert 'from_pretrained("Wan-AI/Wan2.2-I2V-A14B-Diffusers")' in both
    second = both.split("pipe.load_lora_weights")[2]
    assert "load_into_transformer_2=True" in second and "#" not in second
    assert 'weight_name="transformer_2/pytorch_lora_weights.safetensors"' in second
    assert "load_into_transformer_2=True" not in card.loading(WAN, lora=True)
    whole = card.loading(base, lora=False)
    assert 'from_pretrained("this repository")' in whole and "lora" not in whole


def test_the_card_has_the_flags_as_they_were_given(tmp_path):
    """The memory of a machine changes some of them, and config.json has them before that."""
    (tmp_path / "export").mkdir()
    args = cli.defaults(grpo_base.Args, "flux", reward=("hpsv2", "clip=0.5"))
    config = dataclasses.asdict(args) | {"script": "grpo_base"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    resolved = dataclasses.replace(args, micro_batch=3, offload_encoders=True)
    card.write(tmp_path, resolved, FLUX)
    said = (tmp_path / "export/README.md").read_text()
    assert "    grpo_base.py --model flux --reward hpsv2 clip=0.5\n" in said


# --- Files ---


def test_all_files_of_an_export_can_be_read_by_those_who_may_read_the_run(train):
    folder, _ = train(model="tiny-sd", lora_rank=2, steps=1, ema=0.5)
    mask = os.umask(0)
    os.umask(mask)
    files = [
        path
        for name in ("export", "export_ema")
        for path in (folder / name).rglob("*")
        if path.is_file()
    ]
    assert {path.name for path in files} >= {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "lora.safetensors",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


def test_a_stable_diffusion_lora_under_kohyas_names_gives_the_same_images(train):
    folder, _ = train(model="tiny-sd", lora_rank=2, steps=2, learning_rate=1e-2)
    pipe = StableDiffusionPipeline.from_pretrained(models.ASSETS / "tiny-sd", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size, found = models.load("tiny-sd", torch.float32).noise_shape, []
    for lora in (None, folder / "export", folder / "export/kohya/lora.safetensors"):
        if lora:
            pipe.load_lora_weights(lora)
        noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
        settings = dict(height=32, width=32, num_inference_steps=3, latents=noise, output_type="pt")
        found.append(pipe("a red circle", **settings).images)
        pipe.unload_lora_weights()
    assert (found[1] - found[2]).abs().max() <= 1e-5 and (found[0] - found[1]).abs().max() > 1e-3


# --- The hub ---


def test_the_export_is_pushed_in_the_end(train, hub, capsys):
    folder, _ = train(lora_rank=4, steps=1, push_to_hub="me/model")
    assert hub.created["name"] == "model" and hub.created["visibility"] == "private"
    expected = {
        path.name: path.read_bytes() for path in (folder / "export").iterdir() if path.is_file()
    }
    assert hub.files == expected and "README.md" in expected
    assert f"pushed to {hub.url}/me/model" in capsys.readouterr().out


def test_a_push_that_fails_leaves_the_export_and_says_how_to_do_it_later(train, hub):
    hub.broken.append("/api/models/me/model/commit/main")
    with pytest.raises(
        RunError, match=r"complete. Push it later: `hf upload me/model .*run/export`"
    ):
        train(lora_rank=4, steps=1, push_to_hub="me/model")


@pytest.mark.parametrize("repository, token, line", [
    ("me/model", "hf_wrong", "run `hf auth login`, or push later"),
    ("model", "hf_right", "Write OWNER/NAME"),
    ("me/mo del", "hf_right", "does not load"),
])  # fmt: skip
def test_who_cannot_push_hears_of_it_before_any_work(
    repository, token, line, hub, train, monkeypatch, tmp_path
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=line):
        train(push_to_hub=repository)
    assert not (tmp_path / "run").exists()
