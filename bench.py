"""The problems and the score: the embedded world, public benchmarks, pass@k.

Every problem of the project, embedded or public, is a `Problem`: a prompt that the model continues, an expert's continuation
where there is one, and a way to make a sandbox job of a completion. A benchmark's score is the unbiased pass@k over them.

    python bench.py --model HuggingFaceTB/SmolLM2-135M                                      # a row of the paper's Table 1
    python bench.py --model base --benchmarks humaneval --samples 10 --temperature 0.8      # pass@5 too
    python bench.py --score results.jsonl                                                   # the row again, from the file
    python bench.py --check-references --benchmarks humaneval,mbpp,mbppplus                 # do the references pass?

The embedded world needs no download. A docstring lists steps, and the constants in it are not worked out:

    def f(xs):
        \"""add 3 * 4 - 5; above 7 + 2; total\"""
        xs = [x + 7 for x in xs]
        out = []
        for x in xs:
            if x > 9:
                out.append(x)
        xs = out
        return sum(xs)

Constants are worked out from left to right, as on a pocket calculator, which is serial work: a small network that must write
` 7` at once often gets it wrong, one that writes `# 3 * 4 = 12 - 5 = 7` first seldom does. Expert programs carry no comments.
The "web" code that the base model learnt from carries some, of mixed worth: worked out, half worked out, a mere name, chatter.
Nobody tells the model which of them pay. Training and evaluation problems are disjoint: `split` decides by a hash of the docstring.
"""
import argparse
import base64
import io
import json
import pickle
import random
import re
import sys
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from math import comb
from pathlib import Path
from statistics import mean, stdev
from typing import Callable, Iterable, Iterator

import tiktoken
import torch
from tqdm import tqdm

from elbo import statements, strip_comments
from model import GPT, GPT2_TIKTOKEN, Sample, encode_prompt, generate, load_pretrained
from sandbox import Asserts, Check, InvalidJob, Sandbox, Stdio, Verdict, names_under_test

# ------------------------------------------------------------------------------------------------------- problem and score


@dataclass(frozen=True)
class Problem:
    """One problem of any benchmark. Prompt and solution meet at a decision point (see elbo.py)."""
    id: str
    prompt: str
    solution: str = ""                   # the expert's continuation of the prompt; empty where the benchmark has none
    tests: tuple = ()                    # assert statements; or one source that defines check(candidate); or (stdin, stdout) pairs
    kind: str = "asserts"                # which of them: "asserts", "check" or "stdio"
    names: tuple[str, ...] = ("f",)      # what the tests use of the program; for a check the expression that it calls
    setup: str = ""                      # trusted code of the benchmark: asserts run it after the program, the others before it
    prose: bool = False                  # the prompt is no code (few-shot): the completion alone is the program
    stop: tuple[str, ...] = ()           # texts at which a completion ends
    timeout_s: float | None = None       # CPU seconds for a program, with stdio for each case; None: the sandbox's own
    date: str = ""                       # of publication, YYYY-MM-DD, where known

    def __post_init__(self):
        """Raises TypeError for a field of another type than the sandbox will take: rows of data may hold anything."""
        texts = [self.id, self.prompt, self.solution, self.setup, *self.names, *self.tests]
        if self.kind == "stdio":
            texts = [*texts[:4], *(text for given, wanted in self.tests for text in (given, wanted))]
        if odd := [x for x in texts if not isinstance(x, str)]:
            raise TypeError(f"{odd[0]!r:.40} stands where a text should")

    def job(self, completion: str):
        """The sandbox job that tests prompt + completion."""
        return self.job_of(completion if self.prose else self.prompt + completion)

    def job_of(self, program: str):
        """The sandbox job that tests a whole program."""
        if self.kind == "check":
            return Check(program, self.tests[0], self.names[0], self.setup, self.timeout_s)
        if self.kind == "stdio":
            return Stdio(program, self.tests, self.setup, self.timeout_s)
        return Asserts(program, self.tests, self.setup, self.names, self.timeout_s)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n samples of which c are (Chen et al. 2021, eq. 1).

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} needs 1 <= k <= n samples and 0 <= c <= n right ones; got n={n}, c={c}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def end_of(text: str, stop: tuple[str, ...]) -> int | None:
    """Where a completion ends: at the first of the stop texts; quotes are one only where they do not close what others have opened."""
    found = [m.start() for s in stop for m in re.finditer(re.escape(s), text) if not ('"""' in s and text.count('"""', 0, m.start()) % 2)]
    return min(found, default=None)


def stopper(enc, stop: tuple[str, ...]):
    """The `stop` of `generate`: has one of the texts just appeared? Every token is a byte or more, so a short tail will show it."""
    tail = max(len(s.encode()) for s in stop)

    def stopped(tokens: list[int]) -> bool:
        text = enc.decode(tokens[-tail:])
        return any(s in text for s in stop) and end_of(enc.decode(tokens), stop) is not None
    return stopped


