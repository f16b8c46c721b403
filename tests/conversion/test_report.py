"""The report of a conversion: warnings, JSON, the saved file, the picture, and paths made short."""

import copy
import dataclasses
import json

import pytest
from transformers import BertConfig, BertForMaskedLM

import hf_ortho
from hf_ortho.path_patterns import by_kind, split_shared


@pytest.fixture
def report(gpt2, ids):
    return hf_ortho.convert(gpt2(scale=20), "hermite_8", calibration=[{"input_ids": ids, "labels": ids}])


def with_fit(report, **values):
    """The report with other figures in its first layer."""
    changed = copy.copy(report)
    first, *others = report.layers
    changed.layers = [dataclasses.replace(first, fit=dataclasses.replace(first.fit, **values)), *others]
    return changed


@pytest.mark.parametrize(
    ("mass", "outside", "rms", "warns"),
    [
        (2e-3, 0.5, 0.03, True),
        (0.9e-3, 0.5, 0.02, False),  # too few
        (2e-3, 9e-4, 4e-5, False),  # too small an error
        (0.1, 2e-3, 1e-2, False),  # not where the error is
    ],
)
def test_a_warning_names_the_layer_and_the_error_outside(report, mass, outside, rms, warns):
    changed = with_fit(report, mass_outside=mass, rms_error_outside=outside, rms_error=rms)
    assert report.warnings == []
    if not warns:
        assert changed.warnings == []
        return
    (line,) = changed.warnings
    assert line.startswith(f"transformer.h.0.mlp.act: {mass:.2%}")
    assert f"{outside:.1e}" in line
    assert "warning: transformer.h.0.mlp.act" in str(changed)
    assert changed.to_dict()["warnings"] == [line]


def test_bad_tails_warn(gpt2, ids):
    # Pre-activations reach far beyond a domain that is much too small for the degree.
    report = hf_ortho.convert(gpt2(scale=20), "hermite_8", calibration=[ids], domain=(-0.5, 0.5))
    assert len(report.warnings) == 2
    assert report.warnings[1].startswith("transformer.h.1.mlp.act")


@pytest.mark.parametrize(
    ("mass", "rms", "warns"),
    [(0.45, 1e-3, True), (0.29, 1e-3, False), (0.45, 1e-9, False)],  # the last is exact outside, as for ReLU
)
def test_unlike_calibration_data_warn_once(report, mass, rms, warns):
    changed = with_fit(report, mass_outside=mass, rms_error=rms, rms_error_outside=0.0)
    lines = [line for line in changed.summary() if "unlike what the model sees" in line]
    assert len(lines) == warns
    if warns:
        assert lines[0].startswith("warning: 45% of the pre-activations of transformer.h.0.mlp.act lie outside")
        assert lines[0] in changed.remarks()
        assert changed.warnings == []


def test_without_data_it_says_how_to_calibrate_and_shows_equal_rows_once(gpt2, report):
    plain = hf_ortho.convert(gpt2(n_layer=4), "hermite_8")
    (line,) = [line for line in plain.summary() if line.startswith("not calibrated")]
    assert "calibration=[inputs, ...]" in line
    assert "--calibration-data" in line
    (table,) = plain.tables()
    assert table.row_count == 1
    rows = [row.split() for row in str(plain).splitlines() if "layers)" in row]
    assert rows == [["0..3", "(4", "layers)", *plain.layers[0].cells()[1:2], *plain.layers[0].cells()[3:]]]
    assert not any("not calibrated" in line for line in report.summary())
    assert report.tables()[0].row_count == 2


def test_json(report, tmp_path):
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["layers"][1]["module"] == "transformer.h.1.mlp.act"
    assert data["layers"][1]["domain"] == list(report.layers[1].fit.domain)
    assert (data["output_error"], data["noise_floor"]) == (report.output_error, None)
    assert data["loss_after"] == pytest.approx(data["loss_before"], rel=1e-3)
    report.save(tmp_path)
    assert json.loads((tmp_path / "conversion.json").read_text()) == data


def test_unbounded_domains_are_valid_json(gpt2):
    report = hf_ortho.convert(gpt2(), "tropical_rational_2")
    assert json.loads(report.to_json())["layers"][0]["domain"] == [None, None]


def test_plot(report, tmp_path):
    report.plot(tmp_path / "shapes.png")
    assert (tmp_path / "shapes.png").read_bytes().startswith(b"\x89PNG")
    assert [path for path in tmp_path.iterdir()] == [tmp_path / "shapes.png"]


def test_long_paths_fit_100_columns():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = str(hf_ortho.convert(BertForMaskedLM(BertConfig(vocab_size=97, **sizes)), "hermite_4"))
    assert max(map(len, text.splitlines())) <= 100
    for place in (
        "bert.encoder.layer.*.intermediate.intermediate_act_fn",
        "cls.predictions.transform.transform_act_fn",
    ):
        assert f"at {place}\n" in text.replace(" \n", "\n")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.act"], {"a.act": [("*", "a.act")]}),
        (["h.0.act", "h.10.act"], {"h.*.act": [("0", "h.0.act"), ("10", "h.10.act")]}),
        (
            ["s.0.b.0.act", "s.0.b.1.act", "s.1.b.0.act"],
            {"s.*.act": [("0.b.0", "s.0.b.0.act"), ("0.b.1", "s.0.b.1.act"), ("1.b.0", "s.1.b.0.act")]},
        ),
        (["a.act", "a.0.act"], {"a.act": [("*", "a.act")], "a.0.act": [("*", "a.0.act")]}),
        (
            ["h.0.a", "x.b", "h.1.a"],
            {"h.*.a": [("0", "h.0.a"), ("1", "h.1.a")], "x.b": [("*", "x.b")]},
        ),
    ],
)
def test_paths_by_kind(paths, expected):
    assert by_kind(paths) == expected


@pytest.mark.parametrize(
    "paths", [["a.act", "a.a.act"], ["l.0.activation", "l.0.layer.0.activation"], ["x", "x.y"], ["a.b", "c.d"]]
)
def test_what_paths_share_and_what_not_give_the_paths(paths):
    pattern, rows = split_shared(paths)
    assert [pattern.replace("*", row) for row in rows] == paths
