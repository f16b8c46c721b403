"""Two processes with different batches get the same activations, those of all batches together."""

import os

import pytest
import torch
from safetensors.torch import load_file

import hf_ortho

pytestmark = pytest.mark.slow  # ranks are forked

WORKER = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
import hf_ortho
sys.path.insert(0, sys.argv[1])
from conftest import build_gpt2

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
ids = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(1))
batches = [[{"input_ids": ids[:1], "labels": ids[:1]}], [{"input_ids": ids[1:], "labels": ids[1:]}]]
for steps in (0, 3):
    model = build_gpt2(scale=20)
    report = hf_ortho.convert(model, "hermite_5", calibration=batches[rank], distill=steps)
    fits = torch.tensor([[v.fit.minimum, v.fit.maximum, v.fit.rms_error] for v in report.layers])
    state = {k: v.contiguous() for k, v in model.state_dict().items() if ".act." in k}
    losses = torch.tensor([report.loss_before, report.loss_after])
    save_file(state | {"fits": fits, "losses": losses}, f"{sys.argv[2]}/{rank}.{steps}.safetensors")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, forked):
    """What both processes saved, by the steps of distillation."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "worker.py"
    script.write_text(WORKER)
    forked(2, script, os.path.dirname(__file__), folder)
    return {steps: [load_file(folder / f"{rank}.{steps}.safetensors") for rank in range(2)] for steps in (0, 3)}


@pytest.mark.parametrize("steps", [0, 3])
def test_all_processes_agree(ranks, steps):
    first, second = ranks[steps]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_fit_is_that_of_all_batches(ranks, gpt2, ids):
    found, _ = ranks[0]
    model = gpt2(scale=20)
    batches = [{"input_ids": part, "labels": part} for part in (ids[:1], ids[1:])]
    report = hf_ortho.convert(model, "hermite_5", calibration=batches)
    assert found["losses"].tolist() == pytest.approx([report.loss_before, report.loss_after], rel=1e-5)
    for row, layer in zip(found["fits"].tolist(), report.layers, strict=True):
        assert row == pytest.approx([layer.fit.minimum, layer.fit.maximum, layer.fit.rms_error], rel=1e-2)
    for key, value in model.state_dict().items():
        if ".act." in key:
            assert torch.allclose(found[key], value, rtol=1e-2, atol=1e-2), key
