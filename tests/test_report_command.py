"The command behind `make report`, on a graph of one small notebook: lines for a person, signals, locks, noise, clear ends."
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import KERNEL

from cxr_nb import graph, processes

SNAKEFILE = """
PROFILE = config["profile"].removesuffix(".yaml")
COMMAND = "{command}"
rule report:
    input: f"outputs/{{PROFILE}}/records/99_small.json"
rule notebook_99_small:
    input: "nbs/99_small.ipynb"
    output: f"outputs/{{PROFILE}}/records/99_small.json", f"outputs/{{PROFILE}}/notebooks/99_small.ipynb"
    message: "notebook 99_small"
    params: parameters=open(f"nbs/profiles/{{PROFILE}}.yaml").read()
    shell: "{{COMMAND:q}} run 99_small --profile {{PROFILE}}"
"""
LOOP = """
import os, time
from functools import partial
from pathlib import Path
for i in range(steps):
    Path("../ticks").write_text(f"{i} {os.getpid()}")
    time.sleep(0.05)
"""
FINISH = """
run.write("measures/steps.txt", lambda p: p.write_text(str(steps)))
if steps == 3: raise ValueError("three is refused")
run.finish(says=['It ran.'], steps=steps);
"""


@pytest.fixture
def project(tmp_path, copy_project):
    "A copy of the project, in a folder with a blank in its name, whose graph is one notebook."
    copy = copy_project(tmp_path / "a project")
    new = nbformat.v4
    sources = ["profile: str = 'tiny'\nsteps: int = 1", "reads, writes = [], ['measures/steps.txt']", "from cxr_nb.core import Run", "run = Run('99_small', globals())", LOOP, FINISH]
    cells = [new.new_markdown_cell("# Small\n> For a test."), *(new.new_code_cell(source) for source in sources)]
    for i, cell in enumerate(cells): cell["id"] = f"cell{i}"
    for cell, tag in zip(cells[1:], ("parameters", "files")): cell["metadata"]["tags"] = [tag]
    nbformat.write(new.new_notebook(cells=cells, metadata=KERNEL), copy / "nbs/99_small.ipynb")
    (copy / "Snakefile").write_text(SNAKEFILE.format(command=Path(sys.executable).parent / "cxr_nb"))
    return copy


def profile(project, steps): (project / "nbs/profiles/tiny.yaml").write_text(f"base: smoke\n99_small:\n  steps: {steps}\n")


def started(project, *before):
    "Start the command, after other words where there are some, and wait until its notebook's kernel is at work."
    profile(project, 1200)
    command = [*before, str(Path(sys.executable).parent / "cxr_nb"), "report", "--profile", "tiny", "--cores", "1"]
    env = os.environ | {"PYTHONPATH": str(project)}
    # whoever runs the tests in the background has them ignore SIGINT, and their children with them
    attend = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=attend)
    wait_for(lambda: (project / "ticks").exists() and " " in (project / "ticks").read_text())
    return running, psutil.Process(running.pid).children(recursive=True)


def wait_for(true, seconds=120):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "waited in vain"
        time.sleep(0.1)


def test_a_line_for_the_beginning_and_the_end_and_where_the_page_lies(project, run_in):
    profile(project, 1)
    done = run_in(project, "cxr_nb", "report", "--profile", "tiny")
    assert done.returncode == 0, done.stderr
    first, second, page = done.stdout.splitlines()
    assert first == "[ 1/1] 99_small begins" and second.startswith("[ 1/1] 99_small ended after ") and page == "the page: outputs/tiny/report.html"
    log = (project / "outputs/tiny/report.log").read_text()
    assert "Job stats" in log and "TCP" not in log and "Unable to parse" not in log
    again = run_in(project, "cxr_nb", "report", "--profile", "tiny")
    assert again.stdout.splitlines() == ["everything is up to date", "the page: outputs/tiny/report.html"]
    # a result that is lost or damaged is made again, though Snakemake does not know of it
    for spoil in (Path.unlink, lambda path: path.write_text("2")):
        spoil(project / "outputs/tiny/measures/steps.txt")
        assert "99_small begins" in run_in(project, "cxr_nb", "report", "--profile", "tiny").stdout
        assert (project / "outputs/tiny/measures/steps.txt").read_text() == "1"


