"""The flags that all scripts share, in the groups that --help prints.

The bounds of a setting are part of its type, for example Annotated[int, From(1, 1000)]."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from common.errors import InputError

# The default for a LoRA of a folder or hub id; presets.py has those of the named models.
LORA_LEARNING_RATE = 1e-4
AnyArgs = TypeVar("AnyArgs", bound="Scored | Args")  # a script's own class


@dataclass(frozen=True)  # not a tuple: typing caches Annotated by equality
class From:
    """Give the allowed values of a setting, with both ends: Annotated[float, From(0, 1)]."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high  # false for NaN

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


class Above(From):
    """Give the allowed values of a setting, without the lower end."""

    def __contains__(self, value: float) -> bool:
        return self.low < value <= self.high

    def __str__(self) -> str:
        return f"above {self.low:g} and at most {self.high:g}"


@dataclass
class Model:
    """Choose the model and how it samples."""

    model: str = "tiny-flux"
    """Model to train or evaluate: a named model (--list-models prints them), the folder of a
    diffusers pipeline, or a hub id OWNER/NAME."""
    source: str = ""
    """Folder or hub id with other weights for a named --model. The model's settings stay. Default:
    the model's published weights."""
    height: Annotated[int, From(0, 1e5)] = 0
    """Height of the samples in pixels. 0: the model's default."""
    width: Annotated[int, From(0, 1e5)] = 0
    """Width of the samples in pixels. 0: the model's default."""
    frames: Annotated[int, From(0, 1e4)] = 0
    """Number of frames of a clip, for video models. 0: the model's default, 53."""
    fps: Annotated[float, Above(0, 1000)] = 15.0
    """Frames per second at which clips are saved and scored."""
    sampling_steps: Annotated[int, From(2, 1000)] = 16
    """Number of denoising steps per sample (T). More steps give better samples and cost more
    time."""
    shift: Annotated[float | Literal["scheduler"], Above(0, 100)] = 3.0
    """Shift of the noise levels (sigmas). 1: evenly spaced from 1 to 0. Larger values
    spend more steps at high noise. scheduler: the noise levels that the model's own diffusers
    pipeline visits in --sampling-steps steps."""
    guidance: Annotated[float, From(0, 1000)] = 3.5
    """Guidance scale, the same in rollout and update. For classifier-free guidance (Wan, Stable
    Diffusion, Qwen-Image and its editing models, Z-Image, FLUX.2 klein), 1 disables it."""
    guidance_2: Annotated[float, From(0, 1000)] = 0.0
    """Guidance scale of the second expert, for models with two (Wan2.2). 0: the value of
    --guidance."""
    batched_guidance: bool = False
    """Compute both halves of classifier-free guidance in one forward pass. This is faster and needs
    twice the memory for activations."""
    micro_batch: Annotated[int | Literal["auto"], From(1, 1e6)] = 8
    """Samples per forward pass, in rollout and update. auto: the largest batch that fits on the
    GPU; 1 on a CPU and in evaluate.py."""
    decode_batch: Annotated[int, From(0, 1e6)] = 0
    """Samples that the VAE decodes at once. 0: the value of --micro-batch."""
    offload_encoders: bool = False
    """Keep the text and image encoders on the CPU, and move them to the GPU only to encode new
    prompts. Training turns this on when the run would not fit on the GPU otherwise."""
    trust_remote_code: bool = False
    """Run Python code from the repository of --model or --judge-model. Without this flag such a
    repository is refused."""
    process_timeout: Annotated[float, Above(0, 1e5)] = 60.0
    """Minutes that processes wait for one another before the run fails. Increase it if the export
    of a large model or the judge's retries take longer."""

    def model_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of models.load that are flags."""
        return {
            "source": self.source,
            "height": self.height,
            "width": self.width,
            "frames": self.frames,
            "guidance": self.guidance,
            "guidance_2": self.guidance_2,
            "batched_guidance": self.batched_guidance,
            "offload_encoders": self.offload_encoders,
            "trust_remote_code": self.trust_remote_code,
            "decode_batch": self.decode_batch or rows_of(self.micro_batch),
        }


def rows_of(micro_batch: int | Literal["auto"]) -> int:
    """Return the rows of a pass before the memory is known: --micro-batch auto is 1."""
    return 1 if micro_batch == "auto" else micro_batch


def score_batch(micro_batch: int, reward_batch: int) -> int:
    """Return how many samples are decoded and scored together.

    These are as many whole micro-batches as fit into a batch of the rewards, and at least one.
    """
    return micro_batch * max(1, reward_batch // micro_batch)


@dataclass
class Reward:
    """Choose the rewards that score the samples."""

    reward: tuple[str, ...] = ()
    """Rewards to train on, as NAME or NAME=WEIGHT, separated by spaces; common/rewards/README.md
    lists them. A reward of your own is path/to/file.py:CLASS instead of NAME."""
    reward_units: Literal["own", "spread"] = "own"
    """Unit of the weights. own: each reward counts in its own unit. spread: each reward is first
    divided by its typical spread within a group, so equal weights have about equal influence. The
    metric share_NAME is the influence of each."""
    reward_path: tuple[str, ...] = ()
    """Local weights of reward models, as NAME=FILE, separated by spaces. Default: they come from
    the hub."""
    reward_batch: Annotated[int, From(1, 1e6)] = 16
    """Images or clips per forward pass of a reward model."""
    reward_frames: Annotated[int | Literal["first", "middle", "all"], From(1, 1e6)] = "all"
    """Frames of a clip that an image reward scores; the clip's score is their mean. first, middle,
    all, or a number of evenly spaced frames."""


@dataclass
class Judge:
    """Set up the judge for the rewards judge:..."""

    judge_url: str = ""
    """Address of an OpenAI-compatible server for the judge, as http://HOST:PORT/v1. Empty: the
    judge is loaded into this process."""
    judge_model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Model of the judge: a name that the server knows, or without --judge-url a hub id or
    folder."""
    judge_fps: Annotated[float, Above(0, 1000)] = 2.0
    """Frames per second of a clip that the judge sees."""
    judge_expected: bool = False
    """Score by the probabilities of the digits 0 to 9 instead of the number that the judge writes.
    Scores are finer then; the server must return log-probabilities."""
    judge_timeout: Annotated[float, Above(0, 1e5)] = 120.0
    """Seconds that the server has for an answer."""
    judge_retries: Annotated[int, From(0, 1000)] = 5
    """Number of times that a failed request to the server is repeated, after pauses of 0.5 to 8
    seconds. 0: never."""
    judge_concurrency: Annotated[int, From(1, 1000)] = 16
    """Number of requests that each process sends at the same time."""


