"""The model card as huggingface_hub and a markdown reader see it."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import TrainingArguments

import hf_ortho
from hf_ortho.activations import FAMILIES
from hf_ortho.hub import Results, write_card


def tables(text):
    """Every markdown table as a list of rows of cells, the separator row left out but checked."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        header, separator, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
        assert set(separator) == {"---"}
        assert {len(row) for row in (separator, *rows)} == {len(header)}
        assert rows
        found.append([header, *rows])
    # Every line that looks like a row belongs to one of them.
    assert sum(len(table) + 1 for table in found) == sum(line.startswith("|") for line in text.splitlines())
    return found


@pytest.fixture
def card(tmp_path):
    def card(model, task="causal-lm", **options):
        write_card(tmp_path, model, task, place="me/small-hermite", **options)
        return ModelCard.load(tmp_path / "README.md")

    return card


@pytest.fixture
def ids():
    return torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_language_model(card, make_gpt2, ids, family, calibrated):
    model, _ = make_gpt2()
    report = hf_ortho.convert(model, f"{family}_5", calibration=[ids] if calibrated else None)
    found = card(model, report=report)
    assert (found.data.library_name, found.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"hf_ortho", family} <= set(found.data.tags)
    assert found.data.base_model is None
    assert f"`{family}_5`" in found.text
    assert "gelu_new" in found.text
    assert "import hf_ortho" in found.text
    assert 'AutoModelForCausalLM.from_pretrained("me/small-hermite")' in found.text
    assert found.text.strip().startswith("# small-hermite")
    (table,) = tables(found.text)
    assert len(table) == 3
    for row, layer in zip(table[1:], report.layers, strict=True):
        cells = dict(zip(table[0], row, strict=True))
        assert (cells["activation"], cells["source"]) == (f"`{layer.module}`", "gelu_new")
        assert cells["sup f"] == f"{layer.fit.sup_error:.1e}"
        assert cells["rms f"] == f"{layer.fit.rms_error:.1e}"
        assert cells["sup f'"] == f"{layer.fit.sup_derivative_error:.1e}"
        assert cells["outside"] == f"{layer.fit.mass_outside:.2%}"
        assert (cells["pre-activations seen"] == "-") == (not calibrated)
    assert ("weighted by the calibration data" in found.text) == calibrated
    assert all(note in found.text for note in report.notes)


def test_converted_image_model(card, make_convnext):
    model, _ = make_convnext()
    report = hf_ortho.convert(model, "fourier_6")
    found = card(model, "image-classification", report=report)
    assert found.data.pipeline_tag == "image-classification"
    assert "AutoModelForImageClassification" in found.text
    assert [row[0] for row in tables(found.text)[0][1:]] == [f"`{layer.module}`" for layer in report.layers]


def test_another_task(card, make_gpt2):
    model, _ = make_gpt2()
    hf_ortho.convert(model, "hermite_3")
    found = card(model, "")
    assert found.data.pipeline_tag is None
    assert 'AutoModel.from_pretrained("me/small-hermite")' in found.text
    assert tables(found.text) == []


def test_nothing_measured_is_said(card, make_gpt2):
    model, _ = make_gpt2()
    found = card(model, report=hf_ortho.convert(model, "hermite_3"))
    assert "Not evaluated" in found.text.split("## Results")[1].split("##")[0]
    assert "## Training" not in found.text
    assert "![" not in found.text


def test_results_picture_and_hyperparameters(card, make_gpt2, tmp_path):
    model, _ = make_gpt2()
    rows = [["loss", "5.10", "5.11"], ["perplexity", "164", "165"]]
    results = Results(["source", "converted"], rows, "On words.txt.")
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-4, max_steps=7, report_to="none")
    report = hf_ortho.convert(model, "hermite_3")
    found = card(model, report=report, results=results, arguments=arguments, picture="activations.png")
    section = found.text.split("## Results")[1].split("##")[0]
    assert tables(section) == [[["", "source", "converted"], *rows]]
    assert "On words.txt." in section
    assert "Not evaluated" not in section
    training = found.text.split("## Training")[1].split("##")[0]
    assert {"- learning_rate: 0.0003", "- max_steps: 7", "- lr_scheduler_type: linear"} <= set(training.splitlines())
    assert "](activations.png)" in found.text
    assert "fine-tuned" in found.text


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("", None),
        ("/home/me/gpt2", None),
        ("./gpt2", None),
        ("gpt2", None),
        ("runs/gpt2", None),
    ],
)
def test_base_model_is_a_hub_id(card, make_gpt2, tmp_path, monkeypatch, source, base):
    (tmp_path / "runs" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model, _ = make_gpt2()
    model.config._name_or_path = source
    model.config._commit_hash = "0" * 39 + "a" if base else None
    hf_ortho.convert(model, "hermite_3")
    found = card(model)
    assert found.data.base_model == base
    assert (f"at commit `{'0' * 39}a`" in found.text) == bool(base)
    assert (f"`{source}`" if source else "built in memory") in found.text


def test_many_layers_are_thinned(card, make_gpt2):
    model, _ = make_gpt2(n_layer=20, n_embd=4)
    report = hf_ortho.convert(model, "hermite_3")
    found = card(model, report=report)
    rows = [row[0] for row in tables(found.text)[0][1:]]
    assert len(rows) == 16
    assert (rows[0], rows[-1]) == ("`transformer.h.0.mlp.act`", "`transformer.h.19.mlp.act`")
    assert len(set(rows)) == 16
    assert "16 of 20" in found.text


def test_the_example_in_the_card_runs(make_gpt2, save_parts, tmp_path):
    model, _ = make_gpt2()
    hf_ortho.convert(model, "hermite_3")
    folder = save_parts(tmp_path / "it's here", model)
    write_card(folder, model, "causal-lm", place=str(folder))
    code = re.search(r"```python\n(.*?)```", Path(folder / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    loaded, saved = (m.transformer.h[1].mlp.act for m in (names["model"], model))
    assert torch.equal(loaded.coefficients, saved.coefficients)


def test_not_converted(card, make_gpt2):
    model, _ = make_gpt2()
    model.name_or_path = "someone/gpt2"
    found = card(model)
    assert found.data.tags == ["hf_ortho", "learnable-activations"]
    assert "Not converted." in found.text
    assert "`someone/gpt2`" in found.text
