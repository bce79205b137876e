"""The exercises: which functions, for how many points, and the facts that are checked of them.

A fact is a sentence and a call. The call is made twice on the same inputs, by the reference and by what a
student wrote (assignments.py says how), and the answers are compared. Inputs are drawn from a seed.
"""
import copy
import math
import zlib
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

import bench
import elbo
import estep
import model
import mstep
import rlvr
from elbo import ACTION, FORCED, FREE, LATENT, PROMPT, Batch, Trace

MODULES = {m.__name__: m for m in (bench, elbo, estep, model, mstep, rlvr)}


class Fact(NamedTuple):
    """A sentence that is true of the reference, and the call that shows it: lists, dicts, tensors."""
    text: str
    answer: Callable


class Exercise(NamedTuple):
    module: str
    functions: tuple[str, ...]
    points: int
    minutes: int               # of a student's work; grading takes seconds
    facts: Callable[["Draw"], Iterator[Fact]]
    hint: str


# ----------------------------------------------------------------------------------------------------- inputs


class Draw:
    """Hidden inputs: the same for the same seed and exercise, in every process."""

    def __init__(self, seed: int, name: str):
        self.rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng)

    def flags(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.rng) < 0.5

    def integers(self, n: int, low: int, high: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=self.rng).tolist()

    def batch(self) -> Batch:
        """Three programs in two rows, over 11 tokens, of which 0, 1 and 2 open comments; some think."""
        traces = []
        for row, n_lines in enumerate((4, 2, 3)):
            trace = Trace()
            trace.add(self.integers(2 + row, 0, 11), PROMPT)
            for t in range(n_lines):
                if (row + t) % 2:
                    comment = self.integers(1, 0, 3) + self.integers(2, 3, 11)
                    trace.add(comment, LATENT, t, FORCED if t == 2 else FREE)
                line = self.integers(1, 3, 11) + self.integers(t + 1, 0, 11)
                trace.add(line, ACTION, t, FREE)
            traces.append(trace)
        return elbo.collate(traces, rows=[[0, 2], [1]])


OPENERS = torch.arange(11) < 3                                                # (V,), of Draw.batch


def with_gradient(function: Callable, *inputs: Tensor) -> dict:
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


# ------------------------------------------------------------------------------------ the facts, by exercise


def sampling(draw: Draw) -> Iterator[Fact]:
    cfg = model.GPTConfig(vocab_size=12, d_model=32, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, d_ff=48)
    gpt = model.GPT(cfg)
    for p in gpt.parameters():
        p.data = 0.4 * draw.normal(*p.shape)
    prompts = [draw.integers(n, 1, 12) for n in (3, 9, 1, 5)]
    seeds, seen = draw.integers(4, 0, 1000), []
    gpt.embed_tokens.register_forward_pre_hook(lambda layer, args: seen.append(args[0].numel()))

    def samples(n: int = 16, stop_ids=(), **how) -> list[dict]:
        drawn = model.generate(gpt, prompts, max_new_tokens=n, seeds=seeds, stop_ids=stop_ids, **how)
        return [vars(sample) for sample in drawn]

    def tokens(**how) -> list[list[int]]:
        return [sample["tokens"] for sample in samples(**how)]

    def reads_once() -> bool:
        seen.clear()
        samples()
        return sum(seen) <= len(prompts) * (9 + 16)              # every row padded

    def many() -> int:                               # who only pretends to use a cache has no time for this
        seeds = list(range(32))
        drawn = model.generate(gpt, prompts[:1] * 32, max_new_tokens=500, seeds=seeds, stop_ids=())
        return len(drawn)
    yield Fact("greedy, prompts are continued up to max_new_tokens, and do not see each other's padding",
               lambda: tokens(temperature=0))
    yield Fact("each prompt draws from its own seed", tokens)
    yield Fact("a sample ends with a token of stop_ids, which it keeps; `stopped` says so",
               lambda: samples(stop_ids=(3, 4, 5)))
    yield Fact("stop(tokens) ends a sample too", lambda: samples(stop=lambda tokens: 7 in tokens))
    yield Fact("log-probabilities are those of the distribution drawn from, temperature included",
               lambda: samples(temperature=0.7))
    yield Fact("a small batch_size gives the same samples", lambda: samples(batch_size=2))
    yield Fact("the model reads each token once, all others are in the cache", reads_once)
    yield Fact("an empty prompt raises ValueError",
               lambda: raises(model.generate, gpt, [[]], max_new_tokens=1, seeds=[0]))
    yield Fact("500 tokens of 32 rows are a matter of seconds", many)


