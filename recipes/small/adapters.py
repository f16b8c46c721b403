"""Quality against bytes: the gain of each kind of adapter on a frozen pretrained model.

    python recipes/small/adapters.py --config recipes/small/adapters_text.yaml \\
        --model BASE --dataset TRAIN --eval_dataset TEST

Every run is one ``hf-ortho finetune`` with the flags of ``METHODS``. The first of ``SEEDS`` selects the learning rate
of each method; the others give the results. Resumes after an interruption, writes ``adapters.json``, prints a table.
"""

import json
import statistics
import sys
from pathlib import Path

from hf_ortho import convert
from hf_ortho.checkpoints.load import load_checkpoint, save_checkpoint
from hf_ortho.cli.recipe import parse_recipe
from hf_ortho.files import written
from hf_ortho.folders import OutputFolder
from hf_ortho.training import Recipe, finetune

ACTIVATION = "hermite_8"
METHODS = {
    "linear probe": {"train": "head"},
    "activations": {"train": "activations", "adapter": "true", "activation": ACTIVATION},
    "LN-tuning": {"train": "norms", "adapter": "true"},
    "LoRA": {"train": "lora", "adapter": "true"},
    "LoRA + activations": {"train": "lora+activations", "adapter": "true"},
    "full": {"train": "all"},
}
RATES = {
    "linear probe": ("1e-2", "3e-2"),
    "activations": ("1e-2", "3e-2"),
    "LN-tuning": ("1e-2", "3e-2"),
    "LoRA": ("3e-3", "1e-2"),
    "LoRA + activations": ("3e-3", "1e-2"),
    "full": ("1e-3", "3e-3"),
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


def train(argv: list[str], method: str, rate: str, seed: int, output: Path) -> dict:
    """The results of one run."""
    folder = output / method.replace(" ", "") / f"{rate}-{seed}"
    own = {"learning_rate": rate, "seed": str(seed), "output_dir": str(folder), "save_strategy": "no"}
    flags = METHODS[method] | own
    if method == "LoRA + activations":
        base = parse_recipe(Recipe, "finetune", "", argv).model.model
        flags["model"] = converted(str(base), output / "converted")
    pairs = [part for key, value in flags.items() for part in (f"--{key}", value)]
    result = finetune(parse_recipe(Recipe, "finetune", "", [*argv, *pairs]))
    adapter = folder / "adapter_model.safetensors"
    size = adapter.stat().st_size if adapter.is_file() else 4 * result.trainable
    return {"before": result.before, "after": result.after, "trainable": result.trainable, "bytes": size}


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
    for method, rates in RATES.items():

        def quality(found: dict) -> float:
            return found["after"].get("top1", -found["after"]["loss"])

        best = max(rates, key=lambda rate: quality(figures(method, rate, SEEDS[0])))
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
