"""Answers to the exercises of docs/assignments: functions as a student might write them, and how they go wrong.

The functions below are right, though not the reference's. WRONG lists, for each exercise, what a student gets wrong:
(what, a fragment of the right functions, what stands there instead). A whole E-step update is taken from estep.py.
"""
import numpy as np
import torch

from elbo import ACTION, NO_GATE
from model import Sample, new_cache, pad, pick


@torch.no_grad()
def generate(model, prompts, *, max_new_tokens, seeds, temperature=1.0, stop_ids=None, stop=None, batch_size=256):
    """One batch after the other, each until its last row has ended."""
    ends = {model.config.eos_id} if stop_ids is None else set(stop_ids)
    if not all(0 < len(prompt) < model.limit for prompt in prompts):
        raise ValueError("a prompt is empty, or as long as the context")
    out = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start:start + batch_size]
        rngs = [np.random.default_rng(seed) for seed in seeds[start:start + batch_size]]
        samples, cache = [Sample() for _ in part], new_cache(model, len(part), model.limit)
        model(pad([prompt[:-1] or [0] for prompt in part], 0), cache=cache)
        cache.length += torch.tensor([len(prompt) - 1 for prompt in part])
        last, live = torch.tensor([prompt[-1] for prompt in part]), set(range(len(part)))
        while live:
            logits = model(last[:, None], cache=cache)[:, 0]
            cache.length += torch.tensor([b in live for b in range(len(part))])
            noise = torch.tensor([rng.random() for rng in rngs], dtype=torch.float64)
            last = pick(logits, noise, temperature)
            logp = (logits / (temperature or 1)).log_softmax(-1)
            for b in sorted(live):
                s = samples[b]
                s.tokens.append(int(last[b]))
                s.logprobs.append(float(logp[b, last[b]]))
                s.stopped = s.tokens[-1] in ends or (stop is not None and stop(s.tokens))
                if s.stopped or len(s.tokens) == max_new_tokens or len(part[b]) + len(s.tokens) == model.limit:
                    live.remove(b)
        out += samples
    return out


def score(logits, batch, openers):
    """Both sides of every token's gate; then pick."""
    logp = logits.float().log_softmax(-1)
    target = batch.tokens[:, 1:][batch.scored]
    at_gate = batch.gate[:, 1:][batch.scored] != NO_GATE
    think, act = logp[:, openers].logsumexp(-1), logp[:, ~openers].logsumexp(-1)
    gate = torch.where(openers[target], think, act)
    gate = torch.where(at_gate, gate, torch.zeros_like(gate))
    token = logp.gather(1, target[:, None])[:, 0] - gate
    out = torch.zeros(2, *batch.scored.shape)
    out[:, batch.scored] = torch.stack([gate, token])
    return out[0], out[1]


def by_line(values, batch, n_lines):
    """Line by line."""
    doc, line = batch.doc[:, 1:], batch.line[:, 1:]
    return torch.stack([torch.stack([values[(doc == i) & (line == t)].sum() for t in range(n_lines)])
                        for i in range(int(doc.max()) + 1)])


def line_rewards(log_pi, think, broken, *, c, broken_cost, floor=torch.inf):
    """Term by term, in place."""
    reward = torch.maximum(log_pi, torch.tensor(-floor)).clone()
    reward[think] -= c
    reward[broken] -= broken_cost
    return reward


def kl_exact(g, entropy_new, alpha, n):
    """The terms of the definition."""
    leave = (1 - alpha) * (n - 1) / n
    log_leave, log_stay = torch.tensor([leave, 1 - leave], dtype=g.dtype).log()
    gate = torch.special.entr(g) + torch.special.entr(1 - g)
    text = torch.tensor(n - 1.0, dtype=g.dtype).log() - entropy_new
    return -gate - g * log_leave - (1 - g) * log_stay + g * text


def returns(rewards, horizon, gamma):
    """A sum for each line."""
    L = rewards.shape[-1]
    out = torch.zeros_like(rewards)
    for t in range(L):
        for j in range(horizon):
            if t + j < L:
                out[..., t] += gamma ** j * rewards[..., t + j]
    return out


def advantages(G):
    """The others' sum over their number."""
    baseline = (G.sum(1, keepdim=True) - G) / (G.shape[1] - 1)
    return G - baseline


