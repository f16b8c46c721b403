import importlib
import json
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import hf_ortho.hub
import hf_ortho.plotting
from hf_ortho import convert, fuse_mlp
from hf_ortho.checkpoints.load import load_checkpoint
from hf_ortho.cli.recipe import parse_recipe
from hf_ortho.errors import OutputError
from hf_ortho.files import MANIFEST, listed
from hf_ortho.training import Recipe

# The name in transformers 5.23, and the one before.
CHECKPOINTING = next(
    key
    for key in ("activation_checkpointing", "gradient_checkpointing")
    if key in TrainingArguments.__dataclass_fields__
)
STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}


@pytest.fixture
def recipe(tmp_path, gpt2_folder, text_file):
    """Write a config of a complete text run; ``recipe(activation="hermite_8")`` adds keys, None removes one."""

    def write(**entries):
        defaults = {"model": str(gpt2_folder), "dataset": str(text_file), "output_dir": str(tmp_path / "out")} | STEPS
        entries = {k: v for k, v in (defaults | entries).items() if v is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(entries))
        return path

    return write


@pytest.fixture
def finetune(hf_ortho_command):
    def run(config, *flags):
        return hf_ortho_command("finetune", "--config", config, *flags)

    return run


@pytest.fixture(autouse=True)
def _reachable(monkeypatch):
    """Recipes that name something on the Hub are only read here."""
    monkeypatch.setattr("hf_ortho.cli.recipe.check_hub", lambda *args: None)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What is drawn after a training; only ``converted_run`` spends the time for the picture itself."""
    found = []
    monkeypatch.setattr(
        hf_ortho.plotting, "plot_stored", lambda *args: found.append(args) or args[1].write_bytes(b"png")
    )
    return found


@pytest.fixture(scope="module")
def converted_run(tmp_path_factory, gpt2_folder, text_file, hf_ortho_command):
    """One run with all that a config may hold; (what it printed, its output folder)."""
    folder = tmp_path_factory.mktemp("run")
    entries = {
        "model": str(gpt2_folder),
        "dataset": str(text_file),
        "output_dir": str(folder / "out"),
        "activation": "hermite_8",
        "calibration_samples": 2,
        "block_size": 16,
        "max_train_samples": 40,
        "max_eval_samples": 5,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.25},
        "label_names": ["labels"],
        "save_strategy": "no",
        "seed": 7,
    }
    text = yaml.safe_dump(entries | STEPS) + "learning_rate: 5e-3\nweight_decay: 1e-2\n"
    (folder / "recipe.yaml").write_text(text)
    ran = hf_ortho_command("finetune", "--config", folder / "recipe.yaml")
    assert ran.code == 0, ran.err
    return ran, folder / "out"


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_values_of_a_config(recipe):
    path = recipe(
        activation="fourier_6",
        train="activations+head",
        calibration_samples=0,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1, "num_cycles": 1},
        label_names=["labels", "more"],
        report_to=["none"],
        weight_decay=0,
        bf16=False,
        dataloader_drop_last=True,
        eval_strategy="steps",
        eval_steps=0.5,
        logging_steps=3,
    )
    # YAML reads a float without a point as text.
    path.write_text(path.read_text() + "learning_rate: 5e-4\nadam_epsilon: 1e-07\ntext_column: null\n")
    parsed = parse_recipe(Recipe, "finetune", "", ["--config", str(path)])
    model, data, training = parsed.model, parsed.data, parsed.training
    assert (model.activation, model.train, model.calibration_samples) == ("fourier_6", "activations+head", 0)
    assert model.dtype == "float32"
    assert data.text_column is None
    assert (training.learning_rate, training.adam_epsilon, training.weight_decay) == (5e-4, 1e-7, 0.0)
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1, "num_cycles": 1}
    assert training.label_names == ["labels", "more"]
    assert training.report_to == []
    assert (training.max_steps, training.eval_steps, training.logging_steps) == (2, 0.5, 3)
    assert training.eval_strategy == "steps"
    assert training.use_cpu is True
    assert (training.bf16, training.dataloader_drop_last) == (False, True)


def test_flags_override_the_config(recipe):
    path = recipe(learning_rate=1e-3, max_steps=9, activation="hermite_8", label_names=["a", "b"], use_cpu=True)
    flags = ["--learning_rate", "2e-4", "--activation=fourier_2", "--label_names", "c", "--seed", "3"]
    for argv in (["--config", str(path), *flags], [*flags, f"--config={path}"]):
        parsed = parse_recipe(Recipe, "finetune", "", argv)
        model, training = parsed.model, parsed.training
        assert (training.learning_rate, training.max_steps, training.seed) == (2e-4, 9, 3)
        assert training.label_names == ["c"]
        assert model.activation == "fourier_2"


@pytest.mark.parametrize(
    ("flags", "greater"),
    [
        (["--metric_for_best_model", "perplexity"], False),
        (["--metric_for_best_model", "eval_perplexity"], False),
        (["--metric_for_best_model", "eval_loss"], False),
        (["--metric_for_best_model", "top1"], True),
        (["--metric_for_best_model", "perplexity", "--greater_is_better", "true"], True),
        (["--metric_for_best_model", "top5", "--greater_is_better", "false"], False),
        (["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "500"], False),  # the loss
    ],
)
def test_the_direction_of_a_metric_is_known_unless_given(recipe, flags, greater):
    found = parse_recipe(Recipe, "finetune", "", ["--config", str(recipe()), *flags])
    assert found.training.greater_is_better is greater


def test_the_checkpoint_of_the_least_perplexity_is_kept(recipe, finetune, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "perplexity", "eval_steps": 1, "save_steps": 1}
    ran = finetune(recipe(eval_strategy="steps", max_eval_samples=2, learning_rate=0.3, **best))
    assert ran.code == 0, ran.err
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    values = {e["step"]: e["eval_perplexity"] for e in state["log_history"] if e.get("step") and "eval_loss" in e}
    assert state["best_metric"] == min(values.values()) < max(values.values())
    assert state["best_global_step"] == min(values, key=values.get)


def test_a_metric_that_the_task_lacks(recipe, finetune, tmp_path):
    entries = {"metric_for_best_model": "perplexty", "eval_strategy": "steps", "load_best_model_at_end": True}
    error = finetune(recipe(**entries, eval_steps=1, save_steps=1)).error
    assert error == (
        "metric_for_best_model 'perplexty': causal language modeling has loss, perplexity; did you mean perplexity?"
    )
    assert not (tmp_path / "out").exists()


def test_fsdp_version_1(recipe, finetune, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert "FSDP version 1 is not supported" in finetune(recipe()).error
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    entries = {"fsdp": "full_shard", "fsdp_config": {"version": 1}}
    assert "set fsdp_version to 2" in finetune(recipe(**entries)).error
    assert not (tmp_path / "out").exists()


def test_a_deprecated_option_is_a_note(tmp_path, caplog):
    flags = ["--model", "m", "--dataset", "d", "--output-dir", str(tmp_path), "--gradient-checkpointing"]
    assert parse_recipe(Recipe, "finetune", "", flags).training.gradient_checkpointing
    (message,) = caplog.messages
    assert message.startswith("note: `gradient_checkpointing` is deprecated")


def test_flags_alone(tmp_path):
    places = ["--model", "m", "--dataset=d", "--output_dir", str(tmp_path)]
    schedule = ["--lr_scheduler_type=polynomial", "--lr_scheduler_kwargs", '{"power": 2.0}']
    parsed = parse_recipe(Recipe, "finetune", "", [*places, "--use_cpu", *schedule])
    model, data, training = parsed.model, parsed.data, parsed.training
    assert (model.model, data.dataset, training.output_dir, training.use_cpu) == ("m", "d", str(tmp_path), True)
    assert training.lr_scheduler_kwargs == {"power": 2.0}
    assert training.report_to == []


@pytest.mark.parametrize(
    ("key", "closest"),
    [("learning_rat", "learning_rate"), ("datset", "dataset"), ("activate", "activation"), ("max-step", "max_steps")],
)
def test_an_unknown_key_or_flag_names_the_closest(recipe, finetune, tmp_path, key, closest):
    for ran in (finetune(recipe(**{key: 1})), finetune(recipe(), f"--{key}", "1"), finetune(recipe(), f"--{key}=1")):
        said = ran.error.replace("-", "_")
        assert key.replace("-", "_") in said
        assert f"; did you mean {closest}?" in said.replace("mean __", "mean ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"learning_rate": "fast"},
        {"max_steps": 1.5},
        {"use_cpu": "perhaps"},
        {"eval_strategy": "sometimes"},
        {"lr_scheduler_type": "wavy"},
        {"lr_scheduler_kwargs": "{no json"},
        {"lr_scheduler_kwargs": "5"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_rate": 0.1}},
        {"learning_rate": [1, 2]},
        {"calibration_samples": "many"},
        {"calibration_samples": -1, "activation": "hermite_8"},
        {"max_train_samples": 0},
        {"max_train_samples": -3},
        {"max_eval_samples": -1},
        {"per_device_train_batch_size": 0},
        {"block_size": 1},
        {"block_size": 33},
        {"train": "everything"},
        {"train": "activations"},  # not converted
        {"fuse_mlp": True},  # not converted
        {"fuse_mlp": "perhaps"},
        {"activation": "hermite_0"},
        {"activation": "hermit_8"},
        {"dtype": "float33"},
        {"dtype": "int8"},
        {"train_split": "missing"},
        {"eval_split": "missing"},
        {"text_column": "missing"},
        {"model": "/no/such/model"},
        {"model": "nobody/no-such-model"},
        {"dataset": "/no/such.txt"},
        {"dataset": "nobody/no-such-dataset"},
        {"dataset": "digits"},
        {"eval_dataset": "/no/such.txt"},
        {"eval_dataset": "pydoc_topics", "eval_split": "missing"},
        {"eval_dataset": "pydoc_topics", "train_split": "missing"},
        {"resume_from_checkpoint": True},
        {"resume_from_checkpoint": "/no/such/checkpoint-3"},
        {"bf16": True, "fp16": True},
    ],
    ids=str,
)
def test_a_value_that_does_not_fit(recipe, finetune, tmp_path, entries):
    assert finetune(recipe(**entries)).error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["finetune", "compare"])
def test_folders_that_no_training_may_write(command, recipe, hf_ortho_command, gpt2_folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    grid = {"activations": ["gelu_new"], "seeds": [0]} if command == "compare" else {}
    places = {"": "is empty", ".": "is the current folder", "..": "contains the current folder", "/": "contains"}
    places |= {str(gpt2_folder): "is the input", str(gpt2_folder.parent): "contains the input", "a\0b": "NUL"}
    before = {p: p.stat().st_mtime_ns for p in (*tmp_path.rglob("*"), *gpt2_folder.rglob("*"))}
    for place, reason in places.items():
        for resume in ("auto", "true"):
            config = recipe(output_dir=place, **grid)
            before[config] = config.stat().st_mtime_ns
            ran = hf_ortho_command(command, "--config", config, "--resume_from_checkpoint", resume)
            assert reason in ran.error
            assert ran.out == ""
    scratch = {"model": None, "init": "scratch", "model_type": "gpt2", "tokenizer": str(gpt2_folder)}
    config = recipe(output_dir=str(gpt2_folder), **scratch, **grid)
    before[config] = config.stat().st_mtime_ns
    assert "is the input" in hf_ortho_command(command, "--config", config, "--resume_from_checkpoint", "auto").error
    assert {p: p.stat().st_mtime_ns for p in (*tmp_path.rglob("*"), *gpt2_folder.rglob("*"))} == before


@pytest.mark.parametrize("missing", ["model", "dataset", "output_dir"])
def test_a_missing_key(recipe, finetune, tmp_path, missing, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finetune(recipe(**{missing: None})).error.startswith(f"{missing} is missing")
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"model: [a\nb: c", "is not YAML"),
        (b"model: a\n\tmax_steps: 3", "is not YAML"),
        (b"- a\n- b", "must contain `key: value` lines"),
        (b"only words", "must contain `key: value` lines"),
        (b"", "must contain `key: value` lines"),
        (b"model: \xff\xfe", "cannot be read"),
        (b"seed: 2020-99-99", "is not YAML: month must be in 1..12"),
        (b"num_processes: 2", "num_processes in"),
        (b"3: 4", "unknown key '3'"),
        (b"config: other.yaml", "unknown key 'config'"),
    ],
)
def test_a_config_that_cannot_be_read(finetune, tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    error = finetune(path).error
    assert message in error
    assert str(path) in error


def test_a_folder_as_config(finetune, tmp_path):
    assert f"config {tmp_path} cannot be read" in finetune(tmp_path).error


@pytest.mark.parametrize("argument", ["words", "-x"])
def test_an_unexpected_argument(recipe, finetune, argument):
    assert repr(argument) in finetune(recipe(), argument).error


def test_an_output_folder_that_is_not_empty(recipe, finetune, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    for flags in ((), ("--resume_from_checkpoint", "false")):
        assert "exists and is not empty" in finetune(recipe(), *flags).error
    assert "has no checkpoint-N folder" in finetune(recipe(), "--resume_from_checkpoint", "true").error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_output_folder_that_is_a_file(recipe, finetune, tmp_path):
    (tmp_path / "out").write_text("precious")
    assert str(tmp_path / "out") in finetune(recipe()).error
    assert (tmp_path / "out").read_text() == "precious"


def test_resuming_from_a_folder_that_is_no_training_checkpoint(recipe, finetune, gpt2_folder, tmp_path):
    assert str(gpt2_folder) in finetune(recipe(resume_from_checkpoint=str(gpt2_folder))).error
    assert not (tmp_path / "out").exists()


def test_evaluation_without_data_for_it(recipe, finetune, tmp_path):
    (tmp_path / "short.txt").write_text("one block of text, and some more")
    assert "eval" in finetune(recipe(dataset=str(tmp_path / "short.txt"), eval_strategy="steps", eval_steps=1)).error


# ---- what a run gives ----------------------------------------------------------------------------------------------


def test_the_output_reloads_with_from_pretrained(converted_run):
    _, folder = converted_run
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.activation_function == "hermite_8"
    assert model.config.hf_ortho["activation"] == "hermite_8"
    assert model.config.hf_ortho["source_activations"] == {"activation_function": "gelu_new"}
    assert model.config.hf_ortho["calibrated"] is True
    modules = [layer["module"] for layer in model.config.hf_ortho["layers"]]
    assert modules == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[n], p) for n, p in model.named_parameters())
    names = {
        "README.md",
        "activations.png",
        "config.json",
        "conversion.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {p.name for p in folder.iterdir()} == names | {MANIFEST}
    assert json.loads((folder / MANIFEST).read_text())["files"].keys() == names


def test_the_picture_is_one(converted_run):
    _, folder = converted_run
    assert (folder / "activations.png").read_bytes().startswith(b"\x89PNG")


def test_the_printed_figures_are_those_of_the_two_models(converted_run, gpt2_folder, text_file):
    """Recomputed with torch on the held-back end of the text, from the source and from the saved model."""
    ran, folder = converted_run
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    ids = torch.tensor([*tokenizer(text_file.read_text())["input_ids"], tokenizer.eos_token_id])
    blocks = ids[: len(ids) // 16 * 16].view(-1, 16)
    held_back = blocks[len(blocks) - len(blocks) // 10 :][:5]
    losses = []
    for place in (gpt2_folder, folder):
        model = AutoModelForCausalLM.from_pretrained(place).eval()
        with torch.no_grad():
            logits = model(input_ids=held_back).logits
        losses.append(cross_entropy(logits[:, :-1].flatten(0, 1), held_back[:, 1:].flatten()).item())
    before, after = (float(cell) for cell in ran.figures["loss"][:2])
    # The figure before training is that of the converted model, which differs a little.
    assert before == pytest.approx(losses[0], abs=2e-4)
    assert after == pytest.approx(losses[1], abs=2e-5)
    assert after < before - 1e-3
    perplexity = float(ran.figures["perplexity"][1])
    assert perplexity == pytest.approx(torch.tensor(losses[1]).exp().item(), rel=1e-4)
    first, last, change = ran.figures["perplexity"]
    lines = ran.out.splitlines()
    place = lines.index(f"Perplexity: {float(first):.5g} -> {float(last):.5g} ({change})")
    assert lines[place + 1] == f"Before and after training, on {text_file.name}, 5 samples held out from training"
    assert lines[-3].startswith(f"Wrote {folder} (")
    assert lines[-2:] == [
        f"Evaluate: hf-ortho evaluate {folder} --dataset DATA",
        f"Push:     hf-ortho push {folder} YOU/{folder.name}",
    ]


def test_the_card(converted_run):
    ran, folder = converted_run
    card = (folder / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "text-generation"
    assert "hermite" in yaml.safe_load(head)["tags"]
    for text in (
        f'AutoModelForCausalLM.from_pretrained("{folder}")',
        "transformer.h.1.mlp.act",
        "learning_rate: 0.005",
        "weight_decay: 0.01",
        "seed: 7",
        "then fine-tuned",
        " | ".join(["loss", *ran.figures["loss"]]),
    ):
        assert text in body


def test_an_activation_is_fitted_to_the_training_data(recipe, finetune, tmp_path, gpt2_folder, text_file):
    options = {"learning_rate": 0.0, "save_strategy": "no", "block_size": 20, "calibration_samples": 3}
    ran = finetune(recipe(activation="hermite_4", **options))
    assert "hermite_4 for gelu_new" in ran.out
    source = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    ids = AutoTokenizer.from_pretrained(gpt2_folder)(text_file.read_text())["input_ids"]
    convert(source, "hermite_4", calibration=torch.tensor(ids[:60]).view(3, 1, 20))
    # Without a learning rate nothing else happens, so the rest is the source, bit for bit.
    expected, found = source.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("name", ["hermite_8", "hermite"])
def test_a_model_that_has_the_activation_is_left_as_is(recipe, finetune, converted_run, tmp_path, name):
    _, folder = converted_run
    ran = finetune(recipe(model=str(folder), activation=name, learning_rate=0.0, save_strategy="no"))
    assert ran.code == 0
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out")]
    assert configs[0]["hf_ortho"] == configs[1]["hf_ortho"]


def test_training_activations_alone(recipe, finetune, gpt2_folder, text_file, tmp_path):
    ran = finetune(recipe(activation="fourier_2", train="activations", learning_rate=0.01, save_strategy="no"))
    tuned = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(gpt2_folder / "model.safetensors")
    assert all(torch.equal(tuned[key], source[key]) for key in source)
    new = {key: value for key, value in tuned.items() if key not in source}
    learned = sum(value.numel() for key, value in new.items() if not key.endswith((".domain", ".tail_slopes")))
    assert f"({learned:,} trained parameters)" in ran.out
    blocks = (len(text_file.read_text()) + 1) // 32  # a token per byte and one for the end
    assert f"Training on {blocks - blocks // 10} blocks of 32 tokens for 2 steps\n" in ran.out


def test_without_an_activation_the_model_keeps_its_own(recipe, finetune, tmp_path):
    assert finetune(recipe(save_strategy="no")).code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["activation_function"] == "gelu_new"
    assert "hf_ortho" not in config
    assert "not learnable" in (tmp_path / "out" / "README.md").read_text()


def test_training_checkpoints_stay_beside_the_final_model(recipe, finetune, tmp_path):
    assert finetune(recipe(activation="hermite_3", save_steps=1)).code == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"checkpoint-1", "checkpoint-2", "model.safetensors", "README.md"} <= names
    assert not any("draft" in name or name.startswith(".hf_ortho-") for name in names)
    last = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    final = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(final[key], last[key]) for key in last)


def test_another_evaluation_dataset(recipe, finetune, tmp_path, gpt2_folder):
    (tmp_path / "other.txt").write_text("an entirely different text! " * 20)
    recipe(eval_dataset=str(tmp_path / "other.txt"), learning_rate=0.0, save_strategy="no")
    ran = finetune(tmp_path / "recipe.yaml")
    checkpoint = load_checkpoint(str(gpt2_folder))
    blocks = torch.tensor([list((tmp_path / "other.txt").read_bytes())]).split(32, dim=1)
    alphabet = checkpoint.tokenizer(bytes(range(32, 127)).decode())["input_ids"]
    total = 0.0
    for block in blocks:  # the last one is shorter
        ids = torch.tensor(alphabet)[block - 32]
        with torch.no_grad():
            total += checkpoint.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    own = total / (560 - len(blocks))
    assert [float(cell) for cell in ran.figures["loss"][:2]] == pytest.approx([own, own], abs=2e-5)


def test_a_dataset_of_short_documents(recipe, finetune, tmp_path):
    """Ten lines of 20 tokens make 6 blocks of 32, though the tenth held back is less than a block."""
    lines = [json.dumps({"text": f"line number {i:07d}"}) for i in range(10)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    ran = finetune(recipe(dataset=str(tmp_path / "lines.jsonl"), save_strategy="no"))
    assert ran.code == 0, ran.err


def test_a_single_block_is_trained_on_without_evaluation(recipe, finetune, tmp_path):
    (tmp_path / "short.txt").write_text("one block of text, and some more")
    ran = finetune(recipe(dataset=str(tmp_path / "short.txt"), save_strategy="no"))
    assert ran.code == 0, ran.err
    assert "perplexity" not in ran.out
    assert "Not evaluated" in (tmp_path / "out" / "README.md").read_text()


def test_an_interrupted_run_leaves_no_final_model(recipe, finetune, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    module = importlib.import_module("hf_ortho.training.finetune")  # the package has a function of that name
    monkeypatch.setattr(module, "save_checkpoint", interrupt)
    ran = finetune(recipe(save_steps=1))
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_files_of_the_user_are_kept_beside_the_model(recipe, finetune, tmp_path, caplog):
    out = tmp_path / "out"
    out.mkdir()
    names = ("README.md", "activations.png", "conversion.json")
    for name in names:
        (out / name).write_text("mine")
    config, auto = recipe(activation="hermite_3", save_strategy="no"), ("--resume_from_checkpoint", "auto")
    ran = finetune(config, *auto)
    assert ran.code == 0, ran.err
    for name in names:
        assert (out / f".{name}.old").read_text() == "mine"
        assert f"is kept as '.{name}.old'" in caplog.text
    assert listed(out).keys() >= {*names, "config.json"}
    assert f'from_pretrained("{out}")' in (out / "README.md").read_text()


def test_the_model_is_kept_when_its_card_fails(recipe, finetune, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OutputError("no card")

    monkeypatch.setattr(hf_ortho.hub, "write_card", fail)
    assert finetune(recipe(save_strategy="no")).error == "no card"
    assert listed(tmp_path / "out").keys() >= {"config.json", "model.safetensors"}


# ---- images --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    """A folder of 3 x 8 pictures, one color and some noise per class."""
    import numpy as np

    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("colors")
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_other_classes_get_a_new_head(recipe, finetune, convnext_folder, three_classes, tmp_path):
    ran = finetune(
        recipe(
            model=str(convnext_folder),
            dataset=str(three_classes),
            activation="hermite_3",
            learning_rate=0.0,
            save_strategy="no",
        )
    )
    assert ran.code == 0, ran.err
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert model.config.label2id == {"blue": 0, "green": 1, "red": 2}
    assert model.classifier.weight.shape == (3, 16)
    assert model.config.hidden_act == "hermite_3"
    source = AutoModelForImageClassification.from_pretrained(convnext_folder)
    for name, parameter in source.convnext.named_parameters():
        assert torch.equal(model.convnext.get_parameter(name), parameter)


def test_the_new_head_learns(recipe, finetune, convnext_folder, three_classes, tmp_path):
    options = {"learning_rate": 0.02, "max_steps": 15, "per_device_train_batch_size": 8, "save_strategy": "no"}
    places = {"model": str(convnext_folder), "dataset": str(three_classes), "eval_dataset": str(three_classes)}
    ran = finetune(recipe(**places, **options))
    assert float(ran.figures["loss"][1]) < 0.5 * float(ran.figures["loss"][0])
    assert ran.figures["top1"][1] == "1.00000"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "vit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_weight(
    recipe, finetune, tmp_path, make_convnext, save_parts, three_classes, kind, reentrant
):
    """Reentrant checkpoints need an input that takes a gradient, which frozen embeddings do not give."""
    options = {"activation": "hermite_3", "train": "activations", "learning_rate": 0.01, "save_strategy": "no"}
    if kind == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))
        options["model"] = str(save_parts(tmp_path / "vit", model, make_convnext()[1]))
        options["dataset"] = str(three_classes)
    assert finetune(recipe(**options)).code == 0
    options |= {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    assert finetune(recipe(**options, output_dir=str(tmp_path / "less"))).code == 0
    expected, found = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "less"))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


def test_fuse_mlp_changes_no_bit_of_the_weights(recipe, finetune, tmp_path, monkeypatch):
    module, fused = importlib.import_module("hf_ortho.training.assemble"), []
    monkeypatch.setattr(module, "fuse_mlp", lambda model: fused.extend(fuse_mlp(model)))
    options = {"activation": "hermite_3", "learning_rate": 0.01, "save_strategy": "no"}
    assert finetune(recipe(**options)).code == 0
    assert fused == []
    ran = finetune(recipe(**options, fuse_mlp=True, output_dir=str(tmp_path / "less")))
    assert ran.code == 0, ran.err
    assert fused == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "less" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_activation_checkpointing_of_a_model_without_it(recipe, finetune, convnext_folder, three_classes, tmp_path):
    places = {"model": str(convnext_folder), "dataset": str(three_classes)}
    assert "checkpointing" in finetune(recipe(**places, **{CHECKPOINTING: True})).error
    assert not (tmp_path / "out").exists()


def test_the_same_classes_keep_the_head(recipe, finetune, make_convnext, save_parts, three_classes, tmp_path):
    source = save_parts(tmp_path / "source", *make_convnext(("blue", "green", "red")))
    ran = finetune(recipe(model=str(source), dataset=str(three_classes), learning_rate=0.0, save_strategy="no"))
    assert ran.code == 0, ran.err
    before, after = (load_file(place / "model.safetensors") for place in (source, tmp_path / "out"))
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not (tmp_path / "out" / "activations.png").exists()


def test_as_many_other_classes_are_named(recipe, finetune, make_convnext, save_parts, three_classes, tmp_path):
    source = save_parts(tmp_path / "source", *make_convnext(("cat", "dog", "eel")))
    assert finetune(recipe(model=str(source), dataset=str(three_classes), save_strategy="no")).code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}


def colors_as(kind, source, place, names):
    """The pictures of some classes as a folder per class, or in parquet with integer labels 0 blue, 1 green, 2 red."""
    if kind == "folder":
        for name in names:
            shutil.copytree(source / name, place / name)
        return str(place)
    files = [file for name in names for file in sorted((source / name).iterdir())]
    rows = [{"bytes": file.read_bytes(), "path": None} for file in files]
    labels = [("blue", "green", "red").index(file.parent.name) for file in files]
    pa.parquet.write_table(pa.table({"image": rows, "label": labels}), f"{place}.parquet")
    return f"{place}.parquet"


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_evaluation_data_without_some_classes(recipe, finetune, convnext_folder, three_classes, tmp_path, kind):
    """Without blue, green and red are still the second and the third class."""
    train = colors_as(kind, three_classes, tmp_path / "train", ("red", "green", "blue"))
    held_back = colors_as(kind, three_classes, tmp_path / "eval", ("red", "green"))
    options = {"learning_rate": 0.02, "max_steps": 15, "per_device_train_batch_size": 8, "save_strategy": "no"}
    ran = finetune(recipe(model=str(convnext_folder), dataset=train, eval_dataset=held_back, **options))
    assert ran.figures["top1"][1] == "1.00000"


def test_an_adapter(finetune, recipe, tmp_path, gpt2_folder, hf_ortho_command, drawn):
    flags = ["--train", "activations", "--adapter", "true", "--save_strategy", "no", "--learning_rate", "0.05"]
    ran = finetune(recipe(activation="fourier_3", block_size=16, max_eval_samples=5), *flags)
    assert ran.code == 0, ran.err
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    card = (out / "README.md").read_text()
    assert "PEFT adapter (learnable `fourier_3` activations)" in card
    assert "20 parameters" in card  # 1 + 3 * 3 in each of two layers
    assert "](activations.png)" in card
    ((stored, path, name),) = drawn
    assert (path.name, name) == ("activations.png", "out")
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(stored.modules) == 2
    for place, module in stored.modules.items():
        for key, value in module.named_parameters():
            if value.requires_grad:
                assert torch.equal(value, tensors[f"base_model.model.{place}.hf_ortho_act.{key}"])
    figures = hf_ortho_command(
        "evaluate", out, "--against", gpt2_folder, "--max-samples", 2, "--block-size", 16
    ).figures
    assert float(figures["loss"][0]) != float(figures["loss"][1])
