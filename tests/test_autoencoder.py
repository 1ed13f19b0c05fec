"The VAE study's measures and tables, against diffusers, scikit-image, torchxrayvision, scikit-learn and counting."
import numpy as np
import pandas as pd
import pipelines
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from cxr_nb.autoencoder import COLUMNS, LABEL_TARGETS, STATISTICS, boxes_at, classification_table
from cxr_nb.autoencoder import distances_across_patients, latent_seeds, mirrored, pair_measures, reconstruct
from cxr_nb.autoencoder import reconstruct_all, statistics_table, text_measures
from cxr_nb.images import load_radiograph
from cxr_nb.tables import TABLE_COLUMNS, published


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return pipelines.small_vae().eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path):
    "Five files of other shapes, one of them in colour."
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(64, 64), (90, 64), (64, 80), (48, 48), (64, 64, 3)]):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(5)]


@pytest.mark.parametrize("size", [32, 40, 64])
def test_reconstruction_is_the_forward_pass_of_diffusers(vae, size):
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    theirs = vae(images * 2 - 1, sample_posterior=True, generator=torch.Generator().manual_seed(5)).sample
    torch.testing.assert_close(reconstruct(vae, images, [5]), (theirs / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_an_image_has_its_own_latents_in_any_order_and_batch(vae, folder):
    ids, some = ["a", "b", "c", "d", "e"], [3, 1]
    seeds = latent_seeds(ids)
    assert latent_seeds([ids[i] for i in some]) == [seeds[i] for i in some] and len(set(seeds)) == 5
    assert not set(seeds) & set(latent_seeds(ids, seed=1))
    all_of_them, _, made = reconstruct_all(vae, folder, seeds, 32, {}, batch_size=5)
    two, _, again = reconstruct_all(vae, [folder[i] for i in some], [seeds[i] for i in some], 32, {}, batch_size=1)
    assert (made[some].int() - again.int()).abs().max() <= 1
    names = ["rmse", "rmse_xrv", "psnr", "ssim", "colour_cast"]
    np.testing.assert_allclose(two[names], all_of_them[names].iloc[some], rtol=1e-3)


def test_a_set_of_pairs_is_what_each_file_gives(vae, folder):
    result, before, after = reconstruct_all(vae, folder, range(5), 56, {}, batch_size=2)
    assert before.dtype == after.dtype == torch.uint8 and before.shape == after.shape == (5, 56, 56)
    for i, path in enumerate(folder): assert (before[i].numpy() == load_radiograph(path, 56)).all()
    assert result.enlarged.tolist() == [False, False, False, True, False]
    assert result[["ssim_text", "ssim_elsewhere", "ssim_mirrored"]].isna().all(axis=None)
    (folder[2]).write_bytes(b"no image")
    with pytest.raises(ValueError, match="2.png: is no PNG or JPEG"): reconstruct_all(vae, folder, range(5), 56, {})


def test_pair_measures_are_those_of_others():
    import torchxrayvision as xrv
    rng = np.random.default_rng(0)
    before = rng.integers(0, 256, (3, 48, 48)).astype(np.uint8)
    after = np.clip(before[:, None] / 255 + rng.normal(0, 0.1, (3, 3, 48, 48)), 0, 1)
    result = pair_measures(torch.from_numpy(before), torch.from_numpy(after).float())
    for i, row in result.iterrows():
        a, b = before[i].astype(float), 255 * after[i].mean(0)
        scaled = xrv.datasets.normalize(a, 255) - xrv.datasets.normalize(b, 255)
        assert row.rmse == pytest.approx(np.sqrt(((a - b) ** 2).mean()), rel=1e-4)
        assert row.rmse_xrv == pytest.approx(np.sqrt((scaled**2).mean()), rel=1e-4)
        assert row.psnr == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), rel=1e-4)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        assert row.ssim == pytest.approx(structural_similarity(a, b, **options), abs=1e-4)
        assert row.colour_cast == pytest.approx(np.abs(255 * after[i] - b).mean(), rel=1e-4)


@pytest.mark.parametrize("width, height, size", [(100, 100, 100), (128, 128, 64), (150, 100, 80), (100, 140, 120)])
def test_boxes_follow_the_image_that_is_read(tmp_path, width, height, size):
    "A white rectangle, read as the study reads it, lies in its box and nowhere else."
    pixels = np.zeros((height, width), np.uint8)
    pixels[60:72, 58:78] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (left, top, right, bottom), = boxes_at([[58, 60, 78, 72]], width, height, size)
    read = load_radiograph(tmp_path / "a.png", size)
    white = np.argwhere(read > 128)
    assert abs(white.min(0) - [top, left]).max() <= 1 and abs(white.max(0) + 1 - [bottom, right]).max() <= 1


def test_boxes_outside_of_the_square_do_not_count():
    assert boxes_at([[0, 0, 10, 10]], 200, 100, 100) == []
    assert mirrored([[0, 0, 10, 10], [90, 5, 100, 9]], 100) == []  # the other side has text too