def completion(enc, tokens: list[int], stop: tuple[str, ...] = ()) -> str:
    """Text of sampled tokens, up to the first special token (an end of the document, of which some models have several) or stop text."""
    special = set(enc._special_tokens.values())
    text = enc.decode(list(takewhile(lambda t: t not in special, tokens)))
    return text[:end_of(text, stop)]


def judge(box: Sandbox, problems: list[Problem], jobs: list) -> list[Verdict]:
    """The verdict of each job, of the problem beside it; equal jobs run once, as samples of a sharp policy are often the same program.

    Raises ValueError, with the problem's name, if it is the problem that is wrong.
    """
    unique = list(dict.fromkeys(jobs))
    try:
        verdict = dict(zip(unique, box.run(unique)))
    except InvalidJob as e:
        raise ValueError(f"{problems[jobs.index(unique[e.index])].id}: {e.reason}; mend that row, or leave it out") from None
    return [verdict[job] for job in jobs]


def sample(model: GPT, enc, problems: list[Problem], seeds: list, *, max_new_tokens: int, temperature: float = 1.0,
           batch_size: int = 256) -> tuple[list[Sample], list[str]]:
    """One sample for each problem (repeat a problem for a group), and its text up to the stop text."""
    out = [Sample() for _ in problems]
    for stop in dict.fromkeys(p.stop for p in problems):                 # `generate` knows one stop rule at a time
        ids = [i for i, p in enumerate(problems) if p.stop == stop]
        done = generate(model, [encode_prompt(enc, problems[i].prompt) for i in ids], max_new_tokens=max_new_tokens,
                        seeds=[seeds[i] for i in ids], temperature=temperature, batch_size=batch_size,
                        stop_ids=(model.config.eos_id, *enc._special_tokens.values()), stop=stopper(enc, stop) if stop else None)
        for i, s in zip(ids, done):
            out[i] = s
    return out, [completion(enc, s.tokens, p.stop) for p, s in zip(problems, out)]


def attempt(model: GPT, enc, problems: list[Problem], seeds: list, box: Sandbox, **how) -> tuple[list[Sample], list[bool]]:
    """One sample for each problem, drawn as `sample` draws it, and whether it passes its tests."""
    samples, texts = sample(model, enc, problems, seeds, **how)
    return samples, [v.passed for v in judge(box, problems, [p.job(text) for p, text in zip(problems, texts)])]


def evaluate(model: GPT, enc, name: str, problems: list[Problem], box: Sandbox, *, samples: int = 1, seed: int = 0,
             batch_size: int = 64, **how) -> Iterator[dict]:
    """Rows of a results file, one per sample. A prompt that does not fit the model's context counts as failed.

    The draws depend on (seed, problem, sample) alone, not on the batch or on which other problems run.
    """
    fits = {p.id for p in problems if len(encode_prompt(enc, p.prompt)) < model.limit}
    every = [(p, j) for p in problems for j in range(samples)]
    for at in tqdm(range(0, len(every), 4 * batch_size), desc=name, leave=False):
        part = every[at:at + 4 * batch_size]
        todo = [(p, j) for p, j in part if p.id in fits]
        texts = sample(model, enc, [p for p, _ in todo], [(seed, zlib.crc32(p.id.encode()), j) for p, j in todo], batch_size=batch_size, **how)[1]
        done = iter(zip(texts, judge(box, [p for p, _ in todo], [p.job(text) for (p, _), text in zip(todo, texts)])))
        for p, j in part:
            text, v = next(done) if p.id in fits else ("", Verdict(False, "prompt too long", 0, 0, 0.0, ""))
            yield dict(benchmark=name, id=p.id, sample=j, completion=text, passed=v.passed, kind=v.kind, seconds=round(v.seconds, 3), detail=v.detail)


def score(rows: Iterable[dict]) -> dict[str, dict]:
    """Per benchmark: problems, samples of each, and pass@k in percent, with se@k, its standard error over problems.

    Needs nothing but the rows of a results file. k: 1, 5, 10, 100 as far as there are so many samples.
    """
    tally: dict[str, dict[str, list[bool]]] = {}
    for r in rows:
        tally.setdefault(r["benchmark"], {}).setdefault(r["id"], []).append(bool(r["passed"]))
    out = {}
    for name, problems in tally.items():
        n = min(map(len, problems.values()))
        out[name] = {"problems": len(problems), "samples": n}
        for k in (k for k in (1, 5, 10, 100) if k <= n):
            each = [100 * pass_at_k(len(v), sum(v), k) for v in problems.values()]
            out[name] |= {f"pass@{k}": round(mean(each), 3), f"se@{k}": round(stdev(each) / len(each) ** 0.5, 3) if len(each) > 1 else None}
    return out


def score_file(path) -> dict[str, dict]:
    """`score` of a results file. Raises ValueError if it holds no sample or cannot be read."""
    rows = [r for r in local_rows([Path(path)]) if "benchmark" in r]
    if not rows or any(not ({"id", "passed"} <= r.keys() and isinstance(r["id"], str) and isinstance(r["benchmark"], str)) for r in rows):
        raise ValueError(f"{path} is not a results file: expected lines with benchmark, id and passed, as bench.py --out writes them")
    return score(rows)


