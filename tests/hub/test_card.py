"""The model card as huggingface_hub and a markdown reader see it."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import BertConfig, BertForMaskedLM, BertModel, TrainingArguments
from transformers.utils import PushToHubMixin

import hf_ortho
from hf_ortho.activations import FAMILIES
from hf_ortho.conversion.report import LayerReport
from hf_ortho.errors import CheckpointError
from hf_ortho.hub import DataSource, Results, TrainingDetails, card_of, command_line, write_card
from hf_ortho.hub.record import Record, carry_over

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VALUES = {"source": {"loss": 5.1, "perplexity": 164.0}, "converted": {"loss": 5.11, "perplexity": 166.05}}
TEXT = DataSource("me/text", "default", "validation", COMMIT, 7)


def tables(text):
    """Every markdown table as a list of rows of cells, the separator row left out but checked."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        lines = (re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines())
        header, separator, *rows = ([cell.strip().replace(r"\|", "|") for cell in line] for line in lines)
        assert set(separator) == {"---"}
        assert {len(row) for row in (separator, *rows)} == {len(header)}
        assert rows
        found.append([header, *rows])
    # Every line that looks like a row belongs to one of them.
    assert sum(len(table) + 1 for table in found) == sum(line.startswith("|") for line in text.splitlines())
    return found


def section(text, name):
    return text.split(f"## {name}\n")[1].split("\n## ")[0]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "small-hermite"


@pytest.fixture
def card(folder):
    def card(model, **options):
        model.save_pretrained(folder)
        write_card(folder, place="me/small-hermite", **options)
        return ModelCard.load(folder / "README.md")

    return card


@pytest.fixture
def ids():
    return torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("family", "calibrated"), [*((family, False) for family in FAMILIES), ("hermite", True)])
def test_converted_language_model(card, make_gpt2, ids, family, calibrated):
    model, _ = make_gpt2()
    report = hf_ortho.convert(model, f"{family}_5", calibration=[ids] if calibrated else None)
    found = card(model, report=report)
    assert (found.data.library_name, found.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"hf_ortho", family} <= set(found.data.tags)
    assert found.data.base_model is None
    assert f"`{family}_5`" in found.text
    assert "gelu_new" in found.text
    assert 'AutoModelForCausalLM.from_pretrained("me/small-hermite")' in found.text
    assert found.text.strip().startswith("# small-hermite")
    table, *quality = tables(found.text)
    # Without data both layers have the same fit, and one row.
    places = [f"`{layer.module}`" for layer in report.layers] if calibrated else ["`transformer.h.*.mlp.act` (2)"]
    assert [row[0] for row in table[1:]] == places
    for row, layer in zip(table[1:], report.layers, strict=False):
        cells = dict(zip(table[0], row, strict=True))
        assert cells["source"] == "gelu_new"
        assert cells["sup f"] == f"{layer.fit.sup_error:.1e}"
        assert cells["rms f"] == f"{layer.fit.rms_error:.1e}"
        assert cells["sup f'"] == f"{layer.fit.sup_derivative_error:.1e}"
        assert cells["outside"] == f"{layer.fit.mass_outside:.2%}"
        assert (cells["seen"] == "-") == (not calibrated)
        assert cells.get("KL") == (f"{layer.fit.divergence:.1e}" if calibrated else None)
    for legend in ("weighted by the calibration data", "KL: expected", "seen: range"):
        assert (legend in found.text) == calibrated
    assert all(note in found.text for note in report.notes)
    assert ("Not evaluated" in section(found.text, "Quality")) == (not calibrated)
    assert len(quality) == calibrated
    assert "## Training" not in found.text
    assert "![" not in found.text


