"""The embedded world: programs without end that need no download, and that need a chain of thought.

    python base/world.py [web|train|eval|hard]          # print a few

A docstring lists steps, and the constants in it are not worked out:

    def f(xs):
        \"""add 3 * 4 - 5; above 7 + 2; total\"""
        xs = [x + 7 for x in xs]
        out = []
        for x in xs:
            if x > 9:
                out.append(x)
        xs = out
        return sum(xs)

Constants are worked out from left to right, as on a pocket calculator, which is serial work: a small network
that must write ` 7` at once often gets it wrong, one that writes `# 3 * 4 = 12 - 5 = 7` first seldom does.
Experts' programs carry no comments. The "web" code that the base model learns from carries some, above the
step that they are about: worked out, half worked out, a mere name, or the chatter of careless programmers,
whose next step is as often wrong as right. Nobody tells the model which of them pay.
"""
import random
import sys
import zlib
from dataclasses import dataclass
from typing import Iterator

LIMIT = 20                                          # no constant, and no value on the way to it, leaves 0..20
COMPUTED = ("add", "subtract", "above", "below")    # steps that take a constant
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
CHATTER = ("todo: clean this up", "see the docs", "works for now",
           "be careful here", "this part is easy", "old code")


def rows(kind: str, n: int, seed: int, n_steps=(2, 3), n_terms=(5, 9)) -> Iterator[dict]:
    """Yields n different problems as dicts (id, prompt, solution, tests), the same for the same arguments.

    kind: "web" (with comments; easier problems among them; no tests), "train" (experts' programs), "eval"
    (held out) or "hard" (held out, and longer, most than any other). n_steps, n_terms: the least and the most
    steps of a program and terms of a constant. Raises ValueError for another kind.
    """
    if kind not in ("web", "train", "eval", "hard"):
        raise ValueError(f"unknown kind of problem {kind!r}: expected 'web', 'train', 'eval' or 'hard'")
    if kind == "web":
        n_steps, n_terms = (1, n_steps[1]), (1, n_terms[1])
    if kind == "hard":
        n_steps, n_terms = (n_steps[1], n_steps[1] + 1), (n_terms[0] + 1, n_terms[1] + 2)
    seen, rng = set(), random.Random(f"{kind}-{seed}")
    while len(seen) < n:
        steps, end = draw_task(rng, n_steps, n_terms)
        task = "; ".join([*(step.text() for step in steps), end])
        if task in seen or is_held_out(task) != (kind in ("eval", "hard")):
            continue
        seen.add(task)
        solution = write_program(steps, end, rng if kind == "web" else None)
        tests = () if kind == "web" else write_tests(steps, end, rng)
        prompt = f'def f(xs):\n    """{task}"""\n   '
        yield dict(id=f"{kind}/{seed}/{len(seen) - 1}", prompt=prompt, solution=solution, tests=tests)


def is_held_out(task: str) -> bool:
    """Whether a task is for evaluation: its text alone decides, so that none can also be trained on."""
    return zlib.crc32(task.encode()) % 8 == 0


def apply(op: str, value: int, n: int) -> int:
    """One key of the pocket calculator."""
    results = {"": n, "+": value + n, "-": value - n, "*": value * n}
    return results[op]


@dataclass(frozen=True)
class Step:
    kind: str
    terms: tuple[tuple[str, int], ...] = ()     # operators and operands: ("", 3), ("*", 4), ("-", 5)

    def values(self) -> list[int]:
        """The value after each term; the last is the constant."""
        out = []
        for op, n in self.terms:
            out.append(apply(op, out[-1] if out else 0, n))
        return out

    def text(self) -> str:
        return " ".join([self.kind, *(f"{op} {n}".strip() for op, n in self.terms)])

    def lines(self) -> list[str]:
        n = self.values()[-1] if self.terms else None
        return [line.format(n=n) for line in LINES[self.kind]]

    def working(self, count: int) -> str:
        """`3 * 4 = 12 - 5 = 7`: the first `count` terms, worked out."""
        worked = [f"{op} {n} = {value}" for (op, n), value in zip(self.terms, self.values())]
        return " ".join([str(self.values()[0]), *worked[1:count]])

    def run(self, xs: list[int]) -> list[int]:
        """What the step means, written independently of its lines."""
        n = self.values()[-1] if self.terms else 0
        meaning = {
            "add": lambda: [x + n for x in xs],
            "subtract": lambda: [x - n for x in xs],
            "above": lambda: [x for x in xs if x > n],
            "below": lambda: [x for x in xs if x < n],
            "evens": lambda: [x for x in xs if not x & 1],
            "odds": lambda: [x for x in xs if x & 1],
            "reverse": lambda: list(reversed(xs)),
            "sort": lambda: sorted(xs),
            "negate": lambda: [0 - x for x in xs],
        }
        return meaning[self.kind]()


