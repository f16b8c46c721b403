"""Masked blocks of tokens: text packed between the special tokens of the model, with tokens hidden at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any
from zlib import crc32

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from ..errors import ConfigError, DataError
from .arguments import DataArguments
from .columns import text_column
from .data import documents_of
from .packing import DOCUMENTS, Packer
from .tokens import BLOCK, Tokens, cached_tokens, numbered

FEATURES = Features({"tokens": List(Value("int64"))})
NEEDED = {"mask": "[MASK]", "pad": "[PAD]"}


class WordPacker(Packer):
    """Packs 2 t + 1 for each token t that starts a word, and 2 t for the others."""

    def __init__(self, tokenizer, block_size: int, end: int | None) -> None:
        super().__init__(tokenizer, block_size, None if end is None else 2 * end + 1)

    def encode(self, documents: list[str]) -> Iterator[np.ndarray]:
        encoded = self.encoded(documents)
        for i, ids in enumerate(encoded["input_ids"]):
            words = np.array([-1 if word is None else word for word in encoded.word_ids(i)], np.int64)
            yield 2 * np.array(ids, np.int64) + (np.diff(words, prepend=-2) != 0)


class MaskedBlocks:
    """Samples of a masked language model; the transform of a dataset of packed tokens.

    The tokens of a block, its body, are packed as by ``Packer``, with the separator token after each document, and lie
    between the special tokens that the tokenizer puts around a text. A last shorter block is kept. Each token that is
    not special is hidden with ``mask_probability``, by the collator of transformers; at least one per block.

    The masks depend on the tokens of the block and on integers ``key`` alone: without a key they are always the same.
    """

    def __init__(self, tokenizer: Any, block_size: int, arguments: DataArguments, tokens: Tokens | None = None) -> None:
        whole = arguments.whole_word_mask
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        for kind, usual in NEEDED.items():
            if getattr(tokenizer, f"{kind}_token_id") is None:
                add = f"tokenizer.add_special_tokens({{'{kind}_token': '{usual}'}})"
                raise DataError(
                    f"the tokenizer of {name} has no {kind} token, which masked language modeling needs; give another "
                    f"with --tokenizer, or add {usual} with {add} and model.resize_token_embeddings(len(tokenizer))"
                )
        if whole and not tokenizer.is_fast:
            raise ConfigError(
                f"whole_word_mask: needs a tokenizer of the tokenizers library, which {type(tokenizer).__name__} is not"
            )
        around = tokenizer("a", return_special_tokens_mask=True)
        ids = np.array(around["input_ids"], np.int64)
        text = [i for i, special in enumerate(around["special_tokens_mask"]) if not special]
        first, last = (text[0], text[-1] + 1) if text else (len(ids) // 2, len(ids) // 2)  # "a" may be no token
        self.prefix, self.suffix = ids[:first], ids[last:]
        self.size = block_size - len(self.prefix) - len(self.suffix)
        if self.size < 1:
            raise ConfigError(
                f"block_size {block_size}: must be at least {block_size - self.size + 1}, as {name} puts "
                f"{block_size - self.size} special tokens around each block"
            )
        self.tokenizer, self.whole, self.tokens = tokenizer, whole, tokens
        self.end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        self.special = np.unique(tokenizer.all_special_ids)
        shares: dict[str, Any] = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if whole else {}
        self.collator = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=arguments.mask_probability, whole_word_mask=whole, **shares
        )

    # ---- packing ----

    def packed(self, rows: Iterable[dict], column: str, held_back: frozenset[str] = frozenset()) -> Iterator[dict]:
        """The bodies of all blocks as ``tokens``, without the held-out documents."""
        pack, rows = self.packer(), iter(rows)
        while texts := [row[column] for row in islice(rows, DOCUMENTS)]:
            yield from ({"tokens": body.copy()} for body in pack(text for text in texts if text not in held_back))
        yield from ({"tokens": body} for body in self.rest(pack))

    def packer(self) -> Packer:
        return (WordPacker if self.whole else Packer)(self.tokenizer, self.size, self.end)

    def rest(self, pack: Packer) -> list[np.ndarray]:
        """The last body, shorter than the others, if there is any; without a separator at its end."""
        body = pack.left[:-1] if len(pack.left) and pack.left[-1] == pack.end else pack.left
        return [body] if len(body) else []

    def dataset(self, bodies: Iterable[dict]) -> Dataset:
        """The samples of ``packed`` as a dataset."""
        stored = {"tokens": [np.asarray(body["tokens"]) for body in bodies]}
        return Dataset.from_dict(stored, FEATURES).with_transform(self)

    # ---- masking ----

    def __call__(self, rows: dict[str, list]) -> dict[str, list[Tensor]]:
        samples = [self.masked(body) for body in self.bodies(rows)]
        return {key: [sample[key] for sample in samples] for key in ("input_ids", "labels")}

    def sample(self, body: dict, *key: int) -> dict[str, Tensor]:
        """The sample of one body of ``packed``."""
        return self.masked(np.asarray(body["tokens"]), *key)

    def unmasked(self, rows: dict[str, list]) -> list[Tensor]:
        """The blocks of some rows with nothing hidden, each (length,) int64."""
        return [torch.from_numpy(self._block(body)[0]) for body in self.bodies(rows)]

    def bodies(self, rows: dict[str, list]) -> list[np.ndarray]:
        """The bodies of some rows, which have their tokens, or their numbers in a token cache."""
        if self.tokens is None:
            return [np.asarray(tokens, np.int64) for tokens in rows["tokens"]]
        bodies, size, count = [], self.size, len(self.tokens)
        for i in rows[BLOCK]:
            body = self.tokens[i * size : min((i + 1) * size, count)].astype(np.int64)
            bodies.append(body[:-1] if len(body) < size and body[-1] == self.end else body)
        return bodies

    def _block(self, body: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a block, and whether each starts a word."""
        ids, starts = (body >> 1, body & 1) if self.whole else (body, np.ones_like(body))
        ends = [np.ones_like(part) for part in (self.prefix, self.suffix)]
        return np.concatenate([self.prefix, ids, self.suffix]), np.concatenate([ends[0], starts, ends[1]])

    def masked(self, body: np.ndarray, *key: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` of a block, each (length,); the labels are -100 where nothing is hidden."""
        ids, starts = self._block(body)
        special = np.isin(ids, self.special)
        starts |= np.concatenate([[True], special[:-1]])
        # The collator finds words by gaps between the offsets of tokens: here, one before each start of a word.
        offsets = np.arange(len(ids)) + np.cumsum(starts)
        # With its length, as zeros at the end would change nothing.
        seed = int(np.random.SeedSequence([crc32(ids.tobytes()), len(key), *key]).generate_state(1)[0])
        random = self.collator.generator = torch.Generator().manual_seed(seed)
        hidden, labels = self.collator.torch_mask_tokens(
            torch.from_numpy(ids.copy())[None],
            special_tokens_mask=torch.from_numpy(special)[None],
            offset_mapping=torch.from_numpy(np.stack([offsets, offsets + 1], -1))[None],
        )
        self.collator.generator = None  # not a part of the transform: it is not hashed with it
        free = np.flatnonzero(~special)
        if not (labels != -100).any() and len(free):  # a short block; its mean loss would not exist
            chosen = free[int(torch.randint(len(free), (), generator=random))]
            words = np.cumsum(starts)
            word = torch.from_numpy(words == words[chosen])[None]
            labels = torch.from_numpy(ids)[None].where(word, -100)
            hidden = hidden.masked_fill(word, self.tokenizer.mask_token_id)
        return {"input_ids": hidden[0], "labels": labels[0]}


class VariedMasks(torch.utils.data.Dataset):
    """Masked blocks with other masks in each epoch, which depend only on the seed, the epoch, the block and its number.

    So they are the same for any number of workers and processes, and after resuming in the middle of an epoch.
    """

    def __init__(self, samples: Dataset, seed: int) -> None:
        self.rows, self.masks, self.seed = samples.with_format(None), masks_of(samples), seed
        # Shared with the workers of a DataLoader, which may persist across epochs.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        numbers = [int(i) for i in indices]
        bodies = self.masks.bodies(self.rows[numbers])
        key = self.seed, int(self.epoch)
        return [self.masks.masked(body, *key, i) for i, body in zip(numbers, bodies, strict=True)]


def masks_of(samples: Dataset) -> MaskedBlocks:
    """The transform of a dataset of masked blocks."""
    return samples.format["format_kwargs"]["transform"]


def masked_blocks(rows: Dataset, tokenizer: Any, block_size: int, arguments: DataArguments, name: str) -> Dataset:
    """All blocks of a text dataset as samples of a masked language model; see ``MaskedBlocks``.

    Raises:
        DataError: there is no text column, or no text, or the tokenizer has no mask token.
        ConfigError: ``block_size`` is too small, or the tokenizer does not know the words.
    """
    masks = MaskedBlocks(tokenizer, block_size, arguments)
    if arguments.tokenize:
        tokens, cache = cached_tokens(rows, tokenizer, arguments.text_column, name, masks.end)
        masks = MaskedBlocks(tokenizer, block_size, arguments, tokens)
        whole, rest = divmod(len(tokens), masks.size)
        only_end = rest == 1 and tokens[len(tokens) - 1 : len(tokens)][0] == masks.end
        samples = numbered(whole + (rest > 0 and not only_end), masks, [cache, block_size, "masked"])
    else:
        column, pack, last = text_column(rows, arguments.text_column, name), masks.packer(), len(rows) - 1

        def bodies(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
            found = list(pack(batch[column]))
            return {"tokens": found + (masks.rest(pack) if numbers[-1] == last else [])}

        options = {"batch_size": DOCUMENTS, "remove_columns": rows.column_names, "features": FEATURES}
        samples = rows.map(bodies, batched=True, with_indices=True, **options).with_transform(masks)
    if not len(samples):
        raise DataError(f"{name} has no text")
    return samples


def first_masked_blocks(
    rows: Dataset, tokenizer: Any, block_size: int, count: int, arguments: DataArguments, name: str
) -> Dataset:
    """The first ``count`` samples of ``masked_blocks``; raises as it does."""
    masks = MaskedBlocks(tokenizer, block_size, arguments)
    batches = documents_of(rows, arguments.text_column, name, count * block_size)
    bodies = masks.packed(({"text": text} for texts in batches for text in texts), "text")
    samples = masks.dataset(islice(bodies, count))
    if not len(samples):
        raise DataError(f"{name} has no text")
    return samples
