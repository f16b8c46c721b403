"""Augmentation of training images: crop, flip, RandAugment and erasing per image, mixup and cutmix per batch.

All randomness depends only on the seed, the epoch and the row number, so the images are the same for any number of
workers and processes, and after resuming in the middle of an epoch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from ..checkpoints.load import Checkpoint
from ..errors import ConfigError
from ..tasks import of
from ..tasks.classification import predicts_number
from ..tasks.images import pictures
from .arguments import AugmentationArguments
from .ema import ExponentialMovingAverage
from .trainer import ActivationTrainer

OF_IMAGES = ("random_crop", "horizontal_flip", "randaugment", "random_erasing", "mixup", "cutmix")


def check_augmentation(
    arguments: AugmentationArguments, training: TrainingArguments, checkpoint: Checkpoint, train: Any
) -> None:
    """Raise ConfigError if an argument is out of range, or does not fit the task of the checkpoint or the data."""
    ranges = {
        "random_crop": (arguments.random_crop, "above 0 and at most 1", lambda v: 0 < v <= 1),
        "random_erasing": (arguments.random_erasing, "from 0 to 1", lambda v: 0 <= v <= 1),
        "mixup": (arguments.mixup, "at least 0 and finite", lambda v: 0 <= v < math.inf),
        "cutmix": (arguments.cutmix, "at least 0 and finite", lambda v: 0 <= v < math.inf),
        "ema_decay": (arguments.ema_decay, "at least 0 and below 1", lambda v: 0 <= v < 1),
    }
    for key, (value, range_, fits) in ranges.items():
        if value is not None and not fits(value):
            raise ConfigError(f"{key} {value}: must be {range_}")
    if (levels := arguments.randaugment) is not None and not (
        len(levels) in (1, 2) and 0 <= levels[0] <= 10 and 0 <= levels[-1] < math.inf
    ):
        raise ConfigError(
            f"randaugment {' '.join(map(str, levels))}: must be a magnitude between 0 and 10, and optionally its "
            "standard deviation"
        )
    enabled = [key for key in OF_IMAGES if getattr(arguments, key)]
    if enabled and not of(checkpoint.model).augments_images:
        raise ConfigError(f"{enabled[0]}: needs labeled images, which {type(checkpoint.model).__name__} does not take")
    if enabled and not isinstance(train, Dataset):
        raise ConfigError(f"{enabled[0]}: requires random access to the images; set streaming: false")
    if training.label_smoothing_factor and predicts_number(checkpoint.model):
        smoothing = training.label_smoothing_factor
        raise ConfigError(f"label_smoothing_factor {smoothing:g}: needs classes, but the model predicts a number")
    if arguments.ema_decay is None:
        return
    if training.load_best_model_at_end:
        raise ConfigError("ema_decay: averages the weights until the last step; set load_best_model_at_end: false")
    if training.deepspeed_plugin is not None:
        raise ConfigError(
            "ema_decay: not supported by DeepSpeed, which manages the weights itself; use one process, DDP or FSDP2"
        )
    for name, parameter in checkpoint.model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"ema_decay: {name} is {parameter.dtype}, too imprecise for an average; set dtype: float32"
            )


def augment(trainer: ActivationTrainer, checkpoint: Checkpoint, arguments: AugmentationArguments, name: str) -> None:
    """Make ``trainer`` train on augmented images of the dataset ``name``, and average the weights.

    Evaluation data is not augmented.
    """
    if any(getattr(arguments, key) for key in OF_IMAGES):
        assert isinstance(trainer.train_dataset, Dataset)
        images = AugmentedImages(trainer.train_dataset, checkpoint.image_processor, arguments, trainer.args.seed, name)
        trainer.train_dataset = images
        trainer.add_callback(Epochs(images))
    if arguments.mixup or arguments.cutmix:
        classes = checkpoint.model.config.num_labels or 0
        trainer.data_collator = MixingCollator(classes, arguments.mixup, arguments.cutmix)
        trainer.compute_loss_func = SoftTargetLoss(trainer.args.label_smoothing_factor)
    if arguments.ema_decay is not None:
        trainer.average = ExponentialMovingAverage(arguments.ema_decay)
        trainer.add_callback(trainer.average)


class AugmentedImages(torch.utils.data.Dataset):
    """The dataset of ``tasks.images.images``, augmented before the image processor (erasing: after it).

    Samples have the same columns: ``pixel_values`` (C, H, W) and ``labels``. With mixup or cutmix they also have
    ``key``, an integer that seeds the mixing of the batch.

    Example:
        >>> import datasets
        >>> from transformers import ViTImageProcessorPil
        >>> from hf_ortho.tasks.images import images
        >>> from hf_ortho.training import AugmentationArguments, AugmentedImages
        >>> features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        >>> noise = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8).numpy()
        >>> rows = datasets.Dataset.from_dict({"image": list(noise), "label": [0, 1]}, features=features)
        >>> processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
        >>> flipped = AugmentationArguments(horizontal_flip=True)
        >>> AugmentedImages(images(rows, processor), processor, flipped, seed=0)[0]["pixel_values"].shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, images: Dataset, processor, arguments: AugmentationArguments, seed: int, name: str = "dataset"):
        self.rows, self.processor, self.arguments = images.with_format(None), processor, arguments
        self.seed, self.name = seed, name
        features = images.features
        self.image_column = next(c for c, f in features.items() if isinstance(f, Image))
        self.label_column = next(c for c, f in features.items() if isinstance(f, ClassLabel))
        height, width = images[0]["pixel_values"].shape[-2:]
        self.size = (width, height)
        red, green, blue = getattr(processor, "image_mean", None) or (0.5, 0.5, 0.5)
        self.fill = (round(255 * red), round(255 * green), round(255 * blue))
        # Shared with the workers of a DataLoader, which may persist across epochs.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        rngs = [np.random.default_rng((self.seed, int(self.epoch), int(i))) for i in indices]
        rows = self.rows[[int(i) for i in indices]]
        augmented = [
            self._augmented(image, rng)
            for image, rng in zip(pictures(rows, self.image_column, self.name), rngs, strict=True)
        ]
        ready = {"do_resize": False, "do_center_crop": False} if self.arguments.random_crop else {}
        pixels = self.processor(augmented, return_tensors="pt", **ready)["pixel_values"]
        samples = []
        for image, label, rng in zip(pixels, rows[self.label_column], rngs, strict=True):
            if rng.random() < self.arguments.random_erasing:
                erase(image, rng)
            sample = {"pixel_values": image, "labels": label}
            if self.arguments.mixup or self.arguments.cutmix:
                sample["key"] = int(rng.integers(2**63))
            samples.append(sample)
        return samples

    def _augmented(self, picture, rng: np.random.Generator):
        from PIL import ImageOps

        from .pictures import rand_augment, random_resized_crop

        if self.arguments.random_crop:
            picture = random_resized_crop(picture, self.size, self.arguments.random_crop, rng)
        if self.arguments.horizontal_flip and rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        if self.arguments.randaugment:
            magnitude, deviation = (*self.arguments.randaugment, 0.0)[:2]
            picture = rand_augment(picture, magnitude, deviation, self.fill, rng)
        return picture


