"""What a folder remembers of how its model was made: ``conversion.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import cached_file

from ..conversion import ConversionReport
from ..conversion.report import FILE
from ..errors import CheckpointError
from ..files import written
from .results import DataSource, Results


@dataclasses.dataclass
class Record:
    """The conversion of a model, and what was done and measured since.

    Attributes:
        report: of the conversion, None without one.
        results: measured figures, the earliest first.
        commands: the commands that made the model.
        data: what it was calibrated and trained on.
    """

    report: ConversionReport | None = None
    results: list[Results] = dataclasses.field(default_factory=list)
    commands: list[str] = dataclasses.field(default_factory=list)
    data: list[DataSource] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read ``conversion.json`` of a folder, an empty record without one.

        Raises:
            CheckpointError: the file is not what ``hf-ortho`` writes.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                ConversionReport.from_dict(plain),
                [Results.from_dict(entry) for entry in plain.get("results", [])],
                list(plain.get("commands", [])),
                [DataSource(**entry) for entry in plain.get("data", [])],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not what hf-ortho writes ({error}); delete it or convert again"
            ) from error

    def add(
        self, results: Sequence[Results] = (), commands: Sequence[str] = (), data: Sequence[DataSource] = ()
    ) -> None:
        """Append what is new; figures of the same command on the same data are replaced."""
        again = {(new.command, new.data) for new in results}
        self.results = [old for old in self.results if (old.command, old.data) not in again] + list(results)
        self.commands += [new for new in commands if new not in self.commands]
        self.data += [new for new in data if new not in self.data]

    def save(self, folder: Path) -> None:
        """Write ``conversion.json``, if there was a conversion."""
        if self.report is None:
            return
        plain = self.report.to_dict()
        plain["results"] = [entry.to_dict() for entry in self.results]
        plain["commands"] = self.commands
        plain["data"] = [dataclasses.asdict(entry) for entry in self.data]
        with written(folder / FILE) as draft:
            draft.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def carry_over(place: str, revision: str | None, folder: Path) -> None:
    """Copy ``conversion.json`` from the model that a training started from, a folder or a Hub model, if it has one."""
    try:
        found = cached_file(place, FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:  # no network, and not in the cache
        return
    if found is not None:
        with written(folder / FILE) as draft:
            draft.write_bytes(Path(found).read_bytes())
