"""LoRAs: alpha, what an export holds, and training that starts from one."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bpgo
import grpo_base
import self_paced
import slas
from common import cli, errors, models
from common.args import defaults
from common.models import lora, lora_file
from common.prompts import read_prompts
from common.trainer import Policy, export
from evaluation import trained

SCRIPTS = {script.__name__: script for script in (grpo_base, bpgo, slas, self_paced)}
NAMES = ["tiny-flux", "tiny-sd", "tiny-wan", "tiny-wan-i2v"]


def adapted(name, alpha, rank=2, seed=0):
    """A model with a LoRA that changes its velocities."""
    model = models.load(name, torch.float32)
    for module in model.trainable.values():
        module.requires_grad_(False).eval()
    lora.adapt_model(model, targets="", rank=rank, alpha=alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.trainable.values():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def save(model, folder):
    modules = dict(model.trainable)
    states = {
        name: export.trained_weights(m, torch.float32, lora=True) for name, m in modules.items()
    }
    export._save_lora(model, folder, modules, states)
    return folder


@torch.no_grad()
def velocities(model):
    """At two noise levels: of two experts both compute. [2, ...]"""
    prompts = read_prompts(models.settings(model_name(model))["prompts"])[:1]
    cond = model.encode(prompts)
    x = torch.randn(1, *model.noise_shape, generator=torch.Generator().manual_seed(5))
    return torch.cat([model.velocity(x, torch.tensor(sigma), cond) for sigma in (0.97, 0.03)])


def model_name(model):
    return model.source.name


def merged_by_hand(name, files):
    """The model with B A alpha / rank added to its weights, alpha from tensors or else the rank."""
    model = models.load(name, torch.float32)
    for part, file in files.items():
        with safe_open(file, "numpy") as opened:
            saved = {key: opened.get_tensor(key) for key in opened.keys()}
        state = model.trainable[part].state_dict()
        plain = {
            f"lora_{part}_{key.removesuffix('.weight')}".replace(".", "_"): key for key in state
        }
        number = 0
        for key, down in saved.items():
            if key.endswith(".lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                up, alpha = saved[f"{layer}.lora_B.weight"], saved.get(f"{layer}.alpha", len(down))
                target = f"{layer.partition('.')[2]}.weight"
            elif key.endswith(".lora_down.weight"):
                layer = key.removesuffix(".lora_down.weight")
                up, alpha = saved[f"{layer}.lora_up.weight"], saved[f"{layer}.alpha"]
                target = plain[layer]
            else:
                continue
            change = float(alpha) / len(down) * up.astype(np.float64) @ down.astype(np.float64)
            state[target] += torch.tensor(change, dtype=torch.float32)
            number += 1
        assert number > 5
    return model


# --- Alpha ---


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_loader_gives_an_exported_lora_the_strength_of_the_training(name, times, tmp_path):
    """alpha = times the rank: diffusers, and loaders that read alpha tensors or take the rank."""
    model = adapted(name, alpha=2.0 * times)
    expected = velocities(model)
    folder = save(model, tmp_path / "export")
    plain = models.load(name, torch.float32)
    base = velocities(plain)
    plain.load_lora(folder)
    assert (velocities(plain) - expected).abs().max() <= 2e-5 * expected.abs().max()
    part = next(iter(model.trainable))
    files = {part: folder / "pytorch_lora_weights.safetensors"}
    if len(model.trainable) > 1:
        files["transformer_2"] = folder / "transformer_2/pytorch_lora_weights.safetensors"
    assert (
        velocities(merged_by_hand(name, files)) - expected
    ).abs().max() <= 2e-5 * expected.abs().max()
    if name == "tiny-sd":
        found = velocities(merged_by_hand(name, {"unet": folder / "kohya/lora.safetensors"}))
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (base - expected).abs().max() > 1e-2


def test_alpha_is_twice_the_rank_unless_it_is_given(train):
    assert defaults(grpo_base.Args, lora_rank=4).lora_settings()["alpha"] == 8
    assert defaults(grpo_base.Args, lora_rank=4, lora_alpha=2).lora_settings()["alpha"] == 2
    settings = dict(lora_rank=4, steps=1)
    _, usual = train(output="usual", **settings)
    _, same = train(output="same", lora_alpha=8.0, **settings)
    _, other = train(output="other", lora_alpha=4.0, **settings)
    # B is 0 at first, so alpha scales its gradient, and A has none
    norms = [rows[0]["grad_norm"] for rows in (usual, same, other)]
    assert norms[0] == norms[1] == pytest.approx(2 * norms[2], rel=1e-5)


def as_of_0_1_0(folder):
    """Take the settings out of config.json that version 0.1.0 did not have."""
    config = json.loads((folder / "config.json").read_text())
    for name in ("lora_alpha", "adam_eps", "init_lora", "eval_height", "eval_width", "eval_steps"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_run_of_an_older_version_keeps_alpha_at_its_rank(train, monkeypatch):
    settings = dict(lora_rank=4, lora_alpha=4.0, save_every=1, learning_rate=1e-3)
    whole, rows = train(output="whole", steps=3, **settings)
    old, _ = train(output="old", steps=2, **settings)
    as_of_0_1_0(old)
    words = ["grpo_base.py", f"--output={old}", "--resume=latest", "--steps=3"]
    monkeypatch.setattr(sys, "argv", words)
    grpo_base.main(cli.parse(grpo_base.Args, ""))
    assert metrics(old) == rows
    assert all(torch.equal(weights(old, 3)[k], v) for k, v in weights(whole, 3).items())
    as_of_0_1_0(old)
    for folder in (old / "checkpoints/step_000003", old / "export"):
        found = []
        for run in (old, whole):
            model = models.load("tiny-flux", torch.float32)
            trained.load(model, trained.find(run / folder.relative_to(old)))
            found.append(velocities(model))
        assert torch.equal(*found)


# --- AdamW's eps ---


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_grad_rms_is_the_norm_over_the_root_of_the_number_of_weights(train, script):
    folder, rows = train(script, lora_rank=2, steps=1)
    number = sum(weight.numel() for weight in weights(folder, 1).values())
    assert rows[0]["grad_rms"] == pytest.approx(rows[0]["grad_norm"] / number**0.5)


def test_eps_decides_the_step_when_it_is_far_above_the_gradients(train):
    settings = dict(lora_rank=2, steps=1, learning_rate=1e-3, weight_decay=0.0)
    moved = []
    for eps in (1e-8, 1.0):
        folder, rows = train(output=f"eps-{eps}", adam_eps=eps, **settings)
        state = weights(folder, 1)
        moved.append(max(v.abs().max().item() for k, v in state.items() if ".lora_B." in k))
    assert moved[0] == pytest.approx(1e-3, rel=1e-3)  # B was 0; a first step has the rate's size
    assert moved[1] < 1e-3 * rows[0]["grad_norm"] * 1.01


def test_a_resumed_run_has_its_own_eps(train):
    train(steps=1)
    folder, _ = train(steps=2, adam_eps=1e-3, resume="latest")
    (group,) = weights(folder, 2, "optimizer")["param_groups"]
    assert group["eps"] == 1e-3


# --- --init-lora ---

START = dict(lora_rank=4, lora_alpha=16.0, learning_rate=1e-2)


@pytest.fixture
def lora_run(train):
    """A run whose LoRA changes the model; alpha is four times the rank."""
    return train(output="first", steps=2, **START)[0]


def flags_of(path):
    """Rank and alpha as the command line takes them from a file."""
    rank, alpha = lora_file.rank_and_alpha(path)
    return dict(init_lora=str(path), lora_rank=rank, lora_alpha=alpha)


def policy_of(monkeypatch, **settings):
    """A policy without a run: (policy, model)."""
    from common.memory import MemoryPlan  # noqa: F401
    from common.trainer import Processes

    args = defaults(grpo_base.Args, micro_batch=8, **settings)
    processes = Processes(1.0)
    from common.memory import fit

    plan = fit.as_asked(args, fit.launch_of(processes))
    model = models.load(args.model, torch.float32)
    return Policy(model, args, processes, plan, keep_initial=True), model


def test_the_command_line_takes_rank_and_alpha_from_the_file(lora_run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo_base.py", "--init-lora", str(lora_run / "export")])
    args = cli.parse(grpo_base.Args, "")
    assert (args.lora_rank, args.lora_alpha) == (4, 16.0)
    assert args.learning_rate == defaults(grpo_base.Args, lora_rank=4).learning_rate
    cli.check(args)


@pytest.mark.parametrize("name", NAMES)
def test_training_starts_where_the_lora_of_the_file_is(name, tmp_path, monkeypatch):
    expected = velocities(source := adapted(name, alpha=8.0))
    folder = save(source, tmp_path / "export")
    policy, model = policy_of(monkeypatch, model=name, **flags_of(folder))
    assert policy.init_lora and lora_file.rank_and_alpha(folder) == (2, 8.0)
    for trained_name, module in model.trainable.items():
        state = module.state_dict()
        for key, value in source.trainable[trained_name].state_dict().items():
            if "lora_" in key:
                assert torch.equal(state[key], value), "powers of two are scaled exactly"
    assert torch.equal(velocities(model), expected)
    with policy.reference():
        assert torch.equal(velocities(model), expected)
    for weight in policy.weights:
        weight.data += 0.1
    assert (velocities(model) - expected).abs().max() > 1e-2
    with policy.reference():
        assert torch.equal(velocities(model), expected), "the initial LoRA, not the base"
    assert all(weight.requires_grad for weight in policy.weights)


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-wan-i2v"])
def test_float32_weights_stay_exact_in_bf16_and_an_outline_has_the_same_layers(name, tmp_path):
    source = adapted(name, alpha=8.0)
    folder = save(source, tmp_path / "export")
    settings = dict(targets="", rank=2, alpha=8.0, seed=0, init=str(folder))
    half = models.load(name, torch.bfloat16)
    outline = models.outline(name, torch.bfloat16, large=0)
    for module in (*half.trainable.values(), *outline.trainable.values()):
        module.requires_grad_(False)
    lora.adapt_model(half, **settings)
    with torch.device("meta"):
        lora.adapt_model(outline, **settings)
    for part, module in source.trainable.items():
        found = dict(half.trainable[part].named_parameters())
        shapes = dict(outline.trainable[part].named_parameters())
        for key, value in module.named_parameters():
            assert shapes[key].shape == value.shape and shapes[key].is_meta
            assert shapes[key].requires_grad == value.requires_grad == ("lora_" in key)
            if "lora_" in key:
                assert torch.equal(found[key], value)


def test_a_lora_merged_as_the_error_says_is_the_same_model(tmp_path):
    source = adapted("tiny-flux", alpha=8.0)
    expected = velocities(source)
    folder = save(source, tmp_path / "export")
    pipe = models.load("tiny-flux", torch.float32).pipe
    pipe.load_lora_weights(str(folder))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "tiny-flux")
    size = dict(height=32, width=32, guidance=3.5)
    merged = models.load(str(tmp_path / "tiny-flux"), torch.float32, **size)
    assert (velocities(merged) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_kohyas_and_diffusers_own_files_start_a_run_as_they_are(tmp_path, monkeypatch):
    """A file whose alpha is in tensors, and one whose alpha is in the adapter's metadata."""
    source = adapted("tiny-sd", alpha=8.0)
    expected = velocities(source)
    from peft import get_peft_model_state_dict

    unet = source.trainable["unet"]
    layers = get_peft_model_state_dict(unet)
    metadata = {"r": 2, "lora_alpha": 8.0, "target_modules": source.lora_targets}
    source.pipe.save_lora_weights(
        tmp_path / "diffusers", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
    )
    save(source, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours/kohya/lora.safetensors")
    for key in list(tensors):  # as kohya's trainer with network_alpha 8 writes them
        if key.endswith(".alpha"):
            tensors[key] = torch.tensor(8.0)
        if key.endswith("lora_up.weight"):
            tensors[key] = tensors[key] / 4
    save_file(tensors, tmp_path / "kohya.safetensors")
    for path in (tmp_path / "diffusers", tmp_path / "kohya.safetensors"):
        assert lora_file.rank_and_alpha(path) == (2, 8.0)
        policy, model = policy_of(monkeypatch, model="tiny-sd", **flags_of(path))
        assert (velocities(model) - expected).abs().max() <= 2e-5 * expected.abs().max()
        for key, value in unet.state_dict().items():
            if "lora_" in key:
                found = policy.model.trainable["unet"].state_dict()[key]
                torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7)