@dataclass
class Scored(Judge, Reward, Model):
    """Hold the flags of models and rewards, which evaluate.py has too."""


@dataclass
class Rollout:
    """Set what a step samples."""

    prompts: str = ""
    """Training prompts: a text file with one prompt per line (for models that take images, lines
    IMAGE <tab> PROMPT); FILE:COLUMN of a csv, tsv, jsonl, ndjson, json or parquet table;
    hub:OWNER/NAME/FILE:COLUMN of a data set on the hub; or a named set: dancegrpo:images,
    dancegrpo:videos, hpdv2, first-frames. Other fields of a jsonl line are passed to rewards that
    ask for them."""
    eval_prompts: str = ""
    """Held-out prompts for --eval-every and --sample-every, given as for --prompts, or those of a
    benchmark: hpsv2:STYLE (anime, concept-art, paintings, photo, all), geneval, unigenbench,
    unigenbench:long, vbench. Empty: no evaluation and no sample grids."""
    steps: Annotated[int, From(1, 1e9)] = 100
    """Number of training steps. Each step samples, scores and updates the model."""
    prompts_per_step: Annotated[int, From(1, 1e6)] = 8
    """Number of prompts per step (P), over all processes. Each has a group of --group-size
    samples."""
    group_size: Annotated[int, From(2, 1e5)] = 12
    """Number of samples per prompt (G). Their rewards are compared with one another."""
    noise_level: Annotated[float, Above(0, 10)] = 0.3
    """Scale of the noise that sampling adds (eta). Larger values explore more and blur the samples
    more."""
    sde: Literal["dance", "flow", "ddim", "cps"] = "dance"
    """Noise schedule. dance: constant (DanceGRPO). flow: grows with the noise level (Flow-GRPO).
    ddim: DDIM's transition; cps: the same with another standard deviation (Flow-CPS). With these
    two --noise-level is at most 1."""
    same_noise: bool = False
    """Start all samples of a group from the same initial noise."""
    sde_steps: Annotated[int, From(0, 1000)] = 0
    """Add noise only in this many denoising steps, the first ones. 0: in all but the last, which
    never has noise."""
    sde_window: Annotated[int, From(0, 1000)] = 0
    """Of the steps with noise, use only this many consecutive ones, at a new random place in each
    training step. 0: all of them."""
    watch: tuple[str, ...] = ()
    """Further rewards to score and log without training on them, separated by spaces."""


