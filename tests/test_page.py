"The page: self-contained, every table filled and equal to its file, every figure seen in a browser, nothing missing in silence."
import json
import re
import threading
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from browser import Browser, in_chromium
from conftest import ROOT, tracked
from PIL import Image

from cxr_nb import core, graph, page, profiles, tables

LIMITS = {"vector_kb": 60, "drawing_width": 600, "sheet_width": 600, "quality": 75, "open_lines": 4, "most_lines": 6}
DEMO = ROOT / "outputs/demo"
MODEL = "cxr_nb/miniature/stable_diffusion"


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    "A function that writes a small run of three notebooks and makes its page: (HTML, what it says of itself, folder)."
    monkeypatch.setenv("CXR_NB_OUTPUTS", str(tmp_path))
    profile = {"33_text_encoder_results": {}, "C_miniature": {}, "D_benchmarks": {}}
    monkeypatch.setattr(core, "load_profile", lambda name: profile)
    files = [graph.Files([], ["tables/table_2.csv", "figures/chexpert_at_k*"]), graph.Files([], ["tables/miniature.csv", "figures/miniature_prompts.png"])]
    others = [name for section in page.sections() for name in section["notebooks"] if name not in profile]
    made = graph.Graph(dict(zip(profile, [*files, graph.Files([], [])])), {name: f"profile 'made' leaves {name} out" for name in others}, {})
    for module in (core, graph, page): monkeypatch.setattr(module, "graph", lambda name: made)

    def leave(name, says, results, tables, figures, **parameters):
        run = core.Run(name, {"profile": "made", "__annotations__": {"profile": str}})
        run.parameters |= parameters
        for table, frame in tables.items(): run.write_csv(f"tables/{table}.csv", frame)
        for figure in figures:
            if figure == "chexpert_at_k": run.write_figure(figure, drawing())
            else: run.write(f"figures/{figure}.png", lambda p: Image.fromarray(noise()).save(p, "PNG"))
        run.finish(says=says, **results)

    def noise(): return np.random.default_rng(0).integers(0, 255, (90, 900, 3), dtype="uint8")

    def drawing():
        figure, ax = plt.subplots()
        ax.plot([1, 2], [3, 4], label="<b>a line</b>")
        ax.legend()
        plt.close(figure)
        return figure

    rows = [["CLIP", "mean", 42.8, 41.234, 40.05, 42.5, 90], ["CLIP", "cls", 7.0, np.nan, np.nan, np.nan, 0], ["<b>ours</b>", "mean", np.nan, 0.5, 0.1, 0.9, 80]]
    table = pd.DataFrame(rows, columns=tables.TABLE_COLUMNS).assign(k=10, note="measured on few")
    long = pd.DataFrame({"part": [f"part {i}" for i in range(9)], "what": "x", "reached": np.arange(9) / 7})
    leave("33_text_encoder_results", ["CLIP reaches 41.2.", "A <b>bag</b> of words reaches 40."], {}, {"table_2": table}, ["chexpert_at_k", "chexpert_at_k_phantom_reports"])
    leave("C_miniature", ["All weights are 1.5 MB."], {"megabytes": 1.5}, {"miniature": long}, ["miniature_prompts"], folder=MODEL)

    def make():
        run = core.Run("F_page", {"profile": "made", "__annotations__": {"profile": str}})
        html, about = page.report_page(run, profile, LIMITS)
        (tmp_path / "made/report.html").write_text(html)
        return html, about, tmp_path / "made"

    return make


