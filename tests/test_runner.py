"The command `cxr_nb run` and plain papermill: what is refused, and when."
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import KERNEL
from papermill.cli import _resolve_type

from cxr_nb import core, places, processes, profiles, report, runner, values


@pytest.fixture
def project(tmp_path, copy_project):
    "A copy with a small notebook of its own and a profile for it."
    copy = copy_project(tmp_path)
    new = nbformat.v4
    cells = [new.new_markdown_cell("# Small\n> For a test."),
             new.new_code_cell('profile: str = "tiny"\nk: int = 10\nrate: float = 0.5\nnames: list = ["a"]', metadata={"tags": ["parameters"]}),
             new.new_code_cell("from cxr_nb.core import Run"), new.new_code_cell('run = Run("99_small", globals())'),
             new.new_code_cell('if k > 50: raise ValueError(f"k={k} is too large")\nrun.write("measures/k.txt", lambda p: p.write_text(str(k)))\nrun.finish(says=["It ran."], k=k);')]
    for i, cell in enumerate(cells): cell["id"] = f"cell{i}"
    nbformat.write(new.new_notebook(cells=cells, metadata=KERNEL), copy / "nbs/99_small.ipynb")
    return copy


def profile(project, text): (project / "nbs/profiles/tiny.yaml").write_text(text)


GOOD = "99_small:\n  k: 3\n  rate: 1\n  names: [x, y]\n"


@pytest.mark.parametrize("text, arguments, message", [
    (GOOD + "  kk: 5\n", [], "profile 'tiny', notebook 99_small: unknown parameter 'kk'; it takes profile, k, rate, names"),
    (GOOD.replace("3", "three"), [], "profile 'tiny', notebook 99_small: parameter 'k' takes int, not 'three' (str)"),
    (GOOD.replace("3", "true"), [], "parameter 'k' takes int, not True (bool)"),
    (GOOD.replace("[x, y]", "x"), [], "parameter 'names' takes list of text, not 'x' (str)"),
    (GOOD.replace("99_small", "98_other"), [], "notebook 98_other: no file nbs/98_other.ipynb"),
    ("just text", [], "profile 'tiny': expected one section of parameters per notebook"),
    ("a: [", [], "profile 'tiny': not valid YAML"),
    (GOOD, ["-p", "k", "4.5"], "parameter 'k' takes int, not 4.5 (float)"),
    (GOOD, ["-p", "seed", "1"], "unknown parameter 'seed'"),
    (GOOD, ["-p", "k", "1", "-p", "k", "2"], "parameter 'k' is given twice; keep one"),
])
def test_nothing_runs_with_parameters_that_do_not_fit(project, monkeypatch, text, arguments, message):
    monkeypatch.chdir(project)
    profile(project, text)
    with pytest.raises(SystemExit) as stop: report.main(["run", "99_small", "--profile", "tiny", *arguments])
    assert message in stop.value.code and "\n" not in stop.value.code
    assert not (project / "outputs").exists()


