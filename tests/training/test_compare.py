import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainingArguments

import hf_ortho.plotting.comparison
from hf_ortho.cli.compare import metric_of, show, write
from hf_ortho.errors import ConfigError
from hf_ortho.folders import OutputFolder
from hf_ortho.profiling.timing import Times
from hf_ortho.tasks import LOSS, TASKS
from hf_ortho.training import ActivationTrainer, DataArguments, ModelArguments
from hf_ortho.training.arguments import Comparison
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.usefixtures("no_comparison")
def test_images_are_compared_by_their_accuracy(compare, tmp_path):
    pytest.importorskip("sklearn")
    sizes = {"num_stages": 2, "hidden_sizes": [4, 8], "depths": [1, 1], "image_size": 32}
    entries = {"model_type": "convnext", "config_overrides": sizes, "tokenizer": None, "dataset": "digits"}
    entries |= {"max_train_samples": 16, "max_eval_samples": 16}
    ran = compare(**entries, activations=["gelu", "hermite_3"], seeds=[0], max_steps=2)
    assert ran.code == 0, ran.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metric"] == "top1"
    assert {run["activation"]: f"{run['top1']:.4f}" for run in results["runs"]} == {
        name: cells[1] for name, cells in ran.figures.items() if name in ("gelu", "hermite_3")
    }
    saved = json.loads((tmp_path / "out" / "gelu" / "seed-0" / "run.json").read_text())
    assert saved["task"] == "image-classification"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"activations": ["gelu", "hermit_3"]}, "unknown activation 'hermit_3'"),
        ({"activations": ["gelu", "gelu"]}, "activations gelu gelu: give at least one, without duplicates"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"timing_rounds": -1}, "timing_rounds -1"),
        ({"seeds": ["one"]}, "seeds"),
        ({"activation": "hermite_3", "init": "fresh"}, "init 'fresh'"),
        ({"train": "activations"}, "train 'activations': gelu has no parameters to train; remove it from activations"),
        ({"push_to_hub": True}, "push_to_hub: a comparison pushes nothing"),
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


# ---- progress and interruption ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_comparison")
def test_each_run_is_announced_before_it_starts(compare, tmp_path):
    assert compare(activations=["gelu"], seeds=[0]).code == 0
    ran = compare(activations=["gelu", "hermite_3"], seeds=[0, 1])
    assert ran.code == 0, ran.err
    figures = {key: [f"{v:.5f}" for v in (loss, math.exp(loss))] for key, loss in losses(tmp_path / "out").items()}
    lines = [line for line in ran.out.splitlines() if line.startswith(("4 runs", "Run ")) or "step 1/" in line]
    expected = [
        f"4 runs: 2 activations x 2 seeds, in {tmp_path / 'out'}; 1 finished earlier",
        f"Run 1 of 4, gelu, seed 0: finished earlier: loss {figures['gelu', 0][0]}, perplexity ",
        "Run 2 of 4, hermite_3, seed 0",
        "hermite_3, seed 0: step 1/4, loss ",
        f"Run 2 of 4, hermite_3, seed 0: loss {figures['hermite_3', 0][0]}, perplexity ",
        "Run 3 of 4, gelu, seed 1 (less than a minute left)",
        "gelu, seed 1: step 1/4, loss ",
        f"Run 3 of 4, gelu, seed 1: loss {figures['gelu', 1][0]}, perplexity ",
        "Run 4 of 4, hermite_3, seed 1 (less than a minute left)",
        "hermite_3, seed 1: step 1/4, loss ",
        f"Run 4 of 4, hermite_3, seed 1: loss {figures['hermite_3', 1][0]}, perplexity ",
    ]
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.usefixtures("no_comparison")
def test_the_number_of_steps_is_that_of_the_training(compare, tmp_path):
    """It follows from the epochs, and the last logged step is an earlier one."""
    ran = compare(activations=["gelu"], seeds=[0], max_steps=None, num_train_epochs=0.1, logging_steps=100)
    assert ran.code == 0, ran.err
    blocks, steps = re.search(r"Training on (\d+) blocks of 32 tokens for (\d+) steps", ran.out).groups()
    assert int(steps) == math.ceil(0.1 * math.ceil(int(blocks) / 2))
    assert f" for {steps} steps, evaluated on" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.usefixtures("no_comparison")
def test_the_activation_and_the_seed_of_a_training_have_no_effect(compare, caplog):
    ran = compare(activations=["gelu"], seeds=[0], activation="hermite_5", seed=7)
    assert ran.code == 0, ran.err
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "note: activation hermite_5 has no effect; a comparison runs activations (gelu)",
        "note: seed 7 has no effect; a comparison runs seeds (0)",
    ]