def score(draw: Draw) -> Iterator[Fact]:
    batch = draw.batch()
    n = int(batch.scored.sum())
    logits, weight = draw.normal(n, 11), draw.normal(2, *batch.scored.shape)
    sure = [logits + 40 * OPENERS, logits - 40 * OPENERS]              # of think, of act

    def weighted_sum(logits: Tensor) -> Tensor:
        return (weight * torch.stack(elbo.score(logits, batch, OPENERS))).sum()
    yield Fact("the gate's part is log q(think) where a comment opens, log q(act) where a line begins",
               lambda: elbo.score(logits, batch, OPENERS)[0])
    yield Fact("the token's part is log p(token) less the gate's part; 0 in prompts",
               lambda: elbo.score(logits, batch, OPENERS)[1])
    yield Fact("logarithms of probabilities too small for a float stay finite",
               lambda: [elbo.score(x, batch, OPENERS) for x in sure])
    yield Fact("both parts carry gradients", lambda: with_gradient(weighted_sum, logits))


def by_line(draw: Draw) -> Iterator[Fact]:
    batch = draw.batch()
    values, weight = draw.normal(*batch.scored.shape), draw.normal(3, 6)

    def weighted_sum(values: Tensor) -> Tensor:
        return (weight * elbo.by_line(values, batch, 6)).sum()
    yield Fact("entry i belongs to token i + 1, its program and line; what stands in no line counts nowhere",
               lambda: elbo.by_line(values, batch, 4))
    yield Fact("lines that a program does not have are 0", lambda: elbo.by_line(values, batch, 6))
    yield Fact("sums carry gradients", lambda: with_gradient(weighted_sum, values))


def reward(draw: Draw) -> Iterator[Fact]:
    log_pi, (think, broken) = -0.1 - 3 * draw.normal(4, 6).abs(), draw.flags(2, 4, 6)
    none = torch.zeros(4, 6, dtype=torch.bool)
    # One line of each kind is there for every seed.
    log_pi[0, 0], log_pi[1, :2] = -20.0, -0.5
    think[1, :2] = torch.tensor([True, False])
    broken[1, :2] = True

    def rewards(think=none, broken=none, **how) -> Tensor:
        how = dict(c=0.0, broken_cost=0.0) | how
        return elbo.line_rewards(log_pi, think, broken, **how)
    entropy = draw.normal(5).abs().double()
    g = draw.normal(5).sigmoid().double()
    sure = torch.tensor([0.0, 1.0]).double()
    yield Fact("without prices the reward is log pi", rewards)
    yield Fact("no line's likelihood costs more than `floor` nats", lambda: rewards(floor=2.5))
    yield Fact("a rationale costs c", lambda: rewards(think, c=0.3))
    yield Fact("an infinite c that is not paid leaves numbers", lambda: rewards(none, c=math.inf))
    yield Fact("a broken format costs broken_cost, at the floor too",
               lambda: rewards(broken=broken, broken_cost=3.7, floor=1.0))
    yield Fact("kl_exact is KL(q || p), of gate and text", lambda: elbo.kl_exact(g, entropy, 0.7, 6))
    yield Fact("kl_exact is finite where q is sure", lambda: elbo.kl_exact(sure, entropy[:2], 0.7, 6))


def returns(draw: Draw) -> Iterator[Fact]:
    r = draw.normal(2, 3, 7)
    yield Fact("with a horizon of 1 a return is its reward", lambda: estep.returns(r, 1, 0.9))
    yield Fact("a horizon of 3 adds three rewards, the j-th times gamma^j", lambda: estep.returns(r, 3, 0.5))
    yield Fact("lines past the end count 0, however far the horizon", lambda: estep.returns(r, 100, 0.9))


