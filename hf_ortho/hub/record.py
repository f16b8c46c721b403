"""``conversion.json``: the record of how the model in a folder was made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.stored import stored_file
from ..conversion import ConversionReport
from ..conversion.report import REPORT_FILE
from ..errors import CheckpointError
from ..files import json_object, written
from .results import DataSource, Results


@dataclasses.dataclass(frozen=True)
class Graph:
    """How an ONNX graph was made and checked.

    Attributes:
        opset: version of the operators.
        cache: whether it takes and returns a cache.
        difference: largest difference between its outputs and those of the model, relative to the largest output.
        engine: name and version of the program that ran it.
    """

    opset: int
    cache: bool
    difference: float
    engine: str

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Graph:
        """The inverse of ``dataclasses.asdict``; ignores other keys."""
        return cls(int(plain["opset"]), bool(plain["cache"]), float(plain["difference"]), str(plain["engine"]))

    def __str__(self) -> str:
        cache = ", also when it continues from its cache token by token" if self.cache else ""
        return (
            f"On random inputs, the outputs of the graph (float32, opset {self.opset}) in {self.engine} differ from "
            f"those of the model in PyTorch by at most {self.difference:.1e} of the largest one{cache}."
        )


@dataclasses.dataclass
class Record:
    """The conversion of a model and its later history.

    Attributes:
        report: report of the conversion, if any.
        results: measured results, oldest first.
        commands: the commands that made the model.
        data: calibration and training data.
        graph: the ONNX graph in the folder, if any.
    """

    report: ConversionReport | None = None
    results: list[Results] = dataclasses.field(default_factory=list)
    commands: list[str] = dataclasses.field(default_factory=list)
    data: list[DataSource] = dataclasses.field(default_factory=list)
    graph: Graph | None = None

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read ``conversion.json`` from a folder. Without the file, the record is empty.

        Raises:
            CheckpointError: the file was not written by ``hf-ortho``.
        """
        path = folder / REPORT_FILE
        if not path.is_file():
            return cls()
        try:
            plain = json_object(path)
            results, commands, data = (plain.get(key, []) for key in ("results", "commands", "data"))
            return cls(
                ConversionReport.from_dict(plain),
                [Results.from_dict(entry) for entry in results],
                [str(command) for command in commands],
                [DataSource.from_dict(entry) for entry in data],
                Graph.from_dict(plain["graph"]) if "graph" in plain else None,
            )
        except CheckpointError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{path} was not written by hf-ortho ({type(error).__name__}: {error}); delete it or convert again"
            ) from error

    def add(
        self, results: Sequence[Results] = (), commands: Sequence[str] = (), data: Sequence[DataSource] = ()
    ) -> None:
        """Append new entries. Results of the same command on the same data are replaced."""
        replaced = {(new.command, new.data) for new in results}
        self.results = [old for old in self.results if (old.command, old.data) not in replaced] + list(results)
        self.commands += [new for new in commands if new not in self.commands]
        self.data += [new for new in data if new not in self.data]

    def save(self, folder: Path) -> None:
        """Write ``conversion.json`` if there was a conversion."""
        if self.report is None:
            return
        plain = self.report.to_dict()
        plain["results"] = [entry.to_dict() for entry in self.results]
        plain["commands"] = self.commands
        plain["data"] = [dataclasses.asdict(entry) for entry in self.data]
        if self.graph is not None:
            plain["graph"] = dataclasses.asdict(self.graph)
        with written(folder / REPORT_FILE) as draft:
            draft.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def carry_over(place: str, revision: str | None, folder: Path, names: Sequence[str] = (REPORT_FILE,)) -> None:
    """Copy ``conversion.json`` and others in ``names``, if any, from the model (a folder or Hub model) that ``folder``
    is made from."""
    for name in names:
        try:
            stored = stored_file(place, name, revision)
        except OSError:  # no network and not cached
            return
        if stored is not None:
            with written(folder / name) as draft:
                draft.write_bytes(Path(stored).read_bytes())