@pytest.mark.usefixtures("no_comparison")
def test_a_mistake_in_a_later_run_names_it(compare, gpt2_folder, tmp_path):
    entries = {"init": None, "model_type": None, "config_overrides": None, "tokenizer": None, "model": str(gpt2_folder)}
    ran = compare(**entries, activations=["gelu_new", "silu"], seeds=[0], calibration_samples=0)
    assert ran.error.startswith("silu, seed 0: activation 'silu': ")
    assert (tmp_path / "out" / "gelu_new" / "seed-0" / "run.json").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("no_comparison")
def test_an_interruption_names_what_is_kept(compare, tmp_path, monkeypatch):
    """The second run stops in its fourth step; a further one would not yet have had a checkpoint."""
    steps, training_step = 0, ActivationTrainer.training_step

    def interrupted(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(ActivationTrainer, "training_step", interrupted)
    ran = compare(seeds=[0])
    assert ran.code == 130
    out = tmp_path / "out"
    assert ran.err == (
        f"hf-ortho: interrupted; {out} keeps 1 of 3 runs and checkpoint-2 of hermite_3, seed 0; to continue: "
        f"hf-ortho compare --config {tmp_path / 'recipe.yaml'}\n"
    )
    ran = compare(seeds=[0])
    assert ran.code == 0, ran.err
    assert "Run 2 of 3, hermite_3, seed 0\nResuming from checkpoint-2\n" in ran.out
    assert steps == 8 + 2 + 4


@pytest.mark.slow  # starts a process
def test_a_comparison_that_was_interrupted_ends_as_another(compare, tmp_path):
    assert compare(seeds=[0], max_steps=60, output_dir=str(tmp_path / "straight")).code == 0
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | {"output_dir": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "hf_ortho", "compare", "--config", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("hermite_3, seed 0: step 5/"):
            process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    assert process.wait() == 130, error
    assert "Traceback" not in error
    out = tmp_path / "out"
    finished = len(list(out.glob("*/*/run.json")))
    assert f"interrupted; {out} keeps {finished} of 3 runs and checkpoint-" in error
    assert (out / "gelu" / "seed-0" / "run.json").is_file()
    assert "gelu" in (out / "table.md").read_text()
    process.stdout.close()
    process.stderr.close()

    ran = compare(seeds=[0], max_steps=60)
    assert ran.code == 0, ran.err
    assert "Resuming from checkpoint-" in ran.out
    assert (out / "table.md").read_text() == (tmp_path / "straight" / "table.md").read_text()
    assert losses(out) == losses(tmp_path / "straight")


@pytest.mark.usefixtures("no_comparison")
def test_a_run_that_diverges_is_named_and_the_others_follow(compare, tmp_path, monkeypatch):
    compute_loss = ActivationTrainer.compute_loss

    def diverging(self, *args, **kwargs):
        return compute_loss(self, *args, **kwargs) * (math.nan if "gelu" in self.args.output_dir else 1)

    monkeypatch.setattr(ActivationTrainer, "compute_loss", diverging)
    ran = compare(seeds=[0], activations=["gelu", "hermite_3"], eval_strategy="no")
    assert ran.code == 0, ran.err
    assert "Run 1 of 2, gelu, seed 0: diverged: step 1" in ran.out, ran.out
    assert "Run 2 of 2, hermite_3, seed 0: loss " in ran.out
    assert losses(tmp_path / "out").keys() == {("hermite_3", 0)}


# ---- parameter groups ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("no_comparison")
def test_a_pattern_may_name_parameters_of_one_activation(compare, tmp_path):
    """With a learning rate of 0, the coefficients stay at their fit; what other activations lack is passed over."""
    names = ["gelu", "hermite_3", "fourier_2"]
    still = {"pattern": r"\.coefficients$", "learning_rate": 0}
    fast = {"pattern": "frequencies", "learning_rate": 0.1}
    ran = compare(param_groups=[still, fast], activations=names, seeds=[0], timing_rounds=1)
    assert ran.code == 0, ran.err
    assert ran.out.count("Tokenizing") == len(names)
    notes = [line for line in ran.out.splitlines() if "matches no parameter" in line]
    assert notes == [
        f"param_groups: pattern {entry['pattern']!r} matches no parameter here, only of other activations"
        for entry in (still, fast, fast)
    ]
    start, end = (
        load_file(tmp_path / "out" / "hermite_3" / "seed-0" / place / "model.safetensors")
        for place in ("checkpoint-2", "")
    )
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert "transformer.h.0.mlp.act.coefficients" in same
    assert "transformer.h.0.mlp.c_fc.weight" not in same


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["coeficients"], "pattern 'coeficients' matches no parameter; the closest are "),
        (["^act"], "pattern '^act' matches no parameter; the closest are "),
        (
            ["act.co", "mlp.act"],
            "pattern 'mlp.act' only matches parameters of earlier entries, such as transformer.h.0.",
        ),
    ],
)
def test_a_pattern_of_no_activation_is_a_mistake_before_any_run(compare, tmp_path, patterns, message):
    ran = compare(param_groups=[{"pattern": pattern, "learning_rate": 0.1} for pattern in patterns])
    assert f"gelu, seed 0: param_groups: {message}" in ran.error
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_a_folder_from_before_a_field_existed_is_continued(compare, tmp_path):
    """A comparison saved its recipe without it, and its runs without their task."""
    assert compare(activations=["gelu"], seeds=[0]).code == 0
    out = tmp_path / "out"
    for file, keys in (
        (out / "recipe.json", ["param_groups", "channels_last"]),
        (out / "gelu/seed-0/run.json", ["task", "steps"]),
    ):
        plain = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in plain.items() if key not in keys}))
    assert compare(activations=["gelu"], seeds=[0]).code == 0
    ran = compare(activations=["gelu"], seeds=[0], param_groups=[{"pattern": "wte", "learning_rate": 0.1}])
    assert "contains runs with param_groups None, but param_groups is now [{'pattern'" in ran.error


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


