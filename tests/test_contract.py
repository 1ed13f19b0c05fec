"The profile `paper` as it stands, cut to a few images and steps, on small models and data under their real names: it runs to its page, offline."
import json

import paper_world
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def paper(tmp_path_factory, copy_project, run_in):
    "A copy of the project in which the cut profile was run, and the environment that it ran in."
    copy, home = copy_project(tmp_path_factory.mktemp("project")), tmp_path_factory.mktemp("home")
    paper_world.models(home, tmp_path_factory.mktemp("made"))
    paper_world.data(copy / "data")
    (copy / "nbs/profiles/contract.yaml").write_text(paper_world.CUT)
    environment = {"HOME": str(home), "HF_HOME": str(home / "hf"), "TORCH_HOME": str(home / "torch")}
    done = run_in(copy, "cxr_nb", "report", "--profile", "contract", "--cores", 2, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return copy / "outputs/contract", environment


def record(out, notebook): return json.loads((out / f"records/{notebook}.json").read_text())


def test_it_reaches_its_page(paper): assert (paper[0] / "report.html").stat().st_size > 10_000
