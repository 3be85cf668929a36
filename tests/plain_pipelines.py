"""Exports as a stranger loads them: diffusers alone, in a process of its own. plain_pipelines.py
FILE, with FILE a JSON list of jobs (test_evaluate.py writes it); each leaves its samples in
job["out"]."""

import json
import sys

import diffusers
import torch
from PIL import Image


def samples(job):
    """[b, (F,) 3, H, W] in [0, 1]"""
    pipe = getattr(diffusers, job["pipeline"]).from_pretrained(job["folder"], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if job["lora"]:
        pipe.load_lora_weights(job["lora"])
    if job["lora_2"]:
        pipe.load_lora_weights(job["lora_2"], load_into_transformer_2=True)
    sigmas, latents = job["sigmas"][:-1], torch.load(job["latents"], weights_only=True)
    settings = dict(
        prompt=job["prompts"], height=32, width=32, guidance_scale=job["guidance"], latents=latents
    )
    settings |= dict(num_inference_steps=len(sigmas), output_type="pt")
    if job["pipeline"] == "StableDiffusionPipeline":
        return pipe(**settings, eta=0.0).images
    settings["max_sequence_length"] = getattr(pipe, "tokenizer_2", pipe.tokenizer).model_max_length
    if job["pipeline"] == "FluxPipeline":
        return pipe(**settings, sigmas=sigmas).images
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    honest = pipe.scheduler.set_timesteps  # Wan's pipelines take no sigmas, their scheduler does
    pipe.scheduler.set_timesteps = lambda number, device=None: honest(sigmas=sigmas, device=device)
    if not job["images"]:
        return pipe(**settings, num_frames=5).frames
    one_by_one = []  # a call takes one image
    for prompt, image, noise in zip(job["prompts"], job["images"], latents.split(1)):
        settings |= dict(prompt=prompt, image=Image.open(image), latents=noise)
        one_by_one.append(pipe(**settings, num_frames=5).frames)
    return torch.cat(one_by_one)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        for job in json.load(file):
            with torch.no_grad():
                torch.save(samples(job), job["out"])
