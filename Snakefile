# The graph of notebooks, as their cells tagged `files` declare it (cxr_nb.graph). papermill runs each with its section
# of a profile; it runs again when the notebook, a module it imports, its section or a file it reads has changed.
# Called by `make report`, `make benchmarks`, `make cost`, `make growth`, `make ablations` and `make tuning`.
import os
import shutil
import sys
from glob import glob
from pathlib import Path

from snakemake.exceptions import WorkflowError

from cxr_nb import graph, places, profiles, report, resources, runner

# with the file's suffix where the name alone would read as a number, as Snakemake reads it
PROFILE = str(config.get("profile", "demo")).removesuffix(".yaml")
OUT = os.path.relpath(places.outputs_dir(PROFILE))
# small models gain little from a second thread; on a GPU notebooks would share its memory
AT_ONCE = 1 if shutil.which("nvidia-smi") else 2
# none is named where jobs are submitted to a cluster
CORES = workflow.resource_settings.cores or 16
try:
    if wrong := report.unfitting(PROFILE): raise ValueError("\n".join(wrong))
    GRAPH = graph.graph(PROFILE)
    PARAMETERS = profiles.resolve_all(PROFILE)
except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
    raise WorkflowError(error.args[-1])

# run by a command of their own, and no part of the report; page and discussion ask for none, but a new one makes them new
APART = {command: name for command, name in graph.APART.items() if name in GRAPH.notebooks}
APART_RECORDS = [Path(f"{OUT}/records/{name}.json") for name in APART.values()]


def edited(name):
    "Files a person edits: named by a parameter, the claims and their rules, the page's template, the miniature."
    files = ["cxr_nb/published/claims.csv"] * (name in ("10_introduction", "40_discussion"))
    files += ["cxr_nb/templates/report.html", "cxr_nb/templates/report.yaml"] * (name == "F_page")
    tables = [PARAMETERS[name].get(key) for key in ("few_shot_choice", "reference_labels")]
    files += [str(places.find_path(table)) for table in tables if table]
    # a model that was made anew reruns what uses it
    files += ["cxr_nb/miniature/made.json"] * ("cxr_nb/miniature" in str(PARAMETERS[name]))
    # what readers gave, where there are any: nobody's answers are waited for
    files += sorted(glob(f"{OUT}/reading/reconstruction_*/results.csv")) if name == "32_autoencoder_results" else []
    return files + ["cxr_nb/miniature/tuning.csv"] * (name[:2] in ("25", "26", "27"))


def products(*names): return [f"{OUT}/{file}" for name in names for file in GRAPH.products(name)]


# all files are asked for, not the records alone: a fresh clone has the committed ones and lacks the rest
rule report:
    input: products(*(name for name in GRAPH.notebooks if name not in APART.values()))

for command, name in APART.items():
    rule:
        name: command
        input: products(name)

# what is trained (models/, training/) is no output: Snakemake would delete it before a job and after a failure
for name, files in GRAPH.notebooks.items():
    rule:
        name: f"notebook_{name}"
        input:
            modules=[f"cxr_nb/{module}.py" for module in runner.imported_modules(name)],
            upstream=[f"{OUT}/{file}" for file in files.reads],
            edited=edited(name),
        output: products(name)
        message: f"notebook {name}"
        params:
            name=name,
            # neither its prose nor outputs that were saved in it change what a notebook computes
            code=runner.code_hash(name),
            parameters=PARAMETERS[name],
            apart=[places.sha256(path) for path in APART_RECORDS if path.exists()] if name in ("40_discussion", "F_page") else [],
            command=Path(sys.executable).parent / "cxr_nb",
        threads: max(1, CORES // AT_ONCE)
        resources: **resources.resources_of(name, PARAMETERS)
        # what takes longest begins first, and all that it waits for
        priority: int(name in ("03_phantoms", "21_datasets", "27_unet_finetuning"))
        shell: "{params.command:q} run {params.name} --profile {PROFILE}"