def advantages(draw: Draw) -> Iterator[Fact]:
    two, G = draw.normal(1, 2, 3), 2 + 3 * draw.normal(3, 4, 5)
    yield Fact("of two versions, one's baseline is the other's return", lambda: estep.advantages(two))
    yield Fact("the baseline is the mean return of the other versions of the program, line by line",
               lambda: estep.advantages(G))


def reinforce(draw: Draw) -> Iterator[Fact]:
    batch, A = draw.batch(), draw.normal(3, 4)
    gate, token = draw.normal(2, *batch.scored.shape) * batch.scored

    def loss(gate: Tensor, token: Tensor) -> Tensor:
        return estep.reinforce_loss(elbo.log_q(gate, token, batch), A, batch)
    yield Fact("the loss is minus the sum of log q times the advantage of the token's line",
               lambda: loss(gate, token))
    yield Fact("so is its gradient", lambda: with_gradient(loss, gate, token))


def anchor(draw: Draw) -> Iterator[Fact]:
    batch = draw.batch()
    n = int(batch.scored.sum())
    logits, pi_logits = draw.normal(n, 11), draw.normal(n, 11)
    trace = Trace()
    trace.add([3], PROMPT)
    trace.add([4, 5, 6], ACTION, 0)
    plain = elbo.collate([trace])
    yield Fact("away from gates it is the sum of KL(pi || q)",
               lambda: estep.anchor_loss(logits[:3], pi_logits[:3], plain, OPENERS))
    yield Fact("rationales do not count; at gates both are renormalised over tokens that open no comment",
               lambda: estep.anchor_loss(logits, pi_logits, batch, OPENERS))
    yield Fact("the gradient is that of this sum", lambda: with_gradient(
        lambda x: estep.anchor_loss(x, pi_logits, batch, OPENERS), logits))


def pack(draw: Draw) -> Iterator[Fact]:
    def rows(lengths: list[int], length: int) -> list[list[int]]:
        traces = [Trace() for _ in lengths]
        for trace, n in zip(traces, lengths):
            trace.add([1] * n, ACTION)
        return mstep.pack(traces, length)
    lengths = (2 + torch.randperm(30, generator=draw.rng)[:14]).tolist()          # no two alike
    yield Fact("a row may be filled to its last token", lambda: rows([4, 6, 3, 7], 10))
    yield Fact("the longest goes first, each into the first row that has room",
               lambda: rows([2, 5, 8, 3, 1], 10))
    yield Fact("so do many", lambda: rows(lengths, 33))
    yield Fact("no traces make no rows", lambda: rows([], 10))
    yield Fact("a trace longer than a row raises ValueError", lambda: raises(rows, [3, 11], 10))


def grpo(draw: Draw) -> Iterator[Fact]:
    old, A = draw.normal(2, 40)
    rewards = draw.flags(4, 6).float()
    rewards[0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    logp = old + 0.4 * draw.normal(40)
    ratio = torch.tensor([0.75, 0.85, 1.15, 1.25, 1.35] * 2)                  # about both bounds
    sign = torch.tensor([1.0] * 5 + [-1.0] * 5)
    yield Fact("an advantage is the reward less the mean of its group",
               lambda: rlvr.group_advantages(rewards))
    yield Fact("the surrogate is the lesser of two, clipped at 1 - low and 1 + high; summed, and a loss",
               lambda: with_gradient(lambda x: rlvr.grpo_loss(x, torch.zeros(10), sign), ratio.log()))
    yield Fact("so it is at other bounds",
               lambda: with_gradient(lambda x: rlvr.grpo_loss(x, old, A, 0.1, 0.3), logp))


def pass_at_k(draw: Draw) -> Iterator[Fact]:
    [n] = draw.integers(1, 5, 20)
    impossible = [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)]

    def estimates(n: int) -> list[float]:
        return [bench.pass_at_k(n, c, k) for c in range(n + 1) for k in range(1, n + 1)]
    yield Fact("it is the chance that k of the n samples, without replacement, hold a right one",
               lambda: [estimates(1), estimates(4), estimates(n)])
    yield Fact("200 samples are no problem", lambda: bench.pass_at_k(200, 3, 100))
    yield Fact("k > n, k = 0, c > n and c < 0 raise ValueError",
               lambda: [raises(bench.pass_at_k, *numbers) for numbers in impossible])


