"""Adapters as this version writes them, for a seeded GPT-2: ``python tests/peft/adapter_formats.py FOLDER``.

A change of format takes a new folder in ``fixtures``; what is there stays, since such adapters are about.
"""

import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

import hf_ortho
from hf_ortho.activations import FAMILIES

FIXTURES = Path(__file__).with_name("fixtures")
IDS = torch.arange(12)[None]


def base(activation="gelu_new"):
    """A GPT-2 without dropout whose weights depend on nothing but torch's generator."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(activation_function=activation, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".act." not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def write(folder, model):
    """The adapter with moved parameters, and the logits for ``IDS``."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        logits = model.eval()(IDS).logits
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    save_file({"logits": logits}, folder / "expected.safetensors")


def main(place, families=tuple(FAMILIES)):
    for family in families:
        config = hf_ortho.peft.OrthoConfig(activation=f"{family}_4", task_type="CAUSAL_LM")
        write(place / f"{family}_4", get_peft_model(base(), config))
    lora = LoraConfig(r=1, target_modules=["attn.c_proj"], fan_in_fan_out=True, modules_to_save=["act"])
    write(place / "lora_and_hermite_4", get_peft_model(base("hermite_4"), lora))


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    main(Path(sys.argv[1]))
