import threading
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from nsphere.presets import make_config, make_model
from nsphere.train.distributed import Layout, World, name_of_this_start, start
from nsphere.train.parallelize import parallelize
from nsphere.train.ranks import LostRank


@pytest.mark.parametrize(
    ("layout", "size", "shard"),
    [(Layout(), 1, 1), (Layout(), 8, 8), (Layout(dp_replicate=2, tp=2), 8, 2), (Layout(tp=8), 8, 1)],
)
def test_what_is_not_given_is_sharded(layout: Layout, size: int, shard: int) -> None:
    assert layout.resolve(size).dp_shard == shard


@pytest.mark.parametrize(
    ("layout", "size", "message"),
    [
        (Layout(tp=3), 4, "tp 3 is 3 ranks and torchrun started 4 ranks; start torchrun --nproc-per-node 3"),
        (Layout(tp=2), 1, "tp 2 is 2 ranks and this is one process; start torchrun --nproc-per-node 2"),
        (Layout(dp_shard=2), 4, "dp_shard 2 x tp 1 is 2 ranks and torchrun started 4"),
    ],
)
def test_a_layout_of_another_size_is_refused(layout: Layout, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.resolve(size)


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="tp must be at least 1, got 0"):
        Layout(tp=0)
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got -1"):
        Layout(timeout=-1)


def test_one_process_is_a_world_of_one() -> None:
    with start(Layout(), "cpu") as world:
        assert (world.rank, world.size, world.dp_rank, world.tp_rank, world.is_first) == (0, 1, 0, 0, True)
        assert world.largest(7, 0.5) == [7, 0.5] and world.first(lambda: "a") == "a" and world.all(lambda: 3) == [3]
        assert world.first_then_all(lambda: 3) == 3
        world.wait()
    assert world.describe() == "one process"


def test_a_rank_s_place() -> None:
    world = World(Layout(dp_replicate=2, dp_shard=3, tp=4), torch.device("cpu"))
    assert (world.dp, world.tp) == (6, 4)


def meet(store: dist.Store, size: int, order: list[int], seconds: float = 30.0) -> dict[int, Future[str]]:
    """What each rank calls this start, as threads that come one after the other."""
    with ThreadPoolExecutor(size) as pool:
        come: dict[int, Future[str]] = {}
        for rank in order:
            come[rank] = pool.submit(name_of_this_start, store, rank, size, timedelta(seconds=seconds))
            threading.Event().wait(0.12)
    return come


def test_ranks_started_again_on_one_store_take_no_answer_from_before() -> None:
    store, names = dist.HashStore(), set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]):
        told = {come.result() for come in meet(store, 3, order).values()}
        assert len(told) == 1 and told.isdisjoint(names), order
        names |= told


def test_a_rank_that_never_comes_is_named() -> None:
    store = dist.HashStore()
    meet(store, 3, [0, 1, 2])  # an earlier start, with all of them
    come = meet(store, 3, [1, 0], seconds=1.0)
    with pytest.raises(LostRank, match="^rank 2 of 3 did not come within 1 s; start the job again$"):
        come[0].result()
    with pytest.raises(LostRank, match="^a rank of 3 did not come within 1 s; start the job again$"):
        come[1].result()


def test_activation_checkpointing_computes_blocks_again() -> None:
    """And gives the same gradients. Compiled and sharded: tests/distributed."""
    config = make_config("ngpt", vocab_size=11, context=8, d_model=8, num_layers=2, num_heads=2)
    tokens = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_model(config)
        calls: list[int] = []
        block = model.blocks[1]
        block.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        world = World(Layout(1, 1, 1, activation_checkpointing=checkpointing), torch.device("cpu"))
        parallelize(model, world, None, compile=False)
        model.loss(tokens, tokens).backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