def test_the_first_evaluation_is_the_last_of_the_run_that_made_the_lora(train, tmp_path):
    (tmp_path / "few.txt").write_text("a red circle\na blue square")
    looks = dict(eval_every=1, eval_prompts=str(tmp_path / "few.txt"))
    folder, rows = train(output="first", **START, **looks)
    settings = dict(steps=1, kl_coef=0.1, learning_rate=1e-3)
    _, more = train(output="second", **flags_of(folder / "export"), **looks, **settings)
    assert more[0]["eval_reward"] == pytest.approx(rows[-1]["eval_reward"], abs=1e-6)
    assert rows[-1]["eval_reward"] != rows[0]["eval_reward"]


def test_a_resumed_run_keeps_the_reference_and_equals_the_uninterrupted_one(train, lora_run):
    settings = dict(**flags_of(lora_run / "export"), kl_coef=10.0, save_every=1, minibatches=2)
    settings |= dict(learning_rate=1e-2)
    whole, rows = train(output="whole", steps=3, **settings)
    train(output="parts", steps=2, **settings)
    parts, resumed = train(output="parts", steps=3, resume="latest", **settings)
    assert resumed == rows
    _, free = train(output="free", steps=3, **{**settings, "kl_coef": 0.0})
    assert free[2]["reward_mean"] != rows[2]["reward_mean"], "the KL term has an effect here"


