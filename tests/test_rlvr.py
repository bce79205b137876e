"""GRPO: the loss against its formula written as loops, its expected gradient against the exact one by enumeration."""
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import elbo
import rlvr
from bench import Problem
from elbo import ACTION
from model import GPT, GPTConfig, Sample


def test_the_loss_is_the_clipped_surrogate_token_by_token():
    torch.manual_seed(0)
    logp, old, A = -torch.rand(24) * 2, -torch.rand(24) * 2, torch.randn(24)
    total = 0.0
    for i in range(24):
        ratio = float((logp[i] - old[i]).exp())
        total -= min(ratio * float(A[i]), min(max(ratio, 1 - 0.2), 1 + 0.28) * float(A[i]))
    assert rlvr.grpo_loss(logp, old, A).item() == pytest.approx(total, rel=1e-5)


def test_a_ratio_past_its_bound_earns_no_more_gradient_and_one_that_must_come_back_does():
    logp = torch.tensor([0.26, -0.3, 0.26, -0.3], requires_grad=True)            # exp: 1.30, 0.74
    rlvr.grpo_loss(logp, torch.zeros(4), torch.tensor([1.0, -1.0, -1.0, 1.0])).backward()
    assert logp.grad[:2].abs().max() == 0 and logp.grad[2] > 0 and logp.grad[3] < 0
    inside = torch.tensor([0.24], requires_grad=True)                            # 1.27: above 1.2, below 1.28: clip-higher
    rlvr.grpo_loss(inside, torch.zeros(1), torch.ones(1)).backward()
    assert inside.grad.item() < 0


def test_group_advantages():
    r = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert rlvr.group_advantages(r).tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]
    assert rlvr.has_signal(r).tolist() == [True, False]


def test_the_expected_gradient_points_where_the_exact_one_does():
    """One token, three choices, groups of three: over all 27 groups, E[gradient] = (G - 1)/G * d/dtheta E[r]."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    p = theta.softmax(-1)
    exact = torch.autograd.grad((p * reward).sum(), theta)[0]
    expected = torch.zeros(3, dtype=torch.float64)
    for group in itertools.product(range(3), repeat=3):
        g = torch.tensor(group)
        logp = theta.log_softmax(-1)[g]
        A = rlvr.group_advantages(reward[g][None])[0]
        loss = rlvr.grpo_loss(logp, logp.detach(), A) / 3
        expected -= p[g].prod().item() * torch.autograd.grad(loss, theta)[0]
    torch.testing.assert_close(expected, exact * 2 / 3)


def test_the_policy_scores_what_it_sampled():
    """Log-probabilities noted while sampling with a cache equal those of the training pass: the first ratio is one."""
    from model import generate
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=30, d_model=16, n_layer=2, n_head=2, n_kv_head=1, head_dim=8, d_ff=32, context=64, eos_id=29))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]] * 3
    samples = generate(model, prompts, max_new_tokens=20, seeds=[[0, i] for i in range(9)])
    batch = elbo.collate([rlvr.as_trace(p, s) for p, s in zip(prompts, samples)])
    logp = elbo.token_logprobs(model, batch)
    noted = torch.cat([torch.tensor(s.logprobs) for s in samples])
    torch.testing.assert_close(logp.detach(), noted, rtol=1e-4, atol=1e-4)
    assert any(s.stopped for s in samples) and (batch.tokens[:, 1:] == 29)[batch.kind[:, 1:] == ACTION].any()   # the stop is trained


def test_an_unfinished_sample_is_trace_like_any_other():
    t = rlvr.as_trace([1, 2], Sample([3, 4], [-1.0, -2.0], False))
    assert t.tokens == [1, 2, 3, 4] and t.kind == [0, 0, ACTION, ACTION]


def test_what_is_watched_says_how_far_trainer_and_sampler_are_apart():
    """Samples noted with likelihoods that are wrong by known factors: no token of a dead group counts."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, n_kv_head=1, head_dim=8, d_ff=32, context=64, eos_id=29))
    enc = SimpleNamespace(encode_ordinary=lambda text: [1, 2])
    drawn, factors = [], [1.0, 1.25, 1.3, 0.85, 0.75]
    for i in range(4):
        logp = model(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]))[0].log_softmax(-1)
        old = [float(logp[1 + j, 3 + j]) - math.log(f if i < 2 else 9.0) for j, f in enumerate(factors)]
        drawn.append(Sample([3, 4, 5, 6, 7], old, True))
    with mock.patch.object(rlvr, "attempt", lambda *a, **how: (drawn, [1, 0, 1, 1])):
        stats = rlvr.rl_update(model, torch.optim.SGD(model.parameters(), lr=0.1), enc, [Problem("a", "a"), Problem("b", "b")], list(range(4)),
                               None, rlvr.RLVRConfig(rl_group=2), micro_batch=1)
    assert stats["ratio"] == pytest.approx((0 + 0.25 + 0.3 + 0.15 + 0.25) / 5, rel=1e-3) and stats["clipped"] == pytest.approx(2 / 5)
