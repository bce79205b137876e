"""RL with verifiable rewards: GRPO on problems with tests (paper, section 3; Shao et al. 2024; Yu et al. 2025 for the details).

The policy writes a group of programs for each problem, the sandbox runs them against the tests, and

    A_i   = r_i - mean(r of the group)                                    r_i = 1 if all tests pass, else 0
    loss  = - 1/N sum_{i, t} min( rho A_i, clip(rho, 1 - low, 1 + high) A_i ),     rho = pi(token) / pi_old(token)

over the N sampled tokens of all groups that carry a signal, of all ranks and micro-batches: few such groups make a noisier step, not a smaller one.

Details, and where they come from:
 1. Advantages have the mean subtracted only; dividing by the group's deviation favours problems that are nearly solved or
    nearly hopeless (Liu et al. 2025). `z_score=True` brings it back.
 2. Clip-higher: the upper bound is wider, so that rare tokens can grow (DAPO).
 3. Token-level normalisation over the global batch, not per sample: long samples are not favoured (DAPO).
 4. Groups in which all samples earn the same carry no signal; they are dropped, and their share is reported.
 5. No KL to a reference by default; the k3 estimator (Schulman) is an option.
 6. One update per batch of samples: the ratio is 1 up to rounding, and the clip a safeguard.
 7. Samples are drawn at temperature 1 without filters, and just that distribution is scored.
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import elbo
from bench import attempt
from elbo import ACTION, PROMPT, Batch, Trace, chunks
from model import GPT, Sample, encode_prompt
from sandbox import Sandbox


def as_trace(prompt: list[int], sample: Sample) -> Trace:
    """The sampled program as a Trace: all of it is the policy's action, comments too."""
    out = Trace()
    out.add(prompt, PROMPT)
    out.add(sample.tokens, ACTION, 0)
    return out


def group_advantages(rewards: Tensor, z_score: bool = False) -> Tensor:
    """A = r - mean over the group, (P, G) -> (P, G); with z_score divided by the group's standard deviation."""
    A = rewards - rewards.mean(1, keepdim=True)
    return A / (rewards.std(1, keepdim=True, correction=0) + 1e-6) if z_score else A


def has_signal(rewards: Tensor) -> Tensor:
    """(P,) bool: groups whose samples do not all earn the same."""
    return (rewards != rewards[:, :1]).any(1)


def token_logprobs(model, batch: Batch) -> Tensor:
    """log pi of every token given those before it: (B, T - 1), at temperature 1, 0 outside of actions."""
    logp = -F.cross_entropy(elbo.logits_of(model, batch).float(), batch.tokens[:, 1:][batch.scored], reduction="none")   # (N,)
    return logp.new_zeros(batch.scored.shape).masked_scatter(batch.scored, logp)                        # (B, T-1)


def grpo_loss(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.28,
              reference: Tensor | None = None, kl: float = 0.0) -> Tensor:
    """Summed clipped surrogate over sampled tokens; divide by their number over all ranks and micro-batches.

    logp, old, mask, reference: (B, T - 1); advantage: (B,). With `kl`, adds kl * k3, k3 = exp(d) - 1 - d, d = reference - logp.
    """
    ratio = (logp - old).exp()
    A = advantage[:, None]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    out = -(surrogate * mask).sum()
    if kl:
        d = reference - logp
        out = out + kl * ((d.exp() - 1 - d) * mask).sum()
    return out


# --------------------------------------------------------------------------------------------------------------- the loop


def grpo(run, stage: str, model: GPT, data, box: Sandbox, evaluate):
    """GRPO on data.rl_problems; evaluate(model) -> float gives the curve on held-out problems. Trains `model` in place."""
    s = run.s
    optimizer = run.optimizer(torch.optim.Adam, model, betas=(0.9, 0.99))
    reference = copy.deepcopy(run.actor(model)).requires_grad_(False) if s.kl else None
    for step in run.steps(stage, model, optimizer, s.rl_steps, s.rl_lr, warmup=5):
        actor = run.actor(model)
        if step % 5 == 0:
            run.log(phase=stage, step=step, greedy=evaluate(actor))
        picked = np.random.default_rng(run.draw("rlvr", step)).choice(len(data.rl_problems), s.rl_problems, replace=False).tolist()
        tries = [(i, k) for i in run.mine(picked) for k in range(s.rl_group)]
        problems = [data.rl_problems[i] for i, _ in tries]
        with run.autocast():
            samples, passed = attempt(actor, data.enc, problems, [run.draw("rlvr", step, i, k) for i, k in tries], box,
                                      max_new_tokens=s.max_new_tokens, batch_size=s.sample_batch)
        rewards = torch.tensor(passed, dtype=torch.float32).view(-1, s.rl_group)                        # (P, G)
        signal = has_signal(rewards)                                                                    # (P,)
        advantage = group_advantages(rewards, s.z_score).flatten().to(run.device)                       # (P * G,)
        used = [i for i in range(len(samples)) if signal[i // s.rl_group]]
        used.sort(key=lambda i: len(samples[i].tokens))                                                 # neighbours pad little

        def micro_batches():
            for part in chunks(used, s.micro_batch):
                batch = elbo.collate([as_trace(encode_prompt(data.enc, problems[i].prompt), samples[i]) for i in part], run.device)
                mask = batch.kind[:, 1:] == ACTION
                old = torch.zeros(mask.shape, device=run.device)
                old[mask] = torch.tensor([logp for i in part for logp in samples[i].logprobs], device=run.device)
                with run.autocast():
                    logp = token_logprobs(model, batch)
                    with torch.no_grad():
                        ref = token_logprobs(reference, batch) if s.kl else None
                yield grpo_loss(logp, old, advantage[part], mask, clip_low=s.clip_low, clip_high=s.clip_high, reference=ref, kl=s.kl)

        norm = run.update(model, optimizer, micro_batches(), sum(len(samples[i].tokens) for i in used))
        right, n, live, groups, cut, length = run.sum(
            sum(passed), len(passed), int(signal.sum()), len(signal), sum(not x.stopped for x in samples), sum(len(x.tokens) for x in samples))
        run.log(phase=stage, step=step, reward=right / n, signal=live / groups, truncated=cut / n, length=length / n, grad_norm=norm,
                show=f"reward {right / n:.0%} groups with signal {live / groups:.0%}")
    run.log(phase=stage, step=s.rl_steps, greedy=evaluate(run.actor(model)))