@dataclass
class Update:
    """Set how a step updates the model."""

    aggregate: Literal["rewards", "advantages"] = "rewards"
    """How several rewards are combined. rewards: add up the weighted rewards, then normalise; the
    reward with the largest spread dominates. advantages: normalise each reward, then add up the
    weighted advantages."""
    timestep_fraction: Annotated[float, Above(0, 1)] = 1.0
    """Fraction of the noisy denoising steps that each update trains on, drawn at random. 1: all of
    them."""
    best_of: Annotated[int, From(0, 1e5)] = 0
    """Train only on the n/2 best and n/2 worst samples of each group; n is even. Advantages still
    use the whole group. 0: train on all samples."""
    min_spread: Annotated[float, From(0, 1e6)] = 0.0
    """Skip groups whose rewards have a smaller standard deviation than this (2605.10937, Imp1).
    Unit: that of the reward. 0: skip none."""
    updates_per_step: Annotated[int, From(1, 1000)] = 1
    """Number of passes over the samples of each step."""
    minibatches: Annotated[int, From(1, 1e5)] = 1
    """Number of optimizer updates per pass; each trains on a part of every group. The first update
    of a step has ratio 1, so --clip-range has an effect only in later ones."""
    clip_range: Annotated[float, Above(0, 1)] = 1e-4
    """Largest change of a sample's probability that an update rewards: the ratio of new to old
    probability is clipped to 1 +- this value. Smaller values are more cautious."""
    adv_clip_max: Annotated[float, Above(0, 1e6)] = 5.0
    """Largest absolute advantage. Larger ones are clamped to +- this value."""
    learning_rate: Annotated[float, Above(0, 1)] = 1e-5
    """Learning rate of AdamW, constant. Larger values learn faster and diverge earlier. With
    --lora-rank the default is the model's rate for a LoRA."""
    weight_decay: Annotated[float, From(0, 1)] = 1e-4
    """Weight decay of AdamW. 0 disables it."""
    adam_eps: Annotated[float, Above(0, 1)] = 1e-8
    """Epsilon of AdamW, added to the root of the mean squared gradient. A weight whose gradients
    are much smaller than this hardly moves: compare it with the metric grad_rms."""
    max_grad_norm: Annotated[float, Above(0, 1e6)] = 1.0
    """Largest norm of the gradients. Larger gradients are scaled down to it."""
    kl_coef: Annotated[float, From(0, 1e6)] = 0.0
    """Weight of the KL term that keeps the model close to its initial weights. 0 disables it; above
    0 an update needs a second forward pass."""
    lora_rank: Annotated[int, From(0, 4096)] = 0
    """Rank of the LoRA to train. 0: train all weights."""
    lora_alpha: Annotated[float, From(0, 1e6)] = 0.0
    """Scale of the LoRA: the product of its matrices is multiplied by alpha / rank. With a larger
    value the model changes faster at the same learning rate. 0: twice the rank."""
    lora_targets: str = ""
    """Regular expression for the names of the layers that the LoRA adapts; --list-models prints the
    defaults. Default: the linear layers of the blocks."""
    init_lora: str = ""
    """Start from this LoRA and train it further: a safetensors file or its folder, for example
    RUN/export. Rank, alpha and layers are taken from the file. The KL term keeps the model close to
    the model with this LoRA. Empty: start with a new LoRA, which changes nothing at first."""
    frozen_8bit: bool = False
    """For a LoRA on one GPU: store the frozen linear layers of the model and its encoders in 8
    bits. They need half the memory and are rounded, equally in rollout and update. Needs
    --gradient-checkpointing and the package torchao."""
    ema: Annotated[float, From(0, 0.99999)] = 0.0
    """Decay of a moving average of the trained weights, which is exported to export_ema/. Typical:
    0.99. 0 disables it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them. This is slower and needs
    much less memory. Training turns it on when the run would not fit otherwise."""
    compile: bool = False
    """Compile the blocks of the trained model with torch.compile. Steps are faster after a minute
    or more of compilation. Needs a C++ compiler."""
    attention: Literal[
        "native", "_native_flash", "_native_cudnn", "_native_efficient", "_native_math", "flex",
    ] = "native"  # fmt: skip
    """Attention kernel of the transformer, by its name in diffusers; all of them are torch's own.
    native: the kernel that torch or DIFFUSERS_ATTN_BACKEND chooses. _native_flash takes no mask
    (HunyuanVideo, Qwen-Image); flex needs --compile."""
    exchange_often: bool = False
    """For sharded weights: sync gradients after every backward pass instead of once per update.
    This needs less memory and more communication. Training turns it on when the gradients would not
    fit otherwise."""

    def lora_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of lora.adapt_model that are flags."""
        return {
            "targets": self.lora_targets,
            "rank": self.lora_rank,
            "alpha": self.lora_alpha or 2.0 * self.lora_rank,
        }


@dataclass
class Run:
    """Set the folder of the run, its checkpoints and its logs."""

    seed: Annotated[int, From(0, 2**31)] = 0
    """Seed of all random numbers: noise, order of prompts, initial LoRA weights."""
    output: str = ""
    """Folder of the run. Default: runs/SCRIPT-MODEL-N with the next free N."""
    resume: str = ""
    """Continue from a checkpoint. `latest` continues the run in --output.
    RUN/checkpoints/step_NNNNNN begins a new run in a new --output. The defaults of all flags are
    then that run's settings. Empty: start from the model's weights."""
    resume_anyway: bool = False
    """Continue a run although its prompts, model, LoRA or rewards have other contents than when it
    began. Without this flag --resume refuses that."""
    keep_checkpoints: Annotated[int, From(0, 1e9)] = 0
    """Number of checkpoints to keep; older ones are deleted. 0: keep all."""
    save_every: Annotated[int | Literal["auto"], From(0, 1e9)] = "auto"
    """Steps between checkpoints; the last step is always saved. auto: every 20 steps, or every 30
    minutes if that is earlier. 0: only the last step."""
    sample_every: Annotated[int, From(0, 1e9)] = 20
    """Steps between grids of samples for --eval-prompts. 0: never."""
    eval_every: Annotated[int, From(0, 1e9)] = 20
    """Steps between evaluations on --eval-prompts; the first and the last step are always
    evaluated. 0: never."""
    eval_height: Annotated[int, From(0, 1e5)] = 0
    """Height in pixels of samples in evaluations and sample grids. 0: the value of --height."""
    eval_width: Annotated[int, From(0, 1e5)] = 0
    """Width in pixels of samples in evaluations and sample grids. 0: the value of --width."""
    eval_steps: Annotated[int, From(0, 1000)] = 0
    """Number of denoising steps in evaluations and sample grids. 0: the value of
    --sampling-steps."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics are logged in addition to metrics.jsonl. none: nowhere else."""
    push_to_hub: str = ""
    """Hub repository OWNER/NAME to which export/ is uploaded at the end. A new repository is
    private. Empty: no upload."""


