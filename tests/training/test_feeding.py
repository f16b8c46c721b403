"""Training from a token cache, and from a stream that each process reads a part of."""

import json
import math
import shutil
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.errors import DataError
from hf_ortho.tasks import tokens
from hf_ortho.tasks.samples import load_splits
from hf_ortho.training import DataArguments

# Machines with one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

# 48 documents of 4 tokens each, all different; two are a block.
DOCUMENTS = [f"{i:03}" for i in range(48)]
BLOCK = 8


def shards(folder, count=4, documents=DOCUMENTS):
    folder.mkdir()
    for i in range(count):
        part = documents[i * len(documents) // count : (i + 1) * len(documents) // count]
        pa.parquet.write_table(pa.table({"text": pa.array(part, pa.string())}), folder / f"{i}.parquet")
    return folder


def flags(place, model, dataset, **options):
    common = {"output_dir": place, "model": model, "dataset": dataset, "activation": "hermite_3", "block_size": BLOCK}
    common |= {"learning_rate": 0.01, "logging_steps": 1, "calibration_samples": 2, "use_cpu": "true"}
    return [str(word) for key, value in (common | options).items() for word in (f"--{key}", value)]


def losses(place):
    states = sorted(place.glob("checkpoint-*/trainer_state.json"))
    return [entry["loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]


# ---- a token cache -------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The numbers of the blocks that are read, a list for each read."""
    found, cut = [], tokens.Cut.__call__

    def record(self, rows):
        found.append(list(rows[tokens.BLOCK]))
        return cut(self, rows)

    monkeypatch.setattr(tokens.Cut, "__call__", record)
    return found


def test_a_resumed_training_reads_what_is_left_alone(hf_ortho_command, tmp_path, gpt2_folder, reads):
    """Two epochs of 22 blocks are 8 steps; the last 2 steps follow in the order of the second epoch."""
    corpus = shards(tmp_path / "corpus")
    options = {"tokenize": "once", "max_eval_samples": 2, "max_steps": 8, "save_steps": 6}
    options |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}

    def finetune(place, *more):
        reads.clear()
        ran = hf_ortho_command("finetune", *flags(tmp_path / place, gpt2_folder, corpus, **options), *more)
        assert ran.code == 0, ran.err
        training = [numbers for numbers in reads if len(numbers) == 3]  # not those of the calibration and evaluation
        return load_file(tmp_path / place / "model.safetensors"), training

    straight, whole = finetune("straight")
    shutil.copytree(tmp_path / "straight" / "checkpoint-6", tmp_path / "stopped" / "checkpoint-6")
    resumed, rest = finetune("stopped", "--resume_from_checkpoint", "true")
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    assert len(whole) == 2 * 7  # and a batch of one block each
    for epoch in (whole[:7], whole[7:]):
        numbers = [*chain(*epoch)]
        assert len(set(numbers)) == 21
        assert numbers != sorted(numbers)
    assert whole[:7] != whole[7:]
    assert rest == whole[-3:]


# ---- a stream in parts ---------------------------------------------------------------------------------------------


@pytest.fixture
def stream(make_gpt2, tmp_path):
    def load(count, documents=DOCUMENTS):
        (tmp_path / "other.txt").write_text("something else to evaluate on")
        corpus = shards(tmp_path / f"corpus{count}", count, documents)
        options = {"block_size": BLOCK, "streaming": True, "shuffle_buffer": 5, "shuffle_blocks": 1}
        options |= {"eval_dataset": str(tmp_path / "other.txt")}
        return load_splits(Checkpoint(*make_gpt2(), None, None), DataArguments(str(corpus), **options), 0)[0]

    return load


def documents_in(blocks):
    """The documents of blocks of bytes with ends: three digits each."""
    digits = [chr(token + 33) for block in blocks for token in block if token < 256]
    return ["".join(digits[i : i + 3]) for i in range(0, len(digits), 3)]


@pytest.mark.parametrize(("count", "processes"), [(4, 2), (3, 2), (1, 2), (4, 3), (2, 3)])
def test_parts_of_each_pass_are_disjoint_and_complete(stream, count, processes):
    """Of whole shards, if they can be shared out evenly, else of single documents."""
    whole, share = stream(count), len(DOCUMENTS) // processes
    parts = [
        documents_in(s["input_ids"] for s in islice(whole.part(i, processes), 3 * share // 2)) for i in range(processes)
    ]
    for start in (0, share, 2 * share):
        assert sorted(chain(*(part[start : start + share] for part in parts))) == DOCUMENTS
    assert parts[0][:share] != parts[0][share : 2 * share]


def test_workers_share_the_part_of_a_process(stream):
    """Two workers in each of two processes for four shards: one shard per pass each."""
    whole, found = stream(4), []
    for process in range(2):
        loader = DataLoader(whole.part(process, 2), num_workers=2)
        blocks = [batch["input_ids"][0] for batch in islice(loader, 12)]
        found += [documents_in(blocks[worker::2]) for worker in range(2)]
    assert sorted(map(sorted, found)) == [DOCUMENTS[i : i + 12] for i in (0, 12, 24, 36)]


def test_a_process_without_rows_says_so(stream):
    """It must not end quietly, as the others would wait for it."""
    few = stream(1, ["01234567890"] * 2)
    assert len(list(islice(few.part(1, 2), 5))) == 5
    with pytest.raises(
        DataError, match="has no rows for process 2 of 3; use fewer processes or dataloader workers, or"
    ):
        next(iter(few.part(2, 3)))


def test_a_stream_in_another_order_is_noted(hf_ortho_command, tmp_path, gpt2_folder, caplog):
    """Its order depends on the workers, and on whether processes read apart."""
    (tmp_path / "other.txt").write_text("something else to evaluate on")
    options = APART | {"eval_dataset": tmp_path / "other.txt", "max_steps": 2, "save_steps": 1}
    corpus = shards(tmp_path / "corpus")
    for more, notes in (
        ({}, []),
        ({"dataloader_num_workers": 1}, ["dataloader_num_workers 0, now 1"]),
        ({"accelerator_config": "{}"}, ["dispatch_batches False, now True"]),
    ):
        resume = {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-1"} if notes else {}
        caplog.clear()
        ran = hf_ortho_command("finetune", *flags(tmp_path / "out", gpt2_folder, corpus, **(options | more | resume)))
        assert ran.code == 0, ran.err
        assert [
            note for note in notes if f"checkpoint-1 was saved with {note}: the result differs" not in caplog.text
        ] == []
        assert ("the result differs" in caplog.text) == bool(notes)


WORKER = """
import json, os, sys
import torch
import hf_ortho.plotting
from hf_ortho.cli import main
from hf_ortho.tasks.packing import Packer
from hf_ortho.tasks.stream import Stream
from hf_ortho.training.trainer import ActivationTrainer

torch.set_num_threads(1)
hf_ortho.plotting.plot_stored = lambda stored, path, name: path.write_bytes(b"png")
step, call, part = ActivationTrainer.training_step, Packer.__call__, Stream.part
trained, tokenized = [], []

def training_step(self, model, inputs, *args):
    trained.append(inputs["input_ids"].tolist())
    return step(self, model, inputs, *args)

def tokenize(self, texts):
    texts = list(texts)
    tokenized.extend(texts)
    return call(self, texts)

def begin(self, *args):
    tokenized.clear()
    return part(self, *args)

ActivationTrainer.training_step, Packer.__call__, Stream.part = training_step, tokenize, begin
for place, flags in json.load(open(sys.argv[1])):
    trained.clear(), tokenized.clear()
    code = main(["finetune", *flags])
    if code:
        sys.exit(code)
    with open(f"{place}.{os.environ['RANK']}", "w") as file:
        json.dump({"trained": trained, "tokenized": tokenized}, file)
torch.distributed.destroy_process_group()
"""
APART = {"streaming": "true", "shuffle_buffer": 5, "shuffle_blocks": 1, "per_device_train_batch_size": 2}
APART |= {"accelerator_config": '{"dispatch_batches": false}', "max_steps": 8, "save_steps": 4}


@pytest.mark.slow
def test_two_processes(forked, hf_ortho_command, tmp_path, make_gpt2, save_parts):
    """Of a stream, each trains on what it reads itself; of a token cache, one writes and both train as one does."""
    gpt2_folder = save_parts(tmp_path / "gpt2", *make_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    (tmp_path / "other.txt").write_text("something else to evaluate on")
    corpus, other = shards(tmp_path / "corpus"), {"eval_dataset": tmp_path / "other.txt"}
    once = {"tokenize": "once", "max_steps": 3, "save_steps": 3}
    # Children of a forkserver have workers of a forkserver by default, which would import the worker script.
    workers = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}

    def run(name, **options):
        return str(tmp_path / name), flags(tmp_path / name, gpt2_folder, corpus, **other, **options)

    queue = [
        run("apart", **APART),
        run("resumed", **APART, resume_from_checkpoint=tmp_path / "apart" / "checkpoint-4"),
        run("workers", **APART, **workers),
        run("once", **once, per_device_train_batch_size=2),
    ]
    (tmp_path / "runs.json").write_text(json.dumps(queue))
    (tmp_path / "worker.py").write_text(WORKER)
    printed = forked(2, tmp_path / "worker.py", tmp_path / "runs.json", CUDA_VISIBLE_DEVICES="")
    assert printed.count("Wrote") == 4
    assert printed.count("was tokenized") == 2  # for training and for evaluation, by whichever process came first

    found = {
        name: [json.loads((tmp_path / f"{name}.{i}").read_text()) for i in (0, 1)]
        for name in (Path(place).name for place, _ in queue)
    }
    for name in ("apart", "workers"):
        trained = [documents_in(block for batch in run["trained"] for block in batch) for run in found[name]]
        assert list(map(len, trained)) == [32, 32]  # 8 batches of 2 blocks of 2 documents
        assert not {*trained[0][:24]} & {*trained[1][:24]}
        assert {*trained[0][:24], *trained[1][:24]} == {*DOCUMENTS}
    assert sorted(chain(*(run["tokenized"][:24] for run in found["apart"]))) == DOCUMENTS  # by one process each
    assert [run["trained"] for run in found["resumed"]] == [run["trained"][4:] for run in found["apart"]]
    for name in ("apart", "resumed", "workers", "once"):
        assert all(map(math.isfinite, losses(tmp_path / name)))
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("apart", "resumed"))
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    ran = hf_ortho_command("finetune", *run("single", **once, per_device_train_batch_size=4)[1])
    assert ran.code == 0, ran.err
    assert losses(tmp_path / "once") == pytest.approx(losses(tmp_path / "single"), rel=1e-5)
