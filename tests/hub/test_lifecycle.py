"""Every task from end to end: convert, evaluate, fine-tune, evaluate, card, push to a stand-in for the Hub, reload."""

import csv
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from stand_in import Repositories, hub
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2ForSequenceClassification

from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.hub.card.loading import BEGIN, END
from hf_ortho.tasks import TASKS
from hf_ortho.training.calibration import calibration_batches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # huggingface_hub's own
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # read by peft
]
ACTIVATION = "hermite_3"
POLICIES = {
    "all": {},
    "activations": {},
    "lora": {},
    "activations adapter": {"adapter": True, "activation": ACTIVATION},
    "lora+activations adapter": {"adapter": True},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, gpt2_folder, convnext_folder, text_file, make_gpt2, save_parts):
    """By pipeline tag: a model that is not converted, and data for it."""
    return {
        "text-generation": (gpt2_folder, text_file),
        "image-classification": (convnext_folder, _pictures(tmp_path_factory.mktemp("pictures"))),
        "text-classification": (
            _classifier(tmp_path_factory.mktemp("classifier"), make_gpt2()[1]),
            _reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv"),
        ),
        "fill-mask": (_bert(tmp_path_factory.mktemp("bert")), text_file),
    }


def _pictures(folder):
    import numpy as np

    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for number in range(10):
        (folder / str(number)).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 25 * (number + 1), (16, 16, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / str(number) / f"{i}.png")
    return folder


def _classifier(folder, tokenizer):
    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": len(tokenizer)}
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    GPT2ForSequenceClassification(GPT2Config(**sizes, **labels)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _reviews(file):
    with open(file, "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label"])
        rows.writerows(
            [f"{word} number {i}", label] for i in range(20) for word, label in (("ok", "good"), ("no", "bad"))
        )
    return file


def _bert(folder):
    tokenizer = transformers.BertTokenizerFast(vocab=_vocabulary(folder / "vocabulary.txt"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=32)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _vocabulary(file):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four", "five", "six", "seven"]
    file.write_text("\n".join(words))
    return str(file)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, sources, hf_ortho_command):
    """``converted(tag)``: the folder of the converted model of a task, converted on its data."""
    folders = {}

    def convert(tag):
        if tag not in folders:
            source, data = sources[tag]
            folder = tmp_path_factory.mktemp("lifecycle") / f"{tag}-{ACTIVATION}"
            ran = hf_ortho_command("convert", source, "-o", folder, "--degree", 3, "--calibration-data", data)
            assert ran.code == 0, ran.err
            folders[tag] = folder
        return folders[tag]

    return convert


def outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.pipeline_tag)
def test_from_conversion_to_reload(task, policy, sources, converted, connect, hf_ortho_command, tmp_path):
    tag, folder = task.pipeline_tag, tmp_path / "trained"
    (source, data), base = sources[tag], converted(tag)
    before = hf_ortho_command("evaluate", base, "--dataset", data)
    assert before.code == 0, before.err
    model = source if policy == "activations adapter" else base
    options = {"model": model, "dataset": data, "eval_dataset": data, "train": policy.removesuffix(" adapter")}
    options |= {"output_dir": folder, "max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    options |= POLICIES[policy]
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    ran = hf_ortho_command("finetune", *flags)
    assert ran.code == 0, ran.err
    after = hf_ortho_command("evaluate", folder, "--dataset", data)
    assert after.code == 0, after.err
    assert before.figures["loss"] != after.figures["loss"]

    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == tag
    assert {result.metric_name for result in card.data.eval_results} <= {metric.name for metric in task.metrics}
    assert task.compared.name in {result.metric_name for result in card.data.eval_results}

    checkpoint = load_checkpoint(str(folder))
    inputs = calibration_batches(checkpoint, str(data), samples=1)[0][0]
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    expected = outputs(checkpoint.model, inputs)
    repositories = Repositories()
    with hub(repositories) as endpoint:
        connect(endpoint)
        origin = []
        if "adapter" in policy:
            assert hf_ortho_command("push", model, "me/base").code == 0
            origin = ["--base-model", "me/base"]
        pushed = hf_ortho_command("push", folder, "me/trained", *origin)
        assert pushed.code == 0, pushed.err
        again = load_checkpoint("me/trained")
        torch.testing.assert_close(outputs(again.model, inputs), expected, rtol=1e-5, atol=1e-6)
        assert again.processor is not None
        torch.testing.assert_close(as_the_card_says(inputs), expected, rtol=1e-5, atol=1e-6)
        evaluated = hf_ortho_command("evaluate", "me/trained", "--dataset", data)
        assert evaluated.figures["loss"] == after.figures["loss"]
    assert not [path for path in repositories.get("models", "me/trained").files("main") if path.endswith(".bin")]
    assert not any(str(Path(data).parent) in body.decode(errors="ignore") for body in pushed_files(repositories))


def pushed_files(repositories):
    return repositories.get("models", "me/trained").files("main").values()


def as_the_card_says(inputs):
    """The outputs through transformers and peft alone, loaded by the last lines of code in the pushed card."""
    card = ModelCard.load("me/trained").text.partition(BEGIN)[2].partition(END)[0]
    scope = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # peft's, of GPT-2's layers
        exec(card.split("```python\n")[-1].partition("```")[0], scope)
    return outputs(scope["model"], inputs)
