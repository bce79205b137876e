"""Each update of training recomputed by hand, from the paper's formulas, a token at a time, and with SGD.
Then the loops: what must stay frozen from step to step, what must be drawn anew."""
import copy
import dataclasses
import json
import math
import pathlib
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

import bench
import elbo
import estep
import mstep
import rlvr
import train
from elbo import ACTION, FORCED, FREE, LATENT, PROMPT, Trace
from model import GPT, GPTConfig, Sample

# Five texts, two of which open a comment, and the end of the document.
END, OPENERS, OTHERS = 5, [0, 4], [1, 2, 3, 5]
ENC = tiktoken.Encoding("tiny", pat_str=r"##|[\s\S]", special_tokens={"<|endoftext|>": END},
                        mergeable_ranks={b"#": 0, b"\n": 1, b"a": 2, b"x": 3, b"##": 4})
MASK, LR, K = elbo.opener_mask(ENC), 0.3, 3
E = estep.EStepConfig(e_rollouts=K, e_anchor=0.5, c=0.3, broken_cost=0.7, floor=5.0,
                      horizon=2, gamma=0.5, explore=0.2, max_rationale=5, max_comments=2)
RL = rlvr.RLVRConfig(rl_group=K, max_new_tokens=9)
PROGRAMS = [elbo.parse(ENC, "a\n", text, END) for text in ("x\na\nxx\n", "a\n", "ax\nx\nx\na\n")]
PROBLEMS = [bench.Problem(str(i), prompt) for i, prompt in enumerate(("a\n", "xa\n", "x\n", "aax\n"))]


def tiny(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=6, d_model=12, n_layer=1, n_head=2, n_kv_head=1, head_dim=6, d_ff=16,
                          context=64, eos_id=END))
    for p in model.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return model.double()


def same(a: GPT, b: GPT) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def infused(seed: int) -> list[Trace]:
    """Programs of unequal length with rationales."""
    return estep.rollout(tiny(0), ENC, PROGRAMS * 2, [[seed, i] for i in range(6)], MASK, E)


def predictions(model: GPT, tokens: list[int]):
    """log p of each token of the vocabulary after each token but the last: (T - 1, V)."""
    return model(torch.tensor([tokens]))[0, :-1].log_softmax(-1)


def in_two(logp, token: int, gate: int):
    """log p(token) as the gate's choice, and as the token given that choice."""
    if not gate:
        return torch.tensor(0.0), logp[token]
    choice = logp[OPENERS if token in OPENERS else OTHERS].exp().sum().log()
    return choice, logp[token] - choice


def check_step(before: GPT, after: GPT, loss, norm: float):
    """`after` is `before`, with which `loss` was computed, after one SGD step, clipped at norm 1."""
    params = list(before.parameters())
    grads = torch.autograd.grad(loss, params)
    length = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert norm == pytest.approx(length, rel=1e-4)
    for p, new, g in zip(params, after.parameters(), grads):
        torch.testing.assert_close(new - p, -LR * g / max(length, 1.0), rtol=1e-3, atol=1e-5 * LR)


# ------------------------------------------------------------------------------------------------- the E-step


def version_by_hand(q: GPT, pi: GPT, t: Trace) -> SimpleNamespace:
    """Of one infused program, by line: log q of its latents, reward, return; and its part of the anchor."""
    n = t.line[-1] + 1
    v = SimpleNamespace(gates=[0.0] * n, text=[0.0] * n, log_pi=[0.0] * n, think=[False] * n, anchor=0.0)
    ours, theirs = predictions(q, t.tokens), predictions(pi, t.tokens)
    for i, (token, kind, line, gate) in enumerate(zip(t.tokens, t.kind, t.line, t.gate)):
        if kind == PROMPT:
            continue
        choice, word = in_two(ours[i - 1], token, gate)
        if gate == FREE:
            v.gates[line] += choice
        if kind == LATENT:
            v.text[line] += word
            v.think[line] = True
        if kind == ACTION:
            v.log_pi[line] += in_two(theirs[i - 1], token, gate)[1].item()
            words = OTHERS if gate else OPENERS + OTHERS
            a, b = theirs[i - 1][words].softmax(0), ours[i - 1][words].softmax(0)
            v.anchor += (a * (a / b).log()).sum()
    v.rewards = [max(v.log_pi[i], -E.floor) - E.c * v.think[i] - E.broken_cost * (i in t.broken) for i in range(n)]
    v.returns = [sum(E.gamma ** j * r for j, r in enumerate(v.rewards[i:i + E.horizon])) for i in range(n)]
    return v


