# Everything works on a fresh clone with Python 3.11 and make; the first call makes .venv, later ones install nothing.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON := $(shell command -v python3.11 || command -v python3)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check fix docs fuzz crash peers clean quantised
demo: $(READY)
	$(BIN)/loraloom demo --out runs/demo --overwrite

test: $(READY) check
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -rs --durations 8

check: $(READY)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/results/tables.py --check

fix: $(READY)
	$(BIN)/ruff check --no-cache --fix .
	$(BIN)/ruff format .

# Ten thousand damaged inputs, other ones each time.
fuzz: $(READY)
	cd tests && PYTHONPATH=. $(CURDIR)/$(BIN)/python -m fuzz.cases --cases 10000

# Every line and call of a write, then two hundred kills at random moments.
crash: $(READY)
	LORALOOM_ALL_MOMENTS=1 $(BIN)/python -m pytest -q tests/crash
	cd tests && PYTHONPATH=. OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m crash.rounds --rounds 200

docs: $(READY)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/results/tables.py

# Tests of quantised bases: their packages (170 MB) lie beside the environment, where other tests do not see them.
quantised: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/quantised bitsandbytes torchao
	PYTHONPATH=build/quantised $(BIN)/python -m pytest -q tests/integrations/test_quantised.py

# lm-evaluation-harness wants an older python-dateutil than the rest: an environment of its own, seldom needed.
peers:
	$(PYTHON) -m venv .venv-peers
	grep -v python-dateutil constraints.txt > .venv-peers/constraints.txt
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-peers/constraints.txt -e '.[lm-eval]' pytest
	cd peers && ../.venv-peers/bin/python -m pytest -q -c /dev/null -p no:cacheprovider .

clean:
	rm -rf $(VENV) .venv-peers runs build dist .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