@pytest.mark.parametrize(("batches", "data"), [(1, "the only calibration batch"), (2, "held-out calibration data")])
def test_the_quality_begins_with_the_fidelity(card, make_gpt2, ids, batches, data):
    """The numbers are those of the two models, on the batch that the report names."""
    model, _ = make_gpt2()
    source = copy.deepcopy(model).eval()
    calibration = [ids.roll(i, 1) for i in range(batches)]
    report = hf_ortho.convert(model, "hermite_3", calibration=calibration)
    quality = section(card(model, report=report).text, "Quality")
    sentence = f"The converted model, compared with its source model on 64 predictions ({data}):"  # 2 x 32 tokens
    assert quality.strip().startswith(sentence)
    (table,) = tables(quality)
    assert table[0] == ["measure", "value"]
    found = dict(table[1:])
    with torch.no_grad():
        before, after = (m.eval()(calibration[-1], labels=calibration[-1]) for m in (source, model))
    p, q = (output.logits.double().log_softmax(-1) for output in (before, after))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert float(found["KL(source || converted)"].split()[0]) == pytest.approx(expected, rel=0.06)  # two digits
    assert f"{before.loss.exp():.5g} -> {after.loss.exp():.5g} (" in found["perplexity"]
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found["same most likely class"] == f"{agree:.2%}"
    error = (after.logits - before.logits).double().norm() / before.logits.double().norm()
    assert float(found["relative error of the output"]) == pytest.approx(error.item(), rel=0.06)


@pytest.mark.parametrize("recorded", [True, False], ids=["conversion.json", "config alone"])
def test_the_folder_gives_the_same_card_again(card, make_gpt2, folder, recorded):
    model, _ = make_gpt2()
    report = hf_ortho.convert(model, "hermite_3")
    before = card(model, report=report)
    (folder / "README.md").unlink()
    if recorded:
        lines = str(before).splitlines()
        again = card_of(folder, repo_id="me/small-hermite", remote_code=False)
        made_then = ("- Hardware", "- Versions")  # the versions are those that the conversion noted
        kept = [line for line in again.splitlines() if not line.startswith(made_then)]
        assert kept == [line for line in lines if not line.startswith(made_then)]
        assert f"transformers {transformers.__version__}" in again
        return
    (folder / "conversion.json").unlink()
    (table,) = tables(card_of(folder, repo_id="me/small-hermite", remote_code=False))
    (full,) = tables(before.text)
    columns = [full[0].index(name) for name in table[0]]
    assert table == [[row[i] for i in columns] for row in full]
    assert {"activation", "domain", "sup f", "rms f", "outside"} <= set(table[0])


def test_results_are_a_table_and_a_model_index(card, make_gpt2, folder):
    model, _ = make_gpt2()
    report = hf_ortho.convert(model, "hermite_3")
    results = Results(VALUES, TEXT, "hf-ortho convert x", "2 CPU cores", seed=3, note="a part")
    found = card(model, report=report, results=[results], data=[TEXT], command=results.command)
    quality = section(found.text, "Quality")
    header = ["", "source", "converted", "change"]
    rows = [["loss", "5.10000", "5.11000", "+0.196%"], ["perplexity", "164.00000", "166.05000", "+1.250%"]]
    assert tables(quality) == [[header, *rows]]
    for part in ("me/text", "validation", "7 samples", COMMIT, "hf-ortho convert x", "seed 3", "2 CPU cores", "a part"):
        assert part in quality
    assert found.data.datasets == ["me/text"]
    assert found.data.metrics == ["perplexity"]
    head = metadata_load(folder / "README.md")
    name, evaluations = model_index_to_eval_results(head["model-index"])
    assert name == "small-hermite"
    assert {(e.task_type, e.dataset_type, e.dataset_config) for e in evaluations} == {
        ("text-generation", "me/text", "default")
    }
    assert {(e.dataset_split, e.dataset_revision) for e in evaluations} == {("validation", COMMIT)}
    assert {e.metric_type: e.metric_value for e in evaluations} == VALUES["converted"]
    assert ModelCardData(**head).to_dict() == found.data.to_dict()
    assert "hf-ortho convert x" in section(found.text, "How it was made")


def test_what_was_not_run_is_no_figure(card, make_gpt2):
    model, _ = make_gpt2()
    report = hf_ortho.convert(model, "hermite_3")
    values = {"source": {"loss": 5.0}, "converted": {"loss": None}}
    found = card(model, report=report, results=[Results(values, TEXT, "command", "")])
    assert tables(section(found.text, "Quality"))[0][1] == ["loss", "5.00000", "not run", "-"]
    assert found.data.eval_results is None
    assert found.data.metrics is None


def test_a_local_file_is_no_dataset_of_the_hub(card, make_gpt2, tmp_path):
    model, _ = make_gpt2()
    source = DataSource.of(range(4), str(tmp_path / "words.txt"))
    found = card(model, results=[Results(VALUES, source, "command", "here")], data=[source])
    assert found.data.datasets is None
    assert {e.dataset_name for e in found.data.eval_results} == {"words.txt"}
    assert str(tmp_path) not in str(found)


