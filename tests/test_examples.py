"""The examples in the docstrings of all public functions and classes, run as they stand.

They are given ``model``, a tiny GPT-2 with ``gelu_new``, and run in an empty folder.
"""

import contextlib
import doctest
import importlib
import inspect
import io

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hf_ortho

PACKAGES = (
    "hf_ortho",
    *(f"hf_ortho.{name}" for name in ("activations", "benchmark", "conversion", "hub", "peft", "plotting", "training")),
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public():
    """Name in the documentation to object: what the packages export, without modules and constants."""
    found = {}
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found.setdefault(thing, f"{package.__name__}.{name}")
    return {name: thing for thing, name in found.items()}


def examples():
    finder = doctest.DocTestFinder(recurse=True, exclude_empty=True)
    tests = [test for name, thing in public().items() for test in finder.find(thing, name) if test.examples]
    return {test.name: test for test in tests}


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=64))
    test = EXAMPLES[name]
    test.globs |= {"hf_ortho": hf_ortho, "torch": torch, "model": model}
    report = io.StringIO()
    with contextlib.redirect_stderr(io.StringIO()):
        result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.write)
    assert result.failed == 0, report.getvalue()
