"Ablations on small pipelines: what is trained and drawn once, where the scores come from, and what trainings differ in."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pipelines
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from sklearn.metrics import roc_auc_score

from cxr_nb import ablations
from cxr_nb.ablations import drawn_by, few_shot_draws, scores_by_k, scores_of
from cxr_nb.few_shot import CONCEPTS, few_shot_candidates
from cxr_nb.folders import read_folder
from cxr_nb.intervals import over_trainings
from cxr_nb.stable_diffusion import sample
from cxr_nb.training import TrainingSettings
from cxr_nb.unet_finetuning import Variant, finetuned, open_finetuned

PIXELS = pipelines.SIDE * pipelines.FACTOR
PROMPTS = {"no finding": "a lung", "pleural effusion": "a lung with water", "class": "lung"}
ASKED = {finding: PROMPTS[finding] for finding in CONCEPTS}
BOTH = Variant(tuple(CONCEPTS))
SETTINGS = TrainingSettings(4, batch_size=2, learning_rate=1e-2, seed=3, device="cpu")


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return {name: torch.randint(256, (n, 3, PIXELS, PIXELS), dtype=torch.uint8) for name, n in zip(CONCEPTS, (3, 2))}


@pytest.fixture(scope="module")
def models(folder, images, tmp_path_factory):
    "Two trainings that differ in their number of steps."
    place, steps = tmp_path_factory.mktemp("models"), (2, 6)
    for n in steps: finetuned(str(folder), BOTH, images, PROMPTS, replace(SETTINGS, steps=n), place / str(n), place / "work")
    return {n: place / str(n) for n in steps}


def test_images_are_those_of_the_model_and_are_drawn_once(folder, models, tmp_path, monkeypatch):
    drawing, drawn = {"steps": 2, "guidance_scale": 3.0, "size": PIXELS, "batch_size": 2}, []
    monkeypatch.setattr(ablations, "sample", lambda *a, **k: drawn.append(a[1]) or sample(*a, **k))
    def draw(state, **other): return drawn_by(state, str(folder), ASKED, [5, 6, 7], tmp_path, "cpu", "ddim", **(drawing | other))
    first = draw(models[6])
    pipeline = open_finetuned(models[6], str(folder), "cpu", "ddim")
    for finding, prompt in ASKED.items(): assert torch.equal(first[finding], sample(pipeline, prompt, [5, 6, 7], **drawing))
    assert all(torch.equal(first[f], x) for f, x in draw(models[6]).items()) and len(drawn) == 2
    for other in (draw(models[2]), draw(models[6], guidance_scale=1.0), draw(models[6], steps=3)):
        assert not torch.equal(other["no finding"], first["no finding"])
    assert len(drawn) == 8


class Brightness(torch.nn.Module):
    "A judge of one mind: the brighter, the surer of an effusion."
    def __init__(self, sign):
        super().__init__()
        self.classifier, self.op_threshs, self.sign = torch.nn.Linear(1, 1), None, sign

    def forward(self, x): return self.sign * x.mean((1, 2, 3))[:, None].expand(-1, 18) / 500


def test_scores_are_those_of_others_implementations():
    rng = np.random.default_rng(0)
    def noise(n, level): return torch.from_numpy(rng.integers(0, level, (n, 3, 16, 16))).to(torch.uint8)
    drawn = {"no finding": noise(12, 180), "pleural effusion": noise(12, 190)}
    targets = ["Effusion", *[""] * 17]
    judges = [SimpleNamespace(name=f"j{s}", model=Brightness(s), targets=targets, image_size=16) for s in (1, -1)]
    def four(x): return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3)), x[:, 0, 0, 0], x[:, 0, 1, 1]], 1)
    real = {f: (rng.normal(0.4, 0.1, (20, 4)), np.array([f"p{i // 2}" for i in range(20)])) for f in CONCEPTS}
    result = scores_of(drawn, judges, four, real, draws=100, blocks=5).set_index("column")
    level = [(x.float() / 255 * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).mean((1, 2)).numpy() for x in drawn.values()]
    auc = roc_auc_score(np.repeat([0, 1], 12), np.concatenate(level))
    assert result.measured["AUC, j1"] == pytest.approx(auc) and result.measured["AUC, j-1"] == pytest.approx(1 - auc)
    for finding, x in drawn.items():
        a, b = four(x.float() / 255).numpy().astype(float), real[finding][0]
        cov = [np.cov(y, rowvar=False) for y in (a, b)]
        by_hand = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov[0] + cov[1] - 2 * sqrtm(cov[0] @ cov[1]).real)
        assert result.measured[f"Fréchet distance, {finding}"] == pytest.approx(by_hand, rel=1e-6)
    assert (result.ci_low <= result.measured).all() and (result.measured <= result.ci_high).all()
    assert result.n.tolist() == [24, 24, 12, 12, 12, 12] and result.finding.tolist() == ["", "", *CONCEPTS, *CONCEPTS]


def test_the_interval_over_trainings_holds_as_often_as_it_says():
    rng, truth = np.random.default_rng(0), 0.6
    hits, between = [], []
    for _ in range(400):
        x = rng.normal(truth, np.hypot(0.1, 0.05), 4)
        result = over_trainings(pd.DataFrame({"measured": x, "ci_low": x - 1.96 * 0.05, "ci_high": x + 1.96 * 0.05}))
        hits.append(result["ci_low"] <= truth <= result["ci_high"])
        between.append(result["sd_between"] ** 2 - result["se_within"] ** 2)
    assert 0.93 < np.mean(hits) < 0.99, "now and then a single training's interval is the wider one"
    assert np.mean(between) == pytest.approx(0.1**2, rel=0.2), "what training adds beside the images"


def test_random_embeddings_score_chance_whatever_k():
    rng, labels = np.random.default_rng(0), np.repeat(list("abcd"), 50)
    x = torch.from_numpy(rng.normal(size=(200, 8))).float()
    result = scores_by_k({"random": lambda rows, columns: x[rows] @ x[columns].T}, labels, np.arange(200), [5, 50], draws=50)
    assert result.measured.to_numpy() == pytest.approx(100 * 49 / 199, abs=4) and result.n.tolist() == [200, 200]


def test_draws_do_not_depend_on_the_order_of_the_cohort(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20): Image.fromarray(rng.integers(40, 220, (64, 64), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    lines = [f"{i}.png,p{i},PA,{'1,' if i % 2 else ',1'}" for i in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["image,patient_id,view,No Finding,Pleural Effusion", *lines]))
    cohort = read_folder(tmp_path, "Toy")
    cohort["split"] = np.where(cohort.image_id.astype(int) < 4, "valid", "train")
    first = few_shot_candidates(cohort, {"Toy": tmp_path}, 2).query("chosen == 1").drop(columns=["chosen", "excluded"])
    draws, mixed = (few_shot_draws(rows, {"Toy": tmp_path}, first, 3) for rows in (cohort, cohort[::-1]))
    for a, b in zip(draws, mixed): pd.testing.assert_frame_equal(a, b)
    used = pd.concat([first, *draws])
    assert used.patient_id.is_unique and set(used.split) == {"train"} and len(used) == 16
    assert not set(first.patient_id) & set(pd.concat(draws).patient_id)
