# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STUBS := serve/pb
PROTOS := $(wildcard proto/jaxrec/v1/*.proto) $(wildcard proto/inference/*.proto)

.PHONY: demo test check docs format protos stubs baseline release lock clean

demo: .venv/installed
	$(BIN)/jaxrec demo --out runs/demo

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

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

# The folders of the protos stand in for serve/pb, so that the generated code imports from serve.pb.
STUBS_ROOT ?= .
stubs: .venv/installed
	$(BIN)/python -m grpc_tools.protoc $(foreach folder,$(sort $(dir $(PROTOS))),-I$(STUBS)=$(folder)) \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=$(STUBS_ROOT) --grpc_python_out=$(STUBS_ROOT) \
		--mypy_out=quiet:$(STUBS_ROOT) --mypy_grpc_out=quiet:$(STUBS_ROOT) $(PROTOS)

# Needs `uv` on the path; everything else needs only the lock. The image has a lock of its own, with the same versions.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --quiet --output-file requirements.lock
	uv pip compile pyproject.toml --extra serve-cpu --extra postgres --extra redis --constraint requirements.lock \
		--universal --python-version 3.11 --generate-hashes --no-emit-index-url --quiet \
		--output-file deploy/requirements.lock

clean:
	rm -rf .venv build dist *.egg-info
