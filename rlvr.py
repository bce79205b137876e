"""RL with verifiable rewards: GRPO on problems with tests (paper, section 3; Shao et al. 2024; Yu et al.
2025, DAPO).

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
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

import elbo
from bench import Problem, attempt
from elbo import ACTION, PROMPT, Batch, Trace, chunks
from model import GPT, Sample, encode_prompt
from mstep import optimize, total
from sandbox import Sandbox


@dataclass
class RLVRConfig:
    """What RLVR can be told, with the reason for each default."""
    rl_steps: Annotated[int, "updates of GRPO, from each of the arms; 0: no RLVR"] = 40
    rl_problems: Annotated[int, "problems per update of GRPO"] = 16
    rl_group: Annotated[int, "samples of each problem, whose mean reward is the baseline"] = 8
    rl_lr: Annotated[float, "GRPO's learning rate; at 1e-4 the base learns faster, NTP falls apart"] = 1e-4
    max_new_tokens: Annotated[int, "longest sampled program in tokens; three commented loops take 180"] = 224


def rl_update(model: GPT, optimizer, enc, problems: list[Problem], seeds: list, box: Sandbox, cfg: RLVRConfig,
              micro_batch: int = 32, sample_batch: int = 256) -> dict[str, float]:
    """One update of GRPO, in place, on this rank's share of the problems.

    seeds: one for each sample, G = cfg.rl_group of a problem after the other. Returns what to watch, over all
    ranks: reward, signal (share of groups), truncated (share of samples), length, entropy (nats per token,
    from the samples), the gradient's norm, tokens put through the model.
    """
    G = cfg.rl_group
    asked = [p for p in problems for _ in range(G)]
    samples, passed = attempt(model, enc, asked, seeds, box, max_new_tokens=cfg.max_new_tokens,
                              batch_size=sample_batch)
    rewards = torch.tensor(passed, dtype=torch.float32).view(-1, G)                        # (P, G)
    signal = has_signal(rewards)                                                           # (P,)
    advantage = group_advantages(rewards).flatten().to(model.device)                       # (P * G,)
    used = [i for i in range(len(samples)) if signal[i // G]]
    used.sort(key=lambda i: len(samples[i].tokens))                                    # neighbours pad little
    traces = {i: as_trace(encode_prompt(enc, asked[i].prompt), samples[i]) for i in used}

    def losses():
        for part in chunks(used, micro_batch):
            batch = elbo.collate([traces[i] for i in part], model.device)
            old = [logp for i in part for logp in samples[i].logprobs]                     # N
            A = advantage[part][batch.scored.nonzero()[:, 0]]                              # (N,)
            yield grpo_loss(token_logprobs(model, batch), torch.tensor(old, device=model.device), A)

    norm = optimize(model, optimizer, losses(), sum(len(samples[i].tokens) for i in used))
    sums = dict(samples=len(samples), groups=len(signal), reward=sum(passed), signal=int(signal.sum()))
    sums["truncated"] = sum(not s.stopped for s in samples)
    sums["length"] = sum(len(s.tokens) for s in samples)
    sums["surprise"] = -sum(sum(s.logprobs) for s in samples)
    sums["tokens"] = sums["length"] + 3 * sum(len(t.tokens) for t in traces.values())
    sums = total(sums)
    n = sums["samples"]
    return dict(reward=sums["reward"] / n, truncated=sums["truncated"] / n, length=sums["length"] / n,
                signal=sums["signal"] / sums["groups"], entropy=sums["surprise"] / sums["length"],
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


def token_logprobs(model, batch: Batch) -> Tensor:
    """log pi of each sampled token given those before it, at temperature 1: (N,), row by row."""
    target = batch.tokens[:, 1:][batch.scored]                                                     # (N,)
    return -F.cross_entropy(elbo.logits_of(model, batch).float(), target, reduction="none")


def grpo_loss(logp: Tensor, old: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.28) -> Tensor:
    """Summed clipped surrogate over sampled tokens; divide by their number over all ranks. All (N,)."""
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantage, clipped * advantage).sum()
