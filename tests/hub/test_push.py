"""Push to a stand-in for the Hub with the real client: what arrives, what is resumed, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from stand_in import Repositories, hub
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.errors import CheckpointError, ConfigError, HubError
from hf_ortho.hub.push import push

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # huggingface_hub's own
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # read by peft
]
MODEL = {"README.md", "activations.png", "config.json", "conversion.json", "generation_config.json"}
MODEL |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", ".gitattributes"}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", ".gitattributes"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory, gpt2_folder, hf_ortho_command):
    folder = tmp_path_factory.mktemp("push") / "converted"
    assert hf_ortho_command("convert", gpt2_folder, "-o", folder, "--degree", 4).code == 0
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, converted):
    """LoRA and trained activations on ``me/converted``."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True, modules_to_save=["act"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(converted), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or ("modules_to_save" in name and "domain" not in name):
                value += 0.1
    folder = tmp_path_factory.mktemp("push") / "adapter"
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "me/converted"}))
    with torch.no_grad():
        return folder, model.eval()(torch.arange(16)[None]).logits


@pytest.fixture
def shards(tmp_path, converted):
    """The same model in several files."""
    AutoModelForCausalLM.from_pretrained(converted).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    return tmp_path / "shards"


@pytest.fixture
def served(connect):
    """The repositories of a stand-in that this process is connected to, as the user ``me``."""
    repositories = Repositories()
    with hub(repositories) as endpoint:
        connect(endpoint)
        yield repositories


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_round_trip(tmp_path, converted, adapter, connect, hf_ortho_command):
    repositories = Repositories()
    before = files_of(converted)
    with hub(repositories) as endpoint:
        connect(endpoint)
        for folder, name in ((converted, "me/converted"), (adapter[0], "me/adapter")):
            done = hf_ortho_command("push", folder, name)
            assert done.code == 0, done.err
            commit = repositories.get("models", name).refs["main"]
            assert done.out.splitlines()[-1] == f"{folder} is at {endpoint}/{name}/commit/{commit}"
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_me"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        script = [sys.executable, Path(__file__).with_name("load_and_push.py"), tmp_path]
        done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(converted).eval()(torch.arange(16)[None]).logits
    found = load_file(tmp_path / "logits.safetensors")
    assert not torch.equal(expected, adapter[1])
    for name in ("converted", "native", "trained"):
        assert torch.equal(found[f"me/{name}"], expected), name
    for name in ("adapter", "native-adapter"):
        assert torch.equal(found[f"me/{name}"], adapter[1]), name
    assert files_of(converted) == before
    assert set(repositories.get("models", "me/converted").files("main")) == MODEL
    pushed = repositories.get("models", "me/adapter").files("main")
    assert set(pushed) == ADAPTER
    assert pushed["adapter_model.safetensors"] == (adapter[0] / "adapter_model.safetensors").read_bytes()


def test_the_card_reads_as_on_the_hub(served, converted):
    push(converted, "me/other")
    pushed = served.get("models", "me/other").files("main")
    card = ModelCard(pushed["README.md"].decode())
    assert 'from_pretrained("me/other")' in card.text
    assert f'"{converted}"' not in card.text  # but in the command that made it
    assert card.data.library_name == "transformers"