def e_step_by_hand(versions: list[SimpleNamespace]):
    """The loss of an E-step on K versions of each program."""
    loss = 0.0
    for group in elbo.chunks(versions, K):
        n = len(group[0].rewards)
        begins = [i for i in range(n) if i == 0 or 2 * sum(v.think[i] for v in group) > K]
        for begin, end in zip(begins, [*begins[1:], n]):                  # in each piece the gates follow who earned most
            earned = np.array([sum(v.rewards[begin:end]) for v in group]) / estep.TAU
            odds = np.exp(earned - earned.max())
            for v, w in zip(group, odds / odds.sum()):
                loss -= estep.GATE * K * w * sum(v.gates[begin:end])
        for v in group:
            for i in range(len(v.returns)):
                baseline = sum(other.returns[i] for other in group if other is not v) / (K - 1)
                loss -= v.text[i] * (v.returns[i] - baseline)
            loss += E.e_anchor * v.anchor
    return loss / len(versions)


def test_two_e_steps_are_what_the_formula_says():
    q, pi, drawn, gates, sampled = tiny(5), tiny(6), [], set(), estep.rollout
    optimizer = torch.optim.SGD(q.parameters(), lr=LR)

    def rollout(model, enc, versions, given, openers, cfg, *how):
        assert model is q and versions == [p for p in PROGRAMS for _ in range(K)]
        assert given == seeds and cfg is E
        drawn.append(sampled(model, enc, versions, given, openers, cfg, *how))
        return drawn[-1]
    for step in range(2):
        before, seeds = copy.deepcopy(q), [[step, i] for i in range(9)]
        with mock.patch.object(estep, "rollout", rollout):                # passes of two programs and of one
            stats = estep.e_update(q, pi, optimizer, ENC, MASK, PROGRAMS, seeds, E, micro_batch=7)
        versions = [version_by_hand(before, tiny(6), t) for t in drawn[-1]]
        check_step(before, q, e_step_by_hand(versions), stats["grad_norm"])
        lines, thinks = sum(len(v.think) for v in versions), sum(sum(v.think) for v in versions)
        assert stats["reward"] == pytest.approx(sum(sum(v.rewards) for v in versions) / lines, rel=1e-4)
        assert stats["loglik"] == pytest.approx(sum(sum(v.log_pi) for v in versions) / lines, rel=1e-4)
        assert stats["think"] == pytest.approx(thinks / lines)
        assert stats["broken"] == pytest.approx(sum(len(t.broken) for t in drawn[-1]) / thinks)
        assert stats["length"] == pytest.approx(sum(t.kind.count(LATENT) for t in drawn[-1]) / thinks)
        assert {lp < -E.floor for v in versions for lp in v.log_pi} == {True, False}
        for t in drawn[-1]:
            later = [line == before for line, before in zip(t.line, [None, *t.line])]
            gates |= set(zip(t.kind, t.gate, later))
    # There was to be told apart: a forced gate, a line's first gate and others, both openers, new draws.
    assert gates > {(LATENT, FREE, False), (LATENT, FREE, True),
                    (ACTION, FREE, False), (ACTION, FREE, True), (ACTION, FORCED, True)}
    assert all(any(token in t.tokens for t in drawn[0]) for token in OPENERS)
    assert drawn[0] != drawn[1] and same(pi, tiny(6))


# ----------------------------------------------------------------------------------------- M-step and packing