def test_infinite_figures_survive_the_record(card, make_gpt2, folder):
    model, _ = make_gpt2()
    values = {"source": {"perplexity": 2.0}, "converted": {"perplexity": float("inf")}}
    found = card(model, report=hf_ortho.convert(model, "hermite_3"), results=[Results(values, TEXT, "c", "h")])
    assert found.data.eval_results is None
    json.loads((folder / "conversion.json").read_text(), parse_constant=pytest.fail)
    assert Record.load(folder).results[0].values == values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("runs/gpt2", "runs/gpt2"),  # loaded from the Hub elsewhere
        ("me/cached", "me/cached"),
        ("", None),
        ("/home/me/gpt2", None),
        ("./gpt2", None),
        ("gpt2", None),
        ("runs/gpt2", None),
        ("outputs/not-here", None),
        ("a/b/c", None),
    ],
)
def test_base_model_is_a_hub_id(card, make_gpt2, tmp_path, monkeypatch, source, base):
    """Names on the Hub come with their commit, but for the one in the cache."""
    (tmp_path / "runs" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    cached = {"me/cached": "config.json"}
    monkeypatch.setattr("hf_ortho.hub.card.base.try_to_load_from_cache", lambda name, file: cached.get(name))
    model, _ = make_gpt2()
    model.config._name_or_path = source
    model.config._commit_hash = COMMIT if base and source not in cached else None
    hf_ortho.convert(model, "hermite_3")
    found = card(model)
    assert found.data.base_model == base
    assert found.data.get("base_model_relation") == ("finetune" if base else None)
    assert (f"at commit `{COMMIT}`" in found.text) == bool(model.config._commit_hash)
    assert ("commit not recorded" in found.text) == (source in cached)
    assert (f"`{source}`" if source else "built in memory") in found.text


@pytest.mark.parametrize(
    ("head", "inherited"),
    [
        ("license: mit\nlanguage: en\ntags: [x]\n", {"license": "mit", "language": "en"}),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("language: [en, fr]\n", {"language": ["en", "fr"]}),
        ("license: [\n", {}),
        (None, {}),
    ],
)
def test_the_license_is_that_of_the_base(card, make_gpt2, tmp_path, head, inherited):
    base = tmp_path / "base"
    base.mkdir()
    if head is not None:
        (base / "README.md").write_text(f"---\n{head}---\n# Base\n")
    model, _ = make_gpt2()
    model.config._name_or_path = str(base)
    hf_ortho.convert(model, "hermite_3")
    found = card(model)
    keys = ("license", "license_name", "license_link", "language")
    assert {key: found.data.get(key) for key in keys if found.data.get(key)} == inherited
    assert ("so does its license" in found.text) == ("license" not in inherited)


def test_what_else_the_card_keeps_of_the_base(card, make_gpt2, tmp_path):
    (tmp_path / "base").mkdir()
    head = "library_name: sentence-transformers\npipeline_tag: sentence-similarity\ndatasets: [s2orc, snli]\n"
    head += "tags: [sentence-transformers, hf_ortho, pytorch, ONNX, transformers]\nlicense: mit\n"
    (tmp_path / "base" / "README.md").write_text(f"---\n{head}---\n# Base\n")
    model, _ = make_gpt2()
    model.config._name_or_path = str(tmp_path / "base")
    hf_ortho.convert(model, "hermite_3")
    data = DataSource("me/text", revision=COMMIT)
    found = card(model, data=[data]).data
    assert (found.library_name, found.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    ours = ["hf_ortho", "learnable-activations", "hermite"]
    assert found.tags == [*ours, "sentence-transformers", "transformers"]
    assert found.datasets == ["me/text", "s2orc", "snli"]
    trained = card(model, training=TrainingDetails(TrainingArguments("out"))).data
    assert trained.pipeline_tag == "text-generation"  # of its head, whatever that of the base was


@pytest.mark.parametrize(
    "head",
    [
        "license: {a: b}\nlicense_name: [x]\nlanguage: no\ntags: {a: b}\npipeline_tag: 3\nlibrary_name: [a]\n",
        "license: 2024-01-01\ntags: [1, [2], {a: b}, null]\nlanguage: [en, 5, no]\nmodel-index: 5\ndatasets: [{}]\n",
        "- a\n- b\n",
        "tags: " + "[" * 3000,
        "a: &a [1]\n*a : 2\n",
    ],
    ids=["other types", "odd items", "list", "deep", "unhashable"],
)
def test_metadata_of_the_base_that_is_none(card, make_gpt2, tmp_path, head):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{head}---\n# Base\n")
    model, _ = make_gpt2()
    model.config._name_or_path = str(tmp_path / "base")
    hf_ortho.convert(model, "hermite_3")
    found = card(model).data
    assert (found.license, found.datasets, found.pipeline_tag) == (None, None, "text-generation")
    assert (found.library_name, found.tags) == ("transformers", ["hf_ortho", "learnable-activations", "hermite"])
    assert found.language == (["en"] if "language: [en" in head else None)


@pytest.mark.parametrize(
    ("config", "cls", "task"),
    [
        (None, "SentenceTransformer", "sentence-similarity"),
        ("{", "SentenceTransformer", "sentence-similarity"),
        ('{"model_type": ["x"]}', "SentenceTransformer", "sentence-similarity"),
        ('{"model_type": "SparseEncoder"}', "SparseEncoder", "feature-extraction"),
    ],
)
def test_a_model_of_sentence_transformers(folder, config, cls, task):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(**sizes, vocab_size=20))
    hf_ortho.convert(model, "hermite_3")
    model.save_pretrained(folder)
    (folder / "modules.json").write_text("[]")
    if config is not None:
        (folder / "config_sentence_transformers.json").write_text(config)
    write_card(folder)
    found = ModelCard.load(folder / "README.md")
    assert (found.data.library_name, found.data.pipeline_tag) == ("sentence-transformers", task)
    assert f'from sentence_transformers import {cls}\n\nmodel = {cls}("{folder}")\n' in found.text
    assert "import hf_ortho" in found.text
    pushed = card_of(folder, repo_id="me/x", remote_code=True)
    assert f'{cls}("me/x", trust_remote_code=True)' in pushed


def test_further_metadata_wins(card, make_gpt2):
    model, _ = make_gpt2()
    hf_ortho.convert(model, "hermite_3")
    found = card(model, metadata={"license": "mit", "tags": "mine", "base_model": "me/x"})
    assert (found.data.license, found.data.base_model) == ("mit", "me/x")
    assert found.data.tags == ["hf_ortho", "learnable-activations", "hermite", "mine"]


def test_many_layers_are_folded(card, make_gpt2):
    model, _ = make_gpt2()
    report = hf_ortho.convert(model, "hermite_3")
    fit = report.layers[0].fit
    report.layers = [
        LayerReport(f"transformer.h.{i}.mlp.act", "activation_function", dataclasses.replace(fit, rms_error=0.01 * i))
        for i in range(20)
    ]
    found = card(model, report=report)
    ends, everything = tables(found.text)
    paths = [f"`transformer.h.{i}.mlp.act`" for i in range(20)]
    assert [row[0] for row in everything[1:]] == paths
    assert [row[0] for row in ends[1:]] == [paths[0], paths[-1]]
    folded = found.text.split("<details>\n")[1].split("</details>")[0]
    assert all(path in folded for path in paths)
    # Markdown inside HTML is only rendered between empty lines.
    assert "</summary>\n\n|" in folded
    assert folded.endswith("|\n\n")


def test_a_fine_tuned_model_shows_all_stages(card, make_gpt2, ids, folder, tmp_path):
    model, _ = make_gpt2()
    first = Results(VALUES, TEXT, "hf-ortho convert x", "here")
    report = hf_ortho.convert(model, "hermite_3", calibration=[ids])
    card(model, report=report, results=[first], command="hf-ortho convert x")
    tuned = tmp_path / "tuned"
    model.save_pretrained(tuned)
    carry_over(str(folder), None, tuned)
    arguments = TrainingArguments(
        output_dir=str(tuned), learning_rate=3e-4, max_steps=7, report_to="none", use_cpu=True
    )
    values = {"converted": {"loss": 5.11}, "fine-tuned": {"loss": 4.0}}
    for _ in range(2):  # the second time replaces the figures
        write_card(
            tuned,
            results=[Results(values, TEXT, "hf-ortho finetune y", "here", kind="training")],
            command="hf-ortho finetune y",
            training=TrainingDetails(arguments, {"train": "all"}),
        )
    text = (tuned / "README.md").read_text()
    fidelity, *shown = tables(section(text, "Quality"))
    assert "The converted model before the fine-tuning, compared with its source model on 64 predictions" in text
    assert [row[0] for row in fidelity[:2]] == ["measure", "KL(source || converted)"]
    assert [table[0][1:3] for table in shown] == [["source", "converted"], ["converted", "fine-tuned"]]
    assert "then fine-tuned" in text
    assert "hf-ortho convert x\nhf-ortho finetune y\n" in section(text, "How it was made")
    training = section(text, "Training").splitlines()
    assert {"- learning_rate: 0.0003", "- max_steps: 7", "- lr_scheduler_type: linear", "- train: all"} <= set(training)
    (evaluation,) = ModelCard(text).data.eval_results
    assert evaluation.metric_value == 4.0


def test_the_record_keeps_that_a_figure_is_of_a_training(make_gpt2, tmp_path):
    model, _ = make_gpt2()
    report = hf_ortho.convert(model, "hermite_3")
    values = {"before": {"loss": 5.0}, "now": {"loss": 4.0}}
    for kind in ("conversion", "training"):
        Record(report, [Results(values, TEXT, "c", "h", kind=kind)]).save(tmp_path)
        assert Record.load(tmp_path).results[0].of_training == (kind == "training")
    file = tmp_path / "conversion.json"
    plain = json.loads(file.read_text())
    assert plain["results"][0].pop("kind") == "training"
    file.write_text(json.dumps(plain))
    assert not Record.load(tmp_path).results[0].of_training
    plain["results"][0]["values"] = {"source": {"loss": 5.0}, "gelu, fine-tuned": {"loss": 4.0}}
    file.write_text(json.dumps(plain))
    assert Record.load(tmp_path).results[0].of_training  # a file from before the kind was kept
    plain["results"][0]["kind"] = "holiday"
    file.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"conversion\.json .*kind 'holiday'"):
        Record.load(tmp_path)


