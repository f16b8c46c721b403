"""``hf-ortho pretrain``: train a model from scratch, as ``hf-ortho finetune`` with ``init: scratch``."""

from __future__ import annotations

from . import finetune

HELP = str(__doc__)


def run(argv: list[str]) -> int | None:
    return finetune.run([*argv, "--init", "scratch"], "pretrain", HELP)
