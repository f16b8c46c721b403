"""``adapter: true``: what a fine-tuning saves is an adapter for the untouched base model."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, ConvNextForImageClassification, TrainingArguments

from hf_ortho import convert
from hf_ortho.activations import FAMILIES
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.errors import ConfigError
from hf_ortho.training import DataArguments, LoraArguments, ModelArguments, Recipe, finetune


@pytest.fixture
def train(tmp_path, text_file):
    def train(model, dataset=text_file, lora_r=2, out="out", training=(), **options):
        folder = tmp_path / out
        defaults = dict(
            output_dir=str(folder),
            max_steps=2,
            learning_rate=0.01,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        training = TrainingArguments(**(defaults | dict(training)))
        arguments = ModelArguments(model=str(model), adapter=True, **options)
        recipe = Recipe(arguments, DataArguments(dataset=str(dataset)), training, LoraArguments(lora_r=lora_r))
        return finetune(recipe), folder

    return train


@pytest.fixture(scope="module")
def converted_folder(tmp_path_factory, make_gpt2, save_parts):
    model, tokenizer = make_gpt2()
    convert(model, "hermite_3")
    return save_parts(tmp_path_factory.mktemp("converted"), model, tokenizer)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))


def logits(model, *inputs):
    with torch.no_grad():
        return model.eval()(*inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "groups"), [("activations", ""), ("activations", "_g4"), ("activations+norms", "_g4")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations(train, gpt2_folder, ids, family, policy, groups):
    result, folder = train(gpt2_folder, train=policy, activation=f"{family}_3{groups}", calibration_samples=2)
    assert not (folder / "config.json").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(gpt2_folder)
    assert result.conversion.weights == "fisher"
    assert result.trainable == sum(p.numel() for p in result.checkpoint.model.parameters() if p.requires_grad)
    trained_norms = any(".ln_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert trained_norms == (policy == "activations+norms")
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    before = logits(base, ids)
    loaded = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(loaded, ids), logits(result.checkpoint.model, ids))
    assert not torch.equal(logits(loaded, ids), before)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, ids), before)


@pytest.mark.filterwarnings("ignore:Unsupported layer type.*LayerNorm")  # peft's, of its own LN-tuning
@pytest.mark.parametrize(("policy", "part"), [("norms", "ln_tuning"), ("lora", "lora_A"), ("lora+activations", "act")])
def test_of_a_converted_base(train, converted_folder, ids, policy, part):
    result, folder = train(converted_folder, train=policy)
    saved = load_file(folder / "adapter_model.safetensors")
    assert any(f".{part}" in name or ".ln_" in name for name in saved)
    assert any(".act." in name for name in saved) == (policy == "lora+activations")
    base = AutoModelForCausalLM.from_pretrained(converted_folder)
    loaded = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(loaded, ids), logits(result.checkpoint.model, ids))


@pytest.mark.parametrize("policy", ["activations", "lora"])
def test_a_head_for_new_classes_is_trained_and_saved(train, convnext_folder, tmp_path, policy):
    pytest.importorskip("sklearn")
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = [i for i, target in enumerate(digits.target) if target < 3][:40]
    images = [(digits.images[i] * 15).astype("uint8") for i in rows]
    features = Features({"image": Image(), "label": ClassLabel(names=["none", "one", "two"])})
    data = Dataset.from_dict({"image": images, "label": [int(digits.target[i]) for i in rows]}, features=features)
    data.to_parquet(tmp_path / "digits.parquet")
    activation = {"activation": "hermite_3"} if policy == "activations" else {}
    result, folder = train(convnext_folder, tmp_path / "digits.parquet", train=policy, **activation)
    base = ConvNextForImageClassification.from_pretrained(convnext_folder, num_labels=3, ignore_mismatched_sizes=True)
    loaded = PeftModel.from_pretrained(base, folder)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert logits(loaded, pixels).shape == (2, 3)
    expected = logits(result.checkpoint.model, pixels)
    assert torch.equal(logits(loaded, pixels), expected)
    merged = load_checkpoint(str(folder)).model
    torch.testing.assert_close(logits(merged, pixels), expected)
    assert merged.config.id2label == {0: "none", 1: "one", 2: "two"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "all"}, r"adapter: train 'all' has no adapter; use activations, activations\+norms, norms, lora"),
        ({"train": "activations"}, "'activations' requires --activation, such as hermite_8"),
        ({"train": "activations+norms"}, r"'activations\+norms' requires --activation, such as hermite_8"),
        ({"train": "norms", "init": "scratch"}, "adapter: requires a pretrained model"),
        ({"train": "lora+activations", "activation": "hermite_3"}, "has gelu_new; convert it with hf-ortho convert"),
        ({"train": "lora+activations"}, r"'lora\+activations': the model has no learnable activations"),
    ],
)
def test_what_does_not_fit_is_refused(train, gpt2_folder, options, message):
    with pytest.raises(ConfigError, match=message):
        train(gpt2_folder, **options)


def test_an_adapter_on_an_adapter_is_refused(train, gpt2_folder):
    _, first = train(gpt2_folder, train="norms")
    with pytest.raises(ConfigError, match="out is itself an adapter"):
        train(first, out="second", train="lora")


@pytest.mark.parametrize(
    ("policy", "activation"), [("activations", "hermite_3"), ("activations+norms", "hermite_3_g4")]
)
def test_resuming_takes_the_domains_of_the_checkpoint(train, gpt2_folder, tmp_path, policy, activation):
    """Whatever the second command says of calibration: the coefficients belong to them."""
    options = {"train": policy, "activation": activation}
    _, whole = train(
        gpt2_folder, calibration_samples=2, training={"save_strategy": "steps", "save_steps": 1}, **options
    )
    resume = {"resume_from_checkpoint": str(whole / "checkpoint-1")}
    _, resumed = train(gpt2_folder, out="resumed", calibration_samples=0, training=resume, **options)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()
