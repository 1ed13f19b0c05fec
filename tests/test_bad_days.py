"Faults that no other file tries, and the table of all: each that `J_bad_days` names has a test."
import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT
from PIL import Image
from test_checkpoints import COMMIT, find, go_to, model, works_with  # noqa: F401 (fixtures)

from cxr_nb.captions import sample_captions
from cxr_nb.evaluation import evaluate, evaluate_or_exit
from cxr_nb.image_lists import list_images
from cxr_nb.processes import one_writer
from cxr_nb.reader_sheet import write_sheet
from cxr_nb.reading_study import Reading, image_items, write_study

LOOKED_AT = {"extractors": ["cxr_nb/miniature/image_tower"], "judges": [], "image_text": ""}


def test_each_fault_of_the_table_has_its_test():
    text = "".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/J_bad_days.ipynb").read_text())["cells"])
    named = re.findall(r"`(test_\w+)::(test_\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / f"tests/{file}.py").read_text(), flags=re.M), f"tests/{file}.py has no {name}"


@pytest.fixture
def sets(tmp_path):
    "Two folders of images: drawn ones, for a prompt, and real ones with a table."
    rng = np.random.default_rng(0)
    for folder in ("drawn/a lung", "real"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(10): Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
    lines = [f"{i}.png,p{i // 2}" for i in range(10)]
    (tmp_path / "real/labels.csv").write_text("\n".join(["image,patient_id", *lines, ""]))
    return tmp_path / "drawn", tmp_path / "real"


def test_a_network_that_goes_in_mid_download_leaves_nothing_half(hub, go_to, model):  # noqa: F811
    (model / "model.safetensors").write_bytes(os.urandom(200_000))
    go_to(hub({"me/model": model}, COMMIT, cut=lambda path: path.endswith("model.safetensors"))[0])
    with pytest.raises(Exception) as caught: find()
    assert str(caught.value).startswith("a model: ") and "\n" not in str(caught.value)
    works_with(hub, go_to, model)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0\0\0"])
def test_a_damaged_lock_is_named_and_not_taken(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with pytest.raises(BlockingIOError, match="is no lock of this project; delete it if nothing runs") as caught:
        with one_writer(tmp_path / "lock", "a run"): pass
    assert "\n" not in str(caught.value) and (tmp_path / "lock").read_text() == content


def test_html_in_names_and_prompts_is_text_on_the_page(sets, tmp_path):
    drawn, real = sets
    bad = "<img src=x onerror=alert(1)>"
    (drawn / "a lung").rename(drawn / bad)
    evaluate(drawn, real, out=tmp_path / "out", **LOOKED_AT)
    page = (tmp_path / "out/evaluation.html").read_text()
    assert bad not in page and "onerror=alert" not in re.sub(r"&lt;img src=x onerror=alert\(1\)&gt;", "", page)


def test_html_in_a_study_is_text_in_its_sheet(sets, tmp_path):
    bad = "</script><script>alert(1)</script>"
    study = write_study(tmp_path / "study", "generated", image_items([(path, "real", "present") for path in sorted(sets[1].glob("*.png"))]), finding=bad)
    Reading(study, "anna").add("note", item="0001", note=bad)
    assert bad not in write_sheet(study).read_text() and "<script>alert" not in write_sheet(study).read_text()


@pytest.mark.parametrize("place", ["drawn", "real"])
def test_nothing_to_measure_is_one_line(sets, tmp_path, capsys, place):
    for path in [*(tmp_path / place).rglob("*.png"), *(tmp_path / place).glob("*.csv")]: path.unlink()
    assert evaluate_or_exit([str(sets[0]), str(sets[1]), "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"cxr_nb: {tmp_path / place}: holds no image file") and not (tmp_path / "out").exists()


def test_a_table_of_no_rows_is_one_line(sets):
    (sets[1] / "labels.csv").write_text("image,patient_id\n")
    with pytest.raises(ValueError, match="labels.csv: has a header and no rows") as caught: list_images(sets[1] / "labels.csv", "reference")
    assert "\n" not in str(caught.value)


def test_a_parquet_bomb_costs_no_memory(tmp_path):
    "Some hundred bytes that stand for 4 GB of text."
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * 10**6]))
    pa.parquet.write_table(pa.table({"TEXT": texts}), tmp_path / "part.parquet", compression="zstd")
    assert (tmp_path / "part.parquet").stat().st_size < 10_000
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match="column 'TEXT' holds texts of more than 100,000 bytes") as caught: sample_captions(tmp_path, 100)
    assert "\n" not in str(caught.value) and pa.default_memory_pool().max_memory() - before < 500 * 2**20
