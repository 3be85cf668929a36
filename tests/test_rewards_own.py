"""A reward of one's own from a file, the fields of JSONL that reach it, each reward's share of the
sum, and weights in units of the spread."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from learned import made, score_all

import bpgo
import grpo_base
import self_paced
from common import cli, errors, rewards
from common.errors import InputError
from common.prompts import caption_of, fields_of, read_prompts
from common.rewards import switches, table
from common.trainer import checkpoint_files, run_folder

OWN = '''
import torch

class Long:
    """How many letters a prompt has to show, whatever the image."""
    video, scale, range, fields = False, 0.1, (0.0, None), ("text",)

    def score(self, media, prompts, text):
        assert len(media) == len(prompts) == len(text)
        return torch.tensor([float(len(t)) for t in text]) + media.flatten(1).mean(1)

class Bright:
    video, scale, range = False, 0.01, (0.0, 1.0)

    def score(self, media, prompts):
        return media.flatten(1).mean(1)
'''
LINES = [
    {
        "prompt": "a red circle",
        "text": "STOP",
        "tag": "single",
        "include": [{"class": "circle", "count": 1}],
    },
    {"prompt": "two blue squares", "text": "GO NOW"},
]


@pytest.fixture
def folder(tmp_path):
    """With a file of rewards and one of prompts."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/own.py").write_text(OWN)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


# --- Fields ---


def test_fields_of_jsonl_come_with_the_prompt_which_stays_a_string(folder):
    first, second = prompts = read_prompts(folder / "prompts.jsonl")
    assert prompts == ["a red circle", "two blue squares"] and len({first, "a red circle"}) == 1
    assert fields_of(first) == {name: value for name, value in LINES[0].items() if name != "prompt"}
    assert fields_of(second) == {"text": "GO NOW"} and fields_of("plain") == {}
    assert type(caption_of(first)) is str
    assert (
        fields_of(read_prompts(f"{folder / 'prompts.jsonl'}:text")[0])["prompt"] == "a red circle"
    )


def test_each_sample_is_scored_with_its_own_fields(folder):
    prompts = read_prompts(folder / "prompts.jsonl")
    scorers = table.load([f"{folder}/mine/own.py:Long"], prompts)
    scores = score_all(scorers, torch.zeros(3, 3, 8, 8), [prompts[1], prompts[0], prompts[1]])
    assert scores["own.py:Long"].tolist() == [6, 4, 6]
    clips = torch.zeros(
        2, 5, 3, 8, 8
    )  # of a clip, by a reward for images: the mean over its frames
    assert score_all(scorers, clips, prompts)["own.py:Long"].tolist() == [4, 6]


def test_a_prompt_without_the_field_is_named(folder):
    with pytest.raises(
        InputError, match="needs the field 'text', which 'a plain prompt' lacks. .*[.]jsonl"
    ):
        table.load(
            [f"{folder}/mine/own.py:Long"],
            [*read_prompts(folder / "prompts.jsonl"), "a plain prompt"],
        )


# --- A file ---


@pytest.mark.parametrize(
    "spec, source, name, weight",
    [
        ("clip", "clip", "clip", None),
        ("clip=0.5", "clip", "clip", "0.5"),
        ("own.py:R", "own.py:R", "own.py:R", None),
        ("a/own.py:R=-2", "a/own.py:R", "own.py:R", "-2"),
        ("a=b/x.py:d/own.py:R=1e-3", "a=b/x.py:d/own.py:R", "own.py:R", "1e-3"),
    ],
)
def test_split(spec, source, name, weight):
    assert rewards.split(spec) == (source, name, weight)
    assert rewards.parse([spec]) == {name: float(weight or 1)}


def body(**changes):
    lines = (
        dict(
            video="False",
            scale="0.1",
            range="(0, 1)",
            score="lambda self, m, p: m.flatten(1).mean(1)",
        )
        | changes
    )
    return "class R:\n" + "".join(
        f"    {name} = {value}\n" for name, value in lines.items() if value
    )


