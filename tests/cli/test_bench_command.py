"""``hf-ortho bench``: the quick run, the check, and what is refused before anything is measured."""

import dataclasses
import json
import math
import os

import pytest
import torch
from matplotlib.image import imread

import hf_ortho.benchmark
import hf_ortho.cli.bench
from hf_ortho.benchmark import QUICK, SECTIONS, TARGETS, BenchResults, Figure, NotRun, Section, within


@pytest.fixture(scope="module")
def quick(hf_ortho_command, tmp_path_factory):
    """What the quick run printed, its JSON, and the folder of its files."""
    folder = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    ran = hf_ortho_command("bench", "--quick", "--json", folder / "bench.json", "--plot", folder / "bench.png")
    assert (ran.code, ran.err) == (0, "")
    assert torch.get_num_threads() == threads
    return ran, json.loads((folder / "bench.json").read_text()), folder


@pytest.fixture
def measured(monkeypatch):
    """``measured(1.2)``: the command finds each target's ratio to be 1.2 of its limit."""

    def measured(factor):
        figures = [Figure(t.case, t.row, t.measure, 1.0, t.limit * factor) for t in TARGETS if t.device == "cpu"]
        monkeypatch.setattr(hf_ortho.cli.bench, "measure", lambda *args: BenchResults(figures))

    return measured


@pytest.fixture
def nothing_measured(monkeypatch):
    def fail(*args):
        raise AssertionError("measured in spite of a mistake")

    monkeypatch.setattr(hf_ortho.cli.bench, "measure", fail)


@pytest.mark.slow
def test_figures(quick):
    _, found, _ = quick
    absent = {entry["case"] for entry in found["not_run"] if "not installed" in entry["reason"]} & {"vllm"}
    assert {figure["case"] for figure in found["figures"]} == set(SECTIONS["cpu"]) - absent
    for figure in found["figures"]:
        assert 0 < figure["value"] < math.inf, figure
        assert 0 < figure["ratio"] < math.inf, figure
        timed = figure["measure"] not in ("saved", "kept", "peak", "speed")
        assert (figure["spread"] is not None) == timed
    keys = [(figure["case"], figure["row"], figure["measure"]) for figure in found["figures"]]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
def test_every_target_has_a_figure_or_a_reason(quick):
    _, found, _ = quick
    known = {(figure["case"], figure["row"], figure["measure"]) for figure in found["figures"]}
    left_out = {(entry["case"], entry["row"]) for entry in found["not_run"]}
    for target in TARGETS:
        if target.case not in ("gpt2_eager", "gpt2_compiled"):  # see tests/benchmark/test_gpt2_case.py
            assert (target.case, target.row, target.measure) in known or (target.case, target.row) in left_out, target
            assert target.over is None or (target.case, target.over, target.measure) in known


@pytest.mark.slow
def test_saved_by_known_functions(quick):
    _, found, _ = quick
    saved = {(f["case"], f["row"]): f for f in found["figures"] if f["measure"] == "saved"}
    for case in ("sequence", "image"):
        for row, tensors in (("F.gelu", 1), ("silu", 1), ("copy", 1), ("gelu_new", 4)):
            assert (saved[case, row]["value"], saved[case, row]["ratio"]) == (4 * tensors, tensors)


@pytest.mark.slow
def test_kept_by_gpt2(quick):
    """A layer keeps four tensors of (tokens, 4 d) for gelu_new, and its output for the projection that follows."""
    _, found, _ = quick
    kept = next(f for f in found["figures"] if (f["case"], f["row"], f["measure"]) == ("gpt2", "gelu_new", "kept"))
    wide = math.prod(QUICK.gpt2_batch) * 4 * QUICK.gpt2["n_embd"]
    assert kept["value"] > QUICK.gpt2["n_layer"] * 5 * 4 * wide
    peak = next(f for f in found["figures"] if (f["case"], f["row"], f["measure"]) == ("gpt2", "gelu_new", "peak"))
    assert peak["value"] > kept["value"]


@pytest.mark.slow
def test_settings_and_environment(quick, hf_ortho_command):
    _, found, _ = quick
    assert found["settings"] == json.loads(json.dumps(QUICK.to_dict()))
    assert found["settings"]["dtype"] == "float32"
    environment = json.loads(hf_ortho_command("env", "--json").out)
    assert found["environment"] == environment | {"threads": 1}
    assert found["command"].startswith("hf-ortho bench --quick --json ")
    assert found["seconds"].keys() == SECTIONS["cpu"].keys()


