"What a prompt asks for, by hand: Table 4 picks its real images by it."
import pytest

from cxr_nb.places import slug
from cxr_nb.prompts import given_findings, prompt_finding
from cxr_nb.tables import published

EFFUSION, NONE, REFUSED = "pleural effusion", "no finding", "is not clear from"

# as text and as the slug that names a folder
BOTH = {
    "A photo of a lung xray": NONE, "A photo in the style of a lung xray": NONE, "A photo of a lung xray with a visible pleural effusion": EFFUSION,
    "A lung xray with no pleural effusion": NONE, "effusion": EFFUSION, "effusions": EFFUSION, "A lung xray with an effusion": EFFUSION,
    "bilateral pleural effusions": EFFUSION, "a hydrothorax": EFFUSION, "chest x-ray, pericardial effusion": REFUSED, "no pericardial effusion": NONE,
    "pericardial and pleural effusions": EFFUSION, "a chest radiograph without pleural effusion": NONE,
    "a lung xray without any sign of an effusion": NONE, "lungs free of effusion": NONE, "lungs free from pleural effusion": NONE,
    "absence of pleural effusion": NONE, "negative for pleural effusion": NONE, "a normal lung rather than a pleural effusion": NONE,
    "effusion is absent": NONE, "no evidence of pleural effusion": NONE, "not a pleural effusion": NONE, "a resolved pleural effusion": NONE,
    "the pleural effusion has resolved": NONE, "pleural effusion ruled out": NONE, "no pneumothorax but a pleural effusion": EFFUSION,
    "a pleural effusion but no pneumothorax": EFFUSION, "no pleural effusion but cardiomegaly": REFUSED, "no pneumothorax or pleural effusion": NONE,
    "neither pneumothorax nor effusion": NONE, "no pneumothorax, no pleural effusion": NONE, "no pneumothorax, pleural effusion": REFUSED,
    "no pneumothorax and pleural effusion": REFUSED, "no pneumothorax and no pleural effusion": NONE,
    "a pleural effusion and no pneumothorax": EFFUSION, "a pleural effusion without pneumothorax": EFFUSION,
    "pleural effusion with no other abnormality": EFFUSION, "no abnormality except a pleural effusion": EFFUSION,
    "normal lung apart from a pleural effusion": EFFUSION, "nothing but a pleural effusion": EFFUSION, "anything but a pleural effusion": NONE,
    "a lung xray that doesn't show a pleural effusion": NONE, "there isn't an effusion": NONE, "pleural effusion is not seen": NONE,
    "pleural effusion isn't visible": NONE, "effusion-free lungs": NONE, "no longer a pleural effusion": NONE,
    "pleural effusion no longer visible": NONE, "unresolved pleural effusion": EFFUSION, "no change in pleural effusion": EFFUSION,
    "not only pneumothorax but also a pleural effusion": EFFUSION, "possible pleural effusion": REFUSED, "rule out pleural effusion": REFUSED,
    "history of pleural effusion": REFUSED, "cardiomegaly": REFUSED, "no acute findings": NONE, "no finding": NONE, "a normal chest xray": NONE,
    "a lung xray with pneumonia and a pleural effusion": EFFUSION, "lung xray: no effusion; pneumothorax": REFUSED,
    "no focal consolidation, pneumothorax, or pleural effusion": NONE, "no effusion, consolidation, or pneumothorax": NONE,
    "possible pneumonia or pleural effusion": REFUSED, "a pleural effusion and a pneumothorax are absent": NONE,
    "a pleural effusion and pneumothorax is absent": REFUSED, "no consolidation, effusion and pneumothorax": REFUSED,
    "no effusion, and cardiomegaly": REFUSED, "a pleural effusion, pneumothorax absent": REFUSED,
    "effusion or pneumothorax has been ruled out": REFUSED, "lungs without effusion, edema or pneumonia": NONE,
    "a pleural effusion or a pneumothorax": EFFUSION, "no evidence for an effusion": NONE, "effusion: absent": NONE, "effusion - negative": NONE,
    "an effusion that is not small": REFUSED, "not effusion": NONE, "no effusion is seen": NONE, "no effusion is present": NONE,
    "no visible pleural effusion is seen here": NONE, "a lung xray lacking a pleural effusion": NONE, "NO PLEURAL EFFUSION": NONE,
    "pleural effusion: none": NONE, "large left pleural effusion, no pneumothorax": EFFUSION, "a lung x-ray w/o effusion": NONE,
    "not without a pleural effusion": EFFUSION, "pleural effusion cannot be excluded": REFUSED, "pleural thickening": REFUSED,
    "no left pleural effusion but a right pleural effusion": EFFUSION, "effusion not present": NONE, "a small effusion": EFFUSION,
    "a photo of a lung xray with visible pleural effusion": EFFUSION, "pleural fluid": EFFUSION, "the absence of any effusion": NONE,
    "a radiograph of a patient who does not have a pleural effusion": NONE, "a patient not presenting with pleural effusion": REFUSED,
    "a pleural effusion instead of a pneumothorax": EFFUSION, "a pneumothorax instead of a pleural effusion": REFUSED, "clear of effusion": NONE,
    "non-effusion xray": NONE, "a lung with pleural effusions on both sides, not a fracture": EFFUSION, "devoid of pleural effusion": NONE,
    "pleural effusion has been excluded": NONE, "pleural effusion absent": NONE, "no pleural effusion or pneumothorax": NONE,
    "no pleural effusion, no pneumothorax, no consolidation": NONE,
    "a pneumothorax and a pleural effusion are absent": NONE, "clear lungs, no effusion": NONE, "there is no effusion": NONE,
    "no obvious or visible effusion": NONE, "pleural effusion? no": NONE, "the effusion has cleared": NONE, "the effusion was drained": REFUSED,
    "a lung xray with the effusion gone": NONE, "an xray never showing effusion": NONE, "Eine Lunge ohne Pleuraerguss": REFUSED,
    "all findings except pleural effusion": REFUSED, "an effusion on both sides": EFFUSION, "no sign of any abnormality": NONE,
}
# what a list of negations does not know: each word must be known, or the prompt asks
BOTH |= {
    **dict.fromkeys([
        "no devices, visible pleural effusion", "no lines or tubes, visible pleural effusion", "no normal lung, pleural effusion",
        "a lung xray with no tubes and a pleural effusion", "A photo of a lung xray without devices showing pleural effusion",
        "man with no shirt and pleural effusion", "chest CT, not xray, of pleural effusion", "non-loculated pleural effusion",
        "non loculated effusion", "no more than a small pleural effusion", "failed to show effusion", "fails to show an effusion",
        "effusion is denied", "exclusion of effusion", "omit pleural effusion", "healthy lungs, avoid pleural effusion",
        "sine effusion", "opposite of pleural effusion", "pleural effusion aint there", "hardly any effusion",
        "scarcely any pleural effusion", "chylothorax", "a lung with fluid", "kein Erguss", "hemothorax", "Pleuraerguss",
        "blunted costophrenic angles with meniscus sign", "no pneumothorax, large pleural effusion", "pleural effusoin",
        "no effusion on the left and a large effusion on the right", "lung xray, no abnormality, left pleural effusion",
        "The pleural spaces are clear",
        # others of these kinds
        "barely visible pleural effusion", "not a large pleural effusion", "no loculated effusion", "no photo, pleural effusion",
        "a lung with no patient with effusion", "no absence of effusion", "pneumothorax absent effusion", "refute pleural effusion",
        "sin derrame pleural", "wet lungs", "a photo of a dog", "invisible pleural effusion", "an effusion mimic",
        "abnormalities except pleural effusion", "no effusion or healthy lungs", "effusion is not absent", "clear the pleural effusion",
        "effusion 50", "no tubes that show effusion", "a not normal lung", "no pneumothorax and effusion or edema",
    ], REFUSED),
    **dict.fromkeys([
        "pleural effusion (absent)", "pleural effusion (none)", "nonexistent pleural effusion", "negative pleural effusion",
        "0 pleural effusion", "pleural effusions: 0", "pleural effusion = 0", "non-existent pleural effusion", "effusion [none]",
        "a portable AP chest radiograph of an elderly woman", "an xray of lungs with tubes and lines", "no large left-sided pleural effusion",
        "no lines, tubes or pleural effusion", "an effusion was not seen in this lung xray", "no devices", "missing pleural effusion",
        "a lung xray with no visible or obvious pleural effusion", "PA view, normal lungs", "effusion and edema are not present",
    ], NONE),
    **dict.fromkeys([
        "a lung with a loculated pleural effusion", "a large, left-sided pleural effusion without pneumothorax",
        "frontal chest film of a 45 year old man with a small right effusion", "an xray with a pacemaker and a pleural effusion",
        "a high resolution lung xray with pleural effusion", "a free flowing pleural effusion",
    ], EFFUSION),
}
# a folder's name has lost what these hang on
TEXT = {
    "No pneumothorax. Large pleural effusion.": EFFUSION, "no signs of pneumonia; a pleural effusion on the left": EFFUSION,
    "effusion (small)": EFFUSION, "Is there an effusion? None.": NONE,
    "no pneumothorax, with a pleural effusion": EFFUSION, "ø effusion": REFUSED, "no\u200b effusion": REFUSED, "∅ effusion": REFUSED,
    "pleural effusion?": REFUSED, "?pleural effusion": REFUSED, "Effusion, pneumothorax. None.": REFUSED, "(no) pleural effusion": REFUSED, "a cyst\nor an effusion": REFUSED,
    **dict.fromkeys([
        "effusion (-), pneumothorax (-)", "effusion -", "pleural effusion -", "lung xray: effusion -, pneumothorax -", "-effusion",
        "effusion(-)", "effusion - / pneumothorax +", "!effusion", "a lung xray, !effusion", "effusion; no effusion", "no effusion; effusion",
        "large effusion; no effusion", "Large effusion. No effusion.", "effusion, no effusion", "effusion but no effusion",
        "left: effusion, right: none", "right: none, left: effusion", "unilateral, no bilateral effusion", "no effusion on the right",
        "no effusion in the left lung", "right: no effusion", "no effusion on the left; large effusion on the right", "no effusion?",
        "Is there no effusion?", "no effusion on the left side, no pneumothorax",
    ], REFUSED),
    **dict.fromkeys([
        "No pleural effusion!", "No pleural effusion!!", "effusion -- none", "a left lateral chest x-ray with no effusion",
        "no left-sided effusion", "no left or right effusion", "an x-ray of a 45-year-old man - no effusion",
    ], NONE),
    **dict.fromkeys([
        "Large effusion! No pneumothorax!", "chest x-ray - left-sided pleural effusion",
        "left effusion but no right effusion", "effusion on the right; no pneumothorax",
    ], EFFUSION),
    "A photo of a <lung-xray>": NONE, "pleural effusion −": REFUSED, "Lungs clear.\nNo pleural effusion.": NONE,
}


