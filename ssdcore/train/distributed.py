"""Several processes that train one model together, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Group(NamedTuple):
    """The processes of a run."""

    rank: int  # number of this process; process 0 prints and writes files
    size: int

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor of all processes in place, without waiting for the GPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def copy_first(self, tensor: Tensor) -> None:
        """Copy a tensor of process 0 to all others, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def shared(self, value: T) -> T:
        """The value that process 0 has."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def group() -> Group:
    """The processes of torch.distributed if it is initialised, otherwise this one alone."""
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    return Group(0, 1)


def started_by_torchrun() -> bool:
    """Whether torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process is the one that prints, before and after the processes are joined."""
    return int(os.environ.get("RANK", "0")) == 0 if started_by_torchrun() else True


def local_processes() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started_by_torchrun() else 1


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and yield the device of this one.

    Without torchrun, or if the processes are joined already, do nothing.

    After an error the group is not dissolved, because that would wait for processes that wait for this one. The process
    ends instead, and torchrun ends the others.
    """
    if not started_by_torchrun() or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"nproc-per-node must be at most {torch.cuda.device_count()}, the number of GPUs of this machine, "
                f"got {local_processes()}; --device cpu trains without GPUs"
            )
        torch.cuda.set_device(device)
    # Objects travel through gloo, from CPU to CPU. NCCL moves what is on the GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield device
    dist.barrier()  # a process that ends early would close a connection from which another one still reads
    dist.destroy_process_group()
