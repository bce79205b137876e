"""The problems and the score: the embedded world, public benchmarks, pass@k.

Every problem of the project, embedded or public, is a `Problem`: a prompt that the model continues, an expert's continuation
where there is one, and a way to make a sandbox job of a completion. A benchmark's score is the unbiased pass@k over them.

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
import random
import zlib
from dataclasses import dataclass
from math import comb

import tiktoken

from model import GPT, Sample, generate
from sandbox import Asserts, Sandbox

# ------------------------------------------------------------------------------------------------------- problem and score


@dataclass(frozen=True)
class Problem:
    id: str
    prompt: str                          # ends at a decision point (see elbo.py)
    solution: str = ""                   # the expert's continuation of the prompt; empty where the benchmark has none
    tests: tuple[str, ...] = ()          # assert statements
    entry_point: str = "f"

    def job(self, completion: str):
        """The sandbox job that tests prompt + completion."""
        return Asserts(self.prompt + completion, self.tests, names=(self.entry_point,))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n samples of which c are (Chen et al. 2021, eq. 1).

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} needs 1 <= k <= n samples and 0 <= c <= n right ones; got n={n}, c={c}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def completion(enc, tokens: list[int], eos: int) -> str:
    """Text of sampled tokens, up to the end of the document."""
    return enc.decode([t for t in tokens if t != eos])


def verdicts(box: Sandbox, jobs: list) -> list[bool]:
    """Which jobs pass; equal jobs run once, as samples of a sharp policy are often the same program."""
    unique = list(dict.fromkeys(jobs))
    passed = dict(zip(unique, (v.passed for v in box.run(unique))))
    return [passed[job] for job in jobs]


def attempt(model: GPT, enc, problems: list[Problem], seeds: list, box: Sandbox, *, max_new_tokens: int,
            temperature: float = 1.0) -> tuple[list[Sample], list[bool]]:
    """One sample for each problem (repeat a problem for a group) and whether it passes its tests."""
    eos = model.config.eos_id
    samples = generate(model, [enc.encode_ordinary(p.prompt) for p in problems], max_new_tokens=max_new_tokens, seeds=seeds,
                       temperature=temperature, vocab=enc.n_vocab)
    return samples, verdicts(box, [p.job(completion(enc, s.tokens, eos)) for p, s in zip(problems, samples)])


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
    terms, value = [("", rng.randint(1, 9))], 0
    value = terms[0][1]
    while len(terms) < n_terms:
        op = rng.choices("+-*", (2, 2, 2))[0]
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
    """A web programmer's comment on a step: 40% worked out, 15% half worked out, 20% a name, 25% chatter."""
    r = rng.random()
    if step.terms and r < 0.40:
        return step.working(len(step.terms))
    if step.terms and r < 0.55:
        return step.working(rng.randint(1, len(step.terms)))
    if r < 0.75:
        return rng.choice((step.kind, f"{step.kind} step", f"now {step.kind}"))
    return rng.choice(CHATTER)


def write_program(steps: list[Step], end: str, rng: random.Random | None = None) -> str:
    """The body of f, from its first decision point on. With rng: web code, half of it with comments on 60% of its steps."""
    commented = rng is not None and rng.random() < 0.5
    lines = []
    for step in steps:
        body = step.lines()
        if commented and rng.random() < 0.6:
            # Mostly above the step, sometimes right at the line with the constant, at that line's indentation.
            at = 2 if len(body) > 1 and rng.random() < 0.3 else 0
            indent = body[at][:len(body[at]) - len(body[at].lstrip())]
            body.insert(at, f"{indent}# {draw_comment(rng, step)}")
        lines += body
    lines.append(ENDS[end])
    return "\n".join("    " + line for line in lines)[3:] + "\n"       # the prompt holds the first three spaces


def world(kind: str, n: int, seed: int, *, n_steps=(2, 3), n_terms=(4, 8)) -> list[Problem]:
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


def train_tokenizer(vocab_size: int = 384) -> tiktoken.Encoding:
    """Byte-pair encoding learnt offline from the world's own text, with GPT-2's pre-tokenizer."""
    from tiktoken._educational import bpe_train
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    text = "\n".join(p.prompt + p.solution for p in world("web", 600, seed=0))
    ranks = bpe_train(text, vocab_size - 1, pattern, visualise=None)
    return tiktoken.Encoding("ra3-world", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": vocab_size - 1})
