"""Claims and the rules that decide them (§§1, 3, 4, 5)."""
import csv
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from cxr_nb import profiles
from cxr_nb.cells import EXTENDED, PROMPTS, generation_cells, method_cells, printed_cells, quality_cells, strategy
from cxr_nb.discussion import FILES, UNTESTABLE, VERDICTS, blind_tables, printed_check, printed_figures, rests_on, verdict, world_of
from cxr_nb.graph import graph
from cxr_nb.image_sets import variant_name
from cxr_nb.rules import REFERENCE, Estimate, decide, exact, expand, references

FOLDER = ROOT / "cxr_nb/published"
CLAIMS = {row["id"]: row for row in csv.DictReader((FOLDER / "claims.csv").open(encoding="utf-8"))}
RULED = {name: claim for name, claim in CLAIMS.items() if claim["rule"]}
WORDS = {"reproduced", "not reproduced", "seen in the miniature", "not seen in the miniature", "not testable here"}


def raw(name): return list(csv.DictReader((FOLDER / f"{name}.csv").open(encoding="utf-8")))


def cell(name, key, row, column): return float(next(r for r in raw(name) if r[key] == row)[column])


def made_up():
    "A number for every cell that some rule names, and three rows for every star."
    rng, cells = np.random.default_rng(0), {}
    for claim in RULED.values():
        for table, rows, column in references(claim["rule"]):
            for row in ["one", "two", "three"] if rows == "*" else rows.split(" / "):
                number = rng.normal()
                cells[table, row, column] = Estimate(number, number - 0.01, number + 0.01, 100)
    return cells


PRINTED, MADE_UP = printed_cells(), made_up()
TABLES = {table for claim in RULED.values() for table, _, _ in references(claim["rule"])} | FILES.keys()
RESTS_ON = {table: rests_on(graph("demo"), table) for table in sorted(TABLES)}
EVERYWHERE = dict.fromkeys(RESTS_ON, "miniature")


def test_claims_are_whole():
    assert len(CLAIMS) >= 40 and {claim["section"][1] for claim in CLAIMS.values()} == set("1345")
    assert {"§3.1", "§3.2", "§3.3", "§3.4", "§3.5"} <= {claim["section"] for claim in CLAIMS.values()}
    for name, claim in CLAIMS.items():
        assert name.startswith(claim["section"][1:]) and claim["claim"].endswith(".")
        assert claim["rule"] or claim["not_here"], f"{name}: neither a rule nor a reason"
        notebooks = claim["tested_in"].split(", ") if claim["tested_in"] else []
        assert bool(notebooks) == bool(claim["rule"]), name
        assert all((ROOT / f"nbs/{notebook}.ipynb").exists() for notebook in notebooks), name


@pytest.mark.parametrize("name", CLAIMS)
def test_published_figures_are_the_printed_ones(name):
    "Looked up in the transcription in another way than the module does."
    text = CLAIMS[name]["published"]
    shown = [float(x) for x in re.findall(r"-?[\d.]+", printed_figures(re.sub(r"\}[^{]*", "} ", re.sub(r"^[^{]*", "", text)), PRINTED))]
    named = REFERENCE.findall(text)
    assert len(shown) == len(named)
    for result, (table, row, column) in zip(shown, named):
        if column == "chance": expected = 100 * 49 / 699
        elif table == "table_2" and column == "best": expected = max(float(v) for k, v in next(r for r in raw(table) if r["encoder"] == row).items() if k != "encoder" and v)
        elif table == "table_2": expected = cell(table, "encoder", row, column)
        elif table == "table_3": expected = cell(table, "finding", row, column)
        elif table == "table_5": expected = cell(table, "method", row, column)
        elif column == "auc_difference": expected = cell(table, "finding", row, "auc_reconstruction") - cell(table, "finding", row, "auc_original")
        elif table in ("table_1", "table_6"): expected = cell(table, "finding", row, column)
        elif table.startswith("reconstruction"):
            data = "CheXpert" if "chexpert" in table else "MIMIC-CXR"
            expected = next(float(r[column]) for r in raw("figure_3") if (r["dataset"], r["metric"]) == (data, row.removesuffix("_xrv")))
        elif table == "training_details":
            line = "unet" if row.startswith("U-Net") else "inversion" if "Inversion" in row else row.split("(")[1][:5]
            expected = next(float(r["minutes"]) / 60 for r in raw(table) if line in r["experiment"])
        else:
            prompt = {"plain": "A photo of a lung xray", "effusion": "A photo of a lung xray with a visible pleural effusion"}[column]
            expected = next(float(r["fid"]) for r in raw("table_4") if r["prompt"] == prompt and strategy(r["method"], r["variant"]) == row)
        assert result == pytest.approx(expected, abs=0.051 if column == "chance" else 1e-9), (table, row, column)


