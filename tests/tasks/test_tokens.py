import errno
import json
import os
import pickle
import threading

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.errors import ConfigError, DataError
from hf_ortho.files import checksum
from hf_ortho.tasks import data, tokens
from hf_ortho.tasks.packing import Packer
from hf_ortho.tasks.samples import load_splits
from hf_ortho.tasks.tokens import cached_blocks
from hf_ortho.training import DataArguments

# 600 documents of 0 to 12 letters, and none.
TEXTS = [*("abcdefghijkl"[: i * 5 % 13] for i in range(600)), None]


@pytest.fixture(scope="module")
def tokenizer(make_gpt2):
    return make_gpt2()[1]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of the caches of one test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")
    return tmp_path / "home" / "hf_ortho_tokens"


@pytest.fixture
def tokenized(monkeypatch):
    """The documents that were tokenized in this process, in order."""
    documents, call = [], Packer.__call__

    def record(self, texts):
        texts = list(texts)
        documents.extend(texts)
        return call(self, texts)

    monkeypatch.setattr(Packer, "__call__", record)
    return documents


def sequence(tokenizer, texts=TEXTS):
    """The tokens of the texts, each followed by the end."""
    byte_ids = {tokenizer.decode([i]): i for i in range(256)}
    return [token for text in texts if text for token in [*(byte_ids[c] for c in text), tokenizer.eos_token_id]]


def ids(blocks):
    return torch.stack([sample["input_ids"] for sample in blocks])


def parquet(path, **columns):
    pa.parquet.write_table(pa.table(columns), path)
    return data.load(str(path), check=False)["train"]


def stored(home):
    """The folders of complete caches."""
    return sorted(file.parent for file in home.glob("*/tokens.json"))


# ---- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_blocks_are_the_token_sequence_cut_in_blocks(tokenizer, monkeypatch, home, processes):
    """Also across the batches of a file and across the files of several processes, for any block size of one cache."""
    monkeypatch.setattr(tokens, "ROW", 8)
    monkeypatch.setattr(tokens, "BYTES", 1)
    monkeypatch.setattr(tokens, "_cores", lambda: processes)
    expected, dataset = sequence(tokenizer), Dataset.from_dict({"text": TEXTS})
    for size in (2, 7, 100, len(expected)):
        blocks = cached_blocks(dataset, tokenizer, size)
        assert ids(blocks).dtype == torch.int64
        assert ids(blocks).ravel().tolist() == expected[: len(expected) // size * size]
        assert torch.equal(torch.stack([sample["labels"] for sample in blocks]), ids(blocks))
        assert torch.equal(ids(blocks.__getitems__([len(blocks) - 1, 0])), ids([blocks[-1], blocks[0]]))
    (folder,) = stored(home)
    assert len(list(folder.glob("*.arrow"))) == processes


def test_blocks_are_those_that_are_not_cached(tokenizer):
    dataset = data.load("pydoc_topics")["validation"]
    expected = data.text_blocks(dataset, tokenizer, 32)["input_ids"][:]
    assert torch.equal(ids(cached_blocks(dataset, tokenizer, 32)), expected)


def test_a_token_takes_two_bytes_or_four_for_large_vocabularies(tokenizer, home):
    """Here with the ids 65535, the largest of two bytes, and 70000."""

    def words(size):
        model = models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    dataset = Dataset.from_dict({"text": ["w1 w65535 w70000 w2 " * 100] * 50})
    for size, expected, width in ((65536, [1, 65535, 0, 2], 2), (70001, [1, 65535, 70000, 2], 4)):
        before = stored(home)
        blocks = cached_blocks(dataset, words(size), 4)
        assert ids(blocks).tolist() == [expected] * 5000
        (folder,) = {*stored(home)} - {*before}
        on_disk = sum(file.stat().st_size for file in folder.glob("*.arrow"))
        assert width * 20_000 <= on_disk < width * 20_000 * 1.2  # and the frame of Arrow


def test_only_the_blocks_asked_for_are_read(tokenizer):
    """The parts are views of a memory map, and a copy for another process has but the names of the files."""
    blocks = cached_blocks(Dataset.from_dict({"text": ["some text"] * 10_000}), tokenizer, 100)
    cut = blocks.format["format_kwargs"]["transform"]
    assert len(cut.tokens) == 100_000
    assert not any(part.flags.owndata or part.flags.writeable for part in cut.tokens.parts)
    assert len(pickle.dumps(cut)) < 10_000
    copy = pickle.loads(pickle.dumps(blocks))
    assert torch.equal(ids(copy), ids(blocks))


# ---- reuse ---------------------------------------------------------------------------------------------------------


def test_a_cache_is_reused_for_the_same_tokens_alone(tokenizer, make_gpt2, tmp_path, home, tokenized):
    def writes(file, column="text", using=tokenizer, size=4):
        tokenized.clear()
        cached_blocks(data.load(str(file), check=False)["train"], using, size, column)
        return bool(tokenized)

    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for file in (first, second):
        parquet(file, text=["some text", "and more"], other=["something else", None])
    assert writes(first)
    assert not writes(first)
    assert not writes(first, size=3)
    assert not writes(first, using=make_gpt2()[1])  # another object of the same content
    tokenizer("a", truncation=True, max_length=4)  # which stays set in the tokenizer
    assert not writes(first)
    assert len(stored(home)) == 1
    assert writes(first, using=PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))  # without an end
    assert writes(first, column="other")
    assert writes(second)
    parquet(first, text=["some Text", "and more"], other=["something else", None])
    changed = first.stat().st_mtime_ns + 10**9
    os.utime(first, ns=(changed, changed))
    assert writes(first)
    assert len(stored(home)) == 5


