"""``hf-ortho pretrain``: train a model from scratch; equivalent to ``hf-ortho finetune`` with ``init: scratch``."""

from __future__ import annotations

from . import finetune

DESCRIPTION = (
    "Train a model from scratch with Trainer. Options are flags or keys of a YAML file; flags take precedence."
)


def run(argv: list[str]) -> int | None:
    return finetune.run(argv, "pretrain", DESCRIPTION, ("--init", "scratch"))