TABLE_1 = {"humaneval": "HumanEval", "mbpp": "MBPP", "humanevalplus": "HumanEval+", "mbppplus": "MBPP+"}


def table(model: str, method: str, scores: dict[str, dict]) -> str:
    """A row of the paper's Table 1 in Markdown, pass@1 with standard errors; further benchmarks stand after it.

    The averages are over those of the four benchmarks that were run.
    """
    def average(k: str) -> str:
        have = [scores[b][k] for b in TABLE_1 if k in scores.get(b, ())]
        return f"{mean(have):.1f}" if have else "-"

    def cell(b: str) -> str:
        s = scores.get(b)
        return "-" if s is None else f"{s['pass@1']:.1f}" + (f" +- {s['se@1']:.1f}" if s["se@1"] is not None else "")
    more = [b for b in scores if b not in TABLE_1]
    head = ["model", "method", *TABLE_1.values(), "avg pass@1", "avg pass@5", *more]
    row = [model, method, *map(cell, TABLE_1), average("pass@1"), average("pass@5"), *map(cell, more)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), row))


# ------------------------------------------------------------------------------------------------------ the embedded world

LIMIT = 20                                            # every constant, and every value on the way to it, lies in 0..20
COMPUTED = ("add", "subtract", "above", "below")      # steps that take a constant
PLAIN = ("evens", "odds", "reverse", "sort", "negate")
ENDS = {"list": "return xs", "total": "return sum(xs)", "unique": "return sorted(set(xs))"}
LINES = {
    "add": ["xs = [x + {n} for x in xs]"],
    "subtract": ["xs = [x - {n} for x in xs]"],
    "above": ["out = []", "for x in xs:", "    if x > {n}:", "        out.append(x)", "xs = out"],
    "below": ["out = []", "for x in xs:", "    if x < {n}:", "        out.append(x)", "xs = out"],
    "evens": ["xs = [x for x in xs if x % 2 == 0]"],
    "odds": ["xs = [x for x in xs if x % 2 == 1]"],
    "reverse": ["xs = xs[::-1]"],
    "sort": ["xs = sorted(xs)"],
    "negate": ["xs = [-x for x in xs]"],
}
CHATTER = ("todo: clean this up", "see the docs", "works for now", "be careful here", "this part is easy", "old code")


@dataclass(frozen=True)
class Step:
    kind: str
    terms: tuple[tuple[str, int], ...] = ()           # ("", 3), ("*", 4), ("-", 5): operator and operand, from left to right

    def values(self) -> list[int]:
        """The value after each term; the last is the constant."""
        value, out = 0, []
        for op, n in self.terms:
            value = {"": n, "+": value + n, "-": value - n, "*": value * n}[op]
            out.append(value)
        return out

    def text(self) -> str:
        return " ".join([self.kind] + [f"{op} {n}".strip() for op, n in self.terms])

    def lines(self) -> list[str]:
        n = self.values()[-1] if self.terms else None
        return [line.format(n=n) for line in LINES[self.kind]]

    def working(self, upto: int) -> str:
        """`3 * 4 = 12 - 5 = 7`: the first `upto` terms, worked out."""
        parts = [str(self.terms[0][1])]
        for (op, n), value in list(zip(self.terms, self.values()))[1:upto]:
            parts += [op, str(n), "=", str(value)]
        return " ".join(parts)


def draw_step(rng: random.Random, kind: str, n_terms: int) -> Step:
    value = rng.randint(1, 9)
    terms = [("", value)]
    while len(terms) < n_terms:
        op = rng.choices("+-*")[0]
        n = rng.randint(2, 3) if op == "*" else rng.randint(1, 9)
        new = {"+": value + n, "-": value - n, "*": value * n}[op]
        if 0 <= new <= LIMIT:
            terms.append((op, n))
            value = new
    return Step(kind, tuple(terms))


def draw_spec(rng: random.Random, n_steps: tuple[int, int], n_terms: tuple[int, int]) -> tuple[list[Step], str]:
    """Steps of a program and its end. Three steps in four take a constant; no kind stands twice."""
    kinds: list[str] = []
    for _ in range(rng.randint(*n_steps)):
        pool = COMPUTED if rng.random() < 0.75 else PLAIN
        kinds.append(rng.choice([k for k in pool if k not in kinds]))
    steps = [draw_step(rng, k, rng.randint(*n_terms)) if k in COMPUTED else Step(k) for k in kinds]
    return steps, rng.choice(list(ENDS))


def spec_text(steps: list[Step], end: str) -> str:
    return "; ".join([s.text() for s in steps] + [end])


def split(spec: str) -> str:
    """"train" or "eval", decided by the docstring alone, so that no problem can stand in both."""
    return "eval" if zlib.crc32(spec.encode()) % 8 == 0 else "train"


