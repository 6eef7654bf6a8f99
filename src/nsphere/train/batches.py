"""From one long row of tokens to batches, as a pure function of (seed, step).

Nothing here keeps a position: a run that is resumed, on this layout or another, asks for the batch of the
step it is at. Shape legend: B rows of a batch, T tokens of context.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

Tokens = np.ndarray[Any, np.dtype[Any]]


class TokenShards:
    """Token arrays read as one, without copying them together.

    Args:
        parts: Unsigned integers [n_i], none of them empty.
    """

    def __init__(self, parts: list[Tokens]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, stretch: slice) -> Tokens:
        """The tokens from `stretch.start` to `stretch.stop`, in one array."""
        start, stop, _ = stretch.indices(len(self))
        found = []
        for index in range(bisect_right(self._ends, start), len(self._parts)):
            before = self._ends[index] - len(self._parts[index])
            if before >= stop:
                break
            found.append(self._parts[index][max(0, start - before) : stop - before])
        return np.concatenate(found) if found else self._parts[0][:0]


class Batch(NamedTuple):
    """One batch, on the CPU.

    Attributes:
        inputs: int64 [B, T].
        targets: int64 [B, T]; `targets[b, t]` is the token after `inputs[b, t]` in the text.
        document_ids: int32 [B, T], the number of the document that each input token belongs to, counted from
            0 within its row; None unless documents are masked from each other. A separator belongs to the
            document that it ends. Targets are kept across a border: a document's last token is trained to
            predict the separator, and the separator to predict how a document begins.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; to CUDA through pinned memory, without waiting for the copy."""
        if device.type == "cpu":
            return self
        ids = self.document_ids
        inputs, targets, ids = (
            t if t is None else t.pin_memory().to(device, non_blocking=True) for t in (self.inputs, self.targets, ids)
        )
        assert inputs is not None and targets is not None
        return Batch(inputs, targets, ids)


@dataclass(frozen=True)
class TokenSplit:
    """One side of a corpus, training or validation.

    Attributes:
        name: "training" or "validation", for messages.
        tokens: Unsigned integers [num_tokens], in memory or mapped from a file.
        separator_id: The token that ends each document when documents are masked from each other, else
            None.
    """

    name: str
    tokens: Tokens | TokenShards
    separator_id: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def num_windows(self, context: int) -> int:
        """How many windows of `context` inputs and their targets fit side by side.

        Raises:
            ValueError: If not even one fits.
        """
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        if len(self) < context + 1:
            raise ValueError(
                f"the {self.name} data has {len(self)} tokens, fewer than one sequence of context + 1 = "
                f"{context + 1}; give more data or lower the context"
            )
        return (len(self) - 1) // context


class Batches:
    """Training batches: an endless sequence of windows, cut into batches of B rows.

    An epoch lays windows side by side over the split, from a phase in [0, T) drawn for this epoch, and visits
    each once, in an order drawn for this epoch: so no token is trained on twice within an epoch (as a
    target), and the cuts fall elsewhere in the next. Fewer than 2T tokens, at the ends, sit an epoch out.
    Batch s is items s·B ... s·B + B - 1 of the endless sequence; it may span two epochs.

    Phase and order come from the raw 64-bit stream of Philox with the key (seed, epoch), the order as its
    stable argsort. NumPy guarantees raw streams, and not `permutation`, to stay the same between versions and
    platforms. An epoch's order costs 8 bytes and up to 0.5 µs per window, once.

    Args:
        split: The tokens.
        context: T.
        batch_size: B, the global batch: of all data-parallel ranks together.
        seed: At least 0.

    Raises:
        ValueError: If the split is shorter than T + 1 tokens, or an argument is out of its range.
    """

    def __init__(self, split: TokenSplit, *, context: int, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2**64 - 1, got {seed}")
        self.split = split
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        split.num_windows(context)  # refuses a split without a single window
        # As many windows as fit at every phase, so that all epochs have the same length.
        self.windows_per_epoch = max(1, len(split) // context - 1)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __call__(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of one step.

        Args:
            step: Counted from 0.
            rows: Which rows, for a data-parallel rank; by default all of them.

        Returns:
            The rows of the batch, in order.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        chosen = range(self.batch_size)[rows if rows is not None else slice(None)]
        starts = [self._start(step * self.batch_size + row) for row in chosen]
        return _gather(self.split, starts, self.context)

    def _start(self, item: int) -> int:
        epoch, place = divmod(item, self.windows_per_epoch)
        phase, order = self._epoch(epoch)
        return phase + int(order[place]) * self.context

    def _draw_epoch(self, epoch: int) -> tuple[int, Tokens]:
        stream = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
        slack = len(self.split) - 1 - self.windows_per_epoch * self.context
        phase = int(stream.random_raw()) % min(slack + 1, self.context)
        return phase, np.argsort(stream.random_raw(self.windows_per_epoch), kind="stable")


def val_batches(split: TokenSplit, *, context: int, batch_size: int, num_sequences: int | None = None) -> list[Batch]:
    """The fixed set that a run is evaluated on: windows without overlap, spread evenly over the split.

    Which windows it holds does not depend on how they are batched.

    Args:
        split: The tokens.
        context: T.
        batch_size: B; the last batch may have fewer rows.
        num_sequences: How many windows; by default, and at most, all that the split holds.

    Returns:
        The batches, the same on every call.

    Raises:
        ValueError: If the split is shorter than T + 1 tokens, or an argument is out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_sequences is not None and num_sequences < 1:
        raise ValueError(f"num_sequences must be at least 1, or None for all of the split, got {num_sequences}")
    num_windows = split.num_windows(context)
    num_rows = num_windows if num_sequences is None else min(num_sequences, num_windows)
    starts = [row * num_windows // num_rows * context for row in range(num_rows)]
    return [_gather(split, starts[first : first + batch_size], context) for first in range(0, num_rows, batch_size)]


def _gather(split: TokenSplit, starts: list[int], context: int) -> Batch:
    windows = np.empty((len(starts), context + 1), dtype=np.int64)
    for row, start in enumerate(starts):
        windows[row] = split.tokens[start : start + context + 1]
    inputs, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
    document_ids = None
    if split.separator_id is not None:
        ended = np.zeros(inputs.shape, dtype=np.int32)
        np.cumsum(inputs[:, :-1] == split.separator_id, axis=1, out=ended[:, 1:])
        document_ids = torch.from_numpy(ended)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), document_ids)
