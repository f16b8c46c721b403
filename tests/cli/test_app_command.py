"""``hf-ortho app``: what it serves and where, and what it refuses."""

import json
import socket
import sys
import types
import urllib.error
import urllib.request

import pytest

import hf_ortho.cli.app


@pytest.fixture
def visited(monkeypatch):
    """Once the page is served, its title is read and the command interrupted; what was read."""
    found = {}

    def wait():
        with urllib.request.urlopen(f"http://127.0.0.1:{found['port']}/config") as reply:
            found["config"] = json.load(reply)
        raise KeyboardInterrupt

    event = types.SimpleNamespace(wait=wait)
    monkeypatch.setattr(hf_ortho.cli.app, "threading", types.SimpleNamespace(Event=lambda: event))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found["port"] = free.getsockname()[1]
    return found


@pytest.mark.parametrize(
    ("flags", "place"), [([], "OWNER/NAME on the Hub, or a folder"), (["--host", "0.0.0.0"], "OWNER/NAME on the Hub")]
)
def test_serves_until_interrupted(hf_ortho_command, visited, flags, place):
    ran = hf_ortho_command("app", "--port", visited["port"], *flags)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith(f":{visited['port']}/ (Ctrl-C ends it)\n")
    properties = [component["props"] for component in visited["config"]["components"]]
    assert place in [found.get("placeholder") for found in properties]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{visited['port']}/config")


def test_refuses(hf_ortho_command, gpt2_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, message in (
            (["--port", port], f"127.0.0.1:{port} cannot be opened"),
            (["--port", 70000], "--port 70000: must be from 1 to 65535"),
            (["--revision", "main"], "--revision main needs --model"),
            (["--model", "/no/such/folder"], "/no/such/folder does not exist"),
            (["--model", gpt2_folder], "has no learnable activations"),
            (["--size", 3], "unrecognized arguments: --size 3"),
        ):
            assert message in hf_ortho_command("app", *flags).error


def test_needs_gradio(hf_ortho_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert hf_ortho_command("app").error == "hf-ortho app needs Gradio: pip install 'hf-ortho[app]'"
