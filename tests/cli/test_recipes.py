"""The recipes of the repository: every key is one that the command knows."""

import math
import os
import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from hf_ortho.activations import FAMILIES, parse
from hf_ortho.cli.recipe import parse_recipe
from hf_ortho.training import ActivationTrainer, Recipe
from hf_ortho.training.adapters import check_adapter
from hf_ortho.training.compare import Comparison
from hf_ortho.training.optimizer import activations_by_path
from hf_ortho.training.scratch import scratch_checkpoint

REPOSITORY = Path(__file__).parents[2]
LAUNCH = re.compile(r"^# .*hf-ortho (finetune|pretrain|compare) --config (\S+)")
FILES = {
    str(file.relative_to(REPOSITORY)): launched
    for file in sorted(REPOSITORY.glob("recipes/**/*.yaml"))
    if (launched := LAUNCH.match(file.read_text(encoding="utf-8")))
}
PAPER = [file for file in FILES if file.endswith("_paper.yaml")]
GRIDS = {
    f"{kind}{end}": [f for f in FILES if f.startswith(f"recipes/{kind}/") and (f in PAPER) == bool(end)]
    for kind, end in (
        ("gpt2/pretrain", ""),
        ("gpt2/pretrain", "_paper"),
        ("convnext/pretrain", ""),
        ("convnext/pretrain", "_paper"),
        ("convnext/cifar10", ""),
    )
}


def entries(file):
    return yaml.safe_load((REPOSITORY / file).read_text(encoding="utf-8"))


def header(file):
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    return " ".join(line[2:] for line in lines if line.startswith("# "))


def test_there_is_a_recipe_for_each_family():
    for kind, files in GRIDS.items():
        activations = {entries(f).get("activation", "gelu") for f in files}
        names = {name if name == "gelu" else parse(name)[0].family for name in activations}
        assert names == {"gelu", "hermite", "fourier", "tropical_rational" if "cifar10" in kind else "tropical"}
        assert names - {"gelu"} < {*FAMILIES}


@pytest.fixture(autouse=True)
def _reachable(monkeypatch):
    """Recipes that name something on the Hub are only read here."""
    monkeypatch.setattr("hf_ortho.cli.recipe.check_hub", lambda *args: None)


@pytest.mark.parametrize("file", FILES)
def test_a_recipe_is_launched_as_it_says(file, monkeypatch):
    assert FILES[file][2] == file
    monkeypatch.chdir(REPOSITORY)
    with mock.patch.dict(os.environ):  # TrainingArguments sets some, such as for torch_compile
        kind = Comparison if FILES[file][1] == "compare" else Recipe
        recipe = parse_recipe(kind, FILES[file][1], "", ["--config", file, "--use_cpu", "true"])
    assert recipe.training.output_dir == entries(file)["output_dir"]
    assert recipe.training.report_to in ("none", [], ["none"])


@pytest.mark.parametrize("file", FILES)
def test_a_recipe_says_what_it_needs_and_whether_it_was_run(file):
    text = header(file)
    assert "Expected hardware:" in text
    assert "Expected result:" in text or "/small/" in file
    assert re.search(r"Status: (not run|measured, .+)\.$", text)


@pytest.mark.parametrize("kind", GRIDS)
def test_recipes_of_a_grid_differ_in_the_activation_alone(kind):
    own = {"activation", "output_dir", *(("train", "calibration_samples") if "cifar10" in kind else ())}
    grid = [entries(f) for f in GRIDS[kind]]
    shared = [{key: value for key, value in e.items() if key not in own} for e in grid]
    assert shared == [shared[0]] * 4
    assert len({e["output_dir"] for e in grid}) == 4


@pytest.mark.parametrize(
    ("kind", "per_sample", "expected"),
    [
        ("gpt2/pretrain", "block_size", 491_520),
        ("gpt2/pretrain_paper", "block_size", 98_304),
        ("convnext/pretrain", "", 4096),
        ("convnext/pretrain_paper", "", 4096),
    ],
)
def test_tokens_and_images_of_a_step(kind, per_sample, expected):
    """On one GPU, and on eight with the accumulation of the header."""
    for file in GRIDS[kind]:
        e = entries(file)
        size = e["per_device_train_batch_size"] * e.get(per_sample, 1)
        (accumulated,) = re.findall(r"--gradient_accumulation_steps (\d+)", header(file))
        assert size * e["gradient_accumulation_steps"] == size * 8 * int(accumulated) == expected
        if not per_sample or expected > 100_000:
            continue
        assert f"{expected:,} tokens" in header(file)


@pytest.mark.parametrize("file", [file for kind, files in GRIDS.items() if "pretrain" in kind for file in files])
def test_a_figure_of_the_paper_belongs_to_its_method(file):
    text = header(file)
    if file in PAPER:
        assert "the paper reports" not in text or "for this method." in text
        assert re.search(r"The command line of the (paper's )?runs is not public", text)
    else:
        assert "Expected result: no reference figure." in text
        reports = re.findall(r"The paper reports .*, for the method of (\S+\.yaml)", text)
        assert ("The paper reports" in text) == bool(reports)
        assert reports in ([], [Path(file).name.replace(".yaml", "_paper.yaml")])


