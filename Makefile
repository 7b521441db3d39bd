# `make` lists the targets. They need only make and a CPython from 3.11 on.

SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
# Options of pytest, for instance: make test PYTEST_ARGS='-k lock -x'
PYTEST_ARGS ?=
# How often `make race` repeats the tests marked `race`, and the other tests of M1 to M19.
RACES ?= 20
OTHERS ?= 3

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: venv ## run both steps on private servers, and import a module from the cache
	@PATH="$(CURDIR)/.venv/bin:$$PATH" tools/demo

.PHONY: test
test: venv ## run all tests except those below
	tools/test-servers
	# More processes than cores, because a test mostly waits for servers.
	$(PYTHON) -m pytest -n 6 --dist worksteal -m "not faults and not slow and not race and not clusters" $(PYTEST_ARGS)
	@$(PYTHON) -m tests.servers.versions

.PHONY: test-pythons
test-pythons: venv ## run the unit tests on every other installed CPython
	tools/test-servers
	tools/test-other-pythons

.PHONY: check
check: venv ## check format, lint, types, import contracts, lock files, known vulnerabilities, Compose files, manifests, size
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-logo
	$(PYTHON) tools/check-locks
	$(PYTHON) tools/check-words
	$(PYTHON) tools/audit
	$(PYTHON) tools/write-docs --check
	.venv/bin/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml deploy/github/*.yml
	.venv/bin/check-jsonschema -q --builtin-schema vendor.dependabot .github/dependabot.yml
	.venv/bin/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(PYTHON) -m pytest -q tests/kube/test_manifests.py tests/compose/test_files.py
	$(PYTHON) tools/count-lines

.PHONY: bench
bench: venv ## compare the speed with the naive script and with the limit
	tools/test-servers
	$(PYTHON) -m benchmarks

.PHONY: test-compose
test-compose: venv ## test the Compose stack as a user runs it (needs a container engine)
	$(PYTHON) -m pytest --timeout=900 tests/compose $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: venv ## run the fault matrix (kill, freeze, restart or cut every part while init runs) and the slow tests
	tools/test-servers
	$(PYTHON) -m pytest -n 4 --timeout=900 -m "faults or slow" $(PYTEST_ARGS)

.PHONY: test-clusters
test-clusters: venv ## lose a node of RabbitMQ, PostgreSQL and Redis in every phase of init
	tools/test-servers
	$(PYTHON) -m pytest -n 2 --timeout=300 -m clusters tests/always_ends/clusters $(PYTEST_ARGS)

.PHONY: test-kube
test-kube: venv ## run the Pods of the Kubernetes manifests with their init containers (needs podman and kubectl)
	$(PYTHON) -m pytest --timeout=900 tests/kube $(PYTEST_ARGS)

.PHONY: test-platform
test-platform: venv ## test with the real platform: PLATFORM=checkout PLATFORM_PYTHON=interpreter [PLATFORM_FROM=older checkout]
	@PLATFORM="$(PLATFORM)" PLATFORM_PYTHON="$(PLATFORM_PYTHON)" PLATFORM_FROM="$(PLATFORM_FROM)" \
		$(PYTHON) -m pytest --timeout=1200 tests/platform $(PYTEST_ARGS)

.PHONY: test-debian13
test-debian13: ## run make demo and make test in a Debian 13 root (needs root and debootstrap) [BIND=folders]
	@BIND="$(BIND)" ROOT="$(ROOT)" TARGETS="$(TARGETS)" tools/debian13

.PHONY: soak
soak: venv ## run live writers, restarts and re-warms for a long time
	tools/test-servers
	$(PYTHON) -m pytest --timeout=0 tests/soak $(PYTEST_ARGS)

.PHONY: race
race: venv ## repeat the tests of races (RACES=20 times) and the other tests of M1 to M19 (OTHERS=3 times)
	tools/test-servers
	@run=1; while [ $$run -le $(RACES) ]; do \
		echo "race $$run of $(RACES)"; \
		$(PYTHON) -m pytest -q -x -n 2 -m race $(PYTEST_ARGS) || exit 1; \
		run=$$((run + 1)); \
	done
	@run=1; while [ $$run -le $(OTHERS) ]; do \
		echo "the other migration tests, $$run of $(OTHERS)"; \
		$(PYTHON) -m pytest -q -x -n 2 -m "not race" -k "test_m0 or test_m1" $(PYTEST_ARGS) || exit 1; \
		run=$$((run + 1)); \
	done

.PHONY: docs
docs: venv ## write the generated parts of the documents
	$(PYTHON) tools/write-docs

.PHONY: site
site: venv ## build the documents as a site with a search, in build/site (SERVE=1: serve it while you write)
	@tools/site $(if $(SERVE),serve,build)

.PHONY: screenshot
screenshot: venv ## make the pictures again: docs/flower.png (in a browser) and docs/rehearse.svg
	tools/test-servers
	SCREENSHOT=docs/flower.png $(PYTHON) -m pytest -q tests/security/test_flower.py -k browser
	PYTHONPATH=. $(PYTHON) tools/rehearse-picture

.PHONY: lock
lock: ## write requirements/*.lock from pyproject.toml (UPGRADE=1: with the newest versions)
	@UPGRADE=$(UPGRADE) tools/lock

.PHONY: clean
clean: ## delete everything that this Makefile and the tools have made
	rm -rf .venv .venv-3.* .venv.lock .lock-venv .audit-venv build dist *.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: venv
venv:
	@tools/venv .venv
