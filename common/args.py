"""The flags that all scripts share, in the groups that --help prints. A setting's bounds stand
beside its type."""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(
    frozen=True
)  # and no tuple: From(0, 1) and Above(0, 1) must differ, as typing caches Annotated by equality
class From:
    """Allowed values of a setting: Annotated[float, From(0, 1)]"""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high  # false for NaN, too

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.low:g} and at most {self.high:g}"


class Above(From):
    """The same without the lower end."""

    def __contains__(self, value: float) -> bool:
        return self.low < value <= self.high


@dataclass(frozen=True)
class Start:
    """A value of a setting for which a run keeps the weights of its start, as --kl-coef does."""

    value: str


@dataclass
class Model:
    """What samples are made with."""

    model: str = "tiny-flux"
    """A named model (--list-models), the folder of a diffusers pipeline, or a hub id."""
    source: str = ""
    """Folder or hub id of other weights for a named --model, with its settings; default: the
    model's own."""
    height: Annotated[int, From(0, 1e5)] = 0
    """Height of the samples in pixels; 0: the model's own."""
    width: Annotated[int, From(0, 1e5)] = 0
    """Width of the samples in pixels; 0: the model's own."""
    frames: Annotated[int, From(0, 1e4)] = 0
    """Frames of a clip; 0: the model's own, 53."""
    fps: Annotated[float, Above(0, 1000)] = 15.0
    """Frames a second at which clips are saved and scored."""
    sampling_steps: Annotated[int, From(2, 1000)] = 16
    """T: denoising steps."""
    shift: Annotated[float, Above(0, 100)] = 3.0
    """Shift of the sigmas: larger spends more steps at high noise."""
    guidance: Annotated[float, From(0, 1000)] = 3.5
    """Guidance scale, the same in rollout and update. Of classifier-free guidance 1 is none: Wan,
    Stable Diffusion, Qwen-Image."""
    guidance_2: Annotated[float, From(0, 1000)] = 0.0
    """Guidance scale of the second expert of a model that has two (Wan2.2); 0: the same."""
    batched_guidance: bool = False
    """Compute both halves of classifier-free guidance in one forward pass: faster, for twice the
    memory."""
    micro_batch: Annotated[int | Literal["auto"], From(1, 1e6)] = 8
    """Rows of one forward pass, of rollout and update alike; auto: in training on GPUs as many as
    fit, else 1."""
    decode_batch: Annotated[int, From(0, 1e6)] = 0
    """Rows that the VAE decodes at once; 0: a micro-batch."""
    offload_encoders: bool = False
    """Keep the text and image encoders off the accelerator except when a new prompt has to be
    encoded. Chosen by itself where the run would not fit otherwise, as is
    --gradient-checkpointing."""
    trust_remote_code: bool = False
    """Run the Python code that the repository of a --model or --judge-model brings along; else it
    is refused."""
    process_timeout: Annotated[float, Above(0, 1e5)] = 60.0
    """Minutes that processes wait for one another: the main one's export of a large model takes
    some, a judge's retries too."""


@dataclass
class Reward:
    """What samples are scored with."""

    reward: tuple[str, ...] = ()
    """Rewards, NAME or NAME=WEIGHT, several separated by spaces; common/rewards/README.md lists
    them. For one of your own path/to/file.py:CLASS stands in the place of NAME."""
    reward_units: Literal["own", "spread"] = "own"
    """What the weights count: each reward in its own unit; or in units of the spread within a group
    that it declares, so that two of weight 1 have about the same say. share_NAME in the metrics is
    the say that each had."""
    reward_path: tuple[str, ...] = ()
    """Weights of rewards that do not come from the hub: NAME=FILE, several separated by spaces."""
    reward_batch: Annotated[int, From(1, 1e6)] = 16
    """Images or clips that a reward model looks at at once."""
    reward_frames: Annotated[int | Literal["first", "middle", "all"], From(1, 1e6)] = "all"
    """Frames of a clip that a reward for images scores, as their mean: one, all, or so many, evenly
    spaced."""