def test_the_sft_prior_is_the_reward_of_the_model_with_the_lora(train, lora_run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square")
    settings = dict(prompts=str(tmp_path / "prompts.txt"), prior="sft", steps=1)
    priors = []
    for start in (flags_of(lora_run / "export"), dict(lora_rank=4)):
        folder, _ = train(bpgo, output=f"run-{len(priors)}", **settings, **start)
        priors.append(weights(folder, 1, "prior")["known"])
    assert priors[0].keys() == priors[1].keys() and priors[0] != priors[1]


def test_equal_loras_are_equal_files(tmp_path):
    path = tmp_path / "lora.safetensors"
    written = set()
    for _ in range(16):
        lora_file.writer(8.0)({"a.lora_A.weight": torch.ones(2, 3)}, path)
        written.add(path.read_bytes())
    assert len(written) == 1


def test_a_checkpoint_is_evaluated_without_the_file_it_began_from(train, lora_run, tmp_path):
    tensors = load_file(lora_run / "export/pytorch_lora_weights.safetensors")
    fewer = {key: value for key, value in tensors.items() if ".to_q." in key}
    lora_file.writer(16.0)(fewer, tmp_path / "fewer.safetensors")
    folder, _ = train(output="fewer", ema=0.5, **flags_of(tmp_path / "fewer.safetensors"))
    assert {key.split(".lora_")[0].split(".")[-1] for key in weights(folder, 2)} == {"to_q"}
    (tmp_path / "fewer.safetensors").unlink()
    found = []
    for spec, averaged in ((folder, False), (folder / "export", False), (folder, True)):
        model = models.load("tiny-flux", torch.float32)
        trained.load(model, trained.find(spec, averaged))
        found.append(velocities(model))
    assert (found[0] - found[1]).abs().max() <= 1e-5 < (found[0] - found[2]).abs().max()
    with pytest.raises(errors.InputError, match="no such file or folder. A run needs it at"):
        train(
            output="fewer", steps=3, ema=0.5, resume="latest", lora_rank=4, lora_alpha=16.0,
            init_lora=str(tmp_path / "fewer.safetensors"),
        )  # fmt: skip


REFUSED = {
    "no such path": (dict(init_lora="nowhere"), "--init-lora nowhere: there is no such file"),
    "a model": (dict(init_lora="{assets}/tiny-flux/transformer"), "not a LoRA"),
    "a text": (dict(init_lora="{assets}/prompts/shapes.txt"), "does not load"),
    "an empty folder": (dict(init_lora="{tmp}/empty"), "has 0 safetensors files"),
    "another rank": (dict(init_lora="{tmp}", lora_rank=8), "has rank 2. Leave --lora-rank out"),
    "another alpha": (dict(init_lora="{tmp}", lora_alpha=3.0), "alpha 4. Leave --lora-alpha out"),
    "all weights": (dict(init_lora="{tmp}", lora_rank=0, lora_alpha=0.0), "fuse_lora()"),
    "targets": (dict(init_lora="{tmp}", lora_targets="to_q"), "Leave it out"),
    "another model's": (dict(init_lora="{tmp}", model="tiny-sd"), "no layers of the unet"),
    "a text encoder's": (dict(init_lora="{tmp}/text.safetensors"), "changes the text_encoder too"),
    "layers more": (dict(init_lora="{tmp}/more.safetensors"), "this model has no"),
    "two ranks": (dict(init_lora="{tmp}/ranks.safetensors"), "the ranks 2, 3"),
    "another shape": (dict(init_lora="{tmp}/shape.safetensors"), "has shape [2, 7], this model"),
    "a larger shape": (dict(init_lora="{tmp}/larger.safetensors"), "Give a LoRA that was trained"),
    "not finite": (dict(init_lora="{tmp}/nan.safetensors"), "is not finite. Give another LoRA"),
    "a DoRA of ai-toolkit": (dict(init_lora="{tmp}/magnitude.safetensors"), "not a LoRA, it has"),
    "a DoRA of peft": (dict(init_lora="{tmp}/vector.safetensors"), "not a LoRA, it has"),
    "a bias": (dict(init_lora="{tmp}/bias.safetensors"), "not a LoRA, it has"),
    "a whole difference": (dict(init_lora="{tmp}/diff.safetensors"), "not a LoRA, it has"),
    "an embedding": (dict(init_lora="{tmp}/words.safetensors"), "not a LoRA, it has"),
    "an alpha of nan": (dict(init_lora="{tmp}/alpha.safetensors"), "its alpha is nan"),
    "alpha alone": (dict(lora_alpha=8.0, lora_rank=0), "--lora-alpha 8: needs --lora-rank"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    save(adapted("tiny-flux", alpha=4.0), folder)
    (folder / "empty").mkdir()
    good = load_file(folder / "pytorch_lora_weights.safetensors")
    key = next(iter(good))
    layer = key.split(".lora_")[0]
    width = models.load("tiny-flux", torch.float32).pipe.text_encoder.config.hidden_size
    up, down = torch.zeros(width, 2), torch.zeros(2, width)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    odd = {
        "text": {f"{text}.lora_A.weight": down, f"{text}.lora_B.weight": up},
        "more": {f"{layer}9.lora_A.weight": down, f"{layer}9.lora_B.weight": up},
        "ranks": {
            f"{layer}.lora_A.weight": torch.zeros(3, good[f"{layer}.lora_A.weight"].shape[1])
        },
        "shape": {f"{layer}.lora_A.weight": torch.zeros(2, 7)},
        "larger": {f"{layer}.lora_A.weight": torch.zeros(2, 7000)},
        "nan": {f"{layer}.lora_A.weight": good[f"{layer}.lora_A.weight"] * torch.nan},
        "magnitude": {f"{layer}.magnitude": torch.ones(width)},
        "vector": {f"{layer}.lora_magnitude_vector": torch.ones(width)},
        "bias": {f"{layer}.lora_B.bias": torch.ones(width)},
        "diff": {f"{layer}.diff_b": torch.ones(width)},
        "words": {"bundle_emb.a.string_to_param.*": torch.ones(width)},
    }
    lora_file.writer(float("nan"))(good, folder / "alpha.safetensors")
    for name, changed in odd.items():
        lora_file.writer(4.0)({**good, **changed}, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_run_can_start_from_is_one_line(what, train, files):
    settings, mention = REFUSED[what]
    path = settings.get("init_lora", "").format(tmp=files, assets=models.ASSETS)
    given = dict(lora_rank=2, lora_alpha=4.0) | settings
    if path:
        given["init_lora"] = path
    with pytest.raises(errors.InputError) as raised:
        train(**given)
    assert mention in str(raised.value) and "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


# --- Evaluation at another size ---


@pytest.mark.parametrize("name", NAMES)
def test_evaluations_have_their_own_size_and_steps(name, train, tmp_path, monkeypatch):
    """They equal those of a run that samples so in training, too, and pictures have that size."""
    from common.trainer import Evaluator, log

    few = read_prompts(models.settings(name)["eval_prompts"])[:2]
    (tmp_path / "few.txt").write_text("\n".join(few))
    settings = dict(model=name, eval_prompts=str(tmp_path / "few.txt"), sampling_steps=4, steps=1)
    settings |= dict(sde_steps=0, eval_every=1, sample_every=1, prompts_per_step=1)
    settings["reward"] = (f"{ROOT}/tests/smooth.py:green",)
    shapes, pictured = [], []
    true = Evaluator.sample_and_score

    def spied(self, prompts, **words):
        scores, media = true(self, prompts, **words)
        shapes.append(tuple(media.shape[-2:]))
        return scores, media

    monkeypatch.setattr(Evaluator, "sample_and_score", spied)
    honest = log.Log.samples
    monkeypatch.setattr(
        log.Log,
        "samples",
        lambda self, step, media, *rest: (
            pictured.append(media.shape[-2:]) or honest(self, step, media, *rest)
        ),
    )
    _, own = train(output="own", eval_height=48, eval_width=32, eval_steps=6, **settings)
    assert set(shapes) == set(map(tuple, pictured)) == {(48, 32)}
    wide = {**settings, "height": 48, "width": 32, "sampling_steps": 6}
    _, same = train(output="same", **wide)
    assert own[0]["eval_reward"] == same[0]["eval_reward"]
    _, usual = train(output="usual", **settings)
    # sampling and training are as without the flags
    for row, other in zip(own, usual, strict=True):
        differing = {key for key in row if row[key] != other[key]}
        assert all(key.startswith("eval_") for key in differing)
    assert own[0]["eval_reward"] != usual[0]["eval_reward"]
    # the updates are seen
    assert own[1]["eval_reward"] != own[0]["eval_reward"]


def test_evaluate_takes_the_size_of_a_runs_evaluations(train, tmp_path, monkeypatch):
    import evaluate

    (tmp_path / "few.txt").write_text("a red circle\na blue square")
    folder, rows = train(
        steps=1,
        eval_every=1,
        eval_prompts=str(tmp_path / "few.txt"),
        eval_height=48,
        eval_width=48,
        eval_steps=3,
        learning_rate=1e-3,
    )
    words = ["evaluate.py", str(folder), f"--output={tmp_path}/look", "--shown=0"]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main(cli.parse(evaluate.Args, evaluate.__doc__, evaluate.defaults))
    found = json.loads((tmp_path / "look/results.json").read_text())["rewards"]
    means = [row["verifier"]["mean"] for row in found.values()]
    assert means == [row["eval_reward"] for row in rows]


def test_a_size_of_evaluations_that_the_model_cannot_make_is_one_line(train):
    line = "--eval-height 30 --eval-width 32: both must be multiples of"
    with pytest.raises(errors.InputError, match=line):
        train(eval_height=30)


def test_the_sft_prior_has_the_size_of_the_training(train, tmp_path):
    (tmp_path / "few.txt").write_text("a red circle\na blue square")
    settings = dict(prompts=str(tmp_path / "few.txt"), prior="sft", steps=1)
    priors = []
    for height in (0, 48):
        folder, _ = train(bpgo, output=f"run-{height}", eval_height=height, **settings)
        priors.append(weights(folder, 1, "prior")["known"])
    assert priors[0] == priors[1]
