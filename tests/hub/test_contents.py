"""Which folders can be pushed, which of their files are, and what is wrong with folders that cannot."""

import json
import os
import shutil

import pytest

import hf_ortho
from hf_ortho.errors import CheckpointError, ConfigError
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


MODULES = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
CARD = "![Shapes](activations.png) <img width=5 src='assets/a%20b.jpg'> ![other](notes.txt) ![up](../up.png)"
NEEDED = {
    "README.md": CARD,
    "activations.png": "",
    "assets/a b.jpg": "",
    "conversion.json": "{}",
    "modules.json": json.dumps(MODULES),
    "1_Pooling/config.json": "{}",
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "",
    "config_sentence_transformers.json": "{}",
    "sentence_bert_config.json": "{}",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "",
    "additional_chat_templates/tools.jinja": "",
    "vocab.txt": "",
    "merges.txt": "",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "sentencepiece.bpe.model": "",
    "source.spm": "",
    "LICENSE": "",
    "NOTICE.txt": "",
}
# What a model does not need, and how it is listed.
OTHERS = {
    "token": "token",
    "id_rsa": "id_rsa",
    "secrets.json": "secrets.json",
    "sub/credentials": "sub/",
    "x.ipynb": "x.ipynb",
    "wandb/run-1/config.yaml": "wandb/",
    "runs/a/events.out.tfevents.1": "runs/",
    "events.out.tfevents.2": "events.out.tfevents.2",
    "core.1234": "core.1234",
    "x.sqlite": "x.sqlite",
    "p.pkl.gz": "p.pkl.gz",
    "x.dill": "x.dill",
    "big.bin.bak": "big.bin.bak",
    "x.npy": "x.npy",
    "gensim.model": "gensim.model",
    "notes.txt": "notes.txt",
    "train.jsonl": "train.jsonl",
    "modeling_own.py": "modeling_own.py",
    "optimizer.pt": "optimizer.pt",
    "training_args.bin": "training_args.bin",
    "trainer_state.json": "trainer_state.json",
    ".env": ".env",
    ".git/config": ".git/",
    "checkpoint-5/config.json": "checkpoint-5/",
    "old.safetensors": "old.safetensors",
    "activations/step-1.safetensors": "activations/",
    "other/1_Pooling/config.json": "other/",
    "2_Dense/pytorch_model.bin": "2_Dense/pytorch_model.bin",
    "1_Pooling/secrets.json": "1_Pooling/secrets.json",
    "assets/hidden.png": "assets/hidden.png",
}


def write(folder, files):
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def test_only_what_a_model_needs_is_pushed(models, tmp_path):
    folder = shutil.copytree(models / "single", tmp_path / "single")
    needed = {path.name for path in folder.iterdir()} | NEEDED.keys()
    write(folder, NEEDED | dict.fromkeys([*OTHERS, ".hf_ortho.json"], "x"))
    (folder / "linked").symlink_to(tmp_path)
    (folder / "vocab-link.json").symlink_to("added_tokens.json")
    found = contents_of(folder)
    assert found.files == sorted([*needed, "vocab-link.json"])
    assert found.left_out == sorted([*set(OTHERS.values()), "linked/ (a link to a folder)"])


@pytest.mark.parametrize(
    ("patterns", "added"),
    [
        (["*.py"], {"modeling_own.py"}),
        (["runs/*", "x.npy"], {"runs/a/events.out.tfevents.1", "x.npy"}),
        (["2_Dense/*"], {"2_Dense/pytorch_model.bin"}),  # a pickle that the model needs
        (["token"], {"token"}),
        (["*"], set(OTHERS) - {"token", "id_rsa", "secrets.json", "1_Pooling/secrets.json", "sub/credentials", ".env"}),
    ],
)
def test_further_files_are_included_by_pattern(models, tmp_path, patterns, added):
    folder = shutil.copytree(models / "single", tmp_path / "single")
    write(folder, NEEDED | dict.fromkeys(OTHERS, "x"))
    plain = contents_of(folder)
    found = contents_of(folder, patterns)
    assert set(found.files) - set(plain.files) == added - {".git/config"}  # hidden folders are not entered


def test_a_pattern_that_selects_nothing(models, tmp_path):
    folder = shutil.copytree(models / "single", tmp_path / "single")
    write(tmp_path, {"secret.txt": "x"})
    write(folder, {"id_rsa": "x"})
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(folder / "pipe")
    for pattern, reason in {
        "*.py": "",
        "id_*": "",
        "*.txt": ": notes.txt is a link that leads out of the folder",
        "pipe": ": pipe is not a regular file",
    }.items():
        with pytest.raises(ConfigError) as caught:
            contents_of(folder, [pattern])
        assert str(caught.value) == f"include {pattern!r} selects no file of {folder}{reason}"


def test_a_snapshot_in_the_cache_links_to_its_blobs(models, tmp_path):
    repository = tmp_path / "models--me--x"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(models / "single", blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert contents_of(snapshot).files == sorted(file.name for file in blobs.iterdir())
    write(repository, {"private": "secret"})
    (snapshot / "README.md").symlink_to("../../private")
    with pytest.raises(CheckpointError, match=r"README\.md is a link that leads out of the folder"):
        contents_of(snapshot)


def test_a_name_that_is_not_utf_8(models, tmp_path):
    folder = shutil.copytree(models / "single", tmp_path / "single")
    (folder / os.fsdecode(b"a\xff.txt")).write_text("x")
    assert contents_of(folder).left_out == [os.fsdecode(b"a\xff.txt")]
    with pytest.raises(ConfigError, match=r"the name of 'a\\udcff.txt' is not UTF-8; rename the file"):
        contents_of(folder, ["*.txt"])


def link_out(folder, name):
    """Replace a file, if any, by a link to it, somewhere else."""
    if (folder / name).exists():
        (folder / name).rename(folder.parent / name)
    else:
        (folder.parent / name).write_text("secret")
    (folder / name).symlink_to(folder.parent / name)


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
    "a card outside": (
        "single",
        lambda f: link_out(f, "README.md"),
        "README.md is a link that leads out of the folder; replace it with a copy",
    ),
    "a config outside": ("single", lambda f: link_out(f, "config.json"), "config.json is a link that leads out of"),
    "a license outside": ("adapter", lambda f: link_out(f, "LICENSE"), "LICENSE is a link that leads out of the"),
    "a pipe": ("single", lambda f: os.mkfifo(f / "vocab.json"), "vocab.json is not a regular file"),
    "weights outside": (
        "single",
        lambda f: (
            (f / "model.safetensors").rename(f.parent / "w") and (f / "model.safetensors").symlink_to(f.parent / "w")
        ),
        "model.safetensors is a link that leads out of the folder",
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