@pytest.mark.parametrize(("calibrated", "weights"), [(True, "density"), (False, None)])
def test_a_record_of_version_0_1(make_gpt2, tmp_path, calibrated, weights):
    """``version_0.1.json`` was written by hf_ortho 0.1: without weights, notes and fidelity."""
    model, _ = make_gpt2()
    hf_ortho.convert(model, "tropical_3")
    model.save_pretrained(tmp_path)
    plain = json.loads(Path(__file__).with_name("records").joinpath("version_0.1.json").read_text())
    file = tmp_path / "conversion.json"
    file.write_text(json.dumps(plain | {"calibrated": calibrated}))
    record = Record.load(tmp_path)
    report = record.report
    assert (report.weights, report.fidelity, report.distillation) == (weights, None, None)
    assert report.notes == [plain["layers"][0]["note"]]  # of both layers
    assert [layer.fit.rms_error for layer in report.layers] == [layer["rms_error"] for layer in plain["layers"]]
    assert {layer.fit.divergence for layer in report.layers} == {None}
    assert ("not calibrated" in str(report)) == (not calibrated)
    text = card_of(tmp_path, repo_id="me/small", remote_code=False)
    fits, losses = tables(text)
    assert fits[0][3:6] == ["domain", "sup f", "rms f"]
    assert fits[1][3:6] == ["-9.50..1.62", "8.7e-02", "3.1e-03"]
    assert losses[1][:3] == ["loss", "5.53256", "5.53269"]
    assert ("weighted by the calibration data" in text) == calibrated
    assert report.notes[0] in text.replace("\\", "")
    record.save(tmp_path)
    assert json.loads(file.read_text())["weights"] == weights
    assert Record.load(tmp_path) == record


