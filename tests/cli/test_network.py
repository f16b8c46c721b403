"""Without a network a command ends at once, with one sentence."""

import socket

import pytest
from huggingface_hub import constants

from hf_ortho.cli import network
from hf_ortho.errors import CheckpointError, DataError, HubError


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Not told to stay offline, with an empty cache; ``online(url)`` names the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return lambda endpoint: monkeypatch.setattr(constants, "ENDPOINT", endpoint)


@pytest.fixture
def silent(monkeypatch):
    """The address of a server that takes connections and never says a word."""
    monkeypatch.setattr(network, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_does_not_speak_does_not_answer(silent):
    assert not network.answers(silent)
    assert not network.answers("http://127.0.0.1:9")
    assert not network.answers("no address at all")


def test_what_is_not_cached_is_named(online, silent):
    online(silent)
    with pytest.raises(CheckpointError, match=f"^me/model is not a folder.* no answer from {silent}.*not cached$"):
        network.check_hub([("me/model", None)], ["me/data"])
    with pytest.raises(DataError, match=f"'me/data' is not a file or folder.* no answer from {silent}"):
        network.check_hub(datasets=["me/data"])
    with pytest.raises(HubError, match=f"^no answer from {silent}: nothing was pushed"):
        network.check_hub(push=True)
    assert not constants.HF_HUB_OFFLINE


def test_what_is_cached_is_used_offline(online, silent, tmp_path):
    online(silent)
    snapshot = tmp_path / "models--me--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    with pytest.raises(CheckpointError, match="me/model"):
        network.check_hub([("me/model", "another-branch")])
    (tmp_path / "me___data").mkdir()
    network.check_hub([("me/model", None), (None, None)], ["me/data", None])
    assert constants.HF_HUB_OFFLINE


def test_nothing_of_the_hub_asks_nobody(online, tmp_path):
    online("no address at all")
    network.check_hub(
        [(str(tmp_path), None), ("/no/such/folder", None)], ["pydoc_topics", "missing.txt", "*.txt", "da[t]a/*"]
    )
    assert not constants.HF_HUB_OFFLINE
