"""Conversions with groups of channels: the report, the refit, ``degree="auto"`` and the distillation."""

import json

import pytest
import torch

import hf_ortho
from hf_ortho.activations import FAMILIES
from hf_ortho.conversion import ConversionReport


@pytest.fixture
def model(gpt2):
    """GPT-2 whose channels differ: half of the pre-activations of each layer are negative, half positive."""
    model = gpt2(scale=4)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.bias.copy_(torch.where(torch.arange(len(block.mlp.c_fc.bias)) < 64, -1.0, 1.0))
    return model


def divergence(report):
    return sum(layer.fit.divergence for layer in report.layers)


@pytest.fixture
def batches(ids):
    return [{"input_ids": ids}, {"input_ids": ids.flip(1)}, {"input_ids": ids.flip(0)}]


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_bring_a_model_closer(model, batches, family):
    layer = divergence(hf_ortho.convert(model, f"{family}_2", calibration=batches))
    hf_ortho.revert(model)
    report = hf_ortho.convert(model, f"{family}_2_g2", calibration=batches)
    # the lines of a tropical polynomial have fixed slopes: a group can only move them
    assert divergence(report) < (1.0 if family == "tropical" else 0.9) * layer
    assert ConversionReport.from_dict(json.loads(report.to_json())).layers == report.layers


def test_the_table_shows_the_worst_and_the_median_group(model, batches):
    report = hf_ortho.convert(model, "hermite_3_g8", calibration=batches)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "worst group" in text
    assert "median group" in text
    for layer in report.layers:
        for index, error in (layer.fit.worst_group, layer.fit.median_group):
            assert f"{index}: {error:.1e}" in text
    assert "worst group its number, counted from 0, and its part of the KL" in " ".join(text.split())
    assert str(ConversionReport.from_dict(report.to_dict())) == text


def test_warnings_speak_of_the_domains_of_the_groups(model, batches):
    report = hf_ortho.convert(model, "hermite_3_g2", calibration=batches, domain=(-0.5, 0.5))
    assert len(report.warnings) == 2
    assert all("lie outside the domains of their groups" in line for line in report.warnings)


def test_a_refit_keeps_each_function(model, batches):
    hf_ortho.convert(model, "hermite_3_g2", calibration=batches)
    before = [block.mlp.act.whole() for block in model.transformer.h]
    report = hf_ortho.convert(model, "hermite_3_g4", calibration=batches)
    x = torch.linspace(-1.0, 1.0, 101).unsqueeze(1).expand(-1, 4)
    for old, block in zip(before, model.transformer.h, strict=True):
        torch.testing.assert_close(block.mlp.act(x), old(x), rtol=0, atol=5e-3)  # the search of the interval
    assert report.fidelity.divergence < 1e-6


@pytest.mark.slow
def test_the_smallest_degree_with_groups(model, batches):
    tolerance = divergence(hf_ortho.convert(model, "hermite_3_g2", calibration=batches)) / 2
    hf_ortho.revert(model)
    report = hf_ortho.convert(model, "hermite", degree="auto", groups=2, tolerance=tolerance, calibration=batches)
    degree = model.transformer.h[0].mlp.act.degree
    assert (report.activation, degree > 3) == (f"hermite_{degree}_g2", True)
    assert divergence(report) <= tolerance
    hf_ortho.revert(model)
    assert divergence(hf_ortho.convert(model, f"hermite_{degree - 1}_g2", calibration=batches)) > tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_of_groups(model, batches, family):
    report = hf_ortho.convert(model, f"{family}_2_g2", calibration=batches, distill=4)
    assert report.distillation.error_after <= report.distillation.error_before
    act = model.transformer.h[0].mlp.act
    parts = [
        m.measure("gelu_new", histogram=report.modules["transformer.h.0.mlp.act"][2].by_group()[i]).divergence
        for i, m in enumerate(act.members())
    ]
    assert report.layers[0].fit.divergence == pytest.approx(sum(parts), rel=1e-6)
