"""Regular expressions in the adapter_config.json of others."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_ortho.checkpoints import patterns
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.errors import CheckpointError

ENDLESS = r"(transformer|[a-z]+|.)*(\.|.)*(.*)*(.*)*(.*)*!"
ENDLESS_FIELDS = {
    "target_modules": ENDLESS,
    "exclude_modules": ENDLESS,
    "modules_to_save": ["c_fc", ENDLESS],
    "rank_pattern": {ENDLESS: 1},
    "alpha_pattern": {ENDLESS: 1},
    "layers_pattern": [ENDLESS],
    "feedforward_modules": ENDLESS,
    "some_pattern_of_a_later_method": {ENDLESS: 1},
}
PATHS = ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("field", ENDLESS_FIELDS)
def test_an_endless_match_is_refused(field, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(
        CheckpointError, match=r"^the adapter: matching its regular expressions, such as '\(transf.* s;"
    ):
        patterns.check_patterns({field: ENDLESS_FIELDS[field], "layers": []}, PATHS, "the adapter")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*\.attn\.(c_attn|c_proj)", "rank_pattern": {r"h\.[0-9]+\.attn\.c_attn": 1}},
        {"target_modules": "(", "rank_pattern": {"(?i)x+": 1}},
    ],
    ids=["ordinary", "invalid"],
)
def test_other_expressions_are_left_to_peft(config):
    patterns.check_patterns(config, PATHS, "the adapter")


def test_names_start_no_process(monkeypatch):
    monkeypatch.setattr(patterns, "subprocess", None)
    config = {
        "base_model_name_or_path": "a (b)+",
        "task_type": "(a+)+",
        "target_modules": ["c_attn", "h.0.mlp", 3],
        "exclude_modules": "all-linear",
        "modules_to_save": None,
        "rank_pattern": {r"^transformer\.h\.[01].attn$": 1},
        "layers": [{"module": "(a+)+"}],
        "r": 8,
    }
    patterns.check_patterns(config, PATHS, "the adapter")


@pytest.mark.slow
def test_the_adapter_of_a_stranger(make_gpt2, tmp_path, monkeypatch):
    base, _ = make_gpt2(n_layer=1)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=r".*(c_attn|c_fc)", fan_in_fan_out=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(
        tmp_path / "adapter"
    )
    assert load_checkpoint(str(tmp_path / "adapter")).merged
    shutil.copytree(tmp_path / "adapter", tmp_path / "endless")
    file = tmp_path / "endless" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ENDLESS}))
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(CheckpointError, match=r"^adapter_config\.json of .*endless: matching its regular expressions"):
        load_checkpoint(str(tmp_path / "endless"))
