"""The contents of a card before rendering, and the details of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from transformers import TrainingArguments

from ...text import Markdown
from .base import Base

NOTHING = Markdown()
HYPERPARAMETERS = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)


@dataclasses.dataclass(frozen=True)
class TrainingDetails:
    """Details of a training that the model folder does not contain.

    Attributes:
        arguments: arguments of Trainer, if any.
        others: further hyperparameters by name.
        base_model, base_revision: the trained model and its commit. Only used for a model that hf_ortho did not
            convert, and not for an adapter, whose config names its base model.

    Example:
        >>> hf_ortho.hub.TrainingDetails(others={"learning_rate": 1e-3}).hyperparameters
        {'learning_rate': 0.001}
    """

    arguments: TrainingArguments | None = None
    others: Mapping[str, object] = dataclasses.field(default_factory=dict)
    base_model: str | None = None
    base_revision: str | None = None

    @property
    def hyperparameters(self) -> dict[str, object]:
        """All hyperparameters that a card lists."""
        arguments = self.arguments
        if arguments is None:
            return dict(self.others)
        unused = "num_train_epochs" if arguments.max_steps > 0 else "max_steps"
        known = {key: getattr(arguments, key) for key in HYPERPARAMETERS if key != unused}
        known = {key: getattr(value, "value", value) for key, value in known.items()}  # value of an enum
        return {**known, "processes": arguments.world_size, **self.others}


@dataclasses.dataclass(frozen=True)
class CardParts:
    """The contents of the card of a model or an adapter, rendered by ``template.md``.

    Attributes:
        kind: ``converted`` for a pretrained model with learnable activations, ``scratch`` for a model trained from
            scratch with them, ``plain`` for a model without them, ``adapter`` for a peft adapter.
        name: class of the model, or method of the adapter.
        base: base model.
        task: pipeline tag, or None if unknown.
        tags: tags for the Hub.
        activation: name of the learnable activations, such as ``hermite_8``, or None.
        count: number of activations; 0 if not recorded.
        sources: the activations that they replaced.
        init: initialization in a training from scratch: ``paper``, ``unit`` or a name in ``ACT2FN``.
        tails: whether the activations are straight lines outside a domain; None if they have no domain.
        formulas: formulas of the families.
        tables: tables of the activations, and of the modules of an adapter.
        legend: what the columns of the first table are; empty if it has no errors.
        tuned: whether the model was trained after the conversion.
        outdated: whether the first table describes the conversion before a training.
        fidelity: comparison of the converted model with its source, as names and values.
        compared_on: what it is measured on.
        remarks: remarks of the conversion report.
        parameters, size: number of parameters of an adapter, and its size in bytes.
        targets, saved: the modules that an adapter changes, and the modules saved in full.
        versions: package versions recorded in the config.
    """

    kind: Literal["converted", "scratch", "plain", "adapter"]
    name: str
    base: Base
    task: str | None
    tags: Sequence[str]
    activation: str | None = None
    count: int = 0
    sources: Sequence[str] = ()
    init: str | None = None
    tails: bool | None = None
    formulas: Markdown = NOTHING
    tables: Sequence[Markdown] = ()
    legend: str = ""
    tuned: bool = False
    outdated: bool = False
    fidelity: Sequence[tuple[str, str]] = ()
    compared_on: str = ""
    remarks: Sequence[str] = ()
    parameters: int = 0
    size: int = 0
    targets: Markdown = NOTHING
    saved: Markdown = NOTHING
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