def test_a_dataset_in_memory_has_a_cache_too(tokenizer, home, tokenized):
    cached_blocks(data.load("pydoc_topics")["validation"], tokenizer, 32)
    assert tokenized
    tokenized.clear()
    cached_blocks(data.load("pydoc_topics")["validation"], tokenizer, 32)
    assert not tokenized


@pytest.mark.parametrize("damage", ["truncated", "missing", "incomplete", "manifest", "count", "arrow", "byte"])
def test_a_damaged_cache_is_written_again(tokenizer, home, caplog, damage):
    dataset = Dataset.from_dict({"text": TEXTS})
    expected = ids(cached_blocks(dataset, tokenizer, 16))
    (folder,) = stored(home)
    file, manifest = folder / "tokens.arrow", folder / "tokens.json"
    content = json.loads(manifest.read_text())
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 8)
    elif damage == "missing":
        file.unlink()
    elif damage == "incomplete":  # the writer was killed
        manifest.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "count":
        manifest.write_text(json.dumps(content | {"tokens": 5}))
    elif damage == "byte":
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        file.write_bytes(damaged)
    else:
        file.write_bytes(b"\xff" * file.stat().st_size)
    caplog.clear()
    assert torch.equal(ids(cached_blocks(dataset, tokenizer, 16)), expected)
    assert file.stat().st_size == content["files"]["tokens.arrow"][0][0]
    assert checksum(file) == content["files"]["tokens.arrow"][1]
    assert ("is damaged" in caplog.text) == (damage != "incomplete")
    assert "was tokenized" in caplog.text


def test_a_copy_of_a_cache_is_compared_by_its_content_once(tokenizer, home, caplog, monkeypatch):
    dataset = Dataset.from_dict({"text": TEXTS})
    expected = ids(cached_blocks(dataset, tokenizer, 16))
    (folder,) = stored(home)
    os.utime(folder / "tokens.arrow", (1e9, 1e9))
    read = []
    monkeypatch.setattr(tokens, "checksum", lambda file: (read.append(file.name), checksum(file))[1])
    caplog.clear()
    for _ in range(2):
        assert torch.equal(ids(cached_blocks(dataset, tokenizer, 16)), expected)
    assert read == ["tokens.arrow"]
    assert "is damaged" not in caplog.text
    assert "was tokenized" not in caplog.text


def test_the_note_says_where_and_how_large(tokenizer, home, caplog):
    for place in ("was tokenized in", "is read from"):
        cached_blocks(Dataset.from_dict({"text": ["123456789"] * 100}), tokenizer, 16, name="numbers")
        assert f"numbers {place}" in caplog.text
        assert "1,000 tokens (0.0 MB)" in caplog.text
        assert str(stored(home)[0]) in caplog.text
        caplog.clear()


