import json
import shutil
import statistics

import pytest
import yaml

import hf_ortho.plotting.comparison
from hf_ortho.cli.compare import metric_of
from hf_ortho.errors import ConfigError
from hf_ortho.training.compare import Run, summarize

SIZES = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}
NAMES = ["gelu", "hermite_3", "tropical_2"]


@pytest.fixture
def compare(hf_ortho_command, text_file, tmp_path):
    """``compare(seeds=[0])`` runs a complete comparison of a tiny GPT-2 with other keys, None to leave one out."""

    def run(**entries):
        defaults = {
            "init": "scratch",
            "model_type": "gpt2",
            "config_overrides": SIZES,
            "tokenizer": "bytes",
            "dataset": str(text_file),
            "activations": NAMES,
            "seeds": [0, 1],
            "timing_rounds": 0,
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "use_cpu": True,
        }
        entries = {k: v for k, v in (defaults | entries).items() if v is not None}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(entries))
        return hf_ortho_command("compare", "--config", tmp_path / "recipe.yaml")

    return run


def losses(folder):
    runs = json.loads((folder / "results.json").read_text())["runs"]
    return {(run["activation"], run["seed"]): run["loss"] for run in runs}


@pytest.fixture
def no_comparison(monkeypatch):
    """The picture is drawn again after each run; tests/plotting looks at it, and the comparison of conversions here."""
    monkeypatch.setattr(hf_ortho.plotting.comparison, "plot_comparison", lambda *args: None)


