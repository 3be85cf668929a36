"""Small random checkpoints of the learned rewards, in the official layouts, and what every such
reward has to do."""

import json

import open_clip
import torch
from PIL import Image

from common.args import Args
from common.rewards import Rewards, weights
from common.rewards.scorer import scores_of
from common.rewards.weights import Source

PROMPTS = [
    "a red circle",
    "A photo of an Astronaut, riding a horse!",
    "two cats & a dog",
    "snow   on the Matterhorn",
    "x",
    "a very long prompt " + "about many things that nobody can count and that goes on and on " * 8,
]
# height, width: larger and smaller than the models' 56
SHAPES = [(64, 64), (75, 104), (128, 32), (40, 61), (33, 300)]
# a real architecture with small numbers
CONFIG = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 64, "head_width": 32, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def photo(height, width, seed):
    """[3, H, W] in 256 levels: smooth colours with noise on top, as a photograph has."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    image += 0.15 * torch.randn(3, height, width, generator=generator)
    return (image.clamp(0, 1) * 255).round() / 255


def photos(number, height=60, width=80, seed=0):
    return torch.stack([photo(height, width, seed + i) for i in range(number)])


def as_pil(image):
    return Image.fromarray((image * 255).round().to(torch.uint8).movedim(0, -1).numpy())


def randomised(module, seed=0):
    """Weights large enough for every layer to matter: the modules' own start near zero hides
    mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 0:
            weight.data.fill_(3.0)
        elif weight.ndim == 1:
            weight.data = 0.2 * noise + ("weight" in name)  # a norm's weight, or a bias
        else:
            weight.data = noise / (
                weight[0].numel() ** 0.5 if weight.ndim > 1 and "embed" not in name else 1
            )
    return module.eval().requires_grad_(False)


def clip_folder(folder, seed=0, config=CONFIG, **preprocess):
    """A small open_clip model in open_clip's own layout, as open_clip's factory loads it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    about = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], **preprocess}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": about})
    )
    model = randomised(open_clip.CLIP(**config), seed)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def loaded(cls, name, path, batch=4, **paths):
    """A scorer with the weights at `path`, read as from --reward-path."""
    scorer = cls()
    scorer.load(
        Source(name, {name: str(path), **{key: str(value) for key, value in paths.items()}}), batch
    )
    return scorer


def check_contract(make, media, prompts, reads_prompts=True, tolerance=1e-5):
    """make(batch) -> scorer. Each sample is scored with its own prompt, whatever is beside it and
    however many."""
    together = make(4).score(media, prompts)
    assert together.shape == (len(media),) and together.dtype == torch.float32
    assert together.std() > 100 * tolerance, "too equal to tell anything"
    for batch in (1, 3, 100):
        torch.testing.assert_close(
            make(batch).score(media, prompts), together, atol=tolerance, rtol=0
        )
    scorer = make(4)
    alone = [scorer.score(media[i : i + 1], prompts[i : i + 1]) for i in range(len(media))]
    torch.testing.assert_close(torch.cat(alone), together, atol=tolerance, rtol=0)
    order = torch.randperm(len(media), generator=torch.Generator().manual_seed(1))
    permuted = scorer.score(media[order], [prompts[i] for i in order])
    torch.testing.assert_close(permuted, together[order], atol=tolerance, rtol=0)
    blamed = scorer.score(media, [prompts[1], *prompts[1:]])  # the first gets another one's prompt
    torch.testing.assert_close(blamed[1:], together[1:], atol=tolerance, rtol=0)
    assert ((blamed[0] - together[0]).abs() > 10 * tolerance) == reads_prompts
    assert torch.equal(scorer.score(media * 1.0, prompts), scorer.score(media, prompts))
    assert torch.equal(scorer.score(media.double(), prompts), scorer.score(media, prompts))
    wild = media + (media == 1) * 0.7 - (media == 0) * 0.7  # what a decoder may give
    assert torch.equal(scorer.score(wild, prompts), scorer.score(media, prompts))


def check_half_precision(monkeypatch, make, media, prompts, tolerance):
    """What runs on GPUs, half-precision weights under autocast; on a CPU it is only slower."""
    expected, device = make(4).score(media, prompts), "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(weights, "precision", lambda device: torch.float16)
    scorer = make(4)
    ours = scorer.score(media.to(device), prompts)
    assert ours.dtype == torch.float32 and ours.device.type == device
    assert not torch.equal(ours.cpu(), expected), "it was not half precision"
    torch.testing.assert_close(ours.cpu(), expected, atol=tolerance, rtol=0)


def score_all(scorers, media, prompts):
    """{name: [b]} of scorers {name: scorer}; an exception passes through."""
    return {name: scores_of(scorer, media, prompts) for name, scorer in scorers.items()}


def made(*specs, prompts=(), scorers=None, **settings):
    """The Rewards of these --reward words and settings; `scorers` take the place of the loaded."""
    found = Rewards(Args(reward=specs, **settings), list(prompts))
    if scorers:
        found.scorers = scorers
    return found
