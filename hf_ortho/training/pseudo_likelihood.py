"""Pseudo-perplexity of a masked language model: each token predicted from all others of its block."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from datasets import Dataset

from .. import tasks
from ..checkpoints.load import Checkpoint
from ..checkpoints.verify import evaluating
from ..errors import ConfigError, DataError
from ..tasks.masking import masks_of


@torch.inference_mode()
def pseudo_perplexity(
    checkpoint: Checkpoint,
    dataset: Dataset,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """exp(-(1/T) sum_t log p(w_t | all other tokens of the block)) over all T tokens that are not special.

    Each token is hidden alone, so a block of n tokens takes n predictions, ``batch_size`` at a time. Source: Salazar et
    al., Masked language model scoring (2020).

    Args:
        dataset: samples of ``Task.prepare`` for a masked language model.
        progress: called with the number of tokens done and in total.

    Raises:
        ConfigError: the model is not a masked language model.
        DataError: all tokens are special.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from hf_ortho.checkpoints.load import Checkpoint
        >>> from hf_ortho.tasks.masked_lm import MASKED_LM
        >>> from hf_ortho.tasks.tokenizer import byte_tokenizer
        >>> from hf_ortho.training import DataArguments, pseudo_perplexity
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = BertForMaskedLM(BertConfig(vocab_size=260, max_position_embeddings=8, **sizes))
        >>> checkpoint = Checkpoint(model, byte_tokenizer(masks=True), None, None)
        >>> rows = Dataset.from_dict({"text": ["some words"]})
        >>> samples = MASKED_LM.prepare(checkpoint, rows, DataArguments(), "words")
        >>> 250 < pseudo_perplexity(checkpoint, samples) < 270  # of random weights, close to the vocabulary size
        True
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    check_masked(checkpoint)
    assert tokenizer is not None
    masks, rows = masks_of(dataset), dataset.with_format(None)
    special = torch.tensor(tokenizer.all_special_ids)
    blocks = [masks.unmasked(rows[i : i + 1])[0] for i in range(len(rows))]
    places = [torch.isin(ids, special, invert=True).nonzero()[:, 0] for ids in blocks]
    total, done, log_likelihood = sum(map(len, places)), 0, 0.0
    if not total:
        raise DataError("the dataset has no tokens to predict: all are special")
    with evaluating(model):
        for ids, all_places in zip(blocks, places, strict=True):
            for place in all_places.split(batch_size):
                row = torch.arange(len(place))
                inputs = ids.repeat(len(place), 1)
                inputs[row, place] = tokenizer.mask_token_id
                inputs = inputs.to(model.device)
                logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs))["logits"]
                scores = logits[row, place].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                log_likelihood += scores.gather(1, ids[place, None].to(scores.device)).double().sum().item()
                done += len(place)
                progress(done, total)
    try:
        return math.exp(-log_likelihood / total)
    except OverflowError:
        return math.inf


def check_masked(checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the model is a masked language model."""
    if not tasks.head_of(checkpoint.model).masks_tokens:
        name = type(checkpoint.model).__name__
        raise ConfigError(f"pseudo-perplexity: needs a masked language model, which {name} is not")
