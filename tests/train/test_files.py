import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nsphere.train import files
from nsphere.train.files import (
    JsonlWriter,
    RunLock,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    fsync_file,
    read_jsonl,
)


class TestAtomicWrite:
    def test_writes_and_replaces(self, tmp_path):
        path = tmp_path / "a.bin"
        atomic_write_bytes(path, b"one\r\n")
        atomic_write_bytes(path, b"two")
        assert path.read_bytes() == b"two"
        assert os.listdir(tmp_path) == ["a.bin"]

    def test_text_is_utf8_with_its_newlines(self, tmp_path):
        atomic_write_text(tmp_path / "a.txt", "‖w‖\r\n=\n1")
        assert (tmp_path / "a.txt").read_bytes() == "‖w‖\r\n=\n1".encode()

    def test_json_keeps_every_bit_of_a_float(self, tmp_path):
        value = {"a": 0.1 + 0.2, "b": 5e-324, "c": float("inf"), "d": [1, True, None, "α"]}
        atomic_write_json(tmp_path / "a.json", value)
        assert json.loads((tmp_path / "a.json").read_text()) == value

    def test_a_file_is_as_readable_as_any_other(self, tmp_path):
        before = os.umask(0o022)
        try:
            atomic_write_bytes(tmp_path / "a", b"")
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644

    @pytest.mark.parametrize("stage", ["fsync", "replace"])
    def test_a_failure_leaves_the_old_content_and_nothing_else(self, tmp_path, monkeypatch, stage):
        path = tmp_path / "a"
        atomic_write_bytes(path, b"old")

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, stage, fail)
        with pytest.raises(OSError, match="No space"):
            atomic_write_bytes(path, b"new")
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a"]

    def test_content_reaches_the_disk_before_the_name_and_the_folder_after_it(self, tmp_path, monkeypatch):
        events = []
        fsync, replace = os.fsync, os.replace

        def noted_fsync(descriptor):
            events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split(".tmp")[-1])
            fsync(descriptor)

        def noted_replace(source, target):
            events.append("rename")
            replace(source, target)

        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("needs /proc to tell which file is flushed")
        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)
        atomic_write_bytes(tmp_path / "a", b"x")
        assert events == ["", "rename", tmp_path.name]

    def test_fsync_file_names_what_is_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            fsync_file(tmp_path / "none")


def steps(path):
    return [record["step"] for record in read_jsonl(path)]


class TestJsonlWriter:
    def test_lines_come_back_bit_for_bit(self, tmp_path):
        records = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-300, "note": "two\nlines"}]
        with JsonlWriter(tmp_path / "m.jsonl") as writer:
            for record in records:
                writer.write(record)
        assert read_jsonl(tmp_path / "m.jsonl") == records
        assert (tmp_path / "m.jsonl").read_bytes().count(b"\n") == 2

    def test_a_line_is_there_as_soon_as_it_is_written(self, tmp_path):
        writer = JsonlWriter(tmp_path / "m.jsonl")
        writer.write({"step": 1})
        assert steps(tmp_path / "m.jsonl") == [1]
        writer.close()
        writer.close()

    def test_without_a_resume_step_it_continues(self, tmp_path):
        for step in (1, 2):
            with JsonlWriter(tmp_path / "m.jsonl") as writer:
                writer.write({"step": step})
        assert steps(tmp_path / "m.jsonl") == [1, 2]

    @pytest.mark.parametrize(("resume", "kept"), [(-1, []), (0, [0]), (2, [0, 1, 2, 2]), (9, [0, 1, 2, 2, 3])])
    def test_resume_drops_later_steps(self, tmp_path, resume, kept):
        path = tmp_path / "m.jsonl"
        path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (0, 1, 2, 2, 3)))
        with JsonlWriter(path, resume_step=resume) as writer:
            writer.write({"step": 100})
        assert steps(path) == [*kept, 100]

    def test_a_line_without_a_step_goes_with_the_one_before_it(self, tmp_path):
        path = tmp_path / "m.jsonl"
        path.write_text('{"a": 0}\n{"step": 1}\n{"a": 1}\n{"step": 2}\n{"a": 2}\n')
        JsonlWriter(path, resume_step=1).close()
        assert read_jsonl(path) == [{"a": 0}, {"step": 1}, {"a": 1}]

    def test_resuming_leaves_the_old_file_when_it_cannot_replace_it(self, tmp_path, monkeypatch):
        path = tmp_path / "m.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}\n')
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            JsonlWriter(path, resume_step=1)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'

    @pytest.mark.parametrize("resume", [None, 1])
    @pytest.mark.parametrize("cut", range(1, 13))
    def test_a_torn_last_line_is_taken_away(self, tmp_path, resume, cut):
        path = tmp_path / "m.jsonl"
        whole = b'{"step": 1}\n'
        path.write_bytes(whole + whole[: len(whole) - cut])
        assert read_jsonl(path) == [{"step": 1}]
        with JsonlWriter(path, resume_step=resume) as writer:
            writer.write({"step": 2})
        assert path.read_bytes() == whole + b'{"step": 2}\n'

    @pytest.mark.parametrize("damage", [b'{"step": 2', b"\x00\x00\xff", b"7"])
    def test_a_damaged_line_is_named_and_left_out(self, tmp_path, caplog, damage):
        path = tmp_path / "m.jsonl"
        path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
        with caplog.at_level(logging.WARNING):
            JsonlWriter(path, resume_step=5).close()
        assert "m.jsonl: line 2 is damaged" in caplog.text
        assert steps(path) == [1, 3]

    def test_a_line_that_is_only_partly_written_is_taken_back(self, tmp_path, monkeypatch):
        path = tmp_path / "m.jsonl"
        writer = JsonlWriter(path)
        writer.write({"step": 1})
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
        with pytest.raises(OSError, match=r"m\.jsonl: a line could not be written \(No space left on device\)"):
            writer.write({"step": 2})
        monkeypatch.undo()
        writer.write({"step": 3})
        writer.close()
        assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


