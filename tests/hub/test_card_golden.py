"""Whole cards against files: ``<number>``, ``<hardware>`` and ``<version>`` stand for what may vary."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import TrainingArguments

import hf_ortho
from hf_ortho.hub import DataSource, Results, TrainingDetails, card_of, write_card
from hf_ortho.hub.record import carry_over

BASE_COMMIT, DATA_COMMIT = "a" * 40, "b" * 40
VARYING = {
    "number": r"[-+]?\d+(\.\d+)?(e[-+]\d+)?%?",
    "hardware": r"\d+ (CPU cores \(\w+\)|x .+)",
    "version": r"\d+[\w.+]*",
}


def assert_like(text: str, name: str) -> None:
    """Each line of the text matches the line of the pattern."""
    pattern = (Path(__file__).with_name("cards") / name).read_text().splitlines()
    found = text.splitlines()
    for line, expected in zip(found, pattern, strict=False):
        regex = re.escape(expected)
        for key, varying in VARYING.items():
            regex = regex.replace(f"<{key}>", varying)
        assert re.fullmatch(regex, line), f"{line!r} is not like {expected!r}"
    assert len(found) == len(pattern)


@pytest.fixture
def base_card(tmp_path, monkeypatch):
    """The card of the base model on the Hub, at its commit."""
    card = tmp_path / "base.md"
    card.write_text("---\nlanguage: en\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Base\n")

    def download(repo, file, revision):
        assert (repo, file, revision) == ("openai-community/gpt2", "README.md", BASE_COMMIT)
        return str(card)

    monkeypatch.setattr("hf_ortho.hub.card.base.hf_hub_download", download)


def test_a_converted_and_fine_tuned_model(base_card, make_gpt2, save_parts, tmp_path):
    model, _ = make_gpt2()
    model.config._name_or_path, model.config._commit_hash = "openai-community/gpt2", BASE_COMMIT
    ids = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
    report = hf_ortho.convert(model, "tropical_3", calibration=[ids, ids.flip(1)])
    train = DataSource("me/text", None, "train", DATA_COMMIT)
    held_back = DataSource("me/text", None, "validation", DATA_COMMIT, 32)
    commands = (
        "hf-ortho convert openai-community/gpt2 -o converted --calibration-data me/text",
        "hf-ortho finetune -c r",
    )
    values = {"source": {"loss": 3.5}, "converted": {"loss": 3.502}}
    first = save_parts(tmp_path / "converted", model)
    results = Results(values, train, commands[0], "2 CPU cores (x86_64)", note="a part")
    write_card(first, report=report, results=[results], data=[train], command=commands[0])
    second = save_parts(tmp_path / "gpt2-tuned", model)
    (second / "activations.png").write_bytes(b"png")
    carry_over(str(first), None, second)
    values = {"converted": {"loss": 3.6, "perplexity": 36.5982}, "fine-tuned": {"loss": 3.1, "perplexity": 22.1979}}
    write_card(
        second,
        results=[Results(values, held_back, commands[1], "2 CPU cores (x86_64)", seed=7, kind="training")],
        data=[train],
        command=commands[1],
        training=TrainingDetails(
            TrainingArguments(str(second), max_steps=7, seed=7, optim="sgd", use_cpu=True, report_to="none"),
            {"train": "activations"},
        ),
    )
    text = card_of(second, repo_id="me/gpt2-tuned", remote_code=True)
    assert_like(text, "fine_tuned.txt")
    assert str(ModelCard(text)) == text


def test_an_adapter_of_activations(base_card, tmp_path):
    config = {
        "peft_type": "HF_ORTHO",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "openai-community/gpt2",
        "base_commit": BASE_COMMIT,
        "activation": "hermite_8",
        "calibrated": True,
        "layers": [
            {
                "module": f"transformer.h.{i}.mlp.act",
                "field": "activation_function",
                "source": "gelu_new",
                "domain": [-2.9, 2.96],
                "tail_slopes": [0.0, 1.0],
                "fitted_to": "gelu_new",
                "sup_error": 2.7e-3,
                "rms_error": 1e-4 * (i + 1),
                "mass_outside": 0.0652,
            }
            for i in range(12)
        ],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.transformer.h.{i}.mlp.act.coefficients": torch.zeros(9) for i in range(12)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    values = {"base model": {"loss": 3.5}, "adapter": {"loss": 3.4}}
    data = DataSource("words.txt", samples=5)
    write_card(
        tmp_path, place="me/adapter", results=[Results(values, data, "python tune.py", "2 CPU cores (x86_64)", 0)]
    )
    text = (tmp_path / "README.md").read_text()
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert f"108 parameters, {size:,} bytes" in text  # 12 x 9
    assert_like(text.replace(f"{size:,}", f"{size}"), "adapter.txt")
    assert str(ModelCard(text)) == text


def test_lora_and_activations_of_a_converted_model(tmp_path):
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "me/converted",
        "revision": "v1",
        "target_modules": ["c_proj", "c_attn"],
        "modules_to_save": ["act"],
        "auto_mapping": {"base_model_class": "GPT2LMHeadModel"},
        "peft_version": "0.20.0",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    text = card_of(tmp_path, repo_id="me/lora", remote_code=False)
    head = ModelCard(text).data
    assert (head.library_name, head.base_model, head.base_model_relation) == ("peft", "me/converted", "adapter")
    assert {"hf_ortho", "peft", "lora"} <= set(head.tags)
    assert "LoRA on `c_attn`, `c_proj`. Trained and saved in full: `act`." in text
    assert "import hf_ortho  #" in text
    assert "- Versions: peft 0.20.0\n" in text
    assert 'base = GPT2LMHeadModel.from_pretrained("me/converted", revision="v1")' in text
    assert 'PeftModel.from_pretrained(base, "me/lora")' in text
    assert head.pipeline_tag == "text-generation"


def test_an_adapter_of_an_image_classifier(tmp_path):
    """peft has no task_type for it."""
    classes = {"base_model_class": "ConvNextForImageClassification", "parent_library": "transformers"}
    config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": "me/base", "auto_mapping": classes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    data = DataSource("me/pictures", samples=5, revision=DATA_COMMIT)
    write_card(tmp_path, place="me/lora", results=[Results({"adapter": {"top1": 0.5}}, data, "command", "here")])
    head = ModelCard.load(tmp_path / "README.md").data
    assert (head.pipeline_tag, head.metrics) == ("image-classification", ["accuracy"])
    assert (head.eval_results[0].task_type, head.eval_results[0].metric_value) == ("image-classification", 0.5)
