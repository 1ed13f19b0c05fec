"Tests beside functions carry the tag `skip-execution`: papermill passes over them, JupyterLab and `nbdev_test` run them."
import ast
import re
import symtable
from functools import cache

import nbformat
import papermill
import pytest
from conftest import KERNEL, cells, python_of
from nbdev import test as nbdev

from cxr_nb.places import source_names
from cxr_nb.profiles import tagged_cells

TAG = "skip-execution"
# their first calls are slow, and are not to be measured
WARMING = "test_close(chexpert_at_k(few, classes)", "test_close(ours, each_pair(first, second)"
NAMES = [name for name in source_names("", ".ipynb") if tagged_cells(name, "files")]


def within(table): return [one for child in table.get_children() for one in (child, *within(child))]


class Cell:
    """A code cell: the names that it gives to those after it, and those that it takes from others.

    What it gives under a condition alone is in `gives` and not in `surely`; what a function of it
    takes is in `later`, too, for a function looks it up when it is called.
    """

    def __init__(self, source, tags=()):
        self.source, self.tags = source, tags
        self.code = ast.parse(python_of(source))
        self.gives, self.surely, self.takes, self.later = set(), set(), set(), set()
        self.surely = self.read(self.code.body, set())

    def read(self, statements, given):
        "Note what statements take that was not given yet; what is given when they are through."
        for statement in statements:
            parts = [getattr(statement, field) for field in ("body", "orelse", "finalbody") if getattr(statement, field, None)]
            parts += [handler.body for handler in getattr(statement, "handlers", [])]
            if isinstance(statement, ast.If | ast.For | ast.While | ast.With | ast.Try):
                heads = [getattr(statement, field) for field in ("test", "iter") if hasattr(statement, field)]
                items = getattr(statement, "items", [])
                heads += [item.context_expr for item in items]
                targets = [statement.target] if hasattr(statement, "target") else [item.optional_vars for item in items if item.optional_vars]
                targets = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
                targets |= {handler.name for handler in getattr(statement, "handlers", []) if handler.name}
                for head in heads: given = given | self.note(ast.unparse(head), given)
                self.gives |= targets
                ends = [self.read(part, given | targets) for part in parts]
                if isinstance(statement, ast.With): given = ends[0]
            else: given = given | self.note(ast.unparse(statement), given, augmented(statement))
        return given

    def note(self, text, given, also=frozenset()):
        table = symtable.symtable(text, "cell", "exec")
        inner = [symbol for one in within(table) for symbol in one.get_symbols() if symbol.is_global()]
        on_the_way = {s.get_name() for s in inner if s.is_assigned()}
        later = {s.get_name() for s in inner if s.is_referenced()} - on_the_way
        gives = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()} | on_the_way
        self.takes |= ({s.get_name() for s in table.get_symbols() if s.is_referenced()} | later | also) - on_the_way - given
        self.later |= later - given
        self.gives |= gives
        return gives

    def calls(self): return {ast.unparse(node.func) for node in ast.walk(self.code) if isinstance(node, ast.Call)}

    def tests(self):
        tested = any(re.match("test_|assert", name.split(".")[-1]) for name in self.calls())
        return tested or any(isinstance(node, ast.Assert) for node in ast.walk(self.code))

    def shows(self):
        "Whether a reader sees a result of it: what it prints, or the value of its last line."
        last = self.code.body[-1]
        return bool({"print", "display"} & self.calls()) or isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call)


def augmented(statement):
    return {node.id for node in ast.walk(statement.target) if isinstance(node, ast.Name)} if isinstance(statement, ast.AugAssign) else set()


@cache  # three tests look at each notebook
def code_cells(name):
    return [Cell(cell["text"], cell["metadata"].get("tags", [])) for cell in cells(name)]


def taken(cells):
    "Cell, name that it takes from others, and one of those that may give it, of cells that all run in their order."
    last = {}
    for i, cell in enumerate(cells):
        for name in cell.takes:
            yield from ((cell, name, giver) for giver in last.get(name, []))
            if name in cell.later: yield from ((cell, name, giver) for giver in cells[i + 1:] if name in giver.gives)
        for name in cell.gives: last[name] = [cell] if name in cell.surely else [*last.get(name, []), cell]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_takes_nothing_from_what_is_passed_over(name):
    "And in JupyterLab, which passes over nothing, its other cells take the same names from the same cells."
    found = [(cell.source, name) for cell, name, giver in taken(code_cells(name)) if TAG in giver.tags and TAG not in cell.tags]
    assert not found


@pytest.mark.parametrize("name", NAMES)
def test_what_only_tests_is_passed_over(name):
    cells = code_cells(name)
    givers = {id(giver) for cell, _, giver in taken(cells) if TAG not in cell.tags}
    for cell in cells:
        if re.match(r"#\| (?!hide)", cell.source) or cell.tags or not cell.tests(): continue
        if name == "D_benchmarks" and any(call in cell.source for call in WARMING): continue
        assert id(cell) in givers or cell.shows(), f"tag it {TAG}:\n{cell.source}"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_passed_over_only_tests(name):
    cells = code_cells(name)
    givers = {id(giver) for cell, _, giver in taken(cells) if TAG in cell.tags}
    for cell in cells:
        if TAG not in cell.tags: continue
        assert cell.tags == [TAG] and not re.match(r"#\| (?!hide)", cell.source), f"nobody would run it:\n{cell.source}"
        assert not {"print", "display"} & cell.calls(), f"it shows what a reader of a run would miss:\n{cell.source}"
        assert cell.tests() or id(cell) in givers, f"it tests nothing:\n{cell.source}"


def test_what_cells_take_from_one_another():
    first, second = Cell("a, b = 1, 2\ndef f(x): return x + c"), Cell("for i in [a]: print(f(b) + i)\nb = b + 1\nb += [d for d in [b] if (e := d)]\ne = e")
    assert (first.gives, first.takes, first.later) == ({"a", "b", "f"}, {"c"}, {"c"})
    assert (second.gives, second.takes) == ({"b", "e", "i"}, {"a", "b", "f", "print"})
    assert [(name, giver) for _, name, giver in taken([first, Cell("b = 3"), second]) if name == "b"][0][1].source == "b = 3"
    assert Cell("x += 1").takes == {"x"} and Cell("if c: x = f(x)").takes == {"c", "x", "f"}
    with_one = Cell("with open(p) as file:\n    y = file\n    z = y")
    assert (with_one.takes, with_one.surely) == ({"open", "p"}, {"file", "y", "z"})
    # an earlier giver stays one where the next gives under a condition, and a function finds what is given after it
    cells = [Cell("x = 1"), Cell("if c: x = 2"), Cell("def g(): return x"), Cell("x = 3")]
    assert [giver.source for _, name, giver in taken(cells) if name == "x"] == ["x = 1", "if c: x = 2", "x = 3"]


@pytest.mark.parametrize("right", [True, False])
def test_who_runs_a_tagged_cell(tmp_path, right):
    code = [nbformat.v4.new_code_cell("a = 1"), nbformat.v4.new_code_cell(f"assert (a == 1) is {right}", metadata={"tags": [TAG]})]
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=KERNEL), tmp_path / "a.ipynb")
    assert nbdev.test_nb(tmp_path / "a.ipynb", showerr=False)[0] is right
    if right: return
    run = papermill.execute_notebook(tmp_path / "a.ipynb", tmp_path / "b.ipynb", kernel_name="python3", progress_bar=False)
    assert [cell.execution_count for cell in run.cells] == [1, None]
