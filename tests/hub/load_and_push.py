"""With HF_ENDPOINT and an empty HF_HOME: load what was pushed, push in the native ways, load that; save the logits."""

import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_ortho  # noqa: F401  (registers the activations)

folder, ids = Path(sys.argv[1]), torch.arange(16)[None]
logits = {}


def load(auto, name, **options):
    model = auto.from_pretrained(name, **options).eval()
    with torch.no_grad():
        logits[name] = model(ids).logits
    return model


model = load(AutoModelForCausalLM, "me/converted")
adapted = load(AutoPeftModelForCausalLM, "me/adapter")
model.push_to_hub("me/native")
adapted.push_to_hub("me/native-adapter")
arguments = TrainingArguments(str(folder / "run"), hub_model_id="me/trained", report_to="none", use_cpu=True)
Trainer(model, arguments, processing_class=AutoTokenizer.from_pretrained("me/converted")).push_to_hub()
for name in ("me/native", "me/trained"):
    load(AutoModelForCausalLM, name)
load(AutoPeftModelForCausalLM, "me/native-adapter")
save_file(logits, folder / "logits.safetensors")
