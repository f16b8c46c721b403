"""The small models and datasets of the demo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from datasets import Dataset
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessorPil,
    GPT2Config,
    GPT2LMHeadModel,
)

from ..checkpoints.load import Checkpoint
from ..tasks import data, of
from ..tasks.arguments import DataArguments
from ..tasks.tokenizer import byte_tokenizer

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class DemoTask:
    """A model, its training data and hyperparameters.

    ``steps`` and ``tune_steps`` are the optimizer steps of pretraining and fine-tuning.
    """

    dataset: str
    build: Callable[[], Checkpoint]
    steps: int
    tune_steps: int
    batch_size: int
    learning_rate: float
    tune_learning_rate: float
    calibration_batch: int

    def datasets(self, checkpoint: Checkpoint) -> tuple[Dataset, Dataset]:
        splits, arguments = data.load(self.dataset), DataArguments(block_size=BLOCK)
        task, common = of(checkpoint.model), (arguments, self.dataset)
        held_back = task.prepare_evaluation(checkpoint, splits["validation"], *common)
        return task.prepare(checkpoint, splits["train"], *common), held_back


def small_gpt2() -> Checkpoint:
    tokenizer = byte_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=BLOCK,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Checkpoint(GPT2LMHeadModel(config), tokenizer, None, None)


def small_convnext() -> Checkpoint:
    names = dict(enumerate(str(n) for n in range(10)))
    config = ConvNextConfig(
        num_stages=3,
        hidden_sizes=[24, 48, 96],
        depths=[1, 1, 2],
        image_size=32,
        layer_scale_init_value=0.1,
        id2label=names,
        label2id={v: k for k, v in names.items()},
    )
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0)
    return Checkpoint(ConvNextForImageClassification(config), None, processor, None)


DEMOS = {
    "text": DemoTask("pydoc_topics", small_gpt2, 620, 100, 8, 4e-3, 4e-4, 8),
    "vision": DemoTask("digits", small_convnext, 250, 60, 64, 2e-3, 2e-4, 64),
}
