import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture
def tiny_gpt2_model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=257, n_positions=32, bos_token_id=256, eos_token_id=256)
    )