@dataclass
class Args(Judge, Run, Update, Rollout, Reward, Model):
    """Hold all flags of a training run.

    A script derives its own class from this one and adds the flags of its method as fields.
    Constants have no annotation, so they are not flags.
    """

    TITLE = ""  # name of the method on the model card; "" prints the script's name
    ARXIV = ()  # arXiv ids of its papers
    CURVES = ()  # NAME: a plot NAME.png of the metrics NAME and NAME_...
    SETTINGS = {}  # {named model: {flag: default}}
    # defaults that a --variant changes: {value: {named model, or "" for all: {flag: default}}}
    VARIANTS = {}


def defaults(cls: type[AnyArgs], model: str = "tiny-flux", **values: Any) -> AnyArgs:
    """Return an instance of cls with the defaults of a named model, and `values` over them.

    The defaults come from cls.SETTINGS, or from the fields for a folder or hub id. If the values
    have a `variant`, its defaults in cls.VARIANTS replace them. With lora_rank the default learning
    rate is lora_learning_rate of the table, else LORA_LEARNING_RATE.
    """
    table = settings_of(cls, model, values.get("variant"))
    flags = {field.name for field in dataclasses.fields(cls)} - {"source"}
    chosen = {name: value for name, value in table.items() if name in flags}
    chosen = {"model": model, **chosen, **values}
    if chosen.get("lora_rank") and "learning_rate" not in values:
        chosen["learning_rate"] = table.get("lora_learning_rate", LORA_LEARNING_RATE)
    return cls(**chosen)


