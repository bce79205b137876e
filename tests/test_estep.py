"""The E-step: the batched sampler against line-by-line decoding, the estimator against the exact gradient by enumeration."""
import copy
import math
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch

import elbo
import estep
from elbo import ACTION, FORCED, FREE, LATENT, PROMPT, Trace
from model import GPT, GPTConfig, pick

EOS = 4


def rollout(model, enc, programs, seeds, openers, **how) -> list[Trace]:
    return estep.rollout(model, enc, programs, seeds, openers, estep.EStepConfig(**how))


@pytest.fixture(scope="module")
def enc():
    """Four characters and the end of the document: a world small enough to list all latents."""
    return tiktoken.Encoding("tiny", pat_str=r"[\s\S]", mergeable_ranks={b"#": 0, b"\n": 1, b"a": 2, b"x": 3},
                             special_tokens={"<|endoftext|>": EOS})


def tiny(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=5, d_model=12, n_layer=1, n_head=2, n_kv_head=1, head_dim=6, d_ff=16, context=64, eos_id=EOS))
    for p in model.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return model.double()


def program(enc):
    return elbo.parse(enc, "a\n", "x\na\n", EOS)


MAX = 3                                  # longest rationale: "#", one character, a newline


def every_trace(enc) -> list[Trace]:
    """All outcomes of a rollout of `program`, written down independently of the sampler."""
    p = program(enc)
    out = []

    def copy(t):
        new = Trace(list(t.tokens), list(t.kind), list(t.line), list(t.gate), set(t.broken))
        return new

    def line(t, i, gate):
        t = copy(t)
        t.add(p.lines[i], ACTION, i, gate)
        decide(t, i + 1)

    def decide(t, i):
        if i == len(p.lines):
            return out.append(t)
        line(t, i, FREE)
        t = copy(t)
        t.add([0], LATENT, i, FREE)
        body(t, i, "#")

    def force(t, i):
        t = copy(t)
        t.broken.add(i)
        t.add([1], PROMPT, i)
        line(t, i, FORCED)

    def body(t, i, text):
        for token in range(5):
            new = copy(t)
            new.add([token], LATENT, i)
            piece = enc.decode([token])
            if token == EOS:
                force(new, i)                           # the document does not end inside a comment
            elif piece == "\n":
                if text.strip("#"):
                    line(new, i, FREE)                  # closed, and the next gate says act
                    new.add([0], LATENT, i, FREE)       # closed, but another comment opens
                    force(new, i)
                else:
                    force(new, i)                       # empty
            elif len(text) + 1 == MAX:
                force(new, i)                           # too long
            else:
                body(new, i, text + piece)

    start = Trace()
    start.add(p.prompt, PROMPT)
    decide(start, 0)
    return out


def key(t: Trace):
    return tuple(t.tokens), tuple(t.kind), tuple(t.line), tuple(t.gate), tuple(sorted(t.broken))


def scores(model, traces, openers):
    batch = elbo.collate(traces)
    gate, token = elbo.score(elbo.logits_of(model, batch), batch, openers)
    return batch, gate, token


def test_q_is_a_distribution_over_the_outcomes_and_the_sampler_draws_from_it(enc):
    model, openers = tiny(0), elbo.opener_mask(enc)
    traces = every_trace(enc)
    batch, gate, token = scores(model, traces, openers)
    q = elbo.log_q(gate, token, batch).sum(-1).exp()
    assert q.sum().item() == pytest.approx(1.0, abs=1e-5)
    n = 6000
    drawn = rollout(model, enc, [program(enc)] * n, [[7, i] for i in range(n)], openers, max_rationale=MAX)
    index = {key(t): i for i, t in enumerate(traces)}
    counts = torch.zeros(len(traces), dtype=torch.float64)
    for t in drawn:
        counts[index[key(t)]] += 1                                      # KeyError: an outcome that should not exist
    z = (counts / n - q) / (q * (1 - q) / n).sqrt()
    assert z[q > 1e-3].abs().max() < 4.5
    assert len({key(t) for t in drawn}) > 30


