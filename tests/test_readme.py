"The README is two screens, its links lead somewhere, and what README, guide and first hour tell to type is taken."
import json
import re
import shlex

import mistune
import pytest
import yaml
from browser import Browser, in_chromium
from conftest import ROOT

from cxr_nb import profiles
from cxr_nb.check import model_need
from cxr_nb.evaluation import evaluate_parser

README = (ROOT / "README.md").read_text()
CELLS = {name: json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"] for name in ("first_hour", "guide", "index", "results", "tour", "J_bad_days")}
PROSE = {name: "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown") for name, cells in CELLS.items()}

# GitHub's: the column of a README beside the sidebar, in a window of 1,280 pixels
STYLE = """body > :first-child { margin-top: 0 !important } body > :last-child { margin-bottom: 0 !important } body { width: 830px; margin: 0; font: 16px/1.5 Arial, sans-serif } h1, h2 { margin: 24px 0 16px; padding-bottom: 5px; line-height: 1.25; border-bottom: 1px solid }
p, ul, table, pre, blockquote { margin: 0 0 16px } td, th { padding: 6px 13px; border: 1px solid } table { border-collapse: collapse }
li + li { margin-top: 4px } ul { padding-left: 32px } pre { padding: 16px; font: 13.6px/1.45 monospace; overflow: auto } blockquote { padding: 0 16px }"""


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 100 and README.count("<img ") + README.count("![") == 1 and len(re.findall(r"^\| ---", README, flags=re.M)) == 1


@in_chromium
def test_the_readme_fits_two_screens(tmp_path):
    page = mistune.create_markdown(escape=False, plugins=["table"])(README).replace('src="', f'src="{ROOT.as_uri()}/')
    (tmp_path / "readme.html").write_text(f'<meta charset="utf-8"><style>{STYLE}</style>{page}')
    with Browser(tmp_path / "chromium") as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
        browser.open((tmp_path / "readme.html").as_uri())
        browser.picture(tmp_path / "readme.png")
        assert browser.value("document.images[0].naturalWidth > 300 && document.querySelectorAll('table').length == 1")
        assert browser.value("document.documentElement.scrollHeight") <= 2 * 800


@pytest.mark.parametrize("name", ["README", *PROSE])
def test_links_lead_somewhere(name):
    text, folder = (README, ROOT) if name == "README" else (PROSE[name], ROOT / "nbs")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, heading = link.partition("#")
        assert (folder / file).exists(), link
        headings = PROSE.get((folder / file).stem if file else name, "")
        assert not heading or re.search(rf"^#+ {re.escape(heading.replace('-', ' '))}$", headings, flags=re.M), link


TYPED = README, PROSE["guide"], PROSE["first_hour"]
BLOCKS = [(kind, block) for text in TYPED for kind, block in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.S)]


def test_commands_are_taken():
    "Targets of make are there, and the command's words fit notebooks, parameters and options."
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    lines = [line.split(" #")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    lines += [line for text in TYPED for line in re.findall(r"`((?:make|\.venv/bin/\w+|cxr_nb) [^`]+)`", text)]
    known = [line for line in lines if check(shlex.split(line), targets)]
    assert len(known) > 12


def check(words, targets):
    tool, words = words[0].removeprefix(".venv/bin/"), words[1:]
    if tool == "make": assert words[0] in targets
    elif tool == "papermill" or (tool == "cxr_nb" and words[0] == "run"):
        notebook, rest = profiles.notebook_named(words[0] if tool == "papermill" else words[1]), words[2:]
        declared = profiles.declared_parameters(notebook)
        assert {rest[i + 1] for i, word in enumerate(rest) if word == "-p"} <= set(declared)
    elif tool == "cxr_nb" and words[0] == "evaluate" and words[1:]: evaluate_parser().parse_args(words[1:])
    else: return False
    return True


def test_profiles_that_are_shown_can_be_read(tmp_path, copy_project, monkeypatch):
    copy = copy_project(tmp_path)
    monkeypatch.chdir(copy)
    blocks = [block for kind, block in BLOCKS if kind == "yaml"]
    assert len(blocks) >= 3 and all(isinstance(yaml.safe_load(block), dict) for block in blocks)
    for block in blocks:
        (copy / "nbs/profiles/mine.yaml").write_text(block)
        profiles.resolve_all("mine")


def test_code_that_is_shown_is_code():
    for kind, block in BLOCKS:
        if kind == "python": compile(block, "example", "exec")


def test_the_example_of_the_readme_gives_what_it_says():
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    *lines, last = example.strip().split("\n")
    exec("\n".join(lines), names := {})
    value, said = last.split("  # ")
    assert eval(value, names) == json.loads(said)


def test_the_first_hour_fetches_what_the_check_asks_for(monkeypatch):
    monkeypatch.setattr("cxr_nb.check.cached_snapshot", lambda location, revision: None)
    need = model_need("Stable Diffusion", profiles.resolve_parameters("22_stable_diffusion", "public")["stable_diffusion"])
    assert f"```sh\n{need.todo}\n```" in PROSE["first_hour"]
    assert not re.search(r"(?<!\.venv/bin/)\bhf (download|auth)", "".join(TYPED))