def check_lists(cls: type, argv: Sequence[str]) -> None:
    """Raise InputError if the words of a command line give a flag with a list of values twice.

    The parser would keep the last list only. A flag with one value may come again: the last one
    counts, so a script can append flags to a command.
    """
    hints = get_type_hints(cls)
    lists = {flag_of(name) for name, hint in hints.items() if get_args(hint)[1:] == (...,)}
    found = {}
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        if flag not in lists:
            continue
        rest = [value] if equals else []
        for following in argv[i + 1 :]:
            if following.startswith("--"):
                break
            rest.append(following)
        if flag in found:
            every = " ".join([*found[flag], *rest])
            raise InputError(
                f"{flag}: is given twice. Write all values after one, or remove one: {flag} "
                f"{every:.200}"
            )
        found[flag] = rest


def settings_of(cls: type[AnyArgs], model: str, variant: str | None = None) -> dict[str, Any]:
    """Return the settings of a named model, {flag: default}, with those of a --variant over them.

    A folder or hub id has those of the variant alone.
    """
    changes = cls.VARIANTS.get(variant, {})
    return {**cls.SETTINGS.get(model, {}), **changes.get("", {}), **changes.get(model, {})}


def check_bounds(args: Any) -> None:
    """Raise InputError for the first setting of a dataclass that is out of its bounds."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        bounds = [bound for bound in getattr(hint, "__metadata__", ()) if isinstance(bound, From)]
        value = getattr(args, name)
        for part in value if isinstance(value, tuple) else (value,):
            _check_value(flag_of(name), part, bounds)


def _check_value(flag: str, value: Any, bounds: list[From]) -> None:
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{flag} {value!a:.300}: not UTF-8. Choose another name, or set PYTHONUTF8=1."
        ) from None
    if isinstance(value, str):  # "auto" or "scheduler", where a number has bounds
        return
    for bound in bounds:
        if value not in bound:
            raise InputError(f"{flag} {str(value):.40}: must be {bound}.")


def flag_of(name: str) -> str:
    """Return the flag of a setting: "group_size" -> "--group-size"."""
    return "--" + name.replace("_", "-")
