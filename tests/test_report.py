"The graph of notebooks, at the smoke scale: it runs, it stands still, it reruns what an edit touches, it fails well and resumes."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import pandas as pd
import pytest

from cxr_nb import graph, places, runner, tables
from cxr_nb import report as command


MADE = graph.graph("smoke")
NOTEBOOKS = MADE.notebooks.keys() - graph.APART.values()


def resting_on(*changed):
    "Notebooks that use what some make, and these themselves."
    return {name for name in NOTEBOOKS if {*changed} & {*MADE.ancestors(f"records/{name}.json")}}


def readers(file): return resting_on(*(name for name in NOTEBOOKS if file in MADE.notebooks[name].reads))


def importing(module): return resting_on(*(name for name in NOTEBOOKS if module in runner.imported_modules(name)))


@pytest.fixture(scope="module")
def report(tmp_path_factory, copy_project, run_in):
    "A copy of the project in which the smoke report was run, with small checkpoints in the place of the seven encoders."
    copy = copy_project(tmp_path_factory.mktemp("project"))
    folders = tmp_path_factory.mktemp("checkpoints")
    for name, make in checkpoints.MAKERS.items(): make(folders / name)
    profile = copy / "nbs/profiles/smoke.yaml"
    encoders = ", ".join(f"{name}: {folders / name}" for name in checkpoints.MAKERS)
    profile.write_text(profile.read_text().replace("encoders: {", f"encoders: {{{encoders}, ").replace('figure_8: ""', "figure_8: CXR-BERT-specialized"))
    done = run_in(copy, "cxr_nb", "report", "--profile", "smoke", "--cores", 2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return copy


def snakemake(run_in, project, *args, profile="smoke"):
    return run_in(project, "snakemake", "--cores", 2, "--rerun-incomplete", *args, "--config", f"profile={profile}")


def would_run(run_in, project):
    done = snakemake(run_in, project, "-n")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^Job \d+: notebook (\w+)", done.stdout + done.stderr, flags=re.M))


@pytest.fixture
def edited():
    "A function that replaces text in a file and puts it back after the test."
    kept = {}

    def edit(path, old, new):
        kept.setdefault(path, path.read_text())
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    yield edit
    for path, text in kept.items(): path.write_text(text)


def test_it_writes_what_was_agreed(report):
    out = report / "outputs/smoke"
    for name in ("table_1", "table_2", "table_3", "table_2_phantom_reports", "table_3_phantom_reports", "table_2_open_i_rarer_classes", "table_3_open_i_rarer_classes", "table_5", "table_6", "reconstruction"):
        table = pd.read_csv(out / f"tables/{name}.csv")
        assert list(table)[:7] == tables.TABLE_COLUMNS
        measured = table[table.measured.notna()]
        around = measured[~measured.column.isin(["min", "max"])]  # an extreme has no interval
        around = around[around.ci_low.notna()]  # a single patient of a kind has no interval
        assert len(around) and around.ci_low.le(around.measured).all() and around.ci_high.ge(around.measured).all()
        assert (measured.n > 0).all()
        # a value is missing where there was nothing to measure, or where a judge called no image positive: that has no precision
        unmeasured = table[table.measured.isna() & (table.n > 0)]
        recalls = table[table.column == "recall"].set_index("row").measured if len(unmeasured) else {}
        assert all(column == "precision" and recalls[row] == 0 for row, column in zip(unmeasured.row, unmeasured.column)), name
    drawn = {"figure_2", "figure_8", "figure_6", "figure_7", "chexpert_at_k", "chexpert_at_k_phantom_reports", "chexpert_at_k_open_i_rarer_classes", "clusters_all_minilm_l6_v2", "text_evaluation_classes", "cohort_labels", "cohort_patients", "cohort_cooccurrence", "figure_3", "reconstruction_by_size", "miniature_losses", "textual_projection_loss", "textual_inversion_loss", "unet_losses", "generation_measures", "classification_roc", "classification_thresholds", "domain_gap", "claims"}
    images = {"figure_1", "figure_4", "figure_5", "tsne", "tsne_phantom_reports", "tsne_open_i_rarer_classes", "classification_scores"}
    sheets = {"images_original", "miniature_prompts", "phantoms", "phantom_findings", "cohort_sample_phantoms", "few_shot_candidates", "reconstruction_examples", "textual_projection_along", "textual_inversion_along", "few_shot", "unet_along_training", "images_unet", "nearest_training_images", "classification_extremes"}
    # numbered figures are PNG whatever they show
    for name in drawn | images: assert (out / f"figures/{name}.png").stat().st_size > 10_000 and (out / f"figures/{name}.svg").exists() == (name in drawn)
    for name in sheets: assert (out / f"figures/{name}.webp").stat().st_size > 3_000
    assert (out / "report.html").exists()
    for name in NOTEBOOKS:
        assert (out / f"notebooks/{name}.ipynb").exists()
        record = json.loads((out / f"records/{name}.json").read_text())
        assert all(places.sha256(out / file) == digest for file, digest in (record["inputs"] | record["outputs"]).items())


def test_printed_cells_are_all_there_beside_the_measured(report):
    table = pd.read_csv(report / "outputs/smoke/tables/table_3.csv").set_index(["row", "column"])
    printed = tables.published("table_3").set_index("finding").stack().dropna()
    assert (table.published.loc[printed.index] == printed).all()
    table = pd.read_csv(report / "outputs/smoke/tables/table_2.csv").set_index(["row", "column"])
    printed = tables.published("table_2").set_index("encoder").stack().dropna()
    assert (table.published.loc[printed.index] == printed).all()


def test_every_extraction_of_the_seven_encoders_is_measured(report):
    table = pd.read_csv(report / "outputs/smoke/tables/table_2.csv")
    printed = table[table.published.notna()]
    # the one printed cell a checkpoint without a trained pooler cannot fill
    assert printed[printed.measured.isna()][["row", "column"]].to_numpy().tolist() == [["CXR-BERT-general", "pooler_output"]]
    clip = printed[(printed.row == "CLIP") & (printed.column == "cls_hidden_state")].iloc[0]
    assert clip.measured == pytest.approx(clip.chance) and clip.measured_cosine == pytest.approx(clip.chance)


def test_macro_is_the_mean_of_the_classes_measured(report):
    table = pd.read_csv(report / "outputs/smoke/tables/table_3.csv")
    classes = table[table.row.isin(tables.published("table_3").finding[:-1]) & table.measured.notna()]
    macro = table[table.row == f"Macro, {classes.row.nunique()} classes measured"].set_index("column")
    for encoder, rows in classes.groupby("column"):
        assert rows.measured.mean() == pytest.approx(macro.measured[encoder])
        assert pd.isna(macro.published[encoder]) or rows.published.mean() == pytest.approx(macro.published[encoder], abs=0.01)
    left_out = table[table.note.fillna("").str.startswith("left out")]
    assert set(left_out.row).isdisjoint(classes.row) and left_out.row.nunique() + classes.row.nunique() == 14


def test_judges_are_asked_about_prompts_of_reports(report):
    "With fewer images than a measure takes it would be left out, and nothing else would show it."
    table = pd.read_csv(report / "outputs/smoke/tables/report_prompts.csv")
    by_judge = table[table.measured_by.str.startswith("judge_") & table.measured.notna()]
    assert by_judge.groupby(["row", "column"]).size().eq(2).all()
    assert set(by_judge.column) == {"Pleural Effusion", "Cardiomegaly", "stated, against not named", "denied, against not named"}


def test_a_second_call_runs_nothing(report, run_in):
    assert would_run(run_in, report) == set()


@pytest.mark.parametrize("file, old, new, expected", [
    ("nbs/profiles/smoke.yaml", "  draws: 200", "  draws: 100", resting_on("33_text_encoder_results")),
    ("nbs/profiles/smoke.yaml", "# Tests", "# tests", set()),
    ("nbs/B_text_clusters.ipynb", "Appendix B", "Appendix  B", set()),
    ("nbs/B_text_clusters.ipynb", '"outputs": []', '"outputs": [{"name": "stdout", "output_type": "stream", "text": ["saved"]}]', set()),
    ("nbs/B_text_clusters.ipynb", "figure_style()", "figure_style( )", {"B_text_clusters", "F_page"}),
    ("cxr_nb/metrics.py", "AUTOGENERATED", "autogenerated", importing("metrics")),
    ("cxr_nb/stable_diffusion.py", "AUTOGENERATED", "autogenerated", importing("stable_diffusion")),
    ("cxr_nb/judges.py", "AUTOGENERATED", "autogenerated", importing("judges")),
    ("cxr_nb/cohorts.py", "AUTOGENERATED", "autogenerated", importing("cohorts")),
    ("cxr_nb/pictures.py", "AUTOGENERATED", "autogenerated", importing("pictures")),
    ("outputs/smoke/cohorts/text_evaluation_classes.csv", "label", "label ", readers("cohorts/text_evaluation_classes.csv")),
    ("outputs/smoke/cohorts/few_shot.csv", "image_id", "image_id ", readers("cohorts/few_shot.csv")),
])
def test_an_edit_reruns_what_depends_on_it(report, run_in, edited, file, old, new, expected):
    edited(report / file, old, new)
    assert would_run(run_in, report) == expected


def test_what_is_missing_is_made_again(report, run_in):
    for file in ("records/33_text_encoder_results.json", "measures/chexpert_at_k.parquet", "tables/table_3.csv", "figures/chexpert_at_k.svg", "notebooks/33_text_encoder_results.ipynb"):
        path = report / "outputs/smoke" / file
        kept = path.rename(path.with_name("kept"))
        assert "33_text_encoder_results" in would_run(run_in, report)
        kept.rename(path)


LOST = {
    "03_phantoms": "images/phantoms/images/*.png", "22_stable_diffusion": "images/original/*/0000.png", "23_autoencoder": "images/autoencoder/*/*/0000.png",
    "25_textual_projection": "models/textual_projection/*/*.safetensors", "26_textual_inversion": "models/textual_inversion/*/*.safetensors",
    "27_unet_finetuning": "models/unet/*/unet/*.safetensors", "21_datasets": "cohorts/phantoms.csv", "28_classification": "measures/generated_probabilities.parquet",
}


@pytest.mark.parametrize("notebook", LOST)
def test_what_is_lost_or_damaged_is_known(report, monkeypatch, notebook):
    "All that a notebook left is in its record, also what Snakemake does not know of: pictures, weights, tokens."
    monkeypatch.chdir(report)
    assert command.outdated("smoke") == {}
    for path in sorted((report / "outputs/smoke").glob(LOST[notebook]))[:3]:
        kept = path.read_bytes()
        path.unlink()
        assert command.outdated("smoke").keys() == {notebook}, path
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert command.outdated("smoke").keys() == {notebook}, path
        path.write_bytes(kept)
    assert command.outdated("smoke") == {}


def test_class_images_are_in_the_record_too(report, monkeypatch):
    monkeypatch.chdir(report)
    path = sorted((report / "outputs/smoke/images/unet/class_images").rglob("*.png"))[0]
    kept = path.rename(path.with_name(".kept"))
    assert command.outdated("smoke").keys() == {"27_unet_finetuning"}
    kept.rename(path)


def test_a_fresh_clone_with_committed_results_runs_everything(report, run_in, tmp_path):
    copy = tmp_path / "clone"
    shutil.copytree(report, copy, ignore=shutil.ignore_patterns(".snakemake", "cohorts", "measures", "images"))
    assert would_run(run_in, copy) == NOTEBOOKS


def test_an_unknown_profile_key_stops_everything_with_one_line(report, run_in, edited):
    edited(report / "nbs/profiles/smoke.yaml", "  draws: 200", "  drawss: 200")
    done = snakemake(run_in, report)
    assert done.returncode == 1
    assert "profile 'smoke', notebook 33_text_encoder_results: unknown parameter 'drawss'; it takes profile, seed, k, draws" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_run_keeps_its_notebook_and_resumes(report, run_in):
    path, notebook = report / "nbs/profiles/smoke.yaml", "A_chexpert_reconstruction"
    good = path.read_text()
    path.write_text(f"{good}\n{notebook}:\n  threshold: 2.0\n")
    out = report / "outputs/smoke"
    failed = snakemake(run_in, report)
    assert failed.returncode == 1 and f"notebook {notebook} failed: ValueError: threshold is 2; scores are probabilities from 0 to 1" in failed.stderr
    assert "threshold is 2" in (out / f"failed/{notebook}.ipynb").read_text()
    assert not list(out.rglob(".partial-*"))
    path.write_text(good)
    done = snakemake(run_in, report)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line for line in re.findall(r"^Job \d+: notebook (\w+)", done.stderr, flags=re.M)} == resting_on(notebook)
    assert (out / "tables/reconstruction_chexpert.csv").exists() and would_run(run_in, report) == set()


