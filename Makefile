# `make experiment` trains the quickstart model, `make test` runs what CI runs; each installs what it needs first.

PYTHON ?= python3
# Parameters of the experiment, e.g. make experiment ARGS="-p encoder swinv2 -p epochs 3"
ARGS ?=
# Further options of pytest, e.g. make test PYTEST_ARGS="-k losses"
PYTEST_ARGS ?=

# torchvision bounds torch from below only, so the pair that belongs together is named when versions are resolved anew.
TORCH := torch==2.14.1 torchvision==0.29.2
VENV := .venv
BIN := $(VENV)/bin
# The stamp's name holds a checksum of everything that decides what is installed.
STAMP := $(VENV)/.installed-$(shell cat constraints.txt settings.ini setup.py | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.PHONY: $(VENV) help format lint types setup experiment benchmark test test-all chapters clean-nbs readme lab hooks \
  constraints release docs

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 14

setup: $(STAMP)  ## create .venv and install the pinned packages (every other target does this where it is needed)

$(STAMP):
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory $(VENV)
	@echo "setup: installing the pinned packages (the first time a few minutes and about 7 GB)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[dev]' || \
	  { echo "setup: pip could not install the packages (its message is above); the same command tries again"; exit 1; }
	@rm -f $(VENV)/.installed-*
	@touch $@

# What builds the site and looks at it; the other commands do without.
DOCS_STAMP := $(STAMP)-docs

$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[docs,browser]'
	@touch $@

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "setup: $(PYTHON) is missing or older than 3.11; name another: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { echo "setup: $(PYTHON) cannot create $(VENV); on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# Executes nbs/$(1).ipynb into outputs/ and prints the last line that it shows.
define execute
mkdir -p outputs; \
result=outputs/$(1).$$(date +%Y%m%d-%H%M%S).ipynb; \
$(BIN)/papermill -k python3 nbs/$(1).ipynb $$result $(ARGS) || \
  { test ! -f $$result || echo "The run failed; the notebook with the error: $$result"; exit 1; }; \
echo "Result notebook: $$result"; \
$(BIN)/python .ci/last_line.py $$result
endef

experiment: $(STAMP)  ## run nbs/run_experiment.ipynb; parameters: make experiment ARGS="-p encoder swinv2"
	@$(BIN)/crackseg_run $(ARGS)

benchmark: $(STAMP)  ## compare encoders over seeds, nbs/benchmark_encoders.ipynb; parameters: make benchmark ARGS="-p seeds 1,2,3"
	@$(call execute,benchmark_encoders)

# tests/light holds a stand-in for a package that takes seconds to import and that nobody needs here.
TESTS = pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout 300 \
  $(PYTEST_ARGS) nbs/*/[0-9]*.ipynb tests

test: $(STAMP)  ## what CI runs: chapters, tests, sync and cleanliness
	@PYTHONPATH="tests/light:$$PYTHONPATH" $(BIN)/python -m $(TESTS)

test-all: $(DOCS_STAMP)  ## the same and the slow tests, then one number: the package's lines that ran, in percent
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m $(TESTS) --slow; status=$$?; \
	$(BIN)/coverage combine --quiet && echo "coverage: $$($(BIN)/coverage report --format=total) %"; exit $$status

chapters: clean-nbs  ## clean the notebooks and export the package
	@$(BIN)/nbdev_export
	@$(BIN)/ruff format --quiet crackseg_nb

format: $(STAMP)  ## lay out notebooks, tests and scripts, and export the package
	@$(BIN)/ruff check --fix --quiet --extend-exclude crackseg_nb . || true
	@$(BIN)/ruff format --quiet --extend-exclude crackseg_nb .
	@$(MAKE) --no-print-directory chapters

lint: $(STAMP)  ## check layout and lint; `make format` mends what can be mended
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: $(STAMP)  ## check the types of the package, at the level that ty.toml sets
	@$(BIN)/ty check --python $(VENV)

clean-nbs: $(STAMP)  ## clean the notebooks only
	@$(BIN)/python .ci/clean.py
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_clean --fname docs/guides

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	@$(BIN)/python .ci/readme.py > README.md.new && mv README.md.new README.md || { rm -f README.md.new; exit 1; }

docs: $(DOCS_STAMP)  ## build the site into _docs/html, without a network, and check its links
	@rm -rf _docs
	@$(BIN)/python -m sphinx --quiet --jobs 2 -c docs -d _docs/read . _docs/html
	@$(BIN)/python docs/check_links.py _docs/html
	@echo "The site: _docs/html/index.html"

# The folder adds to the user's own settings: the index is opened, and a notebook is cleaned when it is saved.
lab: $(STAMP)  ## open the index in JupyterLab, with the project as its root; options: make lab ARGS="--no-browser --port 8889"
	@JUPYTER_CONFIG_PATH="$(CURDIR)/.ci/lab:$$JUPYTER_CONFIG_PATH" $(BIN)/jupyter lab $(ARGS)

hooks: $(STAMP)  ## install the pre-commit hooks
	@$(BIN)/pre-commit install

constraints:  ## resolve the bounds of settings.ini anew and write constraints.txt
	@rm -rf $(VENV)-constraints
	@$(PYTHON) -m venv $(VENV)-constraints
	@$(VENV)-constraints/bin/python -m pip install -qq --disable-pip-version-check --use-pep517 '.[dev,benchmark,artefact,compression,geo,docs,browser]' $(TORCH)
	@.ci/freeze $(VENV)-constraints/bin/python > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@rm -rf $(VENV)-constraints

release: $(STAMP)  ## build sdist and wheel into dist/ from a clean checkout, and try the wheel without it
	@test -z "$$(git status --porcelain)" || \
	  { echo "release: found changes that are not committed, expected a clean checkout:"; git status --short; exit 1; }
	@rm -rf build dist
	@$(BIN)/python -m build --no-isolation > dist.log 2>&1 || { cat dist.log; exit 1; }
	@rm -f dist.log
	@$(BIN)/python .ci/try_wheel.py dist/*.whl
	@ls dist