def reinforce_loss(log_q, advantage, batch):
    """Line by line."""
    doc, line = batch.doc[:, 1:], batch.line[:, 1:]
    return -sum((log_q * (doc == i) * (line == t) * advantage[i, t]).sum()
                for i in range(advantage.shape[0]) for t in range(advantage.shape[1]))


def anchor_loss(logits, pi_logits, batch, openers):
    """With infinities, and without those where pi is 0."""
    action = batch.kind[:, 1:][batch.scored] == ACTION
    at_gate = batch.gate[:, 1:][batch.scored] != NO_GATE
    never = (action & at_gate)[:, None] & openers
    q, pi = [x.masked_fill(never, -torch.inf).log_softmax(-1)[action] for x in (logits, pi_logits)]
    held = ~never[action]
    return (pi.exp()[held] * (pi[held] - q[held])).sum()


def pack(traces, length):
    """Row by row through the rooms that are left."""
    order = sorted(range(len(traces)), key=lambda i: len(traces[i].tokens), reverse=True)
    if traces and len(traces[order[0]].tokens) > length:
        raise ValueError("a trace is longer than a row")
    rows = []
    for i in order:
        for row in rows:
            if sum(len(traces[k].tokens) for k in row) + len(traces[i].tokens) <= length:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


def group_advantages(rewards):
    """The mean of each row."""
    mean = rewards.mean(dim=1)
    return rewards - mean[:, None]


def grpo_loss(logp, old, advantage, low=0.2, high=0.28):
    """One bound for each sign of the advantage."""
    ratio = torch.exp(logp - old)
    gain = torch.where(advantage > 0, ratio.clamp(max=1 + high), ratio.clamp(min=1 - low))
    return -(gain * advantage).sum()


def pass_at_k(n, c, k):
    """The product form of Chen et al."""
    if not 0 <= c <= n or not 0 < k <= n:
        raise ValueError("numbers that cannot be")
    from math import prod
    return 1 - prod(1 - k / i for i in range(n - c + 1, n + 1))


