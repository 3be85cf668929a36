"""The judge in this process: a model of transformers that reads images and text."""

import functools
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from common import hub
from common.errors import InputError, text
from common.rewards.judge import TOKENS, Answer, Talk, digits


@functools.lru_cache(maxsize=1)  # three questions, one model
def local(model: str, expected: bool, trusted: bool, batch: int) -> "Local":
    """The model, loaded once."""
    return Local(model, expected, trusted, batch)


class Local:
    """model: a hub id or a folder. Raises InputError where it does not load."""

    def __init__(self, model: str, expected: bool, trusted: bool, batch: int) -> None:
        self.expected, self.batch = expected, batch
        if not Path(model).exists():
            hub.settle()
        try:
            self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=trusted)
            self.model = AutoModelForImageTextToText.from_pretrained(
                model, dtype="auto", trust_remote_code=trusted
            )
            self.model.eval().requires_grad_(False)
        except Exception as error:  # whatever a broken folder makes transformers say
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"reward judge: --judge-model {model} brings Python code; "
                    "--trust-remote-code runs it"
                ) from None
            raise InputError(
                f"reward judge: --judge-model {model} cannot be loaded ({text(error)}); run `hf "
                f"download {model}` "
                "where there is a network, give a folder, or --judge-url of a server"
            ) from None
        if Version(transformers.__version__) < Version(
            "5.23"
        ):  # in older ones prompts can spell control tokens
            raise InputError(
                "reward judge: a model in this process takes transformers 5.23, and so Python "
                "3.11; installed is "
                f"{transformers.__version__}: use --judge-url of a server"
            )
        self.processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def answers(self, talks: list[Talk]) -> list[Answer]:
        """Conversations -> what the model says next."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
        said = []
        for i in range(0, len(talks), self.batch):
            inputs = self.processor.apply_chat_template(
                talks[i : i + self.batch], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt", processor_kwargs=dict(padding=True), sanitize_control_tokens=True,
            ).to(device, self.model.dtype)  # fmt: skip
            said += self.chances(inputs) if self.expected else self.words(inputs)
        return said

    def words(self, inputs: BatchFeature) -> list[str]:
        """Inputs of b conversations -> b answers."""
        settings = dict(
            max_new_tokens=TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        new = self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)

    def chances(self, inputs: BatchFeature) -> list[dict[int, float]]:
        """Inputs of b conversations -> b times {digit: probability}, of the next token alone."""
        chance = self.model(**inputs, logits_to_keep=1).logits[:, -1].float().softmax(-1)
        tokens = self.processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
        return [digits(zip("0123456789", row)) for row in chance[:, tokens].tolist()]
