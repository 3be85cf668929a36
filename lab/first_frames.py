"""Make first frames for image to video, for --prompts first-frames, the default of wan2.2-i2v.

    python -m lab.first_frames                      # FLUX draws 64 of DanceGRPO's video prompts
    python -m lab.first_frames --model sd1.4 --prompts captions.txt --number 500
    python -m lab.first_frames --clips clips.txt    # the first frames of clips, from lines
                                                    # CLIP <tab> CAPTION

It writes a PNG for each and prompts.txt with lines IMAGE <tab> CAPTION; stopped and started again
it goes on. BPGO (2511.18919, appendix B) starts from the first frames of real clips, from which
objects were removed; these are whole."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import imageio.v3 as imageio
import torch
import tyro
from PIL import Image, ImageOps

from common import cli, models
from common.errors import InputError, run
from common.prompts import caption_of, image_of, prompts_of_step, read_prompts, sets
from common.trainer import Processes
from common.trainer.evaluator import load_to_sample, sample


@dataclass
class Args:
    model: str = "flux"
    """What draws them: a named text-to-image model, the folder of a pipeline, or a hub id."""
    prompts: str = "dancegrpo:videos"
    """Captions to draw, as for training."""
    clips: str = ""
    """Instead: a text file with lines CLIP <tab> CAPTION, the clip's path counted from the file's
    folder."""
    number: int = 64
    """How many of the captions, chosen by the seed; 0: all, in their order."""
    height: int = 480
    """Height in pixels."""
    width: int = 832
    """Width in pixels. What comes from a clip is cut to this shape around its middle, then
    scaled."""
    sampling_steps: int = 0
    """Denoising steps; 0: the model's own."""
    seed: int = 0
    """Chooses the captions."""
    output: str = str(sets.FIRST_FRAMES.parent)
    """Folder for them; --prompts first-frames looks in the default, of any other give
    OUTPUT/prompts.txt."""


def main(args):
    prompts = read_prompts(args.clips or args.prompts)
    if args.number:
        prompts = prompts_of_step(prompts, 0, min(args.number, len(prompts)), args.seed)
    output = begin(args)
    frame_of = beginning if args.clips else artist(args, prompts)
    for i, prompt in enumerate(prompts):
        path = output / f"{i:06d}.png"
        if not path.is_file():
            beside = path.with_suffix(".tmp")
            ImageOps.fit(frame_of(i, prompt), (args.width, args.height)).save(beside, "PNG")
            beside.rename(path)
        print(f"\r{i + 1} of {len(prompts)}", end="", flush=True)
    lines = [f"{i:06d}.png\t{caption_of(prompt)}\n" for i, prompt in enumerate(prompts)]
    (output / "prompts.txt").write_text("".join(lines), encoding="utf-8")
    print(f"\n{output}/prompts.txt")


def begin(args):
    """The folder, which remembers what is being made in it; raises InputError where it holds
    something else."""
    output, made = Path(args.output), json.dumps(asdict(args), indent=2)
    if (output / "prompts.txt").exists():
        raise InputError(
            f"--output {output} has its first frames already; delete it or give another"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        settings = output / "settings.json"
        if (
            any(output.glob("*.png"))
            and settings.exists()
            and settings.read_text(encoding="utf-8") != made
        ):
            raise InputError(
                f"--output {output} has begun with other settings; delete it or give another"
            )
        settings.write_text(made, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output}: cannot write there ({error.strerror})") from None
    return output


def beginning(_, prompt):
    """The first frame of the clip of a line CLIP <tab> CAPTION, a PIL image."""
    if not image_of(prompt):
        raise InputError(f"--clips: {prompt[:60]!r} has no clip; write lines CLIP <tab> CAPTION")
    try:
        return Image.fromarray(imageio.imread(image_of(prompt), index=0)).convert("RGB")
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"--clips: {image_of(prompt)} is no clip that can be read "
            f"({(str(error) or repr(error)).splitlines()[0]})"
        ) from None


def artist(args, prompts):
    """(i, the i-th caption) -> the PIL image that --model draws of it, without noise in its
    steps."""
    settings = models.settings(args.model)
    size = dict(height=args.height, width=args.width, offload_encoders=True)
    if models.family_of(args.model).video:
        raise InputError(
            f"--model {args.model} makes clips; take a text-to-image model, or --clips"
        )
    processes = Processes()
    guidance = settings.get("guidance", 3.5)
    model = load_to_sample(args.model, prompts, processes, guidance=guidance, **size)
    sigmas = model.sigmas(
        args.sampling_steps or settings.get("sampling_steps", 28), settings.get("shift", 3.0)
    )

    def draw(i, prompt):
        (image,) = sample(
            model,
            [prompt],
            torch.tensor([i]),
            sigmas=sigmas,
            micro_batch=1,
            device=processes.device,
        )
        return Image.fromarray((image.movedim(0, -1) * 255).round().byte().cpu().numpy())

    return draw


if __name__ == "__main__":
    run(main, tyro.cli(Args, description=__doc__, args=cli.at_home(sys.argv[1:])))
