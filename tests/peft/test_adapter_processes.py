"""Two processes under DDP calibrate, train and save an adapter as one process does with the whole batch."""

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,  # ranks are forked
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # read by peft
]

WORKER = """
import json
import sys
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from hf_ortho.peft import OrthoConfig, calibrate

def train(folder, batch, find_unused):
    arguments = TrainingArguments(
        folder, use_cpu=True, max_steps=3, per_device_train_batch_size=batch, learning_rate=0.01, report_to=[],
        logging_steps=1, disable_tqdm=True, save_strategy="no", ddp_find_unused_parameters=find_unused,
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    base = GPT2LMHeadModel(GPT2Config(**sizes, **drop))
    model = get_peft_model(base, OrthoConfig(activation="hermite_3", task_type="CAUSAL_LM"))
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    share = 8 // arguments.world_size
    calibrate(model, [ids[arguments.process_index * share :][:share]], weights="density")  # no random labels
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(folder)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

if __name__ == "__main__":
    torch.set_num_threads(1)
    losses = train(sys.argv[1], 2, False)
    if torch.distributed.get_rank() == 0:
        print("LOSSES", json.dumps(losses))
    torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path, forked):
    import json

    (tmp_path / "worker.py").write_text(WORKER)
    printed = forked(2, tmp_path / "worker.py", tmp_path / "two", TRANSFORMERS_VERBOSITY="error")
    names: dict = {"__name__": "worker"}
    exec(WORKER, names)
    expected = names["train"](str(tmp_path / "one"), 4, None)
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("LOSSES")).removeprefix("LOSSES"))
    assert len(found) == 3
    assert found == pytest.approx(expected, abs=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    layers = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["layers"][0]["domain"]
        for name in ("one", "two")
    ]
    assert layers[0] == pytest.approx(layers[1], rel=1e-5)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
