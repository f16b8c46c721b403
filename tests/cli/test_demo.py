import contextlib
import dataclasses
import re
import shutil

import matplotlib.image
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    GPT2Model,
)

from hf_ortho.checkpoints.load import Checkpoint, load_checkpoint
from hf_ortho.cli import demo_story, demo_tasks
from hf_ortho.errors import DataError
from hf_ortho.files import MANIFEST
from hf_ortho.folders import OutputFolder
from hf_ortho.tasks import built_in
from hf_ortho.training.evaluation import evaluate_model

QUICK = ("--steps", "3", "--tune-steps", "2")


@pytest.fixture(scope="module")
def demo(hf_ortho_command):
    def run(*argv):
        return hf_ortho_command("demo", *argv)

    return run


@pytest.fixture(scope="module", autouse=True)
def little_data():
    """A little of the help texts and of the digits, and small batches of them to calibrate with."""
    texts = built_in.pydoc_topics()
    held_back = {"text": [texts["validation"][0]["text"][:3000]]}
    little = {"pydoc_topics": DatasetDict(train=texts["train"].select([0, 1]), validation=Dataset.from_dict(held_back))}
    with contextlib.suppress(DataError):  # without scikit-learn
        digits = built_in.digits()
        little["digits"] = DatasetDict({name: split.select(range(64)) for name, split in digits.items()})
    with pytest.MonkeyPatch.context() as patch:
        for name, splits in little.items():
            patch.setitem(built_in.BUILT_IN, name, lambda splits=splits: splits)
        for name, batch in (("text", 1), ("vision", 4)):
            task = dataclasses.replace(demo_tasks.DEMOS[name], batch_size=4, calibration_batch=batch)
            patch.setitem(demo_tasks.DEMOS, name, task)
        yield