HOLD = """
import sys, time
from nsphere.train.files import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


class TestRunLock:
    def test_a_second_process_is_refused_until_the_first_is_gone(self, tmp_path):
        with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
            try:
                assert holder.stdout.readline() == b"held\n"
                with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on .*; wait") as refused:
                    RunLock(tmp_path).__enter__()
                assert "\n" not in str(refused.value)
            finally:
                holder.kill()
                holder.wait()
        with RunLock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()

    def test_a_second_job_of_the_same_process_is_refused(self, tmp_path):
        with RunLock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()}"):
            RunLock(tmp_path).__enter__()

    def test_it_ends_with_the_block_and_with_an_error_in_it(self, tmp_path):
        with pytest.raises(KeyError), RunLock(tmp_path):
            assert RunLock.is_held_here(tmp_path)
            raise KeyError
        assert not RunLock.is_held_here(tmp_path)
        with RunLock(tmp_path):
            pass

    def test_other_folders_are_free(self, tmp_path):
        with RunLock(tmp_path / "a"), RunLock(tmp_path / "b"):
            assert not RunLock.is_held_here(tmp_path)

    def test_a_refused_job_does_not_end_the_holders_lock(self, tmp_path):
        with RunLock(tmp_path):
            for _ in range(2):
                with pytest.raises(ValueError, match="in use"):
                    RunLock(tmp_path).__enter__()
            assert RunLock.is_held_here(tmp_path)

    def test_a_holder_without_a_name_still_refuses(self, tmp_path):
        with RunLock(tmp_path):
            (tmp_path / ".lock").write_text("")
            with pytest.raises(ValueError, match="in use by another process"):
                RunLock(tmp_path).__enter__()

    def test_a_file_system_without_locks_is_warned_of(self, tmp_path, monkeypatch, caplog):
        fcntl = pytest.importorskip("fcntl", reason="the lock of POSIX systems")

        def unsupported(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", unsupported)
        with caplog.at_level(logging.WARNING), RunLock(tmp_path):
            assert "can't be locked" in caplog.text

    def test_windows_locks_one_byte_behind_the_text(self, tmp_path, monkeypatch):
        fcntl = pytest.importorskip("fcntl", reason="stands in for msvcrt")

        def locking(descriptor, mode, size):
            assert (mode, size, os.lseek(descriptor, 0, os.SEEK_CUR)) == (2, 1, 1 << 30)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PermissionError(13, "Permission denied") from None

        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
        monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
        with RunLock(tmp_path):
            assert (tmp_path / ".lock").stat().st_size < 200
            with pytest.raises(ValueError, match=f"process {os.getpid()}"):
                RunLock(tmp_path).__enter__()
        atomic_write_bytes(tmp_path / "a", b"no folder to flush there")
