"""What loading, training, evaluation and cards need to know of a task: ``Task``, one object for each."""

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
    """A figure of an evaluation.

    Attributes:
        key: under which ``compute_metrics`` gives it.
        name: for readers.
        evaluate_name: of the metric in the ``evaluate`` library, which the Hub lists; None if it is not one of them.
        unit: empty for a plain number.
    """

    key: str
    name: str
    evaluate_name: str | None = None
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


LOSS = Metric("loss", "loss", unit="nats")


@dataclasses.dataclass(frozen=True)
class Head:
    """What the class of a model says of it.

    Attributes:
        endings: of the names of such classes.
        auto_class: of transformers, which loads them.
        pipeline_tag: on the Hub, None if it has none.
        peft_type: ``task_type`` in peft, None if it has none.
    """

    endings: tuple[str, ...]
    auto_class: str
    pipeline_tag: str | None
    peft_type: str | None = None

    def model_class(self, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
        """The class of transformers with this head for a config, None if there is none."""
        import transformers

        found = getattr(transformers, self.auto_class)._model_mapping.get(type(config), None)
        return found[0] if isinstance(found, tuple) else found

    def calibration(
        self, checkpoint: Checkpoint, rows: Dataset, name: str, samples: int, block_size: int | None
    ) -> list[dict]:
        """Model inputs that weight the fits of a conversion, from the dataset ``name``; with labels where they fit.

        Args:
            samples: texts of ``block_size`` tokens (None: the model's context), or images times 8.

        Raises:
            HfOrthoError: the data do not fit the model.
        """
        from .calibration import unlabeled

        return unlabeled(checkpoint, rows, name, samples, block_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Head, abc.ABC):
    """A task that models are trained for and evaluated on.

    Attributes:
        title: for sentences.
        metrics: what ``compute_metrics`` gives, in this order.
        compared: the one of them that a comparison shows.
        default_dataset: that ``hf-ortho evaluate`` takes if none is named; None if there is none.
        random_split: whether a tenth that is held back is drawn at random instead of from the end.
        augments_images: whether its samples are images with a class, which may be cropped, mirrored and mixed.
    """

    title: str
    metrics: tuple[Metric, ...]
    compared: Metric
    default_dataset: str | None = None
    random_split: bool = True
    augments_images: bool = False

    @abc.abstractmethod
    def prepare(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        """Model inputs and ``labels`` from the rows of one split of the dataset ``name``."""

    @abc.abstractmethod
    def stream(
        self,
        checkpoint: Checkpoint,
        rows: IterableDataset,
        held_back_rows: IterableDataset | None,
        arguments: DataArguments,
        seed: int,
    ) -> tuple[Stream | Dataset, Dataset]:
        """Training samples that are made while they are read, in an order by ``seed``, and those to evaluate on."""

    @abc.abstractmethod
    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """``metrics`` by their keys; an argument of Trainer."""

    def preprocess_logits_for_metrics(self, logits: Any, labels: Tensor) -> Any:
        """What is kept of a model's outputs for ``compute_metrics``; an argument of Trainer."""
        return logits

    def collator(self, checkpoint: Checkpoint) -> Callable[[list[dict]], dict]:
        """Makes a batch of samples."""
        from transformers import default_data_collator

        return default_data_collator

    def adapt_head(self, checkpoint: Checkpoint, train: Dataset | Stream, seed: int) -> None:
        """Give the model a new head, drawn from ``seed``, if the samples need one; sets ``checkpoint.new_head``."""
        return None

    def check(self, model: PreTrainedModel, samples: Dataset) -> None:
        """Raise DataError for samples that the model cannot be evaluated on."""
        return None
