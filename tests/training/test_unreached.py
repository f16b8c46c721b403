"""Activations that the model does not call."""

import copy
import logging
from types import MethodType

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments

import hf_ortho
from hf_ortho.activations import FAMILIES, build
from hf_ortho.errors import ConfigError
from hf_ortho.training import ActivationTrainer


class Net(nn.Module):
    """Linear layers with activations, of which only those in ``used`` are called."""

    def __init__(self, used, experts=0, family="hermite"):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.used = used
        self.acts = nn.ModuleDict({name: build(f"{family}_3") for name in ("first", "second")})
        self.experts = nn.ModuleList(nn.ModuleDict({"act_fn": build(f"{family}_3")}) for _ in range(experts))

    def forward(self, x, labels=None):
        y = self.layer(x)
        for name in self.used:
            y = self.get_submodule(name)(y)
        return {"loss": y.square().mean()}


def notes(net, folder, caplog, **options):
    """What is reported after three steps."""
    defaults = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(folder, max_steps=3, save_strategy="no", **(defaults | options))
    data = [{"x": x, "labels": 0} for x in torch.randn(4, 2, generator=torch.Generator().manual_seed(0))]
    with caplog.at_level(logging.WARNING, "hf_ortho"):
        ActivationTrainer(net, arguments, train_dataset=data).train()
    return [record.getMessage() for record in caplog.records]


BOTH = ("acts.first", "acts.second")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_activation_that_the_model_does_not_call_is_reported(family, tmp_path, caplog):
    (note,) = notes(Net(["acts.second"], family=family), tmp_path, caplog)
    assert note.startswith("note: 1 of 2 learnable activations got no gradient in 3 steps and did not change: acts.fir")
    assert "fused kernel" in note


def test_experts_without_a_token_are_named_as_such(tmp_path, caplog):
    (note,) = notes(Net([*BOTH, "experts.2.act_fn"], experts=6), tmp_path, caplog)
    assert note == (
        "note: 5 of 8 learnable activations got no gradient in 3 steps and did not change: experts.0.act_fn, "
        "experts.1.act_fn, experts.3.act_fn and 2 more; no token was routed to these experts"
    )


def test_activations_that_are_called_or_frozen_are_not_reported(tmp_path, caplog):
    assert notes(Net(BOTH), tmp_path, caplog) == []
    frozen = Net(["acts.second"])
    frozen.acts["first"].requires_grad_(False)
    assert notes(frozen, tmp_path, caplog) == []


def test_an_activation_called_in_a_later_step_alone_is_not_reported(tmp_path, caplog):
    net = Net(["acts.first"])
    net.register_forward_hook(lambda module, args, output: setattr(module, "used", BOTH))
    assert notes(net, tmp_path, caplog) == []


# ---- fused kernels -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral():
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**shape, num_key_value_heads=2, vocab_size=16, num_local_experts=2, pad_token_id=0)
    model = MixtralForCausalLM(config)
    hf_ortho.convert(model, "hermite_3")
    return model


def trainer(model, folder):
    return ActivationTrainer(model, TrainingArguments(folder, report_to="none", use_cpu=True))


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_the_experts_of_torch_train_their_activation(mixtral, tmp_path, experts):
    model = copy.deepcopy(mixtral)
    model.set_experts_implementation(experts)
    trainer(model, tmp_path)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.experts.act_fn.coefficients.grad.abs().min() > 0


@pytest.mark.parametrize("experts", ["sonicmoe", "deepgemm_megamoe"])
def test_experts_that_compute_silu_themselves_are_refused(mixtral, tmp_path, experts):
    model = copy.deepcopy(mixtral)
    model.config._experts_implementation_internal = experts
    with pytest.raises(ConfigError, match=rf"{experts}: .*activation model\.layers\.0\.mlp\.experts\.act_fn; use grou"):
        trainer(model, tmp_path)


def test_a_replaced_forward_is_refused(mixtral, tmp_path):
    """The kernels of the Hub replace the forward of a module in this way."""

    class MegaBlocksMoeMLP:
        def forward(self, hidden_states, *routes):
            return hidden_states

    model = copy.deepcopy(mixtral)
    experts = model.model.layers[0].mlp.experts
    experts.forward = MethodType(MegaBlocksMoeMLP.forward, experts)
    with pytest.raises(ConfigError, match=r"MLP\.forward replaced the forward of MixtralExperts .*kernels"):
        trainer(model, tmp_path)
