"Reports as prompts: studies that no other set has, and judges that see in phantoms what their impressions state."
import numpy as np
import pytest

from cxr_nb.alignment import judge_rows
from cxr_nb.anatomy import draw_body
from cxr_nb.image_scan import scan
from cxr_nb.judges import load_classifier
from cxr_nb.phantoms import LABELS
from cxr_nb.report_prompts import DENYING, PLAIN, SEVERAL, choose_studies, draw_study, fits_tokenizer, kind_of, list_of_studies, named_in, study_images
from cxr_nb.stable_diffusion import encoder_hidden_states, load_component, load_pipeline, write_images
from cxr_nb.yardstick import Sampling

FINDINGS = ["Pleural Effusion", "Cardiomegaly", "Edema"]
JUDGE = "cxr_nb/miniature/classifiers/judge_a"


@pytest.fixture(scope="module")
def chosen():
    fits = fits_tokenizer(load_component("cxr_nb/miniature/stable_diffusion", "tokenizer"))
    learned = choose_studies(dict.fromkeys([*FINDINGS, PLAIN], 3), FINDINGS, fits, 0)
    wanted = dict.fromkeys([*FINDINGS, SEVERAL, PLAIN, DENYING], 6)
    return learned, choose_studies(wanted, FINDINGS, fits, 0, 1_000_000, [one.prompt for one in learned.studies])


def test_no_study_is_a_phantom_of_another_set():
    "Cohorts begin their patients from (seed, number), reports without images from (seed, number, labels)."
    for number in range(40):
        others = [draw_body(np.random.default_rng(key)) for key in ([0, number], [0, number, len(LABELS)])]
        assert draw_study(number, 0).body not in others


def test_what_is_learned_and_what_is_asked_are_apart(chosen):
    learned, asked = chosen
    for same in (lambda one: one.name, lambda one: one.body, lambda one: one.prompt): assert not {*map(same, learned.studies)} & {*map(same, asked.studies)}
    assert len({one.prompt for one in asked.studies}) == len(asked.studies) == 36


def test_an_impression_states_what_was_drawn_and_no_more(chosen):
    for kind, study in zip(chosen[1].kinds, chosen[1].studies):
        stated = {name for name, value in named_in(study, FINDINGS).items() if value == 1}
        assert kind == kind_of(study, FINDINGS) and len(stated) == (0 if kind in (PLAIN, DENYING) else len(stated) if kind == SEVERAL else 1)
        words = {"Pleural Effusion": ("effusion", "pleural fluid"), "Cardiomegaly": ("cardiomegaly",), "Edema": ("edema",)}
        affirmed = [one for one in study.prompt.lower().split(". ") if not one.startswith(("no ", "there is no", "the heart is not", "heart size is"))]
        assert stated == {name for name, ways in words.items() if any(way in one for way in ways for one in affirmed)}, study.prompt


def test_every_chosen_impression_is_read_to_its_end(chosen):
    pipeline = load_pipeline("cxr_nb/miniature/stable_diffusion")
    for study in chosen[1].studies: encoder_hidden_states(pipeline, study.prompt)
    with pytest.raises(ValueError, match="tokens; the text encoder reads 77"): encoder_hidden_states(pipeline, "1. Severe pulmonary edema. " * 20)


def test_phantoms_show_what_their_impressions_state_and_other_phantoms_do_not(chosen, tmp_path):
    studies = chosen[1].studies
    write_images(tmp_path / "images", study_images(studies, 128))
    apart = [*np.random.default_rng(0).permutation(studies)]
    aligned, shuffled = (scan(list_of_studies("generated", tmp_path / "images", some, FINDINGS), [f"judge={JUDGE}"], tmp_path / "kept", 128) for some in (studies, apart))
    targets = load_classifier(JUDGE).targets
    for finding in ("Pleural Effusion", "Edema"):
        row = judge_rows(finding, "judge judge_a", targets, aligned, aligned, Sampling()).iloc[0]
        chance = judge_rows(finding, "judge judge_a", targets, shuffled, aligned, Sampling()).iloc[0]
        assert row.measured > 0.85 and row.ci_low > 0.6 and chance.ci_low < 0.5 < chance.ci_high
