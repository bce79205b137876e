"""The temporal ELBO: latents, likelihoods, the reward, the bound; and programs as lines (paper, section 3).

An expert program is a sequence of actions a_0 .. a_{T-1}, one line of code each. Before line t stands a
latent z_t: `<act>`, "go on as you were", or `<think>`, a new rationale, which is a comment line. With its
rationales the text is still a program:

        out = []                               z = <act>
        # 3 * 4 = 12 - 5 = 7                   z = <think>, a rationale ...
        for x in xs:                           ... and the action it stands before

Where exactly does z_t stand in a token sequence? Tokenizers merge a newline with the indentation after it
(GPT-2) or with the punctuation before it (Llama-3, Qwen). So the text is cut *just before the last space of a
line's indentation* (before its first character if there is none). There the tokens of the whole text have a
border in either family, and one token decides: it opens a comment (its text starts with `#` after at most one
space), or it begins the expert's line. With p the model's next-token distribution at that *decision point*,

    q(think) = sum of p over the openers          q(act) = 1 - q(think)
    pi(first token of a_t) = p(token) / q(act)

so log q + log pi add up to the log-probability of the infused text, exactly and token by token (`score`). The
choice between think and act is the *gate* of a decision point. There is one before each comment line and one
before the action: a rationale ends where the gate says `act`, and that last gate is part of q(z_t) too.

Symbols: B rows, T tokens, L lines, V vocabulary, N scored tokens. Likelihoods are natural logarithms (nats).
"""
import io
import re
import tokenize
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Encoding, encode_prompt, load_pretrained

# ------------------------------------------------------------------------------ what each token of a text is

PROMPT, LATENT, ACTION = 0, 1, 2      # given text; chosen by q; the expert's (or, in RLVR, the policy's) code
NO_GATE, FREE, FORCED = 0, 1, 2       # no decision point; one that q chose, or learns from; one it does not


@dataclass
class Trace:
    """A token sequence with what each token is: the one record that every phase reads and writes.

    tokens, kind, line, gate: lists of one length; `line` is -1 in the prompt. A closing that had to be forced
    on a rationale is of kind PROMPT, but of that line. broken: lines whose rationale breaks the format.
    """
    tokens: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    gate: list[int] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)

    def add(self, tokens: list[int], kind: int, line: int = -1, gate: int = NO_GATE):
        """Append tokens of one kind; `gate` says whether the first of them stands at a decision point."""
        self.tokens += tokens
        self.kind += [kind] * len(tokens)
        self.line += [line] * len(tokens)
        self.gate += [gate] * bool(tokens) + [NO_GATE] * (len(tokens) - 1)

    def thinks(self) -> list[bool]:
        """Per line: does a rationale stand before it?"""
        latent = {line for kind, line in zip(self.kind, self.line) if kind == LATENT}
        return [t in latent for t in range(max(self.line, default=-1) + 1)]


@dataclass
class Batch:
    """Traces in rows of one length, on a device: all (B, T) int64. doc: a token's trace; padding has -1."""
    tokens: Tensor
    kind: Tensor
    line: Tensor
    gate: Tensor
    doc: Tensor

    @property
    def scored(self) -> Tensor:
        """(B, T - 1) bool: the targets whose likelihoods are wanted, rationales and actions, N in all."""
        return self.kind[:, 1:] != PROMPT


def collate(traces: list[Trace], device=None, rows: list[list[int]] | None = None) -> Batch:
    """Traces in rows, padded on the right: padding is PROMPT, which no loss counts and no token attends to.

    rows: the numbers of the traces in each row, of `mstep.pack`; None: each has its own.
    """
    rows = rows or [[i] for i in range(len(traces))]
    width = max(sum(len(traces[i].tokens) for i in row) for row in rows)

    def fill(of: Callable[[int], list], value: int) -> Tensor:
        joined = [[x for i in row for x in of(i)] for row in rows]
        padded = [row + [value] * (width - len(row)) for row in joined]
        return torch.tensor(padded, dtype=torch.int64, device=device)         # (B, T)
    values = dict(tokens=0, kind=PROMPT, line=-1, gate=NO_GATE)
    fields = {name: fill(lambda i: getattr(traces[i], name), value) for name, value in values.items()}
    return Batch(**fields, doc=fill(lambda i: [i] * len(traces[i].tokens), -1))


def chunks(items: list, n: int) -> list[list]:
    """Cut a list into lists of at most n."""
    return [items[i:i + n] for i in range(0, len(items), n)]


# ----------------------------------------------------------------------------------------------- likelihoods


def states_of(model, batch: Batch) -> Tensor:
    """(N, D): the model's last hidden states before the tokens that are `batch.scored`, row by row."""
    return model(batch.tokens[:, :-1], doc=batch.doc[:, :-1], at=batch.scored, head=False)


