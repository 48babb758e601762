# fma-nb: every target sets up what it needs in .venv, from nothing but Python >= 3.11 and make.
.DEFAULT_GOAL := run
.PHONY: run test lab data notebooks check-notebooks lint clean help

PYTHON  ?= python3
DATASET ?= fma_mini
PRESET  ?= compact
DEVICE  ?= auto
ARGS    ?=
# For example https://download.pytorch.org/whl/cpu: another build of PyTorch than PyPI's.
TORCH_INDEX ?=

VENV  := .venv
READY := $(VENV)/.ready
BIN   := $(VENV)/bin

run: $(READY) ## environment, data, the five notebooks and the report (DATASET, PRESET, DEVICE, ARGS)
	$(BIN)/fma-nb run --dataset $(DATASET) --preset $(PRESET) --device $(DEVICE) $(ARGS)

test: lint ## environment, lint, unit and fault tests, nbval over notebooks/
	@# Both at once, a thread each; what nbval says is printed last.
	outputs=$$(mktemp -d) && trap 'rm -rf "$$outputs"' EXIT && export OMP_NUM_THREADS=1 && \
	{ FMA_NB_OUTPUTS=$$outputs $(BIN)/python -m pytest --nbval --nbval-current-env \
	    --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 600 notebooks/*.ipynb \
	    > $$outputs/nbval.txt 2>&1 & \
	  notebooks=$$!; $(BIN)/python -m pytest tests; status=$$?; \
	  wait $$notebooks || status=1; cat $$outputs/nbval.txt; exit $$status; }

lint: $(READY) ## ruff over code and notebooks, mypy over the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The start page is the README: shown, not edited, and no question about news beside it.
LAB_SETTINGS = {"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}}, \
  "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}

lab: $(READY) ## JupyterLab; its start page leads to the notebooks
	@mkdir -p $(VENV)/lab && echo '$(LAB_SETTINGS)' > $(VENV)/lab/overrides.json
	@# The kernels run in notebooks/: a relative folder means the one where make was typed.
	FMA_NB_DATA="$$($(BIN)/python -c 'from fma_nb.project import data_dir; print(data_dir())')" \
	FMA_NB_OUTPUTS="$$($(BIN)/python -c 'from fma_nb.project import outputs_dir; print(outputs_dir())')" \
	$(BIN)/jupyter lab --LabApp.app_settings_dir="$(CURDIR)/$(VENV)/lab" --LabApp.default_url=/lab/tree/README.md

data: $(READY) ## download FMA's metadata and FMA-Small (7.2 GiB), resumable, verified
	$(BIN)/fma-nb download metadata small

notebooks: $(READY) ## execute the notebooks in place on fma_mini, so that their outputs can be committed
	$(BIN)/python tests/refresh_notebooks.py

check-notebooks: $(READY) ## are the committed outputs those that `make notebooks` gives here?
	$(BIN)/python tests/refresh_notebooks.py --check

clean: ## remove outputs and the synthetic dataset; keep .venv and downloaded data
	find outputs -mindepth 1 -not -name README.md -delete
	rm -rf data/raw/fma_mini data/raw/fma_mini_metadata data/spectrograms/fma_mini-*

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is written last: an interrupted installation is taken up again.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fma-nb needs Python 3.11 or newer: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up $(VENV): a download of 3 GB with PyTorch's CUDA libraries, some minutes."
	$(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH_INDEX)" ]; then \
	  $(BIN)/pip install -q --index-url $(TORCH_INDEX) 'torch==2.11.*' 'torchaudio==2.11.*'; fi
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	$(BIN)/python -m ipykernel install --sys-prefix --name fma-nb --display-name fma-nb \
	  --env CUBLAS_WORKSPACE_CONFIG :16:8
	@touch $@
