"The command `cxr_nb run` and plain papermill: what is refused, and when."
import json
import math

import nbformat
import pytest
from papermill.cli import _resolve_type

from cxr_nb import core, report


@pytest.fixture
def project(tmp_path, copy_project):
    "A copy with a small notebook of its own and a profile for it."
    copy = copy_project(tmp_path)
    new = nbformat.v4
    cells = [new.new_markdown_cell("# Small\n> For a test."),
             new.new_code_cell('profile: str = "tiny"\nk: int = 10\nrate: float = 0.5\nnames: list = ["a"]', metadata={"tags": ["parameters"]}),
             new.new_code_cell("from cxr_nb.core import Run"), new.new_code_cell('run = Run("99_small", globals())'),
             new.new_code_cell('if k > 50: raise ValueError(f"k={k} is too large")\nrun.write("measures/k.txt", lambda p: p.write_text(str(k)))\nrun.finish(k=k);')]
    for i, cell in enumerate(cells): cell["id"] = f"cell{i}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new.new_notebook(cells=cells, metadata=kernel), copy / "nbs/99_small.ipynb")
    return copy


def profile(project, text): (project / "nbs/profiles/tiny.yaml").write_text(text)


GOOD = "99_small:\n  k: 3\n  rate: 1\n  names: [x, y]\n"


@pytest.mark.parametrize("text, arguments, message", [
    (GOOD + "  kk: 5\n", [], "profile 'tiny', notebook 99_small: unknown parameter 'kk'; it takes profile, k, rate, names"),
    (GOOD.replace("  k: 3\n", ""), [], "profile 'tiny', notebook 99_small: missing parameter 'k' (int)"),
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
    ("[32, 64]", "list", REFUSED), ("[a, ~]", "list", REFUSED), ("[[a]]", "list", REFUSED), ("lung", "list", REFUSED),
]


@pytest.mark.parametrize("text, kind, value", VALUES)
def test_a_value_is_the_same_in_a_profile_and_on_the_command_line(text, kind, value):
    for read in (core.read_yaml(f"x: {text}")["x"], core.read_yaml(f"{{x: {text}}}")["x"], core.read_value(text)):
        if value is REFUSED:
            with pytest.raises(TypeError, match="^here: parameter 'x' takes "): core.check_parameter("here", "x", read, kind)
        else:
            core.check_parameter("here", "x", read, kind)
            assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("text", sorted({text for text, *_ in VALUES if text[0] not in "[\"'~" and text not in ("true", "null")}))
def test_words_and_numbers_are_what_papermill_takes_them_for(text):
    theirs, ours = _resolve_type(text), core.read_value(text)
    assert type(ours) is type(theirs) and (ours == theirs or math.isnan(ours) and math.isnan(theirs))


@pytest.mark.parametrize("text, message", [
    (GOOD + "  k: 5\n", "profile 'tiny': 'k' is there twice, in lines 2 and 5; keep one"),
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
    assert core.load_profile("tiny")["99_small"] == {"k": 3, "rate": 1, "names": ["x", "y"]}


@pytest.mark.parametrize("text", ["effusion: left", "lung #2", "#5", "@x", "*x", "{a", "a, b", "- a", "%", "don't", "[CLS"])
def test_text_on_the_command_line_is_taken_whole_or_refused(text):
    if text == "[CLS":
        with pytest.raises(ValueError): core.read_value(text)
    else: assert core.read_value(text) == text == _resolve_type(text)


def test_unknown_profile_names_those_there_are(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as stop: report.main(["run", "99_small", "--profile", "dmeo"])
    assert stop.value.code == "cxr_nb: profile 'dmeo': no file nbs/profiles/dmeo.yaml; there are demo, paper, public, smoke"


def test_run_leaves_output_record_and_executed_notebook(project, run_in):
    profile(project, GOOD)
    done = run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny", "-p", "k", 7)
    assert done.returncode == 0, done.stderr
    record = json.loads((project / "outputs/tiny/records/99_small.json").read_text())
    assert record["parameters"] == {"profile": "tiny", "k": 7, "rate": 1, "names": ["x", "y"]}
    assert record["outputs"] == {"measures/k.txt": core.sha256(project / "outputs/tiny/measures/k.txt")}
    assert record["results"] == {"k": 7} and record["seconds"] >= 0 and record["versions"]["torch"]
    assert str(project) not in (project / "outputs/tiny/notebooks/99_small.ipynb").read_text()


def test_failed_run_says_why_in_one_line_and_keeps_its_notebook(project, run_in):
    profile(project, GOOD)
    done = run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny", "-p", "k", 70)
    assert done.returncode == 1
    assert "cxr_nb: notebook 99_small failed: ValueError: k=70 is too large" in done.stderr and "Traceback" not in done.stderr
    assert "k=70 is too large" in (project / "outputs/tiny/notebooks/99_small.ipynb").read_text()
    assert not (project / "outputs/tiny/measures").exists() and not (project / "outputs/tiny/records").exists()


def test_plain_papermill_gets_the_type_check_in_the_next_cell(project, run_in):
    done = run_in(project, "papermill", "nbs/99_small.ipynb", "out.ipynb", "--cwd", "nbs", "-p", "k", "ten", "-k", "python3")
    assert done.returncode == 1
    assert "TypeError: notebook 99_small: parameter 'k' takes int, not 'ten' (str)" in done.stderr
    executed = nbformat.read(project / "out.ipynb", 4)
    ran = [c for c in executed.cells if c.cell_type == "code" and c.execution_count]
    assert "Run(" in ran[-1].source


def test_missing_input_names_notebook_and_command(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_NB_OUTPUTS", str(tmp_path))
    run = core.Run("33_text_encoder_results", {"profile": "demo", "__annotations__": {"profile": str}})
    with pytest.raises(FileNotFoundError, match="^outputs/demo/cohorts/x.csv is missing; notebook 21_datasets makes it: cxr_nb run 21_datasets --profile demo$"):
        run.need("cohorts/x.csv", "21_datasets")
