"""An adapter of peft where a command takes a checkpoint: merged into its base, or its activations read alone."""

import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_ortho import convert
from hf_ortho.activations import FAMILIES
from hf_ortho.checkpoints.activations import load_activations
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.errors import CheckpointError, ConfigError, HfOrthoError
from hf_ortho.peft import OrthoConfig

PATHS = [f"transformer.h.{i}.mlp.act" for i in (0, 1)]
IDS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))


def moved(model):
    """The adapter with all that it trains somewhere else."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def check(model, folder, activations):
    """``activations``: the modules in use, by their paths in the base model."""
    model.save_pretrained(folder)
    loaded = load_checkpoint(str(folder))
    assert type(loaded.model) is type(model.get_base_model())
    assert loaded.tokenizer is not None
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits)
    stored = load_activations(str(folder))
    assert list(stored.modules) == PATHS
    for path, module in activations.items():
        found = stored.modules[path]
        assert found.name == module.name
        state = module.state_dict() | {key: getattr(module, key) for key in ("domain", "tail_slopes")}
        assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    return stored.provenance


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_activations(gpt2_folder, tmp_path, family):
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    model = moved(get_peft_model(base, OrthoConfig(activation=f"{family}_4")))
    layers = {path: model.base_model.model.get_submodule(path).hf_ortho_act["default"] for path in PATHS}
    provenance = check(model, tmp_path / "adapter", layers)
    assert provenance.source_model == str(gpt2_folder)
    assert provenance.source_activations == {"activation_function": "gelu_new"}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft's, who then sets it
def test_lora_and_activations_on_a_converted_base(make_gpt2, save_parts, tmp_path):
    base, tokenizer = make_gpt2()
    convert(base, "tropical_4")  # its tensors have the shapes of hermite_4
    save_parts(tmp_path / "base", base, tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = moved(get_peft_model(base, LoraConfig(target_modules=["c_fc"], modules_to_save=["act"])))
    layers = {path: model.base_model.model.get_submodule(path).modules_to_save["default"] for path in PATHS}
    check(model, tmp_path / "adapter", layers)


@pytest.mark.parametrize(
    "spoiled",
    [
        {"layers": 3},
        {"layers": [{}]},
        {"layers": [{"module": "x", "domain": [0, 1]}]},
        {"layers": [{"module": "x", "domain": [0, 1], "tail_slopes": ["0", "1"]}]},
        {"source_activations": ["a"]},
        {"revision": 3},
    ],
    ids=str,
)
def test_a_spoiled_adapter(tmp_path, spoiled):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "HF_ORTHO", "base_model_name_or_path": "x"} | spoiled)
    )
    (key,) = spoiled
    for load in (load_checkpoint, load_activations):
        with pytest.raises(CheckpointError, match=rf"adapter_config.json of .*: {key}(\[0\]: \w+)? is ") as caught:
            load(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_an_adapter_without_activations(gpt2_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    get_peft_model(base, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no learnable activations"):
        load_activations(str(tmp_path))


@pytest.mark.parametrize("dropped", ["transformer.h.1.mlp.act.hf_ortho_act.coefficients", None])
def test_an_adapter_that_is_not_whole(gpt2_folder, tmp_path, dropped):
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    get_peft_model(base, OrthoConfig(activation="hermite_3")).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    if dropped is None:
        tensors["base_model.model.transformer.h.1.mlp.act.hf_ortho_act.coefficients"][0] = torch.nan
    save_file({k: v for k, v in tensors.items() if not dropped or dropped not in k}, weights)
    with pytest.raises(HfOrthoError, match="expected finite" if dropped is None else "incomplete"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("spoiled", [{"target_modules": 5}, {"fields": 5}, {"fields": "x"}], ids=str)
def test_an_adapter_config_that_selects_nothing(gpt2_folder, tmp_path, spoiled):
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    get_peft_model(base, OrthoConfig(activation="hermite_3")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | spoiled))
    (key,) = spoiled
    with pytest.raises(HfOrthoError, match=rf"{key} .* of the OrthoConfig: must be a list of names"):
        load_checkpoint(str(tmp_path))


def test_a_pattern_of_a_saved_adapter_is_not_matched(gpt2_folder, tmp_path):
    """It would not end. The paths of the activations are stored as well."""
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    get_peft_model(base, OrthoConfig(activation="hermite_3")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": "(.*)*(.*)*(.*)*(.*)*x"}))
    model = load_checkpoint(str(tmp_path)).model
    assert [model.get_submodule(path).name for path in PATHS] == ["hermite_3"] * 2


def test_an_adapter_that_cannot_be_merged(gpt2_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="PROMPT_TUNING, which cannot be merged"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", '{"peft_type": "LORA", "base_model_name_or_path": 5}', "{}"])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    for load in (load_checkpoint, load_activations):
        with pytest.raises(CheckpointError, match=r"not a peft config|does not name its base|not hold a JSON object"):
            load(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft's, when it saves
@pytest.mark.parametrize(("base", "message"), [(None, "does not name its base"), ("./none", "base model ./none does")])
def test_an_adapter_without_its_base(make_gpt2, tmp_path, base, message):
    model = make_gpt2()[0]
    model.name_or_path = base
    get_peft_model(model, OrthoConfig(activation="hermite_3")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(tmp_path))
