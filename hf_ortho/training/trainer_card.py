"""The model card of a model trained with ``ActivationTrainer``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub import DataSource, Results, TrainingDetails, hardware, write_card
from .metrics import metrics_at_start, metrics_logged

if TYPE_CHECKING:
    from .trainer import ActivationTrainer


def write_trainer_card(
    trainer: ActivationTrainer,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    **others: object,
) -> None:
    """Write README.md to ``output_dir`` with the logged metrics. ``others`` are ignored."""
    arguments, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    before, after = metrics_at_start(trainer), metrics_logged(trainer)
    results = []
    if after:
        named = [dataset] if isinstance(dataset, str) else dataset or [_name(trainer.eval_dataset)]
        stages = ({"before training": before} if before else {}) | {"after training": after}
        source = DataSource.of(trainer.eval_dataset, ", ".join(named))
        results.append(Results(stages, source, "Trainer.evaluate", hardware(), arguments.seed, kind="training"))
    metadata: dict[str, Any] = {"language": language, "license": license, "tags": tags}
    write_card(
        Path(str(arguments.output_dir)),
        place=arguments.hub_model_id or str(arguments.output_dir),
        results=results,
        training=TrainingDetails(arguments, base_model=getattr(model, "name_or_path", None) or None),
        metadata={key: value for key, value in metadata.items() if value},
    )


def _name(dataset: Any) -> str:
    return getattr(getattr(dataset, "info", None), "dataset_name", None) or "the evaluation data"