@dataclass
class Judge:
    """The rewards judge:..."""

    judge_url: str = ""
    """OpenAI-compatible server of the judge, http://HOST:PORT/v1; none: the judge is loaded into
    this process."""
    judge_model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """The judge: a name that the server knows, or a hub id or folder."""
    judge_fps: Annotated[float, Above(0, 1000)] = 2.0
    """Frames a second of a clip that the judge sees."""
    judge_expected: bool = False
    """Score by the judge's probabilities of the digits 0 to 9 instead of by the number that it
    writes: finer."""
    judge_timeout: Annotated[float, Above(0, 1e5)] = 120.0
    """Seconds that the server has for an answer."""
    judge_retries: Annotated[int, From(0, 1000)] = 5
    """Times that a request is repeated, after 0.5 seconds at first and 8 at last, before it counts
    as failed."""
    judge_concurrency: Annotated[int, From(1, 1000)] = 16
    """Requests that each process has under way at once."""


@dataclass
class Scored(Judge, Reward, Model):
    """A model, and rewards of its samples: the flags that evaluate.py has too."""


@dataclass
class Rollout:
    """What a step samples."""

    prompts: str = ""
    """Text file with one prompt a line; for image-to-video models IMAGE <tab> PROMPT. Or
    FILE:COLUMN of a table that is csv, tsv, jsonl, json or parquet; hub:OWNER/NAME/FILE:COLUMN of a
    data set on the hub; or a set by its name (common/prompts/sets.py): dancegrpo:images,
    dancegrpo:videos, hpdv2, first-frames. Other fields of jsonl go to the rewards that ask for
    them."""
    eval_prompts: str = ""
    """Held-out prompts for --eval-every and --sample-every, named in the same way, or a
    benchmark's: hpsv2:STYLE (anime, concept-art, paintings, photo, all), geneval, unigenbench,
    unigenbench:long, vbench. None: neither."""
    steps: Annotated[int, From(1, 1e9)] = 100
    """Training steps: rollout, reward, advantage, update."""
    prompts_per_step: Annotated[int, From(1, 1e6)] = 8
    """P: prompts of a step, over all processes."""
    group_size: Annotated[int, From(2, 1e5)] = 12
    """G: samples of each prompt."""
    noise_level: Annotated[float, Above(0, 10)] = 0.3
    """eta: scale of the noise that sampling adds. More explores more and blurs more."""
    sde: Literal["dance", "flow", "ddim"] = "dance"
    """Noise: DanceGRPO's constant; Flow-GRPO's, growing with sigma; DDIM's, with a transition of
    its own."""
    same_noise: bool = False
    """Start all samples of a group from the same noise."""
    sde_steps: Annotated[int, From(0, 1000)] = 0
    """Add noise in this many steps only, the first; 0: in all but the last, which never is
    noisy."""
    sde_window: Annotated[int, From(0, 1000)] = 0
    """Of these, add noise in this many consecutive ones only, a new random window each training
    step; 0: in all."""
    watch: tuple[str, ...] = ()
    """Rewards to score and log beside those, without training on them."""


