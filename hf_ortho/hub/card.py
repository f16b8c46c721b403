"""The model card (README.md) of a converted or fine-tuned model."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, TrainingArguments

from ..activations import FAMILIES, LearnableActivation, parse
from ..activations.base import INITIALISATIONS
from ..conversion import ConversionReport
from ..conversion.stored import provenance_of

TEMPLATE = Path(__file__).with_name("card_template.md")
MAX_LAYERS = 16
TASKS = {
    "causal-lm": ("text-generation", "AutoModelForCausalLM"),
    "image-classification": ("image-classification", "AutoModelForImageClassification"),
}
HYPERPARAMETERS = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "seed",
)
REACH = {
    True: "Beyond its domain an activation is a straight line of fixed slope, so it cannot adapt there.",
    False: "The activations have no tails: inputs that drive them beyond their domains give useless outputs.",
}


@dataclasses.dataclass(frozen=True)
class Results:
    """A table of measured figures; ``caption`` says on which data, by which command, on which hardware."""

    columns: list[str]
    rows: list[list[str]]
    caption: str


def hardware() -> str:
    """The machine that a figure was measured on."""
    import os

    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def write_card(
    folder: Path,
    model: PreTrainedModel,
    task: str,
    *,
    place: str,
    report: ConversionReport | None = None,
    results: Results | None = None,
    arguments: TrainingArguments | None = None,
    others: Mapping[str, object] | None = None,
    picture: str | None = None,
) -> None:
    """Write README.md into ``folder`` from what is known; what was not measured is said to be so.

    ``others`` are hyperparameters beside those of ``arguments``.
    """
    provenance = provenance_of(model.config)
    activation = provenance.get("activation")
    pipeline, auto_class = TASKS.get(task, (None, "AutoModel"))
    base = provenance.get("source_model")
    on_hub = base is not None and base.count("/") == 1 and base[0] not in "./~" and not Path(base).exists()
    card_data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["hf_ortho", "learnable-activations", *(_families(activation) if activation else [])],
    )
    sources = ", ".join(sorted(set(provenance.get("source_activations", {}).values())))
    revision = provenance.get("source_revision")
    origin = f"`{base}`" + (f" at commit `{revision}`" if revision else "") if base else "a model built in memory"
    name = type(model).__name__.removeprefix("FSDP")  # FSDP2 derives a class of its own
    if init := provenance.get("init"):
        summary = f"{name} with learnable `{activation}` activations, trained from scratch; they started "
        paper = {"paper": "from the paper's initialisation.", "unit": "with E[f(x)^2] = 1 under N(0, 1)."}
        summary += paper.get(init, f"as the Hermite interpolation of {init}.")
    elif activation:
        summary = f"{name} with learnable `{activation}` activations, converted from {origin} ({sources})"
        summary += " by Hermite interpolation" + (", then fine-tuned." if arguments else ".")
    elif not model.name_or_path:
        summary = f"{name}, trained from scratch; its activations are not learnable."
    else:
        summary = f"{name}, fine-tuned from `{model.name_or_path}`; its activations are not learnable."
    ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=Path(place).name,
        summary=summary,
        activation=activation,
        auto_class=auto_class,
        place=place,
        picture=picture,
        conversion=_conversion(model, activation, provenance, report),
        layers=_layers(report),
        weight="the calibration data" if report and report.calibrated else "the density of N(-0.5, 1.5^2)",
        reach="" if provenance.get("init") in INITIALISATIONS else REACH[_tails(provenance)],
        notes=[*report.notes, *report.warnings] if report else [],
        results=results,
        hyperparameters=_hyperparameters(arguments, others or {}),
        versions=", ".join(f"{p} {version(p)}" for p in ("hf_ortho", "torch", "transformers", "datasets")),
    ).save(folder / "README.md")


def card_of(folder: Path, *, repo_id: str, remote_code: bool = False) -> str:
    """The card of a saved model or adapter as it reads at its place on the Hub."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {repo_id}\n\n`{folder}`\n"
    return text.replace(f'"{folder}"', f'"{repo_id}"')


def _conversion(
    model: PreTrainedModel, activation: str | None, provenance: dict, report: ConversionReport | None
) -> str:
    if not activation:
        return "Not converted."
    formulas = [(FAMILIES[name].__doc__ or "").split("\n\n")[1].strip() for name in _families(activation)]
    count = sum(isinstance(module, LearnableActivation) for module in model.modules())
    text = f"{count} activations, {activation}:\n\n    " + "\n\n    ".join(formulas)
    if provenance.get("init") in INITIALISATIONS:
        text += "\n\non the whole real line."
    elif _tails(provenance):
        text += "\n\nwith straight tails outside the domain."
    else:
        text += "\n\non the whole real line, fitted on the domain: far outside it the values explode."
    if report and len(report.layers) > MAX_LAYERS:
        text += f" The table shows {MAX_LAYERS} of {len(report.layers)}; `config.json` holds all under `hf_ortho`."
    return text


def _tails(provenance: dict) -> bool:
    """Whether the activations go on straight outside a domain."""
    return provenance.get("tails", provenance.get("init") not in INITIALISATIONS)


def _families(activation: str) -> list[str]:
    """The families in a text such as ``hermite_8, hermite_9``, each once."""
    return list(dict.fromkeys(parse(name)[0].family for name in activation.split(", ")))


def _layers(report: ConversionReport | None) -> list[list[str]]:
    if report is None:
        return []
    layers = report.layers
    if len(layers) > MAX_LAYERS:
        step = (len(layers) - 1) / (MAX_LAYERS - 1)
        layers = [layers[round(i * step)] for i in range(MAX_LAYERS)]
    return [[f"`{layer.module}`", *layer.cells()] for layer in layers]


def _hyperparameters(arguments: TrainingArguments | None, others: Mapping[str, object]) -> dict[str, object]:
    if arguments is None:
        return {}
    unused = "num_train_epochs" if arguments.max_steps > 0 else "max_steps"
    known = {key: _plain(getattr(arguments, key)) for key in HYPERPARAMETERS if key != unused}
    return {**known, "processes": arguments.world_size, **others}


def _plain(value):
    return getattr(value, "value", value)
