import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.errors import DataError
from hf_ortho.tasks import data
from hf_ortho.tasks.images import images
from hf_ortho.tasks.labels import class_names
from hf_ortho.tasks.samples import load_splits
from hf_ortho.training import DataArguments

TEXTS = ["first line\nsecond line\n", "naïve — \t ✓", 'a,b,"c"']


@pytest.fixture(scope="module")
def tokenizer(make_gpt2):
    return make_gpt2()[1]


@pytest.fixture(scope="module")
def processor(make_convnext):
    pytest.importorskip("PIL")
    return make_convnext()[1]


def picture(seed, mode="RGB"):
    from PIL import Image as PILImage

    rng = np.random.default_rng(seed)
    return PILImage.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).convert(mode)


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "png")
    return buffer.getvalue()


def pixels(processor, seed, mode="RGB"):
    return processor([picture(seed, mode).convert("RGB")], return_tensors="pt")["pixel_values"][0]


# ---- what the dependencies carry -----------------------------------------------------------------------------------


def test_pydoc_topics_has_each_paragraph_once_and_a_tenth_held_back():
    from pydoc_data.topics import topics

    parts = data.load("pydoc_topics")
    train, held_back = (
        [p.strip("\n") for document in parts[name]["text"] for p in document.split("\n\n") if p.strip()]
        for name in ("train", "validation")
    )
    everything = {p.strip("\n") for text in topics.values() for p in text.split("\n\n") if p.strip()}
    assert not set(train) & set(held_back)
    assert set(train) | set(held_back) == everything
    assert len(train) + len(held_back) == len(everything)
    assert sum(map(len, held_back)) / sum(map(len, everything)) == pytest.approx(0.1, abs=0.02)


def test_pydoc_topics_is_the_same_each_time():
    assert data.load("pydoc_topics")["train"]["text"][:] == data.load("pydoc_topics")["train"]["text"][:]


def test_digits_are_the_scans_of_scikit_learn():
    pytest.importorskip("PIL")
    scans = pytest.importorskip("sklearn.datasets").load_digits()
    parts = data.load("digits")
    held_back = np.arange(1797) % 5 == 4
    for name, rows in (("train", ~held_back), ("validation", held_back)):
        assert parts[name].num_rows == rows.sum()
        assert parts[name]["label"][:] == scans.target[rows].tolist()
        assert class_names(parts[name]) == list("0123456789")
        found = np.stack([np.asarray(image) for image in parts[name].select(range(50))["image"]])
        assert found.shape == (50, 32, 32)
        # Means of 4 x 4 blocks undo the enlargement but for its smoothing.
        small = found.reshape(50, 8, 4, 8, 4).mean((2, 4))
        assert np.corrcoef(small.ravel(), scans.images[rows][:50].ravel())[0, 1] > 0.98


# ---- text ----------------------------------------------------------------------------------------------------------


def stream(tokenizer, texts, end):
    """The tokens of ``texts`` one after the other, each text followed by ``end``."""
    byte_ids = {tokenizer.decode([i]): i for i in range(256)}
    return [token for text in texts for token in ([byte_ids[c] for c in text] + end)]


@pytest.mark.parametrize("block_size", [2, 7, 100])
def test_text_blocks_are_the_token_stream_cut_in_blocks(tokenizer, block_size):
    # More documents than one batch of the tokenization takes, of lengths 0 to 12.
    texts = ["abcdefghijkl"[: i * 5 % 13] for i in range(600)]
    blocks = data.text_blocks(Dataset.from_dict({"text": [*texts, None]}), tokenizer, block_size)
    expected = stream(tokenizer, [t for t in texts if t], [tokenizer.eos_token_id])
    kept = len(expected) // block_size * block_size
    assert kept < len(expected) or block_size == 2
    assert blocks.column_names == ["input_ids", "labels"]
    assert blocks["input_ids"][:].dtype == torch.int64
    assert blocks["input_ids"][:].shape == (kept // block_size, block_size)
    assert blocks["input_ids"][:].ravel().tolist() == expected[:kept]
    assert torch.equal(blocks["labels"][:], blocks["input_ids"][:])


def test_text_blocks_of_a_tokenizer_without_an_end(tokenizer):
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    blocks = data.text_blocks(Dataset.from_dict({"text": ["abc", "defg"]}), endless, 3)
    assert blocks["input_ids"][:].ravel().tolist() == stream(tokenizer, ["abcdef"], [])


def test_text_shorter_than_a_block_is_refused(tokenizer):
    with pytest.raises(DataError, match="corpus has less than one block of 5 tokens"):
        data.text_blocks(Dataset.from_dict({"text": ["abc"]}), tokenizer, 5, name="corpus")


def write(path: Path, texts) -> Path:
    if path.suffix == ".txt":
        path.write_text(texts[0], encoding="utf-8")
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    elif path.suffix == ".parquet":
        pa.parquet.write_table(pa.table({"text": texts}), path)
    else:
        pa.csv.write_csv(pa.table({"text": texts}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv"])
def test_a_text_file_is_read_to_the_letter(tmp_path, suffix):
    splits = data.load(str(write(tmp_path / f"data{suffix}", TEXTS)))
    assert list(splits) == ["train"]
    assert splits["train"]["text"][:] == (TEXTS[:1] if suffix == ".txt" else TEXTS)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".csv", ".TXT"])
def test_a_folder_of_text_files_is_read_in_order(tmp_path, suffix):
    (tmp_path / "deeper").mkdir()
    for place, text in (("a", "one"), ("b", "two"), ("deeper/c", "three")):
        lower = write(tmp_path / f"{place}{suffix.lower()}", [text])
        lower.rename(lower.with_suffix(suffix))
    (tmp_path / "notes.md").write_text("not data")
    assert data.load(str(tmp_path))["train"]["text"][:] == ["one", "two", "three"]


def dataset_of(**columns):
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("columns", "wanted", "expected"),
    [
        ({"text": ["yes"], "title": ["no"]}, None, "yes"),
        ({"content": ["yes"], "id": [1]}, None, "yes"),
        ({"text": ["no"], "title": ["yes"]}, "title", "yes"),
    ],
)
def test_text_column_found(tokenizer, columns, wanted, expected):
    blocks = data.text_blocks(dataset_of(**columns), tokenizer, 3, wanted)
    assert tokenizer.decode(blocks["input_ids"][0]) == expected


