"Every data set as a cohort: against torchxrayvision's readers, in any order of files, by patient, and with bad input refused."
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.csv
import pytest
import yaml
import torch
import torchxrayvision as xrv
import trees
from conftest import ROOT
from PIL import Image

from cxr_nb import commits, core, profiles, tables
from cxr_nb.captions import sample_captions
from cxr_nb.chexpert import read_chexpert
from cxr_nb.cohort_images import CohortImages, image_paths
from cxr_nb.cohorts import CHEXPERT_LABELS, COHORT_COLUMNS, SPLITS, read_cohort, sample_frontal, with_splits
from cxr_nb.few_shot import few_shot_candidates, read_few_shot_choice
from cxr_nb.folders import read_folder
from cxr_nb.images import inverted_images
from cxr_nb.impressions import impression_section
from cxr_nb.mimic_cxr import read_mimic_cxr
from cxr_nb.nih import read_nih
from cxr_nb.openi import openi_cohort, read_openi, read_reference_labels
from cxr_nb.phantoms import write_phantoms
from cxr_nb.reports import report_texts
from cxr_nb.sources import places_of_others, portable_place, read_sources

SHAPES = ["CheXpert-v1.0-small", "CheXpert-v1.0", "batches"]
XRV_NAMES = {"Effusion": "Pleural Effusion"}
OPENI_IDS = [image for images in read_openi().images[:40] for image in images]


def quietly(read, *args):
    with warnings.catch_warnings(action="ignore"): return read(*args)


def xrv_labels(dataset):
    return pd.DataFrame(dataset.labels, columns=[XRV_NAMES.get(p, p) for p in dataset.pathologies])


def all_cohorts(base, order=1):
    "A cohort of each data set, its trees made in one order of files and rows or the other."
    mimic = trees.mimic(base / "mimic", order=order)
    read = {
        "chexpert": lambda: read_chexpert(trees.chexpert(base / "chexpert", order=order)),
        "mimic": lambda: read_mimic_cxr(mimic, trees.mimic_reports(base / "reports", mimic)),
        "nih": lambda: read_nih(trees.nih(base / "nih", order=order)),
        "openi": lambda: openi_cohort(read_openi(), trees.openi(base / "openi", OPENI_IDS, order)),
        "plain": lambda: read_folder(trees.plain(base / "plain", order=order), "Mine"),
    }
    return {name: quietly(make) for name, make in read.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory): return tmp_path_factory.mktemp("trees")


@pytest.fixture(scope="module")
def cohorts(base): return all_cohorts(base)


ROOTS = {"CheXpert": "chexpert", "MIMIC-CXR": "mimic", "NIH ChestX-ray14": "nih", "Open-i": "openi", "Mine": "plain"}


# ---- what is read

@pytest.mark.parametrize("shape", SHAPES)
def test_chexpert_in_its_three_shapes(tmp_path, shape):
    root = trees.chexpert(tmp_path, shape)
    cohort = read_chexpert(root)
    table = pd.concat([pd.read_csv(p) for p in root.rglob("*.csv")])
    assert len(cohort) == len(table) == 132 and list(cohort) == COHORT_COLUMNS
    assert all((root / path).is_file() for path in cohort.image_path)
    keys = table.Path.str.split("/").str[2:].str.join("_").str.removesuffix(".jpg")
    expected = table.set_index(keys)[CHEXPERT_LABELS].astype(float).loc[cohort.image_id]
    np.testing.assert_array_equal(cohort[CHEXPERT_LABELS], expected)
    assert cohort["view"].value_counts().to_dict() == {"lateral": 66, "PA": 34, "AP": 32}
    assert set(cohort.official_split) == {"train", "valid"} and cohort.sex.isin(["M", "F"]).all() and cohort.age.between(18, 90).all()
    direct = {"CheXpert-v1.0-small": root / shape, "CheXpert-v1.0": root / shape}.get(shape, root)
    assert read_chexpert(direct).drop(columns="image_path").equals(cohort.drop(columns="image_path"))


def test_chexpert_against_torchxrayvision_on_the_real_table(tmp_path):
    "223,414 rows that torchxrayvision packs: views counted as published, labels as its own reader has them."
    packed = Path(xrv.datasets.datapath) / "chexpert_train.csv.gz"
    (tmp_path / "train").mkdir()
    (tmp_path / "train.csv").write_bytes(gzip.decompress(packed.read_bytes()))
    cohort = read_chexpert(tmp_path)
    assert cohort["view"].value_counts()[["AP", "PA", "lateral"]].tolist() == [161590, 29420, 32387] and len(cohort) == 223414
    theirs = xrv.datasets.CheX_Dataset(str(tmp_path), str(tmp_path / "train.csv"), views=["*"], unique_patients=False)
    ids = theirs.csv.Path.str.split("/").str[2:].str.join("_").str.removesuffix(".jpg")
    ours = cohort.set_index("image_id").loc[ids]
    labels = xrv_labels(theirs)
    # theirs makes -1 unknown and every finding of a normal image negative; ours keeps the table's values
    made_negative = (ours["No Finding"] == 1).to_numpy()[:, None] & (labels.columns != "Support Devices")
    np.testing.assert_array_equal(ours[labels.columns].replace(-1, np.nan).mask(made_negative, 0), labels)
    assert ours.patient_id.str.removeprefix("patient").tolist() == theirs.csv.patientid.tolist()


def test_mimic_against_torchxrayvision(cohorts, base, tmp_path):
    root = trees.mimic(tmp_path, packed=False)
    theirs = xrv.datasets.MIMIC_Dataset(str(root / "files"), str(root / "mimic-cxr-2.0.0-chexpert.csv"), str(root / "mimic-cxr-2.0.0-metadata.csv"), views=["*"], unique_patients=False)
    ours = quietly(read_mimic_cxr, root).set_index("image_id").loc[theirs.csv.dicom_id]
    labels = xrv_labels(theirs)
    made_negative = (ours["No Finding"] == 1).to_numpy()[:, None] & np.ones(len(labels.columns), bool)
    np.testing.assert_array_equal(ours[labels.columns].replace(-1, np.nan).mask(made_negative, 0), labels)
    for i in (0, 5): assert (root / ours.image_path.iloc[i]).read_bytes() == Path(theirs.imgpath, *ours.image_path.iloc[i].split("/")[1:]).read_bytes()
    packed = cohorts["mimic"].drop(columns="report_path")
    assert packed.equals(quietly(read_mimic_cxr, root).drop(columns="report_path")), "packed and unpacked tables are one"
    assert packed["view"].value_counts().to_dict() == {"PA": 40, "lateral": 40, "AP": 26, "": 12}
    assert set(packed.official_split) == {"train", "test"}


def test_nih_against_torchxrayvision(cohorts, base):
    root = base / "nih"
    theirs = xrv.datasets.NIH_Dataset(str(root), str(root / "Data_Entry_2017_v2020.csv"), views=["PA", "AP"], unique_patients=False)
    ours = cohorts["nih"].set_index("image_id").loc[theirs.csv["Image Index"].str.removesuffix(".png")]
    theirs_labels = pd.DataFrame(theirs.labels, columns=theirs.pathologies)
    for name, label in {"Atelectasis": "Atelectasis", "Effusion": "Pleural Effusion", "Infiltration": "Lung Opacity", "Pleural_Thickening": "Pleural Other"}.items():
        assert ours[label].tolist() == theirs_labels[name].tolist()
    assert ours["Lung Lesion"].tolist() == theirs_labels[["Mass", "Nodule"]].max(axis=1).tolist()
    assert (ours.other_findings == "Hernia").tolist() == (theirs_labels.Hernia == 1).tolist()
    assert ours.age.tolist() == theirs.csv.age_years.tolist() and (ours.sex == "M").tolist() == theirs.csv.sex_male.tolist()
    assert ours[["Fracture", "Support Devices"]].isna().all(axis=None)
    assert set(ours.official_split) == {"train_val", "test"} and all((root / p).is_file() for p in ours.image_path)


def test_nih_of_2017_and_in_one_folder(tmp_path):
    root = trees.nih(tmp_path, shape="flat", table="Data_Entry_2017.csv")
    table = root / "Data_Entry_2017.csv"
    table.write_text(table.read_text().replace("Patient Sex", "Patient Gender").replace(",20,", ",020Y,"))
    cohort = read_nih(root)
    assert cohort.image_path.str.match(r"images/\d{8}_\d{3}\.png").all() and cohort.age.notna().all() and set(cohort.sex) == {"M", "F"}


