"""The tables of ``hf-ortho bench``."""

import pytest

from hf_ortho.benchmark import FULL, QUICK, SECTIONS, BenchResults
from hf_ortho.benchmark.report import case_table

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
