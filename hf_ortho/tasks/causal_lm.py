"""Causal language modeling on blocks of tokens, measured by loss and perplexity.

Evaluation and calibration also read instruction data, of which only the completions count.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def prepare_evaluation(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        """The windows of the text, of which the last may be shorter; or one sample per conversation."""
        from ..errors import ConfigError
        from .columns import instruction_columns
        from .conversations import conversations
        from .data import documents_of, tokens_per_sample
        from .tokens import cached_tokens
        from .windows import text_windows, windows

        size, stride, most = tokens_per_sample(checkpoint, arguments), arguments.stride, arguments.max_eval_samples
        tokenizer: Any = checkpoint.tokenizer
        if instruction_columns(rows, arguments.text_column):
            if stride is not None:
                raise ConfigError(f"stride {stride}: {name} has instruction data, which is read a row at a time")
            return conversations(rows, tokenizer, size, name, most)
        if arguments.tokenize is None:
            cut = None if most is None else most * size
            documents = documents_of(rows, arguments.text_column, name, cut)
            return text_windows(documents, tokenizer, size, stride=stride, most=most, name=name, split=rows.split)
        tokens, _ = cached_tokens(rows, tokenizer, arguments.text_column, name)
        length = max(0, len(tokens) - (tokenizer.eos_token_id is not None))  # the last document has no other after it
        return windows(tokens, size, length=length, stride=stride, most=most, name=name, split=rows.split)

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

    def collator(self, checkpoint: Checkpoint) -> Callable[[list[dict]], dict]:
        from .packing import padded

        return padded

    def metrics_of_samples(self, metrics: dict[str, float], samples: Dataset) -> dict[str, float]:
        from .windows import text_metrics

        return text_metrics(metrics["loss"], samples)

    def calibration(
        self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
    ) -> list[dict]:
        """Blocks of tokens, or conversations with labels on the completions."""
        from .columns import instruction_columns
        from .conversations import conversations
        from .data import first_blocks, tokens_per_sample

        size = tokens_per_sample(checkpoint, arguments)
        if instruction_columns(rows, arguments.text_column):
            found = conversations(rows, checkpoint.tokenizer, size, name, samples)
            return [{key: ids[None] for key, ids in sample.items()} for sample in found]
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
    sample_metrics=(
        Metric("bits_per_byte", "bits per byte", greater_is_better=False),
        Metric("bits_per_word", "bits per word", greater_is_better=False),
        Metric("word_perplexity", "word perplexity", greater_is_better=False),
    ),
    default_dataset="pydoc_topics",
    random_split=False,  # neighboring blocks overlap in content
)
