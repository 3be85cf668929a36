"""The published sentence encoder of evaluation/sentences.py, and its vocabulary, which is that of
ImageReward's text encoder."""

import shutil
import sys

import numpy as np
import pytest
import torch
from learned import PROMPTS
from transformers import AutoModel, AutoTokenizer, BertTokenizer

from common.errors import InputError
from evaluation import bias, sentences

CAPTIONS = [
    "a red circle left of a blue square",
    "a crimson disc to the left of a blue box",
    "two dogs run through deep snow",
    "x",
]


@pytest.fixture(scope="module")
def folder():
    try:
        return sentences.folder()
    except InputError:
        pytest.skip(sentences.INSTALL)


def test_vectors_are_the_mean_of_the_tokens_that_are_no_padding(folder):
    found = sentences.vectors(CAPTIONS, folder)
    assert found.shape == (4, 384) and np.linalg.norm(found, axis=1) == pytest.approx([1] * 4)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for caption, vector in zip(CAPTIONS, found):
        with torch.no_grad():
            states = model.double()(**tokenizer(caption, return_tensors="pt")).last_hidden_state
        mean = states[0].numpy().mean(0)
        assert np.abs(mean / np.linalg.norm(mean) - vector).max() < 1e-6
    assert sentences.vectors(CAPTIONS, folder, batch=1) == pytest.approx(found, abs=1e-6)


def test_captions_that_mean_the_same_are_near(folder):
    near = sentences.vectors(CAPTIONS, folder)
    near = near @ near.T
    assert near[0, 1] > 0.7 and max(near[0, 2], near[1, 2], near[2, 3]) < 0.3


def test_other_weights_and_no_package_are_one_line(folder, tmp_path, monkeypatch):
    path = shutil.copytree(folder, tmp_path / "model")
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="the weights are not the published ones") as error:
        sentences.vectors(CAPTIONS, path)
    assert "\n" not in str(error.value)
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="install it again"):
        sentences.vectors(CAPTIONS, path)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sentences, "PACKAGE", "no_such_package_of_sentences")
    with pytest.raises(InputError, match=sentences.INSTALL) as error:
        bias.main(bias.Args("tiny-flux", embedding="minilm"))
    assert "\n" not in str(error.value)


def test_its_clusters_are_those_of_bias(folder, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["bias"])
    args = bias.Args(
        "tiny-flux", ("jpeg",), number=12, clusters=(3,), output=str(tmp_path), embedding="minilm"
    )
    (row,) = bias.main(args)
    assert row["reward"] == "jpeg" and row["clusters"] == 3


def test_imagerewards_tokenizer_with_the_real_words(folder):
    """BERT's uncased vocabulary: words, accents, numbers, other scripts, as tokenizer.json has it.

    ImageReward reads vocab.txt with transformers' BertTokenizer; the file of the fast tokenizer was
    written by its publisher.
    """
    from tokenizers import Tokenizer

    ours = BertTokenizer(str(folder / "vocab.txt"))
    published = Tokenizer.from_file(str(folder / "tokenizer.json"))
    published.no_truncation()
    published.no_padding()
    assert len(ours) == 30522
    hard = ["A Café in Zürich, 1920s!", "naïve re-enactment of #42", "中文 and 🦊", "'quoted' (x)"]
    for prompt in [*PROMPTS, *hard, *CAPTIONS]:
        assert ours(prompt).input_ids == published.encode(prompt).ids, prompt
    assert ours.convert_ids_to_tokens(ours("an astronaut").input_ids) == [
        "[CLS]", "an", "astronaut", "[SEP]",
    ]  # fmt: skip
