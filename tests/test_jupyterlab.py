"Notebooks as a person opens them: in JupyterLab, by Run All, on the demo's values."
import json
import shutil

from browser import NOTEBOOK, Browser, in_chromium, jupyter_lab, run_all
from conftest import ROOT

OUTPUTS = f"{NOTEBOOK}.content.widgets.flatMap(cell => cell.model.outputs?.toJSON() ?? [])"
SHOWN = "[...document.querySelectorAll('.jp-OutputArea-output img')].filter(image => image.naturalWidth > 100).length"


def code(path): return [(cell["id"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]


@in_chromium
def test_run_all_in_jupyterlab(copy_project, tmp_path):
    "All cells run, figures are seen, nothing fails, and a notebook that is saved has the code it had."
    root = copy_project(tmp_path / "root")
    shutil.copytree(ROOT / "outputs/demo/records", tmp_path / "outputs/demo/records")
    with jupyter_lab(tmp_path, root, CXR_NB_OUTPUTS=str(tmp_path / "outputs")) as address, Browser(tmp_path / "chromium") as browser:
        for name, figures in {"31_training_details": 0, "tour": 4}.items():
            path = root / f"nbs/{name}.ipynb"
            before = code(path)
            run_all(browser, f"{address}/lab/tree/nbs/{name}.ipynb")
            browser.wait("window.ended", 300)
            assert [output["evalue"] for output in browser.value(OUTPUTS) if output["output_type"] == "error"] == []
            if figures: browser.wait(f"{SHOWN} >= {figures}")
            browser.value(f"{NOTEBOOK}.context.save().then(() => true)")
            assert code(path) == before and any(cell.get("outputs") for cell in json.loads(path.read_text())["cells"])
        assert browser.value("document.querySelectorAll('.jupyter-button').length") == 6  # the panel's scores, and undo
    assert (tmp_path / "outputs/demo/tour/evaluation/evaluation.html").exists()
