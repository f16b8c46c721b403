"""The loading instructions of a card, between two markers so that a push can rewrite them."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from ...checkpoints.adapter import base_revision, problem_type
from ...checkpoints.custom_code import references
from ...checkpoints.listing import MODULES
from ...checkpoints.model_class import class_names
from ...checkpoints.provenance import Provenance
from ...errors import CheckpointError
from ...files import json_object
from ...tasks import head_of
from ...text import Markdown, code, code_block, markdown

BEGIN = "<!-- how to load: written by hf_ortho, `hf-ortho push` puts the repository's name here -->"
END = "<!-- end of how to load -->"


MOST_CLASSES = 50  # that are listed
SENTENCE_CONFIG = "config_sentence_transformers.json"
SENTENCE_MODELS = {"SentenceTransformer": "sentence-similarity", "SparseEncoder": "feature-extraction"}
SENTENCE_MODELS |= {"CrossEncoder": "text-ranking"}  # their tasks on the Hub


def sentence_model(folder: Path | None) -> str | None:
    """The class of sentence_transformers that loads the folder; None for a model of transformers only."""
    if folder is None or not (folder / MODULES).is_file():
        return None
    kind = None
    with contextlib.suppress(CheckpointError):
        kind = json_object(folder / SENTENCE_CONFIG).get("model_type")
    return kind if isinstance(kind, str) and kind in SENTENCE_MODELS else "SentenceTransformer"


def architecture(config: dict, place: str) -> str | None:
    """The model class in a ``config.json``; raises as ``class_names``."""
    return next(iter(class_names(config.get("architectures"), place)), None)


def import_line(activation: str) -> str:
    """The line of code that a model with this activation needs before it is loaded."""
    return f"import hf_ortho  # pip install hf-ortho: registers {activation} in transformers\n"


def model_loading(config: dict, place: str, remote_code: bool, sentence: str | None = None) -> Markdown:
    """Instructions for loading a model with and without hf_ortho; ``sentence``: see ``sentence_model``."""
    auto = head_of(architecture(config, place) or "").auto_class
    activation = Provenance.of(config, place).activation
    imports = import_line(activation) if activation else ""
    load = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({json.dumps(place)}"
    if sentence:
        load = f"from sentence_transformers import {sentence}\n\nmodel = {sentence}({json.dumps(place)}"
    own_code = references(config.get("auto_map"))
    load += ", trust_remote_code=True" if own_code else ""
    parts: list[str] = [code_block(f"{imports}{load})", "python")]
    if remote_code:
        parts += [
            "Without hf_ortho, using the code in this repository:",
            code_block(f"{load}, trust_remote_code=True)", "python"),
        ]
    elif activation:
        parts.append(
            f"This model requires hf_ortho: without the import, transformers does not know {code(activation)} and "
            "fails to load."
        )
    if auto == "AutoModelForSequenceClassification" and (names := named_classes(config.get("id2label"))):
        parts.append(names)
    return marked("\n\n".join(parts))


def adapter_loading(config: dict, place: str, tokenizer: bool = False) -> Markdown:
    """Instructions for loading a PEFT adapter.

    Args:
        config: ``adapter_config.json``, with the classes of a new head as ``id2label``.
        tokenizer: whether there is a tokenizer beside it.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    base, task = config.get("base_model_name_or_path") or "BASE_MODEL", config.get("task_type")
    module = "hf_ortho.peft" if config.get("activation") else "hf_ortho"
    why = "registers the adapter type in peft" if config.get("activation") else "registers the activations"
    imports = f"import {module}  # pip install hf-ortho: {why}\n"
    parts = []
    if task in MODEL_TYPE_TO_PEFT_MODEL_MAPPING and not config.get("id2label"):
        auto = f"Auto{MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__}"
        load = f"{imports}from peft import {auto}\n\nmodel = {auto}.from_pretrained({json.dumps(place)})"
        parts.append(code_block(load, "python"))
    revision = base_revision(config)
    at = f", revision={json.dumps(revision)}" if revision else ""
    recorded = (config.get("auto_mapping") or {}).get("base_model_class") or ""  # by peft, without a task_type
    cls = head_of(task).auto_class if task else recorded if recorded.isidentifier() else "AutoModel"
    classes, before, labels = cls, "", config.get("id2label")
    named, texts = named_classes(labels), head_of(task or recorded).auto_class == "AutoModelForSequenceClassification"
    if labels:  # the adapter has a separate head
        before = f"classes = {labels}\n" if named else ""
        at += ", id2label=classes" if named else f", num_labels={len(labels)}"
        at += f", problem_type={json.dumps(problem_type(len(labels)))}" if texts else ""
        at += ", ignore_mismatched_sizes=True"
    if tokenizer and texts:  # a decoder may have no pad token, other than the tokenizer
        classes += ", AutoTokenizer"
        before += f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(place)})\n"
        at += ", pad_token_id=tokenizer.pad_token_id"
    lines = (
        f"{imports}from peft import PeftModel\nfrom transformers import {classes}\n\n"
        f"{before}base = {cls}.from_pretrained({json.dumps(base)}{at})\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(place)})"
    )
    names = f"{named} They are in `labels.json`." if named else ""
    return marked("\n\n".join(part for part in (*parts, code_block(lines, "python"), names) if part))


def named_classes(labels: Any) -> Markdown:
    """A sentence with the names of classes by their index; empty for those that transformers gives, or for many."""
    names = [str(name) for name in labels.values()] if isinstance(labels, dict) else []
    if not 1 < len(names) <= MOST_CLASSES or any(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return Markdown()
    return Markdown(f"The classes are {markdown(', '.join(names))}.")


def with_loading(text: str, loading: str) -> str:
    """Replace the loading instructions of a card. A card without them is unchanged."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: loading, text, count=1, flags=re.DOTALL)


def marked(text: str) -> Markdown:
    """``text`` between the markers."""
    return Markdown(f"{BEGIN}\n\n{text}\n\n{END}")