def reference_rollout(model, enc, p, seed, openers, comments):
    """Line by line, token by token, without a cache; a rationale of at most 12 tokens and so many comment lines."""
    rng, t = np.random.default_rng(seed), Trace()
    t.add(p.prompt, PROMPT)

    def probs():
        with torch.no_grad():
            return model(torch.tensor([t.tokens]))[0, -1].double().softmax(-1)

    for i, line in enumerate(p.lines):
        gate, written, spent = FREE, 0, 0
        while rng.random() < (pr := probs())[openers].sum():
            token = int(pick((pr * openers).log()[None], torch.tensor([rng.random()]), 1.0))
            t.add([token], LATENT, i, FREE)
            latent = [token]
            broken = written == comments
            while not broken and spent + len(latent) < 12 and "\n" not in enc.decode(latent) and latent[-1] != EOS:
                token = int(pick(probs().log()[None], torch.tensor([rng.random()]), 1.0))
                t.add([token], LATENT, i)
                latent.append(token)
            text = enc.decode(latent)
            if broken or "\n" not in text or not text.strip("# \n"):
                t.broken.add(i)
                t.add(enc.encode_ordinary(p.closings[i]), PROMPT, i)
                gate = FORCED
                break
            written, spent = written + 1, spent + len(latent)
        t.add(line, ACTION, i, gate)
    return t


@pytest.mark.parametrize("comments", (1, 2, 9))
def test_scoring_whole_tails_draws_just_what_line_by_line_decoding_draws(enc, comments):
    model, openers, how = tiny(4), elbo.opener_mask(enc), dict(max_rationale=12, max_comments=comments)
    programs = [elbo.parse(enc, "a\n", body, EOS) for body in ("x\na\nxx\nax\n", "x\n", "a\naa\nx\n")] * 10
    seeds = [[1, i] for i in range(len(programs))]
    fast = rollout(model, enc, programs, seeds, openers, **how)
    slow = [reference_rollout(model, enc, p, s, openers, comments) for p, s in zip(programs, seeds)]
    assert [key(a) for a in fast] == [key(b) for b in slow]
    assert sum(sum(t.thinks()) for t in fast) > 20 and any(t.broken for t in fast)
    alone = [rollout(model, enc, [p], [s], openers, **how)[0] for p, s in zip(programs, seeds)]
    assert [key(a) for a in alone] == [key(b) for b in fast]             # a row does not depend on its batch


@pytest.mark.parametrize("text, most, comments, broken", [
    ("#a\n", 9, 1, False), ("#a\n#", 9, 1, True), ("#a\n#x\n", 9, 2, False), ("#a\n#x\n#", 9, 2, True), ("#a\n#x\n#a\n", 9, 3, False),
    ("#a\n#xx", 6, 2, True), ("#a\n#x\n", 6, 2, False), ("#a\n#\n", 9, 2, True)])
def test_a_rationale_has_so_many_comment_lines_and_tokens(enc, text, most, comments, broken):
    r, cfg = estep._Version(program(enc), 0), estep.EStepConfig(max_rationale=most, max_comments=comments)
    finished = [not r.write(token, enc, cfg) for token in enc.encode(text)]
    assert (0 in r.trace.broken) == r.forced == broken and finished[-1]
    assert sum(finished) == text.count("\n") + (text[-1] != "\n")       # not before: each comment line is opened by a gate of its own


@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimator_agrees_with_the_exact_gradient(enc, seed):
    model, pi, openers = tiny(seed), tiny(seed + 10), elbo.opener_mask(enc)
    cost = dict(c=0.3, broken_cost=0.7)

    def line_rewards(batch, traces):
        with torch.no_grad():
            _, token = elbo.score(elbo.logits_of(pi, batch), batch, openers)
            loglik = elbo.by_line(elbo.log_pi(token, batch), batch, 2)
            return elbo.line_rewards(loglik, *estep.decisions(traces, 2), **cost)

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    traces = every_trace(enc)
    batch, gate, token = scores(model, traces, openers)
    logq = elbo.log_q(gate, token, batch).sum(-1)
    exact = gradient((logq.exp() * line_rewards(batch, traces).sum(-1)).sum())
    estimates = []
    K, P = 32, 4
    for i in range(40):
        drawn = rollout(model, enc, [program(enc)] * (P * K), [[seed, i, k] for k in range(P * K)], openers, max_rationale=MAX)
        batch, gate, token = scores(model, drawn, openers)
        G = estep.returns(line_rewards(batch, drawn), 2, 1.0)
        A = estep.advantages(G.view(P, K, 2)).view(-1, 2)
        estimates.append(-gradient(estep.reinforce_loss(elbo.log_q(gate, token, batch), A, batch) / len(drawn)))
    E = torch.stack(estimates)                                           # (40, parameters)
    direction = exact / exact.norm()
    along = E @ direction
    assert abs(along.mean() - exact.norm()) < 4 * along.std() / len(E) ** 0.5
    assert exact.norm() > 10 * along.std() / len(E) ** 0.5               # the test can tell it from zero
    torch.manual_seed(0)
    for _ in range(20):
        v = torch.randn_like(exact)
        x = E @ v
        assert abs(x.mean() - exact @ v) < 4.5 * x.std() / len(E) ** 0.5