def test_no_other_figure_is_typed():
    for name, claim in CLAIMS.items():
        rest = re.sub(r"\{.*?\}", "", claim["published"])
        assert set(re.findall(r"[\d.]*\d", rest)) <= {"@10"[1:], "5", "15"}, name


def test_bars_are_what_the_paper_prints():
    quality = {(r["dataset"], r["metric"]): r for r in raw("figure_3")}
    assert CLAIMS["3.2a"]["rule"].endswith(f"of {quality['MIMIC-CXR', 'rmse']['mean']}")
    for name, metric in {"1a": "ssim", "3.2c": "ssim", "3.2b": "psnr", "3.2r": "embedding_cosine"}.items():
        assert float(CLAIMS[name]["rule"].rpartition("> ")[2]) == float(quality["CheXpert", metric]["mean"])
    for metric in ("ssim", "psnr"): assert f"within {float(quality['MIMIC-CXR', metric]['sd']):g} of" in CLAIMS["3.2f"]["rule"]


def test_printed_contradictions_are_these():
    "Each follows from the transcription by arithmetic."
    best = {r["encoder"]: max(float(v) for k, v in r.items() if k != "encoder" and v) for r in raw("table_2")}
    assert best["RadBERT"] > best["CLIP"] and best["CXR-BERT-specialized"] / best["CLIP"] - 1 > 0.15
    fid = {(r["variant"].removeprefix("CXR-BERT-specialized, "), r["prompt"].count(" ")): float(r["fid"]) for r in raw("table_4")}
    plain, effusion = "A photo of a lung xray".count(" "), "A photo of a lung xray with a visible pleural effusion".count(" ")
    assert fid["document-level projection", effusion] < fid["Stable Diffusion", effusion]
    assert fid["no findings and abnormality, with prior", plain] > fid["Stable Diffusion", plain]
    gain = {r["finding"]: round(float(r["auc_reconstruction"]) - float(r["auc_original"]), 3) for r in raw("table_1")}
    assert gain["Pleural Effusion"] == gain["Edema"] == gain["Consolidation"] == max(gain.values())
    assert 20 * math.log10(2048 / 31.8) - 35.1 > 1
    printed = PRINTED
    result = {name for name, claim in RULED.items() if printed_check(claim["rule"], printed).startswith("contradicted")}
    assert result == {"1e", "3.2d", "3.2m", "3.3e", "3.3f", "3.4c", "3.4g", "4c", "5c"}
    assert printed_check(CLAIMS["3.5h"]["rule"], printed) == "holds"
    assert printed_check(CLAIMS["3.2f"]["rule"], printed) == printed_check("", printed) == ""


@pytest.mark.parametrize("name", RULED)
def test_every_rule_can_be_asked_and_its_answer_hangs_on_the_numbers(name):
    rule, answers = RULED[name]["rule"], set()
    cells = {key: MADE_UP[key] for key in MADE_UP if key[0] in {table for table, _, _ in references(rule)}}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        answers.add(decide(rule, {key: exact(v) for key, v in zip(cells, rng.choice([0.001, 1, 60]) * rng.uniform(-1, 1, len(cells)))})[0])
    assert answers <= {"holds", "fails"} and "fails" in answers
    assert decide(rule, {key: Estimate(0.5, -1e6, 1e6, 9) for key in cells})[0] == "undecided"


def test_rules_that_nothing_printed_can_meet_can_be_met():
    "The rest are met by printed numbers, or contradicted by them."
    good = {"ssim difference": 0.001, "psnr difference": 0.1, "across_patients − floor": 0.001, "floor": 1, "ssim": 0.3, "R²": 0.5, "generated": 0.9,
            "positives against real": 0.8, "negatives against real": 0.7, "effusions": 0.52}
    rows = {"precision": {"Textual Projection (document)": 0.01, "Textual Projection (token)": 0.02, "U-Net, no prior": 0.9},
            "coverage": {"U-Net, with prior": 0.2}, "ms_ssim_difference": {"U-Net, with prior": 0.2}, "table_4": {"Textual Projection (token, deeper)": 5}}
    good = {key: exact(good.get(key[2], rows.get(key[0], {}).get(key[1], 0.5 if key[0] != "table_4" else 9))) for key in MADE_UP if key[0] != "reconstruction_by_size"}
    good |= {("reconstruction_by_size", "64", "ssim"): exact(0.9)}
    unprinted = {name for name, claim in RULED.items() if not printed_check(claim["rule"], PRINTED)}
    assert unprinted == {"1a", "3.2f", "3.2g", "3.2j", "3.4k", "3.4l", "3.4m", "3.4o", "4e", "4k", "5g", "5h"}
    assert {name for name in unprinted if decide(RULED[name]["rule"], good)[0] != "holds"} == set()


