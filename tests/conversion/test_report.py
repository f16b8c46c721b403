"""The report of a conversion: warnings, JSON, the saved file, the picture, and paths made short."""

import copy
import dataclasses
import json
import math
import re

import pytest
from transformers import BertConfig, BertForMaskedLM

import hf_ortho
from hf_ortho.conversion import ConversionReport
from hf_ortho.conversion.fidelity import Fidelity
from hf_ortho.conversion.report_text import cells, remarks, summary
from hf_ortho.path_patterns import by_kind, split_shared
from hf_ortho.text import number


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
    lines = [line for line in summary(changed) if "unlike what the model sees" in line]
    assert len(lines) == warns
    if warns:
        assert lines[0].startswith("warning: 45% of the pre-activations of transformer.h.0.mlp.act lie outside")
        assert lines[0] in remarks(changed)
        assert changed.warnings == []


def test_without_data_it_says_how_to_calibrate_and_shows_equal_rows_once(gpt2, report):
    plain = hf_ortho.convert(gpt2(n_layer=4), "hermite_8")
    (line,) = [line for line in summary(plain) if line.startswith("not calibrated")]
    assert "calibration=[inputs, ...]" in line
    assert "--calibration-data" in line
    rows = [row.split() for row in str(plain).splitlines() if row.startswith(" 0..3")]
    found = cells(plain.layers[0])
    assert rows == [["0..3", *found[:3], *found[4:6]]]  # without sup f' and seen
    assert "All 4 layers are alike" in str(plain).splitlines()
    assert not any("not calibrated" in line for line in summary(report))
    assert rows_of(str(report)) == ["0", "1"]


def rows_of(text):
    """The first cells of the rows of layers."""
    return [line.split()[0] for line in text.splitlines() if re.fullmatch(r"\s*\d+ .*\.\..*", line)]


def test_the_comparison_comes_first(report, ids):
    head, text = str(report).split("Compared", 1)
    f = report.fidelity
    first, head = head.split("\n", 1)
    before, after = math.exp(f.loss_before), math.exp(f.loss_after)
    relative = number(math.exp(f.loss_after - f.loss_before) - 1, "+.3%")
    assert first == f"hermite_8: perplexity {before:.5g} -> {after:.5g} ({relative}) on 128 predictions"
    assert head.startswith("2 activations of GPT2LMHeadModel converted to hermite_8 in ")
    assert " ".join(head.split()).endswith("calibrated, Fisher weights)")
    second, *lines = f"Compared{text}".splitlines()
    assert second == "Compared with the source model on 128 predictions (the only calibration batch):"
    shown = dict(line.strip().split("  ", 1) for line in lines[: lines.index("")])
    assert {name: value.strip() for name, value in shown.items()} == {
        "KL(source || converted)": f"{f.kl:.1e} nats per prediction",
        "perplexity": f"{before:.5g} -> {after:.5g} ({relative})",
        "same most likely class": f"{f.top1:.2%}",
        "relative error of the output": f"{f.output_error:.1e}",
        "relative error of the gradient": f"{f.gradient_error:.1e} (1 - cosine: {1 - f.gradient_cosine:.1e})",
    }


def test_other_comparisons(report):
    changed = copy.copy(report)
    changed.fidelity = Fidelity(3000, True, None, None, 0.012, 1.5, 1.5 - 1e-9, rounding=1e-6)
    text = str(changed)
    assert text.startswith("hermite_8: output within 1.20% of the source model on 3,000 held-out predictions\n")
    assert "on 3,000 predictions (held-out calibration data):" in text
    assert "1.50000 -> 1.50000 (-1.0e-09)" in text
    assert re.search(r"from rounding alone +error of the output 1\.0e-03\n", text)
    legend = "error^2 squared relative error of the output, expected from the errors of this layer alone"
    assert legend in " ".join(text.split())
    assert "KL" not in text
    assert "gradient" not in text
    changed.fidelity = dataclasses.replace(changed.fidelity, kl=2e-5, top1=0.987, loss_before=None)
    assert re.search(r"from rounding alone +KL 1\.0e-06\n", str(changed))
    assert str(changed).startswith("hermite_8: most likely class as before in 98.70% of 3,000 held-out predictions\n")
    assert "1.50000" not in str(changed)