def test_expert_tokens_carry_no_gradient_and_gates_and_rationales_do(enc):
    model, openers = tiny(2), elbo.opener_mask(enc)
    trace = Trace()
    trace.add([2, 1], PROMPT)
    trace.add([0, 2, 1], LATENT, 0, FREE)
    trace.add([3, 3, 1], ACTION, 0, FREE)
    trace.add([2, 1, EOS], ACTION, 1, FREE)
    batch = elbo.collate([trace])
    logits = elbo.logits_of(model, batch).detach().requires_grad_()
    loss = estep.reinforce_loss(elbo.log_q(*elbo.score(logits, batch, openers), batch), torch.tensor([[1.0, -2.0]]), batch)
    loss.backward()
    moved = logits.grad.abs().sum(-1) > 1e-9
    #                         #     a     \n    x     x      \n     a     \n     eos
    assert moved.tolist() == [True, True, True, True, False, False, True, False, False]
    # At an act gate the expert's token itself is not preferred to other lines that could follow.
    at = logits.grad[3]
    p = logits[3].detach().softmax(-1)
    ratio = (at / p)[~openers]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio))


def test_returns_are_truncated_and_discounted():
    r = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    assert estep.returns(r, 1, 0.5).tolist() == [[1.0, 10.0, 100.0, 1000.0]]
    assert estep.returns(r, 2, 0.5).tolist() == [[6.0, 60.0, 600.0, 1000.0]]
    assert estep.returns(r, 99, 1.0).tolist() == [[1111.0, 1110.0, 1100.0, 1000.0]]


def test_the_baseline_of_a_version_is_the_mean_of_the_others():
    G = torch.randn(3, 4, 5)
    A = estep.advantages(G)
    for k in range(4):
        others = [j for j in range(4) if j != k]
        torch.testing.assert_close(A[:, k], G[:, k] - G[:, others].mean(1))


@pytest.mark.parametrize("mode", ["learned", "always", "first"])
def test_rows_of_very_unequal_length_share_a_batch(enc, mode):
    """A long prompt before a short line, beside a short prompt before long lines: no row may run past the cache."""
    model, openers = tiny(4), elbo.opener_mask(enc)
    long_prompt, long_lines = elbo.parse(enc, "a\n" * 12, "x\n", EOS), elbo.parse(enc, "a\n", "axaxaxaxax\nxaxaxaxa\n", EOS)
    programs, seeds = [long_prompt, long_lines] * 10, [[3, i] for i in range(20)]
    together = rollout(model, enc, programs, seeds, openers, max_rationale=MAX, rationales=mode)
    alone = [rollout(model, enc, [p], [s], openers, max_rationale=MAX, rationales=mode)[0] for p, s in zip(programs, seeds)]
    assert [key(t) for t in together] == [key(t) for t in alone]


@pytest.mark.parametrize("comments", (1, 3))
@pytest.mark.parametrize("explore", (0.0, 0.6))
def test_rationales_stay_within_a_context_that_has_room_for_one(enc, explore, comments):
    """A well-formed rationale may be followed by the line and then by another: what the first has spent is spent."""
    model, p, most = tiny(0), elbo.parse(enc, "a\n", "x\n" * 6, EOS), 5
    model.limit = len(p) + most + 3                        # a newline more if it has to be closed
    for k in range(40):
        for t in rollout(model, enc, [p] * 8, [[k, i] for i in range(8)], torch.tensor([True] + [False] * 4), max_rationale=most, max_comments=comments,
                               explore=explore):
            assert len(t.tokens) <= model.limit and [x for x, kind in zip(t.tokens, t.kind) if kind == ACTION] == [x for line in p.lines for x in line]