def draw_task(rng: random.Random, n_steps, n_terms) -> tuple[list[Step], str]:
    """Steps of a program and its end. Three steps in four take a constant; no kind stands twice."""
    kinds: list[str] = []
    for _ in range(rng.randint(*n_steps)):
        pool = COMPUTED if rng.random() < 0.75 else PLAIN
        kinds.append(rng.choice([k for k in pool if k not in kinds]))
    steps = []
    for kind in kinds:
        terms = draw_terms(rng, rng.randint(*n_terms)) if kind in COMPUTED else ()
        steps.append(Step(kind, terms))
    return steps, rng.choice(list(ENDS))


def draw_terms(rng: random.Random, count: int) -> tuple[tuple[str, int], ...]:
    """The terms of a constant, none of which leaves 0..20 on the way."""
    value = rng.randint(1, 9)
    terms = [("", value)]
    while len(terms) < count:
        op = rng.choices("+-*")[0]
        n = rng.randint(2, 3) if op == "*" else rng.randint(1, 9)
        if 0 <= apply(op, value, n) <= LIMIT:
            terms.append((op, n))
            value = apply(op, value, n)
    return tuple(terms)


def write_program(steps: list[Step], end: str, rng: random.Random | None = None) -> str:
    """The body of f, from its first decision point on.

    With rng it is web code: half of the programs have comments, above 80% of their steps.
    """
    commented = rng is not None and rng.random() < 0.5
    lines = []
    for step in steps:
        body = step.lines()
        if commented and rng.random() < 0.8:
            comment = draw_comment(rng, step)
            lines.append(f"# {comment}")
            if comment in CHATTER and rng.random() < 0.5:
                body = write_blunder(rng, step)
        lines += body
    lines.append(ENDS[end])
    body = "\n".join(f"    {line}" for line in lines) + "\n"
    return body[3:]                                                 # the prompt holds the first three spaces


def draw_comment(rng: random.Random, step: Step) -> str:
    """A web programmer's comment on a step: worked out (half of them), partly so, a mere name, or chatter."""
    r = rng.random()
    if step.terms and r < 0.50:
        return step.working(len(step.terms))
    if step.terms and r < 0.60:
        return step.working(rng.randint(1, len(step.terms)))
    if r < 0.75:
        return rng.choice((step.kind, f"{step.kind} step", f"now {step.kind}"))
    return rng.choice(CHATTER)


def write_blunder(rng: random.Random, step: Step) -> list[str]:
    """The lines of a wrong step: its constant is off by 1 to 3, or it is another plain one."""
    if not step.terms:
        return Step(rng.choice([kind for kind in PLAIN if kind != step.kind])).lines()
    right = step.values()[-1]
    wrong = [n for n in range(right - 3, right + 4) if n != right and 0 <= n <= LIMIT]
    n = rng.choice(wrong)
    return [line.format(n=n) for line in LINES[step.kind]]


def write_tests(steps: list[Step], end: str, rng: random.Random) -> tuple[str, ...]:
    """Asserts on a few short lists, and on all of -70..70 shuffled, where most wrong constants show."""
    span = list(range(-70, 71))
    rng.shuffle(span)
    short, positive = [rng.randint(-30, 30) for _ in range(5)], [rng.randint(0, 40) for _ in range(8)]
    tests = []
    for given in ([], short, positive, span):
        xs = given
        for step in steps:
            xs = step.run(xs)
        wanted = {"list": xs, "total": sum(xs), "unique": sorted(set(xs))}
        tests.append(f"assert f({given}) == {wanted[end]}")
    return tuple(tests)


if __name__ == "__main__":
    for row in rows(sys.argv[1] if len(sys.argv) > 1 else "web", 4, seed=0):
        print(row["prompt"] + row["solution"])