REFUSED = object()
VALUES = [  # as written, the parameter's type, what it is
    ("10", "int", 10), ("010", "int", 10), ("-010", "int", -10), ("+5", "int", 5), ("1_000", "int", 1000), ("0", "int", 0),
    ("1:30", "int", REFUSED), ("1:30", "str", "1:30"), ("0x1F", "int", REFUSED), ("0o17", "int", REFUSED), ("0b11", "int", REFUSED),
    ("1e3", "int", REFUSED), ("4.5", "int", REFUSED), ("08", "int", 8), ("2022-01-01", "str", "2022-01-01"), ("2022-01-01", "int", REFUSED),
    ("1e-4", "float", 0.0001), ("1E5", "float", 1e5), (".5", "float", 0.5), ("5.", "float", 5.0), ("1_0.5", "float", 10.5), ("3", "float", 3),
    ("1:30.5", "float", REFUSED), ("nan", "float", REFUSED), ("inf", "float", REFUSED), ("-inf", "float", REFUSED), ("1e999", "float", REFUSED),
    (".nan", "float", REFUSED), (".inf", "float", REFUSED), ("9" * 400, "float", REFUSED), ("nan", "int", REFUSED),
    ("true", "bool", True), ("False", "bool", False), ("yes", "bool", REFUSED), ("off", "bool", REFUSED), ("1", "bool", REFUSED),
    ("off", "str", "off"), ("on", "str", "on"), ("y", "str", "y"), ("true", "str", REFUSED), ("0.1", "str", REFUSED), ("10", "str", REFUSED),
    ('"0.1"', "str", "0.1"), ("'on'", "str", "on"), ('""', "str", ""), ("~", "str", REFUSED), ("null", "str", REFUSED), ("None", "int", REFUSED),
    ("=", "str", "="), ("[on, 1:30, x]", "list", ["on", "1:30", "x"]), ("[]", "list", []), ('["32", "64"]', "list", ["32", "64"]),
    ("[32, 64]", "list[int]", [32, 64]), ("[1, 1e-4]", "list[float]", [1, 0.0001]), ("[32, x]", "list[int]", REFUSED),
    ("{a: b, c: \"1\"}", "dict[str, str]", {"a": "b", "c": "1"}), ("{a: 1}", "dict[str, str]", REFUSED), ("a=b", "dict[str, str]", REFUSED),
    ("bf16", "Precision", "bf16"), ("fp8", "Precision", REFUSED), ("[32, 64]", "list", REFUSED), ("[a, ~]", "list", REFUSED), ("[[a]]", "list", REFUSED), ("lung", "list", REFUSED),
]


@pytest.mark.parametrize("text, kind, value", VALUES)
def test_a_value_is_the_same_in_a_profile_and_on_the_command_line(text, kind, value):
    for read in (values.read_yaml(f"x: {text}")["x"], values.read_yaml(f"{{x: {text}}}")["x"], values.read_value(text)):
        if value is REFUSED:
            with pytest.raises(TypeError, match="^here: parameter 'x' takes "): profiles.check_parameter("here", "x", read, kind)
        else:
            profiles.check_parameter("here", "x", read, kind)
            assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("text", sorted({text for text, *_ in VALUES}))
def test_the_command_line_hands_over_what_was_written(monkeypatch, text):
    given = []
    monkeypatch.setattr(report, "run_or_exit", lambda notebook, profile, pairs: given.append(runner.read_overrides(pairs)) or "outputs")
    report.main(["run", "99_small", "-p", "x", text])
    taken, read = given[0]["x"], values.read_value(text)
    assert type(taken) is type(read) and (taken == read or math.isnan(taken) and math.isnan(read))


@pytest.mark.parametrize("text", sorted({text for text, *_ in VALUES if text[0] not in "[{\"'~" and text not in ("true", "null")}))
def test_words_and_numbers_are_what_papermill_takes_them_for(text):
    theirs, ours = _resolve_type(text), values.read_value(text)
    assert type(ours) is type(theirs) and (ours == theirs or math.isnan(ours) and math.isnan(theirs))


