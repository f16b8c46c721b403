"""Folders that hold something else than a checkpoint: one sentence says what it is, and what would work."""

import json

import pytest

from hf_ortho.checkpoints.activations import load_activations
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.errors import CheckpointError
from hf_ortho.text import one_line


def fill(folder, **files):
    """Files by their paths, with ``__`` for ``/``; a dictionary is JSON."""
    for path, content in files.items():
        file = folder / path.replace("__", "/")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))


CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
PLACES = {
    "sentence-transformers": (
        {"modules.json": [], "0_Transformer__config.json": CONFIG, "1_Pooling__config.json": {"pooling": True}},
        "it is a sentence-transformers model in the old layout; give one of its models: {}/0_Transformer",
    ),
    "diffusers": (
        {"model_index.json": {}, "unet__config.json": {"_class_name": "UNet"}, "text_encoder__config.json": CONFIG},
        "it is a diffusers pipeline; give one of its models: {}/text_encoder",
    ),
    "diffusers without text": (
        {"model_index.json": {}, "unet__config.json": {}},
        "it is a diffusers pipeline; expected a folder with config.json and safetensors weights",
    ),
    "GGUF": ({"model-q4.gguf": 0}, "it has only GGUF weights (model-q4.gguf): save them as safetensors"),
    "GGUF with a config": ({"config.json": CONFIG, "a.gguf": 0}, "has only GGUF weights (a.gguf): save them"),
    "TensorFlow": (
        {"config.json": CONFIG, "tf_model.h5": 0},
        "has only TensorFlow or Flax weights (tf_model.h5): save",
    ),
    "Flax": ({"config.json": CONFIG, "flax_model.msgpack": 0}, "TensorFlow or Flax weights (flax_model.msgpack): save"),
    "nothing": ({}, "it has no config.json; expected a folder with config.json and safetensors weights"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_what_the_folder_is(tmp_path, place):
    files, message = place
    fill(tmp_path, **files)
    for read in (load_checkpoint, load_activations):
        with pytest.raises(CheckpointError) as caught:
            read(str(tmp_path))
        assert str(caught.value).startswith(f"{tmp_path} ")
        assert message.format(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["too long", "NUL"])
def test_a_name_that_no_folder_can_have(name):
    for read in (load_checkpoint, load_activations):
        with pytest.raises(CheckpointError) as caught:
            read(name)
        assert str(caught.value).startswith(f"{one_line(name)} cannot be loaded: Repo id must")
