# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STUBS := serve/pb
PROTOS := $(wildcard proto/jaxrec/v1/*.proto) $(wildcard proto/inference/*.proto)

.PHONY: demo test test-fast test-newest-grpc coverage check docs format protos stubs baseline release lock clean

demo: .venv/installed
	$(BIN)/jaxrec demo --out runs/demo

# The order of the files is that of tests/conftest.py: what takes longest begins first.
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# What takes minutes: training, export, databases, worlds of their own.
SLOW := training runs rl onnx examples bench models evaluation cli/test_cli.py cli/test_recommend.py \
	test_parity_with_serving.py data/distributed data/reading/test_rows.py data/test_bad_input.py data/test_prepare.py \
	data/test_append.py data/test_split.py serve/stores serve/model serve/front serve/http serve/cli serve/serving \
	serve/event_log serve/test_trending.py serve/test_imports.py serve/test_filters.py serve/test_repeats.py \
	serve/test_catalogue.py serve/api/test_outcomes.py serve/api/test_validation.py serve/api/test_contract.py \
	serve/api/test_answers.py

test: .venv/installed
	$(BIN)/python $(PYTEST)

# In between. A change is done when `make test` passes.
test-fast: .venv/installed
	$(BIN)/python $(PYTEST) $(SLOW:%=--ignore=tests/%)

# The front once more, with the newest gRPC that there is in place of that of the lock.
test-newest-grpc: .venv/installed
	rm -rf build/newest-grpc
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--target build/newest-grpc grpcio grpcio-health-checking grpcio-reflection grpcio-status
	PYTHONPATH=$(CURDIR)/build/newest-grpc:$(PYTHONPATH) $(BIN)/python $(PYTEST) \
		tests/serve/front tests/serve/api tests/serve/stores/test_faults.py

# Lines and branches that no test runs, in build/coverage; with those of the processes that tests start.
coverage: .venv/installed
	rm -rf build/coverage
	$(BIN)/coverage run $(PYTEST) $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report

check: .venv/installed protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site of docs/ in build/site; a broken link is an error.
docs: .venv/installed
	$(BIN)/mkdocs build --strict --site-dir build/site

# Style of the contract, and that clients built from the released one still work.
protos: .venv/installed
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/baseline.binpb

# With each release: from here on, what the contract says now must not break.
baseline: .venv/installed
	$(BIN)/buf build proto --exclude-source-info --output proto/baseline.binpb

# Tests, packages in dist/ and a tag; it pushes nothing.
release: .venv/installed
	bash .ci/release

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lock holds every package with its hashes; the project itself is installed in place.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The folders of the protos stand in for serve/pb, so that the generated code imports from serve.pb. The comments, which
# code has not, are in contract.binpb, for the OpenAPI document.
STUBS_ROOT ?= .
stubs: .venv/installed
	$(BIN)/python -m grpc_tools.protoc $(foreach folder,$(sort $(dir $(PROTOS))),-I$(STUBS)=$(folder)) \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=$(STUBS_ROOT) --grpc_python_out=$(STUBS_ROOT) \
		--mypy_out=quiet:$(STUBS_ROOT) --mypy_grpc_out=quiet:$(STUBS_ROOT) \
		--include_source_info --descriptor_set_out=$(STUBS_ROOT)/$(STUBS)/contract.binpb $(PROTOS)

# Needs `uv` on the path; everything else needs only the lock. Each image has a lock of its own, with the same versions.
COMPILE := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url --quiet
lock:
	$(COMPILE) --extra dev --output-file requirements.lock
	$(COMPILE) --extra serve-cpu --extra index --extra postgres --extra redis --constraint requirements.lock \
		--output-file deploy/requirements.lock
	$(COMPILE) --extra export --extra serve-cpu --extra postgres --extra redis --constraint requirements.lock \
		--constraint deploy/requirements.lock --output-file deploy/requirements-learn.lock

clean:
	rm -rf .venv build dist *.egg-info
