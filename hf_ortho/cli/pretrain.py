"""``hf-ortho pretrain``: train a model from scratch; equivalent to ``hf-ortho finetune`` with ``init: scratch``."""

from __future__ import annotations

from . import finetune

DESCRIPTION = "Train a model from scratch with Trainer, configured by a YAML file and flags that override it."


def run(argv: list[str]) -> int | None:
    return finetune.run([*argv, "--init", "scratch"], "pretrain", DESCRIPTION)
