# make demo: the whole path on data it makes itself.  make test: everything that CI checks.
# Both set up .venv first, with PYTHON (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
TYPED := .venv/typed

.PHONY: demo test clean

demo: .venv/installed-train
	$(BIN)/ssdcore demo

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# What users get: an installed copy, read from outside the repository, where kernels/ is ssdcore.kernels.
	rm -rf $(TYPED) build && $(BIN)/pip install --quiet --no-deps --target $(TYPED) .
	cd $(TYPED) && ../bin/mypy --config-file ../../pyproject.toml -p ssdcore
	# Two processes of one thread each, and alone what measures time.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not timing'
	$(BIN)/pytest -m timing

.venv/installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"ssdcore needs Python 3.11 or later, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build *.egg-info demo
