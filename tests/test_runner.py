"The command `cxr_nb run` and plain papermill: what is refused, and when."
import json

import nbformat
import pytest
from conftest import ROOT

from cxr_nb import core, runner


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
])
def test_nothing_runs_with_parameters_that_do_not_fit(project, monkeypatch, text, arguments, message):
    monkeypatch.chdir(project)
    profile(project, text)
    with pytest.raises(SystemExit) as stop: runner.main(["run", "99_small", "--profile", "tiny", *arguments])
    assert message in stop.value.code and "\n" not in stop.value.code
    assert not (project / "outputs").exists()


def test_unknown_profile_names_those_there_are(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as stop: runner.main(["run", "99_small", "--profile", "dmeo"])
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
