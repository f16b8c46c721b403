"""Image classification with the image processor of the model, measured by loss, top-1 and top-5 accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .classification import Classification, classes_of
from .task import LOSS, Metric

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

    from ..checkpoints.load import Checkpoint
    from .arguments import DataArguments


class ImageClassification(Classification):
    def prepare(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        from .images import image_processor, images

        columns = (arguments.image_column, arguments.label_column)
        known, numbered = classes_of(checkpoint.model), not arguments.streaming
        return images(rows, image_processor(checkpoint), *columns, name, known, numbered=numbered)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        from .metrics.compute import accuracy

        return accuracy(prediction, (1, 5))

    def unlabeled(
        self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
    ) -> list[dict]:
        from .calibration import image_batches

        return image_batches(checkpoint, rows, arguments, name, samples)


TOP1 = Metric("top1", "top-1 accuracy", "accuracy")
IMAGE_CLASSIFICATION = ImageClassification(
    endings=("ForImageClassification",),
    auto_class="AutoModelForImageClassification",
    pipeline_tag="image-classification",
    title="image classification",
    metrics=(LOSS, TOP1, Metric("top5", "top-5 accuracy", "accuracy")),
    compared=TOP1,
    augments_images=True,
)
