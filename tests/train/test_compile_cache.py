"""What a killed compiler leaves is removed, and nothing else. That a run then trains: test_loop.py."""

from filelock import FileLock

from nsphere.train.compile_cache import remove_unwritten_libraries


def test_only_what_nobody_is_building(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert remove_unwritten_libraries() == []
    (tmp_path / "ab").mkdir()
    content = {"whole": b"\x7fELF...", "empty": b"", "zeros": bytes(4096), "building": b""}
    paths = {name: tmp_path / "ab" / f"c{name}.main.so" for name in content}
    for name, path in paths.items():
        path.write_bytes(content[name])
    (tmp_path / "ab" / "cempty.main.cpp").touch()
    (tmp_path / "ab" / "cgone.main.so").symlink_to(tmp_path / "nowhere")  # what can't be opened stops nothing
    (tmp_path / "nsphere").mkdir()
    (tmp_path / "nsphere" / "cother.so").touch()  # built under no lock of torch
    with FileLock(tmp_path / "locks" / "cbuilding.lock"):
        assert sorted(remove_unwritten_libraries()) == [paths["empty"], paths["zeros"]]
    assert sorted(path for path in (tmp_path / "ab").iterdir()) == [
        paths["building"],
        tmp_path / "ab" / "cempty.main.cpp",
        tmp_path / "ab" / "cgone.main.so",
        paths["whole"],
    ]
    assert remove_unwritten_libraries() == [paths["building"]]
    assert (tmp_path / "nsphere" / "cother.so").exists()