@pytest.mark.usefixtures("no_comparison")
def test_a_grid_its_files_and_its_resumption(compare, hf_ortho_command, text_file, tmp_path):
    ran = compare(timing_rounds=2)
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    found = losses(out)
    assert found.keys() == {(name, seed) for name in NAMES for seed in (0, 1)}
    assert len(set(found.values())) == 6
    results = json.loads((out / "results.json").read_text())
    assert results["metric"] == "loss"
    assert results["seconds_per_step"].keys() == set(NAMES)
    assert results["seconds_per_step"]["gelu"]["ratio"] == 1.0
    table = (out / "table.md").read_text().splitlines()
    for name, row in zip(NAMES, table[2:5], strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        values, base = ([found[n, seed] for seed in (0, 1)] for n in (name, "gelu"))
        assert cells[:3] == [name, "2", f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"]
        gaps = [a - b for a, b in zip(values, base, strict=True)]
        assert cells[3] == f"{statistics.fmean(gaps):+.4f} ± {statistics.stdev(gaps):.4f}"

    # The same run by itself.
    flags = ["--config", tmp_path / "alone.yaml", "--activation", "hermite_3", "--seed", 1]
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    alone = {k: v for k, v in recipe.items() if k not in ("activations", "seeds", "timing_rounds")}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    ran = hf_ortho_command("pretrain", *flags, "--output_dir", tmp_path / "alone")
    assert float(ran.figures["loss"][0]) == pytest.approx(found["hermite_3", 1], abs=1e-5)

    # One run is missing, one was interrupted after its first checkpoint, one before; the others stay as they are.
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*/seed-*/run.json")}
    for name, seed, checkpoint in (("hermite_3", 1, "checkpoint-2"), ("tropical_2", 0, None)):
        folder = out / name / f"seed-{seed}"
        (folder / checkpoint if checkpoint else folder).rename(tmp_path / "left")
        shutil.rmtree(folder, ignore_errors=True)
        if checkpoint:
            shutil.move(tmp_path / "left", folder / checkpoint)
        else:
            shutil.rmtree(tmp_path / "left")
            (folder / "checkpoint-draft").mkdir(parents=True)
        del kept[folder / "run.json"]
    assert compare().code == 0
    assert losses(out) == found
    assert {file: file.stat().st_mtime_ns for file in kept} == kept

    # Another recipe does not mix with it; other activations and seeds join it.
    assert "contains runs with learning_rate 0.01, but learning_rate is now 0.02" in compare(learning_rate=0.02).error
    assert compare(activations=["gelu", "fourier_1"], seeds=[1]).code == 0
    assert losses(out)["gelu", 1] == found["gelu", 1]


def test_conversions_are_compared_with_the_original(compare, gpt2_folder, tmp_path):
    entries = {"init": None, "model_type": None, "config_overrides": None, "tokenizer": None, "model": str(gpt2_folder)}
    names = ["gelu_new", "hermite_8"]
    ran = compare(**entries, activations=names, seeds=[0], learning_rate=0.0, save_strategy="no")
    assert ran.code == 0, ran.err
    found = losses(tmp_path / "out")
    assert found["hermite_8", 0] == pytest.approx(found["gelu_new", 0], abs=1e-4)
    assert found["hermite_8", 0] != found["gelu_new", 0]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    ran = compare(**entries, activations=["silu"], seeds=[0], output_dir=str(tmp_path / "other"))
    assert "activation 'silu'" in ran.error


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"activations": ["gelu", "hermit_3"]}, "unknown activation 'hermit_3'"),
        ({"activations": ["gelu", "gelu"]}, "activations \\['gelu', 'gelu'\\]: give at least one, without duplicates"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"timing_rounds": -1}, "timing_rounds -1"),
        ({"seeds": ["one"]}, "seeds"),
        ({"activation": "hermite_3", "init": "fresh"}, "init 'fresh'"),
    ],
)
def test_mistakes_are_named_before_any_run(compare, tmp_path, entries, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(compare(**entries).error)
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.usefixtures("no_comparison")
def test_a_run_that_starts_anew_keeps_the_files_of_others(compare, tmp_path):
    """One that was interrupted before its first checkpoint, and one that had ended but for the note of its figures."""
    entries = {"seeds": [0], "save_strategy": "no"}
    assert compare(**entries, activations=["gelu"]).code == 0
    out = tmp_path / "out"
    ended, started = out / "gelu" / "seed-0", out / "silu" / "seed-0"
    figures = (ended / "run.json").read_text()
    (ended / "run.json").unlink()
    (started / "checkpoint-2").mkdir(parents=True)
    (started / "checkpoint-2" / "manifest.json").write_text("{}")
    for folder in (ended, started):
        (folder / "notes.txt").write_text("mine")
    ran = compare(**entries, activations=["gelu", "silu"])
    assert (ran.code, ran.err) == (0, "")
    assert (ended / "run.json").read_text() == figures
    assert [(folder / "notes.txt").read_text() for folder in (ended, started)] == ["mine", "mine"]
    assert not (started / "checkpoint-2").exists()

    (ended / "run.json").unlink()
    (ended / "config.json").write_text("mine")
    assert "config.json in it was changed since hf_ortho wrote it" in compare(**entries, activations=["gelu"]).error
    assert (ended / "config.json").read_text() == "mine"

    (out / "table.md").write_text("mine")
    assert "table.md in it was changed since hf_ortho wrote it" in compare(**entries, activations=["gelu"]).error
    assert (out / "table.md").read_text() == "mine"


def test_a_foreign_folder_is_left_alone(compare, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "does not contain a comparison" in compare().error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["hello", "[]", "\xff"])
def test_a_recipe_of_others_is_named(compare, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_bytes(text.encode("latin-1"))
    assert "recipe.json was not written by hf-ortho compare; move it away" in compare().error


RUN = {"activation": "gelu", "seed": 0, "metrics": {"loss": 1.0}, "history": [[1, 2.0]]}


@pytest.mark.parametrize(
    "plain",
    [[], {"a": 1}, RUN | {"a": 1}, RUN | {"metrics": {}}, RUN | {"metrics": {"loss": "low"}}, RUN | {"history": [1]}],
)
def test_a_run_of_others_is_named(tmp_path, plain):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(RUN))
    assert Run.load(file) == Run("gelu", 0, {"loss": 1.0}, [(1, 2.0)])
    file.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=r"run\.json was not written by hf-ortho compare; move it away"):
        Run.load(file)


def test_summary_pairs_seeds():
    values = {"gelu": [3.0, 2.0, 1.0], "hermite_3": [2.5, 1.9, 0.7]}
    runs = [Run(name, seed, {"loss": own[seed]}, []) for seed in range(3) for name, own in values.items()]
    first, second = summarize(runs, "loss")
    assert (first.difference, first.difference_spread) == (0.0, 0.0)
    assert (second.mean, second.seeds) == (pytest.approx(1.7), 3)
    assert second.difference == pytest.approx(-0.3)
    assert second.difference_spread == pytest.approx(0.2)
    (alone, fewer) = summarize([*runs[:1], *runs[1::2]], "loss")
    assert (alone.seeds, fewer.seeds, fewer.difference) == (1, 3, pytest.approx(-0.5))


@pytest.mark.parametrize(
    ("metrics", "compared"),
    [
        ({"loss": 2.0, "perplexity": 7.4}, "loss (nats)"),
        ({"loss": 2.0, "top1": 0.5, "top5": 0.9}, "top-1 accuracy"),
        ({"loss": 2.0}, "loss (nats)"),  # the figures of who knows what
    ],
)
def test_the_metric_that_is_compared_is_that_of_the_task(metrics, compared):
    assert str(metric_of([Run("gelu", 0, metrics, [])])) == compared
