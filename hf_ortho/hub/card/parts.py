"""What a card says, before it is put into words, and the training that it tells of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from transformers import TrainingArguments

from .base import Base

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
    """How a model was trained, as far as its folder does not say.

    Attributes:
        arguments: of the Trainer, None if there was none.
        others: further hyperparameters by name.
        base_model, base_revision: what was trained, and its commit; only used for a model that hf_ortho did not
            convert, and not for an adapter, whose config names its base model.
    """

    arguments: TrainingArguments | None = None
    others: Mapping[str, object] = dataclasses.field(default_factory=dict)
    base_model: str | None = None
    base_revision: str | None = None

    @property
    def hyperparameters(self) -> dict[str, object]:
        """All that a card lists."""
        arguments = self.arguments
        if arguments is None:
            return dict(self.others)
        unused = "num_train_epochs" if arguments.max_steps > 0 else "max_steps"
        known = {key: getattr(arguments, key) for key in HYPERPARAMETERS if key != unused}
        known = {key: getattr(value, "value", value) for key, value in known.items()}  # of an enum
        return {**known, "processes": arguments.world_size, **self.others}


@dataclasses.dataclass(frozen=True)
class CardParts:
    """What a card says of a model or an adapter; ``template.md`` has the words.

    Attributes:
        kind: ``converted`` for a pretrained model with learnable activations, ``scratch`` for one that was trained
            from scratch with them, ``plain`` for a model without, ``adapter`` for an adapter of peft.
        name: the class of the model, or the method of the adapter.
        base: the model that it was made of.
        task: the pipeline tag, None if unknown.
        tags: for the Hub.
        activation: the learnable activations, such as ``hermite_8``; None if there are none.
        count: how many there are, 0 if that is not recorded.
        sources: the activations that they replaced.
        init: what they started from in a training from scratch: ``paper``, ``unit`` or a name in ``ACT2FN``.
        tails: whether they are straight lines outside a domain; None if they have no domain.
        formulas: of their families, as Markdown.
        tables: of the activations, and of the modules of an adapter, as Markdown.
        weight: what the errors in the first table are weighted by; empty if it has none.
        tuned: whether the model was trained after the conversion.
        outdated: whether the first table is of the conversion, and older than a training.
        remarks: of the report of the conversion.
        parameters, size: the number of parameters of an adapter, and its size in bytes.
        targets, saved: the modules that an adapter changes, and those that it holds whole, as Markdown.
        versions: of the packages that made it, as far as its config records them.
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
    formulas: str = ""
    tables: Sequence[str] = ()
    weight: str = ""
    tuned: bool = False
    outdated: bool = False
    remarks: Sequence[str] = ()
    parameters: int = 0
    size: int = 0
    targets: str = ""
    saved: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