@pytest.mark.parametrize(
    ("metrics", "unit"),
    [
        ({"loss": 2.0, "accuracy": 0.5}, "nats"),
        ({"loss": 2.0, "pearsonr": 0.5, "spearmanr": 0.5}, "mean squared error"),
    ],
)
def test_the_picture_has_the_unit_of_the_loss(tmp_path, monkeypatch, metrics, unit):
    drawn = []
    monkeypatch.setattr(hf_ortho.plotting.comparison, "plot_comparison", lambda *args: drawn.append(args[-1]))
    comparison = Comparison(ModelArguments(), DataArguments("a"), TrainingArguments(tmp_path, report_to="none"))
    runs = [Run("gelu", seed, metrics, [(1, 2.0)], task="text-classification") for seed in (0, 1)]
    for count in (1, 2):
        caption, _, _ = write(OutputFolder(tmp_path / "out", beside=True), comparison, runs[:count], {}, {})
        assert ("±" in caption) == (count == 2)
    assert drawn == [unit] * 2


def test_the_printed_tables_fit_80_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hf_ortho.plotting.comparison, "plot_comparison", lambda *args: None)
    comparison = Comparison(ModelArguments(), DataArguments("a"), TrainingArguments(tmp_path, report_to="none"))
    names = comparison.compare.activations
    metrics = [{"loss": 2.0 + i, "perplexity": math.exp(2.0 + i)} for i in (0, 1)]
    runs = [Run(name, i, metrics[i], [(1, 2.0)], task="text-generation") for i in (0, 1) for name in names]
    times = {name: Times([0.25], [1.5]) for name in names}
    _, columns, rows = write(
        OutputFolder(tmp_path / "out", beside=True), comparison, runs, times, dict.fromkeys(names, 2.5e6)
    )
    show(LOSS, "notes.txt", columns, rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [
        "Loss on notes.txt, lower is better; ±: standard deviation over seeds",
        "minus gelu: the difference from gelu with the same seed",
    ]
    cells = [" ".join(line.split()) for line in lines]
    assert "seeds loss minus gelu perplexity" in cells
    assert "tropical_rational_5 2 2.5000 ± 0.7071 +0.0000 ± 0.0000 13.737" in cells
    assert "time over gelu ms kept, MB" in cells
    assert "tropical_rational_5 1.50 250 2.5" in cells
    header, _, row, *_ = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert header == (
        "|  | seeds | evaluation loss (nats) | minus gelu, same seed | perplexity | time of a micro-batch, over gelu "
        "| ms | kept, MB |"
    )
    assert row == "| gelu | 2 | 2.5000 ± 0.7071 | +0.0000 ± 0.0000 | 13.737 | 1.50 | 250 | 2.5 |"


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
def test_runs_without_a_task_are_of_the_one_with_these_metrics(metrics, compared):
    assert str(metric_of([Run("gelu", 0, metrics, [])])) == compared


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.pipeline_tag)
def test_the_metric_that_is_compared_is_that_of_the_task(task):
    def run(metrics, diverged=""):
        return Run("gelu", 0, {metric.key: 1.0 for metric in metrics}, [], diverged, str(task.pipeline_tag))

    assert metric_of([run(task.metrics), run(task.metrics)]) == task.compared
    # A task may have further metrics than it reports for a model, and one that is compared only for some of them.
    assert metric_of([run([LOSS, task.compared])]) == task.compared
    assert metric_of([run([LOSS, task.compared]), run([LOSS])]) == LOSS
    others = [metric for metric in task.metrics if metric not in (LOSS, task.compared)]
    if task.compared != LOSS:
        assert metric_of([run([LOSS, *others])]) == others[0]
