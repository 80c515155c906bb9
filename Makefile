# What a user and a contributor run. `make setup` is safe to repeat and does nothing when all is there.
.DEFAULT_GOAL := help
.PHONY: help setup demo paper-digits test test-slow test-slurm test-browser test-loops lint site clean

# Tests start hundreds of processes: on one thread each, and of what Python compiled before (some machines turn that off).
test test-slow test-slurm test-browser test-loops: export OMP_NUM_THREADS = 1
test test-slow test-slurm test-browser test-loops: export PYTHONDONTWRITEBYTECODE =
# Files keep what their tests share. More than two at a time gains nothing on two cores.
SIDE_BY_SIDE = -n 2 --dist loadfile
HERE = not slurm and not browser and not loops
# Those with tests of a kind: to read all takes a quarter of a minute.
files = `grep -rl --include=*.py mark.$(1) tests`

help:   ## what there is
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | column -t -s '|'

setup:  ## system packages, .venv, the package (needs root only for missing system packages)
	@scripts/setup.sh

demo: setup  ## real images -> scores -> coresets -> retrained accuracy -> runs/demo/report.html
	@scripts/demo.sh

paper-digits: setup  ## the paper's tables and figures in small, on scikit-learn's digits; under two hours, goes on where it was
	@scripts/paper_on_digits.sh

test: setup  ## the tests, about 5 minutes on 2 cores; `make test SLOW=1` has those of test-slow as well
	@.venv/bin/python -m pytest $(SIDE_BY_SIDE) --no-loadscope-reorder -m "$(if $(filter 1,$(SLOW)),,not slow and )$(HERE)"

test-slow: setup  ## the tests that take minutes each
	@.venv/bin/python -m pytest $(SIDE_BY_SIDE) -m "slow and $(HERE)"

test-slurm: setup  ## jobs on a throw-away SLURM cluster on this machine (needs root only to install it)
	@tests/system/slurm/install.sh
	@.venv/bin/python -m pytest -m slurm $(call files,slurm)

test-browser: setup  ## the demo, and its report in a headless Chromium (needs root only to install it)
	@tests/system/browser/install.sh
	@.venv/bin/python -m pytest -m browser $(call files,browser)

test-loops: setup  ## the examples for timm, Lightning, Hugging Face and cleanlab, and mlcroissant, in an environment with these
	@tests/system/loops/install.sh
	@.venv/loops/bin/python -m pytest -m loops $(call files,loops)

lint: setup  ## style and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check -q .
	@.venv/bin/mypy

site: setup  ## the documentation as a site in build/site; fails on a broken link
	@.venv/bin/properdocs build --quiet --strict --clean

clean:  ## remove what the demo wrote
	rm -rf runs/demo data/digits_*.beton data/digits_*.manifest.json
