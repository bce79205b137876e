"""Each update of training recomputed by hand: plain code from the paper's formulas, one program, line and token at
a time, and one step of SGD. Then the loops: what must stay frozen from step to step, what must be drawn anew."""
import copy
import dataclasses
import json
import math
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

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
TEXTS, END = ["#", "\n", "a", "x", "##"], 5
ENC = tiktoken.Encoding("tiny", pat_str=r"##|[\s\S]", special_tokens={"<|endoftext|>": END},
                        mergeable_ranks={text.encode(): i for i, text in enumerate(TEXTS)})
OPENERS, OTHERS, MASK = [0, 4], [1, 2, 3, 5], elbo.opener_mask(ENC)
LR = 0.3
E = estep.EStepConfig(e_programs=4, e_rollouts=3, e_anchor=0.5, c=0.3, beta=0.4, p_think=0.3, broken_cost=0.7,
                      floor=5.0, horizon=2, gamma=0.5, explore=0.2, max_rationale=5, max_comments=2)


def tiny(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=6, d_model=12, n_layer=1, n_head=2, n_kv_head=1, head_dim=6, d_ff=16,
                          context=64, eos_id=END))
    for p in model.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return model.double()


def programs() -> list[elbo.Program]:
    return [elbo.parse(ENC, "a\n", body, END) for body in ("x\na\nxx\n", "a\n", "ax\nx\nx\na\n")]


def traces(seed: int, n: int = 7) -> list[Trace]:
    """Infused programs of very unequal length, all tokens at random."""
    g, out = torch.Generator().manual_seed(seed), []

    def some(most: int) -> list[int]:
        count = int(torch.randint(1, most + 1, (), generator=g))
        return torch.randint(1, 4, (count,), generator=g).tolist()
    for i in range(n):
        t = Trace()
        t.add(some(3), PROMPT)
        for line in range(1 + i % 3):
            if (i + line) % 2:
                t.add([OPENERS[line % 2], *some(2 + i)], LATENT, line, FREE)
            t.add(some(4), ACTION, line, FREE)
        out.append(t)
    return out


def predictions(model, tokens: list[int]):
    """log p of each token of the vocabulary after each token but the last: (T - 1, V)."""
    return model(torch.tensor([tokens]))[0, :-1].log_softmax(-1)


def in_two(logp, token: int, gate: int):
    """log p(token) as the gate's choice, and the token given that choice."""
    if not gate:
        return torch.tensor(0.0), logp[token]
    side = OPENERS if token in OPENERS else OTHERS
    choice = logp[side].exp().sum().log()
    return choice, logp[token] - choice


def check_step(before: GPT, after: GPT, loss, norm: float):
    """`after` is `before`, which `loss` was computed with, after one SGD step on it, clipped at norm 1."""
    params = list(before.parameters())
    grads = torch.autograd.grad(loss, params)
    length = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert norm == pytest.approx(length, rel=1e-4)
    for p, new, g in zip(params, after.parameters(), grads):
        torch.testing.assert_close(new - p, -LR * g / max(length, 1.0), rtol=1e-3, atol=1e-5 * LR)


# ------------------------------------------------------------------------------------------------- the E-step


