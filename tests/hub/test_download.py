"""Models and data of the Hub, through the real client, against a local stand-in."""

import json

import datasets
import pytest
import torch
from stand_in import COMMIT, Repositories, hub
from transformers import AutoModelForCausalLM

import hf_ortho
from hf_ortho.checkpoints import carry
from hf_ortho.cli.demo_tasks import byte_tokenizer


@pytest.fixture
def root(tmp_path, tiny_gpt2_model):
    folder = tmp_path / "hub" / "models" / "me" / "tiny"
    tiny_gpt2_model.save_pretrained(folder, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder)
    data = tmp_path / "hub" / "datasets" / "me" / "text"
    data.mkdir(parents=True)
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (data / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return tmp_path / "hub"


def test_model_and_data_from_the_hub(root, tmp_path, connect, hf_ortho_command, monkeypatch, tiny_gpt2_model):
    flags = ["--degree", "12", "--revision", "v1", "--calibration-data", "me/text", "--block-size", "16"]
    with hub(root) as endpoint:
        connect(endpoint)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        done = hf_ortho_command("convert", "me/tiny", "-o", tmp_path / "out", *flags)
    assert done.code == 0, done.err
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


def warnings_of(caplog):
    """What is logged for the reader to know; the rest announces what happens."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_the_other_files_of_a_model_of_the_hub(root, tmp_path, connect, hf_ortho_command, monkeypatch, caplog):
    folder = root / "models" / "me" / "tiny"
    carried = {"modules.json": b'[{"path": "2_Dense"}]', "2_Dense/model.safetensors": b"weights", "LICENSE": b"mine"}
    left_out = {"README.md": b"# Tiny", "onnx/model.onnx": b"stale", "tf_model.h5": b"stale", "logs/x": b"x" * 2000}
    for path, body in (carried | left_out | {"notes.txt": b"cut"}).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(body)
    monkeypatch.setattr(carry, "LIMIT", 1900)
    repositories = Repositories(root)
    download = carry.hf_hub_download

    def lost(name, path, revision):
        assert revision == COMMIT
        assert path not in left_out  # only what is carried is downloaded
        if path == "notes.txt":
            raise OSError("lost")
        return download(name, path, revision=revision)

    monkeypatch.setattr(carry, "hf_hub_download", lost)
    with hub(repositories) as endpoint:
        connect(endpoint)
        done = hf_ortho_command("convert", "me/tiny", "-o", tmp_path / "out", "--degree", 3)
    assert done.code == 0, done.err
    assert {path: (tmp_path / "out" / path).read_bytes() for path in carried} == carried
    assert warnings_of(caplog) == [
        "note: not carried over from me/tiny: README.md (the model has a new card), logs/, onnx/, tf_model.h5, "
        "notes.txt (download failed)"
    ]


@pytest.mark.parametrize(
    ("name", "revision", "hint"),
    [("me/none", "main", "me/none"), ("me/tiny", "v9", "v9")],
    ids=["repository", "revision"],
)
def test_what_the_hub_lacks_is_one_sentence(root, tmp_path, connect, hf_ortho_command, name, revision, hint):
    with hub(root) as endpoint:
        connect(endpoint)
        done = hf_ortho_command("convert", name, "-o", tmp_path / "out", "--revision", revision)
    assert hint in done.error
    assert not (tmp_path / "out").exists()


def test_inspect_a_model_of_the_hub(root, tmp_path, connect, hf_ortho_command, tiny_gpt2_model):
    hf_ortho.convert(tiny_gpt2_model, "fourier_3")
    folder = root / "models" / "me" / "converted"
    tiny_gpt2_model.save_pretrained(folder, max_shard_size="20KB")
    with hub(root) as endpoint:
        connect(endpoint)
        done = hf_ortho_command("inspect", "me/converted", "--revision", "v1", "--json")
    found = json.loads(done.out)
    assert found["revision"] == COMMIT
    module = tiny_gpt2_model.transformer.h[1].mlp.act
    assert found["layers"][1]["parameters"]["frequencies"] == module.frequencies.tolist()
    shards = {path.name for path in (tmp_path / "cache").rglob("model-*.safetensors")}
    assert 0 < len(shards) < len(list(folder.glob("model-*.safetensors")))


def test_without_network_the_cache_is_used_and_said(
    root, tmp_path, connect, hf_ortho_command, tiny_gpt2_model, text_file, caplog
):
    hf_ortho.convert(tiny_gpt2_model, "hermite_3")
    tiny_gpt2_model.save_pretrained(root / "models" / "me" / "converted")
    commands = [
        ("inspect", "me/converted"),
        ("evaluate", "me/tiny", "--dataset", text_file, "--max-samples", 2),
        ("convert", "me/tiny", "-o", tmp_path / "again", "--degree", 4),
    ]
    with hub(root) as endpoint:
        connect(endpoint)
        online = [hf_ortho_command(*command) for command in commands[:2]]
    assert not warnings_of(caplog)
    for command in commands:
        caplog.clear()
        done = hf_ortho_command(*command)
        assert done.code == 0, done.err
        assert done.out == (online.pop(0).out if online else done.out)
        assert COMMIT in (done.out if command[0] != "convert" else (tmp_path / "again" / "config.json").read_text())
        notes = [f"note: no answer from {endpoint}: using the cached commit {COMMIT} of {command[1]}"]
        listing = "note: the Hub does not list the files of me/tiny (offline): only cached files are carried over"
        assert warnings_of(caplog) == notes + [listing] * (command[0] == "convert")
        assert command[0] != "convert" or (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ x }}"


@pytest.mark.parametrize("command", ["convert", "inspect", "evaluate", "plot"])
def test_without_network_and_cache_there_is_one_sentence(tmp_path, connect, hf_ortho_command, command):
    connect("http://127.0.0.1:9")
    out = ["-o", tmp_path / "out.png"] if command in ("convert", "plot") else []
    done = hf_ortho_command(command, "me/tiny", *out)
    assert "me/tiny" in done.error
    assert "http://127.0.0.1:9" in done.error
    assert not (tmp_path / "out.png").exists()