def run_spec(steps: list[Step], end: str, xs: list[int]):
    """What the program must return: the meaning of a docstring, written independently of the expert's lines."""
    for s in steps:
        n = s.values()[-1] if s.terms else 0
        if s.kind in ("add", "subtract", "negate"):
            xs = [{"add": x + n, "subtract": x - n, "negate": -x}[s.kind] for x in xs]
        elif s.kind in ("reverse", "sort"):
            xs = list(reversed(xs)) if s.kind == "reverse" else sorted(xs)
        else:
            xs = [x for x in xs if {"above": x > n, "below": x < n, "evens": x % 2 == 0, "odds": x % 2 == 1}[s.kind]]
    return {"list": xs, "total": sum(xs), "unique": sorted(set(xs))}[end]


def make_tests(steps: list[Step], end: str, rng: random.Random) -> tuple[str, ...]:
    """Asserts on a few short lists, and on all of -70..70 shuffled, which no wrong constant survives unless it changes nothing."""
    span = list(range(-70, 71))
    rng.shuffle(span)
    inputs = [[], [rng.randint(-30, 30) for _ in range(5)], [rng.randint(0, 40) for _ in range(8)], span]
    return tuple(f"assert f({xs}) == {run_spec(steps, end, xs)}" for xs in inputs)


def draw_comment(rng: random.Random, step: Step) -> str:
    """A web programmer's comment on a step: half worked out in full, the rest partly worked out, a mere name, or chatter."""
    r = rng.random()
    if step.terms and r < 0.50:
        return step.working(len(step.terms))
    if step.terms and r < 0.60:
        return step.working(rng.randint(1, len(step.terms)))
    if r < 0.75:
        return rng.choice((step.kind, f"{step.kind} step", f"now {step.kind}"))
    return rng.choice(CHATTER)


def write_program(steps: list[Step], end: str, rng: random.Random | None = None) -> str:
    """The body of f, from its first decision point on. With rng: web code, half of it with comments on 80% of its steps."""
    commented = rng is not None and rng.random() < 0.5
    lines = []
    for step in steps:
        body = step.lines()
        if commented and rng.random() < 0.8:
            # Mostly above the step, sometimes right at the line with the constant, at that line's indentation.
            at = 2 if len(body) > 1 and rng.random() < 0.3 else 0
            indent = body[at][:len(body[at]) - len(body[at].lstrip())]
            body.insert(at, f"{indent}# {draw_comment(rng, step)}")
        lines += body
    lines.append(ENDS[end])
    return "\n".join("    " + line for line in lines)[3:] + "\n"       # the prompt holds the first three spaces


def world(kind: str, n: int, seed: int, *, n_steps=(2, 3), n_terms=(5, 9)) -> list[Problem]:
    """n different problems of the embedded world, the same for the same arguments.

    kind: "web" (comments of mixed worth, easier problems among them), "train" (experts' programs) or "eval" (held out).
    """
    if kind not in ("web", "train", "eval"):
        raise ValueError(f"unknown kind of problem {kind!r}; expected 'web', 'train' or 'eval'")
    if kind == "web":
        n_steps, n_terms = (1, n_steps[1]), (1, n_terms[1])
    out, seen, rng = [], set(), random.Random(f"{kind}-{seed}")
    while len(out) < n:
        steps, end = draw_spec(rng, n_steps, n_terms)
        spec = spec_text(steps, end)
        if spec in seen or split(spec) != ("eval" if kind == "eval" else "train"):
            continue
        seen.add(spec)
        prompt = f'def f(xs):\n    """{spec}"""\n   '
        program = write_program(steps, end, rng if kind == "web" else None)
        tests = make_tests(steps, end, rng) if kind != "web" else ()
        out.append(Problem(f"{kind}/{seed}/{len(out)}", prompt, program, tests))
    return out


