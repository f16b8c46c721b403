import os
import re
import signal
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hf_ortho.cli import launch, main
from hf_ortho.errors import ConfigError, HfOrthoError
from hf_ortho.training import distributed


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the launchers and the plugins of Accelerate write into the environment does not stay there."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.fixture
def gpus(monkeypatch):
    """A machine that says it has four of them, and DeepSpeed."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(distributed, "check_deepspeed", lambda: None)


@pytest.fixture
def started(monkeypatch):
    """The arguments with which Accelerate's launchers are called, in place of starting processes."""
    calls = []
    for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(accelerate_launch, name, lambda args, name=name: calls.append((name, args)))
    return calls


def test_without_the_flag_the_command_goes_on(started):
    assert launch.launch("finetune", ["--config", "x.yaml"]) is None
    assert launch.launch("finetune", ["--accelerate_config", "single", "--help"]) is None
    assert started == []
    assert "ACCELERATE_USE_CPU" not in os.environ


def test_torchrun_without_a_gpu_runs_on_the_cpu():
    os.environ["LOCAL_RANK"] = "1"
    assert launch.launch("finetune", []) is None
    assert os.environ["ACCELERATE_USE_CPU"] == "True"


@pytest.mark.parametrize(
    ("name", "launcher", "processes"),
    [
        ("single", "simple_launcher", 1),
        ("multi_gpu", "multi_gpu_launcher", 4),
        ("fsdp2", "multi_gpu_launcher", 4),
        ("zero3", "deepspeed_launcher", 4),
        ("tp", "multi_gpu_launcher", 4),
    ],
)
def test_the_command_is_started_again_on_all_gpus(gpus, started, name, launcher, processes):
    assert launch.launch("finetune", ["--accelerate_config", name, "--config", "x.yaml", "--seed", "3"]) == 0
    ((called, args),) = started
    assert called == launcher
    assert args.num_processes == processes
    assert (args.module, args.training_script) == (True, "hf_ortho")
    assert args.training_script_args == ["finetune", "--config", "x.yaml", "--seed", "3"]
    assert launch.LAUNCHED not in os.environ


def test_a_config_of_the_user_keeps_its_number_of_processes(gpus, started, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 3\nmain_process_port: 0\n")
    launch.launch("finetune", ["--accelerate_config", str(file)])
    launch.launch("finetune", ["--accelerate_config", str(file), "--num_processes", "2"])
    assert [args.num_processes for _, args in started] == [3, 2]


# ---- what Accelerate's own parsers make of the packaged files ------------------------------------------------------


def settings(started, name, prepare):
    launch.launch("finetune", ["--accelerate_config", name, "--num_processes", "2"])
    os.environ.update(prepare(started[-1][1]))


def test_fsdp2_settings(gpus, started):
    settings(started, "fsdp2", prepare_multi_gpu_env)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is False


def test_zero3_settings(gpus, started):
    settings(started, "zero3", lambda args: prepare_deepspeed_cmd_env(args)[1])
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 3
    assert plugin.zero3_init_flag is False
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 3
    assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_tensor_parallel_settings(gpus, started):
    settings(started, "tp", prepare_multi_gpu_env)
    parallelism = ParallelismConfig()
    assert (parallelism.tp_size, parallelism.total_size) == (2, 2)


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accelerate_config", "ddp"], "'ddp': must be one of single, multi_gpu, fsdp2, zero3, tp, or a YAML file"),
        (["--num_processes", "2"], "num_processes 2: requires --accelerate_config"),
        (["--accelerate_config", "multi_gpu", "--num_processes", "0"], "'0': must be an integer and at least 1"),
        (["--accelerate_config", "multi_gpu", "--num_processes", "two"], "'two': must be an integer and at least 1"),
        (["--accelerate_config", "single", "--num_processes", "2"], "single runs one process; use multi_gpu"),
        (
            ["--accelerate_config", "fsdp2"],
            "fsdp2 requires GPUs, but this machine has none; multi_gpu also runs",
        ),
        (["--accelerate_config", "zero3"], "zero3 requires GPUs"),
        (["--accelerate_config", "tp"], "tp requires GPUs"),
    ],
)
def test_mistakes(monkeypatch, started, flags, message):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        launch.launch("finetune", flags)
    assert started == []


