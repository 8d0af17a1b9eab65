# `make demo` and `make test` are all that a fresh clone needs. Installs are stamped: a second make does not repeat them.
PYTHON ?= python3
VENV := .venv
AUDIT := .venv-audit
PIP := $(VENV)/bin/python -m pip
RUN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python
# The names of our folders (for mypy) come from pyproject.toml, through tests/house/typing_tree.py.

.PHONY: help demo test lint sweep faults audit install ops constraints clean

help:
	@echo "make demo         install, then train one model of text, pictures and sounds, kill, resume, export, generate"
	@echo "make test         install, then run the tests"
	@echo "make lint         ruff and mypy"
	@echo "make sweep        the tests that take minutes each"
	@echo "make faults       every fault that is injected, the slow ones too"
	@echo "make audit        look the pinned versions up among known weaknesses (asks PyPI)"
	@echo "make constraints  write constraints.txt from what is installed"
	@echo "make clean        remove what make made (not runs/)"

demo: $(VENV)/stamp-run $(VENV)/stamp-comm
	$(VENV)/bin/python -m millrace.launch.demo

# Tests that start several ranks use two cores by themselves; the others run two at a time.
test: $(VENV)/stamp-dev $(VENV)/stamp-ops
ifdef ARGS
	$(RUN) -m pytest -m "not slow" $(ARGS)
else
	$(RUN) -m pytest -m "not slow and not ranks" -n 2 --dist loadfile
	$(RUN) -m pytest -m "not slow and ranks"
endif

sweep: $(VENV)/stamp-dev $(VENV)/stamp-ops
	$(RUN) -m pytest -m slow $(ARGS)

faults: $(VENV)/stamp-dev $(VENV)/stamp-ops
	$(RUN) -m pytest tests/faults $(ARGS)

lint: $(VENV)/stamp-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python tests/house/typing_tree.py

# --strict: without it a package that the index knows nothing about is passed over, and the audit is clean.
audit: $(AUDIT)/bin/pip-audit
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

$(AUDIT)/bin/pip-audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit

install: $(VENV)/stamp-dev $(VENV)/stamp-ops

ops: $(VENV)/stamp-ops

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("millrace needs Python 3.11 or later; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# What the demo and every command need. Torch is pinned by constraints.txt: any other would pull in another build.
$(VENV)/stamp-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): one to three minutes"
	$(PIP) install --quiet -c constraints.txt -e '.[eval]'
	touch $@

$(VENV)/stamp-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): one to three minutes"
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/stamp-run

# DeepSpeed's operators, compiled once for this environment; again when DeepSpeed or torch may have changed.
# The demo waits for the one that it uses only.
$(VENV)/stamp-comm: constraints.txt | $(VENV)/stamp-run
	$(VENV)/bin/python -m millrace.launch.build_ops ShareMemCommBuilder
	touch $@

$(VENV)/stamp-ops: $(VENV)/stamp-comm
	$(VENV)/bin/python -m millrace.launch.build_ops
	touch $@

constraints: $(VENV)/stamp-dev
	$(VENV)/bin/python .ci/constraints.py > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) $(AUDIT) .typing build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
