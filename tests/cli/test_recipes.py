"""The recipes of the repository: every key is one that the command knows."""

import os
import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
import yaml

from hf_ortho.activations import FAMILIES, parse
from hf_ortho.cli.recipe import parse_recipe
from hf_ortho.training import Recipe
from hf_ortho.training.adapters import check_adapter
from hf_ortho.training.compare import Comparison

REPOSITORY = Path(__file__).parents[2]
LAUNCH = re.compile(r"^# .*hf-ortho (finetune|pretrain|compare) --config (\S+)")
FILES = {
    str(file.relative_to(REPOSITORY)): launched
    for file in sorted(REPOSITORY.glob("recipes/**/*.yaml"))
    if (launched := LAUNCH.match(file.read_text(encoding="utf-8")))
}
GRIDS = [("gpt2", "pretrain"), ("convnext", "pretrain"), ("convnext", "cifar10")]


def entries(file):
    return yaml.safe_load((REPOSITORY / file).read_text(encoding="utf-8"))


def test_there_is_a_recipe_for_each_family():
    for model, kind in GRIDS:
        activations = {entries(f).get("activation", "gelu") for f in FILES if f.startswith(f"recipes/{model}/{kind}/")}
        names = {name if name == "gelu" else parse(name)[0].family for name in activations}
        assert names == {"gelu", "hermite", "fourier", "tropical_rational" if kind == "cifar10" else "tropical"}
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
    header = [line for line in (REPOSITORY / file).read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    text = " ".join(line[2:] for line in header)
    assert "Expected hardware:" in text
    assert "Expected result:" in text or "/small/" in file
    assert re.search(r"Status: (not run|measured, .+)\.$", text)


@pytest.mark.parametrize(("model", "kind"), GRIDS)
def test_recipes_of_a_grid_differ_in_the_activation_alone(model, kind):
    own = {"activation", "output_dir", *(("train", "calibration_samples") if kind == "cifar10" else ())}
    grid = [entries(f) for f in FILES if f.startswith(f"recipes/{model}/{kind}/")]
    shared = [{key: value for key, value in e.items() if key not in own} for e in grid]
    assert shared == [shared[0]] * 4
    assert len({e["output_dir"] for e in grid}) == 4


@pytest.mark.parametrize(
    ("grid", "per_sample", "expected"), [("gpt2/pretrain", "block_size", 491_520), ("convnext/pretrain", "", 4096)]
)
def test_tokens_and_images_of_a_step(grid, per_sample, expected):
    e = entries(f"recipes/{grid}/config_gelu.yaml")
    size = e["per_device_train_batch_size"] * e["gradient_accumulation_steps"]
    assert size * e.get(per_sample, 1) == expected


def test_each_run_of_the_adapters_is_a_recipe(tmp_path):
    script = runpy.run_path(str(REPOSITORY / "recipes/small/adapters.py"))
    assert script["METHODS"].keys() == script["RATES"].keys()
    for flags in script["METHODS"].values():
        pairs = [part for key, value in flags.items() for part in (f"--{key}", value)]
        for file in ("text", "images"):
            config = str(REPOSITORY / f"recipes/small/adapters_{file}.yaml")
            recipe = parse_recipe(
                Recipe, "finetune", "", ["--config", config, "--model", "m", "--use_cpu", "true", *pairs]
            )
            if recipe.model.adapter:
                check_adapter(recipe.model)
