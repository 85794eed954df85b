"""Batches spread over processes: gathering with gradient, and the little that a trainer asks a process group.

Everything works without a process group, as one process.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The number of this process, from 0; 0 without a process group."""
    return dist.get_rank() if _together() else 0


def barrier() -> None:
    """Wait until every process is here."""
    if _together():
        dist.barrier()


def any_true(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set in any process; every process gets the same answer.

    Args:
        flag: of this process.
        device: one that the process group's backend can send from (a GPU for NCCL).
    """
    return bool(largest(int(flag), device))


def largest(number: int, device: torch.device | str = "cpu") -> int:
    """The greatest of all processes' numbers; every process gets the same answer. See `any_true`."""
    if world_size() == 1:
        return number
    numbers = torch.tensor([number], device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers.item())


def from_first(value: T) -> T:
    """The value that process 0 has, in every process; any that can be pickled."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    found: T = values[0]
    return found


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in rank order, with gradient: `[n, …]` to `[sum of n, …]`.

    n may differ and may be 0; the other dimensions and the type may not differ. Any backend will do. Without
    a process group the tensor itself is returned.

    The backward pass sums the gradients that all W processes have for all rows, and keeps those of its own
    rows. If every process computes the same loss L of the whole batch, its rows x_p receive W dL/dx_p, its
    parameters W dL/dx_p dx_p/dθ, and the mean over processes that DistributedDataParallel takes is the sum
    over p of dL/dx_p dx_p/dθ: the gradient of one process with the whole batch. A parameter of the loss
    itself, such as a learned temperature, has dL/dt in every process, and the mean is right for it too. A
    process that computes only its own share of L (`rows` of the losses) must multiply it by `world_size()`
    for both to hold.

    Both passes are collective: every process must call this in the same order, and either all or none may run
    backward through it, so that a process without rows must pass an empty tensor that requires a gradient.
    """
    if world_size() == 1:
        return tensor
    gathered: torch.Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return gathered


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        size = torch.tensor([len(tensor)], device=tensor.device)
        sizes = [torch.empty_like(size) for _ in range(world_size())]
        dist.all_gather(sizes, size)
        counts = [int(each) for each in sizes]
        ctx.first, ctx.count = sum(counts[: rank()]), len(tensor)
        # Backends differ in whether they take uneven parts; all of them take even ones.
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)  # the reduction writes in place
        dist.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.count]
