"""Summarize the activations of a checkpoint: gain, and distance from the source activation."""

from __future__ import annotations

import dataclasses

from ..activations import FitReport, LearnableActivation
from ..activations.base import SHARED
from ..checkpoints.activations import StoredActivations
from ..errors import FitError


@dataclasses.dataclass(frozen=True)
class Layer:
    """One activation, its gain under N(0, 1), and its distance from its source (None if unknown)."""

    path: str
    module: LearnableActivation
    gain: tuple[float, float]
    source: str | None
    fit: FitReport | None

    def vectors(self) -> dict[str, list[float]]:
        """The parameters of the series."""
        return {name: value.tolist() for name, value in self.module.named_parameters() if name not in SHARED}

    def to_dict(self) -> dict:
        """As JSON values."""
        measured = None
        if self.fit is not None:
            keys = ("sup_error", "rms_error", "sup_derivative_error", "rms_derivative_error")
            measured = {key: getattr(self.fit, key) for key in keys}
        return {
            "module": self.path,
            "activation": self.module.name,
            "family": self.module.family,
            "degree": self.module.degree,
            "domain": self.module.domain.tolist(),
            "tail_slopes": self.module.tail_slopes.tolist(),
            "gain": dict(zip(("value", "derivative"), self.gain, strict=True)),
            "source": self.source,
            "distance": measured,
            "parameters": self.vectors(),
        }

    def cells(self) -> list[str]:
        fit = self.fit
        return [
            self.module.name,
            "{:.2f}..{:.2f}".format(*(self.module.domain.tolist() if fit is None else fit.domain)),
            "{:.3g}, {:.3g}".format(*self.module.tail_slopes.tolist()),
            *(f"{moment:.4g}" for moment in self.gain),
            *(("-", "-") if fit is None else (f"{fit.sup_error:.1e}", f"{fit.rms_error:.1e}")),
        ]


def examine(stored: StoredActivations) -> tuple[list[Layer], list[str]]:
    """One entry per activation, and the reasons for missing distances to known sources."""
    layers: list[Layer] = []
    notes: list[str] = []
    for path, source in stored.provenance.source_names(stored.modules).items():
        fit = None
        module = stored.modules[path]
        try:
            fit = None if source is None else module.measure(source, domain=stored.provenance.pure_domain(path))
        except FitError as error:
            notes.append(str(error))
        layers.append(Layer(path, module, module.gain(), source, fit))
    return layers, list(dict.fromkeys(notes))
