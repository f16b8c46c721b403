"""The card contents of a full model, from its config and its record."""

from __future__ import annotations

from typing import Any

from ...activations.base import INITIALIZATIONS
from ...checkpoints.provenance import Provenance
from ...conversion.report_text import fidelity_data, fidelity_rows, remarks
from ...tasks import head_of
from ..record import Record
from .base import Base
from .loading import architecture
from .parts import CardParts, TrainingDetails
from .tables import formulas, layer_table, legend, stored_table


def model_parts(config: dict[str, Any], place: str, record: Record, training: TrainingDetails) -> CardParts:
    """The card contents of the model with this ``config.json``; ``place`` is used in errors."""
    provenance, report = Provenance.of(config, place), record.report
    activation, init, layers = provenance.activation, provenance.init, provenance.layers
    name = (architecture(config, place) or "A model").removeprefix("FSDP")  # FSDP2 derives a class
    base = Base(provenance.source_model or training.base_model, provenance.source_revision or training.base_revision)
    tuned = training.arguments is not None or any(results.of_training for results in record.results)
    table = layer_table(report) if report else stored_table(layers) if layers else None
    return CardParts(
        kind="scratch" if init else "converted" if activation else "plain",
        name=name,
        base=Base(None, None) if init else base,
        task=head_of(name).pipeline_tag,
        tags=provenance.tags,
        activation=activation,
        count=len(layers),
        sources=sorted(set(provenance.source_activations.values())),
        init=init,
        tails=None if init in INITIALIZATIONS or not activation else provenance.has_tails,
        formulas=formulas(activation or ""),
        tables=[table] if table else [],
        legend=legend(report.weights is not None if report else provenance.calibrated, report) if layers else "",
        tuned=tuned,
        fidelity=fidelity_rows(report) if report else (),
        compared_on=fidelity_data(report) if report else "",
        outdated=tuned and report is not None,
        remarks=remarks(report) if report else (),
        versions=provenance.versions,
    )
