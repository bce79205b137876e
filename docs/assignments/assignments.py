"""Make a student's copy of this repository, and grade one.

    python docs/assignments/assignments.py copy OUT                  # the exercises blanked, all else whole
    python docs/assignments/assignments.py grade COPY                # points, and the first fact that fails
    python docs/assignments/assignments.py grade COPY --only returns --json results.json    # for Gradescope
    python docs/assignments/assignments.py leaderboard runs/mine     # a line for the open exercise

An exercise is one or two functions of a module, found by name (EXERCISES). What a student wrote is compared
with what this repository computes, on inputs drawn from a seed. Of a student's file only the bodies of the
exercise's functions are read; everything else is this repository's, so a mistake costs once.

    grader, this process: draws the inputs, computes the reference's answers, compares
       |---> server: the modules, imported once; it never sees an answer
                |---fork---> one child per exercise: puts the student's body in, draws the same inputs, gives
                             up every right (`lock`), and only then calls it; its answers are JSON in a file

A child can compute, and write that file. What it prints, patches or forges reaches nobody: the worst that it
can do is to answer wrongly. Which bodies are right is no secret, they stand in this repository; whether a
student wrote them is not for a grader to say. Needs Linux, as sandbox.py does.
"""
import argparse
import ast
import copy
import ctypes
import itertools
import json
import math
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import bench  # noqa: E402
import elbo  # noqa: E402
import estep  # noqa: E402
import model  # noqa: E402
import mstep  # noqa: E402
import rlvr  # noqa: E402
import sandbox  # noqa: E402
from elbo import ACTION, FORCED, FREE, LATENT, PROMPT, Batch, Trace  # noqa: E402

MODULES = {m.__name__: m for m in (bench, elbo, estep, model, mstep, rlvr)}
COPIED = ("*.py", "base/*", "docs/*.py", "docs/*.md", "docs/assignments/README.md",
          "LICENSE", "README.md", "constraints.txt", "pyproject.toml")
MEMORY_MB = 2048           # that a child may allocate beside the modules
ANSWER_MB = 64             # size of its answers
GRACE_S = 3.0              # CPU seconds of a child: these, and
PATIENCE = 5               # ... so many times what the reference takes
WALL_S = 50                # wall time of a child, for one that sleeps
BUDGET = 3_000_000         # tokens through the model, of the open exercise: half of what RA3 takes by default


# ----------------------------------------------------------------- what is checked: the facts of each exercise


class Fact(NamedTuple):
    """A sentence that is true of the reference, and the call that shows it: numbers, lists, dicts, tensors."""
    text: str
    answer: Callable


class Draw:
    """Hidden inputs: the same numbers for the same seed and exercise, in every process."""

    def __init__(self, seed: int, name: str):
        self.rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.rng)

    def flags(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.rng) < 0.5

    def integers(self, n: int, low: int, high: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=self.rng).tolist()

    def batch(self) -> Batch:
        """Three programs over 11 tokens, of which 0, 1 and 2 open a comment; rationales at every other line."""
        traces = []
        for row, n_lines in enumerate((4, 2, 3)):
            trace = Trace()
            trace.add(self.integers(2 + row, 0, 11), PROMPT)
            for t in range(n_lines):
                if (row + t) % 2:
                    comment = self.integers(1, 0, 3) + self.integers(2, 3, 11)
                    trace.add(comment, LATENT, t, FORCED if t == 2 else FREE)
                trace.add(self.integers(1, 3, 11) + self.integers(t + 1, 0, 11), ACTION, t, FREE)
            traces.append(trace)
        return elbo.collate(traces)


OPENERS = torch.arange(11) < 3                                                # (V,), of Draw.batch


