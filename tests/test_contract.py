"The profile `paper`, cut to a few images and steps, on small models and data under their real names: it runs to its page, offline."
import json
import subprocess

import paper_world
import pandas as pd
import pipelines
import pytest
import torch
from huggingface_hub import constants

from cxr_nb import graph, tables
from cxr_nb.diffusion import training_noise_scheduler
from cxr_nb.judges import load_extractor
from cxr_nb.stable_diffusion import components_record, encoder_hidden_states, load_pipeline, sample
from cxr_nb.text_encoder import ENCODERS
from cxr_nb.training import TrainingSettings
from cxr_nb.unet_finetuning import VARIANTS, finetune, training_samples

NOTEBOOKS = graph.graph("paper").notebooks.keys() - graph.APART.values() - {"C_miniature"}  # which the smoke report runs


def git(folder, *words): return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def paper(tmp_path_factory, copy_project, run_in):
    "The folder of results, in a copy of the project, under git as a clone is, in which the cut profile was run."
    copy, home = copy_project(tmp_path_factory.mktemp("project")), tmp_path_factory.mktemp("home")
    for words in (["init", "--quiet"], ["add", "--all"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all"]): git(copy, *words)
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
    "All but what cannot be: a pooler that was not trained, a value of which the paper does not say the prompt, the precision of no call at all."
    printed = table(paper, name).query("published.notna()")
    empty = printed[printed.measured.isna()]
    cannot = (empty.row == "CXR-BERT-general") & (empty.column == "pooler_output") | empty.column.str.startswith("one of the prompts") | (empty.column == "precision")
    assert len(printed) and cannot.all(), empty[~cannot].to_string()


def test_every_printed_cell_is_there(paper):
    for name, key in (("table_2", "encoder"), ("table_3", "finding")):
        printed = tables.published(name).set_index(key).stack().dropna()
        assert (table(paper, name).set_index(["row", "column"]).published.loc[printed.index] == printed).all(), name


def test_verdicts_are_on_the_papers_own_world(paper):
    claims = pd.read_csv(paper / "tables/claims.csv", keep_default_na=False)
    assert set(claims.world) - {""} == {"paper"}, claims[claims.world == "public"].id.tolist()
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


def test_no_report_is_quoted(paper):
    "Reports say `Study s…`; tables, records, notebooks, figures and the page do not."
    shown = [path for path in paper.rglob("*") if path.suffix in (".csv", ".json", ".ipynb", ".html", ".svg") and path.relative_to(paper).parts[0] != "cohorts"]
    assert shown and not [path.name for path in shown if "Study s500000" in path.read_text()]


def test_git_would_commit_nothing_of_the_run(paper):
    "No report and no patient can be in a commit where all data, results and the profile of one's own are ignored."
    assert not git(paper.parents[1], "status", "--porcelain")


def test_a_random_file_under_inceptions_name_is_refused_in_one_line(tmp_path, monkeypatch):
    "The report above does without Inception: its file cannot be made up."
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    path.write_bytes(torch.randint(256, (1000,), dtype=torch.uint8).numpy().tobytes())
    with pytest.raises(ValueError, match="^extractor inception: .* is not whole .*; delete it and download it again$") as caught: load_extractor("inception")
    assert "\n" not in str(caught.value)


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
