PYTHON ?= python3

.PHONY: run test clean

# One process per core of a small machine; with RANKS=1 the same on one process.
RANKS ?= 2

run: .venv/installed
	.venv/bin/torchrun --standalone --nproc-per-node=$(RANKS) train.py

test: .venv/installed
	.venv/bin/python -m pytest -q -n 2 --dist loadfile

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