def train_tokenizer(vocab_size: int = 416) -> tiktoken.Encoding:
    """Byte-pair encoding learnt offline from the world's own text, with GPT-2's pre-tokenizer."""
    from tiktoken._educational import bpe_train
    text = "\n".join(p.prompt + p.solution for p in world("web", 600, seed=0))
    ranks = bpe_train(text, vocab_size - 1, GPT2_TIKTOKEN, visualise=None)
    return tiktoken.Encoding("ra3-world", pat_str=GPT2_TIKTOKEN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": vocab_size - 1})


# ------------------------------------------------------------------------------------------------------------ rows of data


def local_rows(files: list[Path]) -> Iterator[dict]:
    """Rows of JSONL and Parquet files; a .py file is a row with one column, `text`.

    JSONL is read line by line and not through `datasets`, which cannot name the bad line and takes an empty column for null.
    """
    for file in files:
        n = 0
        try:
            if file.suffix == ".parquet":
                import datasets
                yield from datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
            elif file.suffix == ".py":
                yield {"text": file.read_text(encoding="utf-8-sig", errors="surrogateescape")}      # which no parser takes for Python
            else:
                with open(file, encoding="utf-8") as f:
                    for n, line in enumerate(f, 1):
                        if line.strip():
                            yield {**json.loads(line)}
        except Exception as e:
            raise ValueError(f"{file}{f', line {n},' if n else ''} cannot be read ({one_line(e)}): expected Parquet, Python, or JSONL with one "
                             "object per line, in UTF-8") from None


def hub_rows(name: str, split: str, subset: str | None = None, files: str | None = None, start: int = 0) -> Iterator[dict]:
    """Rows of a dataset on the hub, streamed. files: the JSONL files of one whose loading script `datasets` no longer runs."""
    import datasets
    from huggingface_hub import HfApi, constants, errors
    try:
        if not constants.HF_HUB_OFFLINE:                                  # with HF_HUB_OFFLINE=1, from the local cache
            HfApi().dataset_info(name, timeout=10)                        # fails at once; load_dataset tries for half a minute
        if files:
            data = datasets.load_dataset("json", data_files=f"hf://datasets/{name}/{files}", split="train", streaming=True)
        else:
            data = datasets.load_dataset(name, subset, split=split, streaming=not constants.HF_HUB_OFFLINE)
        yield from data.skip(start)
    except Exception as e:                                                # the many ways of a network to fail
        if any(isinstance(x, errors.GatedRepoError) for x in (e, e.__cause__)):                           # `datasets` wraps it
            raise ValueError(f"the dataset {name!r} is gated: accept its terms on its page on the hub, then run `hf auth login`") from None
        if isinstance(e, (errors.RepositoryNotFoundError, errors.HFValidationError)):
            raise ValueError(f"there is no file, folder or hub dataset {name!r}: check the spelling (a private one needs `hf auth login`)") from None
        raise ValueError(f"there is no file or folder {name!r}, and the hub dataset of that name, split {split!r}, cannot be read "
                         f"({one_line(e)}): check the connection and the name, or give local files") from None


def one_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}"


# ------------------------------------------------------------------------------------------------------- public benchmarks


def plain(text: str) -> str:
    """Lines that end in newlines alone. Form feeds and such end a line for `str.splitlines`, but not for Python's tokenizer."""
    return "".join(line + "\n" for line in text.splitlines())


def cut(head: str, body: str = "") -> tuple[str, str]:
    """Prompt and solution that meet at the decision point where `head`, whole lines of code, is continued.

    The indentation there is that of head's last line, the end of a docstring. The solution loses its comment lines (elbo.py says why).
    """
    head, body = plain(head.rstrip()), plain(body)
    last = head.splitlines()[-1]
    indent = last[:len(last) - len(last.lstrip())]
    if not body.strip():
        return head + indent[:-1], ""
    body = strip_comments(head + body)[len(strip_comments(head)):]
    first = next((i for i in statements(head + body) if i >= len(head)), None)
    if first is None:
        raise ValueError("the solution has no statement")
    return head + indent[:-1], (head + body)[first - bool(indent):]


def docstring(*parts: str) -> str:
    """The task as a module's docstring, raw if need be: LaTeX is full of backslashes."""
    text = plain("\n\n".join(part.strip() for part in parts if part.strip())).replace('"""', "'''")
    return f'{"r" if chr(92) in text else ""}"""\n{text}"""\n'


def strict(test: str) -> str:
    """A test of EvalPlus's hub copies without its two holes: np.allclose finds [] near to any number, and one form of `assertion` asserts nothing."""
    for loose, tight in (("assert np.allclose(out, exp,", "assert np.shape(out) == np.shape(exp) and np.allclose(out, exp,"),
                         ("        exact_match = exp == (out is not None)\n", "        exact_match = exp == (out is not None)\n    assert exact_match\n")):
        test = test.replace(loose, tight)
    return test


def humaneval(r: dict) -> Problem:
    return Problem(str(r["task_id"]), *cut(r["prompt"], r["canonical_solution"]), (strict(r["test"]),), "check", (r["entry_point"],), r["prompt"])


SHOT = "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n[BEGIN]\n"


def mbpp(r: dict, shots: list[dict] = ()) -> Problem:
    """Zero-shot: text and tests in a docstring. With shots: the format of Austin et al. 2021, tasks 2, 3 and 4 as examples."""
    text, code = r["text" if "text" in r else "prompt"], r["code"]
    setup = "\n".join(r["test_imports"]) if "test_imports" in r else r["test_setup_code"]
    tests = (strict(r["test"]),) if "test" in r else tuple(r["test_list"])                                    # MBPP+ has one long test
    prompt, solution = cut(docstring(text, "\n".join(r["test_list"])), code)
    if shots:
        ask = [SHOT.format(s["text" if "text" in s else "prompt"], "\n".join(s["test_list"])) for s in (*shots, r)]
        prompt = "".join(f"{q}{plain(s['code'])}[DONE]\n\n" for q, s in zip(ask, shots)) + ask[-1]
    return Problem(f"mbpp/{r['task_id']}", prompt, solution, tests, "asserts", names_under_test(code, (setup, *r["test_list"])), setup, bool(shots))


