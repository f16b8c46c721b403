"""``python -m tests.embeddings MODEL TEXT [ACTIVATION ...]``: how far conversions move the sentence embeddings of a
pretrained encoder. Half of the lines of TEXT calibrate, the other half is embedded (mean over the tokens)."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor

import hf_ortho
from hf_ortho.checkpoints.load import Checkpoint, load_checkpoint
from hf_ortho.hub import hardware

ACTIVATIONS = [f"hermite_{n}" for n in (3, 8, 12, 16)] + ["fourier_6", "tropical_rational_6", "tropical_rational_12"]


def batches(lines: list[str], checkpoint: Checkpoint, size: int = 16) -> list[dict[str, Tensor]]:
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 128}
    return [dict(checkpoint.tokenizer(lines[i : i + size], **options)) for i in range(0, len(lines), size)]


@torch.no_grad()
def embeddings(model, inputs: list[dict[str, Tensor]]) -> Tensor:
    found = []
    for batch in inputs:
        mask = batch["attention_mask"].double().unsqueeze(-1)
        found.append((model(**batch).last_hidden_state.double() * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub name of an encoder")
    parser.add_argument("text", help="text file, one sentence or paragraph per line")
    parser.add_argument("activations", nargs="*", default=ACTIVATIONS)
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.model)
    lines = [line.strip() for line in Path(args.text).read_text(encoding="utf-8").splitlines() if len(line) > 80][:256]
    calibration, held_out = batches(lines[::2], checkpoint), batches(lines[1::2], checkpoint)
    expected = embeddings(checkpoint.model, held_out)
    print(f"{args.model}, {len(lines)} lines, {hardware()}\n")
    print(
        "| activation | 1 - cos, mean | largest | sup f, worst layer | fits, s per 12 layers |\n|---|---|---|---|---|"
    )
    for name in args.activations:
        model = copy.deepcopy(checkpoint.model)
        report = hf_ortho.convert(model, name, calibration=calibration)
        away = 1 - torch.cosine_similarity(expected, embeddings(model, held_out), dim=1)
        sup = max(layer.fit.sup_error for layer in report.layers)
        seconds = report.fit_seconds * 12 / len(report.layers)
        print(f"| `{name}` | {away.mean():.1e} | {away.max():.1e} | {sup:.1e} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
