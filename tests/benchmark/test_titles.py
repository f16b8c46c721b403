"""The tables of ``hf-ortho bench``."""

import pytest

from hf_ortho.benchmark import FULL, QUICK, SECTIONS, BenchResults, Figure, SpeedTarget, check
from hf_ortho.benchmark.report import case_table, explanation, plan, reference, sentences, targets_table

CASES = [(device, case) for device, sections in SECTIONS.items() for case in sections]


@pytest.mark.parametrize("settings", [FULL, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize(("device", "case"), CASES)
def test_titles_are_plain_text_on_one_line_of_a_terminal(device, case, settings):
    title, _, _ = case_table(BenchResults(), case, settings.on(device))
    assert not set("{}[]'") & set(title)
    assert len(title) <= 80


def test_titles_name_the_sizes():
    found = [case_table(BenchResults(), case, FULL)[0] for case in ("gpt2", "convnext", "generation")]
    assert found == [
        "GPT-2, 4 layers of width 512: training step on 4 x 256 tokens, no optimizer",
        "ConvNeXt, depths 1-1-2-1: training step on 8 images of 128 x 128, no optimizer",
        "GPT-2, 4 layers of width 512: 64 tokens with transformers, greedy, with cache",
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_explanation_fits_80_columns(device):
    assert [line for line in explanation(FULL.on(device)).splitlines() if len(line) > 80] == []


def test_a_table_of_activations_has_ratios_to_a_named_reference():
    rows = [("F.gelu", 0.004, 1.0), ("hermite_3", 0.006, 1.5), ("floor of hermite_3", 0.005, 1.25)]
    figures = [Figure("sequence", name, "forward + backward", value, ratio, 0.1) for name, value, ratio in rows]
    figures += [Figure("sequence", name, "peak", 8.0 * ratio, ratio) for name, _, ratio in rows]
    results = BenchResults(figures)
    assert case_table(results, "sequence", FULL) == (
        "activations on 8 x 1024 x 3072",
        ["", "+ backward", "peak"],
        [["F.gelu", "1.00 ± 0.05", "1.00"], ["hermite_3", "1.50 ± 0.05", "1.50"]],
    )
    assert reference(results, "sequence") == ["1.00 is F.gelu: + backward 4 ms, peak 8 B/elem"]
    assert reference(results, "decode") == []


def test_a_floor_above_a_target_is_its_limit():
    figures = [
        Figure("image", "hermite_3", "forward", 1.0, 1.5),
        Figure("image", "floor of hermite_3", "forward", 1.0, 1.4),
    ]
    outcomes = check(BenchResults(figures), "cpu", [SpeedTarget("cpu", "image", "hermite_3", "forward", 1.2)])
    assert sentences(outcomes) == [
        "missed: image: hermite_3, forward: target 1.2, measured 1.50, "
        "missed by 7%, relative to the measured floor of 1.40"
    ]
    assert targets_table(outcomes)[2] == [["image: hermite_3, forward", "1.40*", "1.50", "missed by 7%"]]


def test_targets_that_were_not_run_are_counted():
    assert sentences(check(BenchResults(), "cpu"))[0].startswith(
        "targets that were not run: 30 of sequence, 30 of image"
    )


def test_a_long_plan_says_how_to_measure_less():
    lines = plan(SECTIONS["cpu"], [], float("inf"))
    assert lines[0].endswith("; about 14 min in all")
    assert lines[1] == "For less: --sections NAME ..., or --budget SECONDS for the most important"
