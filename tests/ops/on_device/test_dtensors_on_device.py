"""The kernels on DTensors over two ranks, in Triton's interpreter."""

import pytest
from needs import kernels
from ops.on_device.device import ON_GPU
from ops.sharded_cases import work
from ranks import Job

pytestmark = [*kernels, pytest.mark.skipif(ON_GPU, reason="two ranks need two GPUs; the interpreter's are on the CPU")]


def test_parts_on_two_ranks_are_the_whole(tmp_path):
    job = Job(2, work("triton"), tmp_path / "log.txt")
    assert job.wait() == [0, 0], job.output()
