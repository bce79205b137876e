"""Problems and scores: public benchmarks, the embedded world, pass@k.

Every problem of the project is a `Problem`: a prompt that the model continues, an expert's continuation where
there is one, and tests. A benchmark's score is the unbiased pass@k over its problems.

    python bench.py --model HuggingFaceTB/SmolLM2-135M                   # a row of the paper's Table 1
    python bench.py --model base --samples 10 --temperature 0.8          # pass@5 and pass@10 too
    python bench.py --out results.jsonl                                  # the row again, from the file
    python bench.py --judge samples.jsonl --benchmarks humanevalplus     # completions made elsewhere
    python bench.py --judge references --benchmarks humaneval,mbpp       # do the references pass?

What a program prints is compared token by token, numbers with a tolerance where a float is expected. `YES` is
not `yes`, as in LiveCodeBench's harness, though some of Codeforces's own checkers take either.
"""
import argparse
import base64
import csv
import gzip
import io
import json
import os
import pickle
import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from math import comb
from pathlib import Path
from statistics import mean, stdev
from textwrap import indent
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
from tqdm import tqdm

from elbo import chunks, statements, strip_comments
from model import GPT, Sample, encode_prompt, generate, load_pretrained
from sandbox import Asserts, Check, InvalidJob, Sandbox, Stdio, Verdict, names_under_test

# ------------------------------------------------------------------------------------------ problems and scores

