"""The model card of an export, as the hub shows it."""

import ast
import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import cli, errors, models
from common.args import Args
from common.errors import RunError
from common.trainer.run_folder import rows_before, write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from common.models.family import Family
    from common.trainer.runtime import Runtime
ROOT = Path(__file__).resolve().parents[2]
OWN = (
    "model",
    "output",
    "resume",
    "push_to_hub",
    "tracker",
    "judge_url",
)  # told elsewhere, or of this machine
WEB = "https://arxiv.org/abs/"


def leave(run: "Runtime") -> None:
    """All processes together, at the end of a run: writes the cards of its exports; --push-to-hub
    sends export/ there. Raises RunError."""
    repository, reason = run.args.push_to_hub, ""
    if run.is_main:
        try:
            write(run.output, run.asked)
            if repository:
                from common import hub  # and with it its client

                run.print(f"pushed to {hub.push(repository, run.output / 'export')}")
        except Exception as error:  # a full disk; the client's, the network's
            later = (
                f"; push it later: `hf upload {repository} {run.output}/export`"
                if repository
                else ""
            )
            reason = f"the run is finished and exported, but not all of it is taken away: {errors.text(error)}{later}"
    if reason := run.first(reason):
        raise RunError(reason)


def write(run: Path, args: Args) -> None:
    """README.md and its pictures into the exports of a run's folder, from what is in the folder.
    Raises OSError."""
    config = json.loads((run / "config.json").read_text())
    rows, family = (
        rows_before(run / "metrics.jsonl", 10**12),
        models.family_of(args.model, args.source),
    )
    for folder in (run / name for name in ("export", "export_ema")):
        if folder.is_dir():
            shown = _pictures(run, folder)
            write_text(
                folder / "README.md",
                card(config, args, family, rows, shown, averaged=folder.name == "export_ema"),
            )


def card(
    config: dict[str, Any],
    args: Args,
    family: "type[Family]",
    rows: list[dict[str, Any]],
    shown: list[str],
    averaged: bool = False,
) -> str:
    """The text, from a run's config.json and the rows of its metrics.jsonl: front matter, method
    and paper, how to load it, held-out reward, settings, and the pictures of the names `shown`;
    `averaged`: of the moving average's export."""
    script = config["script"]
    method, papers = _method(script)
    what = f"A LoRA (rank {args.lora_rank}) for" if args.lora_rank else "All weights of"
    parts = [
        f"---\n{front_matter(args, family.task(), papers).to_yaml()}\n---",
        f"# {_called(args.model)}, trained with {method}",
        f"{what} "
        f"`{_called(args.source or args.model)}`{', the moving average over the training' * averaged}, by "
        f"reinforcement learning: `{script}.py` of vgrpo. "
        + " ".join(f"Paper: [arXiv {paper}]({WEB}{paper})." for paper in papers),
        "It is for the uses that the base model's licence allows; this card states no other.",
        f"```python\n{loading(args, family)}\n```",
        reward_words(args, rows),
        "Everything else is the script's default for this model:\n\n    "
        f"{shlex.join(command(script, args))}",
        *(f"![{name}]({name})" for name in shown),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(args: Args, task: str, papers: list[str]) -> "ModelCardData":
    """What the hub reads, of a task in its words and papers by their arXiv ids. Of a base model
    that is no hub id it says nothing, nor of a licence, which it cannot know."""
    from huggingface_hub import ModelCardData

    known = {"base_model": _hub_id(args)} if _hub_id(args) else {}
    relation = {"base_model_relation": "adapter" if args.lora_rank else "finetune"} if known else {}
    tags = ["vgrpo", "grpo", "reinforcement-learning", *["lora"] * bool(args.lora_rank)]
    tags += [f"arxiv:{paper}" for paper in papers]
    return ModelCardData(
        **known, **relation, library_name="diffusers", pipeline_tag=task, tags=tags
    )


def loading(args: Args, family: "type[Family]") -> str:
    """Python that loads the export in plain diffusers."""
    name, base = family.pipeline.__name__, _hub_id(args) or _called(args.source or args.model)
    lines = [f"from diffusers import {name}", ""]
    if not args.lora_rank:
        return "\n".join([*lines, f'pipe = {name}.from_pretrained("this repository")'])
    lines += [
        f'pipe = {name}.from_pretrained("{base}")',
        'pipe.load_lora_weights("this repository")',
    ]
    if "transformer_2" in family.trained:
        lines.append("# of a model with two experts also:")
        lines.append(
            '# pipe.load_lora_weights("this repository", subfolder="transformer_2", '
            "load_into_transformer_2=True)"
        )
    return "\n".join(lines)


def reward_words(args: Args, rows: list[dict[str, Any]]) -> str:
    """What the training did to the held-out reward, by the rows of metrics.jsonl."""
    evaluations = [row["eval_reward"] for row in rows if isinstance(row.get("eval_reward"), float)]
    said = f"Rewards: {', '.join(f'`{name}`' for name in args.reward)}."
    if len(evaluations) > 1:
        ends = f"{evaluations[0]:.4g} -> {evaluations[-1]:.4g}"
        said += f" Held-out reward over {args.steps} steps: {ends}, noise-free samples."
    return said


def command(script: str, args: Args) -> list[str]:
    """The words of the command line that says in what the settings differ from the script's
    defaults for the model; of paths only the last name."""
    default, words = (
        cli.defaults(type(args), args.model),
        [f"{script}.py", "--model", _called(args.model)],
    )
    default.learning_rate = cli.defaults(
        type(args), args.model, lora_rank=args.lora_rank
    ).learning_rate
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in OWN or value == getattr(default, field.name):
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(_called, value if isinstance(value, tuple) else (value,))]
    return words


def _called(value: float | str) -> str:
    """A setting as others may know it: of a path of this machine its last name."""
    name, equals, path = str(value).rpartition("=")
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else str(value)


def _hub_id(args: Args) -> str:
    """Of a model that comes from the hub, else ""."""
    source = models.source_of(args.model, args.source)
    return source if source.count("/") == 1 and not Path(source).exists() else ""


def _method(script: str) -> tuple[str, list[str]]:
    """(what a script's first words call its method, the arXiv ids in its first paragraph)"""
    path = ROOT / f"{script}.py"
    about = (
        ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
    )
    about = about or f"{script}.py"
    papers = re.findall(r"[0-9]{4}\.[0-9]{5}", about.partition("\n\n")[0])
    name = re.split(r": |\. |, whose |\n", about)[0]
    return re.sub(r" ?\(arXiv [0-9.]+\)|, arXiv [0-9.]+", "", name), list(dict.fromkeys(papers))


def _pictures(run: Path, folder: Path) -> list[str]:
    """Copies the reward's curve and the last samples; their names."""
    last = max(run.glob("samples/step_*.png"), default=None)
    sources = {"reward.png": run / "reward.png", "samples.png": last}
    there = {name: path for name, path in sources.items() if path and path.exists()}
    for name, path in there.items():
        shutil.copyfile(path, folder / name)
    return list(there)
