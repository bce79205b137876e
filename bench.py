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
import contextlib
import gzip
import io
import json
import os
import pickle
import re
import sys
import tokenize
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from itertools import islice
from math import comb
from pathlib import Path
from statistics import mean, stdev
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
from tqdm import tqdm

from elbo import chunks, statements, strip_comments
from model import GPT, Sample, encode_prompt, generate, load_pretrained
from sandbox import Asserts, Check, InvalidJob, Sandbox, Stdio, Verdict, names_under_test

# ---------------------------------------------------------------------------------------- problems and scores

FENCE = re.compile(r"\s*```[^\n]*\n(?P<code>.*?)(?P<end>^```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One problem of any benchmark. Prompt and solution meet at a decision point (see elbo.py).

    tests: assert statements (kind "asserts"), one source that defines check(candidate) ("check"), or pairs of
    stdin and stdout ("stdio"). The program is prompt + completion (form "code"), the completion alone (after
    few-shot "prose"), or what stands in its first fence ("chat").
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
    """Estimate, from n samples of which c are right, the chance that one of k is (Chen et al. 2021, eq. 1).

    Unbiased. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} needs 1 <= k <= n samples and 0 <= c <= n right ones; got n={n}, c={c}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def pass_rates(rows: Iterable[dict], ks: Iterable[int] = ()) -> dict[str, dict]:
    """Per benchmark: problems, samples of each, pass@k in percent and its standard error over problems, se@k.

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


# --------------------------------------------------------------------------------------- sampling and judging

# Strings, of which one in three quotes may not have ended yet, and comments.
STRINGS = r"""("{3}|'{3})(?:\\.|.)*?(?:\1|\Z)|#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""


def before_end(text: str, stop: tuple[str, ...]) -> str:
    """A completion up to the end of the fence that it begins with, or to the first stop text in no string."""
    fence = FENCE.match(text)
    if fence or not stop:
        return text[:fence.start("end")] if fence else text
    pattern = f"{STRINGS}|(?P<stop>{'|'.join(map(re.escape, stop))})"
    ends = (m.start() for m in re.finditer(pattern, text, re.DOTALL) if m["stop"])
    return text[:next(ends, None)]


def has_ended(enc, stop: tuple[str, ...], tokens: list[int]) -> bool:
    """Whether a stop text has just come. A token is a byte or more, so a short tail shows it."""
    tail = enc.decode(tokens[-max(map(len, stop)):])
    if not any(s in tail for s in stop):
        return False
    text = enc.decode(tokens)
    return before_end(text, stop) != text


def complete(model: GPT, enc, problems: list[Problem], seeds: list, **sampling):
    """A completion of each problem, and its text: (list[Sample], list[str]). sampling: see `generate`."""
    samples, special = [Sample()] * len(problems), set(enc._special_tokens.values())
    for stop in {p.stop: None for p in problems}:              # `generate` knows one stop rule at a time
        ids = [i for i, p in enumerate(problems) if p.stop == stop]
        rule = partial(has_ended, enc, stop) if stop else None
        drawn = generate(model, [problems[i].encode(enc) for i in ids], seeds=[seeds[i] for i in ids],
                         stop_ids=(model.config.eos_id, *special), stop=rule, **sampling)
        for i, sample in zip(ids, drawn):
            samples[i] = sample
    texts = [enc.decode([t for t in sample.tokens if t not in special]) for sample in samples]
    return samples, [before_end(text, p.stop) for text, p in zip(texts, problems)]


def judge(box: Sandbox, problems: list[Problem], completions: list[str]) -> Iterator[Verdict]:
    """Yields the verdict on a completion of each problem. Raises ValueError if a problem is wrong itself."""
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


def judged_rows(name: str, attempts: list[tuple[Problem, int, str]], box: Sandbox) -> Iterator[dict]:
    """Yields a row of a results file, once it is judged, for each (problem, number of the sample, text)."""
    verdicts = judge(box, [p for p, _, _ in attempts], [text for _, _, text in attempts])
    for (p, j, text), verdict in zip(attempts, verdicts):
        yield dict(benchmark=name, id=p.id, sample=j, completion=text) | verdict._asdict()


def evaluate(model: GPT, enc, name: str, problems: list[Problem], box: Sandbox, *, samples: int = 1,
             seed: int = 0, done=frozenset(), batch_size: int = 64, **sampling) -> Iterator[dict]:
    """Yields a row of a results file per sample, but for those in `done`: pairs (id, number of the sample).

    A prompt that does not fit the model's context has failed. The draws depend on (seed, problem, sample)
    alone, not on the batch or on which other problems run.
    """
    long = {p.id for p in problems if len(p.encode(enc)) >= model.limit}
    todo = [(p, j) for p in problems for j in range(samples) if (p.id, j) not in done]
    for p, j in todo:
        if p.id in long:
            yield dict(benchmark=name, id=p.id, sample=j, completion="", passed=False, kind="prompt too long")
    for part in chunks([(p, j) for p, j in todo if p.id not in long], batch_size):
        seeds = [(seed, zlib.crc32(p.id.encode()), j) for p, j in part]
        _, texts = complete(model, enc, [p for p, _ in part], seeds, batch_size=batch_size, **sampling)
        yield from judged_rows(name, [(p, j, text) for (p, j), text in zip(part, texts)], box)


def judge_file(file, name: str, problems: list[Problem], box: Sandbox) -> Iterator[dict]:
    """As `evaluate`, of completions made elsewhere, with the columns of human-eval and EvalPlus.

    A row has a task_id and a solution, which is a whole program, or a completion, which follows the last line
    of the benchmark's own prompt. "references" are the benchmark's own solutions. Rows of other problems are
    passed over. Raises ValueError for a problem without a row.
    """
    given = local_rows([file])
    if file == "references":
        problems = [p for p in problems if p.solution]
        given = [dict(task_id=p.id, solution=p.prompt * (p.form == "code") + p.solution) for p in problems]
    by_id, attempts, count = {p.id.lower(): p for p in problems}, [], Counter()
    for row in given:
        p = by_id.get(str(row.get("task_id")).lower())
        if p:
            whole = replace(p, form="prose") if "solution" in row else replace(p, prompt=p.prompt.rstrip(" "))
            text = row.get("solution", row.get("completion"))
            if not isinstance(text, str):
                raise ValueError(f"{file}: a row of {p.id} has neither a completion nor a solution")
            attempts.append((whole, count[p.id], text))
            count[p.id] += 1
    missing = [p.id for p in problems if not count[p.id]]
    if missing:
        raise ValueError(f"{file} lacks {len(missing)} of {len(problems)} problems, {missing[0]} say")
    yield from judged_rows(name, attempts, box)


# What programs answer that know nothing of the problem. What they pass teaches nothing, or not programming.
VALUES = ("None", "True", "False", "0", "1", "-1", "''", "[]", "()", "{}",
          "(*args, *more.values())[0]", "(*args, *more.values())[1]", "(*args, *more.values())[-1]")
PRINTED = ("''", "0", "1", "-1", "'YES'", "'NO'", "'Yes'", "'No'", "input()", "open(0).read()")


def trivial_programs(p: Problem) -> list[str]:
    def define(name: str, value: str) -> str:
        if name.startswith("Solution()."):
            return f"class Solution: {name[11:]} = lambda self, *args, **more: {value}\n"
        return f"{name} = lambda *args, **more: {value}\n"
    if p.kind == "stdio":
        return [f"print({value})\n" for value in PRINTED]
    return ["".join(define(name, value) for name in p.names) for value in VALUES]


def unfit_for_rl(problems: list[Problem], box: Sandbox) -> dict[str, str]:
    """{id: why} of the problems whose own solution fails, or that a trivial program passes."""
    out, have = {}, [p for p in problems if p.solution]
    for p, verdict in zip(have, judge(box, have, [p.solution for p in have])):
        if not verdict.passed:
            out[p.id] = f"its reference fails: {verdict.kind}"
    whole = [replace(p, form="prose") for p in problems if p.id not in out]
    tries = [(p, program) for p in whole for program in trivial_programs(p)]
    verdicts = judge(box, [p for p, _ in tries], [program for _, program in tries])
    for (p, program), verdict in zip(tries, verdicts):
        if verdict.passed:
            out[p.id] = f"a trivial program passes: {program.strip()}"
    return out


# ------------------------------------------------------------------ public benchmarks, and the embedded world


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


def strict(test: str) -> str:
    """A test of EvalPlus's hub copies without three faults.

    np.allclose finds [] near to any number; one form of `assertion` asserts nothing; and HumanEval/32, a root
    of a polynomial, takes the root for the polynomial.
    """
    test = test.replace("np.allclose(out, exp,", "np.shape(out) == np.shape(exp) and np.allclose(out, exp,")
    test = test.replace(" == (out is not None)\n", " == (out is not None)\n    assert exact_match\n")
    return test.replace("_poly(*candidate(*inp), inp) <=", "abs(_poly(*inp, candidate(*inp))) <=")


def humaneval(r: dict) -> Problem:
    prompt, solution = meet_at_decision(r["prompt"], r["canonical_solution"])
    return Problem(str(r["task_id"]), prompt, solution, tests=(strict(r["test"]),), kind="check",
                   names=(r["entry_point"],), setup=r["prompt"])


SHOT = ("You are an expert Python programmer, and here is your task: {} Your code should pass these tests:"
        "\n\n{}\n[BEGIN]\n")


def mbpp(r: dict, shots: list[dict] = ()) -> Problem:
    """Zero-shot: text and tests in a docstring. With shots: the format of Austin et al. 2021."""
    def task(row: dict) -> tuple[str, str]:
        return row["text" if "text" in row else "prompt"], "\n".join(row["test_list"])
    setup = "\n".join(r["test_imports"]) if "test_imports" in r else r["test_setup_code"]
    tests = [strict(r["test"])] if "test" in r else r["test_list"]                   # MBPP+ has one long test
    prompt, solution = meet_at_decision(as_docstring(*task(r)), r["code"])
    if shots:
        prompt = "".join(f"{SHOT.format(*task(s))}{plain(s['code'])}[DONE]\n\n" for s in shots)
        prompt += SHOT.format(*task(r))
    return Problem(f"mbpp/{r['task_id']}", prompt, solution, tests=tuple(tests), setup=setup,
                   names=names_under_test(r["code"], (setup, *r["test_list"])),
                   form="prose" if shots else "code")


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
MODULES = ("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random",
           "statistics", "itertools", "functools", "operator", "io", "sys", "json")
STARS = [f"from {m} import *" for m in (*MODULES, "builtins", "typing")]
LIMITS = ["sys.setrecursionlimit(50000)", "sys.set_int_max_str_digits(50000)", ""]
IMPORTS = "\n".join(STARS + [f"import {m}" for m in MODULES] + LIMITS)
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
        return replace(p, tests=tuple((c["input"], c["output"]) for c in cases), kind="stdio")
    check = CHECK
    for case in cases:
        given, wanted = [json.loads(line) for line in case["input"].splitlines()], json.loads(case["output"])
        check += f"    assert listed(candidate(*{given!r})) == {wanted!r}\n"
    name = f"Solution().{json.loads(r['metadata'])['func_name']}"
    return replace(p, tests=(check,), kind="check", names=(name,), timeout_s=min(6.0 * len(cases), 60.0))


def code_contests(r: dict) -> Problem | None:
    """All tests, and the first of hundreds of solutions that is Python 3. None: the program reads a file."""
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
    return Problem(str(r["name"]), prompt, solution, tests=cases, kind="stdio")


def codeforces(r: dict) -> Problem | None:
    """None: it reads a file, talks to its judge, or has several right answers, which only a checker knows."""
    if r["input_mode"] != "stdio" or r["interaction_format"] or r["generated_checker"]:
        return None
    shown = [f"Input:\n{case['input']}\nOutput:\n{case['output']}" for case in r["examples"] or ()]
    text = as_docstring(r["description"], r["input_format"], r["output_format"], *shown, r["note"])
    cases = tuple((case["input"], case["output"]) for case in r["official_tests"] or ())
    return Problem(f"codeforces/{r['id']}", meet_at_decision(text)[0], tests=cases, kind="stdio")


def leetcode(r: dict) -> Problem:
    """The text ends with the code to complete, which names the method; `prompt` holds imports and nodes."""
    prompt, solution = meet_at_decision(as_docstring(r["query"]), r["completion"])
    return Problem(f"leetcode/{r['task_id']}", prompt, solution, tests=(r["test"],), kind="check",
                   names=(r["entry_point"],), setup=r["prompt"], date=str(r.get("estimated_date") or "")[:10])


# Where completions end. In a function: where code stands at the margin, as a whole program may have it.
IN_FUNCTION = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert", "\nimport", "\nfrom", "\n```")
PROGRAM = ("\nassert", "\nprint", "\nif __name__", '\n"""', "\n```")
SCRIPT = ('\n"""', "\n```")


class Source(NamedTuple):
    """Where a benchmark's rows come from and how a row becomes a Problem."""
    hub: str                                # dataset; or JSON files of one whose script no longer runs
    files: str                              # in --data-dir; {} is the split
    problem: Callable[..., Problem | None]
    stop: tuple[str, ...]                   # where completions end
    timeout_s: float = 10.0                 # for a program; some references of HumanEval+ and MBPP+ take 26
    subset: str | None = None
    shots: tuple[int, ...] = ()             # task ids of the split "prompt"


MBPP = "google-research-datasets/mbpp", "mbpp/full/{}.jsonl", mbpp
SOURCES = {
    "humaneval": Source("openai/openai_humaneval", "openai_humaneval/{}.jsonl", humaneval, IN_FUNCTION),
    "humanevalplus": Source("evalplus/humanevalplus", "humanevalplus/{}.jsonl", humaneval, IN_FUNCTION, 40.0),
    "mbpp": Source(*MBPP, ("[DONE]",), subset="full", shots=(2, 3, 4)),
    "mbpp-docstring": Source(*MBPP, PROGRAM, subset="full"),
    "mbppplus": Source("evalplus/mbppplus", "mbppplus/{}.jsonl", mbpp, PROGRAM, 40.0),
    "livecodebench": Source("hf://datasets/livecodebench/code_generation_lite/test*.jsonl",
                            "livecodebench/*.jsonl", livecodebench, SCRIPT),
    "code_contests": Source("deepmind/code_contests", "code_contests/{}*.jsonl", code_contests, SCRIPT),
    "codeforces": Source("open-r1/codeforces", "open-r1_codeforces/{}*.jsonl", codeforces, SCRIPT),
    "leetcode": Source("newfacade/LeetCodeDataset", "leetcode_dataset/{}.jsonl", leetcode, PROGRAM),
}


def load(names: str, data_dir=None, *, limit: int | None = None, dates: str = "") -> list[Problem]:
    """The problems of "world", or of benchmarks `name[:split][@where]` with commas between, in order.

    `@where` names another hub dataset, or files (`*` stands for any text), with rows of the same columns:
    `leetcode:train@me/my-problems`. A problem that two benchmarks hold (MBPP, MBPP+) counts once.
    data_dir: a folder with files as in `Source.files`; None: the hub. dates: `2024-01-31:2024-06-30`, without
    the last day, either may be empty; problems without a date stay. Raises ValueError for what cannot be had.
    """
    if not re.fullmatch(r"((\d{4}-\d\d-\d\d)?:(\d{4}-\d\d-\d\d)?)?", dates):
        raise ValueError(f"{dates!r} are no dates: expected YYYY-MM-DD:YYYY-MM-DD, of which one may be empty")
    if names.strip() == "world":
        return world("eval", limit or 200, seed=0)
    since, _, until = dates.partition(":")
    found: dict[str, Problem] = {}
    for name in map(str.strip, names.split(",")):
        problems = read_problems(name, data_dir)
        fit = (p for p in problems if not p.date or since <= p.date < (until or "9999"))
        picked = list(islice(fit, limit))
        if not picked:
            raise ValueError(f"{name}: no problem " + (f"in {dates}: widen --dates" if dates else "in it"))
        found |= {p.id: p for p in picked if p.id not in found}
    return list(found.values())[:limit]


def read_problems(name: str, data_dir) -> Iterator[Problem]:
    """Yields the problems of one benchmark that have tests."""
    key, _, where = name.partition("@")
    key, _, split = key.partition(":")
    if key not in SOURCES:
        raise ValueError(f"unknown benchmark {key!r}: expected world, alone, or some of {', '.join(SOURCES)}")
    source, make, ids = SOURCES[key], SOURCES[key].problem, Counter()
    if source.shots:
        shots = [r for r in rows_of(source, "prompt", "", data_dir) if r["task_id"] in source.shots]
        if len(shots) != len(source.shots):
            raise ValueError(f"{name}: the split 'prompt' lacks one of {source.shots}: try mbpp-docstring")
        make = partial(make, shots=shots)
    for n, row in enumerate(rows_of(source, split or "test", where, data_dir), 1):
        try:
            p = make(row)
            if p:                                      # a TypeError for what should be text and is not
                "".join([p.id, p.prompt, p.setup, *p.names, *map("".join, p.tests)])
        except Exception as e:                         # of a bad row nothing is known
            raise ValueError(f"{name}: row {n} is unreadable ({one_line(e)}): expected the columns of "
                             f"{source.hub}, got {', '.join(row)}") from None
        if p and p.tests:
            ids[p.id] += 1                             # scores are by id: no two problems may share one
            number = f"#{ids[p.id]}" if ids[p.id] > 1 else ""
            yield replace(p, id=p.id + number, stop=source.stop, timeout_s=p.timeout_s or source.timeout_s)


def rows_of(source: Source, split: str, where: str, data_dir) -> Iterator[dict]:
    """The rows of a split: from `where` (files or a hub dataset), from data_dir, or from the hub."""
    if not where and data_dir is None:
        return hub_rows(source.hub, split, source.subset)
    pattern = where or str(Path(data_dir, source.files.format(split)))
    files = sorted(glob(pattern))
    if not files and not where:
        raise ValueError(f"there is no file {pattern}: put the rows of {source.hub} there, as JSONL")
    return local_rows(files) if files else hub_rows(where, split)


# ----------------------------------------------------------------------------------------------- rows of data


def local_rows(files: Iterable) -> Iterator[dict]:
    """Yields the rows of .jsonl(.gz), .json, .csv and .parquet files; a .py file is a row with a `text`.

    Raises ValueError for a file or row that cannot be read.
    """
    for file in map(Path, files):
        n = 1
        try:
            for row in file_rows(file):
                yield {**row}
                n += 1
        except Exception as e:
            raise ValueError(f"{file}, row {n}, cannot be read ({one_line(e)}): expected Python, Parquet, "
                             "CSV, JSON, or JSONL with one object per line, in UTF-8") from None


def file_rows(file: Path) -> Iterator[dict]:
    if file.suffix in (".parquet", ".csv", ".json"):
        import datasets
        kind = file.suffix.removeprefix(".")
        yield from datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
    elif file.suffix == ".py":
        with open(file, "rb") as f, contextlib.suppress(SyntaxError):
            encoding = tokenize.detect_encoding(f.readline)[0]         # a coding cookie, a byte order mark
            yield {"text": file.read_text(encoding, errors="surrogateescape")}    # no parser takes these
    else:                                              # `datasets` cannot name a bad line, and makes "" null
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as f:
            yield from (json.loads(line) for line in f if line.strip())


def hub_rows(name: str, split: str, subset: str | None = None, start: int = 0) -> Iterator[dict]:
    """Yields the rows of a hub dataset, or of JSON files there (hf://...), from row `start` on.

    Raises ValueError for what cannot be had.
    """
    import datasets
    from huggingface_hub import HfApi, constants
    offline = constants.HF_HUB_OFFLINE                 # then from the local cache
    try:
        if name.startswith("hf://"):
            data = datasets.load_dataset("json", data_files=name, split="train", streaming=True)
        else:
            if not offline:
                HfApi().dataset_info(name, timeout=10)      # fails at once, load_dataset after half a minute
            data = datasets.load_dataset(name, subset, split=split, streaming=not offline)
        yield from data.skip(start)
    except Exception as e:                             # the many ways of a network to fail
        raise ValueError(f"there is no file {name!r}, and no hub dataset with a split {split!r} can be read "
                         f"({one_line(e)}): check the spelling and the connection; for one that is gated or "
                         "private, run `hf auth login`") from None


def one_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}"