def test_what_a_training_leaves_is_left_out(served, tmp_path, converted, hf_ortho_command):
    folder = tmp_path / "run"
    left_out = ["checkpoint-10/", "checkpoint-10/model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    left_out += ["training_args.bin", "trainer_state.json", "manifest.json", ".cache/", ".cache/x", ".hf_ortho-ready/"]
    left_out += [".hf_ortho-ready/config.json", ".hidden", "model.safetensors.incomplete", "onnx/weights.PKL", "onnx/"]
    left_out += ["activations/step-1.safetensors", "activations/", "notes.txt", "training_recipe.json"]
    present = files_of(converted) | {"LICENSE": b"kept", "step.py": b"included"}
    for name, body in (present | dict.fromkeys(left_out, b"x")).items():
        if not name.endswith("/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(body)
    before = files_of(folder)
    done = hf_ortho_command("push", folder, "me/run", "--include", "*.py")
    assert done.code == 0, done.err
    assert set(served.get("models", "me/run").files("main")) == set(present) - {".hf_ortho.json"} | {".gitattributes"}
    said = done.out.splitlines()[0].removeprefix("Left out (--include adds files): ").split(", ")
    names = sorted(name for name in left_out if name.count("/") == 0 or name.endswith("/"))
    assert said == [*names[:4], f"{names[4]} and {len(names) - 5} more"]
    assert re.fullmatch(rf"Pushing {folder} \(0\.\d MB in \d+ files\)", done.out.splitlines()[1])
    assert files_of(folder) == before


def test_remote_code_stays_only_with_the_flag(served, converted, caplog):
    push(converted, "me/code", remote_code=True)
    assert "modeling_hf_ortho.py" in served.get("models", "me/code").files("main")
    push(converted, "me/code")
    found = served.get("models", "me/code").files("main")
    assert "modeling_hf_ortho.py" not in found
    assert "auto_map" not in json.loads(found["config.json"])
    assert caplog.messages == ["note: me/code no longer loads without hf_ortho; push with --remote-code to keep this"]


def test_a_second_push_sends_what_changed(served, tmp_path, converted, hf_ortho_command, caplog):
    first = push(converted, "me/x")
    assert not caplog.messages
    assert push(converted, "me/x") == first
    commit = first.rpartition("/")[2]
    assert caplog.messages == [f"note: me/x is already up to date at {commit}: nothing to push"]
    assert len(served.get("models", "me/x").commits) == 2
    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.transformer.h[0].mlp.act.coefficients += 1
    model.save_pretrained(tmp_path / "changed")
    done = hf_ortho_command("push", tmp_path / "changed", "me/x", "--commit-message", "Tune the first layer")
    assert done.code == 0, done.err
    assert served.summaries == [f"Upload with hf_ortho {version('hf_ortho')}", "Tune the first layer"]
    assert len(served.stored) == 2
    pushed = served.get("models", "me/x").files("main")
    assert pushed["model.safetensors"] == (tmp_path / "changed" / "model.safetensors").read_bytes()
    assert "tokenizer.json" in pushed


def test_weights_of_an_earlier_push_go(served, converted, shards):
    push(converted, "me/x")
    push(shards, "me/x")
    names = {path.name for path in shards.glob("model*.safetensors*")}
    pushed = served.get("models", "me/x").files("main")
    assert {path for path in pushed if path.startswith("model")} == names
    assert len(names) > 3
    push(converted, "me/x")
    assert set(served.get("models", "me/x").files("main")) == MODEL


def test_an_adapter_of_an_earlier_push_goes(served, converted, adapter):
    """It would be applied to the model as well."""
    push(adapter[0], "me/x")
    push(converted, "me/x")
    assert set(served.get("models", "me/x").files("main")) == MODEL


def test_lost_connections_and_busy_servers_are_retried(served, converted):
    served.faults = {"preupload": [503, 429], "batch": [500], "put": ["cut", 502], "verify": ["cut"]}
    push(converted, "me/x")
    assert not any(served.faults.values())
    assert set(served.get("models", "me/x").files("main")) == MODEL
    assert len(served.stored) == 1


def test_an_interrupted_upload_is_resumed(served, shards, hf_ortho_command):
    served.faults["put"] = [None, None, *["cut"] * 1000]
    message = hf_ortho_command("push", shards, "me/x").error
    assert message.startswith("me/x: Error while uploading 'model-0")
    assert "nothing was committed; run the same command again to resume the upload" in message
    assert len(served.get("models", "me/x").commits) == 1
    arrived = len(served.stored)
    assert arrived == 2
    served.faults = {"commit": [503]}
    assert "503" in hf_ortho_command("push", shards, "me/x").error
    assert hf_ortho_command("push", shards, "me/x").code == 0
    assert len(served.stored) == len(set(served.stored)) > arrived
    pushed = served.get("models", "me/x").files("main")
    expected = files_of(shards)
    assert json.loads(pushed.pop("config.json"))["vocab_size"] == json.loads(expected.pop("config.json"))["vocab_size"]
    assert pushed | expected == pushed


@pytest.mark.parametrize(
    ("token", "name", "hints"),
    [
        (None, "me/x", ["no Hub token", "hf auth login", "HF_TOKEN"]),
        ("hf_m\u00ebn", "me/x", ["the Hub token is not ASCII text", "hf auth login"]),
        ("hf_wrong", "me/x", ["does not accept the token", "401", "hf auth login"]),
        ("hf_reader", "me/x", ["no write access", "403", "hf auth login"]),
        ("hf_me", "you/x", ["no write access", "403", "--create-pr"]),
        ("hf_me", "me/there/x", ["'me/there/x'", "owner/name"]),
        ("hf_me", "../x", ["'../x'", "owner/name"]),
    ],
)
def test_names_and_rights(served, connect, converted, hf_ortho_command, token, name, hints):
    connect(constants.ENDPOINT, token)
    message = hf_ortho_command("push", converted, name).error
    assert name in message
    assert all(hint in message for hint in hints), message
    assert not served.known


@pytest.mark.parametrize(
    ("flags", "hints"),
    [
        (["--revision", "0" * 40], ["0" * 40, "a branch"]),
        (["--revision", "refs/pr/9"], ["refs/pr/9", "no revision", "a branch"]),
        (["--revision", "v2", "--create-pr"], ["v2", "against main"]),
    ],
)
def test_revisions_that_cannot_be_pushed_to(served, converted, hf_ortho_command, flags, hints):
    message = hf_ortho_command("push", converted, "me/x", *flags).error
    assert all(hint in message for hint in hints), message
    assert all(len(repository.commits) == 1 for repository in served.known.values())


@pytest.mark.parametrize("request_name", ["create", "info", "commit"])
def test_a_server_that_fails_is_one_sentence(served, converted, hf_ortho_command, request_name):
    served.faults[request_name] = [500] * 10
    message = hf_ortho_command("push", converted, "me/x").error
    assert message.startswith("me/x: the Hub could not process the request (500 ")
    assert "the same command" in message
    served.faults.clear()
    assert hf_ortho_command("push", converted, "me/x").code == 0


def test_no_network(connect, monkeypatch, converted, hf_ortho_command):
    connect("http://127.0.0.1:9")
    message = hf_ortho_command("push", converted, "me/x").error
    assert message.startswith("no answer from http://127.0.0.1:9: nothing was pushed; run the same command again once")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in hf_ortho_command("push", converted, "me/x").error


def test_a_branch(served, converted, shards):
    push(converted, "me/x")
    main = served.get("models", "me/x").refs["main"]
    for folder in (shards, converted):
        push(folder, "me/x", revision="v2")
        names = {path.name for path in folder.glob("model*")}
        assert {path for path in served.get("models", "me/x").files("v2") if path.startswith("model")} == names
    assert served.get("models", "me/x").refs["main"] == main


def test_a_pull_request_needs_no_rights(served, connect, converted, shards):
    push(converted, "me/x")
    repository = served.get("models", "me/x")
    main = repository.refs["main"]
    endpoint = constants.ENDPOINT
    connect(endpoint, "hf_you")
    assert push(shards, "me/x", create_pr=True) == f"{endpoint}/me/x/discussions/1"
    assert "model.safetensors" not in repository.files("refs/pr/1")
    connect(endpoint, "hf_me")
    push(converted, "me/x", revision="refs/pr/1")
    assert "model.safetensors" in repository.files("refs/pr/1")
    assert repository.refs["main"] == main


def test_private(served, converted, shards, hf_ortho_command, caplog):
    assert hf_ortho_command("push", converted, "hidden", "--private").code == 0  # of the token's own user
    assert served.get("models", "me/hidden", "hf_me").private
    assert not caplog.messages
    push(converted, "me/open")
    assert hf_ortho_command("push", shards, "me/open", "--private").code == 0
    assert not served.get("models", "me/open").private
    assert [message.split(";")[0] for message in caplog.messages] == ["note: me/open exists and is public"]


def test_remote_code(served, monkeypatch, converted, adapter):
    files = {"modeling_hf_ortho.py": b"code", "config.json": b"{}"}
    monkeypatch.setattr("hf_ortho.hub.push.add_remote_code", lambda folder: files)
    before = files_of(converted)
    push(converted, "me/x", remote_code=True)
    pushed = served.get("models", "me/x").files("main")
    assert {name: pushed[name] for name in files} == files
    assert files_of(converted) == before
    with pytest.raises(ConfigError, match="adapter contains an adapter; only a full model"):
        push(adapter[0], "me/y", remote_code=True)


def test_local_paths_do_not_become_public(served, tmp_path, make_gpt2, save_parts, text_file, hf_ortho_command):
    source = save_parts(tmp_path / "private" / "my-gpt2", *make_gpt2())
    folder, data = tmp_path / "private" / "out", shutil.copy(text_file, tmp_path / "private" / "mine.txt")
    done = hf_ortho_command("convert", source, "-o", folder, "--degree", 3, "--calibration-data", data)
    assert done.code == 0, done.err
    before = files_of(folder)
    push(folder, "me/x")
    pushed = served.get("models", "me/x").files("main")
    assert files_of(folder) == before
    assert b"private" in before["config.json"]
    assert b"private" in before["conversion.json"]
    assert [path for path, body in pushed.items() if b"private" in body] == []
    assert json.loads(pushed["config.json"])["hf_ortho"]["source_model"] == "my-gpt2"
    command = "hf-ortho convert my-gpt2 -o out --degree 3 --calibration-data mine.txt"
    record = json.loads(pushed["conversion.json"])
    assert (record["commands"], record["model"]) == ([command], "my-gpt2")
    card = ModelCard(pushed["README.md"].decode())
    assert f"\n{command}\n" in card.text
    assert "converted from `my-gpt2`" in card.text
    assert card.data.base_model is None

    done = hf_ortho_command("push", folder, "me/x", "--base-model", "openai-community/gpt2")
    assert done.code == 0, done.err
    pushed = served.get("models", "me/x").files("main")
    assert json.loads(pushed["config.json"])["hf_ortho"]["source_model"] == "openai-community/gpt2"
    card = ModelCard(pushed["README.md"].decode())
    assert "converted from `openai-community/gpt2`" in card.text
    assert (card.data.base_model, card.data.base_model_relation) == ("openai-community/gpt2", "finetune")
    found = json.loads(pushed["config.json"])
    expected = json.loads(before["config.json"])
    expected["hf_ortho"]["source_model"] = "openai-community/gpt2"
    assert found == expected


def test_a_base_model_that_is_no_hub_id(served, converted, hf_ortho_command):
    message = hf_ortho_command("push", converted, "me/x", "--base-model", "/home/me/gpt2").error
    assert message == "base model '/home/me/gpt2': must be a Hub id, such as openai-community/gpt2"
    assert served.known == {}


def test_the_base_of_an_adapter_on_this_machine_is_noted(served, tmp_path, converted, caplog):
    config = LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(converted), config)
    model.save_pretrained(tmp_path)
    push(tmp_path, "me/x")
    (message,) = caplog.messages
    assert f"names the base model {converted}, a local folder, and is pushed with 'converted'; give" in message
    pushed = served.get("models", "me/x").files("main")
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "converted"
    assert str(converted).encode() not in b"".join(pushed.values())
    caplog.clear()
    push(tmp_path, "me/x", base_model="me/converted")
    assert caplog.messages == []
    pushed = served.get("models", "me/x").files("main")
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "me/converted"
    card = ModelCard(pushed["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("me/converted", "adapter")
    assert 'base = GPT2LMHeadModel.from_pretrained("me/converted")' in card.text


def test_what_the_model_needs_and_does_not_get_is_noted(served, tmp_path, converted, caplog):
    folder = shutil.copytree(converted, tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_own.Own", "AutoTokenizer": ["a.b", None], "AutoConfig": "x/y--own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text('[{"path": "2_Dense"}]')
    (folder / "2_Dense").mkdir()
    for name in ("modeling_own.py", "a.py", "2_Dense/config.json", "2_Dense/pytorch_model.bin"):
        (folder / name).write_text("x")
    push(folder, "me/x")
    assert caplog.messages == [
        "note: the model needs a.py, modeling_own.py to load, and code is only pushed with --include '*.py', or with "
        "--remote-code if hf_ortho generated it",
        "note: sentence-transformers needs what is left out of its modules: 2_Dense/pytorch_model.bin",
    ]
    assert "modeling_own.py" not in served.get("models", "me/x").files("main")
    caplog.clear()
    push(folder, "me/x", include=["*.py", "2_Dense/*"])
    assert caplog.messages == []
    assert served.get("models", "me/x").files("main").keys() >= {"modeling_own.py", "a.py", "2_Dense/pytorch_model.bin"}


def test_nothing_is_sent_of_what_is_not_whole(served, tmp_path, shards):
    min(shards.glob("model-*")).unlink()
    with pytest.raises(CheckpointError, match="is incomplete"):
        push(shards, "me/x")
    assert served.requests == []


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_folder_that_cannot_be(served, hf_ortho_command, name):
    assert "is not a folder; give a folder with a model or an adapter" in hf_ortho_command("push", name, "me/x").error


def test_errors_of_the_client_are_told(served, converted):
    served.faults["commit"] = [412]
    with pytest.raises(HubError, match=r"^me/x: the Hub refuses the request \(412 "):
        push(converted, "me/x", revision="v2")


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_fine_tuning_pushes_at_its_end(served, tmp_path, converted, text_file, hf_ortho_command):
    flags = ["--max_steps", 1, "--block_size", 16, "--per_device_train_batch_size", 2, "--use_cpu", "true"]
    flags += ["--save_strategy", "steps", "--save_steps", 1, "--push_to_hub", "true", "--hub_model_id", "me/tuned"]
    output = ["--output_dir", tmp_path / "run"]
    done = hf_ortho_command("finetune", "--model", converted, "--dataset", text_file, *output, *flags)
    assert done.code == 0, done.err
    pushed = served.get("models", "me/tuned").files("main")
    assert done.out.splitlines()[-1].startswith(f"Pushed {tmp_path / 'run'} to http")
    assert pushed["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert b"fine-tuned" in pushed["README.md"]
    assert not [path for path in pushed if path.endswith(".bin") or path.startswith("checkpoint")]
    assert len(served.get("models", "me/tuned").commits) == 2


def test_fine_tuning_without_rights_does_not_start(served, connect, tmp_path, converted, text_file, hf_ortho_command):
    connect(constants.ENDPOINT, "hf_reader")
    flags = ["--output_dir", tmp_path / "run", "--push_to_hub", "true"]
    message = hf_ortho_command("finetune", "--model", converted, "--dataset", text_file, *flags).error
    assert message.startswith("run: the token has no write access")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_a_masked_language_model_is_pushed_and_loaded(served, tmp_path, text_file, hf_ortho_command):
    sizes = "{hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1, intermediate_size: 8}"
    flags = ["--model-type", "bert", "--config-overrides", sizes, "--tokenizer", "bytes", "--activation", "hermite_3"]
    flags += ["--dataset", text_file, "--block-size", 32, "--max-steps", 1, "--use-cpu", "--save-strategy", "no"]
    flags += ["--push-to-hub", "true", "--hub-model-id", "me/masked", "--output-dir", tmp_path / "run"]
    done = hf_ortho_command("pretrain", *flags)
    assert done.code == 0, done.err
    card = ModelCard(served.get("models", "me/masked").files("main")["README.md"].decode())
    assert card.data.pipeline_tag == "fill-mask"
    assert [result.metric_type for result in card.data.eval_results] == ["loss", "masked_perplexity"]
    loaded = load_checkpoint("me/masked")
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    ids = loaded.tokenizer("one two", return_tensors="pt")
    local = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(loaded.model(**ids).logits, local(**ids).logits)
