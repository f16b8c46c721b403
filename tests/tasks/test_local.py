"""Local data as people have it: compressed files, folders, patterns, saved datasets, and files with faults."""

import bz2
import gzip
import importlib.util
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from hf_ortho.errors import DataError
from hf_ortho.tasks import data

TEXTS = ["first line\nsecond line", "naïve — \t ✓", 'a,b,"c"']
CONTENT = {
    ".txt": TEXTS[1].encode(),
    ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
    ".json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    ".csv": b'text\n"first line\nsecond line"\nna\xc3\xafve \xe2\x80\x94 \t \xe2\x9c\x93\n"a,b,""c"""\n',
    ".tsv": b'text\tn\n"first line\nsecond line"\t1\n"na\xc3\xafve \xe2\x80\x94 \t \xe2\x9c\x93"\t2\n"a,b,""c"""\t3\n',
}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def texts(name, split="train", **options):
    return [row["text"] for row in data.load(str(name), **options)[split]]


def lines(*values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


def refusal(name, **options):
    with pytest.raises(DataError) as caught:
        texts(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("suffix", "compression"),
    [(".txt", ".gz"), (".jsonl", ".gz"), (".json", ".gz"), (".csv", ".gz"), (".tsv", ""), (".tsv", ".gz"),
     (".ndjson", ""), (".txt", ".bz2"), (".jsonl", ".xz"), (".JSONL", ".GZ")],
)  # fmt: skip
def test_a_compressed_file_has_the_texts_of_the_plain_one(tmp_path, suffix, compression, streaming):
    content = CONTENT[suffix.lower().replace("nd", "").replace(".json", ".jsonl") if "nd" in suffix else suffix.lower()]
    path = tmp_path / f"data{suffix}{compression}"
    path.write_bytes(COMPRESS[compression.lower()](content))
    assert texts(path, streaming=streaming) == (TEXTS[1:2] if suffix == ".txt" else TEXTS)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_keep_their_splits_and_rows(tmp_path, streaming):
    rows = Dataset.from_dict({"text": TEXTS})
    rows.select([2, 0]).with_format("numpy").save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, validation=rows.select([1])).save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "one", streaming=streaming) == [TEXTS[2], TEXTS[0]]
    both = data.load(str(tmp_path / "two"), streaming=streaming)
    assert {name: [row["text"] for row in part] for name, part in both.items()} == {
        "train": TEXTS,
        "validation": TEXTS[1:2],
    }
    (arrow,) = (tmp_path / "two" / "train").glob("*.arrow")
    assert texts(arrow, streaming=streaming) == TEXTS


def test_a_saved_dataset_that_lost_its_rows(tmp_path):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"no arrow")
    assert refusal(tmp_path / "saved").startswith(f"dataset '{tmp_path / 'saved'}' cannot be read: ")


def test_a_pattern_selects_files(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/d.jsonl", "e[1].jsonl"):
        (tmp_path / name).write_text(lines(name))
    monkeypatch.chdir(tmp_path)
    assert texts("*.jsonl") == ["a.jsonl", "b.jsonl", "e[1].jsonl"]
    assert texts(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/d.jsonl", "e[1].jsonl"]
    assert texts("[ab].jsonl", streaming=True) == ["a.jsonl", "b.jsonl"]
    assert texts("e[1].jsonl") == ["e[1].jsonl"]  # a file of this name comes first
    assert data.commit_of("*.jsonl") is None


def test_the_files_of_a_folder_are_split_by_their_names(tmp_path):
    (tmp_path / "test").mkdir()
    for name in ("train-0", "train-1", "valid", "more", "test/0"):
        (tmp_path / f"{name}.jsonl").write_text(lines(name))
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(lines("zipped").encode()))
    (tmp_path / ".hidden.jsonl").write_text(lines("hidden"))
    splits = {name: sorted(part["text"]) for name, part in data.load(str(tmp_path)).items()}
    assert splits == {"train": ["more", "train-0", "train-1", "zipped"], "validation": ["valid"], "test": ["test/0"]}


def test_documents_with_words_of_splits_in_their_names_are_training_data(tmp_path, caplog):
    for name in ("dev notes.txt", "test plan.txt", "a.txt", "test-0.txt", "val/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = {split: sorted(rows["text"]) for split, rows in data.load(str(tmp_path)).items()}
    assert found == {
        "train": ["a.txt", "dev notes.txt", "test plan.txt"],
        "test": ["test-0.txt"],
        "validation": ["val/b.txt"],
    }
    assert caplog.messages == [
        f"note: the 5 files of {tmp_path} are used by their names: 3 for train, 1 for test, 1 for validation"
    ]


def test_splits_may_have_other_columns(tmp_path):
    (tmp_path / "train.csv").write_text("text,label,,,\nhello,1,,,\n")
    (tmp_path / "test.csv").write_text("text\nworld\n")
    assert texts(tmp_path) == ["hello"]
    assert texts(tmp_path, "test") == ["world"]


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path):
    for suffix, content in CONTENT.items():
        path = tmp_path / f"data{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
        found = [text.replace("\r\n", "\n") for text in texts(path)]  # a quoted CSV field keeps its line breaks
        assert found == (TEXTS[1:2] if suffix == ".txt" else TEXTS), suffix
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(path) == ["one\ntwo\n"]


@pytest.mark.parametrize("name", ["flat", "flat/0.tiff", "flat/*.png"])
def test_images_without_classes(tmp_path, name):
    (tmp_path / "flat").mkdir()
    for file in ("0.tiff", "1.png", "2.png"):
        Image.fromarray(np.full((4, 4, 3), 10 * int(file[0]), np.uint8)).save(tmp_path / "flat" / file)
    rows = data.load(str(tmp_path / name))["train"]
    expected = {"flat": [0, 10, 20], "flat/0.tiff": [0], "flat/*.png": [10, 20]}[name]
    assert rows.column_names == ["image"]
    assert [image.getpixel((0, 0))[0] for image in rows["image"]] == expected


# ---- what is refused -----------------------------------------------------------------------------------------------

LATIN = "Gödel\n".encode("latin-1")


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "position", "line"),
    [
        ("a.txt", b"abc\n" * 50 + LATIN, 201, 51),
        ("a.txt", "ö".encode() * (1 << 20) + b"\xff", 1 << 21, 1),  # in the third megabyte
        ("a.txt", b"cut off: \xc3", 9, 1),
        ("a.jsonl", b'{"text": "a"}\n{"text": "G\xf6del"}\n', 25, 2),
        ("a.csv", b"text\n" + LATIN, 6, 2),
    ],
)
def test_bytes_that_are_not_utf8_are_located(tmp_path, name, content, position, line, compression):
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESS[compression](content))
    byte = f"byte {content[position]:#04x} at position {position} (line {line})"
    assert f"cannot be read: not UTF-8: {byte}" in refusal(path)
    assert f"not UTF-8: {byte}" in refusal_of_stream(path)


