"""The E-step: REINFORCE over latent rationales (paper, section 3).

For each expert program, q writes K versions with rationales of its own choosing; a frozen copy pi of the model says how
predictable they made each of the expert's lines; q is moved towards what helped:

    grad = E [ sum_t grad log q(z_t | s_t, z_{t-1}) (G_t - b_t) ]        G_t = sum_{j < horizon} gamma^j r_{t+j}

with b_t the mean return at line t of the other K - 1 versions of the same program (`advantages`), and the reward r_t of
`elbo.line_rewards`. What carries gradient is what q chose: the gate at each decision point and the rationale's tokens. The
expert's tokens never do.

Rollouts do not decode the expert's tokens, which are known. One pass scores all remaining lines of a program as if no more
rationales came; the gates are drawn from it in order, up to the first that opens; the cache is rolled back to there, the
rationale is decoded, and the rest is scored again. The distribution is exactly that of deciding line by line.

Where this departs from the paper, or where the paper is silent:
 1. The reward carries beta * (log p(gate) - log q(gate)) beside the fixed penalty c (see `elbo.line_rewards` for why).
 2. Rewards are sums over a line's tokens, in nats, as in Theorem 3.1; the paper's c = 0.05 seems to go with means per token.
 3. A rationale is at most `max_rationale` tokens, one line; a longer, empty or unclosed one is closed by force and pays for it.
"""
import numpy as np
import tiktoken
import torch
from torch import Tensor

import elbo
from elbo import ACTION, FORCED, FREE, LATENT, PROMPT, Batch, Program, Trace
from model import GPT, KVCache, pad, pick

MODES = ("learned", "always", "first", "never")     # who decides where to think: q; everywhere; before line 0 only; nowhere


class _Rollout:
    """One program being infused: the trace so far, the next line, and what has just happened at its decision point."""

    def __init__(self, program: Program, seed):
        self.program, self.rng, self.trace = program, np.random.default_rng(seed), Trace()
        self.trace.add(program.prompt, PROMPT)
        self.t = 0                                  # next line
        self.latent: list[int] = []                 # the rationale being written before it
        self.closed = self.forced = False           # a rationale before line t is complete; line t must follow now

    def tail(self) -> list[int]:
        return [token for line in self.program.lines[self.t:] for token in line]

    def decide(self, p_open: list[float], mode: str) -> bool:
        """Take lines as they come until a gate opens; p_open: q(think) at each remaining line. True if one did."""
        start = self.t
        while self.t < len(self.program.lines):
            gate = FORCED if self.forced or mode == "never" or (mode == "first" and self.t) else FREE
            p = p_open[self.t - start]
            if mode == "always" or (mode == "first" and not self.t):
                p, gate = (0.0 if self.closed else 1.0), FORCED
            if self.forced or (gate == FORCED and p < 1.0):
                p = 0.0
            if p > 0.0 and self.rng.random() < p:
                return True
            self.trace.add(self.program.lines[self.t], ACTION, self.t, gate)
            self.t, self.closed, self.forced = self.t + 1, False, False
        return False

    def write(self, token: int, gate: int = elbo.NO_GATE):
        self.latent.append(token)
        self.trace.add([token], LATENT, self.t, gate)

    def check(self, enc: tiktoken.Encoding, max_rationale: int) -> bool:
        """Is the rationale finished? One that breaks the format is closed by force, and line t then follows without a gate."""
        text = enc.decode_bytes(self.latent).decode("utf-8", "replace")
        body, newline, rest = text.partition("\n")
        closing = self.program.closings[self.t]
        broken = self.closed                                    # it stands right after another one: two comment lines
        if newline:
            broken = broken or not body.strip(" #\t\r") or not closing.startswith("\n" + rest)
            finished = "\n" + rest == closing
        else:
            finished = False
        if not broken and not finished and len(self.latent) < max_rationale:
            return False
        if broken or not finished:
            self.trace.broken.add(self.t)
            self.trace.add(enc.encode_ordinary(closing), PROMPT, self.t)
            self.forced = True
        self.closed, self.latent = True, []
        return True


