"Open-i reports, impressions, labels and the evaluation set: what is read, and what is refused."
import io
import re
import tarfile

import numpy as np
import pandas as pd
import pytest

from cxr_nb.closings import _LISTED
from cxr_nb.cohorts import CHEXPERT_LABELS, COHORT_COLUMNS, read_cohort, single_label
from cxr_nb.folders import read_folder
from cxr_nb.impressions import impression_section
from cxr_nb.openi import label_agreement, openi_archive, openi_cohort, read_openi
from cxr_nb.reports import report_texts, text_evaluation_set

REPORT = """<eCitation><uId id="{uid}"/><AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText><MeSH>{mesh}</MeSH></eCitation>"""


def report(uid, impression="Normal.", mesh=("normal",), findings="Clear lungs."):
    return REPORT.format(uid=uid, findings=findings, impression=impression, mesh="".join(f"<major>{m}</major>" for m in mesh)).encode()


@pytest.fixture
def archive(tmp_path):
    "A function that packs files into an archive: {name: content}."
    def pack(files):
        path = tmp_path / "reports.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path
    return pack


def test_archive_is_read_in_order_of_ids_whatever_its_own(archive):
    files = {f"ecgen-radiology/{i}.xml": report(f"CXR{i}", mesh=["Cardiomegaly/mild"] * (i == 3)) for i in (3, 1, 2)}
    a, b = read_openi(archive(files)), read_openi(archive(dict(reversed(files.items()))))
    assert a.equals(b) and a.study_id.tolist() == ["CXR1", "CXR2", "CXR3"]
    cohort = openi_cohort(a)
    assert list(cohort) == COHORT_COLUMNS
    assert cohort.Cardiomegaly.tolist()[2] == 1 and cohort["No Finding"].isna().all()


@pytest.mark.parametrize("files, message", [
    ({"1.xml": b"<eCitation>"}, "reports.tgz: '1.xml' is no readable Open-i report .no element found.*; download it again"),
    ({"1.xml": b'<?xml version="1.0" encoding="zzz"?><e/>'}, "reports.tgz: '1.xml' is no readable Open-i report .unknown encoding: zzz"),
    ({"1.xml": b'<?xml version="1.0" encoding="gb18030"?><e/>'}, "reports.tgz: '1.xml' is no readable Open-i report .multi-byte encodings"),
    ({"1.xml": b"<eCitation/>"}, "reports.tgz: '1.xml' is no readable Open-i report .it has no <uId> with an id"),
    ({"1.xml": b"<eCitation><uId/></eCitation>"}, "'1.xml' is no readable Open-i report .it has no <uId> with an id"),
    ({"1.xml": report(" ")}, "'1.xml' is no readable Open-i report .it has no <uId> with an id"),
    ({"1.txt": b"x"}, "reports.tgz: holds no .xml report"),
    ({"1.xml": report("CXR1"), "2.xml": report("CXR1")}, "study CXR1 is there twice"),
])
def test_archives_with_wrong_content_are_refused(archive, files, message):
    with pytest.raises(ValueError, match=message) as caught: read_openi(archive(files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not an archive", lambda b: b[:200] + b"\0" * 50 + b[250:],
                                   lambda b: b[:-4], lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:]])
def test_broken_archives_are_refused(tmp_path, spoil):
    path = tmp_path / "broken.tgz"
    path.write_bytes(spoil(openi_archive().read_bytes()))
    with pytest.raises(ValueError, match="broken.tgz: not a whole .tgz archive") as caught: read_openi(path)
    assert "\n" not in str(caught.value)


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("member, message", [
    (special("a/2.xml", tarfile.DIRTYPE), "'a/2.xml' is a folder, not a report"),
    (special("a/2.xml", tarfile.SYMTYPE, "/etc/passwd"), "'a/2.xml' is a link, not a report"), (special("2.xml", tarfile.LNKTYPE, "1.xml"), "'2.xml' is a link, not a report"),
    (special("2.xml", tarfile.FIFOTYPE), "'2.xml' is a device, not a report"), (special("2.xml", tarfile.CHRTYPE), "'2.xml' is a device, not a report"),
    ("/2.xml", "path '/2.xml' leads out of the archive"), ("../2.xml", "path '../2.xml' leads out"), ("a/../../2.xml", "path 'a/../../2.xml' leads out"),
    ("1.xml", "'1.xml' is there twice; keep one"), ("./1.xml", "'./1.xml' is there twice; keep one"), ("a/../1.xml", "'a/../1.xml' is there twice"),
])
def test_what_has_a_reports_name_and_is_none_is_refused(tmp_path, member, message):
    path = tmp_path / "reports.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for info, content in ((tarfile.TarInfo("1.xml"), report("CXR1")), (tarfile.TarInfo(member) if isinstance(member, str) else member, report("CXR2"))):
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    with pytest.raises(ValueError, match=re.escape(f"reports.tgz: {message}")) as caught: read_openi(path)
    assert "\n" not in str(caught.value)


