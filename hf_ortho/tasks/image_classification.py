"""Image classification with the image processor of the model, measured by loss, top-1 and top-5 accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DataError
from .arguments import DataArguments
from .classification import Classification, classes_of
from .task import LOSS, Metric

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

    from ..checkpoints.load import Checkpoint


class ImageClassification(Classification):
    def prepare(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        from .data import images

        if checkpoint.image_processor is None:
            raise DataError(f"{checkpoint.model.name_or_path} has no image processor, so images cannot be read for it")
        columns = (arguments.image_column, arguments.label_column)
        return images(rows, checkpoint.image_processor, *columns, name, classes_of(checkpoint.model))

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        from .metrics.compute import accuracy

        return accuracy(prediction, (1, 5))

    def calibration(
        self, checkpoint: Checkpoint, rows: Dataset, name: str, samples: int, block_size: int | None
    ) -> list[dict]:
        from .data import class_names
        from .samples import batches

        prepared = self.prepare(checkpoint, rows, DataArguments(), name)
        inputs = batches(prepared, samples * 8, size=8)
        if class_names(prepared) != classes_of(checkpoint.model):
            # The labels do not match the classes of the model.
            inputs = [{"pixel_values": batch["pixel_values"]} for batch in inputs]
        return inputs


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
