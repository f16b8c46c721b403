"""The loading instructions of a card for a folder with an ONNX graph: code that needs onnxruntime, not hf_ortho."""

from __future__ import annotations

import json
from pathlib import Path

from ...checkpoints.listing import MODULES
from ...checkpoints.place import GRAPH, GRAPH_DATA
from ...checkpoints.processors import IMAGE_FILES, TOKENIZER_FILES
from ...errors import CheckpointError
from ...files import json_object
from ...tasks import head_of
from ...tasks.causal_lm import CAUSAL_LM
from ...tasks.text_classification import TEXT_CLASSIFICATION
from ...text import Markdown, code, code_block
from .loading import architecture, marked, named_classes

TEXT = "Once upon a time"
RUN = "outputs = session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})"
# Both continue a text of shape (1, length) by the most likely token. ``inputs`` has more than the graph takes.
WITH_CACHE = """\
names = [each.name for each in session.get_inputs()]
past = {{}}
for each in session.get_inputs():
    if "past" in each.name:
        past[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
{text}
new = text
for _ in range(32):
    length = text.shape[1]
    inputs = {{"input_ids": new, "attention_mask": np.ones_like(text)}}
    inputs["position_ids"] = np.arange(length - new.shape[1], length)[None]
    logits, *present = session.run(None, {{name: value for name, value in (inputs | past).items() if name in names}})
    past = dict(zip(past, present))
    new = logits[:, -1:].argmax(-1)
    text = np.concatenate([text, new], axis=1)
{show}"""
WITHOUT_CACHE = """\
names = [each.name for each in session.get_inputs()]
{text}
for _ in range(32):
    inputs = {{"input_ids": text, "attention_mask": np.ones_like(text)}}
    inputs["position_ids"] = np.arange(text.shape[1])[None]
    (logits,) = session.run(None, {{name: value for name, value in inputs.items() if name in names}})
    text = np.concatenate([text, logits[:, -1:].argmax(-1)], axis=1)
{show}"""
MEAN = """\
mask = inputs["attention_mask"][..., None]
embeddings = (outputs[0] * mask).sum(1) / mask.sum(1)"""
NORM = "embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)"


def graph_loading(config: dict, place: str, folder: Path, on_hub: bool) -> Markdown:
    """Instructions for running the ONNX graph in ``folder``, which is or becomes ``place``."""
    head = head_of(architecture(config, place) or "")
    texts = any((folder / file).is_file() for file in TOKENIZER_FILES)
    images = not texts and any((folder / file).is_file() for file in IMAGE_FILES)
    imports = ["import numpy as np", "import onnxruntime"]
    imports += ["from huggingface_hub import snapshot_download"] if on_hub else []
    imports += ["from transformers import AutoTokenizer"] if texts else []
    imports += ["from transformers import AutoImageProcessor"] if images else []
    packages = dict.fromkeys(line.split()[1] for line in imports[2:])
    lines = [f"# pip install {' '.join(['onnxruntime', *packages])}", *imports, ""]
    lines += [f"folder = {f'snapshot_download({json.dumps(place)})' if on_hub else json.dumps(place)}"]
    lines += [f'session = onnxruntime.InferenceSession(f"{{folder}}/{GRAPH}")']
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"] if texts else []
    if head is CAUSAL_LM:
        text = f'text = tokenizer("{TEXT}", return_tensors="np")["input_ids"]' if texts else "text = np.array([[1, 2]])"
        show = "print(tokenizer.decode(text[0]))" if texts else "print(text)"
        lines += [(WITH_CACHE if config.get("use_cache") else WITHOUT_CACHE).format(text=text, show=show)]
    elif images:
        lines += ["processor = AutoImageProcessor.from_pretrained(folder)"]
        lines += ["image = np.zeros((224, 224, 3), np.uint8)  # or PIL.Image.open(file)"]
        lines += ['inputs = processor(image, return_tensors="np")', RUN, "print(outputs[0])"]
    elif texts:
        masked, several = 'f"Once upon a {tokenizer.mask_token}."', '["One text.", "Another one, longer."]'
        text = masked if head.masks_tokens else several if _pads(folder) else '"One text."'
        padding = ", padding=True" if text == several else ""
        lines += [f'inputs = tokenizer({text}{padding}, return_tensors="np")', RUN]
        lines += _result(head.masks_tokens, folder)
    else:
        lines += ["for each in session.get_inputs():", "    print(each.name, each.shape, each.type)"]
    data = f" and {code(GRAPH_DATA)}" if (folder / GRAPH_DATA).is_file() else ""
    note = f"The model is an ONNX graph in float32, {code(GRAPH)}{data}. It contains the formulas of its activations:"
    note += " it needs neither hf_ortho nor PyTorch. Names of inputs and outputs are those of Optimum."
    parts = [note, code_block("\n".join(lines), "python")]
    parts += [named_classes(config.get("id2label"))] if head is TEXT_CLASSIFICATION else []
    return marked("\n\n".join(filter(None, parts)))


def _pads(folder: Path) -> bool:
    """Whether the tokenizer can make a batch of texts of several lengths."""
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(json_object(file).get("pad_token"))


def _result(masks_tokens: bool, folder: Path) -> list[str]:
    if masks_tokens:
        found = 'outputs[0][inputs["input_ids"] == tokenizer.mask_token_id].argmax(-1)'
        return [f"print(tokenizer.decode({found}))"]
    if kinds := _modules(folder):
        lines = [MEAN, *([NORM] if "Normalize" in kinds else [])]
        return [*lines, "print(embeddings @ embeddings.T)"]
    return ["print(outputs[0])"]


def _modules(folder: Path) -> list[str]:
    """The classes of the modules of sentence-transformers if they pool by the mean; empty otherwise."""
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        pooling = json_object(folder / modules[kinds.index("Pooling")]["path"] / "config.json")
    except (CheckpointError, OSError, ValueError, LookupError, TypeError):
        return []
    mean = pooling.get("pooling_mode_mean_tokens") or pooling.get("pooling_mode") == "mean"
    return kinds if mean and not set(kinds) - {"Transformer", "Pooling", "Normalize"} else []