class Tables(HTMLParser):
    "Rows of text of each table, by the file that the link before it leads to; images with their attributes; all that is loaded."
    def __init__(self, html):
        super().__init__()
        self.tables, self.images, self.loaded, self.links, self.cell, self.file = [], [], [], [], None, ""
        self.cards = []  # the file and the id of each
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loaded += [attributes[k] for k in ("src", "srcset", "data", "poster") if k in attributes]
        self.loaded += [attributes["href"]] if tag == "link" else []
        if tag == "article": self.cards.append((self.file, attributes["id"]))
        if tag == "a": self.links.append(attributes["href"])
        if tag == "a" and attributes["href"].endswith(".csv"): self.file = attributes["href"]
        if tag == "img": self.images.append(attributes)
        if tag == "table":
            self.tables.append((self.file, []))
            self.file = ""
        if tag == "tr": self.tables[-1][1].append([])
        if tag in ("td", "th"): self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append(self.cell.strip())
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None: self.cell += data


def check_self_contained(html):
    parsed = Tables(html)
    assert parsed.loaded and all(source.startswith("data:") for source in parsed.loaded)
    assert not re.search(r"@import|url\((?!#)|https?://|fetch\(|XMLHttp", html)
    # a browser shows a notebook's file as raw text: no link leads to one
    assert all(re.match(r"#|(tables|figures|records)/[\w.]+$", link) for link in parsed.links)
    assert all(f'id="{link[1:]}"' in html for link in parsed.links if link.startswith("#"))
    assert parsed.images and all(len(image["alt"]) > 20 for image in parsed.images)
    assert all(len(label) > 20 for label in re.findall(r'<svg [^>]*role="img" aria-label="([^"]*)"', html)) and html.count("<svg ") == html.count("<svg viewBox=")
    assert html.count("<figure>") == len(parsed.images) + html.count("<svg ")
    for file, rows in parsed.tables:
        assert len(rows) > 1 and all(len(row) == len(rows[0]) for row in rows), file
        assert all(any(row[1:]) for row in rows[1:]), f"{file} has an empty line"
    return parsed


def test_page_is_self_contained_and_filled(made_up):
    html, about, _ = made_up()
    parsed = check_self_contained(html)
    assert (about["tables"], about["figures"], len(parsed.images), html.count("<svg ")) == (2, 3, 2, 1)
    assert "<b>" not in html and "&lt;b&gt;ours" in html and "&lt;b&gt;a line" in html  # what tables and drawings hold is text
    assert made_up()[0] == html


def test_no_two_places_of_the_page_have_one_name():
    ids = re.findall(r'\bid="([^"]+)"', (ROOT / "outputs/demo/report.html").read_text())
    assert len(ids) == len(set(ids)) > 30
    numbers = [section["number"] for section in page.sections()]
    assert len(numbers) == len(set(numbers))


def test_table_shows_published_above_measured_and_the_numbers_of_its_file(made_up):
    rows = dict(Tables(made_up()[0]).tables)["tables/table_2.csv"]
    assert rows[0] == ["", "", "mean", "cls", "n"]
    assert rows[1:3] == [["CLIP", "published", "42.8", "7.0", ""], ["CLIP", "measured", "41.2 [40.0,\u00a042.5]", "–", "90"]]
    assert rows[3:] == [["<b>ours</b>", "measured", "0.5 [0.1,\u00a00.9]", "–", "80"]]


def test_a_long_table_is_folded_and_cut_openly(made_up):
    html, _, folder = made_up()
    rows = dict(reversed(Tables(html).tables))["tables/miniature.csv"]
    assert len(rows) == 1 + LIMITS["most_lines"] and "<details>" in html and "The first 6 of 9 lines" in html
    assert rows[3][0] == pd.read_csv(folder / "tables/miniature.csv").part[2]


def test_the_miniature_is_marked_and_nothing_else(made_up):
    html, about, _ = made_up()
    assert about["miniature"] == ["C_miniature"]
    for part in re.split(r'<section id="', html)[1:]:
        shown = len(re.findall(r"<img |<svg |<table", part)) if not part.startswith("provenance") else 0
        assert part.count('class="mark"') == (shown if part.startswith("sc") else 0), part[:20]


def part_of(html, number): return next(part for part in re.split(r'<section id="s', html)[1:] if part.startswith(f'{number}"'))


