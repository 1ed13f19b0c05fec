"What a run writes: JSON that any reader takes."
import errno
import json
from collections import Counter, OrderedDict
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path, PureWindowsPath
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_nb import core, places, values


@dataclass
class Point:
    x: float
    place: Path


def strictly(text):
    "JSON as its standard has it: Python's own reader takes NaN, other readers do not."
    def refuse(word): raise AssertionError(f"{word} is no JSON")
    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value, expected", [
    (float("nan"), None), (float("inf"), None), (-np.inf, None), (np.float32("nan"), None), (pd.NA, None), (pd.NaT, None),
    (np.datetime64("NaT"), None), (np.longdouble("1e4000"), None), (np.ma.masked, None), (torch.tensor(float("nan")), None),
    (np.float64(0.1), 0.1), (np.float32(0.5), 0.5), (np.int64(-3), -3), (np.uint8(255), 255), (np.bool_(True), True), (True, True),
    (np.array(4), 4), (np.array([1, 2]), [1, 2]), (np.array([[0.5, np.nan]]), [[0.5, None]]), (np.array(["a", None], object), ["a", None]),
    (torch.tensor([[1.5, 2]]), [[1.5, 2.0]]), (torch.nn.Parameter(torch.ones(2)), [1.0, 1.0]), (torch.tensor(3), 3),
    ((1, (2,)), [1, [2]]), ({3, 20, 1}, [1, 3, 20]), (frozenset("ba"), ["a", "b"]), ({1, "a"}, ["a", 1]), (range(3), [0, 1, 2]),
    (Path("a/b.png"), "a/b.png"), (PureWindowsPath("a\\b"), "a/b"), (np.str_("é"), "é"), ("\udcff", "\\udcff"),
    (pd.Timestamp("2022-01-01 12:00"), "2022-01-01T12:00:00"), (np.datetime64("2022-01-01", "ns"), "2022-01-01T00:00:00"),
    (np.array(["2022-01-01"], "datetime64[ns]"), ["2022-01-01T00:00:00"]), (date(2022, 1, 1), "2022-01-01"), (datetime(2022, 1, 1, 1), "2022-01-01T01:00:00"),
    (Point(np.float32(1), Path("p")), {"x": 1.0, "place": "p"}), ({"p": [Point(np.nan, Path("p"))]}, {"p": [{"x": None, "place": "p"}]}),
    ({1: "a", np.int64(2): "b", 0.5: "c"}, {"1": "a", "2": "b", "0.5": "c"}), (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    (Counter("aab"), {"a": 2, "b": 1}), (MappingProxyType({"a": 1}), {"a": 1}), (10**30, 10**30), ({}, {}), (set(), []),
])
def test_values_of_the_field_become_json(value, expected):
    made = values.json_value(value)
    assert made == expected and type(made) is type(expected)
    assert strictly(values.json_text(value)) == expected


@pytest.mark.parametrize("value, message", [
    ({"a": {"b": [0, object()]}}, "value['a']['b'][1] is of type object"), (1j, "value is of type complex"), (b"x", "of type bytes"),
    (np.array([1j]), "value[0] is of type complex"), (np.timedelta64(1, "s"), "of type timedelta64"), (np.array([1], "m8[s]"), "value[0] is of type timedelta64"),
    (torch.float32, "of type dtype"), (pd.Series([1.0]), "of type Series"), (pd.DataFrame({"a": [1]}), "of type DataFrame"), (iter([1]), "list_iterator"),
    (Point, "of type type"), (lambda: 1, "of type function"), ({(1, 2): 3}, "has the key (1, 2)"), ({float("nan"): 3}, "has the key nan"), ({None: 3}, "has the key None"),
    ({1: "a", "1": "b"}, "two keys that are '1'"), ({object(): 1}, "a key of value is of type object"),
])
def test_what_json_has_no_form_for_is_refused_by_its_place(value, message):
    with pytest.raises(TypeError) as refused: values.json_text(value)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_value_that_holds_itself_is_refused():
    itself = {}; itself["again"] = itself
    with pytest.raises(TypeError, match="holds itself"): values.json_text(itself)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_NB_OUTPUTS", str(tmp_path))
    return core.Run("24_text_encoder", {"profile": "demo", "rate": 0.5, "__annotations__": {"profile": str, "rate": float}})


def test_a_record_is_json_for_any_reader(run):
    returned = run.finish(says=["It ran."], psnr=np.float32("nan"), auc=[np.float64(0.5), float("-inf")], where=Path("x"), n=np.int64(3))
    kept = strictly((run.folder / "records/24_text_encoder.json").read_text(encoding="utf-8"))
    assert kept == returned and kept["says"] == ["It ran."] and kept["results"] == {"psnr": None, "auc": [0.5, None], "where": "x", "n": 3}


def test_a_refused_result_leaves_no_record_and_names_its_key(run):
    with pytest.raises(TypeError, match=r"^notebook 24_text_encoder: results\['model'\] is of type Linear"):
        run.finish(says=["It ran."], psnr=1.0, model=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="two keys"): run.write_json("measures/x.json", {1: 1, "1": 2})
    assert not list(run.folder.rglob("*"))


@pytest.mark.parametrize("says", [[], "", "a sentence that is no list", ["One.", ""], [" \n"], [1]])
def test_a_run_that_says_nothing_in_words_is_refused_and_leaves_no_record(run, says):
    with pytest.raises(ValueError, match="^notebook 24_text_encoder: `says` takes a list of sentences; without results, one on why$"): run.finish(says=says, n=1)
    with pytest.raises(TypeError, match="says"): run.finish(n=1)
    assert not list(run.folder.rglob("*"))


def test_a_run_shows_the_sentences_that_its_record_keeps(run, capsys):
    record = run.finish(says=["One <b>image</b>.", "Two — images."])
    assert capsys.readouterr().out == "One <b>image</b>.\nTwo — images.\n"
    assert core.sentences_of(record) == record["says"] == strictly((run.folder / "records/24_text_encoder.json").read_text(encoding="utf-8"))["says"]


def test_every_committed_record_is_json_for_any_reader():
    records = list((places.repo_root() / "outputs/demo/records").glob("*.json"))
    assert records and all(strictly(path.read_text(encoding="utf-8"))["parameters"] for path in records)


@pytest.mark.parametrize("error, free", [(OSError(errno.ENOSPC, "No space left on device"), 1 << 40), (RuntimeError("unexpected pos 345728 vs 345622"), 4096)])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch, error, free):
    path = tmp_path / "a.pt"
    path.write_text("before")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    with pytest.raises(OSError, match=f"^{path}: cannot be written, the disk is full; make room, and call again$"):
        with places.written_whole(path) as partial:
            partial.write_text("half")
            raise error
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="^other$"):
        with places.written_whole(tmp_path / "a") as partial: raise RuntimeError("other")
