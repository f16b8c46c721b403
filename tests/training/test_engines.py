"""Two processes under DDP, FSDP2, ZeRO-3 and tensor parallelism, over gloo on the CPU, train as one does."""

import importlib.util
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_ortho
from hf_ortho.cli.demo_tasks import byte_tokenizer
from hf_ortho.training.history import read_step, recorded_steps

pytestmark = pytest.mark.slow
NO_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
ENGINES = ("ddp", "fsdp2", pytest.param("zero3", marks=NO_DEEPSPEED))
ACTIVATIONS = {
    "all": "hermite_3",
    "activations": "fourier_2",
    "activations+norms": "tropical_2",
    "activations+head": "tropical_rational_2",
    "lora+activations": "hermite_4",
}
STEPS = dict.fromkeys(ACTIVATIONS, 2) | {"all": 4, "lora+activations": 3}
RESUMED = ("all", "lora+activations")

# Accelerate takes the CPU for no device of FSDP, DeepSpeed or tensor parallelism: the worker names it one, all else is
# as on GPUs. DeepSpeed would compile an operator for the CPU, only for reductions in shared memory.
WORKER = """
import contextlib, importlib, json, os, sys
import torch, torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import training_args
import hf_ortho.plotting
from hf_ortho.cli import main

torch.set_num_threads(1)
hf_ortho.plotting.plot_stored = lambda stored, path, name: path.write_bytes(b"png")  # as tests/training/conftest.py
results = []
module = importlib.import_module("hf_ortho.training.finetune")
original = module.finetune
module.finetune = lambda *args: results.append(original(*args)) or results[-1]
for engine, place, flags in json.load(open(sys.argv[1])):
    if engine == "ddp":  # as the recipes
        flags = [*flags, "--use_cpu", "true", "--logging_nan_inf_filter", "false"]
        flags += ["--ddp_find_unused_parameters", "false", "--ddp_broadcast_buffers", "false"]
    else:
        fsdp, zero, tp = engine == "fsdp2", engine == "zero3", engine == "tp"
        if zero:
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": str(fsdp), "FSDP_VERSION": "2",
                       "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                       "ACCELERATE_USE_DEEPSPEED": str(zero), "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                       "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
                       "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
                       "ACCELERATE_USE_PARALLELISM_CONFIG": str(tp), "PARALLELISM_CONFIG_TP_SIZE": str(1 + tp)}
        training_args.is_torch_bf16_gpu_available = lambda: True
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    code = main(["finetune", "--output_dir", place, *flags])
    if code:
        sys.exit(code)
    if "lora" in place or engine == "tp":  # merged, or gathered, by the main process alone
        continue
    state = results[-1].checkpoint.model.state_dict(keep_vars=True)
    state = {k: v for k, v in state.items() if k != "lm_head.weight"}
    sharded = [k for k, v in state.items() if isinstance(v, DTensor)]
    parts = {k: v.to_local() if k in sharded else v.ds_tensor for k, v in state.items() if engine != "ddp"}
    shapes = {str(tuple(v.shape)) for k, v in parts.items() if k.endswith("act.coefficients")}
    gathered = deepspeed.zero.GatheredParameters(state.values()) if engine == "zero3" else contextlib.nullcontext()
    with gathered:
        whole = {k: (v.full_tensor() if k in sharded else v).detach().contiguous().clone() for k, v in state.items()}
    save_file(whole, f"{place}.{dist.get_rank()}", {"shapes": " ".join(shapes)})
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_gpt2, save_parts):
    """A model for each policy, without dropout, whose masks would depend on how the batch is split.

    All are converted but that for ``all``, which the runs convert.
    """
    found = {}
    for policy, activation in ACTIVATIONS.items():
        model, tokenizer = make_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        if policy != "all":
            hf_ortho.convert(model, activation)
        found[policy] = save_parts(tmp_path_factory.mktemp("gpt2"), model, tokenizer)
    return found


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory, folders):
    """An adapter that changes the model for ``activations``, into which it is merged."""
    base = AutoModelForCausalLM.from_pretrained(folders["activations"])
    config = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    folder = tmp_path_factory.mktemp("lora")
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory, save_parts):
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    return save_parts(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(LlamaConfig(**shape, **ends)), tokenizer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forked, folders, lora_folder, llama_folder, text_file, hf_ortho_command):
    """The folder of all runs: ``ENGINE.POLICY``, and with ``.resumed`` those continued from their checkpoint-2."""
    folder = tmp_path_factory.mktemp("engines")

    def flags(**options):
        common = {"dataset": text_file, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01, "weight_decay": 0.1}
        common |= {"calibration_samples": 2, "per_device_eval_batch_size": 4}  # of 9 samples
        return [word for key, value in (common | options).items() for word in (f"--{key}", str(value))]

    def gpt2(policy, processes):
        batch = {"max_steps": STEPS[policy], "per_device_train_batch_size": 4 // processes}
        return flags(model=folders[policy], train=policy, activation=ACTIVATIONS[policy], **batch)

    # The batch is 4 samples in each process, in two parts; transformers does not resume what it sharded.
    llama = flags(model=llama_folder, activation="hermite_3", max_steps=2, save_only_model=True)
    llama += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    queue = []
    for engine in ("ddp", "fsdp2", "zero3"):
        queue.append((engine, str(folder / f"{engine}.bf16"), [*gpt2("activations", 2), "--bf16", "true"]))
        for policy in ACTIVATIONS:
            place = str(folder / f"{engine}.{policy}")
            queue.append((engine, place, gpt2(policy, 2)))
            if policy in RESUMED:
                again = ["--resume_from_checkpoint", f"{place}/checkpoint-2"]
                queue.append((engine, f"{place}.resumed", gpt2(policy, 2) + again))
    queue.append(("fsdp2", str(folder / "fsdp2.bfloat16"), [*gpt2("all", 2), "--dtype", "bfloat16"]))
    queue.append(("tp", str(folder / "tp.llama"), llama))
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero, **auto}))
    parts = ["--deepspeed", str(folder / "deepspeed.json")]  # transformers loads the model in parts
    logged = [*gpt2("activations", 2), *parts, "--log_activations", "1"]
    queue.append(("zero3", str(folder / "zero3.parts"), logged))
    adapter = {"model": lora_folder, "train": "activations", "max_steps": 2}
    queue.append(("zero3", str(folder / "zero3.merged"), flags(**adapter, per_device_train_batch_size=2) + parts))
    (folder / "worker.py").write_text(WORKER)
    for name in ("zero3", "runs") if importlib.util.find_spec("deepspeed") else ("runs",):
        chosen = [run for run in queue if (run[0] == "zero3") == (name == "zero3")]
        (folder / f"{name}.json").write_text(json.dumps(chosen))
        printed = forked(
            2, folder / "worker.py", folder / f"{name}.json", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu"
        )
        assert printed.count("Wrote") == len(chosen)  # by the main process alone
    others = [("llama", llama), ("merged", flags(**adapter, per_device_train_batch_size=4))]
    for name, options in [(policy, gpt2(policy, 1)) for policy in ACTIVATIONS] + others:
        ran = hf_ortho_command("finetune", "--output_dir", folder / f"single.{name}", *options, "--use_cpu", True)
        assert ran.code == 0, ran.err
    return folder


def history(folder, key):
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"))
    return [entry[key] for entry in json.loads(states[-1].read_text())["log_history"] if key in entry]


def check_like_one_process(several, one):
    """The losses and weights; returns the weights."""
    for key in ("loss", "eval_loss", "eval_perplexity"):
        assert len(history(one, key)) > 0
        assert history(several, key) == pytest.approx(history(one, key), rel=1e-5)
    expected, found = load_file(one / "model.safetensors"), load_file(several / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    return found


@pytest.mark.parametrize("policy", ACTIVATIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_and_weights_are_those_of_one_process(runs, engine, policy, folders):
    found = check_like_one_process(runs / f"{engine}.{policy}", runs / f"single.{policy}")
    start = load_file(folders[policy] / "model.safetensors")
    layers = {n for n in start if n.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))}
    series = {n for n in start if ".act." in n and not n.endswith((".domain", ".tail_slopes"))}
    others = {"activations": set(), "activations+norms": {n for n in start if ".ln_" in n}, "all": set(start)}
    others |= {"activations+head": {"transformer.wte.weight"}, "lora+activations": layers}
    moved = {name for name, tensor in start.items() if not torch.equal(found[name], tensor)}
    assert moved == series | others[policy]
    assert bool(series) == (policy != "all")


@pytest.mark.parametrize("policy", ACTIVATIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_all_processes_hold_the_weights_that_are_saved(runs, engine, policy):
    """The consolidated checkpoint loads with plain from_pretrained, bit-equal to the weights in memory."""
    folder = runs / f"{engine}.{policy}"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    assert loaded.config.architectures == ["GPT2LMHeadModel"]
    assert "GPT2LMHeadModel with learnable" in (folder / "README.md").read_text()
    assert not any(word in (folder / "README.md").read_text() for word in ("FSDP", "DeepSpeed"))
    if policy == "lora+activations":  # merged, by the main process alone
        return
    saved = loaded.state_dict()
    first, second = (load_file(f"{folder}.{rank}") for rank in range(2))
    assert first.keys() == second.keys() == saved.keys() - {"lm_head.weight"}
    assert [name for name in first if not torch.equal(first[name], saved[name])] == []
    assert [name for name in first if not torch.equal(second[name], saved[name])] == []


@pytest.mark.parametrize("policy", RESUMED)
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


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_engines_round_to_bf16_where_ddp_does(runs, engine):
    """Accelerate's own mixed precision, and DeepSpeed's, would round the coefficients too, autocast does not."""
    for key in ("loss", "eval_loss", "grad_norm"):
        assert history(runs / f"{engine}.bf16", key) == pytest.approx(history(runs / "ddp.bf16", key), rel=1e-6)
    assert {t.dtype for t in load_file(runs / f"{engine}.bf16" / "model.safetensors").values()} == {torch.float32}
    assert history(runs / "ddp.bf16", "loss") != pytest.approx(history(runs / "ddp.activations", "loss"), rel=1e-6)


@NO_DEEPSPEED
@pytest.mark.parametrize(("run", "one"), [("parts", "activations"), ("merged", "merged")])
def test_a_model_loaded_in_parts_and_a_merged_adapter_train_as_in_one_process(runs, run, one):
    check_like_one_process(runs / f"zero3.{run}", runs / f"single.{one}")


@NO_DEEPSPEED
def test_the_parameters_in_parts_are_recorded(runs, folders):
    steps = dict(recorded_steps(runs / "zero3.parts"))
    assert list(steps) == [0, 1, 2]
    for step, folder in ((0, folders["activations"]), (2, runs / "zero3.parts")):
        tensors = load_file(folder / "model.safetensors")
        modules, statistics = read_step(steps[step])
        for path, module in modules.items():
            assert all(torch.equal(value, tensors[f"{path}.{key}"]) for key, value in module.state_dict().items())
            assert statistics[path]["gain"] == pytest.approx(module.gain()[0])
            assert ("outside" in statistics[path]) == (step > 0)


def test_fsdp2_shards_a_bfloat16_model_with_float32_activations(runs):
    tensors = load_file(runs / "fsdp2.bfloat16" / "model.safetensors")
    assert {t.dtype for n, t in tensors.items() if ".act." in n} == {torch.float32}
    assert {t.dtype for n, t in tensors.items() if ".act." not in n} == {torch.bfloat16}


def test_tensor_parallelism_is_one_process(runs, llama_folder):
    """Also with the gradients of two backward passes, and with a conversion of the model in shards."""
    found = check_like_one_process(runs / "tp.llama", runs / "single.llama")
    assert AutoModelForCausalLM.from_pretrained(runs / "tp.llama").config.hidden_act == "hermite_3"
    start = load_file(llama_folder / "model.safetensors")
    assert {name for name in start if torch.equal(start[name], found[name])} == set()


@pytest.mark.parametrize("engine", ENGINES)
def test_four_coefficients_are_two_in_each_process_of_a_sharded_model(runs, engine):
    with safe_open(runs / f"{engine}.all.0", "pt") as file:
        assert file.metadata()["shapes"] == ("" if engine == "ddp" else "(2,)")
