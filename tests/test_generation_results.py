"""Intervals and floors of §3.4: they must cover what they promise."""
import inspect

import numpy as np
import pytest
import torch

from cxr_nb import generation
from cxr_nb.domain_gap import gap_scores
from cxr_nb.generation import MEASURES, copying_measures, distribution_measures, mean_likeness, ms_ssim
from cxr_nb.generation import nearest_training, reference_sizes, split_floor
from cxr_nb.intervals import jackknife
from cxr_nb.metrics import disjoint_halves, precision_recall_density_coverage

REPEATS = 60


@pytest.fixture(scope="module")
def repeated():
    "Measures of many pairs of samples of the same two populations: (repeats, value/low/high, measures)."
    def one(i):
        rng = np.random.default_rng(i)
        fake, real = rng.normal(0.7, 1.2, (40, 4)), rng.normal(size=(60, 4))
        return jackknife(lambda a, b: distribution_measures(real=real[b], fake=fake[a]), [np.arange(40), np.arange(60)], 10)
    return np.stack([one(i) for i in range(REPEATS)])


def half_width(result): return np.nanmean(result[:, 2] - result[:, 0], axis=0)


@pytest.mark.parametrize("name", ["frechet", "kid", "precision", "density", "coverage"])
def test_jackknife_is_as_wide_as_the_spread_over_new_samples(repeated, name):
    at = MEASURES.index(name)
    spread = repeated[:, 0, at].std(ddof=1)
    # Student's t of 9 degrees of freedom; the spread of 60 repeats is itself known to about a tenth
    assert 0.75 < half_width(repeated)[at] / (2.262 * spread) < 1.5


@pytest.mark.parametrize("name", ["frechet", "kid", "density", "coverage"])
def test_interval_covers_the_mean_over_new_samples(repeated, name):
    at = MEASURES.index(name)
    expected = repeated[:, 0, at].mean()
    covered = (repeated[:, 1, at] <= expected) & (expected <= repeated[:, 2, at])
    assert covered.mean() > 0.85


def test_jackknife_keeps_patients_together():
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(25), 4)
    value = rng.normal(size=25)[units]  # a patient's four images are all the same
    _, low, high = jackknife(lambda i: [value[i].mean()], [units], blocks=25)[:, 0]
    by_patient = value[::4]
    assert (high - low) / 2 == pytest.approx(2.064 * by_patient.std(ddof=1) / 5, rel=1e-3)


def test_likeness_of_pairs_has_the_right_width():
    def one(i):
        x = np.random.default_rng(i).normal(size=30)
        likeness, units = np.exp(-np.abs(x[:, None] - x)), np.arange(30)
        return jackknife(lambda j: [mean_likeness(likeness, units, j)], [units], 15)
    result = np.stack([one(i) for i in range(REPEATS)])
    assert 0.75 < half_width(result)[0] / (2.145 * result[:, 0, 0].std(ddof=1)) < 1.4


def test_more_of_the_same_population_is_at_the_floor():
    rng = np.random.default_rng(1)
    real, fake, units = rng.normal(size=(300, 5)), rng.normal(size=(50, 5)), np.arange(300)
    sizes = reference_sizes(units, 50)
    statistic = lambda x: lambda i, j: distribution_measures(real=real[j], fake=x[i])
    floor = split_floor(statistic(real), units, sizes, splits=40)
    _, reference = disjoint_halves(units, sizes, rng)
    result = np.array(distribution_measures(real=real[reference], fake=fake))
    apart = np.abs(result - floor.mean(0)) / floor.std(0)
    assert (apart < 4).all()
    moved = np.array(distribution_measures(real=real[reference], fake=fake + 1))
    assert moved[0] > floor[:, 0].max() and moved[1] > floor[:, 1].max()


def test_copies_show_and_do_not_depend_on_the_unit():
    rng = np.random.default_rng(2)
    training, held = rng.normal(size=(10, 8)), rng.normal(size=(200, 8))
    mixed = rng.normal(size=(50, 8))
    mixed[:20] = training[rng.integers(10, size=20)] + rng.normal(scale=1e-3, size=(20, 8))
    near, far = nearest_training(mixed, training)[0], nearest_training(held, training)[0]
    nearer, copies = copying_measures(real=far, fake=near)
    assert copies >= 0.4 and 0.55 < nearer < 0.85
    assert copying_measures(real=7 * far, fake=7 * near) == [nearer, copies]


def test_ms_ssim_is_the_same_in_blocks(monkeypatch):
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (7, 48, 40), dtype=np.uint8))
    whole, apart = ms_ssim(images), ms_ssim(images[:3], images)
    monkeypatch.setattr(generation, "_BLOCK", 2 * images[0].numel())
    np.testing.assert_allclose(ms_ssim(images), whole, atol=1e-5)
    np.testing.assert_allclose(ms_ssim(images[:3], images), apart, atol=1e-5)
    np.testing.assert_allclose(whole, whole.T)


def test_ms_ssim_of_opposites_and_of_tiny_images():
    ramp = torch.arange(64, dtype=torch.uint8).repeat(64, 1) * 4
    assert ms_ssim(torch.stack([ramp, 255 - ramp]))[0, 1] == 0
    with pytest.raises(ValueError, match="images of 10 pixels"): ms_ssim(torch.zeros(2, 10, 10, dtype=torch.uint8))
    with pytest.raises(ValueError, match="all of one size"): ms_ssim(torch.zeros(2, 32, 32))


@pytest.mark.parametrize("function", [precision_recall_density_coverage, distribution_measures, copying_measures, gap_scores])
def test_a_real_and_a_generated_set_are_told_apart_by_name(function):
    "Exchanged by place they would give a number as well."
    sets = [p for p in inspect.signature(function).parameters.values() if p.name in ("real", "fake")]
    assert [p.name for p in sets] == ["real", "fake"] and all(p.kind is p.KEYWORD_ONLY for p in sets)
    with pytest.raises(TypeError): function(np.zeros((9, 2)), np.zeros((9, 2)))


def test_exchanged_sets_are_another_answer():
    rng = np.random.default_rng(0)
    dull, real = rng.normal(0, 0.1, (60, 3)), rng.normal(size=(60, 3))
    one, other = (dict(zip(MEASURES, distribution_measures(real=a, fake=b))) for a, b in ((real, dull), (dull, real)))
    assert one["precision"] == pytest.approx(other["recall"]) and one["precision"] > 0.9 > 0.3 > one["recall"]