def test_a_large_report_in_the_archive_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "reports.tgz"
    class Blanks(io.RawIOBase):
        def read(self, n=-1): return b" " * n
    info = tarfile.TarInfo("1.xml")
    info.size = 60 * 10**6
    with tarfile.open(path, "w:gz") as tar: tar.addfile(info, Blanks())
    with pytest.raises(ValueError, match="reports.tgz: '1.xml' has 60.0 MB; a report has at most 1 MB"): read_openi(path)


def test_clutter_beside_the_reports_is_passed_over(archive):
    assert read_openi(archive({"a/._1.xml": b"\0", "a/1.xml": report("CXR1"), "a/read.me": b"x"})).study_id.tolist() == ["CXR1"]


def test_missing_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Open-i reports: no file .*none.tgz"): read_openi(tmp_path / "none.tgz")


MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 FINDINGS:

 There is no focal consolidation, pleural effusion or pneumothorax.

 IMPRESSION:

 1.  No acute cardiopulmonary process.
 2.  Small nodule, ___ mm.

 NOTIFICATION:  The findings were discussed with Dr. ___.
"""


@pytest.mark.parametrize("text, expected", [
    (MIMIC, "1. No acute cardiopulmonary process. 2. Small nodule, mm."),
    (MIMIC.replace("IMPRESSION:", "Impression:"), "1. No acute cardiopulmonary process. 2. Small nodule, mm."),
    (MIMIC.replace("IMPRESSION:", "IMPRESSION"), "1. No acute cardiopulmonary process. 2. Small nodule, mm."),
    (MIMIC.replace("IMPRESSION:", "CONCLUSION:"), "1. No acute cardiopulmonary process. 2. Small nodule, mm."),
    (MIMIC.replace("IMPRESSION:", "**IMPRESSION:**"), "1. No acute cardiopulmonary process. 2. Small nodule, mm."),
    (MIMIC.replace("FINDINGS:", "PROVISIONAL FINDINGS IMPRESSION (PFI):").replace("IMPRESSION:\n", "RECOMMENDATION:\n"), None),
    (MIMIC.replace(" NOTIFICATION:", "ADDENDUM\n"), "1. No acute cardiopulmonary process. 2. Small nodule, mm."),
    (MIMIC + "\n IMPRESSION:  Addended: edema.", "Addended: edema."),
    ("IMPRESSIONS: Two.", "Two."), ("Final impression: Clear.", "Clear."), ("FINDINGS/IMPRESSION: Clear.", "Clear."),
    ("Clear lungs. IMPRESSION: Clear.", "Clear."), ("IMPRESSION: AP view compared to ___: unchanged.", "AP view compared to: unchanged."),
    ("IMPRESSION: XXXX-year-old with XXXX effusion.", "year-old with effusion."),
    ("Findings: Clear lungs. Impression: Normal chest.", "Normal chest."), ("Clear lungs. IMPRESSION Normal chest.", "Normal chest."),
    ("Impression  No acute disease.", "No acute disease."), ("Impression\n1. Edema.", "1. Edema."), ("IMPRESSION - Edema.", "Edema."),
    ("impression: edema", "edema"), ("Impression of a mass in the lung.", None), ("IMPRESSION:\nxxxx", None),
    ("IMPRESSION: One. IMPRESSION: Two.", "Two."), ("IMPRESSION AND RECOMMENDATION: Repeat film.", "Repeat film."),
    ("The impression: of a catheter", None), ("IMPRESSION:", None), ("IMPRESSION: ___", None), ("", None),
])
def test_impression_section(text, expected):
    assert impression_section(text) == expected


MISSPELT = "IMPRESSON IMPRRESSION IMOPRESSION IMPRSSION IMPERSSION IMPRESSOIN IMPRESION MPRESSION IMPESSION IMRPESSION IMPRESSIOM IMPRESSIIONS"
PLACES = ["FINDINGS: x.\n{}: Edema.", "x\n {}:\n\n Edema.\n", "x\n**{}:** Edema.", "FINDINGS AND {}: Edema.", "FINDINGS: x. {}: Edema.", "x\n{}\nEdema.", "{} Edema.", "Clear. {} Edema."]


@pytest.mark.parametrize("place", PLACES)
def test_a_slip_in_the_heading_is_seen_in_every_place(place):
    for word in ["IMPRESSION", *MISSPELT.split()]: assert impression_section(place.format(word)) == "Edema.", word
    for word in ["Impresson", "Imperssion"]: assert impression_section(f"x\n{word}: Edema.") == impression_section(f"x. {word}: Edema.") == "Edema."


def test_a_letter_within_a_pair_is_a_slip(): assert impression_section("x\nIMPRESXSION: Edema.") == "Edema."


@pytest.mark.parametrize("text", ["Consult line placement is satisfactory.", "Wet read: pneumonia.", "Consult line in place.", "Nurse call device over the chest."])
def test_a_finding_that_begins_like_a_sign_off_stays(text):
    assert impression_section(f"FINDINGS: x.\n\nIMPRESSION: {text}\nWet read: none.") == text


def test_words_near_a_heading_are_none():
    for word in ("COMPRESSION", "DEPRESSION", "EXPRESSION", "PROGRESSION"): assert impression_section(f"x\n{word}: Edema.") is None
    for word in ("CONTUSION", "CONCUSSION", "OCCLUSION"): assert impression_section(f"IMPRESSION: Edema.\n{word}: none.") == f"Edema. {word}: none."


@pytest.mark.parametrize("heading", "FINDING FINDINS FINDINDGS FINDGINGS FINDNGS FINDNINGS FINIDNGS FIDINGS IDICATION NDICATION COMPARISION COMPARSION COMPARRISON "
                         "COMPARISIONS RECCOMENDATION RECOMENDATIONS TECHNQUE CONLCUSION HISTROY NOTIFCATION WETREAD DATE".split() + ["CLINCAL HISTORY", "REFERENCE EXAM", "COMPARISON FILM", "COMMENT", "Comments", "DISCUSSION", "PLAN"])
def test_a_slip_in_the_next_heading_ends_the_impression(heading):
    assert impression_section(f"IMPRESSION: Edema.\n\n {heading}: Clear lungs.") == "Edema."


DRESSED = ["**IMPRESSION**: ", "IMPRESSION-: ", "IMPRESSION\uff1a", "IMPRESSION. ", "<b>IMPRESSION:</b> ", "1MPRESSION: ", "IMPRESS1ON: ", "1MPRESS10N: ", "I M P R E S S I O N: ", "IMP: ",
           "OPINION: ", "IMPRESSION (PRELIMINARY): ", "IMPRESSION (final): ", "IMPRESSION [FINAL]\n", "IMPRESSION: (PRELIMINARY) ", "IMPRES\ufe0fSION: ", "IMPRES\u034fSION: ", "IMPRES\u0301SION: ",
           "== IMPRESSION ==\n", "***IMPRESSION***\n", "3. IMPRESSION: ", "__IMPRESSION:__ ", "[IMPRESSION]: ", "IMPRESSION; ", "IMPRESSION = ", "IMPRESSION> ", "IMPRESSION\u2014", "IMPRESSION (prelim) ",
           "\uff29\uff2d\uff30\uff32\uff25\uff33\uff33\uff29\uff2f\uff2e\uff1a", "\u0406MPRESSION: ", "IMPRESSION- ", "IMPRESSION#1: ", "IMPRESSION 1: ", "IMPRESSION OF CHEST: "]


@pytest.mark.parametrize("heading", DRESSED)
def test_a_dressed_up_heading_is_seen_and_no_part_of_it_stays(heading):
    for before in ("FINDINGS: Heart normal.\n", "FINDINGS: Heart normal. ", ""):
        assert impression_section(f"{before}{heading}Small left effusion.") == "Small left effusion."


@pytest.mark.parametrize("heading", ["## Impression\n", "## Impression ", "<h2>Impression</h2>\n", "SUMMARY: ", "Opinion: ", "Preliminary impression: "])
def test_a_heading_on_a_line_of_its_own(heading):
    assert impression_section(f"FINDINGS: Heart normal.\n{heading}Small left effusion.") == "Small left effusion."


@pytest.mark.parametrize("heading", ["**RECOMMENDATION**:", "<b>FINDINGS:</b>", "F1NDINGS:", "FINDINGS (FINAL):", "F I N D I N G S:", "COMPARISON\uff1a", "**ADDENDUM**", "PFI:", "FIND\u0301INGS:"])
def test_a_dressed_up_next_heading_ends_the_impression(heading):
    if heading != "**ADDENDUM**": assert impression_section(f"IMPRESSION: Edema.\n{heading} Clear lungs.") == "Edema."
    assert impression_section(f"IMPRESSION: Edema.\n{heading}\nClear lungs.") == "Edema."


@pytest.mark.parametrize("text", ["1.", "1.\n", "1", "(1)", "1. 2.", "a)", "- 1."])
def test_the_number_of_a_list_alone_is_no_impression(text):
    assert impression_section(f"IMPRESSION: {text}") is None


def test_a_summary_is_a_conclusion_and_a_code_is_not():
    assert impression_section("SUMMARY: 2 - ABNORMAL") is None and impression_section("SUMMARY: Old.\nIMPRESSION: New.") == "New."


SIGNED_OFF = [
    "DICTATED BY: DR. A", "Dictated by Dr. A. Jones on 1/2/2003", "Dictated and signed by: A", "Signed", "Signed: Jane Doe, MD", "SIGNED BY: ___", "Signed 1/2/2003", "Transcribed by: AB",
    "Electronically signed by: Jane Doe, MD 01/02/2003 10:15", "ELECTRONICALLY SIGNED BY JANE DOE", "Transcribed: 1/2/2003", "Reviewed by: Jane Doe", "Reviewed by Dr. ___", "Reviewed by Jane Doe, MD",
    "Reviewed and electronically signed by Jane Doe", "D: 01/02/2003 T: 01/02/2003", "D:  ___  T: ___", "Interpreted by Attending Radiologist John Smith", "Attending Radiologist: J. Doe", "Job #: 123",
    "Physician to Physician Radiology Consult Line: (650) 555-0100", '"Physician to Physician Radiology Consult Line: (___) ___-____"', "SUMMARY: 2 - ABNORMAL, PREVIOUSLY REPORTED", "END OF IMPRESSION",
    "I have personally reviewed the images for this examination and agree with the report transcribed above.",
]
NOTIFIED = [
    "The findings were discussed with Dr. ___ by telephone at 10:15 AM on ___.", "These results were telephoned to Dr. ___ by Dr. ___ at 9:30am on ___, 5 minutes after discovery.", "D/w Dr. Smith at 5 pm",
    "Dr. ___ was paged with these findings at 3:45 p.m.", "The above findings were communicated via telephone by Dr. ___ to Dr. ___ at 14:05 on ___", "DISCUSSED WITH DR. SMITH BY PHONE AT 0930 HOURS.",
    "Findings were conveyed to Dr. ___ in person at the time of discovery.", "An email was sent to Dr. ___ on ___.", "Results were entered into the critical results dashboard by Dr. ___ at 3:00 PM.",
    "Findings discussed with\n Dr. ___ by\n phone.", "The referring physician has been notified.", "Wet read called to the ED by Dr. ___ at 3 am.", "Results discussed with John Smith, PA, by phone.",
    "If there are any questions regarding this interpretation, please call ___.", "Critical result notification documented through Primordial.", "Findings were reported to the nurse practitioner, ___, at 7:45 p.m.",
]


CLOSINGS = [
    "For questions call the radiology consult line at 555-1234.", "Please call 555-1234 with questions.", "This report has been electronically signed by J Smith", "Final report electronically signed by Dr J Smith",
    "THIS DOCUMENT HAS BEEN ELECTRONICALLY SIGNED BY J SMITH", "E-signed by J Smith", "e-Signed by: J Smith", "Esigned by J Smith", "/s/ John Smith MD", "John Smith, M.D.", "JOHN SMITH MD", "Dr. J. Smith", "Jane Doe MD PhD",
    "Authenticated by J Smith", "Approved by J Smith", "APPROVED BY: JOHN SMITH, MD", "approved by j smith, md", "Interpreted by J Smith MD", "Released by: J Smith", "Report finalized by Dr. Smith 1/2/2003",
    "Finalized on 1/2/2003 by J Smith", "The report was verified by John Smith, MD on 1/2/2003 at 10:15 AM", "Report dictated by J. Smith and signed by K. Jones", "Dicatated by: Dr. Smith", "Dictated - J Smith",
    "cc: Dr Smith", "CC: Drs. Smith and Jones", "Transcriptionist- AB", "Tel: 555-1234", "Phone: (650) 555-1234", "Contact number: 555-1234", "Callback number 555-1234", "Pager 12345", "Workstation: ABC123",
    "Electronic signature: J Smith", "Signature on file", "Reported by J Smith", "Radiologist - J Smith", "J Smith, Radiologist", "cc: primary care", "Copy to: Dr Smith", "-J Smith, MD", "FINAL REPORT",
    "Thank you for this referral.", "Questions? Call 555-1234", "Confirmed by J Smith", "Dictation workstation: ABC123", "Report approved electronically by J Smith", "Report status: Final", "Voice recognition software was used.", "Dictated using speech recognition software.", "This report was generated using voice recognition software and may contain errors.",
    "If you have any questions, please contact the reading room at 555-1234.", "I have personally reviewed the image(s) and the resident's interpretation and agree with the findings.",
    "[Signed]", "(Signed)", "Co-signed by Jane Doe", "Cosigned by: Jane Doe MD", "Countersigned: Jane Doe", "Reading radiologist: Jane Doe", "Sincerely, Jane Doe", "--- End of report ---",
    "Please call the reading room at x1234 with questions.", "Should you have any questions, call 5-1234.", "Voice recognition software was used to create this report.", "PowerScribe 360",
    "Critical results were called to nurse Jane at 14:30.", "Report created on 1/2/2020", "Elec. signed: Jane Doe", "Teaching physician attestation: I reviewed the study.", "x____",
    "As the attending radiologist, I have reviewed the images and edited the report.", "I, the attending physician, have reviewed the images and agree with the report.",
]


@pytest.mark.parametrize("closing", CLOSINGS)
def test_a_sign_off_without_a_mark_is_no_impression(closing):
    for before in ("\n", "\n\n", " "):
        assert impression_section(f"IMPRESSION: Small left effusion. No pneumothorax.{before}{closing}") == "Small left effusion. No pneumothorax."
    assert impression_section(f"IMPRESSION: Small left effusion\n{closing}").rstrip(".") == "Small left effusion"
    assert impression_section(f"IMPRESSION: {closing}") is None


def test_a_telephone_number_on_a_line_of_its_own(): assert impression_section("IMPRESSION: Edema.\nTel. 617-555-1234") == "Edema."


def test_lines_of_names_that_end_a_sentence_stay():
    assert impression_section("IMPRESSION: Catheter placed per\nDr. Smith.") == "Catheter placed per Dr. Smith."


@pytest.mark.parametrize("closing", [*SIGNED_OFF, *NOTIFIED])
@pytest.mark.parametrize("before", ["\n", "\n\n", "\n 2. ", " "])
def test_who_signed_and_who_was_notified_is_no_impression(closing, before):
    if before == "\n 2. " and closing in SIGNED_OFF: before = "\n   "
    if before == " " and closing.startswith("Transcribed:"): before = "\n"
    assert impression_section(f"IMPRESSION:\n 1. Small left effusion.{before}{closing}") == "1. Small left effusion."


@pytest.mark.parametrize("closing", NOTIFIED)
def test_findings_around_a_notification_stay(closing):
    assert impression_section(f"IMPRESSION:\n 1. Edema.\n 2. {closing}\n 3. New effusion.\n") == "1. Edema. 3. New effusion."
    assert impression_section(f"IMPRESSION: {closing}") is None


@pytest.mark.parametrize("text", [
    "Signed out as pneumonia.", "PICC tip at the cavoatrial junction discussed previously.", "New pneumothorax was discussed with Dr. Smith by phone.", "Dr. Smith was notified of the pneumothorax.",
    "Reviewed by comparison with CT, the nodule is stable.", "Opacity reported previously.", "T12 compression fracture.", "T: tube in place.", "D: dilated loops.", "Findings worrisome for edema as discussed above.",
    "The tube was advanced after discussion with Dr. Smith.", "Recommend discussion with Dr. Smith regarding biopsy.", "Interpreted as edema.", "Read as normal before.", "Left effusion reported by Dr. Smith.",
    "The line was called to the attention of Dr. Smith.", "Not discussed with Dr. Smith.", "Signed difference between both lungs.", "Findings with Dr. Smith: effusion, discussed by phone, is new.",
    "Approved device in place.", "Interpreted as atelectasis by the referring physician.", "Findings were called a pneumothorax.", "3 cc of fluid.", "Effusion of 300 cc: stable.", "CC: chest pain.", "Verified by CT.",
    "VERIFIED BY LATERAL VIEW.", "Released by bronchoscopy.", "Read by outside hospital as edema.", "INTERPRETED BY OUTSIDE HOSPITAL AS PNEUMONIA.", "Interpreted by Dr. Smith as edema.", "Approved: Hickman Catheter.",
    "Approved by Dr. Smith for removal of the line.", "Verified: Pneumothorax.", "Read by RUL Collapse.", "Contact with the chest wall.", "Pager overlies the chest.", "Overlying pager.", "MD Anderson port in place.",
    "Mass, MD to follow.", "Transcription error excluded, effusion is real.", "DO NOT ADVANCE THE TUBE.", "Workstation artifact.", "Left Lung Collapse.", "Impression of the rib on the lung.", "My impression. Clear.", "Confirmed by CT.", "Confirmed by Biopsy.", "Radiologist to review.", "Reported by the patient.", "CONFIRMED BY LATERAL FILM.",
])
def test_clinical_text_stays(text):
    assert impression_section(f"IMPRESSION: Edema.\n{text}\n") == f"Edema. {text}"


def test_a_clause_about_a_notification_goes_and_its_finding_stays():
    for clause in (", discussed with Dr. ___ by phone", " (discussed with Dr. ___ at 10:00)", " - Dr. ___ was notified", ", which was communicated to Dr. ___ at 9:15 a.m"):
        assert impression_section(f"IMPRESSION: Right pneumonia{clause}.") == "Right pneumonia."


def test_every_word_that_may_be_cut_is_free_of_findings():
    "Against the words of real reports' codes: no MeSH finding, no label, no device is on the lists."
    clinical = {word for terms in read_openi().mesh for term in terms for word in re.findall(r"[a-z]+", term.lower())} | {w for x in CHEXPERT_LABELS for w in x.lower().split()}
    assert _LISTED & clinical <= {"and", "in", "of", "with", "image", "medical", "no", "other", "quality", "finding", "nurse", "nos"} and not _LISTED & {"no", "not", "left", "right", "line", "tube", "new", "stable"}


@pytest.mark.parametrize("hidden", [*map(chr, range(0x200B, 0x2010)), "\ufeff", "\u2060", "\u00ad", "\x00", "\x07", "\x7f", "\x9f", "\u202e", "\u2066", "\u3164", "\U000e0041"])
def test_characters_that_show_nothing_are_no_impression_and_split_no_word(hidden):
    assert impression_section(f"IMPRESSION: {hidden}{hidden} ") is None
    assert impression_section(f"IMP{hidden}RESSION:{hidden} Small ef{hidden}fusion.{hidden}\nNew.") == "Small effusion. New."


def test_combining_marks_alone_are_no_impression_and_letters_keep_theirs():
    assert impression_section("IMPRESSION: \u0301\u0302") is None
    assert impression_section("IMPRESSION: M\u00e9ni\u0300sque.") == "M\u00e9ni\u0300sque."


def cohort(labels, texts):
    "A cohort whose rows have one positive label each."
    rows = pd.DataFrame({c: "" for c in COHORT_COLUMNS if c not in CHEXPERT_LABELS}, index=range(len(labels)))
    rows["study_id"] = rows["patient_id"] = [f"s{i}" for i in range(len(labels))]
    rows["source"] = "Open-i"
    for label in CHEXPERT_LABELS: rows[label] = [1.0 if x == label else np.nan for x in labels]
    return rows[COHORT_COLUMNS], pd.Series(texts)


def test_evaluation_set_is_balanced_distinct_and_single_label():
    labels = ["Edema"] * 8 + ["Fracture"] * 5 + ["Pneumonia"] * 2
    texts = [f"edema {i}" for i in range(8)] + ["break 1", "Break, 1!", "break 2", "break 3", None] + ["a", "b"]
    rows, impressions = cohort(labels, texts)
    rows.loc[0, "Fracture"] = 1
    chosen, classes = text_evaluation_set(rows, impressions, min_reports=3)
    assert chosen.label.value_counts().to_dict() == {"Edema": 3, "Fracture": 3}
    assert "s0" not in set(chosen.study_id) and "s12" not in set(chosen.study_id)
    assert len({"s8", "s9"} & set(chosen.study_id)) == 1
    assert classes.set_index("label").loc[["Edema", "Fracture", "Pneumonia"]].to_numpy().tolist() == [[7, 3], [3, 3], [2, 0]]
    capped, _ = text_evaluation_set(rows, impressions, reports_per_class=2, min_reports=3)
    assert capped.label.value_counts().to_dict() == {"Edema": 2, "Fracture": 2}


def test_uncertain_labels_follow_the_policy():
    rows, _ = cohort(["Edema", "Edema"], ["x", "y"])
    rows.loc[1, "Pneumonia"] = -1
    assert single_label(rows, "uncertain_positive_missing_negative").tolist()[0] == "Edema"
    assert single_label(rows, "uncertain_positive_missing_negative").isna().tolist() == [False, True]
    assert single_label(rows, "uncertain_negative_missing_negative").tolist() == ["Edema", "Edema"]
    assert single_label(rows, "uncertain_unknown_missing_negative").isna().tolist() == [False, True]


def test_cohort_survives_its_file(tmp_path):
    rows = openi_cohort(read_openi()).head(50)
    rows.to_csv(tmp_path / "c.csv", index=False)
    pd.testing.assert_frame_equal(read_cohort(tmp_path / "c.csv"), rows, check_dtype=False)
    rows.drop(columns="Edema").to_csv(tmp_path / "d.csv", index=False)
    with pytest.raises(ValueError, match="d.csv: not a cohort table, column 'Edema' is missing"): read_cohort(tmp_path / "d.csv")


def test_unreadable_sources_and_references_are_named():
    rows, _ = cohort(["Edema"], ["x"])
    with pytest.raises(ValueError, match="no reader for the reports of source 'elsewhere'"): report_texts(rows.assign(source="elsewhere"))
    with pytest.raises(ValueError, match="column 'filename' is missing"): label_agreement(rows, pd.DataFrame({"Edema": [1]}))
    with pytest.raises(ValueError, match="none of their file names"): label_agreement(rows, pd.DataFrame({"filename": ["y"], "Edema": [1]}))


REPORTS_ALONE = "study_id,patient_id,view,Edema,report_path\n"


@pytest.mark.parametrize("rows, message", [
    ("s1,p,AP,1,one.txt\ns1,p,AP,1,one.txt\n", r"t.csv: row 3 repeats row 2 \(study_id s1\)"),
    (",p,AP,1,one.txt\n", "t.csv: row 2: study_id is blank"),
    ("s1,,AP,1,one.txt\n", "t.csv: row 2: patient_id is blank; splits are by patient"),
    ("s1,p,AP,1,../one.txt\n", "t.csv: row 2: path '../one.txt' leads out"),
    ("s1,p,XY,1,one.txt\n", "t.csv: row 2: view 'XY' is none of"),
])
def test_a_folder_of_reports_alone_is_checked_as_one_with_images(tmp_path, rows, message):
    (tmp_path / "t.csv").write_text(REPORTS_ALONE + rows)
    with pytest.raises(ValueError, match=message): read_folder(tmp_path, "Told")


def test_a_folder_without_images_or_reports_is_none(tmp_path):
    (tmp_path / "t.csv").write_text("study_id,patient_id,view,Edema\ns1,p,AP,1\n")
    with pytest.raises(ValueError, match="t.csv: column 'image' is missing"): read_folder(tmp_path, "Told")
    (tmp_path / "t.csv").write_text("patient_id,view,Edema,report_path\np,AP,1,one.txt\n")
    with pytest.raises(ValueError, match="t.csv: column 'study_id' is missing"): read_folder(tmp_path, "Told")
