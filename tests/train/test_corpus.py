import inspect
import json.decoder
import re
import textwrap

import pytest

from nsphere.train.corpus import TRAIN_MODULES, VAL_MODULES, read_stdlib

MODULES = TRAIN_MODULES + VAL_MODULES


def test_the_lists_name_each_module_once_in_order():
    assert list(TRAIN_MODULES) == sorted(TRAIN_MODULES)
    assert list(VAL_MODULES) == sorted(VAL_MODULES)
    assert len(set(MODULES)) == len(MODULES) == 330


def test_nothing_listed_is_missing_from_some_distribution_or_version():
    absent = "test tests idlelib tkinter turtle turtledemo lib2to3 ensurepip venv distutils pydoc_data msilib"
    removed = (
        "asynchat asyncore smtpd imp cgi cgitb chunk crypt imghdr mailcap nntplib pipes sndhdr telnetlib uu xdrlib"
    )
    forbidden = {*absent.split(), *removed.split(), "aifc", "audioop", "sunau", "tomllib", "_sysconfigdata"}
    assert not {part for module in MODULES for part in module.split(".")} & forbidden


def test_documents_are_the_running_interpreters_sources():
    train, val = read_stdlib()
    assert len(train) == len(TRAIN_MODULES) and len(val) == len(VAL_MODULES)
    assert train[TRAIN_MODULES.index("inspect")] == inspect.getsource(inspect)
    assert train[TRAIN_MODULES.index("re")] == inspect.getsource(re)
    assert val[VAL_MODULES.index("json.decoder")] == inspect.getsource(json.decoder)
    assert val[VAL_MODULES.index("textwrap")] == inspect.getsource(textwrap)


def test_size_and_share_held_out():
    train, val = (sum(len(text.encode()) for text in side) for side in read_stdlib())
    assert 6e6 < train + val < 12e6
    assert 0.04 < val / (train + val) < 0.07


def test_no_validation_document_is_in_training():
    train, val = read_stdlib()
    assert not set(train) & set(val)
    assert all("\0" not in text and text for text in train + val)


def test_a_package_reads_as_its_init_and_line_ends_are_line_feeds(tmp_path):
    for module in MODULES:
        stem = tmp_path.joinpath(*module.split("."))
        if module in ("pathlib", "email.mime.text"):
            stem.mkdir(parents=True, exist_ok=True)
            (stem / "__init__.py").write_bytes(f"# {module}\r\nx = 1\r\n".encode())
        else:
            stem.parent.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".py").write_bytes(f"# {module}\r\nx = 1\r\n".encode())
    train, val = read_stdlib(tmp_path)
    assert train == [f"# {module}\nx = 1\n" for module in TRAIN_MODULES]
    assert val == [f"# {module}\nx = 1\n" for module in VAL_MODULES]


def test_a_missing_module_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"Python's module '{MODULES[0]}', which .* lacks; install") as caught:
        read_stdlib(tmp_path)
    assert "\n" not in str(caught.value)
