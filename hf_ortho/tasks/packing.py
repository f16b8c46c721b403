"""Packing of documents into blocks of equal size, and of samples into batches."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import default_data_collator

# Documents to tokenize at once: enough for the threads of the tokenizer, few enough for its memory use of hundreds of
# bytes per token.
DOCUMENTS = 16


class Packer:
    """Tokenizes documents and cuts them into blocks of exactly ``block_size`` tokens.

    Each document is followed by the token ``end``, by default the EOS token, if the tokenizer has one. Leftover tokens
    start the first block of the next call.
    """

    def __init__(self, tokenizer, block_size: int, end: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.end = tokenizer.eos_token_id if end is None else end
        self.left = np.empty(0, np.int64)

    def __call__(self, texts: Iterable[str | None]) -> np.ndarray:
        """The blocks completed by these documents, (count, block_size) int64. Empty documents and None are skipped."""
        documents = [text for text in texts if text]
        end = [] if self.end is None else [self.end]
        encoded = self.encode(documents) if documents else []
        new = np.fromiter(chain.from_iterable(chain(document, end) for document in encoded), np.int64)
        tokens = np.concatenate([self.left, new])
        whole = len(tokens) // self.block_size * self.block_size
        # A copy: a view would keep all tokens of this call in memory.
        self.left = tokens[whole:].copy()
        return tokens[:whole].reshape(-1, self.block_size)

    def encode(self, documents: list[str]) -> Iterable[Iterable[int]]:
        """The tokens of each document, without special tokens."""
        return self.encoded(documents)["input_ids"]

    def encoded(self, documents: list[str]):
        """The output of the tokenizer without special tokens."""
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(documents, verbose=False, **options)


def padded(samples: list[dict], padding: int | None = None) -> dict[str, Tensor]:
    """A batch of ``input_ids`` and ``labels``, both (samples, length) int64; the collator of language modeling.

    Shorter samples are padded at the right, so that positions start at the text, with labels of -100, and there is an
    ``attention_mask``. Without the token ``padding``, which a causal language model need not have, it is token 0, which
    no token before sees, and samples of one length have no mask.
    """
    ids, labels = ([torch.as_tensor(sample[key]) for sample in samples] for key in ("input_ids", "labels"))
    lengths = torch.tensor([len(row) for row in ids])
    if padding is None and (lengths == lengths[0]).all():
        return default_data_collator(samples)
    batch = {"input_ids": pad_sequence(ids, True, padding or 0), "labels": pad_sequence(labels, True, -100)}
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch | {"attention_mask": mask.long()}
