import pytest

from nsphere.train import progress


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_the_eta_leaves_out_the_first_step_which_compiles(monkeypatch, capsys) -> None:
    clock, said = Clock(), []
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress.console, "print", lambda text, **_: said.append(text))
    with progress.StepProgress("ngpt", 10, every=1, start=2) as p:
        for step, seconds in ((3, 100.0), (4, 2.0), (5, 2.0)):
            clock.now += seconds
            p.update(step, "loss 1")
    assert said == [
        "ngpt: step 3/10  loss 1  ETA –",
        "ngpt: step 4/10  loss 1  ETA 0:12",
        "ngpt: step 5/10  loss 1  ETA 0:10",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (90, "1:30"), (4000, "1:06:40")])
def test_durations(seconds, text) -> None:
    assert progress.duration(seconds) == text
