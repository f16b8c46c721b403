"""Image classification with the image processor of the model, measured by loss, top-1 and top-5 accuracy."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..errors import DataError
from .classification import Classification, classes_of
from .task import LOSS, Metric

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

    from ..checkpoints.load import Checkpoint
    from .arguments import DataArguments

logger = logging.getLogger("hf_ortho")


class ImageClassification(Classification):
    def prepare(self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str) -> Dataset:
        from .images import image_processor, images

        columns = (arguments.image_column, arguments.label_column)
        known, numbered = classes_of(checkpoint.model), not arguments.streaming
        return images(rows, image_processor(checkpoint), *columns, name, known, numbered=numbered)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        from .metrics.compute import accuracy

        return accuracy(prediction, (1, 5))

    def calibration(
        self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
    ) -> list[dict]:
        """Batches of images, with labels if the dataset has the classes of the model."""
        from .calibration import image_batches
        from .columns import has_labels
        from .labels import class_names
        from .samples import batches

        if not (arguments.label_column or has_labels(rows)):
            return image_batches(checkpoint, rows, arguments, name, samples)
        try:
            prepared = self.prepare(checkpoint, rows, arguments, name)
        except DataError as error:
            if arguments.label_column:
                raise
            logger.warning(f"note: calibrating without labels: {error}")
            return image_batches(checkpoint, rows, arguments, name, samples)
        inputs = batches(prepared, samples * 8, size=8)
        if class_names(prepared) != classes_of(checkpoint.model):
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
