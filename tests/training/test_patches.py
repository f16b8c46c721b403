"""What ``import hf_ortho`` changes in a plain Trainer: no decay of activations, and no kernels that bypass them."""

import copy
import logging
import sys

import pytest
import torch
import transformers.integrations.liger
from accelerate import Accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_ortho
from hf_ortho.errors import ConfigError
from hf_ortho.training import ActivationTrainer, activation_parameters, patches

# As liger-kernel: options that the model type lacks are left out, and the MLP gets a method of another class.
LIGER = """
from types import MethodType
from torch.nn.functional import silu

class LigerSwiGLUMLP:
    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))

def to_llama(model, rms_norm=True, swiglu=True):
    model.given = {"rms_norm": rms_norm, "swiglu": swiglu}
    for layer in model.model.layers if swiglu else ():
        layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)

def to_llava(model, **kwargs):
    to_llama(model)

def _apply_liger_kernel_to_instance(model, **kwargs):
    if model.config.model_type == "llama":
        to_llama(model, **{k: v for k, v in kwargs.items() if k in ("rms_norm", "swiglu")})
    else:
        to_llava(model)
"""


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=16, pad_token_id=0))


@pytest.fixture(scope="module")
def converted(llama):
    model = copy.deepcopy(llama)
    hf_ortho.convert(model, "hermite_3")
    return model


@pytest.fixture(scope="module")
def liger(tmp_path_factory):
    """A package ``liger_kernel`` that can be imported."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "liger_kernel").mkdir()
    (folder / "liger_kernel" / "__init__.py").touch()
    (folder / "liger_kernel" / "transformers.py").write_text(LIGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(transformers.integrations.liger, "is_liger_kernel_available", lambda: True)
        yield
        for name in ("liger_kernel", "liger_kernel.transformers"):
            sys.modules.pop(name, None)


def trained(cls, model, folder, **options):
    """The model after one step of ``cls``."""
    model = copy.deepcopy(model)
    defaults = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(folder, max_steps=1, save_strategy="no", **(defaults | options))
    ids = torch.arange(8)
    cls(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 2).train()
    return model


# ---- weight decay --------------------------------------------------------------------------------------------------


def test_a_plain_trainer_decays_all_but_norms_and_activations(converted, tmp_path):
    arguments = TrainingArguments(tmp_path, weight_decay=0.5, report_to="none", use_cpu=True)
    groups = Trainer(converted, arguments).create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in converted.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.5 for p in group["params"]}
    assert decayed == {name for name in names.values() if "norm" not in name} - activation_parameters(converted)
    assert "model.layers.0.mlp.act_fn.coefficients" not in decayed


def test_weight_decay_leaves_the_activation_of_a_plain_trainer_as_it_is(converted, tmp_path):
    """SGD with a learning rate of 1e-9 moves by decay only: here to half of each weight."""
    model = trained(Trainer, converted, tmp_path, optim="sgd", learning_rate=1e-9, weight_decay=5e8)
    for name, before in converted.named_parameters():
        factor = 1.0 if "norm" in name or ".act_fn." in name else 0.5
        torch.testing.assert_close(model.get_parameter(name), factor * before, rtol=1e-5, atol=1e-6)


def test_a_subclass_that_groups_the_parameters_of_a_loss_module_decays_no_activation(converted, tmp_path):
    loss = nn.ModuleDict({"model": converted, "projection": nn.Linear(2, 2)})
    trainer = Trainer(converted, TrainingArguments(tmp_path, report_to="none", use_cpu=True))
    found = trainer.get_decay_parameter_names(loss)
    assert "model.model.layers.0.mlp.up_proj.weight" in found
    assert "projection.weight" in found
    assert [name for name in found if "act_fn" in name] == []


# ---- liger-kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "groups", "notes"), [(0.1, False, 1), (0.0, False, 0), (0.1, True, 0)], ids=["all", "none", "groups"]
)
def test_accelerate_says_once_that_an_optimizer_decays_activations(converted, caplog, decay, groups, notes):
    patches._say_once.cache_clear()
    params = hf_ortho.param_groups(converted, lr=1e-3, weight_decay=decay) if groups else converted.parameters()
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=decay)
    accelerator = Accelerator(cpu=True)
    with caplog.at_level(logging.WARNING, "hf_ortho"):
        for _ in range(2):
            accelerator.prepare(converted, optimizer)
    assert sum("decays learnable activations (weight_decay 0.1)" in line for line in caplog.messages) == notes


@pytest.mark.parametrize("cls", [Trainer, ActivationTrainer])
@pytest.mark.parametrize("config", [None, {"swiglu": True, "rms_norm": False}])
def test_liger_kernel_keeps_the_learnable_activations(liger, converted, tmp_path, caplog, cls, config):
    with caplog.at_level(logging.WARNING, "hf_ortho"):
        model = trained(cls, converted, tmp_path, use_liger_kernel=True, liger_kernel_config=config, learning_rate=0.01)
    assert model.given == {"rms_norm": config is None, "swiglu": False}
    before, after = (m.model.layers[0].mlp.act_fn.coefficients for m in (converted, model))
    assert not torch.equal(before, after)
    assert [r.getMessage()[:60] for r in caplog.records] == [
        "note: use_liger_kernel: swiglu, geglu, relu_squared stay off"
    ]


def test_liger_kernel_replaces_the_mlp_of_an_original_model(liger, llama, tmp_path, caplog):
    model = trained(Trainer, llama, tmp_path, use_liger_kernel=True)
    assert model.given == {"rms_norm": True, "swiglu": True}
    assert model.model.layers[0].mlp.forward.__qualname__ == "LigerSwiGLUMLP.forward"
    assert caplog.records == []


def test_a_model_type_without_such_an_option_is_refused(liger, converted, tmp_path):
    model = copy.deepcopy(converted)
    model.config.model_type = "llava"
    with pytest.raises(ConfigError, match=r"activation model\.layers\.0\.mlp\.act_fn .*set use_liger_kernel to false"):
        trained(Trainer, model, tmp_path, use_liger_kernel=True)