def test_a_section_shows_the_sentences_of_its_records_and_no_others(made_up):
    html, _, folder = made_up()
    first = re.search(r"<ul>(.*?)</ul>", part_of(html, "3_3"))[1]
    assert re.findall(r"<li>(.*?)</li>", first) == ["CLIP reaches 41.2.", "A &lt;b&gt;bag&lt;/b&gt; of words reaches 40."] and "<p>All weights are 1.5 MB.</p>" in part_of(html, "c")
    path = folder / "records/C_miniature.json"
    path.write_text(path.read_text().replace("are 1.5 MB", "are 77.25 MB"))
    assert "<p>All weights are 77.25 MB.</p>" in made_up()[0]


def test_a_record_from_before_sentences_were_kept_is_named_in_their_place(made_up):
    _, _, folder = made_up()
    path = folder / "records/C_miniature.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "says"}))
    line = "records/C_miniature.json is from before records held sentences; cxr_nb run C_miniature --profile made"
    assert f"<p>{line}</p>" in part_of(made_up()[0], "c")


def test_the_page_says_in_its_own_record_how_it_begins(made_up):
    html, about, _ = made_up()
    assert about["says"] == ["Not asked: Nothing was adapted: profile 'made' leaves 35_classification_results out."]
    assert "Nothing was adapted: profile &#39;made&#39; leaves 35_classification_results out." in html


def test_what_is_missing_stops_the_page_with_the_notebooks_name(made_up):
    _, _, folder = made_up()
    for name, notebook in {"tables/table_2.csv": "33_text_encoder_results", "figures/miniature_prompts.png": "C_miniature", "records/C_miniature.json": "C_miniature"}.items():
        kept = (folder / name).rename(folder / "kept")
        with pytest.raises(FileNotFoundError, match=f"{name} is missing; notebook {notebook} makes it"): made_up()
        kept.rename(folder / name)
    with (folder / "tables/table_2.csv").open("a") as file: file.write("CLIP,pooler,1,1,1,1,1,10,\n")
    with pytest.raises(ValueError, match="tables/table_2.csv differs from records/33_text_encoder_results.json"): made_up()


def test_what_the_profile_leaves_out_is_said(made_up):
    html, about, _ = made_up()
    assert "Not in this run: profile &#39;made&#39; leaves 23_autoencoder out." in html
    assert about["left_out"]["D_benchmarks"] == "measured apart from the report, by make benchmarks"


def test_every_notebook_of_the_report_has_its_place():
    placed = [name for section in page.sections() for name in section["notebooks"]]
    assert len(placed) == len(set(placed)) and profiles.load_profile("demo").keys() - {"F_page"} <= set(placed)


committed = pytest.mark.skipif(not (DEMO / "report.html").exists(), reason="the demo's page is not there; make report")


@committed
def test_the_demos_page():
    path = DEMO / "report.html"
    parsed = check_self_contained(path.read_text())
    assert path.stat().st_size <= 1.8e6
    missing = [link for link in parsed.links if not link.startswith("#") and not (DEMO / link).exists()]
    assert not missing
    shown = {file for file, _ in parsed.tables + parsed.cards}
    claims = [id for file, id in parsed.cards if file == "tables/claims.csv"]
    assert claims == [f"claim-{id}" for id in pd.read_csv(DEMO / "tables/claims.csv").id]
    assert {f"tables/{p.name}" for p in tracked("outputs/demo/tables")} <= shown
    named = {file: how["columns"] for s in page.sections() for file, how in s["shown"].items() if "columns" in how}
    for i in range(1, 7):
        table = pd.read_csv(DEMO / f"tables/table_{i}.csv").drop_duplicates(["row", "column"], keep=False)
        table = table[table.column.isin(named.get(f"tables/table_{i}", table.column))]
        rows = dict(parsed.tables)[f"tables/table_{i}.csv"]
        cells = {(row[0], row[1], name): cell for row in rows[1:] for name, cell in zip(rows[0], row)}
        for value in ("published", "measured"):
            there = table.dropna(subset=value)
            on_page = [cells[row, value, str(column).replace("_", " ")] for row, column in zip(there.row, there.column)]
            assert [float(cell.split(" ")[0]) for cell in on_page] == pytest.approx(there[value].tolist(), abs=0.0501)
            assert [("[" in cell) for cell in on_page] == (there.ci_low.notna() & (value == "measured")).tolist()


