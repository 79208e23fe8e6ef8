# make demo     environment, model, one paper measured again, report, and a generation with its Trace
# make test     environment and the tests
# make lint     ruff and mypy
# make bench    decoders side by side
# make docs     the documentation, into site/
#
# PYTHON=python3.12 make ... chooses the Python that the environment is made with (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench docs

demo: $(INSTALLED)
	@echo "==> Fetching the model smollm2-135m (93 MB; kept, so only once)"
	$(BIN)/tokenworks models --fetch smollm2-135m
	@echo "==> Measuring Token Recycling again, the quick way"
	$(BIN)/tokenworks reproduce token-recycling --quick
	@echo "==> Writing the report"
	$(BIN)/tokenworks report --out report.html
	@echo "==> Generating with a Trace: every token, and how it came about"
	$(BIN)/tokenworks generate "Explain in two sentences why the sky is blue." --trace
	@echo "==> Done. Open the report in a browser: $(CURDIR)/report.html"

test: $(INSTALLED)
	@echo "==> Running the tests, in two processes of one thread"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	@echo "==> Checking style and types"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED)
	@echo "==> Running the decoders side by side"
	$(BIN)/python benchmarks/decode.py

docs: $(INSTALLED)
	@echo "==> Building the documentation into site/"
	$(BIN)/mkdocs build --strict

# The stamp is written last, so whatever was interrupted is taken up again. An environment without a working pip
# was cut off while it was made, and is made anew; any other is kept, since PyTorch takes long to install.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "tokenworks needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: make PYTHON=python3.12"; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "==> Making the environment $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "==> Installing tokenworks and what it needs (PyTorch is large: the first time takes minutes)"
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@
