"""The models and datasets of the demo: small ones, or a checkpoint of the user."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable

from datasets import Dataset
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessorPil,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from ..checkpoints.load import Checkpoint, load_checkpoint
from ..checkpoints.verify import check_weights
from ..errors import ConfigError
from ..tasks import TASKS, Task, head_of
from ..tasks.arguments import DataArguments
from ..tasks.data import context_length
from ..tasks.samples import load_splits
from ..tasks.tokenizer import byte_tokenizer

BLOCK = 128


def block_size(model: PreTrainedModel) -> int:
    """Tokens per text."""
    return min(BLOCK, context_length(model) or BLOCK)


@dataclasses.dataclass(frozen=True)
class DemoTask:
    """A model, its training data and hyperparameters.

    ``steps`` and ``tune_steps`` are the optimizer steps of pretraining and fine-tuning, ``held_back`` the most samples
    to evaluate on, ``note`` what to know about the model, and ``prompt`` the beginning of a generated text.
    """

    dataset: str
    build: Callable[[], Checkpoint]
    steps: int
    tune_steps: int
    batch_size: int
    learning_rate: float
    tune_learning_rate: float
    calibration_batch: int
    note: str = ""
    prompt: str = ""
    held_back: int | None = None
    calibration_batches: int = 16

    def datasets(self, checkpoint: Checkpoint) -> tuple[Dataset, Dataset]:
        size = block_size(checkpoint.model)
        arguments = DataArguments(dataset=self.dataset, block_size=size, max_eval_samples=self.held_back)
        train, held_back = load_splits(checkpoint, arguments)
        if not isinstance(train, Dataset) or held_back is None:
            raise ConfigError(f"--dataset {self.dataset}: has one sample only, so none can be held out")
        return train, held_back


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


def checkpoint_task(name: str, dataset: str | None) -> DemoTask:
    """The task of a checkpoint: so few steps that a model of 135 million parameters takes minutes on a CPU.

    Raises:
        ConfigError: the model lacks what its data needs.
    """
    checkpoint = load_checkpoint(name, dtype="float32", auto_classes=[task.auto_class for task in TASKS])
    check_weights(checkpoint.model, name)
    head, kind = head_of(checkpoint.model), checkpoint.model.main_input_name
    if kind == "input_ids" and checkpoint.tokenizer is None:
        raise ConfigError(
            f"--model {name} has no tokenizer, so the demo has no text for it; convert it without data: "
            f"hf-ortho convert {shlex.quote(name)} -o OUTPUT"
        )
    text = head.default_dataset if isinstance(head, Task) else "pydoc_topics"
    place = dataset or (text if kind == "input_ids" else "digits")
    if place is None:
        raise ConfigError(f"--dataset is required for {type(checkpoint.model).__name__}")
    note = f"{type(checkpoint.model).__name__}, {checkpoint.model.num_parameters() / 1e6:,.0f} million parameters"
    tune_steps, batch_size, rate, calibration_batch = (6, 4, 2e-5, 1) if kind == "input_ids" else (20, 16, 2e-4, 8)
    return DemoTask(
        place,
        lambda: checkpoint,
        steps=0,
        tune_steps=tune_steps,
        batch_size=batch_size,
        learning_rate=0.0,
        tune_learning_rate=rate,
        calibration_batch=calibration_batch,
        note=note,
        prompt="Python is a programming language that",
        held_back=16,
        calibration_batches=8,
    )


GPT2_NOTE = (
    "A GPT-2 of four layers reads bytes, and trains for about a minute: too little to\n"
    "write sensible text, enough to see what a conversion changes."
)
CONVNEXT_NOTE = "A small ConvNeXt learns to read handwritten digits, in about a minute."
DEMOS = {
    "text": DemoTask("pydoc_topics", small_gpt2, 620, 100, 8, 4e-3, 4e-4, 8, GPT2_NOTE),
    "vision": DemoTask("digits", small_convnext, 250, 60, 64, 2e-3, 2e-4, 64, CONVNEXT_NOTE),
}