@pytest.mark.parametrize("text, message", [
    (GOOD + "  k: 5\n", "profile 'tiny': 'k' is there twice, in lines 2 and 5; keep one"),
    (GOOD + "98_other: {1: 1, 1.0: 2}\n", "profile 'tiny': '1.0' is there twice, in lines 5 and 5; keep one"),
    (GOOD + "98_other: {~: 1, null: 2}\n", "profile 'tiny': 'null' is there twice, in lines 5 and 5; keep one"),
    (GOOD + '  "k": 5\n', "profile 'tiny': 'k' is there twice, in lines 2 and 5; keep one"),
    (GOOD + "98_other: {a: 1, b: 2, a: 3}\n", "profile 'tiny': 'a' is there twice, in lines 5 and 5; keep one"),
    (GOOD + "98_other: {}\n" + GOOD, "profile 'tiny': '99_small' is there twice, in lines 1 and 6; keep one"),
    (GOOD.replace("3", "!!python/object/apply:os.getcwd []"), "profile 'tiny': not valid YAML"),
    (GOOD.replace("3", "!!int '010'"), "profile 'tiny': not valid YAML"),
    (GOOD.replace("3", "*base"), "profile 'tiny': not valid YAML"),
    (GOOD.replace("3", "[" * 5000), "profile 'tiny': not valid YAML: too many lists within lists"),
    (GOOD.replace("3", ""), "parameter 'k' takes int, not None"),
    (GOOD + "  profile: demo\n", "'profile' is no parameter to override"),
    (GOOD.replace("3", "\x07"), "profile 'tiny': not valid YAML"),
])
def test_a_profile_that_can_be_read_in_two_ways_is_refused(project, monkeypatch, text, message):
    monkeypatch.chdir(project)
    profile(project, text)
    with pytest.raises(SystemExit) as stop: report.main(["run", "99_small", "--profile", "tiny"])
    assert message in stop.value.code and "\n" not in stop.value.code


def test_sections_may_share_values(project, monkeypatch):
    "A merge key brings in what the section itself may replace: that is no key given twice."
    monkeypatch.chdir(project)
    profile(project, GOOD.replace("99_small:", "00_core: &base {k: 4, rate: 2}\n99_small:\n  <<: *base"))
    assert profiles.load_profile("tiny")["99_small"] == {"k": 3, "rate": 1, "names": ["x", "y"]}


@pytest.mark.parametrize("text", ["effusion: left", "lung #2", "#5", "@x", "*x", "a, b", "- a", "%", "don't", "[CLS", "{a"])
def test_text_on_the_command_line_is_taken_whole_or_refused(text):
    if text in ("[CLS", "{a"):
        with pytest.raises(ValueError): values.read_value(text)
    else: assert values.read_value(text) == text == _resolve_type(text)


