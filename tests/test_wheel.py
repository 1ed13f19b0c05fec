"The package as a wheel brings it: imported and run from a folder that is no checkout."
import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory, copy_project, run_in):
    "A folder with what a wheel of the project holds."
    folder = tmp_path_factory.mktemp("wheel")
    built = run_in(copy_project(folder / "source"), "python", "setup.py", "--quiet", "bdist_wheel", "--compression", "stored", "-d", folder)
    assert built.returncode == 0, built.stderr
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive: archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture
def python(installed, tmp_path):
    "A function that runs Python in an empty folder, with the wheel alone."
    def run(code, *args):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CXR_NB", "GIT_"))} | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, env=env, capture_output=True, text=True)
    return run


COMMAND = "from cxr_nb.command import main; main()"


def test_the_wheel_holds_what_nbs_holds(installed):
    for path in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/profiles").glob("*.yaml")]:
        assert (installed / "cxr_nb/notebooks" / path.relative_to(ROOT / "nbs")).read_bytes() == path.read_bytes()


def test_nothing_of_ones_own_is_packed(tmp_path, copy_project, run_in):
    source = copy_project(tmp_path / "source")
    (source / "nbs/profiles/mine.yaml").write_text("base: public\n")
    (source / "nbs/mine.ipynb").write_text(json.dumps({"cells": [{"outputs": [{"text": "x"}]}]}))
    for command in (["bdist_wheel"], ["sdist"]):
        built = run_in(source, "python", "setup.py", "--quiet", *command, "-d", tmp_path / "made")
        assert built.returncode and "cxr_nb: nbs/mine.ipynb: a notebook with saved outputs" in built.stderr
        assert "cxr_nb: nbs/profiles/mine.yaml: a profile of your own" in built.stderr and not list((tmp_path / "made").glob("*"))


def test_bundled_models_and_profiles_are_found_wherever_the_package_lies(installed, python, tmp_path):
    code = """
import json, re, cxr_nb
from cxr_nb import judges, places, profiles
bundled = set(re.findall("cxr_nb/miniature[^'=]*", str(profiles.load_profile("demo"))))
assert len(bundled) > 5 and all(places.find_path(place).is_dir() for place in bundled)
judge = judges.load_classifier("cxr_nb/miniature/classifiers/judge_a")
print(json.dumps([cxr_nb.__file__, judge.name, places.source_names("profiles", ".yaml"), str(places.outputs_dir("demo"))]))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    profiles = sorted(path.stem for path in (ROOT / "nbs/profiles").glob("*.yaml"))
    assert json.loads(done.stdout.splitlines()[-1]) == [str(installed / "cxr_nb/__init__.py"), "judge_a", profiles, str(tmp_path / "outputs/demo")]


def test_the_command_runs_a_notebook_from_the_wheel(python, tmp_path):
    done = python(COMMAND, "run", "31_training_details", "--profile", "smoke")
    missing = "outputs/smoke/records/25_textual_projection.json is missing; notebook 25_textual_projection makes it"
    assert done.returncode == 1 and f"31_training_details failed: FileNotFoundError: {missing}" in done.stderr
    written = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert [name for name in written if "/.locks/" not in name] == ["outputs/smoke/failed/31_training_details.ipynb"]


def test_a_profile_of_one_s_own_stands_beside_those_of_the_wheel(python, tmp_path):
    (tmp_path / "nbs/profiles").mkdir(parents=True)
    (tmp_path / "nbs/profiles/mine.yaml").write_text("31_training_details: {}\n")
    done = python("from cxr_nb import places, profiles; print(places.source_names('profiles', '.yaml'), profiles.resolve_parameters('31_training_details', 'mine'))")
    assert done.returncode == 0, done.stderr
    assert "'mine'" in done.stdout and "'demo'" in done.stdout


def test_the_readmes_examples_run_with_the_wheel_alone(python):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert examples
    for example in examples:
        *lines, last = example.strip().splitlines()
        value, said = last.split("  # ")
        done = python("\n".join([*lines, f"value = {value}", f"assert value == {said}, value"]))
        assert done.returncode == 0, done.stderr


def test_importing_is_without_side_effects(python, tmp_path):
    "No file, no folder, no network, no word, no setting of the environment or of plots; the package alone loads no library."
    code = """
import os, socket, sys
def refuse(*words): raise AssertionError("the network was asked for")
socket.socket.connect = refuse
before, place = dict(os.environ), os.getcwd()
import cxr_nb
assert not {"torch", "pandas", "numpy", "matplotlib"} & set(sys.modules), "import cxr_nb loads the stack"
import pkgutil, importlib
for module in pkgutil.iter_modules(cxr_nb.__path__): importlib.import_module(f"cxr_nb.{module.name}")
import matplotlib
assert os.getcwd() == place
theirs = ("KMP_", "TORCH")  # which torch and scikit-learn set when they are imported
changed = {k for k, v in os.environ.items() if before.get(k) != v and not k.startswith(theirs)}
print("changed", sorted(changed), matplotlib.rcParams["axes.grid"])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.iterdir()] == [] and done.stdout.splitlines()[-1].startswith("changed []"), done.stdout
    assert len(done.stdout.splitlines()) == 1 and done.stdout.endswith("False\n"), done.stdout