def logits_of(model, batch: Batch) -> Tensor:
    """(N, V): the model's predictions of the tokens that are `batch.scored`, row by row."""
    return model.unembed(states_of(model, batch))


def token_logprobs(model, batch: Batch) -> Tensor:
    """log p of each scored token given what stands before it: (N,), row by row."""
    def part(x: Tensor, target: Tensor) -> list[Tensor]:
        return [-F.cross_entropy(model.unembed(x).float(), target, reduction="none")]
    return model.in_parts(part, states_of(model, batch), batch.tokens[:, 1:][batch.scored])[0]


def score(logits: Tensor, batch: Batch, openers: Tensor) -> tuple[Tensor, Tensor]:
    """Split log p(token) into the gate's part and the token's part, two (B, T - 1) tensors that add up to it.

    logits: (N, V) of `logits_of`; openers: (V,) bool. Entry i speaks of token i + 1; prompts have 0.
    gate: log q(think) or log q(act) at decision points, 0 elsewhere. token: log p(token) given its gate.
    """
    target = batch.tokens[:, 1:][batch.scored]                                # (N,)
    at_gate = batch.gate[:, 1:][batch.scored] != NO_GATE                      # (N,)
    logp = -F.cross_entropy(logits.float(), target, reduction="none")         # (N,)
    p = logits[at_gate].float().log_softmax(-1)                               # (gates, V)
    opens = openers[target[at_gate]]                                          # (gates,)
    same_side = torch.where(opens[:, None], openers, ~openers)                # (gates, V)
    log_gate = p.masked_fill(~same_side, -torch.inf).logsumexp(-1)            # (gates,)
    gate = torch.zeros_like(logp).masked_scatter(at_gate, log_gate)           # (N,)
    zero = logp.new_zeros(batch.scored.shape)                                 # (B, T-1)
    return zero.masked_scatter(batch.scored, gate), zero.masked_scatter(batch.scored, logp - gate)


