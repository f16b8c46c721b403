"""Converted models load by ``trust_remote_code=True`` in a process where hf_ortho cannot be imported, bit for bit."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2LMHeadModel
from transformers.activations import ACT2CLS, ACT2FN
from transformers.dynamic_module_utils import get_imports

from hf_ortho.activations import FAMILIES, build
from hf_ortho.activations.base import LearnableActivation
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.errors import CheckpointError, ConfigError
from hf_ortho.hub import add_remote_code, enable_remote_code

pytestmark = pytest.mark.slow  # a process without hf_ortho is launched

STANDARD = {"__future__", "collections", "copy", "functools", "itertools", "math", "typing"}
# ``cases.json`` in the folder argv[1]: the AutoModel class of each case, and whether to look at more than its values.
WITHOUT_HF_ORTHO = """
import copy, json, pickle, sys
from pathlib import Path

sys.modules["hf_ortho"] = None  # importing it fails

import torch, transformers
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

torch.set_num_threads(1)
root = Path(sys.argv[1])
said, others = {}, set(ACT2FN)


def learnable(model):
    return {path: m for path, m in model.named_modules() if hasattr(m, "tail_slopes")}


def output(model, inputs):
    result = model(**{key: x.to(model.dtype) if x.is_floating_point() else x for key, x in inputs.items()})
    return result.logits_per_image if "logits_per_image" in result else result.logits


for case, (auto, thorough) in json.loads((root / "cases.json").read_text()).items():
    folder, auto, found = root / case, getattr(transformers, auto), {}
    values, inputs = load_file(folder / "values.safetensors"), load_file(folder / "inputs.safetensors")
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    modules = learnable(model)
    with torch.no_grad():
        found["logits"] = output(model, inputs)
        found |= {f"{path} {key}": m(value) for path, m in modules.items() for key, value in values.items()}
    said[case] = {
        "class": type(model).__name__,
        "place": type(model).__module__,
        "missing": [str(key) for keys in info.values() for key in keys],
    }
    if thorough:
        logits = output(model, inputs)
        logits.square().mean().backward()
        found["with gradients"] = logits.detach()
        named = [(f"gradient of {path}.{k}", p) for path, m in modules.items() for k, p in m.named_parameters()]
        found |= {key: parameter.grad for key, parameter in named if parameter.grad is not None}
        half = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        model.save_pretrained(root / "again" / case)
        ways = {
            "saved": auto.from_pretrained(root / "again" / case, trust_remote_code=True),
            "copied": copy.deepcopy(model),
            "pickled": pickle.loads(pickle.dumps(model)),
            "bfloat16": half,
        }
        with torch.no_grad():
            found |= {way: output(other, inputs) for way, other in ways.items()}
        scratch = auto.from_config(model.config, trust_remote_code=True)
        said[case] |= {
            "kinds": sorted({str(v.dtype) for m in learnable(half).values() for v in m.state_dict().values()}),
            "scratch": {k: {n: v.tolist() for n, v in m.state_dict().items()} for k, m in learnable(scratch).items()},
        }
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "found.safetensors")
module = next(iter(modules.values()))
compiled = torch.compile(module, backend="eager", fullgraph=True)
with torch.no_grad():
    torch.testing.assert_close(compiled(values["small float32"]), module(values["small float32"]))
said["names"] = sorted(set(ACT2FN) - others)
(root / "said.json").write_text(json.dumps(said))
"""


def randomized(model):
    """Parameters away from their initial values, domains and tails among them in every second activation."""
    generator = torch.Generator().manual_seed(1)
    found = {path: m for path, m in model.named_modules() if isinstance(m, LearnableActivation)}
    with torch.no_grad():
        for i, module in enumerate(found.values()):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            if i % 2 == 0:
                module.domain.copy_(torch.tensor([-1.5, 1.75]))
                module.tail_slopes.copy_(torch.tensor([0.125, 1.0]))
    return model.eval()


def gpt2(activation, **options):
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids, **options, activation_function=activation))


def convnext(activation):
    sizes = {"hidden_sizes": [8], "depths": [2], "num_stages": 1, "image_size": 16, "layer_scale_init_value": 1.0}
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes, hidden_act=activation))


def llava(activation):
    """Its tensors have other names in files than in the model."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**sizes, vocab_size=32, bos_token_id=0, eos_token_id=0, hidden_act=activation)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=31)
    return transformers.LlavaForConditionalGeneration(config)


