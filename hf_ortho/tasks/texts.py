"""Texts or pairs of texts as samples of a classifier, tokenized on access."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..checkpoints.load import Checkpoint, use_pad_token
from ..errors import ConfigError, DataError
from .arguments import DataArguments
from .data import NO_TOKENIZER, check_block_size, context_length, first_position

DEFAULT = 1024  # tokens per sample of a model without a limit, such as T5


def texts(
    checkpoint: Checkpoint,
    rows: Dataset,
    columns: Sequence[str],
    label: str | None,
    arguments: DataArguments,
    name: str,
) -> Dataset:
    """``input_ids`` and the other inputs of the model, as lists, and ``labels`` if there is a column ``label``.

    Texts are truncated to ``block_size`` tokens, by default to the context of the model. They are not padded.

    Args:
        columns: one text column, or two, whose texts the tokenizer joins.

    Raises:
        DataError: there is no tokenizer, or a text is missing; on access, also if a text has no tokens.
        ConfigError: ``block_size`` is out of range, or ``use_padding`` fails.
    """
    tokenizer = use_padding(checkpoint)
    limit = token_limit(checkpoint.model, tokenizer, arguments.block_size, len(columns) > 1)
    accepted = set(inspect.signature(checkpoint.model.forward).parameters)
    rows = rows.select_columns([*columns, *([label] if label else [])])
    for column in columns:
        for number, text in enumerate(rows[column], 1):
            if text is None:
                row = "" if arguments.streaming else f" in row {number}"
                raise DataError(f"{name}: column {column!r} has no text{row}")

    def tokenized(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=limit)
        for text, ids in zip(batch[columns[0]], encoded["input_ids"], strict=True):
            if not ids:
                raise DataError(f"{name}: the text {text!r} has no tokens; remove its row")
        samples = {key: value for key, value in encoded.items() if key in accepted}
        return samples | ({"labels": batch[label]} if label else {})

    return rows.with_transform(tokenized)


def token_limit(model: PreTrainedModel, tokenizer: Any, block_size: int | None, pair: bool) -> int:
    """The most tokens of a sample: ``block_size``, by default the context of the model.

    Raises:
        ConfigError: ``block_size`` exceeds the context, or leaves no room for text.
    """
    context = context_length(model)
    if block_size is None:
        return min(tokenizer.model_max_length, context or DEFAULT)
    check_block_size(block_size, context or block_size)
    specials = tokenizer.num_special_tokens_to_add(pair=pair)
    if block_size <= specials + pair:
        raise ConfigError(f"block_size {block_size}: leaves no room for text beside {specials} special tokens")
    return block_size


def use_padding(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint, after making it and the model ready for batches of texts of different lengths.

    A tokenizer without a pad token gets the EOS token as one. A decoder classifies at the last token that is not the
    pad token of its config, which is set to that of the tokenizer, and is padded on the right. Attention masks keep
    padding out of everything else.

    Raises:
        DataError: there is no tokenizer.
        ConfigError: the tokenizer has neither a pad token nor an EOS token, or not the pad token of the model, which
            determines its positions.
    """
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    if tokenizer is None:
        raise DataError(NO_TOKENIZER.format(model.name_or_path))
    config: Any = model.config.get_text_config()
    name = model.name_or_path or type(model).__name__
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer of {name} has neither a pad token nor an end-of-text token, so texts cannot be padded "
                "to one length; set tokenizer.pad_token and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if first_position(model) and tokenizer.pad_token_id != config.pad_token_id:
        raise ConfigError(
            f"the pad token of the tokenizer has the id {tokenizer.pad_token_id}, but the positions of {name} depend "
            f"on {config.pad_token_id}; use its own tokenizer"
        )
    use_pad_token(model, tokenizer)
    if getattr(config, "summary_type", None) != "last":  # XLNet classifies at the last position, padding or not
        tokenizer.padding_side = "right"
    return tokenizer