def test_a_failure_is_one_line_and_where_to_look(project, run_in):
    profile(project, 3)
    done = run_in(project, "cxr_nb", "report", "--profile", "tiny")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "cxr_nb: notebook 99_small failed: ValueError: three is refused; see outputs/tiny/failed/99_small.ipynb" in done.stdout
    assert done.stderr.splitlines() == ["what ran is kept, and the same command goes on from there; log: outputs/tiny/report.log"]
    (project / "Snakefile").write_text("rule report:\n    input: 'nowhere'\n")
    done = run_in(project, "cxr_nb", "report", "--profile", "tiny")
    assert done.returncode == 1 and "cxr_nb: report failed: MissingInputException" in done.stderr


def test_any_name_is_a_profile_and_any_number_of_cores_is_one_or_more(project, run_in):
    profile(project, 1)
    (project / "nbs/profiles/tiny.yaml").rename(project / "nbs/profiles/007.yaml")
    done = run_in(project, "cxr_nb", "report", "--profile", "007")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "the page: outputs/007/report.html"
    assert run_in(project, "cxr_nb", "report", "--profile", "007", "--cores", "0").stderr == "cxr_nb: --cores 0: one core at least\n"
    # a record that is damaged is no riddle: its notebook runs again
    (project / "outputs/007/records/99_small.json").write_text("{}")
    assert "99_small begins" in run_in(project, "cxr_nb", "report", "--profile", "007").stdout


UNWRITABLE = {"outputs/tiny": "set CXR_NB_OUTPUTS", "cache": "set XDG_CACHE_HOME", ".snakemake": "in a copy that you may write to"}


@pytest.mark.parametrize("place", UNWRITABLE)
def test_a_folder_that_cannot_be_written_is_one_line(project, run_in, place, monkeypatch):
    # nothing can be made below a file, not even by an administrator, whom no permission stops
    profile(project, 1)
    (project / place).parent.mkdir(exist_ok=True)
    (project / place).write_text("")
    if place == "cache": monkeypatch.setenv("XDG_CACHE_HOME", str(project / place))
    done = run_in(project, "cxr_nb", "report", "--profile", "tiny")
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and line.startswith(f"cxr_nb: {project / place}")
    assert "cannot be written (" in line and UNWRITABLE[place] in line
    if place == "outputs/tiny":
        [line] = run_in(project, "cxr_nb", "run", "99_small", "--profile", "tiny").stderr.splitlines()
        assert line.startswith(f"cxr_nb: {project / place}") and UNWRITABLE[place] in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_children_end_with_the_command(project, number):
    running, children = started(project)
    running.send_signal(number)
    assert not psutil.wait_procs(children, timeout=10)[1]
    output, _ = running.communicate(timeout=10)
    assert running.returncode and "Traceback" not in output
    ticks = (project / "ticks").read_text()
    time.sleep(0.5)
    assert (project / "ticks").read_text() == ticks
    profile(project, 1)
    again = subprocess.run([Path(sys.executable).parent / "cxr_nb", "report", "--profile", "tiny"], cwd=project, env=os.environ | {"PYTHONPATH": str(project)})
    assert again.returncode == 0 and not list(project.glob("outputs/tiny/**/.partial-*"))


def test_children_end_with_a_make_that_is_killed(project):
    shell = "import subprocess, sys, os; subprocess.run(sys.argv[1:], env=os.environ | {'CXR_NB_MAKE': str(os.getpid())})"
    running, children = started(project, sys.executable, "-c", shell)
    running.kill()
    assert not psutil.wait_procs(children, timeout=15)[1]


def test_children_end_with_a_snakemake_that_is_killed(project):
    running, children = started(project)
    snakemake, = (child for child in psutil.Process(running.pid).children())
    snakemake.kill()
    assert not psutil.wait_procs(children, timeout=15)[1]
    assert running.wait(timeout=10) == 1