# ------------------------------------------------------------------------------------------- the command line

ASK = "Complete this Python program. Answer with all of it, in one fenced block.\n\n```python\n{}\n```"


def as_chat(problems: list[Problem], folder) -> list[Problem]:
    """The problems as questions in the chat format of the tokenizer in a folder."""
    from transformers import AutoTokenizer  # a template is a program, which it can run
    tokenizer, out = AutoTokenizer.from_pretrained(folder), []
    for p in problems:
        chat = [dict(role="user", content=p.prompt if p.form == "prose" else ASK.format(p.prompt.rstrip()))]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        out.append(replace(p, prompt=prompt, form="chat", stop=()))
    return out


def read_results(file: Path, settings: dict | None = None) -> list[dict]:
    """The rows of a results file. Raises ValueError if it is none, or if it has other settings."""
    lines = file.read_bytes().split(b"\n")[:-1]        # a process that was killed may leave half a line
    try:
        first, *rows = map(json.loads, lines)
        earlier = dict(first["settings"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is not a results file: expected the lines that --out writes") from None
    for key, value in (settings or {}).items():
        if earlier.get(key) != value:
            raise ValueError(f"{file} has samples of other settings ({key} {earlier.get(key)}, not {value}): "
                             "name another file with --out, or remove this one")
    return rows


def run(args: argparse.Namespace) -> list[dict]:
    """Judge the samples that the results file does not hold yet, drawn or given, and write each at once."""
    names = [name.strip() for name in args.benchmarks.split(",")]
    benchmarks = {name: load(name, args.data_dir, limit=args.limit, dates=args.dates) for name in names}
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "k", "batch_size")}
    if not args.out.exists():
        args.out.write_text(json.dumps(dict(settings=settings)) + "\n")
    rows = read_results(args.out, settings)
    os.truncate(args.out, args.out.read_bytes().rindex(b"\n") + 1)
    with Sandbox() as box, open(args.out, "a") as out:
        if not args.judge:
            device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
            model, enc = load_pretrained(args.model, device, getattr(torch, dtype))
        for name, problems in benchmarks.items():
            done = {(r["id"], r["sample"]) for r in rows if r["benchmark"] == name}
            if args.judge:
                fresh = judge_file(args.judge, name, problems, box)
            else:
                problems = as_chat(problems, enc.source.parent) if args.chat else problems
                fresh = evaluate(model, enc, name, problems, box, samples=args.samples, seed=args.seed,
                                 temperature=args.temperature, max_new_tokens=args.max_new_tokens,
                                 batch_size=args.batch_size, done=done)
            for row in tqdm(fresh, desc=name, total=len(problems) * args.samples - len(done)):
                if (row["id"], row["sample"]) not in done:
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
        raise ValueError(f"--temperature {args.temperature:g} does not do for {args.samples} samples: give 0 "
                         "for one greedy sample, or more, say 0.8")
    if not (args.model or args.judge or args.out.exists()):
        raise ValueError("--model is missing: give the folder of a model or its name on the hub")
    rows = run(args) if args.model or args.judge else read_results(args.out)
    if not rows:
        raise ValueError(f"{args.out} holds no samples yet")
    scores = pass_rates(rows, args.k)
    print(table(args.model or args.judge or str(args.out), scores))
    if args.judge == "references":
        print(*(f"{r['benchmark']} {r['id']}: {r['kind']}" for r in rows if not r["passed"]), sep="\n")
    return dict(results=str(args.out), scores=scores)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="A row of the paper's Table 1, then a JSON line.")
    add = parser.add_argument
    add("--model", help="a folder in the Hugging Face layout, or a hub name; without it only --out is scored")
    add("--judge", metavar="FILE", help="judge completions made elsewhere, in the format of human-eval or "
                                        "EvalPlus, or the benchmark's own: the word references")
    add("--benchmarks", default=",".join(TABLE_1), help="of world, " + ", ".join(SOURCES) + "; or mbpp:train")
    add("--data-dir", help="folder with the benchmarks as JSONL; without it they come from the hub")
    add("--limit", type=int, help="only the first so many problems of each benchmark")
    add("--dates", default="", help="only problems of 2024-01-31:2024-06-30, say, the second date excluded")
    add("--samples", type=int, default=1, help="completions of each problem")
    add("--k", type=int, nargs="+", default=[], help="of pass@k; default: 1, 5, 10, 100 where samples allow")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
    add("--max-new-tokens", type=int, default=512, help="longest completion")
    add("--chat", action="store_true", help="ask in the model's chat format, judge the answer's first fence")
    add("--seed", type=int, default=0, help="of all samples")
    add("--batch-size", type=int, default=64, help="samples that grow side by side, and then are judged")
    add("--device", help="default: the GPU where there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16, on a CPU float32")
    add("--out", type=Path, default="results.jsonl", help="all samples; a run that was cut off goes on there")
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
