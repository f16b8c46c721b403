import pytest

import hf_ortho.plotting


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """What is drawn after a training takes half a second; tests/cli has the real one."""
    monkeypatch.setattr(hf_ortho.plotting, "plot_stored", lambda stored, path, name: path.write_bytes(b"png"))
