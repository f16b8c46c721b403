"""The Trainer for the task of a checkpoint, and its metrics."""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from transformers import TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from ..checkpoints.load import Checkpoint
from ..errors import DataError
from ..tasks import data
from ..tasks.metrics import EVALUATORS
from ..tasks.metrics import Perplexity as Perplexity
from ..tasks.metrics import TopKAccuracy as TopKAccuracy
from .trainer import ActivationTrainer


def make_trainer(
    checkpoint: Checkpoint, arguments: TrainingArguments, train=None, held_back=None, **options
) -> ActivationTrainer:
    """A Trainer with the task's metrics; ``options`` are further arguments of ``ActivationTrainer``."""
    evaluator = EVALUATORS[checkpoint.task]
    # Images are processed on access, from columns that the model does not take.
    arguments.remove_unused_columns = False
    trainer = ActivationTrainer(
        model=checkpoint.model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_back,
        data_collator=default_data_collator,
        processing_class=checkpoint.processor,
        compute_metrics=evaluator.compute_metrics,
        preprocess_logits_for_metrics=evaluator.preprocess_logits_for_metrics,
        **options,
    )
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    return trainer


def metrics_of(trainer: ActivationTrainer) -> dict[str, float]:
    """Evaluate, with the Trainer's prefix and its throughput figures left out."""
    return _metrics_in(trainer.evaluate())


def metrics_at_start(trainer: ActivationTrainer) -> dict[str, float] | None:
    """The metrics that ``eval_on_start`` gave, of a resumed training too; None if there are none."""
    first = (entry for entry in trainer.state.log_history if entry["step"] == 0 and "eval_loss" in entry)
    return next(map(_metrics_in, first), None)


def metrics_logged(trainer: ActivationTrainer) -> dict[str, float] | None:
    """The metrics of the last evaluation after a step of the training; None if there was none."""
    later = (e for e in reversed(trainer.state.log_history) if e.get("step", 0) > 0 and "eval_loss" in e)
    return next(map(_metrics_in, later), None)


def _metrics_in(found: dict) -> dict[str, float]:
    # "loss" of our metrics is the mean over all tokens; the Trainer's own is a mean of batch means.
    kept = ("loss", "perplexity", "top1", "top5")
    return {key: float(found[f"eval_{key}"]) for key in kept if f"eval_{key}" in found}


def evaluate_model(checkpoint: Checkpoint, dataset: Dataset, batch_size: int = 8) -> dict[str, float]:
    """Loss and perplexity, or loss, top-1 and top-5, of a checkpoint on prepared samples."""
    with tempfile.TemporaryDirectory(prefix="hf_ortho.") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        if checkpoint.task == "image-classification":
            names, classes = data.class_names(dataset), checkpoint.model.config.num_labels or 0
            if len(names) > classes:
                raise DataError(f"the dataset has {len(names)} classes, {checkpoint.model.name_or_path} has {classes}")
        return metrics_of(make_trainer(checkpoint, arguments, held_back=dataset))
