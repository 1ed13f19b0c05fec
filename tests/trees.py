"Small data sets in the exact layout of the real ones, with images that can be opened and made-up tables and reports."
import gzip
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from cxr_nb.cohorts import CHEXPERT_LABELS

CHEXPERT_HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,"
    "Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
).split(",")
BATCHES = ["CheXpert-v1.0 batch 1 (validate & csv)", "CheXpert-v1.0 batch 2 (train 1)", "CheXpert-v1.0 batch 3 (train 2)", "CheXpert-v1.0 batch 4 (train 3)"]


def picture(path, seed=0, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(30, 225, (size, size)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def labels(rng, n, values=("1.0", "0.0", "-1.0", ""), alone=0):
    "Raw labels as text; every third row is normal, every third has an effusion alone. Or the first `alone` rows have one label each, all in turn, the rest about half."
    if alone: return pd.DataFrame([["1.0" if (i % 14 == j if i < alone else rng.random() < 0.5) else "" for j in range(14)] for i in range(n)], columns=CHEXPERT_LABELS)
    table = pd.DataFrame(rng.choice(values, (n, 14), p=[0.15, 0.15, 0.1, 0.6]), columns=CHEXPERT_LABELS)
    for label, start in (("No Finding", 0), ("Pleural Effusion", 1)):
        table.iloc[start::3] = ""
        table.loc[table.index[start::3], label] = "1.0"
    table.loc[table.index[2::3], "No Finding"] = ""
    return table


def chexpert(root, shape="CheXpert-v1.0-small", patients=30, order=1, name=True):
    "Both tables and all images; `order` -1 makes files and rows the other way round. Returns the folder to point at."
    rng, parts = np.random.default_rng(0), {}
    for split, numbers in (("train", range(1, patients + 1)), ("valid", range(64541, 64544))):
        paths = [(p, s, v) for p in numbers for s in (1, 2) for v in (1, 2)]
        table = labels(rng, len(paths)).assign(
            Path=[f"{'CheXpert-v1.0-small' if 'small' in shape else 'CheXpert-v1.0'}/{split}/patient{p:05}/study{s}/view{v}_{'frontal' if v == 1 else 'lateral'}.jpg" for p, s, v in paths],
            Sex=rng.choice(["Male", "Female"], len(paths)), Age=rng.integers(18, 91, len(paths)),
        )
        table["Frontal/Lateral"] = ["Frontal" if v == 1 else "Lateral" for _, _, v in paths]
        table["AP/PA"] = [("AP", "PA")[p % 2] if v == 1 else "" for p, _, v in paths]
        parts[split] = table[CHEXPERT_HEADER].iloc[::order]
    batches = shape == "batches"
    base = root / BATCHES[0] if batches else (root / shape if name else root)
    for split, table in parts.items():
        base.mkdir(parents=True, exist_ok=True)
        table.to_csv(base / f"{split}.csv", index=False)
        for i, path in enumerate(table.Path):
            _, _, patient, tail = path.split("/", 3)
            home = base / split / patient
            if batches: home = (root / BATCHES[0] / "valid" if split == "valid" else root / BATCHES[1 + int(patient[-5:]) % 3]) / patient
            picture(home / tail, int(patient[-5:]) * 10 + i % 4)
    return root


def mimic(root, patients=20, packed=True, order=1, tables=("metadata", "chexpert", "negbio", "split"), alone=0):
    "MIMIC-CXR-JPG with tables packed or not; its reports go to `reports` beside it. `alone`: studies of one label each, as `labels` has it."
    rng = np.random.default_rng(1)
    rows = [(10000032 + 7 * p, 50000000 + 10 * p + s, f"{p:02}{s}{v}abcd-00000000-00000000-00000000-00000000", view)
            for p in range(patients) for s in range(2) for v, view in enumerate(("PA", "LATERAL", "AP", "")[: 2 + p % 3])]
    metadata = pd.DataFrame(rows, columns=["subject_id", "study_id", "dicom_id", "ViewPosition"])[["dicom_id", "subject_id", "study_id", "ViewPosition"]]
    metadata.insert(3, "PerformedProcedureStepDescription", "CHEST (PA AND LAT)")
    metadata = metadata.assign(Rows=3056, Columns=2544, StudyDate=21800506, StudyTime=213014.531)
    studies = metadata[["subject_id", "study_id"]].drop_duplicates(ignore_index=True)
    chexpert_labels = pd.concat([studies, labels(rng, len(studies), alone=alone)], axis=1)
    negbio = chexpert_labels.copy()
    negbio.loc[4, "Edema"] = "0.0" if negbio.loc[4, "Edema"] != "0.0" else "1.0"
    split = metadata[["dicom_id", "study_id", "subject_id"]].assign(split=["test" if p % 5 == 0 else "train" for p in metadata.subject_id])
    root.mkdir(parents=True, exist_ok=True)
    for name, table in {"metadata": metadata, "chexpert": chexpert_labels, "negbio": negbio, "split": split}.items():
        if name in tables: table.iloc[::order].to_csv(root / f"mimic-cxr-2.0.0-{name}.csv{'.gz' * packed}", index=False)
    for i, row in list(enumerate(metadata.itertuples()))[::order]:
        picture(root / f"files/p{str(row.subject_id)[:2]}/p{row.subject_id}/s{row.study_id}/{row.dicom_id}.jpg", i)
    return root


def mimic_reports(root, mimic_root, as_zip=False, around="mimic-cxr-reports/"):
    "A report for each study of a MIMIC tree, in a folder or in the zip file."
    texts = {f"{path.parent.parent.relative_to(mimic_root).as_posix()}/{path.parent.name}.txt": f"FINAL REPORT\n FINDINGS: seen.\n IMPRESSION:\n Study {path.parent.name}.\n"
             for path in sorted(mimic_root.glob("files/*/*/*/*.jpg"))}
    root.mkdir(parents=True, exist_ok=True)
    if as_zip:
        with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w") as archive:
            for name, text in texts.items(): archive.writestr(around + name, text)
        return root / "mimic-cxr-reports.zip"
    for name, text in texts.items():
        (root / around / name).parent.mkdir(parents=True, exist_ok=True)
        (root / around / name).write_text(text)
    return root


NIH_LISTS = ["No Finding", "Effusion", "Effusion|Hernia", "Mass|Nodule", "Infiltration|Pneumonia", "Pleural_Thickening"]


def nih(root, patients=24, shape="twelve", order=1, table="Data_Entry_2017_v2020.csv"):
    "Images in images/ or in images_001/images/ …, with a table of its own and the official lists."
    rows = [(f"{p:08}_{f:03}.png", NIH_LISTS[(p + f) % len(NIH_LISTS)], f, p, 20 + p, "MF"[p % 2], ("PA", "AP")[f], 2500, 2048, 0.168, 0.168) for p in range(1, patients + 1) for f in (0, 1)]
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    root.mkdir(parents=True, exist_ok=True)
    (root / table).write_text("\n".join([header, *(",".join(map(str, row)) for row in rows[::order])]) + "\n")
    for i, row in list(enumerate(rows))[::order]:
        folder = f"images_{i % 12 + 1:03}/images" if shape == "twelve" else "images"
        picture(root / folder / row[0], i)
    (root / "train_val_list.txt").write_text("\n".join(row[0] for row in rows if row[3] % 3))
    (root / "test_list.txt").write_text("\n".join(row[0] for row in rows if not row[3] % 3))
    return root


def openi(root, ids, order=1):
    for i, name in list(enumerate(ids))[::order]: picture(root / f"{name}.png", i)
    return root


def plain(root, n=24, order=1, reports=False):
    "A plain folder: images/, a CSV, and a report per image where asked for."
    kinds = ["No Finding", "Effusion", "Edema|Pneumonia"]
    rows = [(f"{i:03}.png", kinds[i % 3], f"p{i // 2}", "PA" if i % 4 else "lateral", 30 + i) for i in range(n)][::order]
    table = pd.DataFrame(rows, columns=["image", "finding_labels", "patient_id", "view", "age"])
    if reports: table["report_path"] = table.image.str.replace(".png", ".txt")
    root.mkdir(parents=True, exist_ok=True)
    table.to_csv(root / "labels.csv", index=False)
    for row in rows:
        picture(root / "images" / row[0], int(row[0][:3]))
        if reports: (root / row[0].replace(".png", ".txt")).write_text(f"IMPRESSION: image {row[0]}.")
    return root


def laion(root, parts=3, rows=400):
    "Parts with LAION-400M's columns, the last one with the other spelling of its text column."
    root.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        texts = [None if i == 17 else f"a photo {part} {i}" for i in range(rows)]
        name = "caption" if part == parts - 1 else "TEXT"
        table = pa.table({"SAMPLE_ID": np.arange(rows), "URL": [f"u{i}" for i in range(rows)], name: texts, "LICENSE": ["?"] * rows,
                          "NSFW": ["UNLIKELY"] * rows, "similarity": np.full(rows, 0.3), "WIDTH": np.full(rows, 256), "HEIGHT": np.full(rows, 256)})
        parquet.write_table(table, root / f"part-{part:05}-5b54c5d5-c000.snappy.parquet", row_group_size=150)
    return root


def gzipped(path):
    "Pack a file beside itself, as the original lies beside what people unpacked."
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed
