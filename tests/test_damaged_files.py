"""Commands on damaged files: success or an HfOrthoError in one line, and nothing else. The damage is seeded."""

import json
import random
import shutil
import signal

import peft
import pytest
import torch
from mutations import damage
from transformers import GPT2Config, GPT2LMHeadModel

import hf_ortho
from hf_ortho.checkpoints import limits
from hf_ortho.checkpoints.activations import load_activations
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.conversion.summary import examine
from hf_ortho.errors import CheckpointError, HfOrthoError
from hf_ortho.hub import DataSource, Results, card_of, write_card
from hf_ortho.hub.contents import contents_of

FILES = {
    "model": ["config.json", "conversion.json", "model.safetensors"],
    "sharded": ["model.safetensors.index.json"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "lora": ["adapter_config.json", "adapter_model.safetensors"],
}
SEEDS = 25  # for each kind of folder
SECONDS = 60  # a bound for what should take milliseconds


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny checkpoints: converted, also in shards, and adapters of learnable activations and of LoRA."""
    place = tmp_path_factory.mktemp("whole")
    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(place / "source")
    report = hf_ortho.convert(model, "hermite_3", calibration=[torch.arange(8)[None], torch.arange(8).flip(0)[None]])
    model.save_pretrained(place / "model")
    model.save_pretrained(place / "sharded", max_shard_size=300)
    data = DataSource("me/text", "default", "validation", "0" * 40, 7)
    values = {"source": {"loss": 5.1, "perplexity": 164.0}, "converted": {"loss": 5.11, "perplexity": 166.05}}
    results = Results(values, data, "hf-ortho convert x", "here", 3, "a part")
    write_card(place / "model", report=report, results=[results], data=[data], command="hf-ortho convert x")
    (place / "model" / "README.md").unlink()
    low_rank = {"r": 2, "target_modules": ["c_attn"], "rank_pattern": {"h.0.attn.c_attn": 1}, "fan_in_fan_out": True}
    configs = {
        "adapter": hf_ortho.peft.OrthoConfig(activation="hermite_3", task_type="CAUSAL_LM"),
        "lora": peft.LoraConfig(**low_rank, task_type="CAUSAL_LM", init_lora_weights=False),
    }
    for name, config in configs.items():
        peft.get_peft_model(GPT2LMHeadModel.from_pretrained(place / "source"), config).save_pretrained(place / name)
        (place / name / "README.md").unlink()
    return place


@pytest.fixture
def limited():
    """An alarm for a command that does not end."""

    def stop(signum, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def inspected(folder):
    layers, _ = examine(load_activations(str(folder)))
    return [(layer.to_dict(), layer.cells()) for layer in layers]


COMMANDS = {
    "load": lambda folder: load_checkpoint(str(folder)),
    "inspect": inspected,
    "card": lambda folder: card_of(folder, repo_id="me/x", remote_code=False),
    "push": contents_of,
}


def outcome(command, folder):
    """``"done"`` or ``"refused"``; fails for any other error, or a message of several lines."""
    try:
        command(folder)
    except HfOrthoError as error:
        message = str(error)
    else:
        return "done"
    assert message
    assert "\n" not in message
    return "refused"


@pytest.mark.filterwarnings("ignore")  # peft's and torch's, for odd values
@pytest.mark.parametrize("kind", FILES)
def test_damage_is_refused_in_one_line(folders, tmp_path, limited, kind):
    found = dict.fromkeys(["done", "refused"], 0)
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        shutil.copytree(folders / kind, folder)
        name = damage(random.Random(f"{kind} {seed}"), folder, FILES[kind])
        for command in COMMANDS.values() if name != "conversion.json" else [COMMANDS["card"]]:
            found[outcome(command, folder)] += 1
    assert min(found.values()) > SEEDS // 5  # the damage matters, and does not hide everything


@pytest.mark.parametrize(
    ("kind", "file", "change"),
    [
        ("model", "config.json", {"n_layer": 10**9}),
        ("model", "config.json", {"vocab_size": 10**9}),
        ("lora", "adapter_config.json", {"r": 10**9, "rank_pattern": {}}),
        ("lora", "adapter_config.json", {"rank_pattern": {"h.0.attn.c_attn": 10**9}}),
    ],
    ids=["layers", "tokens", "rank", "pattern"],
)
def test_a_config_for_a_giant_is_refused_before_it_is_built(
    folders, tmp_path, limited, monkeypatch, kind, file, change
):
    monkeypatch.setattr(limits, "MORE_TENSORS", 100)  # to save time
    folder = tmp_path / kind
    shutil.copytree(folders / kind, folder)
    plain = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(plain | change))
    with pytest.raises(CheckpointError, match=r"config.* of .* describes far more parameters than its weights have"):
        load_checkpoint(str(folder))