@pytest.mark.parametrize("encoding", ["UTF-16", "LATIN1"])
def test_the_conversion_that_is_proposed_works(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Gödel".encode(encoding))
    assert f"with iconv -f {encoding} -t UTF-8" in refusal(tmp_path / "a.txt")


def refusal_of_stream(path):
    from hf_ortho.tasks.stream import read

    with pytest.raises(DataError) as caught:
        list(read(data.load(str(path), streaming=True)["train"], str(path)))
    return str(caught.value)


def test_strings_of_parquet_that_are_not_utf8(tmp_path):
    offsets, characters = pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xe4")
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(2, offsets, characters)}), tmp_path / "a.parquet")
    assert "0xe4" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines("a", "b") + '{"text": "c\n' + lines("d"), "line 3 is not JSON: Invalid control character"),
        ("a.jsonl", lines("a") + "\n\nwords\n", "line 4 is not JSON: Expecting value: column 1"),
        ("a.jsonl", '{"text": "a"', "line 1 is not JSON: Expecting ',' delimiter: column 13"),
        ("a.json", '[\n {"text": "a"},\n {"text" "b"}\n]', "line 3 is not JSON: Expecting ':' delimiter: column 10"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "Column(/text) was specified twice in row 0"),
        ("a.csv", "text,n,text\na,1,b\n", "a.csv has 2 columns named 'text'; rename all but one"),
        ("a.tsv", "text\ttext\na\tb\n", "a.tsv has 2 columns named 'text'; rename all but one"),
        ("a.csv", "text,n\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", "text\n", "cannot be read: it has no rows"),
        ("a.parquet", "PAR1 and no more", "Parquet magic bytes not found in footer"),
        ("a.arrow", "no arrow", "cannot be read: "),
        ("a.jsonl.gz", lines("a"), "Not a gzipped file"),
        ("a.csv.gz", "text\na\n", "Not a gzipped file"),
        ("a.parquet.gz", "PAR1", "a data file must end in one of .txt, .raw, .jsonl"),
        ("a.foo", "words", ".arrow, .csv, .tsv (text, JSON and CSV also followed by .gz, .bz2, .xz, .zst), or be an"),
        ("a.gz", "words", "must end in"),
    ],
)
def test_a_file_with_a_fault(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    sentence = refusal(tmp_path / name)
    assert message in sentence
    assert name in sentence


def test_the_fault_of_a_shard_is_located(tmp_path):
    (tmp_path / "0.jsonl").write_text(lines("a"))
    (tmp_path / "1.jsonl").write_text(lines("b") + "words\n")
    assert f"{tmp_path / '1.jsonl'}: line 2 is not JSON" in refusal(tmp_path)
    assert f"{tmp_path / '1.jsonl'}: line 2 is not JSON" in refusal(f"{tmp_path}/*.jsonl")


def test_files_of_several_types(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("a"))
    (tmp_path / "notes.txt").write_text("words")
    for name in (str(tmp_path), f"{tmp_path}/*"):
        sentence = refusal(name)
        assert (
            f"such as {tmp_path / 'a.jsonl'} and {tmp_path / 'notes.txt'}; select one type with a pattern" in sentence
        )
    assert texts(tmp_path / "*.jsonl") == ["a"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("*.jsonl", "matches no file"), ("*", "b.foo: a data file must end in"), ("*.txt", "*.txt is empty")],
)
def test_a_pattern_without_data(tmp_path, pattern, message):
    (tmp_path / "b.foo").write_text("words")
    if pattern == "*.txt":
        (tmp_path / "a.txt").write_bytes(b"")
    assert message in refusal(tmp_path / pattern)


def test_a_compression_that_needs_a_package(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "zstandard" else find_spec(name))
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    assert refusal(tmp_path / "a.jsonl.zst").endswith("the compression .zst needs zstandard: pip install zstandard")