@torch.no_grad()
def rollout(model: GPT, enc: tiktoken.Encoding, programs: list[Program], seeds: list, openers: Tensor, *, max_rationale: int,
            mode: str = "learned", n_vocab: int | None = None) -> list[Trace]:
    """Infuse each program with latents drawn from q at temperature 1: one Trace per program (repeat a program for more).

    seeds: one per program, anything `np.random.default_rng` takes; a row's draws depend on nothing but its seed and its program.
    mode: one of MODES. Programs must leave room for their rationales in the model's context; where they do not, the
    remaining lines follow without latents.
    """
    cfg, dev = model.config, model.device
    n_vocab = n_vocab or enc.n_vocab
    rows = [_Rollout(p, s) for p, s in zip(programs, seeds, strict=True)]
    out = [r.trace for r in rows]
    if mode == "never" or not rows:
        return [p.trace() for p in programs]
    size = min(cfg.context, max(len(p) + (len(p.lines) if mode != "first" else 1) * (max_rationale + 8) for p in programs))
    cache = KVCache(cfg, len(rows), size, dev, next(model.parameters()).dtype)
    openers = openers.to(dev)
    while rows:
        # Score what each row has not seen yet, and all of its remaining lines behind it.
        fed = cache.length.tolist()
        pending = [r.trace.tokens[n:] for r, n in zip(rows, fed)]
        tails = [r.tail() for r in rows]
        logits = model(pad([a + b for a, b in zip(pending, tails)], cfg.eos_id, dev), cache=cache)      # (B, T, V)
        # The gate of a line is decided by the logits of the token before it.
        where, counts = [], []
        for b, r in enumerate(rows):
            i, n = len(pending[b]) - 1, 0
            for line in r.program.lines[r.t:]:
                where.append((b, i))
                i, n = i + len(line), n + 1
            counts.append(n)
        at = torch.tensor(where, device=dev)                                                            # (N, 2)
        p = logits[at[:, 0], at[:, 1], :n_vocab].double().softmax(-1)                                   # (N, V)
        p_open = (p * openers[:n_vocab]).sum(-1).split(counts)
        firsts = np.cumsum([0] + counts)                        # where each row's lines begin in p
        thinking = []
        for b, (r, q) in enumerate(zip(rows, p_open)):
            start = r.t
            room = size - len(r.trace.tokens) - len(tails[b]) > max_rationale + 8
            if r.decide(q.tolist(), mode if room else "never"):
                thinking.append((b, int(firsts[b]) + r.t - start))
        if not thinking:
            break
        keep = torch.tensor([b for b, _ in thinking], device=dev)
        rows, cache = [rows[b] for b, _ in thinking], cache.select(keep)
        # Which opener: q restricted to them. (`decide` has drawn that it is one.)
        among = p[[n for _, n in thinking]] * openers[:n_vocab]                                         # (B, V)
        last = _draw(among.log(), rows)
        for r, token in zip(rows, last):
            r.write(token, FORCED if mode in ("always", "first") else FREE)
        cache.length = torch.tensor([len(r.trace.tokens) - 1 for r in rows], device=dev)
        live = [not r.check(enc, max_rationale) for r in rows]
        while any(live):
            # Rows that have finished ride along; their cache does not advance.
            logits = model(torch.tensor(last, device=dev)[:, None], cache=cache)[:, 0, :n_vocab]        # (B, V)
            cache.length += torch.tensor(live, device=dev)
            drawn = _draw(logits, rows, live)
            for b, r in enumerate(rows):
                if live[b]:
                    last[b] = drawn[b]
                    r.write(drawn[b])
                    live[b] = not r.check(enc, max_rationale)
        # What is cached of each row: all but its last sampled token and a forced closing.
        cache.length = torch.minimum(cache.length, torch.tensor([len(r.trace.tokens) - 1 for r in rows], device=dev))
    return out


def _draw(logits: Tensor, rows: list[_Rollout], live: list[bool] | None = None) -> list[int]:
    """One token per row, each with the row's own random numbers (rows that are not live draw none)."""
    u = [r.rng.random() if live is None or live[b] else 0.0 for b, r in enumerate(rows)]
    return pick(logits, torch.tensor(u, dtype=torch.float64, device=logits.device), 1.0).tolist()


def without_broken(trace: Trace) -> Trace:
    """The trace with its malformed rationales cut out: those lines stand after `<act>`."""
    out = Trace()
    for token, kind, line, gate in zip(trace.tokens, trace.kind, trace.line, trace.gate):
        if line not in trace.broken or kind == ACTION:
            out.add([token], kind, line, gate)
    return out


def infuse(model: GPT, enc: tiktoken.Encoding, programs: list[Program], seeds: list, openers: Tensor, *, batch_size: int = 256,
           **kw) -> list[Trace]:
    """Programs with rationales drawn from q, format kept: the M-step's data. Same arguments as `rollout`."""
    out: list[Trace] = []
    for i in range(0, len(programs), batch_size):
        out += rollout(model, enc, programs[i:i + batch_size], seeds[i:i + batch_size], openers, **kw)
    return [without_broken(t) for t in out]


# ------------------------------------------------------------------------------------------------------- policy gradient


def returns(rewards: Tensor, horizon: int, gamma: float) -> Tensor:
    """G_t = sum_{j < horizon} gamma^j r_{t+j}: (..., L) -> (..., L), lines past the end counting 0."""
    out = torch.zeros_like(rewards)
    for j in range(min(horizon, rewards.shape[-1])):
        out[..., :rewards.shape[-1] - j] += gamma ** j * rewards[..., j:]
    return out


def advantages(G: Tensor) -> Tensor:
    """G_t - b_t with b_t the mean of the other versions' returns at the same line: (P, K, L) -> (P, K, L), K >= 2.

    Leaving a version's own return out of its baseline keeps the gradient unbiased.
    """
    K = G.shape[1]
    return (G - G.mean(1, keepdim=True)) * K / (K - 1)


@torch.no_grad()
def rewards(pi: GPT, batch: Batch, traces: list[Trace], openers: Tensor, gate: Tensor, free: Tensor, **cost) -> tuple[Tensor, Tensor]:
    """Line rewards under the frozen scorer and the line log-likelihoods they come from, both (B, L); cost: see `line_rewards`."""
    L = gate.shape[1]
    _, token = elbo.score(pi, batch, openers)
    loglik = elbo.by_line(elbo.log_pi(token, batch), batch, L)
    think = torch.zeros_like(loglik, dtype=torch.bool)
    broken = torch.zeros_like(think)
    for b, trace in enumerate(traces):
        for t, z in enumerate(trace.thinks()):
            think[b, t], broken[b, t] = z, t in trace.broken
    return elbo.line_rewards(loglik, think, broken, gate, free, **cost), loglik


def reinforce_loss(log_q: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    """-sum over sampled decisions of log q(decision) * advantage of its line; divide by the number of rollouts of all ranks.

    log_q: (B, T - 1) from `elbo.log_q`; advantage: (B, L).
    """
    line = batch.line[:, 1:].clamp(min=0)                                                               # (B, T-1)
    return -(log_q * advantage.gather(1, line)).sum()