def test_without_data_there_is_no_comparison(gpt2):
    plain = hf_ortho.convert(gpt2(), "hermite_8")
    assert (plain.fidelity, plain.weights) == (None, None)
    first, *rest = str(plain).splitlines()
    assert first == f"hermite_8 follows gelu_new with an rms error of {plain.layers[0].fit.rms_error:.1e}"
    assert " ".join(rest).split("not calibrated", 1)[0].startswith("2 activations of GPT2LMHeadModel")
    assert "Compared" not in str(plain)
    assert "KL" not in str(plain)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fisher", "density"])
def test_the_five_layers_with_the_largest_errors(gpt2, ids, weights):
    report = hf_ortho.convert(gpt2(n_layer=7, scale=20), "tropical_2", calibration=[ids], weights=weights)
    errors = [getattr(v.fit, {"fisher": "divergence", "density": "rms_error"}[weights]) for v in report.layers]
    worst = sorted(range(7), key=lambda i: -errors[i])[:5]
    assert rows_of(str(report)) == [str(i) for i in worst]
    text = " ".join(str(report).split())
    assert "at transformer.h.*.mlp.act The 5 layers of 7 with the largest errors (--verbose for all)" in text
    assert rows_of(report.text(verbose=True)) == [str(i) for i in range(7)]
    assert "with the largest errors" not in report.text(verbose=True)
    five = hf_ortho.convert(gpt2(n_layer=5, scale=20), "tropical_2", calibration=[ids], weights=weights)
    assert rows_of(str(five)) == [str(i) for i in range(5)]
    for shown in (str(report), report.text(verbose=True)):
        assert ("expected from the errors of this layer alone" in " ".join(shown.split())) == (weights == "fisher")
        assert "sup f largest difference of f from the source activation" in " ".join(shown.split())
        assert "rms f root mean square difference, weighted by the data" in " ".join(shown.split())
        assert max(map(len, shown.splitlines())) <= 80


def test_zero_has_no_sign(report):
    changed = with_fit(report, domain=(-0.001, 0.001), tail_slopes=(-1e-9, -0.0), minimum=-0.01, maximum=-0.02)
    changed.fidelity = dataclasses.replace(report.fidelity, loss_after=report.fidelity.loss_before - 1e-9)
    assert "0.00..0.00" in str(changed)
    assert "(0.000%)" in str(changed)
    assert not re.search(r"[-+]0(\.0*)?(?![.\d])", str(changed))


def test_any_text_fits_80_columns(report):
    changed = copy.copy(report)
    changed.model = "/tmp/" + "a/long/path " * 20
    changed.notes = ["a note " * 30]
    changed.left_alone = [("field", "why " * 40)]
    changed = with_fit(changed, mass_outside=0.5, rms_error_outside=0.5, rms_error=0.4)
    assert max(map(len, str(changed).splitlines())) <= 80


def test_json(report, tmp_path):
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["layers"][1]["module"] == "transformer.h.1.mlp.act"
    assert data["layers"][1]["domain"] == list(report.layers[1].fit.domain)
    assert data["layers"][1]["divergence"] == report.layers[1].fit.divergence > 0
    assert data["fidelity"] == dataclasses.asdict(report.fidelity)
    assert ConversionReport.from_dict(data | {"more": 1}) == dataclasses.replace(report, modules={})
    report.save(tmp_path)
    assert json.loads((tmp_path / "conversion.json").read_text()) == data


def test_unbounded_domains_are_valid_json(gpt2):
    report = hf_ortho.convert(gpt2(), "tropical_rational_2")
    assert json.loads(report.to_json())["layers"][0]["domain"] == [None, None]


def test_plot(report, tmp_path):
    report.plot(tmp_path / "shapes.png")
    assert (tmp_path / "shapes.png").read_bytes().startswith(b"\x89PNG")
    assert [path for path in tmp_path.iterdir()] == [tmp_path / "shapes.png"]


def test_long_paths_fit_80_columns():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = str(hf_ortho.convert(BertForMaskedLM(BertConfig(vocab_size=97, **sizes)), "hermite_4"))
    assert max(map(len, text.splitlines())) <= 80
    for place in (
        "bert.encoder.layer.*.intermediate.intermediate_act_fn",
        "cls.predictions.transform.transform_act_fn",
    ):
        assert f"at {place}\n" in text.replace("at\n  ", "at ")


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