def test_unknown_profile_names_those_there_are(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as stop: report.main(["run", "99_small", "--profile", "dmeo"])
    assert stop.value.code == "cxr_nb: profile 'dmeo': no file nbs/profiles/dmeo.yaml; there are demo, paper, public, smoke; did you mean 'demo'?"


@pytest.mark.parametrize("arguments, message", [
    (["99_smal", "--profile", "tiny", "-p", "k", "1", "-p", "kk", "1"], "unknown parameter 'kk'; it takes profile, k, rate, names; did you mean 'k'?"),
    (["99_smlal", "--profile", "tiny"], "notebook 99_smlal: no file nbs/99_smlal.ipynb; 'ls nbs' lists those there are; did you mean"),
    (["99_smlal", "--profile", "tiny"], "; did you mean '99_small'?"),
    (["0", "--profile", "tiny"], "there are 00_commits and 00_core and "),
    (["", "--profile", "tiny"], "notebook : no file nbs/.ipynb; 'ls nbs' lists those there are"),
    (["01_metrics", "--profile", "tiny"], "notebook 01_metrics: the profile has no section 01_metrics; it has 03_phantoms, "),
    (["99", "--profile", "tiny", "-p", "k=5"], "-p k=5: write a name and a value, -p k 5"),
    (["99", "--profile", "tiny", "--parameter", "names=[a b]"], "-p names=[a b]: write a name and a value, -p names '[a b]'"),
    (["-p", "k=5", "99", "--profile", "tiny"], "-p k=5: write a name and a value, -p k 5"),
    (["99", "--profile", "tiny", "-p", "names", "[32, 64]"], "parameter 'names' takes list of text, not [32, 64] (list); quote each: [\"32\", \"64\"]"),
    (["99", "--profile", "tiny", "-p", "names", "32"], "parameter 'names' takes list of text, not 32 (int); put it in brackets: [\"32\"]"),
    (["99", "--profile", "tiny", "-p", "names", "x y"], "parameter 'names' takes list of text, not 'x y' (str); put it in brackets: [\"x y\"]"),
    (["99", "--profile", "tiny", "-p", "rate", "-1e-4", "-p", "k", "-5", "-p", "k", "1"], "parameter 'k' is given twice"),
    (["99", "--profile", "tiny", "-p", "names", "-1e-4"], "takes list of text, not -0.0001 (float)"),
])
def test_a_slip_gets_the_word_that_was_meant(project, monkeypatch, arguments, message):
    monkeypatch.chdir(project)
    profile(project, GOOD)
    with pytest.raises(SystemExit) as stop: report.main(["run", *arguments])
    assert message in stop.value.code and "\n" not in stop.value.code
    assert not (project / "outputs").exists()


@pytest.mark.parametrize("text", ["99_small", "99", "99_s", "99_small.ipynb", "nbs/99_small.ipynb", "./nbs/99_small.ipynb", "/elsewhere/nbs/99_small.ipynb"])
def test_a_notebook_may_be_called_by_its_path_or_its_beginning(project, monkeypatch, text):
    monkeypatch.chdir(project)
    assert profiles.notebook_named(text) == "99_small"


def test_a_whole_name_is_no_beginning(project, monkeypatch):
    monkeypatch.chdir(project)
    (project / "nbs/99_small_again.ipynb").write_text('{"cells": []}')
    assert profiles.notebook_named("99_small") == "99_small"
    with pytest.raises(ValueError, match="^notebook 99: there are 99_small and 99_small_again; write more of the name$"): profiles.notebook_named("99")


def test_run_leaves_output_record_and_executed_notebook(project, run_in):
    profile(project, GOOD)
    done = run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny")
    assert done.returncode == 0 and "cxr_nb:" not in done.stdout, done.stderr
    record = json.loads((project / "outputs/tiny/records/99_small.json").read_text())
    assert record["parameters"] == {"profile": "tiny", "k": 3, "rate": 1, "names": ["x", "y"]}
    assert record["outputs"] == {"measures/k.txt": places.sha256(project / "outputs/tiny/measures/k.txt")}
    assert record["results"] == {"k": 3} and record["versions"]["torch"]
    took = json.loads((project / "outputs/tiny/times/99_small.json").read_text())
    assert took["seconds"] >= 0 and took["peak_memory_mb"]["cpu"] > 10 and took["device"] and not took.keys() & record.keys()
    kept = [project / "outputs/tiny" / name for name in ("records/99_small.json", "notebooks/99_small.ipynb", "measures/k.txt")]
    before = [path.read_bytes() for path in kept]
    assert run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny").returncode == 0
    assert [path.read_bytes() for path in kept] == before, "the same code leaves the same bytes"
    assert str(project) not in (project / "outputs/tiny/notebooks/99_small.ipynb").read_text()
    assert not (project / "outputs/tiny/failed").exists()


@pytest.mark.parametrize("command", [("cxr_nb", "run", "99_small", "--profile", "tiny", "-p", "k", 7), ("papermill", "nbs/99_small.ipynb", "out.ipynb", "--cwd", "nbs", "-p", "k", 7, "-p", "rate", 1, "-y", "names: [x, y]")])
def test_other_parameters_leave_the_profile_s_results_alone(project, run_in, command):
    profile(project, GOOD)
    assert run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny").returncode == 0
    kept = places.sha256(project / "outputs/tiny")
    done = run_in(project, *command)
    assert done.returncode == 0, done.stderr
    folder, = (project / "outputs/tiny/other/99_small").iterdir()
    assert folder.name.startswith("k_7_") and (folder / "measures/k.txt").read_text() == "7"
    assert json.loads((folder / "records/99_small.json").read_text())["parameters"]["k"] == 7
    shutil.rmtree(project / "outputs/tiny/other")
    assert places.sha256(project / "outputs/tiny") == kept


def test_failed_run_says_why_in_one_line_and_keeps_its_notebook(project, run_in):
    profile(project, GOOD)
    assert run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny").returncode == 0
    profile(project, GOOD.replace("k: 3", "k: 70"))
    done = run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny")
    assert done.returncode == 1
    assert "cxr_nb: notebook 99_small failed: ValueError: k=70 is too large; see outputs/tiny/failed/99_small.ipynb" in done.stderr and "Traceback" not in done.stderr
    assert "k=70 is too large" in (project / "outputs/tiny/failed/99_small.ipynb").read_text()
    assert "k=70" not in (project / "outputs/tiny/notebooks/99_small.ipynb").read_text() and not list(project.rglob(".partial-*"))
    profile(project, GOOD)
    assert run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny").returncode == 0
    assert not (project / "outputs/tiny/failed/99_small.ipynb").exists()


def test_a_kernel_that_dies_ends_in_one_line(project, run_in):
    notebook = project / "nbs/99_small.ipynb"
    notebook.write_text(notebook.read_text().replace('run.finish(says=[\\"It ran.\\"], k=k);', "print(6 * 7 * 10**6, flush=True); import os, time; time.sleep(1); os.kill(os.getpid(), 9)"))
    profile(project, GOOD)
    done = run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cxr_nb: notebook 99_small failed: its kernel died, for want of memory or by a signal" in done.stderr
    assert "tiny/failed/99_small.ipynb" in done.stderr and "42000000" in (project / "outputs/tiny/failed/99_small.ipynb").read_text()  # what it had shown


@pytest.mark.parametrize("ending", ["", "; raise ValueError", "; import os; os.kill(os.getpid(), 9)"])
def test_temporary_files_go_with_the_run(project, run_in, tmp_path, ending):
    "Whether it ends well, fails or dies; where they lay, and that they were there, is in a file of its own."
    notebook, temporary, seen = project / "nbs/99_small.ipynb", tmp_path / "temporary", tmp_path / "seen"
    temporary.mkdir()
    written = f"import tempfile; open({str(seen)!r}, 'w').write(tempfile.mkdtemp()){ending}"
    notebook.write_text(notebook.read_text().replace("run.finish(", f"{written}\\nrun.finish("))
    profile(project, GOOD)
    done = run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny", TMPDIR=str(temporary))
    assert (done.returncode == 0) == (not ending), done.stderr
    assert Path(seen.read_text()).is_relative_to(temporary) and not list(temporary.iterdir())


def test_a_second_run_in_the_same_place_waits_for_its_turn(project, run_in):
    profile(project, GOOD)
    with processes.one_writer(project / "outputs/tiny/.locks/report", "a report"):
        done = run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny")
        assert done.returncode == 1 and "cxr_nb: notebook 99_small: a report (process" in done.stderr and "is at work there" in done.stderr
        assert run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny", "-p", "k", 7).returncode == 0
    assert not (project / "outputs/tiny/records").exists()


def test_plain_papermill_gets_the_type_check_in_the_next_cell(project, run_in):
    done = run_in(project, "papermill", "nbs/99_small.ipynb", "out.ipynb", "--cwd", "nbs", "-p", "k", "ten", "-k", "python3")
    assert done.returncode == 1
    assert "TypeError: notebook 99_small: parameter 'k' takes int, not 'ten' (str)" in done.stderr
    executed = nbformat.read(project / "out.ipynb", 4)
    ran = [c for c in executed.cells if c.cell_type == "code" and c.execution_count]
    assert "Run(" in ran[-1].source


def test_plain_papermill_gets_the_names_there_are_for_a_wrong_one(project, run_in, tmp_path):
    "From any working directory, to any output path."
    (tmp_path / "elsewhere/out").mkdir(parents=True)
    words = ["papermill", project / "nbs/99_small.ipynb", "out/a.ipynb", "-k", "python3"]
    done = run_in(tmp_path / "elsewhere", *words, "-p", "kk", "5", PYTHONPATH=str(project))
    assert done.returncode == 1 and "notebook 99_small: unknown parameter 'kk'; it takes profile, k, rate, names; did you mean 'k'?" in done.stderr
    profile(project, GOOD)
    done = run_in(tmp_path / "elsewhere", *words, "-p", "k", "7", PYTHONPATH=str(project))
    assert done.returncode == 0 and (tmp_path / "elsewhere/out/a.ipynb").exists(), done.stderr
    [folder] = (project / "outputs/tiny/other/99_small").iterdir()
    assert (folder / "measures/k.txt").read_text() == "7"


def test_missing_input_names_notebook_and_command(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_NB_OUTPUTS", str(tmp_path))
    run = core.Run("33_text_encoder_results", {"profile": "demo", "__annotations__": {"profile": str}})
    with pytest.raises(FileNotFoundError, match="^outputs/demo/cohorts/sources.json is missing; notebook 21_datasets makes it: cxr_nb run 21_datasets --profile demo, or make report PROFILE=demo for all$"):
        run.need("cohorts/sources.json")


def test_what_a_profile_does_not_give_is_the_notebooks_default(project, monkeypatch):
    monkeypatch.chdir(project)
    profile(project, "99_small:\n  rate: 2\n")
    assert profiles.resolve_parameters("99_small", "tiny") == {"profile": "tiny", "k": 10, "rate": 2, "names": ["a"]}
    assert profiles.resolve_parameters("34_generation_results", "tiny") == profiles.resolve_parameters("34_generation_results", "demo") | {"profile": "tiny"}


def test_a_profile_holds_only_what_differs_from_its_base(project, monkeypatch):
    monkeypatch.chdir(project)
    profile(project, GOOD)
    based = project / "nbs/profiles/mine.yaml"
    based.write_text("base: tiny\nshared:\n  k: 4\n  rate: 0.25\n99_small:\n  rate: 2\n")
    assert profiles.resolve_parameters("99_small", "mine") == {"profile": "mine", "k": 4, "rate": 2, "names": ["x", "y"]}
    assert profiles.resolve_parameters("99_small", "tiny")["k"] == 3


@pytest.mark.parametrize("text, message", [
    ("base: tiny\nshared:\n  kk: 4\n", "profile 'mine': shared: no notebook has a parameter 'kk'"),
    ("base: mine\n", "profile 'mine': is based on itself by mine"),
    ("base: nobody\n", "profile 'nobody': no file nbs/profiles/nobody.yaml"),
    ("base: ../tiny\n", "profile '../tiny': a name has letters, digits, points, dashes and underscores"),
    ("shared:\n  no_findng_prompt: x\n", "shared: no notebook has a parameter 'no_findng_prompt'; did you mean 'no_finding_prompt'?"),
    ("base: tiny\nshared: 3\n", "profile 'mine': expected one section of parameters per notebook"),
])
def test_a_base_that_is_none_is_refused(project, monkeypatch, text, message):
    monkeypatch.chdir(project)
    profile(project, GOOD)
    (project / "nbs/profiles/mine.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as stop: profiles.load_profile("mine")
    assert message in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("changes, message", [
    ({"21_datasets": {"folders": {"Mine": "data/mine"}, "few_shot_source": "Mine"}}, "23_autoencoder reads 'Phantoms' (sources), and 21_datasets names 'Mine'"),
    ({"27_unet_finetuning": {"variants": ["no findings and abnormality"]}}, "10_introduction reads 'no findings and abnormality, with prior' (shown_variants), and 27_unet_finetuning names"),
    ({"28_classification": {"judges": ["x/judge_c"]}}, "35_classification_results reads 'cxr_nb/miniature/classifiers/judge_a' (judge), and 28_classification names 'x/judge_c'"),
    ({"28_classification": {"drawn_by": ["22_stable_diffusion", "29_nothing"]}}, "28_classification reads '29_nothing' (drawn_by), and the report (with images) names '22_stable_diffusion'"),
    ({"24_text_encoder": {"encoders": {"BERT": "models/bert"}}}, "B_text_clusters reads 'Miniature CLIP' (figure_6), and 24_text_encoder names 'BERT'"),
    ({"22_stable_diffusion": {"prompts": ["A chest"]}}, "10_introduction reads 'A photo of a lung xray' (no_finding_prompt), and 22_stable_diffusion names 'A chest'"),
])
def test_a_profile_whose_parts_do_not_fit_is_refused_before_anything_runs(tmp_path, copy_project, monkeypatch, changes, message):
    copy = copy_project(tmp_path)
    (copy / "nbs/profiles/mine.yaml").write_text(json.dumps({"base": "demo"} | changes))
    monkeypatch.chdir(copy)
    assert any(f"profile 'mine': {message}" in line for line in report.unfitting("mine"))
    with pytest.raises(SystemExit) as stop: report.main(["report", "--profile", "mine"])
    assert stop.value.code == 1 and not (copy / "outputs").exists()


@pytest.fixture(scope="module")
def demo(): return profiles.resolve_all("demo")


@pytest.fixture
def unfitting(demo, monkeypatch):
    "What does not fit in the demo with some sections changed, without a file of it."
    def wrong(changes, sections=demo):
        monkeypatch.setattr(report, "resolve_all", lambda profile: {name: section | changes.get(name, {}) for name, section in sections.items()})
        return report.unfitting("mine")
    return wrong


@pytest.mark.parametrize("changes, message", [
    ({"25_textual_projection": {"caption_source": "cohort"}}, "25_textual_projection reads 'cohort' (caption_source), and 21_datasets (laion_400m) names nothing"),
    ({"28_classification": {"extractors": ["inception"]}}, "28_classification reads 'inception' (extractors), and 23_autoencoder names 'efficientnet-lite0'"),
    ({"28_classification": {"source": ""}}, "28_classification reads '' (source), and 21_datasets names 'Phantoms'"),
    ({"28_classification": {"drawn_by": []}}, "28_classification reads '' (drawn_by), and the report (with images) names '22_stable_diffusion'"),
    ({"28_classification": {"drawn_by": ["22_stable_diffusion"]}}, "34_generation_results reads '27_unet_finetuning' (for shown_variants), and 28_classification (drawn_by) names '22_stable_diffusion'"),
    ({"22_stable_diffusion": {"images_per_prompt": 0}}, "28_classification reads '22_stable_diffusion' (drawn_by), and the report (with images) names '25_textual_projection'"),
    ({"25_textual_projection": {"drawn": []}}, "28_classification reads '25_textual_projection' (drawn_by), and the report (with images) names '22_stable_diffusion', '26"),
    ({"32_autoencoder_results": {"judge": ""}}, "32_autoencoder_results reads '' (judge), and 23_autoencoder names"),
    ({"35_classification_results": {"compared": {"U-Net": {"unet": "no findings"}}}}, "35_classification_results reads 'U-Net' (compared), and Table 5 names 'Original Model'"),
    ({"35_classification_results": {"compared": {"U-Net": {"unet": "no findings"}}}}, "35_classification_results reads 'Original Model' (Table 5), and compared names 'U-Net'"),
    ({"35_classification_results": {"compared": {"Textual Inversion": {"gan": "lung"}}}}, "35_classification_results reads 'gan' (compared), and the report names 'original'"),
    ({"35_classification_results": {"compared": {"Original Model": {"original": "SD"}}}}, "35_classification_results reads 'SD' (compared), and 22_stable_diffusion names 'Stable Diffusion'"),
    ({"25_textual_projection": {"drawn": ["no projection"]}}, "35_classification_results reads 'token-level projection' (compared), and 25_textual_projection names 'no projection'"),
    ({"B_text_clusters": {"further": ["RadBERT"]}}, "B_text_clusters reads 'RadBERT' (further), and 24_text_encoder names 'Miniature CLIP'"),
    ({"40_discussion": {"general_encoders": ["RadBERT"]}}, "40_discussion reads 'RadBERT' (general_encoders), and 24_text_encoder names 'Miniature CLIP'"),
    ({"40_discussion": {"stand_ins": {"CLIP": "RadBERT"}}}, "40_discussion reads 'RadBERT' (stand_ins), and 24_text_encoder names 'Miniature CLIP'"),
    ({"40_discussion": {"stand_ins": {"BERT": "Miniature CLIP"}}}, "40_discussion reads 'BERT' (stand_ins), and Table 2 (what 24_text_encoder lacks) names 'PubMedBERT'"),
    ({"21_datasets": {"text_sources": {"MIMIC-CXR": "", "Open-i": ""}}}, "21_datasets reads 'MIMIC-CXR' (text_sources), and 21_datasets (with reports) names 'Open-i', 'Phantoms'"),
])
def test_what_no_notebook_makes_is_named(unfitting, changes, message):
    wrong = unfitting(changes)
    assert any(line.startswith(f"profile 'mine': {message}") for line in wrong) and "\n" not in "".join(wrong)


def test_a_profile_may_leave_a_way_of_drawing_out(unfitting):
    assert unfitting({"28_classification": {"drawn_by": ["27_unet_finetuning"]}, "25_textual_projection": {"drawn": []}}) == []


def test_a_section_that_a_profile_lacks_is_named(unfitting, demo):
    lacking = {name: section for name, section in demo.items() if name != "27_unet_finetuning"}
    assert unfitting({}, lacking) == ["profile 'mine': section 27_unet_finetuning is missing"]


def test_images_of_a_folder_are_named_in_one_place(tmp_path, copy_project, monkeypatch):
    copy = copy_project(tmp_path)
    monkeypatch.chdir(copy)
    shared = {"folders": {"Mine": "data/mine"}, "few_shot_source": "Mine", "sources": ["Mine"], "source": "Mine"}
    (copy / "nbs/profiles/mine.yaml").write_text(json.dumps({"base": "demo", "shared": shared}))
    assert report.unfitting("mine") == []
    assert profiles.resolve_parameters("28_classification", "mine")["source"] == "Mine"


@pytest.mark.parametrize("old, new, message", [
    ("{", "", "notebook 99_small: nbs/99_small.ipynb is no whole notebook (JSONDecodeError("),
    ('"cells"', '"cell"', "notebook 99_small: nbs/99_small.ipynb is no whole notebook (KeyError("),
    ("k: int = 10", "k: int = = 10", "notebook 99_small: its parameters cell, line 2: invalid syntax"),
    ("k: int = 10", "k: int = max(10, 2)", "notebook 99_small: its parameters cell: the value of 'k' is no literal"),
    ("k: int = 10", "k.x: int = 10", "notebook 99_small: its parameters cell holds 'k.x: int = 10'"),
])
def test_a_broken_notebook_is_named(project, monkeypatch, old, new, message):
    monkeypatch.chdir(project)
    profile(project, GOOD)
    path = project / "nbs/99_small.ipynb"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(SystemExit) as stop: report.main(["run", "99_small", "--profile", "tiny"])
    assert message in stop.value.code and "\n" not in stop.value.code


def test_results_lie_where_the_environment_says_seen_from_the_project(project, run_in):
    profile(project, GOOD)
    done = subprocess.run([Path(sys.executable).parent / "cxr_nb", "run", "99_small", "--profile", "tiny"], cwd=project, env=os.environ | {"PYTHONPATH": str(project), "CXR_NB_OUTPUTS": "elsewhere"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (project / "elsewhere/tiny/records/99_small.json").exists() and not (project / "nbs/elsewhere").exists()
