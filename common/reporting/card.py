"""The model card (README.md) of an export, as the hub shows it."""

import dataclasses
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from common.args import Args, defaults
from common.reporting.files import rows_before, write_text

# flags that the card names elsewhere, or that belong to one machine
LEFT_OUT = ("model", "output", "resume", "push_to_hub", "tracker", "judge_url")
AVERAGED = "export_ema"  # the folder of the averaged weights
ARXIV = "https://arxiv.org/abs/"


@dataclass(frozen=True)
class Base:
    """The model that was trained."""

    source: str  # folder or hub id of its weights
    task: str  # in the hub's words, "text-to-image" for example
    pipeline: str  # name of its class in diffusers
    two_experts: bool = False

    @property
    def hub_id(self) -> str:
        """Return OWNER/NAME for a model from the hub, else ""."""
        if self.source.count("/") != 1 or Path(self.source).exists():
            return ""
        return self.source


def write(folder: Path, args: Args, base: Base) -> None:
    """Write README.md and its pictures into the exports of a run's folder. Raises OSError.

    args: the flags of the run; the card names those of config.json, which this machine's memory
    has not changed.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    given = {}
    for field in dataclasses.fields(args):
        value = config.get(field.name, getattr(args, field.name))
        given[field.name] = tuple(value) if isinstance(value, list) else value
    args = dataclasses.replace(args, **given)
    rows = rows_before(folder / "metrics.jsonl", float("inf"))
    for export in (folder / "export", folder / AVERAGED):
        if export.is_dir():
            names = _copy_pictures(folder, export)
            text = card(config["script"], args, base, rows, names, averaged=export.name == AVERAGED)
            write_text(export / "README.md", text)


def card(
    script: str,
    args: Args,
    base: Base,
    rows: list[dict[str, Any]],
    pictures: list[str],
    averaged: bool = False,
) -> str:
    """Return the card's text.

    script: name without .py; rows: of metrics.jsonl; pictures: names of files beside the card;
    averaged: whether the export has the moving average of the weights.
    """
    name = _public(args.model)
    weights = f"A LoRA (rank {args.lora_rank}) for" if args.lora_rank else "All weights of"
    started = ", which began from another LoRA (`--init-lora`)" if args.init_lora else ""
    average = ", the moving average over the training" if averaged else ""
    papers = [f"Paper: [arXiv {paper}]({ARXIV}{paper})." for paper in args.ARXIV]
    about = (
        f"{weights} `{_public(base.source)}`{average}{started}, trained by reinforcement learning "
        f"with `{script}.py` of vgrpo."
    )
    parts = [
        f"---\n{front_matter(args, base).to_yaml()}\n---",
        f"# {name}, trained with {args.TITLE or f'{script}.py'}",
        " ".join([about, *papers]),
        "The licence of the base model decides about its use; this card states no other.",
        f"```python\n{loading(base, lora=args.lora_rank > 0)}\n{noise_levels(base, args)}\n```",
        reward_words(args, rows),
        "All other settings are the script's defaults for this model:",
        f"    {shlex.join(command(script, args))}",
        *[f"![{picture}]({picture})" for picture in pictures],
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(args: Args, base: Base) -> ModelCardData:
    """Return the metadata that the hub reads. A licence is left out: nobody asked for one."""
    tags = ["vgrpo", "grpo", "reinforcement-learning"]
    if args.lora_rank:
        tags.append("lora")
    tags += [f"arxiv:{paper}" for paper in args.ARXIV]
    data = ModelCardData(library_name="diffusers", pipeline_tag=base.task, tags=tags)
    if base.hub_id:
        data["base_model"] = base.hub_id
        data["base_model_relation"] = "adapter" if args.lora_rank else "finetune"
    return data


def loading(base: Base, lora: bool) -> str:
    """Return Python code that loads the export in plain diffusers."""
    library = "worlds.points" if base.pipeline == "PointsPipeline" else "diffusers"
    start = f"from {library} import {base.pipeline}\n\npipe = {base.pipeline}.from_pretrained"
    if not lora:
        return f'{start}("this repository")'
    lines = [
        f'{start}("{base.hub_id or _public(base.source)}")',
        'pipe.load_lora_weights("this repository")',
    ]
    if base.two_experts:
        # diffusers finds a local file at the top before it looks at a subfolder
        lines += [
            'pipe.load_lora_weights("this repository", load_into_transformer_2=True,',
            '    weight_name="transformer_2/pytorch_lora_weights.safetensors")',
        ]
    return "\n".join(lines)


def noise_levels(base: Base, args: Args) -> str:
    """Return Python code with which the pipeline samples at the noise levels of the training."""
    steps, shift = args.sampling_steps, args.shift
    words = f"# noise levels of the training: pipe(..., num_inference_steps={steps}"
    if base.pipeline == "FluxKontextPipeline" and args.height and args.width:
        # otherwise it samples an area of 1024x1024
        words += f", max_area={args.height * args.width}, _auto_resize=False"
    if base.pipeline == "StableDiffusionPipeline":
        name, scheduler = "DDIMScheduler", "DDIMScheduler.from_config(pipe.scheduler.config)"
    elif shift == "scheduler" or base.pipeline == "PointsPipeline":
        return f"{words})"
    elif base.pipeline.startswith("Wan"):  # no sigmas; off by 0.001 * shift at most
        name = "UniPCMultistepScheduler"
        settings = f'prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift={shift:g}'
        scheduler = f"{name}({settings})"
    else:
        name = "FlowMatchEulerDiscreteScheduler"
        scheduler = f"{name}(shift={shift:g})"
        if base.pipeline == "StableDiffusion3Pipeline":
            words += f", sigmas=numpy.linspace(1, 1 / {steps}, {steps})"
    return f"{words})\nfrom diffusers import {name}\n\npipe.scheduler = {scheduler}"


def reward_words(args: Args, rows: list[dict[str, Any]]) -> str:
    """Return the names of the rewards, and how the held-out reward changed."""
    words = f"Rewards: {', '.join(f'`{name}`' for name in args.reward)}."
    values = [row["eval_reward"] for row in rows if isinstance(row.get("eval_reward"), float)]
    if len(values) > 1:
        change = f"{values[0]:.4g} -> {values[-1]:.4g}"
        words += f" Held-out reward over {args.steps} steps: {change}, noise-free samples."
    return words


def command(script: str, args: Args) -> list[str]:
    """Return the shortest command line that gives these settings; paths lose their folders."""
    # a variant and a LoRA have defaults of their own
    own = {name: getattr(args, name) for name in ("variant",) if hasattr(args, name)}
    usual = defaults(type(args), args.model, **own)
    same_rank = defaults(type(args), args.model, lora_rank=args.lora_rank, **own)
    usual.learning_rate = same_rank.learning_rate
    words = [f"{script}.py", "--model", _public(args.model)]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = field.default if field.name in own else getattr(usual, field.name)
        if field.name in LEFT_OUT or value == default:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            words += [f"--{name}", *map(_public, value)]
        else:
            words += [f"--{name}", _public(value)]
    return words


def _public(value: float | str) -> str:
    """Return a value without the folders of this machine: of an absolute path only its name."""
    name, equals, path = str(value).rpartition("=")
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else str(value)


def _copy_pictures(folder: Path, export: Path) -> list[str]:
    """Copy the curve of the reward and the last samples; return the names of the copies."""
    samples = max(folder.glob("samples/step_*.png"), default=folder / "samples.png")
    names = []
    for name, path in (("reward.png", folder / "reward.png"), ("samples.png", samples)):
        if path.exists():
            shutil.copyfile(path, export / name)
            names.append(name)
    return names
