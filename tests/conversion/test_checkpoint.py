"""Loading with head and processor, and checking what was saved."""

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    ConvNextForImageClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_ortho
from hf_ortho.checkpoints.load import Checkpoint, load_checkpoint, save_checkpoint
from hf_ortho.checkpoints.verify import example_inputs, fingerprint, outputs, verify_reload
from hf_ortho.cli.demo_tasks import byte_tokenizer, small_convnext
from hf_ortho.errors import CheckpointError, HfOrthoError, OutputError

# ---- loading -------------------------------------------------------------------------------------------------------


def _folder_without_config(path):
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"")


def _config(text):
    def make(path):
        path.mkdir()
        (path / "config.json").write_text(text)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (_folder_without_config, "is not a checkpoint"),
        (lambda path: path.write_text("{}"), "is not a checkpoint"),
        (_config(json.dumps({"model_type": "gpt2", "architectures": ["NoSuchModel"]})), "'NoSuchModel'"),
        (_config(json.dumps({"model_type": "gpt2"})), "cannot be loaded"),
        (_config(json.dumps({"model_type": "no_such_type", "architectures": ["GPT2LMHeadModel"]})), "no_such_type"),
        (_config(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})), "cannot be loaded"),
        (_config("{broken"), "cannot be loaded"),
        (_config("[]"), "cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, make, message):
    path = tmp_path / "model"
    make(path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(str(path))
    assert isinstance(error.value, HfOrthoError)
    assert isinstance(error.value, OSError)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_truncated_weights(gpt2, tmp_path):
    gpt2().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated") as error:
        load_checkpoint(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cls", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_the_head_decides_the_class(gpt2, ids, tmp_path, aligned, cls):
    model = gpt2(cls)
    model.save_pretrained(tmp_path)
    found = load_checkpoint(str(tmp_path))
    assert (type(found.model), found.tokenizer, found.commit) == (cls, None, None)
    assert not found.model.training
    with torch.no_grad():
        assert torch.equal(aligned(found.model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_dtype(gpt2, tmp_path, dtype, expected):
    model = gpt2().bfloat16()
    hf_ortho.convert(model, "hermite_4")
    model.save_pretrained(tmp_path)
    found = load_checkpoint(str(tmp_path), dtype=dtype).model
    assert found.transformer.wte.weight.dtype == expected
    assert found.transformer.h[0].mlp.act.coefficients.dtype == torch.float32


def test_tokenizer_goes_with_the_model(gpt2, tmp_path):
    tokenizer = byte_tokenizer()
    model = gpt2(vocab_size=len(tokenizer))
    save_checkpoint(Checkpoint(model, tokenizer, None, None), tmp_path)
    found = load_checkpoint(str(tmp_path))
    text = "Hermite, déjà vu\n"
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert found.tokenizer.decode(found.tokenizer(text)["input_ids"]) == text
    assert found.processor is found.tokenizer
    assert found.image_processor is None


def test_image_processor_goes_with_the_model(convnext, tmp_path):
    processor = small_convnext().image_processor
    save_checkpoint(Checkpoint(convnext(), None, processor, None), tmp_path)
    found = load_checkpoint(str(tmp_path))
    assert type(found.model) is ConvNextForImageClassification
    picture = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 32, 32)
    assert torch.equal(found.image_processor(picture, return_tensors="pt")["pixel_values"], expected)
    assert found.processor is found.image_processor
    assert found.tokenizer is None


# ---- verification --------------------------------------------------------------------------------------------------


def test_example_inputs_run(gpt2, convnext):
    for model, shape in ((gpt2(), (1, 16)), (gpt2(n_positions=8), (1, 8)), (convnext(), (1, 3, 32, 32))):
        inputs = example_inputs(model)
        assert [tuple(v.shape) for v in inputs.values()] == [shape]
        assert torch.equal(*(next(iter(example_inputs(model).values())) for _ in range(2)))
        model.train()
        with torch.no_grad():
            expected = model.eval()(**inputs).logits
        model.train()
        assert torch.equal(outputs(model, inputs)[0], expected)
        assert model.training


def test_outputs_of_other_kinds():
    bert = BertModel(
        BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )
    assert [tuple(v.shape) for v in outputs(bert, example_inputs(bert))] == [(1, 16, 32), (1, 32)]
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    assert outputs(t5, example_inputs(t5))[0].shape == (1, 16, 97)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_reload(gpt2, tmp_path, dtype):
    model = gpt2(scale=60).to(dtype)
    hf_ortho.convert(model, "hermite_8")
    inputs = example_inputs(model)
    expected, tensors = outputs(model, inputs), fingerprint(model)
    model.save_pretrained(tmp_path)
    assert verify_reload(GPT2LMHeadModel, tmp_path, tensors, inputs, expected)
    with torch.no_grad():
        model.transformer.h[1].mlp.act.coefficients[8] *= 1.01
    model.save_pretrained(tmp_path)
    with pytest.raises(OutputError, match="does not reload"):
        verify_reload(GPT2LMHeadModel, tmp_path, tensors, inputs, expected)
