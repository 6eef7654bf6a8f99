"""What the processes of a job do together apart from the training step: files, decisions, errors."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from nsphere.train.distributed import World

T = TypeVar("T")


class _Failure(NamedTuple):
    """What went wrong on a rank, on its way to the others."""

    error: Exception


class Ranks:
    """The ranks of a job, or a process on its own.

    An error of one rank is raised on all of them, so that none is left waiting for one that has gone.

    Args:
        group: of processes that can exchange objects on the CPU (gloo). None: this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def beside(cls, world: World) -> "Ranks":
        """The ranks of a job in a group of their own, whose messages can't meet the training's. Collective."""
        if world.mesh is None:
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=timedelta(seconds=world.layout.timeout)))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def all(self, do: Callable[[], T]) -> list[T]:
        """Do it on every rank; the results by rank.

        Raises:
            What any rank raised, the lowest one first.
        """
        if self.group is None:
            return [do()]
        mine: T | _Failure
        try:
            mine = do()
        except Exception as error:
            mine = _Failure(_portable(error))
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        for rank, result in enumerate(found):
            if isinstance(result, _Failure):
                if result.error.__class__ is OSError and result.error.strerror:
                    result.error.strerror += f" (rank {rank})"
                raise result.error
        return found

    def first(self, do: Callable[[], T]) -> T:
        """Do it on rank 0 alone; its result, or its error, on every rank."""
        return self.all(lambda: do() if self.is_first else None)[0]  # type: ignore[return-value]


def _portable(error: Exception) -> Exception:
    """An error as it can be sent: OSError and our own as they are, the rest as a sentence."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror) if error.errno is not None else OSError(str(error))
    if isinstance(error, ValueError) and len(error.args) == 1:
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


ALONE = Ranks()
"""A process without others."""
