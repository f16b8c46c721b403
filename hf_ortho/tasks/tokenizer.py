"""Tokenizers by name, for models that have none: saved ones, one token per byte, or byte-pair encoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..checkpoints.listing import TOKENIZER
from ..checkpoints.load import Checkpoint
from ..checkpoints.place import check_exists
from ..checkpoints.processors import TOKENIZER_FILES, processor_of
from ..errors import CheckpointError, ConfigError
from ..files import explain
from . import head_of

END = "<|endoftext|>"
# Of a masked language model, the first tokens of its vocabulary: RoBERTa numbers positions from the padding token on.
AROUND = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def named_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, masks: bool = False
) -> Any:
    """``bytes``, or the tokenizer of a folder or Hub model; ``masks`` as for ``byte_tokenizer``.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    if name == "bytes":
        return byte_tokenizer(masks)
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
    masks = head_of(checkpoint.model).masks_tokens
    tokenizer = named_tokenizer(name, trust_remote_code=trust_remote_code, masks=masks)
    size = getattr(checkpoint.model.config.get_text_config(), "vocab_size", None) or 0
    if len(tokenizer) > size:
        model = checkpoint.model.name_or_path
        raise ConfigError(f"tokenizer {name} has {len(tokenizer)} tokens, more than the {size} of {model}")
    checkpoint.tokenizer = tokenizer
    if checkpoint.source is not None:  # none of the previous one is carried over
        checkpoint.source = dataclasses.replace(checkpoint.source, without=f"{checkpoint.source.without} {TOKENIZER}")


def byte_tokenizer(masks: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte plus an end-of-text token, 257 in total; with ``masks``, plus the special tokens of a masked
    language model, 260 in total."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*AROUND.values(), *alphabet] if masks else [*alphabet, END]
    return _wrap(_byte_level(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[])), masks)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int, masks: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding with up to ``vocab_size`` tokens, including special ones as ``byte_tokenizer``."""
    tokenizer = _byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(AROUND.values()) if masks else [END],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return _wrap(tokenizer, masks)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer, masks: bool) -> PreTrainedTokenizerFast:
    if not masks:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)
    first, last = AROUND["cls_token"], AROUND["sep_token"]
    around = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{first} $A {last}", f"{first} $A {last} $B {last}", around
    )
    inputs = ["input_ids", "attention_mask"]  # not every encoder takes token types
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=first, eos_token=last, model_input_names=inputs, **AROUND
    )
