# Each target makes what it needs; on a fresh machine `make demo` and `make test` are enough.
PYTHON ?= python3
SEED ?= 7
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup setup-dev demo test test-long check bench gpu-test gpu-bench dashboards docs site clean

setup: .venv/.installed
setup-dev: .venv/.installed-dev

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -U pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install -q -c constraints.txt --group dev
	touch $@

demo: setup
	$(BIN)/foreshock demo --seed $(SEED)

# Two at a time: much of a test is a service that starts. Three are no faster on two cores.
test: setup-dev
	$(BIN)/pytest -q -n 2 --dist loadfile

test-long: setup-dev
	$(BIN)/pytest -q -m long

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pip check
	$(BIN)/python .ci/audit.py
	$(MAKE) site

# Everything that two cores measure, an hour or more; some faults need root and libfaketime, and the
# peers of the load `apt-get install prometheus victoria-metrics`.
bench: setup-dev
	$(BIN)/python -m benchmarks.monitor_overhead
	$(BIN)/python -m benchmarks.host_cost
	$(BIN)/python -m benchmarks.service_faults
	$(BIN)/python -m benchmarks.ingest
	$(BIN)/python -m benchmarks.load --peers
	$(BIN)/python -m benchmarks.risk_refresh
	$(BIN)/python -m benchmarks.risk_refresh --history 3000
	$(BIN)/python -m benchmarks.store_sizes
	$(BIN)/python -m benchmarks.growth --rows 1e6 1e7
	$(BIN)/python -m benchmarks.collect_ranks
	$(BIN)/python -m benchmarks.page_latency
	$(BIN)/python -m benchmarks.page_latency --long --times 20
	$(BIN)/python -m benchmarks.compare_seeds
	$(BIN)/python -m benchmarks.architectures --steps 150
	$(BIN)/python -m benchmarks.faults --kills 100
	$(BIN)/python -m benchmarks.demo_seeds

# On a machine with a CUDA device and its own torch; pytest is all that must be installed there.
# Each is one call of less than 10 minutes; see benchmarks/README.md.
gpu-test:
	$(PYTHON) -m benchmarks.device_run tests

gpu-bench:
	$(PYTHON) -m benchmarks.device_run benchmarks

dashboards: setup-dev
	$(BIN)/python -m dashboards.build

# The description of the service; a test fails when it is not the service's own.
docs: setup-dev
	$(BIN)/python -m docs.openapi

# The documentation, into build/site; a warning is an error (with --quiet it would not be). Needs no network.
site: setup-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis foreshock-spool