def test_one_of_several_writes_and_the_others_wait(tokenizer, monkeypatch, home):
    """Whoever comes second finds the first one in the middle of its work."""
    inside, go_on, write, written = threading.Event(), threading.Event(), tokens._write, []

    def slow(*args):
        written.append(1)
        inside.set()
        assert go_on.wait(60)
        write(*args)

    monkeypatch.setattr(tokens, "_write", slow)
    dataset, found = Dataset.from_dict({"text": TEXTS}), []
    threads = [threading.Thread(target=lambda: found.append(cached_blocks(dataset, tokenizer, 16))) for _ in range(2)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert torch.equal(ids(found[0]), ids(found[1]))


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_a_failure_leaves_no_cache_and_no_lock(tokenizer, tmp_path, home):
    bad = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    dataset = parquet(tmp_path / "bad.parquet", text=bad)
    for _ in range(2):
        with pytest.raises(DataError, match=r"bad.parquet' cannot be read: .*utf-8"):
            cached_blocks(dataset, tokenizer, 4, name=str(tmp_path / "bad.parquet"))
        assert list(home.glob("*/*")) == []


def test_a_place_that_cannot_be_written(tokenizer, tmp_path, home):
    home.parent.mkdir()
    home.write_text("in the way")
    with pytest.raises(DataError, match=r"corpus: the token cache .*hf_ortho_tokens/\w+ cannot be read or written: "):
        cached_blocks(Dataset.from_dict({"text": TEXTS}), tokenizer, 4, name="corpus")


def test_text_shorter_than_a_block_is_refused(tokenizer):
    with pytest.raises(DataError, match="corpus has less than one block of 5 tokens: it has 4"):
        cached_blocks(Dataset.from_dict({"text": ["abc"]}), tokenizer, 5, name="corpus")
    with pytest.raises(DataError, match="corpus has less than one block of 5 tokens: it has 0"):
        cached_blocks(Dataset.from_dict({"text": [None, ""]}), tokenizer, 5, name="corpus")
    with pytest.raises(DataError, match="corpus has less than one block of 5 tokens: it has 0"):
        cached_blocks(Dataset.from_dict({"text": ["a"]}).select([]), tokenizer, 5, name="corpus")


def test_a_cache_that_cannot_be_read_for_a_while_is_kept(tokenizer, home, monkeypatch):
    def full(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    dataset = Dataset.from_dict({"text": TEXTS})
    expected = ids(cached_blocks(dataset, tokenizer, 16))
    (folder,) = stored(home)
    before = {file.name: file.stat() for file in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "from_file", full)
        with pytest.raises(DataError, match=r"cannot be read or written: .*Too many open files"):
            cached_blocks(dataset, tokenizer, 16)
    assert {file.name: file.stat() for file in folder.iterdir()} == before
    assert torch.equal(ids(cached_blocks(dataset, tokenizer, 16)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenize": "twice"}, "tokenize 'twice': must be once, or left out"),
        ({"tokenize": "once", "streaming": True}, "tokenize once: reads all text before training; leave out streaming"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        DataArguments("pydoc_topics", **options)


def test_images_have_no_tokens(make_convnext):
    model, processor = make_convnext()
    with pytest.raises(ConfigError, match="tokenize once: ConvNextForImageClassification has no tokenizer"):
        load_splits(Checkpoint(model, None, processor, None), DataArguments("digits", tokenize="once"))


# ---- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenize", "most", "train", "held_back"),
    [(None, None, 180, 20), ("once", None, 180, 20), ("once", 50, 180, 20), ("once", 3, 197, 3)],
)
def test_the_last_blocks_are_held_back(make_gpt2, tmp_path, tokenize, most, train, held_back):
    """Without evaluation data: a tenth, or with a cache no more than is evaluated."""
    text = "".join(chr(97 + i % 26) for i in range(200 * 8))
    (tmp_path / "text.txt").write_text(text)
    checkpoint = Checkpoint(*make_gpt2(), None, None)
    options = {"block_size": 8, "max_eval_samples": most, "tokenize": tokenize}
    parts = load_splits(checkpoint, DataArguments(str(tmp_path / "text.txt"), **options))
    assert [len(part) for part in parts] == [train, held_back]
    assert "".join(checkpoint.tokenizer.decode(ids(part).ravel()) for part in parts) == text
