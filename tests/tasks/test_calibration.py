"""Calibration batches from a dataset: for text, images, encoders and models with several inputs."""

import logging
import re

import numpy as np
import pytest
import torch
import transformers as T
from datasets import Dataset
from PIL import Image

from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.errors import ConfigError, DataError
from hf_ortho.tasks import data
from hf_ortho.tasks.image_classification import IMAGE_CLASSIFICATION
from hf_ortho.training import DataArguments, ModelArguments
from hf_ortho.training.calibration import calibration_batches

TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
TEXT |= {"vocab_size": 260, "max_position_embeddings": 32}
VISION = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
VISION |= {"image_size": 16, "patch_size": 8}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
SPEECH = {"vocab_size": 260, "d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8}
SPEECH |= {key: 0 for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")}


@pytest.fixture(scope="module")
def tokenizer(make_gpt2):
    return make_gpt2()[1]


@pytest.fixture(scope="module")
def with_processors(tokenizer, make_convnext):
    return lambda model: Checkpoint(model, tokenizer, make_convnext()[1], None)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A folder of 9 images without classes: 16-bit gray ramps of different height, and one RGB."""
    folder = tmp_path_factory.mktemp("flat")
    for i in range(1, 9):
        Image.fromarray(np.full((16, 16), 8191 * i, np.uint16)).save(folder / f"{i}.png")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "9.png")
    return str(folder)


def calibrate(checkpoint, name, samples=2, **options):
    return calibration_batches(checkpoint, str(name), samples=samples, **options)[0]


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 50])
def test_the_first_blocks_are_those_of_the_whole_dataset(tokenizer, count):
    rows = Dataset.from_dict({"text": [None, "", *("abcdefghijkl"[: i * 5 % 13] for i in range(60))]})
    expected = data.text_blocks(rows, tokenizer, 16)["input_ids"][:]
    found = data.first_blocks(rows, tokenizer, 16, count)
    assert len(found) == min(count, len(expected))
    assert torch.equal(torch.cat(found), expected[:count])


def test_the_first_blocks_of_a_long_line_need_not_all_of_it(tokenizer):
    """A line of 5.5 MB: the same first blocks as of its beginning, without tokenizing the rest."""
    line = "some words " * 500_000
    rows = Dataset.from_dict({"text": [line]})
    seen = []

    class Watched:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, **options):
            seen.extend(map(len, texts))
            return tokenizer(texts, **options)

    found = data.first_blocks(rows, Watched(), 16, 2)
    expected = data.first_blocks(Dataset.from_dict({"text": [line[:100]]}), tokenizer, 16, 2)
    assert torch.equal(torch.cat(found), torch.cat(expected))
    assert sum(seen) < 10_000


def test_a_text_shorter_than_a_block_is_one_block(make_gpt2, tokenizer, tmp_path, caplog):
    (tmp_path / "short.txt").write_text("x" * 19)
    checkpoint = Checkpoint(make_gpt2()[0], tokenizer, None, None)
    with caplog.at_level(logging.WARNING, "hf_ortho"):
        (batch,) = calibrate(checkpoint, tmp_path / "short.txt")
    assert batch["input_ids"].tolist() == [[*tokenizer("x" * 19)["input_ids"], tokenizer.eos_token_id]]
    assert list(batch) == ["input_ids"]  # the labels of a causal language model are its inputs
    assert caplog.messages == [f"note: {tmp_path / 'short.txt'} has 20 tokens, which are one block shorter than 32"]
    loss = checkpoint.model(**batch, labels=batch["input_ids"]).loss
    assert loss.item() == pytest.approx(np.log(257), abs=0.5)  # of random weights


def test_training_text_shorter_than_a_block_is_refused_with_its_length(tokenizer):
    rows = Dataset.from_dict({"text": ["x" * 10, None, "y" * 8]})
    message = r"^words has less than one block of 32 tokens: it has 20; give a --block-size of at most 20$"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=message):
            data.text_blocks(rows, tokenizer, 32, name="words")


@pytest.mark.parametrize("column", [None, "body"])
def test_chunks_of_an_encoder(tokenizer, column):
    documents = ["abcdefg", None, "", "hi"]
    rows = Dataset.from_dict({column or "text": documents, "title": ["no"] * 4})
    found = data.first_chunks(rows, tokenizer, 4, 9, column)
    expected = [tokenizer(part)["input_ids"] for part in ("abcd", "efg", "hi")]
    assert [chunk.tolist() for chunk in found] == [[ids] for ids in expected]
    assert torch.equal(data.first_chunks(rows, tokenizer, 4, 1, column)[0], found[0])


def test_an_encoder_without_text(tokenizer):
    with pytest.raises(DataError, match=r"^words has no text$"):
        data.first_chunks(Dataset.from_dict({"text": ["", None]}), tokenizer, 4, 1, name="words")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "^words: column 'text' does not contain text: row 1 is 1$"),
        ([None, None], "^words: column 'text' does not contain text: all rows are empty$"),
        ([["a"], ["b"]], r"^words: column 'text' does not contain text: row 1 is \['a'\]$"),
    ],
)
def test_values_that_are_no_text_are_located(tokenizer, values, message):
    with pytest.raises(DataError, match=message):
        data.first_blocks(Dataset.from_dict({"text": values}), tokenizer, 4, 1, name="words")


def test_mixed_values_are_located(tmp_path, make_gpt2):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"a.jsonl: column 'text' does not contain text: row 3 is 5$"):
        calibrate(Checkpoint(*make_gpt2(), None, None), tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "messages",
            r"has instruction data \(messages\) and no text column: fine-tune .* recipes/trl_sft.py",
        ),
        ("turns", r"columns: turns\); 'turns' is nested: .* rename it to messages .* recipes/trl_sft.py trains on"),
    ],
)
def test_chats_are_refused_with_what_to_do(tokenizer, column, message):
    rows = Dataset.from_dict({column: [[{"role": "user", "content": "Hello"}]]})
    with pytest.raises(DataError, match=message):
        data.text_blocks(rows, tokenizer, 4, name="chats")


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [("block_size", 0, 2), ("block_size", -1, 2), ("block_size", 1, 2), ("block_size", float("nan"), 2),
     ("max_train_samples", 0, 1), ("max_eval_samples", -2, 1), ("shuffle_buffer", 0, 1), ("shuffle_blocks", -1, 1)],
)  # fmt: skip
def test_numbers_out_of_range(key, value, least):
    with pytest.raises(ConfigError, match=f"^{key} {value}: must be at least {least}$"):
        DataArguments(**{key: value})


def test_a_negative_number_of_calibration_samples():
    with pytest.raises(ConfigError, match=r"^calibration_samples -1: must be at least 0$"):
        ModelArguments(calibration_samples=-1)
    assert ModelArguments(calibration_samples=0).calibration_samples == 0


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "keys"),
    [
        (lambda: T.BertModel(T.BertConfig(**TEXT)), ["input_ids"]),
        (lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)), ["input_ids"]),
        (
            lambda: T.BartForConditionalGeneration(
                T.BartConfig(**LAYERS, **{k: v for k, v in SPEECH.items() if k != "num_mel_bins"})
            ),
            ["input_ids", "decoder_input_ids"],
        ),
        (
            lambda: T.LlavaForConditionalGeneration(
                T.LlavaConfig(
                    vision_config=T.CLIPVisionConfig(**VISION),
                    text_config=T.LlamaConfig(**TEXT, num_key_value_heads=1),
                    image_token_index=259,
                )
            ),
            ["input_ids"],
        ),
    ],
    ids=["encoder", "masked-lm", "encoder-decoder", "vision-language"],
)
def test_text_suffices(with_processors, text_file, build, keys):
    checkpoint = with_processors(build())
    batches = calibrate(checkpoint, text_file, block_size=16)
    assert [list(batch) for batch in batches] == [keys] * 2
    assert all(batch[key].shape == (1, 16) for batch in batches for key in keys)
    with torch.no_grad():
        assert torch.isfinite(checkpoint.model.eval()(**batches[0])[0]).all()


def clip():
    return T.CLIPModel(T.CLIPConfig(text_config=TEXT | {"eos_token_id": 256}, vision_config=VISION, projection_dim=8))


def test_a_model_that_needs_text_and_images(with_processors, text_file, flat):
    needs = "^CLIPModel takes image and text inputs together, which --calibration-data cannot provide; omit it"
    with pytest.raises(DataError, match=rf"{needs}.*hf_ortho.convert\(model, calibration=batches\)"):
        calibrate(with_processors(clip()), text_file)
    with pytest.raises(DataError, match=r"no unambiguous text column .* \(CLIPModel takes image and text inputs\)$"):
        calibrate(with_processors(clip()), flat)


def test_a_model_of_speech(with_processors, text_file):
    config = T.WhisperConfig(**LAYERS, **SPEECH, max_source_positions=8, max_target_positions=8)
    with pytest.raises(DataError, match=r"^WhisperForConditionalGeneration takes input_features, which --calibration"):
        calibrate(with_processors(T.WhisperForConditionalGeneration(config)), text_file)


def test_block_sizes_of_an_encoder(with_processors, text_file):
    checkpoint = with_processors(T.BertModel(T.BertConfig(**TEXT)))
    assert calibrate(checkpoint, text_file)[0]["input_ids"].shape == (1, 32)
    with pytest.raises(ConfigError, match=r"^block_size 33: must be between 2 and the model's context length of 32$"):
        calibrate(checkpoint, text_file, block_size=33)


@pytest.mark.parametrize("head", ["classifier", "backbone"])
def test_images_without_classes(make_convnext, flat, head):
    model, processor = make_convnext()
    checkpoint = Checkpoint(model if head == "classifier" else model.convnext, None, processor, None)
    batches = calibrate(checkpoint, flat)
    assert [list(batch) for batch in batches] == [["pixel_values"]] * 2
    assert [len(batch["pixel_values"]) for batch in batches] == [8, 1]
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    for i, image in enumerate(batches[0]["pixel_values"], 1):
        gray = np.rint(8191 * i / 65535 * 255) / 255
        assert image.mean((1, 2)).numpy() == pytest.approx((gray - mean) / std, abs=1e-5)


@pytest.mark.parametrize("labels", [[-1, -1], [[0, 1], [1]]], ids=["none", "several"])
def test_images_with_labels_that_are_none(make_convnext, labels, caplog):
    model, processor = make_convnext()
    checkpoint = Checkpoint(model, None, processor, None)
    rows = Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 2, "label": labels})
    batches = IMAGE_CLASSIFICATION.calibration(checkpoint, rows, DataArguments(), "pictures", 1)
    assert [sorted(batch) for batch in batches] == [["pixel_values"]]
    assert caplog.messages[0].startswith("note: calibrating without labels: pictures: column 'label' contains")


def test_training_needs_classes(make_convnext, flat):
    from hf_ortho.tasks.samples import load_splits

    checkpoint = Checkpoint(make_convnext()[0], None, make_convnext()[1], None)
    with pytest.raises(DataError, match=rf"^{re.escape(flat)} has no .*label column .*one folder per class$"):
        load_splits(checkpoint, DataArguments(dataset=flat))
