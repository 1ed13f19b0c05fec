"Scores of generated images against scikit-learn, the paper's own arithmetic, counting and a bootstrap written out."
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_nb.classification import SCORE_COLUMNS, effusion_scores, generated_images, judge_differences
from cxr_nb.classification import read_images, real_images, sampling_units, table_5
from cxr_nb.domain_gap import COMPARISONS, domain_scores, gap_scores, gap_verdict, realness, unit_folds
from cxr_nb.folders import read_folder
from cxr_nb.image_sets import image_set
from cxr_nb.judges import load_classifier, probabilities
from cxr_nb.phantoms import write_phantoms
from cxr_nb.tables import TABLE_COLUMNS, published

PAIRS = {method: ("no", "yes") for method in ("original", "textual_projection", "textual_inversion", "unet")}
PAIRS["real"] = "no finding", "pleural effusion"


def rows_of(scores, prompt="no", method="unet", variant="v", patients=None):
    keys = {"method": method, "variant": variant, "prompt": prompt, "image": range(len(scores))}
    return pd.DataFrame(keys).assign(patient_id=[""] * len(scores) if patients is None else patients, Effusion=np.asarray(scores, float))


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    low, high = rng.random(40).round(1), rng.random(60).round(1)  # with ties
    result = effusion_scores(rows_of(low), rows_of(high, "yes"), 0.4, draws=20).set_index("column")
    labels, scores = np.repeat([0, 1], [40, 60]), np.r_[low, high]
    called = scores >= 0.4
    theirs = {"prevalence": 0.6, "auc": roc_auc_score(labels, scores), "accuracy": accuracy_score(labels, called), "f1": f1_score(labels, called),
              "precision": precision_score(labels, called), "recall": recall_score(labels, called)}
    assert result.index.tolist() == SCORE_COLUMNS and (result.n == 100).all()
    assert result.note.to_dict() == dict.fromkeys(SCORE_COLUMNS, "") | {"precision": f"{called.sum()} images called positive"}
    for column, value in theirs.items(): assert result.measured[column] == pytest.approx(value), column


@pytest.mark.parametrize("row", list(published("table_5").itertuples()), ids=lambda row: row.method)
def test_table_5_follows_from_counts(row):
    "Of 50 and 50 images, recall and precision say how many were called; accuracy and F1 must follow, as printed."
    hits = round(50 * row.recall)
    wrong = round(50 + 50 * (1 - 2 * row.accuracy)) - (50 - hits)  # errors are misses and false alarms
    low, high = np.full(50, 0.2), np.full(50, 0.2)
    low[:wrong], high[:hits] = 0.8, 0.8
    result = effusion_scores(rows_of(low), rows_of(high, "yes"), draws=10).set_index("column").measured
    assert result["accuracy"] == pytest.approx(row.accuracy, abs=0.0005) and result["f1"] == pytest.approx(row.f1, abs=0.0005)
    assert np.nan_to_num(result["precision"]) == pytest.approx(row.precision, abs=0.0005)


def test_the_interval_resamples_pairs_of_one_noise():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=30)
    low, high = 1 / (1 + np.exp(-noise)), 1 / (1 + np.exp(-noise - rng.normal(0.5, 0.3, 30)))
    result = effusion_scores(rows_of(low), rows_of(high, "yes"), draws=1500).set_index("column").loc["auc"]
    draws = [rng.integers(30, size=30) for _ in range(1500)]
    def auc(x, y): return (x[:, None] < y).mean() + (x[:, None] == y).mean() / 2
    paired = [auc(low[i], high[i]) for i in draws]
    assert [result.ci_low, result.ci_high] == pytest.approx(np.quantile(paired, [0.025, 0.975]), abs=0.03)
    apart = [auc(low[i], high[j]) for i, j in zip(draws, draws[1:])]
    width = np.diff(np.quantile(apart, [0.025, 0.975]))[0]
    assert result.ci_high - result.ci_low < 0.8 * width  # noise in common makes the difference of the prompts surer


def test_the_units_are_patients_and_noises():
    real = rows_of([0.1, 0.2, 0.3], method="real", patients=["a", "a", "b"])
    assert list(sampling_units(pd.concat([real, rows_of([0.1, 0.2])]))) == ["patient a", "patient a", "patient b", "noise 0", "noise 1"]
    result = effusion_scores(real, rows_of([0.5] * 3, "yes"), draws=200).set_index("column")
    assert result.ci_low["prevalence"] < 0.5 < result.ci_high["prevalence"]