def with_gradient(function: Callable, *inputs: torch.Tensor) -> dict:
    """A scalar function's value and its gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    value.backward()
    return dict(value=value, gradients=[leaf.grad for leaf in leaves])


def raises(function: Callable, *args, **named) -> bool:
    """Does this call raise ValueError, as the docstring says?"""
    try:
        function(*args, **named)
    except ValueError:
        return True
    return False


def sampling(draw: Draw) -> Iterator[Fact]:
    cfg = model.GPTConfig(vocab_size=12, d_model=32, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, d_ff=48)
    gpt = model.GPT(cfg)
    for p in gpt.parameters():
        p.data = 0.4 * draw.normal(*p.shape)
    prompts = [draw.integers(n, 1, 12) for n in (3, 9, 1, 5)]
    seeds, seen = draw.integers(4, 0, 1000), []
    gpt.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))

    def run(n: int = 16, **how) -> list:
        return [vars(s) for s in model.generate(gpt, prompts, max_new_tokens=n, seeds=seeds, **how)]

    def cost() -> bool:
        seen.clear()
        run(stop_ids=())
        return sum(seen) <= 4 * (9 + 16)                         # every row padded, and each token read once
    yield Fact("greedy, one prompt is continued until it has max_new_tokens", lambda: [
        model.generate(gpt, prompts[:1], max_new_tokens=6, seeds=[0], temperature=0, stop_ids=())[0].tokens])
    yield Fact("prompts of different lengths do not see each other's padding", lambda: [
        s["tokens"] for s in run(temperature=0, stop_ids=())])
    yield Fact("each prompt draws from its own seed", lambda: [s["tokens"] for s in run(stop_ids=())])
    yield Fact("a sample ends with a token of stop_ids, which it keeps, and says so; tokens and "
               "log-probabilities agree", lambda: run(stop_ids=(3, 4, 5)))
    yield Fact("stop(tokens) ends a sample too", lambda: run(stop_ids=(), stop=lambda tokens: 7 in tokens))
    yield Fact("log-probabilities are those of the distribution drawn from, temperature included",
               lambda: run(temperature=0.7, stop_ids=()))
    yield Fact("a small batch_size gives the same samples", lambda: run(batch_size=2, stop_ids=()))
    yield Fact("the model reads each token once: the rest is in the cache", cost)
    yield Fact("an empty prompt raises ValueError",
               lambda: raises(model.generate, gpt, [[]], max_new_tokens=1, seeds=[0]))
    many = dict(max_new_tokens=500, seeds=list(range(32)), stop_ids=())        # a matter of the time limit
    yield Fact("500 tokens of 32 rows are a matter of seconds",
               lambda: len(model.generate(gpt, prompts[:1] * 32, **many)))


def score(draw: Draw) -> Iterator[Fact]:
    batch = draw.batch()
    n = int(batch.scored.sum())
    logits, steep, weight = draw.normal(n, 11), 60 * draw.normal(n, 11), draw.normal(2, *batch.scored.shape)
    yield Fact("the gate's part is log q(think) where a comment opens, log q(act) where an action begins, and "
               "0 at all other tokens", lambda: elbo.score(logits, batch, OPENERS)[0])
    yield Fact("the token's part is log p(token) less the gate's part; 0 in prompts",
               lambda: elbo.score(logits, batch, OPENERS)[1])
    yield Fact("logs of probabilities too small for a float stay finite",
               lambda: torch.stack(elbo.score(steep, batch, OPENERS)))
    yield Fact("both parts carry gradients", lambda: with_gradient(
        lambda x: (weight * torch.stack(elbo.score(x, batch, OPENERS))).sum(), logits))


def by_line(draw: Draw) -> Iterator[Fact]:
    batch = draw.batch()
    values, weight = draw.normal(*batch.scored.shape), draw.normal(3, 6)
    yield Fact("entry i of the values belongs to the line of token i + 1; values are added up, and what stands "
               "in no line counts nowhere", lambda: elbo.by_line(values, batch, 4))
    yield Fact("lines that a program does not have are 0", lambda: elbo.by_line(values, batch, 6))
    yield Fact("sums carry gradients",
               lambda: with_gradient(lambda x: (weight * elbo.by_line(x, batch, 6)).sum(), values))


def reward(draw: Draw) -> Iterator[Fact]:
    log_pi, gate = -3 * draw.normal(4, 6).abs() - 0.1, -draw.normal(4, 6).abs()
    think, broken, free = draw.flags(4, 6), draw.flags(4, 6), draw.flags(4, 6)
    none = torch.zeros(4, 6, dtype=torch.bool)
    log_pi[0, 0], think[1, :2], broken[1, :2], free[1, :2] = -20.0, torch.tensor([True, False]), True, True

    def rewards(think=none, broken=none, free=none, **how) -> torch.Tensor:
        how = dict(c=0.0, beta=0.0, p_think=0.2, broken_cost=0.0) | how
        return elbo.line_rewards(log_pi, think, broken, gate, free, **how)
    g, entropy = draw.normal(5).sigmoid().double(), draw.normal(5).abs().double()
    ends = torch.tensor([0.0, 1.0]).double()
    yield Fact("without prices the reward is log pi", rewards)
    yield Fact("no line costs more than `floor` nats", lambda: rewards(floor=2.5))
    yield Fact("a rationale costs c", lambda: rewards(think, c=0.3))
    yield Fact("an infinite c that is not paid leaves numbers", lambda: rewards(none, c=math.inf))
    yield Fact("a broken format costs broken_cost, below the floor too",
               lambda: rewards(broken=broken, broken_cost=0.7, floor=1.0))
    yield Fact("beta (log p(gate) - log q(gate)) is earned where q chose, with p(act) = 1 - p_think",
               lambda: rewards(think, free=free, beta=0.5))
    yield Fact("kl_exact is KL(q || p), of gate and text", lambda: elbo.kl_exact(g, entropy, 0.7, 6))
    yield Fact("kl_exact is finite where q is sure", lambda: elbo.kl_exact(ends, entropy[:2], 0.7, 6))


def returns(draw: Draw) -> Iterator[Fact]:
    r = draw.normal(2, 3, 7)
    yield Fact("with a horizon of 1 a return is its reward", lambda: estep.returns(r, 1, 0.9))
    yield Fact("a horizon of 3 counts three rewards, the j-th times gamma^j", lambda: estep.returns(r, 3, 0.5))
    yield Fact("lines past the end count 0, however far the horizon", lambda: estep.returns(r, 100, 0.9))


def advantages(draw: Draw) -> Iterator[Fact]:
    G, two = 2 + 3 * draw.normal(3, 4, 5), draw.normal(1, 2, 3)
    yield Fact("of two versions, one's baseline is the other's return", lambda: estep.advantages(two))
    yield Fact("the baseline is the mean return of the other versions of the program, line by line",
               lambda: estep.advantages(G))


def reinforce(draw: Draw) -> Iterator[Fact]:
    batch, A = draw.batch(), draw.normal(3, 4)
    parts = draw.normal(2, *batch.scored.shape) * batch.scored
    log_q = elbo.log_q(parts[0], parts[1], batch)                             # 0 where q decides nothing
    yield Fact("the loss is minus the sum of log q times the advantage of the token's line",
               lambda: estep.reinforce_loss(log_q, A, batch))
    yield Fact("so is its gradient",
               lambda: with_gradient(lambda x: estep.reinforce_loss(x, A, batch), log_q))


def anchor(draw: Draw) -> Iterator[Fact]:
    batch = draw.batch()
    n = int(batch.scored.sum())
    logits, pi_logits = draw.normal(n, 11), draw.normal(n, 11)
    only = elbo.collate([Trace([3, 4, 5, 6], [PROMPT] + [ACTION] * 3, [-1, 0, 0, 0], [0, 0, 0, 0])])
    yield Fact("away from gates it is the sum of KL(pi || q)",
               lambda: estep.anchor_loss(logits[:3], pi_logits[:3], only, OPENERS))
    yield Fact("rationales do not count; at gates both are renormalised to tokens that open no comment",
               lambda: estep.anchor_loss(logits, pi_logits, batch, OPENERS))
    yield Fact("the gradient moves q only through these", lambda: with_gradient(
        lambda x: estep.anchor_loss(x, pi_logits, batch, OPENERS), logits))


def pack(draw: Draw) -> Iterator[Fact]:
    def traces(lengths: list[int]) -> list[Trace]:
        return [Trace([1] * n, [ACTION] * n, [0] * n, [0] * n) for n in lengths]
    lengths = (2 + torch.randperm(30, generator=draw.rng)[:14]).tolist()
    yield Fact("rows may be filled to the last token", lambda: mstep.pack(traces([4, 6, 3, 7]), 10))
    yield Fact("the longest goes first, each into the first row that has room",
               lambda: mstep.pack(traces([5, 2, 8, 3, 1]), 10))
    yield Fact("many traces", lambda: mstep.pack(traces(lengths), 33))
    yield Fact("no traces make no rows", lambda: mstep.pack([], 10))
    yield Fact("a trace longer than a row raises ValueError", lambda: raises(mstep.pack, traces([3, 11]), 10))


def grpo(draw: Draw) -> Iterator[Fact]:
    rewards, old, A = draw.flags(4, 6).float(), draw.normal(40), draw.normal(40)
    rewards[0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    logp = old + 0.4 * draw.normal(40)
    edge = torch.tensor([0.75, 0.85, 1.15, 1.25, 1.35] * 2)                      # ratios about both bounds
    sign = torch.tensor([1.0] * 5 + [-1.0] * 5)
    yield Fact("an advantage is the reward less the mean of its group", lambda: rlvr.group_advantages(rewards))
    yield Fact("the surrogate is the lesser of both, clipped at 1 - low and 1 + high",
               lambda: with_gradient(lambda x: rlvr.grpo_loss(x, torch.zeros(10), sign), edge.log()))
    yield Fact("it is summed over tokens, with the sign of a loss",
               lambda: with_gradient(lambda x: rlvr.grpo_loss(x, old, A, 0.1, 0.3), logp))


def pass_at_k(draw: Draw) -> Iterator[Fact]:
    def all_of(n: int) -> list[float]:
        return [bench.pass_at_k(n, c, k) for c in range(n + 1) for k in range(1, n + 1)]
    n = draw.integers(1, 5, 20)[0]
    yield Fact("with k = 1 it is the share of right samples", lambda: [bench.pass_at_k(8, c, 1) for c in range(9)])
    yield Fact("it is the chance that k of the n samples, without replacement, hold a right one",
               lambda: [all_of(4), all_of(n)])
    yield Fact("200 samples are no problem", lambda: bench.pass_at_k(200, 3, 100))
    yield Fact("k > n, k = 0, c > n and c < 0 raise ValueError", lambda: [
        raises(bench.pass_at_k, *wrong) for wrong in ((4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1))])


def e_update(draw: Draw) -> Iterator[Fact]:
    base, enc = model.load_pretrained(ROOT / "base")
    pi = copy.deepcopy(base).requires_grad_(False)
    for p in pi.parameters():                        # another judge than q, so that mixing them up shows
        p += 0.02 * draw.normal(*p.shape)
    rows = bench.world("train", 3, draw.integers(1, 0, 10_000)[0])
    programs = [elbo.parse(enc, row.prompt, row.solution, base.config.eos_id) for row in rows]
    seeds = [[i] for i in draw.integers(9, 0, 1000)]
    cfg = estep.EStepConfig(e_rollouts=3, explore=0.3, e_anchor=0.3, horizon=3, floor=2.0, max_rationale=12)

    def update(micro_batch: int) -> dict:
        q = copy.deepcopy(base)
        sgd = torch.optim.SGD(q.parameters(), lr=1.0)
        stats = estep.e_update(q, pi, sgd, enc, elbo.opener_mask(enc), programs, seeds, cfg, micro_batch)
        moved = q.norm.weight - base.norm.weight                              # (D,)
        return stats | dict(step_of_q=moved, pi=pi.norm.weight)
    yield Fact("one update returns what to watch, moves q and leaves pi", lambda: update(9))
    yield Fact("passes of one program each change nothing", lambda: update(3))


class Exercise(NamedTuple):
    module: str
    functions: tuple[str, ...]
    points: int
    minutes: int               # of a student's work; grading takes seconds
    hint: str
    facts: Callable[[Draw], Iterator[Fact]]


EXERCISES = {
    "sampling": Exercise("model", ("generate",), 15, 90, "let each row's cache.length be the number of its real "
                         "tokens in the cache: the prompt's last token is fed by the first step", sampling),
    "score": Exercise("elbo", ("score",), 12, 60, "a gate's part is a logsumexp over one side of the openers, "
                      "the side of the token that follows", score),
    "by_line": Exercise("elbo", ("by_line",), 5, 15, "the prompt's line is -1: give it a column, and drop it",
                        by_line),
    "reward": Exercise("elbo", ("line_rewards", "kl_exact"), 10, 45, "torch.where picks; a product with 0 makes "
                       "nan of inf; torch.xlogy knows that 0 log 0 is 0", reward),
    "returns": Exercise("estep", ("returns",), 5, 15, "the sum has the terms j = 0 .. horizon - 1", returns),
    "advantages": Exercise("estep", ("advantages",), 6, 15, "leave a version's own return out of its baseline",
                           advantages),
    "reinforce": Exercise("estep", ("reinforce_loss",), 8, 20, "entry i of log_q speaks of token i + 1; the sum "
                          "is divided by the caller", reinforce),
    "anchor": Exercise("estep", ("anchor_loss",), 8, 40, "pi is the first argument of this KL; what cannot "
                       "follow `act` has no probability in either", anchor),
    "pack": Exercise("mstep", ("pack",), 6, 20, "keep the room that is left in each row", pack),
    "grpo": Exercise("rlvr", ("group_advantages", "grpo_loss"), 8, 30, "clipping may only make the surrogate "
                     "smaller, whatever the advantage's sign", grpo),
    "pass_at_k": Exercise("bench", ("pass_at_k",), 5, 15, "count the subsets of k samples in which none is right",
                          pass_at_k),
    "e_update": Exercise("estep", ("e_update",), 12, 120, "rollouts, pi's likelihood of each line, rewards, "
                         "returns, advantages, loss; mstep.optimize divides by the rollouts of all passes",
                         e_update),
}


# ------------------------------------------------------------------------------------------- a student's copy


def definitions(source: str) -> dict[str, ast.FunctionDef]:
    """The functions of a module, by name."""
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def blank(source: str, message: dict[str, str]) -> str:
    """The source with the bodies of these functions replaced by an exception, their docstrings kept."""
    lines, functions = source.split("\n"), definitions(source)
    for name in sorted(message, key=lambda name: -functions[name].lineno):      # from the end: lines stay put
        docstring = functions[name].body[0]
        text = f"    raise NotImplementedError({json.dumps(message[name])})"
        lines[docstring.end_lineno:functions[name].end_lineno] = [text]
    return "\n".join(lines)


def make_copy(out: Path):
    """Write the repository with its exercises blanked. Raises ValueError if there is something already."""
    if out.exists():
        raise ValueError(f"{out} exists: choose another name")
    for pattern in COPIED:
        for file in filter(Path.is_file, ROOT.glob(pattern)):
            target = out / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for name in {exercise.module for exercise in EXERCISES.values()}:
        tasks = {key: task for key, task in EXERCISES.items() if task.module == name}
        message = {f: f"exercise {key}: {task.hint}" for key, task in tasks.items() for f in task.functions}
        file = out / f"{name}.py"
        file.write_text(blank(file.read_text(), message))
    print(f"{out}: {len(EXERCISES)} exercises; {out / 'docs/assignments/README.md'} says what to write")


# -------------------------------------------------------------- a student's function, in a process of its own


def put_in(exercise: Exercise, source: str):
    """Let the exercise's functions have the bodies that they have in a student's source.

    Nothing of it is run here: signature, defaults and decorators are the reference's. Raises ValueError,
    SyntaxError if the functions are not there.
    """
    module = MODULES[exercise.module]
    ours, theirs = definitions(Path(module.__file__).read_text()), definitions(source)
    for name in exercise.functions:
        if name not in theirs:
            raise ValueError(f"{exercise.module}.py has no function {name}")
        ours[name].body, reference = theirs[name].body, getattr(module, name)
        code = compile(ast.Module([ours[name]], []), f"{exercise.module}.py", "exec")
        exec(code, vars(module))
        for other in MODULES.values():               # and where it has been imported to
            for key in [key for key, value in vars(other).items() if value is reference]:
                setattr(other, key, getattr(module, name))


def lock(seconds: float):
    """Limit this process, and leave it nothing but to compute and to write what it has open."""
    used, pages = resource.getrusage(resource.RUSAGE_SELF), int(Path("/proc/self/statm").read_text().split()[0])
    cpu = math.ceil(used.ru_utime + used.ru_stime + seconds)
    memory = pages * resource.getpagesize() + (MEMORY_MB << 20)
    limits = dict(RLIMIT_CPU=cpu, RLIMIT_AS=memory, RLIMIT_FSIZE=ANSWER_MB << 20, RLIMIT_CORE=0)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    libc, seccomp = ctypes.CDLL(None), sandbox.build_filter(os.uname().machine)
    NO_NEW_PRIVS, SECCOMP, FILTER = 38, 22, 2
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(SECCOMP, FILTER, seccomp, 0, 0):
        raise RuntimeError("there is no seccomp here, without which no student's code is run")


def plain(value):
    """Tensors and tuples as lists: what JSON can carry."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def describe(error: BaseException, source: str, file: str) -> str:
    """An exception, with the last line of the student's file that it came through."""
    lines, where = source.split("\n"), ""
    for frame in traceback.extract_tb(error.__traceback__, limit=-50):
        if frame.filename == file:
            where = f" (line {frame.lineno} of {file}: {lines[frame.lineno - 1].strip()})"
    return f"{type(error).__name__}: {error}"[:500] + where


