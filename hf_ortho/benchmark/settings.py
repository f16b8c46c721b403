"""Sizes and durations of the benchmarks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes and durations of a benchmark.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: data type of the inputs of activations and of the weights that generate; training in less than float32
            is mixed precision.
        rounds: number of rounds; each competitor runs once per round.
        seconds: a competitor that has taken this long stops after 5 rounds.
        sample: short calls are repeated until one measurement takes this many seconds.
        sequence, image: input shapes of the activations.
        libraries: input shape for other libraries, which are slow.
        elements: sizes of the sweep over elements.
        degree_elements: size of the sweep over the degree.
        groups: input shapes for groups of channels.
        compiled: whether to also measure ``torch.compile``, and to let vLLM compile.
        gpt2, gpt2_batch: options of ``GPT2Config``, and (sequences, tokens).
        convnext, convnext_batch: options of ``ConvNextConfig``, and the number of images.
        tokens: number of tokens to generate after a prompt of 16.
        deadline: ``time.monotonic()`` after which no further model is started.

    Example:
        >>> hf_ortho.benchmark.FULL.on("cuda").to_dict()["dtype"]
        'bfloat16'
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    rounds: int = 7
    seconds: float = 0.6
    sample: float = 0.002
    sequence: tuple[int, ...] = (8, 1024, 3072)
    image: tuple[int, ...] = (32, 56, 56, 384)
    libraries: tuple[int, ...] = (1, 256, 3072)
    elements: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7, 10**8)
    degree_elements: int = 10**6
    groups: tuple[tuple[int, int], ...] = ((2048, 1536), (8192, 3072))
    decode: tuple[int, ...] = (1, 1, 3072)
    compiled: bool = True
    gpt2: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"n_layer": 4, "n_embd": 512, "n_head": 8, "n_positions": 256, "vocab_size": 1000}
    )
    gpt2_batch: tuple[int, int] = (4, 256)
    convnext: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"hidden_sizes": [96, 192, 384, 768], "depths": [1, 1, 2, 1], "image_size": 128}
    )
    convnext_batch: int = 8
    tokens: int = 64
    deadline: float = math.inf

    def on(self, device: str) -> Settings:
        """These settings on ``device``. CUDA uses bfloat16, and for ``FULL`` the sizes of ``LARGE``."""
        if device == "cpu":
            return self
        return dataclasses.replace(self, device=device, dtype=torch.bfloat16, **(LARGE if self == FULL else {}))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, without the deadline."""
        values = dataclasses.asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}
        del values["deadline"]
        return values


# For a GPU: tensors larger than its caches, up to more elements than a 32-bit index can address; GPT-2 (124M, with a
# vocabulary padded to a multiple of 128) and ConvNeXt-T.
LARGE: dict[str, Any] = {
    "elements": (10**4, 10**5, 10**6, 10**7, 10**8, 10**9, 2**31 + 16),
    "degree_elements": 2**26,
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50304},
    "gpt2_batch": (16, 1024),
    "convnext": {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3], "image_size": 224},
    "convnext_batch": 128,
}
FULL = Settings()
QUICK = Settings(
    rounds=3,
    seconds=0.2,
    sample=0.0005,
    sequence=(2, 64, 256),
    image=(2, 14, 14, 64),
    libraries=(1, 64, 256),
    elements=(10**4, 10**5),
    degree_elements=10**4,
    groups=((16, 128),),
    compiled=False,
    gpt2={"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64, "vocab_size": 100},
    gpt2_batch=(2, 64),
    convnext={"hidden_sizes": [16, 32], "num_stages": 2, "depths": [1, 1], "image_size": 32},
    convnext_batch=2,
    tokens=8,
)
