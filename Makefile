# Two commands do everything on a machine with Python 3.11+ and pip: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
# Of one machine: gpu takes the place of cpu, and tensorrt is NVIDIA's to install.
EXTRAS := cpu,build,bench,aoti,diffusers,pipeline,tensorrt-rtx
# Whose real Python bindings tests/exporter/backends/test_tensorrt_contract.py checks; one environment holds one.
TENSORRT := 10.14.1.48.post1 10.16.1.11 11.4.0.106
# Test files that hold tests of a GPU.
GPU = $(shell grep -rl 'mark\.gpu' tests --include='test_*.py')
# Test files that build for long, which test-oldest leaves out.
LONG := readme docs_run install packaging build compare to_tensorrt tiny_wan run samples bench pipeline official

.PHONY: setup demo test test-all test-oldest check lint types clean

setup: .venv/.ready

# Python compiles what is imported: of what is installed that is a small part.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(BIN)/python -m pip install --quiet $(if $(TORCH),--extra-index-url '$(TORCH)') --no-compile \
		-c constraints.txt -e '.[$(EXTRAS)]' --group dev
	for version in $(TENSORRT); do \
		$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target .venv/contract/$$version \
			tensorrt-cu13-bindings==$$version & pids="$$pids $$!"; \
	done; for pid in $$pids; do wait $$pid || exit; done
	touch $@

demo: setup
	rm -rf demo && mkdir demo
	$(BIN)/wanexport build -m samples/tiny_wan --resolution 96x96 --frames 17 --dtype fp32 -o demo/bundle
	$(BIN)/wanexport compare demo/bundle --steps 8
	$(BIN)/python samples/09_tiny_trained_wan.py demo

# Two files at a time, which two cores and 8 GB do for; what runs on a GPU has it to itself.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not gpu and not slow'
	$(BIN)/python -m pytest -m gpu $(GPU)

# And what takes long: every family, precision and page where the quick tests take one or two (see
# tests/quick.py), every kill and mutation, what AOTInductor compiles, a model of full size.
test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not gpu'
	$(BIN)/python -m pytest -m gpu $(GPU)

# The quick tests with the oldest versions that pyproject.toml allows, in an environment of its own.
test-oldest: .venv/oldest/.ready
	.venv/oldest/bin/python -m pytest -n 2 --dist loadfile -m 'not gpu and not slow' $(LONG:%=--ignore-glob '*/test_%.py')

.venv/oldest/.ready: .venv/.ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv/oldest
	$(BIN)/uv pip install --quiet --no-config --python .venv/oldest --resolution lowest-direct \
		-e '.[$(EXTRAS)]' --group test
	touch $@

check: lint types test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not see through setuptools' package mapping: the link shows them the packages.
types: setup
	mkdir -p .typing && ln -sfn '$(CURDIR)' .typing/wanexport
	$(BIN)/mypy -p wanexport.exporter -p wanexport.graphs -p wanexport.runtime
	$(BIN)/mypy tests samples

clean:
	rm -rf .venv .typing .mypy_cache .pytest_cache .ruff_cache build dist demo *.egg-info
