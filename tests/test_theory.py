"""Section 3 of the paper as checks on small tabular problems: why mid-training should live in a space of action abstractions."""
import math

import numpy as np
import pytest


def random_mdp(rng, states=6, actions=8):
    """P (S, A, S), r (S, A) in [0, 1]."""
    P = rng.dirichlet(np.ones(states) * 0.3, size=(states, actions))
    return P, rng.random((states, actions))


def value(P, r, gamma, policy=None, allowed=None):
    """State values: of a policy (S,), or the best over the allowed actions."""
    V = np.zeros(len(r))
    for _ in range(2000):
        Q = r + gamma * P @ V
        if policy is not None:
            new = Q[np.arange(len(r)), policy]
        else:
            new = Q[:, allowed].max(1) if allowed is not None else Q.max(1)
        if np.abs(new - V).max() < 1e-12:
            break
        V = new
    return V


def test_regret_splits_into_pruning_and_learning():
    """E[V* - V^pi] = E[Delta(M, Z')] + E[V*_{Z'} - V^pi] over tasks that share dynamics; both terms are never negative, and both matter."""
    rng = np.random.default_rng(0)
    P, _ = random_mdp(rng)
    tasks = [rng.random((6, 8)) for _ in range(50)]
    for keep in ([0, 3], [1, 2, 5], list(range(8))):
        total = pruning = learning = 0.0
        for r in tasks:
            best, inside = value(P, r, 0.9)[0], value(P, r, 0.9, allowed=keep)[0]
            policy = np.array([keep[i] for i in rng.integers(len(keep), size=6)])       # a poor learner, inside Z'
            mine = value(P, r, 0.9, policy=policy)[0]
            total, pruning, learning = total + best - mine, pruning + best - inside, learning + inside - mine
        assert total == pytest.approx(pruning + learning)
        assert learning >= -1e-9
        assert pruning == pytest.approx(0, abs=1e-6) if len(keep) == 8 else pruning > 0.5


def test_the_pruning_bound_holds_and_is_not_vacuous():
    """With n = (|Z_eps| log |Z| + log 1/delta) / sigma demonstrations all (eps, sigma)-suboptimal subsets are pruned, but for delta.

    A task is drawn; the expert shows its best action; a subset survives if it holds a best action of every demonstrated task.
    Here Z = 12 actions, subsets of 2, and a subset is (0, sigma)-suboptimal if it fails at least sigma of all tasks.
    """
    from itertools import combinations
    rng = np.random.default_rng(1)
    n_actions, size, sigma, delta = 12, 2, 0.2, 0.1
    best = np.array([0.50, 0.35] + [0.015] * (n_actions - 2))                           # chance that an action is a task's best
    subsets = [s for s in combinations(range(n_actions), size)]
    bad = [s for s in subsets if 1 - best[list(s)].sum() >= sigma]
    good = [s for s in subsets if s not in bad]
    assert good and len(bad) > 30

    def failure(n, trials=2000):
        fails = 0
        for _ in range(trials):
            shown = set(rng.choice(n_actions, size=n, p=best).tolist())
            fails += any(shown <= set(s) for s in bad)
        return fails / trials
    n = math.ceil((size * math.log(n_actions) + math.log(1 / delta)) / sigma)
    assert failure(n) <= delta
    assert failure(3) > delta                                           # with a few demonstrations it does fail


def options_iterations(length: int, gamma: float, eps: float, states: int = 40) -> tuple[int, float]:
    """Iterations of value iteration over options of `length` steps on a ring until eps-optimal, and gamma_bar = gamma ** length.

    An option walks `length` states forward or back; a step pays at most 1 - gamma, so that values stay below R_max = 1.
    """
    rng = np.random.default_rng(0)
    r = rng.random((states, 2)) * (1 - gamma)
    reward, target = np.zeros((states, 2)), np.zeros((states, 2), dtype=int)
    for s in range(states):
        for a, step in enumerate((1, -1)):
            at, total = s, 0.0
            for t in range(length):
                total, at = total + gamma ** t * r[at, a], (at + step) % states
            reward[s, a], target[s, a] = total, at
    bar, V = gamma ** length, np.zeros(states)
    best = np.zeros(states)
    for _ in range(20_000):
        best = (reward + bar * best[target]).max(1)
    n = 0
    while np.abs(V - best).max() > eps:
        V, n = (reward + bar * V[target]).max(1), n + 1
    return n, bar


def test_longer_options_converge_in_fewer_iterations_within_the_bound():
    gamma, eps, counts = 0.99, 0.01, []
    for length in (1, 2, 4, 8, 16):
        n, bar = options_iterations(length, gamma, eps)
        bound = 1 / (1 - bar) * math.log(1 / (eps * (1 - bar)))
        assert n <= bound
        counts.append(n)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 10 * counts[-1]                                  # 16 steps at a time: about a sixteenth of the iterations
