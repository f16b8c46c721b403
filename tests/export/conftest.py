"""Saved models of every kind that can be exported: tiny, converted, and with outliers that reach the tails; one in
bfloat16."""

import copy
import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import hf_ortho

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def tiny(make_gpt2, make_convnext):
    """``tiny("llama")``: a seeded model and its processor, not converted."""

    def tiny(name):
        if name == "images":
            return make_convnext()
        gpt2, tokenizer = make_gpt2(n_positions=64, n_layer=1 if name == "decoder_classes" else 2)
        tokenizer = copy.deepcopy(tokenizer)
        if name in ("sentences", "masked", "classes", "decoder_classes"):
            tokenizer.add_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>"})
            gpt2.config.vocab_size = len(tokenizer)
        sizes = SIZES | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "pad_token_id": tokenizer.pad_token_id or 0,
        }
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        torch.manual_seed(0)
        if name == "gpt2":
            return gpt2, tokenizer
        if name == "decoder_classes":
            return GPT2ForSequenceClassification(gpt2.config), tokenizer
        decoders = {
            "llama": (LlamaConfig, LlamaForCausalLM, {}),
            "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 4, "head_dim": 4, "num_hidden_layers": 2}),
        }
        if name in decoders:  # grouped heads; a window that is shorter than the texts, in gemma2 in one of two layers
            config, cls, options = decoders[name]
            return cls(config(**sizes | ends | options, num_key_value_heads=2)), tokenizer
        classes = {"masked": BertForMaskedLM, "classes": BertForSequenceClassification}
        named = {"id2label": {0: "neg", 1: "pos"}} if name == "classes" else {}
        return classes.get(name, BertModel)(BertConfig(**sizes, **named)), tokenizer

    return tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tiny):
    """``saved("llama", "hermite_4")``: the folder of a converted model; the same for the same arguments."""
    folders = {}

    def saved(name, activation="hermite_4"):
        if (name, activation) in folders:
            return folders[name, activation]
        folder = tmp_path_factory.mktemp(name)
        model, processor = tiny(name)
        with torch.no_grad():
            for value in model.parameters():
                value *= 4  # otherwise the activations hardly matter
        hf_ortho.convert(model, activation)
        if name == "sentences":
            model.to(torch.bfloat16)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if name == "sentences":
            modules = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")
            entries = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
            (folder / "modules.json").write_text(json.dumps(entries))
            (folder / "1_Pooling").mkdir()
            pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        folders[name, activation] = folder
        return folder

    return saved


@pytest.fixture(scope="session")
def exported(tmp_path_factory, saved, hf_ortho_command):
    """``exported("llama")``: the folder that ``hf-ortho export`` writes, and what it printed."""
    done = {}

    def exported(name, activation="hermite_4", *flags):
        key = (name, activation, *flags)
        if key not in done:
            folder = tmp_path_factory.mktemp(name) / "onnx-folder"
            ran = hf_ortho_command("export", saved(name, activation), "-o", folder, *flags)
            assert (ran.code, ran.err) == (0, ""), ran.err
            done[key] = folder, ran.out
        return done[key]

    return exported