def e_update(draw: Draw) -> Iterator[Fact]:
    base, enc = model.load_pretrained(Path(model.__file__).parent / "base")
    pi = copy.deepcopy(base).requires_grad_(False)
    for p in pi.parameters():                        # another judge than q, so that mixing them up shows
        p += 0.02 * draw.normal(*p.shape)
    problems = bench.world("train", 2, seed=draw.integers(1, 0, 10_000)[0])
    programs = [elbo.parse(enc, p.prompt, p.solution, enc.eot_token) for p in problems]
    seeds = [[i] for i in draw.integers(6, 0, 1000)]
    torch.optim.SGD(pi.parameters(), lr=0.0).step()              # imports what a locked process cannot import
    cfg = estep.EStepConfig(e_rollouts=3, explore=0.3, max_rationale=12)
    cfg.e_anchor, cfg.horizon, cfg.floor = 0.05, 3, 2.0

    def update(micro_batch: int) -> dict:
        q = copy.deepcopy(base)
        sgd = torch.optim.SGD(q.parameters(), lr=1.0)
        stats = estep.e_update(q, pi, sgd, enc, elbo.opener_mask(enc), programs, seeds, cfg, micro_batch)
        return stats | dict(step_of_q=q.norm.weight - base.norm.weight, pi=pi.norm.weight)
    yield Fact("one update returns what to watch, moves q, and leaves pi", lambda: update(6))
    yield Fact("passes of one program each give the same", lambda: update(3))


# -------------------------------------------------------------------------------------------------- the table

EXERCISES = {
    "sampling": Exercise(
        "model", ("generate",), 15, 90, sampling,
        "cache.length counts the real tokens of each row; the prompt's last token is fed by the first step"),
    "score": Exercise(
        "elbo", ("score",), 12, 60, score,
        "a gate's part is a logsumexp over one side of the openers, the side of the token that follows"),
    "by_line": Exercise(
        "elbo", ("by_line",), 5, 15, by_line, "`doc` says whose line it is; the prompt's is -1"),
    "reward": Exercise(
        "elbo", ("line_rewards", "kl_exact"), 10, 45, reward,
        "torch.where picks, a product with 0 makes nan of inf; torch.xlogy knows that 0 log 0 is 0"),
    "returns": Exercise(
        "estep", ("returns",), 5, 15, returns, "the sum has the terms j = 0 .. horizon - 1"),
    "advantages": Exercise(
        "estep", ("advantages",), 6, 15, advantages, "leave a version's own return out of its baseline"),
    "reinforce": Exercise(
        "estep", ("reinforce_loss",), 8, 20, reinforce,
        "entry i of log_q speaks of token i + 1; it is the caller who divides"),
    "anchor": Exercise(
        "estep", ("anchor_loss",), 8, 40, anchor,
        "the expectation is over pi; what cannot follow `act` has no probability in either"),
    "pack": Exercise("mstep", ("pack",), 6, 20, pack, "keep the room that is left in each row"),
    "grpo": Exercise(
        "rlvr", ("group_advantages", "grpo_loss"), 8, 30, grpo,
        "clipping may only make the surrogate smaller, whatever the sign of the advantage"),
    "pass_at_k": Exercise(
        "bench", ("pass_at_k",), 5, 15, pass_at_k, "count the subsets of k samples in which none is right"),
    "e_update": Exercise(
        "estep", ("e_update",), 12, 120, e_update,
        "rollout, pi's likelihood of each line, rewards, returns, advantages, posterior, loss; `optimize` "
        "divides, by the rollouts of all passes"),
}
