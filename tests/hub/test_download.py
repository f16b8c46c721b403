"""Convert a model of the Hub, through the real client, against a local stand-in (in a subprocess: the client reads
HF_ENDPOINT when it is imported)."""

import json
import os
import subprocess
import sys

import pytest
import torch
from stand_in import COMMIT, hub
from transformers import AutoModelForCausalLM

import hf_ortho
from hf_ortho.cli.demo_tasks import byte_tokenizer


@pytest.fixture
def root(tmp_path, tiny_gpt2_model):
    folder = tmp_path / "hub" / "models" / "me" / "tiny"
    tiny_gpt2_model.save_pretrained(folder, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder)
    data = tmp_path / "hub" / "datasets" / "me" / "text"
    data.mkdir(parents=True)
    (data / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return tmp_path / "hub"


def command(endpoint, tmp_path, *args, offline=False):
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_DATASETS_CACHE", None)
    run = [sys.executable, "-m", "hf_ortho", *map(str, args)]
    return subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path)


def test_model_and_data_from_the_hub(root, tmp_path, tiny_gpt2_model):
    with hub(root) as endpoint:
        flags = ["--revision", "v1", "--calibration-data", "me/text", "--block-size", 16]
        done = command(endpoint, tmp_path, "convert", "me/tiny", "-o", "out", "--degree", 12, *flags)
    assert done.returncode == 0, done.stderr
    provenance = json.loads((tmp_path / "out" / "config.json").read_text())["hf_ortho"]
    assert provenance["source_model"] == "me/tiny"
    assert provenance["source_revision"] == COMMIT
    assert provenance["calibrated"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: me/tiny" in card
    assert COMMIT in card
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected, found = tiny_gpt2_model.eval()(ids).logits, converted(ids).logits
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "revision", "hint"),
    [("me/none", "main", "me/none"), ("me/tiny", "v9", "v9")],
    ids=["repository", "revision"],
)
def test_what_the_hub_lacks_is_one_sentence(root, tmp_path, name, revision, hint):
    with hub(root) as endpoint:
        done = command(endpoint, tmp_path, "convert", name, "-o", "out", "--revision", revision)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("hf-ortho: error: ")
    assert hint in done.stderr
    assert not (tmp_path / "out").exists()


def test_inspect_a_model_of_the_hub(root, tmp_path, tiny_gpt2_model):
    hf_ortho.convert(tiny_gpt2_model, "fourier_3")
    folder = root / "models" / "me" / "converted"
    tiny_gpt2_model.save_pretrained(folder, max_shard_size="20KB")
    with hub(root) as endpoint:
        done = command(endpoint, tmp_path, "inspect", "me/converted", "--revision", "v1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["revision"] == COMMIT
    module = tiny_gpt2_model.transformer.h[1].mlp.act
    assert found["layers"][1]["parameters"]["frequencies"] == module.frequencies.tolist()
    shards = {path.name for path in (tmp_path / "home").rglob("model-*.safetensors")}
    assert 0 < len(shards) < len(list(folder.glob("model-*.safetensors")))


def test_no_network_is_one_sentence(tmp_path):
    done = command("http://127.0.0.1:9", tmp_path, "convert", "me/tiny", "-o", "out", offline=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "me/tiny" in done.stderr
    assert not (tmp_path / "out").exists()