def test_a_program_can_think_just_where_it_has_room(enc):
    """`Program.room` says which programs are taken, the rollout which of them may think: it must be the same number."""
    model, p = tiny(0), elbo.parse(enc, "a\n", "x\n" * 4, EOS)
    for spare in (0, -1):
        model.limit = len(p) + p.room(enc, MAX) + spare
        [t] = rollout(model, enc, [p], [0], torch.tensor([True] + [False] * 4), max_rationale=MAX, rationales="always")
        assert any(t.thinks()) == (spare == 0)


def test_near_the_end_of_the_context_too_a_row_is_what_it_would_be_alone(enc):
    """Whether there is room for one more rationale is a matter of the row's own closings, not of its neighbours'."""
    model, short, long = tiny(0), elbo.parse(enc, "a\n", "x\n" * 5, EOS), elbo.parse(enc, "a\n", "x\n" * 5, EOS)
    long.closings = ["\n" + "x" * 9] * 5
    model.limit = len(short) + 10
    how = dict(openers=torch.tensor([True] + [False] * 4), max_rationale=MAX, explore=0.5)
    for k in range(30):
        both = rollout(model, enc, [short, long], [[k, 0], [k, 1]], **how)
        assert [both[0], both[1]] == [rollout(model, enc, [p], [[k, i]], **how)[0] for i, p in enumerate((short, long))]


@pytest.mark.parametrize("mode, where", [("never", []), ("always", [0, 1]), ("first", [0])])
def test_modes_think_where_they_say(enc, mode, where):
    model, openers = tiny(1), elbo.opener_mask(enc)
    for t in rollout(model, enc, [program(enc)] * 20, [[5, i] for i in range(20)], openers, max_rationale=MAX, rationales=mode):
        assert [i for i, z in enumerate(t.thinks()) if z] == where
        openings = [g for g, kind, line, before in zip(t.gate, t.kind, t.line, [-1] + t.line) if line != before and line >= 0]
        assert mode == "never" or FREE not in openings                  # nothing of what the experiment chose is q's


def test_exploration_opens_gates_which_learn_as_if_q_had_opened_them(enc):
    """A model that never thinks does so at about the share asked for, and the likelihood of those gates is part of log q."""
    model, openers, p = tiny(1), elbo.opener_mask(enc), program(enc)
    shy = copy.deepcopy(model)
    shy.unembed = lambda x: model.unembed(x) - 40.0 * openers
    seeds = [[5, i] for i in range(400)]
    assert not any(any(t.thinks()) for t in rollout(shy, enc, [p] * 400, seeds, openers, max_rationale=MAX))
    traces = rollout(shy, enc, [p] * 400, seeds, openers, max_rationale=MAX, explore=0.3)
    share = sum(sum(t.thinks()) for t in traces) / 800
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 800) ** 0.5
    batch = elbo.collate([t for t in traces if any(t.thinks())][:8])
    gate, token = elbo.score(elbo.logits_of(model, batch), batch, openers)
    opened = (batch.gate[:, 1:] != elbo.NO_GATE) & (batch.kind[:, 1:] == LATENT)
    assert opened.any() and (batch.gate[:, 1:][opened] == FREE).all()
    torch.testing.assert_close(elbo.log_q(gate, token, batch)[opened], (gate + token)[opened])


