"""The plugin for vLLM, on small stand-ins for the parts of vLLM that it extends."""

import subprocess
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_groups_of_a_gated_activation_are_those_of_the_gate(family):
    gated = vllm.gated(f"{family}_3_g2")
    with torch.no_grad():
        for parameter in gated.parameters():
            if parameter.ndim == 2:
                parameter += torch.tensor([[0.0], [0.125]])
    gate, up = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).unbind()
    plain = build(f"{family}_3_g2")
    plain.load_state_dict(gated.state_dict())
    first, second = plain.members()
    expected = torch.cat([first(gate[:, :3]), second(gate[:, 3:])], dim=1) * up
    torch.testing.assert_close(gated(torch.cat([gate, up], dim=1)), expected)


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


# A layer that only supports SiLU and says so, one that always computes SiLU, and models of them.
STAND_IN = """
import torch
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

class PPMissingLayer(nn.Identity):
    pass

class CheckedModel(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.layers = nn.ModuleList(self.layer(i, config) for i in range(2))

    def layer(self, i, config):
        return CheckedMLP(4, hidden_act=config.hidden_act)

    def load_weights(self, weights):
        own = dict(self.named_parameters())
        loaded = set()
        for name, weight in weights:
            if name in own:
                own[name].data.copy_(weight)
                loaded.add(name)
        return loaded

class ForgetfulModel(CheckedModel):
    def layer(self, i, config):
        return ForgetfulMLP(4, config)

class PartlyForgetfulModel(CheckedModel):
    def layer(self, i, config):
        return ForgetfulMLP(4, config) if i else CheckedMLP(4, hidden_act=config.hidden_act)

class FirstHalf(CheckedModel):
    def layer(self, i, config):
        return PPMissingLayer() if i else CheckedMLP(4, hidden_act=config.hidden_act)

class Draft(ForgetfulModel):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config)
        self.config = vllm_config.draft_config

class Bfloat16Model(CheckedModel):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config)
        self.head = nn.Linear(2, 2)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
"""


@pytest.fixture
def new_model(monkeypatch):
    """``new_model("CheckedModel", "hermite_8")`` builds a stand-in as vLLM builds a model of its own."""

    def new(name, activation, place="stand_in", processes=1):
        module = ModuleType(vllm.MODELS + place)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(STAND_IN, vars(module))
        loader = SimpleNamespace(get_model_architecture=lambda config: (getattr(module, config.name), config.name))
        vllm._extend_classes(loader)
        model_config = SimpleNamespace(hf_config=LlamaConfig(hidden_act=activation), name=name)
        model_class, _ = loader.get_model_architecture(model_config)
        assert loader.get_model_architecture(model_config) == (model_class, name)  # classes are extended once
        parallel = SimpleNamespace(tensor_parallel_size=processes)
        config = SimpleNamespace(model_config=model_config, draft_config=LlamaConfig(), parallel_config=parallel)
        return model_class(vllm_config=config)

    return new


def checkpoint(name, layers=2):
    """The tensors of a converted model of two layers, trained a little."""
    activation = build(name)
    with torch.no_grad():
        activation.tail_slopes.add_(0.25)
    tensors = activation.state_dict().items()
    return [(f"layers.{i}.act_fn.{key}", value) for i in range(layers) for key, value in tensors]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_support_only_silu_get_learnable_activations(family, new_model):
    model = new_model("CheckedModel", f"{family}_4")
    first, second = (layer.act_fn for layer in model.layers)
    assert isinstance(first, FAMILIES[family])
    assert isinstance(first, vllm.Gated)
    assert first is not second
    weights = checkpoint(f"{family}_4")
    assert model.load_weights(iter(weights)) == {name for name, _ in weights}
    assert all(layer.act_fn.tail_slopes.tolist() == [0.25, 0.25] for layer in model.layers)


def test_tensor_parallelism_would_split_groups_of_channels(new_model):
    """A process with half of the channels would split them into all groups."""
    assert new_model("CheckedModel", "hermite_8_g2").layers[0].act_fn.groups == 2
    new_model("CheckedModel", "hermite_8", processes=2)
    message = "^hermite_8_g2 has groups of channels, which --tensor-parallel-size 2 would split: serve it with"
    with pytest.raises(CheckpointError, match=message):
        new_model("CheckedModel", "hermite_8_g2", processes=2)


def test_other_models_are_left_to_vllm(new_model):
    model = new_model("CheckedModel", "silu")
    assert all(type(layer.act_fn).__name__ == "SiluAndMul" for layer in model.layers)
    assert not hasattr(type(model).__init__, "__wrapped__")
    new_model("ForgetfulModel", "silu")
    with pytest.raises(ValueError, match="Only silu is supported"):
        new_model("CheckedModel", "gelu")


def test_a_class_that_would_compute_silu_instead_is_refused(new_model):
    message = "^ForgetfulModel of vLLM does not use hermite_8: try --model-impl transformers$"
    with pytest.raises(CheckpointError, match=message):
        new_model("ForgetfulModel", "hermite_8")
    with pytest.raises(CheckpointError, match="does not use hermite_8: vLLM cannot serve this model"):
        new_model("ForgetfulModel", "hermite_8", place="transformers.stand_in")


def test_a_class_that_would_compute_silu_in_some_layers_is_refused(new_model):
    model = new_model("PartlyForgetfulModel", "hermite_8")
    message = "PartlyForgetfulModel of vLLM uses 1 of the 2 learnable activations of the checkpoint: try"
    with pytest.raises(CheckpointError, match=message):
        model.load_weights(checkpoint("hermite_8"))
    model.load_weights(checkpoint("hermite_8", layers=1))


def test_a_process_of_a_pipeline_has_some_of_the_layers(new_model):
    loaded = new_model("FirstHalf", "hermite_8").load_weights(checkpoint("hermite_8"))
    assert {name.split(".")[1] for name in loaded} == {"0"}


def test_a_draft_of_fixed_activations_beside_a_converted_model_is_left_to_vllm(new_model):
    assert not any(isinstance(module, LearnableActivation) for module in new_model("Draft", "hermite_8").modules())


def test_activations_stay_in_float32_in_a_class_that_makes_all_parameters_bfloat16(new_model):
    model = new_model("Bfloat16Model", "hermite_4")
    assert {p.dtype for p in model.head.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.layers.parameters()} == {torch.float32}


@pytest.mark.parametrize("extend", [vllm._extend_registries, vllm._extend_classes])
def test_a_vllm_without_the_names_that_are_extended_still_serves_other_models(extend, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="9.9"))
    module = SimpleNamespace(_ACTIVATION_REGISTRY=LazyDict({}))
    before = dict(vars(module))
    vllm._try_to_extend(extend, module)
    assert vars(module) == before
    (message,) = caplog.messages
    assert message.startswith("hf_ortho cannot extend vLLM 9.9: ")
    assert "has no attribute" in message
    assert message.endswith(". Do not serve converted models with it.")


@pytest.mark.slow
def test_the_plugin_imports_no_large_library():
    code = "import sys, hf_ortho.vllm as v; v.register(); print({'torch', 'transformers', 'scipy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
