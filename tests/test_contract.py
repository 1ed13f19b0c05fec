"The profile `paper` as it stands, cut to a few images and steps, on small models and data under their real names: it runs to its page, offline."
import json

import paper_world
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def paper(tmp_path_factory, copy_project, run_in):
    "A copy of the project in which the cut profile was run, and the environment that it ran in."
    copy, home = copy_project(tmp_path_factory.mktemp("project")), tmp_path_factory.mktemp("home")
    paper_world.models(home, tmp_path_factory.mktemp("made"))
    paper_world.data(copy / "data")
    (copy / "nbs/profiles/contract.yaml").write_text(paper_world.CUT)
    environment = {"HOME": str(home), "HF_HOME": str(home / "hf"), "TORCH_HOME": str(home / "torch")}
    done = run_in(copy, "cxr_nb", "report", "--profile", "contract", "--cores", 2, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return copy / "outputs/contract", environment


def record(out, notebook): return json.loads((out / f"records/{notebook}.json").read_text())


def test_it_reaches_its_page(paper): assert (paper[0] / "report.html").stat().st_size > 10_000


def test_the_models_are_those_that_the_profile_pins(paper):
    repository, revision = paper_world.V14
    for notebook in ("22_stable_diffusion", "25_textual_projection", "26_textual_inversion", "27_unet_finetuning"):
        text = json.dumps(record(paper[0], notebook)["results"])
        assert revision in text, notebook


def test_the_worlds_are_the_papers(paper):
    "Verdicts on the paper's own models and data are not called the miniature's."
    claims = pd.read_csv(paper[0] / "tables/claims.csv", keep_default_na=False)
    assert "paper" in set(claims.world) and not claims.verdict.str.contains("seen in the miniature").any()


def test_all_seven_encoders_are_measured_on_mimic(paper):
    table = pd.read_csv(paper[0] / "tables/table_3.csv").query("row != 'Overall'")
    there = table[table.measured.notna()]
    assert {"PubMedBERT", "ClinicalBERT", "SapBERT", "RadBERT", "CXR-BERT-general", "CXR-BERT-specialized", "CLIP"} <= set(there.column)


def test_no_report_is_quoted(paper):
    "Reports say `Study s…`; tables, records, notebooks and the page do not."
    shown = [path for path in paper[0].rglob("*") if path.suffix in (".csv", ".json", ".ipynb", ".html") and path.parts[-2] != "cohorts"]
    assert shown and not [path.name for path in shown if "Study s500000" in path.read_text(encoding="utf-8")]
