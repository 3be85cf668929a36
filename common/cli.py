"""The command line that all scripts share. `python X.py --help` prints it with the defaults of the
chosen --model."""

import ast
import dataclasses
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from common import errors, models, rewards
from common.args import Above, Args, From, Model, Scored, Start
from common.errors import InputError
from common.prompts import sets
from common.trainer import run_folder

__all__ = [
    "Above",
    "Args",
    "From",
    "Scored",
    "Start",
    "check",
    "defaults",
    "of_model",
    "of_rewards",
    "parse",
]
AnyArgs = TypeVar("AnyArgs", bound=Args | Scored)  # a script's own class of them


def settings(cls: type[AnyArgs], model: str) -> dict[str, Any]:
    """A script's settings for a named model: the model's own, and over them those of cls.SETTINGS
    {model: settings}."""
    return {**models.settings(model), **cls.SETTINGS.get(model, {})}


def defaults(cls: type[AnyArgs], model: str = "tiny-flux", **values) -> AnyArgs:
    """cls with its settings for a named model, `values` on top. A LoRA has a learning rate of its
    own."""
    fields, table = {f.name for f in dataclasses.fields(cls)}, settings(cls, model)
    named = {name: value for name, value in table.items() if name in fields - {"source"}}
    chosen = {"model": model, **named, **values}
    if chosen.get("lora_rank") and "learning_rate" not in values:
        chosen["learning_rate"] = table.get("lora_learning_rate", models.LORA_LEARNING_RATE)
    return cls(**chosen)


def keeps_initial(args: Args) -> bool:
    """Whether a run keeps the weights of its start beside those that it trains, which a LoRA does
    without a copy."""
    marks = [
        (name, mark)
        for name, hint in get_type_hints(type(args), include_extras=True).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, Start)
    ]
    return bool(args.kl_coef) or any(getattr(args, name) == mark.value for name, mark in marks)


def of_model(args: Model) -> dict[str, Any]:
    """What models.load takes besides name, dtype and prompts."""
    names = ("source", "height", "width", "frames", "guidance", "guidance_2", "batched_guidance")
    settings = {
        name: getattr(args, name) for name in (*names, "offload_encoders", "trust_remote_code")
    }
    return settings | {"decode_batch": args.decode_batch or rows_of(args.micro_batch)}


def rows_of(micro_batch: int | Literal["auto"]) -> int:
    """Rows of a pass where nothing has been counted: --micro-batch auto is 1 then."""
    return 1 if micro_batch == "auto" else micro_batch


def of_rewards(args: Args | Scored) -> dict[str, Any]:
    """What rewards.load takes besides names and prompts. Raises InputError, as models.family_of
    does."""
    names = ("reward_path", "reward_batch", "reward_frames", "fps")
    judge = {
        name[len("judge_") :]: value
        for name, value in vars(args).items()
        if name.startswith("judge_")
    }
    return {
        **{name: getattr(args, name) for name in names},
        "judge": {**judge, "trusted": args.trust_remote_code},
        "clips": models.family_of(args.model, args.source).video,
    }


def parse(
    cls: type[AnyArgs], description: str, default: Callable[[list[str]], AnyArgs] | None = None
) -> AnyArgs:
    """The command line -> cls. The defaults are those of its --model, with --resume the settings of
    that run, or what `default` makes of the words; a lone `--resume` means `--resume latest`.
    `--list-models` prints the table and ends the program; wrong words end it with exit code 2."""
    import tyro

    argv = sys.argv[1:]
    with errors.one_line():
        if "--list-models" in argv:
            print(models.table({name: settings(cls, name) for name in models.MODELS}))
            sys.exit()
        for i, word in enumerate(argv):
            if word == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
                argv = [*argv[: i + 1], "latest", *argv[i + 1 :]]
        _check_words(cls, argv)
        model, resume, output, rank = (
            given(argv, f) for f in ("--model", "--resume", "--output", "--lora-rank")
        )
        lora = (
            {"lora_rank": int(rank[0])} if rank and rank[0].isdecimal() else {}
        )  # what else, the parser refuses
        preset = default(argv) if default else defaults(cls, *model, **lora)
        if resume and hasattr(preset, "resume"):  # evaluate.py's has none, as the parser says
            preset = run_folder.inherit(preset, *resume, *output or [""])
        found = tyro.cli(_grouped(cls, preset), args=argv, description=description)
        values = [
            vars(value) if isinstance(value, Group) else {name: value}
            for name, value in vars(found).items()
        ]
        return cls(**{name: value for part in values for name, value in part.items()})


class Group:
    """Flags that --help prints under one title."""


def _grouped(cls: type[AnyArgs], default: AnyArgs) -> type:
    """cls as tyro shall print it, with the values of `default`: the script's own flags, then a
    Group of them for each class of common/args.py that it derives from."""
    from typing_extensions import Doc
    from tyro.conf import OmitArgPrefixes

    hints, groups = (
        get_type_hints(cls, include_extras=True),
        [c for c in reversed(cls.__mro__[1:]) if _own(c)],
    )

    def fields(part: type) -> list[tuple[str, Any, Any]]:
        said = _said(part)
        return [
            (name, Annotated[hints[name], Doc(said[name])], getattr(default, name))
            for name in _own(part)
        ]

    made = {
        c.__name__.lower(): dataclasses.make_dataclass(c.__name__, fields(c), bases=(Group,))
        for c in groups
    }
    for group, c in zip(made.values(), groups):
        group.__doc__ = c.__doc__
    nested = [
        (n, OmitArgPrefixes[group], dataclasses.field(default_factory=group))
        for n, group in made.items()
    ]
    return dataclasses.make_dataclass("Args", fields(cls) + nested)


