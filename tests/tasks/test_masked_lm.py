"""Masked language models: blocks, masks, metrics, and trainings from scratch and of an encoder."""

import json
import logging
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
import transformers as T
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import hf_ortho
from hf_ortho.checkpoints.load import Checkpoint, load_checkpoint
from hf_ortho.errors import ConfigError, DataError
from hf_ortho.tasks.masked_lm import MASKED_LM
from hf_ortho.tasks.masking import VariedMasks, masked_blocks, masks_of
from hf_ortho.tasks.metrics.compute import masked_loss
from hf_ortho.tasks.samples import batches, load_splits
from hf_ortho.tasks.stream import Stream
from hf_ortho.tasks.tokenizer import bpe_tokenizer, byte_tokenizer
from hf_ortho.training import (
    DataArguments,
    ModelArguments,
    Recipe,
    evaluate_model,
    finetune,
    pseudo_perplexity,
)
from hf_ortho.training.calibration import calibration_batches
from hf_ortho.training.scratch import scratch_checkpoint

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"max_position_embeddings": 40, "initializer_range": 0.5}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
WORDS = "the cat sat on a mat, and then it ran. "


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of the caches of one test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")


@pytest.fixture(scope="module")
def wordpiece():
    """BERT's tokenizer with one token per letter, so that each word is as many tokens as letters."""
    vocabulary = {
        token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *LETTERS])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)


def bert(tokenizer):
    return T.BertForMaskedLM(T.BertConfig(vocab_size=len(tokenizer), **SIZES, **DROPOUT))


