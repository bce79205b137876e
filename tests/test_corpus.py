"""Corpora: programs of files, folders and datasets, cleaned and cut."""
import itertools
import json
from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi

from elbo import statements
from model import load_tokenizer
from mstep import corpus, pieces

GOOD = ("# a comment line\nimport os\n\n\n@property\ndef f(x):\n    # why\n    return x  # kept\n\n\n"
        "class A:\n    y = 1\n")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_programs_are_cleaned_and_cut(tmp_path):
    long = f"s = '{'y' * 400}'\n"
    texts = [GOOD, "This is a text, no program", "print 'python 2'", "", "x = 1\r\n", "if x:\n", long]
    name = write(tmp_path / "c.jsonl", [{"content": text} for text in texts])
    whole = "import os\n\n\n@property\ndef f(x):\n    return x  # kept\n\n\nclass A:\n    y = 1\n"
    assert list(corpus(name, "content", 200)) == [(0, whole), (4, "x = 1\n")]
    f, A = "@property\ndef f(x):\n    return x  # kept\n", "class A:\n    y = 1\n"
    assert list(corpus(name, "content", 50)) == [(0, "import os\n"), (0, f), (0, A), (4, "x = 1\n")]
    assert next(corpus(name, "content", 200, comments=True)) == (0, GOOD)


def test_a_text_that_is_missing_is_no_program(tmp_path):
    name = write(tmp_path / "c.jsonl", [{"text": None}, {"text": "x = 1\n"}])
    assert list(corpus(name)) == [(1, "x = 1\n")]


def test_a_corpus_reads_on_from_a_row(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.py").write_text(f"a = {i}\n\n\ndef f():\n    return {i}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/left_out.py").write_text("x = 1\n")
    straight = list(corpus(str(tmp_path), limit=25))
    assert len(straight) == 14 and [row for row, _ in straight] == sorted([*range(7)] * 2)
    assert list(corpus(str(tmp_path), limit=25, start=3)) == straight[6:]


def test_parquet_and_the_standard_library(tmp_path):
    datasets.Dataset.from_dict({"code": ["x = 1\n", "y = 2\n"]}).to_parquet(str(tmp_path / "p.parquet"))
    assert list(corpus(str(tmp_path / "p.parquet"), "code")) == [(0, "x = 1\n"), (1, "y = 2\n")]
    found = [text for _, text in itertools.islice(corpus("stdlib", limit=2000), 15)]
    assert all(len(text) <= 2000 and statements(text) for text in found)
    plain = [text for text in found if '"""' not in text and "'''" not in text]
    assert plain and not any(line.startswith("#") for text in plain for line in text.splitlines())


def test_a_hub_dataset_is_streamed_by_name_and_column(monkeypatch):
    asked = []
    rows = datasets.Dataset.from_dict({"content": [f"x = {i}\n" for i in range(5)]}).to_iterable_dataset()
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, **_: asked.append(name))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: asked.append((a, kw)) or rows)
    assert list(corpus("me/code", "content", start=3)) == [(3, "x = 3\n"), (4, "x = 4\n")]
    assert asked == ["me/code", (("me/code", None), {"split": "train", "streaming": True})]


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(ValueError, match="row 1 has no column 'txt'; its columns are text"):
        list(corpus(write(tmp_path / "c.jsonl", [{"text": "x = 1\n"}]), "txt"))


def test_a_gated_dataset_is_called_so(monkeypatch):
    def refuse(*a, **kw):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'me/code' is a gated dataset on the Hub.")
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, **_: None)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="'me/code' is a gated dataset .*hf auth login"):
        list(corpus("me/code"))


def test_odd_files_are_read_as_python_reads_them(tmp_path):
    """A coding cookie, a byte order mark; characters that end a line for str.splitlines, inside literals; one that is no text at all."""
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    odd = "x = '\u2028 \x1c \x0b \x85'\ny = 2\n"
    (tmp_path / "c.py").write_text(odd, encoding="utf-8")
    (tmp_path / "d.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "e.py").write_bytes(b"# -*- coding: klingon -*-\nx = 1\n")
    assert [text for _, text in corpus(str(tmp_path))] == ["x = 'é'\n", "x = 1\n", odd]


def test_a_run_of_a_million_spaces_does_not_end_a_corpus():
    """tiktoken failed on one with a PanicException, which is no Exception."""
    enc = load_tokenizer(Path(__file__).parent.parent / "base")
    for run in (" ", "\t"):
        text = "x = [1," + run * 1_000_000 + "2]\n"
        assert pieces(text, 10 ** 9, lambda text: len(enc.encode_ordinary(text)), False) == [text]
    assert pieces("x = [1,      2]\n", 99, len, False) == ["x = [1,      2]\n"]
