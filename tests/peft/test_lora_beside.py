"""LoRA and the activations of a converted model together, with what peft has of its own."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_ortho.activations import FAMILIES
from hf_ortho.training.policies import freeze_domains

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_with_trained_activations_reloads_and_merges(family, make_gpt2, tmp_path, logits, nudge):
    base, _ = make_gpt2(activation_function=f"{family}_3")
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["act"])
    model = get_peft_model(base, config)
    freeze_domains(model)  # peft makes all that it copies trainable
    trained = {name.split(".modules_to_save.")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {f"base_model.model.transformer.h.{i}.mlp.act" for i in range(2)} <= trained
    expected = logits(nudge(model))
    model.save_pretrained(tmp_path / "adapter")

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    found = logits(merged)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the low-rank product is added to the weights
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), found)
