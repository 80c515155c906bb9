# What a user and a contributor run. `make setup` is safe to repeat and does nothing when all is there.
.DEFAULT_GOAL := help
.PHONY: help setup demo paper-digits test test-slow test-slurm test-browser test-loops lint site clean

# Files keep what their tests share. Three at a time, since tests wait as much as they compute; of the slow ones two, which start ranks.
SIDE_BY_SIDE = --dist loadfile
HERE = not slurm and not browser and not loops

help:   ## what there is
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | column -t -s '|'

setup:  ## system packages, .venv, the package (needs root only for missing system packages)
	@scripts/setup.sh

demo: setup  ## real images -> scores -> coresets -> retrained accuracy -> runs/demo/report.html
	@scripts/demo.sh

paper-digits: setup  ## the paper's tables and figures in small, on scikit-learn's digits; under two hours, goes on where it was
	@scripts/paper_on_digits.sh

test: setup  ## the tests, about 7 minutes on 2 cores
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 3 $(SIDE_BY_SIDE) --no-loadscope-reorder -m "not slow and $(HERE)"

test-slow: setup  ## the tests that take minutes each
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 $(SIDE_BY_SIDE) -m "slow and $(HERE)"

test-slurm: setup  ## jobs on a throw-away SLURM cluster on this machine (needs root only to install it)
	@tests/system/slurm/install.sh
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slurm

test-browser: setup  ## the demo, and its report in a headless Chromium (needs root only to install it)
	@tests/system/browser/install.sh
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m browser

test-loops: setup  ## the examples for timm, Lightning, Hugging Face and cleanlab, and mlcroissant, in an environment with these
	@tests/system/loops/install.sh
	@OMP_NUM_THREADS=1 .venv/loops/bin/python -m pytest -m loops

lint: setup  ## style and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check -q .
	@.venv/bin/mypy

site: setup  ## the documentation as a site in build/site; fails on a broken link
	@.venv/bin/properdocs build --quiet --strict --clean

clean:  ## remove what the demo wrote
	rm -rf runs/demo data/digits_*.beton data/digits_*.manifest.json
