"""Quality against bytes: the gain of each kind of adapter on a frozen pretrained model.

    python recipes/small/adapters.py --config recipes/small/adapters_text.yaml \\
        --model BASE --dataset TRAIN --eval-dataset TEST

Every run is one ``hf-ortho finetune`` with the flags of ``METHODS``, except for IA3, which peft adds to the
model. The first of ``SEEDS`` selects the learning rate of each method; the others give the results. Methods whose
groups do not divide the widths of the model are left out. Resumes after an interruption, writes ``adapters.json``,
prints a table.
"""

import json
import statistics
import sys
from pathlib import Path

from peft import IA3Config, get_peft_model

from hf_ortho import convert
from hf_ortho.checkpoints.load import load_checkpoint, save_checkpoint
from hf_ortho.cli.recipe import parse_recipe
from hf_ortho.errors import WidthError
from hf_ortho.files import written
from hf_ortho.folders import OutputFolder
from hf_ortho.training import Recipe, finetune
from hf_ortho.training.assemble import assemble, build_trainer
from hf_ortho.training.metrics import metrics_at_start, metrics_of

ACTIVATION = "hermite_8"  # of LoRA + activations
PER_CHANNEL = "hermite_3_g1024"  # of the model on text
IA3 = {"gpt2": ("c_attn", "mlp.c_proj"), "convnext": ("pwconv2",)}  # the last is the second layer of the MLP


def activations(name: str, train: str = "activations") -> dict[str, str]:
    """The flags of an adapter of activations. Those of single channels start as one fit without data."""
    start = {"calibration_samples": "0"} if name == PER_CHANNEL else {}
    return {"train": train, "adapter": "true", "activation": name} | start


# The flags and the learning rates to try.
METHODS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "activations, hermite_8": (activations("hermite_8"), ("3e-2", "1e-1")),
    "activations, hermite_8_g16": (activations("hermite_8_g16"), ("3e-2", "1e-1")),
    "activations, hermite_3_g64": (activations("hermite_3_g64"), ("3e-2", "1e-1")),
    "activations, hermite_3_g1024": (activations(PER_CHANNEL), ("3e-2", "1e-1")),
    "IA3": ({"train": "all"}, ("3e-2", "1e-1")),
    "LN-tuning": ({"train": "norms", "adapter": "true"}, ("3e-2", "1e-1")),
    "activations + norms, hermite_3_g64": (activations("hermite_3_g64", "activations+norms"), ("3e-2", "1e-1")),
    "activations + norms, hermite_3_g1024": (activations(PER_CHANNEL, "activations+norms"), ("3e-2", "1e-1")),
    "linear probe": ({"train": "head"}, ("1e-2", "3e-2")),
    "LoRA": ({"train": "lora", "adapter": "true"}, ("1e-2", "3e-2")),
    "LoRA + activations": ({"train": "lora+activations", "adapter": "true"}, ("1e-2", "3e-2")),
    "full": ({"train": "all"}, ("3e-3", "1e-2")),
}
SEEDS = 0, 1, 2


def converted(model: str, folder: Path) -> str:
    """The base model of LoRA + activations: ``model`` with learnable activations."""
    if not folder.is_dir():
        output = OutputFolder(folder, keep=[model])
        checkpoint = load_checkpoint(model, dtype="float32")
        convert(checkpoint.model, ACTIVATION)
        with output.writing() as draft:
            save_checkpoint(checkpoint, draft)
    return str(folder)


def train_ia3(recipe: Recipe, folder: Path) -> tuple[dict, dict, int]:
    """The metrics before and after, and the number of trained parameters, of an adapter that ``finetune`` lacks."""
    checkpoint, data, held_back, _ = assemble(recipe)
    targets = IA3[checkpoint.model.config.model_type]
    options = {"target_modules": list(targets), "feedforward_modules": list(targets[-1:])}
    config = IA3Config(modules_to_save=list(checkpoint.new_modules) or None, **options)
    checkpoint.model = get_peft_model(checkpoint.model, config)
    recipe.training.eval_on_start = True
    trainer, trainable = build_trainer(recipe, checkpoint, data, held_back)
    trainer.train()
    checkpoint.model.save_pretrained(folder)
    return metrics_at_start(trainer), metrics_of(trainer), trainable


def train(argv: list[str], method: str, rate: str, seed: int, output: Path) -> dict:
    """The results of one run."""
    folder = output / method.replace(" ", "") / f"{rate}-{seed}"
    own = {"learning_rate": rate, "seed": str(seed), "output_dir": str(folder), "save_strategy": "no"}
    flags = METHODS[method][0] | own
    if method == "LoRA + activations":
        base = parse_recipe(Recipe, "finetune", "", argv).model.model
        flags["model"] = converted(str(base), output / "converted")
    pairs = [part for key, value in flags.items() for part in (f"--{key}", value)]
    recipe = parse_recipe(Recipe, "finetune", "", [*argv, *pairs])
    if method == "IA3":
        before, after, trainable = train_ia3(recipe, folder)
    else:
        result = finetune(recipe)
        before, after, trainable = result.before, result.after, result.trainable
    adapter = folder / "adapter_model.safetensors"
    size = adapter.stat().st_size if adapter.is_file() else 4 * trainable
    return {"before": before, "after": after, "trainable": trainable, "bytes": size}


def main(argv: list[str]) -> None:
    output = Path(str(parse_recipe(Recipe, "finetune", "", argv).training.output_dir))
    output.mkdir(parents=True, exist_ok=True)
    record = output / "adapters.json"
    runs = json.loads(record.read_text()) if record.is_file() else {}

    def figures(method: str, rate: str, seed: int) -> dict:
        key = f"{method}, {rate}, seed {seed}"
        if key not in runs:
            runs[key] = train(argv, method, rate, seed, output)
            with written(record) as draft:
                draft.write_text(json.dumps(runs, indent=1))
            print(key, runs[key], flush=True)
        return runs[key]

    print("| | learning rate | trained parameters | bytes | before | after, ± over seeds |\n|---|---|---|---|---|---|")
    for method, (_, rates) in METHODS.items():

        def quality(found: dict) -> float:
            return found["after"].get("top1", -found["after"]["loss"])

        try:
            best = max(rates, key=lambda rate: quality(figures(method, rate, SEEDS[0])))
        except WidthError:
            continue
        found = [figures(method, best, seed) for seed in SEEDS[1:]]
        metric = "top1" if "top1" in found[0]["after"] else "loss"
        before, after = ([run[when][metric] for run in found] for when in ("before", "after"))
        spread = f"{statistics.mean(after):.4f} ± {statistics.stdev(after):.4f}"
        print(
            f"| {method} | {best} | {found[0]['trainable']:,} | {found[0]['bytes']:,} | {statistics.mean(before):.4f} "
            f"| {spread} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