@pytest.mark.parametrize(
    ("columns", "wanted", "message"),
    [
        ({"title": ["a"], "body": ["b"]}, None, r"no unambiguous text column .*title, body\).*--text-column"),
        ({"id": [1]}, None, r"no unambiguous text column .*: id\)"),
        ({"text": ["a"], "id": [1]}, "body", "no column 'body'; it has: text, id"),
        ({"text": ["a"], "id": [1]}, "id", "'id'"),
        ({"text": [1, 2, 3]}, None, "text"),
    ],
)
def test_text_column_not_found(tokenizer, columns, wanted, message):
    with pytest.raises(DataError, match=message):
        data.text_blocks(dataset_of(**columns), tokenizer, 2, wanted)


# ---- images --------------------------------------------------------------------------------------------------------


def image_folder(folder: Path, names=("cat", "bird", "dog"), each=2) -> Path:
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for j in range(each):
            picture(10 * i + j).save(folder / name / f"{j}.png")
    return folder


def test_an_image_folder_names_its_classes(tmp_path, processor):
    splits = data.load(str(image_folder(tmp_path / "animals")))
    assert list(splits) == ["train"]
    samples = images(splits["train"], processor)
    assert class_names(samples) == ["bird", "cat", "dog"]
    assert [s["labels"] for s in samples] == [0, 0, 1, 1, 2, 2]
    assert samples[2]["pixel_values"].shape == (3, 16, 16)
    assert samples[2]["pixel_values"].dtype == torch.float32
    for i, seed in enumerate((10, 11, 0, 1, 20, 21)):
        assert torch.equal(samples[i]["pixel_values"], pixels(processor, seed))


def test_an_image_folder_with_splits(tmp_path, processor):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test", each=1)
    splits = data.load(str(tmp_path))
    assert {name: part.num_rows for name, part in splits.items()} == {"train": 6, "test": 3}
    train, held_back = data.split(splits, None, None, "animals")
    assert (train.num_rows, held_back.num_rows) == (6, 3)


def test_gray_images_become_rgb(processor):
    gray = Dataset.from_dict(
        {"image": [picture(0, "L")], "label": [0]},
        features=Features({"image": Image(), "label": ClassLabel(names=["only"])}),
    )
    assert torch.equal(images(gray, processor)[0]["pixel_values"], pixels(processor, 0, "L"))


