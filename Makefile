# What a user and a contributor run. `make setup` is safe to repeat and does nothing when all is there.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint clean

help:   ## what there is
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | column -t -s '|'

setup:  ## system packages, .venv, the package (needs root only for missing system packages)
	@scripts/setup.sh

demo: setup  ## real images -> scores -> coresets -> retrained accuracy -> runs/demo/report.html
	@scripts/demo.sh

test: setup  ## the tests, under 10 minutes on 2 cores
	@.venv/bin/python -m pytest -m "not slow"

test-slow: setup  ## the tests that `make test` leaves out
	@.venv/bin/python -m pytest -m slow

lint: setup  ## style and types
	@.venv/bin/ruff check .
	@.venv/bin/mypy

clean:  ## remove what the demo wrote
	rm -rf runs/demo data/digits_*.beton data/digits_*.manifest.json