@committed
def test_the_demos_page_shows_the_sentences_of_its_records():
    text = unescape((DEMO / "report.html").read_text())
    records = [json.loads(path.read_text()) for path in (DEMO / "records").glob("*.json") if path.stem != "F_page"]
    lacking = [sentence for record in records for sentence in record.get("says", []) if sentence not in text]
    assert not lacking


@committed
def test_the_demos_pieces_have_words_of_their_own():
    for section in page.sections():
        for name in section["notebooks"]:
            if not (DEMO / f"records/{name}.json").exists(): continue
            for file in json.loads((DEMO / f"records/{name}.json").read_text())["outputs"]:
                piece, _, kind = file.rpartition(".")
                if (file.split("/")[0], kind) in page.SHOWN_KINDS:
                    assert page.describe(piece, section["shown"])["order"][0] < len(section["shown"]), f"templates/report.yaml has no words for {file}"


LOOK = """(async () => {
  const page = document;
  for (const fold of page.querySelectorAll("details")) fold.open = true;
  const loaded = await Promise.allSettled([...page.images].map(image => image.decode()));
  const wide = [...page.querySelectorAll("main *")].filter(e => !e.closest(".scroll, .card, .again") && e.getBoundingClientRect().right > innerWidth);
  const boxes = [...page.querySelectorAll(".scroll")].map(box => {
    const room = box.getBoundingClientRect(), cells = [...box.querySelectorAll("th, td")], at = cell => cell.getBoundingClientRect();
    const cut = cells.filter(c => /\\[|published|measured/.test(c.textContent) && at(c).left < room.right - 2 && at(c).right > room.right + 2).length;
    const gone = cells.filter(c => /^(published|measured)$/.test(c.textContent) && at(c).right > room.right + 2).length;
    box.scrollLeft = 1e6;
    const last = [...box.querySelectorAll("tr")].map(row => at(row.lastElementChild)), names = [...box.querySelectorAll("tbody th")].map(at);
    return {label: box.ariaLabel, cut, gone, scrolls: box.scrollWidth > box.clientWidth, end: Math.max(...last.map(r => r.right)) - room.right,
            name: Math.max(...names.map(r => Math.abs(r.left - room.left)))};
  });
  return {
    width: page.documentElement.scrollWidth, room: page.documentElement.clientWidth, boxes,
    answer: page.querySelector(".answer").getBoundingClientRect().bottom, sentences: page.querySelectorAll(".answer dd").length, wide: wide.length, loaded: loaded.filter(one => one.status == "fulfilled").length,
    images: [...page.images].map(image => [image.naturalWidth, image.naturalHeight, image.clientWidth]),
    drawings: [...page.querySelectorAll("figure svg")].map(drawing => [drawing.clientWidth, drawing.clientHeight]),
    tables: [...page.querySelectorAll("table")].map(table => table.rows.length),
  };
})()"""


@pytest.fixture
def browse(tmp_path_factory):
    "A function that opens report.html of a folder in Chromium, on a phone or a wider screen: what it shows there, its console, paths asked for."
    servers = []

    def look(folder, width=390, height=844):
        asked = []

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                if self.path != "/favicon.ico":
                    asked.append(self.path)
                    return super().do_GET()
                self.send_response(204)
                self.end_headers()

            def log_message(self, *args): pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Browser(tmp_path_factory.mktemp("chromium")) as browser:
            browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
            browser.open(f"http://127.0.0.1:{server.server_port}/report.html")
            return browser.value(LOOK), browser.console, asked

    yield look
    for server in servers: server.shutdown()


