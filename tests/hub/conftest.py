import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture
def tiny_gpt2_model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=257, n_positions=32, bos_token_id=256, eos_token_id=256)
    )


@pytest.fixture
def connect(monkeypatch, tmp_path):
    """``connect(endpoint)`` points this process's client there, with a token, an empty cache and no waiting."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    def connect(endpoint, token="hf_me", cache="cache"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)  # of its functions, which peft calls
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", token or "")

    yield connect
    close_session()