def roberta(tokenizer):
    """Positions are numbered from the padding index + 1."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    return T.RobertaForMaskedLM(T.RobertaConfig(**SIZES, **DROPOUT, **ids))


def modernbert(tokenizer):
    kinds = ("pad", "cls", "sep", "bos", "eos")
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
    return T.ModernBertForMaskedLM(T.ModernBertConfig(**SIZES, **ids, vocab_size=len(tokenizer)))


MODELS = [bert, roberta, modernbert]


@pytest.fixture
def make():
    """``make(bert)``: a seeded model with the byte tokenizer, as a checkpoint."""

    def checkpoint(build=bert):
        torch.manual_seed(0)
        tokenizer = byte_tokenizer(masks=True)
        return Checkpoint(build(tokenizer).eval(), tokenizer, None, None)

    return checkpoint


def rows(*texts):
    return Dataset.from_dict({"text": list(texts)})


def blocks(tokenizer, texts, size=16, **options):
    return masked_blocks(rows(*texts), tokenizer, size, DataArguments(**options), "words")


def unmasked(samples):
    return [ids.tolist() for ids in masks_of(samples).unmasked(samples.with_format(None)[:])]


# ---- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenize", [None, "once"])
@pytest.mark.parametrize("length", [39, 41, 42, 43])
def test_blocks_are_the_texts_between_special_tokens(wordpiece, tokenize, length):
    """Three documents with separators, cut every 14 tokens: the last block ends without a separator of its own."""
    texts = ["abc" * 5, None, "x", "", "z" * (length - 19)]
    stream = [i for text in texts if text for i in [*(wordpiece.vocab["##" + c] for c in text), 3]]
    for text, place in (("a", 0), ("x", 16), ("z", 18)):
        stream[place] = wordpiece.vocab[text]
    expected = [[2, *stream[i : i + 14], 3] for i in range(0, len(stream), 14)]
    if len(expected[-1]) < 16:
        expected[-1].pop()
    expected = [ids for ids in expected if len(ids) > 2]
    assert len(stream) == length
    assert unmasked(blocks(wordpiece, texts, tokenize=tokenize)) == expected


def test_labels_restore_the_block(wordpiece):
    samples = blocks(wordpiece, [WORDS * 20])
    for sample, ids in zip(samples, unmasked(samples), strict=True):
        hidden = sample["labels"] != -100
        assert sample["labels"][hidden].tolist() == torch.tensor(ids)[hidden].tolist()
        assert sample["input_ids"][~hidden].tolist() == torch.tensor(ids)[~hidden].tolist()
        assert hidden.any()
        assert not hidden[[0, -1]].any()  # special tokens are never hidden


@pytest.mark.parametrize("whole", [False, True])
def test_a_short_block_hides_something(wordpiece, whole):
    """With a probability of 1e-6, the collator would hide nothing in nearly all blocks."""
    samples = blocks(wordpiece, ["abc def"] * 40, 8, mask_probability=1e-6, whole_word_mask=whole)
    assert {int((sample["labels"] != -100).sum()) for sample in samples} == ({1, 2, 3} if whole else {1})


def test_shorter_blocks_are_padded(make):
    checkpoint = make()
    samples = blocks(checkpoint.tokenizer, ["abcdefghijklmn" + "opqr"])
    (batch,) = batches(samples, 2, 2, MASKED_LM.collator(checkpoint))
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (2, 16)
    )
    assert batch["attention_mask"].sum(1).tolist() == [16, 6]
    assert (batch["labels"][1, 6:] == -100).all()
    assert (batch["input_ids"][1, 6:] == checkpoint.tokenizer.pad_token_id).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_loss(make, side):
    checkpoint = make()
    checkpoint.tokenizer.padding_side = side  # BERT's positions start at the first token, padding or not
    samples = blocks(checkpoint.tokenizer, ["abcdefghijklmn" + "opqr"])
    alone, together = (evaluate_model(checkpoint, samples, size)["loss"] for size in (1, 2))
    assert together == pytest.approx(alone, rel=1e-6)


# ---- masks ---------------------------------------------------------------------------------------------------------


def test_shares_of_hidden_and_replaced_tokens():
    """Of 28,000 tokens 15% are hidden, of these 80% by [MASK], 10% at random, 10% not; 4.5 standard deviations."""
    tokenizer = byte_tokenizer(masks=True)
    text = "".join(np.random.default_rng(0).choice([*"abcdefghijklmnop"], 28_000))
    counts = Counter()
    for sample in blocks(tokenizer, [text], 128):
        ids, labels = sample["input_ids"], sample["labels"]
        hidden = labels != -100
        counts["all"] += len(ids) - 2
        counts["hidden"] += int(hidden.sum())
        counts["mask"] += int((ids[hidden] == tokenizer.mask_token_id).sum())
        counts["same"] += int((ids[hidden] == labels[hidden]).sum())

    def close(count, total, p):
        return abs(count - p * total) < 4.5 * math.sqrt(p * (1 - p) * total)

    hidden = counts["hidden"]
    # A random token is the mask token or the same one with a probability of 1/260 each.
    assert close(hidden, counts["all"], 0.15)
    assert close(counts["mask"], hidden, 0.8 + 0.1 / 260)
    assert close(counts["same"], hidden, 0.1 + 0.1 / 260)


@pytest.mark.parametrize("kind", ["wordpiece", "bytes"])
def test_words_are_hidden_whole(kind, wordpiece):
    """Each word as the tokenizer splits the text, and nothing beside it."""
    if kind == "wordpiece":
        tokenizer, words = wordpiece, ["the", "cat", "sat", "on", "a", "mat", ",", "and", "then", "it", "ran", "."]
    else:
        tokenizer, words = byte_tokenizer(masks=True), [" the", " cat", ",", " sat", " on", " it", "."]
    text, sizes = "".join(words) * 30, list(map(len, words)) * 30
    if kind == "wordpiece":
        text = WORDS * 30
    (sample,) = blocks(tokenizer, [text], 1000, mask_probability=0.3, whole_word_mask=True)
    hidden = (sample["labels"] != -100)[1:-1]
    assert len(hidden) == sum(sizes)
    shares = [float(part.float().mean()) for part in hidden.split(sizes)]
    assert set(shares) == {0.0, 1.0}
    assert (sample["input_ids"][1:-1][hidden] == tokenizer.mask_token_id).all()
    p, n = 0.3, len(sizes)
    assert abs(sum(shares) - p * n) < 4.5 * math.sqrt(p * (1 - p) * n)


def test_masks_of_an_evaluation_are_fixed(make, monkeypatch):
    """For any batch size and state of the generators, in another process or position, and without masks elsewhere."""
    checkpoint = make()
    samples = blocks(checkpoint.tokenizer, [WORDS * 9])
    expected = [sample["labels"].tolist() for sample in samples]
    torch.manual_seed(7)
    for size in (1, 3, 100):
        found = batches(samples, 100, size, MASKED_LM.collator(checkpoint))
        labels = [row for batch in found for row in batch["labels"].tolist()]
        assert [row[: len(ids)] for row, ids in zip(labels, expected, strict=True)] == expected
    assert samples.select([3])[0]["labels"].tolist() == expected[3]
    assert torch.initial_seed() == 7


def test_equal_blocks_of_a_training_have_their_own_masks():
    samples = blocks(byte_tokenizer(masks=True), ["abcde" * 60], 32)
    assert len(samples) == 10
    assert len({tuple(ids) for ids in unmasked(samples)}) == 1
    assert len({tuple(sample["labels"].tolist()) for sample in VariedMasks(samples, 0)}) > 8
    assert len({tuple(sample["labels"].tolist()) for sample in samples}) == 1


def test_masks_of_a_training_follow_seed_and_epoch(wordpiece):
    samples = blocks(wordpiece, [WORDS * 9])

    def masks(seed, epoch):
        varied = VariedMasks(samples, seed)
        varied.set_epoch(epoch)
        assert len(varied) == len(samples)
        found = [varied[i]["labels"].tolist() for i in range(len(varied))]
        assert [sample["labels"].tolist() for sample in varied.__getitems__([2, 0])] == [found[2], found[0]]
        return found

    assert masks(0, 1) == masks(0, 1)
    different = [masks(0, 0), masks(0, 1), masks(1, 0), [sample["labels"].tolist() for sample in samples]]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_workers_do_not_change_the_masks(wordpiece):
    varied = VariedMasks(blocks(wordpiece, [WORDS * 9]), 0)
    options = {"num_workers": 2, "persistent_workers": True, "batch_size": 5, "collate_fn": list}
    loader = torch.utils.data.DataLoader(varied, **options)
    for epoch in range(2):
        varied.set_epoch(epoch)
        found = [sample["labels"].tolist() for batch in loader for sample in batch]
        assert found == [varied[i]["labels"].tolist() for i in range(len(varied))]


@pytest.mark.parametrize("held_out", [False, True])
def test_a_stream_masks_anew(make, tmp_path, held_out):
    texts = [WORDS.strip() + str(i) for i in range(40)]
    place = tmp_path / "text.jsonl"
    place.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    arguments = DataArguments(str(place), streaming=True, block_size=16, max_eval_samples=2)
    arguments.eval_dataset = None if held_out else arguments.dataset
    train, evaluation = load_splits(make(), arguments, seed=3)
    assert isinstance(train, Stream)
    assert len(evaluation) == 2

    def labels(samples):
        return [sample["labels"].tolist() for sample in samples]

    first, again = (labels(islice(train, 300)) for _ in range(2))
    assert first == again
    assert len(set(map(tuple, first))) > 200  # 112 blocks in each pass
    fixed = blocks(make().tokenizer, texts[1:] if held_out else texts)
    assert labels(train.head(2)) == labels(fixed.select([0, 1]))
    arguments.max_train_samples = 3
    assert labels(load_splits(make(), arguments)[0]) == labels(fixed.select([0, 1, 2]))


# ---- metrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
def test_the_loss_is_that_of_a_loop(make, build):
    """Over blocks alone, without padding, in float64."""
    checkpoint = make(build)
    samples = blocks(checkpoint.tokenizer, [WORDS * 3])
    found = evaluate_model(checkpoint, samples, batch_size=3)
    model, losses = checkpoint.model.double(), []
    for sample in samples:
        with torch.no_grad():
            p = model(sample["input_ids"][None]).logits[0].softmax(-1)
        losses += [-math.log(p[i, label]) for i, label in enumerate(sample["labels"].tolist()) if label != -100]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["masked_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize("build", MODELS)
def test_pseudo_perplexity_is_that_of_a_loop(make, build):
    checkpoint = make(build)
    checkpoint.model.double()
    samples = blocks(checkpoint.tokenizer, ["some words, ", "and more words"])
    total, count = 0.0, 0
    for ids in unmasked(samples):
        for i, token in enumerate(ids):
            if token in checkpoint.tokenizer.all_special_ids:
                continue
            hidden = torch.tensor([ids])
            hidden[0, i] = checkpoint.tokenizer.mask_token_id
            with torch.no_grad():
                logits = checkpoint.model(hidden).logits[0, i].numpy()
            total += logits[token] - np.log(np.exp(logits).sum())
            count += 1
    assert count == 26  # without the separator between the texts
    steps = []
    found = pseudo_perplexity(checkpoint, samples, 4, lambda done, total: steps.append((done, total)))
    assert found == pytest.approx(math.exp(-total / count), rel=1e-12)
    assert steps[-1] == (26, 26)


def test_the_loss_of_a_training_counts_all_tokens_of_a_step(make):
    """Two parts of a step with 1 and 3 labels: their sum is the mean over 4, which the loss of BERT is not."""
    model = make().model
    ids = torch.arange(4, 12).view(2, 4)
    labels = torch.full((2, 4), -100)
    labels[0, 1], labels[1, 1:] = 5, 6
    with torch.no_grad():
        outputs = [model(part[None]) for part in ids]
    logits = torch.cat([output.logits for output in outputs])[labels != -100].double().log_softmax(-1)
    expected = -logits.gather(1, labels[labels != -100][:, None]).mean()
    parts = [masked_loss(output, part[None], torch.tensor(4)) for output, part in zip(outputs, labels, strict=True)]
    assert float(sum(parts)) == pytest.approx(float(expected), rel=1e-5)
    assert float(masked_loss(outputs[0], torch.full((1, 4), -100), torch.tensor(0))) == 0.0


# ---- calibration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
def test_a_conversion_is_calibrated_with_masks(make, build, text_file):
    checkpoint = make(build)
    found, again = (calibration_batches(checkpoint, str(text_file), samples=3, block_size=16)[0] for _ in range(2))
    assert [sorted(batch) for batch in found] == [["attention_mask", "input_ids", "labels"]] * 3
    assert all(torch.equal(a[key], b[key]) for a, b in zip(found, again, strict=True) for key in a)
    report = hf_ortho.convert(checkpoint.model, "hermite_8", calibration=found)
    assert report.weights == "fisher"
    assert report.fidelity.held_out
    with torch.no_grad():  # the held-out batch is the second one
        expected = make(build).model(**found[1]).loss.item()
    assert report.fidelity.loss_before == pytest.approx(expected, rel=1e-5)


def test_the_blocks_of_a_calibration_are_those_of_a_training(make, text_file):
    checkpoint = make()
    found, _ = calibration_batches(checkpoint, str(text_file), samples=4, block_size=16)
    train, _ = load_splits(checkpoint, DataArguments(str(text_file), block_size=16))
    assert [batch["input_ids"][0].tolist() for batch in found] == [train[i]["input_ids"].tolist() for i in range(4)]


def test_calibration_without_a_mask_token(make, make_gpt2, text_file, caplog):
    checkpoint = Checkpoint(make().model, make_gpt2()[1], None, None)
    with caplog.at_level(logging.WARNING, "hf_ortho"):
        (batch,) = calibration_batches(checkpoint, str(text_file), samples=1, block_size=16)[0]
    assert list(batch) == ["input_ids"]
    assert caplog.messages[0].startswith("note: calibrating without masks: the tokenizer")


def test_the_positions_of_roberta(make, text_file):
    """Its 40 positions start at the padding index + 1: there are 39 for tokens."""
    checkpoint = make(roberta)
    (batch,) = calibration_batches(checkpoint, str(text_file), samples=1)[0]
    assert batch["input_ids"].shape == (1, 39)
    with torch.no_grad():
        assert torch.isfinite(checkpoint.model(**batch).loss)
    with pytest.raises(ConfigError, match=r"^block_size 40: must be between 2 and the model's context length of 39$"):
        calibration_batches(checkpoint, str(text_file), samples=1, block_size=40)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_mask_token(make_gpt2):
    with pytest.raises(DataError, match=r"has no mask token, .* give another with --tokenizer, or add \[MASK\] with"):
        blocks(make_gpt2()[1], ["abc"])


@pytest.mark.parametrize("texts", [[], ["", None]])
@pytest.mark.parametrize("tokenize", [None, "once"])
def test_no_text(wordpiece, texts, tokenize):
    data = Dataset.from_dict({"text": texts}, features=rows("a").features)
    with pytest.raises(DataError, match=r"^words has no text$"):
        masked_blocks(data, wordpiece, 16, DataArguments(tokenize=tokenize), "words")


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan")])
def test_mask_probabilities_out_of_range(value):
    with pytest.raises(ConfigError, match=f"^mask_probability {value}: must be above 0 and below 1$"):
        DataArguments(mask_probability=value)


def test_a_token_cache_has_no_words():
    with pytest.raises(ConfigError, match=r"^tokenize once: stores no word boundaries; leave out whole_word_mask$"):
        DataArguments(tokenize="once", whole_word_mask=True)


def test_a_block_without_room(wordpiece):
    with pytest.raises(ConfigError, match=r"^block_size 2: must be at least 3, as .* puts 2 special tokens around"):
        blocks(wordpiece, ["abc"], 2)


def test_words_need_a_fast_tokenizer(wordpiece):
    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(wordpiece, name)

    with pytest.raises(ConfigError, match=r"^whole_word_mask: needs a tokenizer of the tokenizers library, which Slow"):
        blocks(Slow(), ["abc"], whole_word_mask=True)


def test_errors_of_the_command(hf_ortho_command, gpt2_folder, make, save_parts, tmp_path, text_file):
    error = hf_ortho_command("evaluate", gpt2_folder, "--dataset", text_file, "--pseudo-perplexity").error
    assert error == "pseudo-perplexity: needs a masked language model, which GPT2LMHeadModel is not"
    make().model.save_pretrained(tmp_path / "bert")
    error = hf_ortho_command("evaluate", tmp_path / "bert", "--dataset", text_file, "--tokenizer", gpt2_folder).error
    assert "has no mask token, which masked language modeling needs" in error
    arguments = ["--mask-probability", "1.5", "--dataset", text_file]
    error = hf_ortho_command("evaluate", tmp_path / "bert", *arguments).error
    assert error == "mask_probability 1.5: must be above 0 and below 1"


# ---- trainings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_type": "bert"}, "BertForMaskedLM"),
        ({"model_type": "bert", "config_overrides": SIZES | {"is_decoder": True}}, "BertLMHeadModel"),
        ({"model_type": "bert", "task": "text-generation"}, "BertLMHeadModel"),
        ({"model_type": "roberta"}, "RobertaForMaskedLM"),
        ({"model_type": "modernbert"}, "ModernBertForMaskedLM"),
        ({"model_type": "llama"}, "LlamaForCausalLM"),
        ({"model_type": "bart", "config_overrides": {"d_model": 16, "vocab_size": 300}}, "BartForCausalLM"),
        ({"model_type": "gpt2", "config_overrides": {"n_embd": 16, "n_head": 2, "n_layer": 1}}, "GPT2LMHeadModel"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is_decoder")
def test_the_task_of_a_new_model(options, expected):
    """An encoder is a masked language model, unless it is configured as a decoder."""
    arguments = ModelArguments(init="scratch", tokenizer="bytes", **({"config_overrides": SIZES} | options))
    with torch.device("meta"):
        checkpoint, _ = scratch_checkpoint(arguments, DataArguments(), 0)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    assert type(model).__name__ == expected
    masked = expected.endswith("MaskedLM")
    assert (tokenizer.mask_token_id is not None) == masked
    if masked:
        assert len(tokenizer) == model.config.vocab_size == 260
        assert (model.config.pad_token_id, model.config.eos_token_id) == (0, tokenizer.sep_token_id)


def test_tokenizers_of_masked_language_models(tmp_path):
    for tokenizer in (byte_tokenizer(masks=True), bpe_tokenizer(["the cat " * 9], 262, masks=True)):
        tokenizer.save_pretrained(tmp_path)
        text = "naïve\n\tcats  ✓"
        ids = T.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert tokenizer.decode(ids[1:-1]) == text
        assert [tokenizer.vocab[t] for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"^vocab_size 259: a byte-level tokenizer needs at least 260$"):
        scratch_checkpoint(
            ModelArguments("scratch", model_type="bert", tokenizer="bpe", vocab_size=259), DataArguments("x"), 0
        )


def training(folder, **options):
    defaults = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2}
    defaults |= {"dataloader_pin_memory": False, "save_strategy": "no", "per_device_train_batch_size": 16}
    return T.TrainingArguments(str(folder), **(defaults | options))


def test_a_model_from_scratch_learns(tmp_path):
    """In blocks of 30 letters abcde abcde ..., the position determines each letter."""
    (tmp_path / "letters.txt").write_text("abcde" * 400)
    source = ModelArguments("scratch", model_type="bert", tokenizer="bytes", activation="hermite_3")
    source.config_overrides = SIZES | DROPOUT | {"hidden_size": 32, "initializer_range": 0.02}
    data = DataArguments(str(tmp_path / "letters.txt"), block_size=32)
    result = finetune(Recipe(source, data, training(tmp_path / "out", max_steps=40)))
    assert result.before is None
    assert sorted(result.after) == ["loss", "masked_perplexity"]
    assert result.after["loss"] < 0.5 * math.log(5)  # half the entropy of the letters alone
    loaded = T.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    again = evaluate_model(Checkpoint(loaded, result.checkpoint.tokenizer, None, None), result.held_back)
    assert again["loss"] == pytest.approx(result.after["loss"], rel=1e-5)
    fill = T.pipeline("fill-mask", model=str(tmp_path / "out"))
    assert len(fill("one tw[MASK] three")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("tokenize", [None, "once"])
def test_a_resumed_training_sees_the_same_masks(make, save_parts, tmp_path, text_file, tokenize):
    checkpoint = make()
    save_parts(tmp_path / "bert", checkpoint.model, checkpoint.tokenizer)
    options = {"save_strategy": "steps", "save_steps": 7, "max_steps": 9, "per_device_train_batch_size": 40}

    def run(name, **more):
        data = DataArguments(str(text_file), block_size=16, tokenize=tokenize)
        recipe = Recipe(
            ModelArguments(model=str(tmp_path / "bert")), data, training(tmp_path / name, **(options | more))
        )
        return finetune(recipe).after["loss"]

    whole = run("whole")
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-7").rename(tmp_path / "part" / "checkpoint-7")
    assert run("part", resume_from_checkpoint="true") == whole  # in the middle of the second epoch


@pytest.fixture
def encoder(make, save_parts, tmp_path):
    """A saved BertModel, as of sentence-transformers."""
    checkpoint = make()
    return save_parts(tmp_path / "encoder", checkpoint.model.bert, checkpoint.tokenizer)


@pytest.mark.slow
def test_an_encoder_becomes_a_masked_language_model(encoder, tmp_path, text_file, hf_ortho_command):
    settings = ["--task", "fill-mask", "--activation", "hermite_3", "--dataset", text_file, "--block-size", "16"]
    settings += ["--max-steps", "2", "--use-cpu", "--output-dir", tmp_path / "out", "--save-strategy", "no"]
    ran = hf_ortho_command("finetune", "--model", encoder, *settings, "--max-eval-samples", "9")
    before, after, _ = ran.figures["loss"]
    assert float(before) != float(after)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "type: masked_perplexity" in card
    options = ["--dataset", text_file, "--block-size", "16", "--max-samples", "2"]
    figures = hf_ortho_command("evaluate", tmp_path / "out", *options, "--pseudo-perplexity").figures
    assert sorted(figures) == ["loss", "masked_perplexity", "pseudo_perplexity"]
    checkpoint = load_checkpoint(str(tmp_path / "out"))
    assert type(checkpoint.model) is T.BertForMaskedLM
    train, _ = load_splits(checkpoint, DataArguments(str(text_file), block_size=16))
    expected = pseudo_perplexity(checkpoint, train.select([0, 1]))
    assert float(figures["pseudo_perplexity"][0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["activations", "lora+activations"])
def test_the_embeddings_of_a_new_head_are_not_new(encoder, tmp_path, text_file, policy):
    """The output layer is tied to them: only the layers before it are trained with the activations."""
    source = ModelArguments(model=str(encoder), task="fill-mask", train=policy, activation="hermite_3")
    result = finetune(Recipe(source, DataArguments(str(text_file), block_size=16), training(tmp_path / "out")))
    assert result.checkpoint.new_modules == ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
    loaded = T.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    embeddings = T.AutoModel.from_pretrained(encoder).get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    again = evaluate_model(Checkpoint(loaded, result.checkpoint.tokenizer, None, None), result.held_back)
    assert again["loss"] == pytest.approx(result.after["loss"], rel=1e-5)
    assert again["loss"] != pytest.approx(result.before["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["activations", "lora"])
def test_an_adapter_with_a_new_head(encoder, tmp_path, text_file, policy):
    source = ModelArguments(model=str(encoder), task="fill-mask", train=policy, adapter=True)
    source.activation = "hermite_3" if policy == "activations" else None
    data = DataArguments(str(text_file), block_size=16, max_eval_samples=9)
    result = finetune(Recipe(source, data, training(tmp_path / "out")))
    assert not (tmp_path / "out" / "labels.json").exists()
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    assert sorted(saved) == ["cls.predictions.transform.LayerNorm", "cls.predictions.transform.dense"]
    loaded = load_checkpoint(str(tmp_path / "out"))
    assert type(loaded.model) is T.BertForMaskedLM
    again = evaluate_model(Checkpoint(loaded.model, result.checkpoint.tokenizer, None, None), result.held_back)
    assert again["loss"] == pytest.approx(result.after["loss"], rel=1e-5)
    assert again["loss"] != pytest.approx(result.before["loss"], rel=1e-3)
