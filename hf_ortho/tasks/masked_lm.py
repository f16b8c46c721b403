"""Masked language modeling on blocks of tokens, measured by the loss of the masked tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .task import LOSS, Metric, Task

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset, IterableDataset
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel

    from ..checkpoints.load import Checkpoint
    from .arguments import DataArguments
    from .stream import Stream

logger = logging.getLogger("hf_ortho")


class MaskedLM(Task):
    def model_class(self, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
        """The transformers class of an encoder; None for a decoder (``is_decoder``) and for an encoder-decoder."""
        cls = super().model_class(config)
        is_encoder = cls is not None and cls.__name__.endswith(self.endings)
        return cls if is_encoder and not getattr(config, "is_decoder", False) else None

    def prepare(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        from .masking import masked_blocks

        return masked_blocks(rows, checkpoint.tokenizer, _block_size(checkpoint, arguments), arguments, name)

    def stream(
        self,
        checkpoint: Checkpoint,
        rows: IterableDataset,
        held_back_rows: IterableDataset | None,
        arguments: DataArguments,
        seed: int,
    ) -> tuple[Stream | Dataset, Dataset]:
        from .masking import MaskedBlocks
        from .stream import stream_text

        masks = MaskedBlocks(checkpoint.tokenizer, _block_size(checkpoint, arguments), arguments)
        self.adapt_head(checkpoint, rows, seed)
        return stream_text(rows, held_back_rows, checkpoint.tokenizer, masks.size, arguments, seed, masks)

    def varied(self, samples: Dataset, seed: int) -> Any:
        from .masking import VariedMasks

        return VariedMasks(samples, seed)

    def adapt_head(self, checkpoint: Checkpoint, train: Any, seed: int) -> None:
        """Reduce ``checkpoint.new_modules`` to layers without tied parameters: the embeddings are not new.

        The bias of the output layer, which starts at 0, is then only trained with all parameters.
        """
        model = checkpoint.model
        known = {id(p) for p in model.base_model.parameters()}
        within = tuple(f"{path}." for path in checkpoint.new_modules)
        checkpoint.new_modules = tuple(
            path
            for path, module in model.named_modules()
            if f"{path}.".startswith(within) and not any(module.children())
            if (own := list(module.parameters())) and not any(id(p) in known for p in own)
        )

    def collator(self, checkpoint: Checkpoint) -> Callable[[list[dict]], dict]:
        from functools import partial

        from .packing import padded

        tokenizer: Any = checkpoint.tokenizer
        return partial(padded, padding=tokenizer.pad_token_id)

    def loss_function(self) -> Callable[..., Tensor]:
        from .metrics.compute import masked_loss

        return masked_loss

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        from .metrics.compute import masked_perplexity

        return masked_perplexity(prediction)

    def preprocess_logits_for_metrics(self, logits: Any, labels: Tensor) -> Tensor:
        from .metrics.compute import masked_losses

        return masked_losses(logits, labels)

    def calibration(
        self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
    ) -> list[dict]:
        """Masked blocks with labels, or text without masks if the tokenizer has no mask token."""
        from .masking import first_masked_blocks
        from .samples import batches

        tokenizer = checkpoint.tokenizer
        if tokenizer is not None and tokenizer.mask_token_id is None:
            logger.warning(f"note: calibrating without masks: the tokenizer {tokenizer.name_or_path} has no mask token")
            return super().calibration(checkpoint, rows, arguments, name, samples)
        size = _block_size(checkpoint, arguments)
        blocks = first_masked_blocks(rows, tokenizer, size, samples, arguments, name)
        return batches(blocks, samples, collate=self.collator(checkpoint))


def _block_size(checkpoint: Checkpoint, arguments: DataArguments) -> int:
    """``tokens_per_sample``, by default at most what the tokenizer allows."""
    from .data import tokens_per_sample

    size = tokens_per_sample(checkpoint, arguments)
    limit = getattr(checkpoint.tokenizer, "model_max_length", size)
    return min(size, limit) if arguments.block_size is None else size


MASKED_LM = MaskedLM(
    endings=("ForMaskedLM",),
    auto_class="AutoModelForMaskedLM",
    pipeline_tag="fill-mask",
    masks_tokens=True,
    title="masked language modeling",
    metrics=(LOSS, Metric("masked_perplexity", "masked perplexity", greater_is_better=False)),
    compared=LOSS,
    default_dataset="pydoc_topics",
    random_split=False,  # neighboring blocks overlap in content
)
