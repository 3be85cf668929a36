"""Models: the table of names with the settings that their papers print, and loading by name, folder or hub id.

A model is one class per diffusers pipeline family, with
    encode(prompts) -> cond                  {name: [b, ...]}, once for each distinct prompt
    noise_shape                              shape of one row's latent
    velocity(x, sigma, cond) -> [b, ...]     float32, guidance inside; x [b, *noise_shape], sigma a scalar or [b]
    decode(x0) -> [b, C, H, W] in [0, 1]
    still(prompts) -> [b, F, C, H, W]        image-to-video alone: the conditioning image as a still video
    trainable                                {name: module}, what is trained
    lora_targets                             regular expression of the layers that LoRA adapts
    pipe                                     the diffusers pipeline itself
"""

import importlib
import json
from pathlib import Path

import diffusers
import transformers

from common.errors import InputError

ASSETS = Path(__file__).resolve().parents[2] / "assets"

FAMILIES = {"FluxPipeline": ("common.models.flux", "Flux")}

# Settings by name; --model NAME makes them the defaults of the command line. FLUX: DanceGRPO (2505.07818).
MODELS = {
    "tiny-flux": dict(
        source=str(ASSETS / "tiny-flux"), height=32, width=32, guidance=3.5,
        prompts=str(ASSETS / "prompts/shapes.txt"), eval_prompts=str(ASSETS / "prompts/shapes_heldout.txt"),
        reward=("verifier",),
        steps=60, prompts_per_step=8, group_size=12, sampling_steps=8, sde="flow", noise_level=0.7, shift=1.0,
        timestep_fraction=1.0, same_noise=False, clip_range=1e-3, learning_rate=2e-4, micro_batch=96,
    ),
    "flux": dict(
        source="black-forest-labs/FLUX.1-dev", height=720, width=720, guidance=3.5,
        steps=300, prompts_per_step=8, group_size=12, sampling_steps=16, sde="dance", noise_level=0.3, shift=3.0,
        timestep_fraction=0.6, same_noise=True, clip_range=1e-4, learning_rate=1e-5, micro_batch=1,
    ),
}  # fmt: skip


def settings(name):
    """The table's settings of a named model; none for a folder or hub id."""
    return MODELS.get(name, {})


def take(cond, rows):
    """The given rows of a conditioning {name: [b, ...]}."""
    return {name: value[rows] for name, value in cond.items()}


def family(name):
    """A named model, a folder or a hub id -> the class of its family, read from the pipeline's model_index.json.

    Raises InputError that says what to do; loads no weights.
    """
    pipeline = json.loads(_index_file(settings(name).get("source", name)).read_text()).get("_class_name")
    if pipeline not in FAMILIES:
        raise InputError(f"model: {name} is a {pipeline}; supported are {', '.join(FAMILIES)}")
    module, attribute = FAMILIES[pipeline]
    return getattr(importlib.import_module(module), attribute)


def load(name, dtype, height=0, width=0, guidance=3.5):
    """The model on the CPU, weights in `dtype`; height and width in pixels, 0: the model's own. Raises InputError."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    source, cls = settings(name).get("source", name), family(name)
    try:
        return cls.load(source, dtype, height=height, width=width, guidance=guidance)
    except (OSError, ValueError) as error:  # a missing or broken weight file; a size that does not fit
        raise InputError(f"model: {source} does not load: {error}") from None


def _index_file(source):
    if Path(source).is_dir():
        index = Path(source) / "model_index.json"
        if not index.is_file():
            raise InputError(
                f"model: {source} has no model_index.json; --model takes the folder of a whole diffusers pipeline"
            )
        return index
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    names = f"named models: {', '.join(MODELS)}"
    try:
        return Path(hf_hub_download(source, "model_index.json"))
    except GatedRepoError:
        raise InputError(
            f"model: {source} is gated: accept its licence on huggingface.co, run `hf auth login`, then start again"
        ) from None
    except HFValidationError:
        raise InputError(f"model: there is no folder {source} and it is no hub id; {names}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise InputError(
            f"model: {source} is no folder here, not in the Hugging Face cache, and the hub does not give it; check "
            f"the spelling and the network, run `hf auth login` for a gated model, or give --model PATH ({names})"
        ) from None
