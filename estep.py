"""The E-step: REINFORCE over latent rationales (paper, section 3).

For each expert program, q writes K versions with rationales of its own choosing; a frozen copy pi of the model says how
predictable they made each of the expert's lines; q is moved towards what helped:

    grad = E [ sum_t grad log q(z_t | s_t, z_{t-1}) (G_t - b_t) ]        G_t = sum_{j < horizon} gamma^j r_{t+j}

with b_t the mean return at line t of the other K - 1 versions of the same program (`advantages`), and the reward r_t of
`elbo.line_rewards`. (`horizon` truncates the return; the horizon T of the paper is the number of decisions.) What carries gradient
is what q chose: the gate at each decision point and the rationale's tokens. The expert's tokens never do.

Rollouts do not decode the expert's tokens, which are known. One pass scores all remaining lines of a program as if no more
rationales came; the gates are drawn from it in order, up to the first that opens; the cache is rolled back to there, the
rationale is decoded, and the rest is scored again. The distribution is exactly that of deciding line by line.

Where this departs from the paper, or where the paper is silent:
 1. The reward carries beta * (log p(gate) - log q(gate)) beside the fixed penalty c (see `elbo.line_rewards` for why).
 2. Rewards are sums over a line's tokens, in nats, as in Theorem 3.1; the paper's c = 0.05 seems to go with means per token.
 3. A line's log-likelihood counts as no less than -`floor` nats: the tail of rare, very wrong rationales makes most of the variance.
 4. A trust region holds the action likelihoods, which share the network with q (`anchor_loss`).
 5. One round of E-step and M-step unless `rounds` says otherwise, on one draw of latents per program; the M-step goes on from q's weights.
 6. A rationale is at most `max_rationale` tokens and `max_comments` comment lines, each opened by a gate; a longer, empty or unclosed one is
    closed by force and pays for it.

`run` is train.Run throughout, the plumbing: `steps` yields the updates still to do, `draw` names a random draw, `mine` and `sum` are for
several ranks, `update` takes one optimizer step on a sum of losses.
"""
import copy

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import elbo
from elbo import ACTION, FORCED, FREE, LATENT, NO_GATE, PROMPT, Batch, Program, Trace, chunks
from model import GPT, Decoder, KVCache, pad, pick

# Who decides where to think: q; everywhere; before line 0 only; nowhere. What is not q's decision is one comment line, whatever `max_comments` allows.
MODES = ("learned", "always", "first", "never")


class _Rollout:
    """One program being infused: the trace so far, the next line, and what has just happened at its decision point."""

    def __init__(self, program: Program, seed):
        self.program, self.rng, self.trace = program, np.random.default_rng(seed), Trace()
        self.trace.add(program.prompt, PROMPT)
        self.t = 0                                  # next line
        self.latent: list[int] = []                 # the rationale being written before it
        self.comments = 0                           # complete comment lines before line t, of
        self.spent = 0                              # so many tokens
        self.forced = False                         # line t must follow now

    def tail(self) -> list[int]:
        return [token for line in self.program.lines[self.t:] for token in line]

    def decide(self, p_open: list[float], how: str, explore: float, room: int) -> int:
        """Take lines as they come until a gate opens; FREE or FORCED if one did, else NO_GATE.

        p_open: q(think) at each remaining line. how: one of MODES. room: tokens left for another rationale, beside what this one has spent.
        """
        start = self.t
        while self.t < len(self.program.lines):
            fits = room + self.spent >= 0
            if self.forced or not fits or (how == "first" and self.t):
                p, gate = 0.0, FORCED                               # the line must follow
            elif how in ("always", "first"):
                p, gate = (0.0 if self.comments else 1.0), FORCED
            elif explore and not self.comments and self.rng.random() < explore:
                p, gate = 1.0, FORCED
            else:
                p, gate = p_open[self.t - start], FREE
            if p > 0.0 and self.rng.random() < p:
                return gate
            self.trace.add(self.program.lines[self.t], ACTION, self.t, gate)
            self.t, self.comments, self.spent, self.forced = self.t + 1, 0, 0, False
        return NO_GATE

    def write(self, token: int, gate: int = NO_GATE):
        self.latent.append(token)
        self.trace.add([token], LATENT, self.t, gate)

    def check(self, enc: tiktoken.Encoding, max_rationale: int, max_comments: int) -> bool:
        """Is the comment line finished? One that breaks the format is closed by force, and line t then follows without a gate."""
        text = enc.decode_bytes(self.latent).decode("utf-8", "replace")
        body, newline, rest = text.partition("\n")
        closing = self.program.closings[self.t]
        broken = self.comments >= max_comments
        # To Python a carriage return ends the comment, a NUL ends the program; the end of the document ends it for the model.
        broken = broken or "\r" in body or "\0" in body or self.latent[-1] in enc._special_tokens.values()
        if newline:
            broken = broken or not body.strip(" #\t\r") or not closing.startswith("\n" + rest)
            finished = "\n" + rest == closing
        else:
            finished = False
        if not broken and not finished and self.spent + len(self.latent) < max_rationale:
            return False
        if broken or not finished:
            self.trace.broken.add(self.t)
            self.trace.add(enc.encode_ordinary(closing), PROMPT, self.t)
            self.forced = True
        self.comments, self.spent, self.latent = self.comments + 1, self.spent + len(self.latent), []
        return True


