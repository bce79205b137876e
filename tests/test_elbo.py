"""The temporal ELBO, proved by enumeration on a tiny model: every latent path of a three-line program is listed."""
import itertools
import math

import pytest
import tiktoken
import torch

import elbo
from elbo import ACTION, FREE, LATENT, NO_GATE, PROMPT, Trace
from model import GPT, GPTConfig

GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

CODE = '''\
import os


class Stack:
    """A stack.

    # not a comment
    """
    # a comment of its own
    def __init__(self, items=(1,
                              2)):
        self.items = list(items)  # beside code
        if not items:
            # nothing there
            self.items = [
                # inside brackets
                0,
            ]

    def pop(self):
    \treturn self.items.pop()
'''


def encoding(pattern: str) -> tiktoken.Encoding:
    """Byte-level BPE with merges learnt from CODE, so that newlines, spaces and punctuation do merge."""
    from tiktoken._educational import bpe_train
    ranks = bpe_train(CODE * 3, 330, pattern, visualise=None)
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 330})


@pytest.fixture(scope="module")
def enc():
    return encoding(GPT2)


def tiny(seed: int, enc) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=enc.n_vocab, d_model=16, n_layer=2, n_head=2, n_kv_head=1, head_dim=8, d_ff=32, eos_id=enc.eot_token))
    for p in model.parameters():            # far from uniform, so that a wrong formula shows
        p.data += 0.3 * torch.randn_like(p)
    return model


# ---------------------------------------------------------------------------------------------------------------- the text


def test_comment_lines_go_strings_and_comments_beside_code_stay():
    out = elbo.strip_comments(CODE)
    assert "a comment of its own" not in out and "nothing there" not in out and "inside brackets" not in out
    assert "# not a comment" in out and "# beside code" in out
    assert "\t" not in out and "\n        return self.items.pop()" in out
    compile(out, "out", "exec")


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3])
@pytest.mark.parametrize("prompt", ["", "import os\n\n\nclass Stack:\n"])
def test_pieces_concatenate_to_the_tokens_of_the_whole(pattern, prompt):
    enc = encoding(pattern)
    code = elbo.strip_comments(CODE)
    p = elbo.parse(enc, prompt, code[len(prompt):], enc.eot_token)
    tokens = [t for part in ([] if not prompt and p.prompt == [enc.eot_token] else p.prompt, *p.lines) for t in part]
    assert tokens == enc.encode_ordinary(code) + [enc.eot_token]


def test_decision_points_stand_at_statements_only(enc):
    code = elbo.strip_comments(CODE)
    p = elbo.parse(enc, "", code, enc.eot_token)
    first = [enc.decode(line).strip().split("\n")[0] for line in p.lines]
    assert first == ["import os", "class Stack:", '"""A stack.', "def __init__(self, items=(1,", "self.items = list(items)  # beside code",
                     "if not items:", "self.items = [", "def pop(self):", "return self.items.pop()"]
    assert p.closings[4] == "\n       " and p.closings[0] == "\n"


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3])
def test_a_rationale_at_a_decision_point_is_a_comment_line_of_a_valid_program(pattern):
    enc = encoding(pattern)
    p = elbo.parse(enc, "", elbo.strip_comments(CODE), enc.eot_token)
    openers = elbo.opener_mask(enc)
    text = ""
    for line, closing in zip(p.lines, p.closings):
        lead = " " if closing != "\n" else ""
        rationale = enc.encode_ordinary(lead + "# why" + closing)
        assert openers[rationale[0]] and not openers[line[0]]
        text += enc.decode(rationale + line)
    text = text.replace("<|endoftext|>", "")
    compile(text, "infused", "exec")
    assert text.count("# why") == len(p.lines)
    assert elbo.strip_comments(text) == elbo.strip_comments(CODE)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3])
def test_an_authors_comments_become_the_latents(pattern):
    enc, eos = encoding(pattern), encoding(pattern).eot_token
    source = ("# a block of\n# two lines\nx = 1\n# set y\ny = 2\ndef f(a):\n    # loop over a\n    for b in a:\n# elsewhere\n        print(b)  # beside\n"
              "    s = '''\n# no comment\n    '''\n\t# by a tab\n\treturn s\n#\nz = 3\n# left over\n").replace("\t", "    ")
    t = elbo.parse_commented(enc, source, eos, 40)
    latents = "".join(enc.decode([x]) if k == LATENT else "|" for x, k in zip(t.tokens, t.kind))
    assert [x.strip() for x in latents.split("|") if x.strip()] == ["# set y", "# loop over a", "# by a tab"]
    kept = source.replace("# a block of\n# two lines\n", "").replace("# elsewhere\n", "").replace("#\nz", "z").replace("# left over\n", "")
    assert t.tokens == [eos, *enc.encode_ordinary(kept), eos] and enc.decode(t.tokens[1:-1]) == kept
    openers = elbo.opener_mask(enc)
    assert all(g == NO_GATE or bool(openers[x]) == (k == LATENT) for x, k, g in zip(t.tokens, t.kind, t.gate))
    assert not any(elbo.parse_commented(enc, source, eos, 2).thinks())
    t = elbo.parse_commented(enc, source, eos, 40, max_comments=2)       # blocks too: a decision point before each of their lines
    assert enc.decode(t.tokens[1:-1]) == "# a block of\n# two lines\n" + kept and [k == LATENT for k, g in zip(t.kind, t.gate) if g].index(False) == 2
    assert all(g == NO_GATE or bool(openers[x]) == (k == LATENT) for x, k, g in zip(t.tokens, t.kind, t.gate))


