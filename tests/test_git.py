"Whether git would track a file: a verdict, or an error where there is none."
import json
import os
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import ROOT

from cxr_nb import commits, core, profiles
from cxr_nb.sources import places_of_others


@pytest.fixture(autouse=True)
def plain_git(monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]: monkeypatch.delenv(name)


def git(folder, *words): subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    "A repository that ignores `out/` but for `out/kept/`."
    folder = tmp_path / "repository"
    (folder / "out/kept").mkdir(parents=True)
    git(tmp_path, "init", "--quiet", "repository")
    (folder / ".gitignore").write_text("/out/*\n!/out/kept/\n")
    return folder


def fake_git(folder, monkeypatch, script):
    "Put a git that is a shell script, or none, before all others."
    folder.mkdir()
    if script:
        (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize("name, tracked", [
    ("a.png", True), ("new/folder/a.png", True), ("out/kept/a.png", True), ("out/kept/deep/a.png", True),
    ("out/a.png", False), ("out/other/deep/a.png", False),
])
def test_the_verdict_is_that_of_git_add(repository, name, tracked):
    assert commits.git_would_track(repository / name) is tracked
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text("x")
    git(repository, "add", "--all")
    listed = subprocess.run(["git", "-C", str(repository), "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert (name in listed) is tracked and commits.git_would_track(repository / name) is tracked


def test_a_file_that_is_tracked_although_it_is_ignored_is_tracked(repository):
    (repository / "out/a.png").write_text("x")
    git(repository, "add", "--force", "out/a.png")
    assert commits.git_would_track(repository / "out/a.png")


@pytest.mark.parametrize("script", [
    None, "echo \"fatal: detected dubious ownership in repository at 'x'\" >&2; echo more >&2; exit 128", "exit 128", "exit 127", "kill -9 $$",
])
def test_no_verdict_is_an_error_inside_a_repository_and_not_asked_for_outside(repository, tmp_path, monkeypatch, script):
    fake_git(tmp_path / "bin", monkeypatch, script)
    for name in ("out/kept/a.png", "out/a.png"):
        with pytest.raises(RuntimeError, match="git does not tell whether it would track this") as refused: commits.git_would_track(repository / name)
        assert "\n" not in str(refused.value) and "CXR_NB_OUTPUTS" in str(refused.value)
    assert not any((folder / ".git").exists() for folder in tmp_path.parents)
    assert commits.git_would_track(tmp_path / "elsewhere/a.png") is False


def test_a_damaged_repository_gives_no_verdict(repository):
    (repository / ".git/HEAD").write_text("damaged")
    with pytest.raises(RuntimeError, match="not a git repository"): commits.git_would_track(repository / "out/a.png")


def test_what_counts_is_where_a_link_leads(repository, tmp_path):
    (tmp_path / "outside").mkdir()
    (repository / "out/link").symlink_to(repository / "out/kept")
    (repository / "away").symlink_to(tmp_path / "outside")
    (tmp_path / "in").symlink_to(repository)
    (tmp_path / "outside/file.png").symlink_to(repository / "out/kept/file.png")
    (repository / "out/kept/lost.png").symlink_to(tmp_path / "outside/lost.png")
    tracked = ["out/link/a.png", "../in/a.png", "../outside/file.png", "out/kept/lost.png", "out/../a.png"]
    assert [commits.git_would_track(repository / name) for name in tracked] == [True] * 5
    assert [commits.git_would_track(repository / name) for name in ("away/a.png", "../in/out/a.png")] == [False] * 2


def test_a_submodule_and_a_worktree_have_rules_of_their_own(repository, tmp_path):
    (repository / "out/inner").mkdir()
    git(repository / "out/inner", "init", "--quiet")
    assert commits.git_would_track(repository / "out/inner/a.png")
    git(repository, "add", ".gitignore")
    git(repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    assert [commits.git_would_track(tmp_path / "tree" / name) for name in ("a.png", "out/a.png")] == [True, False]


def test_another_repository_in_the_environment_hides_nothing(repository, tmp_path, monkeypatch):
    git(tmp_path, "init", "--quiet", "second")
    (tmp_path / "second/.gitignore").write_text("*\n")
    for name, value in {"GIT_DIR": tmp_path / "second/.git", "GIT_CEILING_DIRECTORIES": repository, "GIT_INDEX_FILE": "none"}.items(): monkeypatch.setenv(name, str(value))
    assert [commits.git_would_track(repository / name) for name in ("a.png", "out/a.png")] == [True, False]
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "second/.git/info/exclude").write_text("hidden/\n")
    assert [commits.git_would_track(tmp_path / "home" / name) for name in ("a.png", "hidden/a.png")] == [True, False]
    assert commits.git_would_track(tmp_path / "elsewhere.png") is False


def test_the_commit_is_that_of_the_project_whatever_the_environment_names(repository, monkeypatch):
    before = commits.git_commit()
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert commits.git_commit() == before


def test_every_parameter_of_every_notebook_that_names_a_place_is_asked_whose_it_is(repository, monkeypatch):
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        if path.stem not in profiles.load_profile("demo"): continue
        declared = profiles.declared_parameters(path.stem)
        defaults = profiles.resolve_parameters(path.stem, "demo")
        assert commits.places_beside(defaults) == [], "the demo names nothing but the project's own"
        for name, (kind, _) in declared.items():
            if name == "profile": continue
            for place in ("/data/x", "../x", "tests"):
                holds = {"str": place, "list": [place], "list[str]": [place], "dict[str, str]": {"Mine": place}, "list[dict[str, str]]": [{"Mine": place}]}
                if kind in holds: assert commits.places_beside(defaults | {name: holds[kind]}) == [name]


def test_a_run_that_names_a_model_of_somebody_begins_only_where_git_looks_away(repository, monkeypatch):
    monkeypatch.setenv("CXR_NB_OUTPUTS", str(repository))
    monkeypatch.setattr(core, "run_folder", lambda notebook, parameters: repository / parameters["profile"])
    def begun(profile): return core.Run("22_stable_diffusion", {"__annotations__": {"profile": str, "model": str}, "profile": profile, "model": "/data/sd"})
    assert begun("out").parameters["model"] == "/data/sd"
    with pytest.raises(ValueError, match="model: git tracks outputs/kept"): begun("kept")


@pytest.mark.parametrize("ignored", ["figures/\ntables/\nrecords/\nnotebooks/\n", "*.png\n*.csv\n*.json\n*.ipynb\n"])
def test_whatever_kind_of_result_git_tracks_is_enough(repository, ignored):
    (repository / ".gitignore").write_text(ignored)
    run = SimpleNamespace(folder=repository / "mine", notebook="22", parameters={"profile": "mine"})
    with pytest.raises(ValueError, match="git tracks"): core.Run.refuse_tracked(run, ["model"])


def test_a_git_that_does_not_answer_gives_no_verdict(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "GIT_WAIT", 0.2)
    fake_git(tmp_path / "bin", monkeypatch, "exec sleep 60")
    with pytest.raises(RuntimeError, match="git does not tell"): commits.git_would_track(repository / "a.png")


@pytest.mark.parametrize("script", ["exit 128", None])
def test_credentialed_data_are_refused_before_they_are_read(repository, tmp_path, monkeypatch, script):
    "The guard of 21_datasets, with results in a tracked folder, an ignored one, and one that git gives no verdict on."
    cells = json.loads((ROOT / "nbs/21_datasets.ipynb").read_text())["cells"]
    [guard] = [source for cell in cells if "run.refuse_tracked(" in (source := "".join(cell["source"]))]
    defaults = {name: default for name, (_, default) in profiles.declared_parameters("21_datasets").items()}

    def opened(place, **data):
        run = SimpleNamespace(folder=repository / place, notebook="21_datasets", parameters=defaults | data)
        run.refuse_tracked = partial(core.Run.refuse_tracked, run)
        exec(guard, {"run": run, "places_of_others": places_of_others, **run.parameters})

    for data in ({"chexpert": "x"}, {"mimic_cxr": "x"}):
        opened("out/free", **data)
        with pytest.raises(ValueError, match="which a data use agreement may protect"): opened("out/kept", **data)
    fake_git(tmp_path / "bin", monkeypatch, script)
    for place in ("out/kept", "out/free"):
        opened(place)
        for data in ({"chexpert": "x"}, {"mimic_cxr": "x"}):
            with pytest.raises(RuntimeError, match="git does not tell"): opened(place, **data)


def test_a_record_names_the_commit_of_the_code(repository, monkeypatch):
    "Results are committed after the code they came from: made again at that later commit, they name the same one."
    def committed(name, text):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text)
        git(repository, "add", "--all", "--force")
        git(repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", name)
        return subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(commits, "repo_root", lambda: repository)
    assert commits.git_commit() is None
    code = committed("nbs/profiles/demo.yaml", "a: {}")
    assert commits.git_commit() == code
    committed("outputs/demo/records/a.json", "{}"), committed("README.md", "# A")
    assert commits.git_commit() == code
    for name in ("outputs/demo/records/a.json", "README.md"): (repository / name).write_text("another run")
    (repository / "new.txt").write_text("untracked")
    assert commits.git_commit() == code
    (repository / "nbs/profiles/demo.yaml").write_text("b: {}")
    assert commits.git_commit() == f"{code}-dirty"
    later = committed("nbs/profiles/demo.yaml", "b: {}")
    assert commits.git_commit() == later != code


def test_an_evaluation_of_other_peoples_images_is_not_written_where_git_tracks_it(repository, tmp_path):
    from cxr_nb.evaluation import evaluate
    for name in ("drawn", "real"): (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="git would track this, .* name a folder with --out"):
        evaluate(tmp_path / "drawn", tmp_path / "real", out=repository / "results")
    assert not (repository / "results").exists()
    with pytest.raises((ValueError, FileNotFoundError), match="drawn|real") as where: evaluate(tmp_path / "drawn", tmp_path / "real", out=repository / "out/results")
    assert "git" not in str(where.value)