def call_student(folder: str, name: str, seed: int, seconds: float, answers: str):
    """One child: write, for each fact of an exercise, a line of JSON, {"value"} or {"error"}; never return."""
    exercise, source = EXERCISES[name], ""
    file = f"{exercise.module}.py"
    os.closerange(3, 256)
    channel, null = open(answers, "w"), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)                      # functions may print
    try:
        source = (Path(folder) / file).read_text()
        put_in(exercise, source)
        facts = list(exercise.facts(Draw(seed, name)))
        lock(seconds)
        for fact in facts:
            channel.write(json.dumps({"value": plain(fact.answer())}) + "\n")
            channel.flush()
    except SyntaxError as e:
        channel.write(json.dumps({"error": f"line {e.lineno} of {file} is not Python: {e.msg}"}) + "\n")
    except BaseException as e:
        channel.write(json.dumps({"error": describe(e, source, file)}) + "\n")
    finally:
        channel.flush()
        os._exit(0)


def serve():
    """Fork a child for each line of JSON on stdin, the arguments of `call_student`; print how it ended."""
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.SGD([weight]).step()                 # the first optimizer imports, which a child no longer can
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    for job in sys.stdin:
        child = os.fork()
        if child == 0:
            call_student(*json.loads(job))
        in_time = signal.sigtimedwait([signal.SIGCHLD], WALL_S)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        end = f"the process ended itself ({code})"
        if not in_time or code in (-signal.SIGXCPU, -signal.SIGKILL):
            end = "it does not come to an end, or takes many times what the reference takes"
        print(json.dumps(end), flush=True)