def version_by_hand(q: GPT, pi: GPT, t: Trace, cfg) -> SimpleNamespace:
    """Of one infused program, line by line: log q of its latents, rewards; and its part of the trust region."""
    n = t.line[-1] + 1
    v = SimpleNamespace(log_q=[0.0] * n, log_pi=[0.0] * n, think=[False] * n, gate_kl=[0.0] * n, anchor=0.0)
    ours, theirs = predictions(q, t.tokens), predictions(pi, t.tokens)
    for i, (token, kind, line, gate) in enumerate(zip(t.tokens, t.kind, t.line, t.gate)):
        if kind == PROMPT:
            continue
        choice, word = in_two(ours[i - 1], token, gate)
        if gate == FREE:
            v.log_q[line] += choice
            if t.line[i - 1] != line:                                     # the first decision of the line
                prior = cfg.p_think if token in OPENERS else 1 - cfg.p_think
                v.gate_kl[line] = choice.item() - math.log(prior)
        if kind == LATENT:
            v.log_q[line] += word
            v.think[line] = True
        if kind == ACTION:
            v.log_pi[line] += in_two(theirs[i - 1], token, gate)[1].item()
            words = OTHERS if gate else [*OPENERS, *OTHERS]
            a, b = theirs[i - 1][words].exp(), ours[i - 1][words].exp()
            a, b = a / a.sum(), b / b.sum()
            v.anchor += (a * (a / b).log()).sum()
    v.rewards = [max(v.log_pi[i], -cfg.floor) - cfg.c * v.think[i] - cfg.broken_cost * (i in t.broken)
                 - cfg.beta * v.gate_kl[i] for i in range(n)]
    v.returns = [sum(cfg.gamma ** j * r for j, r in enumerate(v.rewards[i:i + cfg.horizon])) for i in range(n)]
    return v


def e_step_by_hand(q: GPT, pi: GPT, drawn: list[Trace], cfg):
    """The loss of an E-step on K versions of each program, and what it should report."""
    loss, gaps, K = 0.0, [], cfg.e_rollouts
    versions = [version_by_hand(q, pi, t, cfg) for t in drawn]
    for group in (versions[i:i + K] for i in range(0, len(versions), K)):
        for v in group:
            for i in range(len(v.returns)):
                baseline = sum(w.returns[i] for w in group if w is not v) / (K - 1)
                loss -= v.log_q[i] * (v.returns[i] - baseline)
            loss += cfg.e_anchor * v.anchor
        for i in range(len(group[0].returns)):
            thought, not_thought = ([v.returns[i] for v in group if v.think[i] == z] for z in (True, False))
            if thought and not_thought:
                gaps.append(sum(thought) / len(thought) - sum(not_thought) / len(not_thought))
    lines, rationales = sum(len(v.think) for v in versions), sum(sum(v.think) for v in versions)
    tokens = 0
    for t in drawn:                    # the rollout: all once, and again what follows a comment; pi once, q thrice
        opened = [i for i, kind in enumerate(t.kind) if kind == LATENT and t.gate[i]]
        tokens += 5 * len(t.tokens) + sum(t.kind[i:].count(ACTION) for i in opened)
    return loss / len(drawn), dict(
        reward=sum(sum(v.rewards) for v in versions) / lines, loglik=sum(sum(v.log_pi) for v in versions) / lines,
        think=rationales / lines, broken=sum(len(t.broken) for t in drawn) / rationales, tokens=tokens,
        length=sum(t.kind.count(LATENT) for t in drawn) / rationales, uplift=sum(gaps) / len(gaps))


def test_two_e_steps_are_what_the_formula_says():
    q, pi, experts, drawn = tiny(5), tiny(6), programs(), []
    frozen, optimizer, sampled = copy.deepcopy(pi), torch.optim.SGD(q.parameters(), lr=LR), estep.rollout

    def rollout(model, enc, versions, seeds, openers, cfg, batch_size):
        assert model is q and cfg is E and versions == [p for p in experts for _ in range(3)]
        drawn.append(sampled(model, enc, versions, seeds, openers, cfg, batch_size))
        return drawn[-1]
    for step in range(2):
        before, seeds = copy.deepcopy(q), [[step, i] for i in range(9)]
        with mock.patch.object(estep, "rollout", rollout):        # 7 // 3: passes of two programs and of one
            stats = estep.e_update(q, pi, optimizer, ENC, MASK, experts, seeds, E, 7, 4)
        loss, wanted = e_step_by_hand(before, frozen, drawn[-1], E)
        check_step(before, q, loss, stats.pop("grad_norm"))
        assert stats == pytest.approx(wanted, rel=1e-4)
    assert drawn[0] != drawn[1]
    # The draws show what is to be told apart: lines over and under the floor, forced and later gates, both openers.
    versions = [version_by_hand(q, frozen, t, E) for t in drawn[0]]
    assert {lp < -E.floor for v in versions for lp in v.log_pi} == {True, False}
    gates = Counter((kind, gate, t.line[i - 1] == t.line[i]) for t in drawn[0]
                    for i, (kind, gate) in enumerate(zip(t.kind, t.gate)))
    assert all(gates[what] for what in ((LATENT, FREE, True), (LATENT, FREE, False), (LATENT, FORCED, False),
                                        (ACTION, FREE, True), (ACTION, FREE, False), (ACTION, FORCED, True)))
    assert any(t.broken for t in drawn[0]) and all(any(o in t.tokens for t in drawn[0]) for o in OPENERS)


