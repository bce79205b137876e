"""The network against itself: cached and uncached, packed and separate, batched and one by one. (test_pretrained.py: against others.)"""
import copy
import math

import numpy as np
import pytest
import torch

from model import GPT, Decoder, GPTConfig, generate, new_cache, pad, pick, prefill, rope_frequencies

TINY = dict(vocab_size=61, d_model=32, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, d_ff=48, context=64, eos_id=0)
KINDS = {
    "plain": {}, "one kv head each": dict(n_kv_head=4), "one for all": dict(n_kv_head=1),
    "untied, biases": dict(tie_embeddings=False, qkv_bias=True), "qk norm": dict(qk_norm=True, head_dim=16),
    "rope scaling": dict(rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
}


def tiny(seed=0, **changes) -> GPT:
    """A random model with weights so large that every position and every token matters: at 0.02 they hardly do."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.ndim > 1 else 1 + 0.3 * torch.randn_like(p))
    return model


def tokens(*shape, seed=0):
    return torch.randint(1, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ one forward pass


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_logits_equal_uncached(kind):
    """Rows of unequal lengths, several tokens at a time, with rejected tokens rolled back: as if each row had run alone."""
    model, rng, B = tiny(**KINDS[kind]), np.random.default_rng(1), 3
    assert model(tokens(1, 9)).std() > 0.5                          # the models under test are not flat
    cache, kept = new_cache(model, B, 60), [[] for _ in range(B)]
    for T in (5, 1, 7, 3, 1, 1, 6):
        new = tokens(B, T, seed=T + 100 * len(kept[0]))
        logits = model(new, cache=cache)                                                              # (B, T, V)
        for b in range(B):
            alone = model(torch.tensor([kept[b] + new[b].tolist()]))[0, -T:]
            assert (logits[b] - alone).abs().max() < 1e-4
        keep = torch.tensor(rng.integers(0, T + 1, B))              # the cache's length, not its content, says what counts
        cache.length += keep
        for b in range(B):
            kept[b] += new[b, :keep[b]].tolist()
    assert len(set(map(len, kept))) == B                            # the lengths did differ
    cache.length -= torch.tensor([1, 0, 2])                         # and further back than the last call
    kept = [row[:n] for row, n in zip(kept, cache.length.tolist())]
    logits = model(tokens(B, 2, seed=9), cache=cache)
    for b in range(B):
        assert (logits[b] - model(torch.tensor([kept[b] + tokens(B, 2, seed=9)[b].tolist()]))[0, -2:]).abs().max() < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has graphs to record")
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_recorded_pass_is_the_pass(kind, autocast):
    """Rows of unequal lengths, some of which stay where they are, token by token: with and without a graph, and as many tokens are counted."""
    model, counted = tiny(**KINDS[kind]).cuda(), []
    model.register_forward_pre_hook(lambda _, args: counted.append(args[0].numel()))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        caches, prompts = [new_cache(model, 3, 40) for _ in range(2)], tokens(3, 7).cuda()
        for cache in caches:
            cache.kv = cache.kv if autocast else cache.kv.float()
            model(prompts, cache=cache)
            cache.length = torch.tensor([7, 3, 5], device="cuda")
        decode = Decoder(model, caches[1])
        for step in range(8):
            last = tokens(3, seed=step).cuda()
            counted.clear()
            plain = model(last[:, None], cache=caches[0])[:, 0]
            recorded = decode(last)
            assert counted == [3, 3]
            torch.testing.assert_close(plain, recorded, **(dict(rtol=0.05, atol=0.3) if autocast else dict(rtol=1e-4, atol=1e-4)))
            for cache in caches:
                cache.length += torch.tensor([True, step % 2 == 0, step < 4], device="cuda")
    assert decode.graph is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to compare with")
@pytest.mark.parametrize("batch_size", (2, 3, 8))
def test_a_gpu_draws_what_the_cpu_draws(batch_size):
    model, prompts = tiny(), [tokens(n, seed=n).tolist() for n in (3, 9, 1, 5, 5, 2, 7)]
    how = dict(max_new_tokens=20, seeds=list(range(7)), batch_size=batch_size, stop_ids=(3, 5, 8))
    cpu = generate(model, prompts, **how)
    gpu = generate(model.cuda(), prompts, **how)
    assert len({len(s.tokens) for s in cpu}) > 2 and [s.tokens for s in cpu] == [s.tokens for s in gpu]


@torch.no_grad()
def test_rows_of_a_cache_are_selected_copied_and_overwritten():
    model, rows = tiny(), tokens(4, 10)
    cache = new_cache(model, 4, 20)
    model(rows, cache=cache)
    cache.length += torch.tensor([10, 8, 6, 4])
    picked = cache.select(torch.tensor([2, 0, 2]))
    logits = model(tokens(3, 1, seed=5), cache=picked)[:, 0]
    for slot, row, n in ((0, 2, 6), (1, 0, 10), (2, 2, 6)):
        whole = torch.cat([rows[row, :n], tokens(3, 1, seed=5)[slot]])
        assert (logits[slot] - model(whole[None])[0, -1]).abs().max() < 1e-4
    assert cache.length.tolist() == [10, 8, 6, 4]
    prefill(model, cache, [1], [tokens(1, 4, seed=6)[0].tolist()])     # all but the last of four
    logits = model(tokens(4, 1, seed=7), cache=cache)[:, 0]
    assert (logits[1] - model(torch.cat([tokens(1, 4, seed=6)[:, :3], tokens(4, 1, seed=7)[1:2]], 1))[0, -1]).abs().max() < 1e-4
    assert (logits[3] - model(torch.cat([rows[3:, :4], tokens(4, 1, seed=7)[3:]], 1))[0, -1]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_equal_separate_ones(kind):
    """Documents laid end to end in one row, whatever their numbers: each as if it stood alone at position 0."""
    model = tiny(**KINDS[kind])
    lengths = [[5, 1, 9, 3], [2, 2, 14]]
    doc = torch.tensor([[7] * 5 + [8] + [2] * 9 + [0] * 3, [0] * 2 + [1] * 2 + [0] * 14])              # numbers may return later
    x = tokens(2, 18)
    doc[1, 4:] = 3
    logits = model(x, doc=doc)
    for b, row in enumerate(lengths):
        start = 0
        for n in row:
            assert (logits[b, start:start + n] - model(x[b:b + 1, start:start + n])[0]).abs().max() < 1e-4
            start += n


@torch.no_grad()
def test_no_token_sees_the_future_or_the_padding():
    model, x = tiny(), tokens(1, 12)
    y = x.clone()
    y[0, 7] = (y[0, 7] + 1) % 61
    change = (model(x) - model(y)).abs().amax(-1)[0]
    assert change[:7].max() == 0 and change[7:].min() > 1e-3        # it alters itself and all that follows, nothing before
    padded = torch.cat([x, torch.zeros(1, 5, dtype=torch.int64)], 1)
    assert (model(padded)[:, :12] - model(x)).abs().max() < 1e-5


@torch.no_grad()
def test_rotary_positions_are_relative():
    """A query and a key turned to positions p and q have a product that depends on p - q alone, and does depend on it."""
    from model import rotate
    cfg = GPTConfig(head_dim=16)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    freq = rope_frequencies(cfg).double()
    turn = lambda x, p: rotate(x, (p * freq).cos().repeat(2), torch.cat([(-p * freq).sin(), (p * freq).sin()]))
    product = lambda p, r: (turn(q, p) * turn(k, r)).sum().item()
    assert product(3, 1) == pytest.approx(product(103, 101), abs=1e-4) and abs(product(3, 1) - product(3, 2)) > 1e-2


def test_llama3_frequencies():
    """Waves shorter than original / high_freq_factor stay, longer than original / low_freq_factor are slowed by factor, others lie between."""
    cfg = GPTConfig(head_dim=64, rope_theta=500_000.0)
    plain = rope_frequencies(cfg)
    cfg.rope_scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    ratio, wave = rope_frequencies(cfg) / plain, 2 * math.pi / plain
    assert torch.allclose(ratio[wave < 8192 / 4], torch.tensor(1.0)) and torch.allclose(ratio[wave > 8192], torch.tensor(1 / 8))
    middle = ratio[(wave > 8192 / 4) & (wave < 8192)]
    assert len(middle) > 1 and ((middle > 1 / 8) & (middle < 1)).all() and (middle.diff() < 0).all()


def test_gradient_checkpointing_changes_no_gradient():
    model, x = tiny(), tokens(2, 20)
    doc = torch.arange(20).div(7, rounding_mode="floor").expand(2, 20)
    grads = []
    for flag in (False, True):
        model.grad_checkpoint = flag
        model.zero_grad()
        model(x, doc=doc).logsumexp(-1).mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads)) and max(g.abs().max() for g in grads[0]) > 1e-3


@torch.no_grad()
def test_logits_of_some_positions_are_those_of_all():
    for changes in ({}, dict(tie_embeddings=False)):
        model, x = tiny(**changes), tokens(2, 6)
        at = torch.rand(x.shape) < 0.5
        torch.testing.assert_close(model.unembed(model(x, head=False)), model(x))
        torch.testing.assert_close(model(x, at=at), model(x)[at])


@torch.no_grad()
def test_copies_moves_and_dtypes_keep_the_positions():
    model, x = tiny(), tokens(2, 30)
    before = model(x)
    assert torch.equal(copy.deepcopy(model)(x), before)
    assert torch.equal(model.bfloat16().float()(x), GPT.float(copy.deepcopy(model))(x))
    with torch.device("meta"):
        hollow = GPT(model.config)
    hollow(x.to("meta"))                                            # even after a forward pass without numbers
    hollow.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(hollow(x), model(x))


@torch.no_grad()
def test_angles_stay_in_float32():
    """With weights in bfloat16 too: an error in the angle per position would grow along the sequence (20-fold here, if rounded)."""
    half, x = tiny(context=512, rope_theta=50.0).bfloat16(), tokens(2, 512)
    exact = copy.deepcopy(half).float()
    error = (half(x).float() - exact(x)).abs().mean(dim=(0, 2))                                       # (T,)
    assert error[400:].mean() < 2 * error[:50].mean()


@torch.no_grad()
def test_beyond_the_context():
    model = tiny(context=16)
    assert model(tokens(1, 16)).shape == (1, 16, 61)
    with pytest.raises(ValueError, match="17 tokens does not fit the model's context of 16"):
        model(tokens(1, 17))
    cache = new_cache(model, 2, 100)
    cache.length += torch.tensor([3, 15])
    model(tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match="context of 16"):
        model(tokens(2, 2), cache=cache)


# -------------------------------------------------------------------------------------------------------------- sampling


def test_pick_draws_from_the_distribution():
    """Over an even grid of uniforms each token is drawn in exactly its share, to the resolution of the grid."""
    logits, n = torch.tensor([[0.3, -math.inf, 2.0, -1.0, 0.3, -5.0]]), 20_000
    for temperature in (0.5, 1.0, 2.0):
        drawn = pick(logits.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n, temperature)
        share = torch.bincount(drawn, minlength=6) / n
        assert (share - torch.softmax(logits[0] / temperature, -1)).abs().max() < 2 / n
    assert pick(logits, torch.tensor([0.99]), 0).tolist() == [2]    # greedy whatever the uniform
    assert pick(torch.tensor([[-math.inf, 0.0, 0.0]]), torch.tensor([0.0]), 1.0).tolist() == [1]      # never one of probability 0
    assert pick(torch.tensor([[0.0, 0.0]]), torch.tensor([1 - 2**-53], dtype=torch.float64), 1.0).tolist() == [1]


def test_a_large_vocabulary_is_drawn_evenly():
    """Summed in float32, 150k probabilities would lose the tail; the tenths of the vocabulary must be drawn at the tenths."""
    V = 150_000
    drawn = pick(torch.zeros(1, V).expand(99, -1), torch.arange(1, 100, dtype=torch.float64) / 100, 1.0)
    assert (drawn - torch.arange(1, 100) * V / 100).abs().max() <= 1


def test_pick_is_the_inverse_of_the_distribution_function():
    """At 0 and next to 1 too, beside tokens of no probability; whatever the size of the vocabulary."""
    for V in (12, 256, 700):
        logits = 5 * torch.randn(60, V, generator=torch.Generator().manual_seed(V))
        logits[:, :2] = logits[:, V // 2:V // 2 + V // 3] = logits[:, -2:] = -math.inf
        uniform = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        uniform[:20], uniform[20:40] = 0.0, 1 - 2**-40              # ends, next to which tokens have no probability
        cdf = torch.softmax(logits, -1).double().cumsum(-1)
        plain, drawn = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1), pick(logits, uniform, 1.0)
        assert logits.gather(-1, drawn[:, None]).isfinite().all() and len(drawn.unique()) > 2
        assert torch.equal(drawn[:20], plain[:20]) and torch.equal(drawn[40:], plain[40:])


@torch.no_grad()
def naive(model, prompt, seed, n, temperature, stop_ids, stop=None):
    """The definition: one row, no cache, one uniform per token. Returns tokens, logprobs, whether it stopped."""
    out, logps, noise = [], [], np.random.default_rng(seed).random(n)
    while len(out) < n and len(prompt) + len(out) < model.config.context:
        logits = model(torch.tensor([prompt + out]))[0, -1]
        p = torch.softmax(logits.double() / (temperature or 1), -1)
        token = logits.argmax().item() if temperature == 0 else int((p.cumsum(0) <= noise[len(out)] * p.sum()).sum())
        out.append(token)
        logps.append(p[token].log().item())
        if token in stop_ids or (stop and stop(out)):
            return out, logps, True
    return out, logps, False


PROMPTS = [tokens(n, seed=i).tolist() for i, n in enumerate([1, 9, 4, 1, 17, 2, 6, 6, 3, 11, 1, 5])]
SEEDS = [(5, i) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("temperature", [0, 1.0, 1.7])
def test_generate_equals_naive_sampling(batch_size, temperature):
    """Whatever the batch: rows that finish early hand their slot on (small batches) or are dropped (large ones)."""
    model, stop_ids = tiny(), tuple(range(0, 6))                    # several stop tokens: rows end at all sorts of times
    ended = []
    out = generate(model, PROMPTS, max_new_tokens=14, seeds=SEEDS, temperature=temperature, stop_ids=stop_ids, batch_size=batch_size,
                   finished=lambda i, sample: ended.append((i, sample, list(sample.tokens))))
    expected = [naive(model, p, s, 14, temperature, stop_ids) for p, s in zip(PROMPTS, SEEDS)]
    assert [(s.tokens, s.stopped) for s in out] == [(t, stopped) for t, _, stopped in expected]
    assert max(abs(a - b) for s, (_, logps, _) in zip(out, expected) for a, b in zip(s.logprobs, logps, strict=True)) < 1e-4
    assert {s.stopped for s in out} == {True, False} and len({len(s.tokens) for s in out}) > 3
    assert sorted(i for i, *_ in ended) == list(range(12)) and all(sample is out[i] and tokens == sample.tokens for i, sample, tokens in ended)


def test_what_prompts_share_is_computed_once_and_changes_nothing():
    model, shared = tiny(), tokens(7, seed=99).tolist()
    prompts = [shared + p for p in PROMPTS[:6]] + [shared, shared + PROMPTS[1]]     # one is all shared, two are equal
    calls = []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(args[0].numel()))
    out = generate(model, prompts, max_new_tokens=8, seeds=SEEDS[:8], stop_ids=())
    hook.remove()
    assert [s.tokens for s in out] == [naive(model, p, s, 8, 1.0, ())[0] for p, s in zip(prompts, SEEDS)]
    assert calls[:2] == [6, 6 * 17]         # the shared tokens but the last, which is fed when decoding; six distinct rests, the longest of 17


def test_generate_ends_rows_for_each_reason():
    model = tiny(context=20)
    model.n_vocab = 40                                              # the other rows of its matrix are padding, no tokens
    stop = lambda t: len(t) >= 2 and sum(t) % 5 == 0
    out = generate(model, PROMPTS, max_new_tokens=6, seeds=SEEDS, stop_ids=(), stop=stop, batch_size=3)
    assert [(s.tokens, s.stopped) for s in out] == [naive(model, p, s, 6, 1.0, (), stop)[::2] for p, s in zip(PROMPTS, SEEDS)]
    assert all(max(s.tokens) < 40 for s in out)
    lengths = [(len(p) + len(s.tokens), len(s.tokens), s.stopped) for p, s in zip(PROMPTS, out)]
    assert any(whole == 20 and not stopped for whole, _, stopped in lengths)    # cut off by the context,
    assert any(n == 6 and not stopped for _, n, stopped in lengths)            # by max_new_tokens,
    assert any(stopped for *_, stopped in lengths)                              # or stopped
    by_default = generate(model, PROMPTS, max_new_tokens=100, seeds=SEEDS)      # the default stop: end of document
    assert all(s.stopped == (s.tokens[-1] == 0) and 0 not in s.tokens[:-1] for s in by_default) and any(s.stopped for s in by_default)


def test_generate_in_bfloat16_and_under_autocast():
    model = tiny()
    exact = generate(model, PROMPTS, max_new_tokens=5, seeds=SEEDS, temperature=0, stop_ids=())
    with torch.autocast("cpu", torch.bfloat16):
        auto = generate(model, PROMPTS, max_new_tokens=5, seeds=SEEDS, temperature=0, stop_ids=(), batch_size=4)
    half = generate(model.bfloat16(), PROMPTS, max_new_tokens=5, seeds=SEEDS, temperature=0, stop_ids=(), batch_size=4)
    for other in (auto, half):                                      # rounding may tip a near tie, not most of them
        assert sum(a.tokens[0] == b.tokens[0] for a, b in zip(exact, other)) >= 10


def test_generate_refuses_what_it_cannot_continue():
    model = tiny(context=16)
    assert generate(model, [], max_new_tokens=3, seeds=[]) == []
    for prompt, size in (([], 0), ([1] * 16, 16)):
        with pytest.raises(ValueError, match=f"prompt 1 has {size} tokens; between 1 and 15 fit"):
            generate(model, [[1], prompt], max_new_tokens=3, seeds=[0, 1])
    with pytest.raises(ValueError, match="2 prompts, but 1 seeds"):
        generate(model, [[1], [2]], max_new_tokens=3, seeds=[0])
    assert pad([[1, 2], [], [3]], 9).tolist() == [[1, 2], [9, 9], [3, 9]]
