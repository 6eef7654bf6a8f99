"""The ops on DTensors: the plain form here, the kernels in on_device/test_dtensors_on_device.py."""

from ops.sharded_cases import work
from ranks import Job


def test_parts_on_two_ranks_are_the_whole(tmp_path):
    job = Job(2, work(None), tmp_path / "log.txt")
    assert job.wait() == [0, 0], job.output()
