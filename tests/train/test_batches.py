import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsphere.train.batches import Batches, TokenShards, TokenSplit, val_batches


def positions(length: int) -> TokenSplit:
    """A split whose tokens are their own positions, so that a batch shows where it was cut."""
    return TokenSplit("training", np.arange(length, dtype=np.uint32))


def items(batches: Batches, first: int, last: int) -> torch.Tensor:
    """Rows first ... last - 1 of the endless sequence, whatever the batch size."""
    size = batches.batch_size
    rows = torch.cat([batches(step).inputs for step in range(first // size, math.ceil(last / size))])
    return rows[first % size :][: last - first]


@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 200), st.integers(0, 2**64 - 1), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_an_epoch_visits_every_window_once_and_nearly_every_token(context, batch_size, extra, seed, epoch):
    length = context + 1 + extra
    batches = Batches(positions(length), context=context, batch_size=batch_size, seed=seed)
    num_windows = batches.windows_per_epoch
    inputs = items(batches, epoch * num_windows, (epoch + 1) * num_windows)
    visited = inputs.sort(dim=0).values.flatten()
    # One stretch without a gap and without a repetition; all but its first token are also targets, and so is one more.
    assert visited.tolist() == list(range(int(visited[0]), int(visited[0]) + num_windows * context))
    assert visited[0] < context and visited[-1] + 1 < length
    assert length - 1 - len(visited) < 2 * context


def test_targets_are_the_next_tokens():
    batch = Batches(positions(1000), context=13, batch_size=6, seed=3)(5)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == (6, 13)
    assert torch.equal(batch.inputs, batch.inputs[:, :1] + torch.arange(13))
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert batch.document_ids is None
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()


def test_phase_and_order_are_drawn_anew_for_each_epoch():
    batches = Batches(positions(8 * 101), context=8, batch_size=100, seed=0)
    assert batches.windows_per_epoch == 100
    epochs = [batches(step).inputs[:, 0] for step in range(200)]
    phases = [int(starts.min()) for starts in epochs]
    assert set(phases) == set(range(8))
    orders = {tuple(((starts - phase) // 8).tolist()) for starts, phase in zip(epochs, phases, strict=True)}
    assert len(orders) == 200
    # Each place of an epoch sees early and late windows alike: the mean of 200 uniform draws from 0 ... 99 is
    # 49.5 ± 2.04, and the largest of 100 such deviations is beyond 4.5 of them once in 1,500 seeds.
    mean = torch.stack([(starts - phase) // 8 for starts, phase in zip(epochs, phases, strict=True)]).double().mean(0)
    assert (mean - 49.5).abs().max() < 4.5 * 2.04


def test_a_batch_depends_on_nothing_but_seed_and_step():
    split = positions(5000)
    batches = Batches(split, context=16, batch_size=4, seed=7)
    forward = [batches(step) for step in range(300)]
    fresh = Batches(split, context=16, batch_size=4, seed=7)
    for step in (299, 0, 150, 299, 77):
        assert torch.equal(fresh(step).inputs, forward[step].inputs)
    other = Batches(split, context=16, batch_size=4, seed=8)
    assert not torch.equal(other(0).inputs, forward[0].inputs)


def test_the_order_of_windows_does_not_depend_on_the_batch_size():
    split = positions(1000)
    small, large = (Batches(split, context=10, batch_size=size, seed=1) for size in (3, 8))
    assert torch.equal(items(small, 5, 400), items(large, 5, 400))


def test_ranks_take_slices_of_the_same_batch():
    batches = Batches(positions(300), context=8, batch_size=12, seed=2)
    whole = batches(9).inputs
    contiguous = [batches(9, slice(4 * rank, 4 * rank + 4)).inputs for rank in range(3)]
    strided = [batches(9, slice(rank, None, 3)).inputs for rank in range(3)]
    assert torch.equal(torch.cat(contiguous), whole)
    assert all(torch.equal(strided[rank], whole[rank::3]) for rank in range(3))


def philox(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., 2011) in plain integers, counters from 1 on as NumPy has it."""
    words: list[int] = []
    for block in range(1, count // 4 + 2):
        counter, (key0, key1) = [block, 0, 0, 0], key
        for _ in range(10):
            product0, product1 = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
            counter = [
                product1 >> 64 ^ counter[1] ^ key0,
                product1 % 2**64,
                product0 >> 64 ^ counter[3] ^ key1,
                product0 % 2**64,
            ]
            key0, key1 = (key0 + 0x9E3779B97F4A7C15) % 2**64, (key1 + 0xBB67AE8584CAA73B) % 2**64
        words += counter
    return words[:count]


@pytest.mark.parametrize("seed", [0, 1234, 2**64 - 1])
def test_batches_are_the_same_on_every_platform(seed):
    batches = Batches(positions(1009), context=10, batch_size=33, seed=seed)
    assert batches.windows_per_epoch == 99
    expected: list[int] = []
    for epoch in range(2):
        phase, *words = philox((seed, epoch), 100)
        expected += [phase % 10 + 10 * window for window in sorted(range(99), key=words.__getitem__)]
    assert items(batches, 0, 198)[:, 0].tolist() == expected


@pytest.mark.parametrize("cuts", [[0, 1000], [0, 1, 499, 500, 1000], [0, 333, 334, 335, 1000]])
def test_shards_read_as_one(cuts):
    tokens = np.arange(1000, dtype=np.uint16)
    shards = TokenShards([tokens[start:stop] for start, stop in pairwise(cuts)])
    assert len(shards) == 1000
    for start, stop in [(0, 1000), (0, 1), (332, 336), (498, 502), (990, 2000), (500, 500), (1000, 1005)]:
        assert np.array_equal(shards[start:stop], tokens[start:stop])
    sharded = Batches(TokenSplit("training", shards), context=30, batch_size=5, seed=0)
    assert torch.equal(sharded(3).inputs, Batches(positions(1000), context=30, batch_size=5, seed=0)(3).inputs)


@given(st.lists(st.integers(0, 3), min_size=10, max_size=60), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_document_ids_count_the_separators_before_a_token(tokens, context):
    split = TokenSplit("training", np.array(tokens, dtype=np.uint8), separator_id=2)
    batch = Batches(split, context=context, batch_size=3, seed=0)(0)
    assert batch.document_ids is not None and batch.document_ids.dtype == torch.int32
    expected = []
    for row in batch.inputs.tolist():
        document, ids = 0, []
        for token in row:
            ids.append(document)
            document += token == 2
        expected.append(ids)
    assert batch.document_ids.tolist() == expected


@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 300), st.one_of(st.none(), st.integers(1, 60)))
@settings(max_examples=200, deadline=None)
def test_validation_windows_do_not_overlap_and_are_spread_evenly(context, batch_size, extra, num_batches):
    length = context + 1 + extra
    batches = val_batches(positions(length), context=context, batch_size=batch_size, num_batches=num_batches)
    windows = (length - 1) // context
    whole = max(1, windows // batch_size)
    assert len(batches) == (whole if num_batches is None else min(num_batches, whole))
    assert all(len(batch.inputs) == min(batch_size, windows) for batch in batches)
    starts = torch.cat([batch.inputs[:, 0] for batch in batches])
    gaps = starts.diff()
    assert starts[0] == 0 and starts[-1] + context < length
    assert (gaps >= context).all() and (gaps % context == 0).all()
    if len(gaps):
        assert gaps.max() - gaps.min() <= context
        assert windows * context - starts[-1] <= gaps.max() + context
    assert all(torch.equal(batch.targets, batch.inputs + 1) for batch in batches)


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
    with pytest.raises(ValueError, match="num_batches must be at least 1, or None"):
        val_batches(positions(100), context=8, batch_size=2, num_batches=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        val_batches(positions(100), context=8, batch_size=0)
