"""Parameters that DeepSpeed ZeRO-3 partitions: each process holds a part of the values, and the parameter is empty."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, distributed


def is_partitioned(parameter: Tensor) -> bool:
    """Whether the values of ``parameter`` are in parts: not, for example, while its layer runs."""
    return parameter.numel() != full_size(parameter)


def full_size(parameter: Tensor) -> int:
    """The number of values of all parts."""
    return getattr(parameter, "ds_numel", parameter.numel())


def local_part(parameter: Tensor) -> Tensor:
    """The values of ``parameter`` that this process holds: under ZeRO-3, FSDP2 and tensor parallelism, its part."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.to_local() if hasattr(parameter, "to_local") else parameter
    start = distributed.get_rank(parameter.ds_process_group) * part.numel()  # type: ignore[attr-defined]
    return part[: max(full_size(parameter) - start, 0)]  # parts have one length: the last ones are padded


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the block, all values of partitioned ``parameters`` can be read. All processes must enter it."""
    parts = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield
