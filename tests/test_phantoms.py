"Phantoms: what is drawn is what is said, on the side it is said of, and more of it where it is said to be larger."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_nb.anatomy import Finding, Scene, draw_body, draw_exposure
from cxr_nb.cohorts import CHEXPERT_LABELS, LABEL_POLICIES, single_label, with_splits
from cxr_nb.few_shot import few_shot_candidates
from cxr_nb.folders import read_folder
from cxr_nb.impressions import impression_section
from cxr_nb.reports import report_texts, text_evaluation_set, wording
from cxr_nb.film import mark
from cxr_nb.findings import DEVICES, attenuation
from cxr_nb.phantom_reports import PHRASES, report
from cxr_nb.phantoms import FREQUENCY, LABELS, draw_findings, radiograph, write_phantom_reports, write_phantoms

MIDLINE = ("Cardiomegaly", "Edema", "Enlarged Cardiomediastinum")  # findings without a side

RNG = np.random.default_rng(8)
BODY = draw_body(RNG)
POSE = replace(draw_exposure(RNG, "PA"), zoom=1.0, turn=0.0, tilt=0.0, shift=(0.0, 0.0), borders=(0.0,) * 4)


def difference(*findings, size=128):
    "What findings change along the rays, and the scene without them."
    plain = Scene(BODY, POSE, [], size)
    return attenuation(Scene(BODY, POSE, findings, size)) - attenuation(plain), plain


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    return folder, write_phantoms(folder, 60, seed=4, size=64)


@pytest.mark.parametrize("name", [*FREQUENCY, "granuloma"])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_finding_is_on_its_side(name, side):
    change, scene = difference(Finding(name, side, 0.6, "mid", seed=3))
    same_side, other = (np.abs(change[scene.side == s]).sum() for s in (side, -side))
    assert same_side > 0
    if name not in (*MIDLINE, "granuloma"): assert same_side > 4 * other


@pytest.mark.parametrize("name", ["Pleural Effusion", "Lung Opacity", "Consolidation", "Edema", "Lung Lesion", "Cardiomegaly", "Enlarged Cardiomediastinum", "Pleural Other"])
def test_larger_takes_more_of_the_rays(name):
    amounts = [difference(Finding(name, 1, s, "mid", seed=3))[0].sum() for s in (0.2, 0.5, 0.8)]
    assert 0 < amounts[0] < amounts[1] < amounts[2]


def test_pneumothorax_is_air():
    change, scene = difference(Finding("Pneumothorax", -1, 0.7, seed=1))
    assert change[(scene.side == -1) & (scene.edge > 0.5) & (scene.edge < 2) & (scene.depth > 0.3) & (scene.depth < 0.6)].mean() < -0.1


def test_the_meniscus_climbs_at_the_wall_and_hides_the_angle():
    change, scene = difference(Finding("Pleural Effusion", 1, 0.35), size=256)
    wet = (change > 0.5 * change.max()) & (scene.side == 1)
    level = {zone: scene.y[wet & zone_mask].min() for zone, zone_mask in
             {"wall": (scene.edge > 0.4) & (scene.edge < 1.2), "middle": (scene.edge > 4) & (scene.edge < 5)}.items()}
    assert level["wall"] < level["middle"] - 0.5  # y runs down
    angle = (scene.side == 1) & (scene.edge > 0.3) & (scene.edge < 1.5) & (scene.above > 0) & (scene.above < 1.5)
    assert (change[angle] > 0.2).mean() > 0.9


def test_devices_are_dense_and_ap_magnifies_the_heart():
    for kind in DEVICES: assert difference(Finding("Support Devices", 1, kind=kind))[0].max() > 0.2, kind
    assert Scene(BODY, replace(POSE, view="AP"), [], 64).heart.sum() > Scene(BODY, POSE, [], 64).heart.sum()


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_any_size_is_the_same_chest(size):
    quiet = replace(POSE, noise=0.0)
    pixels, reference = radiograph(BODY, quiet, size=size), radiograph(BODY, quiet, size=128)
    assert pixels.shape == (size, size) and pixels.dtype == np.uint8
    reduced = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BOX), float)
    expected = np.asarray(Image.fromarray(reference).resize((64, 64), Image.Resampling.BOX), float)
    assert np.corrcoef(reduced.ravel(), expected.ravel())[0, 1] > 0.97