def test_table_5_has_all_printed_cells_and_all_variants():
    printed, rng = published("table_5"), np.random.default_rng(0)
    compared = {row: ("unet", f"v{i}") for i, row in enumerate(printed.method)}
    made = [rows_of(rng.random(4), prompt, "unet", v) for v in ("v0", "v5", "other") for prompt in ("no", "yes")]
    made += [rows_of(rng.random(4), prompt, "real", "Toy", list("abcd")) for prompt in PAIRS["real"]]
    made += [rows_of(rng.random(4), "style", "unet", "other"), rows_of(rng.random(4), "no finding", "few_shot", "Toy")]
    table = table_5(pd.concat(made), PAIRS, compared, printed, draws=20)
    assert list(table.columns[:7]) == TABLE_COLUMNS
    assert table.row.unique().tolist() == [*printed.method, "U-Net: other", "Real images: Toy"]
    wide = table.pivot(index="row", columns="column", values="published").loc[printed.method, SCORE_COLUMNS]
    assert (wide.to_numpy() == printed[SCORE_COLUMNS].to_numpy()).all()
    blank = table[table.note == "not drawn in this run"]
    assert set(blank.row) == {row for row, key in compared.items() if key[1] not in ("v0", "v5")} and blank.measured.isna().all()
    assert table[table.row == "U-Net: other"].n.tolist() == [8] * 6, "the third prompt is neither negative nor positive"


def test_comparisons_across_are_the_aucs_of_their_sets():
    rng = np.random.default_rng(0)
    sides = {"generated": [rows_of(rng.random(20)), rows_of(rng.random(20), "yes")],
             "real": [rows_of(rng.random(15), "no finding", "real", patients=[f"p{i}" for i in range(15)]),
                      rows_of(rng.random(12), "pleural effusion", "real", patients=[f"q{i}" for i in range(12)])]}
    result = gap_scores(real=sides["real"], fake=sides["generated"], draws=20).set_index("column")
    for name, ((kind, i), (other, j)) in COMPARISONS.items():
        low, high = sides[kind][i].Effusion, sides[other][j].Effusion
        assert result.measured[name] == pytest.approx(roc_auc_score(np.repeat([0, 1], [len(low), len(high)]), np.r_[low, high]))
        assert result.n[name] == len(low) + len(high)


@pytest.mark.parametrize("lows, highs, verdict", [
    ((0.6, 0.6, 0.6, 0.4), (0.9, 0.9, 0.9, 0.6), "the finding"), ((0.6, 0.5, 0.6, 0.4), (0.9, 0.9, 0.9, 0.6), "may be the domain gap"),
    ((0.6, 0.6, 0.2, 0.4), (0.9, 0.9, 0.9, 0.6), "may be the domain gap"), ((0.5, 0.6, 0.6, 0.4), (0.9, 0.9, 0.9, 0.6), "not told apart"),
    ((0.6, 0.6, 0.6, 0.6), (0.9, 0.9, 0.9, 0.9), "may be the domain gap"), ((0.6, 0.6, 0.6, 0.1), (0.9, 0.9, 0.9, 0.4), "the finding"),
    ((0.6, 0.6, 0.6, 0.4, 0.39), (0.9, 0.9, 0.9, 0.6, 0.65), "the judge cannot tell"), ((0.6, 0.6, 0.6, 0.4, 0.7), (0.9, 0.9, 0.9, 0.6, 0.9), "the finding"),
    ((0.1, 0.6, 0.6, 0.4), (0.49, 0.9, 0.9, 0.6), "reversed"), ((np.nan, 0.6, 0.6, 0.4), (np.nan, 0.9, 0.9, 0.6), "not told apart")])
def test_the_rule(lows, highs, verdict):
    names = ["generated", "positives against real", "negatives against real", "normals", "real"][: len(lows)]
    assert gap_verdict(pd.DataFrame({"column": names, "ci_low": lows, "ci_high": highs})) == verdict


