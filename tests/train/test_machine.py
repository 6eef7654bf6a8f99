import torch

from nsphere.ops import backend
from nsphere.train import machine
from nsphere.train.ranks import ALONE
from nsphere.train.timing import time_steps


def test_a_compiler_that_is_missing_or_broken_is_named(monkeypatch, tmp_path) -> None:
    backend.cpp_compiler.cache_clear()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    found = backend.cpp_compiler()
    assert not found.available and "/no/such/compiler" in found.reason
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    backend.cpp_compiler.cache_clear()
    monkeypatch.setenv("CXX", str(broken))
    found = backend.cpp_compiler()
    assert not found.available and "can't build" in found.reason
    backend.cpp_compiler.cache_clear()


def test_environment_is_complete() -> None:
    found = machine.environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["num_threads"] == torch.get_num_threads()
    assert all(found[key] for key in ("command", "nsphere", "python", "platform", "cpu", "device"))


class FakeTrainer:
    """A trainer whose step takes a known time, and notes when it was called."""

    device = torch.device("cpu")
    optimizers: tuple = ()
    world = ALONE

    def __init__(self, name: str, seconds: float, clock: "FakeClock") -> None:
        self.name, self.seconds, self.clock = name, seconds, clock
        self.model = torch.nn.Linear(1, 1)

    def step(self) -> None:
        self.clock.calls.append(self.name)
        self.clock.now += self.seconds


class FakeClock:
    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def perf_counter(self) -> float:
        return self.now


def test_steps_are_interleaved_and_medians_taken(monkeypatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr("nsphere.train.timing.time", clock)
    trainers = {name: FakeTrainer(name, seconds, clock) for name, seconds in (("a", 0.1), ("b", 0.3))}
    costs = time_steps(trainers, rounds=4)
    assert round(costs["a"].step_time_ms_median, 6) == 100
    assert round(costs["b"].step_time_ms_median, 6) == 300
    assert clock.calls[:12] == list("abab" + "abba" + "abba")