@pytest.fixture(scope="module")
def text_demo(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "text"
    return demo(*QUICK, "-o", folder), folder


@pytest.fixture(scope="module")
def vision_demo(demo, tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("demo") / "vision"
    return demo("--task", "vision", "--family", "fourier", "--degree", "4", *QUICK, "-o", folder), folder


def check_files(folder, processor_files):
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "conversion.json",
        "activations.png",
        "config.json",
        "model.safetensors",
        MANIFEST,
        *processor_files,
    }
    height, width, _ = matplotlib.image.imread(folder / "activations.png").shape
    assert height > 300
    assert width > 600
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_the_text_demo(text_demo):
    ran, folder = text_demo
    assert ran.code == 0, ran.err
    assert "bit-equal: True" in ran.out
    assert "trains for about a minute: too little to\nwrite sensible text, " in ran.out
    key, *figures = re.search(
        r"Result: (\w+) (\S+) -> (\S+) by the conversion; fine-tuned: (\S+) vs. (\S+)\n", ran.out
    ).groups()
    assert key == "perplexity"
    assert [float(v) for v in figures[2:]] == pytest.approx([float(v) for v in ran.figures["perplexity"][:2]], rel=1e-4)
    assert "demo --model openai-community/gpt2" in ran.out.splitlines()[-1]
    check_files(folder, {"generation_config.json", "tokenizer.json", "tokenizer_config.json"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.activation_function == "hermite_8"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n\treturn 'naïve ✓'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_the_vision_demo(vision_demo):
    ran, folder = vision_demo
    assert ran.code == 0, ran.err
    assert "bit-equal: True" in ran.out
    check_files(folder, {"preprocessor_config.json"})
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.hidden_act == "fourier_4"
    assert model.config.num_labels == 10
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").size["shortest_edge"] == 32


def test_the_card_of_the_demo(vision_demo):
    ran, folder = vision_demo
    card = (folder / "README.md").read_text()
    assert "](activations.png)" in card
    assert "image-classification" in card
    assert "convnext.encoder.stages.2.layers.1.act" in card
    row = next(line for line in card.splitlines() if line.startswith("| loss") and "->" not in line)
    assert row.split(" | ")[-1].rstrip(" |") == ran.figures["loss"][1]
    assert "| same most likely class |" in card


def test_the_figures_are_those_of_the_saved_model(vision_demo):
    """The last table is the fine-tuned source against the fine-tuned conversion, which is what was saved."""
    ran, folder = vision_demo
    checkpoint = load_checkpoint(str(folder))
    _, held_back = demo_tasks.DEMOS["vision"].datasets(checkpoint)
    found = evaluate_model(checkpoint, held_back)
    for key in ("loss", "top1", "top5"):
        assert float(ran.figures[key][1]) == pytest.approx(found[key], abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint(demo, gpt2_folder, tmp_path):
    ran = demo("--model", gpt2_folder, "--tune-steps", 1, "--degree", 4, "-o", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    assert f"1. {gpt2_folder} with gelu_new" in ran.out
    assert "outputs bit-equal: True" in ran.out
    texts = re.findall(r"Generated with (\w+): .Python is a prog", ran.out)
    assert texts == ["gelu_new", "hermite_4"]
    assert ran.out.splitlines()[-1].startswith(f"Next: hf-ortho convert {gpt2_folder} ")
    check_files(tmp_path / "out", {"generation_config.json", "tokenizer.json", "tokenizer_config.json"})
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.hf_ortho["source_model"] == str(gpt2_folder)
    found = evaluate_model(
        load_checkpoint(str(tmp_path / "out")),
        demo_tasks.checkpoint_task(str(gpt2_folder), None).datasets(load_checkpoint(str(gpt2_folder)))[1],
    )
    assert float(ran.figures["loss"][1]) == pytest.approx(found["loss"], abs=1e-5)


@pytest.mark.slow
def test_an_encoder_without_a_head(demo, make_gpt2, save_parts, tmp_path):
    model, tokenizer = make_gpt2()
    source = save_parts(tmp_path / "source", GPT2Model(model.config), tokenizer)
    ran = demo("--model", source, "--degree", 3, "-o", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    assert "hermite_3: output within " in ran.out
    assert "Skipped: GPT2Model has no head to train" in ran.out
    embed = [AutoModel.from_pretrained(folder) for folder in (source, tmp_path / "out")]
    for title, pair in demo_story.SENTENCES:
        texts = [tokenizer(text, return_tensors="pt")["input_ids"][:, :32] for text in pair]
        with torch.no_grad():
            found = [torch.cosine_similarity(*(model(ids)[0].mean(1) for ids in texts)).item() for model in embed]
        assert [float(cell) for cell in ran.figures[title]] == pytest.approx(found, abs=1e-4)


def test_a_checkpoint_that_does_not_fit(demo, make_gpt2, gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_gpt2()[0].save_pretrained(tmp_path / "bare")
    assert "bare has no tokenizer, so the demo has no text for it; convert" in demo("--model", "bare").error
    for flags in (["--task", "text"], ["--steps", "3"]):
        assert " ".join(flags) + ": for the small models" in demo("--model", gpt2_folder, *flags).error
    assert "--dataset digits requires --model" in demo("--dataset", "digits").error
    assert "not cached" in demo("--model", "nobody/no-such-model").error
    assert [p.name for p in tmp_path.iterdir()] == ["bare"]


@pytest.fixture
def tiny_text(monkeypatch, make_gpt2):
    """The text demo with a model of one layer, and without its picture."""

    def build():
        # Weights so large that a conversion to a low degree changes the perplexity.
        model, tokenizer = make_gpt2(n_layer=1, n_positions=demo_tasks.BLOCK, initializer_range=0.5)
        return Checkpoint(model, tokenizer, None, None)

    monkeypatch.setitem(demo_tasks.DEMOS, "text", dataclasses.replace(demo_tasks.DEMOS["text"], build=build))
    monkeypatch.setattr(demo_story, "plot_activations", lambda panels, path, title: path.write_bytes(b"png"))


def test_the_same_again_with_overwrite(demo, tiny_text, tmp_path):
    first = demo(*QUICK, "--seed", 3, "-o", tmp_path / "out")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = demo(*QUICK, "--seed", 3, "-o", tmp_path / "out", "--overwrite")
    assert again.figures == first.figures
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "mine.txt in it was not written by hf_ortho" in demo(*QUICK, "-o", tmp_path / "out", "--overwrite").error
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_old_folder(demo, tiny_text, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_ortho.cli.demo_story.write_card", full)
    with OutputFolder(tmp_path / "out").writing() as draft:
        (draft / "old.txt").write_text("old")
    ran = demo(*QUICK, "-o", tmp_path / "out", "--overwrite")
    assert "No space left on device" in ran.error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"old.txt", MANIFEST}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--family", "hermit"], "did you mean hermite?"),
        (["--family", "polynomial"], "unknown activation 'polynomial'"),
        (["--degree", "0"], "degree '0' of hermite"),
        (["--degree", "33"], "degree '33' of hermite"),
        (["--degree", "-1"], "degree"),
        (["--degree", "two"], "degree 'two' of hermite"),
        (["--groups", "0"], "groups 0 of hermite"),
        (["--steps", "0"], "--steps 0"),
        (["--tune-steps", "-2"], "--tune-steps -2"),
        (["--steps", "1.5"], "--steps"),
        (["--task", "audio"], "--task"),
        (["--setps", "3"], "--setps"),
        (["words"], "words"),
    ],
)
def test_an_argument_that_does_not_fit(demo, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    ran = demo(*argv)
    assert message in ran.error
    assert ran.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(demo, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in demo("-o", tmp_path / "file").error
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    assert "mine.txt in it was not written by hf_ortho" in demo("-o", tmp_path / "folder").error
    assert "name of the output folder is empty" in demo("-o", "").error
    shutil.rmtree(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
