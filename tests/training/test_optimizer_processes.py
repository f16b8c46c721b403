"""Two processes, under DDP and FSDP2, train, average and record as one does with the whole batch."""

import pytest
import torch
from safetensors.torch import load_file

from hf_ortho.activations import FAMILIES
from hf_ortho.training import history

pytestmark = pytest.mark.slow  # ranks are forked

MODEL = r"""
import torch
import hf_ortho
from torch import nn
from hf_ortho.activations import FAMILIES, build
from hf_ortho.training import ExponentialMovingAverage
from hf_ortho.training.logger import ActivationLogger

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), build(name, init="unit"), nn.Linear(8, 6))
            for name in (*(f"{family}_3" for family in FAMILIES), "hermite_3_g4")
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}

x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))

def whole(model):
    found = {k: p.detach().clone() for k, p in model.named_parameters()}
    return {k: (p.full_tensor() if hasattr(p, "full_tensor") else p).contiguous() for k, p in found.items()}

def train(model, wrapped, x, folder, rank=0, resume=lambda *_: None):
    from types import SimpleNamespace
    entries = [{"pattern": r"^layers\.0\.[01]\.", "learning_rate": 0.03, "weight_decay": 0.2}]
    groups = hf_ortho.param_groups(wrapped, lr=0.01, activation_lr=0.02, weight_decay=0.1, groups=entries)
    optimizer = torch.optim.AdamW(groups)
    hf_ortho.scale_steps(optimizer, wrapped, gradient_scale=0.5, natural_steps=True)
    average = ExponentialMovingAverage(0.6)
    average.prepare(optimizer)
    logger = ActivationLogger(1)
    logger._modules = {p: m for p, m in model.named_modules() if hasattr(m, "tail_slopes")}
    logger._every, logger._picture_every, logger._integrations = 1, 0, []
    args = SimpleNamespace(output_dir=folder)
    state = SimpleNamespace(global_step=0, is_world_process_zero=rank == 0)
    for step in range(3):
        if step == 2:
            resume(wrapped, optimizer)
        logger.on_step_begin(args, state, None)
        wrapped(x)["loss"].backward()
        optimizer.step()
        average.on_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()
        state.global_step += 1
        logger.on_step_end(args, state, None)
    resume(wrapped, optimizer)
    with average.applied(optimizer):
        averages = whole(model)
    return averages
"""

WORKER = """
import sys
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from model import Net, hf_ortho, torch, train, whole, x

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, folder = dist.get_rank(), sys.argv[1]
found = {}

def resume(model, optimizer):
    # as Accelerate saves and loads the optimizer
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    optimizer.state.clear()
    dcp.set_optimizer_state_dict(model, optimizer, state if rank == 0 else {}, options=options)

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
    again = {"resume": resume} if engine == "fsdp2" else {}
    averages = train(model, wrapped, x[8 * rank : 8 * rank + 8], f"{folder}/{engine}", rank, **again)
    found |= {f"{engine}.{key}": p for key, p in whole(model).items()}
    found |= {f"{engine}.average.{key}": p for key, p in averages.items()}
save_file(found, f"{folder}/{rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, forked):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "model.py").write_text(MODEL)
    (folder / "worker.py").write_text(WORKER)
    forked(2, folder / "worker.py", folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    names: dict = {}
    exec(MODEL, names)
    model = names["Net"]()
    names["hf_ortho"].DomainPenalty(model, 0.3, (-0.5, 0.5))
    place = tmp_path_factory.mktemp("alone")
    averages = names["train"](model, model, names["x"], str(place))
    return model, place, averages


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_parameters_are_those_of_one_process(folder, alone, engine):
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in range(2))
    for key, parameter in alone[0].named_parameters():
        assert torch.equal(first[f"{engine}.{key}"], second[f"{engine}.{key}"])
        torch.testing.assert_close(first[f"{engine}.{key}"], parameter.detach(), rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_averages_are_those_of_one_process(folder, alone, engine):
    """Under FSDP2 also after the state of the optimizer was loaded again."""
    found = load_file(folder / "0.safetensors")
    for key, expected in alone[2].items():
        torch.testing.assert_close(found[f"{engine}.average.{key}"], expected, rtol=1e-4, atol=1e-5, msg=key)
    assert any(not torch.equal(alone[2][key], p) for key, p in alone[0].named_parameters())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_records_are_those_of_one_process(folder, alone, engine):
    recorded, expected = history.recorded_steps(folder / engine), history.recorded_steps(alone[1])
    assert [step for step, _ in recorded] == [step for step, _ in expected] == [1, 2, 3]
    for (_, one), (_, other) in zip(recorded, expected, strict=True):
        (modules, statistics), (wanted, wanted_statistics) = history.read_step(one), history.read_step(other)
        assert len(modules) == len(FAMILIES) + 1
        for path, module in wanted.items():
            assert statistics[path] == pytest.approx(wanted_statistics[path], rel=1e-4, abs=1e-5)
            torch.testing.assert_close(modules[path].state_dict(), module.state_dict(), rtol=1e-4, atol=1e-5)
