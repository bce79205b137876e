PYTHON ?= python3

.PHONY: run test clean

run: .venv/installed
	.venv/bin/torchrun --standalone train.py

test: .venv/installed
	.venv/bin/python -m pytest -q

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
