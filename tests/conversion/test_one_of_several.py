"""One of two processes converts alone, or waits in vain for the other and says so."""

import os

import pytest
import torch
from forked import by_rank

import hf_ortho

pytestmark = pytest.mark.slow  # ranks are forked

WORKER = """
import itertools, json, sys, time
from types import SimpleNamespace
import torch
import torch.distributed as dist
from peft import get_peft_model
import hf_ortho
from hf_ortho import processes
from hf_ortho.conversion import collect
from hf_ortho.errors import ProcessError
sys.path.insert(0, sys.argv[1])
from conftest import build_gpt2

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
ids = torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(1))
mine = [{"input_ids": ids[rank : rank + 1]}]
path = "transformer.h.0.mlp.act"
found = {}

def coefficients(model):
    return model.get_submodule(path).coefficients.tolist()

def refused(call):
    try:
        call()
    except ProcessError as error:
        return str(error)

if rank == 0:  # the other process is on its way to the barrier
    processes.time = SimpleNamespace(monotonic=itertools.count(0, 1000).__next__, sleep=time.sleep)
    model = build_gpt2(scale=20)
    found["refused"] = [
        refused(lambda: hf_ortho.convert(model, "hermite_3", calibration=mine)),
        refused(lambda: collect(model, [path], mine)),
    ]
    found["unchanged"] = type(model.get_submodule(path)).__name__
    hf_ortho.convert(model, "hermite_3")
    found["no data"] = coefficients(model)
    model = build_gpt2(scale=20)
    found["counts"] = int(collect(model, [path], mine, distributed=False)[path].counts.sum())
    report = hf_ortho.convert(model, "hermite_3", calibration=mine, distill=2, distributed=False)
    found["alone"], found["predictions"] = coefficients(model), report.fidelity.predictions
    adapted = get_peft_model(build_gpt2(scale=20), hf_ortho.peft.OrthoConfig(activation="hermite_3"))
    found["refused"].append(refused(lambda: hf_ortho.peft.calibrate(adapted, mine)))
    report = hf_ortho.peft.calibrate(adapted, mine, distributed=False)
    found["adapter"] = report.modules[path][0].coefficients.tolist()
    found["afterwards"] = processes.several_processes()
dist.barrier()
processes.time = time
model = build_gpt2(scale=20)
found["predictions of both"] = hf_ortho.convert(model, "hermite_3", calibration=mine).fidelity.predictions
found["both"] = coefficients(model)
print("FOUND", rank, json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory, forked):
    script = tmp_path_factory.mktemp("alone") / "worker.py"
    script.write_text(WORKER)
    return forked(2, script, os.path.dirname(__file__))


@pytest.fixture(scope="module")
def found(printed):
    return by_rank(printed)


@pytest.fixture(scope="module")
def batch():
    return torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(1))[:1]


def test_who_waits_names_the_missing_rank_and_the_remedy(found, printed):
    calls = ("convert with calibration", "conversion.collect", "peft.calibrate")
    for what, message in zip(calls, found[0]["refused"], strict=True):
        assert message == (
            f"hf_ortho.{what} waits for rank 1 of 2 processes, at most 1800 seconds (ddp_timeout): others may still be "
            "preparing data. In your own script, call it in all processes, each with its own batches, or pass "
            "distributed=False to use only the batches of this one"
        )
        assert f"note: {message}" in printed
    assert found[0]["unchanged"] == "NewGELUActivation"


def test_without_data_or_distributed_a_process_converts_alone(found, gpt2, batch):
    path = "transformer.h.0.mlp.act"
    for key, options in {"no data": {}, "alone": {"calibration": [batch], "distill": 2}}.items():
        model = gpt2(scale=20)
        hf_ortho.convert(model, "hermite_3", **options)
        assert found[0][key] == model.get_submodule(path).coefficients.tolist()
    histogram = hf_ortho.conversion.collect(gpt2(scale=20), [path], [batch])[path]
    assert found[0]["counts"] == histogram.counts.sum()
    assert found[0]["predictions"] == 32
    assert found[0]["afterwards"]


def test_an_adapter_is_fitted_alone(found, gpt2, batch):
    import peft

    adapted = peft.get_peft_model(gpt2(scale=20), hf_ortho.peft.OrthoConfig(activation="hermite_3"))
    report = hf_ortho.peft.calibrate(adapted, [batch])
    assert found[0]["adapter"] == report.modules["transformer.h.0.mlp.act"][0].coefficients.tolist()


def test_both_meet_after_the_attempts_of_one(found):
    assert found[0]["both"] == found[1]["both"] != found[0]["alone"]
    assert [each["predictions of both"] for each in found] == [64, 64]