class OnlyStr(pickle.Unpickler):
    """Unpickles plain values alone. A pickle that names a class or function could run anything, and is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; a test case is a str")


def decode_cases(column: str) -> list[dict]:
    """LiveCodeBench's test cases: JSON, or (private ones) base64 of zlib of a pickled str of JSON. Raises ValueError otherwise."""
    if not column.lstrip().startswith("["):
        try:
            column = OnlyStr(io.BytesIO(zlib.decompress(base64.b64decode(column)))).load()
        except Exception as e:                                            # a broken pickle can raise nearly anything
            raise ValueError(f"test cases that do not decode ({one_line(e)})") from None
    return json.loads(column)


MODULES = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json".split()
LISTED = "def listed(x):\n    return [listed(y) for y in x] if isinstance(x, (list, tuple)) else x\n\n"      # a tuple will do for a list
IMPORTS = "\n".join([*(f"from {m} import *" for m in (*MODULES, "builtins", "typing")), *(f"import {m}" for m in MODULES),
                     "sys.setrecursionlimit(50000)\n"])                                      # what LiveCodeBench's own harness sets before a program


def livecodebench(r: dict) -> Problem:
    """LeetCode's problems call a method, with arguments and result in JSON, all cases in one test; the others read stdin."""
    cases = decode_cases(r["public_test_cases"]) + decode_cases(r["private_test_cases"] or "[]")
    prompt, date = cut(docstring(r["question_content"], r["starter_code"]))[0], str(r["contest_date"])[:10]
    if not r["starter_code"].strip():
        return Problem(f"lcb/{r['question_id']}", prompt, "", tuple((c["input"], c["output"]) for c in cases), "stdio", (), IMPORTS, date=date)
    lines = [f"    assert listed(candidate(*{[json.loads(x) for x in c['input'].splitlines()]!r})) == {json.loads(c['output'])!r}\n" for c in cases]
    entry = f"Solution().{json.loads(r['metadata'])['func_name']}"
    check = LISTED + "def check(candidate):\n" + "".join(lines)
    return Problem(f"lcb/{r['question_id']}", prompt, "", (check,), "check", (entry,), IMPORTS, timeout_s=min(6.0 * len(cases), 60.0), date=date)


def is_python(source: str) -> bool:
    try:
        return bool(statements(plain(source)))
    except ValueError:
        return False


def code_contests(r: dict, codeforces: bool = False) -> Problem | None:
    """stdin to stdout, all tests; the first Python 3 solution is the reference. None: reads a file, or is not from Codeforces."""
    if r["input_file"] or codeforces and r["source"] != 2:
        return None
    kinds = [r[k] for k in ("public_tests", "private_tests", "generated_tests")]
    solutions = (s for s, language in zip(r["solutions"]["solution"], r["solutions"]["language"]) if language == 3 and is_python(s))
    return Problem(str(r["name"]), *cut(docstring(r["description"]), next(solutions, "")),                # of hundreds, the first
                   tuple(case for k in kinds for case in zip(k["input"], k["output"])), "stdio", ())


def leetcode(r: dict) -> Problem:
    """The text ends with the code to complete, which names the method. `prompt` holds imports and node classes, for tests and program."""
    return Problem(f"leetcode/{r['task_id']}", *cut(docstring(r["query"]), r["completion"]), (r["test"],), "check",
                   (r["entry_point"],), r["prompt"], date=str(r.get("estimated_date") or "")[:10])


# Where completions end. In a function: where code stands at the margin. A whole program may define and comment there.
IN_FUNCTION = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert", "\nimport", "\nfrom", "\n```")
PROGRAM = ("\nassert", "\nprint", "\nif __name__", '\n"""', "\n```")
SCRIPT = ('\n"""', "\n```")


@dataclass(frozen=True)
class Source:
    """Where a benchmark's rows come from, how a row becomes a Problem, where completions end, seconds that a program may take."""
    hub: str
    files: str                           # in --data-dir; {} is the split
    problem: Callable[..., Problem | None]
    stop: tuple[str, ...]
    timeout_s: float = 10.0              # HumanEval+ and MBPP+ have references that take up to 26 s
    subset: str | None = None
    split: str = "test"
    shots: tuple[int, ...] = ()          # task ids of the split "prompt"
    hub_files: str | None = None


MBPP = "google-research-datasets/mbpp"
SOURCES = {
    "humaneval": Source("openai/openai_humaneval", "openai_humaneval/{}.jsonl", humaneval, IN_FUNCTION),
    "humanevalplus": Source("evalplus/humanevalplus", "humanevalplus/{}.jsonl", humaneval, IN_FUNCTION, 40.0),
    "mbpp": Source(MBPP, "mbpp/full/{}.jsonl", mbpp, ("[DONE]",), subset="full", shots=(2, 3, 4)),
    "mbpp-docstring": Source(MBPP, "mbpp/full/{}.jsonl", mbpp, PROGRAM, subset="full"),
    "mbppplus": Source("evalplus/mbppplus", "mbppplus/{}.jsonl", mbpp, PROGRAM, 40.0),
    "livecodebench": Source("livecodebench/code_generation_lite", "livecodebench/*.jsonl", livecodebench, SCRIPT, hub_files="test*.jsonl"),
    "code_contests": Source("deepmind/code_contests", "code_contests/{}*.jsonl", code_contests, SCRIPT),
    "codeforces": Source("deepmind/code_contests", "code_contests/{}*.jsonl", partial(code_contests, codeforces=True), SCRIPT),
    "leetcode": Source("newfacade/LeetCodeDataset", "leetcode_dataset/{}.jsonl", leetcode, PROGRAM),
}