BROKEN = {  # what the file holds, what the line has to say
    "no class": ("x = 1\nclass S:\n    pass\n", "the file has no class 'R'"),
    "not a class": ("def R():\n    pass\n", "the file has no class 'R'"),
    "no Python": ("class R(:\n", "does not load (SyntaxError: "),
    "an import": (
        "import no_such_package\n",
        "does not load (ModuleNotFoundError: No module named 'no_such_package')",
    ),
    "an exit": ("raise SystemExit(0)\n", "does not load (SystemExit: 0)"),
    "arguments": (
        "class R:\n    def __init__(self, size):\n        pass\n",
        "does not load (TypeError: ",
    ),
    "construction": (
        "class R:\n    def __init__(self):\n        raise OSError('no\\nkey')\n",
        "does not load (OSError: no key)",
    ),
    "no score": (body(score=""), "it has no score(media, prompts)"),
    "a check that breaks": (
        body(check="lambda self, prompts: prompts.no"),
        "'list' object has no attribute 'no'",
    ),
    "no video": (body(video=""), "video must be True"),
    "video a word": (body(video="'yes'"), "video must be True"),
    "no scale": (body(scale=""), "scale must be a number above 0"),
    "scale 0": (body(scale="0"), "scale must be a number above 0"),
    "scale nan": (body(scale="float('nan')"), "scale must be a number above 0"),
    "no range": (body(range=""), "range must be (lowest, highest)"),
    "range of three": (body(range="(0, 1, 2)"), "range must be (lowest, highest)"),
    "range the other way": (body(range="(1, 0)"), "range must be (lowest, highest)"),
    "fields a word": (body(fields="'text'"), "fields must be names"),
    # these on a sample, before the first rollout
    "shape": (body(score="lambda self, m, p: m.flatten(1)"), "it returned (1, 192) for 1 samples"),
    "complex": (
        body(score="lambda self, m, p: m.flatten(1).mean(1) * 1j"),
        "it returned torch.complex64",
    ),
    "yes and no": (
        body(score="lambda self, m, p: m.flatten(1).mean(1) > 0"),
        "it returned torch.bool",
    ),
    "words": (body(score="lambda self, m, p: ['good'] * len(m)"), "failed: "),
    "above its range": (
        body(score="lambda self, m, p: m.flatten(1).sum(1)"),
        "outside of its range (0, 1)",
    ),
    "below its range": (
        body(score="lambda self, m, p: [-0.5]", range="(0, None)"),
        "scores -0.5, outside of its range (0,",
    ),
    "other arguments": (body(score="lambda self, m: m.flatten(1).mean(1)"), "failed: TypeError"),
}