# -------------------------------------------------------------------------------------------------- the grade


def difference(got, want, place: str = "") -> str:
    """Where an answer first differs from the reference's, in words; "" if nowhere."""
    where = place or "it"
    if isinstance(want, (list, dict)):
        if type(got) is not type(want) or len(got) < len(want) or (len(got) > len(want) and type(want) is list):
            size = f"{len(got)} entries" if isinstance(got, (list, dict)) else repr(got)[:60]
            return f"{where} has {size}, should have {len(want)} entries"
        for key in want if isinstance(want, dict) else range(len(want)):
            if isinstance(want, dict) and key not in got:
                return f"{where} has no {key}"
            found = difference(got[key], want[key], f"{place}[{key}]")
            if found:
                return found
        return ""
    numbers = type(got) in (int, float, bool) and type(want) in (int, float, bool)
    if numbers and type(want) is float:
        same = math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-5)
    else:
        same = got == want if numbers else type(got) is type(want) and got == want
    return "" if same else f"{where} is {repr(got)[:60]}, should be {want!r}"


class Grader:
    """Grades exercises one by one; a context manager, as it keeps the server."""

    def __enter__(self):
        command = [sys.executable, "-I", __file__, "serve"]        # -I: no module of the folder it stands in
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
                                       env=environment, text=True)
        return self

    def __exit__(self, *error):
        self.server.stdin.close()
        self.server.wait()

    def grade(self, folder: Path, name: str, seed: int) -> str:
        """The first fact that fails, and the hint; "" if all hold."""
        facts, began = list(EXERCISES[name].facts(Draw(seed, name))), time.time()
        want = [plain(fact.answer()) for fact in facts]
        seconds = GRACE_S + PATIENCE * (time.time() - began)
        with tempfile.TemporaryDirectory() as place:
            answers = Path(place) / "answers"
            job = [str(folder.resolve()), name, seed, seconds, str(answers)]
            self.server.stdin.write(json.dumps(job) + "\n")
            self.server.stdin.flush()
            end = json.loads(self.server.stdout.readline())
            lines = answers.read_bytes().split(b"\n")[:-1] if answers.exists() else []
        for fact, right, line in itertools.zip_longest(facts, want, lines[:len(facts)]):
            problem = end if line is None else compare(line, right)
            if problem:
                return f"{fact.text}: {problem}\nHint: {EXERCISES[name].hint}"
        return ""