@pytest.fixture
def image_parquet(tmp_path):
    """Write images as {bytes, path} structs, as the Hub does, with plain labels."""

    def make(labels, name="images.parquet", column="image"):
        rows = [{"bytes": png(i), "path": None} for i in range(len(labels))]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pa.parquet.write_table(pa.table({column: pa.array(rows, kind), "label": labels}), tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize("column", ["image", "img"])
def test_images_in_parquet_are_decoded(image_parquet, processor, column):
    samples = images(data.load(image_parquet([1, 0, 1], column=column))["train"], processor)
    assert [s["labels"] for s in samples] == [1, 0, 1]
    for i in range(3):
        assert torch.equal(samples[i]["pixel_values"], pixels(processor, i))


def test_integer_labels_keep_their_numbers(image_parquet, processor):
    labels = [11, 2, 10, 0, 1, 3, 4, 5, 6, 7, 8, 9]
    samples = images(data.load(image_parquet(labels))["train"], processor)
    assert [s["labels"] for s in samples] == labels
    assert len(class_names(samples)) == 12


def test_text_labels_are_numbered_by_name(image_parquet, processor):
    samples = images(data.load(image_parquet(["dog", "cat", "dog"]))["train"], processor)
    assert [s["labels"] for s in samples] == [1, 0, 1]
    assert class_names(samples) == ["cat", "dog"]


def test_image_and_label_columns(processor):
    features = Features({"photo": Image(), "kind": ClassLabel(names=["a", "b"]), "size": Value("int64")})
    columns = {"photo": [picture(0)], "kind": [1], "size": [7]}
    found = images(Dataset.from_dict(columns, features=features), processor)[0]
    assert torch.equal(found["pixel_values"], pixels(processor, 0))
    assert found["labels"] == 1

    labels = {"label": ClassLabel(names=["a"]), "also": ClassLabel(names=["b", "c"])}
    two = Features({"left": Image(), "right": Image(), **labels})
    columns = {"left": [picture(0)], "right": [picture(1)], "label": [0], "also": [1]}
    pair = Dataset.from_dict(columns, features=two)
    with pytest.raises(DataError, match=r"no unambiguous image column .*left, right, label, also\).*--image-column"):
        images(pair, processor)
    right = images(pair, processor, "right", "also")[0]
    assert torch.equal(right["pixel_values"], pixels(processor, 1))
    assert right["labels"] == 1
    with pytest.raises(DataError, match="no column 'middle'; it has: left, right, label, also"):
        images(pair, processor, "middle")
    unlabeled = pair.remove_columns(["label", "also"])
    with pytest.raises(DataError, match=r"no unambiguous label column .*--label-column"):
        images(unlabeled, processor, "left")


# ---- splits --------------------------------------------------------------------------------------------------------


def splits_of(**rows):
    return DatasetDict({name: Dataset.from_dict({"n": list(range(count))}) for name, count in rows.items()})


@pytest.mark.parametrize(
    ("rows", "train", "held_back", "expected"),
    [
        ({"train": 5, "validation": 2, "test": 3}, None, None, (5, 2)),
        ({"test": 3, "train": 5}, None, None, (5, 3)),
        ({"train": 5, "dev": 4}, None, None, (5, 4)),
        ({"train": 5, "validation": 2, "test": 3}, "validation", "test", (2, 3)),
        ({"train": 5, "validation": 2, "test": 3}, "validation", None, (2, 3)),
    ],
)
def test_split_by_name(rows, train, held_back, expected):
    parts = data.split(splits_of(**rows), train, held_back, "corpus")
    assert tuple(part.num_rows for part in parts) == expected


def test_the_only_split_stays_whole():
    train, held_back = data.split(splits_of(everything=200), None, None, "corpus")
    assert (train.num_rows, held_back) == (200, None)


@pytest.mark.parametrize("blocks", [1, 2, 25])
def test_the_end_of_a_single_document_is_held_back(make_gpt2, tmp_path, blocks):
    model, tokenizer = make_gpt2()
    text = "".join(chr(97 + i * i % 26) for i in range(8 * blocks))
    (tmp_path / "one.txt").write_text(text)
    arguments = DataArguments(dataset=str(tmp_path / "one.txt"), block_size=8)
    train, held_back = load_splits(Checkpoint(model, tokenizer, None, None), arguments)
    parts = [tokenizer.decode(block) for part in (train, held_back) if part is not None for block in part["input_ids"]]
    assert "".join(parts) == text
    assert held_back is None if blocks == 1 else len(held_back) == max(1, blocks // 10)


@pytest.mark.parametrize("wanted", [("missing", None), (None, "missing")])
def test_split_that_does_not_exist(wanted):
    with pytest.raises(DataError, match="'corpus' has no split 'missing'; it has: train, test"):
        data.split(splits_of(train=2, test=2), *wanted, "corpus")


# ---- what cannot be read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("missing", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("model.bin", b"abc", "must end in one of .txt"),
        ("broken.parquet", b"PAR1 no parquet at all", "cannot be read"),
        ("broken.jsonl", b"{no json", "cannot be read"),
        ("latin1.txt", "Gödel".encode("latin-1"), "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        data.load(str(path))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files", [[], ["notes.md"]])
def test_a_folder_without_data(tmp_path, files):
    for file in files:
        (tmp_path / file).write_text("words")
    with pytest.raises(DataError, match="contains no images and no file"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/no-such-dataset", "no_such_dataset"])
def test_a_hub_dataset_that_cannot_be_reached(name):
    with pytest.raises(DataError, match=f"dataset '{name}' cannot be read") as caught:
        data.load(name)
    assert "\n" not in str(caught.value)
    assert "pydoc_topics, digits" in str(caught.value)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'hf-ortho\[vision\]'"):
        data.load("digits")
