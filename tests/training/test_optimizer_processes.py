"""Two processes, under DDP and FSDP2, train and record as one does with the whole batch."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_ortho.activations import FAMILIES
from hf_ortho.training import history

MODEL = """
import torch
import hf_ortho
from torch import nn
from hf_ortho.activations import FAMILIES, build
from hf_ortho.training.logger import ActivationLogger

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), build(f"{f}_3", init="unit"), nn.Linear(8, 6)) for f in FAMILIES
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}

x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))

def train(model, wrapped, x, folder, rank=0):
    from types import SimpleNamespace
    groups = hf_ortho.param_groups(wrapped, lr=0.01, activation_lr=0.02, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    hf_ortho.scale_steps(optimizer, wrapped, gradient_scale=0.5, natural_steps=True)
    logger = ActivationLogger(1)
    logger._modules = {p: m for p, m in model.named_modules() if hasattr(m, "tail_slopes")}
    logger._every, logger._picture_every, logger._integrations = 1, 0, []
    args = SimpleNamespace(output_dir=folder)
    state = SimpleNamespace(global_step=0, is_world_process_zero=rank == 0)
    for _ in range(3):
        logger.on_step_begin(args, state, None)
        wrapped(x)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        logger.on_step_end(args, state, None)
"""

WORKER = """
import sys
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from model import Net, hf_ortho, torch, train, x

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, folder = dist.get_rank(), sys.argv[1]
found = {}
for engine in ("ddp", "fsdp2"):
    model = Net()
    hf_ortho.DomainPenalty(model, 0.3, (-0.5, 0.5))
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    train(model, wrapped, x[8 * rank : 8 * rank + 8], f"{folder}/{engine}", rank)
    for key, p in model.named_parameters():
        p = p.detach()
        found[f"{engine}.{key}"] = (p.full_tensor() if hasattr(p, "full_tensor") else p).contiguous()
save_file(found, f"{folder}/{rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "model.py").write_text(MODEL)
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "worker.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    names: dict = {}
    exec(MODEL, names)
    model = names["Net"]()
    names["hf_ortho"].DomainPenalty(model, 0.3, (-0.5, 0.5))
    place = tmp_path_factory.mktemp("alone")
    names["train"](model, model, names["x"], str(place))
    return model, place


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_parameters_are_those_of_one_process(folder, alone, engine):
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in range(2))
    for key, parameter in alone[0].named_parameters():
        assert torch.equal(first[f"{engine}.{key}"], second[f"{engine}.{key}"])
        torch.testing.assert_close(first[f"{engine}.{key}"], parameter.detach(), rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_records_are_those_of_one_process(folder, alone, engine):
    recorded, expected = history.recorded_steps(folder / engine), history.recorded_steps(alone[1])
    assert [step for step, _ in recorded] == [step for step, _ in expected] == [1, 2, 3]
    for (_, one), (_, other) in zip(recorded, expected, strict=True):
        (modules, statistics), (wanted, wanted_statistics) = history.read_step(one), history.read_step(other)
        assert len(modules) == len(FAMILIES)
        for path, module in wanted.items():
            assert statistics[path] == pytest.approx(wanted_statistics[path], rel=1e-4, abs=1e-5)
            torch.testing.assert_close(modules[path].state_dict(), module.state_dict(), rtol=1e-4, atol=1e-5)
