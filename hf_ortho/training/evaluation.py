"""The Trainer for the task of a checkpoint."""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .. import tasks
from ..checkpoints.load import Checkpoint
from ..tasks.metrics import Perplexity as Perplexity
from ..tasks.metrics import TopKAccuracy as TopKAccuracy
from .metrics import metrics_of
from .trainer import ActivationTrainer


def make_trainer(
    checkpoint: Checkpoint, arguments: TrainingArguments, train=None, held_back=None, **options
) -> ActivationTrainer:
    """A Trainer with the task's metrics; ``options`` are further arguments of ``ActivationTrainer``."""
    task = tasks.of(checkpoint.model)
    # Images are processed on access, from columns that the model does not take.
    arguments.remove_unused_columns = False
    trainer = ActivationTrainer(
        model=checkpoint.model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_back,
        data_collator=task.collator(checkpoint),
        processing_class=checkpoint.processor,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        **options,
    )
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    return trainer


def evaluate_model(checkpoint: Checkpoint, dataset: Dataset, batch_size: int = 8) -> dict[str, float]:
    """The metrics of a checkpoint's task on prepared samples, by their keys.

    Raises:
        HfOrthoError: the model has no task, or the samples are not for it.
    """
    tasks.of(checkpoint.model).check(checkpoint.model, dataset)
    with tempfile.TemporaryDirectory(prefix="hf_ortho.") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        return metrics_of(make_trainer(checkpoint, arguments, held_back=dataset))