# Section 3 of the paper: c_0 = sqrt(1 - 1/n!) / sqrt(e), c_k = 1 / sqrt(e); a_0 = A sqrt(1 - 1/n!^2), a_k = A =
# 1 / sqrt(I_0(2)), frequencies k and phases pi / 4; a_k = 1.
A = 1 / math.sqrt(sum(1 / math.factorial(k) ** 2 for k in range(30)))
INITIAL = {
    "hermite_3": {"coefficients": [math.sqrt(5 / 6 / math.e), *[math.exp(-0.5)] * 3]},
    "fourier_5": {
        "offset": [A * math.sqrt(1 - 1 / 14400)],
        "coefficients": [A] * 5,
        "frequencies": [1, 2, 3, 4, 5],
        "phases": [math.pi / 4] * 5,
    },
    "tropical_5": {"coefficients": [1] * 6},
}
SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 16},
}


@pytest.fixture
def built(monkeypatch):
    """``built(file)``: the recipe of a file, and a small model that it describes, with its activations by path."""
    monkeypatch.chdir(REPOSITORY)

    def build(file):
        with mock.patch.dict(os.environ):
            recipe = parse_recipe(Recipe, "pretrain", "", ["--config", file, "--use_cpu", "true"])
        kind = file.split("/")[1]
        recipe.model.model, recipe.model.model_type = None, kind
        recipe.model.config_overrides |= SMALL[kind]
        recipe.model.tokenizer = "bytes" if kind == "gpt2" else None
        model = scratch_checkpoint(recipe.model, recipe.data, 0)[0].model
        return recipe, model, activations_by_path(model)

    return build


@pytest.mark.parametrize("file", PAPER)
def test_the_method_of_the_paper(file, built):
    recipe, model, activations = built(file)
    name = recipe.model.activation
    assert len(activations) == (0 if name == "gelu" else 2)
    for activation in activations.values():
        found = {key: value.tolist() for key, value in activation.named_parameters()}
        assert found.pop("domain") == [-math.inf, math.inf]
        assert found.pop("tail_slopes") == [0, 0]
        assert found == {key: pytest.approx(values, rel=1e-6) for key, values in INITIAL[name].items()}
    chosen = recipe.optimizer_arguments()
    trainer = ActivationTrainer(model=model, args=recipe.training, eval_dataset=[0], optimizer_arguments=chosen)
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {6e-4 if "gpt2" in file else 4e-3}


def test_our_method_is_another(built):
    recipe, _, activations = built("recipes/gpt2/pretrain/config_hermite_3.yaml")
    assert recipe.optimizer_arguments().activation_learning_rate == 0.01
    for activation in activations.values():
        assert torch.isfinite(activation.domain).all()
        assert activation.tail_slopes.tolist() == [0, 1]


@pytest.mark.parametrize("available", [True, False])
def test_tf32_where_there_is_none(available, monkeypatch, caplog):
    """TrainingArguments would refuse it."""
    chosen = []
    for module in ("transformers.utils", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_tf32_available", lambda: available)
    monkeypatch.setattr("transformers.training_args.enable_tf32", chosen.append)
    argv = ["--model", "m", "--output_dir", "out", "--tf32", "true", "--use_cpu"]
    recipe = parse_recipe(Recipe, "finetune", "", argv)
    assert recipe.training.tf32 is (True if available else None)
    assert chosen == ([True] if available else [])
    notes = [record.message for record in caplog.records if "tf32" in record.message]
    assert notes == (
        [] if available else ["note: tf32: no GPU here supports it (Ampere and newer do), so float32 stays float32"]
    )


def test_a_flag_turns_off_the_workers_of_a_recipe():
    argv = ["--config", "recipes/gpt2/pretrain/config_gelu.yaml", "--dataloader-num-workers", "0", "--use_cpu"]
    training = parse_recipe(Recipe, "pretrain", "", argv).training
    assert training.dataloader_num_workers == 0
    assert training.dataloader_prefetch_factor is None
    assert not training.dataloader_persistent_workers


def test_each_run_of_the_adapters_is_a_recipe(tmp_path):
    script = runpy.run_path(str(REPOSITORY / "recipes/small/adapters.py"))
    for flags, rates in script["METHODS"].values():
        assert len(rates) > 1
        pairs = [part for key, value in flags.items() for part in (f"--{key}", value)]
        for file in ("text", "images"):
            config = str(REPOSITORY / f"recipes/small/adapters_{file}.yaml")
            recipe = parse_recipe(
                Recipe, "finetune", "", ["--config", config, "--model", "m", "--use_cpu", "true", *pairs]
            )
            if recipe.model.adapter:
                check_adapter(recipe.model)