def check_tables_in_reach(layout, width):
    "Nothing is wider than the page; a table ends in its box, scrolled where it must be, with its rows' names in sight."
    assert layout["width"] <= layout["room"] <= width and layout["wide"] == 0
    assert layout["boxes"] and all(box["end"] <= 1 for box in layout["boxes"]), layout["boxes"]
    assert all(box["name"] <= 2 for box in layout["boxes"] if box["scrolls"]), layout["boxes"]
    # "published" and "measured" are never beyond the edge, and a phone cuts no number in two
    assert all(box["gone"] == 0 for box in layout["boxes"]), layout["boxes"]
    if width < 640: assert all(box["cut"] == 0 for box in layout["boxes"]), layout["boxes"]


@in_chromium
@pytest.mark.parametrize("size", [(1280, 800), (1200, 800), (390, 844)], ids=str)
def test_wide_tables_stay_in_reach(made_up, browse, size):
    html, _, folder = made_up()
    measured = "0.815 [0.726,\u00a00.894]"
    view = {"caption": "Wide.", "file": "tables/table_2.csv", "miniature": False, "total": 2, "footer": "", "notes": [], "folded": False}
    view |= {"head": [f"column {i}" for i in range(12)], "corner": "", "beside": True, "cells": "numbers"}
    view["lines"] = [("a strategy with a long name", kind, [measured] * 12) for kind in ("published", "measured")]
    told = view | {"head": ["claim", "verdict", "published", "measured", "printed", "world", "reason", "elsewhere"], "cells": "words", "beside": False}
    sentence = "the interval of this difference is clear of zero in 2 of 2 comparisons"
    told["lines"] = [("1a", "", [sentence, "not seen in the miniature", sentence, f"U-Net, with prior: {measured} of 100", "holds", "miniature", sentence, sentence])]
    section = {"id": "swide", "number": "9", "title": "Wide", "asked": "", "sentences": [], "missing": [], "notebooks": [], "linked": [], "verdicts": {}, "pieces": [view, told]}
    sources = {"rows": [], "minutes": None, "devices": [], "commits": [], "versions": {}}
    html = page.rendered(profile="made", sections=[section], answer=[("Asked", "Which?")], provenance=sources, notebooks=[], marked=[], miniature=[], restricted=[])
    (folder / "report.html").write_text(html)
    layout, console, _ = browse(folder, *size)
    assert console == []
    check_tables_in_reach(layout | {"boxes": layout["boxes"][:2]}, size[0])
    assert layout["boxes"][0]["scrolls"] and not layout["boxes"][1]["scrolls"]
    # the same measure does see a table that is cut off, and one that takes its rows' names along
    for bad in (".scroll { overflow: clip !important } th, td { min-width: 20rem !important }", "th { position: static !important }"):
        (folder / "report.html").write_text(html.replace("</style>", f"{bad}</style>"))
        layout, _, _ = browse(folder, *size)
        with pytest.raises(AssertionError): check_tables_in_reach(layout | {"boxes": layout["boxes"][:1]}, size[0])


def claims_page():
    "A page of the claims alone, with their numbers in full."
    measured = "; ".join(f"judge_{letter}, U-Net, with prior: 0.815 [0.726, 0.894] (n=100)" for letter in "ab")
    claim = {"whose": "paper", "claim": "It draws <b>effusions</b>.", "published": "0.984", "measured": measured, "world": "miniature", "reason": "0.5 is in it"}
    verdicts = ["seen in the miniature", "undecided", "undecided", "not testable here"]
    lines = [(f"{i}a", "", [*(claim | {"verdict": verdict}).values()]) for i, verdict in enumerate(verdicts)]
    view = {"caption": "Claims.", "file": "tables/claims.csv", "miniature": True, "corner": "id", "head": [*claim, "verdict"], "lines": lines}
    section = {"id": "s4", "number": "4", "title": "Discussion", "asked": "", "sentences": [], "missing": [], "notebooks": [], "linked": [], "verdicts": {"undecided": 2}}
    sources = {"rows": [], "minutes": None, "devices": [], "commits": [], "versions": {}}
    pieces = [view | {"cards": page.cards(view)}]
    return page.rendered(profile="made", sections=[section | {"pieces": pieces}], answer=[("Asked", "Which?")], provenance=sources, notebooks=[], marked=[], miniature=[], restricted=[])


