"""Evaluation of a checkpoint, and the Trainer for its task."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .. import tasks
from ..checkpoints.load import Checkpoint
from ..errors import ConfigError
from ..tasks.metrics import F1 as F1
from ..tasks.metrics import MatthewsCorrelation as MatthewsCorrelation
from ..tasks.metrics import Pearson as Pearson
from ..tasks.metrics import Perplexity as Perplexity
from ..tasks.metrics import Spearman as Spearman
from ..tasks.metrics import TopKAccuracy as TopKAccuracy
from ..text import suggestion
from .metrics import metrics_of
from .trainer import ActivationTrainer

logger = logging.getLogger("hf_ortho")


def make_trainer(
    checkpoint: Checkpoint, arguments: TrainingArguments, train=None, held_back=None, **options
) -> ActivationTrainer:
    """A Trainer with the metrics of the task. ``options`` are passed to ``ActivationTrainer``.

    Raises:
        ConfigError: ``metric_for_best_model`` is not a metric of the task.
    """
    task = tasks.of(checkpoint.model)
    _check_metric(checkpoint.model, arguments)
    # Images are processed on access, from columns that are not inputs of the model.
    arguments.remove_unused_columns = False
    trainer = ActivationTrainer(
        model=checkpoint.model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_back,
        data_collator=task.collator(checkpoint),
        processing_class=checkpoint.processor,
        compute_metrics=task.compute_metrics,
        compute_loss_func=None if arguments.label_smoothing_factor else task.loss_function(),
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        **options,
    )
    trainer.new_head = bool(checkpoint.new_modules)
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    return trainer


def _check_metric(model: PreTrainedModel, arguments: TrainingArguments) -> None:
    name, task = arguments.metric_for_best_model, tasks.of(model)
    if name is None:
        return
    metrics = {metric.key: metric for metric in task.metrics_of(model)}
    metric = metrics.get(name.removeprefix("eval_"))
    if metric is None:
        raise ConfigError(
            f"metric_for_best_model {name!r}: {task.title} has {', '.join(metrics)}{suggestion(name, metrics)}"
        )
    if arguments.greater_is_better and not metric.greater_is_better:
        logger.warning(f"note: greater_is_better true: the best checkpoint is the one with the largest {metric.name}")


def evaluate_model(
    checkpoint: Checkpoint, dataset: Dataset, batch_size: int = 8, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, float]:
    """Evaluate a checkpoint on prepared samples and return the metrics of its task, by key.

    ``callbacks`` are passed to Trainer.

    Raises:
        HfOrthoError: the model has no supported task, or the samples do not fit it.

    Example:
        >>> from datasets import Dataset
        >>> from hf_ortho.checkpoints.load import Checkpoint
        >>> ids = [[1, 2, 3, 4]] * 2
        >>> samples = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
        >>> sorted(hf_ortho.training.evaluate_model(Checkpoint(model, None, None, None), samples))
        ['loss', 'perplexity']
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
        return metrics_of(make_trainer(checkpoint, arguments, held_back=dataset, callbacks=list(callbacks)))
