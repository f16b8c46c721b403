"""What is installed: declared dependencies, the files of the wheel and the sdist, and modules without the extras."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
SOURCES = sorted((REPOSITORY / "hf_ortho").rglob("*.py"))
PACKAGES = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}  # by the name that is imported
EXTRAS = {"gradio", "pillow", "scikit-learn", "onnx_ir", "onnxruntime", "lm_eval"}
OTHERS = {"deepspeed", "triton", "vllm", "trackio", "wandb", "torchortho", "rational"}  # used where they are installed
WITHOUT_EXTRAS = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(sys.argv[1:])
import hf_ortho
for module in pkgutil.walk_packages(hf_ortho.__path__, "hf_ortho."):
    try:
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name.partition(".")[0])
"""


def test_the_dependencies_are_those_that_are_imported():
    imported = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported = {PACKAGES.get(name, name) for name in imported - {*sys.stdlib_module_names, "hf_ortho"}}
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.M | re.S)[1]
    assert imported - EXTRAS - OTHERS == set(re.findall(r'"([\w-]+)>=', listed))


def test_the_extras_that_messages_name_are_defined():
    named = {extra for file in SOURCES for extra in re.findall(r"hf-ortho\[([\w-]+)\]", file.read_text("utf-8"))}
    assert named == {"app", "lm-eval", "onnx", "vision"}
    defined = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", PROJECT, re.M | re.S)[1]
    assert named < set(re.findall(r"^([\w-]+) = \[", defined, re.M))


def test_lm_eval_without_its_extra_is_one_sentence(monkeypatch, capsys):
    for name in {"lm_eval", *(name for name in sys.modules if name.startswith("lm_eval."))}:  # of earlier tests
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "hf_ortho.lm_eval", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("hf_ortho.lm_eval", run_name="__main__")
    assert stop.value.code == 2
    sentence = "hf-ortho: error: hf_ortho.lm_eval requires lm_eval: pip install 'hf-ortho[lm-eval]'\n"
    assert capsys.readouterr().err == sentence


@pytest.mark.slow
def test_a_training_argument_that_needs_another_package_is_one_sentence(
    gpt2_folder, text_file, tmp_path, hf_ortho_command, monkeypatch
):
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: False)
    flags = ("--use-liger-kernel", "true", "--max-steps", "1", "--output-dir", tmp_path / "out")
    ran = hf_ortho_command("finetune", "--model", gpt2_folder, "--dataset", text_file, *flags)
    assert ran.code == 2
    assert ran.error.startswith("training arguments: ")
    assert "pip install liger-kernel" in ran.error
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_every_other_module_is_imported_without_the_extras():
    absent = ["gradio", "sklearn", "onnx", "onnxscript", "onnxruntime", "onnx_ir", "trl", "sentence_transformers"]
    absent += ["lm_eval", "triton", "deepspeed", "torchvision"]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *absent]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    triton = {f"hf_ortho.activations.{family}.triton" for family in ("fourier", "hermite", "tropical")}
    triton |= {"hf_ortho.kernels.triton", "hf_ortho.kernels.triton_common"}
    needs = dict.fromkeys(triton, "triton") | dict.fromkeys(("hf_ortho.app.page", "hf_ortho.app.space"), "gradio")
    assert dict(line.split() for line in ran.stdout.splitlines()) == needs | {"hf_ortho.lm_eval": "lm_eval"}


@pytest.mark.slow
def test_the_wheel_and_the_sdist_have_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for name in ("hf_ortho", "tests"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = {str(file.relative_to(tmp_path)) for file in (tmp_path / "hf_ortho").rglob("*") if file.is_file()}
    build = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-W", "error", "-c", build], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == package
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    files = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}
    assert {name for name in names if ".egg-info/" not in name} == package | files
