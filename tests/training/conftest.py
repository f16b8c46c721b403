import importlib

import pytest


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """What is drawn after a training takes half a second; tests/cli has the real one."""
    module = importlib.import_module("hf_ortho.cli.finetune")
    monkeypatch.setattr(module, "plot_stored", lambda stored, path, name: path.write_bytes(b"png"))
