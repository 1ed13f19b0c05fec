"What notebooks declare to read and write, and what follows: order, makers, what is left out, one line for a mistake."
import json
import re

import pytest
from conftest import ROOT

from cxr_nb import core, graph, profiles
from cxr_nb import report as command

RECORDS = sorted((ROOT / "outputs/demo/records").glob("*.json"))


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    "A function that makes a project of small notebooks, name -> (parameters, files), and returns the graph of its profile."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nbs/profiles").mkdir(parents=True)

    def make(profile="", **cells):
        for name, (parameters, files) in cells.items():
            sources = {"parameters": f'profile: str = "small"\n{parameters}', "files": files}
            tagged = [{"cell_type": "code", "metadata": {"tags": [tag]}, "source": source} for tag, source in sources.items() if source]
            (tmp_path / f"nbs/{name}.ipynb").write_text(json.dumps({"cells": tagged}))
        (tmp_path / "nbs/profiles/small.yaml").write_text(profile)
        return graph.graph("small")

    return make


A = 'sources: list[str] = ["", "_b"]', 'reads = []\nwrites = [f"cohorts/texts{of}.csv" for of in sources] + ["cohorts/extra_*.csv"]'
B = "", 'reads = ["cohorts/*.csv"]\nwrites = [f"tables/t{of}.csv" for of in stars(profile, "cohorts/texts*.csv")]'
C = "", 'reads = ["tables/*.csv", "records/a1.json"]\nwrites = [*figures("c"), *sheets("c")]'


def test_patterns_find_what_others_write(notebooks):
    made = notebooks(c3=C, b2=B, a1=A)
    assert list(made.notebooks) == ["a1", "b2", "c3"] and made.left_out == {}
    assert made.notebooks["b2"] == graph.Files(["cohorts/texts.csv", "cohorts/texts_b.csv"], ["tables/t.csv", "tables/t_b.csv"])
    assert made.notebooks["c3"].reads == ["tables/t.csv", "tables/t_b.csv", "records/a1.json"]
    assert made.products("c3") == ["figures/c.png", "figures/c.svg", "figures/c.webp", "records/c3.json", "notebooks/c3.ipynb"]


def test_makers_and_ancestors(notebooks):
    made = notebooks(a1=A, b2=B, c3=C)
    assert [made.maker(file) for file in ("tables/t_b.csv", "cohorts/extra_x.csv", "records/c3.json", "nothing.csv")] == ["b2", "a1", "c3", ""]
    assert made.ancestors("figures/c.png") == ["c3", "b2", "a1"] and made.ancestors("cohorts/texts.csv") == ["a1"]


def test_what_nobody_can_feed_is_left_out_and_why(notebooks):
    made = notebooks("a1: {sources: []}", a1=(A[0], A[1].replace(' + ["cohorts/extra_*.csv"]', "")), b2=B, c3=C, d4=("", 'reads = ["figures/c.png", "x.csv"]\nwrites = ["d"]'))
    assert list(made.notebooks) == [] and made.left_out == {
        "a1": "a1 has nothing to write, because sources is empty", "b2": "b2 has nothing to write",
        "c3": "c3 reads records/a1.json, and a1 is left out", "d4": "d4 reads x.csv, which no notebook of this profile writes"}
    assert made.maker("figures/c.png") == "c3"  # which makes it with other parameters


def test_a_profile_may_leave_a_notebook_out(notebooks):
    assert notebooks("without: [c3]", a1=A, b2=B, c3=C).left_out == {"c3": "profile 'small' leaves c3 out"}
    with pytest.raises(ValueError, match="^profile 'small': without: no notebook 'c33'; did you mean 'c3'[?]$"): notebooks("without: [c33]", c3=C)


def test_what_is_made_apart_is_no_part_of_the_report(notebooks):
    made = notebooks(D_benchmarks=("", 'reads = []\nwrites = ["tables/benchmarks.csv"]'), a1=("", 'reads = ["tables/*", "records/*"]\nwrites = ["page"]'))
    assert made.notebooks["a1"].reads == [] and made.maker("tables/benchmarks.csv") == "D_benchmarks"


NUMBER = "n: int = 3"


@pytest.mark.parametrize("cells, message", [
    ({"a1": A, "b2": ("", 'reads = []\nwrites = ["cohorts/texts.csv"]')}, "notebooks a1 and b2 both write cohorts/texts.csv; rename one"),
    ({"a1": ("", "reads = []\nwrites = [slug(variant)]")}, "notebook a1: its cell tagged 'files': NameError: name 'variant' is not defined"),
    ({"a1": ("", "reads = []\nwrites = [")}, "notebook a1: its cell tagged 'files': SyntaxError: '[' was never closed (<string>, line 2)"),
    ({"a1": ("", 'reads = "cohorts"\nwrites = []')}, "notebook a1: its cell tagged 'files' gives no list of text named reads"),
    ({"a1": (NUMBER, "reads = []\nwrites = [n]")}, "notebook a1: its cell tagged 'files' gives no list of text named writes"),
    ({"a1": ("", 'reads = ["b"]\nwrites = ["a"]'), "b2": ("", 'reads = ["a"]\nwrites = ["b"]')}, "read from each other in a circle"),
    ({"a1": ("", 'reads = []\nwrites = [f"{f}_" for f in matching(profile, "b*")] or ["a"]'), "b2": ("", 'reads = []\nwrites = ["b" + f for f in matching(profile, "*")]')},
     " from each other, in a circle"),
])
def test_a_wrong_declaration_is_one_clear_line(notebooks, cells, message):
    with pytest.raises(ValueError) as stop: notebooks(**cells)
    assert message in str(stop.value) and "\n" not in str(stop.value)


