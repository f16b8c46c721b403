"""The model card (README.md) of a converted or trained model, or of an adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainingArguments

from ..activations.base import INITIALISATIONS
from ..checkpoints.activations import provenance_of
from ..checkpoints.adapter import ADAPTER_CONFIG, LABELS
from ..conversion import ConversionReport
from ..conversion.convert import tags_of
from ..errors import CheckpointError
from ..files import written
from .base_card import Base
from .card_adapter import adapter_parts
from .card_layers import formulas, layer_table, stored_table, table, weight_of
from .card_loading import BEGIN, adapter_loading, model_loading, task_of_class, with_loading
from .record import Record
from .results import METRICS, DataSource, Results, hardware

TEMPLATE = Path(__file__).with_name("card_template.md")
PICTURE = "activations.png"
PACKAGES = ("hf_ortho", "torch", "transformers", "datasets", "peft")
# What a card holds that Trainer or peft wrote and nobody has filled in.
TRAINER_CARD = "has been generated automatically according to the information the Trainer had access to"
BLANK = "[More Information Needed]"
HYPERPARAMETERS = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)
REACH = {
    True: "Beyond its domain an activation is a straight line of fixed slope, so it cannot adapt there.",
    False: "The activations have no tails: inputs that drive them beyond their domains give useless outputs.",
}


@dataclasses.dataclass
class Making:
    """How a model was made, beyond what its folder says.

    Attributes:
        arguments: of the training, None if there was none.
        hyperparameters: others beside those.
        base_model, base_revision: what was trained, where the config does not name it; adapters name it themselves.
        hardware: the machine that made it, if that is this one; the versions are those installed then.
        metadata: further fields of the YAML head.
        notes: what a reader must know of the conversion.
    """

    arguments: TrainingArguments | None = None
    hyperparameters: Mapping[str, object] = dataclasses.field(default_factory=dict)
    base_model: str | None = None
    base_revision: str | None = None
    hardware: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


def write_card(
    folder: str | Path,
    *,
    place: str | None = None,
    report: ConversionReport | None = None,
    results: Sequence[Results] = (),
    data: Sequence[DataSource] = (),
    command: str | None = None,
    arguments: TrainingArguments | None = None,
    hyperparameters: Mapping[str, object] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md for a model or an adapter that is saved in ``folder``; what was not measured is said to be so.

    The rest comes from ``config.json`` or ``adapter_config.json``, and from ``conversion.json``, to which ``report``,
    ``results``, ``data`` and ``command`` are added, so that the figures of each stage are kept. ``activations.png`` is
    shown if it is there.

    Args:
        place: what the examples load; ``folder`` by default, and a push puts the repository's name there.
        report: of ``hf_ortho.convert``, if the model has just been converted.
        results: figures that were measured.
        data: what it was calibrated or trained on.
        command: what made it.
        arguments, hyperparameters: of a training.
        base_model, base_revision: what was trained, if it was not converted by hf_ortho.
        metadata: further fields of the YAML head, which win; ``tags`` come on top.

    Raises:
        CheckpointError: the folder holds neither a model nor an adapter.
        OutputError: it cannot be written to.
    """
    folder = Path(folder)
    record = Record.load(folder) if report is None else Record(report)
    record.add(results, [command] if command else [], data)
    making = Making(arguments, hyperparameters or {}, base_model, base_revision, hardware(), metadata or {})
    text = card_text(_config(folder), record, place or str(folder), making, folder)
    record.save(folder)
    with written(folder / "README.md") as draft:
        draft.write_text(text, encoding="utf-8")


def card_of(folder: Path, *, repo_id: str, remote_code: bool) -> str:
    """The text of README.md for a folder that is pushed to ``repo_id``.

    The folder's own card with the repository in the examples, or a new one if it has none, or only the unfilled form
    that Trainer or peft writes. A card of someone else's is left as it is.

    Raises:
        CheckpointError: the folder holds neither a model nor an adapter.
    """
    path, config = folder / "README.md", _config(folder)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text or _is_form(text):
        return card_text(config, Record.load(folder), repo_id, Making(), folder, remote_code)
    if BEGIN not in text:
        return text
    old, new = folder.absolute().name, repo_id.rpartition("/")[2]
    for line in ("\n# {}\n", "\nmodel-index:\n- name: {}\n"):
        text = text.replace(line.format(old), line.format(new), 1)
    return with_loading(text, _loading(config, repo_id, remote_code))


def _is_form(text: str) -> bool:
    blanks = ModelCard.from_template(ModelCardData()).text.count(BLANK)
    return TRAINER_CARD in text or text.count(BLANK) >= blanks


def _config(folder: Path) -> dict[str, Any]:
    """The config of the adapter, with the classes of a head of its own as ``id2label``, or of the model in a folder."""
    files = [folder / name for name in (ADAPTER_CONFIG, LABELS, "config.json") if (folder / name).is_file()]
    found = {}
    for file in files:
        try:
            found[file.name] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is no JSON: {error}") from error
    if ADAPTER_CONFIG in found:
        return found[ADAPTER_CONFIG] | ({"id2label": found[LABELS]} if LABELS in found else {})
    if "config.json" in found:
        return found["config.json"]
    raise CheckpointError(
        f"{folder} holds neither config.json nor {ADAPTER_CONFIG}: save a model or an adapter there first"
    )


def _loading(config: dict, place: str, remote_code: bool) -> str:
    return adapter_loading(config, place) if "peft_type" in config else model_loading(config, place, remote_code)


