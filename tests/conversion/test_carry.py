"""A conversion, a merged adapter and a training keep the files of their source that are not its weights."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hf_ortho.checkpoints import carry as carry_module
from hf_ortho.checkpoints.carry import Source, carry

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
CARRIED = {
    "modules.json": json.dumps(MODULES),
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": '{"in_features": 8}',
    "2_Dense/model.safetensors": "the weights of the layer",
    "config_sentence_transformers.json": '{"prompts": {"query": "query: "}}',
    "sentence_bert_config.json": "{}",
    "processor_config.json": '{"patch_size": 14}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "modeling_own.py": "raise SystemExit",
    "own/layers.py": "raise SystemExit",
    "spiece.model": "pieces",
    "LICENSE": "Do as you like.",
    "colbert_linear.pt": "a small layer of its own",
    "assets/picture.svg": "<svg/>",
}
LEFT_OUT = {
    "pytorch_model-00001-of-00002.bin": "stale",
    "pytorch_model-00002-of-00002.bin": "stale",
    "tf_model.h5": "stale",
    "flax_model.msgpack": "stale",
    "model.Q4.gguf": "stale",
    "model.fp16.safetensors": "stale",
    "onnx/model.onnx": "stale",
    "onnx/config.json": "{}",
    "original/consolidated.00.pth": "stale",
    "optimizer.pt": "state",
    "training_args.bin": "state",
    "trainer_state.json": "{}",
    "training_recipe.json": "{}",
    "events.out.tfevents.1": "state",
    "runs/events.out.tfevents.2": "state",
    "checkpoint-5/config.json": "{}",
    "checkpoint-10/model.safetensors": "state",
    "earlier/config.json": "{}",
    "earlier/model.safetensors": "of another model",
    "id_rsa": "private",
    "README.md": "# The base",
    "data/train.txt": "x" * 3000,
}
SILENT = {".env": "private", ".git/config": "private", "activations.png": "of the source"}
NAMED = "README.md (the model has a new card), checkpoint-*/, data/, earlier/, events.out.tfevents.1, "
NAMED += "flax_model.msgpack, id_rsa, model.Q4.gguf, model.fp16.safetensors, onnx/, optimizer.pt, original/, "
NAMED += "pytorch_model-*-of-00002.bin, runs/, tf_model.h5, trainer_state.json, training_args.bin, "
NAMED += "training_recipe.json"


def write(folder, files):
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encoded(files):
    return {path: text.encode() for path, text in files.items()}


@pytest.fixture
def source(gpt2_folder, tmp_path):
    return write(shutil.copytree(gpt2_folder, tmp_path / "source"), CARRIED)


def test_what_is_carried_and_what_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(carry_module, "LIMIT", 2000)
    monkeypatch.setattr(carry_module, "SHOWN", 99)
    (tmp_path / "private").write_text("secret")
    source = write(tmp_path / "source", CARRIED | LEFT_OUT | SILENT)
    (source / "notes.txt").symlink_to(tmp_path / "private")
    (source / "vocab.txt").symlink_to("spiece.model")
    (source / "linked").symlink_to(source / "1_Pooling")
    os.mkfifo(source / "pipe")
    written = {"config.json": "{}", "spiece.model": "written by the tokenizer"}
    folder = write(tmp_path / "out", written)
    carry(Source(str(source)), folder)
    assert read(folder) == encoded(CARRIED | {"vocab.txt": "pieces"} | written)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    named = NAMED.replace("model.Q4", "linked/ (a link to a folder), model.Q4")
    named = named.replace("onnx/", "notes.txt (a link that leads out of the folder), onnx/")
    named = named.replace("pytorch", "pipe (not a regular file), pytorch")
    assert caplog.messages == [f"note: not carried over from {source}: {named}"]


def test_the_card_of_an_earlier_conversion_is_replaced_without_a_word(tmp_path, caplog):
    source = write(tmp_path / "source", {"README.md": "# Ours", "conversion.json": "{}", "modeling_hf_ortho.py": ""})
    (tmp_path / "out").mkdir()
    carry(Source(str(source)), tmp_path / "out")
    assert read(tmp_path / "out") == {}
    assert caplog.messages == []


def test_large_files_are_carried_with_a_module_only(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(carry_module, "LIMIT", 10)
    large = {"2_Dense/pytorch_model.bin": "x" * 11, "a.txt": "x" * 11, "b/1.txt": "x" * 6, "b/2.txt": "x" * 6}
    source = write(tmp_path / "source", {"modules.json": "[]"} | large)
    (tmp_path / "out").mkdir()
    carry(Source(str(source)), tmp_path / "out")
    assert set(read(tmp_path / "out")) == {"modules.json"}
    assert caplog.messages[0].endswith(": 2_Dense/, a.txt, b/")
    (source / "modules.json").write_text('[{"path": "2_Dense"}]')
    carry(Source(str(source)), tmp_path / "out")
    assert set(read(tmp_path / "out")) == {"modules.json", "2_Dense/pytorch_model.bin"}


@pytest.mark.parametrize(
    "modules",
    ["{", "[" * 100_000, "5", "[5]", '[{"path": 5}]', '[{"path": ".."}]', '[{"path": "/etc"}]', '{"path": 1}'],
)
def test_a_list_of_modules_that_is_none(tmp_path, modules):
    source = write(tmp_path / "a" / "source", {"modules.json": modules})
    write(tmp_path / "a", {"x.txt": "outside"})
    (tmp_path / "out").mkdir()
    carry(Source(str(source)), tmp_path / "out")
    assert set(read(tmp_path / "out")) <= {"modules.json"}


def test_the_parts_of_a_router_are_modules(tmp_path):
    files = {"modules.json": '[{"path": ""}]', "router_config.json": '{"types": {"query_0_Static": "x.Static"}}'}
    files |= {"query_0_Static/model.safetensors": "its weights"}
    source = write(tmp_path / "source", files)
    (tmp_path / "out").mkdir()
    carry(Source(str(source)), tmp_path / "out")
    assert read(tmp_path / "out") == encoded(files)


def test_a_snapshot_in_the_cache_links_to_its_blobs(tmp_path):
    repository = write(tmp_path / "models--me--x", {"blobs/1": "[]", "private": "secret"})
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "modules.json").symlink_to("../../blobs/1")
    (snapshot / "notes.txt").symlink_to("../../private")
    (tmp_path / "out").mkdir()
    carry(Source(str(snapshot)), tmp_path / "out")
    assert read(tmp_path / "out") == {"modules.json": b"[]"}


# ---- the commands --------------------------------------------------------------------------------------------------


def test_convert(hf_ortho_command, source, tmp_path):
    done = hf_ortho_command("convert", source, "-o", tmp_path / "out", "--degree", 3)
    assert done.code == 0, done.err
    assert read(tmp_path / "out").items() >= encoded(CARRIED).items()
    manifest = json.loads((tmp_path / "out" / ".hf_ortho.json").read_text())["files"]
    assert manifest.keys() >= CARRIED.keys()  # --overwrite replaces them


def test_a_merged_adapter_carries_the_files_of_its_base(hf_ortho_command, source, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source), LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True)
    )
    model.save_pretrained(tmp_path / "adapter")
    done = hf_ortho_command("convert", tmp_path / "adapter", "-o", tmp_path / "out", "--degree", 3)
    assert done.code == 0, done.err
    assert read(tmp_path / "out").items() >= encoded(CARRIED).items()


@pytest.mark.parametrize(
    "flags", [["--train", "lora"], ["--adapter", "true", "--train", "lora"]], ids=["full", "adapter"]
)
def test_a_training(hf_ortho_command, source, text_file, tmp_path, flags):
    options = {"--model": source, "--dataset": text_file, "--output_dir": tmp_path / "out", "--max_steps": 1}
    options |= {"--block_size": 16, "--per_device_train_batch_size": 2, "--use_cpu": "true", "--save_strategy": "no"}
    done = hf_ortho_command("finetune", *(part for pair in options.items() for part in pair), "--train", "lora", *flags)
    assert done.code == 0, done.err
    found = read(tmp_path / "out")
    if "--adapter" in flags:  # its base model has the others
        assert all(path.endswith(".jinja") for path in found.keys() & CARRIED.keys())  # the tokenizer writes them
    else:
        assert found.items() >= encoded(CARRIED).items()


def test_a_feature_extractor(hf_ortho_command, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1}
    sizes |= {"decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 20}
    sizes |= {"num_mel_bins": 8, "max_source_positions": 4, "max_target_positions": 4, "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path / "source")
    done = hf_ortho_command("convert", tmp_path / "source", "-o", tmp_path / "out", "--degree", 3)
    assert done.code == 0, done.err
    found = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (type(found), found.feature_size, found.chunk_length) == (WhisperFeatureExtractor, 8, 1)


def test_sentence_transformers_finds_its_modules(hf_ortho_command, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(**sizes, vocab_size=20)).save_pretrained(tmp_path / "source")
    write(tmp_path / "source", {"modules.json": json.dumps(MODULES)})
    weights = {"linear.weight": torch.randn(4, 8)}
    (tmp_path / "source" / "2_Dense").mkdir()
    save_file(weights, tmp_path / "source" / "2_Dense" / "model.safetensors")
    done = hf_ortho_command("convert", tmp_path / "source", "-o", tmp_path / "out", "--degree", 3)
    assert done.code == 0, done.err
    carried = tmp_path / "out" / "2_Dense" / "model.safetensors"
    assert carried.read_bytes() == (tmp_path / "source" / "2_Dense" / "model.safetensors").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: sentence-transformers\n" in card
    assert "import hf_ortho  # pip install hf-ortho" in card
    assert (
        f'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("{tmp_path / "out"}")'
        in card
    )
