"""The command line that all scripts share. `python X.py --help` prints it with the defaults of the
chosen --model."""

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import torch

from common import args as flags
from common import errors, models, rewards
from common.args import AnyArgs, check_bounds, check_lists, defaults, flag_of
from common.errors import InputError
from common.models import eight_bits, lora_file
from common.prompts import sets
from common.trainer import compiling, run_folder


class Args(flags.Args):
    """The flags of a training run, with the settings of the named models as their defaults."""

    SETTINGS = models.MODELS


def launch(
    main: Callable[[AnyArgs], Any],
    cls: type[AnyArgs],
    description: str,
    prepare: Callable[[AnyArgs], AnyArgs] | None = None,
) -> None:
    """Parse the command line and call main. An error ends the program with one line.

    prepare: args -> args, called before main.
    """
    args = parse(cls, description)

    def program(args: AnyArgs) -> None:
        main(prepare(args) if prepare else args)

    errors.run(program, args)


def parse(
    cls: type[AnyArgs],
    description: str,
    default: Callable[[list[str]], AnyArgs] | None = None,
) -> AnyArgs:
    """Return the settings that the command line gives; wrong words end the program with code 2.

    The defaults are those of --model; with --resume the settings of that run; or what `default`
    makes of the words. A lone --resume means `--resume latest`. --list-models prints a table and
    ends the program.
    """
    import tyro

    with errors.one_line():
        argv = at_home(sys.argv[1:])
        if "--list-models" in argv:
            variant = given(argv, "--variant")
            table = {name: flags.settings_of(cls, name, variant) for name in cls.SETTINGS}
            print(models.table(table))
            sys.exit()
        argv = _with_latest(argv)
        _check_words(cls, argv)
        preset = default(argv) if default else _defaults_of(cls, argv)
        resume, output = given(argv, "--resume"), given(argv, "--output")
        if resume and hasattr(preset, "resume"):  # evaluate.py has no --resume, as tyro reports
            preset = run_folder.inherit(preset, resume=resume, output=output or "")
        found = tyro.cli(_grouped(cls, preset), args=argv, description=description)
        values = {}
        for name, value in vars(found).items():
            values.update(vars(value) if isinstance(value, Group) else {name: value})
        return cls(**values)


def at_home(argv: list[str]) -> list[str]:
    """Return the words of a command line with ~ in full, also after an equals sign.

    A shell leaves --output=~/runs and hpsv2=~/weights.pt as they are. Raises InputError for a user
    who has no home here.
    """
    home = re.compile(r"(?<![^=])~[^/=]*(?=/|$)")  # (?<![^=]): at the start, or after an =
    words = [home.sub(lambda found: os.path.expanduser(found[0]), word) for word in argv]
    for word in words:
        if found := home.search(word):
            raise InputError(f"{word:.80}: {found[0]} is no user's folder. Write the path in full.")
    return words


def _with_latest(argv: list[str]) -> list[str]:
    for i, word in enumerate(argv):
        if word == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            return [*argv[: i + 1], "latest", *argv[i + 1 :]]
    return argv


def _defaults_of(cls: type[AnyArgs], argv: list[str]) -> AnyArgs:
    values = {}
    model, rank = given(argv, "--model"), given(argv, "--lora-rank")
    variant = given(argv, "--variant")
    if model is not None:
        values["model"] = model
    if variant in cls.VARIANTS:  # the parser refuses anything else
        values["variant"] = variant
    if rank is not None and rank.isdecimal():  # the parser refuses anything else
        values["lora_rank"] = int(rank)  # a LoRA has a learning rate of its own
    path = given(argv, "--init-lora")
    if path:
        with contextlib.suppress(InputError):  # `check` reports it
            file_rank, values["lora_alpha"] = lora_file.rank_and_alpha(path)
            values.setdefault("lora_rank", file_rank)
    return defaults(cls, **values)


def given(argv: list[str], flag: str) -> str | None:
    """Return the value that a flag was given last; None if it was not given."""
    value = None
    for word, following in zip(argv, [*argv[1:], None]):
        name, equals, own = word.partition("=")
        if name.replace("_", "-") == flag:
            value = own if equals else following
    return value


# --- What tyro prints ---


class Group:
    """Flags that --help prints under one title."""


def _grouped(cls: type[AnyArgs], default: AnyArgs) -> type:
    """Return cls for tyro, with the values of `default`: the script's own flags first, then a Group
    for each class of common/args.py that it derives from."""
    from typing_extensions import Doc
    from tyro.conf import OmitArgPrefixes

    hints = get_type_hints(cls, include_extras=True)
    parts = [part for part in reversed(cls.__mro__[1:]) if inspect.get_annotations(part)]

    def fields(part: type) -> list[tuple[str, Any, Any]]:
        docs = _docs(part)
        names = inspect.get_annotations(part)
        return [(n, Annotated[hints[n], Doc(docs[n])], getattr(default, n)) for n in names]

    nested = []
    for part in parts:
        group = dataclasses.make_dataclass(part.__name__, fields(part), bases=(Group,))
        group.__doc__ = part.__doc__
        field = dataclasses.field(default_factory=group)
        nested.append((part.__name__.lower(), OmitArgPrefixes[group], field))
    return dataclasses.make_dataclass("Args", fields(cls) + nested)


