"""The model card (README.md) of a converted or trained model, or of an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment

from ...checkpoints.adapter import ADAPTER_CONFIG, LABELS, labels_in
from ...checkpoints.place import has_graph
from ...checkpoints.processors import TOKENIZER_FILES
from ...conversion import ConversionReport
from ...errors import CheckpointError
from ...files import json_object, read_text, written
from ...tasks import METRICS, TASKS, UNTRAINED
from ...text import Markdown, code, code_block, markdown, markdown_table
from ..record import Graph, Record
from ..results import DataSource, Results, hardware
from .adapter import adapter_parts
from .base import LICENSE
from .graph import graph_loading
from .loading import BEGIN, SENTENCE_MODELS, adapter_loading, model_loading, sentence_model, with_loading
from .model import model_parts
from .parts import CardParts, TrainingDetails
from .sentence import with_name

PICTURE = "activations.png"
PACKAGES = ("hf_ortho", "torch", "transformers", "datasets", "peft")
# Markers of an unedited card written by Trainer or peft.
TRAINER_CARD = "has been generated automatically according to the information the Trainer had access to"
BLANK = "[More Information Needed]"
NO_TRAINING = TrainingDetails()
TAGS = {*SENTENCE_MODELS.values(), *(head.pipeline_tag for head in (*TASKS, *UNTRAINED))}  # tags that name a task

# Values come from the files of others: what is not Markdown is escaped.
ENVIRONMENT = Environment(finalize=markdown)
ENVIRONMENT.filters |= {"code": code, "code_block": code_block}
TEMPLATE = ENVIRONMENT.from_string(Path(__file__).with_name("template.md").read_text(encoding="utf-8"))


def write_card(
    folder: str | Path,
    *,
    place: str | None = None,
    report: ConversionReport | None = None,
    results: Sequence[Results] = (),
    data: Sequence[DataSource] = (),
    command: str | None = None,
    training: TrainingDetails | None = None,
    metadata: Mapping[str, Any] | None = None,
    graph: Graph | None = None,
) -> None:
    """Write README.md for a model or an adapter saved in ``folder``. Values that were not measured are marked as such.

    The card also uses ``config.json`` or ``adapter_config.json``, and ``conversion.json``. ``report``, ``results``,
    ``data`` and ``command`` are added to ``conversion.json`` to keep the results of all stages. ``activations.png`` is
    shown if it exists.

    Args:
        place: name to load in the examples; default: ``folder``. A push replaces it with the repository name.
        report: report of ``hf_ortho.convert`` if the model has just been converted.
        results: measured results.
        data: calibration or training data.
        command: the command that made the model.
        training: details of the training, if any.
        metadata: extra YAML fields. They override ours, except ``tags``, which are appended.
        graph: the ONNX graph in the folder, if it has one instead of weights.

    Raises:
        CheckpointError: the folder contains neither a model nor an adapter.
        OutputError: the folder cannot be written to.

    Example:
        >>> from pathlib import Path
        >>> report = hf_ortho.convert(model, "hermite_3")
        >>> model.save_pretrained("converted")
        >>> hf_ortho.hub.write_card("converted", report=report, command="python mine.py")
        >>> "learnable `hermite_3` activations" in Path("converted", "README.md").read_text()
        True
    """
    folder = Path(folder)
    record = Record.load(folder) if report is None else Record(report)
    record.add(results, [command] if command else [], data)
    record.graph = graph
    text = card_text(
        _config(folder),
        record,
        place or str(folder),
        folder,
        training=training or NO_TRAINING,
        machine=hardware(),
        metadata=metadata or {},
    )
    record.save(folder)
    with written(folder / "README.md") as draft:
        draft.write_text(text, encoding="utf-8")


def card_of(folder: Path, *, repo_id: str, remote_code: bool) -> str:
    """The text of README.md for pushing a folder to ``repo_id``.

    This is the card in the folder with the repository name in its examples, or a new card if there is none or only the
    unedited template of Trainer or peft. Foreign cards are not changed, but for the name in a card of
    sentence-transformers.

    Raises:
        CheckpointError: the folder contains neither a model nor an adapter.

    Example:
        >>> from pathlib import Path
        >>> _ = hf_ortho.convert(model, "hermite_3")
        >>> model.save_pretrained("converted")
        >>> card = hf_ortho.hub.card_of(Path("converted"), repo_id="me/gpt2-hermite", remote_code=False)
        >>> 'from_pretrained("me/gpt2-hermite")' in card
        True
    """
    path, config = folder / "README.md", _config(folder)
    text = read_text(path) if path.is_file() else ""
    if not text or _is_form(text):
        return card_text(config, Record.load(folder), repo_id, folder, remote_code=remote_code, on_hub=True)
    if BEGIN not in text:
        return with_name(text, repo_id)
    old, new = folder.absolute().name, repo_id.rpartition("/")[2]
    text = text.replace(f"\n# {markdown(old)}\n", f"\n# {markdown(new)}\n", 1)
    text = text.replace(f"\nmodel-index:\n- name: {old}\n", f"\nmodel-index:\n- name: {new}\n", 1)
    return with_loading(text, _loading(config, repo_id, remote_code, folder, on_hub=True))


def _is_form(text: str) -> bool:
    blanks = ModelCard.from_template(ModelCardData()).text.count(BLANK)
    return TRAINER_CARD in text or text.count(BLANK) >= blanks


def _config(folder: Path) -> dict[str, Any]:
    """The config of the model or adapter in a folder. The classes of a separate adapter head become ``id2label``."""
    names = [name for name in (ADAPTER_CONFIG, LABELS, "config.json") if (folder / name).is_file()]
    configs = {name: json_object(folder / name) for name in names}
    if ADAPTER_CONFIG in configs:
        return configs[ADAPTER_CONFIG] | {"id2label": labels_in(folder / LABELS) if LABELS in configs else None}
    if "config.json" in configs:
        return configs["config.json"]
    raise CheckpointError(
        f"{folder} contains neither config.json nor {ADAPTER_CONFIG}; save a model or an adapter there first"
    )


def _loading(config: dict, place: str, remote_code: bool, folder: Path | None, on_hub: bool = False) -> str:
    if "peft_type" in config:
        tokenizer = folder is not None and any((folder / file).is_file() for file in TOKENIZER_FILES)
        return adapter_loading(config, place, tokenizer)
    if folder is not None and has_graph(folder):
        return graph_loading(config, place, folder, on_hub)
    return model_loading(config, place, remote_code, sentence_model(folder))


def _inherited(base: dict[str, Any], parts: CardParts, sentence: str | None) -> dict[str, Any]:
    """The metadata that the card of a base model gives to that of a model: an adapter only gets license and language.

    A trained model may have another task than its base.
    """
    if parts.kind == "adapter":
        return {key: base[key] for key in LICENSE if key in base} | {"library_name": "peft", "pipeline_tag": parts.task}
    trained = parts.tuned or parts.kind == "plain"
    known = (parts.task, base.get("pipeline_tag")) if trained else (base.get("pipeline_tag"), parts.task)
    task = known[0] or known[1] or SENTENCE_MODELS.get(sentence or "")
    library = "sentence-transformers" if sentence else base.get("library_name", "transformers")
    if trained and not sentence and parts.task not in (None, base.get("pipeline_tag", parts.task)):  # another task
        library = "transformers"
        base = base | {
            "tags": [tag for tag in _listed(base.get("tags")) if tag not in {*TAGS, base.get("library_name")}]
        }
    return base | {"library_name": library, "pipeline_tag": task}


def _listed(*values: str | Sequence[str] | None) -> list[str]:
    """The distinct texts of several values of a list in the metadata."""
    texts = (text for value in values for text in ([value] if isinstance(value, str) else value or ()))
    return list(dict.fromkeys(texts))


def card_text(
    config: dict[str, Any],
    record: Record,
    place: str,
    folder: Path | None = None,
    *,
    training: TrainingDetails = NO_TRAINING,
    machine: str | None = None,
    metadata: Mapping[str, Any] = MappingProxyType({}),
    notes: Sequence[str] = (),
    remote_code: bool = False,
    on_hub: bool = False,
) -> str:
    """The card of a model with this ``config.json``, or of an adapter with this ``adapter_config.json``.

    Args:
        record: record of how the model was made.
        place: name to load in the examples.
        folder: folder with the weights and the figure; None to ignore them.
        training: details of the training, if any.
        machine: this machine, if it made the model; the card then lists the versions installed here.
        metadata: extra YAML fields. They override ours, except ``tags``, which are appended.
        notes: notes about the conversion.
        remote_code: whether the model can also be loaded with remote code.
        on_hub: whether ``place`` is a repository.
    """
    adapter = "peft_type" in config
    parts = adapter_parts(config, folder) if adapter else model_parts(config, place, record, training)
    title, task, base = Path(place).name, parts.task, parts.base
    evaluations = [entry for results in record.results[-1:] for entry in results.evaluations(task)] if task else []
    inherited = _inherited(base.inherited(), parts, sentence_model(folder))
    datasets = [source.name for source in record.data if source.on_hub]
    fields = inherited | {
        "tags": _listed(parts.tags, inherited.get("tags"), metadata.get("tags")),
        "datasets": _listed(datasets, inherited.get("datasets")) or None,
        "metrics": sorted({e.metric_type for e in evaluations} & {m.evaluate_name for m in METRICS.values()}) or None,
        "model_name": title if evaluations else None,
        "eval_results": evaluations or None,
    }
    if base.on_hub:
        fields |= {"base_model": base.name, "base_model_relation": "adapter" if adapter else "finetune"}
    if folder is not None and has_graph(folder):
        fields |= {"library_name": "transformers.js", "tags": _listed(["onnx"], fields["tags"])}
    fields |= {key: value for key, value in metadata.items() if key != "tags"}
    head = ModelCardData(**fields)
    text = TEMPLATE.render(
        head.to_dict(),  # its fields, such as license, are also available in the template
        card_data=Markdown(head.to_yaml()),
        title=title,
        parts=parts,
        loading=_loading(config, place, remote_code, folder, on_hub),
        picture=PICTURE if folder is not None and (folder / PICTURE).is_file() else None,
        notes=notes,
        results=record.results,
        graph=record.graph,
        markdown_table=markdown_table,
        hyperparameters=training.hyperparameters,
        commands=record.commands,
        data=record.data,
        machine=machine,
        versions={package: version(package) for package in PACKAGES} if machine else parts.versions,
    )
    return _tidy(str(ModelCard(text)))


def _tidy(text: str) -> str:
    """Collapse consecutive empty lines."""
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"
