"""Measured figures, and the data, command and machine behind them."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import EvalResult, get_token

from ..tasks import METRICS, Metric
from ..text import change, json_values

SECRETS = ("--hub-token", "--push-to-hub-token", "--token")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Where samples come from.

    Attributes:
        name: a dataset on the Hub, or the bare name of a local file or folder.
        config, split: as in ``load_dataset``.
        revision: the resolved 40-hex commit of a dataset on the Hub.
        samples: how many were used.
    """

    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    samples: int | None = None

    @classmethod
    def of(
        cls,
        dataset: Any,
        name: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        split: str | None = None,
    ) -> DataSource:
        """The source of a ``datasets.Dataset`` that was read from ``name``; a local path is cut to its last part."""
        if split is None and getattr(dataset, "split", None) is not None:
            split = str(dataset.split)
        samples = len(dataset) if hasattr(dataset, "__len__") else None
        return cls(name if revision else Path(name).name or name, config, split, revision, samples)

    @property
    def on_hub(self) -> bool:
        """Whether the name is a dataset id of the Hub."""
        return self.revision is not None

    def __str__(self) -> str:
        parts = [f"`{self.name}`"]
        parts += [f"config `{self.config}`"] if self.config else []
        parts += [f"split `{self.split}`"] if self.split else []
        parts += [f"{self.samples} samples"] if self.samples is not None else []
        parts += [f"commit `{self.revision}`"] if self.revision else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Results:
    """Figures of the same metrics at several stages, on the same data.

    Attributes:
        values: stage (``source``, ``converted``, ``fine-tuned`` ...) to metric (a key of ``tasks.METRICS`` or another
            name) to value, in this order; None where it was not run. The last stage is the model that the card is
            about.
        data: what they were measured on.
        command: the command, or whatever else measured them.
        hardware: the machine; empty if nothing was run.
        seed: of the run, if it has one.
        note: what else a reader must know of the data, for example that it is a part.
        kind: ``training`` if the last stage was trained after the first, else ``conversion``.
    """

    values: Mapping[str, Mapping[str, float | None]]
    data: DataSource
    command: str
    hardware: str
    seed: int | None = None
    note: str = ""
    kind: Literal["conversion", "training"] = "conversion"

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Results:
        """What ``to_dict`` gave."""
        values = {
            stage: {metric: None if value is None else float(value) for metric, value in found.items()}
            for stage, found in plain["values"].items()
        }
        trained = any("fine-tuned" in stage for stage in values)  # what tells it in a file without the kind
        kind = plain.get("kind", "training" if trained else "conversion")
        if kind not in ("conversion", "training"):
            raise ValueError(f"kind {kind!r}: must be conversion or training")
        return cls(**{**plain, "values": values, "data": DataSource(**plain["data"]), "kind": kind})

    def to_dict(self) -> dict:
        """Plain JSON values; what is not finite becomes text."""
        plain = json_values(dataclasses.asdict(self), not_finite=str)
        if self.kind == "conversion":
            del plain["kind"]
        return plain

    @property
    def measured(self) -> list[str]:
        """The stages with a figure."""
        return [stage for stage, found in self.values.items() if any(value is not None for value in found.values())]

    @property
    def of_training(self) -> bool:
        """Whether a training was measured."""
        return self.kind == "training" and bool(self.measured)

    @property
    def columns(self) -> list[str]:
        """The stages, and the change if there are two."""
        return [*self.values, *(["change"] if len(self.values) == 2 else [])]

    @property
    def rows(self) -> list[list[str]]:
        """One row of texts per metric."""
        rows = []
        for metric in next(iter(self.values.values())):
            found = [values.get(metric) for values in self.values.values()]
            cells = ["not run" if value is None else f"{value:.5f}" for value in found]
            if len(found) == 2:
                before, after = found
                cells.append("-" if before is None or after is None else change(before, after))
            rows.append([metric, *cells])
        return rows

    @property
    def caption(self) -> str:
        """On which data, by which command, on which machine."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        note = f" ({self.note})" if self.note else ""
        if not self.hardware:
            return f"Not run; on {self.data}{note}, by `{self.command}`."
        return f"On {self.data}{note}; by `{self.command}`{seed}; on {self.hardware}."

    def evaluations(self, task: str) -> list[EvalResult]:
        """The figures of the last stage, as huggingface_hub's ``model-index`` takes them."""
        stage = list(self.values)[-1]
        return [
            EvalResult(
                task_type=task,
                dataset_type=self.data.name,
                dataset_name=self.data.name,
                dataset_config=self.data.config,
                dataset_split=self.data.split,
                dataset_revision=self.data.revision,
                metric_type=metric.evaluate_name or metric.key,
                metric_name=metric.name,
                metric_value=round(value, 5),
            )
            for key, value in self.values[stage].items()
            for metric in [METRICS.get(key, Metric(key, key))]
            if value is not None and math.isfinite(value)
        ]


def hardware() -> str:
    """The machine that a figure was measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def command_line(command: str, argv: Sequence[str]) -> str:
    """``hf-ortho COMMAND ...`` as it was typed, tokens of the Hub left out."""
    kept: list[str] = []
    token, before = get_token(), ""
    for word in argv:
        flag, equals, _ = word.replace("_", "-").partition("=")  # the recipe's flags have both spellings
        secret = flag in SECRETS or before in SECRETS or (token and token in word)
        before = "" if equals else flag
        if not secret:
            kept.append(word)
    return shlex.join(["hf-ortho", command, *kept])
