"""Conversions under ``torch.inference_mode``, whose tensors autograd cannot use."""

import copy

import pytest
import torch

import hf_ortho
from hf_ortho.conversion import collect


@pytest.fixture
def calibration(ids):
    with torch.inference_mode():
        return [ids.clone(), ids.flip(0)]


def test_batches_made_there_are_used_like_others(gpt2, calibration):
    model = gpt2()
    other = copy.deepcopy(model)
    with torch.inference_mode():
        found = hf_ortho.convert(model, "hermite_4", calibration=calibration)
        path = found.layers[0].module
        seen = collect(other, [path], calibration)[path]
    expected = hf_ortho.convert(other, "hermite_4", calibration=[batch.clone() for batch in calibration])
    assert found.weights == "fisher"
    assert found.fidelity == expected.fidelity
    assert found.fidelity.gradient_error is not None
    assert [layer.fit for layer in found.layers] == [layer.fit for layer in expected.layers]
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert seen.importance.sum() > 0


def test_weights_made_there_have_no_fisher_information(gpt2, calibration):
    with torch.inference_mode():
        report = hf_ortho.convert(gpt2(), "hermite_4", calibration=calibration)
    assert report.weights == "density"
    assert report.notes == ["no Fisher weights, since GPT2LMHeadModel was loaded under torch.inference_mode"]
    assert report.fidelity.kl < 1e-3
    assert report.fidelity.gradient_error is None
    expected = hf_ortho.convert(gpt2(), "hermite_4", calibration=calibration, weights="density")
    assert [layer.fit for layer in report.layers] == [layer.fit for layer in expected.layers]
    assert expected.notes == []
