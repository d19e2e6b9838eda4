# demo   a whole market on this machine: two providers render an image for a requestor and are paid
# test   all tests, a worker for each core      make test ARGS="tests/protocol -k terms"; ARGS=--shuffle=any
# quick  what one runs while editing: no processes, under a minute
# lint   ruff (rules and format), mypy, the layers, dead code, dependencies, and what the lowest Python does not have
# bench  every benchmark      make bench ARGS="bench_kernel scenario" for some; figures also go to benchmarks/results/
# setup  .venv alone, with the node and its commands
# clean  what the targets made, environments included
#
# Each sets up what it needs (see .ci/setup); PYTHON chooses the interpreter, ARGS are passed on.

PYTHON ?= python3
ARGS ?=
RUNTIME ?=
SOURCES = protocol actors golem tests benchmarks examples examples/process-runtime/process-runtime
BENCHES = $(if $(ARGS),$(ARGS:%=benchmarks/%.py),$(sort $(wildcard benchmarks/*.py)))

export PYTHON

# Tests of one file stay with one worker: they share nodes and Engines.
PYTEST = .venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
QUICK = tests/house tests/protocol tests/actors tests/kernel tests/provider tests/node tests/cli tests/files tests/bus tests/base

.PHONY: demo test quick lint bench setup clean

demo:
	@.ci/setup node yapapi
	@.venv/bin/python -m golem.lab.demo $(if $(RUNTIME),--runtime $(RUNTIME)) $(ARGS)

test:
	@.ci/setup node yapapi vyper anvil golem-js
	@$(PYTEST) $(ARGS)

quick:
	@.ci/setup node
	@$(PYTEST) -m "not integration" --ignore=tests/kernel/test_forgetting.py $(QUICK) $(ARGS)

lint:
	@.ci/setup node
	@status=0; for check in "ruff check ." "ruff format --check ." mypy lint-imports vulture "deptry ." "vermin $(SOURCES)"; do \
	    echo "== $$check"; .venv/bin/$$check || status=1; done; exit $$status

bench:
	@.ci/setup node yapapi
	@mkdir -p benchmarks/results
	@set -e; for bench in $(BENCHES); do echo "== $$bench"; \
	    .venv/bin/python $$bench --json benchmarks/results/$$(basename $$bench .py).json; done

setup:
	@.ci/setup node

clean:
	rm -rf .venv .venv-yapapi .venv-vyper node_modules examples/js/node_modules .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	    .import_linter_cache benchmarks/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