def test_flipped_numbers_flip_the_verdict():
    claim = CLAIMS["3.5h"]
    high, low = Estimate(0.97, 0.94, 0.99, 100), Estimate(0.52, 0.41, 0.63, 100)
    rows = ("table_5", "U-Net, with prior", "auc"), ("table_5", "Original Model", "auc")
    for world, words in {"miniature": "{} in the miniature", "public": "{}", "paper": "{}"}.items():
        seen, not_seen = (VERDICTS[held][world] for held in (True, False))
        assert verdict(claim, dict(zip(rows, (high, low))), {"table_5": world}, {}, {})["verdict"] == seen
        assert verdict(claim, dict(zip(rows, (low, high))), {"table_5": world}, {}, {})["verdict"] == not_seen
        near = dict(zip(rows, (Estimate(0.6, 0.5, 0.7, 100), low)))
        result = verdict(claim, near, {"table_5": world}, {}, {})
        assert (result["verdict"], result["outcome"]) == (not_seen, "undecided") and "includes zero" in result["reason"]
        blank = dict(zip(rows, (Estimate(0.9, math.nan, math.nan, 2), low)))
        assert verdict(claim, blank, {"table_5": world}, {}, {})["reason"].endswith("has no interval")
    assert {word for words in VERDICTS.values() for word in words.values()} | {UNTESTABLE} == WORDS


def test_opposite_comparisons_never_both_hold():
    rng = np.random.default_rng(1)
    for _ in range(300):
        a, b = (Estimate(v, v - d, v + u, 50) for v, d, u in rng.uniform(0, 1, (2, 3)))
        cells = {("t", "a", "x"): a, ("t", "b", "x"): b}
        more, less, back = (decide(rule, cells)[0] for rule in ("t[a | x] > t[b | x]", "t[a | x] < t[b | x]", "t[b | x] > t[a | x]"))
        assert less == back and {more, less} in ({"holds", "fails"}, {"undecided"})
        if a.low > b.high: assert more == "holds"


