# make demo    installs, runs the quick study on phantoms from raw scans to tables and figures, says where to look
# make trial   a question with replicates and a protocol: make trial TRIAL=e1; see notebooks/studies/trials
# make keep    keeps the finished runs of a study as small tables: make keep STUDY=trials
# make results writes RESULTS.md and outputs/reference/README.md from the kept tables
# make claims  recomputes the figures of README.md from outputs/reference
# make check   lints and runs the tests that are not slow: a minute and a half; what one runs before every commit
# make test    lints and runs all tests, every notebook among them
# make test-environment  environment.yml, resolved for its Python and read by Binder's builder; needs the internet
# make test-real         the tests that want real scans, with those in MUPKG_REALDATA
# make test-itkwidgets   whether the optional viewer draws, in an environment of its own; needs npm and Chromium
# make test-nnunet       notebook 11 with the real nnU-Net, in an environment of its own
# make soak    kills a smoke study KILLS times (23) and a smoke trial, and compares them with undisturbed ones
# make bench   ours against what one would take instead, a quarter of an hour; kept in tests/benchmarks/results
.DEFAULT_GOAL := demo
.PHONY: setup study trial keep reference results claims demo demo-pair check test test-real test-environment test-itkwidgets test-nnunet soak lint lab lessons gallery bench clean

PYTHON ?= python3
CORES ?= 2
STUDY ?= quick
TRIAL ?= e1
# Real scans for tests and for notebook 01, if they are at hand; none of them is needed.
MUPKG_REALDATA ?= $(wildcard ../shared/realdata)
export MUPKG_REALDATA
export PYTHONWARNINGS ?= ignore::DeprecationWarning

SNAKEMAKE = $(BIN)/snakemake --cores $(CORES) --workflow-profile notebooks/studies/profiles/laptop
REAL_SCAN := $(wildcard $(MUPKG_REALDATA)/ct_totalsegmentator/ts_example_image.nii.gz)
REAL_CT := $(if $(REAL_SCAN),--config 'report={"real_scan": "$(REAL_SCAN)"}')

# Where the active conda environment is that of environment.yml, all is there; else an own environment is made.
ifneq ($(wildcard $(CONDA_PREFIX)/lib/python3*/site-packages/mupkg-*.dist-info),)
BIN := $(CONDA_PREFIX)/bin
setup: ;
else
BIN := .venv/bin
setup: .venv/installed
endif

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { echo "Python 3.11 to 3.14 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# Any study: make study STUDY=promise12_128 CORES=4 OPTIONS="--dry-run"
study: setup
	$(SNAKEMAKE) --configfile notebooks/studies/$(STUDY).yaml $(OPTIONS)

# A trial is a study with arms and replicates; what it has trained already is not trained again.
trial: setup
	$(SNAKEMAKE) --configfile notebooks/studies/trials/$(TRIAL).yaml $(OPTIONS)

demo: setup
	$(SNAKEMAKE) --configfile notebooks/studies/quick.yaml $(REAL_CT)
	@echo
	@echo "Done. Numbers are measured on PHANTOMS, not on patients."
	@echo "  the table           outputs/quick/report/table.csv (and with the paper's beside it: 04_evaluation.ipynb)"
	@echo "  contours, heatmaps  outputs/quick/report/figure8_contours.png, figure1_heatmaps.png"
	@echo "  executed notebooks  outputs/quick/report/*.ipynb; as web pages: make gallery"
	@echo "  JupyterLab          make lab"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

PYTEST = $(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder
check: lint
	$(PYTEST) -m "not slow"

test: lint
	$(PYTEST)

test-real: setup
	$(PYTEST) -m real_scans

# An environment of its own: the suite needs neither Binder's builder nor the newest pip.
test-environment: setup
	$(PYTHON) -m venv .venv-binder
	.venv-binder/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip jupyter-repo2docker
	PATH="$(CURDIR)/.venv-binder/bin:$$PATH" $(BIN)/python -m pytest -rs tests/test_environment.py

# An environment of its own: the extra's extension of JupyterLab asks the internet at every start.
ITK := .venv-itkwidgets/bin/python
test-itkwidgets:
	$(PYTHON) -m venv .venv-itkwidgets
	$(ITK) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,itkwidgets]"
	$(ITK) tests/lab/npm_copies.py
	$(ITK) -m pytest tests/lab/itkwidgets_draws.py

# Notebook 11 and its module with the real nnU-Net, which brings some thirty packages: an environment of its own.
NNUNET := .venv-nnunet/bin/python
test-nnunet:
	$(PYTHON) -m venv .venv-nnunet
	$(NNUNET) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,nnunet]"
	$(NNUNET) -m pytest tests/nnunet tests/notebooks/test_notebook_11.py

# The list of kills: outputs/soak/kills.csv
KILLS ?= 23
soak: setup
	$(BIN)/python tests/soak/kill_study.py outputs/soak --kills $(KILLS)

# What a trial has measured, kept as small tables under outputs/reference; then RESULTS.md and the pages anew.
reference: setup
	mkdir -p outputs/reference/$(TRIAL)
	cp outputs/*/report/$(TRIAL)/*.csv outputs/*/report/$(TRIAL)/*.png outputs/reference/$(TRIAL)/
	cp $(firstword $(wildcard notebooks/studies/trials/$(TRIAL).yaml notebooks/studies/$(TRIAL).yaml)) outputs/reference/$(TRIAL)/protocol.yaml
	$(BIN)/python -m mupkg.trials.pages

results: setup
	$(BIN)/python -m mupkg.trials.pages

# Every finished run of a study as small tables in outputs/reference/runs, to be committed: neither a batch nor
# notebook 10 trains it again.
keep: setup
	$(BIN)/python -m mupkg.trials.kept outputs/$(STUDY)

claims: setup
	$(BIN)/python -m pytest tests/test_claims.py

lab: setup
	$(BIN)/jupyter lab notebooks

# The lessons' notebooks, blank and solved, from notebooks/lessons/source
lessons: setup
	$(BIN)/python notebooks/lessons/make_lessons.py

# The trained pair of data/demo, anew: a few minutes
demo-pair: setup
	$(SNAKEMAKE) --configfile notebooks/studies/demo.yaml --until stage2
	$(BIN)/python -m mupkg.report.ship outputs/demo data/demo

gallery: setup
	$(BIN)/python -m mupkg.report.gallery outputs/$(STUDY) data outputs/gallery/$(STUDY)

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/benchmarks/requirements.txt
	$(BIN)/python tests/benchmarks/bench.py

clean:
	rm -rf .venv .venv-binder .venv-itkwidgets .venv-nnunet .snakemake .pytest_cache .ruff_cache .import_linter_cache