SUBMIT = """
echo "$1" >> asked
for job; do :; done
nohup sh "$job" > "$(dirname "$0")/job.log" 2>&1 &
echo $!
"""


def stub_cluster(project, asked):
    "A scheduler that notes what a job asks for and begins it at once."
    (project / "stub").mkdir()
    (project / "stub/submit.sh").write_text(SUBMIT)
    (project / "stub/config.yaml").write_text(
        f"executor: cluster-generic\ncluster-generic-submit-cmd: 'sh stub/submit.sh \"{asked}\"'\njobs: 2\nlatency-wait: 20\nseconds-between-status-checks: 1\n")
    return "--cluster", "stub"


def test_a_notebook_is_a_job_of_a_cluster(project, run_in):
    profile(project, 1)
    cluster = stub_cluster(project, "{rule}")
    done = run_in(project, "cxr_nb", "report", "--profile", "tiny", *cluster)
    assert done.returncode == 0, done.stderr + (project / "outputs/tiny/report.log").read_text()
    assert done.stdout.splitlines() == ["[ 1/1] 99_small submitted", "[ 1/1] 99_small ended", "the page: outputs/tiny/report.html"]
    assert (project / "asked").read_text() == "notebook_99_small\n"
    assert "cxr_nb: begins 99_small" in (project / "stub/job.log").read_text()
    profile(project, 3)
    done = run_in(project, "cxr_nb", "report", "--profile", "tiny", *cluster)
    assert done.returncode == 1 and "cxr_nb: notebook 99_small failed; see its failed/99_small.ipynb" in done.stdout
    assert (project / "outputs/tiny/failed/99_small.ipynb").exists()
    [line] = run_in(project, "cxr_nb", "report", "--profile", "tiny", "--cluster", "nowhere").stderr.splitlines()
    assert line == "cxr_nb: --cluster nowhere: has no config.yaml; cluster/slurm is one for SLURM"


def test_the_graph_is_submitted_with_what_its_notebooks_ask_for(tmp_path, copy_project, run_in):
    copy = copy_project(tmp_path / "copy")
    cluster = stub_cluster(copy, "{rule} {threads} {resources.mem_mb} {resources.runtime}")
    others = graph.graph("smoke").notebooks.keys() - graph.APART.values() - {"03_phantoms"}  # which rests on no other
    few = "03_phantoms: {patients: 2, reports_per_label: 1}"
    (copy / "nbs/profiles/one.yaml").write_text(f"base: smoke\nwithout: {json.dumps(sorted(others))}\n{few}\n")
    done = run_in(copy, "cxr_nb", "report", "--profile", "one", *cluster)
    assert done.returncode == 0, done.stderr + (copy / "outputs/one/report.log").read_text()
    assert (copy / "asked").read_text() == "notebook_03_phantoms 8 32000 240\n"
    assert (copy / "outputs/one/images/phantoms/phantoms.csv").exists()
    # SLURM itself is not here: its settings are read, and nothing is submitted
    options = "--config", "profile=paper.yaml", "--profile", "cluster/slurm", "--executor", "dryrun", "notebook_27_unet_finetuning"
    plan = run_in(copy, "snakemake", "--dry-run", *options)
    assert plan.returncode == 0 and "notebook 27_unet_finetuning" in plan.stdout, plan.stderr


def test_a_lock_of_an_owner_out_of_sight_stands(project, run_in):
    profile(project, 1)
    lock = project / "outputs/tiny/.locks/report"
    lock.parent.mkdir(parents=True)
    owner = processes.process_id() | {"doing": "a report", "since": "yesterday"}
    lock.write_text(json.dumps(owner | {"host": "node7"}))
    done = run_in(project, "cxr_nb", "report", "--profile", "tiny")
    assert done.returncode == 1 and "node7" in done.stderr and "delete that file if it has ended" in done.stderr and lock.exists()
    # one that is known to be gone is no hindrance
    lock.write_text(json.dumps(owner | {"pid": 4_000_000}))
    assert run_in(project, "cxr_nb", "report", "--profile", "tiny").returncode == 0 and not lock.exists()
