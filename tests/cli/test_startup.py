"""What a command imports before it knows that it has work to do, and what ``import hf_ortho`` alone makes known."""

import json
import subprocess
import sys

import pytest

from hf_ortho.cli import main
from hf_ortho.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "numpy", "scipy", "matplotlib", "datasets", "peft", "accelerate", "sympy")


def run(code: str, *argv: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_help_and_usage_errors_import_none_of_the_libraries(tmp_path):
    commands = [["--help"], ["--version"], ["no-such-command"]]
    names = ("demo", "convert", "evaluate", "plot", "inspect", "push", "export", "app", "bench", "env")
    commands += [[name, flag] for name in names for flag in ("--help", "--no-such-flag")]
    commands += [
        ["convert", str(tmp_path), "-o", "y", "--family", "hermit"],
        ["convert", str(tmp_path), "-o", "y", "--degree", "33"],
        ["evaluate", str(tmp_path), "--batch-size", "0"],
        ["plot", "x", "-o", "y.pdf"],
        ["demo", "--steps", "0"],
        ["bench", "--check", "--quick"],
        ["finetune", "--lr", "3"],
        ["compare", "--config", "no-such-file.yaml"],
    ]
    code = f"""
import contextlib, json, sys
from hf_ortho.cli import main
from hf_ortho.cli.main import COMMANDS
codes = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(sys.stderr):
        codes.append(main(argv))
print(json.dumps([codes, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    codes, imported = json.loads(run(code, json.dumps(commands)))
    assert codes == [2 if command[-1] not in ("--help", "--version") else 0 for command in commands]
    assert imported == []


@pytest.mark.parametrize("command", ["finetune", "pretrain", "compare"])
def test_the_help_of_a_recipe_has_its_own_fields_alone(capsys, command):
    pages = {}
    for flag in ("--help", "--help-all"):
        assert main([command, flag]) == 0
        pages[flag] = capsys.readouterr().out
    assert "--domain-penalty" in pages["--help"]
    assert "--weight-decay" not in pages["--help"]
    assert {"--domain-penalty", "--weight-decay", "--accelerate-config"} <= set(pages["--help-all"].split())
    assert "(default: None)" not in pages["--help"]
    assert "_" not in "".join(word for word in pages["--help-all"].split() if word.startswith("--"))


@pytest.mark.parametrize("flags", [[], *([name, "--help"] for name in COMMANDS), ["finetune", "--help-all"]])
def test_help_fits_80_columns(capsys, monkeypatch, flags):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(flags) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_the_usage_starts_with_three_steps(capsys):
    assert main([]) == 0
    found = [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:] if "  hf-ortho " in line]
    assert found == ["convert", "finetune", "push"]


@pytest.mark.parametrize(
    ("command", "first"),
    [("finetune", "--model MODEL"), ("pretrain", "--model-type TYPE"), ("compare", "--model MODEL")],
)
def test_the_help_of_a_recipe_starts_with_what_it_needs(capsys, command, first):
    assert main([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: hf-ortho {command} {first} --dataset DATA --output-dir DIR [...]\n")
    options = page.partition("most used:\n")[2].partition("\n\n")[0]
    assert options.startswith(f"  {first} ")
    assert all(f"--{flag}" in options for flag in ("dataset", "output-dir", "max-steps", "learning-rate"))
    assert page.count("  --dataset ") == 1
    assert "['" not in page


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import hf_ortho, peft", "import peft, hf_ortho"])
def test_names_and_adapter_are_known_whichever_library_comes_first(order):
    code = f"""
{order}
from peft import PeftType, get_peft_config
from transformers.activations import ACT2CLS, ACT2FN
config = get_peft_config({{"peft_type": "HF_ORTHO", "activation": "fourier_3"}})
print(PeftType.HF_ORTHO.value, type(config).__name__, ACT2FN["hermite_8"].name, ACT2CLS["tropical"]().name)
"""
    assert run(code) == "HF_ORTHO OrthoConfig hermite_8 tropical_6"


def test_the_package_alone_imports_none_of_the_libraries():
    assert run(f"import sys, hf_ortho; print([name for name in {HEAVY!r} if name in sys.modules])") == "[]"
