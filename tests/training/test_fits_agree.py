"""Two processes whose fits differ, as on machines that round differently, train with those of the first."""

import pytest
from forked import by_rank

pytestmark = pytest.mark.slow  # ranks are forked

WORKER = """
import json
import torch
import torch.distributed as dist
from peft import get_peft_model
from types import SimpleNamespace
from transformers import GPT2Config, GPT2LMHeadModel
import hf_ortho
from hf_ortho.activations import LearnableActivation
from hf_ortho.training import LoraArguments, ModelArguments, add_adapter
from hf_ortho.training.assemble import _convert_first
from hf_ortho.training.scratch import build_model

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
original = LearnableActivation.fit

def fit(self, *args, **kwargs):
    report = original(self, *args, **kwargs)
    with torch.no_grad():
        self.coefficients.add_(0.25 * rank)
    return report

LearnableActivation.fit = fit
sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}

def coefficients(model):
    return [m.coefficients.tolist() for m in model.modules() if isinstance(m, LearnableActivation)]

found = {}
for case in ("converted", "adapter", "scratch", "convert", "OrthoConfig"):
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    arguments = ModelArguments(activation="hermite_3", calibration_samples=0, train="activations")
    if case == "converted":
        _convert_first(SimpleNamespace(model=model), arguments, None)
    elif case == "adapter":
        checkpoint = SimpleNamespace(model=model, merged=False, new_modules=(), commit=None)
        model = add_adapter(checkpoint, arguments, LoraArguments(), seed=0)
    elif case == "convert":
        hf_ortho.convert(model, "hermite_3")
    elif case == "OrthoConfig":
        model = get_peft_model(model, hf_ortho.peft.OrthoConfig(activation="hermite_3"))
    else:
        model, _ = build_model(GPT2LMHeadModel, config, "hermite_3", "gelu_new", 0)
    found[case] = coefficients(model)
print("FOUND", rank, json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory, forked):
    script = tmp_path_factory.mktemp("agree") / "worker.py"
    script.write_text(WORKER)
    return by_rank(forked(2, script))


@pytest.mark.parametrize("case", ["converted", "adapter", "scratch"])
def test_training_starts_from_the_fits_of_the_first(found, case):
    first, second = found
    assert len(first[case]) == 2
    assert first[case] == second[case] == first["convert"]


@pytest.mark.parametrize("case", ["convert", "OrthoConfig"])
def test_a_call_without_data_is_local(found, case):
    first, second = found
    assert first[case] == first["convert"]
    for mine, other in zip(first[case], second[case], strict=True):
        assert other == pytest.approx([value + 0.25 for value in mine])
