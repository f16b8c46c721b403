"""How processes wait for each other, with a store and a clock of its own in place of other processes."""

import itertools
import logging
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed
from torch.distributed import HashStore

from hf_ortho import processes
from hf_ortho.errors import ProcessError

RANKS = 64


class Store(HashStore):
    """The numbers of keys that were checked together."""

    def __init__(self):
        super().__init__()
        self.checked = []

    def check(self, keys):
        self.checked.append(len(keys))
        return super().check(keys)


@pytest.fixture
def store(monkeypatch):
    """That of rank 0 of 64 processes, with a timeout of 600 seconds; the others are there, without the last two."""
    store = Store()
    store.set_timeout(timedelta(seconds=600))
    for rank in range(1, RANKS - 2):
        store.set(f"hf_ortho/0/{rank}", "here")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: RANKS)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(processes, "_meeting", 0)
    return store


@pytest.fixture
def clock(monkeypatch):
    """``clock(step, sleep)``: a reading is ``step`` seconds after the last, and ``sleep`` is called between polls."""

    def install(step, sleep=lambda pause: None):
        readings = itertools.count(0, step)
        monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: next(readings), sleep=sleep))

    return install


def arrive(store):
    for rank in (RANKS - 2, RANKS - 1):
        store.set(f"hf_ortho/0/{rank}", "here")


def test_a_poll_is_two_requests_for_any_number_of_processes(store, clock):
    arrive(store)
    clock(1)
    with processes.together(True, "it"):
        assert processes.several_processes()
    assert store.checked == [1, RANKS]  # the decision, and all ranks


def test_processes_that_need_minutes_longer_are_named_and_waited_for(store, clock, caplog):
    polls = itertools.count(1)
    clock(100, lambda pause: arrive(store) if next(polls) == 5 else None)  # in the sixth poll, 600 seconds are over
    with caplog.at_level(logging.WARNING, "hf_ortho"), processes.together(True, "it"):
        assert next(polls) == 6
    assert [record.message.split(":")[0] for record in caplog.records] == ["note"]
    assert "it waits for rank 62, 63 of 64 processes, at most 600 seconds (ddp_timeout)" in caplog.text


def test_who_waits_in_vain_gives_up_after_the_timeout_of_the_group(store, clock, caplog):
    polls = itertools.count(1)
    clock(100, lambda pause: next(polls))
    caplog.set_level(logging.WARNING, "hf_ortho")
    with pytest.raises(ProcessError, match="waits for rank 62, 63 of 64"), processes.together(True, "it"):
        pass
    assert next(polls) == 7  # in the seventh poll, 700 seconds had passed
    assert len(caplog.records) == 1


def test_within_a_block_of_all_processes_no_other_begins(store, clock):
    arrive(store)
    clock(1)
    with processes.together(True, "it"):
        for all_processes in (False, True):
            with processes.together(all_processes, "a part of it"):
                assert processes.several_processes()
    assert len(store.checked) == 2
    with processes.together(False, "it"), processes.together(True, "a part of it"):
        assert not processes.several_processes()
    assert len(store.checked) == 2