def test_reports_state_what_was_drawn_and_deny_nothing_of_it():
    rng = np.random.default_rng(0)
    for _ in range(300):
        exposure = draw_exposure(rng)
        findings = draw_findings(rng, exposure.view)
        text, stated = report(findings, exposure, rng)
        drawn = {f.name for f in findings if f.name in PHRASES}
        assert {name for name, value in stated.items() if value} - {"No Finding"} == drawn
        assert all(stated[f.name] == (-1 if f.doubt else 1) for f in findings if f.name in PHRASES)
        assert ("No Finding" in stated) == (not drawn - {"Support Devices"}) and set(stated) <= set(CHEXPERT_LABELS)
        impression = impression_section(text)
        assert impression and "{" not in text and "  " not in text
        for f in findings:
            if f.name == "Pleural Effusion" and len({g.side for g in findings if g.name == f.name}) == 1:
                assert {-1: "right", 1: "left"}[f.side] in impression


def test_the_cohort_is_read_like_any_other_folder(cohort):
    folder, table = cohort
    read = read_folder(folder, "Phantoms")
    assert len(read) == len(table) and read.patient_id.nunique() == 60 and read.study_id.is_unique
    for label in set(CHEXPERT_LABELS) & set(table):
        np.testing.assert_array_equal(read.set_index("image_id")[label], table.set_index("study_id")[label].loc[read.image_id])
    texts = report_texts(read, {"Phantoms": folder})
    assert texts.str.contains("IMPRESSION:").all()
    rows = few_shot_candidates(with_splits(read), {"Phantoms": folder}, n=1)
    truth = json.loads((folder / "truth.json").read_text())
    for row in rows[rows.chosen == 1].itertuples():
        names = {f["name"] for f in truth[row.study_id]["findings"]} & set(FREQUENCY)
        assert names == ({"Pleural Effusion"} if row.concept == "pleural effusion" else set())


def test_a_patient_keeps_the_body_and_is_the_same_alone_or_among_others(cohort, tmp_path):
    folder, table = cohort
    assert table.groupby("patient_id")[["sex", "age"]].nunique().max().max() == 1
    alone = write_phantoms(tmp_path, 2, seed=4, size=64, first=31)
    for row in alone.itertuples():
        assert (tmp_path / "images" / row.image).read_bytes() == (folder / "images" / row.image).read_bytes()
        assert (tmp_path / row.report_path).read_text() == (folder / row.report_path).read_text()


def test_burnt_in_text_lies_in_its_boxes_and_nowhere_else():
    rng, texts = np.random.default_rng(2), 0
    for _ in range(30):
        exposure = replace(draw_exposure(rng), borders=(0.0,) * 4)
        film = np.full((128, 128), 0.3, np.float32)
        pixels, boxes = mark(film, exposure)
        changed = pixels != int(255 * 0.3)
        inside = np.zeros_like(changed)
        for left, top, right, bottom in boxes:
            box = (slice(max(0, top), bottom), slice(max(0, left), right))
            assert changed[box].any()
            inside[box] = True
            texts += 1
        assert not (changed & ~inside).any()
    assert texts > 25


@pytest.mark.parametrize("seed", [0, 1])
def test_reports_alone_make_the_whole_evaluation_set(tmp_path, seed):
    "The paper's protocol: 50 reports of each of 14 classes, one class each, no impression twice, whatever the policy."
    write_phantom_reports(tmp_path, 100, seed)
    assert set(LABELS) == set(CHEXPERT_LABELS)
    read = read_folder(tmp_path, "Alone")
    assert (read.image_path == "").all() and read.patient_id.is_unique
    impressions = report_texts(read, {"Alone": tmp_path}).map(impression_section)
    chosen = {policy: text_evaluation_set(read, impressions, policy, 50, 50)[0] for policy in list(LABEL_POLICIES)[:3]}
    for rows in chosen.values():
        assert rows.label.value_counts().to_dict() == dict.fromkeys(CHEXPERT_LABELS, 50)
        assert not wording(impressions.set_axis(read.study_id)[rows.study_id]).duplicated().any()
    pd.testing.assert_frame_equal(*list(chosen.values())[:2])


def test_a_report_alone_speaks_of_its_label_and_of_no_other(tmp_path):
    write_phantom_reports(tmp_path, 30)
    read = read_folder(tmp_path, "Alone")
    texts = report_texts(read, {"Alone": tmp_path}).str.lower()
    labels = single_label(read, "uncertain_positive_missing_negative")
    words = {"Pneumothorax": "pneumothorax", "Fracture": "fracture", "Edema": "edema", "Pneumonia": "pneumonia", "Cardiomegaly": "cardiomegaly"}
    for label, word in words.items():
        affirmed = texts.str.replace(rf"[^.]*\b(?:no|not|without)\b[^.]*\.", "", regex=True)  # denials aside
        assert affirmed[labels == label].str.contains(f"{word}|enlarge").all() and not affirmed[labels != label].str.contains(word).any()
    assert not texts.str.contains("possible|questionable|cannot be excluded").any()