@in_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_claims_are_cards_with_a_filter(tmp_path, width):
    (tmp_path / "report.html").write_text(claims_page())
    seen = "[...document.querySelectorAll('.claim')].filter(c => c.checkVisibility()).map(c => c.id)"
    with Browser(tmp_path / "chromium") as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.open((tmp_path / "report.html").as_uri())
        assert browser.value(seen) == [f"claim-{i}a" for i in range(4)]
        assert browser.value("[...document.querySelectorAll('.filter button')].map(b => b.textContent)") == ["4 all claims", "1 seen in the miniature", "2 undecided", "1 not testable here"]
        browser.value("document.querySelectorAll('.filter button')[2].click()")
        assert browser.value(seen) == ["claim-1a", "claim-2a"]
        browser.value("document.querySelectorAll('.filter button')[0].click()")
        text = browser.value("document.querySelector('#claim-0a').innerText")
        assert "It draws <b>effusions</b>." in text and text.count("0.815 [0.726, 0.894] (n=100)") == 2 and "0.5 is in it" not in text
        browser.value("document.querySelector('#claim-0a summary').click()")
        assert "0.5 is in it" in browser.value("document.querySelector('#claim-0a').innerText")
        assert browser.value("document.documentElement.scrollWidth") <= width
        # numbers in full: nothing in a card is cut off
        assert browser.value("[...document.querySelectorAll('.claim')].every(c => c.scrollWidth <= c.clientWidth + 1)") and browser.console == []


@in_chromium
def test_in_a_browser(made_up, browse):
    html, about, folder = made_up()
    layout, console, asked = browse(folder)
    assert console == [] and asked == ["/report.html"]
    assert layout["width"] <= 390 and layout["wide"] == 0
    assert len(layout["images"]) + len(layout["drawings"]) == about["figures"] and layout["loaded"] == len(layout["images"])
    assert min(layout["drawings"][0]) > 200 and layout["images"][0] == [600, 60, layout["images"][0][2]]
    assert all(rows > 1 for rows in layout["tables"])
    # the same look does see a script that fails, a line too wide and a file that is asked for
    bad = '<p style="width: 500px">wide</p><script>nothing()</script><script src="more.js"></script>'
    (folder / "report.html").write_text(html.replace("<main>", f"<main>{bad}"))
    layout, console, asked = browse(folder)
    assert layout["width"] > 390 and layout["wide"] > 0 and "/more.js" in asked and "nothing is not defined" in "".join(console)


@committed
@in_chromium
@pytest.mark.parametrize("size", [(1280, 800), (1200, 800), (390, 844)], ids=str)
def test_the_demos_first_screen_answers(browse, size):
    layout, _, _ = browse(DEMO, *size)
    check_tables_in_reach(layout, size[0])
    assert layout["sentences"] == 4 and layout["answer"] < size[1]


@committed
@in_chromium
def test_the_demos_page_in_a_browser(browse):
    layout, console, asked = browse(DEMO)
    assert console == [] and asked == ["/report.html"]
    check_tables_in_reach(layout, 390)
    # how many of the figures are drawings is a matter of their weight
    assert len(layout["images"]) + len(layout["drawings"]) > 20
    assert len(layout["images"]) == layout["loaded"] > 10 and all(min(w, h) > 100 and shown > 200 for w, h, shown in layout["images"])
    assert layout["drawings"] and all(w > 200 and h > 80 for w, h in layout["drawings"])
    assert all(rows > 1 for rows in layout["tables"])