def card_text(
    config: dict[str, Any],
    record: Record,
    place: str,
    making: Making,
    folder: Path | None = None,
    remote_code: bool = False,
) -> str:
    """The card of a model with this ``config.json`` (or adapter with this ``adapter_config.json``)."""
    parts = adapter_parts(config, folder) if "peft_type" in config else _model_parts(config, record, making)
    base: Base = parts["base"]
    title, task = Path(place).name, parts["task"]
    evaluations = [entry for results in record.results[-1:] for entry in results.evaluations(task)] if task else []
    extra = {**base.inherited(), **making.metadata}
    tags = extra.pop("tags", [])
    fields = {
        "library_name": parts["library"],
        "pipeline_tag": task,
        "tags": [*parts["tags"], *([tags] if isinstance(tags, str) else tags)],
        "datasets": list(dict.fromkeys(source.name for source in record.data if source.on_hub)) or None,
        "metrics": sorted({e.metric_type for e in evaluations} & set(METRICS.values())) or None,
        "model_name": title if evaluations else None,
        "eval_results": evaluations or None,
    }
    if base.on_hub:
        fields |= {"base_model": base.name, "base_model_relation": parts["relation"]}
    card_data = ModelCardData(**(fields | extra))
    unknown = ", commit not recorded" if card_data.base_model and not base.revision else ""
    made = [f"Base model: {base}{unknown}"] if base.name else []
    made += [f"Data: {source}" for source in record.data]
    made += [f"Hardware: {making.hardware}"] if making.hardware else []
    versions = {p: version(p) for p in PACKAGES} if making.hardware else parts["versions"]
    made += ["Versions: " + ", ".join(f"{p} {v}" for p, v in versions.items())] if versions else []
    limits = parts["limits"]
    if base.name:
        limits += "Limits of the base model apply" + ("." if extra.get("license") else ", and so does its licence.")
    picture = PICTURE if folder is not None and (folder / PICTURE).is_file() else None
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title,
        summary=parts["summary"],
        loading=_loading(config, place, remote_code),
        picture=picture,
        conversion=parts["conversion"],
        layers=parts["layers"],
        weight=parts["weight"],
        notes=[*making.notes, *parts["notes"]],
        quality=[{"table": table(["", *r.columns], r.rows), "caption": r.caption} for r in record.results],
        hyperparameters=_hyperparameters(making),
        commands=record.commands,
        made=made,
        limits=limits.strip() or "None known.",
    )
    return _tidy(str(card))


def _model_parts(config: dict[str, Any], record: Record, making: Making) -> dict[str, Any]:
    """What a card says of a whole model."""
    provenance, report = provenance_of(config), record.report
    activation, init = provenance.get("activation"), provenance.get("init")
    name = (config.get("architectures") or ["A model"])[0].removeprefix("FSDP")  # FSDP2 derives a class of its own
    base = Base(
        provenance.get("source_model") or making.base_model, provenance.get("source_revision") or making.base_revision
    )
    tuned = making.arguments is not None or any("fine-tuned" in stage for r in record.results for stage in r.measured)
    sources = ", ".join(sorted(set(provenance.get("source_activations", {}).values())))
    if init:
        base = Base(None, None)
        summary = f"{name} with learnable `{activation}` activations, trained from scratch; they started "
        paper = {"paper": "from the paper's initialisation.", "unit": "with E[f(x)^2] = 1 under N(0, 1)."}
        summary += paper.get(init, f"as weighted least-squares fits to {init}.")
    elif activation:
        summary = f"{name} with learnable `{activation}` activations, converted from {base} ({sources})"
        summary += " by weighted least-squares fits" + (", then fine-tuned." if tuned else ".")
    elif not base.name:
        summary = f"{name}, trained from scratch; its activations are not learnable."
    else:
        summary = f"{name}, fine-tuned from {base}; its activations are not learnable."
    layers = provenance.get("layers", [])
    notes = report.summary()[1:] if report else []
    if report and tuned:
        notes.insert(0, "The table is of the conversion; the training moved the activations since.")
    return {
        "base": base,
        "relation": "finetune",
        "library": "transformers",
        "task": task_of_class(name)[0],
        "tags": tags_of(activation),
        "summary": summary,
        "conversion": _conversion(activation, provenance),
        "layers": layer_table(report) if report else stored_table(layers) if layers else "",
        "weight": weight_of(report.calibrated if report else provenance.get("calibrated")) if layers else "",
        "notes": notes,
        "versions": provenance.get("versions"),
        "limits": (REACH[_tails(provenance)] + " ") if activation and init not in INITIALISATIONS else "",
    }


def _conversion(activation: str | None, provenance: dict) -> str:
    if not activation:
        return "Nothing."
    layers = provenance.get("layers", [])
    text = f"{len(layers)} activations, " if layers else "All activations, "
    text += f"{activation}:\n\n{formulas(activation)}"
    if provenance.get("init") in INITIALISATIONS:
        return text + "\n\non the whole real line."
    if _tails(provenance):
        return text + "\n\nwith straight tails outside the domain."
    return text + "\n\non the whole real line, fitted on the domain: far outside it the values explode."


def _tails(provenance: dict) -> bool:
    """Whether the activations go on straight outside a domain."""
    return provenance.get("tails", provenance.get("init") not in INITIALISATIONS)


def _hyperparameters(making: Making) -> dict[str, object]:
    arguments = making.arguments
    if arguments is None:
        return dict(making.hyperparameters)
    unused = "num_train_epochs" if arguments.max_steps > 0 else "max_steps"
    known = {key: _plain(getattr(arguments, key)) for key in HYPERPARAMETERS if key != unused}
    return {**known, "processes": arguments.world_size, **making.hyperparameters}


def _plain(value):
    return getattr(value, "value", value)


def _tidy(text: str) -> str:
    """At most one empty line in a row."""
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"