@pytest.mark.slow
def test_printed(quick):
    ran, found, folder = quick
    lines = ran.out.splitlines()
    for figure in found["figures"]:
        if figure["case"] == "elements" and figure["spread"] is not None:
            line = next(line for line in lines if line.strip().startswith(f"{figure['row']} "))
            assert f"{figure['ratio']:.2f} ± {figure['spread'] / 2:.2f}" in line
    copy = next(f for f in found["figures"] if (f["case"], f["row"], f["measure"]) == ("image", "copy", "forward"))
    moved = 2 * 4 * math.prod(QUICK.image)
    bandwidths = [line.split() for line in lines if line.startswith(" copy ") and line.count("100%") == 2]
    assert bandwidths[1][1:3] == [f"{moved / copy['value'] / 1e9:.4g}", "100%"]  # after that of sequence
    assert any(line.endswith("compiled: skipped by --quick, not run") for line in lines)
    assert not any("<=" in line for line in lines)
    assert f"Wrote {folder / 'bench.json'}" in lines


@pytest.mark.slow
def test_plot(quick):
    _, _, folder = quick
    assert imread(folder / "bench.png").std() > 0
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.png"]


@pytest.mark.parametrize(("factor", "code"), [(0.9, 0), (1.14, 0), (1.16, 1)])
def test_check(hf_ortho_command, measured, factor, code):
    measured(factor)
    ran = hf_ortho_command("bench", "--check")
    assert (ran.code, ran.err) == (code, "")
    count = sum(target.device == "cpu" for target in TARGETS)
    missed = count if code else 0
    assert f"{missed} of {count} targets are missed by more than 15% or not run" in ran.out.splitlines()
    line = "missed: generation: hermite_8, generate: target 1.03, measured 1.19, missed by 16%"
    assert (line in ran.out.splitlines()) == bool(code)


def test_without_check_a_missed_target_is_only_reported(hf_ortho_command, measured):
    measured(2.0)
    ran = hf_ortho_command("bench")
    assert ran.code == 0
    assert "missed by 100%" in ran.out
    assert "missed: " not in ran.out


def test_results_are_written_before_the_check_fails(hf_ortho_command, measured, tmp_path):
    measured(2.0)
    assert hf_ortho_command("bench", "--check", "--json", tmp_path / "bench.json").code == 1
    assert len(json.loads((tmp_path / "bench.json").read_text())["figures"]) > 10


def test_what_was_not_run_is_said(hf_ortho_command, monkeypatch):
    reason = "no C++ compiler"

    def section(results, settings):
        results.figures.append(Figure("decode", "F.gelu", "call", 1e-5, 1.0, 0.0))
        results.not_run.append(NotRun("decode", "hermite_3 compiled", reason))

    monkeypatch.setattr(hf_ortho.benchmark, "SECTIONS", {"cpu": {"decode": Section(section, 1)}})
    ran = hf_ortho_command("bench", "--check")
    assert ran.code == 1
    assert f"hermite_3 compiled: {reason}, not run" in ran.out.splitlines()
    assert "1 of 1 targets are missed by more than 15% or not run" in ran.out.splitlines()
    assert hf_ortho_command("bench").code == 0


@pytest.fixture
def sections(monkeypatch):
    """Sections that run at once, some of which fail; their names, in the order in which they ran."""
    ran: list[str] = []

    def section(name, error=None):
        def run(results, settings):
            ran.append(name)
            results.figures.append(Figure(name, "F.gelu", "call", 1e-5, 1.0, 0.0))
            if error:
                raise error

        return Section(run, 10)

    broken = RuntimeError("an illegal memory access\nmore")
    found = {"decode": section("decode"), "gpt2": section("gpt2", broken), "degree": section("degree")}
    monkeypatch.setattr(hf_ortho.benchmark, "SECTIONS", {"cpu": found})
    return ran


def test_a_section_that_fails_does_not_end_the_run(hf_ortho_command, sections, tmp_path):
    ran = hf_ortho_command("bench", "--output", tmp_path / "bench.json")
    assert (ran.code, ran.err) == (1, "")
    assert sections == ["decode", "gpt2", "degree"]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [figure["case"] for figure in found["figures"]] == sections  # also those from before the failure
    entry = {"case": "gpt2", "row": "", "reason": "an illegal memory access", "failed": True}
    assert found["not_run"] == [entry]
    assert ran.out.splitlines()[-1] == "failed: gpt2: an illegal memory access"


