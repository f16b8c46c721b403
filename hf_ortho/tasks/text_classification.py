"""Classification of texts and pairs of texts, and regression on them.

The samples are classes, measured by loss, accuracy, F1 and Matthews correlation, or numbers, measured by loss (mean
squared error), Pearson and Spearman correlation. They are numbers if a label is a fraction, or if the model has one
output and the labels have no names.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from .classification import Classification, predicts_number, replace_head
from .task import LOSS, Metric

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedModel

    from ..checkpoints.load import Checkpoint
    from .arguments import DataArguments
    from .stream import Stream

logger = logging.getLogger("hf_ortho")

ACCURACY = Metric("accuracy", "accuracy", "accuracy")
OF_CLASSES = (
    ACCURACY,
    Metric("f1", "F1", "f1"),
    Metric("matthews_correlation", "Matthews correlation", "matthews_correlation"),
)
OF_NUMBERS = (
    Metric("pearsonr", "Pearson correlation", "pearsonr"),
    Metric("spearmanr", "Spearman correlation", "spearmanr"),
)


class TextClassification(Classification):
    def prepare(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        from .columns import class_column
        from .labels import are_numbers, first_fraction

        if arguments.tokenize:
            raise ConfigError(f"tokenize {arguments.tokenize}: only for language models; leave it out for {self.title}")
        label = class_column(rows, arguments.label_column, name)
        feature = rows.features[label]
        numbers = are_numbers(feature) and (
            predicts_number(checkpoint.model)
            or first_fraction(rows, label) is not None
            or (not len(rows) and "int" not in feature.dtype)  # of a stream, in which any label may be a fraction
        )
        return self._samples(checkpoint, rows, label, numbers, arguments, name)

    def prepare_evaluation(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        from .columns import class_column
        from .labels import are_numbers, first_fraction

        label, model = class_column(rows, arguments.label_column, name), checkpoint.model
        _check_outputs(model)
        numbers, who = predicts_number(model), model.name_or_path or type(model).__name__
        if numbers and not are_numbers(rows.features[label]):
            raise DataError(f"{name}: column {label!r} contains classes, but {who} predicts a number")
        if not numbers and (fraction := first_fraction(rows, label)) is not None:
            raise DataError(
                f"{name}: column {label!r} contains numbers such as {fraction:g}, but {who} predicts one of "
                f"{model.config.num_labels} classes"
            )
        return self._samples(checkpoint, rows, label, numbers, arguments, name)

    def _samples(
        self, checkpoint: Checkpoint, rows: Dataset, label: str, numbers: bool, arguments: DataArguments, name: str
    ) -> Dataset:
        from .classification import classes_of
        from .labels import with_classes, with_numbers
        from .texts import texts

        columns, numbered = self.text_columns(rows, arguments, name, label), not arguments.streaming
        if label in columns:
            raise ConfigError(f"label_column {label!r}: is also the text column; name another with --text-column")
        if numbers:
            rows = with_numbers(rows, label, name, numbered=numbered)
        else:
            rows = with_classes(rows, label, classes_of(checkpoint.model), name, numbered=numbered)
        return texts(checkpoint, rows, columns, label, arguments, name)

    def text_columns(
        self, rows: Dataset, arguments: DataArguments, name: str, label: str | None = None
    ) -> tuple[str, ...]:
        from .columns import text_columns

        label = label or arguments.label_column
        rest = rows.remove_columns([label]) if label in rows.column_names and label != arguments.text_column else rows
        return text_columns(rest, arguments.text_column, arguments.text_pair_column, name)

    def unlabeled(
        self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
    ) -> list[dict]:
        """Pairs of texts in batches of 8; single texts whole, in chunks."""
        from .calibration import unlabeled
        from .samples import batches
        from .texts import texts

        columns = self.text_columns(rows, arguments, name)
        if len(columns) == 1:
            arguments = dataclasses.replace(arguments, text_column=columns[0])
            return unlabeled(checkpoint, rows, arguments, name, samples)
        prepared = texts(checkpoint, rows, columns, None, arguments, name)
        return batches(prepared, samples * 8, size=8, collate=self.collator(checkpoint))

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        from .metrics.compute import classification, first_output, regression

        measure = regression if first_output(prediction.predictions).shape[-1] == 1 else classification
        return measure(prediction)

    def metrics_of(self, model: PreTrainedModel) -> tuple[Metric, ...]:
        return (LOSS, *(OF_NUMBERS if predicts_number(model) else OF_CLASSES))

    def preprocess_logits_for_metrics(self, logits: Any, labels: Tensor) -> Tensor:
        from .metrics.compute import first_output

        return first_output(logits)

    def collator(self, checkpoint: Checkpoint) -> Callable[[list[dict]], dict]:
        """Pads to the longest sample of the batch."""
        from transformers import DataCollatorWithPadding

        from .texts import use_padding

        return DataCollatorWithPadding(use_padding(checkpoint))

    def adapt_head(self, checkpoint: Checkpoint, train: Dataset | Stream, seed: int) -> None:
        """As for all classes, or a head of one output for numbers."""
        from .labels import class_names, has_classes

        config = checkpoint.model.config
        if has_classes(train):
            if len(names := class_names(train)) < 2:
                raise DataError(f"the training data has a single class ({', '.join(names)}); at least two are needed")
            config.problem_type = "single_label_classification"
            super().adapt_head(checkpoint, train, seed)
            return
        outputs, config.problem_type = config.num_labels, "regression"
        if outputs != 1 or checkpoint.new_modules:
            config.id2label, config.label2id = {0: "LABEL_0"}, {"LABEL_0": 0}
            replace_head(checkpoint, 1, seed)

    def check_classes(self, train: Dataset | Stream, held_back: Dataset, name: str) -> None:
        from .labels import has_classes

        if has_classes(train):
            super().check_classes(train, held_back, name)

    def check(self, model: PreTrainedModel, samples: Dataset) -> None:
        from .labels import has_classes

        _check_outputs(model)
        if has_classes(samples) == predicts_number(model):
            kinds = ("a number", "one class") if predicts_number(model) else ("one class", "a number")
            raise DataError(f"{model.name_or_path} predicts {kinds[0]} per text, the samples have {kinds[1]}")
        if has_classes(samples):
            super().check(model, samples)


def _check_outputs(model: PreTrainedModel) -> None:
    several = {"multi_label_classification": "classes", "regression": "numbers" if model.config.num_labels != 1 else ""}
    if what := several.get(model.config.problem_type or ""):
        raise DataError(f"{model.name_or_path} predicts several {what} per text, which is not supported")


TEXT_CLASSIFICATION = TextClassification(
    endings=("ForSequenceClassification",),
    auto_class="AutoModelForSequenceClassification",
    pipeline_tag="text-classification",
    peft_type="SEQ_CLS",
    title="text classification",
    metrics=(LOSS, *OF_CLASSES, *OF_NUMBERS),
    compared=ACCURACY,
)
