"""RLVR: GRPO on problems with tests (paper, section 3; Shao et al. 2024; DAPO, Yu et al. 2025).

The policy writes a group of programs for each problem, the sandbox runs them against the tests, and

    A_i   = r_i - mean(r of the group)                                  r_i = 1 if all tests pass, else 0
    loss  = - 1/N sum_{i, t} min( rho A_i, clip(rho, 1 - low, 1 + high) A_i ), rho = pi(token) / pi_old(token)

over the N sampled tokens of all groups that carry a signal, of all ranks and micro-batches: few such groups
make a noisier step, not a smaller one.

Details, and where they come from:
 1. Advantages have the mean subtracted only; dividing by the group's deviation favours problems that are
    nearly solved or nearly hopeless (Liu et al. 2025).
 2. Clip-higher: the upper bound is wider, so that rare tokens can grow (DAPO). With one update per batch of
    samples the ratio is 1 up to rounding, and the clip a safeguard.
 3. Token-level normalisation over the global batch, not per sample: long samples are not favoured (DAPO).
 4. Groups in which all samples earn the same carry no signal; they are dropped, and their share is reported.
 5. No KL to a reference model (DAPO; Liu et al.).
 6. Samples are drawn at temperature 1 without filters, and just that distribution is scored.
"""
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

import elbo
from bench import Problem, attempt, world
from elbo import ACTION, PROMPT, Trace, chunks
from model import GPT, Sample, encode_prompt, load_pretrained
from mstep import optimize, packed_rows, total
from sandbox import Sandbox

LOW, HIGH = 0.2, 0.28                   # how far below and above 1 the ratio still counts


@dataclass
class RLVRConfig:
    """What RLVR can be told, with the reason for each default."""
    rl_steps: Annotated[int, "updates of GRPO, from each of the arms; 0: no RLVR"] = 40
    rl_problems: Annotated[int, "problems per update of GRPO"] = 16
    rl_group: Annotated[int, "samples of each problem, whose mean reward is the baseline"] = 8
    rl_lr: Annotated[float, "GRPO's learning rate; RA3's best of 3e-5, 1e-4, 3e-4; the base's is 3e-4"] = 1e-4
    max_new_tokens: Annotated[int, "longest sampled program in tokens; three commented loops take 180"] = 224


def rl_update(model: GPT, optimizer, enc, problems: list[Problem], seeds: list, box: Sandbox, cfg: RLVRConfig,
              micro_batch: int = 32, sample_batch: int = 256) -> dict[str, float]:
    """One update of GRPO, in place, on this rank's share of the problems.

    seeds: one for each sample, G = cfg.rl_group of a problem after the other. micro_batch: packed rows per
    pass; sample_batch: samples drawn at a time. Returns what to watch, over all ranks: reward, signal (share
    of groups), truncated (share of samples), length, entropy (nats per token, from the samples), how far
    trainer and sampler are apart (ratio: the mean of |rho - 1|; clipped: share of tokens), the gradient's
    norm, tokens put through the model.
    """
    G, sums = cfg.rl_group, Counter(ratio=0.0, clipped=0)
    asked = [p for p in problems for _ in range(G)]
    samples, passed = attempt(model, enc, asked, seeds, box, max_new_tokens=cfg.max_new_tokens,
                              batch_size=sample_batch)
    rewards = torch.tensor(passed, dtype=torch.float32).view(-1, G)                        # (P, G)
    signal = has_signal(rewards)                                                           # (P,)
    used = [i for i in range(len(samples)) if signal[i // G]]
    advantage = group_advantages(rewards).flatten()[used].to(model.device)                 # (used,)
    traces = [as_trace(encode_prompt(enc, asked[i].prompt), samples[i]) for i in used]
    trained = sum(len(samples[i].tokens) for i in used)

    def losses():
        for rows in chunks(packed_rows(traces, model.limit), micro_batch):
            batch = elbo.collate(traces, model.device, rows)
            old = [logp for row in rows for n in row for logp in samples[used[n]].logprobs]
            old = torch.tensor(old, device=model.device)                                           # (N,)
            A = advantage[batch.doc[:, 1:][batch.scored]]                                          # (N,)
            logp = elbo.token_logprobs(model, batch)                                               # (N,)
            apart = (logp.detach() - old).expm1()
            sums["ratio"] += apart.abs().sum().item()
            sums["clipped"] += ((apart < -LOW) | (apart > HIGH)).sum().item()
            yield grpo_loss(logp, old, A)

    norm = optimize(model, optimizer, losses(), trained)
    sums.update(
        samples=len(samples), groups=len(signal), reward=sum(passed), signal=int(signal.sum()),
        truncated=sum(not s.stopped for s in samples), length=sum(len(s.tokens) for s in samples),
        surprise=-sum(sum(s.logprobs) for s in samples), trained=trained)
    sums["tokens"] = sums["length"] + 3 * sum(len(t.tokens) for t in traces)
    sums = total(sums)
    share = {name: sums[name] / sums["samples"] for name in ("reward", "truncated", "length")}
    share |= {name: sums[name] / max(sums["trained"], 1) for name in ("ratio", "clipped")}
    return dict(share, signal=sums["signal"] / sums["groups"], entropy=sums["surprise"] / sums["length"],
                grad_norm=norm, tokens=sums["tokens"])


def group_advantages(rewards: Tensor) -> Tensor:
    """A = r - mean over the group: (P, G) -> (P, G)."""
    return rewards - rewards.mean(1, keepdim=True)


def has_signal(rewards: Tensor) -> Tensor:
    """(P,) bool: groups whose samples do not all earn the same."""
    return (rewards != rewards[:, :1]).any(1)


def as_trace(prompt: list[int], sample: Sample) -> Trace:
    """The sampled program as a Trace: all of it is the policy's action, comments too."""
    out = Trace()
    out.add(prompt, PROMPT)
    out.add(sample.tokens, ACTION, 0)
    return out


def grpo_loss(logp: Tensor, old: Tensor, advantage: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Summed clipped surrogate over sampled tokens; divide by their number over all ranks. All (N,)."""
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantage, clipped * advantage).sum()


def demo():
    """Print a group of sampled programs with rewards and advantages, and their clipped loss."""
    model, enc = load_pretrained(Path(__file__).parent / "base")
    [problem] = world("train", 1, seed=0)
    with Sandbox(workers=1) as box:
        samples, passed = attempt(model, enc, [problem] * 8, range(8), box, max_new_tokens=128)
    A = group_advantages(torch.tensor([passed]).float())[0]                                        # (8,)
    print(problem.prompt)
    for sample, reward, advantage in zip(samples, passed, A):
        print(f"{enc.decode(sample.tokens[:-1])}    reward {reward:d}, advantage {advantage:+.3f}")
    traces = [as_trace(encode_prompt(enc, problem.prompt), sample) for sample in samples]
    logp = elbo.token_logprobs(model, elbo.collate(traces)).detach()                               # (N,)
    old = torch.tensor([logp for sample in samples for logp in sample.logprobs])                   # (N,)
    A = A.repeat_interleave(torch.tensor([len(sample.tokens) for sample in samples]))              # (N,)
    losses = [grpo_loss(old + math.log(ratio), old, A) / len(A) for ratio in (0.5, 1.0, 1.5)]
    print("clipped loss if all ratios were 0.5, 1.0 and 1.5:", *(f"{loss:+.3f}" for loss in losses))
    print("check, it scores just what it sampled:", torch.allclose(logp, old, atol=1e-3))


if __name__ == "__main__":
    demo()
