"""Base of the classification tasks: each sample, such as an image or a text, has one class."""

from __future__ import annotations

import abc
import logging
from functools import partial
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError
from .task import Task

logger = logging.getLogger("hf_ortho")

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel

    from ..checkpoints.load import Checkpoint
    from .arguments import DataArguments
    from .stream import Stream


class Classification(Task):
    """A task whose ``prepare`` returns a ``ClassLabel`` column; see ``labels.with_classes``."""

    @abc.abstractmethod
    def unlabeled(
        self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
    ) -> list[dict]:
        """``calibration`` without labels."""

    def calibration(
        self, checkpoint: Checkpoint, rows: Dataset, arguments: DataArguments, name: str, samples: int
    ) -> list[dict]:
        """Batches of 8 samples, with labels if the dataset has the classes of the model."""
        from .columns import has_labels
        from .labels import class_names, has_classes
        from .samples import batches

        if not (arguments.label_column or has_labels(rows)):
            return self.unlabeled(checkpoint, rows, arguments, name, samples)
        try:
            prepared = self.prepare_evaluation(checkpoint, rows, arguments, name)
        except DataError as error:
            if arguments.label_column:
                raise
            logger.warning(f"note: calibrating without labels: {error}")
            return self.unlabeled(checkpoint, rows, arguments, name, samples)
        inputs = batches(prepared, samples * 8, size=8, collate=self.collator(checkpoint))
        if has_classes(prepared) and class_names(prepared) != classes_of(checkpoint.model):
            logger.warning(f"note: calibrating without labels: the classes of {name} are not those of the model")
            inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in inputs]
        return inputs

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
        train = stream_classified(
            rows, partial(self.prepare, checkpoint, arguments=arguments, name=name), arguments, seed
        )
        self.adapt_head(checkpoint, train, seed)
        name = arguments.eval_dataset or name
        held_back_rows = first_rows(held_back_rows, arguments.max_eval_samples, name)
        held_back = self.prepare_evaluation(checkpoint, held_back_rows, arguments, name)
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
        if unseen and not (_numbers(names) or _unnamed(known)):
            logger.warning(
                f"note: the classes of the dataset ({_some(names)}) are compared with those of {model.name_or_path} "
                f"({_some(known)}) in this order"
            )

    def adapt_head(self, checkpoint: Checkpoint, train: Dataset | Stream, seed: int) -> None:
        """Write the class names of the dataset to the config, and replace the head if the classes differ."""
        from .labels import class_names

        names, model = class_names(train), checkpoint.model
        known, old = classes_of(model), model.config.num_labels
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
        unnamed = _unnamed(known)
        if (known == names or (unnamed and old == len(names))) and not checkpoint.new_modules:
            return
        if old == len(names) and not unnamed and known != names:
            logger.warning(
                f"note: the classes of {model.name_or_path} ({_some(known)}) differ from those of the dataset "
                f"({_some(names)}): its head is replaced with a new one"
            )
        replace_head(checkpoint, len(names), seed)


def replace_head(checkpoint: Checkpoint, outputs: int, seed: int) -> None:
    """Replace the layers whose size is the number of outputs, initialized from ``seed`` as transformers does.

    Raises:
        ConfigError: the model has no such layer.
    """
    from transformers import set_seed

    model = checkpoint.model
    fresh, larger = (_with_outputs(model, number) for number in (outputs, outputs + 1))
    sizes = {name: p.shape for name, p in larger.named_parameters()}
    paths = {name.rpartition(".")[0] for name, p in fresh.named_parameters() if p.shape != sizes[name]}
    if not paths:
        raise ConfigError(f"{type(model).__name__} has no head to replace with one of {outputs} outputs")
    set_seed(seed)
    for path in sorted(paths):
        old = next(model.get_submodule(path).parameters())
        layer = fresh.get_submodule(path).to_empty(device=old.device).to(old.dtype)
        model._init_weights(layer)
        model.set_submodule(path, layer)
    for module in model.modules():
        if hasattr(module, "num_labels"):
            setattr(module, "num_labels", outputs)  # noqa: B010  # torch types it as a module
    model.config.num_labels = outputs
    known = checkpoint.new_modules
    checkpoint.new_modules = (*known, *(path for path in sorted(paths) if not f"{path}.".startswith(_prefixes(known))))


def _prefixes(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{path}." for path in paths)


def _with_outputs(model: PreTrainedModel, outputs: int) -> PreTrainedModel:
    """The same model on the meta device, with another number of outputs."""
    import copy

    from ..conversion.sites import rebuild

    config = copy.deepcopy(model.config)
    config.num_labels = outputs
    return rebuild(model, config)


def predicts_number(model: PreTrainedModel) -> bool:
    """Whether a model has one output, or several, that are numbers instead of the logits of classes."""
    return model.config.num_labels == 1 or model.config.problem_type == "regression"


def classes_of(model: PreTrainedModel) -> list[str]:
    """The classes of a classifier, in the order of its logits."""
    return [name for _, name in sorted((model.config.id2label or {}).items())]


def _unnamed(names: list[str]) -> bool:
    """Whether the classes have the names that transformers gives."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (" ..." if names[2:] else "")


def _numbers(names: list[str]) -> bool:
    """Whether the classes are numbers, as of integer labels."""
    return names == [str(i) for i in range(len(names))]