def test_what_thinking_earns_is_reported(enc):
    """By its definition: return with a rationale minus without, where there are both, for a reward of likelihood and c alone."""
    model, openers, pi, old = tiny(3), elbo.opener_mask(enc), tiny(3), []
    programs, K = [program(enc), elbo.parse(enc, "a\n", "xx\na\nx\n", EOS)], 5
    cfg = estep.EStepConfig(e_rollouts=K, max_rationale=MAX, explore=0.5, c=0.3, broken_cost=0.0, floor=math.inf, horizon=2, gamma=0.5)
    sampled = estep.rollout

    def spy(*args, **how):
        old.extend(sampled(*args, **how))
        return old[:]
    with mock.patch.object(estep, "rollout", spy):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        stats = estep.e_update(model, pi, optimizer, enc, openers, programs, [[0, i] for i in range(2 * K)], cfg, micro_batch=K)
    G = []
    for t in old:
        batch, n = elbo.collate([t]), max(t.line) + 1
        loglik = elbo.by_line(elbo.log_pi(elbo.score(elbo.logits_of(pi, batch), batch, openers)[1], batch), batch, n)[0].tolist()
        r = [x - 0.3 * z for x, z in zip(loglik, t.thinks())]
        G.append([x + 0.5 * y for x, y in zip(r, [*r[1:], 0.0])])
    want = []
    for k in range(0, len(old), K):
        for i in range(len(G[k])):
            with_, without = ([G[j][i] for j in range(k, k + K) if old[j].thinks()[i] == z] for z in (True, False))
            want += [np.mean(with_) - np.mean(without)] if with_ and without else []
    assert len(want) > 2 and stats["uplift"] == pytest.approx(np.mean(want), abs=1e-4)