@pytest.mark.parametrize(("prompt", "finding"), [*BOTH.items(), *((slug(p), f) for p, f in BOTH.items()), *TEXT.items()])
def test_what_a_prompt_asks_for(prompt, finding):
    if finding is not REFUSED: assert prompt_finding(prompt) == finding
    else:
        with pytest.raises(ValueError, match=f"{finding}.*say it in findings") as caught: prompt_finding(prompt)
        assert "\n" not in str(caught.value)


def test_what_a_list_leaves_open_without_its_stops_is_not_guessed():
    for prompt in list(TEXT)[:2]:
        with pytest.raises(ValueError, match=REFUSED): prompt_finding(slug(prompt))


def test_printed_prompts_keep_their_finding():
    for prompt in published("table_4").prompt.dropna():
        assert prompt_finding(prompt) == prompt_finding(slug(prompt)) == (EFFUSION if "effusion" in prompt else NONE)


def test_a_person_can_say_it():
    prompt = "A blunted angle, possible effusion"
    assert prompt_finding(prompt, {prompt: "no finding"}) == prompt_finding(slug(prompt), {prompt: "no finding"}) == NONE
    assert prompt_finding("a = b", {"a = b": "pleural effusion"}) == EFFUSION
    with pytest.raises(ValueError, match="findings: 'a prompt': 'edema' is neither no finding nor pleural effusion"): given_findings({"a prompt": "edema"})
