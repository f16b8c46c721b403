"""Tokenizers by name, for models that have none: saved ones, one token per byte, or byte-pair encoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..checkpoints.listing import TOKENIZER
from ..checkpoints.load import Checkpoint
from ..checkpoints.place import check_exists
from ..checkpoints.processors import TOKENIZER_FILES, processor_of
from ..errors import CheckpointError, ConfigError
from ..files import explain

END = "<|endoftext|>"


def named_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """``bytes``, or the tokenizer of a folder or Hub model.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    if name == "bytes":
        return byte_tokenizer()
    check_exists(name)
    try:
        tokenizer = processor_of(AutoTokenizer, TOKENIZER_FILES, name, revision, trust_remote_code)
    except CheckpointError:
        raise
    except Exception as error:  # whatever the libraries raise for such files
        raise CheckpointError(f"the tokenizer of {name}: {explain(error)}") from error
    if tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer; give another folder or Hub model, or bytes")
    return tokenizer


def use_tokenizer(checkpoint: Checkpoint, name: str | None, *, trust_remote_code: bool = False) -> None:
    """Replace the tokenizer of a checkpoint by that with a name, see ``named_tokenizer``; nothing for None.

    Raises:
        CheckpointError: there is none.
        ConfigError: it has more tokens than the vocabulary of the model.
    """
    if name is None:
        return
    tokenizer = named_tokenizer(name, trust_remote_code=trust_remote_code)
    size = getattr(checkpoint.model.config.get_text_config(), "vocab_size", None) or 0
    if len(tokenizer) > size:
        model = checkpoint.model.name_or_path
        raise ConfigError(f"tokenizer {name} has {len(tokenizer)} tokens, more than the {size} of {model}")
    checkpoint.tokenizer = tokenizer
    if checkpoint.source is not None:  # none of the previous one is carried over
        checkpoint.source = dataclasses.replace(checkpoint.source, without=TOKENIZER)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte plus an end-of-text token, 257 in total."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return _wrap(_byte_level(models.BPE(vocab=vocabulary | {END: len(vocabulary)}, merges=[])))


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding with up to ``vocab_size`` tokens (at least 257), including end of text."""
    tokenizer = _byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return _wrap(tokenizer)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)
