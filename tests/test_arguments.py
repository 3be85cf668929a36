"""The command line: defaults of the named models, every bad value refused in one line, every flag
read somewhere."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import bpgo
import evaluate
import grpo_base
import self_paced
import slas
from common import cli, models, rewards
from common.args import Above, From, check_lists, defaults
from common.cli import Args, check
from common.errors import InputError
from evaluation import bias
from lab import gains, study

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {field.name: field.default for field in dataclasses.fields(Args)}
NUMBERS = [name for name, default in FIELDS.items() if type(default) in (int, float)]
NAMED = list(models.MODELS)
SCRIPTS = {"grpo_base": grpo_base, "bpgo": bpgo, "slas": slas, "self_paced": self_paced}
PAPERS = {  # script: the models that its paper trains
    "grpo_base": {"flux", "sd1.4", "sd3.5-medium", "qwen-image", "hunyuan"},
    "bpgo": {"flux", "wan2.1-1.3b", "wan2.2-i2v"},
    "slas": {"flux", "sd1.4"},
    "self_paced": {"wan2.1-1.3b", "wan2.1-14b", "hunyuan"},
}


def refused(model="tiny-flux", **values):
    """The one line with which check() refuses a model with these settings."""
    with pytest.raises(InputError) as error:
        check(defaults(Args, model, **values))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def no_hub(monkeypatch):
    """check() asks the model's folder or the hub what the model is; here it asks nobody."""
    monkeypatch.setattr(models, "family_of", lambda *_: None)


def reward_class(name):
    module, _, attribute = rewards.REWARDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def flag(name):
    return "--" + name.replace("_", "-")


# --- A flag given twice ---


