"""RL with verifiable rewards: GRPO on problems with tests (paper, section 3; Shao et al. 2024; Yu et al. 2025 for the details).

The policy writes a group of programs for each problem, the sandbox runs them against the tests, and

    A_i   = r_i - mean(r of the group)                                    r_i = 1 if all tests pass, else 0
    loss  = - 1/N sum_{i, t} min( rho A_i, clip(rho, 1 - low, 1 + high) A_i ),     rho = pi(token) / pi_old(token)

over the N sampled tokens of the whole step, all ranks and micro-batches counted.

Details, and where they come from:
 1. Advantages have the mean subtracted only; dividing by the group's deviation favours problems that are nearly solved or
    nearly hopeless (Liu et al. 2025). `z_score=True` brings it back.
 2. Clip-higher: the upper bound is wider, so that rare tokens can grow (DAPO).
 3. Token-level normalisation over the global batch, not per sample: long samples are not favoured (DAPO).
 4. Groups in which all samples earn the same carry no signal; they are dropped, and their share is reported.
 5. No KL to a reference by default; the k3 estimator (Schulman) is an option.
 6. Samples are drawn at temperature 1 without filters, and just that distribution is scored.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from elbo import ACTION, PROMPT, Batch, Trace
from model import Sample


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
    logits = model(batch.tokens[:, :-1]).float()                                                        # (B, T-1, V)
    logp = -F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    return torch.where(batch.kind[:, 1:] == ACTION, logp.view(len(batch), -1), 0.0)


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
