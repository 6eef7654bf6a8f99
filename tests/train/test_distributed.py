import pytest
import torch

from nsphere.train.distributed import Layout, World, start


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
