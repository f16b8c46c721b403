"""Instruction data as samples for evaluation and calibration: only the tokens of completions have labels.

The formats are those of TRL: ``messages``, a list of {role, content}; or ``prompt`` and ``completion``, both such lists
or both strings. Lists are rendered with the chat template of the tokenizer. Strings are joined, and end with the EOS
token.

The completions of ``messages`` are the assistant turns, as the template marks them ({% generation %}). If it does not,
the conversation before a turn is rendered with the prompt for a generation, and the turn starts where the whole
conversation differs from it, or where it ends; so does ``completion``. This compares text, not tokens: a token that
reaches into a turn belongs to it. A turn that the template renders differently when others follow is context only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import DataError
from ..files import explain, logger
from .columns import shortened
from .data import BLOCK_FEATURES

MARKS = re.compile(r"\{%-?\s*generation\b")
Sample = tuple[np.ndarray, np.ndarray]  # the ids of the tokens, and whether each is part of a completion


def conversations(rows: Iterable[dict], tokenizer: Any, block_size: int, name: str, most: int | None = None) -> Dataset:
    """One sample per row: ``input_ids``, cut to ``block_size``, and ``labels`` of -100 but on the completions.

    Rows whose first ``block_size`` tokens have no completion are left out, with a note.

    Args:
        rows: rows with the columns of ``columns.INSTRUCTIONS``.
        most: the largest number of samples.

    Raises:
        DataError: the tokenizer has no chat template, or a row is no conversation that it can render.
    """
    samples: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    number = without = 0
    for number, row in enumerate(rows, 1):
        try:
            ids, counts = _sample(row, tokenizer)
        except DataError as error:
            raise DataError(f"{name}: row {number}: {error}") from error
        ids, counts = ids[:block_size], counts[:block_size]
        if not counts[1:].any():  # the first token is not predicted
            without += 1
            continue
        samples["input_ids"].append(ids)
        samples["labels"].append(np.where(counts, ids, -100))
        if len(samples["labels"]) == most:
            break
    if not samples["labels"]:
        raise DataError(f"{name} has no completion within the first {block_size} tokens of a row")
    if without:
        which = f"{without} of {number} rows"
        logger.warning(f"note: {which} of {name} have no completion within {block_size} tokens and are left out")
    return Dataset.from_dict(samples, BLOCK_FEATURES, split=getattr(rows, "split", None)).with_format("torch")


def _sample(row: dict[str, Any], tokenizer: Any) -> Sample:
    if "messages" not in row and isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        prompt, completion = row["prompt"], row["completion"]
        end = tokenizer.eos_token or ""
        text = prompt + completion + ("" if completion.endswith(end) else end)
        return _tokens(tokenizer, text, [(len(prompt), len(text))], add_special_tokens=True)
    before = [] if "messages" in row else _messages(row["prompt"])
    messages = [*before, *_messages(row["messages"] if "messages" in row else row["completion"])]
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template; give another with --tokenizer, or prompts and completions as text"
        )

    def render(messages: list[dict], **options) -> Any:
        tools = row.get("tools")
        try:
            tools = json.loads(tools) if isinstance(tools, str) else _filled(tools)
            return tokenizer.apply_chat_template(messages, tools=tools or None, **{"tokenize": False, **options})
        except Exception as error:  # jinja2's, and whatever a template raises for values that it does not expect
            raise DataError(f"the chat template cannot render it: {explain(error)}") from error

    if not before and MARKS.search(str(tokenizer.chat_template)):
        found = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return np.array(found["input_ids"]), np.array(found["assistant_masks"], bool)
    whole = render(messages)
    if before:
        turns = [(before, whole)]
    else:
        places = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        turns = [(messages[:i], render(messages[: i + 1])) for i in places]
    spans = [(_start(render, earlier, whole), len(until)) for earlier, until in turns if whole.startswith(until)]
    spans = [(start, end) for start, end in spans if 0 <= start < end]
    if turns and not spans:
        raise DataError(
            "the chat template renders the messages before a completion differently without it, so where it starts is "
            "unknown; mark the completions in the template with {% generation %}"
        )
    return _tokens(tokenizer, whole, spans, add_special_tokens=False)


def _start(render: Callable[..., str], before: list[dict], whole: str) -> int:
    """Where what follows ``before`` starts in ``whole``; -1 if ``whole`` does not start with ``before``."""
    asked = render(before, add_generation_prompt=True)
    shared = next(
        (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), min(len(asked), len(whole))
    )
    return shared if whole[:shared].startswith(render(before)) else -1


def _messages(value: Any) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) and entry.get("role") for entry in value):
        raise DataError(f"{shortened(value)} is not a list of messages with role and content")
    return _filled(value)


def _filled(value: Any) -> Any:
    """A value of a row without the keys that a table fills with None, at any depth, as in TRL."""
    if isinstance(value, dict):
        return {key: _filled(part) for key, part in value.items() if part is not None}
    return [_filled(part) for part in value] if isinstance(value, list) else value


def _tokens(tokenizer: Any, text: str, spans: list[tuple[int, int]], *, add_special_tokens: bool) -> Sample:
    """The tokens of ``text``; those that overlap one of the ``spans`` of characters are completions."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not tell the places of its tokens, which instruction data need"
        )
    options = {"return_attention_mask": False, "return_token_type_ids": False, "return_offsets_mapping": True}
    found = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False, **options)
    starts, ends = np.array(found["offset_mapping"], np.int64).reshape(-1, 2).T
    starts -= starts == ends  # a space, whose place some tokenizers trim (``trim_offsets``)
    counts = np.zeros(len(starts), bool)
    for start, end in spans:
        counts |= (ends > start) & (starts < end)
    return np.array(found["input_ids"], np.int64), counts