def _own(cls: type) -> dict[str, Any]:
    return inspect.get_annotations(cls)


def _said(cls: type) -> dict[str, str]:
    """{field: what the string under it says} of a class."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    pairs = [pair for pair in zip(node.body, node.body[1:]) if isinstance(pair[0], ast.AnnAssign)]
    return {field.target.id: " ".join(string.value.value.split()) for field, string in pairs}


def given(argv: list[str], flag: str) -> list[str]:
    """[what a flag was last given], [] if it was not."""
    pairs = [
        word.split("=", 1) if "=" in word else (word, next_one)
        for word, next_one in zip(argv, [*argv[1:], None])
    ]
    return [value for word, value in pairs if word.replace("_", "-") == flag and value is not None][
        -1:
    ]


def _check_words(cls: type[AnyArgs], argv: list[str]) -> None:
    """Raises InputError for --lr and the like, which look like no flag to tyro: it suggests by the
    letters; and for words longer than any path, which it would repeat."""
    names = [f.name for f in dataclasses.fields(cls)]
    for word in argv:
        if len(word) > 4096:
            raise InputError(
                f"{word[:40]}...: a word of {len(word)} letters; no setting is so long"
            )
        short = word.partition("=")[0].removeprefix("--")
        meant = [
            n for n in names if "_" in n and short == "".join(part[0] for part in n.split("_"))
        ]
        if word.startswith("--") and meant and short not in names:
            raise InputError(
                f"there is no --{short}; did you mean {' or '.join(map(_flag, meant))}?"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_value(flag: str, values: float | str | tuple, bounds: list[From]) -> None:
    """Raises InputError for a setting, or one of several, that is out of its bounds, or that no
    file could hold."""
    for value in values if isinstance(values, tuple) else (values,):
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise InputError(f"{flag} {value!a:.300} is no UTF-8: choose a name that is") from None
        for bound in () if isinstance(value, str) else bounds:
            if value not in bound:
                raise InputError(f"{flag} {str(value):.40}: must be {bound}")


def check_bounds(args: Any) -> None:
    """Raises InputError for the first setting, of any dataclass of them, that is out of its
    bounds."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        bounds = [bound for bound in getattr(hint, "__metadata__", ()) if isinstance(bound, From)]
        _check_value(_flag(name), getattr(args, name), bounds)


def check(args: Args) -> None:
    """Raises InputError for the first setting that makes no sense; only a hub id as --model or --source, and
    --push-to-hub, ask the network."""
    check_bounds(args)
    if args.best_of % 2 or args.best_of > args.group_size:
        raise InputError(
            f"--best-of {args.best_of}: must be even and at most --group-size {args.group_size}"
        )
    if args.minibatches > (args.best_of or args.group_size):
        raise InputError(
            f"--minibatches {args.minibatches}: each takes some of the "
            f"{args.best_of or args.group_size} samples of "
            "every group that are trained on"
        )
    can_be_noisy = args.sampling_steps - 1
    for flag, number in (("--sde-steps", args.sde_steps), ("--sde-window", args.sde_window)):
        if number > can_be_noisy:
            raise InputError(
                f"{flag} {number}: only {can_be_noisy} of {args.sampling_steps} steps can be "
                "noisy, the last never is"
            )
    if args.sde_window > (args.sde_steps or can_be_noisy):
        raise InputError(
            f"--sde-window {args.sde_window}: longer than the --sde-steps {args.sde_steps} it "
            "lies in"
        )
    for spec in args.watch:
        if rewards.split(spec)[2] is not None:
            raise InputError(
                f"--watch {spec}: nothing is trained on it, so it has no weight; leave out what "
                "follows ="
            )
    if args.reward_units == "spread" and args.aggregate == "advantages":
        raise InputError(
            "--reward-units spread: --aggregate advantages has each reward in units of its "
            "spread already"
        )
    if args.sde == "ddim" and args.noise_level > 1:
        raise InputError(f"--noise-level {args.noise_level:g}: at most 1 with --sde ddim")
    if args.lora_targets and not args.lora_rank:
        raise InputError("--lora-targets belongs to --lora-rank above 0")
    if args.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "--tracker wandb: the package is missing; pip install wandb, or use --tracker "
            "tensorboard"
        )
    if args.source or args.model not in models.MODELS:
        models.family_of(args.model, args.source)  # a wrong model would lack the next two as well
    if sets.is_benchmark(args.prompts):
        raise InputError(
            f"--prompts {args.prompts}: these are a benchmark's, for --eval-prompts; train on "
            "dancegrpo:images, hpdv2, "
            "dancegrpo:videos or a file"
        )
    if args.push_to_hub:
        from common import hub  # and with it its client

        hub.check_push(args.push_to_hub)
    for name in ("reward", "prompts"):
        if not getattr(args, name):
            raise InputError(f"--{name} is missing: --model {args.model} has no default for it")