def test_text_that_is_lost_shows_inside_its_box_alone():
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.integers(90, 110, (1, 64, 64)).astype(np.uint8))
    images[:, 4:14, 4:24] = torch.from_numpy(rng.choice([0, 255], (10, 20)).astype(np.uint8))
    lost = images.clone()
    lost[:, 4:14, 4:24] = 100
    result = text_measures(images, lost[:, None].expand(-1, 3, -1, -1) / 255, [[[4, 4, 24, 14]]]).iloc[0]
    assert result.ssim_text < 0.2 and result.ssim_elsewhere > 0.9 and result.ssim_mirrored > 0.9


def measured_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"ssim": rng.normal(0.9, 0.02, n), "rmse_xrv": rng.gamma(9, 4, n)})


def test_statistics_are_those_of_pandas_and_the_printed_stand_beside_them():
    values, printed = measured_of(60), published("figure_3").query("dataset == 'MIMIC-CXR'").replace({"metric": {"rmse": "rmse_xrv"}})
    table = statistics_table(values, np.arange(60), printed, draws=300).set_index(["row", "column"])
    assert list(table.reset_index()) == TABLE_COLUMNS
    wanted = values.agg(["mean", "std", "median", "min", "max"]).T.set_axis(STATISTICS, axis=1).stack()
    np.testing.assert_allclose(table.measured.loc[wanted.index], wanted)
    assert table.published["ssim"].tolist() == [0.93, 0.02, 0.93, 0.69, 0.97] and table.published["rmse_xrv", "mean"] == 31.8
    assert table.loc["radiologist_score"].measured.isna().all() and (table.loc["radiologist_score"].n == 0).all()
    inner = table.loc[[(row, c) for row in values for c in ("mean", "sd", "median")]]
    assert (inner.ci_low < inner.measured).all() and (inner.measured < inner.ci_high).all()


def test_intervals_resample_patients():
    "Each image twice, of one patient, is no more than once; of two patients it would be."
    values = measured_of(60)
    twice, none = pd.concat([values, values], ignore_index=True), pd.DataFrame(columns=["metric", *STATISTICS])
    width = lambda x, units: (lambda t: t.ci_high - t.ci_low)(statistics_table(x, units, none, 500).query("column == 'mean'").iloc[0])
    once, same, more = width(values, np.arange(60)), width(twice, np.tile(np.arange(60), 2)), width(twice, np.arange(120))
    assert same == pytest.approx(once) and more < 0.8 * once


def test_table_1_is_what_scikit_learn_says():
    rng, n = np.random.default_rng(0), 80
    rows = pd.DataFrame({"image_id": [f"i{i}" for i in range(n)], "patient_id": [f"p{i // 2}" for i in range(n)]})
    for label in LABEL_TARGETS: rows[label] = rng.choice([1, 0, -1, np.nan], n, p=[0.2, 0.3, 0.1, 0.4])
    rows["Fracture"] = np.nan
    truth = rows[list(LABEL_TARGETS)].isin([1, -1]).astype(int)
    result = pd.concat([pd.DataFrame({"image_id": rows.image_id, "target": target, "original": rng.random(n), "reconstruction": rng.random(n)}) for target in LABEL_TARGETS.values()])
    result = result.sample(frac=1, random_state=0)  # rows are matched by image, not by order
    table = classification_table(rows, result, published("table_1"), 0.4, draws=50).set_index(["row", "column"])
    assert len(table) == 12 * len(COLUMNS) and list(table.reset_index())[:7] == TABLE_COLUMNS
    by_target = {t: f.set_index("image_id").loc[rows.image_id] for t, f in result.groupby("target")}
    for label, target in LABEL_TARGETS.items():
        measured, y = table.measured[label], truth[label]
        assert measured["prevalence"] == pytest.approx(y.mean())
        if label == "Fracture": continue
        for side in ("original", "reconstruction"):
            p = by_target[target][side].to_numpy()
            wanted = roc_auc_score(y, p), accuracy_score(y, p >= 0.4), f1_score(y, p >= 0.4)
            np.testing.assert_allclose(measured[[f"{score}_{side}" for score in ("auc", "accuracy", "f1")]], wanted)
        assert measured["auc_difference"] == pytest.approx(measured["auc_reconstruction"] - measured["auc_original"])
    fracture = table.loc["Fracture"].drop("prevalence")
    assert fracture.measured.isna().all() and set(fracture.note) == {"no image has this label"} and (fracture.n == 0).all()
    printed = published("table_1").set_index("finding").stack()
    assert (table.published.loc[printed.index] == printed).all() and table.published.notna().sum() == len(printed)


def test_a_reconstruction_that_changes_nothing_is_at_the_floor_and_a_shift_above_it():
    rng = np.random.default_rng(0)
    real, patients = rng.normal(size=(120, 4)), np.repeat(np.arange(40), 3)
    floor, same, n = distances_across_patients(real, real, patients)
    assert (floor == same).all() and n == 59
    _, moved, _ = distances_across_patients(real, real + 2, patients)
    assert (moved - floor).mean() == pytest.approx(4 * 2**2, rel=0.1)
