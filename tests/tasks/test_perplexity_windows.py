"""Perplexity in windows against the loop of the documentation of transformers, and figures per byte and per word."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.errors import ConfigError, DataError
from hf_ortho.tasks.arguments import DataArguments
from hf_ortho.tasks.causal_lm import CAUSAL_LM
from hf_ortho.tasks.packing import padded
from hf_ortho.tasks.tokenizer import bpe_tokenizer
from hf_ortho.tasks.windows import text_metrics, text_windows, windows
from hf_ortho.training.evaluation import evaluate_model

TEXT = "".join(f"Line {i * i % 37} of naïve text\nwith äöü — {i}  and more.\n\n" for i in range(12))
PLAIN = TEXT.encode("ascii", "replace").decode()


@pytest.fixture(scope="module")
def checkpoint(make_gpt2):
    """With losses that differ much from token to token."""
    model, tokenizer = make_gpt2(initializer_range=0.3)
    return Checkpoint(model.eval(), tokenizer, None, None)


@pytest.fixture(scope="module")
def bpe():
    return bpe_tokenizer([TEXT], 300)


def samples_of(checkpoint, texts, **options):
    stride = options.pop("stride", None)
    arguments = DataArguments(**options)
    arguments.stride = stride
    return CAUSAL_LM.prepare_evaluation(checkpoint, Dataset.from_dict({"text": texts}), arguments, "corpus")


def documentation(model, encodings, max_length, stride, counted):
    """The loop of "Perplexity of fixed-length models"; ``counted`` are the tokens of a loss, from its labels."""
    seq_len = encodings.size(1)
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = encodings[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        if counted(target_ids):
            with torch.no_grad():
                neg_log_likelihood = model(input_ids, labels=target_ids).loss.item()
            nll_sum += neg_log_likelihood * counted(target_ids)
            n_tokens += counted(target_ids)
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return nll_sum / n_tokens


def as_documented(target_ids):
    """One less than the labels, because the model shifts them; in a window with context, it takes all of them."""
    return (target_ids != -100).sum().item() - 1


def as_averaged(target_ids):
    """The labels that are left after the shift, which the loss of the model is the mean over."""
    return (target_ids[:, 1:] != -100).sum().item()


# ---- the documentation of transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [193, 97, 33, 32, 5])  # 193 and 97 leave a window of one token
@pytest.mark.parametrize(("block_size", "stride"), [(32, 1), (32, 8), (32, 31), (32, 32), (16, 12), (16, 16)])
def test_the_loop_of_the_documentation(checkpoint, block_size, stride, length):
    text = PLAIN[:length]
    ids = checkpoint.tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, length)
    samples = samples_of(checkpoint, [text], block_size=block_size, stride=stride)
    loss = evaluate_model(checkpoint, samples, 7)["loss"]
    assert loss == pytest.approx(documentation(checkpoint.model, ids, block_size, stride, as_averaged), rel=1e-6)
    if stride == block_size:
        disjoint = evaluate_model(checkpoint, samples_of(checkpoint, [text], block_size=block_size))
        assert disjoint["loss"] == loss
        assert loss == pytest.approx(documentation(checkpoint.model, ids, block_size, stride, as_documented), rel=1e-6)


def test_the_weights_of_the_documentation_leave_out_one_token_per_window(checkpoint):
    """They differ by the spread of the windows over their length; on long windows, by nothing to speak of."""
    ids = checkpoint.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    loss = evaluate_model(checkpoint, samples_of(checkpoint, [TEXT], stride=16))["loss"]
    assert loss == pytest.approx(documentation(checkpoint.model, ids, 32, 16, as_documented), rel=1 / 16)


def test_each_token_is_predicted_once_from_as_much_as_there_is():
    tokens = np.arange(50)
    rows = windows(tokens, 10, stride=4)
    predicted = [int(token) for row in rows for token in row["labels"] if token != -100]
    assert predicted == list(range(1, 50))
    for row in rows:
        targets = row["labels"][row["labels"] != -100]
        context = int(targets[0] - row["input_ids"][0])
        assert context >= min(10 - 4, int(targets[0])) or row["input_ids"][-1] == 49
        assert torch.equal(row["input_ids"], torch.arange(row["input_ids"][0], row["input_ids"][-1] + 1))


def test_the_first_token_of_a_disjoint_block_is_not_predicted():
    rows = windows(np.arange(21), 5)
    assert [int(token) for row in rows for token in row["labels"] if token != -100] == [i for i in range(21) if i % 5]
    assert len(rows) == 4  # nothing predicts the last token


# ---- text, documents, bytes and words ------------------------------------------------------------------------------


def test_a_text_file_is_one_document_whatever_its_lines(checkpoint, tmp_path, hf_ortho_command, save_parts):
    from hf_ortho.tasks.data import load

    (tmp_path / "wiki.test.raw").write_text(TEXT)
    rows = load(str(tmp_path / "wiki.test.raw"))["train"]
    samples = CAUSAL_LM.prepare_evaluation(checkpoint, rows, DataArguments(block_size=32), "corpus")
    ids = torch.cat([row["input_ids"] for row in samples])
    assert ids.tolist() == checkpoint.tokenizer(TEXT)["input_ids"]
    assert checkpoint.tokenizer.eos_token_id not in ids


def test_documents_are_separated_and_empty_ones_left_out(checkpoint):
    samples = samples_of(checkpoint, ["", "ab", None, "cde", ""], block_size=4)
    end = checkpoint.tokenizer.eos_token_id
    a, b, c, d, e = checkpoint.tokenizer("abcde")["input_ids"]
    assert [row["input_ids"].tolist() for row in samples] == [[a, b, end, c], [d, e]]
    assert [row["labels"].tolist() for row in samples] == [[-100, b, end, c], [-100, e]]
    assert samples.with_format(None)["bytes"][:] == [2, 1]
    assert samples.with_format(None)["words"][:] == [1, 0]  # "ab" begins in a token that is not predicted


def test_bytes_are_those_of_the_decoded_tokens(bpe):
    samples = text_windows([[PLAIN]], bpe, 16, stride=5)
    counts = samples.with_format(None)
    assert len(bpe(PLAIN)["input_ids"]) < 0.8 * len(PLAIN)
    for row, size, words in zip(samples, counts["bytes"], counts["words"], strict=True):
        predicted = bpe.decode(row["labels"][row["labels"] != -100])
        assert size == len(predicted)
        assert words in (len(predicted.split()), len(predicted.split()) - 1)  # unless it begins in the token before


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("text", [TEXT, "  \n ä 😀x\t\n", "日本語 and ASCII"])
def test_all_tokens_together_are_the_whole_text(bpe, text, fast):
    def tokenizer(texts, return_offsets_mapping=False, **options):
        assert fast or not return_offsets_mapping
        return bpe(texts, return_offsets_mapping=return_offsets_mapping, **options)

    stand_in = type("Tokenizer", (), {"__call__": staticmethod(tokenizer), "is_fast": fast, "eos_token_id": 0})()
    first = bpe.decode(bpe("x " + text)["input_ids"][0])
    (counts,) = text_windows([["x " + text]], stand_in, 10_000).with_format(None)
    assert first == "x"
    if fast:
        assert counts["bytes"] == len((" " + text).encode())
        assert counts["words"] == len(text.split())
    else:
        assert counts["bytes"] == pytest.approx(len(text.encode()), abs=4)


@pytest.mark.parametrize("stride", [None, 8])
def test_figures_per_byte_and_per_word_from_all_losses(checkpoint, hf_ortho_command, save_parts, tmp_path, stride):
    """One byte is one token here, so the predicted bytes are those behind the first of all, or of each block."""
    texts = [PLAIN, "Another document.\n"]
    folder = save_parts(tmp_path / "model", checkpoint.model, checkpoint.tokenizer)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [] if stride is None else ["--stride", stride]
    ran = hf_ortho_command("evaluate", folder, "--dataset", tmp_path / "texts.jsonl", *flags)
    content = PLAIN.encode() + b"\0" + texts[1].encode()  # \0 for the end of a document
    first = [i for i in range(len(content)) if i == 0 or (stride is None and i % 32 == 0)]
    predicted = [i for i in range(len(content)) if i not in first]
    size = len([i for i in predicted if content[i]])
    words = len([i for i in predicted if not content[i : i + 1].isspace() and content[i - 1 : i] in b" \n\0"])
    words -= 1  # the end of a document is no word
    loss = float(ran.figures["loss"][0])
    total = loss * len(predicted)
    found = {key: float(ran.figures[key][0]) for key in ("bits_per_byte", "bits_per_word", "word_perplexity")}
    assert found["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert found["bits_per_word"] == pytest.approx(total / words / math.log(2), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-3)  # of a loss of 5 decimals
    assert found["word_perplexity"] == pytest.approx(2 ** found["bits_per_word"], rel=1e-3)


def test_figures_that_a_text_or_another_kind_of_samples_has_not(bpe):
    (figure,) = text_metrics(1.0, text_windows([["日本語"]], bpe, 16)).items()  # a token per byte
    assert figure == ("bits_per_byte", pytest.approx(8 / 6 / math.log(2)))  # the first holds a character's 3 bytes
    assert text_metrics(1.0, windows(np.arange(9), 8)) == {}
    many = text_windows([["one two three"]], bpe, 8)
    assert text_metrics(5000.0, many)["word_perplexity"] == math.inf


# ---- how much is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 1, 3])
def test_no_more_is_read_than_the_windows_asked_for(bpe, stride):
    def documents():
        yield ["one two three four five"] * 4
        raise AssertionError("read on")

    whole = text_windows([["one two three four five"] * 4], bpe, 8, stride=stride)
    some = text_windows(documents(), bpe, 8, stride=stride, most=2)
    assert [row["input_ids"].tolist() for row in some] == [row["input_ids"].tolist() for row in whole.select([0, 1])]


def test_a_long_document_is_cut_before_it_is_tokenized(checkpoint):
    samples = samples_of(checkpoint, [TEXT * 100], block_size=32, max_eval_samples=3, stride=5)
    whole = samples_of(checkpoint, [TEXT * 100], block_size=32, stride=5)
    assert len(samples) == 3
    assert samples.with_format(None)[:] == whole.with_format(None)[:3]
    assert len(samples.format["format_kwargs"]["transform"].tokens) < 100 * len(TEXT)


@pytest.mark.parametrize("texts", [["ab", "cde", "x" * 30], [TEXT]])
@pytest.mark.parametrize("stride", [None, 3])
def test_a_token_cache_has_the_same_windows(checkpoint, texts, stride):
    once = samples_of(checkpoint, texts, block_size=8, tokenize="once", stride=stride)
    ours = samples_of(checkpoint, texts, block_size=8, stride=stride)
    assert len(once) == len(ours)
    for a, b in zip(once, ours, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])


def test_less_than_a_block_is_one_sample_and_less_than_two_tokens_none(checkpoint):
    (row,) = samples_of(checkpoint, ["abc"], block_size=32)
    assert row["labels"].tolist()[1:] == checkpoint.tokenizer("bc")["input_ids"]
    for texts, count in ((["a"], 1), (["", None], 0)):
        with pytest.raises(DataError, match=f"^corpus has {count} tokens to evaluate on; at least 2 are needed$"):
            samples_of(checkpoint, texts, block_size=32)


@pytest.mark.parametrize("stride", [33, 1000, 0, -1])
def test_a_stride_that_does_not_fit(checkpoint, stride):
    with pytest.raises(ConfigError, match=f"^stride {stride}: must be between 1 and the block size of 32$"):
        samples_of(checkpoint, [TEXT], stride=stride)


# ---- batches -------------------------------------------------------------------------------------------------------


def test_padding_changes_no_loss(checkpoint):
    ids = checkpoint.tokenizer(TEXT)["input_ids"]
    rows = [{"input_ids": ids[i : i + n], "labels": ids[i : i + n]} for i, n in ((0, 5), (7, 12), (40, 2))]
    batch = padded(rows)
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(batch, (3, 12))
    assert batch["attention_mask"].sum(1).tolist() == [5, 12, 2]
    with torch.no_grad():
        together = checkpoint.model(**batch).loss.item()
        alone = [checkpoint.model(**padded([row])).logits[0].double() for row in rows]
    pairs = zip(alone, rows, strict=True)
    losses = [cross_entropy(z[:-1], torch.tensor(row["labels"][1:]), reduction="none") for z, row in pairs]
    assert together == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


def test_samples_of_one_length_are_stacked_as_they_are():
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [-100, 4]}]
    batch = padded(rows)
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["labels"].tolist() == [[1, 2], [-100, 4]]
