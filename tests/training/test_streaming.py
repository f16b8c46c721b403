import json
import multiprocessing
import os
import shutil
import socket
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.errors import ConfigError, DataError
from hf_ortho.tasks.samples import batches, load_splits
from hf_ortho.tasks.stream import Stream, mixed
from hf_ortho.training import DataArguments

# Machines with one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

# 40 documents of 1 to 12 bytes, all different, in 4 shards; followed by an end each.
DOCUMENTS = [f"{i}" + "abcdefghij"[: i * 7 % 11] for i in range(40)]
BLOCK = 8


def shards(folder, documents=DOCUMENTS, count=4):
    folder.mkdir()
    for i in range(count):
        part = documents[i * len(documents) // count : (i + 1) * len(documents) // count]
        pa.parquet.write_table(pa.table({"text": part, "id": list(range(len(part)))}), folder / f"{i}.parquet")
    return folder


@pytest.fixture
def corpus(tmp_path):
    return shards(tmp_path / "corpus")


@pytest.fixture
def other(tmp_path):
    (tmp_path / "other.txt").write_text("something else to evaluate on")
    return tmp_path / "other.txt"


@pytest.fixture(scope="module")
def checkpoint(make_gpt2):
    return Checkpoint(*make_gpt2(), None, None)


@pytest.fixture
def splits(checkpoint):
    def load(dataset, *, seed=0, shuffle_buffer=16, shuffle_blocks=1, streaming=True, **options):
        options |= {"shuffle_buffer": shuffle_buffer, "shuffle_blocks": shuffle_blocks}
        options = {"block_size": BLOCK, "streaming": streaming} | options
        return load_splits(checkpoint, DataArguments(dataset=str(dataset), **options), seed)

    return load


def tokens(stream, count):
    blocks = [sample["input_ids"] for sample in islice(stream, count)]
    assert all(block.shape == (BLOCK,) and block.dtype == torch.int64 for block in blocks)
    return torch.cat(blocks)


@pytest.fixture(scope="module")
def text_of(make_gpt2):
    """The bytes behind tokens, with a dot for each end."""
    tokenizer = make_gpt2()[1]
    return lambda ids: tokenizer.decode(ids).replace(tokenizer.eos_token, ".")


@pytest.fixture(scope="module")
def documents_in(text_of):
    """The whole documents in a stretch of tokens."""
    return lambda ids: text_of(ids).split(".")[:-1]


CORPUS = "".join(f"{document}." for document in DOCUMENTS)


# ---- blocks and their order ----------------------------------------------------------------------------------------


def test_the_head_is_the_corpus_in_its_own_order(splits, text_of, corpus, other):
    stream, _ = splits(corpus, eval_dataset=str(other))
    head = stream.head(1000)
    assert text_of(torch.cat([s["input_ids"] for s in head])) == CORPUS[: len(CORPUS) // BLOCK * BLOCK]
    assert all(torch.equal(s["labels"], s["input_ids"]) for s in head)


@pytest.mark.parametrize("shuffle_buffer", [1, 16, 1000])
def test_every_pass_has_every_document_once_in_another_order(splits, documents_in, corpus, other, shuffle_buffer):
    """What remains of a pass begins the next one, so that no document is torn."""
    stream, _ = splits(corpus, eval_dataset=str(other), shuffle_buffer=shuffle_buffer)
    found = documents_in(tokens(stream, 3 * len(CORPUS) // BLOCK + 2))
    passes = [found[i : i + 40] for i in (0, 40, 80)]
    assert [sorted(p) == sorted(DOCUMENTS) for p in passes] == [True, True, True]
    assert len(set(map(tuple, [*passes, DOCUMENTS]))) == 4


def test_blocks_are_mixed_and_none_is_lost(splits, corpus, other):
    """Of 200 blocks that came, all but the 10 in the buffer have gone out, in another order."""
    plain, mixed = (
        [tuple(s["input_ids"].tolist()) for s in islice(stream, count)]
        for count, (stream, _) in (
            (n, splits(corpus, eval_dataset=str(other), shuffle_blocks=size)) for n, size in ((200, 1), (190, 10))
        )
    )
    assert len(set(plain)) > 100
    left = list(plain)
    for block in mixed:
        left.remove(block)
    assert len(left) == 10
    assert mixed != plain[:190]
    distances = [abs(plain.index(block) - place) for place, block in enumerate(mixed[:50])]
    assert 1 < np.mean(distances) < 40


def test_a_block_in_the_buffer_keeps_no_other_in_memory(splits, corpus, other):
    stream, _ = splits(corpus, eval_dataset=str(other))
    for sample in islice(stream, 3):
        assert sample["input_ids"].untyped_storage().nbytes() == sample["input_ids"].nbytes


def test_a_finite_stream_ends_with_its_buffer():
    rows = [{"n": i} for i in range(25)]
    for size in (1, 10, 100):
        found = list(mixed(rows, size, np.random.default_rng(0)))
        assert sorted(row["n"] for row in found) == list(range(25))
        assert (found == rows) == (size == 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle_blocks", [1, 8])
def test_the_order_is_that_of_the_seed(splits, corpus, other, workers, shuffle_blocks):
    def first(seed):
        stream, _ = splits(corpus, eval_dataset=str(other), seed=seed, shuffle_blocks=shuffle_blocks)
        loader = DataLoader(stream, batch_size=4, num_workers=workers)
        return torch.cat([batch["input_ids"] for batch in islice(loader, 25)])

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_workers_share_the_shards(splits, documents_in, tmp_path, other):
    """Of three workers for two shards two read, each one shard per pass; together they have the corpus."""
    stream, _ = splits(shards(tmp_path / "two", count=2), eval_dataset=str(other))
    blocks = [batch["input_ids"][0] for batch in islice(DataLoader(stream, num_workers=3), len(CORPUS) // BLOCK + 20)]
    first_pass = [set(documents_in(torch.cat(blocks[worker::2]))[:20]) for worker in (0, 1)]
    assert sorted(map(sorted, first_pass)) == sorted(map(sorted, (DOCUMENTS[:20], DOCUMENTS[20:])))


# ---- evaluation, and parts of a corpus -----------------------------------------------------------------------------


def test_held_back_documents_never_train(splits, text_of, documents_in, tmp_path):
    repeated = [*DOCUMENTS, DOCUMENTS[1], DOCUMENTS[0]]
    stream, held_back = splits(shards(tmp_path / "corpus", repeated), max_eval_samples=3)
    assert text_of(tokens(held_back, 1000)) == CORPUS[: 3 * BLOCK]
    touched = CORPUS[: 3 * BLOCK - 1].count(".") + 1
    for ids in (tokens(stream, 100), torch.cat([s["input_ids"] for s in stream.head(1000)])):
        assert set(documents_in(ids)) - set(DOCUMENTS[touched:]) == set()
        assert len(set(documents_in(ids))) >= 40 - touched - 1


def test_the_evaluation_is_that_of_whole_datasets(splits, corpus, other):
    _, streamed = splits(corpus, eval_dataset=str(other))
    _, whole = splits(corpus, eval_dataset=str(other), streaming=False)
    ids = [torch.cat([sample["input_ids"] for sample in samples]) for samples in (streamed, whole)]
    assert torch.equal(*ids)
    assert len(ids[0]) % BLOCK  # the last one is shorter
    assert streamed.with_format(None)[:] == whole.with_format(None)[:]


def test_max_train_samples_is_that_of_whole_datasets(splits, corpus, other):
    streamed, _ = splits(corpus, eval_dataset=str(other), max_train_samples=5)
    whole, _ = splits(corpus, eval_dataset=str(other), max_train_samples=5, streaming=False)
    assert len(streamed) == 5
    assert torch.equal(streamed["input_ids"][:], whole["input_ids"][:])


def test_calibration_is_that_of_whole_datasets(splits, corpus, other):
    streamed, whole = (splits(corpus, eval_dataset=str(other), streaming=s)[0] for s in (True, False))
    assert isinstance(streamed, Stream)
    for ours, theirs in zip(batches(streamed, 5, 2), batches(whole, 5, 2), strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["labels"], theirs["labels"])


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_shards_of_each_kind(splits, documents_in, tmp_path, other, kind):
    (tmp_path / "shards").mkdir()
    for name, texts in (("a", ["one\ntwo"]), ("b", []), ("c", ["three"])):
        file = tmp_path / "shards" / f"{name}.{kind}"
        if kind == "parquet":
            pa.parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), file)
        else:
            file.write_text("".join(json.dumps({"text": t}) if kind == "jsonl" else t for t in texts))
    stream, _ = splits(tmp_path / "shards", eval_dataset=str(other))
    assert set(documents_in(tokens(stream, 7))) == {"one\ntwo", "three"}


def test_what_the_dependencies_carry_as_a_stream(splits):
    stream, held_back = splits("pydoc_topics", max_eval_samples=2)
    whole, whole_held_back = splits("pydoc_topics", max_eval_samples=2, streaming=False)
    assert torch.equal(tokens(stream.head(9), 9), whole["input_ids"][:9].ravel())
    assert torch.equal(tokens(held_back, 10**6), tokens(whole_held_back, 10**6))


# ---- images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def image_folder(tmp_path):
    """Splits of 6 and 3 images of the classes bird, cat and dog."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split, each in (("train", 2), ("test", 1)):
        for name in ("bird", "cat", "dog"):
            (tmp_path / "animals" / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                image.fromarray(pixels).save(tmp_path / "animals" / split / name / f"{i}.png")
    return tmp_path / "animals"


def test_streamed_images_are_those_of_a_whole_dataset(make_convnext, image_folder):
    def load(**options):
        model, processor = make_convnext()
        checkpoint = Checkpoint(model, None, processor, None)
        parts = load_splits(checkpoint, DataArguments(dataset=str(image_folder), **options))
        assert list(model.config.id2label.values()) == ["bird", "cat", "dog"]
        return parts

    def images(samples):
        return [(s["labels"], s["pixel_values"].numpy().tobytes()) for s in samples]

    streamed, held_back = load(streaming=True, shuffle_buffer=4)
    whole, whole_held_back = load()
    assert images(streamed.head(6)) == images(whole)
    assert images(held_back) == images(whole_held_back)
    found = images(islice(streamed, 12))
    assert sorted(found[:6]) == sorted(found[6:]) == sorted(images(whole))
    assert found[:6] != found[6:]
    assert images(load(streaming=True, max_train_samples=3)[0]) == images(whole)[:3]


def test_streamed_images_without_classes(make_convnext, image_folder):
    rows = [{"bytes": file.read_bytes(), "path": None} for file in sorted((image_folder / "test").rglob("*.png"))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": [0, 1, 2]})
    pa.parquet.write_table(table, image_folder / "rows.parquet")
    place = str(image_folder / "rows.parquet")
    model, processor = make_convnext()
    checkpoint = Checkpoint(model, None, processor, None)
    with pytest.raises(DataError, match=r"column 'label' of .*rows.parquet is not a ClassLabel"):
        load_splits(checkpoint, DataArguments(dataset=place, eval_dataset=place, streaming=True))
    with pytest.raises(ConfigError, match="no evaluation split"):
        load_splits(checkpoint, DataArguments(dataset=str(image_folder / "train"), streaming=True))


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_three_steps_and_three_more_are_six(hf_ortho_command, tmp_path, gpt2_folder, workers):
    """Dropout, the place in the corpus, in its second pass by then, and what remains of its documents all continue."""
    documents = DOCUMENTS[:12]
    entries = {
        "model": str(gpt2_folder),
        "dataset": str(shards(tmp_path / "corpus", documents, 2)),
        "streaming": True,
        "shuffle_buffer": 4,
        "shuffle_blocks": 3,
        "max_eval_samples": 1,
        "activation": "hermite_3",
        "block_size": BLOCK,
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": workers,
        "use_cpu": True,
    }
    assert sum(len(d) + 1 for d in documents) < 3 * 2 * 2 * BLOCK
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(entries))

    def finetune(place, *flags):
        ran = hf_ortho_command(
            "finetune", "--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / place, *flags
        )
        assert ran.code == 0, ran.err
        return load_file(tmp_path / place / "model.safetensors")

    straight = finetune("straight")
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    middle = load_file(tmp_path / "stopped" / "checkpoint-3" / "model.safetensors")
    resumed = finetune("stopped", "--resume_from_checkpoint", "true")
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    assert not torch.equal(straight["transformer.wte.weight"], middle["transformer.wte.weight"])


def process(rank, port, stream, folder):
    """One of two processes: 10 of its batches of 2 blocks, as accelerate (and so Trainer) hands them out."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(stream, batch_size=2))
    ids = torch.stack([batch["input_ids"] for batch in islice(loader, 10)])
    save_file({"ids": ids}, folder / f"{accelerator.process_index}.safetensors")
    accelerator.end_training()


def test_two_processes_share_the_batches_of_one(splits, tmp_path, corpus, other):
    stream, _ = splits(corpus, eval_dataset=str(other))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=process, args=(rank, port, stream, tmp_path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    single = torch.stack([sample["input_ids"] for sample in islice(stream, 40)]).reshape(10, 2, 2, BLOCK)
    for rank in (0, 1):
        assert torch.equal(load_file(tmp_path / f"{rank}.safetensors")["ids"], single[:, rank])


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "streaming: a stream is infinite, so training needs a number of steps; give --max_steps"),
        (["--max_steps", "1", "--shuffle_buffer", "0"], "shuffle_buffer 0: must be at least 1"),
        (["--max_steps", "1", "--shuffle_blocks", "0"], "shuffle_blocks 0: must be at least 1"),
        (["--max_steps", "1"], "no evaluation split; give --eval_dataset, or --max_eval_samples N"),
        (["--max_steps", "1", "--max_eval_samples", "100"], "after holding out 40 documents; give --eval_dataset"),
        (
            ["--max_steps", "1", "--max_eval_samples", "1", "--text_column", "body"],
            "no column 'body'; it has: text, id",
        ),
    ],
)
def test_mistakes(hf_ortho_command, tmp_path, corpus, gpt2_folder, flags, message):
    flags = ["--streaming", "true", "--block_size", BLOCK, "--output_dir", tmp_path / "out", *flags]
    ran = hf_ortho_command("finetune", "--model", gpt2_folder, "--dataset", corpus, *flags)
    assert message in ran.error
    assert not (tmp_path / "out").exists()


def write(file, rows):
    if isinstance(rows, bytes):
        file.write_bytes(rows)
    elif file.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("parquet", b"PAR1 no parquet at all", "Parquet"),
        ("parquet", [{"body": "two"}], "lacks column text of the files before it"),
        ("jsonl", b"{no json", "line 1 is not JSON"),
        ("jsonl", [{"body": "two"}], "lacks column text of the files before it"),
    ],
)
@pytest.mark.parametrize("bad", ["1", "9"])
def test_the_shard_at_fault_is_named(splits, tmp_path, other, kind, rows, message, bad):
    (tmp_path / "shards").mkdir()
    for name in ("0", "5"):
        write(tmp_path / "shards" / f"{name}.{kind}", [{"text": "some more words"}])
    write(tmp_path / "shards" / f"{bad}.{kind}", rows)
    with pytest.raises(DataError) as caught:
        tokens(splits(tmp_path / "shards", eval_dataset=str(other))[0], 20)
    assert f"shards/{bad}.{kind}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_a_worker_cannot_read(hf_ortho_command, tmp_path, other, gpt2_folder):
    corpus = shards(tmp_path / "corpus")
    (corpus / "9.parquet").write_bytes(b"PAR1 no parquet at all")
    flags = ["--streaming", "true", "--block_size", BLOCK, "--eval_dataset", other, "--dataloader_num_workers", 1]
    flags += ["--max_steps", 9, "--output_dir", tmp_path / "out", "--use_cpu", "true", "--report_to", "none"]
    ran = hf_ortho_command("finetune", "--model", gpt2_folder, "--dataset", corpus, *flags)
    assert ran.error.startswith(f"dataset '{corpus}' cannot be read: {corpus}/9.parquet: ")
