"""Run the judge in this process, with a model of transformers that reads images and text."""

import functools
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from common import errors, hub
from common.errors import InputError
from common.rewards.judge_answers import CUT
from common.rewards.judge_questions import TOKENS, Answer, Talk, digits

NEEDED = "5.23"  # in older releases of transformers a prompt can spell control tokens


@functools.lru_cache(maxsize=1)  # three questions share one model
def local(model: str, expected: bool, trusted: bool, batch: int) -> "Local":
    """Return the model. It is loaded once."""
    return Local(model, expected, trusted=trusted, batch=batch)


class Local:
    """Answer conversations with a model in this process, `batch` at a time."""

    def __init__(self, model: str, expected: bool, trusted: bool, batch: int) -> None:
        """Load a hub id or a folder. trusted: run its Python code. Raises InputError."""
        if Version(transformers.__version__) < Version(NEEDED):
            raise InputError(
                f"reward judge: a judge in this process needs transformers {NEEDED} (Python 3.11), "
                f"and {transformers.__version__} is installed. Use a server by --judge-url."
            )
        self.expected = expected
        self.batch = batch
        with errors.loading(
            "reward judge: --judge-model",
            model,
            do=f"run `hf download {model}`, give a folder, use a server by --judge-url, or add "
            "--trust-remote-code for a model with Python code",
        ):
            if not Path(model).exists():
                hub.settle()
            self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=trusted)
            self.model = AutoModelForImageTextToText.from_pretrained(
                model, dtype="auto", trust_remote_code=trusted
            )
            self.model.eval().requires_grad_(False)
            self.processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def answers(self, talks: list[Talk]) -> list[Answer]:
        """Return the model's answer to each conversation."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
        said = []
        for i in range(0, len(talks), self.batch):
            inputs = self.processor.apply_chat_template(
                talks[i : i + self.batch],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
                sanitize_control_tokens=True,
            ).to(device, self.model.dtype)
            said += self._chances(inputs) if self.expected else self._words(inputs)
        return said

    def _words(self, inputs: BatchFeature) -> list[str]:
        """Return b answers to the inputs of b conversations, by greedy decoding."""
        whole = self.model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        new = whole[:, inputs["input_ids"].shape[1] :]
        said = self.processor.batch_decode(new, skip_special_tokens=True)
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(new, torch.tensor(ends or [], device=new.device)).any(1).tolist()
        return [words if end else f"{words}{CUT}" for words, end in zip(said, ended)]

    def _chances(self, inputs: BatchFeature) -> list[dict[int, float]]:
        """Return {digit: probability} of the next token, for each of b conversations."""
        chance = self.model(**inputs, logits_to_keep=1).logits[:, -1].float().softmax(-1)
        tokens = self.processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
        return [digits(zip("0123456789", row)) for row in chance[:, tokens].tolist()]
