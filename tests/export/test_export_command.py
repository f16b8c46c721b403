"""``hf-ortho export``: what it writes, what a push takes of it, and what it refuses."""

import copy
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_ortho.export.check
import hf_ortho.export.graph
from hf_ortho.errors import CheckpointError, ConfigError
from hf_ortho.hub.contents import contents_of
from hf_ortho.hub.push import push
from hf_ortho.hub.record import Record


@pytest.mark.slow
def test_what_is_written(exported, saved):
    folder, out = exported("gpt2")
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {
        ".hf_ortho.json",
        "README.md",
        "config.json",
        "generation_config.json",
        "onnx/model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    lines = out.splitlines()
    assert lines[:2] == [f"Loading {saved('gpt2')}", "Exporting GPT2LMHeadModel with a cache, which may take minutes"]
    assert lines[-2].startswith(f"Wrote {folder} (onnx/model.onnx, ")
    assert lines[-1] == f"Next: hf-ortho push {folder} YOU/{folder.name}"
    config, source = (json.loads((place / "config.json").read_text()) for place in (folder, saved("gpt2")))
    assert {key: config[key] for key in source} == source
    graph = (folder / "onnx" / "model.onnx").read_bytes()
    assert not [path for path in (os.fsencode(Path.cwd()), b"site-packages", b".py") if path in graph]


@pytest.mark.slow
def test_the_record_and_the_card(hf_ortho_command, gpt2_folder, tmp_path):
    converted, folder = tmp_path / "converted", tmp_path / "graph"
    assert hf_ortho_command("convert", gpt2_folder, "-o", converted, "--degree", 3).code == 0
    assert hf_ortho_command("export", converted, "-o", folder).code == 0
    record = Record.load(folder)
    assert record.graph.cache
    assert 0 < record.graph.difference < 1e-4
    assert record.graph.engine == f"onnxruntime {onnxruntime.__version__}"
    assert [command.split()[1] for command in record.commands] == ["convert", "export"]
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.library_name == "transformers.js"
    assert card.data.tags[0] == "onnx"
    assert f"differ from those of the model in PyTorch by at most {record.graph.difference:.1e}" in card.text
    assert "learnable `hermite_3` activations" in card.text
    assert "engine that ignores the activation" not in card.text
    assert (folder / "activations.png").read_bytes() == (converted / "activations.png").read_bytes()

    with pytest.raises(ConfigError, match="contains an ONNX graph, which is loaded without code"):
        push(folder, "me/graph", remote_code=True)

    again = hf_ortho_command("export", converted, "-o", folder)
    assert "it is not empty; pass --overwrite" in again.error
    assert hf_ortho_command("export", converted, "-o", converted, "--overwrite").error.endswith("name another")


@pytest.mark.slow
def test_a_model_that_is_not_converted(hf_ortho_command, gpt2_folder, tmp_path):
    ran = hf_ortho_command("export", gpt2_folder, "-o", tmp_path / "graph", "--no-cache")
    assert ran.code == 0, ran.err
    card = (tmp_path / "graph" / "README.md").read_text()
    assert f"GPT2LMHeadModel, exported from `{gpt2_folder}`" in card
    assert "differ from those of the model" in card


@pytest.mark.slow
def test_weights_beyond_the_size_of_one_file(hf_ortho_command, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_ortho.export.graph, "SINGLE_FILE", 1000)
    folder = tmp_path / "graph"
    assert hf_ortho_command("export", saved("classes"), "-o", folder).code == 0
    data = folder / "onnx" / "model.onnx_data"
    assert data.stat().st_size > (folder / "onnx" / "model.onnx").stat().st_size / 100
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {"model.onnx": 1}}
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} <= set(contents_of(folder).files)
    onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    data.unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: onnx/model\.onnx_data, which config\.json mentions"):
        contents_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_a_graph_that_computes_something_else_is_not_kept(hf_ortho_command, saved, tmp_path, monkeypatch, value):
    write = hf_ortho.export.graph.write_graph

    def spoiled(model, signature, file):
        model = copy.deepcopy(model)
        torch.nn.init.constant_(model.classifier.bias, value)
        return write(model, signature, file)

    monkeypatch.setattr("hf_ortho.export.onnx_folder.write_graph", spoiled)
    sentence = hf_ortho_command("export", saved("classes"), "-o", tmp_path / "graph").error
    assert "the graph of BertForSequenceClassification does not compute the same: its outputs differ" in sentence
    assert not (tmp_path / "graph").exists()


