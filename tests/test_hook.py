"The hook of `make hook`: nothing that may show data under an agreement is committed, and the project itself is."
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, tracked
from PIL import Image

from cxr_nb.commit_check import HOOK, install, why_refused


def git(folder, *words): return subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words], capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path, monkeypatch, capsys):
    "One with the project's .gitignore and the hook, whose Python is this one."
    for name in [name for name in os.environ if name.startswith("GIT_")]: monkeypatch.delenv(name)
    folder = tmp_path / "repository"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").write_text(f'#!/bin/sh\nPYTHONPATH="{os.pathsep.join(filter(None, sys.path))}" exec "{sys.executable}" "$@"\n')
    (folder / ".venv/bin/python").chmod(0o755)
    shutil.copy(ROOT / ".gitignore", folder)
    assert git(tmp_path, "init", "--quiet", "repository").returncode == 0
    monkeypatch.chdir(folder)
    install()
    install()  # a second time changes nothing
    assert git(folder, "add", ".gitignore").returncode == git(folder, "commit", "--quiet", "-m", "first").returncode == 0
    return folder


def picture(path): Image.new("L", (9, 9)).save(path, "PNG")


MADE = {
    "outputs/mine/tables/table_1.csv": lambda p: p.write_text("row,column\n"),
    "outputs/demo/cohorts/a.csv": lambda p: p.write_text("a\n"),
    "copied/a.png": picture, "copied/a.txt": picture, "copied/a.parquet": lambda p: p.write_bytes(b"PAR1\x15\0"),
    "nbs/10_introduction.ipynb": lambda p: p.write_text(json.dumps({"cells": [{"outputs": [{"text": "x"}]}]})),
    "nbs/profiles/mine.yaml": lambda p: p.write_text("21_datasets: {mimic_cxr: /data}\n"),
    "outputs/demo/records/a.json": lambda p: p.write_text('{"of": "p10000032/s50414267"}'),
    "outputs/demo/notebooks/a.ipynb": lambda p: p.write_text(json.dumps({"cells": [{"outputs": [{"text": "FINDINGS:\nClear.\nIMPRESSION: Normal."}]}]})),
    "notes.md": lambda p: p.write_text("CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg\n"),
    "nbs/tour.ipynb": lambda p: p.write_text(json.dumps({"cells": [], "metadata": {"widgets": {"state": {"a": 1}}}})),
    "results/report.html": lambda p: p.write_text('<img src="data:image/jpeg;base64,/9j/4AAQ">'),
    "link": lambda p: p.symlink_to("/data/a.png"), "bitmap": lambda p: Image.new("L", (9, 9)).save(p, "BMP"),
    "ids.tsv": lambda p: p.write_text("n\tstudy_id\n1\t2\n"), "copy/patient00001/a.rst": lambda p: p.write_text("Clear.\n"),
    "report.txt": lambda p: p.write_bytes("FINDINGS: a\nIMPRESSION: b".encode("utf-16")),
    "data/notes.txt": lambda p: p.write_text("Clear.\n"),
}


@pytest.mark.parametrize("name", MADE)
def test_what_may_show_data_is_refused(repository, name):
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    MADE[name](repository / name)
    git(repository, "add", "--force", name)
    done = git(repository, "commit", "--quiet", "-m", "by accident")
    assert done.returncode == 1 and f"cxr_nb: '{name}': " in done.stderr and "p10000032" not in done.stderr
    assert git(repository, "log", "--oneline").stdout.count("\n") == 1
    git(repository, "rm", "--cached", "--quiet", name)
    (repository / "code.py").write_text("x = 1\n")
    git(repository, "add", "code.py")
    assert git(repository, "commit", "--quiet", "-m", "code alone").returncode == 0


def test_what_counts_is_what_is_staged(repository):
    (repository / "notes.md").write_text("s50414267\n")
    git(repository, "add", "notes.md")
    (repository / "notes.md").write_text("harmless\n")
    assert git(repository, "commit", "--quiet", "-m", "by accident").returncode == 1
    assert git(repository, "commit", "--quiet", "-m", "all", "--all").returncode == 0
    git(repository, "rm", "--quiet", "notes.md")
    assert git(repository, "commit", "--quiet", "-m", "gone").returncode == 0


def test_without_an_environment_nothing_is_committed(repository):
    shutil.rmtree(repository / ".venv")
    (repository / "code.py").write_text("x = 1\n")
    git(repository, "add", "code.py")
    done = git(repository, "commit", "--quiet", "-m", "code")
    assert done.returncode != 0 and "is not there to look at the files; make env" in done.stderr


def unseen(repository):
    "A branch with a commit that was not looked at."
    git(repository, "switch", "--quiet", "--create", "side")
    (repository / "notes.md").write_text("s50414267\n")
    git(repository, "add", "notes.md")
    assert git(repository, "commit", "--quiet", "--no-verify", "-m", "unseen").returncode == 0
    git(repository, "switch", "--quiet", "-")


def test_a_merge_is_looked_at(repository):
    unseen(repository)
    done = git(repository, "merge", "--no-ff", "--no-edit", "side")
    assert done.returncode != 0 and "'notes.md': ids in the form" in done.stderr
    assert git(repository, "log", "--oneline").stdout.count("\n") == 1


def test_what_no_commit_looked_at_is_not_pushed(repository, tmp_path):
    git(tmp_path, "init", "--quiet", "--bare", "other")
    git(repository, "remote", "add", "other", str(tmp_path / "other"))
    assert git(repository, "push", "--quiet", "other", "HEAD:main").returncode == 0
    unseen(repository)
    assert git(repository, "cherry-pick", "side").returncode == 0
    (repository / "notes.md").write_text("harmless\n")
    assert git(repository, "commit", "--quiet", "--all", "-m", "the last state is harmless, the history is not").returncode == 0
    done = git(repository, "push", "other", "HEAD:main")
    assert done.returncode != 0 and "cxr_nb: 'notes.md': ids in the form" in done.stderr and "not pushed" in done.stderr
    assert git(repository, "push", "--quiet", "other", ":main").returncode == 0, "a branch may be removed"


def test_a_hook_of_somebody_else_stays(repository):
    path = repository / ".git/hooks/pre-commit"
    path.write_text("#!/bin/sh\n")
    with pytest.raises(SystemExit, match="is another hook; add to it: python="): install()
    assert path.read_text() == "#!/bin/sh\n" != HOOK


def test_the_project_itself_passes():
    refused = {path.name: why for path in tracked() if (why := why_refused(path.relative_to(ROOT).as_posix(), path.read_bytes()))}
    assert refused == {}
