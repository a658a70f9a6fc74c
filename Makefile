# make demo    installs, runs the quick study on phantoms from raw scans to tables and figures, says where to look
# make trial   a question with replicates and a protocol: make trial TRIAL=e1; see notebooks/studies/trials
# make keep    keeps the finished runs of a study as small tables: make keep STUDY=trials
# make results writes RESULTS.md and outputs/reference/README.md from the kept tables
# make claims  whether README, RESULTS and METHOD say what the kept tables say
# make check   lints and runs the tests that are not slow; what one runs before every commit
# make test    lints and runs all tests, every notebook among them
# make test-environment  environment.yml, resolved for its Python and read by Binder's builder; needs the internet
# make test-real         the tests that want real scans, with those in MUPKG_REALDATA
# make test-itkwidgets   whether the optional viewer draws, in an environment of its own; needs npm and Chromium
# make test-atlas     whether Embedding Atlas draws what notebook 08 saves, offline, in an environment of its own
# make test-nnunet       notebook 11 with the real nnU-Net, in an environment of its own
# make site    README, METHOD, solved lessons and executed notebooks as web pages: outputs/site/index.html
# make test-site         builds the site and looks at it in a browser without a network
# make soak    kills a smoke study KILLS times (23) and a smoke trial, and compares them with undisturbed ones
# make bench   ours against what one would take instead, a quarter of an hour; kept in tests/benchmarks/results
.DEFAULT_GOAL := demo
.PHONY: setup study trial keep reference results claims demo demo-pair demo-pair-files check test test-real \
	test-environment test-itkwidgets test-atlas test-nnunet site test-site soak lint lab lessons bench clean

PYTHON ?= python3
CORES ?= 2
STUDY ?= quick
TRIAL ?= e1
# Real scans for tests and for notebook 01, if they are at hand; none of them is needed.
MUPKG_REALDATA ?= $(wildcard ../shared/realdata)
export MUPKG_REALDATA
export PYTHONWARNINGS ?= ignore::DeprecationWarning
# Threads that wait for others sleep, so that two programs side by side do not slow each other down.
export OMP_WAIT_POLICY ?= PASSIVE

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
	@echo "  executed notebooks  outputs/quick/report/*.ipynb; as web pages: make site"
	@echo "  JupyterLab          make lab"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

