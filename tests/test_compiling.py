"""--compile: one graph of each block for rollout and update, and everything else as without it. The
quick tests take torch's compiler up to the point where it writes C++; the slow ones whole."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pipelines
import pytest
import torch
from conftest import ROOT, metrics, weights
from diffusers import FluxPipeline
from test_families import folder_of, picture  # noqa: F401, a fixture
from torch._dynamo.backends.debugging import aot_eager

import grpo_base
import slas
from common import errors
from common.errors import InputError
from common.trainer import compiling

BLOCKS = ("FluxTransformerBlock", "FluxSingleTransformerBlock")


@pytest.fixture
def graphs(monkeypatch):
    """Inside, compiled blocks run as torch's compiler found them, without C++; the graphs that it
    found. Those of the arithmetic around the transformer are left out (test_regions.py)."""
    found = []

    def backend(graph, inputs):
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        if any("hidden_states" in name for name in names):
            found.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(compiling.torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(compiling, "check", lambda device: None)
    yield found
    torch._dynamo.reset()


@pytest.fixture
def small(tmp_path):
    """Settings of a run that trains a FLUX of two blocks."""
    folder = tmp_path / "flux"
    pipelines.flux().save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text("\n".join(pipelines.CORPUS[:5]))
    file = str(tmp_path / "prompts.txt")
    return dict(
        model=str(folder),
        prompts=file,
        eval_prompts=file,
        height=32,
        width=32,
        reward=("jpeg",),
        guidance=3.5,
        learning_rate=1e-3,
        micro_batch=3,
        eval_every=1,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "lora_rank, kl_coef", [pytest.param(0, 0.0, marks=pytest.mark.slow), (2, 0.1)]
)
def test_rollout_and_update_run_the_same_graphs_and_nothing_else_changes(
    graphs, bf16, small, lora_rank, kl_coef, train
):
    """Of a LoRA the first block's inputs want no gradients, the rollout's none at all; the
    reference of the KL has the LoRA off. The evaluation's batches of 3 and 2 of 5 prompts: the last
    one is no batch of the run's."""
    small |= dict(lora_rank=lora_rank, kl_coef=kl_coef, gradient_checkpointing=bool(lora_rank))
    plain, expected = train(**small)
    folder, rows = train(**small, compile=True, output="compiled")
    assert len(graphs) == len(BLOCKS) * (2 if kl_coef else 1)
    rows = rows[:2]  # the third is the last evaluation
    assert all(row["ratio_error"] == 0.0 for row in rows)
    assert weights(folder, 2).keys() == weights(plain, 2).keys()
    for row, other in zip(rows, expected):
        assert row["reward_mean"] == pytest.approx(other["reward_mean"], rel=0.02)
    FluxPipeline.from_pretrained(folder / "export" if not lora_rank else small["model"])

    # in two runs the same, bit for bit
    train(**small, compile=True, output="again", steps=1)
    again, rows = train(**small, compile=True, output="again", resume="latest")
    assert rows == metrics(folder)
    assert all(
        torch.equal(value, weights(again, 2)[name]) for name, value in weights(folder, 2).items()
    )
    assert json.loads((again / "config.json").read_text())["compile"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "wan, two experts", "hunyuan"])
def test_every_familys_blocks_compile_once(family, graphs, train, tmp_path, picture):  # noqa: F811
    settings = folder_of(family, tmp_path, picture)
    _, plain = train(**settings)
    _, rows = train(**settings, compile=True, output="compiled")
    number = len(graphs)
    assert number and all(row["ratio_error"] == 0.0 for row in rows)
    for row, other in zip(rows, plain):
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    _, rows = train(**settings, compile=True, output="compiled", steps=3, resume="latest")
    assert len(graphs) == number  # of the same blocks in another run


def test_the_kl_of_an_update_is_the_same_if_it_is_compiled(graphs, small, train):
    _, plain = train(slas, **small, gamma="auto")
    _, rows = train(slas, **small, gamma="auto", compile=True, output="compiled")
    assert graphs and plain[0]["update_kl"] > 0
    assert rows[0]["update_kl"] == pytest.approx(plain[0]["update_kl"], rel=1e-2)


