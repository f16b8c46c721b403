"""The cards in model_cards are what the recipe writes."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_ortho.activations import FAMILIES

ROOT = Path(__file__).parents[2]
NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]\d+)?"


def folder_of(name, family):
    return ROOT / "model_cards" / f"{name}-{family}_{FAMILIES[family].default_degree}"


PAIRS = itertools.product(("gpt2", "convnext-tiny-224"), FAMILIES)
COMMITTED = [pair for pair in PAIRS if folder_of(*pair).is_dir()]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("reference_cards", ROOT / "recipes" / "reference_cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def skeleton(text):
    """The text without the versions and with a mark for each number, and the numbers."""
    text = re.sub(r"^- Versions: .*$", "", text, flags=re.MULTILINE)
    return re.sub(NUMBER, "#", text), [float(number) for number in re.findall(NUMBER, text)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), COMMITTED)
def test_the_committed_cards_are_those_of_the_recipe(recipe, name, family):
    folder = folder_of(name, family)
    report, config = recipe.reference(name, family)
    text, numbers = skeleton(recipe.reference_card(name, report, config, folder))
    committed = (folder / "README.md").read_text()
    expected, expected_numbers = skeleton(committed)
    assert text == expected
    assert numbers == pytest.approx(expected_numbers, rel=0.06, abs=1e-9)  # one unit of the second digit
    assert (folder / "activations.png").is_file()
    assert ModelCard(committed).data.eval_results is None
    assert "not run" in committed
