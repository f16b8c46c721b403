"""Calibration and test inputs of a pretrained model: text, samples of the model, or random tokens."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ortho.checkpoints.load import Checkpoint
from hf_ortho.conversion.calibrate import is_held_out
from hf_ortho.errors import ConfigError
from hf_ortho.files import read_text
from hf_ortho.tasks.data import CHARACTERS, check_block_size, context_length, too_short
from hf_ortho.tasks.packing import Packer

TEXTS = 8  # per batch, where these are shorter than a block

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Batches by purpose.

    Attributes:
        calibration: passed to ``convert``, which holds some of them out of the fits.
        test: held out; every measure is taken on them.
        others: batches of other domains by name.
        origin: what ``calibration`` and ``test`` are.
    """

    calibration: list[Batch]
    test: list[Batch]
    others: dict[str, list[Batch]]
    origin: str

    @property
    def tokens(self) -> dict[str, int]:
        """The number of tokens by purpose, without padding."""
        named = {"calibration": self.calibration, "test": self.test, **self.others}
        return {name: sum(map(_size, batches)) for name, batches in named.items()}

    @classmethod
    def of(cls, checkpoint: Checkpoint, args: argparse.Namespace) -> Inputs:
        """The inputs that the arguments of the command ask for.

        Raises:
            ConfigError: the model takes no text, the block size exceeds its context, or a text is short.
            CheckpointError: a text cannot be read.
        """
        model = checkpoint.model
        if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
            raise ConfigError(f"{type(model).__name__} is neither a causal language model nor a text encoder")
        size = args.block_size
        check_block_size(size, context_length(model) or size)
        fitted, tested = _with_held_out(args.calibration_blocks), args.test_blocks
        others = {"random": _random(model, args.other_blocks, size, args.seed)}
        if checkpoint.tokenizer is None:
            if not model.can_generate():
                raise ConfigError(f"{model.name_or_path} has no tokenizer, and cannot generate its own inputs")
            batches = sampled(model, fitted + tested, size, args.seed)
            origin = "sampled from the model, which has no tokenizer"
            return cls(batches[:fitted], batches[fitted:], others, origin)

        def blocks(text: str, count: int, name: str, *, all_of_them: bool = True) -> list[Batch]:
            make = _packed if model.can_generate() else _lines
            found = make(checkpoint.tokenizer, text, count, size, name)
            if all_of_them and len(found) < count:
                raise ConfigError(f"{name} is too short: it has {len(found)} of {count} blocks")
            return found

        text = read_text(args.text)
        first, second = text[: len(text) // 2], text[len(text) // 2 :]
        texts = {Path(path).stem: read_text(path) for path in args.other} | {"code": inspect.getsource(argparse)}
        found = {name: blocks(other, args.other_blocks, name, all_of_them=False) for name, other in texts.items()}
        return cls(
            blocks(first, fitted, f"the first half of {args.text}"),
            blocks(read_text(args.test), tested, args.test)
            if args.test
            else blocks(second, tested, f"the second half of {args.text}"),
            found | others,
            f"calibration: {args.text}; test: {args.test or f'the second half of {args.text}'}",
        )


@torch.no_grad()
def sampled(model: PreTrainedModel, count: int, size: int, seed: int) -> list[Batch]:
    """``count`` padded batches of texts that the model writes at temperature 1, up to their ends or ``size`` tokens."""
    config = model.config
    ends = torch.tensor([] if config.eos_token_id is None else config.eos_token_id).reshape(-1)
    prompts = torch.full((TEXTS, 1), 0 if config.bos_token_id is None else config.bos_token_id)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_length": size}
    options |= {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id or 0}
    batches = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(count):
            ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
            stops = torch.isin(ids[:, 1:], ends).long()
            # A token counts if no end precedes it; the first one starts the text.
            before = torch.nn.functional.pad(stops.cumsum(1) - stops, (1, 0))
            batches.append({"input_ids": ids, "attention_mask": (before == 0).long()})
    return batches


def _with_held_out(count: int) -> int:
    """The number of batches of which ``convert`` fits to ``count``: it holds out the second of every four."""
    fitted = (i for i in itertools.count() if not is_held_out(i))
    return next(itertools.islice(fitted, count - 1, None)) + 1


def _packed(tokenizer, text: str, count: int, size: int, name: str) -> list[Batch]:
    """Up to ``count`` blocks of ``size`` tokens each, or one shorter block."""
    pack = Packer(tokenizer, size)
    blocks = [{"input_ids": block[None]} for block in torch.from_numpy(pack([text[: CHARACTERS * count * size]]))]
    if not blocks and len(pack.left) > 1:
        blocks = [{"input_ids": torch.from_numpy(pack.left)[None]}]
    if not blocks:
        raise ConfigError(too_short(name, len(pack.left), size))
    return blocks[:count]


def _lines(tokenizer, text: str, count: int, size: int, name: str) -> list[Batch]:
    """Up to ``count`` padded batches of lines, each cut to ``size`` tokens, as an encoder of sentences takes them."""
    lines = [line.strip() for line in text.splitlines() if line.strip()][: count * TEXTS]
    if not lines:
        raise ConfigError(f"{name} has no text")
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": size}
    return [dict(tokenizer(lines[i : i + TEXTS], **options)) for i in range(0, len(lines), TEXTS)]


def _random(model: PreTrainedModel, count: int, size: int, seed: int) -> list[Batch]:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (count, 1, size), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": block} for block in ids]


def _size(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
