"""Packing of documents into blocks of equal size."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np

# Documents to tokenize at once: enough for the threads of the tokenizer, few enough for its memory use of hundreds of
# bytes per token.
DOCUMENTS = 16


class Packer:
    """Tokenizes documents and cuts them into blocks of exactly ``block_size`` tokens.

    Each document is followed by the EOS token, if the tokenizer has one. Leftover tokens start the first block of the
    next call.
    """

    def __init__(self, tokenizer, block_size: int) -> None:
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.left = np.empty(0, np.int64)

    def __call__(self, texts: Iterable[str | None]) -> np.ndarray:
        """The blocks completed by these documents, (count, block_size) int64. Empty documents and None are skipped."""
        documents = [text for text in texts if text]
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        encoded = self.tokenizer(documents, verbose=False, **options)["input_ids"] if documents else []
        new = np.fromiter(chain.from_iterable(chain(document, end) for document in encoded), np.int64)
        tokens = np.concatenate([self.left, new])
        whole = len(tokens) // self.block_size * self.block_size
        # A copy: a view would keep all tokens of this call in memory.
        self.left = tokens[whole:].copy()
        return tokens[:whole].reshape(-1, self.block_size)