def test_judges_differ_as_their_aucs_do():
    rng = np.random.default_rng(0)
    first = pd.concat([rows_of(rng.random(30)), rows_of(rng.random(30), "yes")], ignore_index=True)
    second = first.assign(Effusion=rng.random(60))
    result = judge_differences(first, second.sample(frac=1, random_state=1), "yes", 0.3, draws=200).set_index("column")
    labels = first.prompt == "yes"
    assert result.measured["auc difference"] == pytest.approx(roc_auc_score(labels, second.Effusion) - roc_auc_score(labels, first.Effusion))
    assert result.measured["called alike"] == pytest.approx(np.mean((first.Effusion >= 0.3) == (second.Effusion >= 0.3)))
    assert (result.ci_low < result.measured).all() and (result.measured < result.ci_high).all()


@pytest.mark.parametrize("seed", range(5))
def test_folds_cut_no_unit_and_have_both_classes(seed):
    rng = np.random.default_rng(seed)
    patients = rng.integers(12, size=40)
    units = np.r_[[f"p{i}" for i in patients], [f"n{i % 7}" for i in range(21)]]
    classes = np.repeat([1, 0], [40, 21])
    fold = unit_folds(units, classes, seed=seed)
    assert (pd.Series(fold).groupby(units).nunique() == 1).all()
    assert (pd.crosstab(fold, classes) > 0).all(axis=None) and len(set(fold)) == 5
    dealt = pd.DataFrame({"fold": fold, "own": classes, "unit": units}).groupby(["own", "fold"]).unit.nunique().unstack()
    assert (dealt.max(axis=1) - dealt.min(axis=1) <= 1).all()
    assert len(set(unit_folds(np.array(["a", "b", "n", "m"]), np.array([0, 0, 1, 1])))) == 2


def test_realness_is_a_cross_validated_regression():
    rng = np.random.default_rng(0)
    real, groups, units = np.repeat([1, 0], [50, 30]), rng.integers(2, size=80), np.array([f"u{i // 2}" for i in range(80)])
    x = rng.normal(size=(80, 5)) + 0.7 * real[:, None] * [1, 0, 0, 0, 3]
    cells = [sum((real == r) & (groups == g)) for r, g in zip(real, groups)]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    theirs = cross_val_predict(model, x, real, cv=PredefinedSplit(unit_folds(units, real, seed=3)), method="predict_proba",
                               params={"logisticregression__sample_weight": 80 / 4 / np.array(cells)})
    np.testing.assert_allclose(realness(x, real, groups, units, seed=3), theirs[:, 1], rtol=1e-6)


def test_the_finding_alone_does_not_tell_domains_apart():
    "Many real normals and few real effusions, as many generated of each: the finding must not pass for the domain."
    rng = np.random.default_rng(0)
    rows = pd.concat([
        rows_of(np.zeros(160), "no finding", "real", patients=[f"p{i}" for i in range(160)]),
        rows_of(np.zeros(40), "pleural effusion", "real", patients=[f"q{i}" for i in range(40)]), rows_of(np.zeros(60)), rows_of(np.zeros(60), "yes")])
    finding = rows.prompt.isin(["pleural effusion", "yes"]).to_numpy(float)
    x = np.c_[2 * finding + rng.normal(0, 0.3, len(rows)), rng.normal(size=(len(rows), 2))]
    result = domain_scores(rows, x, ["pleural effusion", "yes"], draws=100).set_index("column")
    assert (result.measured - 0.5).abs().max() < 0.15
    real, units = (rows.method == "real").to_numpy(int), sampling_units(rows)
    assert roc_auc_score(real, realness(x, real, np.zeros(len(rows)), units)) > 0.6, "without weights it would"
    far = domain_scores(rows, x + 3 * (1 - real)[:, None], ["pleural effusion", "yes"], draws=100).set_index("column")
    assert far.measured[["domain", "domain, negatives", "domain, positives"]].min() > 0.95


def test_images_are_those_the_lists_name(tmp_path):
    sets = pd.DataFrame([image_set("unet", "A, with b", "p", 0, 2), image_set("unet", "A, with c", "p", 0, 1)]).assign(method="unet")
    for name in ("a_with_b/p/0000", "a_with_b/p/0001", "a_with_c/p/0000", "an_old_variant/p/0000"):
        path = tmp_path / f"images/unet/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (200, 0, 0)).save(path)
    result = generated_images(tmp_path, sets)
    assert result.path.tolist() == ["images/unet/a_with_b/p/0000.png", "images/unet/a_with_b/p/0001.png", "images/unet/a_with_c/p/0000.png"]
    assert read_images([tmp_path / path for path in result.path])[:, 0].min() == 200
    Image.new("RGB", (40, 48)).save(tmp_path / result.path[1])
    with pytest.raises(ValueError, match="a_with_b/p: images of 2 sizes"): read_images([tmp_path / path for path in result.path[:2]])
    (tmp_path / result.path[1]).unlink()
    with pytest.raises(ValueError, match="a_with_b/p: holds 1 images, sets.csv says 2; draw them again"): generated_images(tmp_path, sets)


