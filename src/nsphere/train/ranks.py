"""What the processes of a job decide and do together, apart from the training step: files, errors, turns."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

EX_TEMPFAIL = 75


class LostRank(Exception):
    """A rank died, hangs or never came; the message names it and what it was doing.

    What was saved is good: start the job again. `exit_code` is 75, a temporary failure.
    """

    exit_code = EX_TEMPFAIL


def is_communication_error(error: BaseException) -> bool:
    """Whether an error is a collective's, rather than the computation's."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return any(word in text for word in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL"))


class _Failure(NamedTuple):
    """What went wrong on a rank, on its way to the others."""

    error: Exception


class Ranks:
    """The ranks of a job, or a process on its own. Every method is called by all of them.

    An error of one rank is raised on all of them, so that none is left waiting for one that has gone.

    Args:
        group: of processes that can exchange objects on the CPU (gloo). None: this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once and talks to the user."""
        return self.rank == 0

    def all(self, do: Callable[[], T]) -> list[T]:
        """Do it on every rank; the results by rank.

        Raises:
            What any rank raised, the lowest one first; it is named where the error is not everybody's.
        """
        found = self._exchange(do)
        failed = {rank: result.error for rank, result in enumerate(found) if isinstance(result, _Failure)}
        if not failed:
            return found
        rank, error = next(iter(failed.items()))
        if len(failed) < self.size and error.__class__ is ValueError:
            raise ValueError(f"{error} (rank {rank})")
        if len(failed) < self.size and error.__class__ is OSError and error.strerror:
            error.strerror += f" (rank {rank})"
        raise error

    def first(self, do: Callable[[], T]) -> T:
        """Do it on rank 0 alone; its result, or its error, on every rank."""
        result: Any = self._exchange(lambda: do() if self.is_first else None)[0]
        if isinstance(result, _Failure):
            raise result.error
        return result

    def _exchange(self, do: Callable[[], T]) -> list[Any]:
        """Each rank's result or _Failure."""
        if self.group is None:
            return [do()]
        mine: T | _Failure
        try:
            mine = do()
        except Exception as error:
            mine = _Failure(_portable(error))
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def largest(self, *numbers: float) -> list[float]:
        """The maximum over the ranks of each number."""
        if self.group is None:
            return list(numbers)
        seen = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.group)
        return seen.tolist()

    def wait(self) -> None:
        """Until every rank is here."""
        self.largest(0)

    def first_then_all(self, do: Callable[[], T]) -> T:
        """Do it on rank 0, then on the others, which find what it left in a cache; this rank's own result."""
        mine: list[T] = []
        self.first(lambda: mine.append(do()))
        self.all(lambda: None if self.is_first else mine.append(do()))
        return mine[0]


def _portable(error: Exception) -> Exception:
    """An error as it can be sent: those that a user can mend as they are, the rest as a sentence."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror) if error.errno is not None else OSError(str(error))
    if isinstance(error, ModuleNotFoundError):
        return ModuleNotFoundError(str(error), name=error.name)
    if isinstance(error, ValueError):
        plain = type(error).__init__ is ValueError.__init__  # JSON's and Unicode's want more than a sentence
        return (type(error) if plain else ValueError)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


ALONE = Ranks()
"""A process without others."""
