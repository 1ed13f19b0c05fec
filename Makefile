# One command each, from a fresh clone: `make report`, `make test`, `make lab`. `make help` lists the rest.
# it reaches a shell by the environment alone, and is a name there whatever it holds
export PROFILE ?= demo
# The first Python on the path that the lock was resolved for.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
CORES ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# nothing of the user's own Python reaches the environment, and results do not depend on the hash seed
export PYTHONNOUSERSITE := 1
export PYTHONHASHSEED := 0

# an environment that was taken away in part is made again
$(shell test -x $(BIN)/python && test -x $(BIN)/cxr_nb || rm -f $(READY))

.DEFAULT_GOAL := help
.PHONY: help env report pdf miniature test lab hook benchmarks cost growth ablations tuning check clear prepare readme lock clean clean-results

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

env: $(READY)  ## make the environment from the lock (done by itself where needed)

# uv takes a tenth of pip's time; it comes from the lock as well, and reads the index that pip was told of.
# Bytecode is made once: where Python is told to write none, as in many containers, each process would compile anew.
$(READY): requirements.lock settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 found; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/uv.lock
	UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || echo https://pypi.org/simple)}}" \
		$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --offline --editable .
	touch $@

# the command ends with this make, which names itself by the shell's parent
RUN = @CXR_NB_MAKE=$$PPID exec $(BIN)/cxr_nb report --profile "$$PROFILE" --cores $(CORES)

report: $(READY)  ## run every notebook of the report that is out of date: PROFILE=demo CORES=all
	$(RUN)

check: $(READY)  ## what a profile needs, what of it is there, and what to do: PROFILE=paper
	@$(BIN)/cxr_nb check --profile "$$PROFILE" || test $$? = 1

# the browser is asked for before a report is run for it
CHROMIUM ?= $(firstword $(foreach p,chromium chromium-browser google-chrome,$(shell command -v $(p))))
PAGE = $${CXR_NB_OUTPUTS:-outputs}/$$PROFILE
pdf:  ## the page as outputs/demo/report.pdf, printed by Chromium: CHROMIUM=/path/to/chromium
	@test -n "$(CHROMIUM)" || { echo "make pdf: no Chromium found; install one or name it: make pdf CHROMIUM=/path/to/chromium" >&2; exit 1; }
	$(MAKE) report
	"$(CHROMIUM)" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-pdf-header-footer --print-to-pdf="$(PAGE)/.partial-report.pdf" "$(PAGE)/report.html" 2>/dev/null
	mv "$(PAGE)/.partial-report.pdf" "$(PAGE)/report.pdf"

miniature: $(READY)  ## train the parts that cxr_nb/miniature lacks, and measure them (hours on 2 cores; goes on where it stopped)
	$(BIN)/cxr_nb run C_miniature --profile demo -p train true

benchmarks: $(READY)  ## measure the speed ratios (D_benchmarks), outside the report's budget
	$(RUN) --target benchmarks

cost: $(READY)  ## what the paper's experiments compute, counted (D_cost): seconds, whatever was run
	$(RUN) --target cost

growth: $(READY)  ## how time and memory grow with images, reports and captions (D_growth), outside the report's budget
	$(RUN) --target growth

ablations: $(READY)  ## train and sample the U-Net in other ways (E_ablations), outside the report's budget
	$(RUN) --target ablations

tuning: $(READY)  ## give each method the same number of tries (E_tuning), outside the report's budget
	$(RUN) --target tuning

test: $(READY)  ## everything that must be green: notebooks, tests, the smoke report, clean and in sync
	@# what the notebooks' tests write goes with them: some 550 MB; three at a time keep two cores busy, for some tests wait
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && trap 'exit 130' INT TERM && \
		TMPDIR="$$folder" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 3
	$(BIN)/python -m pytest tests -n 3 --dist loadfile --no-loadscope-reorder

# from the project's root, so that results and own data are in reach of the notebooks and of the file browser
lab: $(READY)  ## open JupyterLab on the notebooks (ARGS="--no-browser --port 8890" are handed on)
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

prepare: $(READY)  ## before a commit: export, clean and render the README
	$(BIN)/nbdev_export
	$(MAKE) clear
	$(MAKE) readme

# what widgets showed is kept apart from the outputs, in the notebook's metadata
clear: $(READY)  ## clear all notebooks of what they have shown: outputs and widgets
	$(BIN)/python -m nbconvert --to notebook --inplace --log-level WARN --ClearOutputPreprocessor.enabled=True --ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.clear_cell_metadata=False '--ClearMetadataPreprocessor.preserve_nb_metadata_mask={"kernelspec"}' $(or $(NOTEBOOKS),nbs/*.ipynb)
	$(BIN)/nbdev_clean

# links are written for nbs/, where the notebook lies
readme: $(READY)
	$(BIN)/python -m nbconvert --execute --to markdown --no-input --log-level WARN --stdout nbs/index.ipynb > .partial-README.md
	sed 's#\([("]\)\.\./#\1#g' .partial-README.md > README.md
	rm .partial-README.md

hook: $(READY)  ## let git refuse to commit what may show data under an agreement
	@$(BIN)/python -c "from cxr_nb.commit_check import install; install()"

lock: $(READY)  ## resolve requirements.lock anew from settings.ini
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 --extra dev --extra real setup.py -o requirements.lock

clean:  ## remove the environment; results stay
	rm -rf $(VENV) .snakemake

clean-results:  ## remove the results of one profile that are not committed: PROFILE=demo
	@case "$$PROFILE" in ""|.*|*[!A-Za-z0-9._-]*) echo "make clean-results: PROFILE='$$PROFILE' is no profile's name" >&2; exit 1;; esac
	git clean -fdXq -- "outputs/$$PROFILE"