@dataclass
class Update:
    """What a step learns from them, and how."""

    aggregate: Literal["rewards", "advantages"] = "rewards"
    """Of several rewards: normalise their weighted sum, where the one with the largest spread
    decides; or each by itself, and add up the advantages with the weights."""
    timestep_fraction: Annotated[float, Above(0, 1)] = 1.0
    """Share of the noisy denoising steps that an update trains on, drawn at random for each
    update."""
    best_of: Annotated[int, From(0, 1e5)] = 0
    """Train on the n/2 best and n/2 worst samples of each group; advantages still come from all G.
    0: train on all."""
    min_spread: Annotated[float, From(0, 1e6)] = 0.0
    """Leave out the groups whose rewards have a smaller standard deviation than this (2605.10937,
    Imp1)."""
    updates_per_step: Annotated[int, From(1, 1000)] = 1
    """Passes over each rollout."""
    minibatches: Annotated[int, From(1, 1e5)] = 1
    """Optimizer updates of a pass, each on its share of every group. The first update of a rollout
    finds the ratio 1: only in later ones --clip-range does something."""
    clip_range: Annotated[float, Above(0, 1)] = 1e-4
    """The ratio is clipped to 1 +- this."""
    adv_clip_max: Annotated[float, Above(0, 1e6)] = 5.0
    """Advantages are clamped to +- this."""
    learning_rate: Annotated[float, Above(0, 1)] = 1e-5
    """AdamW's learning rate, constant. With --lora-rank another default, for a LoRA."""
    weight_decay: Annotated[float, From(0, 1)] = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Above(0, 1e6)] = 1.0
    """Gradients are scaled down to this norm."""
    kl_coef: Annotated[float, From(0, 1e6)] = 0.0
    """Weight of the KL term against the initial weights; above 0 it costs a second forward pass."""
    lora_rank: Annotated[int, From(0, 4096)] = 0
    """Rank of the LoRA that is trained; 0: all weights are."""
    lora_targets: str = ""
    """Regular expression of the layers that the LoRA adapts; default: the linear layers of the
    blocks."""
    ema: Annotated[float, From(0, 0.99999)] = 0.0
    """Decay of a running average of the trained weights, exported beside them; 0: no average."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, for much less
    memory."""
    compile: bool = False
    """Compile the blocks of what is trained (torch.compile), the same ones in rollout and update:
    faster steps, after a minute or more. Needs a C++ compiler."""
    attention: Literal[
        "native", "_native_flash", "_native_cudnn", "_native_efficient", "_native_math", "flex",
        "flash", "flash_hub", "_flash_3", "_flash_3_hub", "xformers",
    ] = "native"  # fmt: skip
    """Kernels of the transformer's attention, by diffusers' names (those that have gradients);
    native: what torch or DIFFUSERS_ATTN_BACKEND chooses."""
    exchange_often: bool = False
    """Sharded weights: processes exchange gradients after every backward pass instead of once an
    update; more traffic, but none of them holds the gradients of all weights. Chosen by itself
    where they would not fit otherwise."""


@dataclass
class Run:
    """The run and its folder."""

    seed: Annotated[int, From(0, 2**31)] = 0
    """Everything random follows from it."""
    output: str = ""
    """Folder of the run; default: runs/SCRIPT-MODEL-N with the next free N."""
    resume: str = ""
    """`latest`, or RUN/checkpoints/step_NNNNNN: go on from there with that run's settings; in a new
    --output as a new run."""
    keep_checkpoints: Annotated[int, From(0, 1e9)] = 0
    """Keep this many of the latest checkpoints; 0: all."""
    save_every: Annotated[int | Literal["auto"], From(0, 1e9)] = "auto"
    """Steps between checkpoints; the last step always saves. 0: only the last; auto: 20, or half an
    hour of them, whichever comes first."""
    sample_every: Annotated[int, From(0, 1e9)] = 20
    """Steps between grids of samples; 0: never."""
    eval_every: Annotated[int, From(0, 1e9)] = 20
    """Steps between evaluations on --eval-prompts; first and last step always. 0: never."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where the metrics go besides metrics.jsonl."""
    push_to_hub: str = ""
    """OWNER/NAME of a repository of the hub, a private one if it is new, into which export/ goes in
    the end."""


@dataclass
class Args(Judge, Run, Update, Rollout, Reward, Model):
    """All of a training run's. A method's own are the fields of the class that its script
    derives."""

    # of named models, beyond those of common/models; no field, as it has no annotation
    SETTINGS = {}
