"""The steps of ``hf-ortho demo``: pretrain a small model with GELU, convert it, fine-tune both, save, reload, plot."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import TrainingArguments, set_seed
from transformers.activations import ACT2FN

from ..checkpoints.load import Checkpoint, save_checkpoint
from ..checkpoints.verify import example_inputs, fingerprint, outputs, verify_reload
from ..conversion import ConversionReport, collect, convert
from ..files import MANIFEST
from ..folders import OutputFolder
from ..hub import DataSource, Results, TrainingDetails, hardware, write_card
from ..plotting import Panel, plot_activations
from ..tasks import head_of
from ..tasks.samples import batches
from ..text import change
from ..training.evaluation import evaluate_model, make_trainer
from .console import console, show_report, table
from .demo_tasks import DemoTask
from .progress import trainer_progress

CALIBRATION_BATCHES = 16


def train(checkpoint: Checkpoint, task: DemoTask, dataset: Dataset, steps: int, rate: float, seed: int, title: str):
    """Train in place with Trainer; returns the training arguments."""
    with tempfile.TemporaryDirectory(prefix="hf_ortho.") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=task.batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            weight_decay=0.1,
            seed=seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = make_trainer(checkpoint, arguments, dataset)
        trainer.add_callback(trainer_progress(title))
        trainer.train()
    return arguments


def pretrain(task: DemoTask, steps: int, seed: int) -> tuple[Checkpoint, Dataset, Dataset]:
    set_seed(seed)
    checkpoint = task.build()
    dataset, held_back = task.datasets(checkpoint)
    title = f"Training with {_source(checkpoint)} on {task.dataset}"
    train(checkpoint, task, dataset, steps, task.learning_rate, seed, title)
    return checkpoint, dataset, held_back


def _source(checkpoint: Checkpoint) -> str:
    config = checkpoint.model.config
    return getattr(config, "activation_function", None) or config.hidden_act


def calibration(task: DemoTask, dataset: Dataset) -> list[dict]:
    return batches(dataset, CALIBRATION_BATCHES * task.calibration_batch, task.calibration_batch)


def tell_story(
    task: DemoTask, name: str, output: OutputFolder, steps: int, tune_steps: int, seed: int, command: str
) -> None:
    start = time.perf_counter()
    console.rule("1. A pretrained checkpoint", align="left")
    original, dataset, held_back = pretrain(task, steps, seed)
    source = _source(original)
    original.model.eval()
    at_first = evaluate_model(original, held_back)
    table(f"on {len(held_back)} held-out samples", ["", source], [[k, f"{v:.5f}"] for k, v in at_first.items()])

    console.rule(f"2. Convert it to {name}", align="left")
    converted = dataclasses.replace(original, model=copy.deepcopy(original.model))
    with console.status("Calibrating and fitting"):
        report = convert(converted.model, name, calibration=calibration(task, dataset))
    show_report(report)
    at_once = evaluate_model(converted, held_back)
    rows = [
        [key, f"{value:.5f}", f"{at_once[key]:.5f}", change(value, at_once[key])] for key, value in at_first.items()
    ]
    table("before any fine-tuning", ["", source, name, "change"], rows)

    console.rule("3. Fine-tune both: same steps, data and seed", align="left")
    tuned, arguments = {}, None
    for title, checkpoint in ((source, original), (name, converted)):
        set_seed(seed + 1)
        rate = task.tune_learning_rate
        arguments = train(checkpoint, task, dataset, tune_steps, rate, seed + 1, f"Fine-tuning with {title}")
        tuned[title] = evaluate_model(checkpoint, held_back)
    rows = [
        [key, f"{value:.5f}", f"{tuned[name][key]:.5f}", change(value, tuned[name][key])]
        for key, value in tuned[source].items()
    ]
    table("after fine-tuning", ["", source, name, "difference"], rows)

    console.rule("4. Save and reload with plain from_pretrained", align="left")
    inputs = example_inputs(converted.model)
    expected = outputs(converted.model, inputs)
    with output.writing() as draft:
        save_checkpoint(converted, draft)
        draw(converted, report, dataset, task, draft / "activations.png", source)
        stages = (source, at_first), (f"{source}, fine-tuned", tuned[source]), (f"{name}, converted", at_once)
        values = dict([*stages, (f"{name}, fine-tuned", tuned[name])])
        samples = DataSource(task.dataset, split="validation", samples=len(held_back))
        write_card(
            draft,
            place=output.name,
            report=report,
            results=[Results(values, samples, command, hardware(), seed, kind="training")],
            data=[DataSource(task.dataset, split="train", samples=len(dataset))],
            command=command,
            training=TrainingDetails(arguments),
        )
    auto = getattr(transformers, head_of(converted.model).auto_class)
    equal = verify_reload(auto, output.path, fingerprint(converted.model), inputs, expected)
    console.print(f"{auto.__name__}.from_pretrained({output.name!r}): logits bit-equal: {equal}")
    reloaded = auto.from_pretrained(output.path)
    if converted.tokenizer is not None:
        console.print(f"Generated text: {generate(reloaded, converted.tokenizer, seed)!r}")
    files = ", ".join(sorted(p.name for p in output.path.iterdir() if p.name != MANIFEST))
    console.print(f"Wrote {output.name}/: {files}")
    console.print(f"Done in {time.perf_counter() - start:.0f} s on {hardware()}.")


def generate(model, tokenizer, seed: int, prompt: str = "The statement ") -> str:
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    options = {"max_new_tokens": 100, "do_sample": True, "top_k": 20, "temperature": 0.7}
    ids = model.generate(**inputs, **options, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0])


def draw(checkpoint, report: ConversionReport, dataset: Dataset, task: DemoTask, path: Path, source: str) -> None:
    names = [layer.module for layer in report.layers]
    histograms = collect(checkpoint.model, names, calibration(task, dataset), weights="density")
    panels = [Panel(n, checkpoint.model.get_submodule(n), ACT2FN[source], histograms[n]) for n in names]
    plot_activations(panels, path, f"{type(checkpoint.model).__name__}: {source} and learned {report.activation}")
