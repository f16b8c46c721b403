"""The activations of a checkpoint, as the page shows them, and what visitors may name."""

import json
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_ortho.app.checkpoint
from hf_ortho.app.checkpoint import COLUMNS, shapes
from hf_ortho.checkpoints import weights
from hf_ortho.errors import HfOrthoError


def test_rows_and_picture(converted_folder):
    found = shapes(str(converted_folder))
    assert found.title == "2 activations at transformer.h.*.mlp.act, source gelu_new"
    assert [row[:2] for row in found.rows] == [["0", "hermite_8"], ["1", "hermite_8"]]
    assert {len(row) for row in found.rows} == {len(COLUMNS)}
    with safe_open(converted_folder / "model.safetensors", "np") as weights:
        for row in found.rows:
            key = f"transformer.h.{row[0]}.mlp.act.domain"
            assert [float(end) for end in row[2].split("..")] == pytest.approx(weights.get_tensor(key), abs=5e-3)
    for axes in found.figure.axes[:2]:
        learned, source = (line.get_xydata() for line in axes.lines[:2])
        expected = F.gelu(torch.tensor(source[:, 0]), approximate="tanh").numpy()
        assert np.allclose(source[:, 1], expected, atol=1e-6)
        assert 0 < np.abs(learned[:, 1] - expected).max() < 1e-2
    assert found.commands.splitlines()[0] == f"hf-ortho inspect {converted_folder} --json"


def test_of_many_activations_64_are_read_and_shown(converted_folder, tmp_path, monkeypatch):
    folder, read = tmp_path / "many", []
    shutil.copytree(converted_folder, folder)
    tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if ".0.mlp.act." in key}
    tensors = {key.replace(".0.", f".{i}."): value.clone() for key, value in tensors.items() for i in range(100)}
    save_file(tensors, folder / "model.safetensors")
    real = weights.tensors
    monkeypatch.setattr(weights, "tensors", lambda file, keys: read.extend(keys) or real(file, keys))
    monkeypatch.setattr(hf_ortho.app.checkpoint, "draw_activations", lambda panels, title: len(panels))
    found = shapes(str(folder))
    assert (len(found.rows), found.figure) == (64, 64)
    assert found.title.startswith("100 activations at transformer.h.*.mlp.act")
    assert found.notes[0] == "64 of 100 are shown, evenly spaced"
    assert [found.rows[0][0], found.rows[-1][0]] == ["0", "99"]
    assert len(read) == 64 * 3  # coefficients, domain and tail slopes; the rest is not read


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no checkpoint given"),
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("nobody/nothing", "nobody/nothing cannot be loaded"),
    ],
)
def test_refuses(name, message):
    with pytest.raises(HfOrthoError, match=message) as caught:
        shapes(name)
    assert "\n" not in str(caught.value)


def test_needs_a_converted_model(gpt2_folder):
    with pytest.raises(HfOrthoError, match="has no learnable activations"):
        shapes(str(gpt2_folder))


@pytest.mark.parametrize(
    "name",
    ["{folder}", "../{name}", "{name}", "~/{name}", "owner/../{name}", "/etc", "C:\\models", "a" * 100_000, "a\0b"],
    ids=lambda name: name[:20],
)
def test_visitors_read_no_folder(converted_folder, monkeypatch, name):
    """The folder ``name`` is there, relative to the working directory too."""
    monkeypatch.chdir(converted_folder.parent)
    monkeypatch.setattr(hf_ortho.app.checkpoint, "load_activations", None)
    name = name.format(folder=converted_folder, name=converted_folder.name)
    with pytest.raises(HfOrthoError, match="is not a Hub model; give OWNER/NAME"):
        shapes(name, public=True)


def test_visitors_read_small_models_at_revisions(converted_folder, monkeypatch):
    size, json_files, asked, deleted, loaded = 1e6, {"config.json": 100}, [], [], []

    def model_info(name, revision, files_metadata):
        asked.append((name, revision))
        files = {"model.safetensors": size, "pytorch_model.bin": 1e12, "tokenizer.json": 2e7} | json_files
        siblings = [types.SimpleNamespace(rfilename=f, size=n) for f, n in files.items()]
        return types.SimpleNamespace(siblings=siblings, sha="c" * 40)

    revisions = [types.SimpleNamespace(commit_hash="a"), types.SimpleNamespace(commit_hash="b")]
    cache = types.SimpleNamespace(size_on_disk=0, repos=[types.SimpleNamespace(revisions=revisions)])
    cache.delete_revisions = lambda *found: types.SimpleNamespace(execute=lambda: deleted.extend(found))
    load = hf_ortho.app.checkpoint.load_activations
    monkeypatch.setattr(hf_ortho.app.checkpoint, "model_info", model_info)
    monkeypatch.setattr(hf_ortho.app.checkpoint, "scan_cache_dir", lambda: cache)
    monkeypatch.setattr(hf_ortho.app.checkpoint, "adapter_config", lambda name, revision: adapter)
    monkeypatch.setattr(
        hf_ortho.app.checkpoint,
        "load_activations",
        lambda name, revision, most: loaded.append(revision) or load(str(converted_folder), most=most),
    )
    adapter = None
    monkeypatch.setattr(hf_ortho.app.checkpoint, "HF_HUB_CACHE", str(converted_folder / "none"))
    assert len(shapes(" owner/name ", "v1", public=True).rows) == 2
    assert (asked, loaded, deleted) == ([("owner/name", "v1")], ["c" * 40], [])
    cache.size_on_disk = 2e10
    monkeypatch.setattr(hf_ortho.app.checkpoint, "HF_HUB_CACHE", str(converted_folder))
    assert shapes("gpt2", public=True).commands.splitlines()[0] == "hf-ortho inspect gpt2 --json"
    assert deleted == ["a", "b"]
    with pytest.raises(HfOrthoError, match="is not a revision; give a branch"):
        shapes("owner/name", "../../x", public=True)
    size = 3e9
    with pytest.raises(HfOrthoError, match=r"owner/name has 3.0 GB of weights, but this page accepts at most 2 GB"):
        shapes("owner/name", public=True)
    size = 1e6
    for file in ("config.json", "adapter_config.json", "model.safetensors.index.json"):
        json_files = {file: 1.1e7}
        with pytest.raises(HfOrthoError, match=f"{file} of owner/name has 11.0 MB, but this page accepts at most 10"):
            shapes("owner/name", public=True)
    json_files, count = {}, len(loaded)
    for base in (str(converted_folder), "../x", "~/x", "/etc", converted_folder.name):
        adapter = {"base_model_name_or_path": base}
        monkeypatch.chdir(converted_folder.parent)
        with pytest.raises(HfOrthoError, match=r"owner/name is an adapter; its base model .* is not a Hub model"):
            shapes("owner/name", public=True)
    assert len(loaded) == count
    adapter = {"base_model_name_or_path": "owner/base", "revision": "v2"}
    shapes("owner/name", public=True)
    assert asked[-1] == ("owner/base", "v2")
    assert len(loaded) == count + 1


def test_without_the_hub_visitors_get_a_sentence():
    with pytest.raises(HfOrthoError, match="owner/name cannot be found on the Hub") as caught:
        shapes("owner/name", public=True)
    assert "\n" not in str(caught.value)


def test_unknown_source(converted_folder, tmp_path):
    folder = tmp_path / "unknown"
    shutil.copytree(converted_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["hf_ortho"]
    (folder / "config.json").write_text(json.dumps(config))
    found = shapes(str(folder))
    assert found.title.endswith("source unknown")
    assert [row[-2:] for row in found.rows] == [["-", "-"]] * 2