def compare(line: bytes, want) -> str:
    """What is wrong with a child's line, in words; "" if nothing."""
    try:
        answer = json.loads(line)
        return answer["error"][:800] if "error" in answer else difference(answer["value"], want)
    except (ValueError, TypeError, KeyError, RecursionError):
        return "there is no valid answer"


def grade(folder: Path, names: list[str], seed: int) -> dict:
    """Grade and print; returns what Gradescope reads as results.json."""
    tests = []
    with Grader() as grader:
        for name in names:
            problem, points = grader.grade(folder, name, seed), EXERCISES[name].points
            tests.append(dict(name=name, score=0 if problem else points, max_score=points,
                              output=problem or "all facts hold"))
            print(f"{tests[-1]['score']:3} of {points:2}  {name}", *problem.split("\n")[:bool(problem) * 2],
                  sep="\n           ", flush=True)
    score = sum(test["score"] for test in tests)
    print(f"{score:3} of {sum(test['max_score'] for test in tests)}; inputs of seed {seed}")
    return dict(score=score, tests=tests, output=f"inputs of seed {seed}")


# ------------------------------------------------------------------------------------------ the open exercise


def leaderboard(run: Path, budget: int) -> str:
    """The best arm of a run within the budget, as a line. Raises ValueError if there is none.

    What counts is all that a run put through a model before the arm was ready: a trained token three times.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = {line["key"]: line for line in lines if "key" in line}
    arms, found = dict(ra3=("estep", "infuse", "ra3"), ntp=("ntp",)), []
    for arm, stages in arms.items():
        for key, used in ((arm, stages), (f"rlvr-{arm}", (*stages, f"rlvr-{arm}"))):
            spent = sum(record["tokens"] for name, record in records.items()
                        if name.startswith("cost/") and name[5:].split(".")[0] in ("warm", *used))
            if f"eval/{key}" in records and spent <= budget:
                found.append((records[f"eval/{key}"]["pass@1"], key, spent))
    if not found:
        raise ValueError(f"{run}: no arm within {budget:,} tokens has been evaluated")
    best, key, spent = max(found)
    return f"| {run.name} | {key} | {100 * best:.1f} | {spent:,.0f} |"


def main(argv: list[str] | None = None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("copy", help="make a student's copy")
    sub.add_argument("out", type=Path)
    sub = commands.add_parser("grade", help="grade a copy")
    sub.add_argument("copy", type=Path)
    sub.add_argument("--only", choices=EXERCISES, help="one exercise alone")
    sub.add_argument("--json", type=Path, help="where to write Gradescope's results.json")
    sub.add_argument("--seed", type=int, help="of the hidden inputs; default: a new one")
    sub = commands.add_parser("leaderboard", help="the open exercise: a line of a run")
    sub.add_argument("run", type=Path)
    sub.add_argument("--budget", type=int, default=BUDGET, help="tokens through the model")
    commands.add_parser("serve", help="of the grader's own use")
    args = ap.parse_args(argv)
    if args.command == "copy":
        make_copy(args.out)
    elif args.command == "serve":
        serve()
    elif args.command == "leaderboard":
        print(leaderboard(args.run, args.budget))
    else:
        if not args.copy.is_dir():
            raise ValueError(f"{args.copy} is no folder")
        seed = secrets.randbelow(10**6) if args.seed is None else args.seed
        results = grade(args.copy, [args.only] if args.only else list(EXERCISES), seed)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"assignments.py: {e}")