FENCE = re.compile(r"\s*```[^\n]*\n(?P<code>.*?)(?P<closed>^```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One problem of any benchmark. Prompt and solution meet at a decision point (see elbo.py).

    tests: assert statements (kind "asserts"), one source that defines check(candidate) ("check"), or pairs of
    stdin and stdout ("stdio"). The program is prompt + completion (form "code"), the completion alone ("prose",
    a few-shot prompt), or what stands in its first fence ("chat").
    """
    id: str
    prompt: str
    solution: str = ""                # the expert's continuation of the prompt, where the benchmark has one
    tests: tuple = ()
    kind: str = "asserts"
    names: tuple[str, ...] = ("f",)   # what the tests use of the program; for a check the expression to call
    setup: str = ""                   # trusted code; asserts run it after the program, the others before it
    form: str = "code"
    stop: tuple[str, ...] = ()        # texts at which a completion ends
    timeout_s: float | None = None    # CPU seconds of a program (stdio: of a case); None: the sandbox's own
    date: str = ""                    # of publication, YYYY-MM-DD, where known

    def encode(self, enc) -> list[int]:
        """The tokens of the prompt."""
        if self.form == "chat":       # a chat template writes special tokens as text
            return enc.encode(self.prompt, allowed_special="all")
        return encode_prompt(enc, self.prompt)

    def job(self, completion: str):
        """The sandbox job that tests a completion. One that begins with a fence is a whole program."""
        fence = (FENCE.search if self.form == "chat" else FENCE.match)(completion)
        program = self.prompt + completion if self.form == "code" else completion
        program = fence["code"] if fence else program
        if self.kind == "check":
            return Check(program, self.tests[0], self.names[0], self.setup, self.timeout_s)
        if self.kind == "stdio":
            return Stdio(program, self.tests, self.setup, self.timeout_s)
        return Asserts(program, self.tests, self.setup, self.names, self.timeout_s)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate, from n samples of which c are right, of the chance that one of k is (Chen et al. 2021,
    eq. 1). Raises ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} needs 1 <= k <= n samples and 0 <= c <= n right ones; got n={n}, c={c}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def pass_rates(rows: Iterable[dict], ks: Iterable[int] = ()) -> dict[str, dict]:
    """Per benchmark: problems, samples of each, pass@k in percent, and se@k, its standard error over problems.

    rows: of a results file. ks: by default 1, 5, 10 and 100, as far as there are so many samples.
    """
    tally = defaultdict(lambda: defaultdict(list))
    for row in rows:
        tally[row["benchmark"]][row["id"]].append(row["passed"])
    out = {}
    for name, problems in tally.items():
        n = min(map(len, problems.values()))
        out[name] = dict(problems=len(problems), samples=n)
        for k in sorted({1, *ks}) if ks else [k for k in (1, 5, 10, 100) if k <= n]:
            each = [100 * pass_at_k(len(passed), sum(passed), k) for passed in problems.values()]
            out[name][f"pass@{k}"] = round(mean(each), 3)
            out[name][f"se@{k}"] = round(stdev(each) / len(each) ** 0.5, 3) if len(each) > 1 else None
    return out


TABLE_1 = {"humaneval": "HumanEval", "mbpp": "MBPP", "humanevalplus": "HumanEval+", "mbppplus": "MBPP+"}


def table(model: str, scores: dict[str, dict]) -> str:
    """A row of the paper's Table 1 in Markdown: pass@1 and its standard error, further benchmarks after it.

    The averages are over those of the four benchmarks that were run.
    """
    cells = {"model": model} | dict.fromkeys(TABLE_1.values(), "-")
    for k in (key for key in next(iter(scores.values())) if key.startswith("pass@")):
        rates = [scores[name][k] for name in TABLE_1 if name in scores]
        cells[f"avg {k}"] = f"{mean(rates):.1f}" if rates else "-"
    for name, score in scores.items():
        error = "" if score["se@1"] is None else f" +- {score['se@1']:.1f}"
        cells[TABLE_1.get(name, name)] = f"{score['pass@1']:.1f}{error}"
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells, ["---"] * len(cells), cells.values()))


# ------------------------------------------------------------------------------------- sampling and judging

STRINGS = r"""("{3}|'{3})(?:\\.|.)*?(?:\1|\Z)|#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""    # and comments


def end_of(text: str, stop: tuple[str, ...]) -> int | None:
    """Where a completion ends: with the fence it begins with, or at the first stop text outside of a string."""
    fence = FENCE.match(text)
    if fence:
        return fence.end() if fence["closed"] else None
    pattern = f"{STRINGS}|(?P<stop>{'|'.join(map(re.escape, stop))})"
    found = (m.start() for m in re.finditer(pattern, text, re.DOTALL) if m["stop"])
    return next(found, None)


def has_ended(enc, stop: tuple[str, ...], tokens: list[int]) -> bool:
    """Whether a completion has just come to its end. A token is a byte or more, so a short tail shows it."""
    tail = enc.decode(tokens[-max(map(len, stop)):])
    return any(s in tail for s in stop) and end_of(enc.decode(tokens), stop) is not None


def text_of(enc, tokens: list[int], stop: tuple[str, ...] = ()) -> str:
    """The text of sampled tokens, up to its stop text, without the special token that may end it."""
    special = enc._special_tokens.values()
    text = enc.decode([t for t in tokens if t not in special])
    return text[:end_of(text, stop)] if stop else text


def complete(model: GPT, enc, problems: list[Problem], seeds: list, **sampling) -> tuple[list[Sample], list[str]]:
    """A completion of each problem, and its text up to the stop text. sampling: arguments of `generate`."""
    samples = [Sample()] * len(problems)
    for stop in {p.stop: None for p in problems}:              # `generate` knows one stop rule at a time
        ids = [i for i, p in enumerate(problems) if p.stop == stop]
        drawn = generate(model, [problems[i].encode(enc) for i in ids], seeds=[seeds[i] for i in ids],
                         stop_ids=(model.config.eos_id, *enc._special_tokens.values()),
                         stop=partial(has_ended, enc, stop) if stop else None, **sampling)
        for i, sample in zip(ids, drawn):
            samples[i] = sample
    return samples, [text_of(enc, s.tokens, p.stop) for s, p in zip(samples, problems)]


def judge(box: Sandbox, problems: list[Problem], completions: list[str]) -> Iterator[Verdict]:
    """Yields the verdict on the completion of each problem, as soon as it is there.

    Raises ValueError, with the problem's name, if it is the problem that is wrong.
    """
    try:
        yield from box.iter([p.job(text) for p, text in zip(problems, completions)])
    except InvalidJob as e:
        raise ValueError(f"{problems[e.index].id}: {e.reason}; mend that row, or leave it out") from None


def attempt(model: GPT, enc, problems: list[Problem], seeds: list, box: Sandbox, **sampling):
    """A sample of each problem, and whether it passes: (list[Sample], list[bool]).

    sampling: max_new_tokens, temperature=1.0, batch_size=256, see `generate`. Repeat a problem for a group.
    """
    samples, texts = complete(model, enc, problems, seeds, **sampling)
    return samples, [verdict.passed for verdict in judge(box, problems, texts)]


def evaluate(model: GPT, enc, name: str, problems: list[Problem], box: Sandbox, *, samples: int = 1,
             seed: int = 0, done=frozenset(), batch_size: int = 64, **sampling) -> Iterator[dict]:
    """Yields a row of a results file per sample, but for those in `done`: pairs (id, number of the sample).

    A prompt that does not fit the model's context has failed. The draws depend on (seed, problem, sample) alone,
    not on the batch or on which other problems run.
    """
    todo = [(p, j) for p in problems for j in range(samples) if (p.id, j) not in done]
    long = {p.id for p in problems if len(p.encode(enc)) >= model.limit}
    for part in chunks([(p, j) for p, j in todo if p.id not in long], batch_size):
        picked, seeds = [p for p, _ in part], [(seed, zlib.crc32(p.id.encode()), j) for p, j in part]
        _, texts = complete(model, enc, picked, seeds, batch_size=batch_size, **sampling)
        for (p, j), text, verdict in zip(part, texts, judge(box, picked, texts)):
            yield dict(benchmark=name, id=p.id, sample=j, completion=text) | verdict._asdict()
    for p, j in todo:
        if p.id in long:
            yield dict(benchmark=name, id=p.id, sample=j, completion="", passed=False, kind="prompt too long")


def judge_file(file, name: str, problems: list[Problem], box: Sandbox, done=frozenset()) -> Iterator[dict]:
    """As `evaluate`, of completions made elsewhere, with the columns of human-eval and EvalPlus.

    A row has a task_id and a solution, which is a whole program, or a completion, which follows the last line of
    the benchmark's own prompt. "references" stands for the solutions of the benchmark itself. Raises ValueError
    for a problem without a completion; rows of other problems are passed over.
    """
    given = local_rows([file])
    if file == "references":
        problems = [p for p in problems if p.solution]
        given = [dict(task_id=p.id, solution=p.prompt * (p.form == "code") + p.solution) for p in problems]
    picked, rows, count = [], [], Counter()
    by_id = {p.id.lower(): p for p in problems}
    for row in given:
        p = by_id.get(str(row.get("task_id")).lower())
        if p:
            text, j = str(row.get("solution", row.get("completion"))), count[p.id]
            whole = replace(p, form="prose") if "solution" in row else replace(p, prompt=p.prompt.rstrip(" "))
            count[p.id] += 1
            if (p.id, j) not in done:
                picked.append(whole)
                rows.append(dict(benchmark=name, id=p.id, sample=j, completion=text))
    missing = [p.id for p in problems if not count[p.id]]
    if missing:
        raise ValueError(f"{file} has nothing for {len(missing)} of {len(problems)} problems, {missing[0]} say")
    for row, verdict in zip(rows, judge(box, picked, [row["completion"] for row in rows])):
        yield row | verdict._asdict()


# ---------------------------------------------------------------------------------------------- fitness for RL

# Programs that know nothing of the problem: what such a one passes teaches nothing, or other than programming.
VALUES = ("None", "True", "False", "0", "1", "-1", "''", "[]", "()", "{}", "args[0]", "args[1]", "args[-1]")
PRINTED = ("''", "0", "1", "-1", "'YES'", "'NO'", "'Yes'", "'No'", "input()", "open(0).read()")


def trivial_programs(p: Problem) -> dict[str, str]:
    """What it does -> a program that does it, for each trivial answer."""
    if p.kind == "stdio":
        return {f"print({value})": f"print({value})" for value in PRINTED}
    out = {}
    for value in VALUES:
        program = ""
        for name in p.names:
            method = name.removeprefix("Solution().")
            head = f"def {method}({'self, ' * (method != name)}*args, **more):\n"
            function = head + f"    args += (*more.values(),)\n    return {value}\n"
            program += "class Solution:\n" + indent(function, "    ") if method != name else function
        out[f"return {value}"] = program
    return out


def unfit_for_rl(problems: list[Problem], box: Sandbox) -> dict[str, str]:
    """{id: why} of the problems whose reference (where there is one) fails, or which a trivial program passes."""
    out = {}
    have = [p for p in problems if p.solution]
    for p, verdict in zip(have, judge(box, have, [p.solution for p in have])):
        if not verdict.passed:
            out[p.id] = f"its reference fails: {verdict.kind}"
    whole = [replace(p, form="prose") for p in problems if p.id not in out]
    tries = [(p, what, program) for p in whole for what, program in trivial_programs(p).items()]
    verdicts = judge(box, [p for p, _, _ in tries], [program for _, _, program in tries])
    for (p, what, _), verdict in zip(tries, verdicts):
        if verdict.passed:
            out[p.id] = f"a trivial program passes: {what}"
    return out


# --------------------------------------------------------------------------------------------- rows as problems


def world(kind: str, n: int, seed: int) -> list[Problem]:
    """n different problems of the embedded world (base/world.py), of kind "web", "train" or "eval"."""
    from base.world import rows
    return [Problem(**row) for row in rows(kind, n, seed)]


def plain(text: str) -> str:
    """Lines that end in newlines alone; for Python's tokenizer a form feed, say, ends none."""
    return "".join(line + "\n" for line in text.splitlines())


def meet_at_decision(head: str, body: str = "") -> tuple[str, str]:
    """Prompt and solution that meet at the decision point where `head`, whole lines of code, is continued.

    The indentation there is that of head's last line, the end of a docstring. The solution loses its comment
    lines (elbo.py says why). Raises ValueError if it is not Python, or empty.
    """
    head, body = plain(head.rstrip()), plain(body)
    margin = re.match(r"\s*", head.splitlines()[-1])[0]
    if not body.strip():
        return head + margin[:-1], ""
    text = head + strip_comments(head + body)[len(strip_comments(head)):]
    begins = [i for i in statements(text) if i >= len(head)]
    if not begins:
        raise ValueError("the solution has no statement")
    return head + margin[:-1], text[begins[0] - bool(margin):]


def as_docstring(*parts: str | None) -> str:
    """The task as a module's docstring, raw if need be: LaTeX is full of backslashes."""
    text = plain("\n\n".join(part.strip() for part in parts if part and part.strip())).replace('"""', "'''")
    return "r" * ("\\" in text) + f'"""\n{text}"""\n'


# Faults of EvalPlus's tests as they are on the hub. np.allclose finds [] near to any number; one form of
# `assertion` asserts nothing; and HumanEval/32, a root of a polynomial, takes the root for the polynomial.
MENDED = {
    "assert np.allclose(out, exp,": "assert np.shape(out) == np.shape(exp) and np.allclose(out, exp,",
    " exact_match = exp == (out is not None)\n": " exact_match = exp == (out is not None)\n    assert exact_match\n",
    "assert _poly(*candidate(*inp), inp) <= 0.0001": "assert abs(_poly(*inp, candidate(*inp))) <= 0.0001",
}


def strict(test: str) -> str:
    """A test without the faults of EvalPlus's hub copies."""
    for loose, tight in MENDED.items():
        test = test.replace(loose, tight)
    return test


def humaneval(r: dict) -> Problem:
    prompt, solution = meet_at_decision(r["prompt"], r["canonical_solution"])
    return Problem(str(r["task_id"]), prompt, solution, tests=(strict(r["test"]),), kind="check",
                   names=(r["entry_point"],), setup=r["prompt"])


def mbpp(r: dict, shots: list[dict] = ()) -> Problem:
    """Zero-shot: text and tests in a docstring. With shots: the format of Austin et al. 2021."""
    def parts(row: dict) -> tuple[str, str]:
        return row["text" if "text" in row else "prompt"], "\n".join(row["test_list"])

    def ask(row: dict) -> str:
        task, tests = parts(row)
        return (f"You are an expert Python programmer, and here is your task: {task} Your code should pass these "
                f"tests:\n\n{tests}\n[BEGIN]\n")
    setup = "\n".join(r["test_imports"]) if "test_imports" in r else r["test_setup_code"]
    tests = [strict(r["test"])] if "test" in r else r["test_list"]                   # MBPP+ has one long test
    prompt, solution = meet_at_decision(as_docstring(*parts(r)), r["code"])
    if shots:
        prompt = "".join(f"{ask(s)}{plain(s['code'])}[DONE]\n\n" for s in shots) + ask(r)
    return Problem(f"mbpp/{r['task_id']}", prompt, solution, tests=tuple(tests), setup=setup,
                   names=names_under_test(r["code"], (setup, *r["test_list"])), form="prose" if shots else "code")


class OnlyStr(pickle.Unpickler):
    """Unpickles plain values alone: a pickle that names a class or function could run anything."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; a test case is a str")


def decode_cases(column: str) -> list[dict]:
    """LiveCodeBench's test cases: JSON, or (private ones) base64 of zlib of a pickled str of JSON."""
    if not column.lstrip().startswith("["):
        column = OnlyStr(io.BytesIO(zlib.decompress(base64.b64decode(column)))).load()
    return json.loads(column)


# What LiveCodeBench's own harness sets before a program. builtins stand late, as math's pow hides Python's.
MODULES = ("string re datetime collections heapq bisect copy math random statistics itertools functools operator "
           "io sys json").split()
IMPORTS = "\n".join([*(f"from {m} import *" for m in (*MODULES, "builtins", "typing")),
                     *(f"import {m}" for m in MODULES),
                     "sys.setrecursionlimit(50000)", "sys.set_int_max_str_digits(50000)", ""])
CHECK = """def listed(x):
    return [listed(y) for y in x] if isinstance(x, (list, tuple)) else x  # a tuple will do for a list

def check(candidate):
"""


def livecodebench(r: dict) -> Problem:
    """LeetCode's problems call a method, with arguments and result in JSON; the others read stdin."""
    cases = decode_cases(r["public_test_cases"]) + decode_cases(r["private_test_cases"] or "[]")
    prompt, _ = meet_at_decision(as_docstring(r["question_content"], r["starter_code"]))
    p = Problem(f"lcb/{r['question_id']}", prompt, setup=IMPORTS, date=str(r["contest_date"])[:10])
    if not r["starter_code"].strip():
        return replace(p, tests=tuple((c["input"], c["output"]) for c in cases), kind="stdio", names=())
    check = CHECK
    for case in cases:
        given, wanted = [json.loads(line) for line in case["input"].splitlines()], json.loads(case["output"])
        check += f"    assert listed(candidate(*{given!r})) == {wanted!r}\n"
    name = f"Solution().{json.loads(r['metadata'])['func_name']}"
    return replace(p, tests=(check,), kind="check", names=(name,), timeout_s=min(6.0 * len(cases), 60.0))


def code_contests(r: dict) -> Problem | None:
    """All tests, and the first of hundreds of solutions that is Python 3. None: the program should read a file."""
    if r["input_file"]:
        return None
    solutions = zip(r["solutions"]["language"], r["solutions"]["solution"])
    for text in [*(text for language, text in solutions if language == 3), ""]:
        try:
            prompt, solution = meet_at_decision(as_docstring(r["description"]), text)
            break
        except ValueError:
            continue
    parts = [r[key] for key in ("public_tests", "private_tests", "generated_tests")]
    cases = tuple(case for part in parts for case in zip(part["input"], part["output"]))
    return Problem(str(r["name"]), prompt, solution, tests=cases, kind="stdio", names=())


def codeforces(r: dict) -> Problem | None:
    """None: it reads a file, talks to its judge, or has several right answers, which only its checker can tell."""
    if r["input_mode"] != "stdio" or r["interaction_format"] or r["generated_checker"]:
        return None
    shown = [f"Input:\n{case['input']}\nOutput:\n{case['output']}" for case in r["examples"] or ()]
    text = as_docstring(r["description"], r["input_format"], r["output_format"], *shown, r["note"])
    cases = tuple((case["input"], case["output"]) for case in r["official_tests"] or ())
    return Problem(f"codeforces/{r['id']}", meet_at_decision(text)[0], tests=cases, kind="stdio", names=())


def leetcode(r: dict) -> Problem:
    """The text ends with the code to complete, which names the method. `prompt` holds imports and node classes."""
    prompt, solution = meet_at_decision(as_docstring(r["query"]), r["completion"])
    return Problem(f"leetcode/{r['task_id']}", prompt, solution, tests=(r["test"],), kind="check",
                   names=(r["entry_point"],), setup=r["prompt"], date=str(r.get("estimated_date") or "")[:10])


# ------------------------------------------------------------------------------------------- public benchmarks

# Where completions end. In a function: where code stands at the margin. A whole program may define things there.
IN_FUNCTION = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert", "\nimport", "\nfrom", "\n```")
PROGRAM = ("\nassert", "\nprint", "\nif __name__", '\n"""', "\n```")
SCRIPT = ('\n"""', "\n```")


class Source(NamedTuple):
    """Where a benchmark's rows come from and how a row becomes a Problem."""
    hub: str
    files: str                              # in --data-dir; {} is the split
    problem: Callable[..., Problem | None]
    stop: tuple[str, ...]                   # where completions end
    timeout_s: float = 10.0                 # for a program; some references of HumanEval+ and MBPP+ take 26
    subset: str | None = None
    shots: tuple[int, ...] = ()             # task ids of the split "prompt"
    hub_files: str | None = None            # JSON files, where `datasets` no longer runs the loading script


MBPP = "google-research-datasets/mbpp", "mbpp/full/{}.jsonl", mbpp
SOURCES = {
    "humaneval": Source("openai/openai_humaneval", "openai_humaneval/{}.jsonl", humaneval, IN_FUNCTION),
    "humanevalplus": Source("evalplus/humanevalplus", "humanevalplus/{}.jsonl", humaneval, IN_FUNCTION, 40.0),
    "mbpp": Source(*MBPP, ("[DONE]",), subset="full", shots=(2, 3, 4)),
    "mbpp-docstring": Source(*MBPP, PROGRAM, subset="full"),
    "mbppplus": Source("evalplus/mbppplus", "mbppplus/{}.jsonl", mbpp, PROGRAM, 40.0),
    "livecodebench": Source("livecodebench/code_generation_lite", "livecodebench/*.jsonl", livecodebench, SCRIPT,
                            hub_files="test*.jsonl"),
    "code_contests": Source("deepmind/code_contests", "code_contests/{}*.jsonl", code_contests, SCRIPT),
    "codeforces": Source("open-r1/codeforces", "open-r1_codeforces/{}*.jsonl", codeforces, SCRIPT),
    "leetcode": Source("newfacade/LeetCodeDataset", "leetcode_dataset/{}.jsonl", leetcode, PROGRAM),
}


def load(names: str, data_dir=None, *, limit: int | None = None, dates: str = "") -> list[Problem]:
    """The problems of "world", or of benchmarks `name[:split][@where]` with commas between, in the order of rows.

    `@where` names another hub dataset, or files (`*` stands for any), with rows of the same columns:
    `leetcode:train@me/my-problems`. A problem that two benchmarks hold (MBPP, MBPP+) counts once.
    data_dir: a folder with files as in `Source.files`; None: the hub. dates: `2024-01-31:2024-06-30`, the second
    excluded, either may be empty; problems without a date stay. Raises ValueError for what cannot be had.
    """
    if not re.fullmatch(r"((\d{4}-\d\d-\d\d)?:(\d{4}-\d\d-\d\d)?)?", dates):
        raise ValueError(f"{dates!r} are no dates: expected YYYY-MM-DD:YYYY-MM-DD, of which one may be empty")
    if names.strip() == "world":
        return world("eval", limit or 200, seed=0)
    since, _, until = dates.partition(":")
    found: dict[str, Problem] = {}
    for name in map(str.strip, names.split(",")):
        problems = []
        for p in read_problems(name, data_dir):
            if not p.date or since <= p.date < (until or "9999"):
                problems.append(p)
            if len(problems) == limit:
                break
        if not problems:
            raise ValueError(f"{name}: no problem " + (f"in {dates}: widen --dates" if dates else "in it"))
        for p in problems:
            found.setdefault(p.id, p)
    return list(found.values())[:limit]


def read_problems(name: str, data_dir) -> Iterator[Problem]:
    """Yields the problems of one benchmark that have tests."""
    key, _, where = name.partition("@")
    key, _, split = key.partition(":")
    if key not in SOURCES:
        raise ValueError(f"unknown benchmark {key!r}: expected world, alone, or some of {', '.join(SOURCES)}")
    source = SOURCES[key]
    shots = [r for r in rows_of(source, "prompt", "", data_dir) if r["task_id"] in source.shots] if source.shots else []
    if len(shots) != len(source.shots):
        raise ValueError(f"{name}: the split 'prompt' lacks one of the examples {source.shots}; try mbpp-docstring")
    ids = Counter()
    for n, row in enumerate(rows_of(source, split or "test", where, data_dir), 1):
        try:
            p = source.problem(row, shots) if shots else source.problem(row)
            if p:                                          # raise TypeError for what should be text and is not
                "".join([p.id, p.prompt, p.setup, *p.names, *map("".join, p.tests)])
        except Exception as e:                             # nothing is known of a row that is not what it should be
            raise ValueError(f"{name}: row {n} is unreadable ({one_line(e)}): expected the columns of {source.hub}, "
                             f"got {', '.join(row)}") from None
        if p and p.tests:
            ids[p.id] += 1                                 # scores are by id: no two problems may share one
            p = replace(p, id=f"{p.id}#{ids[p.id]}") if ids[p.id] > 1 else p
            yield replace(p, stop=source.stop, timeout_s=p.timeout_s or source.timeout_s)


def rows_of(source: Source, split: str, where: str, data_dir) -> Iterator[dict]:
    """The rows of a split: from `where` (files or a hub dataset), from data_dir, or from the hub."""
    if not where and data_dir is None:
        return hub_rows(source.hub, split, source.subset, source.hub_files)
    pattern = where or str(Path(data_dir, source.files.format(split)))
    files = sorted(glob(pattern))
    if files:
        return local_rows(files)
    if where:
        return hub_rows(where, split)
    raise ValueError(f"there is no file {pattern}: put the rows of {source.hub} there, one JSON object per line")


# -------------------------------------------------------------------------------------------------- rows of data


def local_rows(files: Iterable) -> Iterator[dict]:
    """Yields the rows of files: .jsonl, .json (one array), .csv (all these also .gz), .parquet; a .py file is a row
    with one column, `text`. Raises ValueError for a file or row that cannot be read.
    """
    for file in map(Path, files):
        n = 1
        try:
            for row in file_rows(file):
                yield {**row}
                n += 1
        except Exception as e:
            raise ValueError(f"{file}, row {n}, cannot be read ({one_line(e)}): expected Python, Parquet, CSV, a JSON "
                             "array of objects, or JSONL with one object per line, in UTF-8") from None


def file_rows(file: Path) -> Iterator[dict]:
    """Yields the rows of one file."""
    if file.suffix == ".parquet":
        import datasets
        yield from datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        return
    if file.suffix == ".py":                                # surrogates, as no parser takes them for Python
        yield {"text": file.read_text(encoding="utf-8-sig", errors="surrogateescape")}
        return
    opener, name = (gzip.open, file.stem) if file.suffix == ".gz" else (open, file.name)
    with opener(file, "rt", encoding="utf-8-sig", newline="") as f:
        if name.endswith(".csv"):
            csv.field_size_limit(2**31 - 1)
            yield from csv.DictReader(f)
        elif name.endswith(".json"):
            yield from json.load(f)
        else:                                               # `datasets` cannot name the bad line, and takes "" for null
            yield from (json.loads(line) for line in f if line.strip())


def hub_rows(name: str, split: str, subset: str | None = None, files: str | None = None, start: int = 0):
    """Yields the rows of a dataset on the hub, from row `start` on; files: JSON files of it. Raises ValueError."""
    import datasets
    from huggingface_hub import HfApi, constants
    try:
        offline = constants.HF_HUB_OFFLINE                  # then from the local cache
        if not offline:
            HfApi().dataset_info(name, timeout=10)          # fails at once; load_dataset tries for half a minute
        if files:
            where = f"hf://datasets/{name}/{files}"
            data = datasets.load_dataset("json", data_files=where, split="train", streaming=True)
        else:
            data = datasets.load_dataset(name, subset, split=split, streaming=not offline)
        yield from data.skip(start)
    except Exception as e:                                  # the many ways of a network to fail
        raise ValueError(f"there is no file {name!r}, and the hub dataset of that name, split {split!r}, cannot be read "
                         f"({one_line(e)}): check the spelling and the connection; if it is gated or private, run "
                         "`hf auth login`") from None


def one_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}"


# ------------------------------------------------------------------------------------------- the command line

ASK = "Complete this Python program. Answer with the whole program, in one fenced block.\n\n```python\n{}\n```"


def as_chat(p: Problem, tokenizer) -> Problem:
    """The problem as a question in the chat format of a tokenizer of `transformers`."""
    content = p.prompt if p.form == "prose" else ASK.format(p.prompt.rstrip())
    prompt = tokenizer.apply_chat_template([dict(role="user", content=content)], tokenize=False, add_generation_prompt=True)
    return replace(p, prompt=prompt, form="chat", stop=())


def read_results(file: Path) -> tuple[dict, list[dict]]:
    """The settings and the rows of a results file. Raises ValueError for another kind of file."""
    lines = file.read_bytes().split(b"\n")[:-1]             # a process that was killed may leave half a line
    try:
        first, *rows = map(json.loads, lines)
        return first["settings"], rows
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is not a results file: expected the lines that bench.py --out writes") from None


def resume(file: Path, settings: dict) -> list[dict]:
    """The rows that a results file holds; a new file is begun. Raises ValueError for one with other settings."""
    if not file.exists():
        file.write_text(json.dumps({"settings": settings}) + "\n")
        return []
    earlier, rows = read_results(file)
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise ValueError(f"{file} holds samples of other settings ({key}: {earlier.get(key)}, not {value}): name "
                             "another file with --out, or remove this one")
    os.truncate(file, file.read_bytes().rindex(b"\n") + 1)
    return rows


def run(args: argparse.Namespace) -> list[dict]:
    """Judge the samples that the results file does not hold yet, drawn or given, and write each at once."""
    names = [name.strip() for name in args.benchmarks.split(",")]
    benchmarks = {name: load(name, args.data_dir, limit=args.limit, dates=args.dates) for name in names}
    rows = resume(args.out, {key: value for key, value in vars(args).items() if key not in ("out", "k", "batch_size")})
    with Sandbox() as box, open(args.out, "a") as out:
        if not args.judge:
            device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
            model, enc = load_pretrained(args.model, device, getattr(torch, dtype))
        for name, problems in benchmarks.items():
            done = {(r["id"], r["sample"]) for r in rows if r["benchmark"] == name}
            if args.judge:
                fresh = judge_file(args.judge, name, problems, box, done)
            else:
                if args.chat:                               # a template is a program in Jinja, as `transformers` runs it
                    from transformers import AutoTokenizer
                    tokenizer = AutoTokenizer.from_pretrained(enc.source.parent)
                    problems = [as_chat(p, tokenizer) for p in problems]
                fresh = evaluate(model, enc, name, problems, box, samples=args.samples, seed=args.seed, done=done,
                                 batch_size=args.batch_size, temperature=args.temperature,
                                 max_new_tokens=args.max_new_tokens)
            for row in tqdm(fresh, desc=name, total=len(problems) * args.samples - len(done)):
                rows.append(row)
                print(json.dumps(row), file=out, flush=True)
    return rows


def command(args: argparse.Namespace) -> dict:
    """What the command line asks for; returns its JSON line. Raises ValueError for what cannot be done."""
    for name in ("samples", "max_new_tokens", "batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if args.temperature < 0 or args.temperature == 0 and args.samples > 1:
        raise ValueError(f"--temperature {args.temperature:g} does not do for {args.samples} samples: it must be 0 for one "
                         "greedy sample, or positive, say 0.8")
    if args.model and max(args.k, default=1) > args.samples:
        raise ValueError(f"--k {max(args.k)} needs as many --samples; got {args.samples}")
    if args.model or args.judge:
        rows = run(args)
    elif args.out.exists():
        _, rows = read_results(args.out)
    else:
        raise ValueError("--model is missing: give the folder of a model or its name on the hub")
    scores = pass_rates(rows, args.k)
    print(table(args.model or args.judge or str(args.out), scores))
    if args.judge == "references":
        print(*(f"{r['benchmark']} {r['id']}: {r['kind']}" for r in rows if not r["passed"]), sep="\n")
    return dict(results=str(args.out), scores=scores)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="A row of the paper's Table 1 for a model, then a JSON line.")
    add = parser.add_argument
    add("--model", help="a folder in the Hugging Face layout, or a hub name; without: only the scores of --out")
    add("--judge", metavar="FILE", help="judge completions made elsewhere: rows with task_id and completion or "
                                        "solution, as human-eval and EvalPlus have them; or the word references")
    add("--benchmarks", default=",".join(TABLE_1), help=f"of world, {', '.join(SOURCES)}; leetcode:train is its split")
    add("--data-dir", help="folder with the benchmarks as JSONL; without it they come from the hub")
    add("--limit", type=int, help="only the first so many problems of each benchmark")
    add("--dates", default="", help="only problems of these dates, the second excluded: 2024-01-31:2024-06-30")
    add("--samples", type=int, default=1, help="completions of each problem")
    add("--k", type=int, nargs="+", default=[], help="of pass@k; default: 1, 5, 10, 100 as far as the samples go")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
    add("--max-new-tokens", type=int, default=512, help="longest completion")
    add("--chat", action="store_true", help="ask in the model's chat format; the answer's first fence is judged")
    add("--seed", type=int, default=0, help="of all samples")
    add("--batch-size", type=int, default=64, help="samples that grow side by side, and then are judged")
    add("--device", help="default: the GPU where there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights; default: bfloat16 but on a CPU")
    add("--out", type=Path, default=Path("results.jsonl"), help="every sample with its verdict; a run that was cut "
                                                                "off goes on where this file ends")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(command(args)))
    except (ValueError, OSError, RuntimeError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"bench.py: interrupted; the same command goes on where {args.out} ends")


if __name__ == "__main__":
    main()
