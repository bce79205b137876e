"""The E-step: REINFORCE over latent rationales (paper, section 3).

For each expert program, q writes K versions with rationales of its own choosing; a frozen copy pi of the
model says how predictable they made each of the expert's lines; q is moved towards what helped:

    grad = E [ sum_t grad log q(z_t | s_t, z_{t-1}) (G_t - b_t) ]      G_t = sum_{j < horizon} gamma^j r_{t+j}

with the reward r_t of `elbo.line_rewards` and b_t the mean return at line t of the other K - 1 versions
(`advantages`). (`horizon` truncates the return; the horizon T of the paper is the number of decisions.) So
the rationales' tokens learn. For the gates that is too noisy: where thinking is idle it costs no more than c,
and q came to think everywhere. They are drawn to what the posterior would keep of the K versions, with
weights w (`posterior`) that cost no further pass, as in the wake phase of reweighted wake-sleep:

    grad = GATE E [ sum_k sum_t w_kt grad log q(gate_kt) ]

The expert's tokens never carry gradient. `e_update` is the whole.

Rollouts do not decode the expert's tokens, which are known. One pass scores all remaining lines of a program
as if no more rationales came; the gates are drawn from it in order, up to the first that opens; the cache is
rolled back to there, the rationale is decoded, and the rest is scored again. The distribution is that of
deciding line by line.

Where this departs from the paper, or where the paper is silent:
 1. The gates' posterior has q itself for a prior, and is sharpened by TAU (with p and TAU = 1 this would be
    Bornschein and Bengio's, arXiv 1406.2751): it tends to the best of the K versions.
 2. Rewards are sums over a line's tokens, in nats, as in Theorem 3.1; the paper's c = 0.05 may go with means
    per token. A line counts as costing `floor` nats at most: rare, very wrong rationales make the variance.
 3. A trust region holds the action likelihoods, which share the network with q (`anchor_loss`).
 4. The M-step goes on from q's weights, on programs put together from several draws (`select`), once.
 5. A rationale is at most `max_rationale` tokens and `max_comments` comment lines, each opened by a gate; a
    longer, empty or unclosed one is closed by force and pays `broken_cost` for it.
"""
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import elbo
from elbo import ACTION, FORCED, FREE, LATENT, NO_GATE, PROMPT, Batch, Program, Trace, chunks
from model import GPT, Decoder, Encoding, KVCache, autocast, load_pretrained, new_cache, pad, pick
from mstep import bar, optimize, packed_rows, total

TAU = 0.03                # nats by which a piece must pay more to be e times as likely in the `posterior`
GATE = 5.0                # weight of the gates' loss; at 1 the E-step ends before they have learnt


@dataclass
class EStepConfig:
    """What the E-step can be told, with the reason for each default."""
    e_steps: Annotated[int, "updates of q; most of its gain comes in 25"] = 45
    e_programs: Annotated[int, "programs per update of the E-step"] = 16
    e_rollouts: Annotated[int, "K, versions of each program; the baseline averages the K - 1 others"] = 8
    e_lr: Annotated[float, "the E-step's learning rate; 5e-4 spoils the arithmetic at once"] = 2e-4
    e_anchor: Annotated[float, "weight of the trust region on action likelihoods; 0 loses skill"] = 0.1
    c: Annotated[float, "price of a rationale in nats; inf: never think, which is NTP"] = 0.1
    broken_cost: Annotated[float, "nats that a malformed rationale costs; more than chance wins"] = 0.5
    floor: Annotated[float, "nats that a line costs at most in the reward; inf: no floor"] = 3.0
    horizon: Annotated[int, "lines that a rationale is credited for; a loop of the world has 5"] = 6
    gamma: Annotated[float, "discount per line in the return"] = 0.9
    explore: Annotated[float, "share of gates forced open in rollouts, for a base that hardly thinks"] = 0.0
    max_rationale: Annotated[int, "longest rationale in tokens; eight worked-out terms take 31"] = 40
    max_comments: Annotated[int, "comment lines of a rationale; real code explains itself in blocks"] = 1
    rationales: Annotated[Literal["learned", "always", "first", "never"],
                          "where rationales stand: as q learns, at every line, the first, none"] = "learned"
    draws: Annotated[int, "versions that `select` makes a program of the M-step from; 0: one, as it is"] = 2