@pytest.mark.parametrize("bad", ["", "   \n", "def f(:\n", "x = (1,\n", "  x = 1\n y = 2\n"])
def test_what_is_not_a_program_is_refused_in_one_sentence(enc, bad):
    with pytest.raises(ValueError) as e:
        elbo.parse(enc, "", bad, enc.eot_token)
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------------------- bookkeeping


def infused(enc) -> Trace:
    t = Trace()
    t.add(enc.encode_ordinary("def f(x):\n   "), PROMPT)
    t.add(enc.encode_ordinary(" # add\n   "), LATENT, 0, FREE)
    t.add(enc.encode_ordinary(" x = x + 1\n   "), ACTION, 0, FREE)
    t.add(enc.encode_ordinary(" return x\n") + [enc.eot_token], ACTION, 1, FREE)
    return t


def test_log_q_and_log_pi_add_up_to_the_log_probability_of_the_infused_text(enc):
    model, trace = tiny(0, enc), infused(enc)
    batch = elbo.collate([trace, infused(enc)])
    openers = elbo.opener_mask(enc)
    gate, token = elbo.score(elbo.logits_of(model, batch), batch, openers)
    logits = model(batch.tokens[:, :-1])
    logp = logits.log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
    total = elbo.log_q(gate, token, batch) + elbo.log_pi(token, batch)
    n = trace.kind.count(PROMPT)
    torch.testing.assert_close(total[:, n - 1:], logp[:, n - 1:])
    # q(think) is the mass of the openers at the decision point; pi is normalised over what does not open.
    p = logits[0, n - 1].softmax(-1)
    torch.testing.assert_close(gate[0, n - 1].exp(), p[openers].sum())
    act = n - 1 + trace.kind.count(LATENT)
    p = logits[0, act].softmax(-1)
    torch.testing.assert_close(token[0, act].exp(), p[trace.tokens[act + 1]] / p[~openers].sum())


def test_forced_gates_belong_to_neither(enc):
    model, trace = tiny(0, enc), infused(enc)
    forced = infused(enc)
    forced.gate = [elbo.FORCED if g else 0 for g in forced.gate]
    batch, other = elbo.collate([trace]), elbo.collate([forced])
    openers = elbo.opener_mask(enc)
    gate, token = elbo.score(elbo.logits_of(model, batch), batch, openers)
    difference = elbo.log_q(gate, token, batch) - elbo.log_q(gate, token, other)
    torch.testing.assert_close(difference, gate)


def test_values_are_summed_by_line(enc):
    batch = elbo.collate([infused(enc)])
    ones = torch.ones(batch.tokens[:, 1:].shape)
    line = torch.tensor(infused(enc).line)
    torch.testing.assert_close(elbo.by_line(ones, batch, 3)[0], torch.tensor([(line == t).sum().float() for t in range(3)]))


# ---------------------------------------------------------------------------------------------------------------- the bound


