"""World: who am I among the processes that torchrun started; a world of one is the normal case."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """Rank and size; sums over ranks are no-ops in a world of one."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor)
        return float(tensor)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up gradients over all ranks in one message; a rank without any counts as zero."""
        if self.size == 1:
            return
        owners = list(parameters)
        for owner in owners:
            if owner.grad is None:
                owner.grad = torch.zeros_like(owner)
        flat = torch.cat([owner.grad.reshape(-1) for owner in owners if owner.grad is not None])
        dist.all_reduce(flat)
        position = 0
        for owner in owners:
            assert owner.grad is not None
            owner.grad.copy_(flat[position : position + owner.numel()].view_as(owner))
            position += owner.numel()

    def any(self, flag: bool) -> bool:
        """Return whether any rank says True."""
        return self.sum(float(flag)) > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def join_world() -> World:
    """Return the world that torchrun's environment describes, joining it once."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), size)
