"""Cards of models and adapters whose files hold Markdown, HTML and control sequences, read by a CommonMark parser."""

import json
import math
import re

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file

import hf_ortho
from hf_ortho.conversion.distill import Distillation
from hf_ortho.errors import CheckpointError
from hf_ortho.hub import DataSource, Results, TrainingDetails, card_of, write_card
from hf_ortho.hub.record import Graph, Record

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
EVIL = [
    "<img src=http://evil/x.png>",
    "` <img src=http://evil/x.png> `",
    "``` \n```\n<script>",
    "[x](http://evil)",
    "![x](http://evil/x.png)",
    "<http://evil>",
    "a\n\n# heading\n\n<b>",
    "[x]: http://evil",
    "a | <b> | `c`",
    "\\| <b> \\`",
    "&lt;b&gt; **bold** _it_ ~~s~~",
    "1. <b>",
    "- - -",
    "> <!-- x",
    "</details>",
    "<!-- end of how to load -->\n<b>",
    "\x1b[31m\x9b2J\u202e<b>\r\n",
]
OURS = ("<details>", "</details>", "<summary>", "</summary>", "<!-- how to load", "<!-- end of how to load -->")


def tokens(text):
    for token in PARSER.parse(text):
        yield token
        yield from token.children or ()


def shown(text):
    """All the text of a document, on one line."""
    parts = (token.content for token in tokens(text) if token.type in ("text", "text_special", "code_inline", "fence"))
    return re.sub(r"\s+", " ", "".join(parts))


def structure(text):
    """The tokens of a document that are not plain text or code."""
    plain = ("text", "text_special", "code_inline", "softbreak")
    return [(token.type, token.tag) for token in tokens(text) if token.type not in plain]


def assert_harmless(card):
    """No links, images, HTML, emphasis or control characters but those of the template; returns the body."""
    body = ModelCard(card).text
    for token in tokens(body):
        assert token.type not in ("link_open", "image", "html_inline", "em_open", "strong_open", "s_open"), token
        if token.type == "html_block":
            assert all(line.startswith(OURS) for line in token.content.strip().splitlines()), token.content
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", body)
    return body


def words(text):
    """The words that the reader must see."""
    return re.findall("[A-Za-z]{3,}", text)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, make_gpt2):
    folder = tmp_path_factory.mktemp("escaped")
    model, _ = make_gpt2(n_layer=1)
    report = hf_ortho.convert(model, "hermite_3", calibration=[torch.arange(32)[None]])
    model.save_pretrained(folder)
    values = {"source": {"loss": 5.0}, "converted": {"loss": 5.1}}
    data = DataSource("words.txt", "config", "train", None, 7)
    write_card(
        folder,
        report=report,
        results=[Results(values, data, "command", "machine", 3, "note")],
        data=[data],
        command="c",
        graph=Graph(20, True, 1e-6, "engine"),
    )
    (folder / "README.md").unlink()
    return folder


def spoiled(folder, target, config=None, record=None):
    """A copy of the JSON files of a folder, changed by the functions ``config`` and ``record``, if any."""
    for name, change in (("config.json", config), ("conversion.json", record)):
        plain = json.loads((folder / name).read_text())
        if change is not None:
            change(plain)
        (target / name).write_text(json.dumps(plain))
    return target


def put(evil):
    """``evil`` in every text of a config, and of a record."""

    def config(plain):
        plain["architectures"] = [evil]
        plain["hf_ortho"] |= {"source_model": evil, "source_revision": evil, "versions": {evil: evil}}
        plain["hf_ortho"]["source_activations"] = {evil: evil}
        plain["hf_ortho"]["layers"] = [{"module": f"{evil}.{i}", "source": f"{evil}{i}"} for i in range(20)]

    def record(plain):
        plain["commands"] = [evil, f"{evil}\n```\n<b>"]
        plain["left_alone"] = [[evil, evil]]
        plain["notes"] = [evil]
        plain["layers"] = [plain["layers"][0] | {"module": evil, "source": evil, "note": evil}]
        data = {"name": evil, "config": evil, "split": evil, "revision": None, "samples": 3}
        plain["data"] = [data]
        values = {evil: {evil: 1.0}, "b": {evil: 2.0}}
        result = {"values": values, "data": data, "command": evil, "hardware": evil, "note": evil, "seed": 1}
        plain["results"] = [result]
        plain["graph"]["engine"] = evil

    return config, record


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("recorded", [True, False], ids=["conversion.json", "config alone"])
def test_texts_of_a_model_stay_text(converted, tmp_path, evil, recorded):
    bodies = []
    for text in (evil, "word"):
        spoiled(converted, tmp_path, *put(text))
        if not recorded:
            (tmp_path / "conversion.json").unlink()
        card = card_of(tmp_path, repo_id="me/x", remote_code=True)
        bodies.append(assert_harmless(card))
    assert structure(bodies[0]) == structure(bodies[1])  # the same headings, lists, tables and cells
    for word in words(evil):
        assert shown(bodies[0]).count(word) >= 5


