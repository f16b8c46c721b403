"""Lower bounds for CPU kernels: the same number of tensor operations, without the arithmetic of the activation."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..kernels.cpu import CHUNK

NODES = 1024  # size of a table


@dataclasses.dataclass(frozen=True)
class Operations:
    """The number of operations of each kind per chunk of the input, which stays in the cache."""

    passes: int  # elementwise
    sums: int = 0
    gathers: int = 0  # from a table
    scatters: int = 0  # accumulated into a table

    def run(self, x: Tensor, g: Tensor, out: Tensor) -> None:
        index, table = torch.arange(CHUNK) % NODES, torch.zeros(NODES)
        row = torch.empty(CHUNK)
        for x_chunk, g_chunk, out_chunk in zip(*(t.view(-1).split(CHUNK) for t in (x, g, out)), strict=True):
            n = len(x_chunk)
            torch.mul(x_chunk, g_chunk, out=out_chunk)
            for _ in range(self.passes - 1):
                torch.mul(x_chunk, g_chunk, out=row[:n])
            for _ in range(self.sums):
                row[:n].sum().item()
            for _ in range(self.gathers):
                torch.index_select(table, 0, index[:n], out=row[:n])
            for _ in range(self.scatters):
                table.scatter_add_(0, index[:n], row[:n])


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.save_for_backward(x)
        ctx.backward_operations = backward
        y = torch.empty_like(x)
        forward.run(x, x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        gx = torch.empty_like(x)
        ctx.backward_operations.run(x, g, gx)
        return gx, None, None


class Floor(nn.Module):
    """Runs the operations of an activation on contiguous tensors, without its arithmetic."""

    def __init__(self, forward: Operations, backward: Operations):
        super().__init__()
        self.operations = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return _Floor.apply(x, *self.operations)


# Horner's method takes n passes for degree n. Its backward takes n for S', n for g x^k, and n + 1 sums. A clamped
# domain with one straight tail takes four more passes in each direction. A maximum of 7 lines takes an addition and a
# maximum per line, and in the backward a mask, an addition and a sum. A table of second-order expansions takes six
# passes for the nearest node, two products and three lookups, and in the backward one more product, three passes for
# the sums, and three scatters.
FLOORS = {
    "hermite_3": (Operations(3), Operations(6, sums=4)),
    "hermite_8": (Operations(8), Operations(16, sums=9)),
    "hermite_3 with tails": (Operations(7), Operations(10, sums=4)),
    "fourier_6": (Operations(8, gathers=3), Operations(12, gathers=3, scatters=3)),
    "fourier_6 with tails": (Operations(12, gathers=3), Operations(16, gathers=3, scatters=3)),
    "tropical_6": (Operations(12), Operations(12, sums=7)),
}
