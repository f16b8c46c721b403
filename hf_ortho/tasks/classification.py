"""Base of the classification tasks: each sample, such as an image or a text, has one class."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel

    from ..checkpoints.load import Checkpoint
    from .arguments import DataArguments
    from .stream import Stream


class Classification(Task):
    """A task whose ``prepare`` returns a ``ClassLabel`` column; see ``labels.with_classes``."""

    def stream(
        self,
        checkpoint: Checkpoint,
        rows: IterableDataset,
        held_back_rows: IterableDataset | None,
        arguments: DataArguments,
        seed: int,
    ) -> tuple[Stream | Dataset, Dataset]:
        from .stream import first_rows, stream_classified

        name = str(arguments.dataset)
        if held_back_rows is None:
            raise ConfigError(f"streaming: {name} has no evaluation split; give --eval_dataset")
        prepare = partial(self.prepare, checkpoint, arguments=arguments)
        train = stream_classified(rows, partial(prepare, name=name), arguments, seed)
        self.adapt_head(checkpoint, train, seed)
        name = arguments.eval_dataset or name
        held_back = prepare(first_rows(held_back_rows, arguments.max_eval_samples, name), name=name)
        self.check_classes(train, held_back, name)
        return train, held_back

    def check_classes(self, train: Dataset | Stream, held_back: Dataset, name: str) -> None:
        from .labels import class_names

        known, names = class_names(train), class_names(held_back)
        if _numbers(names):
            if len(names) > len(known):
                raise DataError(
                    f"{name} has the label {len(names) - 1}, but the training data has {len(known)} classes, numbered "
                    "from 0"
                )
            return
        if unseen := [label for label in names if label not in known]:
            raise DataError(
                f"{name} has the class {unseen[0]!r}, which is not among the {len(known)} classes of the training data "
                f"({', '.join(known[:5])}{', ...' if len(known) > 5 else ''})"
            )

    def check(self, model: PreTrainedModel, samples: Dataset) -> None:
        from .labels import class_names

        names, known, classes = class_names(samples), classes_of(model), model.config.num_labels or 0
        if len(names) > classes:
            raise DataError(f"the dataset has {len(names)} classes, {model.name_or_path} has {classes}")
        unseen = [name for name in names if name not in known]
        shared = [name for name in names if name in known]
        same = len(names) == classes and all(names.index(name) == known.index(name) for name in shared)
        if unseen and shared and not same and not _numbers(names):  # with equal places, the spelling may differ
            raise DataError(f"the dataset has the class {unseen[0]!r}, which {model.name_or_path} does not have")

    def adapt_head(self, checkpoint: Checkpoint, train: Dataset | Stream, seed: int) -> None:
        """Write the class names of the dataset to the config, and replace the head if the classes differ."""
        import torch
        from transformers.utils import logging

        from .labels import class_names

        names, model = class_names(train), checkpoint.model
        known, old = classes_of(model), model.config.num_labels
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
        unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(known))
        if known == names or (unnamed and old == len(names)):
            return
        head = next((m for m in (getattr(model, n, None) for n in ("classifier", "head", "fc")) if m is not None), None)
        if not isinstance(head, torch.nn.Linear):
            if old == len(names):
                return
            raise ConfigError(
                f"{model.name_or_path} has {old} classes and the dataset {len(names)}, but "
                f"{type(model).__name__} has no linear head to replace"
            )
        if old == len(names):
            logging.get_logger("hf_ortho").warning(
                f"note: the classes of {model.name_or_path} ({', '.join(known[:2])} ...) differ from those of the "
                f"dataset ({', '.join(names[:2])} ...): its head is replaced with a new one"
            )
        torch.manual_seed(seed)
        new = torch.nn.Linear(head.in_features, len(names), dtype=head.weight.dtype, device=head.weight.device)
        torch.nn.init.normal_(new.weight, std=getattr(model.config, "initializer_range", 0.02))
        torch.nn.init.zeros_(new.bias)
        for name, module in model.named_children():
            if module is head:
                setattr(model, name, new)
                checkpoint.new_head = name
        setattr(model, "num_labels", len(names))  # noqa: B010


def classes_of(model: PreTrainedModel) -> list[str]:
    """The classes of a classifier, in the order of its logits."""
    return [name for _, name in sorted((model.config.id2label or {}).items())]


def _numbers(names: list[str]) -> bool:
    """Whether the classes are numbers, as of integer labels."""
    return names == [str(i) for i in range(len(names))]
