"""A Hugging Face cache in its real layout, with small models under the real hub ids: what the
owner's commands need, without a network."""

import hashlib
import os
import shutil
from pathlib import Path

import open_clip
import pipelines
import torch
import vlm
from learned import randomised

from benchmarks.memory import FAMILIES
from common import models
from common.args import Args
from common.rewards import Rewards, judge_local
from common.rewards.videoclip_xl import TwoEncoders

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# 53 frames of 480x832 in 14 x 15 x 26 latents, of 240x416 in 14 x 15 x 26 too; one token for all
# frames of a place
VAE = dict(
    base_dim=2, dim_mult=[1, 1, 1], num_res_blocks=0, temperal_downsample=[True, True],
    scale_factor_temporal=4,
)  # fmt: skip
LARGE_CLIPS = dict(VAE, patch_size=8, in_channels=192, out_channels=192, scale_factor_spatial=32)
SMALL_CLIPS = dict(VAE, patch_size=4, in_channels=48, out_channels=48, scale_factor_spatial=16)
PATCH = (14, 1, 1)
PIPELINES = {
    "flux": pipelines.flux,
    "sd1.4": lambda: pipelines.sd(blocks=7),
    "wan2.1-1.3b": lambda: pipelines.wan(vae=LARGE_CLIPS, patch_size=PATCH),
    "wan2.1-14b": lambda: pipelines.wan(vae=SMALL_CLIPS, patch_size=PATCH),
    "wan2.2-i2v": lambda: pipelines.wan(experts=2, images=True, vae=LARGE_CLIPS, patch_size=PATCH),
    "hunyuan": lambda: pipelines.hunyuan(width=1, layers=0, patch_size=2, patch_size_t=14),
}


def put(home, repository, folder, kind="model"):
    """The files of a folder -> the cache of `home` (HF_HOME), as a download would leave them
    there."""
    place = Path(home) / "hub" / f"{kind}s--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "blobs").mkdir(exist_ok=True)
    (place / "refs/main").write_text(COMMIT)
    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        blob = place / "blobs" / hashlib.sha256(str(name).encode()).hexdigest()
        shutil.move(file, blob)
        link = place / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def put_model(home, name, tmp):
    """The small pipeline of a named model under the hub id of the real one."""
    PIPELINES[name]().save_pretrained(tmp)
    put(home, models.settings(name)["source"], tmp)


@torch.no_grad()
def put_judge(home, tmp, name, captions):
    """Qwen/Qwen2.5-VL-7B-Instruct, small, and one to whom samples of the named small pipeline make
    a difference: of a random model the long question decides the answer. So what all samples have
    in common is taken out of what tells its answers apart."""
    vlm.save_judge(tmp)
    own = models.settings(name)
    size = {key: own[key] for key in ("height", "width", "frames") if key in own}
    model = FAMILIES[name](PIPELINES[name](), **size)
    samples = model.decode(
        torch.randn(4, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    )
    stages = ["judge:quality", "judge:smoothness", "judge:alignment"]
    if "frames" not in own:
        stages.remove("judge:smoothness")
    rewards = Rewards(Args(reward=tuple(stages), judge_model=str(tmp)), captions)
    answering = judge_local.local(str(tmp), False, False, 16).model
    heard = []
    answering.lm_head.register_forward_pre_hook(
        lambda _, given: heard.append(given[0][:, -1].mean(0))
    )
    for caption in captions:
        rewards.check(rewards.score(samples, [caption] * len(samples)), [caption])
    common = torch.linalg.qr(torch.stack(heard).T).Q  # [D, questions]
    answering.lm_head.weight -= answering.lm_head.weight @ common @ common.T
    answering.save_pretrained(tmp)
    put(home, "Qwen/Qwen2.5-VL-7B-Instruct", tmp)


def put_videoclip_xl(home, tmp):
    """alibaba-pai/VideoCLIP-XL: small, under the names of the released weights."""
    module = randomised(
        TwoEncoders(size=28, patch=14, video=(128, 1, 2), text=(64, 1, 1), output=32)
    )
    official = {"video": "vision_model.vision_encoder", "text": "text_model"}
    state = {
        f"{official[key.partition('.')[0]]}.{key.partition('.')[2]}": value
        for key, value in module.state_dict().items()
    }
    state["text_model.positional_embedding_res"] = state["text_model.positional_embedding"].clone()
    tmp.mkdir()
    torch.save(state, tmp / "VideoCLIP-XL.bin")
    put(home, "alibaba-pai/VideoCLIP-XL", tmp)


def put_hpsv2(home, tmp):
    """xswu/HPSv2 at its real size, random, in half precision: two gigabytes."""
    with torch.device("meta"):
        module = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    generator, state = torch.Generator().manual_seed(0), {}
    for key, value in module.state_dict().items():
        norm = ".ln_" in key and key.endswith("weight")
        state[key] = (norm + 0.02 * torch.randn(value.shape, generator=generator)).half()
    tmp.mkdir()
    torch.save({"state_dict": state}, tmp / "HPS_v2_compressed.pt")
    put(home, "xswu/HPSv2", tmp)
