# Two commands for a fresh machine: `make demo` draws a picture, `make test` runs every check. Only Python >= 3.11 is needed.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# one more than cores: many tests wait for processes of their own
WORKERS ?= 3
export PYTHONSAFEPATH = 1
export HF_HUB_DISABLE_TELEMETRY = 1

PROMPT ?= a red circle left of a blue square on a yellow background

.PHONY: demo test lint types install install-dev link clean

demo: install
	$(BIN)/sglang generate --prompt "$(PROMPT)" --seed 1

test: install-dev lint types
	PYTHONPATH=.src $(BIN)/lint-imports --no-logo
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev link

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.installed

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy -p sgl_diffusion

# static tools do not follow the import hook of an editable install: a folder of links shows them the package
link:
	mkdir -p .src/sgl_diffusion
	for f in kernels models runtime server cli bench; do ln -sfn ../../$$f .src/sgl_diffusion/$$f; done
	ln -sfn ../../facade/__init__.py .src/sgl_diffusion/__init__.py
	ln -sfn ../../facade/__main__.py .src/sgl_diffusion/__main__.py
	ln -sfn ../../facade/py.typed .src/sgl_diffusion/py.typed

clean:
	rm -rf .venv .triton-3.6 .src build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