def test_openi_images_against_torchxrayvision(cohorts):
    theirs = xrv.datasets.Openi_Dataset(".", views=["*"], unique_patients=False).csv.set_index("imageid")
    ours = cohorts["openi"].set_index("image_id")
    assert sorted(ours.index) == sorted(OPENI_IDS) and (theirs.uid.loc[ours.index] == ours.study_id).all()
    views = theirs["View Position"].loc[ours.index]
    for view in ("AP", "PA"): assert ours["view"][views == view].isin([view, ""]).all()
    contradicted = views.isin(["AP", "PA"]) & (theirs["tsne-view"].loc[ours.index] == "L")
    assert contradicted.any() and (ours["view"][contradicted] == "").all()


def test_reports_of_every_source(cohorts, base, tmp_path):
    mimic = cohorts["mimic"]
    places = {"MIMIC-CXR": base / "reports"}
    texts = report_texts(mimic, places)
    assert all(f"Study {study}." in text for study, text in zip(mimic.study_id, texts))
    for around in ("", "mimic-cxr-reports/"):
        archive = trees.mimic_reports(tmp_path / f"zip{len(around)}", base / "mimic", as_zip=True, around=around)
        assert report_texts(mimic, {"MIMIC-CXR": archive}).equals(texts)
    plain = read_folder(trees.plain(tmp_path / "plain", reports=True), "Mine")
    both = pd.concat([plain.tail(3), mimic.head(2)], ignore_index=True)
    result = report_texts(both, places | {"Mine": tmp_path / "plain"})
    assert result.tolist()[:3] == [f"IMPRESSION: image {i}.png." for i in plain.tail(3).image_id] and result.tolist()[3:] == texts.head(2).tolist()


# ---- order, seeds, patients

def test_cohorts_are_the_same_bytes_whatever_the_order_of_files(cohorts, tmp_path, monkeypatch):
    glob, rglob = Path.glob, Path.rglob
    monkeypatch.setattr(Path, "glob", lambda self, *a: iter(sorted(glob(self, *a), reverse=True)))
    monkeypatch.setattr(Path, "rglob", lambda self, *a: iter(sorted(rglob(self, *a), reverse=True)))
    for name, other in all_cohorts(tmp_path, order=-1).items():
        one = with_splits(cohorts[name], 3)
        two = with_splits(other, 3)
        assert one.to_csv().encode() == two.to_csv().encode(), name
        assert sample_frontal(one, 8, 3).to_csv() == sample_frontal(two, 8, 3).to_csv() != sample_frontal(two, 8, 4).to_csv()


def test_a_cohort_survives_its_file(cohorts, tmp_path):
    for name, cohort in cohorts.items():
        cohort.to_csv(tmp_path / name, index=False)
        pd.testing.assert_frame_equal(read_cohort(tmp_path / name), cohort, check_dtype=False)


def test_no_patient_crosses_a_split(cohorts):
    for cohort in [*cohorts.values(), read_nih()]:
        split = with_splits(cohort, 7)
        of_patient = {}
        for patient, name in zip(split.patient_id, split.split): of_patient.setdefault(patient, set()).add(name)
        assert all(len(names) == 1 for names in of_patient.values()) and set(split.split) <= set(SPLITS)
        assert len(of_patient) < len(split), "only patients with several images can cross"
    assert set(split.split) == set(SPLITS)


