"""The embedded world and the maker of its base model."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken

import bench
from base import pretrain, world
from elbo import parse
from model import load_tokenizer
from sandbox import Sandbox

ROOT = Path(__file__).resolve().parents[1]
EOS = 256
ENC = tiktoken.Encoding("bytes", pat_str=pretrain.GPT2_CUTS, mergeable_ranks={bytes([i]): i for i in range(256)},
                        special_tokens={"<|endoftext|>": EOS})


@pytest.fixture(scope="module")
def box():
    with Sandbox(2) as box:
        yield box


def test_world_is_a_function_of_its_arguments_and_splits_are_disjoint():
    train, held, web = bench.world("train", 60, 0), bench.world("eval", 60, 0), bench.world("web", 60, 0)
    assert train == bench.world("train", 60, 0) and train != bench.world("train", 60, 1)
    assert {p.prompt for p in held}.isdisjoint(p.prompt for p in train + web)
    assert all(len({p.prompt for p in ps}) == len({p.id for p in ps}) == 60 for ps in (train, held, web))
    with pytest.raises(ValueError, match="unknown kind"):
        bench.world("test", 1, 0)


def test_world_programs_pass_carry_no_comments_and_no_changed_constant_passes(box):
    problems = bench.world("train", 12, 1) + bench.world("eval", 12, 1)
    for p in problems:
        assert "#" not in p.solution and ENC.decode(parse(ENC, p.prompt, p.solution, EOS).prompt) == p.prompt
    assert all(v.passed for v in bench.judge(box, zip(problems, [p.solution for p in problems])))
    # A constant stands after + - < >; on values from -70 to 70 one more or less changes what the program
    # returns, unless a step beside it makes it void (`x > 9` after `x > 12`): a few survivors are no fault.
    mutants = [(p, p.solution[:m.start(1)] + str(int(m[1]) + d) + p.solution[m.end(1):])
               for p in problems for m in re.finditer(r"x [-+<>*] (\d+)", p.solution) for d in (1, -1)]
    survived = sum(v.passed for v in bench.judge(box, mutants))
    assert len(mutants) > 30 and survived <= len(mutants) // 10


def test_web_code_is_commented_here_and_there():
    share = sum("#" in p.solution for p in bench.world("web", 200, 0)) / 200
    assert 0.1 < share < 0.9


def test_a_step_means_what_its_lines_do():
    xs = [3, -8, 0, 12, 7, 7, -1]
    for kind in world.LINES:
        step = world.Step(kind, (("", 3), ("*", 4), ("-", 5)) if kind in world.COMPUTED else ())
        space = {"xs": list(xs)}
        exec("\n".join(step.lines()), space)
        assert space["xs"] == step.run(xs)
    step = world.Step("add", (("", 3), ("*", 4), ("-", 5)))
    assert step.text() == "add 3 * 4 - 5" and step.lines() == ["xs = [x + 7 for x in xs]"]
    assert [step.working(n) for n in (1, 2, 3)] == ["3", "3 * 4 = 12", "3 * 4 = 12 - 5 = 7"]


def test_the_base_models_tokenizer_can_be_made_again(tmp_path):
    """All of its merges take half a minute to learn, so here the first 24; and the file, of the shipped ranks."""
    base = load_tokenizer(ROOT / "base")
    learnt = pretrain.train_tokenizer(256 + 24 + 1)._mergeable_ranks
    assert len(learnt) == 256 + 24 and learnt.items() < base._mergeable_ranks.items()
    assert pretrain.train_tokenizer.__defaults__ == (base.n_vocab,)
    enc = tiktoken.Encoding("shipped", pat_str=pretrain.GPT2_CUTS, mergeable_ranks=base._mergeable_ranks,
                            special_tokens=base._special_tokens)
    pretrain.write_tokenizer(enc, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "base" / name).read_bytes()
    back, text = load_tokenizer(tmp_path), "def f(xs):\n    # 3 * 4 = 12\n    return xs[::-1]  # é\n"
    assert back.encode_ordinary(text) == enc.encode_ordinary(text) and back.eot_token == enc.eot_token
    orphan = tiktoken.Encoding("orphan", pat_str=pretrain.GPT2_CUTS, special_tokens={},
                               mergeable_ranks={bytes([i]): i for i in range(256)} | {b"abc": 256})
    with pytest.raises(ValueError, match="no merge makes the token b'abc'"):
        pretrain.write_tokenizer(orphan, tmp_path)


def test_a_model_that_is_there_is_not_written_over():
    before = (ROOT / "base/model.safetensors").stat().st_mtime
    command = [sys.executable, ROOT / "base/pretrain.py", ROOT / "base", "--tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "holds a model already" in done.stderr and "--force" in done.stderr
    assert (ROOT / "base/model.safetensors").stat().st_mtime == before


def test_the_script_prints_programs():
    done = subprocess.run([sys.executable, ROOT / "base/world.py", "eval"], capture_output=True, text=True)
    assert done.stdout == "".join(row["prompt"] + row["solution"] + "\n" for row in world.rows("eval", 4, 0))
