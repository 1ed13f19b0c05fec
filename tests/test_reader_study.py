"The reader study as readers meet it: in a browser alone, in JupyterLab, and through a kernel that dies."
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
from browser import Browser, in_chromium, jupyter_lab, run_all, until
from conftest import KERNEL
from PIL import Image

from cxr_nb import graph
from cxr_nb.autoencoder import statistics_table
from cxr_nb.reader_sheet import write_sheet
from cxr_nb.reading_results import results_table
from cxr_nb.reading_study import Reading, all_answers, answer, image_items, import_answers, pair_items, read_study, write_study
from cxr_nb.reconstruction import printed_quality, reader_results, readers_sentence, with_readers


@pytest.fixture
def paths(tmp_path):
    rng, paths = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths: Image.fromarray(rng.integers(0, 255, (80, 60), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def pairs(paths, tmp_path): return write_study(tmp_path / "pairs", "reconstruction", pair_items(paths[:3], paths[3:], 3))


def begin(browser, study, reader):
    browser.open(write_sheet(study).as_uri())
    browser.value(f"document.getElementById('reader').value = '{reader}'; document.querySelector('#start button').click()")


def press(browser, key):
    "A key, once the images are there."
    browser.wait("sides.every(side => side.pixels)")
    browser.press(key)


@in_chromium
def test_a_sheet_is_read_by_keys_and_comes_back(pairs, tmp_path):
    with Browser(tmp_path / "chromium") as browser:
        begin(browser, pairs, "anna")
        for key in "41x": press(browser, key)  # x is no answer
        assert browser.value("by('count').textContent") == "2 of 3"
        browser.press("u")
        browser.press("n")
        browser.type("ribs, \"lost\"\nat 2")
        browser.press("Escape")
        # the page may be closed at any time
        begin(browser, pairs, "anna")
        assert browser.value("[by('count').textContent, by('question').textContent, by('note').value]") == ["1 of 3", "Item 0002. How good is the reconstruction?", "ribs, \"lost\"\nat 2"]
        browser.wait("sides.every(side => side.pixels)")
        browser.value("document.querySelectorAll('#answers button')[3].click()")
        press(browser, "5")
        assert "All items have been read" in browser.value("by('question').textContent")
        (tmp_path / "anna.csv").write_bytes(browser.value("csv()").encode())
        begin(browser, pairs, "ben")
        assert browser.value("by('count').textContent") == "0 of 3" and browser.console == []
    assert import_answers(pairs, tmp_path / "anna.csv") == "anna: 4 of 4 answers and notes are new"
    table = all_answers(pairs)
    assert table.answer.tolist() == ["4", "2", "5"] and table.note.tolist() == ["", "ribs, \"lost\"\nat 2", ""]


@in_chromium
def test_a_key_that_is_held_down_answers_once(pairs, tmp_path):
    with Browser(tmp_path / "chromium") as browser:
        begin(browser, pairs, "anna")
        press(browser, "4")
        for _ in range(3): browser.call("Input.dispatchKeyEvent", type="keyDown", key="4", text="4", autoRepeat=True)
        assert browser.value("by('count').textContent") == "1 of 3"


@in_chromium
def test_two_windows_do_not_overwrite_each_other(pairs, tmp_path):
    with Browser(tmp_path / "chromium") as browser:
        begin(browser, pairs, "anna")
        press(browser, "4")
        # what another window wrote meanwhile, before this one hears of it
        browser.value("localStorage.setItem(place(), JSON.stringify({given: [...given, {item: '0002', question: 'quality', answer: '2', time: new Date().toISOString()}], notes: {}}))")
        press(browser, "5")
        assert browser.value("[by('count').textContent, given.map(one => one.answer).join('')]") == ["2 of 3", "42"]
        assert "another window" in browser.value("by('warning').textContent")
        press(browser, "5")
        assert browser.value("given.map(one => one.answer).join('')") == "425"


@in_chromium
def test_a_browser_that_keeps_nothing_says_so(pairs, tmp_path):
    with Browser(tmp_path / "chromium") as browser:
        browser.call("Page.addScriptToEvaluateOnNewDocument", source="Object.defineProperty(window, 'localStorage', {get() { throw new Error('blocked'); }})")
        begin(browser, pairs, "anna")
        press(browser, "4")
        assert browser.value("by('count').textContent") == "1 of 3" and "export them before you close" in browser.value("by('warning').textContent")
        assert browser.console == []


@in_chromium
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)], ids=str)
def test_images_and_answers_are_seen_together(pairs, tmp_path, size):
    with Browser(tmp_path / "chromium") as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
        begin(browser, pairs, "anna")
        browser.wait("sides.every(side => side.pixels)")
        parts = "[...document.querySelectorAll('canvas, #answers button')].map(one => one.getBoundingClientRect().bottom)"
        assert max(browser.value(parts)) <= size[1] and browser.value("document.documentElement.scrollWidth") <= size[0]


