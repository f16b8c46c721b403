"""The origin of a model's activations: the entry ``hf_ortho`` of its config, or the config of an adapter."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from .. import activations
from ..activations import FitReport
from ..activations.base import INITIALIZATIONS
from ..errors import CheckpointError
from ..text import interval, json_values

PACKAGES = ("hf_ortho", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class LayerProvenance:
    """The record of one activation, in addition to its parameters. Unknown values are None.

    Attributes:
        module: its path in the model.
        field: the config field that drives it.
        source: the name in ``ACT2FN`` of the original activation of the model.
        fitted_to: the name of the activation it was fitted to; differs from ``source`` after a second conversion.
        domain: the interval [lo, hi] of the fit, whose ends may be infinite.
        tail_slopes: the slopes outside the domain; only for an adapter, whose weights do not contain them.
        sup_error, rms_error, mass_outside: of the fit, as in ``FitReport``.
    """

    module: str
    field: str | None = None
    source: str | None = None
    fitted_to: str | None = None
    domain: tuple[float, float] | None = None
    tail_slopes: tuple[float, float] | None = None
    sup_error: float | None = None
    rms_error: float | None = None
    mass_outside: float | None = None

    @classmethod
    def of_fit(cls, module: str, field: str, fit: FitReport, *, tail_slopes: bool = False) -> LayerProvenance:
        """The record of a fit, with its tail slopes if requested."""
        slopes = fit.tail_slopes if tail_slopes else None
        errors = (fit.sup_error, fit.rms_error, fit.mass_outside)
        return cls(module, field, None, fit.source, fit.domain, slopes, *errors)

    @classmethod
    def from_dict(cls, plain: Any, where: str) -> LayerProvenance:
        """The inverse of ``to_dict``; ignores other keys.

        Raises:
            CheckpointError: a value has the wrong type; the message names ``where`` and the key.
        """
        if not isinstance(plain, dict):
            raise unexpected(where, plain, "a dictionary")
        values: dict[str, Any] = {
            key: optional_text(plain, key, where) for key in ("module", "field", "source", "fitted_to")
        }
        values |= {key: _number(plain.get(key), where, key) for key in ("sup_error", "rms_error", "mass_outside")}
        if values["module"] is None:
            raise CheckpointError(f"{where}: module is missing; expected the path of an activation")
        if (ends := plain.get("domain")) is not None:
            lo, hi = values["domain"] = interval(
                _pair(ends, where, "domain", "two finite numbers, or null for no bound")
            )
            if lo > hi:
                raise unexpected(f"{where}: domain", ends, "an interval [lo, hi] with lo <= hi")
        if (slopes := plain.get("tail_slopes")) is not None:
            values["tail_slopes"] = _pair(slopes, where, "tail_slopes", "two finite numbers")
            if None in slopes:
                raise unexpected(f"{where}: tail_slopes", slopes, "two finite numbers")
        return cls(**values)

    def to_dict(self) -> dict:
        """The known values as JSON values; an infinite end of the domain is None."""
        return json_values({key: value for key, value in vars(self).items() if value is not None})


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The origin of a model's learnable activations; empty if nothing is recorded.

    Attributes:
        activation: their names, for example ``hermite_8``, or ``hermite_8, hermite_9``.
        calibrated: whether the fits were weighted by data.
        init: the initialization of a training from scratch: ``paper``, ``unit``, or a name in ``ACT2FN``; None for a
            pretrained model.
        layers: one entry per converted activation.
        source_activations: the values of the driving fields in the config of the source model; may be empty.
        source_model, source_revision: the name of the source model, and its commit on the Hub.
        tails: whether the activations are straight lines outside their domains; None if not recorded.
        versions: of the packages that made the fits.
    """

    activation: str | None = None
    calibrated: bool = False
    init: str | None = None
    layers: tuple[LayerProvenance, ...] = ()
    source_activations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source_model: str | None = None
    source_revision: str | None = None
    tails: bool | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: Any, name: str = "") -> Provenance:
        """The provenance in a config, an object or a dictionary; errors name the model ``name``.

        Raises:
            CheckpointError: the entry ``hf_ortho`` is invalid.
        """
        plain = config.get("hf_ortho") if isinstance(config, Mapping) else getattr(config, "hf_ortho", None)
        name = name or getattr(config, "_name_or_path", "") or type(config).__name__
        return cls.from_dict({} if plain is None else plain, f"hf_ortho in the config of {name}")

    @classmethod
    def of_adapter(cls, config: Mapping[str, Any], where: str) -> Provenance:
        """The provenance in an ``adapter_config.json``; the activations of an adapter always have tails.

        Raises:
            CheckpointError: a value is invalid for an ``OrthoConfig``; the message names ``where`` and the key.
        """
        plain = {key: config.get(key) for key in ("activation", "calibrated", "layers", "source_activations")}
        provenance = cls.from_dict({**plain, "tails": True}, where)
        for i, layer in enumerate(provenance.layers):
            if layer.domain is None or layer.tail_slopes is None:
                missing = "domain" if layer.domain is None else "tail_slopes"
                raise CheckpointError(f"{where}: layers[{i}]: {missing} is missing")
        base, commit = (optional_text(config, key, where) for key in ("base_model_name_or_path", "base_commit"))
        return dataclasses.replace(provenance, source_model=base, source_revision=commit)

    @classmethod
    def of_conversion(
        cls,
        config: Any,
        activation: str,
        sources: Mapping[str, str],
        layers: Iterable[LayerProvenance],
        *,
        calibrated: bool,
        tails: bool,
    ) -> Provenance:
        """The provenance of a model whose ``layers`` were just converted; keeps the sources of earlier conversions.

        Args:
            config: the model's config, with the previous provenance.
            sources: the previous values of the driving fields, prefix included.
        """
        earlier = cls.of(config)
        sources = {**sources, **earlier.source_activations}
        new = {
            layer.module: dataclasses.replace(layer, source=sources[str(layer.field)].rpartition("-")[2])
            for layer in layers
        }
        model, commit = config._name_or_path or None, getattr(config, "_commit_hash", None)
        if earlier.source_activations:
            model, commit = earlier.source_model, earlier.source_revision
        return cls(
            activation,
            calibrated,
            None,
            (*new.values(), *(layer for layer in earlier.layers if layer.module not in new)),
            sources,
            model,
            commit,
            tails,
            {package: version(package) for package in PACKAGES},
        )

    @classmethod
    def from_dict(cls, plain: Any, where: str) -> Provenance:
        """The inverse of ``to_dict``; ignores other keys.

        Raises:
            CheckpointError: a value has the wrong type; the message names ``where`` and the key.
        """
        if not isinstance(plain, dict):
            raise unexpected(where, plain, "a dictionary")
        values: dict[str, Any] = {
            key: optional_text(plain, key, where) for key in ("activation", "init", "source_model", "source_revision")
        }
        for key in ("calibrated", "tails"):
            if (value := plain.get(key)) is not None:
                if not isinstance(value, bool):
                    raise unexpected(f"{where}: {key}", value, "true or false")
                values[key] = value
        for key in ("source_activations", "versions"):
            value = {} if plain.get(key) is None else plain[key]
            if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
                raise unexpected(f"{where}: {key}", value, "a dictionary of strings")
            values[key] = value
        layers = [] if plain.get("layers") is None else plain["layers"]
        if not isinstance(layers, list):
            raise unexpected(f"{where}: layers", layers, "a list")
        values["layers"] = tuple(
            LayerProvenance.from_dict(layer, f"{where}: layers[{i}]") for i, layer in enumerate(layers)
        )
        return cls(**values)

    def to_dict(self) -> dict:
        """The entry ``hf_ortho`` of a config as JSON values, sorted by key as transformers writes them."""
        plain: dict[str, Any] = {"activation": self.activation, "init": self.init, "versions": dict(self.versions)}
        plain = {key: value for key, value in plain.items() if value}
        if self.source_activations or self.layers:  # the model was converted
            plain |= {key: getattr(self, key) for key in ("calibrated", "source_model", "source_revision")}
            plain |= {"source_activations": dict(self.source_activations), "tails": self.has_tails}
            plain["layers"] = [layer.to_dict() for layer in self.layers]
        return dict(sorted(plain.items()))

    @property
    def has_tails(self) -> bool:
        """Whether the activations are straight lines outside their domains. Paper and unit initializations are not."""
        return self.init not in INITIALIZATIONS if self.tails is None else self.tails

    @property
    def tags(self) -> list[str]:
        """The tags of the model on the Hub."""
        return ["hf_ortho", "learnable-activations", *families_in(self.activation or "")]

    def layer(self, module: str) -> LayerProvenance:
        """The record of the activation at a path."""
        return self._by_module.get(module, LayerProvenance(module))

    @functools.cached_property
    def _by_module(self) -> dict[str, LayerProvenance]:
        return {layer.module: layer for layer in reversed(self.layers)}

    def pure_domain(self, module: str) -> tuple[float, float] | None:
        """The interval on which an activation without tails was fitted, otherwise None."""
        domain = self.layer(module).domain
        return None if self.has_tails or domain is None or not all(map(math.isfinite, domain)) else domain

    def source_names(self, modules: Iterable[str]) -> dict[str, str | None]:
        """The name in ``ACT2FN`` of each module's source: as recorded for the module, or common to all fields."""
        fields = {field: value.rpartition("-")[2] for field, value in self.source_activations.items()}
        common = next(iter(fields.values())) if len(set(fields.values())) == 1 else None
        layers = {module: self.layer(module) for module in modules}
        return {path: layer.source or fields.get(layer.field or "", common) for path, layer in layers.items()}


def families_in(activation: str) -> list[str]:
    """The distinct families in a string such as ``hermite_8, hermite_9``."""
    names = activation.split(", ") if activation else []
    return list(dict.fromkeys(activations.parse(name)[0].family for name in names))


def unexpected(where: str, value: Any, expected: str) -> CheckpointError:
    """The error for a value at a place."""
    return CheckpointError(f"{where} is {value!r:.80}; expected {expected}")


def optional_text(plain: Mapping[str, Any], key: str, where: str) -> str | None:
    """The text at a key, or None; raises CheckpointError for anything else."""
    value = plain.get(key)
    if value is not None and not isinstance(value, str):
        raise unexpected(f"{where}: {key}", value, "text")
    return value


def _number(value: Any, where: str, key: str, expected: str = "a finite number") -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise unexpected(f"{where}: {key}", value, expected)
    return value


def _pair(values: Any, where: str, key: str, expected: str) -> Sequence[float | None]:
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise unexpected(f"{where}: {key}", values, expected)
    return tuple(_number(value, where, key, expected) for value in values)