# ------------------------------------------------------------------------------------------------ the update


def e_update(q: GPT, pi: GPT, optimizer, enc: Encoding, openers: Tensor, programs: list[Program],
             seeds: list, cfg: EStepConfig, micro_batch: int = 32, sample_batch: int = 256) -> dict:
    """One update of q, in place, on this rank's share of the programs. pi: the frozen copy that scores.

    seeds: one for each version, K = cfg.e_rollouts of a program after the other. micro_batch: versions per
    pass; sample_batch: versions rolled out at a time. Returns what to watch, over all ranks: reward, loglik
    and think per line; broken and length per rationale; `uplift`; grad_norm; tokens put through a model.
    """
    names = ("reward", "loglik", "think", "gap", "broken", "length", "compared")
    K, sums = cfg.e_rollouts, Counter(dict.fromkeys(names, 0.0))       # also of a rank that has no program
    versions = [p for p in programs for _ in range(K)]
    traces = rollout(q, enc, versions, seeds, openers, cfg, sample_batch)

    def losses():
        for part in chunks(traces, max(micro_batch // K, 1) * K):      # versions of a program stay together
            batch = elbo.collate(part, q.device, packed_rows(part, q.limit))
            gate, token, pi_token, anchor = likelihoods(q, pi, batch, openers)             # (B, T-1) each
            watched = judge(part, batch, pi_token, cfg)                              # (P * K, L) each
            reward, think = (watched[name].unflatten(0, (-1, K)) for name in ("reward", "think"))  # (P, K, L)
            G = returns(reward, cfg.horizon, cfg.gamma)                                    # (P, K, L)
            A, W = advantages(G).flatten(0, 1), K * posterior(reward, think).flatten(0, 1)     # (P * K, L)
            gap, compared = uplift(G, think)
            watched |= dict(gap=gap, compared=compared, length=batch.kind == LATENT)
            sums.update({name: value.sum().item() for name, value in watched.items()})
            gates, text = elbo.log_q_parts(gate, token, batch)                             # (B, T-1) each
            learned = reinforce_loss(text, A, batch) + GATE * reinforce_loss(gates, W, batch)
            yield learned + cfg.e_anchor * anchor

    norm = optimize(q, optimizer, losses(), len(traces))
    sums["lines"] = sum(len(p.lines) for p in versions)
    sums["tokens"] = sum(rollout_tokens(t) + 4 * len(t.tokens) for t in traces)            # pi once, q thrice
    sums = total(sums)
    lines, rationales = sums["lines"], max(sums["think"], 1)
    return dict(reward=sums["reward"] / lines, loglik=sums["loglik"] / lines, think=sums["think"] / lines,
                broken=sums["broken"] / rationales, length=sums["length"] / rationales,
                uplift=sums["gap"] / max(sums["compared"], 1), grad_norm=norm, tokens=sums["tokens"])


def judge(traces: list[Trace], batch: Batch, pi_token: Tensor, cfg: EStepConfig) -> dict:
    """Of each line of the traces, (traces, L): loglik by pi, think, broken, and the reward that they make.

    pi_token: (B, T - 1), pi's of `elbo.score`.
    """
    L = int(batch.line.max()) + 1
    loglik = elbo.by_line(elbo.log_pi(pi_token, batch), batch, L)                             # (traces, L)
    think, broken = decisions(traces, L, pi_token.device)
    price = dict(c=cfg.c, broken_cost=cfg.broken_cost, floor=cfg.floor)
    reward = elbo.line_rewards(loglik, think, broken, **price)
    return dict(loglik=loglik, think=think, broken=broken, reward=reward)


def returns(rewards: Tensor, horizon: int, gamma: float) -> Tensor:
    """G_t = sum_{j < horizon} gamma^j r_{t+j}: (..., L) -> (..., L), lines past the end counting 0."""
    L, out = rewards.shape[-1], torch.zeros_like(rewards)
    for j in range(min(horizon, L)):
        out[..., :L - j] += gamma ** j * rewards[..., j:]
    return out


def advantages(G: Tensor) -> Tensor:
    """G_t - b_t, b_t the mean of the K - 1 other versions' returns at line t: (P, K, L) -> (P, K, L).

    Leaving a version's own return out of its baseline keeps the gradient unbiased.
    """
    K = G.shape[1]
    return (G - G.mean(1, keepdim=True)) * K / (K - 1)


def pieces(think: Tensor) -> list[tuple[int, int]]:
    """(begin, end) of the pieces of a program of which there are versions: one begins where most think.

    think: (K, L). A rationale is in force until the next, so a piece's reward is that of its own rationale.
    """
    L, most = think.shape[1], think.float().mean(0) > 0.5
    return list(pairwise([*(t for t in range(L) if t == 0 or most[t]), L]))


def posterior(reward: Tensor, think: Tensor) -> Tensor:
    """Weights of the versions of each program, line by line: (P, K, L) twice -> (P, K, L), sums over K are 1.

    In a piece a version weighs ~ exp(its reward there / TAU): q writes before it sees the line that it
    explains; here the line has its say, as in the posterior under which Theorem 3.1 is tight, but sharper.
    """
    out = torch.zeros_like(reward)
    for weights, r, z in zip(out, reward, think):
        for begin, end in pieces(z):
            weights[:, begin:end] = (r[:, begin:end].sum(1, keepdim=True) / TAU).softmax(0)
    return out


def uplift(G: Tensor, think: Tensor) -> tuple[Tensor, Tensor]:
    """What thinking earns: mean return of the versions that think before a line, less that of the others.

    G, think: (P, K, L). Returns its sum over the lines where there are both kinds, and their number.
    """
    K, n = think.shape[1], think.sum(1)                                                            # (P, L)
    both = (n > 0) & (n < K)
    gap = (G * think).sum(1) / n - (G * ~think).sum(1) / (K - n)
    return gap[both].sum(), both.sum()


def decisions(traces: list[Trace], n_lines: int, device=None) -> tuple[Tensor, Tensor]:
    """Where a rationale stands and where it breaks the format: two (traces, L) bool tensors."""
    think = torch.zeros(2, len(traces), n_lines, dtype=torch.bool)
    for b, trace in enumerate(traces):
        for t, z in enumerate(trace.thinks()):
            think[0, b, t], think[1, b, t] = z, t in trace.broken
    return tuple(think.to(device))


def reinforce_loss(log_q: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    """-sum over q's decisions of log q(decision) A_line, or w_line; divide by the number of rollouts.

    log_q: (B, T - 1) from `elbo.log_q`, or a part of it; advantage: (traces, L).
    """
    doc, line = batch.doc[:, 1:], batch.line[:, 1:]
    real = line >= 0
    return -(log_q[real] * advantage[doc[real], line[real]]).sum()


def anchor_loss(logits: Tensor, pi_logits: Tensor, batch: Batch, openers: Tensor) -> Tensor:
    """Trust region: summed KL(pi || q's network) over the action tokens, each given its gate.

    q and pi are one network, so moving q drags the action likelihoods along, and what drifts too far is lost
    to the M-step. The expert's tokens play no part here: pi's distribution is held; gates and rationales are
    left free.
    """
    action = (batch.kind == ACTION)[:, 1:][batch.scored]                                           # (N,)
    at_gate = (batch.gate != NO_GATE)[:, 1:][batch.scored]                                         # (N,)
    never = at_gate[action][:, None] & openers                                             # (A, V): after act
    p = pi_logits[action].float().masked_fill(never, -1e9).log_softmax(-1)                         # (A, V)
    q = logits[action].float().masked_fill(never, -1e9).log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def likelihoods(q: GPT, pi: GPT, batch: Batch, openers: Tensor):
    """q's gate and token, pi's token, (B, T - 1) each (`elbo.score`); the anchor loss."""
    x = elbo.states_of(q, batch)                                                                   # (N, D)
    with torch.no_grad():
        pi_x = elbo.states_of(pi, batch)
    fields = [field[:, 1:][batch.scored] for field in vars(batch).values()]                        # (N,) each

    def part(x: Tensor, pi_x: Tensor, *fields: Tensor) -> list[Tensor]:
        piece = Batch(*(F.pad(field, (1, 0))[None] for field in fields))             # its first is not scored
        logits = q.unembed(x)                                                                      # (n, V)
        with torch.no_grad():
            pi_logits = pi.unembed(pi_x)
            _, pi_token = elbo.score(pi_logits, piece, openers)
        anchor = anchor_loss(logits, pi_logits, piece, openers)
        return *elbo.score(logits, piece, openers), pi_token, anchor[None]
    *logps, anchors = q.in_parts(part, x, pi_x, *fields)
    zero = torch.zeros(batch.scored.shape, device=x.device)
    return *(zero.masked_scatter(batch.scored, logp) for logp in logps), anchors.sum()


# -------------------------------------------------------------------------------------------------- rollouts


class _Version:
    """One program being infused: the trace so far, the next line t, and what stands before it by now."""

    def __init__(self, program: Program, seed):
        self.program, self.rng, self.trace = program, np.random.default_rng(seed), Trace()
        self.trace.add(program.prompt, PROMPT)
        self.t = 0
        self.latent: list[int] = []                 # the comment line being written before line t
        self.comments = self.spent = 0              # complete comment lines there, and their tokens
        self.forced = False                         # line t must follow now

    def rest(self) -> list[int]:
        return [token for line in self.program.lines[self.t:] for token in line]

    def decide(self, p_open: list[float], room: int, mode: str, explore: float) -> int:
        """Take lines as they come until a gate opens; FREE or FORCED if one did, else NO_GATE.

        p_open: q(think) at each remaining line. room: tokens left for a rationale, beside what this one has
        spent.
        """
        for p in p_open:
            gate, first = FREE, not self.comments
            if self.forced or room + self.spent < 0 or (mode == "first" and self.t):
                p, gate = 0.0, FORCED
            elif mode in ("always", "first"):
                p, gate = float(first), FORCED
            elif explore and first and self.rng.random() < explore:
                p = 1.0                             # q's gate learns whether that paid
            if p > 0.0 and self.rng.random() < p:
                return gate
            self.trace.add(self.program.lines[self.t], ACTION, self.t, gate)
            self.t, self.comments, self.spent, self.forced = self.t + 1, 0, 0, False
        return NO_GATE

    def write(self, token: int, enc: Encoding, cfg: EStepConfig, gate: int = NO_GATE) -> bool:
        """Add a token to the comment line; is it still open? One that breaks the format is closed."""
        self.latent.append(token)
        self.trace.add([token], LATENT, self.t, gate)
        closing = self.program.closings[self.t]
        body, newline, rest = enc.decode_bytes(self.latent).decode("utf-8", "replace").partition("\n")
        # To Python a carriage return ends the comment, a NUL the program; the end of a document ends all.
        broken = "\r" in body or "\0" in body or token in enc._special_tokens.values()
        broken = broken or self.comments >= cfg.max_comments
        if newline:
            broken = broken or not body.strip(" #\t\r") or not closing.startswith("\n" + rest)
        closed = newline + rest == closing
        if not (broken or closed) and self.spent + len(self.latent) < cfg.max_rationale:
            return True
        if broken or not closed:
            self.trace.broken.add(self.t)
            self.trace.add(enc.encode_ordinary(closing), PROMPT, self.t)
            self.forced = True
        self.comments, self.spent, self.latent = self.comments + 1, self.spent + len(self.latent), []
        return False


@torch.no_grad()
def rollout(model: GPT, enc: Encoding, programs: list[Program], seeds: list, openers: Tensor,
            cfg: EStepConfig, batch_size: int = 256) -> list[Trace]:
    """Infuse each program with latents drawn from q at temperature 1: one Trace each (repeat one for more).

    seeds: one per program, anything `np.random.default_rng` takes: a row's draws depend on its seed and
    program. cfg.rationales, explore, max_rationale, max_comments say how. Gates that cfg.rationales decides
    carry no gradient, those that exploration opens do; the rationale is q's own all the same. Where the
    model's context has no room for one, lines follow without.
    """
    if cfg.rationales == "never":
        return [p.trace() for p in programs]
    rows = [_Version(p, seed) for p, seed in zip(programs, seeds, strict=True)]
    with autocast(model.device):
        for part in bar(chunks(rows, batch_size), "roll out"):
            infuse_batch(model, enc, part, openers.to(model.device), cfg)
    return [r.trace for r in rows]


def infuse_batch(model: GPT, enc: Encoding, rows: list[_Version], openers: Tensor, cfg: EStepConfig):
    """Complete the traces of some versions."""
    # Versions of one program begin alike: their first pass is one row of the cache.
    distinct = {id(r.program): r for r in rows}
    room = {key: r.program.room(enc, cfg.max_rationale) for key, r in distinct.items()}
    size = max(len(r.program) + len(r.program.lines) * room[key] for key, r in distinct.items())
    cache = new_cache(model, len(distinct), min(size, model.limit))
    place = {key: n for n, key in enumerate(distinct)}
    slots = [place[id(r.program)] for r in rows]                             # each version's row in the cache
    scored = list(distinct.values())
    while True:
        states, p_open = score_lines(model, cache, scored, openers)            # per row of the cache
        thinking = []
        for row, slot in zip(rows, slots):
            start, left = row.t, model.limit - len(row.trace.tokens) - len(row.rest()) - room[id(row.program)]
            gate = row.decide(p_open[slot], left, cfg.rationales, cfg.explore)
            if gate:
                thinking.append((row, slot, states[slot][row.t - start], gate))
        if not thinking:
            return
        rows, slots, opened, gates = map(list, zip(*thinking))
        cache = cache.select(torch.tensor(slots, device=model.device))
        write_comments(model, cache, rows, torch.stack(opened), gates, enc, openers, cfg)
        scored, slots = rows, range(len(rows))


def score_lines(model: GPT, cache: KVCache, rows: list[_Version], openers: Tensor) -> tuple[list, list]:
    """Score what a row of the cache has not seen yet, and all of its remaining lines L behind it.

    Returns, per row, the hidden states (L, D) that decide the lines' gates, and q(think) at each of them.
    """
    texts = [r.trace.tokens + r.rest() for r in rows]
    width = max(len(text) - seen for text, seen in zip(texts, cache.length.tolist()))
    # Shorter rows begin earlier, with tokens that are cached already: no row is padded past its own end.
    starts = [max(len(text) - width, 0) for text in texts]
    cache.length = torch.tensor(starts, device=model.device)
    at = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, r in enumerate(rows):                               # the token before a line decides its gate
        lengths = [len(line) for line in r.program.lines[r.t:-1]]
        at[b, np.cumsum([len(r.trace.tokens) - 1 - starts[b], *lengths])] = True
    text = pad([text[a:] for text, a in zip(texts, starts)], 0, model.device)                      # (B, T)
    x = model(text, cache=cache, at=at.to(model.device), head=False)                         # (N, D), N gates
    p_open = torch.cat([(part @ openers.double()) for part in next_token(model, x)])               # (N,)
    n_lines = at.sum(1).tolist()
    return x.split(n_lines), [p.tolist() for p in p_open.split(n_lines)]


def next_token(model: GPT, x: Tensor):
    """The distributions (n, V) after the states (N, D), n at a time: float64 takes much memory."""
    return (model.unembed(part).double().softmax(-1) for part in x.split(256))


def write_comments(model: GPT, cache: KVCache, rows: list[_Version], states: Tensor, gates: list[int],
                   enc: Encoding, openers: Tensor, cfg: EStepConfig):
    """Decode the comment line that each row has just opened; states: (B, D) at the gates.

    Leaves the cache with what it has seen of each row: all but its last sampled token and a forced closing.
    Brings rows, and those of the cache, into another order.
    """
    def draw(logits: Tensor, live: list[bool]) -> list[int]:
        noise = [r.rng.random() if on else 0.0 for r, on in zip(rows, live)]       # of the first rows
        return pick(logits, torch.tensor(noise, dtype=torch.float64, device=model.device), 1.0).tolist()
    cache.length = torch.tensor([len(r.trace.tokens) for r in rows], device=model.device)
    # Which opener: q restricted to them, since `decide` has drawn that it is one.
    opening = torch.cat([(p * openers).log() for p in next_token(model, states)])                  # (B, V)
    last = draw(opening, [True] * len(rows))
    live = [r.write(token, enc, cfg, gate) for r, token, gate in zip(rows, last, gates)]
    decode = Decoder(model, cache)
    while any(live):
        fewer, order = cache.shrink(live)
        if fewer is not cache:
            rows[:len(live)] = [rows[b] for b in order]
            last, live = [[values[b] for b in order[:len(fewer.length)]] for values in (last, live)]
            cache, decode = fewer, Decoder(model, fewer)
        # Rows that have finished since ride along; their cache does not advance.
        logits = decode(torch.tensor(last, device=model.device)).float()                           # (B, V)
        cache.length += torch.tensor(live, device=model.device)
        last = draw(logits, live)
        live = [on and r.write(token, enc, cfg) for on, r, token in zip(live, rows, last)]


def rollout_tokens(trace: Trace) -> int:
    """Tokens that a rollout puts through the model: a program, and what follows each comment once more."""
    cost, after = len(trace.tokens), 0
    for token_kind, gate in zip(reversed(trace.kind), reversed(trace.gate)):
        after += token_kind == ACTION
        cost += after * (token_kind == LATENT and gate != NO_GATE)
    return cost


def without_broken(trace: Trace) -> Trace:
    """The trace with its malformed rationales cut out: those lines stand after `<act>`."""
    out = Trace()
    for token, kind, line, gate in zip(trace.tokens, trace.kind, trace.line, trace.gate):
        if line not in trace.broken or kind == ACTION:
            out.add([token], kind, line, gate)
    return out


@torch.no_grad()
def select(pi: GPT, program: Program, versions: list[Trace], openers: Tensor, cfg: EStepConfig,
           seed) -> Trace:
    """One trace out of versions of a program and the plain one, drawn piece by piece from the `posterior`."""
    versions = [program.trace(), *versions]
    batch, rng, out = elbo.collate(versions, pi.device), np.random.default_rng(seed), Trace()
    _, token = elbo.score(elbo.logits_of(pi, batch), batch, openers)
    judged = judge(versions, batch, token, cfg)                                                    # (K, L)
    weights = posterior(judged["reward"][None], judged["think"][None])[0].double().cpu()           # (K, L)
    out.add(program.prompt, PROMPT)
    for begin, end in pieces(judged["think"]):
        chosen = versions[rng.choice(len(versions), p=weights[:, begin] / weights[:, begin].sum())]
        for token, kind, line, gate in zip(chosen.tokens, chosen.kind, chosen.line, chosen.gate):
            if begin <= line < end:
                out.add([token], kind, line, gate)
    return out


def demo():
    """Print versions of a program with rewards, returns and advantages; a gradient, estimated and exact."""
    q, enc = load_pretrained(Path(__file__).parent / "base")
    prompt = 'def f(xs):\n    """add 3 * 4 - 5; subtract 2 + 6; list"""\n   '
    solution = " xs = [x + 7 for x in xs]\n    xs = [x - 8 for x in xs]\n    return xs\n"
    program, openers = elbo.parse(enc, prompt, solution, enc.eot_token), elbo.opener_mask(enc)
    shown = rollout(q, enc, [program] * 8, range(8), openers, EStepConfig())
    drawn = rollout(q, enc, [program] * 256, range(256), openers, EStepConfig(max_rationale=1))
    listed = list({str(trace): trace for trace in drawn}.values())  # one token: all outcomes have occurred
    traces = shown + drawn + listed
    batch = elbo.collate(traces)
    gate, token, pi_token, _ = likelihoods(q, q, batch, openers)
    r = judge(traces, batch, pi_token, EStepConfig())["reward"]                              # (B, 3)
    G = returns(r, horizon=3, gamma=1.0)
    for trace, *rows in zip(shown, r, G, advantages(G[None, :8])[0]):
        numbers = [[round(x, 2) for x in row.tolist()] for row in rows]
        print(enc.decode(trace.tokens[len(program.prompt):-1]), "  rewards, returns, advantages:", *numbers)
    log_q, A = elbo.log_q(gate, token, batch), torch.zeros_like(G)
    A[8:264] = advantages(G[None, 8:264])[0] / 256
    J = (log_q[264:].sum(1).exp() * r[264:].sum(1)).sum()            # the expected reward: sum of q(z) r(z)
    losses = (reinforce_loss(log_q, A, batch), -J)
    g, exact = (torch.autograd.grad(x, q.embed_tokens.weight, retain_graph=True)[0] for x in losses)
    print(f"gradient: norm {g.norm():.3f} by 256 versions, {exact.norm():.3f} by all {len(listed)} outcomes")
    print("check, they differ by less than 30%:", bool((g - exact).norm() < 0.3 * exact.norm()))


if __name__ == "__main__":
    demo()
