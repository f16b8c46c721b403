"""Local paths in what is pushed."""

import json
from pathlib import Path

import pytest

from hf_ortho.hub.card.loading import BEGIN
from hf_ortho.hub.local_paths import public_name, shortened, without_paths


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("hf-ortho convert /home/me/gpt2 -o ../out/x", "hf-ortho convert gpt2 -o x"),
        ("hf-ortho finetune --dataset=~/data/mine.txt -o out", "hf-ortho finetune --dataset=mine.txt -o out"),
        ("hf-ortho convert '/home/me/a model' -o out", "hf-ortho convert 'a model' -o out"),
        ("hf-ortho convert 'C:\\Users\\me\\gpt2' -o out", "hf-ortho convert gpt2 -o out"),
        ("""hf-ortho x --set '{"a": "/home/me/x"}'""", """hf-ortho x --set '{"a": "x"}'"""),
        ("python mine.py  --x 'a b'", "python mine.py  --x 'a b'"),
        ("hf-ortho convert openai-community/gpt2 -o runs/out", "hf-ortho convert openai-community/gpt2 -o runs/out"),
        (
            "hf-ortho convert /cache/models--me--x/snapshots/0123 -o out",
            "hf-ortho convert me/x -o out",
        ),
    ],
)
def test_commands(command, public):
    assert shortened(command) == public


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("gpt2", "gpt2"),
        ("runs/gpt2", "gpt2"),  # a folder here
        ("/home/me/gpt2", "gpt2"),
        ("/home/me/gpt2/", "gpt2"),
        ("./gpt2", "gpt2"),
        ("~/models/gpt2", "gpt2"),
        ("a/b/c", "c"),
    ],
)
def test_names(tmp_path, monkeypatch, name, public):
    (tmp_path / "runs" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name(name) == public


def test_values_of_all_kinds():
    config = {
        "_name_or_path": "/home/me/gpt2",
        "text_config": {"_name_or_path": "/home/me/part"},
        "tokenizer_file": "/home/me/tokenizer.json",
        "architectures": ["GPT2LMHeadModel"],
        "label": "/not a path",
        "n_layer": 2,
        "hf_ortho": {"source_model": "/home/me/gpt2", "source_revision": None},
    }
    record = {
        "model": "/home/me/gpt2",
        "commands": ["hf-ortho convert /home/me/gpt2 -o x"],
        "data": [{"name": "/d/t.txt"}],
    }
    files = {"config.json": config, "conversion.json": record, "x.json": [1, None]}
    files = {name: json.dumps(value).encode() for name, value in files.items()} | {"odd.json": b"{"}
    done = without_paths(files)
    assert json.loads(done["config.json"]) == config | {
        "_name_or_path": "gpt2",
        "text_config": {"_name_or_path": "part"},
        "tokenizer_file": "tokenizer.json",
        "hf_ortho": {"source_model": "gpt2", "source_revision": None},
    }
    assert json.loads(done["conversion.json"]) == {
        "model": "gpt2",
        "commands": ["hf-ortho convert gpt2 -o x"],
        "data": [{"name": "t.txt"}],
    }
    assert [done[name] for name in ("x.json", "odd.json")] == [files[name] for name in ("x.json", "odd.json")]


def test_another_base_has_no_commit_of_the_first():
    config = {"base_model_name_or_path": "/home/me/gpt2", "base_commit": "0" * 40, "revision": "v1", "r": 8}
    done = without_paths({"adapter_config.json": json.dumps(config).encode()}, "me/gpt2")["adapter_config.json"]
    assert json.loads(done) == {"base_model_name_or_path": "me/gpt2", "base_commit": None, "revision": None, "r": 8}


def test_only_names_and_paths_are_replaced():
    """A source folder may be named as its model type, and modules have configs of their own."""
    config = {"model_type": "gpt2", "hf_ortho": {"source_model": "gpt2"}, "vision_tower": str(Path(__file__).parent)}
    module = {"_name_or_path": "/home/me/x", "content": "/", "chat_template": "{{ a / b }}"}
    files = {"config.json": config, "0_Transformer/config.json": module}
    done = without_paths({name: json.dumps(plain).encode() for name, plain in files.items()}, "openai-community/gpt2")
    assert json.loads(done["config.json"]) == {
        "model_type": "gpt2",
        "hf_ortho": {"source_model": "openai-community/gpt2"},
        "vision_tower": "hub",
    }
    assert json.loads(done["0_Transformer/config.json"]) == module | {"_name_or_path": "x"}


def test_the_base_in_a_card_of_others():
    text = "---\nbase_model: /home/me/gpt2\n---\nFine-tuned from /home/me/gpt2.\n"
    assert without_paths({"README.md": text.encode()})["README.md"].decode() == text.replace("/home/me/gpt2", "gpt2")


def test_the_card():
    head = "---\nlicense: mit\n---\n"
    text = (
        "# X\n\nA model, not `model`, of `/home/me/gpt2`; by `hf-ortho evaluate /other/place`; see /home/me/gpt2-xl.\n"
    )
    config = json.dumps({"a": {"source_model": "/home/me/gpt2"}, "b": {"source_model": "model"}}).encode()
    foreign = without_paths({"config.json": config, "README.md": (head + text).encode()})["README.md"].decode()
    assert foreign == head + text.replace("`/home/me/gpt2`", "`gpt2`")
    ours = without_paths({"config.json": config, "README.md": (head + BEGIN + text).encode()}, "me/base")
    expected = (
        text.replace("/home/me/gpt2`", "me/base`").replace("`model`", "`me/base`").replace("/other/place", "place")
    )
    found = ours["README.md"].decode()
    assert found.endswith(BEGIN + expected)
    assert "base_model: me/base\nbase_model_relation: finetune\n" in found
