"""Two processes with different batches get the same activations, those of all batches together."""

import json
import os

import numpy as np
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
from no_backward import NoBackward

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
ids = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(1))
batches = [[{"input_ids": ids[:1], "labels": ids[:1]}], [{"input_ids": ids[1:], "labels": ids[1:]}]]
for case, options in {"density": {"weights": "density"}, "fisher": {}, "distilled": {"distill": 3}}.items():
    model = build_gpt2(scale=20)
    report = hf_ortho.convert(model, "hermite_5", calibration=batches[rank], **options)
    fits = torch.tensor([[v.fit.minimum, v.fit.maximum, v.fit.rms_error] for v in report.layers])
    state = {k: v.contiguous() for k, v in model.state_dict().items() if ".act." in k}
    f = report.fidelity
    assert (f.held_out, f.predictions) == (False, 128)
    predicted = sum(v.fit.divergence or 0 for v in report.layers)
    figures = [f.kl, f.top1, f.output_error, f.loss_before, f.loss_after, predicted]
    figures = torch.tensor(figures, dtype=torch.float64)
    save_file(state | {"fits": fits, "figures": figures}, f"{sys.argv[2]}/{rank}.{case}.safetensors")

from hf_ortho.conversion import Histogram
found = {}
for case, groups in {"both": 1, "second": 1, "groups": 4, "groups of the second": 4}.items():
    x = torch.linspace(-3, 3, 100).view(5, 20) + rank
    histogram = Histogram(groups)
    if rank or "second" not in case:
        histogram.update(x)
        histogram.weigh(x, x / 10)
    histogram.reduce(torch.device("cpu"))
    found[f"{case}.counts"] = torch.from_numpy(histogram.counts)
    found[f"{case}.importance"] = torch.from_numpy(histogram.importance)
    found[f"{case}.extremes"] = torch.tensor([histogram.minimum, histogram.maximum])
    members = histogram.by_group()
    found[f"{case}.members"] = torch.tensor([(v.minimum, v.maximum, v.counts.sum()) for v in members])
save_file(found, f"{sys.argv[2]}/{rank}.histogram.safetensors")

model = build_gpt2(scale=20)
if rank:
    model.transformer.ln_f.register_forward_hook(lambda module, args, output: NoBackward.apply(output))
report = hf_ortho.convert(model, "hermite_3", calibration=batches[rank])
with open(f"{sys.argv[2]}/{rank}.report.json", "w") as file:
    file.write(report.to_json())
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, forked):
    """What both processes saved, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "worker.py"
    script.write_text(WORKER)
    forked(2, script, os.path.dirname(__file__), folder)
    names = ("density", "fisher", "distilled", "histogram")
    found = {name: [load_file(folder / f"{rank}.{name}.safetensors") for rank in range(2)] for name in names}
    return found | {"reports": [json.loads((folder / f"{rank}.report.json").read_text()) for rank in range(2)]}


@pytest.mark.parametrize("case", ["density", "fisher", "distilled", "histogram"])
def test_all_processes_agree(ranks, case):
    first, second = ranks[case]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("weights", ["density", "fisher"])
def test_the_fit_is_that_of_all_batches(ranks, weights, gpt2, ids):
    found, _ = ranks[weights]
    model = gpt2(scale=20)
    report = hf_ortho.convert(model, "hermite_5", calibration=[ids], weights=weights)
    f, predicted = report.fidelity, sum(layer.fit.divergence or 0 for layer in report.layers)
    expected = [f.kl, f.top1, f.output_error, f.loss_before, f.loss_after]
    # With Fisher weights, each process draws directions of its own: the fits differ a little.
    assert found["figures"][:5].tolist() == pytest.approx(expected, rel={"density": 1e-3, "fisher": 5e-2}[weights])
    assert found["figures"][5].item() == pytest.approx(predicted, rel=0.3)
    for row, layer in zip(found["fits"].tolist(), report.layers, strict=True):
        assert row == pytest.approx([layer.fit.minimum, layer.fit.maximum, layer.fit.rms_error], rel=1e-2)
    x = torch.linspace(-4, 4, 201)
    for path in (layer.module for layer in report.layers):
        other = hf_ortho.activations.build("hermite_5")
        state = {k.removeprefix(f"{path}."): v for k, v in found.items() if k.startswith(path)}
        other.load_state_dict(state)
        module = model.get_submodule(path)
        if weights == "density":
            for key, value in module.state_dict().items():
                assert torch.allclose(state[key], value, rtol=1e-2, atol=1e-2), key
        with torch.no_grad():
            assert (other(x) - module(x)).abs().max() < {"density": 2e-3, "fisher": 2e-2}[weights]


@pytest.mark.parametrize("case", ["both", "second", "groups", "groups of the second"])
def test_histograms_of_all_processes_are_summed(ranks, case):
    found, _ = ranks["histogram"]
    x = torch.linspace(-3, 3, 100)
    x = x + 1 if "second" in case else torch.cat([x, x + 1])
    edges = np.linspace(-np.arcsinh(2.0**16), np.arcsinh(2.0**16), 1025)
    g = torch.cat([part / 10 for part in x.split(100)]).double().numpy()
    importance, _ = np.histogram(np.arcsinh(x.double().numpy()), edges, weights=g**2)
    assert found[f"{case}.counts"].sum() == len(x)
    np.testing.assert_allclose(found[f"{case}.importance"].numpy(), importance, rtol=1e-5, atol=1e-12)
    assert found[f"{case}.extremes"].tolist() == [x.min().item(), x.max().item()]
    members = x.view(-1, 20).tensor_split(4 if "groups" in case else 1, dim=1)
    expected = [[v.min().item(), v.max().item(), v.numel()] for v in members]
    np.testing.assert_allclose(found[f"{case}.members"], expected, rtol=1e-6)


def test_all_processes_use_densities_if_one_has_no_backward_pass(ranks):
    reports = ranks["reports"]
    assert [report["weights"] for report in reports] == ["density", "density"]
    assert "since the backward pass fails in another process" in reports[0]["notes"][0]
    assert "GPT2LMHeadModel fails: this kernel has no backward pass" in reports[1]["notes"][0]
    first, second = (report["layers"] for report in reports)
    assert first == second
    assert {layer["divergence"] for layer in first} == {None}