def test_an_untraceable_model_is_one_sentence(hf_ortho_command, saved, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("Failed to export the model.\nmore") from ValueError("a branch depends on data\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    sentence = hf_ortho_command("export", saved("gpt2"), "-o", tmp_path / "graph").error
    reason = "torch.onnx cannot export GPT2LMHeadModel: a branch depends on data"
    assert sentence == f"{reason}; --no-cache may help"
    assert not (tmp_path / "graph").exists()


def other_models():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    clip = CLIPConfig(text_config=sizes | {"vocab_size": 32}, vision_config=sizes | {"image_size": 8, "patch_size": 4})
    return {
        "an encoder-decoder": lambda: T5ForConditionalGeneration(t5),
        "a model of image and text": lambda: CLIPModel(clip),
    }


@pytest.mark.parametrize("kind", other_models())
def test_models_of_other_inputs(hf_ortho_command, tmp_path, kind):
    model = other_models()[kind]()
    model.save_pretrained(tmp_path / "model")
    sentence = hf_ortho_command("export", tmp_path / "model", "-o", tmp_path / "graph").error
    assert sentence == (
        f"{type(model).__name__} is {kind}, which cannot be exported; what can be exported is text generation, "
        "classification, fill-mask and embeddings, of one text or one image"
    )
    assert not (tmp_path / "graph").exists()


def test_a_classifier_without_a_pad_token(hf_ortho_command, make_gpt2, save_parts, tmp_path):
    gpt2, tokenizer = make_gpt2(n_layer=1)
    save_parts(tmp_path / "model", GPT2ForSequenceClassification(gpt2.config), tokenizer)
    sentence = hf_ortho_command("export", tmp_path / "model", "-o", tmp_path / "graph").error
    assert sentence.endswith("but has no pad token; set pad_token_id in its config.json")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_the_extra_is_missing(hf_ortho_command, gpt2_folder, tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == missing else find(name, *args))
    sentence = hf_ortho_command("export", gpt2_folder, "-o", tmp_path / "graph").error
    assert sentence == "hf-ortho export requires onnx, onnxscript, onnxruntime: pip install 'hf-ortho[onnx]'"


def test_unknown_formats_and_places(hf_ortho_command, gpt2_folder, tmp_path):
    sentence = hf_ortho_command("export", gpt2_folder, "-o", tmp_path / "graph", "--format", "gguf").error
    assert "argument --format: invalid choice: 'gguf'" in sentence
    assert "no-such-folder" in hf_ortho_command("export", tmp_path / "no-such-folder", "-o", tmp_path / "graph").error


def test_other_graphs_beside_the_weights_are_left_out_of_a_push(saved, tmp_path):
    folder = shutil.copytree(saved("gpt2"), tmp_path / "model")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"")
    assert contents_of(folder).left_out == ["onnx/"]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # weights too, but those of a pickle
    with pytest.raises(CheckpointError, match=r"it has a config but neither model\.safetensors nor"):
        contents_of(folder)


@pytest.mark.parametrize("command", ["convert", "evaluate", "export", "finetune", "inspect", "plot"])
def test_a_graph_is_no_input(hf_ortho_command, saved, text_file, tmp_path, command):
    folder = shutil.copytree(saved("gpt2"), tmp_path / "graph")
    (folder / "onnx").mkdir()
    (folder / "model.safetensors").rename(folder / "onnx" / "model.onnx")
    flags = {
        "evaluate": [folder, "--dataset", text_file],
        "finetune": ["--model", folder, "--dataset", text_file, "--output-dir", tmp_path / "out"],
        "inspect": [folder],
        "plot": [folder, "-o", tmp_path / "out.png"],
    }
    ran = hf_ortho_command(command, *flags.get(command, [folder, "-o", tmp_path / "out"]))
    sentence = f"{folder} has only an ONNX graph (onnx/model.onnx): give the model that it was exported from"
    assert (ran.code, ran.error) == (2, sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_is_merged(hf_ortho_command, saved, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(saved("classes"))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    ran = hf_ortho_command("export", tmp_path / "adapter", "-o", tmp_path / "graph")
    assert ran.code == 0, ran.err
    ids = torch.arange(5, 12)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "onnx" / "model.onnx")
    feed = {each.name: np.zeros(ids.shape, np.int64) for each in session.get_inputs()}
    feed |= {name: value.numpy() for name, value in inputs.items()}
    with torch.no_grad(), model.disable_adapter():
        base = model(**inputs).logits.numpy()
    found, expected = session.run(None, feed)[0], model(**inputs).logits.detach().numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max() < 1e-2 * np.abs(base - expected).max()
    assert f"- merged adapter: {tmp_path / 'adapter'}" in (tmp_path / "graph" / "README.md").read_text()