def clip(text, vision):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 32, "hidden_act": text, "bos_token_id": 0, "eos_token_id": 6},
        vision_config=sizes | {"image_size": 16, "patch_size": 8, "hidden_act": vision},
        projection_dim=8,
    )
    return transformers.CLIPModel(config)


IDS = {"input_ids": torch.arange(12).reshape(2, 6) % 7}
PIXELS = {"pixel_values": torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(3))}


@dataclasses.dataclass
class Case:
    """A model to save; ``native``: ``save_pretrained`` alone writes the code."""

    make: Callable
    activations: tuple[str, ...]
    auto: str = "AutoModelForCausalLM"
    inputs: dict = dataclasses.field(default_factory=lambda: IDS)
    thorough: bool = True
    native: bool = False


CASES = {
    **{f"{family}_3": Case(gpt2, (f"{family}_3",), thorough=False) for family in FAMILIES},
    **{f"{family}_12": Case(gpt2, (f"{family}_12",)) for family in FAMILIES},
    **{f"{family}_3_g4": Case(gpt2, (f"{family}_3_g4",), thorough=family == "hermite") for family in FAMILIES},
    "native": Case(gpt2, ("hermite",), native=True),
    "convnext": Case(convnext, ("fourier_2",), "AutoModelForImageClassification", PIXELS),
    "llava": Case(llava, ("hermite_9",), "AutoModelForImageTextToText"),
    "without kernels": Case(gpt2, ("sine_2",)),
    "clip": Case(clip, ("hermite_4", "tropical_rational_2"), "AutoModel", IDS | PIXELS),
}
THOROUGH = [name for name, case in CASES.items() if case.thorough]


def output(model, inputs):
    result = model(**{key: x.to(model.dtype) if x.is_floating_point() else x for key, x in inputs.items()})
    return result.logits_per_image if "logits_per_image" in result else result.logits


def learnable(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, LearnableActivation)}