def test_an_interrupted_report_keeps_finished_trainings(report, run_in):
    "Interrupted between two U-Nets, twice: those that are finished are found by the next run, and not a step of theirs is taken again."
    out, env = report / "outputs/smoke", os.environ | {"PYTHONPATH": str(report)}
    call = [Path(sys.executable).parent / "cxr_nb", "report", "--profile", "smoke", "--cores", "2"]
    (out / "records/27_unet_finetuning.json").unlink()
    folders = sorted((out / "models/unet").iterdir(), key=lambda folder: (folder / "training.json").stat().st_mtime)
    for folder in folders[2:]: shutil.rmtree(folder)
    def trained(): return {path: path.read_bytes() for path in (out / "models/unet").glob("*/training.json")}
    kept = trained()
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = subprocess.Popen(call, cwd=report, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(trained()) == len(kept): assert running.poll() is None; time.sleep(0.05)
        running.send_signal(number)
        running.wait(timeout=30)
        time.sleep(3)  # the children of one that was killed look after it every half second
        assert kept.items() < trained().items() and len(trained()) < len(folders)
        kept = trained()
    assert run_in(report, "cxr_nb", "run", "27_unet_finetuning", "--profile", "smoke").returncode == 0
    assert all(path.read_bytes() == content for path, content in kept.items())  # which hold the seconds that they took
    assert all((folder / "training.json").exists() for folder in folders)
