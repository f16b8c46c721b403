"""Windows of tokens on which a causal language model is evaluated, with the bytes and words that they stand for.

Windows of B tokens start at 0, N, 2N ... (``stride`` N). Each predicts the tokens after the end of the one before, so
that a token is predicted once, after the first window from at least B - N tokens. With N = B, the default, windows are
disjoint blocks, and nothing predicts the first token of each. The last window may be shorter. These are the windows of
"Perplexity of fixed-length models" in the documentation of transformers. Its loop takes the mean loss of each window
times one token less than it has; here all predicted tokens have the same weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, NamedSplit
from datasets.table import InMemoryTable

from ..errors import ConfigError, DataError

WORD = re.compile(r"\S+")


class Window:
    """Makes samples from the places of windows; the transform of a dataset."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens

    def __call__(self, rows: dict[str, list[int]]) -> dict[str, list[torch.Tensor]]:
        samples: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": []}
        for begin, first, end in zip(rows["begin"], rows["first"], rows["end"], strict=True):
            ids = torch.from_numpy(self.tokens[begin:end].astype(np.int64))
            labels = ids.clone()
            labels[: first - begin] = -100
            samples["input_ids"].append(ids)
            samples["labels"].append(labels)
        return samples


def places(length: int, block_size: int, stride: int, most: int | None = None) -> np.ndarray:
    """The begin, the first predicted token and the end of the windows of ``length`` tokens: (windows, 3) int64."""
    count = max(0, math.ceil((length - block_size) / stride)) + 1
    begin = np.arange(count if most is None else min(count, most), dtype=np.int64) * stride
    end = np.minimum(begin + block_size, length)
    first = np.maximum(begin + 1, np.concatenate([[0], end[:-1]]))
    return np.stack([begin, first, end], 1)[first < end]


def windows(
    tokens: Any,
    block_size: int,
    *,
    length: int | None = None,
    stride: int | None = None,
    most: int | None = None,
    sizes: dict[str, np.ndarray] | None = None,
    name: str = "dataset",
    split: NamedSplit | None = None,
) -> Dataset:
    """The windows of ``tokens[:length]`` as samples: ``input_ids``, and ``labels`` of -100 for what is context only.

    Args:
        tokens: an array, or anything whose slices are arrays.
        stride: tokens from one window to the next; default: ``block_size``.
        most: the largest number of windows.
        sizes: further columns by name: the sum over the tokens before each position, ``length`` + 1 integers. A window
            has the sum over its predicted tokens.

    Raises:
        ConfigError: ``stride`` is not between 1 and ``block_size``.
        DataError: there are less than 2 tokens.
    """
    if stride is not None and not 1 <= stride <= block_size:
        raise ConfigError(f"stride {stride}: must be between 1 and the block size of {block_size}")
    length = len(tokens) if length is None else length
    if length < 2:
        raise DataError(f"{name} has {length} tokens to evaluate on; at least 2 are needed")
    begin, first, end = places(length, block_size, stride or block_size, most).T
    table = {"begin": begin, "first": first, "end": end}
    table |= {key: before[end] - before[first] for key, before in (sizes or {}).items()}
    return Dataset(InMemoryTable(pa.table(table)), split=split).with_transform(Window(tokens))


def text_windows(
    documents: Iterable[Sequence[str | None]],
    tokenizer: Any,
    block_size: int,
    *,
    stride: int | None = None,
    most: int | None = None,
    name: str = "dataset",
    split: NamedSplit | None = None,
) -> Dataset:
    """The ``windows`` of documents, given a few at a time, with the columns ``bytes`` and ``words``.

    Documents are tokenized whole, without special tokens. An EOS token separates two of them, if the tokenizer has one;
    it is predicted like any other token, and stands for no bytes. Empty documents and None are skipped.

    Example:
        >>> from hf_ortho.tasks.tokenizer import byte_tokenizer
        >>> from hf_ortho.tasks.windows import text_windows
        >>> samples = text_windows([["one two", "three"]], byte_tokenizer(), block_size=8, stride=4)
        >>> [len(sample["input_ids"]) for sample in samples], samples.with_format(None)["bytes"][:]
        ([8, 8, 5], [6, 4, 1])
    """
    wanted = None if most is None else block_size + (most - 1) * (stride or block_size)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    separator = np.array([end, [0] * len(end), [0] * len(end)], np.int64)
    parts: list[np.ndarray] = []
    found = 0
    for batch in documents:
        for part in _tokenized([text for text in batch if text], tokenizer):
            parts += [separator, part]
            found += separator.shape[1] + part.shape[1]
        if wanted is not None and found > wanted:
            break
    ids, *sizes = np.concatenate([np.empty((3, 0), np.int64), *parts[1:]], 1)
    counts = {key: np.concatenate([[0], np.cumsum(size)]) for key, size in zip(("bytes", "words"), sizes, strict=True)}
    return windows(ids.astype(np.int32), block_size, stride=stride, most=most, sizes=counts, name=name, split=split)


def _tokenized(texts: list[str], tokenizer: Any) -> Iterable[np.ndarray]:
    """For each text the ids of its tokens, and the bytes and words that end or begin in each: (3, tokens) int64."""
    if not texts:
        return
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(texts, verbose=False, **options, **({"return_offsets_mapping": True} if fast else {}))
    for i, text in enumerate(texts):
        ids = np.fromiter(encoded["input_ids"][i], np.int64)
        if not len(ids):
            continue
        if fast:
            ends = np.maximum.accumulate(np.fromiter((stop for _, stop in encoded["offset_mapping"][i]), np.int64))
            ends[-1] = len(text)
        else:  # spread evenly
            ends = np.arange(1, len(ids) + 1) * len(text) // len(ids)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        width = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        sizes = np.concatenate([[0], np.cumsum(width)])[ends]
        words = np.searchsorted([word.start() for word in WORD.finditer(text)], ends)
        yield np.stack([ids, np.diff(sizes, prepend=0), np.diff(words, prepend=0)])


def text_metrics(loss: float, samples: Dataset) -> dict[str, float]:
    """Figures per byte and per word, which models with different tokenizers share, from the mean loss per token.

    With L = loss * predicted tokens, and the UTF-8 bytes and whitespace-separated words of the predicted tokens:
    bits_per_byte = L / (ln 2 * bytes), bits_per_word = L / (ln 2 * words), word_perplexity = exp(L / words). A word
    belongs to the token in which it begins. Without bytes or words, there are no figures per byte or per word, and
    there are none for samples other than those of ``text_windows``.
    """
    places = samples.with_format(None)
    if not {"bytes", "words"} <= set(places.column_names):
        return {}
    total = loss * (sum(places["end"]) - sum(places["first"]))
    sizes, words = sum(places["bytes"]), sum(places["words"])
    bits = total / math.log(2)
    figures = {"bits_per_byte": bits / sizes} if sizes else {}
    if words:
        with np.errstate(over="ignore"):
            figures |= {"bits_per_word": bits / words, "word_perplexity": float(np.exp(total / words))}
    return figures