class Enumerated:
    """All latent paths of a three-line program under a tiny model, three latents: what happened before, or one of two rationales.

    z_t is the rationale in force. Keeping it writes nothing; changing to another writes its comment line.
    """
    RATIONALES = (" # add\n   ", " # list\n   ", " # self\n   ")
    LINES = (" x = x + 1\n   ", " y = x * 2\n   ", " return y\n")

    def __init__(self, enc, seed):
        self.n = len(self.RATIONALES)
        self.paths = list(itertools.product(range(self.n), repeat=len(self.LINES)))
        openers, model, traces = elbo.opener_mask(enc), tiny(seed, enc), []
        for path in self.paths:
            t, last = Trace(), 0
            t.add(enc.encode_ordinary("def f(x):\n   " + self.RATIONALES[0]), PROMPT)      # z_{-1} = 0 is in force
            for i, (z, line) in enumerate(zip(path, self.LINES)):
                if z != last:
                    t.add(enc.encode_ordinary(self.RATIONALES[z]), LATENT, i, elbo.FORCED)
                t.add(enc.encode_ordinary(line), ACTION, i, elbo.FORCED)
                last = z
            traces.append(t)
        batch = elbo.collate(traces)
        with torch.no_grad():
            _, token = elbo.score(elbo.logits_of(model, batch), batch, openers)
        self.log_pi = elbo.by_line(elbo.log_pi(token, batch), batch, len(self.LINES)).double()       # (N, L)

    def log_prior(self, alpha):
        p = elbo.prior(alpha, self.n).log()
        return torch.stack([torch.stack([p[a, b] for a, b in zip((0, *path), path)]) for path in self.paths])

    def conditionals(self, weights):
        """log q(z_t | z_<t), (N, L), of a distribution over paths given by its (N,) probabilities."""
        out = torch.zeros(len(self.paths), len(self.LINES), dtype=torch.float64)
        for i, path in enumerate(self.paths):
            for t in range(len(path)):
                prefix = lambda n: sum(w for w, p in zip(weights, self.paths) if p[:n] == path[:n])
                out[i, t] = (prefix(t + 1) / prefix(t)).log()
        return out

    def loglik(self, alpha):
        return (self.log_pi + self.log_prior(alpha)).sum(-1).logsumexp(0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("alpha", [0.1, 0.9])
def test_the_bound_never_exceeds_the_log_likelihood_and_meets_it_at_the_posterior(enc, seed, alpha):
    world = Enumerated(enc, seed)
    truth, prior = world.loglik(alpha), world.log_prior(alpha)
    torch.manual_seed(seed)
    gaps = []
    for _ in range(20):
        q = torch.softmax(2 * torch.randn(len(world.paths), dtype=torch.float64), 0)
        gaps.append(truth - elbo.bound(world.log_pi, world.conditionals(q), prior, q))
    assert min(gaps) > 1e-6                                             # strictly below for any other q
    posterior = torch.softmax((world.log_pi + prior).sum(-1), 0)
    at = elbo.bound(world.log_pi, world.conditionals(posterior), prior, posterior)
    torch.testing.assert_close(at, truth, rtol=0, atol=1e-9)


def test_alpha_one_gives_next_token_prediction(enc):
    world = Enumerated(enc, 0)
    plain = world.paths.index((0, 0, 0))
    torch.testing.assert_close(world.loglik(1.0), world.log_pi[plain].sum())
    q = torch.zeros(len(world.paths), dtype=torch.float64)
    q[plain] = 1.0
    torch.testing.assert_close(elbo.bound(world.log_pi, torch.zeros_like(world.log_pi), world.log_prior(1.0), q), world.log_pi[plain].sum())
    for alpha in (0.9, 0.99, 0.999, 0.9999):                            # and approaches it on the way
        assert abs(world.loglik(alpha) - world.log_pi[plain].sum()) < 40 * (1 - alpha)


def test_horizon_one_gives_the_objective_of_brite(enc):
    """One latent before the whole program: E_q log pi(program | z) - KL(q(z) || p(z)), computed here from its definition."""
    world = Enumerated(enc, 1)
    whole = [i for i, path in enumerate(world.paths) if len(set(path)) == 1]
    log_pi = world.log_pi[whole].sum(-1, keepdim=True)                  # (3, 1): the program as one action
    prior = elbo.prior(0.5, world.n)[0]
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    brite = (q * log_pi[:, 0]).sum() - (q * (q / prior).log()).sum()
    torch.testing.assert_close(elbo.bound(log_pi, q.log()[:, None], prior.log()[:, None], q), brite)
    assert brite <= torch.logsumexp(log_pi[:, 0] + prior.log(), 0)


def test_the_kl_of_proposition_4_1(enc):
    torch.manual_seed(0)
    for n, alpha in itertools.product((2, 3, 50), (0.0, 0.3, 0.95)):
        q = torch.softmax(3 * torch.randn(n, dtype=torch.float64), 0)
        stay = 0
        g = 1 - q[stay]
        new = torch.cat([q[:stay], q[stay + 1:]]) / g
        p = elbo.prior(alpha, n)[stay]
        torch.testing.assert_close(elbo.kl_exact(g, -(new * new.log()).sum(), alpha, n), (q * (q / p).log()).sum())
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(elbo.kl_exact(zero, zero, 0.5, 4), -torch.tensor(0.5 + 0.5 / 4, dtype=torch.float64).log())
    with pytest.raises(ValueError):
        elbo.prior(1.5, 3)


def test_line_rewards_are_the_sum_of_their_parts():
    think, broken = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    r = elbo.line_rewards(torch.tensor([[-1.0, -9.0, -2.0]]), think, broken, c=0.05, broken_cost=0.5, floor=4.0)
    torch.testing.assert_close(r, torch.tensor([[-1.0 - 0.05 - 0.5, -4.0 - 0.05, -2.0]]))
    priceless = elbo.line_rewards(torch.zeros(1, 2), torch.tensor([[True, False]]), torch.zeros(1, 2), c=math.inf, broken_cost=0.0)
    assert priceless.tolist() == [[-math.inf, 0.0]]
