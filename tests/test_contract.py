"The profile `paper`, cut to a few images and steps, on small models and data under their real names: it runs to its page, offline."
import json
import re
import subprocess

import paper_world
import pandas as pd
import pipelines
import pytest
import torch
from conftest import tracked
from huggingface_hub import constants

from cxr_nb import graph, tables
from cxr_nb.diffusion import training_noise_scheduler
from cxr_nb.stable_diffusion import components_record, encoder_hidden_states, load_pipeline, sample
from cxr_nb.text_encoder import ENCODERS
from cxr_nb.training import TrainingSettings
from cxr_nb.unet_finetuning import VARIANTS, finetune, training_samples

MADE = graph.graph("paper")
NOTEBOOKS = MADE.notebooks.keys() - graph.APART.values()


@pytest.fixture(scope="module")
def paper(tmp_path_factory, copy_project, run_in):
    "The folder of results, in a copy of the project in which the cut profile was run."
    copy, home = copy_project(tmp_path_factory.mktemp("project")), tmp_path_factory.mktemp("home")
    paper_world.models(home, tmp_path_factory.mktemp("made"))
    paper_world.data(copy / "data")
    (copy / "nbs/profiles/contract.yaml").write_text(paper_world.CUT)
    done = run_in(copy, "cxr_nb", "report", "--profile", "contract", "--cores", 1, **paper_world.environment(home))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return copy / "outputs/contract"


def record(out, notebook): return json.loads((out / f"records/{notebook}.json").read_text())


def table(out, name): return pd.read_csv(out / f"tables/{name}.csv")


def test_every_notebook_of_the_paper_has_its_record(paper):
    assert NOTEBOOKS <= {path.stem for path in (paper / "records").glob("*.json")}


@pytest.mark.parametrize("name", [f"table_{i}" for i in range(1, 7)])
def test_what_the_paper_prints_is_measured(paper, name):
    "All of it, but for the pooled output of a checkpoint without a trained pooler, and the precision of a judge that called no image positive."
    printed = table(paper, name).query("published.notna()")
    unmeasured = printed[printed.measured.isna()]
    allowed = {("CXR-BERT-general", "pooler_output")} | {(row, column) for row, column in zip(printed.row, printed.column) if column == "precision"}
    assert len(printed) and set(zip(unmeasured.row, unmeasured.column)) <= allowed


def test_every_printed_cell_is_there(paper):
    for name, key in (("table_2", "encoder"), ("table_3", "finding")):
        printed = tables.published(name).set_index(key).stack().dropna()
        assert (table(paper, name).set_index(["row", "column"]).published.loc[printed.index] == printed).all(), name


def test_verdicts_are_on_the_papers_own_world(paper):
    claims = pd.read_csv(paper / "tables/claims.csv", keep_default_na=False)
    assert {"paper"} <= set(claims.world) <= {"", "paper"}
    assert set(claims.verdict) <= {"reproduced", "not reproduced", "undecided", "not testable here"}
    assert claims.verdict.isin(["reproduced", "not reproduced"]).any()


def test_records_name_the_revisions_that_are_pinned(paper):
    for notebook in ("22_stable_diffusion", "25_textual_projection", "26_textual_inversion", "27_unet_finetuning"):
        assert paper_world.PINNED in json.dumps(record(paper, notebook)["results"]), notebook
    text = json.dumps(record(paper, "24_text_encoder")["results"])
    for source in ENCODERS.values(): assert source.location in text and (source.revision or paper_world.NEWEST) in text, source.name


def test_the_page_names_the_models(paper):
    page = (paper / "report.html").read_text()
    for name in (paper_world.V14, paper_world.JUDGE, *ENCODERS): assert name in page, name


def test_no_report_and_no_patient_is_shown_or_could_be_committed(paper):
    "Reports say `Study s…`, which no table, record, notebook or page quotes; what git would take names no patient either."
    shown = [path for path in paper.rglob("*") if path.suffix in (".csv", ".json", ".ipynb", ".html", ".svg") and path.relative_to(paper).parts[0] != "cohorts"]
    assert shown and not [path.name for path in shown if "Study s500000" in path.read_text()]
    project = paper.parents[1]
    subprocess.run(["git", "init", "--quiet", project], check=True)
    listing = ["git", "-C", project, "ls-files", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    assert names and not [name for name in names if name.startswith(("data/", "outputs/", "nbs/profiles/contract"))]
    assert not [name for name in names if re.search(rb"Study s500000|p100000\d\d|patient0000\d/study", (project / name).read_bytes()) and name not in OURS]


OURS = {path.relative_to(path.parents[1]).as_posix() for path in tracked("tests/*.py")}


OTHERS = {  # repository -> release, formats of its weights, what its U-Net estimates
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (pipelines.V1, ["bin"], "epsilon"),
    "stabilityai/stable-diffusion-2-1-base": (pipelines.V2, ["safetensors"], "epsilon"),
    "stabilityai/stable-diffusion-2-1": (pipelines.V2_VELOCITY, ["safetensors"], "v_prediction"),
}


@pytest.mark.parametrize("repository", OTHERS)
def test_another_model_of_the_family_works_by_its_hub_id(tmp_path, monkeypatch, repository):
    release, forms, estimated = OTHERS[repository]
    paper_world.cache(tmp_path, repository, "6" * 40, pipelines.published_pipeline(tmp_path / "made", **release, forms=forms))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert components_record(repository)["revision"] == "6" * 40
    pipeline = load_pipeline(repository)
    assert pipeline.vae.config.scaling_factor == 0.18215 and len(pipeline.tokenizer) == 49408
    words = pipeline.tokenizer("lung", padding="max_length", max_length=77).input_ids
    assert pipeline.tokenizer.convert_ids_to_tokens(words[:4]) == ["<|startoftext|>", "lung</w>", "<|endoftext|>", release["pad"]]
    assert encoder_hidden_states(pipeline, "lung").shape == (1, 77, release["width"])
    assert pipeline.text_encoder.config.hidden_act == release["act"]
    assert training_noise_scheduler(pipeline.scheduler).config.prediction_type == estimated
    prompts = {"no finding": "a lung", "pleural effusion": "a lung with water", "class": "lung"}
    images = {name: torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8) for name in prompts}
    variant, before = VARIANTS["no findings and abnormality"], pipeline.unet.conv_in.weight.clone()
    log, _ = finetune(pipeline, variant, training_samples(variant, images, prompts), prompts, TrainingSettings(1, device="cpu"), tmp_path / "work")
    assert log.loss.notna().all() and not torch.equal(pipeline.unet.conv_in.weight, before)
    drawn = sample(pipeline, "a lung", [1, 2], steps=2)
    assert drawn.shape == (2, 3, 64, 64) and drawn.float().std() > 1