@pytest.mark.parametrize(
    "script, words, said",
    [
        (grpo_base, "--reward verifier --steps 1 --reward jpeg=2", "--reward verifier jpeg=2"),
        (grpo_base, "--reward=verifier --reward=jpeg", "--reward verifier jpeg"),
        (bpgo, "--watch jpeg --watch jpeg", "--watch jpeg jpeg"),
        (slas, "--reward_path clip=a b=c --reward-path d=e", "--reward-path clip=a b=c d=e"),
        (self_paced, "--thresholds .5 -1 --seed 1 --thresholds .2", "--thresholds .5 -1 .2"),
        (self_paced, "--reward a --stage-range 0 1 --stage-range 0 2", "--stage-range 0 1 0 2"),
        (evaluate, "RUN --reward verifier --reward jpeg", "--reward verifier jpeg"),
    ],
)
def test_a_list_given_twice_is_refused_in_one_line(script, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.parse(script.Args, "")
    name = said.partition(" ")[0]
    expected = f"error: {name}: is given twice. Write all values after one, or remove one: {said}\n"
    assert ended.value.code == 2 and capsys.readouterr().err == expected


@pytest.mark.parametrize("module", [bias, study, gains], ids=lambda module: module.__name__)
def test_the_commands_with_parsers_of_their_own_refuse_it_too(module):
    field = next(f.name for f in dataclasses.fields(module.Args) if isinstance(f.default, tuple))
    with pytest.raises(InputError, match=f"{flag(field)}: is given twice"):
        check_lists(module.Args, [flag(field), "1", "2", flag(field), "3"])
    assert "check_lists(Args, sys.argv[1:])" in Path(module.__file__).read_text()


def test_of_a_single_value_given_twice_the_last_counts(monkeypatch):
    words = "--steps 3 --reward verifier jpeg --steps 5 --model tiny-wan --model tiny-flux"
    monkeypatch.setattr(sys, "argv", ["x.py", *words.split()])
    args = cli.parse(grpo_base.Args, "")
    assert (args.steps, args.model, args.reward) == (5, "tiny-flux", ("verifier", "jpeg"))


# --- Defaults ---


@pytest.mark.parametrize("name", NAMED)
def test_defaults_are_those_of_the_table(name):
    table, args = models.settings(name), defaults(Args, name)
    assert args.model == name
    rate = "lora_learning_rate" if args.lora_rank else "learning_rate"
    for field, default in FIELDS.items():
        if field not in ("model", "source"):
            assert getattr(args, field) == table.get(
                rate if field == "learning_rate" else field, default
            ), field


@pytest.mark.parametrize("name", NAMED)
def test_the_table_has_no_setting_that_is_no_flag(name):
    assert models.settings(name).keys() - FIELDS.keys() == {"pipeline", "lora_learning_rate"}


def test_tiny_flux_needs_no_flags():
    args = defaults(Args, "tiny-flux")
    assert args.reward == ("verifier",) and (args.height, args.width) == (32, 32)
    assert Path(args.prompts).is_file() and Path(args.eval_prompts).is_file()
    check(args)


def test_a_rollout_has_an_update_for_every_four_samples_of_a_group():
    """As the papers' code accumulates gradients."""
    for name in ("flux", "wan2.1-1.3b", "wan2.1-14b", "wan2.2-i2v", "hunyuan"):
        args = defaults(Args, name)
        assert args.minibatches == (args.best_of or args.group_size) / 4


def test_values_win_over_the_table():
    args = defaults(Args, "tiny-flux", learning_rate=0.5, prompts="mine.txt")
    assert (args.learning_rate, args.prompts) == (0.5, "mine.txt")
    assert args.clip_range == models.settings("tiny-flux")["clip_range"]


def test_a_folder_takes_the_plain_defaults():
    assert defaults(Args, "some/folder") == Args(model="some/folder")


@pytest.mark.parametrize("name", [*NAMED, "some/folder"])
def test_every_model_is_valid_with_prompts_and_reward(no_hub, name):
    check(defaults(Args, name, prompts="prompts.txt", reward=("jpeg",)))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_all_settings_for_every_named_model(no_hub, script, name):
    cls = SCRIPTS[script].Args
    args = defaults(cls, name)
    check(args)
    beside = cls.SETTINGS[name].keys() - {f.name for f in dataclasses.fields(cls)}
    assert beside <= {"source", "pipeline", "paper", "lora_learning_rate"}
    scorers = [reward_class(reward) for reward in rewards.parse(args.reward)]
    assert all(
        scorer.video if args.frames else getattr(scorer, "image", True) for scorer in scorers
    )
    if script == "self_paced":
        assert len(args.thresholds) == len(scorers)
    if not name.startswith(("tiny", "points")):  # the embedded ones
        assert args.micro_batch == "auto"
        assert args.gradient_checkpointing == (name != "sd1.4")  # its activations fit
        assert args.keep_checkpoints and args.steps >= 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_list_models_says_which_pairs_are_a_papers(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--list-models"])
    with pytest.raises(SystemExit):
        cli.parse(SCRIPTS[script].Args, "about")
    head, *rows = [line.split() for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    assert head[:2] == ["name", "paper"] and len(rows) == len(NAMED)
    assert {name for name, paper, *_ in rows if paper != "-"} == PAPERS[script]
    number = 3 if script == "grpo_base" else 2  # and Flow-GRPO's
    assert len({paper for _, paper, *_ in rows}) == number


# --- Variants ---


def test_a_variant_has_defaults_of_its_own(monkeypatch):
    assert defaults(bpgo.Args).alpha == 0.5 and defaults(self_paced.Args).alpha == 4.0
    for cls, variant in ((bpgo.Args, "released"), (self_paced.Args, "v4")):
        for model in ("tiny-flux", "flux", "some/folder"):
            assert defaults(cls, model, variant=variant).alpha == 1.0
            assert defaults(cls, model, variant=variant, alpha=0.25).alpha == 0.25
        monkeypatch.setattr(sys, "argv", ["x.py", f"--variant={variant}"])
        assert cli.parse(cls, "about").alpha == 1.0
        monkeypatch.setattr(sys, "argv", ["x.py", "--alpha", "0.25", "--variant", variant])
        assert cli.parse(cls, "about").alpha == 0.25
    wan = defaults(self_paced.Args, "wan2.1-1.3b", variant="v4")
    assert (wan.frames, wan.fps, wan.steps, wan.prompts_per_step) == (81, 16.0, 220, 16)
    assert defaults(self_paced.Args, "wan2.1-1.3b").frames == 53
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["x.py", "--variant", "v2"])
        cli.parse(self_paced.Args, "about")


def test_list_models_has_the_settings_of_the_variant(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["self_paced.py", "--list-models", "--variant", "v4"])
    with pytest.raises(SystemExit):
        cli.parse(self_paced.Args, "about")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "wan2.1-1.3b" in line]
    assert "2511.19356v4" in row and " 81 " in row


# --- Bad values ---


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_may_be_negative_or_not_finite(name, value):
    assert refused(**{name: value}).startswith(f"{flag(name)} {value}: must be ")


POSITIVE = """steps prompts_per_step group_size sampling_steps noise_level shift timestep_fraction
minibatches updates_per_step micro_batch clip_range adv_clip_max learning_rate max_grad_norm"""


@pytest.mark.parametrize("name", POSITIVE.split())
def test_zero_is_refused_where_it_makes_no_sense(name):
    assert refused(**{name: 0}).startswith(f"{flag(name)} 0: must be ")


@pytest.mark.parametrize(
    "name, value",
    [
        ("group_size", 1),  # a group of one has no advantage
        ("sampling_steps", 1),  # the last step is never noisy
        ("sampling_steps", 1001),
        ("timestep_fraction", 1.01),
        ("clip_range", 1.5),
        ("learning_rate", 2.0),
        ("weight_decay", 1.5),
        ("noise_level", 100.0),
        ("lora_rank", 10_000),
        ("seed", 2**32),
        ("height", 10**6),
        ("width", 10**6),
        ("kl_coef", 1e9),
        ("reward_batch", 0),
        ("reward_frames", 0),
        ("best_of", 3),
        ("best_of", 1),
        ("best_of", 14),  # of 12
        ("minibatches", 13),
        ("sde_window", 8),  # of 8 steps, the last of which is never noisy
        ("sde_window", 500),
        ("sde_steps", 8),
    ],
)
def test_values_out_of_range(name, value):
    assert refused(**{name: value}).startswith(f"{flag(name)} {value}: ")


def test_bounds_of_different_kinds_differ():
    """typing caches Annotated by equality: on Python 3.10 a setting got the bound of another
    one."""
    assert From(0, 1) == From(0, 1) != Above(0, 1) != From(0, 1)
    assert 0 in From(0, 1) and 0 not in Above(0, 1)


@pytest.mark.parametrize("name, value", [("prompts", ""), ("reward", ())])
def test_missing_prompts_or_reward(no_hub, name, value):
    line = refused(**{name: value})
    assert line.startswith(f"{flag(name)}: --model tiny-flux has no default")
    given = {"prompts": "prompts.txt", "reward": ("jpeg",), name: value}
    line = refused(model="flux", **given)
    assert line.startswith(f"{flag(name)}: --model flux has no default")


def test_other_weights_than_a_named_models_are_looked_for_first(tmp_path):
    assert refused(model="some/folder", source="a/b").startswith(
        "--source a/b: --model some/folder is not a named model. Give --model a/b instead."
    )
    line = refused(source=str(tmp_path / "none"))
    assert line.startswith(f"model: there is no folder {tmp_path}/none.")
    assert f"{tmp_path} has no model_index.json" in refused(source=str(tmp_path))
    # it would train, with FLUX's size, and 53 frames of it
    other = models.settings("tiny-wan")["source"]
    line = refused(model="flux", prompts="prompts.txt", reward=("jpeg",), source=other)
    assert line.startswith(f"--source {other}: it is a WanPipeline")
    assert f"Give --model {other} alone" in line
    line = refused(source="flux")
    assert line.startswith("--source flux: ") and "Give --model flux alone" in line


@pytest.mark.parametrize("name", [name for name in NAMED if name.startswith("tiny-")])
def test_a_named_models_own_weights_are_of_its_pipeline(name):
    own = models.settings(name)
    assert models.family_of(name).pipeline.__name__ == own["pipeline"]
    assert models.family_of(name, own["source"]) is models.family_of(name)


def test_a_folder_that_is_no_supported_model(tmp_path):
    assert f"{tmp_path} has no model_index.json" in refused(model=str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "ToasterPipeline"}')
    line = refused(model=str(tmp_path))
    assert f"{tmp_path} is a ToasterPipeline. Supported are FluxPipeline" in line


@pytest.mark.parametrize(
    "values",
    [
        dict(best_of=12, group_size=12),
        dict(minibatches=12, group_size=12),
        dict(minibatches=2, best_of=2),
        dict(best_of=2, group_size=2, minibatches=1),
        dict(sde_window=7, sampling_steps=8),
        dict(sde_window=1, sampling_steps=2),
        dict(sde_window=3, sde_steps=3, sampling_steps=4),
        dict(sampling_steps=1000, timestep_fraction=1),
        dict(
            timestep_fraction=1e-3,
            noise_level=1e-6,
            shift=0.5,
            clip_range=1e-8,
            learning_rate=1e-12,
        ),
        dict(
            height=0,
            width=0,
            guidance=0,
            weight_decay=0,
            kl_coef=0,
            lora_rank=0,
            best_of=0,
            sde_window=0,
            seed=0,
        ),
        dict(save_every=0, sample_every=0, eval_every=0, eval_prompts=""),
        dict(steps=1, prompts_per_step=1, micro_batch=1, updates_per_step=1),
    ],
)
def test_values_at_the_edge_are_allowed(values):
    check(defaults(Args, **values))


# --- The command line ---


def parsed(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["grpo_base.py", *argv])
    return cli.parse(Args, "about")


@pytest.mark.parametrize(
    "argv", [["--model", "flux"], ["--model=flux"], ["--model", "tiny-flux", "--model", "flux"]]
)
def test_the_named_model_sets_the_defaults(monkeypatch, argv):
    assert parsed(monkeypatch, *argv) == defaults(Args, "flux")


@pytest.mark.parametrize("name", [*NAMED, "some/folder"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_lora_has_the_models_rate_for_one(script, name):
    cls = SCRIPTS[script].Args
    own = cls.SETTINGS.get(name, {})
    full, lora = own.get("learning_rate", 1e-5), own.get("lora_learning_rate", 1e-4)
    assert lora >= full and (name == "some/folder" or "lora_learning_rate" in models.settings(name))
    assert defaults(cls, name).learning_rate == (lora if own.get("lora_rank") else full)
    assert defaults(cls, name, lora_rank=0).learning_rate == full
    assert defaults(cls, name, lora_rank=8).learning_rate == lora
    assert defaults(cls, name, lora_rank=8, learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize(
    "words, rate",
    [
        ("--model flux", 1e-5),
        ("--model flux --lora-rank 8", 3e-4),
        ("--lora_rank=8 --model=wan2.1-1.3b", 1e-4),
        ("--model flux --lora-rank 8 --learning-rate 0.5", 0.5),
        ("--model some/folder --lora-rank 8", 1e-4),
        ("--model sd3.5-medium", 3e-4),
        ("--model sd3.5-medium --lora-rank 0", 1e-5),
    ],
)
def test_the_command_line_takes_a_loras_rate_where_none_is_given(monkeypatch, words, rate):
    assert parsed(monkeypatch, *words.split()).learning_rate == rate


def test_a_resumed_lora_keeps_its_rate(monkeypatch, tmp_path):
    for run, rate in (("old", 1e-5), ("new", 3e-4)):  # LoRAs once took that of all weights
        (tmp_path / run).mkdir()
        args = defaults(Args, "flux", lora_rank=8, learning_rate=rate)
        (tmp_path / run / "config.json").write_text(
            json.dumps(dataclasses.asdict(args) | {"script": "grpo_base"})
        )
        words = ("--model", "flux", "--lora-rank", "8", "--output", str(tmp_path / run), "--resume")
        assert parsed(monkeypatch, *words).learning_rate == rate
        assert parsed(monkeypatch, *words, "--learning-rate", "0.5").learning_rate == 0.5


def test_a_rank_that_is_no_number_is_the_parsers_to_refuse(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--lora-rank", "many")
    assert "--lora-rank" in capsys.readouterr().err


def test_flags_win_over_the_named_model(monkeypatch):
    args = parsed(
        monkeypatch, "--clip-range", "0.2", "--reward", "verifier", "jpeg=0.5", "--model", "flux"
    )
    assert args == defaults(Args, "flux", clip_range=0.2, reward=("verifier", "jpeg=0.5"))
    assert parsed(monkeypatch) == defaults(Args, "tiny-flux")


@pytest.mark.parametrize(
    "word, frames", [("first", "first"), ("middle", "middle"), ("all", "all"), ("3", 3)]
)
def test_rewards_take_words_and_numbers(monkeypatch, word, frames):
    flags = "--watch verifier jpeg --reward-path clip=a hpsv2=b --reward-frames"
    args = parsed(monkeypatch, *flags.split(), word)
    assert args.watch == ("verifier", "jpeg") and args.reward_path == ("clip=a", "hpsv2=b")
    assert args.reward_frames == frames


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--output=~/runs", "output", "/home/fox/runs"),
        ("--output ~", "output", "/home/fox"),  # in quotes a shell leaves it, too
        ("--prompts=~/a.txt", "prompts", "/home/fox/a.txt"),
        ("--eval-prompts=~/a.csv:text", "eval_prompts", "/home/fox/a.csv:text"),
        ("--eval_prompts=~/a.csv", "eval_prompts", "/home/fox/a.csv"),
        ("--model=~/sd", "model", "/home/fox/sd"),
        ("--source=~/model", "source", "/home/fox/model"),
        ("--judge-model=~/judge", "judge_model", "/home/fox/judge"),
        ("--reward ~/a.py:Mine=2 jpeg", "reward", ("/home/fox/a.py:Mine=2", "jpeg")),
        ("--reward=~/a.py:Mine=2", "reward", ("/home/fox/a.py:Mine=2",)),
        ("--watch=~/a.py:Mine", "watch", ("/home/fox/a.py:Mine",)),
        (
            "--reward-path hpsv2=~/w.pt clip=~/c",
            "reward_path",
            ("hpsv2=/home/fox/w.pt", "clip=/home/fox/c"),
        ),
        ("--reward-path=hpsv2=~/w.pt", "reward_path", ("hpsv2=/home/fox/w.pt",)),
        ("--output=a~/b", "output", "a~/b"),
        ("--output=runs/~/b", "output", "runs/~/b"),
    ],
)
def test_a_path_may_begin_at_home(monkeypatch, words, name, value):
    monkeypatch.setenv("HOME", "/home/fox")
    assert getattr(parsed(monkeypatch, *words.split()), name) == value


def test_a_run_to_resume_may_be_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = dataclasses.asdict(dataclasses.replace(defaults(Args), seed=7))
    run = tmp_path / "runs/a"
    (run / "checkpoints/step_000001").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({**settings, "script": "grpo_base"}))
    args = parsed(monkeypatch, "--resume=~/runs/a/checkpoints/step_000001", "--output=~/runs/b")
    assert args.seed == 7 and args.output == f"{tmp_path}/runs/b"
    assert parsed(monkeypatch, "--resume", "latest", "--output=~/runs/a").seed == 7


@pytest.mark.parametrize(
    "argv, resume",
    [
        ([], ""),
        (["--resume"], "latest"),
        (["--resume", "--seed", "1"], "latest"),
        (["--seed", "1", "--resume"], "latest"),
        (["--resume", "latest"], "latest"),
        (["--resume", "runs/x/checkpoints/step_000020"], "runs/x/checkpoints/step_000020"),
    ],
)
def test_resume_alone_means_latest(monkeypatch, argv, resume):
    args = parsed(monkeypatch, *argv)
    assert args.resume == resume and args.seed == ("--seed" in argv)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_the_methods_flags_first_and_the_judges_last(monkeypatch, capsys, script):
    """All of them, each with what it is, in titled groups in the order of common/args.py."""
    cls = SCRIPTS[script].Args
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit):
        cli.parse(cls, SCRIPTS[script].__doc__)
    _, *parts = re.split(r"^[╭─ ]*((?:[a-z]+ )?options)\b", capsys.readouterr().out, flags=re.M)
    titles, texts = parts[::2], parts[1::2]
    assert titles == [
        "options",
        *(f"{g} options" for g in ("model", "reward", "rollout", "update", "run", "judge")),
    ]
    shown = [re.findall(r"^[│ ] --([a-z][a-z0-9-]*)", text, re.M) for text in texts]
    assert shown[0] == [name.replace("_", "-") for name in inspect.get_annotations(cls)]
    assert all(name.startswith("judge-") for name in shown[-1]) and shown[1][0] == "model"
    named = [name.replace("-", "_") for names in shown for name in names]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(cls))
    assert all(text.count("(default:") == len(names) for text, names in zip(texts, shown))


@pytest.mark.parametrize(
    "argv",
    [
        ["--sde", "euler"],
        ["--tracker", "excel"],
        ["--steps", "many"],
        ["--steps", "1.5"],
        ["--no-such-flag", "1"],
    ],
)
def test_what_is_no_setting_ends_the_program(monkeypatch, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, *argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err


# --- Every flag is read ---


def test_every_setting_that_is_read_is_a_flag():
    """tests/test_house.py has the other direction: every flag is read."""
    read = set()
    for path in [*ROOT.glob("common/**/*.py"), ROOT / "grpo_base.py"]:
        if path.name != "cli.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    owner = node.value  # args.x or self.args.x
                    if getattr(owner, "id", getattr(owner, "attr", "")) == "args":
                        read.add(node.attr)
    constants = {"CURVES", "TITLE", "ARXIV", "model_settings", "lora_settings"}
    assert read and not read - FIELDS.keys() - constants, "no such flag"