@in_chromium
def test_a_sheet_shows_both_sides_alike(pairs, tmp_path):
    original = np.asarray(Image.open(pairs.folder / pairs.items[0]["images"][0]["path"]))
    middle = "[...sides.map(s => s.canvas.getContext('2d').getImageData(s.canvas.width / 2, s.canvas.height / 2, 1, 1).data[0])]"
    with Browser(tmp_path / "chromium") as browser:
        begin(browser, pairs, "anna")
        browser.wait("sides.every(s => s.pixels)")
        assert browser.value("Array.from(sides[0].pixels.data).filter((_, i) => i % 4 == 0)") == original.ravel().tolist()
        browser.value("look({level: 255, width: 2})")  # all but white is black
        assert set(browser.value(middle)) <= {0}
        browser.value("look({level: 0, width: 2, zoom: 100, x: 9, y: -9})")
        assert browser.value(middle) == [255, 255]
        assert browser.value("[view.zoom, view.x, view.y]") == [8, 1 - 1 / 16, 1 / 16]
        browser.press("0")
        assert browser.value("JSON.stringify(view) == JSON.stringify(whole())")


@in_chromium
def test_a_sheet_of_generated_images_asks_three_things(paths, tmp_path):
    origins = ["real", "generated"] * 3
    study = write_study(tmp_path / "images", "generated", image_items((p, o, "absent") for p, o in zip(paths, origins)))
    with Browser(tmp_path / "chromium") as browser:
        begin(browser, study, "anna")
        for _ in range(6):
            for key in "ga2": press(browser, key)
        (tmp_path / "anna.csv").write_bytes(browser.value("csv()").encode())
        assert "generated" not in browser.value("JSON.stringify(study.items)")
    import_answers(study, tmp_path / "anna.csv")
    assert all_answers(study).groupby("question").answer.unique().map(list).to_dict() == {"origin": ["g"], "finding": ["a"], "realism": ["2"]}


def test_writers_at_once_lose_nothing(pairs):
    code = "import sys; from cxr_nb.reading_study import *; r = Reading(read_study(sys.argv[1]), 'anna')\nfor i in range(60): r.add('note', item='0001', note=f'{sys.argv[2]} {i}')"
    running = [subprocess.Popen([sys.executable, "-c", code, pairs.folder, name]) for name in "ab"]
    assert [one.wait() for one in running] == [0, 0]
    notes = [event["note"] for event in Reading(pairs, "anna").events]
    assert sorted(notes) == sorted(f"{name} {i}" for name in "ab" for i in range(60))


def test_answers_that_do_not_fit_on_the_disk_leave_the_file_as_it_was(pairs):
    Reading(pairs, "anna").add("note", item="0001", note="before")
    file = pairs.folder / "readings/anna.jsonl"
    kept = file.read_bytes()
    code = """
import resource, signal, sys
from cxr_nb.reading_study import *
study = read_study(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
append_events(study, "anna", [{"event": "note", "item": "0001", "note": "x" * 40, "time": "2026-11-26T12:00:00Z"}] * 40)
"""
    done = subprocess.run([sys.executable, "-c", code, pairs.folder, str(len(kept) + 700)], capture_output=True, text=True)
    assert done.returncode == 1 and "nothing was saved" in done.stderr and file.read_bytes() == kept


def test_no_answer_is_lost_when_the_kernel_dies(pairs):
    "A process that answers as fast as it can is killed at any moment: what it was told is saved, is."
    code = """
import sys
from cxr_nb.reading_study import Reading, answer, read_study
reading = Reading(read_study(sys.argv[1]), "anna")
while True:
    item, question = reading.open
    answer(reading, item["item"], question.name, "4")
    print("saved", flush=True)
    reading.add("undo")
    print("undone", flush=True)
"""
    for pause in (0, 7, 20, 41):
        file = pairs.folder / "readings/anna.jsonl"
        before = len(file.read_text().splitlines()) if file.exists() else 0
        running = subprocess.Popen([sys.executable, "-c", code, pairs.folder], stdout=subprocess.PIPE, text=True)
        told = [running.stdout.readline() for _ in range(pause + 1)]
        running.send_signal(signal.SIGKILL)
        told += running.stdout.readlines()
        running.wait()
        events = Reading(read_study(pairs.folder), "anna").events
        assert len(events) - before in (len(told), len(told) + 1)
        assert [event["event"] for event in events[before:]][:len(told)] == [{"saved\n": "answer", "undone\n": "undo"}[line] for line in told]
        if Reading(pairs, "anna").answers: Reading(pairs, "anna").add("undo")


