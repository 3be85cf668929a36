"""Make tokenizers from captions, and a learning rate schedule, for the builders of tiny models."""

import math
from collections import Counter

from transformers import CLIPTokenizer, T5Tokenizer

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


def words_of(corpus):
    return sorted({word for caption in corpus for word in caption.split()})


def clip_tokenizer(corpus, longest, marks=()):
    """Return a CLIP byte-pair tokenizer with one token for each word of the captions.

    marks: punctuation of the captions, a token each.

    The merges are learned here, because the library's trainer numbers its tokens differently in
    every process.
    """
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words_of(corpus)}
    merges = []
    while pairs := Counter(pair for parts in spelled.values() for pair in zip(parts, parts[1:])):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        spelled = {word: _merge(parts, merges[-1]) for word, parts in spelled.items()}
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *LETTERS,
        *(letter + "</w>" for letter in LETTERS),
        *(mark + "</w>" for mark in marks),
    ]
    tokens += dict.fromkeys(left + right for left, right in merges)
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=longest
    )


def _merge(parts, pair):
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def t5_tokenizer(corpus, longest, letters=LETTERS, marks=()):
    """Return a T5 unigram tokenizer: a piece for each word of the captions, and for each letter.

    marks: punctuation of the captions, a piece each at the beginning of a word and elsewhere.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    pieces += (
        [("▁" + word, -2.0) for word in words_of(corpus) if len(word) > 1]
        + [("▁a", -2.0)]
        + [(c, -10.0) for c in letters]
        + [(start + mark, -2.0) for mark in marks for start in ("▁", "")]
    )
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=longest)


def schedule(optimizer, steps, warmup=100):
    """Yield the learning rate of each step: linear warm-up, then cosine to zero."""
    peak = optimizer.param_groups[0]["lr"]
    for step in range(steps):
        rate = peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate
        yield rate
