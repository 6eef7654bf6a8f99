import json
import pickle
from pathlib import Path

import pytest

from nsphere.train.checkpoint.manifest import Broken
from nsphere.train.ranks import _portable


def error_of(do) -> Exception:
    with pytest.raises(Exception) as caught:
        do()
    return pickle.loads(pickle.dumps(_portable(caught.value)))


def test_an_error_reaches_the_other_ranks_as_what_it_is() -> None:
    """A rank that can't send its error would leave the others waiting."""

    def broken() -> None:
        raise Broken("state.json is missing")

    assert type(error_of(broken)) is Broken
    not_json = error_of(lambda: json.loads("{"))
    assert type(not_json) is ValueError and str(not_json).startswith("Expecting property name")
    not_text = error_of(lambda: b"\xff".decode())
    assert type(not_text) is ValueError and "can't decode byte 0xff" in str(not_text)
    absent = error_of(lambda: __import__("datasets_that_is_not_there"))
    assert isinstance(absent, ModuleNotFoundError) and absent.name == "datasets_that_is_not_there"
    missing = error_of(lambda: Path("/nowhere/file").read_text())
    assert isinstance(missing, OSError) and missing.errno == 2
    assert str(error_of(lambda: {}["x"])) == "KeyError: 'x'"