@pytest.fixture(scope="module", autouse=True)
def sine():
    """A family that has a formula and no kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES._places, "sine", "sine:Sine")
        patch.setitem(ACT2FN, "sine_2", lambda: build("sine_2"))
        yield


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: randomized(case.make(*case.activations)) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def values():
    """Inputs of single activations."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"small": (3, 36), "large": (3, 300, 300)}  # below and above where chunks and tables begin
    drawn = {size: 2 * torch.randn(shape, generator=generator) for size, shape in shapes.items()}
    return {
        f"{size} {kind}": x.to(getattr(torch, kind)) for size, x in drawn.items() for kind in ("float32", "bfloat16")
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory, models, values):
    """Every case saved with its remote code, and what a process without hf_ortho made of it."""
    root = tmp_path_factory.mktemp("remote")
    for name, case in CASES.items():
        if case.native:
            enable_remote_code(models[name])
        models[name].save_pretrained(root / name)
        if not case.native:
            for file, content in add_remote_code(root / name).items():
                (root / name / file).write_bytes(content)
        save_file(case.inputs, root / name / "inputs.safetensors")
        save_file(values, root / name / "values.safetensors")
    (root / "cases.json").write_text(json.dumps({name: (case.auto, case.thorough) for name, case in CASES.items()}))
    command = [sys.executable, "-W", "error", "-c", WITHOUT_HF_ORTHO, str(root)]
    environment = os.environ | {"HF_HOME": str(root / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def said(root):
    return json.loads((root / "said.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_same_bits_without_hf_ortho(name, root, models, values, said):
    found = load_file(root / name / "found.safetensors")
    modules = learnable(models[name])
    assert len(modules) == 2
    with torch.no_grad():
        expected = {f"{path} {key}": m(value) for path, m in modules.items() for key, value in values.items()}
        expected["logits"] = output(models[name], CASES[name].inputs)
    for key, value in expected.items():
        if "_g" in name:  # without the kernel for groups: its operations are rounded in another order
            least = {"rtol": 1e-2, "atol": 1e-2} if "bfloat16" in key else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(found[key], value, **least)
        else:
            assert torch.equal(found[key], value), key
    assert said[name]["class"] == next(c.__name__ for c in type(models[name]).__mro__ if "transformers" in c.__module__)
    assert said[name]["place"].endswith(".modeling_hf_ortho")
    assert said[name]["missing"] == []


@pytest.mark.parametrize("name", THOROUGH)
def test_what_else_a_model_does_without_hf_ortho(name, root, models, said):
    found = load_file(root / name / "found.safetensors")
    for way in ("with gradients", "saved", "copied", "pickled"):
        assert torch.equal(found[way], found["logits"]), way
    modules = learnable(models[name])
    models[name].zero_grad()
    output(models[name], CASES[name].inputs).square().mean().backward()
    expected = {f"{path}.{key}": p.grad for path, m in modules.items() for key, p in m.named_parameters()}
    for key, gradient in expected.items():
        assert (gradient is None) == key.endswith((".domain", ".tail_slopes"))
        if gradient is not None:
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[f"gradient of {key}"], gradient, rtol=1e-4, atol=1e-4 * scale)
    assert said[name]["kinds"] == ["torch.float32"]
    drawn = {path: {k: v.tolist() for k, v in build(m.name).state_dict().items()} for path, m in modules.items()}
    assert said[name]["scratch"] == json.loads(json.dumps(drawn))


def test_only_the_names_in_use_are_registered(said):
    assert said["names"] == sorted({name for case in CASES.values() for name in case.activations})


@pytest.mark.parametrize("name", ["hermite_12", "native", "convnext", "clip"])
def test_hf_ortho_hands_out_the_native_class(name, root, models, tmp_path):
    registered = dict(ACT2CLS)
    case = CASES[name]
    auto = getattr(transformers, case.auto)
    model = auto.from_pretrained(root / name, trust_remote_code=True, dtype=torch.bfloat16)
    cls = getattr(transformers, model.config.architectures[0])
    assert type(model) is cls
    assert {path: type(m) for path, m in learnable(model).items()} == {
        path: type(m) for path, m in learnable(models[name]).items()
    }
    assert registered == ACT2CLS
    found = load_file(root / name / "found.safetensors")
    with torch.no_grad():
        assert torch.equal(output(model, case.inputs), found["bfloat16"])
    assert type(auto.from_config(AutoConfig.from_pretrained(root / name), trust_remote_code=True)) is cls
    model.save_pretrained(tmp_path)  # by transformers alone, and so without code
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in vars(load_checkpoint(str(root / name)).model.config)


def test_the_code_holds_what_is_in_use_and_nothing_else(root):
    source = (root / "hermite_3" / "modeling_hf_ortho.py").read_text()
    header, _ = source.split("from __future__")
    assert version("hf_ortho") in header
    assert "SPDX-License-Identifier: Apache-2.0" in header
    assert "class Hermite(" in source
    assert "Fourier" not in source
    assert "class Fourier(" not in (root / "clip" / "modeling_hf_ortho.py").read_text()
    assert (root / "again" / "clip" / "modeling_hf_ortho.py").read_text().count("class TropicalRational(") == 1
    assert get_imports(root / "clip" / "modeling_hf_ortho.py") == sorted(STANDARD | {"numpy", "torch", "transformers"})


def test_every_auto_class_of_the_config(root):
    auto_map = json.loads((root / "hermite_3" / "config.json").read_text())["auto_map"]
    assert auto_map.keys() >= {"AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    for auto, place in auto_map.items():
        expected = getattr(transformers, auto).from_config(
            transformers.GPT2Config(n_layer=0, n_embd=2, n_head=1, vocab_size=2)
        )
        assert place == f"modeling_hf_ortho.{type(expected).__name__}"
    assert json.loads((root / "native" / "config.json").read_text())["auto_map"] == auto_map


def test_what_cannot_carry_remote_code(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        add_remote_code(tmp_path)
    with pytest.raises(CheckpointError, match="none does not exist"):
        add_remote_code("none")
    gpt2("gelu_new").save_pretrained(tmp_path / "plain")
    before = sorted(path.name for path in (tmp_path / "plain").iterdir())
    with pytest.raises(ConfigError, match=r"plain has no learnable activations.*hf-ortho convert"):
        add_remote_code(tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == before
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no learnable activations"):
        enable_remote_code(gpt2("gelu_new"))
    two_heads = transformers.GPT2DoubleHeadsModel(gpt2("hermite_3").config)
    with pytest.raises(CheckpointError, match=r"no AutoModel class .* the class 'GPT2DoubleHeadsModel'"):
        enable_remote_code(two_heads)
    two_heads.save_pretrained(tmp_path / "heads")
    with pytest.raises(CheckpointError, match=r"no AutoModel class .* the class 'GPT2DoubleHeadsModel'"):
        add_remote_code(tmp_path / "heads")
    (tmp_path / "heads" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        add_remote_code(tmp_path / "heads")