@pytest.mark.parametrize("evil", EVIL)
def test_texts_of_an_adapter_stay_text(tmp_path, evil):
    config = {
        "peft_type": evil,
        "base_model_name_or_path": evil,
        "revision": evil,
        "target_modules": [evil, f"{evil}x"],
        "modules_to_save": evil,
        "auto_mapping": {"base_model_class": evil},
        "peft_version": evil,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "labels.json").write_text(json.dumps({"0": evil, "1": "b"}))
    save_file({f"{evil}.lora_A.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    body = assert_harmless(card_of(tmp_path, repo_id="me/x", remote_code=False))
    assert "from transformers import AutoModel\n" in body  # not what the file calls a class
    for word in words(evil):
        assert shown(body).count(word) >= 5


def test_the_title_and_the_training_are_text(converted, tmp_path):
    folder = tmp_path / "a_<b>_[x](y)"
    folder.mkdir()
    spoiled(converted, folder)
    write_card(folder, training=TrainingDetails(None, {"<b>": "*x*"}))
    text = (folder / "README.md").read_text()
    assert "<b>: *x*" in shown(assert_harmless(text))
    assert ("heading_open", "h1") in structure(text)
    assert "a_<b>_[x](y)" in shown(text)
    assert "\n# x\\_\n" in card_of(folder, repo_id="me/x_", remote_code=False)


@pytest.mark.parametrize(
    "path",
    [
        "layers",
        "layers 0",
        "layers 0 module",
        "layers 0 sup_error",
        "layers 0 domain",
        "layers 0 tail_slopes",
        "layers 0 minimum",
        "layers 0 divergence",
        "weights",
        "notes",
        "fidelity",
        "fidelity predictions",
        "fidelity kl",
        "fidelity loss_before",
        "fidelity gradient_cosine",
        "fidelity rounding",
        "left_alone",
        "distillation",
        "results",
        "results 0 values",
        "results 0 values source",
        "results 0 values source loss",
        "results 0 data",
        "results 0 data name",
        "results 0 data revision",
        "results 0 data samples",
        "results 0 seed",
        "results 0 kind",
        "commands",
        "commands 0",
        "data 0",
        "graph",
        "graph opset",
        "graph difference",
        "graph engine",
    ],
)
def test_a_record_of_other_types_is_refused_or_shown(converted, tmp_path, path):
    *parents, key = (int(part) if part.isdecimal() else part for part in path.split())
    errors = []
    for value in (None, 5, -5, 1e300, math.inf, "x", "", [], {}, [[1, {}]], 10**400):

        def change(plain, value=value):
            for parent in parents:
                plain = plain[parent]
            plain[key] = value

        spoiled(converted, tmp_path, None, change)
        try:
            card_of(tmp_path, repo_id="me/x", remote_code=False)
        except CheckpointError as error:
            errors.append(str(error))
    assert errors or key in ("name", "revision", "module", "engine", 0)
    for error in errors:
        assert error.startswith(f"{tmp_path / 'conversion.json'} was not written by hf-ortho (")
        assert "\n" not in error


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b"[]", b"caf\xe9", b'{"layers": 9'], ids=["deep", "list", "Latin", "cut"]
)
def test_a_record_that_is_no_json_object(converted, tmp_path, content):
    spoiled(converted, tmp_path)
    (tmp_path / "conversion.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"conversion\.json (cannot be read|does not hold a JSON object)"):
        card_of(tmp_path, repo_id="me/x", remote_code=False)


def test_a_card_that_is_not_utf_8(converted, tmp_path):
    spoiled(converted, tmp_path)
    (tmp_path / "README.md").write_bytes(b"caf\xe9\n")
    with pytest.raises(CheckpointError, match=r"README\.md cannot be read: 'utf-8' codec"):
        card_of(tmp_path, repo_id="me/x", remote_code=False)


@pytest.mark.parametrize("names", ["GPT2LMHeadModel", [5], [None], {"a": 1}, 3])
def test_architectures_of_other_types(converted, tmp_path, names):
    spoiled(converted, tmp_path, lambda plain: plain.update(architectures=names))
    with pytest.raises(CheckpointError, match=r"architectures is .*; expected a list of class names"):
        card_of(tmp_path, repo_id="me/x", remote_code=False)


def test_infinite_results_of_a_distillation_survive(converted, tmp_path):
    report = Record.load(spoiled(converted, tmp_path)).report
    report.distillation = Distillation(0, math.inf, math.inf, True)
    Record(report).save(tmp_path)
    assert Record.load(tmp_path).report.distillation == report.distillation
    assert "0 steps of distillation: squared error of the output inf -> inf" in card_of(
        tmp_path, repo_id="me/x", remote_code=False
    )


@pytest.mark.parametrize(("before", "after"), [(1.0, 2000.0), (2000.0, 1.0), (-650.0, 650.0)])
def test_a_perplexity_too_large_for_a_float_is_shown_as_a_loss(converted, tmp_path, before, after):
    def change(plain):
        plain["fidelity"] |= {"loss_before": before, "loss_after": after}

    spoiled(converted, tmp_path, None, change)
    card = card_of(tmp_path, repo_id="me/x", remote_code=False)
    assert f"| loss | {before:.5f} -> {after:.5f} ({after - before:+.1e}) |" in card
    assert "| perplexity |" not in card
