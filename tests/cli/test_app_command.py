"""``hf-ortho app``: what it serves and where, and what it refuses."""

import sys
import types

import pytest

import hf_ortho.app.page
import hf_ortho.cli.app

pytest.importorskip("gradio")


@pytest.fixture
def launched(monkeypatch):
    """What the page was built and launched with; nothing is served, and the command is interrupted at once."""
    found = {}

    class Page:
        share_url = None

        def launch(self, **options):
            found.update(options)
            if options["server_port"] == 1:
                raise OSError("Cannot find empty port. Pass `server_port` to `launch()`.")
            return None, "http://127.0.0.1:7860/", self.share_url

        def close(self, verbose):
            found["closed"] = True

    def build(model, revision, public):
        found.update(model=model, revision=revision, public=public)
        return Page()

    def wait():
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_ortho.app.page, "build", build)
    event = types.SimpleNamespace(wait=wait)
    monkeypatch.setattr(hf_ortho.cli.app, "threading", types.SimpleNamespace(Event=lambda: event))
    found["class"] = Page
    return found


@pytest.mark.parametrize(
    ("flags", "public"),
    [
        ([], False),
        (["--host", "localhost"], False),
        (["--host", "0.0.0.0"], True),
        (["--share"], True),
    ],
)
def test_folders_are_for_this_machine_only(hf_ortho_command, launched, tmp_path, flags, public):
    if flags == ["--share"]:
        launched["class"].share_url = "https://x.gradio.live"
    ran = hf_ortho_command("app", "--port", 7000, "--model", tmp_path, "--revision", "r", *flags)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{launched['class'].share_url or 'http://127.0.0.1:7860/'} (press Ctrl-C to stop)\n"
    assert (launched["model"], launched["revision"], launched["public"]) == (str(tmp_path), "r", public)
    assert (launched["server_port"], launched["allowed_paths"], launched["closed"]) == (7000, [], True)


def test_refuses(hf_ortho_command, launched):
    for flags, message in (
        (["--port", 1], "127.0.0.1:1 cannot be opened: it is in use, or"),
        (["--port", 70000], "--port 70000: must be between 1 and 65535"),
        (["--revision", "main"], "--revision main requires --model"),
        (["--share"], "--share: gradio.live returned no link"),
        (["--size", 3], "unknown flag --size"),
    ):
        error = hf_ortho_command("app", *flags).error
        assert message in error
        assert "launch()" not in error


def test_refuses_a_model(hf_ortho_command, gpt2_folder):
    assert "/no/such/folder does not exist" in hf_ortho_command("app", "--model", "/no/such/folder").error
    assert "has no learnable activations" in hf_ortho_command("app", "--model", gpt2_folder).error


def test_needs_gradio(hf_ortho_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert hf_ortho_command("app").error == "hf-ortho app requires Gradio: pip install 'hf-ortho[app]'"