class Epochs(TrainerCallback):
    """Tells training samples the epoch, which their randomness depends on."""

    def __init__(self, samples: Any):
        self.samples = samples

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.samples.set_epoch(int(state.epoch or 0))


def erase(image: Tensor, rng: np.random.Generator) -> None:
    """Fill a rectangle of a normalized image (C, H, W) with N(0, 1) in place: 2 to 33% of the area, aspect 0.3 to 3.3.

    Source: Zhong et al., Random erasing data augmentation (2020).
    """
    channels, height, width = image.shape
    for _ in range(10):
        area, ratio = height * width * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.standard_normal((channels, h, w), dtype=np.float32)
            image[:, top : top + h, left : left + w] = torch.from_numpy(noise)
            return


class MixingCollator:
    """Data collator for mixup and cutmix: mixes each image with its opposite in the batch, with one weight per batch.

    With a weight s ~ Beta(alpha, alpha), mixup gives s x_i + (1 - s) x_j. Cutmix pastes a box of x_j, of area 1 - s
    before clipping at the border, into x_i. ``labels`` become probabilities (batch, classes): s' for the class of x_i
    and 1 - s' for the class of x_j, where s' is the actual share of x_i. If both are enabled, each batch
    gets one of them with probability 1/2. Samples without a ``key`` (evaluation) are batched unchanged.

    Sources: Zhang et al., mixup (2018); Yun et al., CutMix (2019).

    Example:
        >>> samples = [{"pixel_values": torch.zeros(3, 4, 4), "labels": label, "key": 7} for label in (0, 1)]
        >>> batch = hf_ortho.training.MixingCollator(classes=2, mixup=0.8, cutmix=0.0)(samples)
        >>> batch["labels"].sum(1).tolist()  # probabilities
        [1.0, 1.0]
    """

    def __init__(self, classes: int, mixup: float, cutmix: float):
        self.classes, self.mixup, self.cutmix = classes, mixup, cutmix

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        if "key" not in samples[0]:
            return default_data_collator(samples)
        rng = np.random.default_rng([sample["key"] for sample in samples])
        batch = default_data_collator([{k: v for k, v in sample.items() if k != "key"} for sample in samples])
        images, labels = batch["pixel_values"], one_hot(batch["labels"], self.classes).float()
        partners = images.flip(0)
        if self.cutmix and (not self.mixup or rng.random() < 0.5):
            rows, columns = _box(images.shape[2], images.shape[3], rng.beta(self.cutmix, self.cutmix), rng)
            images[..., rows, columns] = partners[..., rows, columns]
            share = 1 - partners[0, 0, rows, columns].numel() / partners[0, 0].numel()
        else:
            share = rng.beta(self.mixup, self.mixup)
            images = torch.lerp(partners, images, share)
        return {"pixel_values": images, "labels": torch.lerp(labels.flip(0), labels, share)}


def _box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """A box of area 1 - share around a random pixel, clipped at the border."""
    side = math.sqrt(1 - share)

    def span(length: int) -> slice:
        center, half = int(rng.integers(length)), int(length * side) // 2
        return slice(max(0, center - half), min(length, center + half))

    return span(height), span(width)


@dataclasses.dataclass(frozen=True)
class SoftTargetLoss:
    """``compute_loss_func`` for Trainer with class indices (batch,) or probabilities (batch, classes).

    The loss is -sum_c t_c log p_c with t = (1 - label_smoothing) target + label_smoothing / classes, averaged over the
    images of an optimizer step.

    Example:
        >>> loss = hf_ortho.training.SoftTargetLoss()
        >>> round(loss({"logits": torch.zeros(1, 2)}, torch.tensor([[0.5, 0.5]])).item(), 4)  # log 2
        0.6931
    """

    label_smoothing: float = 0.0

    def __call__(self, outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"].float()
        if num_items_in_batch is None:
            return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # Trainer counts the entries of labels: with probabilities, one per image and class.
        images = num_items_in_batch * len(labels) / labels.numel()
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum") / images