def opened(tmp_path, monkeypatch, **files):
    monkeypatch.setenv("CXR_NB_OUTPUTS", str(tmp_path))
    return core.Run("33_text_encoder_results", {"profile": "demo", "__annotations__": {"profile": str}} | files)


def test_a_run_reads_what_it_declares(tmp_path, monkeypatch):
    run = opened(tmp_path, monkeypatch, reads=["cohorts/*.csv"], writes=[])
    with pytest.raises(ValueError, match="^tables/a.csv: `reads` of the cell tagged 'files' of notebook 33_text_encoder_results does not name it$"): run.need("tables/a.csv")
    with pytest.raises(FileNotFoundError, match="^outputs/demo/cohorts/sources.json is missing; notebook 21_datasets makes it: cxr_nb run 21_datasets --profile demo, or make report PROFILE=demo for all$"):
        opened(tmp_path, monkeypatch).need("cohorts/sources.json")
    with pytest.raises(FileNotFoundError, match="^outputs/demo/cohorts/x.csv is missing; no notebook of profile 'demo' makes it$"): run.need("cohorts/x.csv")


def test_a_run_leaves_what_it_declares(tmp_path, monkeypatch):
    run = opened(tmp_path, monkeypatch, reads=[], writes=["tables/a.csv", "models/*"])
    for name in ("tables/b.csv", "models/a/x"): run.write(name, lambda path: path.write_text("1"))
    with pytest.raises(ValueError, match="^notebook 33_text_encoder_results: its cell tagged 'files' does not say what it writes: tables/a.csv was not written; tables/b.csv is not declared$"): run.finish(says=["It ran."])
    assert not (run.folder / "records").exists()


@pytest.mark.parametrize("profile", ["demo", "smoke", "paper"])
def test_the_profiles_with_images_leave_nothing_out(profile):
    made = graph.graph(profile)
    apart = {"J_report_prompts"} if profile == "paper" else set()  # its reports are phantoms'
    assert set(made.left_out) == apart and set(made.notebooks) == set(graph.graph("demo").notebooks) - apart


@pytest.fixture
def there(monkeypatch, tmp_path):
    "A list of places below data/ that are there; all others are not."
    there, find = [], profiles.find_path
    monkeypatch.setattr(profiles, "find_path", lambda place: (tmp_path if place in there else tmp_path / "none") if place.startswith("data/") else find(place))
    return there


def test_public_adapts_the_model_where_public_radiographs_lie(there):
    "And it learns from LAION's captions where these lie, else from a program's."
    assert list(profiles.absent_places("public")) == ["data/nih", "data/laion400m-meta"]
    there.append("data/nih")
    made = graph.graph("public")
    assert set(made.left_out) == {"J_report_prompts"} and "27_unet_finetuning" in made.notebooks
    assert command.unfitting("public") == [] and list(profiles.absent_places("public")) == ["data/laion400m-meta"]
    assert profiles.load_profile("public")["25_textual_projection"]["caption_source"] == "pictures"
    there.append("data/laion400m-meta")
    assert profiles.load_profile("public")["25_textual_projection"]["caption_source"] == "cohort"
    assert command.unfitting("public") == [] and profiles.absent_places("public") == {}


def test_a_profile_without_images_keeps_the_study_of_texts(there):
    made = graph.graph("public")
    assert set(made.notebooks) == {"03_phantoms", "21_datasets", "22_stable_diffusion", "24_text_encoder", "25_textual_projection",
                                   "33_text_encoder_results", "B_text_clusters", "C_miniature", "D_benchmarks", "D_cost", "D_growth", "F_page"}
    assert all("\n" not in why and (why.startswith(name) or why == f"profile 'public' leaves {name} out") for name, why in made.left_out.items())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_committed_records_are_of_declared_files(path):
    record, files = json.loads(path.read_text()), graph.graph("demo").declared[path.stem]
    assert [file for file in record["inputs"] if not any(graph.fits(read, file) for read in files.reads)] == []
    # the tables beside sets of images are younger than the committed results
    assert re.sub(r"(; )?images/\w+/sets.csv was not written", "", graph.unlike_declared(files.writes, record["outputs"])) == ""


def test_the_cells_are_short_and_name_no_file_twice():
    for name, files in graph.graph("demo").declared.items():
        [cell] = profiles.tagged_cells(name, "files")
        assert cell.count("\n") < 15 and max(map(len, cell.splitlines())) <= 120, name
        assert len(set(files.writes)) == len(files.writes) and len(set(files.reads)) == len(files.reads)