def load(name: str, data_dir=None, *, limit: int | None = None, since: str = "", until: str = "") -> list[Problem]:
    """The problems of a benchmark, in the order of its rows: `benchmark[:split][@where]`, or "world".

    `@where` names another hub dataset, file (JSONL, Parquet) or folder of them with rows of the same columns: `leetcode:train@me/my-problems`.
    Several benchmarks, with commas between, are read one after the other; a problem that two of them hold (MBPP, MBPP+) counts once.
    data_dir: a folder with JSONL files as in `Source.files`; None: the hub. since, until: dates YYYY-MM-DD, the second excluded; problems
    without a date stay. Raises ValueError for an unknown name, what cannot be read, a row without a column, or if no problem is left.
    """
    for date in filter(None, (since, until)):
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
            raise ValueError(f"{date!r} is not a date: expected YYYY-MM-DD")
    if "," in name:
        found: dict[str, Problem] = {}
        for one in name.split(","):
            if one == "world":                                            # these are the held-out ones, and a list may be for training
                raise ValueError(f"{name}: the world cannot stand in a list; give it alone")
            for p in load(one, data_dir, limit=limit, since=since, until=until):
                found.setdefault(p.id, p)
        return list(found.values())[:limit]
    if name == "world":
        return world("eval", limit or 200, seed=0)
    key, _, where = name.partition("@")
    key, _, split = key.partition(":")
    if key not in SOURCES:
        raise ValueError(f"unknown benchmark {key!r}: expected world or one of {', '.join(SOURCES)}")
    source, where = SOURCES[key], Path(where) if where else None
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"there is no folder {str(data_dir)!r}: give --data-dir an existing folder, or leave it out to use the hub")

    def rows(split: str) -> Iterator[dict]:
        if where is not None and split != "prompt":
            files = [where] if where.is_file() else sorted(f for f in where.rglob("*") if f.suffix in (".jsonl", ".parquet"))
            return local_rows(files) if files else hub_rows(str(where), split)
        if data_dir is None:
            return hub_rows(source.hub, split, source.subset, source.hub_files)
        pattern = source.files.format(split)
        if not (files := sorted(Path(data_dir).glob(pattern))):
            raise ValueError(f"{data_dir} has no file {pattern}: put the rows of {source.hub} there, one JSON object per line")
        return local_rows(files)
    shots = [r for r in rows("prompt") if r.get("task_id") in source.shots] if source.shots else []
    if len(shots) != len(source.shots):
        raise ValueError(f"{name}: the split 'prompt' lacks one of the examples {source.shots}; take it from {source.hub}, or use mbpp-docstring")
    make = partial(source.problem, shots=shots) if shots else source.problem
    out: list[Problem] = []
    ids: Counter = Counter()
    for n, row in enumerate(rows(split or source.split), 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                           # of odd escapes in other people's strings
                p = make(row)
        except KeyError as e:
            raise ValueError(f"{name}: row {n} has no column {e}; its columns are {', '.join(row)}") from None
        except Exception as e:                                            # nothing is known of a row that is not what it should be
            raise ValueError(f"{name}: row {n} is unreadable ({one_line(e)}): expected a row like those of {source.hub}") from None
        if p and p.tests and (not p.date or since <= p.date < (until or "9999")):
            ids[p.id] += 1                                                # scores are by id: no two problems may share one
            out.append(replace(p, id=p.id + f"#{ids[p.id]}" * (ids[p.id] > 1), stop=source.stop, timeout_s=p.timeout_s or source.timeout_s))
        if len(out) == limit:
            break
    if not out:
        raise ValueError(f"{name}: no problem " + (f"between {since or 'the start'} and {until or 'today'}: widen --since and --until"
                                                   if since or until else "in it: is the dataset empty?"))
    return out


# Programs that know nothing of the problem: what such a one passes teaches nothing, or teaches it in place of programming.
VALUES = ("None", "True", "False", "0", "1", "-1", "''", "[]", "()", "{}", "args[0]", "args[1]", "args[-1]")
PRINTED = ("", "print(0)", "print(1)", "print(-1)", "print('YES')", "print('NO')", "print('Yes')", "print('No')", "print(input())",
           "print(open(0).read())")


def trivial_programs(p: Problem) -> dict[str, str]:
    """What it does -> a program that does it, for each trivial answer."""
    def answer(name: str, value: str) -> str:
        in_class = name.startswith("Solution().")
        lines = [f"def {name.removeprefix('Solution().')}({'self, ' * in_class}*args, **more):",
                 "    args += tuple(more.values())", f"    return {value}"]
        return "class Solution:\n" * in_class + "".join(f"{'    ' * in_class}{line}\n" for line in lines)
    if p.kind == "stdio":
        return {program or "print nothing": program for program in PRINTED}
    return {f"return {value}": "".join(answer(name, value) for name in p.names) for value in VALUES}


def unfit_for_rl(problems: list[Problem], box: Sandbox) -> dict[str, str]:
    """{id: why} of the problems whose reference (where there is one) fails, or which a trivial program passes."""
    have = [p for p in problems if p.solution]
    out = {p.id: f"its reference fails: {v.kind}" for p, v in zip(have, judge(box, have, [p.job(p.solution) for p in have])) if not v.passed}
    left = {p.id: trivial_programs(p) for p in problems if p.id not in out}
    while left:                                                           # one trivial program of each problem per round
        tried = [(p, left[p.id].popitem()) for p in problems if p.id in left]
        for (p, (what, _)), v in zip(tried, judge(box, [p for p, _ in tried], [p.job_of(program) for p, (_, program) in tried])):
            if v.passed:
                out[p.id] = f"a trivial program passes: {what}"
        left = {i: programs for i, programs in left.items() if programs and i not in out}
    return out


# -------------------------------------------------------------------------------------------------------- the command line


def check_references(name: str, problems: list[Problem], box: Sandbox) -> dict:
    """How many reference solutions pass, and which do not."""
    have = [p for p in problems if p.solution]
    if not have:
        raise ValueError(f"{name} has no reference solutions to check")
    failed = {p.id: v.kind for p, v in zip(have, judge(box, have, [p.job(p.solution) for p in have])) if not v.passed}
    print(f"{name}: {len(have) - len(failed)} of {len(have)} references pass", *(f"    {i}: {kind}" for i, kind in failed.items()), sep="\n")
    return {"problems": len(have), "passed": len(have) - len(failed), "failed": failed}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Scores of a model on code benchmarks: a row of the paper's Table 1, then one JSON line.")
    add = parser.add_argument
    add("--model", help="a folder in the Hugging Face layout, or a hub name")
    add("--method", default="base", help="what the table calls it: base, NTP, RA3")
    add("--benchmarks", default=",".join(TABLE_1), help=f"of world, {', '.join(SOURCES)}; a split follows a colon: leetcode:train")
    add("--data-dir", help="folder with the benchmarks as JSONL; without it they come from the hub")
    add("--samples", type=int, default=1, help="per problem; 5 and more give pass@5")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--max-new-tokens", type=int, default=512)
    add("--batch-size", type=int, default=64, help="samples that grow side by side")
    add("--limit", type=int, help="only the first so many problems of each benchmark")
    add("--since", default="", help="first date, YYYY-MM-DD, of problems that have one (LiveCodeBench)")
    add("--until", default="", help="the date after the last")
    add("--seed", type=int, default=0)
    add("--workers", type=int, help="processes of the sandbox; default: one per core")
    add("--out", default="results.jsonl", help="every sample with its verdict; the score can be recomputed from it")
    add("--score", metavar="FILE", help="only print the scores of a results file")
    add("--check-references", action="store_true", help="only run the reference solutions")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(command(args)))
    except (ValueError, OSError, RuntimeError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        sys.exit(2)


def command(args: argparse.Namespace) -> dict:
    """What the command line asks for; returns its JSON line. Raises ValueError with one clear sentence for what cannot be done."""
    for name in ("samples", "max_new_tokens", "batch_size", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if not 0 <= args.temperature < float("inf") or args.temperature == 0 < args.samples - 1:
        raise ValueError(f"--temperature {args.temperature:g} does not do for {args.samples} samples: it must be 0 for one greedy sample, "
                         "or positive, say 0.8")
    if args.score:
        scores = score_file(args.score)
        print(table(args.model or args.score, args.method, scores))
        return {"scores": scores}
    benchmarks = {name: load(name, args.data_dir, limit=args.limit, since=args.since, until=args.until) for name in args.benchmarks.split(",")}
    with Sandbox(args.workers) as box:
        if args.check_references:
            return {name: check_references(name, problems, box) for name, problems in benchmarks.items()}
        if not args.model:
            raise ValueError("--model is missing: give the folder of a model or its name on the hub")
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        model, enc = load_pretrained(args.model, device, dtype)
        rows = []
        with open(args.out, "w", encoding="utf-8") as f:
            f.write(json.dumps({"settings": vars(args)}) + "\n")
            for name, problems in benchmarks.items():
                for row in evaluate(model, enc, name, problems, box, samples=args.samples, temperature=args.temperature,
                                    max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, seed=args.seed):
                    rows.append(row)
                    f.write(json.dumps(row) + "\n")
    scores = score(rows)
    print(table(args.model, args.method, scores))
    return {"model": args.model, "method": args.method, "seed": args.seed, "temperature": args.temperature, "results": args.out, "scores": scores}


if __name__ == "__main__":
    main()
