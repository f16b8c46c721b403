"""Measured results with their data, command and machine."""

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
from ..text import Markdown, change, code, json_values, markdown

SECRETS = ("--hub-token", "--push-to-hub-token", "--token")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """The source of samples.

    Attributes:
        name: name of a Hub dataset, or file name of a local file or folder.
        config, split: see ``load_dataset``.
        revision: full commit hash of a Hub dataset.
        samples: number of samples used.

    Example:
        >>> str(hf_ortho.hub.DataSource("my_text.txt", split="test", samples=32))
        '`my_text.txt`, split `test`, 32 samples'
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
        """The source of a ``datasets.Dataset`` loaded from ``name``. A local path is shortened to its last part.

        A single file has no splits, although ``datasets`` calls all of it ``train``.
        """
        if split is None and getattr(dataset, "split", None) is not None:
            split = str(dataset.split)
        if Path(name).is_file():
            split = None
        samples = len(dataset) if hasattr(dataset, "__len__") else None
        return cls(name if revision else Path(name).name or name, config, split, revision, samples)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> DataSource:
        """The inverse of ``dataclasses.asdict``; ignores other keys."""
        config, split, revision = (
            None if plain.get(key) is None else str(plain[key]) for key in ("config", "split", "revision")
        )
        samples = None if plain.get("samples") is None else int(plain["samples"])
        return cls(str(plain["name"]), config, split, revision, samples)

    @property
    def on_hub(self) -> bool:
        """Whether the name is a Hub dataset id."""
        return self.revision is not None

    def __str__(self) -> Markdown:
        parts: list[str] = [code(self.name)]
        parts += [f"config {code(self.config)}"] if self.config else []
        parts += [f"split {code(self.split)}"] if self.split else []
        parts += [f"{self.samples} samples"] if self.samples is not None else []
        parts += [f"commit {code(self.revision)}"] if self.revision else []
        return Markdown(", ".join(parts))


@dataclasses.dataclass(frozen=True)
class Results:
    """Values of the same metrics at several stages, on the same data.

    Attributes:
        values: stage (``source``, ``converted``, ``fine-tuned`` ...) to metric (a key of ``tasks.METRICS`` or another
            name) to value, in order. Values that were not measured are None. The last stage is the model described by
            the card.
        data: evaluation data.
        command: the command, or another description of the measurement.
        hardware: the machine; empty if nothing was run.
        seed: seed of the run, if any.
        note: a note about the data, such as that it is a subset.
        kind: ``training`` if the model was trained between the first and last stage, else ``conversion``.

    Example:
        >>> values = {"source": {"loss": 2.0}, "converted": {"loss": 2.01}}
        >>> source = hf_ortho.hub.DataSource("my_text.txt")
        >>> hf_ortho.hub.Results(values, source, "python mine.py", hf_ortho.hub.hardware()).rows
        [['loss', '2.00000', '2.01000', '+0.500%']]
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
        """The inverse of ``to_dict``; ignores other keys."""
        values = {
            stage: {metric: None if value is None else float(value) for metric, value in metrics.items()}
            for stage, metrics in plain["values"].items()
        }
        if not values:
            raise ValueError("results without values")
        trained = any("fine-tuned" in stage for stage in values)  # for files without the kind
        kind = plain.get("kind", "training" if trained else "conversion")
        if kind not in ("conversion", "training"):
            raise ValueError(f"kind {kind!r}: must be conversion or training")
        seed = None if plain.get("seed") is None else int(plain["seed"])
        command, hardware, note = (str(plain.get(key, "")) for key in ("command", "hardware", "note"))
        return cls(values, DataSource.from_dict(plain["data"]), command, hardware, seed, note, kind)

    def to_dict(self) -> dict:
        """Plain JSON values. Non-finite numbers become text."""
        plain = json_values(dataclasses.asdict(self), not_finite=str)
        if self.kind == "conversion":
            del plain["kind"]
        return plain

    @property
    def measured(self) -> list[str]:
        """The stages with at least one value."""
        return [stage for stage, metrics in self.values.items() if any(value is not None for value in metrics.values())]

    @property
    def of_training(self) -> bool:
        """Whether these are measured results of a training."""
        return self.kind == "training" and bool(self.measured)

    @property
    def columns(self) -> list[str]:
        """The stages, followed by the change if there are two."""
        return [*self.values, *(["change"] if len(self.values) == 2 else [])]

    @property
    def rows(self) -> list[list[str]]:
        """One row of formatted values per metric."""
        rows = []
        for metric in next(iter(self.values.values())):
            by_stage = [values.get(metric) for values in self.values.values()]
            cells = ["not run" if value is None else f"{value:.5f}" for value in by_stage]
            if len(by_stage) == 2:
                before, after = by_stage
                cells.append("-" if before is None or after is None else change(before, after))
            rows.append([metric, *cells])
        return rows

    @property
    def caption(self) -> Markdown:
        """The data, command and machine in one line."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        note = f" ({markdown(self.note)})" if self.note else ""
        if not self.hardware:
            return Markdown(f"Not run; on {self.data}{note}, by {code(self.command)}.")
        return Markdown(f"On {self.data}{note}; by {code(self.command)}{seed}; on {markdown(self.hardware)}.")

    def evaluations(self, task: str) -> list[EvalResult]:
        """The values of the last stage, as entries of the ``model-index`` of huggingface_hub."""
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


def hardware(gpu: bool = True) -> str:
    """Describe this machine: its GPUs, or its CPU cores if it has none or ``gpu`` is False.

    Example:
        >>> "CPU cores" in hf_ortho.hub.hardware(gpu=False)
        True
    """
    if gpu and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def command_line(command: str, argv: Sequence[str]) -> str:
    """``hf-ortho COMMAND ...`` as typed, without Hub tokens.

    Example:
        >>> hf_ortho.hub.command_line("push", ["gpt2-hermite", "me/gpt2", "--token", "hf_secret"])
        'hf-ortho push gpt2-hermite me/gpt2'
    """
    words: list[str] = []
    token, before = get_token(), ""
    for word in argv:
        flag, equals, _ = word.replace("_", "-").partition("=")  # flags of a recipe have both spellings
        secret = flag in SECRETS or before in SECRETS or (token and token in word)
        before = "" if equals else flag
        if not secret:
            words.append(word)
    return shlex.join(["hf-ortho", command, *words])
