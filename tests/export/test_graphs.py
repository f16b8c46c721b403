"""The graphs of ``hf-ortho export`` in onnxruntime, beside the models that they were made from."""

import json
import re
import runpy

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_ortho.activations import FAMILIES
from hf_ortho.checkpoints.load import load_checkpoint

pytestmark = pytest.mark.slow
TASKS = ["gpt2", "llama", "gemma2", "bert", "sentences", "masked", "classes", "decoder_classes", "images"]
# Float32 in two programs: the largest differences seen are 3e-6 of the largest output.
TOLERANCE = 1e-4


def session_of(folder):
    return onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])


def close(found, expected):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def ids_of(model, batch, length, seed=3):
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def generated(session, ids, steps):
    """Greedy tokens after ``ids``, (1, length), with the cache."""
    names = [each.name for each in session.get_inputs()]
    past = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }
    text = new = ids.numpy()
    for _ in range(steps):
        length = text.shape[1]
        feed = {"input_ids": new, "attention_mask": np.ones_like(text)}
        feed["position_ids"] = np.arange(length - new.shape[1], length)[None]
        logits, *present = session.run(None, {name: (feed | past)[name] for name in names})
        past = dict(zip(past, present, strict=True))
        new = logits[:, -1:].argmax(-1)
        text = np.concatenate([text, new], axis=1)
    return text[0].tolist()


@pytest.mark.parametrize("activation", [*(f"{family}_4" for family in FAMILIES), "hermite_4_g8"])
def test_every_family(exported, saved, activation):
    session, model = session_of(exported("bert", activation)[0]), load_checkpoint(str(saved("bert", activation))).model
    ids = ids_of(model, 3, 30)
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((3, 30), np.int64)}
    (found,) = session.run(None, feed | extra([each.name for each in session.get_inputs()], ids))
    close(found, model(ids).last_hidden_state)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_greedy_tokens_with_the_cache(exported, saved, name):
    session, model = session_of(exported(name)[0]), AutoModelForCausalLM.from_pretrained(saved(name))
    ids = ids_of(model, 1, 5)
    options = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    assert generated(session, ids, 24) == expected


@pytest.mark.parametrize(("name", "layers", "heads", "size"), [("gpt2", 2, 2, 8), ("llama", 1, 2, 4)])
def test_names_are_those_of_optimum(exported, name, layers, heads, size):
    session = session_of(exported(name)[0])
    cache = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = {each.name: each.shape for each in session.get_inputs()}
    past = [f"past_key_values.{part}" for part in cache]
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *past]
    assert [each.name for each in session.get_outputs()] == ["logits", *(f"present.{part}" for part in cache)]
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.0.key"] == ["batch_size", heads, "past_sequence_length", size]


def test_without_a_cache(exported, saved):
    folder, out = exported("llama", "hermite_4", "--no-cache")
    assert "Exporting LlamaForCausalLM without a cache" in out
    session, model = session_of(folder), load_checkpoint(str(saved("llama"))).model
    assert [each.name for each in session.get_inputs()] == ["input_ids", "attention_mask", "position_ids"]
    assert [each.name for each in session.get_outputs()] == ["logits"]
    ids = ids_of(model, 4, 17)
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((4, 17), np.int64)}
    close(session.run(None, feed | {"position_ids": np.arange(17)[None].repeat(4, 0)})[0], model(ids).logits)
    assert json.loads((folder / "config.json").read_text())["use_cache"] is False


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("bert", ["last_hidden_state"]),
        ("sentences", ["last_hidden_state"]),
        ("masked", ["logits"]),
        ("classes", ["logits"]),
        ("decoder_classes", ["logits"]),
    ],
)
def test_texts_of_other_lengths_with_padding(exported, saved, name, outputs):
    session, checkpoint = session_of(exported(name)[0]), load_checkpoint(str(saved(name)), dtype="float32")
    model, pad = checkpoint.model, checkpoint.tokenizer.pad_token_id
    if model.config.pad_token_id is None:  # a decoder, whose graph knows that of its tokenizer
        model.config.pad_token_id = pad
    ids = ids_of(model, 3, 21)
    mask = torch.ones_like(ids)
    padded = slice(0, 12) if name == "decoder_classes" else slice(9, None)
    mask[1, padded], ids[1, padded] = 0, model.config.pad_token_id
    feed = {"input_ids": ids, "attention_mask": mask}
    known = [each.name for each in session.get_inputs()]
    assert known[:2] == list(feed)
    found = session.run(outputs, {key: value.numpy() for key, value in feed.items()} | extra(known, ids))
    close(found[0], model(**feed)[outputs[0]])
    assert [each.name for each in session.get_outputs()] == outputs


def extra(names, ids):
    return {"token_type_ids": np.zeros(ids.shape, np.int64)} if "token_type_ids" in names else {}


def test_images(exported, saved):
    session, model = session_of(exported("images")[0]), load_checkpoint(str(saved("images"))).model
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert session.get_inputs()[0].shape == ["batch_size", 3, 16, 16]
    close(session.run(["logits"], {"pixel_values": pixels.numpy()})[0], model(pixels).logits)


@pytest.mark.parametrize("name", TASKS)
def test_the_code_on_the_card_runs(exported, saved, capsys, name, tmp_path):
    folder, _ = exported(name)
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert str(folder) in code
    assert ("The classes are neg, pos." in card) == (name == "classes")
    assert not {"import torch", "import hf_ortho"} & set(code.splitlines())
    (tmp_path / "block.py").write_text(code)
    found = runpy.run_path(str(tmp_path / "block.py"))
    assert capsys.readouterr().out.strip()
    if name == "sentences":
        checkpoint = load_checkpoint(str(saved(name)), dtype="float32")
        inputs = checkpoint.tokenizer(["One text.", "Another one, longer."], padding=True, return_tensors="pt")
        hidden = checkpoint.model(**inputs).last_hidden_state
        pooled = [row[mask.bool()].mean(0) for row, mask in zip(hidden, inputs["attention_mask"], strict=True)]
        close(found["embeddings"], torch.nn.functional.normalize(torch.stack(pooled)))
    if name == "llama":
        checkpoint = load_checkpoint(str(saved(name)))
        ids = checkpoint.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
        options = {"do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32, "pad_token_id": 0}
        checkpoint.model.generation_config.eos_token_id = None
        assert found["text"][0].tolist() == checkpoint.model.generate(ids, **options)[0].tolist()