WRONG = {
    "sampling": [
        ("the prompt is read again for each token", "logits = model(last[:, None], cache=cache)[:, 0]",
         "logits = torch.stack([model(torch.tensor([part[b] + samples[b].tokens]))[0, -1] for b in range(len(part))])"),
        ("padding counts as read", "torch.tensor([len(prompt) - 1 for prompt in part])", "max(map(len, part)) - 1"),
        ("log-probabilities at temperature 1", "(logits / (temperature or 1)).log_softmax", "logits.log_softmax"),
        ("the stop token is dropped", "live.remove(b)", "live.remove(b); s.tokens = s.tokens[:-1] if s.stopped else s.tokens"),
        ("one seed for all", "default_rng(seed) for", "default_rng(seeds[0]) for"),
        ("off by one position", "len(prompt) - 1 for", "len(prompt) for"),
    ],
    "score": [
        ("the gate's sides swapped", "think, act)", "act, think)"),
        ("a gate at every token", "at_gate, gate,", "at_gate | True, gate,"),
        ("the token that stands there, not the next", "batch.tokens[:, 1:]", "batch.tokens[:, :-1]"),
        ("the token not given its gate", "[:, 0] - gate", "[:, 0]"),
        ("act as the log of 1 - q(think)", "logp[:, ~openers].logsumexp(-1)", "(1 - logp[:, openers].exp().sum(-1)).log()"),
    ],
    "by_line": [
        ("off by one token", "batch.line[:, 1:]", "batch.line[:, :-1]"),
        ("off by one line", "== t)", "== t + 1)"),
        ("means for sums", ".sum()", ".mean()"),
        ("rows for programs", "(doc == i)", "(doc[:, :1] == i)"),
        ("the prompt counted with the first line", "batch.line[:, 1:]", "batch.line[:, 1:].clamp(min=0)"),
    ],
    "reward": [
        ("no floor", "torch.maximum(log_pi, torch.tensor(-floor))", "log_pi"),
        ("the floor under all of the reward", "return reward\n", "return reward.clamp(min=-floor)\n"),
        ("c times think, nan where c is infinite", "reward[think] -= c", "reward -= c * think"),
        ("the KL of p from q", "-gate - g * log_leave - (1 - g) * log_stay",
         "leave * (log_leave - g.log()) + (1 - leave) * (log_stay - (1 - g).log())"),
        ("nan where q is sure", "torch.special.entr(g)", "-g * g.log()"),
        ("n for n - 1 other latents", "(n - 1) / n", "1"),
    ],
    "returns": [
        ("horizon + 1", "range(horizon)", "range(horizon + 1)"),
        ("discounted from the first line on", "gamma ** j", "gamma ** (j + 1)"),
        ("the next line first", "range(horizon)", "range(1, horizon + 1)"),
        ("the last line left out", "if t + j < L", "if t + j < L - 1"),
        ("the lines before", "rewards[..., t + j]", "rewards[..., t - j]"),
    ],
    "advantages": [
        ("itself in the baseline", "(G.sum(1, keepdim=True) - G) / (G.shape[1] - 1)", "G.mean(1, keepdim=True)"),
        ("the other programs for the other versions", "(G.sum(1, keepdim=True) - G) / (G.shape[1] - 1)", "G.mean(0, keepdim=True)"),
        ("divided by the deviation", "G - baseline", "(G - baseline) / G.std(1, keepdim=True)"),
        ("all lines in one baseline", "G.sum(1, keepdim=True) - G", "(G.sum(1, keepdim=True) - G).mean(-1, keepdim=True)"),
    ],
    "reinforce": [
        ("a loss that gets worse", "-sum(", "sum("),
        ("off by one token", "batch.line[:, 1:]", "batch.line[:, :-1]"),
        ("a mean for the sum", "return -sum(", "return -1 / batch.scored.sum() * sum("),
        ("each rollout over its length", "advantage[i, t])", "advantage[i, t] / (doc == i).sum())"),
        ("rows for programs", "(doc == i)", "(doc[:, :1] == i)"),
        ("cut off from its gradient", "(log_q *", "(log_q.detach() *"),
    ],
    "anchor": [
        ("q and pi swapped", "q, pi = ", "pi, q = "),
        ("rationales held too", "== ACTION", ">= 0"),
        ("openers kept at gates", "[:, None] & openers", "[:, None] & ~openers & openers"),
        ("openers taken away at every token", "(action & at_gate)", "action"),
        ("a mean for the sum", ".sum()", ".mean()"),
    ],
    "pack": [
        ("< for <=", "<= length:", "< length:"),
        ("the shortest first", ", reverse=True", ""),
        ("only the last row is tried", "for row in rows:", "for row in rows[-1:]:"),
        ("a row too long is let through", "if traces and len(traces[order[0]].tokens) > length", "if False"),
    ],
    "grpo": [
        ("divided by the group's deviation", "rewards - mean[:, None]", "(rewards - mean[:, None]) / (rewards.std(1, keepdim=True) + 1e-6)"),
        ("the mean of all groups", "rewards.mean(dim=1)", "rewards.mean().expand(len(rewards))"),
        ("clip bounds swapped", "max=1 + high), ratio.clamp(min=1 - low)", "max=1 + low), ratio.clamp(min=1 - high)"),
        ("clipped on both sides always", "ratio.clamp(max=1 + high), ratio.clamp(min=1 - low)", "ratio.clamp(1 - low, 1 + high), ratio.clamp(1 - low, 1 + high)"),
        ("a mean over tokens", ".sum()", ".mean()"),
        ("the wrong sign", "return -(gain", "return (gain"),
        ("the ratio upside down", "logp - old", "old - logp"),
    ],
    "pass_at_k": [
        ("biased: as if drawn with replacement", "prod(1 - k / i for i in range(n - c + 1, n + 1))", "(1 - c / n) ** k"),
        ("all k right", "1 - prod(1 - k / i for i in range(n - c + 1, n + 1))", "prod(max(c - i, 0) / (n - i) for i in range(k))"),
        ("one factor short", "range(n - c + 1", "range(n - c + 2"),
        ("k > n goes through", "0 < k <= n", "0 < k"),
        ("0 right samples are 0 of 0", "if not 0 <= c", "if not 0 < c"),
    ],
    "e_update": [
        ("a mean over each pass", "yield learned", "yield 1 / len(part) * learned"),
        ("no trust region", "cfg.e_anchor * anchor", "0 * anchor"),
        ("gates by the advantages", "gates, W, batch", "gates, A, batch"),
        ("q judges itself", "batch, pi_token, cfg)", "batch, token.detach(), cfg)"),
        ("a baseline over all programs", "advantages(G)", "advantages(G.flatten(0, 1)[None])"),
        ("no horizon", "cfg.horizon", "10 ** 6"),
    ],
}