# ------------------------------------------------------------------------------------------ M-step and packing


def test_two_m_steps_are_what_the_formula_says():
    model = tiny(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for seed in range(2):
        before, batch = copy.deepcopy(model), traces(seed)
        stats = mstep.m_update(model, optimizer, batch, micro_batch=2)
        nats, n = 0.0, 0
        for t in batch:
            logp = predictions(before, t.tokens)
            for i, kind in enumerate(t.kind):
                if kind in (LATENT, ACTION):
                    nats, n = nats - logp[i - 1, t.tokens[i]], n + 1
        check_step(before, model, nats / n, stats["grad_norm"])
        assert stats["loss"] == pytest.approx((nats / n).item(), rel=1e-5)
        assert stats["tokens"] == 3 * sum(len(t.tokens) for t in batch)
    assert len(mstep.pack(batch, max(len(t.tokens) for t in batch))) > 2      # two passes at least


def test_the_longest_go_first_and_what_just_fits_fits():
    of_length = [Trace(tokens=[0] * n) for n in (4, 6, 3, 5, 2, 10)]
    assert mstep.pack(of_length, 10) == [[5], [1, 0], [3, 2, 4]]


def test_action_nll_is_all_nats_over_all_tokens():
    model, heldout, nats, n = tiny(3), traces(5), 0.0, 0
    for t in heldout:
        logp = predictions(model, t.tokens)
        for i, kind in enumerate(t.kind):
            if kind == ACTION:
                nats, n = nats - in_two(logp[i - 1], t.tokens[i], t.gate[i])[1].item(), n + 1
    for size in (1, 2, 3, 99):
        assert mstep.action_nll(model, heldout, MASK, size) == pytest.approx(nats / n, rel=1e-5)


# -------------------------------------------------------------------------------------------------------- RLVR

RL, GROUP = rlvr.RLVRConfig(rl_group=3, max_new_tokens=9), 3
PROBLEMS = [bench.Problem(str(i), prompt) for i, prompt in enumerate(("a\n", "xa\n", "x\n", "aax\n"))]
PASSED = [1, 0, 0] + [0, 0, 0] + [1, 1, 0] + [1, 1, 1]                     # the second and the last are dead


def samples(model: GPT) -> list[Sample]:
    """Three of each problem, drawn from a policy whose tokens differ from the model's by a factor."""
    g, out = torch.Generator().manual_seed(0), []
    for i in range(len(PASSED)):
        prompt = ENC.encode(PROBLEMS[i // GROUP].prompt)
        tokens = torch.randint(0, 6, (2 + i % 4,), generator=g).tolist()
        logp = predictions(model, prompt + tokens)[len(prompt) - 1:].detach()
        factors = [(0.7, 1.0, 1.25, 1.4)[(i + j) % 4] for j in range(len(tokens))]      # of 1.25: inside of 1.28
        old = [float(lp[token]) - math.log(f) for lp, token, f in zip(logp, tokens, factors)]
        out.append(Sample(tokens, old, stopped=i % 5 > 0))
    return out


def attempts(wanted: list[Sample], passed: list[int]):
    """In place of `attempt`: sample i of all for the seed i."""
    def attempt(model, enc, asked, seeds, box, max_new_tokens, batch_size):
        assert [p.id for p in asked] == [PROBLEMS[i // GROUP].id for i in seeds] and max_new_tokens == 9
        return [wanted[i] for i in seeds], [bool(passed[i]) for i in seeds]
    return mock.patch.object(rlvr, "attempt", attempt)


def test_an_rl_step_is_what_the_formula_says():
    model, seeds = tiny(0), range(len(PASSED))
    before, drawn = copy.deepcopy(model), samples(model)
    optimizer, loss, live = torch.optim.SGD(model.parameters(), lr=LR), 0.0, 0
    with attempts(drawn, PASSED):
        stats = rlvr.rl_update(model, optimizer, ENC, PROBLEMS, seeds, None, RL, micro_batch=4)
    trained = 0                                                            # tokens of prompts and samples
    for i, s in enumerate(drawn):
        group = PASSED[i // GROUP * GROUP:][:GROUP]
        advantage = PASSED[i] - sum(group) / GROUP
        if 0 < sum(group) < GROUP:
            prompt = ENC.encode(PROBLEMS[i // GROUP].prompt)
            logp = predictions(before, prompt + s.tokens)[len(prompt) - 1:]
            for lp, token, old in zip(logp, s.tokens, s.logprobs):
                ratio = (lp[token] - old).exp()
                clipped = min(max(ratio.item(), 0.8), 1.28) * advantage
                loss -= ratio * advantage if ratio.item() * advantage <= clipped else clipped
            live, trained = live + len(s.tokens), trained + len(prompt) + len(s.tokens)
    check_step(before, model, loss / live, stats.pop("grad_norm"))
    n, total = len(drawn), sum(len(s.tokens) for s in drawn)
    assert stats == pytest.approx(dict(
        reward=6 / 12, signal=2 / 4, truncated=sum(not s.stopped for s in drawn) / n, length=total / n,
        entropy=-sum(sum(s.logprobs) for s in drawn) / total, tokens=total + 3 * trained))
    moved = copy.deepcopy(model)
    with attempts(drawn, [1, 1, 1] * 4):
        stats = rlvr.rl_update(model, optimizer, ENC, PROBLEMS, seeds, None, RL)
    assert (stats["signal"], stats["grad_norm"]) == (0.0, 0.0) and same(model, moved)


# ---------------------------------------------------------------------------------- the step, on one rank and on two


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_step_is_on_the_sum_of_the_losses_over_the_count():
    model = torch.nn.Linear(2, 1, bias=False).double()
    x, y, start = torch.tensor([3.0, 4.0]).double(), torch.tensor([0.0, 1.0]).double(), model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.full((1, 2), 99.0).double()                  # left over from elsewhere
    norm = mstep.optimize(model, optimizer, (model(v).sum() for v in (x, y)), 20)
    assert norm == pytest.approx(math.hypot(0.15, 0.25))
    torch.testing.assert_close(model.weight.detach(), start - torch.tensor([[0.15, 0.25]]).double())
    assert mstep.optimize(model, optimizer, [model(x).sum()], 1) == pytest.approx(5.0)              # clipped
    torch.testing.assert_close(model.weight.detach(), start - torch.tensor([[0.75, 1.05]]).double(), atol=1e-6, rtol=0)
    before = copy.deepcopy(model)
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="diverged"):
            mstep.optimize(model, optimizer, [model(x).sum() * bad], 1)
    assert mstep.optimize(model, optimizer, [model(x).sum() * 0], 0) == 0.0
    assert same(model, before)


def bfloat_steps(n: int, optimizer_of, first: int = 0, model: GPT | None = None):
    """A bfloat16 model after n steps on given gradients, at a rate that changes; and its optimizer."""
    model = model or tiny(0).bfloat16()
    optimizer = optimizer_of(model.parameters())
    for step in range(first, n):
        torch.manual_seed(step)
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (1 + step)
        optimizer.step()
    return model, optimizer


def masters(params):
    return mstep.Masters(torch.optim.Adam, params, "cpu", lr=1.0, betas=(0.9, 0.99))


def test_masters_are_a_float32_optimizer_and_a_rounding():
    model, optimizer = bfloat_steps(8, masters)
    exact, grads = [p.detach().float() for p in tiny(0).bfloat16().parameters()], []
    adam = torch.optim.Adam(exact, betas=(0.9, 0.99))
    for step in range(8):
        torch.manual_seed(step)
        grads = [torch.randn_like(p, dtype=torch.bfloat16).float() for p in exact]
        for p, g in zip(exact, grads):
            p.grad = g
        adam.param_groups[0]["lr"] = 1e-4 * (1 + step)
        adam.step()
    assert all(torch.equal(p, w.bfloat16()) for p, w in zip(model.parameters(), exact))
    assert not all(torch.equal(p.float(), w) for p, w in zip(model.parameters(), exact))
    half, kept = bfloat_steps(5, masters)
    state = copy.deepcopy(kept.state_dict())

    def restored(params):
        fresh = masters(params)
        fresh.load_state_dict(state)
        return fresh
    assert same(bfloat_steps(8, restored, first=5, model=half)[0], model)


def all_updates(rank: int, ranks: int) -> dict:
    """Name -> (what it reports, the weights after it) of every update, on this rank's share of its batch."""
    out = {}

    def after(name: str, work, make=torch.optim.SGD, **options):
        model = tiny(0)
        optimizer = make(model.parameters(), lr=LR, **options)
        stats = work(model, optimizer)
        out[name] = stats, [p.detach().clone() for p in model.parameters()]

    def e(q, optimizer):
        seeds = [[i, k] for i in range(3)[rank::ranks] for k in range(3)]
        return estep.e_update(q, tiny(1), optimizer, ENC, MASK, programs()[rank::ranks], seeds, E, 3)

    def m(model, optimizer):
        return mstep.m_update(model, optimizer, traces(0)[rank::ranks], 1)

    def rl(model, optimizer):
        mine = range(4)[rank::ranks]                        # of two ranks the second has dead groups alone
        seeds = [GROUP * i + k for i in mine for k in range(GROUP)]
        with attempts(samples(model), PASSED):
            return rlvr.rl_update(model, optimizer, ENC, [PROBLEMS[i] for i in mine], seeds, None, RL, 2)

    def no_signal(model, optimizer):
        mstep.m_update(model, optimizer, traces(0)[rank::ranks], 1)
        return dict(norm=mstep.optimize(model, optimizer, [], 0))

    def nll(model, optimizer):
        return dict(nll=mstep.action_nll(model, traces(0)[rank::ranks], MASK, 2))
    for work in (e, m, rl, nll):
        after(work.__name__, work)
    after("no_signal", no_signal, momentum=0.9)
    out["masters"] = {}, [p.detach() for p in bfloat_steps(3, masters)[0].parameters()]
    return out


def one_of_two(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    torch.save(all_updates(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_do_what_one_does(tmp_path):
    spawn(one_of_two, (str(tmp_path),), nprocs=2)
    one, two = all_updates(0, 1), [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (stats, weights) in one.items():
        for its_stats, its_weights in (both[name] for both in two):
            assert its_stats == pytest.approx(stats, rel=1e-4), name
            torch.testing.assert_close(its_weights, weights, rtol=0, atol=0 if name == "masters" else 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(two[0][name][1], two[1][name][1])), name


# ------------------------------------------------------------------------------------------------------ the loops

SMALL = ("--e-steps 6 --e-programs 4 --e-rollouts 2 --rl-steps 6 --rl-problems 4 --rl-group 2 --m-programs 4 "
         "--e-lr 0.1 --rl-lr 0.1 --m-lr 0.1").split()


def new_run(folder, *flags: str) -> train.Run:
    folder.mkdir(exist_ok=True)
    return train.Run(train.parse_flags([*SMALL, *flags]), folder)


def steps_of(loop, folder, *args, seed=0, stage="stage", rank=0, ranks=1) -> list[SimpleNamespace]:
    """What a loop gives to its update, step by step: the items, each with its seeds, and the learning rate."""
    run, model, seen = new_run(folder / f"{stage}{seed}{rank}{ranks}", "--seed", str(seed)), tiny(0), []
    run.rank, run.ranks, start = rank, ranks, tiny(0)

    def update(q, *args, **batches):
        items, *seeds = [a for a in args if type(a) is list]
        [optimizer] = [a for a in args if isinstance(a, torch.optim.Optimizer)]
        assert q is model and all(same(pi, start) for pi in args if isinstance(pi, GPT))
        before = copy.deepcopy(q)
        for p in q.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not same(q, before)
        seeds = [tuple(seed) for seed in seeds[0]] if seeds else items
        drawn = dict(zip(items, elbo.chunks(seeds, len(seeds) // len(items)), strict=True))
        seen.append(SimpleNamespace(drawn=drawn, lr=optimizer.param_groups[0]["lr"]))
        return dict(grad_norm=1.0)
    data = SimpleNamespace(enc=ENC, openers=MASK, box=None, rl_problems=list(range(40)))
    with (mock.patch.object(estep, "e_update", update), mock.patch.object(mstep, "m_update", update),
          mock.patch.object(rlvr, "rl_update", update), mock.patch.object(mstep, "action_nll", lambda *a: 0.0),
          mock.patch.object(train, "accuracy", lambda *a: {"pass@1": 0.0})):
        loop(run, stage, model, data, *args)
    return seen


@pytest.mark.parametrize("loop, args", [(train.e_step, [list(range(40))]), (train.grpo, [])])
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
    def epochs(n: int = 12, **how) -> list[list[int]]:
        order = [list(step.drawn) for step in steps_of(train.m_step, tmp_path, list(range(n)), [], 9, **how)]
        assert all(len(batch) == 4 for batch in order)
        return elbo.chunks([i for batch in order for i in batch], 12)
    seen = epochs()
    assert all(sorted(epoch) == list(range(12)) for epoch in seen) and len(set(map(tuple, seen))) == 3
    assert epochs(stage="other") == seen and epochs(seed=1) != seen        # arms are compared on the same draws
    assert all(len(set(epoch)) == 12 for epoch in epochs(14, stage="14"))  # the two left over wait for the next
    lr = [step.lr for step in steps_of(train.m_step, tmp_path, list(range(12)), [], 9, stage="lr")]
    assert lr == pytest.approx([0.1 * (i + 1) / 10 * (1 - 0.9 * i / 9) for i in range(9)])


def test_infusion_is_qs_own_and_cuts_out_what_breaks_the_format(tmp_path):
    run, drawn, sampled = new_run(tmp_path), [], estep.rollout

    def rollout(model, enc, versions, seeds, openers, cfg, batch_size):
        assert model is q and cfg == dataclasses.replace(E, explore=0.0)
        drawn.append(([tuple(seed) for seed in seeds], sampled(model, enc, versions, seeds, openers, cfg)))
        return drawn[-1][1]
    q, data = tiny(0), SimpleNamespace(enc=ENC, openers=MASK, heldout=programs())
    with (mock.patch.object(estep, "rollout", rollout),
          mock.patch.object(run, "load", lambda name: {"q": q}[name])):
        infused = [train.infuse(run, "q", data, programs() * 5, E, tag) for tag in ("", ".2")]
    seeds = [seed for group, _ in drawn[:3] for seed in group]             # experts, held-out, the second experts
    assert len(set(seeds)) == len(seeds) == 15 + 3 + 15
    for (_, raw), clean in zip(drawn, [group for pair in infused for group in pair], strict=True):
        for t, now in zip(raw, clean, strict=True):
            rows = zip(t.tokens, t.kind, t.line, t.gate)
            kept = [row for row in rows if row[1] == ACTION or row[2] not in t.broken]
            assert list(zip(now.tokens, now.kind, now.line, now.gate)) == kept and not now.broken
    assert any(t.broken for t in drawn[0][1]) and any(any(t.thinks()) for t in infused[0][0])
    shown = (tmp_path / "infused.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in shown] == [t.tokens for t in infused[0][1]]


def test_accuracy_is_of_one_greedy_sample_or_of_several_at_temperature_1(tmp_path):
    run, seen = new_run(tmp_path), []

    def attempt(model, enc, asked, seeds, box, *, temperature, max_new_tokens, batch_size):
        seen.append((asked, [tuple(seed) for seed in seeds], temperature))
        return None, [p == "b" or (p == "a" and i % 5 < 2) for i, p in enumerate(asked)]     # a: 2 of 5; b: all
    data = SimpleNamespace(enc=ENC, box=None, eval_problems=["a", "b", "c"])
    with mock.patch.object(bench, "attempt", attempt):
        assert train.accuracy(run, tiny(0), data, 2) == {"pass@1": 1.0}
        several = train.accuracy(run, tiny(0), data, 9, 5)
    assert several == pytest.approx({"pass@1": (2 / 5 + 1 + 0) / 3, "pass@5": 2 / 3})
    assert [(asked, t) for asked, _, t in seen] == [(["a", "b"], 0.0), (["a"] * 5 + ["b"] * 5 + ["c"] * 5, 1.0)]
    assert len(set(seen[1][1])) == 15


class Story:
    """A run that trains nothing: a model is the name of its stage."""
    def __init__(self, *flags: str):
        self.s, self.stages, self.tried = train.parse_flags([*flags, "--m-steps", "100"]), {}, {}

    def stage(self, name, start, loop, *args):
        self.stages[name] = (start, loop, *args)
        return name

    def once(self, key, work):
        self.tried[key] = work()

    def done(self, stage):
        return False

    def tokens(self, stage):
        return dict(estep=500, infuse=40, ra3=360, ntp=300)[stage]


def tell(*flags: str) -> tuple[Story, SimpleNamespace]:
    """The paper's story, in two rounds after a warm-up."""
    run = Story("--rounds", "2", "--warm-steps", "7", "--warm-data", "stdlib", "--model", "cold", *flags)
    data = SimpleNamespace(experts=programs(), warm=["warm"], heldout=programs()[:1],
                           read_experts=lambda n: {1: programs()[:2]}[n])

    def infuse(run, q, data, experts, cfg, tag):
        return [f"{cfg.rationales} by {q}: {len(experts)}"], ["held-out by " + q]
    with (mock.patch.object(train, "infuse", infuse),
          mock.patch.object(train, "evaluate", lambda run, name, data: name)):
        train.experiment(run, data)
    return run, data


def test_the_story_is_the_papers():
    run, data = tell()
    plain, e, m, rl = [p.trace() for p in programs()], train.e_step, train.m_step, train.grpo
    assert not any(LATENT in t.kind for t in plain)
    assert run.stages == {
        "warm": ("cold", m, data, ["warm"], plain[:1], 7),
        "estep": ("warm", e, data, programs()), "estep.2": ("ra3", e, data, programs()[:2]),
        "ra3": ("estep", m, data, ["learned by estep: 3"], ["held-out by estep"], 100),
        "ra3.2": ("estep.2", m, data, ["learned by estep.2: 2"], ["held-out by estep.2"], 100),
        "ntp": ("warm", m, data, plain, plain[:1], 100), "ntp.2": ("ntp", m, data, plain[:2], plain[:1], 100),
        "ntp-long": ("warm", m, data, plain, plain[:1], 300),
        "ntp-long.2": ("ntp-long", m, data, plain[:2], plain[:1], 300),
        "rlvr-base": ("warm", rl, data), "rlvr-ra3": ("ra3.2", rl, data), "rlvr-ntp": ("ntp.2", rl, data)}
    tried = dict(cold="cold", base="warm", ra3="ra3.2", ntp="ntp.2") | {"ntp-long": "ntp-long.2"}
    tried |= {f"rlvr-{arm}": f"rlvr-{arm}" for arm in ("base", "ra3", "ntp")}
    assert run.tried == {f"eval/{name}": model for name, model in tried.items()}


def test_at_an_infinite_price_nothing_is_asked_of_q():
    run, _ = tell("--c", "inf", "--arms", "ra3", "--rl-steps", "0")
    assert list(run.stages) == ["warm", "ra3", "ra3.2"]
    assert run.stages["ra3"][0] == "warm" and run.stages["ra3"][3] == ["never by warm: 3"]