def test_a_rank_without_a_share_sums_the_same_names_as_the_others(enc):
    """Three programs on four ranks: sums of other names, or in another order, would be added up crosswise."""
    import bench
    import mstep
    import rlvr
    model, openers, seen = tiny(3), elbo.opener_mask(enc), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    problem = bench.Problem("1", "a\n")
    right = lambda model, enc, problems, *rest, **how: ([rlvr.Sample([2], [-1.0], True) for _ in problems], [True, False] * (len(problems) // 2))

    def note(sums):
        if len(sums) > 1:
            seen.append(list(sums))
        return {name: value + 1 for name, value in sums.items()}
    with mock.patch.object(estep, "total", note), mock.patch.object(mstep, "total", note), mock.patch.object(rlvr, "total", note), \
            mock.patch.object(rlvr, "attempt", right):
        for programs, problems in (([program(enc)], [problem]), ([], [])):
            cfg, seeds = estep.EStepConfig(e_rollouts=2, max_rationale=MAX), [[0, i] for i in range(2 * len(programs))]
            estep.e_update(model, copy.deepcopy(model), optimizer, enc, openers, programs, seeds, cfg)
            mstep.m_update(model, optimizer, [p.trace() for p in programs])
            rlvr.rl_update(model, optimizer, enc, problems, [], None, rlvr.RLVRConfig(rl_group=2))
    assert len(seen) == 6 and seen[:3] == seen[3:]


def test_the_tokens_of_a_rollout_are_those_of_its_passes(enc):
    """Counted by hand as the sampler goes: all of the program once, then each comment line and, once more, the code that follows it."""
    t = Trace()
    t.add([2, 1], PROMPT)
    t.add([0, 2, 1], LATENT, 0, FREE)
    t.add([0, 3, 1], LATENT, 0, FREE)
    t.add([3, 3, 1], ACTION, 0, FREE)
    t.add([0, 1], LATENT, 1, FORCED)
    t.add([2, 1, EOS], ACTION, 1, FREE)
    assert estep.rollout_tokens(t) == 2 + 6 + (3 + 6) + (3 + 6) + (2 + 3)


def test_what_breaks_the_format_is_cut_out_and_the_rest_stays(enc):
    model, openers = tiny(1), elbo.opener_mask(enc)
    p = program(enc)
    traces = rollout(model, enc, [p] * 60, [[2, i] for i in range(60)], openers, max_rationale=MAX)
    assert any(t.broken for t in traces)
    for t in traces:
        clean = estep.without_broken(t)
        assert [x for x, k in zip(clean.tokens, clean.kind) if k == ACTION] == p.lines[0] + p.lines[1]
        assert not any(z and i in t.broken for i, z in enumerate(clean.thinks()))
        assert sum(clean.thinks()) == sum(t.thinks()) - len(t.broken)


def test_the_posterior_weighs_versions_piece_by_piece():
    """By hand; and where a rationale is idle the weight is with those that do not think, however dear the next line was."""
    think = torch.tensor([[[True, False, True], [False, False, True], [True, True, True], [True, False, False]],
                          [[False, False, True], [False, True, False], [True, False, False], [False, False, False]]])
    reward = torch.tensor([[[-0.1, 0.0, -2.0], [0.0, 0.0, -3.0], [-0.1, -0.1, -0.2], [-0.1, 0.0, -0.2]],
                           [[0.0, -1.0, -1.0], [0.0, -1.1, -1.0], [-0.1, -1.0, -1.0], [0.0, -1.0, 0.0]]])
    with mock.patch.object(estep, "TAU", 0.1):
        W = estep.posterior(reward, think)                                # (2, 4, 3)
    assert [estep.pieces(z) for z in think] == [[(0, 2), (2, 3)], [(0, 3)]]
    torch.testing.assert_close(W[0, :, 0], torch.tensor([-1.0, 0.0, -2.0, -1.0]).softmax(0))
    torch.testing.assert_close(W[0, :, 2], torch.tensor([-20.0, -30.0, -2.0, -2.0]).softmax(0))
    torch.testing.assert_close(W[1, :, 0], torch.tensor([-20.0, -21.0, -21.0, -10.0]).softmax(0))
    assert W[0, 1, 0] == W[0, :, 0].max() and torch.equal(W[0, :, 1], W[0, :, 0]) and torch.equal(W[1, :, 2], W[1, :, 0])


def test_a_selected_program_takes_each_piece_from_a_version_by_what_paid_there(enc):
    """Odds and pieces against those by hand: cuts where most versions think."""
    pi, openers, p = tiny(2), elbo.opener_mask(enc), program(enc)
    cfg = estep.EStepConfig(c=0.3, floor=3.0, broken_cost=2.0)

    def version(*rationales: list[int], broken=()) -> Trace:
        t = Trace(broken=set(broken))
        t.add(p.prompt, PROMPT)
        for line, rationale in enumerate(rationales):
            t.add(rationale, LATENT, line, FREE)
            t.add(p.lines[line], ACTION, line, FREE)
        return t
    a, x, aa = [0, 2, 1], [0, 3, 1], [0, 2, 2, 1]
    for versions, pieces in (([version(a, x), version(x, aa), version(aa, a), version(a, [], broken=[1])], [(0, 1), (1, 2)]),
                             ([version(a, []), version(x, [])], [(0, 2)]),
                             ([version(a, x), version(x, aa), version(aa, [])], [(0, 2)])):       # 2 of 4: not most
        every, asked = [p.trace(), *versions], []

        def choice(n, p):
            asked.append(p)
            return (n, 2 * n - 1)[len(asked) - 1] % len(every)                                 # the first, the last
        with (mock.patch.object(estep, "TAU", 0.5),
              mock.patch.object(estep.np.random, "default_rng", lambda seed: mock.Mock(choice=choice))):
            out = estep.select(pi, p, versions, openers, cfg, 0)
        tokens = list(p.prompt)
        for (begin, end), odds, k in zip(pieces, asked, (0, -1), strict=False):
            reward = []
            for t in every:
                logp = scores(pi, [t], openers)[2][0].detach()
                own = [torch.tensor([i for i, (k, n) in enumerate(zip(t.kind, t.line)) if (k, n) == (ACTION, line)]) - 1
                       for line in range(begin, end)]
                paid = sum(max(logp[i].sum().item(), -3.0) for i in own) - 0.3 * sum(t.thinks()[begin:end])
                reward.append(paid - 2.0 * sum(begin <= line < end for line in t.broken))
            assert odds == pytest.approx(torch.tensor(reward).div(0.5).softmax(0).numpy(), abs=1e-4)
            tokens += [x for x, n in zip(every[k].tokens, every[k].line) if begin <= n < end]
        assert len(asked) == len(pieces) and out.tokens == tokens


def test_the_trust_region_is_zero_at_pi_and_blind_to_the_gate(enc):
    model, openers = tiny(1), elbo.opener_mask(enc)
    batch = elbo.collate([program(enc).trace()])
    logits = elbo.logits_of(model, batch).detach()
    assert estep.anchor_loss(logits, logits, batch, openers).item() == pytest.approx(0, abs=1e-12)
    gates = (batch.gate[:, 1:] != 0)[batch.scored][:, None] & openers
    assert estep.anchor_loss(logits + 3.0 * gates, logits, batch, openers).item() == pytest.approx(0, abs=1e-6)
    assert estep.anchor_loss(logits + torch.randn_like(logits), logits, batch, openers) > 0.01