@pytest.mark.parametrize(
    ("init", "started", "reach"),
    [
        ("paper", "They were initialized as in the paper.", "An inference engine that"),
        ("unit", "They were initialized to E[f(x)^2] = 1 under N(0, 1).", "An inference engine that"),
        ("gelu", "They were initialized by weighted least-squares fits to gelu.", "Outside its domain, an"),
    ],
)
def test_a_model_from_scratch(card, make_gpt2, init, started, reach):
    model, _ = make_gpt2(activation_function="hermite_3")
    model.config.hf_ortho = {"activation": "hermite_3", "init": init}
    found = card(model, training=TrainingDetails(base_model="someone/gpt2"))
    assert f"activations, trained from scratch. {started}\n" in found.text
    assert section(found.text, "Limits").strip().startswith(reach)
    assert ("with straight tails" in found.text) == (init == "gelu")
    assert "someone/gpt2" not in str(found)


def test_the_picture_is_shown_if_it_is_there(card, make_gpt2, folder):
    model, _ = make_gpt2()
    folder.mkdir()
    (folder / "activations.png").write_bytes(b"png")
    assert "](activations.png)" in card(model, report=hf_ortho.convert(model, "hermite_3")).text


def test_a_model_without_classes(card, ids):
    """Its outputs are compared by their norm, and the errors of its layers add to the square of that."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=257, **sizes))
    report = hf_ortho.convert(model, "hermite_2", calibration=[ids, ids.flip(0)])
    text = card(model, report=report).text
    fits, quality = tables(text)
    assert fits[0][3:5] == ["error^2", "domain"]
    assert [row[3] for row in fits[1:]] == [f"{layer.fit.divergence:.1e}" for layer in report.layers]
    assert "error^2: squared relative error of the output, expected from the errors of this layer alone; sup:" in text
    assert [row[0] for row in quality] == ["measure", "relative error of the output", "relative error of the gradient"]
    assert quality[1][1] == f"{report.fidelity.output_error:.1e}"
    assert "compared with its source model on 64 predictions (held-out calibration data):" in text


def test_other_heads_keep_their_class(card):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=16, **sizes))
    hf_ortho.convert(model, "hermite_3")
    found = card(model)
    assert found.data.pipeline_tag == "fill-mask"
    assert "AutoModelForMaskedLM.from_pretrained" in found.text
    model = model.bert
    found = card(model)
    assert found.data.pipeline_tag is None
    assert 'AutoModel.from_pretrained("me/small-hermite")' in found.text


def test_the_example_in_the_card_runs(make_gpt2, save_parts, tmp_path):
    model, _ = make_gpt2()
    hf_ortho.convert(model, "hermite_3")
    folder = save_parts(tmp_path / 'it\'s "here"', model)
    write_card(folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    loaded, saved = (m.transformer.h[1].mlp.act for m in (names["model"], model))
    assert torch.equal(loaded.coefficients, saved.coefficients)


def test_not_converted(card, make_gpt2):
    model, _ = make_gpt2()
    found = card(model, training=TrainingDetails(base_model="someone/gpt2", base_revision=COMMIT))
    assert found.data.tags == ["hf_ortho", "learnable-activations"]
    assert (found.data.base_model, found.data.get("base_model_relation")) == ("someone/gpt2", "finetune")
    assert "not learnable" in found.text
    assert "import hf_ortho" not in found.text


def test_the_tags_go_with_a_native_push(make_gpt2, monkeypatch):
    model, _ = make_gpt2()
    sent = {}
    monkeypatch.setattr(PushToHubMixin, "push_to_hub", lambda self, repo, **options: sent.update(options))
    hf_ortho.convert(model, "tropical_rational_2")
    model.push_to_hub("me/x")
    assert sent["tags"] == ["hf_ortho", "learnable-activations", "tropical_rational"]
    hf_ortho.revert(model)
    assert model.model_tags == []


@pytest.mark.parametrize("content", [None, "{", '{"activation": "hermite_3"}'])
def test_a_folder_without_a_model_or_with_a_broken_record(make_gpt2, save_parts, tmp_path, content):
    if content is not None:
        save_parts(tmp_path, make_gpt2()[0])
        (tmp_path / "conversion.json").write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("flag", ["token", "hub_token", "hub-token", "push_to_hub_token", "push-to-hub-token"])
def test_a_command_is_quoted_and_keeps_no_token(monkeypatch, flag):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    argv = [
        "me/gpt2",
        "-o",
        "my folder",
        f"--{flag}",
        "hf_secret",
        f"--{flag}=hf_other",
        "--token_file=x",
        "--seed",
        "1",
    ]
    argv += ["hf_mine", "--hub_model_id=hf_mine"]
    assert command_line("convert", argv) == "hf-ortho convert me/gpt2 -o 'my folder' --token_file=x --seed 1"


def test_groups_of_channels(card, make_gpt2):
    model, _ = make_gpt2()
    report = hf_ortho.convert(model, "fourier_3_g8")
    text = section(card(model, report=report).text, "What was converted")
    assert "\n\n(`fourier_3_g8`: 10 parameters for each of 8 groups of consecutive channels)\n\nwith straight" in text
