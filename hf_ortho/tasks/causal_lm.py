"""Causal language modeling on blocks of tokens, measured by loss and perplexity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .task import LOSS, Metric, Task

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from torch import Tensor
    from transformers import EvalPrediction

    from ..checkpoints.load import Checkpoint
    from .arguments import DataArguments
    from .stream import Stream


class CausalLM(Task):
    def prepare(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        from .data import text_blocks, tokens_per_sample
        from .tokens import cached_blocks

        size = tokens_per_sample(checkpoint, arguments)
        blocks = text_blocks if arguments.tokenize is None else cached_blocks
        return blocks(rows, checkpoint.tokenizer, size, arguments.text_column, name)

    def stream(
        self,
        checkpoint: Checkpoint,
        rows: IterableDataset,
        held_back_rows: IterableDataset | None,
        arguments: DataArguments,
        seed: int,
    ) -> tuple[Stream | Dataset, Dataset]:
        from .data import tokens_per_sample
        from .stream import stream_text

        size = tokens_per_sample(checkpoint, arguments)
        return stream_text(rows, held_back_rows, checkpoint.tokenizer, size, arguments, seed)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        from .metrics.compute import perplexity

        return perplexity(prediction)

    def preprocess_logits_for_metrics(self, logits: Any, labels: Tensor) -> Tensor:
        from .metrics.compute import token_losses

        return token_losses(logits, labels)

    def calibration(
        self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
    ) -> list[dict]:
        """Blocks of tokens."""
        from .data import first_blocks, tokens_per_sample

        size = tokens_per_sample(checkpoint, arguments)
        blocks = first_blocks(rows, checkpoint.tokenizer, size, samples, arguments.text_column, name)
        return [{"input_ids": block} for block in blocks]


CAUSAL_LM = CausalLM(
    endings=("ForCausalLM", "LMHeadModel"),
    auto_class="AutoModelForCausalLM",
    pipeline_tag="text-generation",
    peft_type="CAUSAL_LM",
    title="causal language modeling",
    metrics=(LOSS, Metric("perplexity", "perplexity", "perplexity", greater_is_better=False)),
    compared=LOSS,
    default_dataset="pydoc_topics",
    random_split=False,  # neighboring blocks overlap in content
)
