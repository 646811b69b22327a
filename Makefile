# `make run` and `make test` need Python 3.11 to 3.13 and a package registry, nothing else.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Where test-images and test-cluster keep layers and programs from one run to the next.
export IMAGES_DIR ?= /var/tmp/inception-transfer-images
export CLUSTER_DIR ?= /var/tmp/inception-transfer-cluster
BIN := $(VENV)/bin
# Two tests at a time, each on one of two cores: little of what they do gains by a second core. Those
# that share what takes long to make stay together, and the longest start first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help run demo check unit test test-all test-images test-cluster chaos soak fuzz coverage mutants lint format reference site lock sbom licences audit clean clean-images

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.run ## the whole job on this machine, on handwritten digits, no network (ARGS="--config …")
	$(BIN)/python -m jobs run $(or $(ARGS),--config quickstart)

demo: $(VENV)/.demo ## all of it here: S3, training, promotion, service, an answer; until Ctrl-C
	$(BIN)/python -m jobs demo $(ARGS)

check: $(VENV)/.test ## quick check: lint, and the tests that need no torch, in under a minute
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint unit

unit: $(VENV)/.test ## the tests that need no torch (ARGS="-k config")
	$(PYTEST) -q tests/unit $(ARGS)

test: $(VENV)/.test ## all tests but the slow ones, in five minutes
	$(PYTEST) -m "not slow and not containers and not cluster" $(ARGS)

test-all: $(VENV)/.test ## those and the slow ones, a training at the real size among them: under half an hour
	$(PYTEST) -m "not containers and not cluster" $(ARGS)

test-images: $(VENV)/.test ## the images, built and run (Debian 12, root, 55 GB of disk, 30 of them kept, some 25 minutes)
	tests/containers/install.sh
	$(BIN)/python -m pytest -m containers tests/containers $(ARGS)

test-cluster: $(VENV)/.test ## the manifests in a real Kubernetes (as test-images, and some 25 minutes more)
	tests/containers/install.sh
	tests/cluster/build.sh $(CLUSTER_DIR)
	PYTHONPATH=tests/containers $(BIN)/python -m pytest -p no:randomly -m cluster tests/cluster $(ARGS)

chaos: $(VENV)/.test ## kill a job at 50 random moments, let its disk be full 12 times (root): is anything lost?
	$(BIN)/python -m benchmarks.chaos --disks $(if $(filter 0,$(shell id -u)),12,0) $(ARGS)

soak: $(VENV)/.test ## half an hour of good, bad and slow clients: does the service's memory grow?
	$(BIN)/python -m benchmarks.soak $(ARGS)

fuzz: $(VENV)/.test ## 10,000 requests with random errors, 1,000 silent connections, bombs: does the service bear them?
	$(BIN)/python -m benchmarks.fuzz $(ARGS)

coverage: $(VENV)/.test ## which lines and branches do the quick tests, and the processes they start, never run?
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/coverage run -m pytest -n 2 -m "not slow and not containers and not cluster" $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Every mutant is a fork, and OpenMP's threads do not survive one.
mutants: $(VENV)/.mutants ## change the code in 3,000 ways: which changes does no test notice? (ARGS="'serving.trust.*'")
	OMP_NUM_THREADS=1 $(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

lint: $(VENV)/.test ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test ## fix style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/.run ## write docs/reference.md from the code
	PYTHONPATH=. $(BIN)/python docs/reference.py

site: $(VENV)/.run ## the documentation as a site, in build/site
	rm -rf build/site-source && mkdir -p build/site-source
	git ls-files -z | xargs -0 cp --parents --target-directory=build/site-source
	NO_MKDOCS_2_WARNING=1 $(BIN)/uv tool run --with 'mkdocs-material>=9.6,<10' --from 'mkdocs>=1.6,<2' mkdocs build --strict

lock: $(VENV)/.run ## pin what the images install (TORCH_WHEELS=… where PyTorch's index is not reached)
	PATH=$(abspath $(BIN)):$$PATH requirements/lock.sh

LOCKS := train serve serve-gpu score-ray

sbom: $(VENV)/.run ## what each image installs, with versions and digests, as CycloneDX in build/
	mkdir -p build
	for lock in $(LOCKS); do $(BIN)/uv tool run --from 'cyclonedx-bom>=7,<8' cyclonedx-py requirements \
	  requirements/$$lock.txt --output-file build/$$lock.cdx.json || exit 1; done

# All but Ray's dashboard is in the environment, `serve`'s torch with CUDA.
licences: $(VENV)/.test ## the licence of each Python package in each image, as CSV in build/
	mkdir -p build
	for lock in $(LOCKS); do \
	  case $$lock in score-ray) tool="--with-requirements requirements/$$lock.txt pip-licenses" ;; \
	    *) tool="pip-licenses --python $(BIN)/python" ;; esac; \
	  $(BIN)/uv tool run --python $(BIN)/python --from 'pip-licenses>=5.5,<6' $$tool --format csv \
	    --with-system --output-file build/$$lock.licences.csv \
	    --packages $$(sed -n 's/^\([a-z0-9.-]*\)==.*/\1/p' requirements/$$lock.txt) || exit 1; done

# Strict, as a package without an answer would count as one without vulnerabilities: a mirror may have
# no advisories, and nobody has any for torch's `+cpu`.
audit: $(VENV)/.run ## which of it has known vulnerabilities (asks pypi.org)
	mkdir -p build
	for lock in $(LOCKS); do sed 's/+cpu / /' requirements/$$lock.txt > build/$$lock.audit.txt && \
	  $(BIN)/uv tool run 'pip-audit>=2.10,<3' --strict --disable-pip --require-hashes \
	  --requirement build/$$lock.audit.txt || exit 1; done

clean: ## remove the environment, caches and built files; runs stay
	rm -rf $(VENV) build dist mutants *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-images: ## remove what test-images and test-cluster keep for their next run
	rm -rf $(IMAGES_DIR) $(CLUSTER_DIR)

# One environment for everything: what others need is added to what `make run` installed. But for
# checkov, which insists on an older boto3.
INSTALL := PYTHON="$(PYTHON)" VENV="$(VENV)" requirements/install.sh

$(VENV)/.run: pyproject.toml requirements/install.sh requirements/train.txt
	@$(INSTALL) export
	@touch $@

$(VENV)/.demo: $(VENV)/.run
	@$(INSTALL) export demo
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@$(INSTALL) export test
	@$(BIN)/uv venv --quiet --allow-existing --python "$(PYTHON)" $(VENV)/checkov
	@$(BIN)/uv pip install --python $(VENV)/checkov 'checkov>=3.3,<4'
	@touch $@

$(VENV)/.mutants: $(VENV)/.test
	@$(INSTALL) export test mutants
	@touch $@
