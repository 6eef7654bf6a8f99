"""A job: a command at work on its ranks, from their meeting until the last has left.

`nsphere train` and `nsphere compare` both go: settings are checked, the ranks meet, `with job(...)`; during "the
preparation" every rank reads the data, all agree, and rank 0 takes the folder; then the work.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from nsphere.ops.backend import can_compile
from nsphere.train.compile_cache import remove_unwritten_libraries
from nsphere.train.config import RunOptions, differences, shown
from nsphere.train.data import Corpus, DataConfig, load_corpus
from nsphere.train.distributed import World, start
from nsphere.train.files import RunLock
from nsphere.train.progress import console, say
from nsphere.train.roll_call import RollCall
from nsphere.train.signals import StopRequest
from nsphere.train.token_cache import data_cache


class Job:
    """The ranks at work, and what they hold until the end. Every method is called by all of them; see `job`."""

    def __init__(self, world: World, roll_call: RollCall, held: contextlib.ExitStack, compiles: bool) -> None:
        self.world, self.roll_call, self._held, self._compiles = world, roll_call, held, compiles
        self.during = roll_call.during

    def load_corpus(self, data: DataConfig) -> Corpus:
        """The data, by rank 0 first, so that the others find its tokens in the cache.

        Raises:
            ValueError: as `load_corpus`.
        """
        return self.world.first_then_all(lambda: load_corpus(data, cache_dir=data_cache()))

    def check_agreement(self, mine: dict[str, Any]) -> None:
        """Refuse ranks that were started with different settings or data, which would wait for each other in vain.

        Raises:
            ValueError: which rank differs from rank 0, and in what.
        """
        others_choice = ("device", "threads")
        mine = {**mine, "options": {k: v for k, v in mine["options"].items() if k not in others_choice}}
        for rank, theirs in enumerate(seen := self.world.all(lambda: mine)):
            if different := differences(seen[0], theirs):
                raise ValueError(
                    f"rank {rank} was started otherwise than rank 0: {shown(different)}. Give all ranks the same "
                    "flags, data and environment"
                )

    def take(self, folder: Path, check: Callable[[], object]) -> None:
        """Lock the folder until the job ends, and only then `check` it once more; on rank 0. The work begins with it.

        Raises:
            ValueError: another job has the folder, or, having been here since, left what `check` refuses.
        """

        def lock() -> None:
            self._held.enter_context(RunLock(folder))
            check()

        self.world.first(lock)
        if self._compiles:
            for library in remove_unwritten_libraries():
                say(f"removed {library}: a process that was killed while it compiled has left it empty")

    def heed_signals(self) -> None:
        """From here to the end note signals, rather than obey them."""
        self._held.enter_context(StopRequest())


@contextlib.contextmanager
def job(folder: Path, options: RunOptions, world: World | None = None) -> Iterator[Job]:
    """Join the ranks, set up the process, and know who is at what, for the time of the context.

    Args:
        folder: what the job leaves, and is resumed on.
        options: how it is carried out.
        world: the ranks, if they are joined already: a run of a comparison.

    Raises:
        ValueError: a layout or device that can't be.
        LostRank: another rank died or hangs.
    """
    joined = start(options.layout, options.device) if world is None else contextlib.nullcontext(world)
    with (
        joined as world,
        process_settings(options, world.device),
        _one_voice(world),
        RollCall(world, f"; start it again with --resume on {folder}") as roll_call,
        contextlib.ExitStack() as held,
    ):
        yield Job(world, roll_call, held, options.compile and can_compile(world.device.type).available)


@contextlib.contextmanager
def _one_voice(world: World) -> Iterator[None]:
    """Rank 0 alone talks to the person watching."""
    before, console.quiet = console.quiet, not world.is_first
    try:
        yield
    finally:
        console.quiet = before


@contextlib.contextmanager
def process_settings(options: RunOptions, device: torch.device) -> Iterator[None]:
    """Threads, determinism and the compiler's limits for the time of a run; what was set before comes back.

    On CPU every operation used here is deterministic for a given number of threads, the embedding's gradient by
    construction. CUDA needs to be asked, and cuBLAS by an environment variable, which stays.
    """
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # a silent fall-back to eager would be slow and, worse, change the last bits in the middle of a run
    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    try:
        with limits:
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
