"""Summarize the activations of a checkpoint: gain, and distance from the source activation."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..activations import FitReport, LearnableActivation
from ..activations.base import SHARED
from ..checkpoints.activations import StoredActivations
from ..errors import FitError

OVER_GROUPS = "with groups of channels, domain: the smallest that contains all; E and rms: means; sup: the largest"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One activation, its gain under N(0, 1), and its distance from its source (None if unknown)."""

    path: str
    module: LearnableActivation
    gain: tuple[float, float]
    source: str | None
    fit: FitReport | None

    def parameters(self) -> dict[str, Tensor]:
        """The parameters of the series; with groups of channels, one row per group."""
        return {name: value.detach() for name, value in self.module.named_parameters() if name not in SHARED}

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
            "groups": self.module.groups,
            "domain": self.module.domain.tolist(),
            "tail_slopes": self.module.tail_slopes.tolist(),
            "gain": dict(zip(("value", "derivative"), self.gain, strict=True)),
            "source": self.source,
            "distance": measured,
            "parameters": {name: value.tolist() for name, value in self.parameters().items()},
        }

    def cells(self) -> list[str]:
        """One row of text: name, domain, tail slopes, gain, sup and rms; see ``OVER_GROUPS``."""
        fit, ends = self.fit, self.module.domain.detach().reshape(-1, 2)
        domain = (ends[:, 0].min().item(), ends[:, 1].max().item()) if fit is None else fit.domain
        return [
            self.module.name,
            "{:.2f}..{:.2f}".format(*domain),
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
