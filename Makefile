PYTHON ?= python3

.PHONY: run test lint clean

# One process per core of a small machine; with RANKS=1 the same on one process.
RANKS ?= 2
NAME := $(or $(NAME),$(shell date +%Y%m%d-%H%M%S))

run: .venv/installed
	.venv/bin/torchrun --standalone --nproc-per-node=$(RANKS) train.py --name $(NAME)
	.venv/bin/python docs/report.py runs/$(NAME)

# The longest files first, or the worker that began with one last would be alone at the end; one thread each, or the
# workers get in each other's way.
test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/test_scale.py tests/test_train.py tests/test_resume.py tests

# Rules and their reasons stand in pyproject.toml.
lint: .venv/installed
	.venv/bin/ruff check .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