PYTEST = $(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder
check: lint
	$(PYTEST) -m "not slow"

# The browsers last: what software draws in place of a GPU takes both cores.
test: lint
	$(PYTEST) --ignore tests/lab
	$(PYTEST) tests/lab

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

# Without what Embedding Atlas would make embeddings of texts with: ours are in the file, and PyTorch need not be twice.
ATLAS := .venv-atlas/bin
test-atlas: setup
	$(PYTHON) -m venv .venv-atlas
	$(ATLAS)/pip install --quiet --disable-pip-version-check --no-deps embedding-atlas==0.26.0
	$(ATLAS)/pip install --quiet --disable-pip-version-check -c constraints.txt click duckdb fastapi uvicorn pandas pyarrow narwhals platformdirs websockets inquirer tqdm uvloop cryptography
	$(BIN)/python -m pytest tests/lab/atlas_draws.py

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
	$(BIN)/python notebooks/studies/pages.py

results: setup
	$(BIN)/python notebooks/studies/pages.py

# Every finished run of a study as small tables in outputs/reference/runs, to be committed: neither a batch nor
# notebook 10 trains it again.
keep: setup
	$(BIN)/python -m mupkg.trials.kept outputs/$(STUDY)

claims: setup
	$(BIN)/python -m pytest tests/test_claims.py

# JupyterLab on its start page; notebooks/lab says that Markdown files open rendered
lab: setup
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/START.md --LabApp.app_settings_dir=notebooks/lab

# The lessons' notebooks, blank and solved, from notebooks/lessons/source
lessons: setup
	$(BIN)/python notebooks/lessons/make_lessons.py

# The trained pair of data/demo, anew: a few minutes
demo-pair: setup
	$(SNAKEMAKE) --configfile notebooks/studies/demo.yaml --until stage2
	$(MAKE) demo-pair-files

# What notebook 08 needs of outputs/demo: both runs, and the regions of two test cases and of the filmed case
DEMO_RUN := weights.safetensors localizer.safetensors history.csv metrics.csv run.json card.md film
demo-pair-files:
	rm -rf data/.demo.making && mkdir -p data/.demo.making/stage1/regions
	set -e; cd outputs/demo; for run in *-seed0; do \
	    mkdir ../../data/.demo.making/$$run; \
	    for name in $(DEMO_RUN); do cp -R $$run/$$name ../../data/.demo.making/$$run; done; \
	done
	cp outputs/demo/stage1/run.json data/.demo.making/stage1
	awk -F, 'NR == 1 || $$2 == "test" && ++t <= 2 || $$2 == "validation" && ++v <= 1' outputs/demo/stage1/regions.csv \
	    > data/.demo.making/stage1/regions.csv
	set -e; for case in $$(tail -n +2 data/.demo.making/stage1/regions.csv | cut -d, -f1); do \
	    cp outputs/demo/stage1/regions/$${case}_*.npy data/.demo.making/stage1/regions; \
	done
	rm -rf data/demo && mv data/.demo.making data/demo

# A static site in outputs/site, from what is at hand: the lessons' solutions and the notebooks that need no training
# are executed (a few minutes, once), and executed notebooks of studies in outputs are shown, too. Its builder has an
# environment of its own. Where a repository has an address, Binder's badge belongs at the top of README.md.
PAGES := outputs/pages/notebooks
SITE_LESSONS := $(patsubst notebooks/lessons/solutions/%,$(PAGES)/lessons/%,$(wildcard notebooks/lessons/solutions/*.ipynb))
SITE_LESSONS += $(patsubst notebooks/%,$(PAGES)/%,$(wildcard notebooks/lessons/slides.ipynb))
SITE_NOTEBOOKS := $(addprefix $(PAGES)/,00_prepare_cohort.ipynb 01_data_exploration.ipynb 08_explore.ipynb 09_segment_a_patient.ipynb)
# Trials whose runs are all kept as tables, for notebooks 10 and 06
SITE_TRIAL ?= e1_new
SITE_PARAMETERS ?= parameters
SITE_NOTEBOOKS += $(SITE_TRIAL:%=$(PAGES)/10_does_it_help.ipynb) $(SITE_PARAMETERS:%=$(PAGES)/06_parameter_studies.ipynb)
PACKAGE := $(wildcard mupkg/*.py mupkg/*/*.py notebooks/lessons/*.py)
site: $(SITE_LESSONS) $(SITE_NOTEBOOKS) .venv-site/installed
	rm -rf outputs/site
	.venv-site/bin/sphinx-build -q -E -c notebooks/site . outputs/site
	@echo "open outputs/site/index.html"

.venv-site/installed: notebooks/site/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	@touch $@

# Ten phantoms that the pair of data/demo has not seen
$(PAGES)/00%: TOLD = "cohort": "phantoms", "phantoms": 10, "seed": 1000, "data_folder": "outputs/pages/data"
$(PAGES)/01%: TOLD = "cohort": "phantoms", "data_folder": "outputs/pages/data", "outputs_folder": "outputs/pages"
$(PAGES)/08%: TOLD = "pictures_folder": "outputs/pages/explore"
$(PAGES)/10%: TOLD = "protocol": "notebooks/studies/trials/$(SITE_TRIAL).yaml", "outputs_folder": "outputs/pages"
$(PAGES)/06%: TOLD = "protocol": "notebooks/studies/trials/$(SITE_PARAMETERS).yaml", "outputs_folder": "outputs/pages"
$(PAGES)/01_data_exploration.ipynb: $(PAGES)/00_prepare_cohort.ipynb
$(PAGES)/lessons/%.ipynb: notebooks/lessons/solutions/%.ipynb $(PACKAGE) | setup
	$(BIN)/python -m mupkg.batch $< $@ '{}'
$(PAGES)/%.ipynb: notebooks/%.ipynb $(PACKAGE) | setup
	$(BIN)/python -m mupkg.batch $< $@ '{$(TOLD)}'
$(PAGES)/09_segment_a_patient.ipynb: TOLD = "run": "data/demo/MetricUNet-HCP-seed0", "output": "outputs/pages/segmented", \
	"scan": "outputs/pages/data/phantoms/images/phantom-1000.nii.gz"
$(PAGES)/09_segment_a_patient.ipynb: notebooks/09_segment_a_patient.ipynb $(PACKAGE) $(PAGES)/00_prepare_cohort.ipynb
	rm -rf outputs/pages/segmented
	$(BIN)/python -m mupkg.batch $< $@ '{$(TOLD)}'

test-site: site
	$(BIN)/python -m pytest tests/lab/test_site.py

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/benchmarks/requirements.txt
	$(BIN)/python tests/benchmarks/bench.py

clean:
	rm -rf .venv .venv-binder .venv-itkwidgets .venv-atlas .venv-nnunet .venv-site
	rm -rf .snakemake .pytest_cache .ruff_cache .import_linter_cache
