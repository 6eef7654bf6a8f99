"""Checkpoints that are written beside the training."""

import logging
import threading

import pytest
import torch
from torch import nn

from nsphere.train.checkpoint import CheckpointSaver, latest_checkpoint, load_checkpoint
from nsphere.train.checkpoint import save as save_module


@pytest.fixture
def gate(monkeypatch):
    """Saves wait in their middle until this is set."""
    gate, write = threading.Event(), save_module.write_manifest

    def waiting(*args):
        assert gate.wait(60)
        write(*args)

    monkeypatch.setattr(save_module, "write_manifest", waiting)
    return gate


def make(value):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    fill(model, optimizer, value)
    return model, optimizer


@torch.no_grad()
def fill(model, optimizer, value):
    for tensor in [*model.parameters(), *(s["exp_avg"] for s in optimizer.state.values())]:
        tensor.fill_(value)


def test_what_is_saved_is_the_state_of_the_call_and_not_of_the_writing(tmp_path, gate):
    model, optimizer = make(1.0)
    with CheckpointSaver(tmp_path) as saver:
        saver.save(step=1, model=model, optimizer=optimizer, state={})
        fill(model, optimizer, 2.0)
        optimizer.param_groups[0]["lr"] = 7.0
        assert latest_checkpoint(tmp_path) is None  # nor does looking clean away what is under way
        gate.set()
    other, restored = make(3.0)
    load_checkpoint(tmp_path).restore(other, restored)
    values = {*other.weight.flatten().tolist(), *restored.state[other.weight]["exp_avg"].flatten().tolist()}
    assert values == {1.0}
    assert restored.param_groups[0]["lr"] == 1e-3


def test_one_at_a_time(tmp_path, gate):
    model, optimizer = make(1.0)
    with CheckpointSaver(tmp_path) as saver:
        saver.save(step=1, model=model, optimizer=optimizer, state={})
        threading.Timer(0.2, gate.set).start()
        saver.save(step=2, model=model, optimizer=optimizer, state={})
        assert (tmp_path / "checkpoints" / "step-00000001").is_dir()  # the second waited for the first
    assert load_checkpoint(tmp_path).step == 2


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("then", ["wait", "save", "exit"])
def test_what_goes_wrong_is_raised_by_the_next_call(tmp_path, monkeypatch, then):
    model, optimizer = make(1.0)
    saver = CheckpointSaver(tmp_path)
    saver.save(step=1, model=model, optimizer=optimizer, state={})
    saver.wait()
    monkeypatch.setattr(save_module, "write_manifest", full)
    saver.save(step=2, model=model, optimizer=optimizer, state={})
    with pytest.raises(OSError, match="step 2 could not be written .*No space left.*the last good .*step-00000001"):
        if then == "wait":
            saver.wait()
        elif then == "save":
            saver.save(step=3, model=model, optimizer=optimizer, state={})
        else:
            with saver:
                pass
    assert not saver.has_failed  # it is told once
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_it_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, caplog):
    model, optimizer = make(1.0)
    monkeypatch.setattr(save_module, "write_manifest", full)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt), CheckpointSaver(tmp_path) as saver:
        saver.save(step=1, model=model, optimizer=optimizer, state={})
        raise KeyboardInterrupt
    assert "the checkpoint of step 1 could not be written" in caplog.text


def test_in_the_foreground_it_is_there_on_return(tmp_path):
    model, optimizer = make(1.0)
    CheckpointSaver(tmp_path, background=False).save(step=1, model=model, optimizer=optimizer, state={})
    assert load_checkpoint(tmp_path).step == 1
