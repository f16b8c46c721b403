import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import AutoModelForCausalLM

from hf_ortho.activations import LearnableActivation

SCRIPT = Path(__file__).parents[2] / "recipes" / "accelerate_loop.py"


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its device for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_the_example_trains_and_saves_what_reloads(gpt2_folder, text_file, tmp_path, monkeypatch, capsys):
    flags = [gpt2_folder, tmp_path / "out", "--data", text_file, "--steps", 2, "--activation", "hermite_3", "--cpu"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
    names = runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "step 2 loss" in capsys.readouterr().out
    assert [group["initial_lr"] for group in names["groups"]] == [1e-4, 1e-4, 1e-3]
    trained = names["model"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = reloaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())
    assert sum(isinstance(m, LearnableActivation) and m.name == "hermite_3" for m in reloaded.modules()) == 2
