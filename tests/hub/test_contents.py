"""Which folders can be pushed, and what is wrong with those that cannot."""

import shutil

import pytest

import hf_ortho
from hf_ortho.errors import CheckpointError
from hf_ortho.hub.contents import contents_of


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_gpt2):
    """A converted model in one file and in several, with the files of an adapter apart."""
    root = tmp_path_factory.mktemp("contents")
    model, _ = make_gpt2(n_layer=1)
    model.save_pretrained(root / "source")
    hf_ortho.convert(model, "hermite_3")
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="8KB")
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(root / "single" / "model.safetensors", root / "adapter" / "adapter_model.safetensors")
    return root


@pytest.mark.parametrize("name", ["source", "single", "sharded", "adapter"])
def test_whole_folders(models, name):
    found = contents_of(models / name)
    assert found.files == sorted(path.name for path in (models / name).iterdir())
    assert found.left_out == []
    assert found.adapter == (name == "adapter")


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-1])


def swap_shards(folder):
    first, second = sorted(folder.glob("model-*"))[:2]
    shutil.copy(first, second)


BROKEN = {
    "no weights": ("single", lambda f: (f / "model.safetensors").unlink(), "it has a config but neither"),
    "pickled weights": (
        "single",
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "cut short": ("single", lambda f: cut_short(f / "model.safetensors"), "model.safetensors is damaged or truncated"),
    "a shard cut short": ("sharded", lambda f: cut_short(max(f.glob("model-*"))), "is damaged or truncated"),
    "a shard missing": ("sharded", lambda f: max(f.glob("model-*")).unlink(), "model.safetensors.index.json lists, is"),
    "a wrong shard": ("sharded", swap_shards, r"model-00002-of-\d+.safetensors lacks "),
    "an empty index": ("sharded", lambda f: (f / "model.safetensors.index.json").write_text("{}"), "lists no weights"),
    "half an index": (
        "sharded",
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight'),
        "index.json cannot be read",
    ),
    "half a config": ("single", lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no model type": ("single", lambda f: (f / "config.json").write_text("{}"), "config.json cannot be read"),
    "no config": ("single", lambda f: (f / "config.json").unlink(), "contains neither a model nor an adapter"),
    "the source's weights": (
        "single",
        lambda f: shutil.copy(f.parent / "source.safetensors", f / "model.safetensors"),
        "is incomplete: its weights lack transformer.h.0.mlp.act.domain",
    ),
    "a broken link": ("single", lambda f: (f / "vocab.json").symlink_to(f / "blob"), "vocab.json is a link to a "),
    "an adapter without weights": (
        "adapter",
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "it has adapter_config.json but no adapter_model.safetensors",
    ),
    "an adapter of nothing": (
        "adapter",
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "does not name a peft_type",
    ),
    "half an adapter": ("adapter", lambda f: cut_short(f / "adapter_model.safetensors"), "damaged or truncated"),
    "a list": ("adapter", lambda f: (f / "adapter_config.json").write_text("[]"), "does not hold a JSON object"),
    "no folder": ("adapter", shutil.rmtree, "is not a folder"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders(models, tmp_path, what):
    name, damage, message = BROKEN[what]
    folder = shutil.copytree(models / name, tmp_path / name)
    shutil.copy(models / "source" / "model.safetensors", tmp_path / "source.safetensors")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        contents_of(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