@pytest.mark.parametrize("content, said", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_a_file_is_one_line(content, said, tmp_path):
    (tmp_path / "own.py").write_text(content)
    model = SimpleNamespace(try_out=lambda prompt: torch.full((1, 3, 8, 8), 0.5))
    with pytest.raises(InputError) as caught:
        made(f"{tmp_path}/own.py:R", prompts=["a"]).smoke_test(model.try_out("a"), "a")
    assert (
        said in str(caught.value)
        and "own.py:R" in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no file .*/own.py"):
        table.load([f"{tmp_path}/own.py:R"], [])


def test_two_files_called_alike_are_two(folder):
    (folder / "own.py").write_text(OWN)
    with pytest.raises(InputError, match="is called own.py:Bright, too. Rename one"):
        table.load([f"{folder}/own.py:Bright", f"{folder}/mine/own.py:Bright"], [])
    (folder / "mine/own.py").write_text("from beside import Bright as Mine\n")
    (folder / "mine/beside.py").write_text(OWN)
    assert list(table.load([f"{folder}/own.py:Bright", f"{folder}/mine/own.py:Mine"], [])) == [
        "own.py:Bright", "own.py:Mine",
    ]  # fmt: skip


def test_a_run_trains_on_one_and_watches_another_and_goes_on_when_both_are_given_again(
    folder, train, monkeypatch
):
    own = dict(
        prompts=str(folder / "prompts.jsonl"),
        eval_prompts="",
        reward=(f"{folder}/mine/own.py:Long=2", "jpeg"),
    )
    own |= dict(watch=(f"{folder}/mine/own.py:Bright",), learning_rate=1e-5)
    run, rows = train(**own, steps=2, script=bpgo, prior="sft")
    assert {"own.py:Long_mean", "own.py:Bright_mean", "share_own.py:Long", "share_jpeg"} <= rows[
        0
    ].keys()
    assert rows[0]["own.py:Long_mean"] > 4 and 0 < rows[0]["own.py:Bright_mean"] < 1
    assert "share_own.py:Bright" not in rows[0]
    assert rows[0]["share_own.py:Long"] + rows[0]["share_jpeg"] == pytest.approx(1)
    assert json.loads((run / "config.json").read_text())["reward"] == list(own["reward"])
    state = checkpoint_files.read(checkpoint_files.newest_first(run)[0])[1]["prior"]
    assert {type(prompt) for prompt in state["known"]} == {
        str
    }  # a checkpoint holds no class of ours

    # a folder alone makes no code run
    monkeypatch.setattr(
        sys, "argv", ["bpgo.py", "--resume", "latest", "--output", str(run), "--steps", "3"]
    )
    args = cli.parse(bpgo.Args, "")
    assert args.prior == "sft" and args.reward == ("verifier",) and args.watch == ()
    with pytest.raises(
        InputError,
        match="now it is .'verifier'..*a run's folder alone does not run code",
    ):
        run_folder.check(run, args)
    _, rows = train(**own, steps=3, script=bpgo, prior="sft", resume="latest")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["own.py:Long_mean"] > 4


# --- Global switches ---

SWITCHED = {  # what a reward does to the process: a statement at import or in score
    "the working directory": "os.chdir('/')",
    "gradients": "torch.set_grad_enabled(False)",
    "inference mode": "KEPT.append(torch.inference_mode()); KEPT[-1].__enter__()",
    "autocast": "torch.autocast('cpu', torch.bfloat16).__enter__()",
    "dtype": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('meta')",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "cudnn": "torch.backends.cudnn.benchmark = True; torch.backends.cudnn.allow_tf32 = False",
    "tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "attention": "torch.backends.cuda.enable_math_sdp(False)",
    "cudnn attention": "torch.backends.cuda.enable_cudnn_sdp(False)",
    "anomalies": "torch.autograd.set_detect_anomaly(True)",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "seeds": "torch.manual_seed(3); random.seed(3); np.random.seed(3)",
    "numpy": "np.seterr(all='raise')",
    "warnings": "warnings.simplefilter('error')",
    "logging": "logging.disable(50); logging.basicConfig(force=True)",
    "signals": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "sys.argv": "sys.argv = ['mine']",
    "sys.path": "sys.path.insert(0, '/nowhere')",
    "the environment": "os.environ['WORLD_SIZE'] = '8'; os.environ.pop('HOME', None)",
    "streams": "sys.stdout = sys.stderr = KEPT",
}
RUDE = """
import logging, os, random, signal, sys, warnings
import numpy as np
import torch
KEPT = []
{at_import}

class R:
    video, scale, range = False, 0.05, (0.0, 1.0)
    {elsewhere}

    def score(self, media, prompts):
        scores = media.mean((1, 2, 3), dtype=torch.float32)
        {in_score}
        return scores
"""


def rude(path, statement="pass", where="in_score", elsewhere=False):
    """A reward of the mean, which does one thing to the process."""
    parts = {"at_import": "pass", "in_score": "pass", where: statement}
    path.write_text(RUDE.format(**parts, elsewhere="elsewhere = True" if elsewhere else ""))
    return f"{path}:R"


def state():
    """What the process has now, of all that a reward can switch."""
    read = {name: switch.read() for name, switch in switches.SWITCHES.items()}
    return read | {"inference mode": torch.is_inference_mode_enabled()}


@pytest.mark.parametrize("where", ["at_import", "in_score"])
@pytest.mark.parametrize("name", SWITCHED)
def test_a_switch_that_a_reward_leaves_on_is_put_back(name, where, tmp_path):
    media = torch.rand(3, 3, 8, 8)
    before = state()
    found = made(rude(tmp_path / "own.py", SWITCHED[name], where))
    for _ in range(2):
        scores = found.score(media, ["a"] * 3)["own.py:R"]
        found.check({"own.py:R": scores[None]}, ["a"])
        torch.testing.assert_close(scores, media.mean((1, 2, 3)))
        after = state()
        assert {key for key in before if before[key] != after[key]} == set()
    weight = torch.ones(2, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad.tolist() == [2, 2]


def test_a_reward_finds_its_own_switches_again(tmp_path):
    """It opens files beside it, draws new random numbers, and imports what lies in its folder."""
    (tmp_path / "beside.txt").write_text("0.5")
    (tmp_path / "late.py").write_text("half = 0.5")
    at_import = (
        f"os.chdir({str(tmp_path)!r}); sys.path.insert(0, {str(tmp_path)!r}); "
        "torch.manual_seed(5); os.environ['MINE'] = 'x'"
    )
    in_score = (
        "import late; assert os.environ['MINE'] == 'x'; "
        "scores = float(open('beside.txt').read()) * torch.rand(len(media)) + 0 * late.half"
    )
    path = tmp_path / "elsewhere"
    path.mkdir()
    spec = rude(path / "own.py", at_import, where="at_import")
    text = (path / "own.py").read_text().replace("        pass\n", f"        {in_score}\n")
    (path / "own.py").write_text(text)
    found, media = made(spec), torch.rand(4, 3, 8, 8)
    drawn = [found.score(media, ["a"] * 4)["own.py:R"] for _ in range(2)]
    torch.manual_seed(11)  # the run's own numbers are no matter
    drawn += [found.score(media, ["a"] * 4)["own.py:R"]]
    generator = torch.Generator().manual_seed(5)
    expected = [0.5 * torch.rand(4, generator=generator) for _ in range(3)]
    assert [part.tolist() for part in drawn] == [part.tolist() for part in expected]
    assert "MINE" not in os.environ


@pytest.mark.parametrize("name", ["the working directory", "dtype", "cudnn", "deterministic"])
def test_a_switch_of_the_process_is_refused_while_the_run_samples(name, tmp_path):
    media = torch.rand(2, 3, 8, 8)
    before = state()
    found = made(rude(tmp_path / "own.py", SWITCHED[name], elsewhere=True))
    scoring = found.begin(lambda x0: x0, ["a"] * 2, size=2)
    scoring.add(media)
    scores = scoring.result()
    assert state() == before
    with pytest.raises(errors.RunError, match="own.py:R failed: .*it changed .* another thread"):
        found.check({name: part[None] for name, part in scores.items()}, ["a"])


def test_a_run_with_a_rude_reward_has_the_numbers_of_a_polite_one(train, tmp_path):
    """All at once, at import and in every call, on the tiny model."""
    small = dict(steps=2, eval_prompts="", group_size=2, sampling_steps=2, learning_rate=1e-4)
    spec = rude(tmp_path / "own.py")
    _, polite = train(output="polite", reward=(spec,), **small)
    everything = "; ".join(part for name, part in SWITCHED.items() if name != "device")
    rude(tmp_path / "own.py", everything)
    run, found = train(output="rude", reward=(spec,), **small)
    assert found == polite and (run / "export").is_dir()


# --- Shares and units ---


def shares(scores, weights, parts=()):
    """The share_NAME of a summary."""
    found = made("jpeg")
    found.weights = weights
    metrics = found.summary(scores, parts)
    return {name: value for name, value in metrics.items() if name.startswith("share_")}


def share_in_numpy(scores, weights):
    """{name: [P, G]} in float64, by the definition: mean over groups of |weight| * the population's
    deviation."""
    spread = {
        n: np.mean([abs(weights[n]) * np.nanstd(group) for group in s]) for n, s in scores.items()
    }
    return {f"share_{name}": value / sum(spread.values()) for name, value in spread.items()}


@pytest.mark.parametrize(
    "weights", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": -0.3}, {"a": 60.0, "b": 1.0}], ids=str
)
def test_shares_are_numpys(weights):
    random = np.random.default_rng(0)
    scores = {"a": random.normal(0, 0.01, (5, 6)), "b": random.normal(20, 0.6, (5, 6))}
    scores["b"][2, 3] = np.nan  # masked
    found = shares({name: torch.tensor(value) for name, value in scores.items()}, weights)
    expected = share_in_numpy(scores, weights)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-12)


def test_hpsv21_and_pickscore_are_seen_to_be_60_to_1_and_in_units_of_their_spread_equal(
    monkeypatch,
):
    for name in ("hpsv2.1", "pickscore"):
        monkeypatch.setattr(type(table.of_table(name)), "load", lambda *_: None)
    own = made("hpsv2.1", "pickscore")
    noise = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = {name: scorer.scale * noise for name, scorer in own.scorers.items()}
    assert own.weights == {"hpsv2.1": 1.0, "pickscore": 1.0}
    share = own.summary(scores)
    assert float(share["share_pickscore"] / share["share_hpsv2.1"]) == pytest.approx(60)
    spread = made("hpsv2.1=2", "pickscore", reward_units="spread")
    assert float(spread.summary(scores)["share_hpsv2.1"]) == pytest.approx(2 / 3)
    assert spread.scale == pytest.approx(3)  # what BPGO divides by


def test_shares_of_advantages_are_those_of_what_is_added_up():
    scores = {
        "a": torch.rand(4, 6, dtype=torch.float64),
        "b": 60 * torch.rand(4, 6, dtype=torch.float64),
    }
    terms = [(scores["a"], 2.0), (scores["b"], 1.0)]
    parts = [w * grpo_base.compute_advantages(r, 5.0) for r, w in terms]
    found = shares(scores, {"a": 2.0, "b": 1.0}, parts)
    assert float(found["share_a"]) == pytest.approx(2 / 3, abs=1e-6)


def test_without_any_spread_and_of_one_reward():
    flat = {"a": torch.ones(2, 3), "b": torch.full((2, 3), torch.nan)}
    assert [float(share) for share in shares(flat, {"a": 1.0, "b": 1.0}).values()] == [0, 0]
    assert shares({"a": torch.rand(2, 3)}, {"a": 1.0}) == {}


def test_a_step_in_units_of_the_spread_is_one_with_those_weights(train):
    two = dict(reward=("verifier", "jpeg=3"), steps=1, learning_rate=1e-5)
    _, (spread,) = train(**two, reward_units="spread", output="spread")
    weights = ("verifier=4", "jpeg=60")  # 1 / .25, 3 / .05
    _, (own,) = train(**{**two, "reward": weights}, output="own")
    assert spread == own and 0 < spread["share_jpeg"] < 1


def test_stages_have_shares_by_their_weights_in_each_group(train):
    _, (row,) = train(
        self_paced, steps=1, reward=("verifier:quality", "verifier"), thresholds=(0.5, 0.5)
    )
    assert row["share_verifier:quality"] + row["share_verifier"] == pytest.approx(1)


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(watch=("jpeg=2",)), "--watch jpeg=2: it is not trained on"),
        (
            dict(reward_units="spread", aggregate="advantages"),
            "--reward-units spread: --aggregate advantages does that",
        ),
    ],
)
def test_flags_that_make_no_sense(flags, said):
    with pytest.raises(errors.InputError) as caught:
        cli.check(cli.defaults(grpo_base.Args, **flags))
    assert said in str(caught.value)