def test_interval_of_a_difference_covers_it():
    "Of proportions, whose intervals are skewed; independent ones, and pairs that rise and fall together."
    rng, n, p, q = np.random.default_rng(2), 50, 0.85, 0.6
    def wilson(k):
        share, z = k / n, 1.96
        middle, reach = (share + z**2 / (2 * n)) / (1 + z**2 / n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        return Estimate(share, middle - reach, middle + reach, n)
    def covered(pairs): return np.mean([d.low <= p - q <= d.high for d in (wilson(a) - wilson(b) for a, b in pairs)])
    apart = covered(zip(rng.binomial(n, p, 3000), rng.binomial(n, q, 3000)))
    noise = rng.uniform(size=(3000, n))
    assert 0.935 < apart < 0.97
    assert covered(zip((noise < p).sum(1), (noise < q).sum(1))) > apart


def test_a_star_leaves_out_rows_that_are_named_and_rows_without_a_value():
    cells = {("t", row, column): exact(i) for i, row in enumerate("abc") for column in "xy" if (row, column) != ("c", "y")}
    assert expand("t[* | x] > t[a | x]", cells) == ["t[b | x] > t[a | x]", "t[c | x] > t[a | x]"]
    assert expand("t[* | x] > t[* | y]", cells) == ["t[a | x] > t[a | y]", "t[b | x] > t[b | y]"]
    assert expand("t[a / b | x] > t[b / c | x]", cells)[1:3] == ["t[a | x] > t[c | x]", "t[b | x] > t[b | x]"]


@pytest.mark.parametrize("table", sorted({table for claim in RULED.values() for table, _, _ in references(claim["rule"])}))
def test_a_missing_table_is_one_clear_line(table):
    cells = {key: result for key, result in MADE_UP.items() if key[0] != table}
    worlds = {name: "paper" for name in RESTS_ON if name != table}
    for claim in RULED.values():
        uses = table in {name for name, _, _ in references(claim["rule"])}
        result = verdict(claim, cells, worlds, {}, {})
        assert (result["verdict"] == UNTESTABLE) == uses
        if uses:
            assert result["reason"] == f"this run has no {table}: it was not made" and not result["measured"]
            assert verdict(claim, cells, worlds, {}, {table: "of another data set"})["reason"] == f"this run has no {table}: of another data set"
            # there, but without the numbers
            result = verdict(claim, cells, worlds | {table: "paper"}, {}, {})
            assert result["verdict"] == UNTESTABLE and f"{table}[" in result["reason"] and "\n" not in result["reason"]


def test_claims_without_a_test_say_why():
    result = {name: verdict(claim, MADE_UP, EVERYWHERE, {}, {}) for name, claim in CLAIMS.items()}
    for name, claim in CLAIMS.items():
        assert (result[name]["verdict"] == UNTESTABLE) == bool(claim["not_here"]), name
        assert result[name]["reason"], name
    for name in ("3.5g", "4l"): assert "E_ablations" in result[name]["reason"]
    # outside of the miniature a rule that needs the paper's own scale is asked
    for name in ("3.1b", "3.2a", "4h"): assert verdict(CLAIMS[name], MADE_UP, dict.fromkeys(RESTS_ON, "paper"), {}, {})["verdict"] != UNTESTABLE


def test_rules_name_strategies_that_the_report_draws():
    sections = profiles.load_profile("demo")
    drawn = {strategy("original", ""), strategy("real", "")}
    for method, notebook in {"textual_projection": "25_textual_projection", "textual_inversion": "26_textual_inversion", "unet": "27_unet_finetuning"}.items():
        drawn |= {strategy(method, variant_name(variant)) for variant in sections[notebook]["variants"]}
    printed = {row["method"] for row in raw("table_5")}
    for claim in RULED.values():
        for table, rows, column in references(claim["rule"]):
            if table in EXTENDED.values():
                assert set(rows.split(" / ")) <= drawn and column in PROMPTS.values()
            if table in ("table_5", "domain_gap"): assert set(rows.split(" / ")) <= printed
            assert RESTS_ON[table][0]


def records_of(profile, source):
    "What run records of a profile tell of models and data."
    sections = profiles.load_profile(profile)
    return {name: {"parameters": sections[name], "results": {"source": source} if name[:2] in ("28", "32", "33", "34", "35", "A_") else {}}
            for names in RESTS_ON.values() for name in names}


@pytest.mark.parametrize("profile, source, world", [
    ("demo", "Phantoms", "miniature"), ("public", "Open-i", "public"), ("public", "Phantoms", "miniature"), ("paper", "MIMIC-CXR", "paper"),
])
def test_worlds_of_the_profiles(profile, source, world):
    records, datasets = records_of(profile, source), profiles.load_profile("demo" if source == "Phantoms" else profile)["21_datasets"]
    for table, names in RESTS_ON.items():
        result = world_of([records[name] for name in names], datasets)
        no_data = table in ("textual_projection", "training_details")
        assert result == ("miniature" if profile == "demo" else "public" if no_data else world), table


def test_one_stand_in_is_enough_for_the_miniature():
    records = records_of("paper", "MIMIC-CXR")
    datasets = profiles.load_profile("paper")["21_datasets"]
    names = RESTS_ON["table_5"]
    assert world_of([records[name] for name in names], datasets) == "paper"
    records["28_classification"]["parameters"] = records["28_classification"]["parameters"] | {"judges": ["cxr_nb/miniature/classifiers/judge_a"]}
    assert world_of([records[name] for name in names], datasets) == "miniature"


def test_other_judges_answer_the_same_rule():
    claim, cells = CLAIMS["3.4r"], MADE_UP
    turned = {key: result * -1 for key, result in cells.items() if key[0] == "table_5"}
    result = verdict(claim, cells, EVERYWHERE, {"judge_b": turned, "Phantom reports": {("table_2", "a", "b"): exact(1)}}, {})
    assert result["elsewhere"] == f"judge_b: {decide(claim['rule'], cells | turned)[0]}"


def test_measured_tables_come_under_the_names_of_rules():
    row = {"method": "unet", "variant": "no findings and abnormality, with prior", "prompt": "a_photo_of_a_lung_xray", "measured": 3.0, "ci_low": 2.0, "ci_high": 4.0, "n": 50}
    extended = pd.DataFrame([row | {"measure": "frechet", "extractor": "tower"}, row | {"measure": "frechet", "extractor": "judge", "measured": 9.0},
                             row | {"measure": "ms_ssim − real", "extractor": "pixels", "measured": 0.1}, row | {"measure": "kid", "extractor": "tower"}])
    cells = generation_cells(extended, "tower")
    assert cells["table_4", "U-Net, with prior", "plain"] == Estimate(3, 2, 4, 50)
    assert [key[0] for key in cells] == ["table_4", "ms_ssim_difference"]
    trainings = pd.DataFrame({"method": ["unet", None], "variant": ["no findings", None], "measured_hours": [0.5, None]})
    projections = pd.DataFrame([{"variant": "document-level projection", "texts": "captions", "measure": "R²", "value": 0.8, "ci_low": 0.7, "ci_high": 0.9, "n": 200}])
    cells = method_cells(projections, trainings)
    assert cells["training_details", "U-Net, no findings", "hours"] == exact(0.5)
    assert decide(CLAIMS["3.4k"]["rule"].split("; ")[0], cells)[0] == "undecided"
    quality = pd.DataFrame([{"row": "rmse_xrv", "column": "mean", "measured": 20.48, "ci_low": 20.0, "ci_high": 21.0, "n": 7}])
    assert quality_cells({"reconstruction": quality})["reconstruction", "psnr_of_mean_rmse", "mean"].value == pytest.approx(40)


@pytest.mark.parametrize("rule, says", [
    ("t[a | x] is good", "compares nothing"), ("t[a | x] > t[b | x] * t[a | x]", "is no sum"), ("t[a | x] > open('f')", "is no sum"), ("t[a | x] > 1 +", "rule: "),
])
def test_a_rule_that_is_not_understood_says_so(rule, says):
    with pytest.raises(ValueError, match=says) as caught: decide(rule, {("t", row, "x"): exact(1) for row in "ab"})
    assert "\n" not in str(caught.value)


def test_the_demo_says_what_its_tables_say():
    "The committed verdicts follow from the committed tables, where they are committed."
    path = ROOT / "outputs/demo/tables/claims.csv"
    if not path.exists(): pytest.skip("no committed verdicts yet")
    table = pd.read_csv(path).fillna("")
    assert list(table.id) == list(CLAIMS) and set(table.verdict) <= WORDS and list(table.rule) == [claim["rule"] for claim in CLAIMS.values()]
    assert not table.verdict.isin(["reproduced", "not reproduced"]).any() and set(table.world) == {"miniature", ""}
    assert ((table.outcome == "holds") == (table.verdict == "seen in the miniature")).all()
    for name in ("1h", "3.5h"):
        auc = pd.read_csv(path.with_name("table_5.csv")).query("column == 'auc'").set_index("row").measured["U-Net, with prior"]
        assert f"U-Net, with prior, auc: {auc:.3g}" in table.set_index("id").measured[name]
    record = json.loads((ROOT / "outputs/demo/records/40_discussion.json").read_text())["results"]
    assert record["verdicts"] == table.verdict.value_counts().to_dict()


@pytest.mark.parametrize(("low", "high", "can_tell"), [(0.78, 0.90, True), (0.39, 0.65, False), (0.5, 0.8, False), (0.1, 0.3, False), (math.nan, math.nan, False)])
def test_no_claim_is_decided_by_a_judge_that_cannot_tell(low, high, can_tell):
    "Every cell is on the claim's side by far; what is asked first is the judge, on real images."
    judged = {"table_5", "domain_gap", "table_1", "table_6"}
    on_real = Estimate(0.52, low, high, 100)
    cells = MADE_UP | {("table_5", "Real images: Open-i", "auc"): on_real} | {(name, "Pleural Effusion", "auc_original"): on_real for name in ("table_1", "table_6")}
    blind = blind_tables("judge_a", cells)
    assert set(blind) == (set() if can_tell else judged)
    rested = set()
    for name, claim in RULED.items():
        result = verdict(claim | {"not_here": ""}, cells, EVERYWHERE, {}, {}, blind)
        if {table for table, _, _ in references(claim["rule"])} & judged and not can_tell:
            rested.add(name)
            assert (result["verdict"], result["outcome"]) == (UNTESTABLE, ""), name
            assert result["reason"].startswith("the judge cannot tell: judge_a tells real effusions from real normals with AUC 0.52")
        else: assert result["outcome"] in ("holds", "fails", "undecided"), name
    assert can_tell or rested >= {"1b", "1d", "1f", "1h", "3.4p", "3.4r", "3.5a", "3.5h", "3.5k", "4a", "4e", "4j", "5a", "5f", "5g"}


def test_without_real_images_no_judge_is_known_to_tell():
    assert set(blind_tables("judge_a", {("table_5", "U-Net, with prior", "auc"): Estimate(0.97, 0.94, 0.99, 100)})) == {"table_5"}
    assert blind_tables("judge_a", {("table_2", "CLIP", "best"): exact(3.0)}) == {}