@pytest.mark.parametrize("version", ["", "fsdp_config: {fsdp_version: 1}\n", "fsdp_config: {fsdp_version: 2}\n"])
def test_fsdp_needs_version_2(gpus, started, tmp_path, version):
    """Version 1 is the default of Accelerate."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"distributed_type: FSDP\nnum_processes: 2\nmain_process_port: 0\n{version}")
    flags = ["--accelerate_config", str(file)]
    if "2}" in version:
        launch.launch("finetune", flags)
        assert len(started) == 1
        return
    with pytest.raises(ConfigError, match=r"mine\.yaml: FSDP version 1 is not supported.* set fsdp_version to 2"):
        launch.launch("finetune", flags)
    assert started == []


def test_more_processes_than_gpus(gpus, started):
    with pytest.raises(ConfigError, match="num_processes 5: this machine has 4 GPUs"):
        launch.launch("finetune", ["--accelerate_config", "fsdp2", "--num_processes", "5"])


@pytest.mark.parametrize("found", ["none", "0.9.12", "0.19.7", "0.19.8", "0.20.0+cu128", "1.0"])
def test_deepspeed_is_missing_or_old(monkeypatch, started, found):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(distributed, "is_deepspeed_available", lambda: found != "none")
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: found if name == "deepspeed" else version(name))
    config, arguments = {"bf16": {"enabled": True}}, SimpleNamespace(bf16=True)
    if found in ("0.19.8", "0.20.0+cu128", "1.0"):
        launch.launch("finetune", ["--accelerate_config", "zero3"])
        distributed.autocast_under_deepspeed(config, arguments)
        assert (len(started), config["torch_autocast"]["enabled"]) == (1, True)
        return
    message = re.escape(f"DeepSpeed 0.19.8 or newer is required, found {found}: pip install 'deepspeed>=0.19.8'")
    with pytest.raises(ConfigError, match=message):
        launch.launch("finetune", ["--accelerate_config", "zero3"])
    with pytest.raises(ConfigError, match=message):
        distributed.autocast_under_deepspeed(config, arguments)
    assert started == []


@pytest.mark.parametrize(
    "text", ["distributed_type: [", "num_machines: 1", "distributed_type: MULTI_GPU\ngpus: 3", "7"]
)
def test_a_file_that_is_no_config(tmp_path, started, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml is not an Accelerate config: \S"):
        launch.launch("finetune", ["--accelerate_config", str(tmp_path / "mine.yaml")])


def test_the_flag_in_one_of_several_processes():
    os.environ["LOCAL_RANK"] = "0"
    with pytest.raises(ConfigError, match="this process was already launched as one of several"):
        launch.launch("finetune", ["--accelerate_config", "multi_gpu"])


# ---- how the processes end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "launched", "printed"), [("0", False, True), ("1", False, False), ("0", True, False)])
def test_a_mistake_is_printed_once_and_left_to_the_launcher(hf_ortho_command, tmp_path, rank, launched, printed):
    file = tmp_path / "error.json"
    os.environ.update(
        {"TORCHELASTIC_ERROR_FILE": str(file), "RANK": rank} | ({launch.LAUNCHED: "1"} if launched else {})
    )
    ran = hf_ortho_command("evaluate", "./no_such_model")
    assert ran.code == 2
    assert bool(ran.err) == printed
    failure = ProcessFailure(int(rank), 1, 2, str(file))
    with pytest.raises(HfOrthoError, match=r"\./no_such_model does not exist"):
        launch._failed(ChildFailedError("hf_ortho", {int(rank): failure}))


@pytest.mark.parametrize(
    ("exitcode", "code", "message"),
    [
        (1, 1, "process 3 exited with code 1; see the error above"),
        (-signal.SIGKILL, 137, "process 3 was killed by SIGKILL"),
    ],
)
def test_a_crash_is_reported_with_its_process(capsys, exitcode, code, message):
    assert launch._failed(ChildFailedError("hf_ortho", {3: ProcessFailure(3, 1, exitcode, "")})) == code
    assert capsys.readouterr().err == f"hf-ortho: error: {message}\n"


@pytest.fixture
def two_processes(monkeypatch, capfd):
    """``hf-ortho finetune`` on two, without a GPU: the exit code and what all of them have printed."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    handlers = {number: signal.getsignal(number) for number in (1, 2, 3, 15)}  # torch's launcher sets its own

    def run(*flags):
        code = main(["finetune", "--accelerate_config", "multi_gpu", "--num_processes", "2", *map(str, flags)])
        return code, *capfd.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_two_processes_on_the_cpu(two_processes, gpt2_folder, text_file, tmp_path):
    flags = ["--model", gpt2_folder, "--dataset", text_file, "--max_steps", 1, "--per_device_train_batch_size", 2]
    code, out, err = two_processes(*flags, "--save_steps", 1, "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "")  # no process prints warnings of a library
    assert out.count("Wrote") == 1
    typed = f"hf-ortho finetune --accelerate_config multi_gpu --num_processes 2 --model {gpt2_folder}"
    assert typed.rpartition("/")[0] in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    written = {p.name for p in (tmp_path / "out" / "checkpoint-1").glob("rng_state*")}
    assert written == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
def test_a_mistake_in_two_processes_is_one_sentence(two_processes, gpt2_folder, tmp_path):
    flags = ["--model", gpt2_folder, "--dataset", tmp_path / "none.txt", "--output_dir", tmp_path / "out"]
    code, out, err = two_processes(*flags)
    assert (code, err) == (2, f"hf-ortho: error: {tmp_path / 'none.txt'} does not exist\n")
    begun = ("Launching with multi_gpu", f"Loading {gpt2_folder}", f"Tokenizing {tmp_path / 'none.txt'}")
    assert out.splitlines() == list(begun)  # of one of them
