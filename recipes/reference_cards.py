"""Write the cards of the reference conversions: ``python recipes/reference_cards.py [FOLDER]``, by default model_cards.

GPT-2 and ConvNeXt-T with every family at its default degree. The fits are data-free, so they need the activation of the
model and no weights: a thin network with as many layers is built and converted. What needs the weights is "not run".
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import ConvNextConfig, ConvNextForImageClassification, GPT2Config, GPT2LMHeadModel

import hf_ortho
from hf_ortho.activations import FAMILIES
from hf_ortho.hub import DataSource, Results
from hf_ortho.hub.card import PICTURE, card_text
from hf_ortho.hub.record import Record

WIKITEXT = DataSource("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")
CIFAR10 = DataSource("uoft-cs/cifar10", None, "test")


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 with its 12 layers, thin."""
    return GPT2LMHeadModel(GPT2Config(n_embd=12, vocab_size=8, n_positions=8, bos_token_id=0, eos_token_id=0))


def convnext() -> ConvNextForImageClassification:
    """ConvNeXt-T with its 18 blocks, thin."""
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[2, 2, 2, 2], image_size=32))


# name -> (base, builder, metrics, data, recipe that fine-tunes it)
MODELS = {
    "gpt2": ("openai-community/gpt2", gpt2, ("loss", "perplexity"), WIKITEXT, "gpt2/sft/config_hermite.yaml"),
    "convnext-tiny-224": (
        "facebook/convnext-tiny-224",
        convnext,
        ("loss", "top1", "top5"),
        CIFAR10,
        "convnext/cifar10/config_hermite.yaml",
    ),
}


def reference(name: str, family: str) -> tuple[hf_ortho.ConversionReport, dict]:
    """The report of a conversion, and the config of the model."""
    base, build, *_ = MODELS[name]
    model = build()
    model.config._name_or_path = base
    report = hf_ortho.convert(model, family)
    return report, model.config.to_dict() | {"architectures": [type(model).__name__]}


def reference_card(name: str, report: hf_ortho.ConversionReport, config: dict, folder: Path) -> str:
    """The card for ``folder``, which may hold the picture."""
    base, _, metrics, data, recipe = MODELS[name]
    family, _, degree = report.activation.rpartition("_")
    command = f"hf-ortho convert {base} -o {folder.name} --family {family} --degree {degree}"
    tune = f"hf-ortho finetune --config recipes/{recipe} --model {folder.name} --activation {report.activation}"
    stages = ("source", "converted", "fine-tuned")
    measure = f"{tune} --output_dir outputs/{folder.name}"
    results = Results({stage: dict.fromkeys(metrics) for stage in stages}, data, measure, "")
    note = (
        f"The fits are data-free: they depend on {report.layers[0].fit.source} and the family alone. They were "
        f"computed in a network with the layers of {base} and random weights; the pretrained weights were not loaded."
    )
    metadata = {"base_model": base, "base_model_relation": "finetune"}
    return card_text(config, Record(report, [results], [command]), folder.name, folder, metadata=metadata, notes=[note])


def main(folder: Path) -> None:
    """Write every card as ``folder/NAME/README.md``, with the picture of its one shape."""
    for name in MODELS:
        for family in FAMILIES:
            report, config = reference(name, family)
            place = folder / f"{name}-{report.activation}"
            place.mkdir(parents=True, exist_ok=True)
            first = report.layers[0].module
            report.modules = {first: report.modules[first]}  # all are the same
            report.plot(place / PICTURE, f"{MODELS[name][0]}: {report.activation} in every layer")
            (place / "README.md").write_text(reference_card(name, report, config, place), encoding="utf-8")
            print(place / "README.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "model_cards")