def test_two_m_steps_are_what_the_formula_says():
    """And the held-out measure: all nats over all tokens, whatever the batches."""
    model = tiny(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for seed in range(2):
        before, batch, nats, n, action_nats, actions = copy.deepcopy(model), infused(seed), 0.0, 0, 0.0, 0
        stats = mstep.m_update(model, optimizer, batch, micro_batch=1)
        for t in batch:
            logp = predictions(before, t.tokens)
            for i, kind in enumerate(t.kind):
                if kind in (LATENT, ACTION):
                    nats, n = nats - logp[i - 1, t.tokens[i]], n + 1
                if kind == ACTION:
                    action_nats -= in_two(logp[i - 1], t.tokens[i], t.gate[i])[1].item()
                    actions += 1
        check_step(before, model, nats / n, stats["grad_norm"])
        assert stats["loss"] == pytest.approx((nats / n).item(), rel=1e-5)
        assert stats["tokens"] == 3 * sum(len(t.tokens) for t in batch)
        assert len(mstep.pack(batch, max(len(t.tokens) for t in batch))) > 1           # passes
        for size in (1, 4, 99):
            nll = mstep.action_nll(before, batch, MASK, size)
            assert nll == pytest.approx(action_nats / actions, rel=1e-5)


def test_the_longest_go_first_and_what_just_fits_fits():
    of_length = [Trace(tokens=[0] * n) for n in (4, 6, 3, 5, 2, 10)]
    assert mstep.pack(of_length, 10) == [[5], [1, 0], [3, 2, 4]]


# ------------------------------------------------------------------------------------------------------- RLVR

PASSED = [1, 0, 0] + [0, 0, 0] + [1, 1, 0] + [1, 1, 1]                     # the second and the last are dead


def samples(model: GPT) -> list[Sample]:
    """K of each problem, drawn from a policy that differs from the model, token by token, by a factor."""
    g, out = torch.Generator().manual_seed(0), []
    for i in range(len(PASSED)):
        prompt = ENC.encode(PROBLEMS[i // K].prompt)
        tokens = torch.randint(0, 6, (2 + i % 4,), generator=g).tolist()
        logp = predictions(model, prompt + tokens)[len(prompt) - 1:].detach()
        factors = [(0.7, 1.0, 1.25, 1.4)[(i + j) % 4] for j in range(len(tokens))]     # 1.25: inside of 1.28
        old = [float(lp[token]) - math.log(f) for lp, token, f in zip(logp, tokens, factors)]
        out.append(Sample(tokens, old, stopped=i % 5 > 0))
    return out


def attempts(wanted: list[Sample], passed: list[int]):
    """In place of `attempt`: for the seed i sample i of all."""
    def attempt(model, enc, asked, seeds, box, max_new_tokens, batch_size):
        assert asked == [PROBLEMS[i // K] for i in seeds] and max_new_tokens == 9
        return [wanted[i] for i in seeds], [bool(passed[i]) for i in seeds]
    return mock.patch.object(rlvr, "attempt", attempt)


def test_an_rl_step_is_what_the_formula_says():
    model, seeds = tiny(0), range(len(PASSED))
    before, drawn = copy.deepcopy(model), samples(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with attempts(drawn, PASSED):
        stats = rlvr.rl_update(model, optimizer, ENC, PROBLEMS, seeds, None, RL, micro_batch=4)
    loss, live, trained, ratios = 0.0, 0, 0, []
    for i, s in enumerate(drawn):
        group, prompt = PASSED[i // K * K:][:K], ENC.encode(PROBLEMS[i // K].prompt)
        if sum(group) in (0, K):
            continue
        advantage = PASSED[i] - sum(group) / K
        logp = predictions(before, prompt + s.tokens)[len(prompt) - 1:]
        for lp, token, old in zip(logp, s.tokens, s.logprobs):
            ratio = (lp[token] - old).exp()
            loss -= torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            ratios.append(ratio.item())
        live, trained = live + len(s.tokens), trained + len(prompt + s.tokens)
    check_step(before, model, loss / live, stats.pop("grad_norm"))
    total = sum(len(s.tokens) for s in drawn)
    assert stats == pytest.approx(dict(
        reward=6 / 12, signal=2 / 4, truncated=sum(not s.stopped for s in drawn) / 12, length=total / 12,
        ratio=sum(abs(r - 1) for r in ratios) / live, clipped=sum(not 0.8 <= r <= 1.28 for r in ratios) / live,
        entropy=-sum(sum(s.logprobs) for s in drawn) / total, tokens=total + 3 * trained))
    moved = copy.deepcopy(model)
    with attempts(drawn, [1] * 12):                                        # all groups dead
        stats = rlvr.rl_update(model, optimizer, ENC, PROBLEMS, seeds, None, RL)
    assert (stats["signal"], stats["grad_norm"]) == (0.0, 0.0) and same(model, moved)


# ------------------------------------------------------------------------------ the step, on one rank and two


def test_a_step_is_on_the_sum_of_the_losses_over_the_count():
    model = torch.nn.Linear(2, 1, bias=False).double()
    x, y = torch.tensor([3.0, 4.0]).double(), torch.tensor([0.0, 1.0]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.data.zero_()
    model.weight.grad = torch.full((1, 2), 99.0).double()                  # left over from elsewhere
    norm = mstep.optimize(model, optimizer, (model(v).sum() for v in (x, y)), 20)
    assert norm == pytest.approx(math.hypot(0.15, 0.25))
    assert model.weight.tolist()[0] == pytest.approx([-0.15, -0.25])
    assert mstep.optimize(model, optimizer, [model(x).sum()], 1) == pytest.approx(5.0)
    assert model.weight.tolist()[0] == pytest.approx([-0.75, -1.05], abs=1e-5)             # clipped
    before = copy.deepcopy(model)
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="diverged"):
            mstep.optimize(model, optimizer, [model(x).sum() * bad], 1)
    assert mstep.optimize(model, optimizer, [model(x).sum()], 0) == 0.0 and same(model, before)


def masters_by_hand() -> GPT:
    """A bfloat16 model after some steps with masters, which are those of a float32 optimizer, rounded."""
    model = tiny(0).bfloat16()
    exact = [p.detach().float() for p in model.parameters()]
    ours = mstep.Masters(torch.optim.Adam, model.parameters(), "cpu", lr=1.0, betas=(0.9, 0.99))
    adam = torch.optim.Adam(exact, lr=1.0, betas=(0.9, 0.99))
    for step in range(8):
        torch.manual_seed(step)
        for p, master in zip(model.parameters(), exact):
            p.grad = torch.randn_like(p)
            master.grad = p.grad.float()
        for optimizer in (ours, adam):
            optimizer.param_groups[0]["lr"] = 1e-4 * (1 + step)
            optimizer.step()
        assert all(torch.equal(p, master.bfloat16()) for p, master in zip(model.parameters(), exact))
    assert not same(model, tiny(0).bfloat16())
    return model


def test_masters_are_a_float32_optimizer_and_a_rounding():
    masters_by_hand()


def all_updates(rank: int, ranks: int) -> dict:
    """{name: (what it reports, the weights after it)} of every update, on this rank's share of its batch."""
    def e(q, optimizer):
        seeds = [[i, k] for i in range(3)[rank::ranks] for k in range(K)]
        return estep.e_update(q, tiny(1), optimizer, ENC, MASK, PROGRAMS[rank::ranks], seeds, E, 3)

    def m(model, optimizer):
        return mstep.m_update(model, optimizer, infused(0)[rank::ranks], 1)

    def rl(model, optimizer):                                  # of two ranks the second has dead groups alone
        seeds = [K * i + k for i in range(4)[rank::ranks] for k in range(K)]
        with attempts(samples(model), PASSED):
            return rlvr.rl_update(model, optimizer, ENC, PROBLEMS[rank::ranks], seeds, None, RL, 2)

    def no_signal(model, optimizer):                            # after a step, which momentum would repeat
        return m(model, optimizer) | dict(norm=mstep.optimize(model, optimizer, [], 0))

    def nll(model, optimizer):
        return dict(nll=mstep.action_nll(model, infused(0)[rank::ranks], MASK, 2))
    out = {"masters": ({}, list(masters_by_hand().parameters()))}
    for work in (e, m, rl, no_signal, nll):
        model = tiny(0)
        stats = work(model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))
        out[work.__name__] = stats, [p.detach() for p in model.parameters()]
    return out


def one_of_two(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=60), 2, rank)
    torch.save(all_updates(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_do_what_one_does(tmp_path):
    spawn(one_of_two, (str(tmp_path),), nprocs=2)
    one, two, again = all_updates(0, 1), *(torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, (stats, weights) in one.items():
        assert two[name][0] == again[name][0] == pytest.approx(stats, rel=1e-4), name
        torch.testing.assert_close(two[name][1], weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(two[name][1], again[name][1], rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------- the loops

SMALL = ("--e-steps 6 --e-programs 4 --e-rollouts 2 --rl-steps 6 --rl-problems 4 --rl-group 2 --m-programs 4 "
         "--m-steps 100 --e-lr 0.1 --rl-lr 0.1 --m-lr 0.1").split()


def new_run(folder, *flags: str) -> train.Run:
    folder.mkdir(exist_ok=True)
    return train.Run(train.parse_flags([*SMALL, *flags]), folder)


def steps_of(loop, folder, *args, seed=0, stage="stage", rank=0, ranks=1) -> list[SimpleNamespace]:
    """What a loop gives to its update, step by step: the items, each with its seeds, and the rate."""
    run, model, seen = new_run(folder / f"{stage}{seed}{rank}{ranks}", "--seed", str(seed)), tiny(0), []
    run.rank, run.ranks = rank, ranks
    data = SimpleNamespace(enc=ENC, openers=MASK, box=None, rl_problems=list(range(40)), eval_problems=[])

    def update(q, *args, **batches):
        items, *seeds = [a for a in args if type(a) is list]
        [optimizer] = [a for a in args if isinstance(a, torch.optim.Optimizer)]
        assert q is model and all(same(pi, tiny(0)) for pi in args if isinstance(pi, GPT))
        before = copy.deepcopy(q)
        for p in q.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not same(q, before)
        seeds = [tuple(seed) for seed in seeds[0]] if seeds else items
        drawn = dict(zip(items, elbo.chunks(seeds, len(seeds) // len(items)), strict=True))
        seen.append(SimpleNamespace(drawn=drawn, lr=optimizer.param_groups[0]["lr"]))
        return dict(grad_norm=1.0)
    with (mock.patch.object(estep, "e_update", update), mock.patch.object(mstep, "m_update", update),
          mock.patch.object(rlvr, "rl_update", update), mock.patch.object(mstep, "action_nll", lambda *a: 0),
          mock.patch.object(train, "accuracy", lambda *a: {"pass@1": 0.0})):
        loop(run, stage, model, data, *args)
    return seen


@pytest.mark.parametrize("loop, args", [(train.e_step, [[range(n) for n in range(40)]]), (train.grpo, [])])
def test_each_step_draws_items_and_seeds_anew_while_pi_stays(tmp_path, loop, args):
    seen, other = (steps_of(loop, tmp_path, *args, seed=seed) for seed in (0, 1))
    assert len(seen) == 6 and all(len(step.drawn) == 4 for step in seen)
    assert len({frozenset(step.drawn) for step in seen + other}) == 12
    seeds = [seed for step in seen + other for group in step.drawn.values() for seed in group]
    assert len(set(seeds)) == len(seeds) == 12 * 4 * 2
    shares = [steps_of(loop, tmp_path, *args, rank=rank, ranks=2) for rank in (0, 1)]
    assert [a.drawn | b.drawn for a, b in zip(*shares)] == [step.drawn for step in seen]
    assert all(len(step.drawn) == 2 for share in shares for step in share)
    assert [step.lr for step in seen] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_every_epoch_has_every_program_once_in_an_order_of_its_own(tmp_path):
    def epochs(n: int, **how) -> list[list[int]]:
        steps = steps_of(train.m_step, tmp_path, list(range(n)), [], 9, **how)
        assert all(len(step.drawn) == 4 for step in steps)
        lr = [0.1 * (i + 1) / 10 * (1 - 0.9 * i / 9) for i in range(9)]    # never past the warm-up
        assert [step.lr for step in steps] == pytest.approx(lr)
        return elbo.chunks([i for step in steps for i in step.drawn], 12)
    seen = epochs(12)
    assert all(sorted(epoch) == list(range(12)) for epoch in seen) and len(set(map(tuple, seen))) == 3
    assert epochs(12, stage="arm") == seen and epochs(12, seed=1) != seen
    assert all(len(set(epoch)) == 12 for epoch in epochs(14, stage="14"))  # two are left over


def test_infusion_is_qs_own_and_cuts_out_what_breaks_the_format(tmp_path):
    run, q, seen, sampled = new_run(tmp_path), tiny(0), [], estep.rollout

    def rollout(model, enc, programs, seeds, openers, cfg, batch_size):
        assert model is q and cfg == dataclasses.replace(E, explore=0.0, draws=0)
        seen.append(([tuple(seed) for seed in seeds], sampled(model, enc, programs, seeds, openers, cfg)))
        return seen[-1][1]
    data = SimpleNamespace(enc=ENC, openers=MASK, heldout=PROGRAMS)
    with mock.patch.object(estep, "rollout", rollout), mock.patch.object(run, "load", {"q": q}.get):
        given = []
        for tag in ("", ".2"):
            given += train.infuse(run, "q", "pi", data, PROGRAMS * 5, dataclasses.replace(E, draws=0), tag)
    seeds = [seed for its, _ in seen[:3] for seed in its]              # experts, held-out, the next experts
    assert len(set(seeds)) == len(seeds) == 15 + 3 + 15
    for (_, raw), clean in zip(seen, given, strict=True):
        for t, now in zip(raw, clean, strict=True):
            rows = zip(t.tokens, t.kind, t.line, t.gate)
            kept = [row for row in rows if row[1] == ACTION or row[2] not in t.broken]
            assert list(zip(now.tokens, now.kind, now.line, now.gate)) == kept and not now.broken
    assert any(t.broken for t in seen[0][1]) and any(any(t.thinks()) for t in given[0])
    shown = [json.loads(line)["tokens"] for line in (tmp_path / "infused.jsonl").read_text().splitlines()]
    assert shown == [t.tokens for t in given[1]]


def test_programs_are_selected_by_pi_from_draws_that_are_all_new_and_held_out_ones_are_not(tmp_path):
    run, seen, chosen, models = new_run(tmp_path), [], [], dict(q=tiny(0), pi=tiny(1))

    def rollout(model, enc, programs, seeds, openers, cfg, batch_size):
        assert model is models["q"]
        seen.append([tuple(seed) for seed in seeds])
        return [p.trace() for p in programs]

    def select(pi, program, versions, openers, cfg, seed):
        assert pi is models["pi"] and [v.tokens for v in versions] == [program.trace().tokens] * 2
        chosen.append(tuple(seed))
        return PROGRAMS[1].trace()
    data = SimpleNamespace(enc=ENC, openers=MASK, heldout=PROGRAMS)
    with (mock.patch.object(estep, "rollout", rollout), mock.patch.object(estep, "select", select),
          mock.patch.object(run, "load", models.get)):
        given, heldout = train.infuse(run, "q", "pi", data, PROGRAMS, dataclasses.replace(E, draws=2), "")
    assert [t.tokens for t in given] == [PROGRAMS[1].trace().tokens] * 3
    assert [t.tokens for t in heldout] == [p.trace().tokens for p in PROGRAMS]
    assert len({*sum(seen, []), *chosen}) == 3 * 3 + 3                  # two draws, the held-out ones, selection
    [cost] = [r for r in run.records if r.get("key") == "cost/infuse"]
    assert cost["tokens"] == sum(len(p) for p in PROGRAMS) * (2 + 3)    # q's rollouts; pi reads the plain program too


def test_accuracy_is_of_one_greedy_sample_or_of_several_at_temperature_1(tmp_path):
    run, seen = new_run(tmp_path), []

    def attempt(model, enc, asked, seeds, box, *, temperature, max_new_tokens, batch_size):
        seen.append((asked, temperature, len({tuple(seed) for seed in seeds})))
        return None, [p == "b" or (p == "a" and i < 2) for i, p in enumerate(asked)]
    data, problems = SimpleNamespace(enc=ENC, box=None), ["a", "b", "c"]
    with mock.patch.object(bench, "attempt", attempt):                     # a: 2 of 5; b: all
        assert train.accuracy(run, None, data, problems[:2]) == {"pass@1": 1.0}
        several = train.accuracy(run, None, data, problems, 5)
    assert several == pytest.approx({"pass@1": (2 / 5 + 1 + 0) / 3, "pass@5": 2 / 3})
    assert seen == [(["a", "b"], 0.0, 2), (["a"] * 5 + ["b"] * 5 + ["c"] * 5, 1.0, 15)]


def test_the_story_is_the_papers():
    """Two rounds after a warm-up, nothing trained: a model is the name of its stage."""
    flags = [*SMALL, "--rounds", "2", "--warm-steps", "7", "--warm-data", "stdlib", "--model", "cold"]
    stages, tried, tokens = {}, {}, dict(estep=500, infuse=40, ra3=360, ntp=300)
    run = SimpleNamespace(
        s=train.parse_flags(flags), done=lambda name: False, tokens=tokens.get,
        stage=lambda name, *how: stages.update({name: how}) or name,
        once=lambda key, work: tried.update({key: work()}))
    data = SimpleNamespace(experts=PROGRAMS, heldout=PROGRAMS[:1], warm=["w"])
    data.read_experts = {1: PROGRAMS[:2]}.get

    def infuse(run, q, pi, data, experts, cfg, tag):
        return [f"{cfg.rationales} by {q} for {pi}: {len(experts)}"], ["held-out by " + q]
    with (mock.patch.object(train, "infuse", infuse),
          mock.patch.object(train, "evaluate", lambda run, name, data, *curve: name)):
        train.experiment(run, data)
    plain, e, m, rl = [p.trace() for p in PROGRAMS], train.e_step, train.m_step, train.grpo
    assert not any(LATENT in t.kind for t in plain)                        # next-token prediction
    assert stages == {
        "warm": ("cold", m, data, ["w"], plain[:1], 7),
        "estep": ("warm", e, data, PROGRAMS), "estep.2": ("ra3", e, data, PROGRAMS[:2]),
        "ra3": ("estep", m, data, ["learned by estep for warm: 3"], ["held-out by estep"], 100),
        "ra3.2": ("estep.2", m, data, ["learned by estep.2 for ra3: 2"], ["held-out by estep.2"], 100),
        "ntp": ("warm", m, data, plain, plain[:1], 100), "ntp.2": ("ntp", m, data, plain[:2], plain[:1], 100),
        "ntp-long": ("warm", m, data, plain, plain[:1], 300),
        "ntp-long.2": ("ntp-long", m, data, plain[:2], plain[:1], 300),
        "rlvr-base": ("warm", rl, data), "rlvr-ra3": ("ra3.2", rl, data), "rlvr-ntp": ("ntp.2", rl, data)}
    models = {"cold": "cold", "base": "warm", "ra3": "ra3.2", "ntp": "ntp.2", "ntp-long": "ntp-long.2"}
    models |= {name: name for name in ("rlvr-base", "rlvr-ra3", "rlvr-ntp")}
    assert tried == {f"eval/{name}": model for name, model in models.items()}


def test_only_the_first_rank_looks_for_old_checkpoints(tmp_path):
    """Another would find files that the first deletes meanwhile: a run on two ranks ended so."""
    run = new_run(tmp_path, "--save-every", "1")
    optimizer = run.optimizer(torch.optim.Adam, tiny(0))
    for run.rank, run.ranks in ((0, 2), (1, 2)):
        with mock.patch.object(pathlib.Path, "glob", return_value=[]) as glob:
            for step in run.steps(f"stage{run.rank}", optimizer, 4, 0.1):
                run.log(phase=f"stage{run.rank}", step=step, grad_norm=1.0)
        assert glob.call_count == (3 if run.rank == 0 else 0)