def test_sections(hf_ortho_command, sections):
    ran = hf_ortho_command("bench", "--sections", "degree", "decode")
    assert ran.code == 0
    assert sections == ["decode", "degree"]
    assert "Sections: decode 10 s, degree 10 s; about 20 s in all" in ran.out.splitlines()
    assert "gpt2" not in ran.out


def test_budget(hf_ortho_command, sections):
    lines = hf_ortho_command("bench", "--sections", "degree", "decode", "--budget", "19.5").out.splitlines()
    assert sections == ["decode"]
    assert (
        lines[lines.index("Sections: decode 10 s; about 10 s in all") + 1] == "Left out to stay within 19.5 s: degree"
    )


def test_results_are_saved_after_each_section(hf_ortho_command, sections, tmp_path, monkeypatch):
    def interrupt(results, settings):
        raise KeyboardInterrupt

    found = hf_ortho.benchmark.SECTIONS["cpu"] | {"degree": Section(interrupt, 10)}
    monkeypatch.setattr(hf_ortho.benchmark, "SECTIONS", {"cpu": found})
    assert hf_ortho_command("bench", "--output", tmp_path / "bench.json").code != 0
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert [figure["case"] for figure in saved["figures"]] == ["decode", "gpt2"]


def test_a_late_section_is_left_out(sections):
    settings = dataclasses.replace(QUICK, deadline=-math.inf)
    results = hf_ortho.cli.bench.measure(hf_ortho.benchmark.SECTIONS["cpu"], settings, lambda results: None)
    assert sections == []
    assert [(entry.case, entry.failed) for entry in results.not_run] == [
        ("decode", False),
        ("gpt2", False),
        ("degree", False),
    ]


@pytest.mark.parametrize(
    ("budget", "names"),
    [(math.inf, "abc"), (35, "abc"), (34, "ab"), (29, "ac"), (5, "c"), (4, "")],
    ids=lambda v: str(v),
)
def test_the_most_important_that_fit(budget, names):
    sections = {name: Section(print, seconds) for name, seconds in (("a", 10), ("b", 20), ("c", 5))}
    assert "".join(within(sections, budget)) == names


def test_the_help_names_all_sections(hf_ortho_command):
    words = hf_ortho_command("bench", "--help").out.replace(",", " ").replace(";", " ").replace(".", " ").split()
    assert {*SECTIONS["cpu"], *SECTIONS["cuda"]} <= set(words)


@pytest.mark.usefixtures("nothing_measured")
class TestRefuses:
    def test_check_of_small_tensors(self, hf_ortho_command):
        assert "the targets are for the full sizes" in hf_ortho_command("bench", "--quick", "--check").error

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_unknown_sections(self, hf_ortho_command, device):
        ran = hf_ortho_command("bench", "--device", device, "--sections", "decode", "gpt3")
        assert ran.code == 2
        assert f"--sections gpt3: unknown; the sections on {device} are {', '.join(SECTIONS[device])}" in ran.error

    @pytest.mark.parametrize(("budget", "reason"), [("0", "positive"), ("nan", "positive"), ("soon", "invalid float")])
    def test_budgets(self, hf_ortho_command, budget, reason):
        ran = hf_ortho_command("bench", "--budget", budget)
        assert ran.code == 2
        assert reason in ran.error

    def test_a_budget_for_small_tensors(self, hf_ortho_command):
        assert "the durations are for the full sizes" in hf_ortho_command("bench", "--quick", "--budget", "9").error

    def test_cuda(self, hf_ortho_command, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "torch finds no CUDA device" in hf_ortho_command("bench", "--device", "cuda").error

    @pytest.mark.parametrize("flag", ["--output", "--plot"])
    def test_paths(self, hf_ortho_command, tmp_path, flag):
        missing = tmp_path / "missing" / "file.png"
        assert f"{missing.parent} does not exist" in hf_ortho_command("bench", flag, missing).error
        folder = tmp_path / "folder.png"
        folder.mkdir()
        assert f"{flag} {folder} is a folder; name a file" in hf_ortho_command("bench", flag, folder).error
        assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]

    def test_a_folder_that_cannot_be_written(self, hf_ortho_command, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda *args: False)
        error = hf_ortho_command("bench", "--json", tmp_path / "bench.json").error
        assert error.endswith(f"the folder {tmp_path} cannot be written")

    def test_other_pictures(self, hf_ortho_command, tmp_path):
        assert "must end in .png" in hf_ortho_command("bench", "--plot", tmp_path / "bench.pdf").error

    def test_one_file_for_both(self, hf_ortho_command, tmp_path):
        path = tmp_path / "bench.png"
        assert "use two different files" in hf_ortho_command("bench", "--json", path, "--plot", path).error
