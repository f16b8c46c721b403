"""Tables and plots of made-up results, as of a GPU."""

import math

import pytest
from matplotlib.image import imread

from hf_ortho.benchmark import FULL, QUICK, SECTIONS, TARGETS, BenchResults, Figure, NotRun, plot_results, report

CUDA = FULL.on("cuda")


@pytest.mark.parametrize("device", SECTIONS)
def test_every_section_has_a_title(device):
    for case in SECTIONS[device]:
        title, columns, rows = report.case_table(BenchResults(), case, FULL.on(device))
        assert "{" not in title.replace("{'", "")
        assert (columns, rows) == ([""], [])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_target_is_of_a_section(target):
    assert target.case in SECTIONS[target.device]


def test_bandwidth():
    """8 x 1024 x 3072 x 2 bytes: two tensors in 50 us, five in 120 us."""
    results = BenchResults()
    for row, times in (("copy", (50e-6, 120e-6)), ("hermite_3", (100e-6, 160e-6))):
        for measure, seconds in zip(("forward", "forward + backward"), times, strict=True):
            results.figures.append(Figure("sequence", row, measure, seconds, 1.0, 0.0))
    assert report.has_bandwidth(results, "sequence")
    assert not report.has_bandwidth(results, "image")
    _, _, rows = report.bandwidth_table(results, "sequence", CUDA)
    size = math.prod(CUDA.sequence) * 2
    rates = [f"{tensors * size / t / 1e9:.4g}" for tensors, t in ((2, 50e-6), (5, 120e-6), (2, 100e-6), (5, 160e-6))]
    assert rows == [["copy", rates[0], "100%", rates[1], "100%"], ["hermite_3", rates[2], "50%", rates[3], "75%"]]


def test_training_steps():
    results = BenchResults()
    for row, seconds in (("gelu", 0.080), ("hermite_3", 0.064)):
        results.figures += [
            Figure("gpt2_eager", row, "step", seconds, seconds / 0.080, 0.0),
            Figure("gpt2_eager", row, "speed", 16384 / seconds, 0.080 / seconds),
            Figure("gpt2_eager", row, "peak", 21e9, 1.0),
        ]
    _, columns, rows = report.case_table(results, "gpt2_eager", CUDA)
    assert columns == ["", "step", "ms", "speed", "ktokens/s", "peak", "MB"]
    assert rows[1] == ["hermite_3", "0.80 ± 0.00", "64", "1.25", "256", "1.00", "21000"]


def test_failures_and_what_was_left_out():
    results = BenchResults()
    results.not_run += [NotRun("degree", f"hermite_{n}", "out of registers", failed=True) for n in (24, 32)]
    results.not_run += [NotRun("degree", "fourier_32", "skipped"), NotRun("image", "", "no driver", failed=True)]
    assert report.not_run(results, "degree") == [
        "hermite_24, hermite_32: failed: out of registers",
        "fourier_32: skipped, not run",
    ]
    assert report.not_run(results, "image") == ["image: failed: no driver"]


def test_a_gpu_gets_sizes_of_its_own():
    assert CUDA.elements[-1] > 2**31
    assert all(n % 16 == 0 for n in (*CUDA.elements, CUDA.degree_elements))  # kernels load aligned vectors
    assert QUICK.on("cuda").elements == QUICK.elements
    assert FULL.on("cpu") is FULL


def test_a_plot_of_some_sections(tmp_path):
    """Also of one that failed after its first measure, and of none that is drawn."""
    plot_results(BenchResults(), CUDA, TARGETS, tmp_path / "none.png")
    assert imread(tmp_path / "none.png").shape[0] < 100
    figures = [Figure("degree", row, "forward", 1e-3, 1.0, 0.0) for row in ("F.gelu", "hermite_3")]
    figures += [Figure("elements", f"{row} 1000", "forward", 1e-3, 1.0, 0.0) for row in ("F.gelu", "hermite_8")]
    figures += [Figure("gpt2_compiled", row, "step", 0.1, 1.0, 0.0) for row in ("gelu", "hermite_3")]
    plot_results(BenchResults(figures), CUDA, TARGETS, tmp_path / "bench.png")
    assert imread(tmp_path / "bench.png").std() > 0