@torch.no_grad()
def rollout(model: GPT, enc: tiktoken.Encoding, programs: list[Program], seeds: list, openers: Tensor, *, max_rationale: int,
            max_comments: int = 1, mode: str = "learned", explore: float = 0.0) -> list[Trace]:
    """Infuse each program with latents drawn from q at temperature 1: one Trace per program (repeat a program for more).

    seeds: one per program, anything `np.random.default_rng` takes; a row's draws depend on nothing but its seed and its program.
    mode: one of MODES. explore: probability that a gate is forced open, for a model that hardly ever thinks by itself; the rationale is
    q's own all the same, and the forced gate carries no gradient. Programs must leave room for their rationales in the model's context;
    where they do not, the remaining lines follow without latents.
    """
    cfg, dev = model.config, model.device
    rows = [_Rollout(p, s) for p, s in zip(programs, seeds, strict=True)]
    out = [r.trace for r in rows]
    if mode == "never" or not rows:
        return [p.trace() for p in programs]
    need = {i: p.room(enc, max_rationale) for i, p in {id(p): p for p in programs}.items()}
    size = min(model.limit, max(len(p) + (1 if mode == "first" else len(p.lines)) * need[id(p)] for p in programs))
    distinct = {i: n for n, i in enumerate(need)}
    slots = [distinct[id(p)] for p in programs]                 # a row's place in the cache: versions of a program begin alike, and share it
    dtype = torch.get_autocast_dtype(dev.type) if torch.is_autocast_enabled(dev.type) else model.embed_tokens.weight.dtype
    cache = KVCache(cfg, len(distinct), size, dev, dtype)
    openers = openers.to(dev)
    while rows:
        # Score what each row has not seen yet, and all of its remaining lines behind it. Shorter rows begin earlier, with tokens
        # that are cached already (and get the same values again), so that no row is padded past its own end.
        scored = [r for _, r in sorted(dict(zip(slots, rows)).items())]                                 # one row of each slot
        texts = [r.trace.tokens + r.tail() for r in scored]
        width = max(len(text) - seen for text, seen in zip(texts, cache.length.tolist()))
        starts = [max(len(text) - width, 0) for text in texts]
        cache.length = torch.tensor(starts, device=dev)
        text = pad([text[i:] for text, i in zip(texts, starts)], cfg.eos_id, dev)                       # (B, T)
        at = torch.zeros(text.shape, dtype=torch.bool)
        for b, r in enumerate(scored):                          # the gate of a line is decided by the logits of the token before it
            ends = np.cumsum([len(r.trace.tokens) - 1 - starts[b], *map(len, r.program.lines[r.t:-1])])
            at[b, torch.from_numpy(ends)] = True
        x = model(text, cache=cache, at=at.to(dev), head=False)                                         # (N, D), N gates

        def opening(x: Tensor) -> Tensor:
            return model.unembed(x).double().softmax(-1) * openers                                      # (n, V)
        p_open = torch.cat([opening(part).sum(-1) for part in x.split(256)]).tolist()                   # real vocabularies fill a GPU
        firsts = np.cumsum([0, *(len(r.program.lines) - r.t for r in scored)])                          # where each slot's lines begin in x
        thinking = []
        for b, r in zip(slots, rows):
            start = r.t
            if gate := r.decide(p_open[firsts[b]:firsts[b + 1]], mode, explore, model.limit - len(texts[b]) - need[id(r.program)]):
                thinking.append((r, b, int(firsts[b]) + r.t - start, gate))
        if not thinking:
            break
        rows, cache = [r for r, *_ in thinking], cache.select(torch.tensor([b for _, b, *_ in thinking], device=dev))
        slots = list(range(len(rows)))
        # Which opener: q restricted to them. (`decide` has drawn that it is one.)
        last = _draw(opening(x[[n for *_, n, _ in thinking]]).log(), rows)                              # of (B, V)
        for r, token, (*_, gate) in zip(rows, last, thinking):
            r.write(token, gate)
        cache.length = torch.tensor([len(r.trace.tokens) - 1 for r in rows], device=dev)
        live, decode = [not r.check(enc, max_rationale, max_comments) for r in rows], Decoder(model, cache)
        while any(live):
            # Rows that have finished ride along; their cache does not advance.
            drawn = _draw(decode(torch.tensor(last, device=dev)).float(), rows, live)                   # of (B, V)
            cache.length += torch.tensor(live, device=dev)
            for b, r in enumerate(rows):
                if live[b]:
                    last[b] = drawn[b]
                    r.write(drawn[b])
                    live[b] = not r.check(enc, max_rationale, max_comments)
        del decode                                  # its recording holds memory
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


