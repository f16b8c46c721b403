"""``Task``: the properties of a task that loading, training, evaluation and cards use."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel

    from ..checkpoints.load import Checkpoint
    from .arguments import DataArguments
    from .stream import Stream


@dataclasses.dataclass(frozen=True)
class Metric:
    """An evaluation metric.

    Attributes:
        key: key in the result of ``compute_metrics``.
        name: display name.
        evaluate_name: name in the ``evaluate`` library, as listed on the Hub; None if it is not listed.
        unit: unit; empty for a plain number.
        greater_is_better: whether a larger value is better.
    """

    key: str
    name: str
    evaluate_name: str | None = None
    unit: str = ""
    greater_is_better: bool = True

    def __str__(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


LOSS = Metric("loss", "loss", unit="nats", greater_is_better=False)


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a model, recognized by the name of its class.

    Attributes:
        endings: endings of the class names.
        auto_class: the auto class of transformers that loads such models.
        pipeline_tag: pipeline tag on the Hub, or None.
        peft_type: ``task_type`` in peft, or None.
        masks_tokens: whether the model predicts masked tokens, so that its tokenizer needs a mask token.
    """

    endings: tuple[str, ...]
    auto_class: str
    pipeline_tag: str | None
    peft_type: str | None = None
    masks_tokens: bool = False

    def model_class(self, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
        """The transformers class with this head for a config, or None."""
        import transformers

        classes = getattr(transformers, self.auto_class)._model_mapping.get(type(config), None)
        return classes[0] if isinstance(classes, tuple) else classes

    def calibration(
        self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
    ) -> list[dict]:
        """Model inputs from the dataset ``name`` for calibrating a conversion, with labels if they fit the model.

        Args:
            arguments: the columns and ``block_size``.
            samples: number of texts, or of batches of 8 images.

        Raises:
            HfOrthoError: the data does not fit the model.
        """
        from .calibration import unlabeled

        return unlabeled(checkpoint, rows, arguments, name, samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Head, abc.ABC):
    """A task that models are trained for and evaluated on.

    Attributes:
        title: name of the task within a sentence.
        metrics: the metrics that ``compute_metrics`` returns, in order; see ``metrics_of``.
        compared: the metric that a comparison shows.
        sample_metrics: the metrics that ``metrics_of_samples`` adds in ``hf-ortho evaluate``, in order.
        default_dataset: default dataset of ``hf-ortho evaluate``, or None.
        random_split: whether a held-out tenth is drawn at random instead of from the end.
        augments_images: whether the samples are labeled images that can be cropped, mirrored and mixed.
    """

    title: str
    metrics: tuple[Metric, ...]
    compared: Metric
    sample_metrics: tuple[Metric, ...] = ()
    default_dataset: str | None = None
    random_split: bool = True
    augments_images: bool = False

    @abc.abstractmethod
    def prepare(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        """Prepare the rows of one split of the dataset ``name`` as training samples for ``collator``."""

    def prepare_evaluation(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        """Prepare the rows of one split of the dataset ``name`` as evaluation samples for ``collator``."""
        return self.prepare(checkpoint, rows, arguments, name)

    def text_columns(self, rows: Dataset, arguments: DataArguments, name: str) -> tuple[str, ...]:
        """The columns of the dataset ``name`` with the text that a new tokenizer is learned from."""
        from .columns import text_column

        return (text_column(rows, arguments.text_column, name),)

    @abc.abstractmethod
    def stream(
        self,
        checkpoint: Checkpoint,
        rows: IterableDataset,
        held_back_rows: IterableDataset | None,
        arguments: DataArguments,
        seed: int,
    ) -> tuple[Stream | Dataset, Dataset]:
        """A stream of training samples in an order determined by ``seed``, and the evaluation samples."""

    @abc.abstractmethod
    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute ``metrics``, by key; passed to Trainer."""

    def metrics_of(self, model: PreTrainedModel) -> tuple[Metric, ...]:
        """Those of ``metrics`` that apply to a model."""
        return self.metrics

    def metrics_of_samples(self, metrics: dict[str, float], samples: Dataset) -> dict[str, float]:
        """Compute ``sample_metrics``, by key, from ``metrics`` and the evaluation samples; empty if they do not fit."""
        return {}

    def preprocess_logits_for_metrics(self, logits: Any, labels: Tensor) -> Any:
        """Reduce the logits before they are stored for ``compute_metrics``; passed to Trainer."""
        return logits

    def collator(self, checkpoint: Checkpoint) -> Callable[[list[dict]], dict]:
        """The data collator: makes a batch of model inputs, with ``labels``, from samples."""
        from transformers import default_data_collator

        return default_data_collator

    def loss_function(self) -> Callable[..., Tensor] | None:
        """``compute_loss_func`` of Trainer, None for the loss of the model."""
        return None

    def varied(self, samples: Dataset, seed: int) -> Any:
        """The training samples with what changes at random in each epoch, selected by ``set_epoch``; None for nothing.

        Without it, they are the same at each access.
        """
        return None

    def adapt_head(self, checkpoint: Checkpoint, train: Dataset | Stream, seed: int) -> None:
        """Replace the head, initialized from ``seed``, if the samples require it; sets ``checkpoint.new_modules``."""
        return None

    def check_classes(self, train: Dataset | Stream, held_back: Dataset, name: str) -> None:
        """Raise DataError if the evaluation samples, of the dataset ``name``, have other classes than the training."""
        return None

    def check(self, model: PreTrainedModel, samples: Dataset) -> None:
        """Raise DataError if the model cannot be evaluated on the samples."""
        return None
