"""``hf-ortho env``."""

import json
import os
import platform
import subprocess

import torch
import transformers

import hf_ortho
from hf_ortho.cli import env


def test_json(hf_ortho_command):
    ran = hf_ortho_command("env", "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["python"] == platform.python_version()
    assert found["logical_cores"] == os.cpu_count()
    assert found["threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == torch.cuda.device_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert abs(found["ram_gib"] - pages / 2**30) < 0.1
    assert torch.__version__.startswith(found["packages"]["torch"])  # PyPI's names no CUDA version
    versions = {"transformers": transformers.__version__, "hf_ortho": hf_ortho.__version__}
    assert versions.items() <= found["packages"].items()


def test_table(hf_ortho_command, monkeypatch):
    monkeypatch.setattr("hf_ortho.cli.env.PACKAGES", ("torch", "no-such-package"))
    ran = hf_ortho_command("env")
    assert ran.code == 0
    shown = dict(line.split(None, 1) for line in ran.out.replace("not installed", "missing").splitlines())
    assert torch.__version__.startswith(shown["torch"])
    assert shown["missing"] == "no-such-package"
    found = json.loads(hf_ortho_command("env", "--json").out)
    assert found["cpu"] in ran.out
    assert f"{found['ram_gib']} GiB" in ran.out


def test_driver(monkeypatch):
    def run(command, **options):
        assert command[0] == "nvidia-smi"
        if failure:
            raise failure
        return subprocess.CompletedProcess(command, 0, "580.82.07\n580.82.07\n", "")

    failure = None
    monkeypatch.setattr(env.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(env.subprocess, "run", run)
    assert env._driver() == "580.82.07"
    failure = subprocess.CalledProcessError(9, "nvidia-smi")
    assert env._driver() is None
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    assert env._driver() is None


def test_refuses(hf_ortho_command):
    assert "unknown flag --yaml" in hf_ortho_command("env", "--yaml").error
