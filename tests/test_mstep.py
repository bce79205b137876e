"""The M-step: packing changes nothing, what is counted is what is trained, and NTP is the case without latents."""
import copy
import time

import pytest
import torch

import elbo
import mstep
from elbo import ACTION, FREE, LATENT, PROMPT, Trace
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, n_kv_head=1, head_dim=8, d_ff=32, context=64))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def traces(n: int) -> list[Trace]:
    g, out = torch.Generator().manual_seed(1), []
    for _ in range(n):
        draw = lambda low, high: torch.randint(1, 40, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()
        t = Trace()
        t.add(draw(1, 5), PROMPT)
        for line in range(2):
            t.add(draw(0, 4), LATENT, line, FREE)
            t.add(draw(1, 6), ACTION, line, FREE)
        out.append(t)
    return out


def test_packing_keeps_every_trace_and_every_row_fits():
    ts = traces(50)
    rows = mstep.pack(ts, 40)
    assert sorted(i for row in rows for i in row) == list(range(50))
    assert all(sum(len(ts[i].tokens) for i in row) <= 40 for row in rows)
    assert len(rows) < 50
    with pytest.raises(ValueError, match="does not fit"):
        mstep.pack(ts, 8)


def test_an_updates_rows_fit_the_model_and_come_so_many_at_a_time():
    ts = traces(20)
    longest = max(len(t.tokens) for t in ts)
    for limit in (longest, 99):                                      # up to twice as long as the longest, where the model allows that
        parts = elbo.chunks(mstep.packed_rows(ts, limit), 3)
        assert longest <= max(sum(len(ts[i].tokens) for i in row) for rows in parts for row in rows) <= min(limit, 2 * longest)
        assert sorted(i for rows in parts for row in rows for i in row) == list(range(20)) and {len(rows) for rows in parts[:-1]} == {3}


def test_rows_are_as_long_as_pads_least():
    """14 with 10, 10 with 10, and once more: three rows of 24. Rows of 14 would be six, rows of 21 (then 20 wide) four."""
    ts = [Trace(tokens=[1] * n) for n in (10, 10, 14, 10, 10, 10)]
    rows = mstep.packed_rows(ts, 99)
    assert [sum(len(ts[i].tokens) for i in row) for row in rows] == [24, 20, 20]


def test_loss_and_gradient_of_packed_rows_are_those_of_the_documents_alone(model):
    ts = traces(20)
    packed = elbo.collate(ts, rows=mstep.pack(ts, 40))
    grads, losses = [], []
    for batches in ([packed], [elbo.collate([t]) for t in ts]):
        total = sum(mstep.loss(model, b) for b in batches)
        losses.append(total)
        grads.append(torch.autograd.grad(total, list(model.parameters())))
    torch.testing.assert_close(losses[0], losses[1])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert int(packed.scored.sum()) == sum(k != PROMPT for t in ts for k in t.kind)


def test_prompts_are_not_trained_and_rationales_are(model):
    t = traces(1)[0]
    batch = elbo.collate([t])
    logp = model(batch.tokens[:, :-1]).log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[0, :, 0]
    mine = -sum(lp for lp, kind in zip(logp, t.kind[1:]) if kind in (LATENT, ACTION))
    torch.testing.assert_close(mstep.loss(model, batch), mine)


def test_action_cross_entropy_counts_the_same_tokens_with_and_without_latents(model):
    openers = torch.zeros(40, dtype=torch.bool)
    openers[7] = True
    ts = traces(12)
    plain = []
    for t in ts:
        new = Trace()
        for token, kind, line, gate in zip(t.tokens, t.kind, t.line, t.gate):
            if kind != LATENT:
                new.add([token], kind, line, gate)
        plain.append(new)
    n = sum(k == ACTION for t in ts for k in t.kind)
    assert n == sum(k == ACTION for t in plain for k in t.kind)
    for group in (ts, plain):
        by_hand = 0.0
        for t in group:
            logp = model(torch.tensor([t.tokens]))[0].log_softmax(-1).double()
            for i in range(1, len(t.tokens)):
                act = logp[i - 1][~openers].logsumexp(0) if t.gate[i] else 0.0
                by_hand -= (logp[i - 1, t.tokens[i]] - act) * (t.kind[i] == ACTION)
        for size in (1, 5, 12):
            assert mstep.action_nll(model, group, openers, size) == pytest.approx(float(by_hand) / n, rel=1e-4)


def test_the_meter_counts_training_alone_and_padding_behind_rows(model):
    meter, tokens = mstep.Meter(), torch.tensor([[5, 0, 6, 0, 0], [1, 2, 3, 4, 5]])
    model = copy.deepcopy(model)
    meter.watch(model)
    meter.read()
    for _ in range(2):
        model(tokens)
        with torch.no_grad():
            model(tokens)
    copy.deepcopy(model)(tokens)                                     # pi is a copy
    meter.peak, meter.began = 1e6, time.time() - 2.0
    seen = meter.read(1000)
    assert seen["padding"] == 0.2 and seen["tokens/s"] == pytest.approx(500, rel=0.05)
    weights = sum(p.numel() for p in model.parameters())
    assert seen["mfu"] == pytest.approx(2 * weights * 500 / 1e6, rel=0.05)
    assert meter.read(1000)["padding"] == 0


def test_an_update_is_packed_well(model):
    """Also where most programs are longer than half of the longest: rows take more than one."""
    model, meter = copy.deepcopy(model), mstep.Meter()
    meter.watch(model)
    for low in (3, 15):
        ts = [t for t in traces(400) if len(t.tokens) >= low][:64]
        mstep.m_update(model, torch.optim.SGD(model.parameters(), 0.0), ts, micro_batch=16)
        assert 0 <= meter.read(1)["padding"] < 0.1
