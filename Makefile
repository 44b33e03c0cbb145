# make help says what there is. Needs Python 3.10 or later with pip, and nothing else: the rest goes into
# .venv (Python packages) and .tools (a redis-server where there is none, what only tests import).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# How many tests run at once: most of them wait for servers and workers, which takes no processor.
WORKERS ?= 6
bin := $(VENV)/bin
celery_tests := tests/beat tests/tasks tests/test_settings.py tests/test_pytest_plugin.py tests/test_fencing_examples.py

# Where no bytecode is kept, each pytest, and each of some hundred processes that tests start, compiles all of it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo example test test-broken test-celery-oldest test-grpc-oldest bench bench-smoke costs endings coverage chaos chaos-beat smoke
.PHONY: check types docs matrix format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## the promises, shown in under a minute: etcd, a broker, two workers, a kill -9
	@$(bin)/python -m example_project.demo $(ARGS)

example: $(VENV)/.demo $(VENV)/.example ## the Django shop, until Ctrl-C: etcd, Redis, two workers, two beats, a page; PORT=8000
	@$(bin)/python -m example_project.run $(if $(PORT),--port=$(PORT)) $(ARGS)

test: $(VENV)/.test ## the tests, on a real etcd, a real broker and real workers; ARGS="-k mutex -x" go to pytest
	@all=5; run() { \
	    $(bin)/python -m pytest "$$@" $(ARGS); part=$$?; \
	    [ $$part = 5 ] || all=$$part; [ $$part = 0 ] || [ $$part = 5 ] || exit $$part; \
	  }; \
	  run -n $(WORKERS) --dist loadscope -m "not alone"; \
	  run -n 3 --dist loadscope -m "together and not broken"; \
	  run -m "alone and not together and not broken"; \
	  exit $$all # 5: ARGS chose no test

test-broken: $(VENV)/.test ## that make chaos finds locks which are broken on purpose: chaos runs, and so not in make test
	@$(bin)/python -m pytest -m broken $(ARGS)

test-celery-oldest: $(VENV)/.test $(VENV)/celery-oldest/.there ## the tests that run tasks, with the oldest Celery
	@export PYTHONPATH=$(abspath $(VENV)/celery-oldest); \
	$(bin)/python -c 'import celery, kombu, redis; print(*(f"{m.__name__} {m.__version__}" for m in (celery, kombu, redis)))' && \
	$(bin)/python -m pytest -n $(WORKERS) --dist loadscope -m "not alone" $(or $(TESTS),$(celery_tests)) $(ARGS)

test-grpc-oldest: $(VENV)/.test $(VENV)/grpc-oldest/.there ## the tests of the gRPC transport, with the oldest grpcio and protobuf
	@export PYTHONPATH=$(VENV)/grpc-oldest; \
	$(bin)/python -c 'import grpc, google.protobuf as p; print("grpcio", grpc.__version__, "protobuf", p.__version__)' && \
	$(bin)/python -m pytest -W "ignore:Type google._upb:DeprecationWarning" -k grpc \
	  tests/etcd/test_contract.py tests/etcd/test_grpc.py $(ARGS)

costs: $(VENV)/.test ## what locks cost in requests, bytes and time: the figures of docs/costs.md, in some minutes
	@$(bin)/python -m tests.costs $(ARGS)

bench: $(VENV)-bench/.bench ## measured against the floor, Go, and everything one could use instead: docs/benchmarks.md, in some ten minutes
	@$(VENV)-bench/bin/python -m benchmarks $(ARGS)

bench-smoke: $(VENV)-bench/.bench ## the same in under a minute, with samples so small that the figures say nothing, written nowhere
	@$(VENV)-bench/bin/python -m benchmarks --smoke $(ARGS)

endings: $(VENV)/.test ## how long a lock stays taken, for every pool and every way to end: the tables of docs/endings.md
	@$(bin)/python -m tests.endings $(ARGS)

coverage: $(VENV)/.test ## the tests once more, with the lines and branches they miss
	@rm -f .coverage .coverage.*
	@COVERAGE_FILE=$(CURDIR)/.coverage $(bin)/coverage run -m pytest $(ARGS)
	@$(bin)/coverage combine --quiet
	@$(bin)/coverage report

chaos: $(VENV)/.test ## locks under faults for SECONDS=120, and whether they excluded; SEED=… for the same faults again
	@$(bin)/python -m tests.safety.chaos --seconds=$(or $(SECONDS),120) $(if $(SEED),--seed=$(SEED)) $(ARGS)

chaos-beat: $(VENV)/.test ## three beats under faults for SECONDS=300, and whether every tick was sent once; SEED=… as above
	@$(bin)/python -m tests.beat.chaos --seconds=$(or $(SECONDS),300) $(if $(SEED),--seed=$(SEED)) $(ARGS)

# In a virtualenv of its own: pytest-celery's plugin loads wherever it is installed, and changes fixtures and the
# releases of other packages, which make test must not depend on.
smoke: ## broker, backend, etcd, workers and beats in containers, by pytest-celery; needs Docker
	@$(MAKE) --no-print-directory VENV=$(VENV)-smoke smoke-here

.PHONY: smoke-here
smoke-here: $(VENV)/.pytest-celery
	@$(bin)/python -m pytest tests/smoke $(ARGS)

check: $(VENV)/.dev ## ruff, mypy and the import contracts
	@$(bin)/ruff check
	@$(bin)/ruff format --check
	@$(bin)/mypy
	@$(bin)/lint-imports --no-logo --no-cache

docs: $(VENV)/.docs ## these pages as a site, in build/docs; a warning fails
	@$(bin)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs build/docs
	@echo "build/docs/index.html"

types: $(VENV)/.dev ## the public API as a user has it: mypy and pyright (which needs node), with celery-types and without
	@$(bin)/nox -s types

matrix: $(VENV)/.dev ## some tests with each Python, Celery, urllib3 and etcd of the matrix that this machine has: `nox -l`
	@$(bin)/nox -s tests

format: $(VENV)/.dev ## put the code into ruff's form
	@$(bin)/ruff format --quiet
	@$(bin)/ruff check --fix --quiet

clean: ## remove what make made
	@rm -rf $(VENV) $(VENV)-smoke $(VENV)-bench .nox .tools .demo .example build dist
	@rm -rf .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Not among what tests import: see the extra.
$(VENV)-bench/.bench: pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(VENV)-bench $(VENV)-bench/.bench

# Beside what is installed, and found before it by who has it on PYTHONPATH.
$(VENV)/grpc-oldest/.there $(VENV)/celery-oldest/.there: $(VENV)/%-oldest/.there: tests/%-oldest.txt | $(VENV)/bin/python
	@rm -rf $(@D)
	@$(bin)/python -m pip install -qq --disable-pip-version-check --no-deps --only-binary :all: --target $(@D) -r $<
	@test -d $(@D)/$* || { echo "$< names no oldest $* for this Python"; exit 1; }
	@touch $@

# One virtualenv, and that of smoke; .demo, .test and so on in it say which of the package's extras it holds.
# (Debian's Python has no ensurepip unless python3-venv is there: then pip puts a pip into it.)
$(VENV)/bin/python:
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	  || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) \
	       && $(PYTHON) -m pip -qq --disable-pip-version-check --python $(VENV)/bin/python install pip; } \
	  || { rm -rf $(VENV); exit 1; }

extras := demo example test dev docs pytest-celery bench
$(extras:%=$(VENV)/.%): $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	@echo "installing the package with its extra '$*' into $(VENV)"
	@$(bin)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@
