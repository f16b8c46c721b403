"""Two processes under DDP and FSDP2, over gloo on the CPU, train as one process does with the same global batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ENGINES = ("ddp", "fsdp2")
ACTIVATIONS = {
    "all": "hermite_3",
    "activations": "fourier_2",
    "activations+norms": "tropical_2",
    "activations+head": "tropical_rational_2",
    "lora+activations": "hermite_4",
}

# Accelerate takes the CPU for no FSDP device: the worker names it one, and all else is as on GPUs.
WORKER = """
import json, os, sys
import torch, torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from hf_ortho.cli import finetune as command, main

torch.set_num_threads(1)
results = []
original = command.finetune
command.finetune = lambda recipe: results.append(original(recipe)) or results[-1]
for engine, place, flags in json.load(open(sys.argv[1])):
    if engine == "fsdp2":
        os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
                       "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    else:
        flags = [*flags, "--use_cpu", "true"]
    code = main(["finetune", "--output_dir", place, *flags])
    if code:
        sys.exit(code)
    if "lora" in place:  # merged, by the main process alone
        continue
    state = {k: v for k, v in results[-1].checkpoint.model.state_dict().items() if k != "lm_head.weight"}
    sharded = [k for k, v in state.items() if isinstance(v, DTensor)]
    whole = {k: (v.full_tensor() if k in sharded else v).contiguous() for k, v in state.items()}
    shapes = {str(tuple(state[k].to_local().shape)) for k in sharded if k.endswith("act.coefficients")}
    save_file(whole, f"{place}.{dist.get_rank()}", {"shapes": " ".join(shapes)})
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, make_gpt2, save_parts):
    """Without dropout, whose masks would depend on how the batch is split."""
    pdrop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return save_parts(tmp_path_factory.mktemp("gpt2"), *make_gpt2(**pdrop))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder, text_file, hf_ortho_command):
    """The folder of all runs: ``ENGINE.POLICY``, and with ``.resumed`` those continued from their checkpoint-2."""
    folder = tmp_path_factory.mktemp("engines")

    def flags(policy, processes):
        common = {"model": model_folder, "dataset": text_file, "train": policy, "activation": ACTIVATIONS[policy]}
        common |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01, "weight_decay": 0.1}
        common |= {"per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 4}
        return [word for key, value in common.items() for word in (f"--{key}", str(value))]

    queue = []
    for engine in ENGINES:
        for policy in ACTIVATIONS:
            place = str(folder / f"{engine}.{policy}")
            queue.append((engine, place, flags(policy, 2)))
            if policy in ("all", "lora+activations"):
                again = ["--resume_from_checkpoint", f"{place}/checkpoint-2"]
                queue.append((engine, f"{place}.resumed", flags(policy, 2) + again))
    (folder / "runs.json").write_text(json.dumps(queue))
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "worker.py"), str(folder / "runs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == len(queue)  # by the main process alone
    for policy in ACTIVATIONS:
        ran = hf_ortho_command(
            "finetune", "--output_dir", folder / f"single.{policy}", *flags(policy, 1), "--use_cpu", True
        )
        assert ran.code == 0, ran.err
    return folder


def history(folder, key):
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


@pytest.mark.parametrize("policy", ACTIVATIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_and_weights_are_those_of_one_process(runs, engine, policy, model_folder):
    one, several = runs / f"single.{policy}", runs / f"{engine}.{policy}"
    assert len(history(one, "loss")) == 4
    for key in ("loss", "eval_perplexity"):
        assert history(several, key) == pytest.approx(history(one, key), rel=1e-5)
    expected, found = load_file(one / "model.safetensors"), load_file(several / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    source = load_file(model_folder / "model.safetensors")
    moved = {name for name, tensor in source.items() if not torch.equal(found[name], tensor)}
    layers = {n for n in source if n.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))}
    norms = {n for n in source if ".ln_" in n}
    trained = {"activations": set(), "activations+norms": norms, "activations+head": {"transformer.wte.weight"}}
    trained |= {"lora+activations": layers, "all": set(source)}
    assert moved == trained[policy]


@pytest.mark.parametrize("policy", ACTIVATIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_all_processes_hold_the_weights_that_are_saved(runs, engine, policy):
    """The consolidated checkpoint loads with plain from_pretrained, bit-equal to the weights in memory."""
    folder = runs / f"{engine}.{policy}"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    assert loaded.config.architectures == ["GPT2LMHeadModel"]
    assert "GPT2LMHeadModel with learnable" in (folder / "README.md").read_text()
    assert "FSDP" not in (folder / "README.md").read_text()
    if policy == "lora+activations":  # merged, by the main process alone
        return
    saved = loaded.state_dict()
    first, second = (load_file(f"{folder}.{rank}") for rank in range(2))
    assert first.keys() == second.keys() == saved.keys() - {"lm_head.weight"}
    assert [name for name in first if not torch.equal(first[name], saved[name])] == []
    assert [name for name in first if not torch.equal(second[name], saved[name])] == []


@pytest.mark.parametrize("policy", ["all", "lora+activations"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_training_ends_bit_equal(runs, engine, policy):
    straight, resumed = runs / f"{engine}.{policy}", runs / f"{engine}.{policy}.resumed"
    expected, found = load_file(straight / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert history(resumed, "loss") == history(straight, "loss")


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpoints_on_the_way_load_with_from_pretrained(runs, engine):
    found = AutoModelForCausalLM.from_pretrained(runs / f"{engine}.all" / "checkpoint-4").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(runs / f"{engine}.all").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("engine", "shapes"), [("ddp", ""), ("fsdp2", "(2,)")])
def test_four_coefficients_are_two_in_each_process_under_fsdp2(runs, engine, shapes):
    with safe_open(runs / f"{engine}.all.0", "pt") as file:
        assert file.metadata()["shapes"] == shapes