class Writer(torch.nn.Module):
    "TorchScript that writes a file as it is loaded."

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor): return x

    @torch.jit.export
    def __getstate__(self): return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path, self.training = state
        torch.ops.aten.save(torch.zeros(1), self.path)


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, "w")


def torchscript(path, trap): torch.jit.save(torch.jit.script(Writer(trap)), path)
def pickled(path, trap): torch.save({"weights": Trap(trap)}, path)
def pickled_long_ago(path, trap): torch.save(Trap(trap), path, _use_new_zipfile_serialization=False)
def plain_pickle(path, trap): path.write_bytes(pickle.dumps(Trap(trap)))


def zipped(path, trap):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("archive/data.pkl", "archive/version", "archive/code/__torch__.py"): archive.writestr(name, pickle.dumps(Trap(trap)))


def tarred(path, trap):
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content := pickle.dumps(Trap(trap)))
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("make", [torchscript, pickled, pickled_long_ago, plain_pickle, zipped, tarred])
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_code_are_refused_and_not_run(tmp_path, monkeypatch, make):
    from torchxrayvision import models, utils
    name, trap = "densenet121-res224-all", str(tmp_path / "trap")
    monkeypatch.setattr(utils, "get_cache_dir", lambda: str(tmp_path / "home"))
    path = tmp_path / "home" / models.model_urls[name]["weights_url"].rsplit("/", 1)[1]
    path.parent.mkdir()
    make(path, trap)
    if make is torchscript:
        (tmp_path / "trap").unlink(missing_ok=True)
        torch.jit.load(str(path))
        assert (tmp_path / "trap").exists(), "the trap works"
        (tmp_path / "trap").unlink()
    with pytest.raises(ValueError, match=f"^classifier {name}: .*download it again$"): load_classifier(name)
    assert not (tmp_path / "trap").exists()


def test_a_judge_finds_effusions_in_phantoms_and_tells_when_they_are_swapped(tmp_path):
    "All the way from files: phantoms of other seeds stand for real and for generated images."
    write_phantoms(tmp_path, 45, 7, 64)
    cohort = read_folder(tmp_path, "Toy")
    rows = real_images(cohort, 15)
    assert rows.groupby("prompt").size().min() >= 6 and not rows.duplicated("image_id").any()
    judge = load_classifier("cxr_nb/miniature/classifiers/judge_a")
    pixels = read_images([tmp_path / path for path in rows.image_path], 64)
    rows["Effusion"] = probabilities(judge, pixels)[:, judge.targets.index("Effusion")]
    low, high = (rows[rows.prompt == prompt] for prompt in PAIRS["real"])
    assert effusion_scores(low, high, draws=20).set_index("column").measured["auc"] > 0.8
    def as_generated(part): return part.assign(method="unet", patient_id="", image=range(len(part)))
    assert gap_verdict(gap_scores(real=(low, high), fake=(as_generated(low), as_generated(high)), draws=300)) == "the finding"
    assert gap_verdict(gap_scores(real=(low, high), fake=(as_generated(high), as_generated(low)), draws=300)) == "reversed"


def test_a_set_of_more_images_than_four_digits_count(tmp_path):
    "As text 10000.png stands between 1000.png and 1001.png."
    place, n = tmp_path / "images/unet/v/no", 10001
    place.mkdir(parents=True)
    for i in range(n): (place / f"{i:04}.png").touch()
    sets = pd.DataFrame([["unet", "v", "no", "images/unet/v/no", n]], columns=["method", "variant", "prompt", "path", "n"])
    result = generated_images(tmp_path, sets)
    assert len(result) == n and (result.path == [f"images/unet/v/no/{i:04}.png" for i in result.image]).all() and result.path.iloc[-1].endswith("/10000.png")
    (place / "0500.png").rename(place / "10001.png")
    with pytest.raises(ValueError, match=r"holds 10001 images, sets.csv says 10001; draw them again \(0500.png, 10001.png\)"): generated_images(tmp_path, sets)