def uplift(G: Tensor, think: Tensor) -> tuple[Tensor, Tensor]:
    """What thinking earns: the mean return of the versions that think before a line minus that of those that do not, wherever there are both.

    G, think: (P, K, L). Returns its sum over such lines, and their number.
    """
    n, K = think.sum(1), think.shape[1]                                                                 # (P, L)
    both = (n > 0) & (n < K)
    gap = (G * think).sum(1) / n - (G * ~think).sum(1) / (K - n)
    return gap[both].sum(), both.sum()


def decisions(traces: list[Trace], n_lines: int, device=None) -> tuple[Tensor, Tensor]:
    """Where a rationale stands and where it breaks the format: two (B, L) bool tensors."""
    think = torch.zeros(len(traces), n_lines, dtype=torch.bool)
    broken = torch.zeros_like(think)
    for b, trace in enumerate(traces):
        for t, z in enumerate(trace.thinks()):
            think[b, t], broken[b, t] = z, t in trace.broken
    return think.to(device), broken.to(device)


def reinforce_loss(log_q: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    """-sum over sampled decisions of log q(decision) * advantage of its line; divide by the number of rollouts of all ranks.

    log_q: (B, T - 1) from `elbo.log_q`; advantage: (B, L).
    """
    line = batch.line[:, 1:].clamp(min=0)                                                               # (B, T-1)
    return -(log_q * advantage.gather(1, line)).sum()


def anchor_loss(logits: Tensor, pi_logits: Tensor, batch: Batch, openers: Tensor) -> Tensor:
    """Trust region: summed KL(pi || model) over the action tokens, each given its gate; divide as `reinforce_loss`.

    q and pi are one network, so moving q drags the action likelihoods along, and what drifts too far is lost to the M-step.
    The expert's tokens play no part here: it is pi's distribution that is held, and the gates and rationales are left free.
    """
    act, gate = (x[:, 1:][batch.scored] for x in (batch.kind == ACTION, batch.gate != NO_GATE))         # (N,) each
    never = gate[act][:, None] & openers                                                                # (A, V): after act, no opener
    p, q = (x[act].float().masked_fill(never, -1e9).log_softmax(-1) for x in (pi_logits, logits))       # (A, V)
    return (p.exp() * (p - q)).sum()


def compare(model: GPT, pi: GPT, batch: Batch, openers: Tensor, positions: int = 1024) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the E-step needs of the logits of both models: q's gate and token, and pi's token, (B, T - 1) each (`elbo.score`); the anchor loss.

    With a vocabulary of 150k, this takes more memory than everything else: some 30 bytes per entry of q's logits. A model that recomputes
    its blocks recomputes them too, so that no more than `positions` x V of them are there at a time.
    """
    x = model(batch.tokens[:, :-1], at=batch.scored, head=False)                                        # (N, D), as in `elbo.logits_of`
    with torch.no_grad():
        pi_x = pi(batch.tokens[:, :-1], at=batch.scored, head=False)
    flat = [F.pad(t[:, 1:][batch.scored], (1, 0)) for t in (batch.tokens, batch.kind, batch.line, batch.gate)]       # (1 + N,) each

    def part(x: Tensor, pi_x: Tensor, a: int, b: int):
        piece = Batch(*(t[None, a:b + 1] for t in flat))            # one row, of which all but the first token is scored
        logits = model.unembed(x[a:b])                                                                  # (b-a, V)
        with torch.no_grad():
            pi_logits = pi.unembed(pi_x[a:b])
            _, pi_token = elbo.score(pi_logits, piece, openers)
        return *elbo.score(logits, piece, openers), pi_token, anchor_loss(logits, pi_logits, piece, openers)
    N = len(x)
    if model.grad_checkpoint:
        *scores, anchor = zip(*(checkpoint(part, x, pi_x, a, min(a + positions, N), use_reentrant=False) for a in range(0, N, positions)))
        scores, anchor = [torch.cat(parts, 1) for parts in scores], sum(anchor)
    else:
        *scores, anchor = part(x, pi_x, 0, N)
    gate, token, pi_token = (v.new_zeros(batch.scored.shape).masked_scatter(batch.scored, v) for v in scores)        # (B, T-1) each
    return gate, token, pi_token, anchor


# --------------------------------------------------------------------------------------------------------------- the loop


def e_step(run, stage: str, model: GPT, data):
    """E-step: move q, which starts as the model itself, towards rationales that pay; pi is the frozen start.

    run: train.Run, the plumbing; data: train.Data. Trains `model` in place.
    """
    s = run.s
    pi = copy.deepcopy(run.actor(model)).requires_grad_(False)
    optimizer = run.optimizer(torch.optim.Adam, model, betas=(0.9, 0.99))
    for step in run.steps(stage, model, optimizer, s.e_steps, s.e_lr, warmup=5):
        picked = np.random.default_rng(run.draw(stage, step)).choice(len(data.experts), s.e_programs, replace=False).tolist()
        versions = [(i, k) for i in run.mine(picked) for k in range(s.e_rollouts)]
        traces, actor = [], run.actor(model)
        for part in chunks(versions, s.sample_batch):
            with run.autocast():
                traces += rollout(actor, data.enc, [data.experts[i] for i, _ in part], [run.draw(stage, step, i, k) for i, k in part],
                                  data.openers, max_rationale=s.max_rationale, max_comments=s.max_comments, mode=s.rationales, explore=s.explore)
        stats = np.zeros(8)

        def micro_batches():
            # Whole groups stay together, because a version's baseline is made of the others.
            for part in chunks(traces, max(s.micro_batch // s.e_rollouts, 1) * s.e_rollouts):
                batch = elbo.collate(part, run.device)
                L = int(batch.line.max()) + 1
                with run.autocast():
                    gate, token, pi_token, anchor = compare(model, pi, batch, data.openers)             # (B, T-1) each, a scalar
                loglik = elbo.by_line(elbo.log_pi(pi_token, batch), batch, L)                           # (B, L)
                think, broken = decisions(part, L, run.device)
                r = elbo.line_rewards(loglik, think, broken, *elbo.opening_gate(gate.detach(), batch, L), c=s.c, beta=s.beta,
                                      p_think=s.p_think, broken_cost=s.broken_cost, floor=s.floor)                     # (B, L)
                G = returns(r, s.horizon, s.gamma).view(-1, s.e_rollouts, L)                            # (P, K, L)
                A = advantages(G).view(-1, L)
                stats[:] += [x.sum().item() for x in (r, loglik, batch.line.amax(1) + 1, think, broken, batch.kind == LATENT, *uplift(G, think.view(G.shape)))]
                yield reinforce_loss(elbo.log_q(gate, token, batch), A, batch) + s.e_anchor * anchor

        norm = run.update(model, optimizer, micro_batches(), len(traces))
        reward, loglik, lines, thinks, broken, latents, up, compared = run.sum(*stats)
        run.log(phase=stage, step=step, reward=reward / lines, loglik=loglik / lines, think=thinks / lines,
                broken=broken / max(thinks, 1), length=latents / max(thinks, 1), uplift=up / max(compared, 1), grad_norm=norm,
                show=f"reward {reward / lines:+.3f} think {thinks / lines:.0%}")


def infuse(run, q: GPT, data, programs: list[Program], what: str, mode: str, explore: float = 0.0) -> list[Trace]:
    """Programs with rationales drawn from q, format kept: the M-step's data. Ranks share the work; each gets all of it."""
    out, q = [], run.use(q)
    for part in chunks(run.mine(list(enumerate(programs))), run.s.sample_batch):
        with run.autocast():
            out += rollout(q, data.enc, [p for _, p in part], [run.draw("infuse " + what, i) for i, _ in part], data.openers,
                           max_rationale=run.s.max_rationale, max_comments=run.s.max_comments, mode=mode, explore=explore)
    return run.gather([without_broken(t) for t in out])


# ------------------------------------------------------------------------------------------------ do the rationales help?


def shuffled(enc: tiktoken.Encoding, programs: list[Program], infused: list[Trace], seed) -> list[Trace]:
    """The same programs, thinking before the same lines, but each rationale is one of another program: the control.

    What is left of the gain there is owed to the form of a comment, not to what it says. A program keeps its own rationales if no other
    program has any.
    """
    said = []                                       # (program, the comment lines of its rationale)
    for i, trace in enumerate(infused):
        for t, z in enumerate(trace.thinks()):
            said += [(i, [line.strip() for line in enc.decode(trace.of(t, LATENT)).split("\n") if line.strip()])] if z else []
    rng, out = np.random.default_rng(seed), []
    for i, (program, trace) in enumerate(zip(programs, infused, strict=True)):
        others = [comments for j, comments in said if j != i] or [comments for _, comments in said]
        out.append(Trace())
        out[-1].add(program.prompt, PROMPT)
        for t, z in enumerate(trace.thinks()):
            for comment in others[rng.integers(len(others))] if z else ():
                out[-1].add(elbo.rationale(enc, program, t, comment), LATENT, t, FORCED)
            out[-1].add(program.lines[t], ACTION, t, FREE)
    return out


@torch.no_grad()
def rationale_gain(run, pi: GPT, data, programs: list[Program], infused: list[Trace]) -> dict:
    """What rationales are worth to pi at the lines before which they stand: nats per line without them, with them, and with those of
    another program (`shuffled`). `gain` and `gain_shuffled` are the means of the differences from without, `gain_own` that of the program's
    own from another's, each with its standard error over programs.
    """
    pi = run.use(pi)
    variants = [[p.trace() for p in programs], infused, shuffled(data.enc, programs, infused, run.draw("shuffled"))]
    fits = [v for v in zip(*variants) if max(len(t.tokens) for t in v) <= pi.limit]        # another's rationale may be longer
    rows = []                                       # (program, without, with, shuffled) of every line that has a rationale
    for part in chunks(run.mine(list(enumerate(fits))), run.s.micro_batch):
        think, _ = decisions([own for _, (_, own, _) in part], max(max(own.line) for _, (_, own, _) in part) + 1)       # (B, L)
        columns = [torch.tensor([n for n, _ in part])[:, None].expand(think.shape)[think]]                  # (N,)
        for traces in zip(*(variants for _, variants in part)):
            batch = elbo.collate(list(traces), run.device)
            with run.autocast():
                _, token = elbo.score(elbo.logits_of(pi, batch), batch, data.openers)
            columns.append(-elbo.by_line(elbo.log_pi(token, batch), batch, think.shape[1]).cpu()[think])    # (N,)
        rows += torch.stack(columns, 1).tolist()
    rows = np.array([r for part in run.gather_lists(rows) for r in part]).reshape(-1, 4)
    if not len(rows):
        return dict(lines=0)
    program, nats = rows[:, 0].astype(int), rows[:, 1:]
    out = dict(lines=len(rows), **dict(zip(("without", "with", "shuffled"), nats.mean(0).tolist())))
    for name, a, b in (("gain", 0, 1), ("gain_shuffled", 0, 2), ("gain_own", 2, 1)):
        mean, se = mean_by_cluster(nats[:, a] - nats[:, b], program)
        out |= {name: mean, f"{name}_se": se}
    return out


def mean_by_cluster(values: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
    """The mean of `values` (n,) and its standard error where those of one cluster (n,) may depend on each other; nan for one cluster.

    Lines of one program share the rationales before them: to take them as independent would make the error too small.
    """
    sums = np.bincount(cluster, values - values.mean())             # 0 for clusters without values, which do not count
    m = len(np.unique(cluster))
    return float(values.mean()), float((sums @ sums * m / (m - 1)) ** 0.5 / len(values)) if m > 1 else float("nan")
