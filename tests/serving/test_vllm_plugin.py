"""The plugin for vLLM, on small stand-ins for the parts of vLLM that it extends."""

import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from hf_ortho import vllm
from hf_ortho.activations import FAMILIES, LearnableActivation, build
from hf_ortho.activations.registry import is_learnable
from hf_ortho.errors import CheckpointError


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gated_activation_has_the_tensors_and_values_of_the_plain_one(family):
    plain, gated = build(f"{family}_4"), vllm.gated(f"{family}_4")
    assert gated.load_state_dict(plain.state_dict())
    assert not isinstance(plain, vllm.Gated)
    gate, up = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    expected = plain.double()(gate) * up
    found = gated.double()(torch.cat([gate, up], dim=-1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64; slices may take another kernel


def test_vllm_finds_the_plugin():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    _, _, section = project.partition('[project.entry-points."vllm.general_plugins"]\n')
    name, place = section.splitlines()[0].split(" = ")
    assert EntryPoint(name, place.strip('"'), "vllm.general_plugins").load() is vllm.register


class LazyDict(Mapping):
    """Like vLLM's: one module per name, made at its first use."""

    def __init__(self, factory):
        self._factory, self._modules = factory, {}

    def __getitem__(self, name):
        return self._modules.setdefault(name, self._factory[name]())

    def __iter__(self):
        return iter(self._factory)

    def __len__(self):
        return len(self._factory)


def test_the_registries_give_each_layer_its_own_activation():
    module = SimpleNamespace(
        _ACTIVATION_REGISTRY=LazyDict({"gelu": nn.GELU}), _ACTIVATION_AND_MUL_REGISTRY=LazyDict({"silu": nn.SiLU})
    )
    vllm._extend_registries(module)
    plain, gated = module._ACTIVATION_REGISTRY, module._ACTIVATION_AND_MUL_REGISTRY
    assert plain["gelu"] is plain["gelu"]
    assert gated["silu"] is gated["silu"]
    assert plain["hermite_8"] is not plain["hermite_8"]
    assert plain["hermite_8"].name == "hermite_8"
    assert gated["fourier_6"](torch.ones(2, 6)).shape == (2, 3)
    assert "hermite_8" in plain
    assert "hermit_8" not in plain
    with pytest.raises(KeyError, match="hermit_8"):
        plain["hermit_8"]


# A layer that only supports SiLU and says so, one that always computes SiLU, and a model of each.
STAND_IN = """
from torch import nn

class SiluAndMul(nn.Module):
    pass

class CheckedMLP(nn.Module):
    def __init__(self, width, hidden_act):
        super().__init__()
        if hidden_act != "silu":
            raise ValueError("Only silu is supported for now.")
        self.act_fn = SiluAndMul()

class ForgetfulMLP(nn.Module):
    def __init__(self, width, config):
        super().__init__()
        self.act_fn = SiluAndMul()

class CheckedModel(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        activation = vllm_config.model_config.hf_config.hidden_act
        self.layers = nn.ModuleList(CheckedMLP(4, hidden_act=activation) for _ in range(2))

class ForgetfulModel(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.layers = nn.ModuleList(ForgetfulMLP(4, vllm_config.model_config.hf_config) for _ in range(2))
"""


@pytest.fixture
def new_model(monkeypatch):
    """``new_model("CheckedModel", "hermite_8", pipeline=1)`` builds a stand-in as vLLM builds a model of its own."""
    module = ModuleType(f"{vllm.MODELS}stand_in")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(STAND_IN, vars(module))
    loader = SimpleNamespace(get_model_architecture=lambda config: (getattr(module, config.name), config.name))
    vllm._extend_classes(loader)

    def new(name, activation, pipeline=1):
        config = LlamaConfig(hidden_act=activation)
        if is_learnable(activation):
            config.hf_ortho = {"layers": [{"module": f"layers.{i}.act_fn"} for i in range(2)]}
        model_config = SimpleNamespace(hf_config=config, model="me/llama", name=name)
        parallel = SimpleNamespace(pipeline_parallel_size=pipeline)
        model_class, _ = loader.get_model_architecture(model_config)
        return model_class(vllm_config=SimpleNamespace(model_config=model_config, parallel_config=parallel))

    return new


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_support_only_silu_get_learnable_activations(family, new_model):
    for _ in range(2):  # the classes are extended once
        model = new_model("CheckedModel", f"{family}_4")
        first, second = (layer.act_fn for layer in model.layers)
        assert isinstance(first, FAMILIES[family])
        assert isinstance(first, vllm.Gated)
        assert first is not second
        assert "layers.1.act_fn.domain" in model.state_dict()


def test_other_activations_are_left_to_vllm(new_model):
    assert all(type(layer.act_fn).__name__ == "SiluAndMul" for layer in new_model("CheckedModel", "silu").layers)
    new_model("ForgetfulModel", "silu")
    with pytest.raises(ValueError, match="Only silu is supported"):
        new_model("CheckedModel", "gelu")


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_class_that_would_compute_silu_instead_is_refused(pipeline, new_model):
    expected = {1: 2, 2: 1}[pipeline]  # with pipeline parallelism, a process does not know how many it should have
    message = f"0 of the {expected} learnable activations of me/llama: serve it with --model-impl transformers"
    with pytest.raises(CheckpointError, match=message):
        new_model("ForgetfulModel", "hermite_8", pipeline)


def test_the_transformers_backend_keeps_activations_in_float32():
    class Base:
        def init_parameters(self, module, dtype=None):
            for child in module.modules():
                for name, parameter in list(child.named_parameters(recurse=False)):
                    setattr(child, name, nn.Parameter(parameter.data.to(torch.bfloat16)))

    vllm._keep_float32(SimpleNamespace(Base=Base))
    model = nn.Sequential(nn.Linear(2, 2), build("hermite_4"))
    Base().init_parameters(model)
    assert {p.dtype for p in model[0].parameters()} == {torch.bfloat16}
    assert isinstance(model[1], LearnableActivation)
    assert {p.dtype for p in model[1].parameters()} == {torch.float32}
