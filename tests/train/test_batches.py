import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsphere.train.batches import Batches, TokenSplit, val_batches


def positions(length: int) -> TokenSplit:
    """A split whose tokens are their own positions, so that a batch shows where it was cut."""
    return TokenSplit("training", np.arange(length, dtype=np.uint32))


def items(batches: Batches, first: int, last: int) -> torch.Tensor:
    """Rows first ... last - 1 of the endless sequence, whatever the batch size."""
    size = batches.batch_size
    rows = torch.cat([batches(step).inputs for step in range(first // size, math.ceil(last / size))])
    return rows[first % size :][: last - first]


@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 300), st.one_of(st.none(), st.integers(1, 60)))
@settings(max_examples=200, deadline=None)
def test_validation_windows_do_not_overlap_and_are_spread_evenly(context, batch_size, extra, num_sequences):
    length = context + 1 + extra
    batches = val_batches(positions(length), context=context, batch_size=batch_size, num_sequences=num_sequences)
    windows = (length - 1) // context
    rows = windows if num_sequences is None else min(num_sequences, windows)
    sizes = [len(batch.inputs) for batch in batches]
    assert sum(sizes) == rows and all(size == batch_size for size in sizes[:-1]) and 0 < sizes[-1] <= batch_size
    starts = torch.cat([batch.inputs[:, 0] for batch in batches])
    gaps = starts.diff()
    assert starts[0] == 0 and starts[-1] + context < length
    assert (gaps >= context).all() and (gaps % context == 0).all()
    if len(gaps):
        assert gaps.max() - gaps.min() <= context
        assert windows * context - starts[-1] <= gaps.max() + context
    assert all(torch.equal(batch.targets, batch.inputs + 1) for batch in batches)


@given(st.integers(1, 9), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 40)))
@settings(max_examples=50, deadline=None)
def test_the_validation_set_does_not_depend_on_how_it_is_batched(one, other, num_sequences):
    sets = [
        torch.cat(
            [b.inputs for b in val_batches(positions(200), context=5, batch_size=size, num_sequences=num_sequences)]
        )
        for size in (one, other)
    ]
    assert torch.equal(*sets)


def test_short_data_is_refused_with_both_lengths():
    split = TokenSplit("validation", np.zeros(64, dtype=np.uint8))
    message = r"the validation data has 64 tokens, fewer than one sequence of context \+ 1 = 65; give more data"
    with pytest.raises(ValueError, match=message):
        Batches(split, context=64, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=message):
        val_batches(split, context=64, batch_size=1)
    assert len(Batches(split, context=63, batch_size=2, seed=0)(4).inputs) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be from 0 to 2\*\*64 - 1, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(positions(100), **{"context": 8, "batch_size": 2, "seed": 0, **arguments})


def test_further_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        Batches(positions(100), context=8, batch_size=2, seed=0)(-1)
    with pytest.raises(ValueError, match="num_sequences must be at least 1, or None"):
        val_batches(positions(100), context=8, batch_size=2, num_sequences=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        val_batches(positions(100), context=8, batch_size=0)
