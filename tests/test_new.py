"""docs/new_method.md, new_model.md, new_reward.md: their patches apply and train, their code runs,
or is the file's."""

import importlib.util
import inspect
import re
import sys

import pytest
import torch
from conftest import ROOT

from common import cli, loss, sde
from common.args import defaults
from common.errors import InputError
from common.models.sd3 import StableDiffusion3
from common.rewards import table


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / f"docs/{page}.md").read_text(), re.M | re.S
    )


def patched(source, diff):
    """The source with each hunk's lines (" " and "-") found once, and replaced by its " " and
    "+"."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        assert source.count(old) == 1, hunk
        source = source.replace(old, new)
    return source


def module_of(path, monkeypatch):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[0, 1], ids=["advantage", "ratio"])
def method(request, tmp_path, monkeypatch):
    """grpo_base.py with one of the page's patches."""
    diff, file = blocks("new_method", "diff")[request.param], tmp_path / "my_method.py"
    file.write_text(patched((ROOT / "grpo_base.py").read_text(), diff))
    return module_of(file, monkeypatch)


# --- A method ---


def test_the_patches_keep_the_length_of_lines():
    for diff in blocks("new_method", "diff"):
        assert max(map(len, diff.splitlines())) <= 101  # with the sign


def test_a_patched_copy_trains(method, train):
    _, rows = train(method, model="tiny-flux", steps=1, minibatches=2, clip_range=1e-5)
    _, base = train(steps=1, minibatches=2, clip_range=1e-5, output="base")
    assert rows[0]["ratio_error"] == 0 and rows[0]["grad_norm"] > 0
    assert rows[0]["reward_mean"] == base[0]["reward_mean"]  # the same rollout
    assert rows[0]["grad_norm"] != base[0]["grad_norm"]


def test_the_pages_tests_pass(tmp_path, monkeypatch):
    file = tmp_path / "my_method.py"
    file.write_text(patched((ROOT / "grpo_base.py").read_text(), blocks("new_method", "diff")[0]))
    module_of(file, monkeypatch)
    code, names = blocks("new_method", "python")[0], {}
    exec(code, names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_pages_flag_has_its_bounds():
    names = {"__name__": __name__}  # where dataclasses looks for the annotations
    exec(blocks("new_method", "python")[1], names)
    assert names["Args"]().power == 1
    with pytest.raises(InputError, match="--power 5.0: must be from 0 to 4"):
        cli.check(defaults(names["Args"], power=5.0))


def test_the_normalised_ratio_has_lost_its_shift_and_the_steps_spread(tmp_path, monkeypatch):
    """log rho = zD / std - D^2 / (2 std^2) becomes zD, whatever the step's std."""
    file = tmp_path / "guard.py"
    file.write_text(patched((ROOT / "grpo_base.py").read_text(), blocks("new_method", "diff")[1]))
    guard, generator = module_of(file, monkeypatch), torch.Generator().manual_seed(0)
    old, distance, z = (
        torch.randn(5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    for std in (0.05, 0.5):
        x = old + std * z
        of_new, of_old = (
            sde.gaussian_log_prob(x, mean, torch.tensor(std))
            for mean in (old + 0.01 * distance, old)
        )
        ratio = guard.normalised_ratio(of_new - of_old, old + 0.01 * distance, old, std)
        assert torch.allclose(
            ratio.log(), (z * 0.01 * distance).flatten(1).mean(1), rtol=1e-6, atol=1e-12
        )
        assert (loss.gaussian_kl(old + 0.01 * distance, old, std) > 0).all()


# --- A model ---


def test_the_pages_class_is_the_files():
    file, parts = inspect.getsource(StableDiffusion3), blocks("new_model", "python")
    assert len(parts) == 6 and all(part in file for part in parts)
    left = file
    for part in parts:
        left = left.replace(part, "")
    assert re.findall(r"def (\w+)", left) == ["schedule", "blank"]


def test_the_tests_that_the_page_names_are_there():
    text = "".join(
        (ROOT / f"tests/{name}.py").read_text() for name in ("test_families", "test_processes")
    )
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/new_model.md").read_text())
    assert len(named) == 10 and all(f"def {name}(" in text for name in named)


# --- A reward ---


@pytest.fixture
def own(tmp_path):
    (code,) = blocks("new_reward", "python")
    (tmp_path / "my").mkdir()
    (tmp_path / "my/rewards.py").write_text(code)
    return tmp_path / "my/rewards.py"


def test_the_pages_rewards_train_and_mask(own, train, tmp_path):
    lines = ['{"prompt": "a square", "text": "GO"}', '{"prompt": "two blue squares", "text": ""}']
    (tmp_path / "signs.jsonl").write_text("\n".join(lines))
    named = dict(reward=(f"{own}:Colourful", "verifier=2"), watch=(f"{own}:Legible",))
    _, rows = train(**named, prompts=str(tmp_path / "signs.jsonl"), eval_prompts="", steps=1)
    assert 0 < rows[0]["rewards.py:Colourful_mean"] < 1 and rows[0]["rewards.py:Legible_mean"] > 0
    scorers = table.load([f"{own}:Legible"], [])
    assert scorers["rewards.py:Legible"].masks
    media = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = scorers["rewards.py:Legible"].score(media, ["", ""], ["GO", ""])
    assert found.isnan().tolist() == [False, True]


def test_the_pages_line_is_what_a_misspelt_class_gets(own, monkeypatch):
    monkeypatch.chdir(own.parents[1])
    (line,) = re.findall(r"^    error: (.*)$", (ROOT / "docs/new_reward.md").read_text(), re.M)
    with pytest.raises(InputError, match=re.escape(line)):
        table.load(["my/rewards.py:Colorful"], [])