def log_q_parts(gate: Tensor, token: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Two (B, T - 1) parts of log q(z_t | s_t, z_{t-1}): of q's own gates, of the rationales' tokens."""
    free = batch.gate[:, 1:] == FREE
    latent = batch.kind[:, 1:] == LATENT
    return torch.where(free, gate, 0.0), torch.where(latent, token, 0.0)


def log_q(gate: Tensor, token: Tensor, batch: Batch) -> Tensor:
    """(B, T - 1): each token's part of log q(z_t | s_t, z_{t-1})."""
    return sum(log_q_parts(gate, token, batch))


def log_pi(token: Tensor, batch: Batch) -> Tensor:
    """(B, T - 1): each token's part of log pi(a_t | s_t, z_t)."""
    return torch.where(batch.kind[:, 1:] == ACTION, token, 0.0)


def by_line(values: Tensor, batch: Batch, n_lines: int) -> Tensor:
    """Sum (B, T - 1) token values into (traces, L) line values."""
    doc, line = batch.doc[:, 1:], batch.line[:, 1:]
    real = line >= 0
    out = values.new_zeros(int(doc.max()) + 1, n_lines)
    return out.index_put_((doc[real], line[real]), values[real], accumulate=True)


# ------------------------------------------------------------------------------ reward, prior, KL, the bound


def line_rewards(log_pi: Tensor, think: Tensor, broken: Tensor, *, c: float, broken_cost: float,
                 floor: float = torch.inf) -> Tensor:
    """The E-step's reward of each line, (B, L), in nats: the bound's summand with c in place of the KL.

        r_t = max(log pi(a_t | s_t, z_t), -floor) - c [z_t != act] - broken_cost [format broken]

    think, broken: (B, L) bool. floor: the most nats that a line may cost, since one wrong rationale in ten,
    at 8 nats, would drown the other nine.
    """
    price = torch.where(think, c, 0.0)                # c * think would be nan where an infinite c is not paid
    return log_pi.clamp(min=-floor) - price - broken_cost * broken


def prior(alpha: float, n: int) -> Tensor:
    """Proposition 4.1: p(z' | z) = alpha [z' = z] + (1 - alpha) / n, as an (n, n) matrix, row z, column z'.

    Raises ValueError unless 0 <= alpha <= 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a probability; got {alpha}")
    return alpha * torch.eye(n, dtype=torch.float64) + (1 - alpha) / n


def kl_exact(g: Tensor, entropy_new: Tensor, alpha: float, n: int) -> Tensor:
    """KL(q || p) under the prior of Proposition 4.1, from q's gate and the entropy of what is new.

    g: q(z_t != z_{t-1}); entropy_new: entropy (nats) of q over the n - 1 other latents, given that it leaves.

        KL = KL(Bern(g) || Bern(1 - alpha')) + g (log(n - 1) - H(q_new)),    alpha' = alpha + (1 - alpha) / n
    """
    stay = torch.as_tensor(alpha + (1 - alpha) / n, dtype=g.dtype)
    leaving = torch.xlogy(g, g) - torch.xlogy(g, 1 - stay)
    staying = torch.xlogy(1 - g, 1 - g) - torch.xlogy(1 - g, stay)
    text = torch.tensor(n - 1.0, dtype=g.dtype).log() - entropy_new
    return leaving + staying + torch.where(g > 0, g * text, 0.0)


def bound(log_pi: Tensor, log_q: Tensor, log_prior: Tensor, q: Tensor) -> Tensor:
    """Theorem 3.1: J = E_q sum_t [log pi(a_t | s_t, z_t) - (log q(z_t) - log p(z_t))], over listed paths.

    log_pi, log_q, log_prior: (N, L) of N paths. q: (N,) their probabilities, or 1/N for samples from q.
    """
    per_path = (log_pi - log_q + log_prior).sum(-1)                           # (N,)
    return torch.where(q > 0, q * per_path, 0.0).sum()


# ----------------------------------------------------------------- programs as lines, cut at decision points


@dataclass
class Program:
    """A tokenised expert program.

    prompt: tokens before it; lines: tokens of each line, from its decision point to the next one;
    closings: what a rationale before each line ends with, newline + indentation up to the decision point.
    """
    prompt: list[int]
    lines: list[list[int]]
    closings: list[str]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.lines))

    def room(self, enc: Encoding, max_rationale: int) -> int:
        """Tokens to leave free for a rationale anywhere: its own, and a closing that had to be forced."""
        closings = {len(enc.encode_ordinary(closing)) for closing in set(self.closings)}
        return max_rationale + 1 + max(closings)

    def trace(self) -> Trace:
        """The program without latents: <act> everywhere, which makes mid-training next-token prediction."""
        out = Trace()
        out.add(self.prompt, PROMPT)
        for t, line in enumerate(self.lines):
            out.add(line, ACTION, t, FREE)
        return out


def parse(enc: Encoding, prompt: str, solution: str, eos: int) -> Program:
    """Cut prompt + solution at the decision points of the solution; the prompt need not be Python.

    eos ends the last line; where there is no prompt it is the prompt, so that every action has a token before
    it. Raises ValueError if the solution is empty or not Python.
    """
    text = prompt + solution
    try:
        begins = [i for i in statements(text) if i >= len(prompt)]
    except ValueError:
        begins = [i + len(prompt) for i in statements(solution)]
    if not begins:
        raise ValueError("the program has no statement")
    indents = [text[text.rfind("\n", 0, i) + 1:i] for i in begins]
    borders = [i - bool(indent) for i, indent in zip(begins, indents)]   # before the indentation's last space
    head, *lines = encode_pieces(enc, text, borders)
    lines[-1].append(eos)
    return Program(encode_prompt(enc, "") + head or [eos], lines, ["\n" + indent[:-1] for indent in indents])


def encode_pieces(enc: Encoding, text: str, borders: list[int]) -> list[list[int]]:
    """The tokens of a text, in pieces between ascending character offsets.

    The text is tokenised whole: alone, a piece that ends in blank lines would get other tokens (GPT-2 leaves
    the last newline to what follows). Only where a token reaches across a border are the pieces tokenised one
    by one.
    """
    borders = [0, *borders, len(text)]
    tokens = enc.encode_ordinary(text)
    lengths = [len(enc.decode_single_token_bytes(t)) for t in tokens]
    token_at = {byte: n for n, byte in enumerate(accumulate(lengths, initial=0))}
    at = [token_at.get(len(text[:b].encode("utf-8", "replace"))) for b in borders]
    if None in at or at[-1] != len(tokens):
        return [enc.encode_ordinary(text[a:b]) for a, b in pairwise(borders)]
    return [tokens[a:b] for a, b in pairwise(at)]


def rationale(enc: Encoding, program: Program, t: int, comment: str) -> list[int]:
    """The tokens of the comment line `# ...` before line t, from one decision point to the next."""
    lead = " " if enc.decode(program.lines[t]).startswith(" ") else ""  # the indentation's last space, if any
    return enc.encode_ordinary(lead + comment + program.closings[t])


def parse_commented(enc, source: str, eos: int, max_rationale: int, max_comments: int = 1) -> Trace:
    """A program with its author's comments as latents: what a cold base is warmed up on.

    The rationale of a line is the block of comment lines right above it, at its indentation. A block of more
    than max_comments lines or max_rationale tokens, which q could not write, is dropped. Raises as `parse`
    does.
    """
    program, comments = parse(enc, "", strip_comments(source), eos), comment_lines(python_tokens(source))
    out = Trace()
    out.add(program.prompt, PROMPT)
    for t, start in enumerate(statements(source)):
        column = start - source.rfind("\n", 0, start) - 1
        number, block = source.count("\n", 0, start) + 1, []
        while number - 1 in comments:
            number -= 1
            block.insert(0, comments[number])
        said = [rationale(enc, program, t, tok.string) for tok in block]
        fits = len(said) <= max_comments and sum(map(len, said)) <= max_rationale
        if fits and all(tok.start[1] == column and tok.string.strip("# \t") for tok in block):
            for tokens in said:
                out.add(tokens, LATENT, t, FREE)
        out.add(program.lines[t], ACTION, t, FREE)
    return out


def python_tokens(source: str) -> list[tokenize.TokenInfo]:
    """Python's own tokens. Raises ValueError if `source` is not Python."""
    try:
        return list(tokenize.generate_tokens(io.StringIO(source, newline="\n").readline))
    except (tokenize.TokenError, SyntaxError) as e:
        raise ValueError(f"not a Python program: {e.args[0]}") from None


def comment_lines(tokens: list[tokenize.TokenInfo]) -> dict[int, tokenize.TokenInfo]:
    """Line number, from 1 -> the comment that is all that stands there."""
    comments = [tok for tok in tokens if tok.type == tokenize.COMMENT]
    return {tok.start[0]: tok for tok in comments if not tok.line[:tok.start[1]].strip()}


def statements(source: str) -> list[int]:
    """Offset of every statement's first character: none is in a string or on a continuation line.

    Raises ValueError if `source` is not Python.
    """
    lengths = [len(line) + 1 for line in source.split("\n")]          # splitlines also splits at form feeds
    line_starts = list(accumulate(lengths, initial=0))
    layout = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    out, fresh = [], True
    for tok in python_tokens(source):
        if tok.type == tokenize.NEWLINE:
            fresh = True
        elif fresh and tok.type not in layout:
            line, column = tok.start
            out.append(line_starts[line - 1] + column)
            fresh = False
    return out


def strip_comments(source: str) -> str:
    """Drop the lines that hold only a comment, and turn tabs at the start of lines into spaces.

    Comment lines are the very thing that is latent here; comments beside code stay. Raises ValueError if
    `source` is not Python.
    """
    alone = comment_lines(python_tokens(source))
    lines = re.findall(r".*\n|.+", source)
    kept = "".join(line for n, line in enumerate(lines, 1) if n not in alone)
    return re.sub(r"^[ \t]+", lambda indent: indent[0].expandtabs(4), kept, flags=re.MULTILINE)


def opener_mask(enc: Encoding) -> Tensor:
    """(V,) bool: the tokens that open a comment, i.e. whose text starts with `#` after at most one space."""
    mask = torch.zeros(enc.n_vocab, dtype=torch.bool)
    for text, i in enc._mergeable_ranks.items():             # special tokens are not among them
        if i < enc.n_vocab:
            mask[i] = text.removeprefix(b" ").startswith(b"#")
    return mask


def demo():
    """Print an infused program token by token; then the bound beside the log-likelihood."""
    model, enc = load_pretrained(Path(__file__).parent / "base")
    head = 'def f(xs):\n    """add 3 * 4 - 5; list"""\n'
    body = "    xs = [x + 7 for x in xs]\n    return xs\n"
    latents = ("", "    # add\n", "    # 3 * 4 = 12 - 5 = 7\n")             # <act>, or one of two rationales
    traces = [parse_commented(enc, head + z + body, enc.eot_token, max_rationale=40) for z in latents]
    batch, shown = collate(traces), traces[2]
    batch.kind[batch.line < 2] = PROMPT                                  # `def` and the docstring are given
    gate, token = score(logits_of(model, batch).detach(), batch, opener_mask(enc))
    q, pi = log_q(gate, token, batch), log_pi(token, batch)                                    # (3, T - 1)
    print("token               kind line gate    log q   log pi   (kind 1: latent, 2: action)")
    for i in range(shown.kind.index(LATENT), len(shown.tokens)):
        what = f"{shown.kind[i]:5}{shown.line[i]:5}{shown.gate[i]:5}{q[2, i - 1]:9.3f}{pi[2, i - 1]:9.3f}"
        print(f"{enc.decode(shown.tokens[i:i + 1])!r:19}{what}")
    joint = pi.sum(1) + prior(0.5, 3)[0].log()                                                 # (3,)
    own, best = q.sum(1).softmax(0), joint.softmax(0)                    # q of the base, and the posterior
    J = [bound(joint[:, None], p.log()[:, None], 0, p) for p in (own, best)]
    truth = joint.logsumexp(0)
    print(f"bound: {J[0]:.3f} by the base's q, {J[1]:.3f} by the posterior; log-likelihood: {truth:.3f}")
    print("check, below it, and equal by the posterior:", bool(J[0] < truth and (J[1] - truth).abs() < 1e-4))


if __name__ == "__main__":
    demo()
