"The container's recipe: it copies what there is, has a Python that the lock is for, and takes no data and no results of others in."
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPE = (ROOT / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()


def test_it_copies_what_is_there():
    for line in re.findall(r"^COPY (.+)$", RECIPE, re.M):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line


def test_its_python_is_one_that_the_lock_is_for():
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    low, high = (tuple(map(int, settings["DEFAULT"][key].split("."))) for key in ("min_python", "max_python"))
    assert low <= tuple(map(int, re.search(r"FROM python:(\d+)\.(\d+)", RECIPE).groups())) <= high


def test_no_data_and_no_results_but_the_demos_enter_the_image():
    assert {"data", "models", "outputs/*", "!outputs/demo"} <= set(IGNORED)
    assert IGNORED.index("outputs/*") < IGNORED.index("!outputs/demo")


def docker_answers(): return shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


@pytest.mark.skipif(not docker_answers(), reason="no docker at work here: the recipe is read and not built")
def test_it_builds_and_answers():
    subprocess.run(["docker", "build", "-q", "-t", "cxr_nb_test", "."], cwd=ROOT, check=True)
    done = subprocess.run(["docker", "run", "--rm", "cxr_nb_test", "make", "check"], capture_output=True, text=True, check=True)
    assert "profile demo: " in done.stdout