def _docs(cls: type) -> dict[str, str]:
    """Return {field: the string below it} of a class."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    docs = {}
    for field, string in zip(node.body, node.body[1:]):
        if isinstance(field, ast.AnnAssign):
            docs[field.target.id] = " ".join(string.value.value.split())
    return docs


# --- Checks before anything is loaded ---


def _check_words(cls: type[AnyArgs], argv: list[str]) -> None:
    """Raise InputError for abbreviations like --lr, for words longer than any path, and for a list
    given twice."""
    names = [field.name for field in dataclasses.fields(cls)]
    for word in argv:
        if len(word) > 4096:
            raise InputError(f"{word[:40]}...: {len(word)} characters. No setting is so long.")
        short = word.partition("=")[0].removeprefix("--")
        meant = [n for n in names if "_" in n and short == "".join(p[0] for p in n.split("_"))]
        if word.startswith("--") and meant and short not in names:
            flags = " or ".join(map(flag_of, meant))
            raise InputError(f"--{short}: there is no such flag. Did you mean {flags}?")
    check_lists(cls, argv)


def check(args: flags.Args) -> None:
    """Raise InputError for the first setting that makes no sense.

    The network is asked only for a hub id as --model or --source, and for --push-to-hub.
    """
    check_bounds(args)
    _check_groups(args)
    _check_noisy_steps(args)
    for spec in args.watch:
        if rewards.split(spec)[2] is not None:
            raise InputError(f"--watch {spec}: it is not trained on. Leave the weight out.")
    if args.reward_units == "spread" and args.aggregate == "advantages":
        raise InputError("--reward-units spread: --aggregate advantages does that. Leave it out.")
    if args.sde in ("ddim", "cps") and args.noise_level > 1:
        raise InputError(
            f"--noise-level {args.noise_level:g}: must be at most 1 with --sde {args.sde}."
        )
    if args.lora_targets and not args.lora_rank:
        raise InputError("--lora-targets: needs --lora-rank above 0.")
    if args.init_lora:
        _check_init_lora(args)
    if args.lora_alpha and not args.lora_rank:
        raise InputError(f"--lora-alpha {args.lora_alpha:g}: needs --lora-rank above 0.")
    if args.frozen_8bit:
        _check_frozen_8bit(args)
    if args.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError("--tracker wandb: the package is missing. pip install wandb.")
    compiling.check_attention(args)
    if args.compile:
        compiling.check(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.source or args.model not in models.MODELS:
        models.family_of(args.model, args.source)  # a wrong model would lack the next two as well
    if sets.is_benchmark(args.prompts):
        raise InputError(
            f"--prompts {args.prompts}: a benchmark's prompts are for --eval-prompts. Train on "
            "dancegrpo:images, hpdv2, dancegrpo:videos or a file."
        )
    for name in ("reward", "prompts"):
        if not getattr(args, name):
            raise InputError(f"--{name}: --model {args.model} has no default. Name one.")
    if args.push_to_hub:
        from common import hub

        hub.check_push(args.push_to_hub)


def _check_groups(args: flags.Args) -> None:
    if args.best_of % 2 or args.best_of > args.group_size:
        raise InputError(
            f"--best-of {args.best_of}: must be even and at most --group-size {args.group_size}."
        )
    trained = args.best_of or args.group_size
    if args.minibatches > trained:
        raise InputError(
            f"--minibatches {args.minibatches}: must be at most {trained}, the samples of a group "
            "that are trained on."
        )


def _check_init_lora(args: flags.Args) -> None:
    rank, alpha = lora_file.rank_and_alpha(args.init_lora)
    if not args.lora_rank:
        raise InputError(
            "--lora-rank 0: --init-lora trains a LoRA. To train all weights, merge it first: "
            f'pipe.load_lora_weights("{args.init_lora}"), pipe.fuse_lora(), '
            "pipe.unload_lora_weights(), pipe.save_pretrained(FOLDER); then --model FOLDER."
        )
    if args.lora_rank != rank:
        raise InputError(
            f"--lora-rank {args.lora_rank}: the LoRA {args.init_lora} has rank {rank}. Leave "
            "--lora-rank out."
        )
    if args.lora_settings()["alpha"] != alpha:
        raise InputError(
            f"--lora-alpha {args.lora_alpha:g}: the LoRA {args.init_lora} has alpha {alpha:g}. "
            "Leave --lora-alpha out."
        )
    if args.lora_targets:
        raise InputError(
            f"--lora-targets: the layers of the LoRA {args.init_lora} are trained. Leave it out."
        )


def _check_frozen_8bit(args: flags.Args) -> None:
    if not args.lora_rank:
        raise InputError("--frozen-8bit: needs --lora-rank above 0; trained weights are float32.")
    if not args.gradient_checkpointing:
        raise InputError(
            "--frozen-8bit: without --gradient-checkpointing all weights would be kept in 16 bits "
            "for the backward pass. Add it."
        )
    if args.compile:
        raise InputError("--frozen-8bit: blocks in 8 bits are not compiled. Leave --compile out.")
    eight_bits.check()


def _check_noisy_steps(args: flags.Args) -> None:
    most = args.sampling_steps - 1
    for flag, number in (("--sde-steps", args.sde_steps), ("--sde-window", args.sde_window)):
        if number > most:
            raise InputError(
                f"{flag} {number}: must be at most {most}; the last of {args.sampling_steps} steps "
                "has no noise."
            )
    if args.sde_window > (args.sde_steps or most):
        raise InputError(
            f"--sde-window {args.sde_window}: must be at most --sde-steps {args.sde_steps}."
        )