def test_scores_stand_beside_the_published_ones_and_nothing_does_without_readers(pairs):
    "As I_reader_study leaves them and 32_autoencoder_results takes them."
    def table():
        results = results_table(pairs).assign(source="Toy", vae="sd", size=64)
        results.to_csv(pairs.folder / "results.csv", index=False)
        read = reader_results([pd.read_csv(pairs.folder / "results.csv")], "Toy", "sd", 64)
        quality = statistics_table(pd.DataFrame({"ssim": [0.8, 0.9]}), np.array(["a", "b"]), printed_quality("MIMIC-CXR"), 50)
        return with_readers(quality, read, "measured on Toy").query("row == 'radiologist_score'").set_index("column"), readers_sentence(read)

    rows, sentence = table()
    assert rows.measured.isna().all() and rows.published["mean"] == 4.51 and rows.note.str.startswith("not read; cxr_nb run I_reader_study").all()
    for reader, keys in {"anna": "552", "ben": "434"}.items():
        reading = Reading(pairs, reader)
        for key in keys: answer(reading, reading.open[0]["item"], "quality", key)
    rows, sentence = table()
    given = np.array([5, 5, 2, 4, 3, 4])
    expected = {"mean": given.mean(), "sd": given.std(ddof=1), "median": 4, "min": 2, "max": 5, "share of 2 or less": 1 / 6}
    assert rows.measured.to_dict() == pytest.approx(expected) and (rows.n == 6).all() and rows.published.to_dict()["share of 2 or less"] == 0
    assert rows.ci_low["mean"] < given.mean() < rows.ci_high["mean"] and rows.note["mean"] == "measured on Toy; readers: 2"
    assert f"Readers (2) gave 6 scores of 1 to 5: mean {given.mean():.2f} [" in sentence and "published: mean 4.51" in sentence


def test_no_notebook_waits_for_a_reader():
    "The answers are read where there are any; the graph has no maker of them."
    made = graph.graph("demo")
    assert "reading/*/results.csv" in made.declared["32_autoencoder_results"].reads
    assert not any(file.startswith("reading/") for files in made.notebooks.values() for file in files.reads)


PANEL = """
from pathlib import Path
from cxr_nb.reader_panel import ReaderPanel
from cxr_nb.reading_study import read_study
ReaderPanel(read_study(Path(PLACE)), "anna")
"""
BUTTONS = "[...document.querySelectorAll('.jp-OutputArea .jupyter-button')]"


@in_chromium
def test_the_panel_in_jupyterlab(pairs, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    code = nbformat.v4.new_code_cell(PANEL.replace("PLACE", repr(str(pairs.folder))))
    nbformat.write(nbformat.v4.new_notebook(cells=[code], metadata=KERNEL), root / "reading.ipynb")
    with jupyter_lab(tmp_path, root) as address, Browser(tmp_path / "chromium") as browser:
        run_all(browser, f"{address}/lab/tree/reading.ipynb")
        browser.wait(f"{BUTTONS}.length == 6")  # five scores and undo
        assert browser.value("document.querySelectorAll('.jp-OutputArea-output[data-mime-type*=error], .jp-RenderedText[data-mime-type*=stderr]').length") == 0
        browser.wait("[...document.querySelectorAll('.jp-OutputArea img')].filter(i => i.naturalWidth).length == 2")
        browser.value(f"{BUTTONS}.find(b => b.textContent == '5').click()")
        until(lambda: len(all_answers(pairs)) == 1, "the click was not saved")
        browser.value("document.querySelector('input[placeholder^=click]').focus()")
        time.sleep(0.5)  # as long as a reader takes at the least
        browser.press("2")
        until(lambda: all_answers(pairs).answer.tolist() == ["5", "2"], "the key was not saved")
        browser.wait("[...document.querySelectorAll('.widget-label')].some(l => l.textContent == '2 of 3')")
        browser.picture(tmp_path / "panel.png")
