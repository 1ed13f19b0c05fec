"The project's own rules: how notebooks read, what imports what, what may be committed."
import ast
import json
import re
from configparser import ConfigParser
from importlib import metadata
from statistics import median
from typing import get_args

import autopep8
import pandas as pd
import pytest
from conftest import ROOT, cells, python_of, tracked
from packaging.requirements import Requirement

from cxr_nb import graph, places, profiles, runner
from cxr_nb.cohorts import LABEL_POLICIES
from cxr_nb.impressions import impression_section
from cxr_nb.openi import read_openi
from cxr_nb.stable_diffusion import SCHEDULERS
from cxr_nb.training import SCHEDULES

NOTEBOOKS = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))
PROFILES = sorted(p.stem for p in (ROOT / "nbs/profiles").glob("*.yaml"))
RECORDS = sorted((ROOT / "outputs/demo/records").glob("*.json"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_reads_as_agreed(name):
    assert re.match(r"# \S.*\n> \S", cells(name, "markdown")[0]["text"]), "a title and a line that says what it is about"
    profiles.declared_parameters(name)
    assert not any(c["outputs"] or c["execution_count"] for c in cells(name)), "results belong to outputs/"


def lines_of(cell): return sum(bool(line.strip()) and not line.startswith("#|") for line in cell["text"].split("\n"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_are_small(name):
    lengths = [lines_of(cell) for cell in cells(name)]
    assert median(lengths) <= 6 and max(lengths) <= 40


# blank lines and one-line statements are the author's, and so is where a long line is broken
LEFT_ALONE = ["E12", "E131", "E203", "E226", "E24", "E265", "E266", "E3", "E402", "E501", "E7", "W5", "W6"]


LONG_LINES = {"F_page", "index", "results"}  # sentences and tables of the page and the README


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_are_formatted(name):
    for cell in cells(name):
        longest = max(cell["text"].split("\n"), key=len)
        assert len(longest) <= 120 or name in LONG_LINES, f"break the line: {longest}"
        if re.search(r"^[%!]", cell["text"], flags=re.M): continue
        formatted = autopep8.fix_code(cell["text"] + "\n", options={"max_line_length": 120, "ignore": LEFT_ALONE})
        assert formatted.rstrip("\n") == cell["text"], "autopep8 writes it otherwise"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_an_export_cell_holds_one_definition(name):
    for cell in cells(name):
        if not cell["text"].startswith("#| export"): continue
        kinds = [node for node in ast.parse(cell["text"]).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(kinds) < 2, cell["text"]


@pytest.mark.parametrize("path", sorted((ROOT / "cxr_nb").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_module_is_one_room(path): assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", sorted((ROOT / "cxr_nb").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_module_uses_what_it_imports(path):
    "What only examples and the report need is imported by a cell of theirs."
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    names = {(alias.asname or alias.name).split(".")[0] for alias in imports if alias.name not in OF_A_PACKAGE}
    assert not names - {node.id for node in nodes if isinstance(node, ast.Name)}


OF_A_PACKAGE = {"pyarrow.csv", "pyarrow.parquet"}  # parts of `pa`, which has them once they are imported


def test_files_are_declared_once():
    "In a cell of each notebook of the report, and nowhere else."
    declaring = {name for name in NOTEBOOKS for cell in cells(name) if "files" in cell["metadata"].get("tags", [])}
    assert declaring == set(graph.graph("demo").declared)
    assert len((ROOT / "Snakefile").read_text().splitlines()) <= 90
    for name in NOTEBOOKS:
        for cell in cells(name):
            for call in ast.walk(ast.parse(python_of(cell["text"]))):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "need":
                    assert len(call.args) == 1, f"{name}: the graph knows who makes it: {ast.unparse(call)}"


@pytest.mark.parametrize("name", sorted(graph.graph("demo").declared))
def test_a_notebook_of_the_report_says_in_words_what_it_computed(name):
    "Once, in one of its last two cells: the other may show how many reports an encoder cuts."
    last = [python_of(cell["text"]) for cell in cells(name)]
    calls = [(len(last) - i, {keyword.arg for keyword in node.keywords}) for i, text in enumerate(last) for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.finish"]
    [(from_the_end, keywords)] = calls
    assert from_the_end <= 2 and {"says", None} & keywords, "run.finish(says=[…], …)"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_imports_stand_in_cells_of_their_own(name):
    for cell in cells(name):
        tree = ast.parse(python_of(cell["text"]))
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body}
        assert len(kinds) < 2, cell["text"]


ROOMS_BELOW = ["places", "commits", "values", "profiles", "tables", "graph", "core"]  # all of number 00, from the lowest up


def test_imports_flow_downward():
    module_of = {n: m[1] for n in NOTEBOOKS for c in cells(n) if (m := re.match(r"#\| default_exp (\w+)", c["text"]))}
    level = {module: (name.split("_")[0], ROOMS_BELOW.index(module) if name[:2] == "00" else 0) for name, module in module_of.items()}
    for name in NOTEBOOKS:
        prefix = name.split("_")[0]
        if not prefix.isdigit(): continue
        above = level.get(module_of.get(name), (prefix, 0))
        for module in runner.imported_modules(name):
            assert level[module][0].isdigit() and level[module] < above, f"{name} imports {module} of {level[module][0]}"


def calls_of_from_pretrained(module):
    "Calls in a module of the package, and their lines; a from_pretrained that is handed on uncalled is one, too."
    tree = ast.parse((ROOT / f"cxr_nb/{module}.py").read_text())
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"]
    return [(node.lineno, called.get(id(node))) for node in named]


def test_no_code_of_a_checkpoint_is_run():
    "Wherever a library might ask whether it may run code that comes with a model, it is told that it may not."
    calls = {f"{path.stem}, line {line}": call for path in sorted((ROOT / "cxr_nb").glob("*.py")) for line, call in calls_of_from_pretrained(path.stem)}
    assert {name.split(",")[0] for name in calls} >= {"checkpoints", "miniature"}
    for name, call in calls.items():
        options = {k.arg: ast.unparse(k.value) for k in call.keywords} if call else {}
        assert options.get("trust_remote_code") == "False", f"{name}: pass trust_remote_code=False"


def test_a_choice_is_what_the_code_knows():
    assert get_args(profiles.Schedule) == (*SCHEDULES,)
    assert get_args(profiles.Sampler) == ("", *SCHEDULERS)
    assert get_args(profiles.LabelPolicy) == (*LABEL_POLICIES,)


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_fit_the_notebooks(profile):
    for notebook in profiles.load_profile(profile): profiles.resolve_parameters(notebook, profile)
    assert profiles.load_profile(profile).keys() == profiles.load_profile("demo").keys()


def test_a_parameter_has_one_type():
    kinds = {}
    for notebook in NOTEBOOKS:
        for name, (kind, _) in profiles.declared_parameters(notebook).items(): kinds.setdefault(name, set()).add(kind)
    # a variant of textual inversion is made of words; all others are known by a name
    assert {n: k for n, k in kinds.items() if len(k) > 1} == {"variants": {"list[str]", "list[Inversion]"}}


def test_run_all_in_jupyter_is_the_demo():
    for notebook, section in profiles.load_profile("demo").items():
        defaults = {name: value for name, (_, value) in profiles.declared_parameters(notebook).items()}
        assert defaults == section | {"profile": "demo"}


def test_clean_and_in_sync(tmp_path, copy_project, run_in):
    copy = copy_project(tmp_path)
    for command in ("nbdev_export", "nbdev_clean"):
        done = run_in(copy, command)
        assert done.returncode == 0, done.stderr
    for path in tracked("nbs", "cxr_nb", "settings.ini", "setup.py"):
        assert (copy / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), f"run make prepare: {path.relative_to(ROOT)} differs"


def test_readme_is_the_index(tmp_path, copy_project, run_in):
    copy = copy_project(tmp_path)
    for path in tracked("outputs/demo"):
        (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    before = (copy / "README.md").read_text()
    done = run_in(copy, "python", "-m", "nbconvert", *README_COMMAND.split())
    assert done.returncode == 0, done.stderr
    assert re.sub(r"""([("])\.\./""", r"\1", done.stdout) == before, "README.md is not what make readme makes of nbs/index.ipynb"


README_COMMAND = "--execute --to markdown --no-input --log-level WARN --stdout nbs/index.ipynb"


def test_lock_holds_what_settings_ask_for():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini")
    lock = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^([\w.-]+)==([^ ;\\]+)", lock, flags=re.M)
    for line in (parser["DEFAULT"]["requirements"] + parser["DEFAULT"]["dev_requirements"]).split("\n"):
        if not line: continue
        need = Requirement(line)
        result = [version for name, version in pins if name.lower().replace("_", "-") == need.name.lower().replace("_", "-")]
        assert result and all(need.specifier.contains(v) for v in result), f"run make lock: {line} but {result}"
    blocks = re.split(r"^(?=[\w.-]+==)", lock, flags=re.M)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
    assert not re.search(r"://", re.sub(r"#.*", "", lock)), "a lock names no host"
    assert metadata.metadata("cxr_nb")["Requires-Python"].replace(" ", "") in (">=3.11,<3.14", "<3.14,>=3.11")


def test_only_the_demo_is_committed():
    kept = tracked("outputs")
    assert all(path.relative_to(ROOT).parts[1] == "demo" for path in kept)
    assert {path.relative_to(ROOT).parts[2] for path in kept} <= {"tables", "figures", "records", "notebooks", "report.html"}
    assert sum(path.stat().st_size for path in kept) <= 12e6


def test_committed_results_are_one_clean_run_of_the_demo():
    records = {path.stem: json.loads(path.read_text()) for path in RECORDS}
    assert records
    for path, record in zip(RECORDS, records.values()):
        given, resolved = record["parameters"], profiles.resolve_parameters(record["notebook"], "demo")
        assert given == resolved
        if record["notebook"] != "D_benchmarks":  # whose results are times
            assert not {"seconds", "device", "peak_memory_mb"} & record.keys(), f"{path.name} holds what is another at every run"
        # what is measured apart is made anew seldom; the page names a record of it that lacks sentences
        assert record.get("says") or path.stem in graph.APART.values(), f"{path.name} holds no sentence"
        assert re.fullmatch(r"[0-9a-f]{40}", record["commit"]), f"{path.name} was made from uncommitted code: {record['commit']}"
        assert (ROOT / f"outputs/demo/notebooks/{record['notebook']}.ipynb").exists()
        for name, digest in record["outputs"].items():
            if name.split("/")[0] in ("tables", "figures"): assert places.sha256(ROOT / "outputs/demo" / name) == digest, name
    # what is measured apart has its own commit, and the page, which is made anew with it, shows the very files that are committed
    apart = {"D_benchmarks", "D_cost", "D_growth", "E_ablations", "E_tuning", "F_page"}
    assert len({r["commit"] for name, r in records.items() if name not in apart}) == 1, "the committed results come from several commits"
    read = records["F_page"]["inputs"]
    for name, digest in read.items(): assert places.sha256(ROOT / "outputs/demo" / name) == digest, f"the page shows another {name}"
    assert {f"records/{name}.json" for name in records if name != "F_page"} <= set(read)


@pytest.mark.parametrize("path", sorted((ROOT / "outputs/demo/tables").glob("*.csv")), ids=lambda path: path.stem)
def test_no_committed_interval_has_no_width(path):
    table = pd.read_csv(path)
    if "ci_low" not in table: return
    sure = table[table.ci_high - table.ci_low <= 1e-12]
    assert sure.empty, f"{path.name}: measured, and as sure as if it were counted:\n{sure.to_string()}"


def test_committed_results_hold_no_report_text_and_no_local_path():
    impressions = {t for t in read_openi().report.map(impression_section).dropna() if len(t) > 60}
    for path in tracked("outputs", "README.md", "nbs", "cxr_nb", "tests"):
        if path.suffix in (".png", ".webp", ".safetensors"): continue
        text = path.read_text()
        assert not any(t in text for t in impressions), f"{path.name} holds report text"
        assert str(ROOT) not in text and "site" "-packages" not in text, f"{path.name} names a path of this machine"
