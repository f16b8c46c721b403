"""A model or processor that is defined by code in its folder: refused without the flag, and never at a prompt."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ortho.activations import LearnableActivation
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.errors import CheckpointError, ConfigError
from hf_ortho.hub import add_remote_code, card_of, enable_remote_code
from hf_ortho.hub.contents import contents_of
from hf_ortho.tasks.tokenizer import byte_tokenizer

RAN = "open({marker!r}, 'w').close()  # leaves a trace\n"
CONFIGURATION = """
from transformers import PreTrainedConfig

class OneLayerConfig(PreTrainedConfig):
    model_type = "hf_ortho_one_layer"

    def __init__(self, vocab_size=257, hidden_size=8, hidden_act="gelu", **kwargs):
        self.vocab_size, self.hidden_size, self.hidden_act = vocab_size, hidden_size, hidden_act
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput

from .configuration_one_layer import OneLayerConfig

class OneLayerForCausalLM(PreTrainedModel):
    config_class = OneLayerConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits = self.head(self.act(self.up(self.embed(input_ids))))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""
IMAGES = """
from transformers import ConvNextImageProcessorPil

class OwnImageProcessor(ConvNextImageProcessorPil):
    own = True
"""


@pytest.fixture
def marker(tmp_path):
    """A file that exists once the code has run."""
    return tmp_path / "ran"


@pytest.fixture
def one_layer(tmp_path, marker):
    """A folder with a tokenizer and a model that only its code can build."""
    folder = tmp_path / "one_layer"
    folder.mkdir()
    trace = RAN.format(marker=str(marker))
    (folder / "configuration_one_layer.py").write_text(trace + CONFIGURATION)
    (folder / "modeling_one_layer.py").write_text(trace + MODELING)
    auto_map = {
        "AutoConfig": "configuration_one_layer.OneLayerConfig",
        "AutoModelForCausalLM": "modeling_one_layer.OneLayerForCausalLM",
    }
    entries = {"model_type": "hf_ortho_one_layer", "auto_map": auto_map, "architectures": ["OneLayerForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(entries))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    marker.unlink()
    return folder


def test_nothing_runs_without_the_flag(hf_ortho_command, one_layer, marker, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at a prompt"))
    out = tmp_path / "out"
    recipe = ["--model", one_layer, "--dataset", text_file, "--output_dir", out, "--max_steps", 1]
    for command in (
        ["convert", one_layer, "-o", out],
        ["evaluate", one_layer, "--dataset", text_file],
        ["plot", one_layer, "--calibration-data", text_file, "-o", tmp_path / "a.png"],
        ["finetune", *recipe],
        ["pretrain", "--init", "scratch", *recipe],
    ):
        error = hf_ortho_command(*command).error
        assert f"the config of {one_layer} is defined by code, configuration_one_layer.py of {one_layer}; " in error
        assert "--trust-remote-code" in error
    assert not marker.exists()
    assert not out.exists()


def test_with_the_flag_it_converts_reloads_and_evaluates(hf_ortho_command, one_layer, text_file, tmp_path):
    out = tmp_path / "out"
    ran = hf_ortho_command("convert", one_layer, "-o", out, "--degree", 3, "--trust-remote-code")
    assert ran.code == 0, ran.err
    assert "tensors and outputs bit-equal" in ran.out
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_act"] == "hermite_3"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_one_layer.OneLayerForCausalLM"
    shutil.rmtree(one_layer)  # the result has its own copy of the code
    assert "hermite_3" in hf_ortho_command("inspect", out).out  # reads no code
    found = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert isinstance(found.act, LearnableActivation)
    figures = hf_ortho_command("evaluate", out, "--dataset", text_file, "--trust-remote-code", "--block-size", 16)
    assert float(figures.figures["loss"][0]) == pytest.approx(5.6, abs=0.3)
    assert "modeling_one_layer.py" in contents_of(out).left_out  # code is pushed on request only
    assert "modeling_one_layer.py" in contents_of(out, ["*.py"]).files
    assert 'from_pretrained("me/it", trust_remote_code=True)' in card_of(out, repo_id="me/it", remote_code=False)
    with pytest.raises(ConfigError, match=r"by its own code, \w+_one_layer\.py, so no remote code can be added"):
        add_remote_code(out)
    with pytest.raises(ConfigError, match="so no remote code can be added"):
        enable_remote_code(found)
    (out / "modeling_one_layer.py").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: modeling_one_layer\.py, which config\.json names"):
        contents_of(out)


def test_training_with_the_flag(hf_ortho_command, one_layer, text_file, tmp_path):
    recipe = ["--dataset", text_file, "--max_steps", 1, "--block_size", 16, "--use_cpu", "--trust_remote_code", "true"]
    recipe += ["--activation", "hermite_3", "--calibration_samples", 1, "--model", one_layer]
    for command, more in (("finetune", []), ("pretrain", ["--init", "scratch"])):
        out = tmp_path / command
        ran = hf_ortho_command(command, *recipe, *more, "--output_dir", out)
        assert ran.code == 0, ran.err
        found = load_checkpoint(str(out), trust_remote_code=True)
        assert type(found.model).__name__ == "OneLayerForCausalLM"
        assert found.model.act.name == "hermite_3"
        assert found.tokenizer is not None


def test_a_class_of_transformers_needs_no_code(gpt2_folder, tmp_path, marker):
    shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    config = json.loads((gpt2_folder / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_x.GPT2LMHeadModel", "AutoConfig": "modeling_x.Config"}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (tmp_path / "gpt2" / "modeling_x.py").write_text(RAN.format(marker=str(marker)))
    model = load_checkpoint(str(tmp_path / "gpt2")).model
    assert type(model).__module__.startswith("transformers.")
    assert not hasattr(model.config, "auto_map")
    assert not marker.exists()


def test_code_for_a_processor(convnext_folder, gpt2_folder, tmp_path, marker):
    """Of a kind that transformers has none of for the model: otherwise it would take its own class."""
    images, text = shutil.copytree(gpt2_folder, tmp_path / "a"), shutil.copytree(convnext_folder, tmp_path / "b")
    (images / "processing_own.py").write_text(RAN.format(marker=str(marker)) + IMAGES)
    auto_map = {"AutoImageProcessor": "processing_own.OwnImageProcessor"}
    entries = json.loads((convnext_folder / "preprocessor_config.json").read_text())
    entries |= {"auto_map": auto_map, "image_processor_type": "OwnImageProcessor"}
    (images / "preprocessor_config.json").write_text(json.dumps(entries))
    auto_map = {"AutoTokenizer": ["me/elsewhere--tokenization_own.Slow", None]}
    (text / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Slow", "auto_map": auto_map}))
    for folder, message in (
        (images, f"the image processor of {images} is defined by code, processing_own.py of {images}; read it"),
        (text, f"the tokenizer of {text} is defined by code, tokenization_own.py of me/elsewhere; read it"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(folder))
        assert str(caught.value).startswith(message)
    assert not marker.exists()
    assert load_checkpoint(str(images), trust_remote_code=True).image_processor.own


def test_an_image_processor_that_is_unknown_is_noted(gpt2_folder, tmp_path, caplog):
    folder = shutil.copytree(gpt2_folder, tmp_path / "model")
    for kind, noted in (("image_processor_type", True), ("feature_extractor_type", False)):
        (folder / "preprocessor_config.json").write_text(json.dumps({kind: "NoSuchImageProcessor"}))
        caplog.clear()
        assert load_checkpoint(str(folder)).image_processor is None
        assert noted is (f"note: {folder} is loaded without its image processor: " in caplog.text)
