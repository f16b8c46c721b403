"""The steps of ``hf-ortho demo``: a model with its own activation, converted, fine-tuned, saved and reloaded."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import TrainingArguments, set_seed

from ..checkpoints.load import Checkpoint, save_checkpoint
from ..checkpoints.verify import example_inputs, fingerprint, outputs, verify_reload
from ..conversion import ConversionReport, collect, convert
from ..conversion.report_text import fidelity_lines, headline
from ..conversion.sites import find_sites
from ..errors import ConfigError
from ..files import MANIFEST
from ..folders import OutputFolder
from ..hub import DataSource, Results, TrainingDetails, hardware, write_card
from ..plotting import Panel, plot_activations
from ..tasks import LOSS, Task, head_of, of
from ..tasks.built_in import BUILT_IN
from ..tasks.samples import batches
from ..text import change
from ..training.calibration import calibration_batches
from ..training.evaluation import evaluate_model, make_trainer
from .console import console, table
from .demo_tasks import DemoTask, block_size
from .progress import counted, evaluation_progress, trainer_log

SENTENCES = [
    ("alike", ("A cat sleeps on the sofa.", "A kitten naps on the couch.")),
    ("unlike", ("A cat sleeps on the sofa.", "The parliament passed a law.")),
]


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
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = make_trainer(checkpoint, arguments, dataset)
        trainer.add_callback(trainer_log(title))
        trainer.train()
    return arguments


def measure(checkpoint: Checkpoint, held_back: Dataset) -> dict[str, float]:
    """The metrics on the held-out samples, the loss last."""
    console.print(f"Evaluating on {len(held_back)} held-out samples")
    metrics = evaluate_model(checkpoint, held_back, callbacks=evaluation_progress())
    return {key: metrics[key] for key in sorted(metrics, key=LOSS.key.__eq__)}


def compare(title: str, names: list[str], first: dict[str, float], second: dict[str, float]) -> None:
    rows = [[k, f"{v:.5f}", f"{second[k]:.5f}", change(v, second[k])] for k, v in first.items()]
    table(title, ["", *names, "change"], rows)


def tell_story(
    task: DemoTask, name: str, output: OutputFolder, steps: int, tune_steps: int, seed: int, command: str, model: str
) -> None:
    """``model`` names the checkpoint in the output."""
    start = time.perf_counter()
    set_seed(seed)
    original = task.build()
    source = ", ".join(dict.fromkeys(site.source for site in find_sites(original.model)[0]))
    if source == name:
        raise ConfigError(f"{model} has {name} already; choose another --family or --degree")
    console.rule(f"1. {model} with {source}", align="left")
    console.print(f"{task.note}\n")
    trained = isinstance(head_of(original.model), Task)
    stages: dict[str, dict[str, float]] = {}
    names, arguments = [source, name], None
    if trained:
        dataset, held_back = task.datasets(original)
        splits = ("train", "validation") if task.dataset in BUILT_IN else (None, None)
        data = DataSource.of(dataset, task.dataset, split=splits[0])
        samples = DataSource.of(held_back, task.dataset, split=splits[1])
        if steps:
            console.print(f"Training on {task.dataset}: {steps} steps")
            train(original, task, dataset, steps, task.learning_rate, seed, "Training")
        original.model.eval()
        stages[source] = measure(original, held_back)
        rows = [[key, f"{value:.5f}"] for key, value in stages[source].items()]
        table(f"{task.dataset}, {len(held_back)} held-out samples", ["", source], rows)
        size, collate = task.calibration_batch, of(original.model).collator(original)
        seen = batches(dataset, task.calibration_batches * size, size, collate)
    else:
        size = block_size(original.model)
        seen, data = calibration_batches(original, task.dataset, samples=task.calibration_batches, block_size=size)

    console.rule(f"2. Convert it to {name}", align="left")
    converted = dataclasses.replace(original, model=copy.deepcopy(original.model))
    with counted(seen) as calibration:
        report = convert(converted.model, name, calibration=calibration)
    console.print("\n".join([*headline(report), *fidelity_lines(report)]))
    if trained:
        stages[f"{name}, converted"] = measure(converted, held_back)
        compare("Before any fine-tuning", names, *stages.values())
    elif (similar := similarities(original, converted)) is not None:
        table("Cosine similarity of the embeddings of two sentences", ["", *names], similar)

    console.rule("3. Fine-tune both: same steps, data and seed", align="left")
    if trained:
        for title, checkpoint in zip(names, (original, converted), strict=True):
            console.print(f"Fine-tuning with {title}: {tune_steps} steps")
            set_seed(seed + 1)
            rate = task.tune_learning_rate
            arguments = train(checkpoint, task, dataset, tune_steps, rate, seed + 1, "Fine-tuning")
            stages[f"{title}, fine-tuned"] = measure(checkpoint, held_back)
        compare("After fine-tuning", names, *list(stages.values())[2:])
    else:
        console.print(
            f"Skipped: {type(original.model).__name__} has no head to train; hf-ortho finetune --task adds one"
        )

    console.rule("4. Save and reload with plain from_pretrained", align="left")
    console.print(f"Writing {output.name}, and reloading it")
    inputs = example_inputs(converted.model)
    expected = outputs(converted.model, inputs)
    with output.writing() as draft:
        save_checkpoint(converted, draft)
        draw(converted, report, seen, draft / "activations.png")
        keys = list(stages)
        values = {keys[i]: stages[keys[i]] for i in (0, 2, 1, 3)} if trained else {}  # model by model
        write_card(
            draft,
            place=output.name,
            report=report,
            results=[Results(values, samples, command, hardware(), seed, kind="training")] if trained else [],
            data=[data],
            command=command,
            training=TrainingDetails(arguments),
        )
    auto = getattr(transformers, head_of(converted.model).auto_class)
    equal = verify_reload(auto, output.path, fingerprint(converted.model), inputs, expected)
    console.print(f"{auto.__name__}.from_pretrained({output.name!r}): outputs bit-equal: {equal}")
    if converted.model.can_generate() and converted.tokenizer is not None and task.prompt:
        for title, writer in ((source, original.model), (name, auto.from_pretrained(output.path))):
            console.print(f"Generated with {title}: {generate(writer, converted.tokenizer, task.prompt)!r}")
    files = ", ".join(sorted(p.name for p in output.path.iterdir() if p.name != MANIFEST))
    console.print(f"Wrote {output.name}/: {files}")
    if trained:
        key = next(iter(stages[source]))
        first, at_once, *tuned = (f"{metrics[key]:.5g}" for metrics in stages.values())
        console.print(f"Result: {key} {first} -> {at_once} by the conversion; fine-tuned: {' vs. '.join(tuned)}")
    console.print(f"Done in {time.perf_counter() - start:.0f} s on {hardware()}.")


@torch.no_grad()
def similarities(original: Checkpoint, converted: Checkpoint) -> list[list[str]] | None:
    """Rows with the cosine similarity of two sentences for each model; None for a model without embeddings of text."""
    model: Any = original.model
    if original.tokenizer is None or model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        return None
    rows, cut = [[title] for title, _ in SENTENCES], {"truncation": True, "max_length": block_size(model)}
    for checkpoint in (original, converted):
        for row, (_, pair) in zip(rows, SENTENCES, strict=True):
            inputs = (original.tokenizer(text, **cut, return_tensors="pt").to(model.device) for text in pair)
            one, other = (checkpoint.model(**each)[0].mean(1) for each in inputs)
            row.append(f"{torch.cosine_similarity(one, other).item():.5f}")
    return rows


def generate(model, tokenizer, prompt: str) -> str:
    """The most likely text after ``prompt``."""
    most = block_size(model) // 2
    inputs = tokenizer(prompt, truncation=True, max_length=most, return_tensors="pt").to(model.device)
    options = {"max_new_tokens": min(40, most), "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    ids = model.generate(**inputs, **options)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def draw(checkpoint: Checkpoint, report: ConversionReport, seen: list[dict], path: Path) -> None:
    names = [layer.module for layer in report.layers]
    histograms = collect(checkpoint.model, names, seen, weights="density")
    panels = [Panel(n, *report.modules[n][:2], histograms.get(n)) for n in names]
    plot_activations(panels, path, f"{type(checkpoint.model).__name__}: source and learned {report.activation}")
