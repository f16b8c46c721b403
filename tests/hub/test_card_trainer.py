"""The card that ``ActivationTrainer`` writes, where ``Trainer`` would write its own."""

import json

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from transformers import TrainingArguments, default_data_collator

import hf_ortho
from hf_ortho.training import ActivationTrainer


@pytest.fixture
def trainer(make_gpt2, tmp_path):
    model, _ = make_gpt2(n_layer=1)
    hf_ortho.convert(model, "hermite_3")
    ids = torch.randint(0, 257, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    samples = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
    )
    options = {"train_dataset": samples, "eval_dataset": samples, "data_collator": default_data_collator}
    return ActivationTrainer(model, arguments, **options)


def test_push_to_hub_writes_the_card(trainer, tmp_path, monkeypatch):
    trainer.train()
    trainer.hub_model_id = trainer.args.hub_model_id = "me/tuned"
    pushed = {}
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: pushed.update(options))
    trainer.push_to_hub(language="en", tags="mine", dataset="my words")
    assert pushed["repo_id"] == "me/tuned"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.language == "en"
    assert card.data.tags == ["hf_ortho", "learnable-activations", "hermite", "mine"]
    assert 'from_pretrained("me/tuned")' in card.text
    assert "then fine-tuned" in card.text
    assert {"- max_steps: 1", "- seed: 5"} <= set(card.text.splitlines())
    logged = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert f"| loss | {logged:.5f} |" in card.text
    assert "On `my words`, 4 samples" in card.text
    (evaluation,) = card.data.eval_results
    assert evaluation.metric_value == pytest.approx(logged, abs=1e-5)


def test_what_push_to_hub_uploads_has_no_local_paths(trainer, tmp_path, monkeypatch):
    trainer.model.config.hf_ortho["source_model"] = str(tmp_path / "gpt2")
    trainer.model.name_or_path = str(tmp_path / "gpt2-hermite")
    trainer.hub_model_id = trainer.args.hub_model_id = "me/tuned"
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: None)
    trainer.push_to_hub()
    texts = {name: (tmp_path / "out" / name).read_text() for name in ("README.md", "config.json")}
    assert not any(str(tmp_path) in text for text in texts.values())
    assert json.loads(texts["config.json"])["hf_ortho"]["source_model"] == "gpt2"
    assert trainer.model.config.hf_ortho["source_model"] == str(tmp_path / "gpt2")


def test_without_evaluation_nothing_is_claimed(trainer, tmp_path):
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "Not evaluated" in card.text
    assert card.data.eval_results is None
