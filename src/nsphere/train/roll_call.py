"""Which rank is at what, so that a job that ends for want of one can say which."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from nsphere.train.distributed import World
from nsphere.train.ranks import EX_TEMPFAIL, LostRank, is_communication_error


class RollCall:
    """Each rank notes in the job's store what it is doing, and, when it has to leave, that it noticed.

    A rank that neither goes on nor notices is the lost one. A collective that waits for it fails in gloo after the
    layout's timeout, or at once if its process has ended. What fails in no other way (a rank that hangs by itself, or
    waits in NCCL, which does not raise) is ended by a thread that watches what is done in `watched`, and says where
    it was. A context: the thread ends with it.

    Args:
        world: the ranks; alone nothing is done.
        last_good: what the message ends with.
    """

    def __init__(self, world: World, last_good: str = "") -> None:
        self.rank, self.size, self.timeout, self.last_good = world.rank, world.size, world.layout.timeout, last_good
        self._store: Any = dist.distributed_c10d._get_default_store() if self.size > 1 else None
        self._since: tuple[float, str] | None = None
        self._over = threading.Event()

    def __enter__(self) -> "RollCall":
        if self._store is not None:
            threading.Thread(target=self._watch, name="roll call", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Around what all ranks do, called `what` in messages, such as "step 3". One inside another has its own name.

        Raises:
            LostRank: in place of the collective's error.
        """
        if self._store is None:
            yield
            return
        try:
            self._note("at", what)
            yield
        except (RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and is_communication_error(error):
                raise LostRank(self.who_is_missing(what)) from error
            self._note("left", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            raise

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Around what can't take longer than the timeout, on no rank: nothing is compiled, read or written in it."""
        self._since = time.monotonic(), what
        try:
            yield
        finally:
            self._since = None

    def _note(self, what: str, text: str) -> None:
        # the store may be gone with the process that held it
        with suppress(RuntimeError, dist.DistError):
            self._store.set(f"nsphere/{what}/{self.rank}", text)

    def _read(self, what: str, rank: int) -> str | None:
        key = f"nsphere/{what}/{rank}"
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except (RuntimeError, dist.DistError):
            return None

    def who_is_missing(self, during: str, patience: float = 5.0) -> str:
        """The ranks that are lost, each with what it did last, once all others had time to notice."""
        self._note("noticed", during)
        end = time.monotonic() + patience
        others = [rank for rank in range(self.size) if rank != self.rank]
        missing = others
        while missing and time.monotonic() < end:
            time.sleep(0.05)
            missing = [rank for rank in others if self._read("noticed", rank) is None]
        told = []
        for rank in missing:
            left = self._read("left", rank)
            at = self._read("at", rank)  # None where it had not begun, and where the store went with its rank
            where = f" in {at}" if at is not None else ""
            told.append(f"rank {rank} stopped{where}: {left}" if left else f"rank {rank} died or hangs{where}")
        what = ", ".join(told) or "all ranks are there, but a message between them did not arrive"
        return f"{what}; the job ends in {during}{self.last_good}"

    def _watch(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._over.wait(min(1.0, self.timeout / 4)):
            since = self._since
            if since is not None and time.monotonic() - since[0] > self.timeout + 10:
                where = traceback.extract_stack(sys._current_frames()[main])[-1]
                print(
                    f"nsphere: rank {self.rank} hangs in {since[1]}, for {self.timeout + 10:g} s, in {where.name} "
                    f"({where.filename}:{where.lineno}); the job ends{self.last_good}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EX_TEMPFAIL)
