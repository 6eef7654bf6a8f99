"""Checkpoints under damage, kills and full disks.

Every weight of a saved model is the step it was saved at (or another known number), so that a mixture of two saves
would show.
"""

import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem

from nsphere.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, tensor_files
from nsphere.train.checkpoint import manifest as manifest_module
from nsphere.train.checkpoint import save as save_module
from nsphere.train.files import JsonlWriter, RunLock, read_jsonl

MODEL, OPTIMIZER = (f"{part}/shard-00001-model-00001-of-00001.safetensors" for part in ("model", "optimizer"))
FILES = [MODEL, OPTIMIZER, "state.json", "manifest.json"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A kill loses nothing that the kernel has, so these tests need no flushes; tests/train makes real ones."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def make(size=8):
    model = nn.Linear(size, size)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def numbers(model, optimizer):
    return [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]


def save(run, step, value=None, made=None):
    """A checkpoint of which every part says `value` (the step)."""
    value = step if value is None else value
    model, optimizer = made or make()
    with torch.no_grad():
        for tensor in numbers(model, optimizer):
            tensor.fill_(value)
    optimizer.param_groups[0]["lr"] = value
    return save_checkpoint(
        run, step=step, model=model, optimizer=optimizer, state={"architecture": "gpt", "value": value}
    )


def assert_whole(checkpoint, size=8):
    """All parts are of one save; its value."""
    value = checkpoint.state["value"]
    model, optimizer = make(size)
    checkpoint.restore(model, optimizer)
    assert {entry for tensor in numbers(model, optimizer) for entry in tensor.flatten().tolist()} == {value}
    assert optimizer.param_groups[0]["lr"] == value
    return value


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def cut_one_byte(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def lengthen(path):
    with open(path, "ab") as file:
        file.write(b" ")


def flip_first_bit(path):
    flip(path, 0, 0)


def flip_middle_bit(path):
    flip(path, path.stat().st_size // 2, 3)


def flip_last_bit(path):
    flip(path, path.stat().st_size - 1, 7)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def remove(path):
    path.unlink()


def flip(path, byte, bit):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


DAMAGES = [truncate, cut_one_byte, empty, lengthen, flip_first_bit, flip_middle_bit, flip_last_bit, zero, remove]


def one_line(text):
    assert "\n" not in text
    return text


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
class TestDamage:
    def test_the_broken_one_is_named_and_the_one_before_it_used(self, tmp_path, caplog, name, damage):
        save(tmp_path, 2)
        damage(save(tmp_path, 4) / name)
        with caplog.at_level(logging.WARNING):
            loaded = load_checkpoint(tmp_path)
        assert loaded.step == assert_whole(loaded) == 2
        (record,) = (r for r in caplog.records if r.name.startswith("nsphere"))
        message = one_line(record.getMessage())
        assert "step-00000004" in message
        assert name in message

    def test_named_by_the_user_it_is_an_error(self, tmp_path, name, damage):
        save(tmp_path, 2)
        path = save(tmp_path, 4)
        damage(path / name)
        with pytest.raises(ValueError, match="can't be used: ") as caught:
            load_checkpoint(path)
        assert f"step-00000004 can't be used: {name} " in one_line(str(caught.value))

    def test_none_left_names_every_one(self, tmp_path, name, damage):
        for step in (2, 4):
            damage(save(tmp_path, step) / name)
        with pytest.raises(ValueError, match="can be used") as caught:
            load_checkpoint(tmp_path)
        message = one_line(str(caught.value))
        assert f"step-00000004: {name} " in message
        assert f"step-00000002: {name} " in message


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_goes_unseen(tmp_path, name):
    path = save(tmp_path, 4) / name
    sound = path.read_bytes()
    places = range(len(sound)) if len(sound) < 1000 else random.Random(0).sample(range(len(sound)), 100)
    for byte in places:
        flip(path, byte, byte % 8)
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path)
        path.write_bytes(sound)
    assert_whole(load_checkpoint(tmp_path))


def resign(folder, **changes):
    """Rewrite the manifest as the writer would for what is in the folder now."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    entries = {str(p.relative_to(folder)): manifest_module.entry(p) for p in files}
    manifest_module.write_manifest(folder, int(folder.name.removeprefix("step-")), entries)
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(manifest_module.manifest_text(manifest))


class Payload:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return Path.write_text, (Path(self.target), "ran")


class TestPickles:
    @pytest.mark.parametrize("resigned", [False, True], ids=["as swapped", "with a fitting manifest"])
    @pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
    @pytest.mark.parametrize("kind", ["archive", "legacy", "pickle"])
    def test_refused_by_name_and_not_run(self, tmp_path, caplog, kind, name, resigned):
        run, sentinel = tmp_path / "run", tmp_path / "sentinel"
        save(run, 2)
        folder = save(run, 4)
        payload = Payload(sentinel)
        if kind == "pickle":
            (folder / name).write_bytes(pickle.dumps(payload))
        else:
            torch.save(payload, folder / name, _use_new_zipfile_serialization=kind == "archive")
        if resigned:
            resign(folder)
        with pytest.raises(ValueError, match=f"{name} is a pickle, which could run code when read; it was not read"):
            load_checkpoint(folder)
        with caplog.at_level(logging.WARNING):
            assert assert_whole(load_checkpoint(run)) == 2
        assert f"{name} is a pickle" in caplog.text
        assert not sentinel.exists()

    def test_the_payload_would_have_run(self, tmp_path):
        pickle.loads(pickle.dumps(Payload(tmp_path / "sentinel")))
        assert (tmp_path / "sentinel").read_text() == "ran"

    @pytest.mark.parametrize("name", ["state.json", "manifest.json"])
    def test_json_is_not_unpickled_either(self, tmp_path, name):
        folder = save(tmp_path / "run", 4)
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "sentinel")))
        if name == "state.json":
            resign(folder)
        with pytest.raises(ValueError, match=f"can't be used: {name} is"):
            load_checkpoint(folder)
        assert not (tmp_path / "sentinel").exists()

    def test_a_header_length_that_begins_like_a_pickle_is_none(self, tmp_path):
        """safetensors files whose header has 0x80 as its lowest length byte are read."""
        for size in range(1, 140):
            model = nn.Module()
            model.register_buffer("a" * size, torch.ones(2))
            path = save_checkpoint(tmp_path, step=size, model=model, optimizer=None, state={})
            if (path / MODEL).read_bytes()[0] == 0x80:
                assert load_checkpoint(tmp_path).model_tensors["a" * size].tolist() == [1, 1]
                return
        pytest.fail("no header of that length came up")


class TestContents:
    def test_a_newer_schema_is_refused_and_not_fallen_back_from(self, tmp_path):
        save(tmp_path, 2)
        folder = save(tmp_path, 4)
        resign(folder, schema_version=3)
        for look, path in ((load_checkpoint, tmp_path), (load_checkpoint, folder), (latest_checkpoint, tmp_path)):
            with pytest.raises(ValueError, match="schema version 3, and this nsphere reads up to 2; update") as caught:
                look(path)
            one_line(str(caught.value))

    def test_one_from_before_the_first_release_is_refused_too(self, tmp_path):
        folder = save(tmp_path, 4)
        files = json.loads((folder / "manifest.json").read_text())["files"]
        old = {"schema_version": 1, "step": 4, "files": {"model.safetensors": files[MODEL]}}
        (folder / "manifest.json").write_text(manifest_module.manifest_text(old))
        for look, path in ((load_checkpoint, tmp_path), (load_checkpoint, folder), (latest_checkpoint, tmp_path)):
            with pytest.raises(ValueError, match="schema version 1, from before nsphere's first release") as caught:
                look(path)
            one_line(str(caught.value))

    @pytest.mark.parametrize("name", ["other.safetensors", ".metadata", "shard-00002-model-00001-of-00001.safetensors"])
    def test_a_file_that_was_not_written_there_is_not_read(self, tmp_path, name):
        folder = save(tmp_path, 4)
        shutil.copy(folder / MODEL, folder / "model" / name)
        with pytest.raises(ValueError, match=f"model/{name} is not in manifest.json; take it away"):
            load_checkpoint(folder)

    def test_a_part_of_a_tensor_with_a_fitting_manifest(self, tmp_path):
        folder = save(tmp_path, 4)
        with safe_open(folder / MODEL, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        offsets = {name: {"saved_offsets": [2] + [0] * (t.dim() - 1)} for name, t in tensors.items()}
        save_file(tensors, folder / MODEL, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
        resign(folder)
        with pytest.raises(ValueError, match="model holds (weight|bias) in part only"):
            load_checkpoint(folder)

    @pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
    def test_nonsense_with_a_fitting_manifest(self, tmp_path, name):
        folder = save(tmp_path, 4)
        (folder / name).write_bytes(os.urandom(64))
        resign(folder)
        with pytest.raises(ValueError, match=f"{name} is not a readable safetensors file"):
            load_checkpoint(folder)

    def test_a_manifest_that_points_elsewhere(self, tmp_path):
        folder = save(tmp_path, 4)
        files = json.loads((folder / "manifest.json").read_text())["files"]
        resign(folder, files=files | {"../../../secret": {"bytes": 1, "sha256": ""}})
        with pytest.raises(ValueError, match=r"does not list the files of a checkpoint"):
            load_checkpoint(folder)

    def test_files_of_two_checkpoints_are_not_mixed(self, tmp_path):
        first = save(tmp_path, 2)
        shutil.copy(save(tmp_path, 4) / OPTIMIZER, first / OPTIMIZER)
        with pytest.raises(ValueError, match=f"{OPTIMIZER} is damaged"):
            load_checkpoint(first)


NO_SPACE = (28, "No space left on device")


class TestFullDisk:
    def failed(self, run, step=6):
        with pytest.raises(OSError) as caught:
            save(run, step)
        message = one_line(str(caught.value))
        assert f"the checkpoint of step {step} could not be written to {run}: No space left on device" in message
        assert "MiB free" in message
        assert caught.value.errno == 28
        return message

    @pytest.mark.parametrize("at", range(14))
    def test_at_every_flush(self, tmp_path, monkeypatch, at):
        """The last good checkpoint is left and named, and nothing half written stays."""
        for step in (2, 4):
            save(tmp_path, step)
        calls, fsync = iter(range(1000)), os.fsync

        def full(descriptor):
            if next(calls) == at:
                raise OSError(*NO_SPACE)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        if at < 13:
            message = self.failed(tmp_path)
            last = 6 if at == 12 else 4  # the last flush follows the rename
            assert f"the last good checkpoint is {tmp_path}/checkpoints/step-{last:08d}" in message
        else:
            save(tmp_path, 6)
            assert next(calls) == 13, "a save flushes 13 times: this test must reach them all"
            last = 6
        monkeypatch.undo()
        assert assert_whole(load_checkpoint(tmp_path)) == last
        assert not [name for name in names(tmp_path) if name.startswith(".")]

    def test_while_tensors_are_written(self, tmp_path, monkeypatch):
        for step in (2, 4):
            save(tmp_path, step)

        def full(self, path, mode):
            raise OSError(*NO_SPACE)

        monkeypatch.setattr(FileSystem, "create_stream", full)
        assert "the last good checkpoint is" in self.failed(tmp_path)
        assert names(tmp_path) == ["step-00000002", "step-00000004"]

    def test_with_none_before(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(*NO_SPACE)))
        assert "there is no earlier checkpoint" in self.failed(tmp_path)

    def test_interrupted_by_the_keyboard(self, tmp_path, monkeypatch):
        save(tmp_path, 2)
        monkeypatch.setattr(save_module, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 4)
        assert names(tmp_path) == ["step-00000002"]

    def test_an_old_one_that_cannot_be_removed_is_no_failure(self, tmp_path, monkeypatch, caplog):
        for step in (2, 4):
            save(tmp_path, step)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
        with caplog.at_level(logging.WARNING):
            save(tmp_path, 6)
        assert "step-00000002 could not be removed (denied)" in caplog.text
        assert assert_whole(load_checkpoint(tmp_path / "checkpoints" / "step-00000006")) == 6


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


class TestSmallDisk:
    def test_a_disk_that_really_fills(self, small_disk):
        run = small_disk / "run"
        for step in (2, 4):
            save(run, step, made=make(100))  # 40 kB of weights, 80 kB of moments
        (small_disk / "filler").write_bytes(bytes(200_000))
        for _ in range(2):
            with pytest.raises(OSError, match="No space left on device") as caught:
                save(run, 6, made=make(100))
            assert f"the last good checkpoint is {run}/checkpoints/step-00000004" in one_line(str(caught.value))
            assert names(run) == ["step-00000002", "step-00000004"]
            assert assert_whole(load_checkpoint(run), size=100) == 4
        (small_disk / "filler").unlink()
        save(run, 6, made=make(100))
        assert assert_whole(load_checkpoint(run), size=100) == 6

    def test_a_metrics_line_that_does_not_fit_is_not_half_there(self, small_disk):
        path = small_disk / "metrics.jsonl"
        with JsonlWriter(path) as writer:
            writer.write({"step": 1})
            with open(small_disk / "filler", "wb", buffering=0) as filler:
                while filler.tell() < 508 << 10:  # all but the page that the metrics are in
                    filler.write(bytes(4096))
            with pytest.raises(OSError, match="a line could not be written"):
                writer.write({"step": 2, "text": "x" * 10_000})
            assert read_jsonl(path) == [{"step": 1}]
            (small_disk / "filler").unlink()
            writer.write({"step": 2})
        assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'

    def test_a_read_only_run_folder(self, small_disk):
        save(small_disk, 2)
        (small_disk / "checkpoints" / ".tmp-step-00000004-abcd").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        assert assert_whole(load_checkpoint(small_disk)) == 2
        with pytest.raises(OSError, match=r"Read-only file system.*; the last good checkpoint is .*step-00000002"):
            save(small_disk, 4)


def run_script(mode, run):
    """Run this file in a process of its own, which forks the jobs to be killed; what it printed, as JSON."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, mode, str(run)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TestKills:
    def test_at_every_stage_of_a_save(self, tmp_path):
        # in memory where there is such a folder: it is what the file system shows that matters, and there are many
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
            told = run_script("stages", folder)
        for kind in ("new", "again"):
            seen = told[kind]
            # killed before the rename: the old one; after it: the new one; never anything else
            assert len(seen) >= 25
            assert seen == sorted(seen)
            assert set(seen) == ({4, 6} if kind == "new" else {4, 40})
            assert seen.index(seen[-1]) > 12

    def test_at_random_moments(self, tmp_path):
        told = run_script("random", tmp_path)
        assert told["kills"] == 12
        assert told["in the middle of a save"] >= 2
        assert told["last step"] >= 12


def killed_at(event, run, job):
    """Fork a job that ends, as by a kill, before its event-th change of the disk. Whether it was reached."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == event:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        def torn_write(folder, *args):
            write(folder, *args)
            (path,) = folder.iterdir()
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
            changed()
            path.write_bytes(data)

        write, changed = tensor_files.write, counted(lambda: None)
        tensor_files.write = torn_write
        for name in ("mkdir", "rename", "replace", "fsync", "chmod", "unlink", "rmdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        job(run)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


def kill_at_every_stage(run):
    jobs = {"new": lambda folder: save(folder, 6), "again": lambda folder: save(folder, 4, value=40)}
    told = {}
    for step in (2, 4):
        save(run / "before", step)
    for kind, job in jobs.items():
        told[kind] = []
        for event in range(1, 1000):
            folder = run / f"{kind}-{event}"
            shutil.copytree(run / "before", folder)
            if not killed_at(event, folder, job):
                break
            # the folder as a reader finds it, and as the next save does
            copy = run / f"{kind}-{event}-copy"
            shutil.copytree(folder, copy)
            told[kind].append(assert_whole(load_checkpoint(copy)))
            assert not [name for name in names(copy) if name.startswith(".")]
            for name in names(copy):
                assert_whole(load_checkpoint(copy / "checkpoints" / name))
            save(folder, 8)
            assert assert_whole(load_checkpoint(folder)) == 8
            assert len(names(folder)) == 2, names(folder)
    return told


def kill_at_random(run):
    rng, size = random.Random(0), 100
    os.fsync = lambda _: time.sleep(0.002)  # a disk that takes its time, so that kills come in all stages of a save
    middle, last = 0, 0
    for _ in range(12):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            made, step = make(size), last
            with RunLock(run):
                while True:
                    step += 1
                    save(run, step, made=made)
                    os.write(write, step.to_bytes(4, "big"))
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            pipe.read(4)
            time.sleep(rng.uniform(0, 0.05))  # a save takes about 20 ms
            os.kill(child, 9)
            os.waitpid(child, 0)
            announced = pipe.read()
        said = int.from_bytes(announced[-4:], "big") if announced else last + 1
        middle += any(name.startswith(".") for name in names(run))
        loaded = load_checkpoint(run)
        assert assert_whole(loaded, size) == loaded.step >= said
        assert loaded.step <= said + 1
        for name in names(run):
            assert_whole(load_checkpoint(run / "checkpoints" / name), size)
        last = loaded.step
    return {"kills": 12, "in the middle of a save": middle, "last step": last}


if __name__ == "__main__":
    os.fsync = lambda _: None
    print(json.dumps({"stages": kill_at_every_stage, "random": kill_at_random}[sys.argv[1]](Path(sys.argv[2]))))