def test_same_patient_number_in_two_sources_is_two_people():
    rows = pd.DataFrame({"source": ["A", "B"] * 500, "patient_id": [str(i // 2) for i in range(1000)]})
    split = with_splits(rows)
    assert (split.split[::2].to_numpy() != split.split[1::2].to_numpy()).mean() > 0.2


def test_sample_is_a_fair_draw():
    cohort = read_nih().head(400)
    times = sum(cohort.image_id.isin(sample_frontal(cohort, 100, seed).image_id).astype(int) for seed in range(200))
    assert times.mean() == 50 and times.std() == pytest.approx((200 * 0.25 * 0.75) ** 0.5, rel=0.15)


# ---- images

def test_images_through_torchxrayvisions_contract(cohorts, base):
    roots = {source: base / folder for source, folder in ROOTS.items()}
    mixed = pd.concat([c.head(3) for c in cohorts.values()], ignore_index=True)
    dataset = CohortImages(mixed, roots, size=None)
    for i in range(len(mixed)):
        pixels = np.asarray(Image.open(roots[mixed.source[i]] / mixed.image_path[i]))
        np.testing.assert_allclose(dataset[i]["img"], xrv.datasets.normalize(pixels, 255, reshape=True), atol=1e-3)
    xrv.datasets.relabel_dataset(["Pneumonia", "Effusion", "Hernia"], dataset, silent=True)
    assert dataset.labels.shape == (15, 3) and np.isnan(dataset.labels[:, 2]).all()


def one_label_each(folder):
    "A data set of 14 images, the first with the first label alone positive, the second with the second, and so on."
    table = pd.DataFrame(np.eye(14, dtype=int), columns=CHEXPERT_LABELS).assign(patient_id=range(14), view=["PA", "AP"] * 7)
    table["image"] = [f"{i:02}.png" for i in range(14)]
    for i in range(14): trees.picture(folder / f"{i:02}.png", i)
    table.to_csv(folder / "t.csv", index=False)
    return CohortImages(read_folder(folder, "Mine"), {"Mine": folder}, size=32)


def test_no_label_that_torchxrayvision_has_is_lost_in_its_names(tmp_path):
    dataset = one_label_each(tmp_path)
    xrv.datasets.relabel_dataset(xrv.datasets.default_pathologies, dataset, silent=True)
    kept = {name: np.flatnonzero(column == 1).tolist() for name, column in zip(dataset.pathologies, dataset.labels.T)}
    right = {name: [i] for i, name in enumerate(CHEXPERT_LABELS) if name in xrv.datasets.default_pathologies}
    right |= {"Effusion": [CHEXPERT_LABELS.index("Pleural Effusion")], "Pleural_Thickening": [CHEXPERT_LABELS.index("Pleural Other")]}
    assert len(right) == 12 and kept == {name: right.get(name, []) for name in xrv.datasets.default_pathologies}
    assert dataset.totals() == {name: {0.0: 13, 1.0: 1} if name in right else {} for name in xrv.datasets.default_pathologies}


def test_labels_are_those_of_torchxrayvisions_own_reader(cohorts, base):
    folder = base / "chexpert/CheXpert-v1.0-small"
    theirs = xrv.datasets.CheX_Dataset(str(folder), str(folder / "train.csv"), views=["*"], unique_patients=False)
    ours = CohortImages(cohorts["chexpert"].query("official_split == 'train'"), {"CheXpert": base / "chexpert"}, size=None)
    for dataset in (theirs, ours): xrv.datasets.relabel_dataset(xrv.datasets.default_pathologies, dataset, silent=True)
    ids = theirs.csv.Path.str.split("/").str[2:].str.join("_").str.removesuffix(".jpg")
    at = ours.csv.reset_index().set_index("image_id")["index"][ids].to_numpy()
    drawn = [p for p in xrv.datasets.default_pathologies if p != "Pleural_Thickening"]  # which its reader leaves out
    # it makes every finding of a normal image negative; ours keeps what the table says
    rows = (ours.csv["No Finding"].iloc[at] != 1).to_numpy()
    columns = [theirs.pathologies.index(p) for p in drawn]
    np.testing.assert_array_equal(ours.labels[at][rows][:, columns], theirs.labels[rows][:, columns])
    assert (ours.labels[:, ours.pathologies.index("Effusion")] == 1).sum() > 10
    merged = xrv.datasets.MergeDataset([ours, theirs])
    assert merged.totals()["Effusion"][1.0] == ours.totals()["Effusion"][1.0] + theirs.totals()["Effusion"][1.0]
    both = merged[int(at[0])], merged[len(ours)]
    assert [item["source"] for item in both] == [0, 1]
    np.testing.assert_allclose(both[0]["img"], both[1]["img"], atol=1e-3)


def test_torchxrayvisions_tools_take_a_cohort(tmp_path):
    dataset, others = one_label_each(tmp_path), one_label_each(tmp_path)
    at = CHEXPERT_LABELS.index("Edema")
    assert str(dataset) == "CohortImages num_samples=14 views=['*'] data_aug=None"
    filtered, subset = xrv.datasets.FilterDataset(dataset, ["Edema"]), xrv.datasets.SubsetDataset(dataset, [5, at])
    assert filtered.csv.image_id.tolist() == [f"{at:02}"] and filtered.totals()["Edema"] == {1.0: 1}
    assert filtered[0]["lab"].tolist() == subset[1]["lab"].tolist() == np.eye(14)[at].tolist()
    assert "CohortImages num_samples=14" in str(subset) and subset.totals()["Edema"] == {0.0: 1, 1.0: 1}
    target = np.arange(14) % 2
    shifted = xrv.datasets.CovariateDataset(dataset, target, others, target, ratio=0.5)
    assert len(shifted) > 0 and shifted[0]["img"].shape == (1, 32, 32)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=14)))
    assert batch["img"].shape == (14, 1, 32, 32) and (batch["lab"].numpy() == np.eye(14)).all()
    dataset.check_paths_exist()
    (tmp_path / "05.png").unlink()
    with pytest.raises(FileNotFoundError, match="cohort row 5: .*05.png: no such image file"): dataset.check_paths_exist()


def test_views_and_transforms_as_in_torchxrayvision(tmp_path):
    dataset = one_label_each(tmp_path)
    dataset.transform = lambda image: image[:, ::2, ::2]
    dataset.data_aug = lambda image: image + 1
    plain = one_label_each(tmp_path)
    np.testing.assert_array_equal(dataset[4]["img"], plain[4]["img"][:, ::2, ::2] + 1)
    dataset.limit_to_selected_views("AP")
    assert len(dataset) == 7 and dataset.csv.image_id.tolist() == [f"{i:02}" for i in range(1, 14, 2)]
    assert (dataset.labels == np.eye(14)[1::2]).all() and str(dataset).startswith("CohortImages num_samples=7 views=['AP']")
    np.testing.assert_array_equal(dataset[2]["img"], plain[5]["img"][:, ::2, ::2] + 1)


def test_few_shot_images_are_sole_findings_of_training_patients(cohorts, base):
    roots = {source: base / folder for source, folder in ROOTS.items()}
    for name in ("chexpert", "nih"):
        cohort = with_splits(cohorts[name], 0)
        rows = few_shot_candidates(cohort, roots, 2, 0)
        assert rows.groupby("concept").chosen.sum().to_dict() == {"no finding": 2, "pleural effusion": 2}
        for concept, label in (("no finding", "No Finding"), ("pleural effusion", "Pleural Effusion")):
            raw = rows[rows.concept == concept]
            assert (raw[label] == 1).all() and (raw[CHEXPERT_LABELS].isin([1, -1]).sum(axis=1) == 1).all()
        assert (rows.split == "train").all() and rows["view"].isin(["AP", "PA"]).all() and (rows.other_findings == "").all()
        assert not rows.patient_id[rows.concept == "no finding"].duplicated().any()


@pytest.mark.parametrize("change, message", [
    (lambda t: t.assign(concept="edema"), r"row 2 \(.*\): its concept is none of no finding, pleural effusion"),
    (lambda t: t.assign(image_id=["nobody", *t.image_id[1:]]), r"row 2 \(nobody\): no such image in CheXpert"),
    (lambda t: t.assign(chosen="yes"), "chosen is neither 1 nor 0"),
    (lambda t: t.assign(chosen=0), "no image is chosen for 'no finding'"),
    (lambda t: t.assign(concept="no finding"), "not labelled No Finding"),
    (lambda t: t.drop(columns="chosen"), "column 'chosen' is missing"),
    (lambda t: pd.concat([t, t.head(1)]), "repeats row 2"),
])
def test_a_choice_that_does_not_fit_is_refused(cohorts, base, tmp_path, change, message):
    cohort = with_splits(cohorts["chexpert"], 0)
    proposed = few_shot_candidates(cohort, {"CheXpert": base / "chexpert"}, 2, 0)
    change(proposed).to_csv(tmp_path / "choice.csv", index=False)
    with pytest.raises(ValueError, match="choice.csv: .*" + message) as caught: read_few_shot_choice(tmp_path / "choice.csv", cohort, {"CheXpert": base / "chexpert"})
    assert "\n" not in str(caught.value)


CHOICE = "concept,image_id,chosen,overrules\n"


@pytest.fixture
def few(tmp_path):
    "Six patients, all of them in training but the last: two normals, two effusions, one of them cropped and with a device, a lateral and a held-out one."
    rows = ["a.png,p1,PA,1,,", "b.png,p2,AP,1,,", "c.png,p3,PA,,1,", "d.png,p4,PA,,1,1", "e.png,p5,lateral,,1,", "f.png,p6,PA,,1,", "g.png,p1,PA,,1,"]
    (tmp_path / "t.csv").write_text("image,patient_id,view,No Finding,Pleural Effusion,Support Devices\n" + "\n".join(rows))
    for i, name in enumerate("abcdefg"): trees.picture(tmp_path / f"{name}.png", i)
    pixels = np.asarray(Image.open(tmp_path / "d.png")).copy()
    pixels[:20] = 0
    Image.fromarray(pixels).save(tmp_path / "d.png")
    cohort = read_folder(tmp_path, "Few")
    return cohort.assign(split=np.where(cohort.image_id == "f", "test", "train"))


def chosen(few, tmp_path, rows):
    (tmp_path / "choice").write_text(CHOICE + rows)
    return read_few_shot_choice(tmp_path / "choice", few, {"Few": tmp_path})


def test_a_choice_is_taken_where_nothing_could_be_proposed(few, tmp_path):
    with pytest.raises(ValueError, match="few-shot images: 2 of 2 for 'no finding' pass, 5 are needed: of 7 images of Few 6 are frontal, 5 of these in the training split, "
                       "4 with one per patient, 2 of these have No Finding as sole finding and 2 are not cropped"): few_shot_candidates(few, {"Few": tmp_path}, 5)
    taken = chosen(few, tmp_path, "no finding,a,1,\nno finding,b,0,\npleural effusion,c,1,\npleural effusion,d,1,\n")
    assert taken.image_id.tolist() == ["a", "c", "d"] and taken.chosen.eq(1).all() and taken.excluded.tolist()[:2] == ["", ""] and taken.excluded[2].startswith("cropped: ")
    assert list(taken) == ["concept", "chosen", "excluded", *COHORT_COLUMNS]


@pytest.mark.parametrize("rows, message", [
    ("pleural effusion,e,1,", r"row 3 .e.: not a frontal image"),
    ("pleural effusion,f,1,", "f is of a patient in the test split; choose from train"),
    ("pleural effusion,g,1,", "patient p1 is chosen twice; one image per patient"),
    ("pleural effusion,b,1,", "row 3 .b.: not labelled Pleural Effusion; put 1 in a column 'overrules'"),
    ("pleural effusion,b,1,0", "row 3 .b.: not labelled Pleural Effusion; put 1 in a column 'overrules'"),
    ("pleural effusion,c,1,yes", "row 3 .c.: overrules is none of 1, 0, blank"),
    ("pleural effusion,f,1,1", "f is of a patient in the test split"), ("pleural effusion,e,1,1", "not a frontal image"),
    ("pleural effusion,h,1,", "row 3 .h.: no such image in Few"),
])
def test_what_matters_in_a_choice_is_checked(few, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message): chosen(few, tmp_path, "no finding,a,1,\n" + rows)


def test_a_person_overrules_a_label_knowingly(few, tmp_path):
    assert chosen(few, tmp_path, "no finding,a,1,\npleural effusion,b,1,1\n").concept.tolist() == ["no finding", "pleural effusion"]


def test_a_chosen_image_is_there_and_whole(few, tmp_path):
    rows = "no finding,a,1,\npleural effusion,c,1,\n"
    cut(tmp_path / "c.png")
    with pytest.raises(ValueError, match="choice: row 3: .*c.png: is broken or truncated"): chosen(few, tmp_path, rows)
    (tmp_path / "c.png").unlink()
    with pytest.raises(FileNotFoundError, match="choice: row 3: .*c.png: no such image file"): chosen(few, tmp_path, rows)


# ---- bad input

def replaced(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def chexpert_table(root): return root / "CheXpert-v1.0-small/train.csv"


BAD_CHEXPERT = {
    "missing column": (lambda p: replaced(p, ",AP/PA", ",View"), "train.csv: column 'AP/PA' is missing; it has Path"),
    "bad label": (lambda p: replaced(p, ",1.0", ",0.5"), r"train.csv: row \d+, column '.*': label '0.5' is none of 1, 0, -1, blank"),
    "word for a label": (lambda p: replaced(p, ",1.0", ",yes"), r"row \d+, column '.*': label 'yes' is none of"),
    "age": (lambda p: p.write_text(pd.read_csv(p, dtype=str, keep_default_na=False).assign(Age="old").to_csv(index=False)), r"row 2, column 'Age': 'old' is not a number of at least 0"),
    "odd view": (lambda p: replaced(p, ",Frontal,PA", ",frontal,PA"), r"row 2, column 'Frontal/Lateral': 'frontal' is none of Frontal, Lateral"),
    "odd projection": (lambda p: replaced(p, ",Frontal,PA", ",Frontal,ap"), r"row 2, column 'AP/PA': 'ap' is none of AP, PA, LL, RL"),
    "duplicate row": (lambda p: p.write_text(p.read_text() + p.read_text().splitlines()[1] + "\n"), "train.csv: row 122 repeats row 2 .* with the same values"),
    "same image, other labels": (lambda p: p.write_text(p.read_text() + p.read_text().splitlines()[1].rsplit(",", 1)[0] + ",-1.0\n"), "row 122 repeats row 2 .* with another Support Devices"),
    "leaves the folder": (lambda p: replaced(p, "CheXpert-v1.0-small/train/patient00001", "CheXpert-v1.0-small/../patient00001"), r"row 2: path '.*' leads out of"),
    "another layout": (lambda p: replaced(p, "/study1/", "/exam1/"), r"row 2: path '.*' is not like CheXpert-v1.0/train/patient00001/study1"),
    "empty": (lambda p: p.write_text(""), "train.csv: not a readable CSV file"),
    "header alone": (lambda p: p.write_text(p.read_text().splitlines()[0] + "\n"), "train.csv: has a header and no rows"),
    "binary": (lambda p: p.write_bytes(b"\x89PNG\xff\xfe\x00"), "train.csv: "),
    "a field too many": (lambda p: replaced(p, "patient00001/study1/view2", "patient00001,study1/view2"), "train.csv: not a readable CSV file .*Row #3: Expected 19 columns, got 20"),
    "a field too few": (lambda p: replaced(p, ",Frontal,", ","), "Row #2: Expected 19 columns, got 18"),
    "a column twice": (lambda p: replaced(p, ",Fracture,", ",Edema,"), "train.csv: column 'Edema' is there twice"),
    "valid repeats train": (lambda p: shutil.copy(p, p.with_name("valid.csv")), "train.csv and valid.csv both have patient00001"),
}


@pytest.mark.parametrize("case", BAD_CHEXPERT)
def test_bad_chexpert_is_refused_in_one_line(tmp_path, case):
    spoil, message = BAD_CHEXPERT[case]
    spoil(chexpert_table(trees.chexpert(tmp_path)))
    with pytest.raises(ValueError, match=message) as caught: read_chexpert(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_batch_that_was_not_unpacked_is_named(tmp_path):
    root = trees.chexpert(tmp_path, "batches")
    shutil.rmtree(root / trees.BATCHES[2])
    with pytest.raises(ValueError, match=r"train.csv: row \d+: patient00001 is in none of the batches; unpack all four"): read_chexpert(root)


def metadata(root): return root / "mimic-cxr-2.0.0-metadata.csv"


BAD_MIMIC = {
    "no view column": (lambda r: replaced(metadata(r), "ViewPosition", "View"), "metadata.csv: column 'ViewPosition' is missing"),
    "duplicate image": (lambda r: metadata(r).write_text(metadata(r).read_text() + metadata(r).read_text().splitlines()[3] + "\n"), "metadata.csv: row 120 repeats row 4"),
    "two versions of a table": (lambda r: (trees.gzipped(metadata(r)), replaced(metadata(r), ",PA,", ",AP,")), "metadata.csv and mimic-cxr-2.0.0-metadata.csv.gz disagree from row 2 on; keep the one"),
    "a shorter version": (lambda r: (trees.gzipped(metadata(r)), metadata(r).write_text("\n".join(metadata(r).read_text().splitlines()[:9]))), "disagree from row 10 on"),
    "cut gzip": (lambda r: (trees.gzipped(metadata(r)), metadata(r).unlink(), cut(r / "mimic-cxr-2.0.0-metadata.csv.gz")), "metadata.csv.gz: not a readable CSV file"),
    "blank id": (lambda r: replaced(metadata(r), "00000000,10000032,", "00000000,,"), "metadata.csv: row 2, column 'subject_id': '' is not an id"),
    "id that is a path": (lambda r: replaced(metadata(r), "0000abcd-", "../0000abcd-"), "metadata.csv: row 2, column 'dicom_id': '../0000abcd.* is not an id"),
    "bad label": (lambda r: replaced(r / "mimic-cxr-2.0.0-chexpert.csv", ",1.0", ",2.0"), r"chexpert.csv: row \d+, column '.*': label '2.0' is none"),
    "study twice": (lambda r: replaced(r / "mimic-cxr-2.0.0-chexpert.csv", ",50000001,", ",50000000,"), "chexpert.csv: row 3 repeats row 2 .study_id 50000000."),
    "study of two patients": (lambda r: replaced(r / "mimic-cxr-2.0.0-chexpert.csv", "10000032,50000000", "10000033,50000000"), "metadata.csv: row 2: study 50000000 is of patient 10000032 here and of 10000033"),
    "other release": (lambda r: (r / "mimic-cxr-2.0.0-chexpert.csv").write_text((r / "mimic-cxr-2.0.0-chexpert.csv").read_text().replace(",500", ",700")), "none of its studies is in the label table"),
}


def cut(path): path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("case", BAD_MIMIC)
def test_bad_mimic_is_refused_in_one_line(tmp_path, case):
    spoil, message = BAD_MIMIC[case]
    spoil(trees.mimic(tmp_path, packed=False))
    with pytest.raises(ValueError, match=message) as caught: quietly(read_mimic_cxr, tmp_path)
    assert "\n" not in str(caught.value)


def test_equal_tables_packed_and_unpacked_are_one(tmp_path):
    trees.gzipped(metadata(trees.mimic(tmp_path, packed=False)))
    assert len(quietly(read_mimic_cxr, tmp_path)) == 118


def test_labelers_that_disagree_and_studies_without_labels_are_reported(tmp_path):
    root = trees.mimic(tmp_path, packed=False)
    path = root / "mimic-cxr-2.0.0-chexpert.csv"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if ",50000000," not in line) + "\n")
    with pytest.warns(UserWarning) as warned: cohort = read_mimic_cxr(root)
    texts = [str(w.message) for w in warned]
    assert texts[0] == "MIMIC-CXR: 2 of 118 images left out, their study has no labels; the first is study s50000000"
    assert "negbio.csv has other labels for 1 of 39 studies; the CheXpert labeler's are used; the first is s50000020, Edema" in texts[1]
    assert "s50000000" not in set(cohort.study_id)


def test_a_study_without_report_is_named(cohorts, base, tmp_path):
    reports = tmp_path / "reports"
    shutil.copytree(base / "reports", reports)
    rows = cohorts["mimic"]
    gone = rows.report_path[2]
    (reports / "mimic-cxr-reports" / gone).unlink()
    with pytest.raises(ValueError, match=rf"cohort row \d+: no MIMIC-CXR report '{gone}'"): report_texts(rows, {"MIMIC-CXR": reports})
    (reports / "mimic-cxr-reports" / gone).write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8 text"): report_texts(rows, {"MIMIC-CXR": reports})
    with pytest.raises(FileNotFoundError, match="MIMIC-CXR's reports: .* is not the data set .* looked for a whole zip file of reports"): report_texts(rows, {"MIMIC-CXR": tmp_path})
    with pytest.raises(ValueError, match="cohort row 0: MIMIC-CXR names no report"): report_texts(rows.assign(report_path=""), {"MIMIC-CXR": reports})


@pytest.mark.parametrize("read", [read_chexpert, read_mimic_cxr, read_nih, lambda p: openi_cohort(read_openi(), p), lambda p: read_folder(p, "Mine"), sample_captions])
@pytest.mark.parametrize("place", ["empty", "none", "other"])
def test_a_folder_that_is_not_the_data_set_says_what_was_looked_for(tmp_path, read, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=f"{place}.* is not the data set .*looked for ") as caught: read(tmp_path / place)
    assert "\n" not in str(caught.value)


def test_missing_and_unknown_images_of_nih_are_reported(tmp_path):
    root = trees.nih(tmp_path)
    next(root.rglob("00000002_000.png")).unlink()
    trees.picture(root / "images_001/images/extra.png")
    with pytest.warns(UserWarning) as warned: cohort = read_nih(root)
    assert len(cohort) == 47 and "00000002_000" not in set(cohort.image_id)
    assert "47 of the 48 images" in str(warned[0].message) and "00000002_000.png" in str(warned[0].message) and "extra.png" in str(warned[1].message)
    trees.picture(root / "images_002/images/extra.png")
    with pytest.raises(ValueError, match="extra.png is there twice"): read_nih(root)


BAD_PLAIN = {
    "no patients": (lambda p: replaced(p, "patient_id", "person"), "column 'patient_id' is missing"),
    "blank patient": (lambda p: replaced(p, ",p0,", ",,"), "row 2: patient_id is blank; splits are by patient"),
    "no view": (lambda p: replaced(p, ",view,", ",projection,"), "column 'view' is missing"),
    "odd view": (lambda p: replaced(p, ",PA,", ",front,"), "row 3: view 'front' is none of AP, PA, lateral, blank"),
    "odd finding": (lambda p: replaced(p, "Effusion", "Efusion"), "row 3: finding 'Efusion' is none of"),
    "no labels": (lambda p: replaced(p, "finding_labels", "notes"), "column 'finding_labels' is missing; it has image, .*; needed are image, patient_id, view and finding_labels, or a column for each label"),
    "twice": (lambda p: replaced(p, "001.png", "000.png"), "row 3 repeats row 2"),
    "leaves": (lambda p: replaced(p, "001.png", "../001.png"), "row 3: path '../001.png' leads out"),
    "blank image": (lambda p: replaced(p, "001.png", ""), "row 3: image is blank"),
    "two images of one name": (lambda p: replaced(p, "001.png", "000.jpg"), "row 3 repeats row 2 .image_id 000. with another image"),
    "two kinds of labels": (lambda p: replaced(p, ",age", ",Edema"), "has finding_labels and column 'Edema'; keep one kind"),
    "semicolons": (lambda p: p.write_text(p.read_text().replace("finding_labels", "Edema").replace(",", ";")), "labels.csv: its columns are separated by semicolons; separate columns by commas"),
    "two tables": (lambda p: p.with_name("b.csv").write_text("image"), "holds 2 CSV files, b.csv and labels.csv among them"),
}


@pytest.mark.parametrize("case", BAD_PLAIN)
def test_bad_plain_folders_are_refused_in_one_line(tmp_path, case):
    spoil, message = BAD_PLAIN[case]
    spoil(trees.plain(tmp_path) / "labels.csv")
    with pytest.raises(ValueError, match=message) as caught: read_folder(tmp_path, "Mine")
    assert "\n" not in str(caught.value)


def all_tables(base):
    "Every kind of CSV a person can give: its name, the file, and what reads it."
    cohort = with_splits(read_folder(trees.plain(base / "plain"), "Mine"))
    mimic, nih = trees.mimic(base / "mimic", packed=False), trees.nih(base / "nih")
    cohort.to_csv(base / "cohort.csv", index=False)
    (base / "choice.csv").write_text("concept,image_id,chosen\nno finding,000,1\n")
    (base / "plus.csv").write_text("path_to_image,report\ntrain/patient00001/study1/view1_frontal.jpg,IMPRESSION: Edema.\n")
    (base / "negbio.csv").write_text("filename,Effusion\nCXR1,1\n")
    chexpert = read_chexpert(trees.chexpert(base / "chexpert"), base / "plus.csv").head(1)
    return {
        "chexpert": (chexpert_table(base / "chexpert"), lambda: read_chexpert(base / "chexpert")),
        "mimic": (metadata(mimic), lambda: read_mimic_cxr(mimic)), "nih": (nih / "Data_Entry_2017_v2020.csv", lambda: read_nih(nih)),
        "plain": (base / "plain/labels.csv", lambda: read_folder(base / "plain", "Mine")), "cohort": (base / "cohort.csv", lambda: read_cohort(base / "cohort.csv")),
        "choice": (base / "choice.csv", lambda: read_few_shot_choice(base / "choice.csv", cohort, {})),
        "plus": (base / "plus.csv", lambda: report_texts(chexpert, {"CheXpert": base / "plus.csv"})), "negbio": (base / "negbio.csv", lambda: read_reference_labels(base / "negbio.csv")),
    }


SAVED_OTHERWISE = {
    "semicolons": (lambda t: t.replace(",", ";").encode(), "its columns are separated by semicolons; separate columns by commas"),
    "tabs": (lambda t: t.replace(",", "\t").encode("utf-8-sig"), "its columns are separated by tabs; separate columns by commas"),
    "bars": (lambda t: t.replace(",", "|").replace("\n", "\r\n").encode(), "its columns are separated by vertical bars; separate columns by commas"),
    "utf-16": (lambda t: t.encode("utf-16"), "is UTF-16; save it as UTF-8"), "utf-16-be": (lambda t: b"\xfe\xff" + t.encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
    "utf-16 without a mark": (lambda t: t.encode("utf-16-le"), "is UTF-16 or binary; save it as UTF-8"), "utf-32": (lambda t: t.encode("utf-32"), "is UTF-32; save it as UTF-8"),
}


def test_tables_saved_otherwise_are_refused_wherever_one_is_read(tmp_path):
    for name, (path, read) in all_tables(tmp_path).items():
        text = path.read_text()
        for case, (encode, message) in SAVED_OTHERWISE.items():
            path.write_bytes(encode(text))
            with pytest.raises(ValueError, match=f"{path.name}: .*{message}") as caught: quietly(read)
            assert "\n" not in str(caught.value), (name, case)
        path.write_bytes(text.encode("utf-8-sig"))
        if name not in ("choice", "cohort"): quietly(read)
        path.write_text(text)


def test_a_column_that_is_no_utf8_is_reported(tmp_path):
    path = trees.plain(tmp_path) / "labels.csv"
    path.write_bytes(path.read_text().replace("p0", "caf\u00e9").encode("latin-1"))
    with pytest.raises(ValueError, match="labels.csv: is not UTF-8 text; save it as UTF-8"): read_folder(tmp_path, "Mine")


def test_no_message_names_nothing(tmp_path):
    path = trees.plain(tmp_path) / "labels.csv"
    none = read_folder(tmp_path, "Mine").head(0)
    with pytest.raises(ValueError, match="3 of 0 frontal images of an empty cohort asked for; give images"): sample_frontal(none, 3)
    with pytest.raises(ValueError, match="of 0 images of an empty cohort 0 are frontal"): few_shot_candidates(none, {}, 3)
    path.write_text(",\n1,2\n")
    with pytest.raises(ValueError, match="it has no named column"): read_folder(tmp_path, "Mine")


def test_the_same_patient_with_a_stray_blank_is_the_same(tmp_path):
    path = trees.plain(tmp_path) / "labels.csv"
    replaced(path, ",p0,", ",p0 ,")
    assert set(read_folder(tmp_path, "Mine").patient_id) == {f"p{i}" for i in range(12)}


def test_dots_in_names_belong_to_the_id_and_clutter_is_passed_over(tmp_path):
    (tmp_path / "images").mkdir()
    names = [f"1.2.840.{i}" for i in range(6)]
    for i, name in enumerate(names): trees.picture(tmp_path / f"{name}.png", i)
    (tmp_path / "T.CSV").write_text("image,patient_id,view,Edema\n" + "".join(f"{name}.png,p,PA,1\n" for name in names))
    (tmp_path / "._T.CSV").write_text("clutter")
    cohort = read_folder(tmp_path, "Mine")
    assert cohort.image_id.tolist() == names and all((tmp_path / path).is_file() for path in cohort.image_path)


@pytest.mark.parametrize("encode", [lambda s: s.replace("\n", "\r\n").encode(), lambda s: s.encode("utf-8-sig")])
def test_reports_of_any_system_keep_their_impression(tmp_path, encode):
    trees.plain(tmp_path, n=2, reports=True)
    for path in tmp_path.glob("*.txt"): path.write_bytes(encode("IMPRESSION\n\nMild edema.\n"))
    texts = report_texts(read_folder(tmp_path, "Mine"), {"Mine": tmp_path})
    assert texts.map(impression_section).tolist() == ["Mild edema."] * 2


def test_chexpert_tables_and_images_need_not_lie_together(tmp_path):
    root = trees.chexpert(tmp_path)
    expected = read_chexpert(root)
    for name in ("train.csv", "valid.csv"): shutil.move(root / "CheXpert-v1.0-small" / name, root / name)
    assert read_chexpert(root).equals(expected)
    with pytest.raises(FileNotFoundError, match="is not the data set .* and train/ or the batches"):
        read_chexpert(trees.chexpert(tmp_path / "b", "batches") / trees.BATCHES[0])


def test_a_patient_in_two_batches_is_named(tmp_path):
    root = trees.chexpert(tmp_path, "batches")
    shutil.copytree(root / trees.BATCHES[2] / "patient00001", root / trees.BATCHES[3] / "patient00001")
    with pytest.raises(ValueError, match="patient00001 is in 'CheXpert-v1.0 batch 3 .train 2./patient00001' and in"): read_chexpert(root)


@pytest.mark.parametrize("spoil, message", [
    (lambda p: p.write_bytes(p.read_bytes()[:-200]), "is not the data set .it is a file.; looked for a whole zip file"),
    (lambda p: p.write_bytes(p.read_bytes().replace(b"Study s50000000", b"Study s5000000X")), "cohort row 0: no MIMIC-CXR report .* .Bad CRC-32"),
])
def test_a_broken_zip_of_reports_is_reported(cohorts, base, tmp_path, spoil, message):
    archive = trees.mimic_reports(tmp_path, base / "mimic", as_zip=True)
    spoil(archive)
    with pytest.raises((ValueError, FileNotFoundError), match=message): report_texts(cohorts["mimic"], {"MIMIC-CXR": archive})


SAME_IMAGE = ["./000.png", ".//000.png", "x/../000.png", "images/000.png", "images//000.png", "images/../images/./000.png", "images\\000.png"]


@pytest.mark.parametrize("other", SAME_IMAGE)
def test_an_image_in_another_spelling_is_the_same_image(tmp_path, other):
    path = trees.plain(tmp_path) / "labels.csv"
    plain = read_folder(tmp_path, "Mine")
    text = path.read_text()
    path.write_text(text.replace("001.png", other))
    with pytest.raises(ValueError, match=r"labels.csv: row 3 repeats row 2 .(image 000.png|image_path images/000.png)."): read_folder(tmp_path, "Mine")
    path.write_text(text.replace("000.png", other))
    again = read_folder(tmp_path, "Mine")
    assert again.set_index("image_path").patient_id.to_dict() == plain.set_index("image_path").patient_id.to_dict()


@pytest.mark.parametrize("leads", ["../000.png", "x/../../000.png", "/000.png", "..\\000.png", "C:\\000.png", "./../000.png", "~/000.png"])
def test_a_path_that_leads_out_is_refused_in_every_spelling(tmp_path, leads):
    path = trees.plain(tmp_path) / "labels.csv"
    path.write_text(path.read_text().replace("001.png", leads))
    with pytest.raises(ValueError, match="row 3: path .* leads out of"): read_folder(tmp_path, "Mine")


def test_a_large_report_is_refused_before_it_is_read(cohorts, base, tmp_path):
    "600 MB of blanks: 0.6 MB in a zip file, a hole in a plain one."
    plain = read_folder(trees.plain(tmp_path / "plain", n=2, reports=True), "Mine")
    with open(tmp_path / "plain/000.txt", "wb") as file: file.truncate(600 * 10**6)
    mimic = cohorts["mimic"].head(1)
    with zipfile.ZipFile(tmp_path / "r.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open(mimic.report_path[0], "w") as file:
        for _ in range(600): file.write(b" " * 10**6)
    tracemalloc.start()
    for rows, places in ((plain.head(1), {"Mine": tmp_path / "plain"}), (mimic, {"MIMIC-CXR": tmp_path / "r.zip"})):
        with pytest.raises(ValueError, match=r"cohort row 0: .* report '.*' has 600.0 MB; a report has at most 1 MB"): report_texts(rows, places)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_reports_that_are_links_out_of_their_folder_are_refused(cohorts, base, tmp_path):
    plain = read_folder(trees.plain(tmp_path / "plain", n=2, reports=True), "Mine")
    secret, report, places = tmp_path / "secret.txt", tmp_path / "plain/000.txt", {"Mine": tmp_path / "plain"}
    secret.write_text("IMPRESSION: x")
    for target in (secret, "../secret.txt", "001.txt"):
        report.unlink()
        report.symlink_to(target)
        if target == "001.txt": assert report_texts(plain, places).tolist() == ["IMPRESSION: image 001.png."] * 2
        else:
            with pytest.raises(ValueError, match="report '000.txt' is a link that leads out of the folder"): report_texts(plain, places)
    report.unlink()
    os.mkfifo(report)
    with pytest.raises(ValueError, match="report '000.txt' is not a file"): report_texts(plain, places)
    (tmp_path / "linked").symlink_to(tmp_path / "plain")
    assert report_texts(plain.tail(1), {"Mine": tmp_path / "linked"}).tolist() == ["IMPRESSION: image 001.png."]
    shutil.copytree(base / "reports", tmp_path / "mimic")
    first = cohorts["mimic"].head(1)
    (tmp_path / "mimic/mimic-cxr-reports" / first.report_path[0]).unlink()
    (tmp_path / "mimic/mimic-cxr-reports" / first.report_path[0]).symlink_to(secret)
    with pytest.raises(ValueError, match="leads out of the folder"): report_texts(first, {"MIMIC-CXR": tmp_path / "mimic"})


def test_links_and_locked_reports_in_a_zip_are_refused(cohorts, tmp_path):
    first = cohorts["mimic"].head(1)
    link = zipfile.ZipInfo(first.report_path[0])
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive: archive.writestr(link, "/etc/hostname")
    with pytest.raises(ValueError, match="cohort row 0: .* is a link, not a report"): report_texts(first, {"MIMIC-CXR": tmp_path / "r.zip"})
    locked = bytearray((tmp_path / "r.zip").read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): locked[locked.index(mark) + at] |= 1
    locked[locked.index(b"PK\x01\x02") + 38 : locked.index(b"PK\x01\x02") + 42] = b"\0\0\xa4\x81"
    (tmp_path / "r.zip").write_bytes(locked)
    with pytest.raises(ValueError, match="cohort row 0: no MIMIC-CXR report .*encrypted"): report_texts(first, {"MIMIC-CXR": tmp_path / "r.zip"})


# ---- where the data lie

def test_results_that_were_moved_or_copied_read_their_own_images(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    trees.plain(first / "images/mine", n=2)
    far = trees.plain(tmp_path / "far", n=2)
    cohort = read_folder(first / "images/mine", "Mine")
    places = {"images": {"Mine": portable_place(first / "images/mine", first), "Far": portable_place(far, first)}, "reports": {"Mine": portable_place(first / "images/mine", first)}, "text_sets": {"Mine": ""}, "inverted": "keep"}
    assert places["images"] == {"Mine": "images/mine", "Far": str(far)}
    (first / "cohorts").mkdir()
    (first / "cohorts/sources.json").write_text(json.dumps(places))
    shutil.copytree(first, second)
    trees.picture(second / "images/mine/images/000.png", seed=99)
    theirs, ours = (CohortImages(cohort, read_sources(base / "cohorts/sources.json")["images"], size=None)[0]["img"] for base in (first, second))
    assert (theirs != ours).any() and (ours[0] == xrv.datasets.normalize(np.asarray(Image.open(second / "images/mine/images/000.png")), 255)).all()
    shutil.move(first, tmp_path / "third")
    moved = read_sources(tmp_path / "third/cohorts/sources.json")
    assert (CohortImages(cohort, moved["images"], size=None)[0]["img"] == theirs).all()
    assert moved["images"]["Far"] == far and moved["reports"]["Mine"] == tmp_path / "third/images/mine" and moved["text_sets"] == {"Mine": ""} and moved["inverted"] == "keep"


def test_places_of_the_project_are_named_from_it_on(tmp_path):
    assert portable_place(ROOT / "data/mine", tmp_path) == "project:data/mine"
    (tmp_path / "cohorts").mkdir()
    (tmp_path / "cohorts/sources.json").write_text(json.dumps({"images": {"Mine": "project:data/mine", "Old": "/data/old"}, "reports": {}, "text_sets": {}, "inverted": "refuse"}))
    assert read_sources(tmp_path / "cohorts/sources.json")["images"] == {"Mine": ROOT / "data/mine", "Old": Path("/data/old")}
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real/images/x").mkdir(parents=True)
    assert portable_place(tmp_path / "real/images/x", tmp_path / "link") == portable_place(tmp_path / "link/images/x", tmp_path / "real") == "images/x"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"images": 1, "reports": {}, "text_sets": {}}', '{"images": {"a": 1}, "reports": {}, "text_sets": {}, "inverted": "refuse"}', '{"images": {}, "reports": {}, "text_sets": {}}'])
def test_a_broken_list_of_places_is_reported(tmp_path, text):
    (tmp_path / "sources.json").write_text(text)
    with pytest.raises(ValueError, match="sources.json: does not say where the data lie .*; run 21_datasets again"): read_sources(tmp_path / "sources.json")


def test_every_notebook_reads_the_places_by_one_function():
    for path in (ROOT / "nbs").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            for line in cell["source"] if cell["cell_type"] == "code" and not path.stem.startswith(("16", "21")) else ():
                if "need(" in line and "sources.json" in line: assert 'read_sources(run.need("cohorts/sources.json"))' in line, path.name


# ---- captions

def test_captions_come_from_all_parts_without_nulls(tmp_path):
    drawn, counts = sample_captions(trees.laion(tmp_path), 300, seed=2)
    assert counts == {"rows": 1200, "null": 3, "not UTF-8": 0, "blank": 0}
    assert drawn.part.value_counts().between(70, 130).all() and drawn.caption.str.match(r"a photo \d \d+$").all()
    assert (drawn.caption == [f"a photo {int(p[5:10])} {r}" for p, r in zip(drawn.part, drawn.row)]).all()
    assert sample_captions(tmp_path, 60, seed=2)[0].equals(drawn.head(60))


@pytest.mark.parametrize("spoil, message", [
    (lambda p: p.write_bytes(p.read_bytes()[:2000]), "part-00001.*: not a whole parquet file"),
    (lambda p: p.write_bytes(b""), "part-00001.*: not a whole parquet file"),
    (lambda p: pd.DataFrame({"URL": ["u"]}).to_parquet(p), "part-00001.*: no column TEXT or caption; it has URL"),
    (lambda p: pd.DataFrame({"TEXT": [1, 2]}).to_parquet(p), "part-00001.*: column 'TEXT' holds int64, not text"),
])
def test_bad_captions_are_refused_in_one_line(tmp_path, spoil, message):
    spoil(sorted(trees.laion(tmp_path).glob("*"))[1])
    with pytest.raises(ValueError, match=message) as caught: sample_captions(tmp_path, 100)
    assert "\n" not in str(caught.value)


# ---- size

MEASURE = "import resource, sys; {work}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"


def peak_mb(work):
    done = subprocess.run([sys.executable, "-c", MEASURE.format(work=work)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def write_csv(table, path): pyarrow.csv.write_csv(pyarrow.Table.from_pandas(table, preserve_index=False), path)


def test_mimic_at_its_real_size_fits_in_2_gb(tmp_path):
    rng = np.random.default_rng(0)
    studies = np.sort(rng.choice(np.arange(50_000_000, 60_000_000), 227_835, replace=False))
    of = np.sort(np.concatenate([np.arange(227_835), rng.integers(0, 227_835, 377_110 - 227_835)]))
    patients = 10_000_032 + 17 * np.sort(rng.integers(0, 65_379, 227_835))
    views = rng.choice(["AP", "PA", "LATERAL", "LL", ""], 377_110, p=[0.39, 0.255, 0.22, 0.095, 0.04])
    dicom = [f"{a:08x}-{b:08x}-{c:08x}-{d:08x}-{e:08x}" for a, b, c, d, e in rng.integers(0, 2**32, (377_110, 5))]
    write_csv(pd.DataFrame({"dicom_id": dicom, "subject_id": patients[of], "study_id": studies[of], "ViewPosition": views}), tmp_path / "mimic-cxr-2.0.0-metadata.csv")
    labels = pd.DataFrame(rng.choice(["1.0", "0.0", "-1.0", ""], (227_827, 14), p=[0.15, 0.15, 0.05, 0.65]), columns=CHEXPERT_LABELS)
    labels.insert(0, "study_id", studies[:-8])
    labels.insert(0, "subject_id", patients[:-8])
    write_csv(labels, tmp_path / "mimic-cxr-2.0.0-chexpert.csv")
    work = f"from cxr_nb.cohorts import *; from cxr_nb.mimic_cxr import *; c = with_splits(read_mimic_cxr({str(tmp_path)!r})); assert 377_000 < len(c) < 377_110; sample_frontal(c); c.to_csv({str(tmp_path / 'c.csv')!r})"
    assert peak_mb(work) < 2000


def test_memory_for_captions_does_not_grow_with_the_parts(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(words) for words in rng.choice(["a", "photo", "of", "lung", "xray"], (50_000, 12))]
    for folder, times in (("one", 1), ("many", 40)):
        (tmp_path / folder).mkdir()
        pd.DataFrame({"TEXT": texts * times}).to_parquet(tmp_path / folder / "p.parquet", row_group_size=10**9)
    few, many = (peak_mb(f"from cxr_nb.captions import sample_captions; sample_captions({str(tmp_path / folder)!r}, 20_000)") for folder in ("one", "many"))
    assert many - few < 150, "2 million captions are 100 MB of text, and more as strings"


def dicom(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + bytes(200))


def only_dicom(folder):
    for i in range(3): dicom(folder / f"study{i}/IM{i:04}")


def mimic_of_dicom(folder, tables):
    "MIMIC-CXR as it was before its conversion, with the converted release's tables beside it or not."
    root = trees.mimic(folder)
    for path in root.rglob("*.jpg"): dicom(path.with_suffix(".dcm")); path.unlink()
    if not tables:
        for path in root.glob("*.csv.gz"): path.unlink()
    return root


@pytest.mark.parametrize("make, read, message", [
    (only_dicom, lambda root: read_folder(root, "Mine"), "looked for a CSV file in it; study0/IM0000 is a DICOM file, which is not read; convert it to 8-bit PNG"),
    (only_dicom, read_nih, "looked for PNG or JPEG images in it or up to three levels below; study0/IM0000 is a DICOM file, which is not read"),
    (only_dicom, lambda root: openi_cohort(read_openi(), root), "study0/IM0000 is a DICOM file; the collection is also available as PNG"),
    (only_dicom, read_chexpert, "study0/IM0000 is a DICOM file, which is not read; convert"),
    (lambda folder: mimic_of_dicom(folder, False), read_mimic_cxr, r"files/p10/.*\.dcm is a DICOM file of MIMIC-CXR; MIMIC-CXR-JPG is that release converted"),
    (lambda folder: mimic_of_dicom(folder, True), read_mimic_cxr, r"files/p10/.*\.dcm is a DICOM file of MIMIC-CXR; MIMIC-CXR-JPG is that release converted"),
])
def test_dicom_where_images_are_expected_says_how_to_convert_it(tmp_path, make, read, message):
    make(tmp_path)
    with pytest.raises(FileNotFoundError, match=message) as caught: quietly(read, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_dicom_file_in_a_table_is_a_row_that_cannot_be_used(tmp_path):
    dicom(tmp_path / "a.dcm")
    (tmp_path / "t.csv").write_text("image,patient_id,view,Edema\na.dcm,p1,PA,1\n")
    cohort = read_folder(tmp_path, "Mine")
    with pytest.raises(ValueError, match="cohort row 0: .*a.dcm: is a DICOM file, which is not read; convert it"): CohortImages(cohort, {"Mine": tmp_path})[0]


def test_links_out_of_a_data_set_are_not_followed_and_its_own_folder_may_be_one(tmp_path):
    for name in ("real/a.png", "real/sub/b.png", "elsewhere/secret.png", "realer/c.png"): trees.picture(tmp_path / name)
    (tmp_path / "real/t.csv").write_text("image,patient_id,view,Edema\na.png,p1,PA,1\n")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    cohort = read_folder(tmp_path / "linked", "Mine")
    def paths(name, root="linked"): return image_paths(cohort.assign(image_path=name), {"Mine": tmp_path / root})
    links = {"in.png": "sub/b.png", "sub/up.png": "../a.png", "inner": "sub", "out.png": "../elsewhere/secret.png", "outer": "../elsewhere", "near": "../realer",
             "abs.png": tmp_path / "elsewhere/secret.png", "twice.png": "out.png", "broken.png": "../none.png"}
    for name, to in links.items(): (tmp_path / "real" / name).symlink_to(to)
    for root in ("real", "linked"):
        for name in ("a.png", "in.png", "sub/up.png", "inner/b.png"): assert paths(name, root) == [tmp_path / root / name]
        for name in ("out.png", "outer/secret.png", "near/c.png", "abs.png", "twice.png", "broken.png", "../elsewhere/secret.png", f"{tmp_path}/elsewhere/secret.png"):
            with pytest.raises(ValueError, match="leads out of Mine's folder .*; put the file itself there") as caught: paths(name, root)
            assert "\n" not in str(caught.value)
            with pytest.raises(ValueError, match="leads out of"): image_paths(cohort.assign(image_path=name, inverted="invert"), {"Mine": tmp_path / root})
            with pytest.raises(ValueError, match="leads out of"): CohortImages(cohort.assign(image_path=name), {"Mine": tmp_path / root})


# ---- the notebook

@pytest.fixture(scope="module")
def edited_choice(cohorts, base):
    "What the notebook will propose, edited: what was not chosen is, and the other way round."
    proposed = few_shot_candidates(with_splits(cohorts["chexpert"], 0), {"CheXpert": base / "chexpert"}, 2, 0)
    return proposed.assign(chosen=(proposed.excluded.eq("") & proposed.chosen.eq(0)).astype(int))


@pytest.fixture(scope="module")
def turned(base):
    "A plain data set of 24 frontal phantoms, the first three stored as negatives; their ids."
    names = write_phantoms(base / "turned", 12, seed=3).query("view != 'lateral'").image.iloc[:3]
    for name in names: Image.fromarray(255 - np.asarray(Image.open(base / "turned/images" / name).convert("L"))).save(base / "turned/images" / name)
    return set(names.str.removesuffix(".png"))


def without_tests(path):
    "Take a notebook's test cells out, which nbdev_test runs: what defines and what reports stays."
    notebook = json.loads(path.read_text())
    stays = ("#|", "import ", "from ", "profile: ", "made = ", "run = Run(", "def ")
    notebook["cells"] = [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).startswith(stays)]
    path.write_text(json.dumps(notebook))
    return ["".join(c["source"]) for c in notebook["cells"]]


@pytest.fixture(scope="module")
def project(tmp_path_factory, copy_project, base, turned, edited_choice):
    "A copy of the project with a profile that names a small tree of every data set."
    copy = copy_project(tmp_path_factory.mktemp("project"))
    without_tests(copy / "nbs/21_datasets.ipynb")
    (copy / "data").mkdir()
    for name in ("chexpert", "mimic", "nih", "openi", "reports"): (copy / "data" / name).symlink_to(base / name)
    (copy / "data/mine").symlink_to(base / "turned")
    trees.laion(copy / "data/laion")
    edited_choice.to_csv(copy / "mine.csv", index=False)
    values = {"chexpert": "data/chexpert", "mimic_cxr": "data/mimic", "mimic_cxr_reports": "data/reports", "openi_images": "data/openi", "nih": "data/nih",
              "folders": {"Mine": "data/mine"}, "laion_400m": "data/laion", "sample_size": 24, "inverted": "invert", "text_sources": {"Open-i": ""},
              "few_shot_source": "CheXpert", "few_shot": 2, "few_shot_choice": "mine.csv", "check_files": True}
    sections = {"base": "smoke", "shared": {"source": "CheXpert", "sources": ["CheXpert"]}, "21_datasets": values}
    (copy / "nbs/profiles/all.yaml").write_text(yaml.safe_dump(sections))
    return copy


@pytest.fixture(scope="module")
def ran(project, run_in):
    done = run_in(project, "snakemake", "--cores", 2, "outputs/all/records/21_datasets.json", "--config", "profile=all")
    assert done.returncode == 0, done.stderr[-3000:]
    return project / "outputs/all"


def test_the_notebook_writes_a_cohort_of_every_data_set(ran):
    record = json.loads((ran / "records/21_datasets.json").read_text())
    assert set(record["results"]["cohorts"]) == {"CheXpert", "MIMIC-CXR", "Open-i", "NIH ChestX-ray14", "Mine"}
    for name in ("chexpert", "mimic_cxr", "open_i", "nih_chestx_ray14", "mine"):
        cohort, sample = (read_cohort(ran / f"cohorts/{name}{kind}.csv") for kind in ("", "_sample"))
        assert cohort.groupby("patient_id").split.nunique().max() == 1
        assert len(sample) == 24 and sample["view"].isin(["AP", "PA"]).all() and set(sample.image_id) <= set(cohort.image_id)
        assert (ran / f"figures/cohort_sample_{name}.webp").stat().st_size > 3_000
    captions = pd.read_parquet(ran / "cohorts/captions.parquet")
    assert len(captions) == 100 and record["results"]["captions"]["null"] == 3
    table = pd.read_csv(ran / "tables/cohorts.csv")
    assert list(table)[:7] == tables.TABLE_COLUMNS and (table[["positive", "uncertain", "negative", "blank"]].sum(axis=1) == table.n).all()


def test_reports_are_shown_where_the_licence_lets_them(ran):
    shown = {p.stem for p in (ran / "figures").glob("cohort_reports_*.webp")}
    assert shown == {"cohort_reports_open_i", "cohort_reports_mine"}


def test_the_edited_choice_takes_the_place_of_the_proposal(ran, edited_choice):
    chosen = pd.read_csv(ran / "cohorts/few_shot.csv")
    assert sorted(chosen.image_id) == sorted(edited_choice.image_id[edited_choice.chosen == 1])
    shown = pd.read_csv(ran / "cohorts/few_shot_candidates.csv")
    assert shown.image_id.tolist() == chosen.image_id.tolist() and shown.chosen.eq(1).all()


def test_another_edit_of_the_choice_runs_it_again(ran, project, run_in):
    def would_run():
        done = run_in(project, "snakemake", "-n", "--cores", 2, "outputs/all/records/21_datasets.json", "--config", "profile=all")
        return "notebook_21_datasets" in done.stdout + done.stderr
    assert not would_run()
    choice = project / "mine.csv"
    choice.write_text(choice.read_text() + "\n")
    assert would_run()


@pytest.fixture
def reported(tmp_path, monkeypatch):
    "A function that runs what 21_datasets reports of one plain folder, here; where it stopped, its error and the files it wrote."
    shutil.copy(ROOT / "nbs/21_datasets.ipynb", tmp_path)
    monkeypatch.setenv("CXR_NB_OUTPUTS", str(tmp_path / "outputs"))

    def run(place, **values):
        values |= {"folders": {"Mine": str(place)}, "text_sources": {"Open-i": ""}, "few_shot_source": ""}
        names = {}
        with pytest.raises(ValueError) as caught:
            for cell in without_tests(tmp_path / "21_datasets.ipynb"):
                exec(cell, names)
                if cell.startswith("profile: "): names |= profiles.resolve_parameters("21_datasets", "smoke", values)
        return str(caught.value), {p.name for p in (tmp_path / "outputs").rglob("*") if p.is_file()}
    return run


def test_a_broken_image_stops_the_run_before_anything_is_written(reported, tmp_path):
    trees.plain(tmp_path / "spoilt")
    cut(tmp_path / "spoilt/images/001.png")
    line, written = reported(tmp_path / "spoilt", sample_size=18)
    assert line.startswith("Mine: 1 of 18 images cannot be used; row 0 of the sample: ") and "001.png: is broken or truncated" in line and "\n" not in line
    assert written == {"mine_problems.csv"}


def test_inverted_images_are_refused(reported, base, turned):
    line, written = reported(base / "turned", sample_size=24)
    assert line.startswith("Mine: 3 of 24 images look inverted") and "\n" not in line and written == {"cohort_inverted_mine.webp"}


def test_inverted_images_are_read_by_choice(ran, base, turned):
    sample = read_cohort(ran / "cohorts/mine_sample.csv")
    assert set(sample.image_id[sample.inverted == "invert"]) == turned and set(sample.inverted) == {"invert", ""}
    assert not any(inverted_images(image_paths(sample, {"Mine": base / "turned"})))
    record = json.loads((ran / "records/21_datasets.json").read_text())
    assert record["results"]["cohorts"]["Mine"]["inverted"] == 3 and (ran / "figures/cohort_inverted_mine.webp").exists()


def test_negatives_are_not_proposed_as_few_shot_images(base, turned):
    place = base / "turned"
    cohort = read_folder(place, "Mine").assign(split="train", **{label: np.nan for label in CHEXPERT_LABELS})
    cohort["No Finding"], cohort["Pleural Effusion"] = (np.where(cohort.index % 2 == odd, 1, np.nan) for odd in (0, 1))
    rows = few_shot_candidates(cohort.assign(other_findings="", patient_id=cohort.image_id), {"Mine": place}, 2)
    negative = rows.image_id.isin(turned)
    assert negative.any() and (rows.excluded.str.startswith("inverted") | rows.excluded.str.startswith("c"))[negative].all() and not rows.chosen[negative].any()
    assert not rows.excluded[~negative].str.startswith("inverted").any()


def test_data_of_others_stay_out_of_what_git_tracks(project, run_in, tmp_path):
    "A clone whose demo names patients under an agreement, reports and captions: one line, and a look at what git would track of the run."
    copy = shutil.copytree(project, tmp_path / "clone", symlinks=True, ignore=shutil.ignore_patterns("outputs", ".snakemake"))
    subprocess.run(["git", "init", "-q", copy], check=True)
    path = copy / "nbs/profiles/demo.yaml"
    values = {"chexpert": "data/chexpert", "text_sources": {"Open-i": "", "Mine": "data/mine"}, "laion_400m": "data/laion"}
    path.write_text(yaml.safe_dump({"21_datasets": values}))
    done = run_in(copy, "cxr_nb", "run", "21_datasets")
    tracked = subprocess.run(["git", "-C", copy, "status", "--porcelain", "--untracked-files=all", "outputs"], capture_output=True, text=True, check=True)
    assert done.returncode == 1 and tracked.stdout == ""
    named = re.search("ValueError: (.*): git tracks outputs/demo, and pictures, reports and paths of other people's data, which a data use", done.stderr)[1]
    assert sorted(named.split(", ")) == ["chexpert", "laion_400m", "text_sources"]
    # a run with other values than the demo's goes where git looks away
    place = core.run_folder("21_datasets", profiles.resolve_parameters("21_datasets", "demo", {"chexpert": "data/chexpert"}))
    assert not commits.git_would_track(place / "figures/a.png")


NO_PLACE = {"profile", "few_shot_source"}  # text that names no file


def test_every_parameter_that_names_a_place_is_asked_whose_it_is():
    declared = profiles.declared_parameters("21_datasets")
    defaults = {name: default for name, (_, default) in declared.items()}
    assert places_of_others(defaults) == [], "the demo shows nothing but the project's own"
    for name, (kind, _) in declared.items():
        if kind not in ("str", "dict[str, str]") or name in NO_PLACE: continue
        for place in ("/data/x", "../x"):
            given = place if kind == "str" else {"Mine": place}
            assert places_of_others(defaults | {name: given}) == [name]
    for place in ("images/mine", "images/phantoms/../../x", "data/mine", "imagesx/phantoms"): assert places_of_others(defaults | {"folders": {"Mine": place}}) == ["folders"]


def test_paths_of_a_cohort_do_not_name_this_machine(ran, project):
    for path in (ran / "cohorts").glob("*.csv"): assert str(project) not in path.read_text()
    with pytest.raises(ValueError, match="no folder for the images of source 'Mine'"): image_paths(read_cohort(ran / "cohorts/mine.csv"), {})