def test_without_a_compiler_it_is_one_line(small, train, monkeypatch):
    from torch._inductor import config

    torch._dynamo.reset()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    with pytest.raises(InputError, match="--compile: .*; install a C\\+\\+ compiler"):
        train(**small, compile=True)


CHECK = """
import torch
from common.errors import InputError
from common.trainer import compiling
try:
    compiling.check(torch.device("cpu"))
except InputError as error:
    print("refused:", error)
"""


@pytest.mark.long
def test_a_cache_that_a_kill_cut_is_named_and_not_called_a_missing_compiler(tmp_path):
    cache = tmp_path / "cache"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}

    def checked():
        words = [sys.executable, "-c", CHECK]
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert checked() == ""
    for folder in ("fxgraph", "aotautograd"):
        shutil.rmtree(cache / folder, ignore_errors=True)
    libraries = list(cache.rglob("*.main.so"))
    assert libraries
    for path in libraries:
        os.truncate(path, 0)
    said = checked()
    assert said.startswith("refused: --compile: the compiler's cache is damaged (")
    assert f"Delete {cache}." in said and "install" not in said and said.count("\n") == 1
    shutil.rmtree(cache)
    assert checked() == ""


def test_a_block_that_does_not_compile_names_the_cache(small, train, monkeypatch, tmp_path):
    """The cache of the blocks may be cut as well, of which the check knows nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()

    def backend(graph, inputs):
        raise SyntaxError("unexpected EOF while parsing")

    monkeypatch.setattr(compiling, "check", lambda device: None)
    monkeypatch.setattr(compiling.torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(errors.LocalError) as error:
        train(**small, compile=True)
    torch._dynamo.reset()
    line = str(error.value)
    assert line.startswith("--compile: a block does not compile (BackendCompilerFailed")
    assert f"Delete {tmp_path}/cache, or leave --compile out" in line


def test_a_compiler_that_the_shell_turned_off_is_refused(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "disable", True)  # as TORCHDYNAMO_DISABLE=1 does
    with pytest.raises(InputError, match="--compile: TORCHDYNAMO_DISABLE"):
        compiling.check(torch.device("cpu"))


# --- Attention ---


def test_attention_takes_the_kernels_that_are_asked_for(small, train, monkeypatch):
    """In rollout and update; torch's plain ones round otherwise than what it chooses by itself."""
    asked, honest = [], torch.nn.functional.scaled_dot_product_attention

    def attention(*words, **settings):
        asked.append(torch.backends.cuda.flash_sdp_enabled())
        return honest(*words, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    train(**small)
    assert all(asked)
    asked.clear()
    _, rows = train(**small, attention="_native_math", output="math")
    assert len(set(asked)) == 2  # the text encoders' are not the transformer's
    assert all(row["ratio_error"] == 0.0 for row in rows[:2])


def test_attention_that_is_not_there_is_one_line(small, train, tmp_path, picture):  # noqa: F811
    with pytest.raises(InputError, match="--attention flash: only torch's kernels work"):
        train(**small, attention="flash")
    with pytest.raises(InputError, match="--attention _native_math: a UNet2DConditionModel"):
        train(**folder_of("sd", tmp_path, picture), attention="_native_math", output="sd")


# --- The whole compiler: minutes ---


@pytest.mark.slow
def test_in_bf16_the_ratio_is_one(small, train, bf16):
    small |= dict(eval_every=0, lora_rank=2)
    _, rows = train(**small, compile=True)
    assert all(row["ratio_error"] == 0.0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_compiled_processes_train_as_one_that_is_not(config, small, train, tmp_path):
    from test_processes import assert_same, two, words

    small |= dict(
        prompts_per_step=2, group_size=3, sampling_steps=4, steps=2, eval_every=0, tracker="none"
    )
    alone, _ = train(**small, output="alone")
    small = {name: value for name, value in small.items() if not isinstance(value, bool)}
    two(tmp_path, [[*words(grpo_base, small, tmp_path / config), "--compile"]], config)
    assert_same(alone, tmp_path / config, steps=2)
