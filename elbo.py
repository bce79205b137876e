"""The temporal ELBO: programs as lines with latents, the prior and its cost, likelihoods, the bound (paper, section 3).

An expert program is a sequence of actions a_0 .. a_{T-1}, one line of code each. Before line t stands a latent z_t: `<act>`,
"go on as you were", or `<think>`, a new rationale, which is a comment line. The text with its rationales is still a program:

        out = []                               z = <act>
        # 3 * 4 = 12 - 5 = 7                   z = <think>, a rationale ...
        for x in xs:                           ... and the action it stands before

Where exactly does z_t stand in a token sequence? Tokenizers merge a newline with the indentation after it (GPT-2) or with the
punctuation before it (Llama-3, Qwen). So the text is cut *just before the last space of a line's indentation* (before its first
character if there is none). The tokens of the whole text have a border there in either family, and one token decides: it
either opens a comment (its text starts with `#` after at most one space) or begins the expert's line. With p the model's next-token
distribution at that *decision point*,

    q(think) = sum of p over the openers          q(act) = 1 - q(think)
    pi(first token of a_t) = p(token) / q(act)

and log q + log pi add up to the log-probability of the infused text, exactly and token by token (`score`). The choice between
think and act is the *gate* of a decision point. There is one before each comment line and one before the action: a rationale
ends where the gate says `act`, and that last gate is part of q(z_t) too.

Symbols: B rows, T tokens, L lines, V vocabulary. All likelihoods are natural logarithms (nats).
"""
import io
import re
import tokenize
from dataclasses import dataclass, field

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from model import encode_prompt

# -------------------------------------------------------------------------------------------- what each token of a text is

PROMPT, LATENT, ACTION = 0, 1, 2       # given text; chosen by q; the expert's (or, in RLVR, the policy's) code
NO_GATE, FREE, FORCED = 0, 1, 2        # not at a decision point; at one where q chose; at one where the experiment chose


@dataclass
class Trace:
    """A token sequence with what each token is: the one record that every phase reads and writes.

    tokens, kind, line, gate: lists of one length; `line` is -1 in the prompt (a closing that had to
    be forced on a rationale is of kind PROMPT, but of that line). broken: lines whose rationale breaks the format.
    """
    tokens: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    gate: list[int] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)

    def of(self, line: int, kind: int) -> list[int]:
        """The tokens of one kind of one line: its rationale, or its action."""
        return [x for x, k, n in zip(self.tokens, self.kind, self.line) if n == line and k == kind]

    def add(self, tokens: list[int], kind: int, line: int = -1, gate: int = NO_GATE):
        """Append tokens of one kind; `gate` says whether the first of them stands at a decision point."""
        self.tokens += tokens
        self.kind += [kind] * len(tokens)
        self.line += [line] * len(tokens)
        self.gate += [gate] * bool(tokens) + [NO_GATE] * (len(tokens) - 1)

    def thinks(self) -> list[bool]:
        """Per line: does a rationale stand before it?"""
        out = [False] * (max(self.line, default=-1) + 1)
        for kind, line in zip(self.kind, self.line):
            if kind == LATENT:
                out[line] = True
        return out


@dataclass
class Program:
    """A tokenised expert program: what comes before it, its lines, and for each line what a rationale there ends with."""
    prompt: list[int]
    lines: list[list[int]]             # tokens of a line, from its decision point to the next one
    closings: list[str]                # newline + indentation up to the decision point

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.lines))

    def room(self, enc: tiktoken.Encoding, max_rationale: int) -> int:
        """Tokens to leave free for a rationale anywhere in the program: its own, and a closing that had to be forced."""
        return max_rationale + 1 + max(len(enc.encode_ordinary(c)) for c in set(self.closings))

    def trace(self) -> Trace:
        """The program without latents: <act> everywhere, which makes mid-training next-token prediction."""
        out = Trace()
        out.add(self.prompt, PROMPT)
        for t, line in enumerate(self.lines):
            out.add(line, ACTION, t, FREE)
        return out


def python_tokens(source: str) -> list[tokenize.TokenInfo]:
    """Python's own tokens. Raises ValueError if `source` is not Python."""
    try:
        return list(tokenize.generate_tokens(io.StringIO(source, newline="\n").readline))
    except (tokenize.TokenError, SyntaxError) as e:
        raise ValueError(f"not a Python program: {e.args[0]}") from None


def comment_lines(tokens: list[tokenize.TokenInfo]) -> dict[int, str]:
    """Line number, from 1 -> the comment that is all that stands there."""
    return {tok.start[0]: tok.string for tok in tokens if tok.type == tokenize.COMMENT and not tok.line[:tok.start[1]].strip()}


def statements(source: str) -> list[int]:
    """Offset of the first character of every statement: lines inside strings and continuation lines begin none.

    Raises ValueError if `source` is not Python.
    """
    starts = [0]
    for line in source.split("\n"):                      # not splitlines, which also splits at form feeds and the like
        starts.append(starts[-1] + len(line) + 1)
    skip = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    out, fresh = [], True
    for tok in python_tokens(source):
        if tok.type == tokenize.NEWLINE:
            fresh = True
        elif fresh and tok.type not in skip:
            out.append(starts[tok.start[0] - 1] + tok.start[1])
            fresh = False
    return out


def strip_comments(source: str) -> str:
    """Drop the lines that hold only a comment, and turn tabs of the indentation into spaces; comments beside code stay.

    Comment lines are the very thing that is latent here. Raises ValueError if `source` is not Python.
    """
    tokens = python_tokens(source)
    lines = re.findall(r".*\n|.+", source)
    inside = {n for tok in tokens for n in range(tok.start[0] + 1, tok.end[0] + 1) if tok.type != tokenize.NEWLINE}
    alone = comment_lines(tokens)
    out = []
    for n, line in enumerate(lines, 1):
        if n in alone:
            continue
        body = line.lstrip("\t ")
        out.append(line if n in inside else line[:len(line) - len(body)].expandtabs(4) + body)
    return "".join(out)


def parse(enc: tiktoken.Encoding, prompt: str, solution: str, eos: int) -> Program:
    """Cut prompt + solution at the decision points of the solution. A prompt that is not Python (a few-shot text) is left alone.

    eos ends the last line; where there is no prompt it is the prompt, so that every action has a token before it.
    Raises ValueError if the solution is empty or not Python.
    """
    text = prompt + solution
    try:
        begins = [i for i in statements(text) if i >= len(prompt)]
    except ValueError:
        begins = [i + len(prompt) for i in statements(solution)]
    if not begins:
        raise ValueError("the program has no statement")
    indents = [text[text.rfind("\n", 0, i) + 1:i] for i in begins]
    cuts = [i - bool(indent) for i, indent in zip(begins, indents)]                  # before the last space of the indentation
    head, *lines = encode_cut(enc, text, cuts)
    lines[-1].append(eos)
    return Program(encode_prompt(enc, "") + head or [eos], lines, ["\n" + indent[:-1] for indent in indents])


def encode_cut(enc: tiktoken.Encoding, text: str, cuts: list[int]) -> list[list[int]]:
    """The tokens of a text, cut at ascending character offsets.

    Cut first and tokenised then, a piece that ends in blank lines would get other tokens than it has in the whole (GPT-2 and SmolLM2
    leave the last newline to what follows). Only where the whole cannot be cut there (a token reaches across, or bytes that
    the tokenizer does not know have gone) are the pieces tokenised one by one.
    """
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    tokens = enc.encode_ordinary(text)
    ends = np.cumsum([0] + [len(enc.decode_single_token_bytes(t)) for t in tokens])           # bytes before each token, and in all
    marks = np.cumsum([0] + [len(piece.encode("utf-8", "replace")) for piece in pieces])
    at = np.searchsorted(ends, marks)
    if ends[-1] != marks[-1] or not np.array_equal(ends[at], marks):
        return [enc.encode_ordinary(piece) for piece in pieces]
    return [tokens[a:b] for a, b in zip(at, at[1:])]


def rationale(enc: tiktoken.Encoding, program: Program, t: int, comment: str) -> list[int]:
    """The tokens of the comment line `# ...` before line t, from the line's decision point to the next one."""
    lead = " " if enc.decode(program.lines[t]).startswith(" ") else ""               # the last space of the indentation, if any
    return enc.encode_ordinary(lead + comment + program.closings[t])


def parse_commented(enc: tiktoken.Encoding, source: str, eos: int, max_rationale: int, max_comments: int = 1) -> Trace:
    """A program with its author's comments as latents: what a cold base is warmed up on.

    The rationale of a line is the block of comment lines right above it, at its indentation. A block of more than max_comments lines or
    max_rationale tokens is dropped, for q could not write it. Raises ValueError as `parse` does.
    """
    program, comments = parse(enc, "", strip_comments(source), eos), comment_lines(python_tokens(source))
    lines, out = source.split("\n"), Trace()
    out.add(program.prompt, PROMPT)

    def indent(n: int) -> str:
        return lines[n - 1][:len(lines[n - 1]) - len(lines[n - 1].lstrip())]
    for t, start in enumerate(statements(source)):
        here = source.count("\n", 0, start) + 1                                      # the number of its line, from 1
        first = here
        while first - 1 in comments:
            first -= 1
        block = range(first, here)
        if len(block) <= max_comments and all(indent(n) == indent(here) and comments[n].strip("# \t") for n in block):
            pieces = [rationale(enc, program, t, comments[n]) for n in block]
            for piece in pieces if sum(map(len, pieces)) <= max_rationale else ():
                out.add(piece, LATENT, t, FREE)
        out.add(program.lines[t], ACTION, t, FREE)
    return out


def opener_mask(enc: tiktoken.Encoding) -> Tensor:
    """(V,) bool: the tokens that open a comment, i.e. whose text starts with `#` after at most one space."""
    mask = torch.zeros(enc.n_vocab, dtype=torch.bool)
    special = set(enc._special_tokens.values())
    for i in range(enc.n_vocab):
        if i not in special:
            try:
                mask[i] = enc.decode_single_token_bytes(i).removeprefix(b" ").startswith(b"#")
            except KeyError:                                                         # a hole in the vocabulary
                pass
    return mask


# -------------------------------------------------------------------------------------------------------------- likelihoods


@dataclass
class Batch:
    """Traces padded to one length, on a device: all (B, T) int64."""
    tokens: Tensor
    kind: Tensor
    line: Tensor
    gate: Tensor
    doc: Tensor | None = None          # document numbers where rows are packed

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def scored(self) -> Tensor:
        """(B, T - 1) bool: the targets that likelihoods are wanted of: rationales and actions, N in all; not prompts, not padding."""
        return self.kind[:, 1:] != PROMPT


def chunks(items: list, n: int) -> list[list]:
    """Cut a list into lists of at most n."""
    return [items[i:i + n] for i in range(0, len(items), n)]


def collate(traces: list[Trace], device=None) -> Batch:
    """Pad traces on the right: padding is PROMPT, which no loss counts and, being last, no token attends to."""
    width = max(len(t.tokens) for t in traces)

    def fill(name: str, value: int) -> Tensor:
        rows = [getattr(t, name) for t in traces]
        return torch.tensor([r + [value] * (width - len(r)) for r in rows], dtype=torch.int64, device=device)
    return Batch(fill("tokens", 0), fill("kind", PROMPT), fill("line", -1), fill("gate", NO_GATE))


def logits_of(model, batch: Batch) -> Tensor:
    """(N, V): the model's predictions of the tokens that are `batch.scored`, row by row."""
    return model(batch.tokens[:, :-1], doc=None if batch.doc is None else batch.doc[:, :-1], at=batch.scored)


def score(logits: Tensor, batch: Batch, openers: Tensor) -> tuple[Tensor, Tensor]:
    """Split log p(token) at the decision points into the gate's and the token's part: two (B, T - 1) tensors, which add up to it.

    logits: (N, V) of `logits_of`. Entry i speaks of token i + 1; prompts have 0. gate: log q(think) or log q(act) at decision points,
    0 elsewhere. token: log-probability of the token given its gate. So log q(z) sums both over LATENT tokens and the gate over ACTION
    tokens, but for gates that were FORCED (`log_q`); log pi(a | s, z) sums `token` over ACTION.
    """
    target, where = batch.tokens[:, 1:][batch.scored], batch.gate[:, 1:][batch.scored] != NO_GATE        # (N,) each
    logp = -F.cross_entropy(logits.float(), target, reduction="none")                                    # (N,)
    p = logits[where].float().log_softmax(-1)                                                            # (gates, V)
    opens = openers[target[where]]                                                                       # (gates,)
    side = torch.where(opens[:, None], openers, ~openers)                                                # (gates, V): the gate's side
    gate = torch.zeros_like(logp).masked_scatter(where, p.masked_fill(~side, -torch.inf).logsumexp(-1))  # (N,)
    zero = logp.new_zeros(batch.scored.shape)                                                            # (B, T-1)
    return zero.masked_scatter(batch.scored, gate), zero.masked_scatter(batch.scored, logp - gate)


def log_q(gate: Tensor, token: Tensor, batch: Batch) -> Tensor:
    """(B, T - 1): each token's part of log q(z_t | s_t, z_{t-1}); nothing of what the experiment forced, nothing of the expert's."""
    free = batch.gate[:, 1:] == FREE
    latent = batch.kind[:, 1:] == LATENT
    return torch.where(free, gate, 0.0) + torch.where(latent, token, 0.0)


def log_pi(token: Tensor, batch: Batch) -> Tensor:
    """(B, T - 1): each token's part of log pi(a_t | s_t, z_t)."""
    return torch.where(batch.kind[:, 1:] == ACTION, token, 0.0)


def by_line(values: Tensor, batch: Batch, n_lines: int) -> Tensor:
    """Sum (B, T - 1) token values into (B, L) line values."""
    line = batch.line[:, 1:]
    out = values.new_zeros(len(batch), n_lines + 1)
    return out.scatter_add_(1, line + 1, values)[:, 1:]                              # column 0 gathers the prompt's


def opening_gate(gate: Tensor, batch: Batch, n_lines: int) -> tuple[Tensor, Tensor]:
    """(B, L) log-probability of q's choice at each line's first decision point, and (B, L) bool: was it q that chose there?"""
    first = (batch.line[:, 1:] != batch.line[:, :-1]) & (batch.gate[:, 1:] == FREE)
    return by_line(gate * first, batch, n_lines), by_line(first.float(), batch, n_lines) > 0


# -------------------------------------------------------------------------------------------------- prior, penalty, the bound


def prior(alpha: float, n: int) -> Tensor:
    """Proposition 4.1: p(z' | z) = alpha * [z' = z] + (1 - alpha) / n, as an (n, n) matrix over n latents, row z, column z'.

    Raises ValueError unless 0 <= alpha <= 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a probability; got {alpha}")
    return alpha * torch.eye(n, dtype=torch.float64) + (1 - alpha) / n


def kl_exact(g: Tensor, entropy_new: Tensor, alpha: float, n: int) -> Tensor:
    """KL(q || p) under the prior of Proposition 4.1, from the gate and the entropy of what is new (section 3, exact form).

    g: q(z_t != z_{t-1}); entropy_new: entropy (nats) of q over the n - 1 other latents given that it leaves; any one shape.

        KL = KL(Bern(g) || Bern(1 - alpha')) + g * (log(n - 1) - H(q_new)),   alpha' = alpha + (1 - alpha) / n
    """
    stay = torch.as_tensor(alpha + (1 - alpha) / n, dtype=g.dtype)
    bernoulli = torch.xlogy(g, g) - torch.xlogy(g, 1 - stay) + torch.xlogy(1 - g, 1 - g) - torch.xlogy(1 - g, stay)
    rest = torch.log(torch.tensor(n - 1.0, dtype=g.dtype)) - entropy_new
    return bernoulli + torch.where(g > 0, g * rest, 0.0)


def bound(log_pi: Tensor, log_q: Tensor, log_prior: Tensor, q: Tensor) -> Tensor:
    """Theorem 3.1: J = E_q sum_t [ log pi(a_t | s_t, z_t) - (log q(z_t) - log p(z_t)) ], over listed latent paths.

    log_pi, log_q, log_prior: (N, L) of N paths; q: (N,) weights of the paths (their probabilities, or 1/N for samples from q).
    """
    per_path = (log_pi - log_q + log_prior).sum(-1)                                  # (N,)
    return torch.where(q > 0, q * per_path, 0.0).sum()


def line_rewards(log_pi: Tensor, think: Tensor, broken: Tensor, gate: Tensor, free: Tensor, *, c: float, beta: float,
                 p_think: float, broken_cost: float, floor: float = torch.inf) -> Tensor:
    """The E-step's reward of each line, (B, L), in nats: the summand of the bound with the algorithm's penalty in place of the KL.

        r_t = max(log pi(a_t | s_t, z_t), -floor) - c [z_t != act] + beta (log p(gate_t) - log q(gate_t)) - broken_cost [format broken]

    gate, free: log q of the choice at the opening gate, and whether q chose (see `opening_gate`). The beta term is the gate's own part of the exact KL, with
    prior p(think) = p_think. It keeps the choice open until rationales have become good; without it the gate closes first.
    floor: no line counts as worse than that many nats; one wrong rationale in ten costs 8 nats and would drown the other nine.
    """
    log_prior = torch.where(think, torch.tensor(p_think).log(), torch.tensor(1 - p_think).log())
    price = torch.where(think, c, 0.0)                                               # c * think would be nan where an infinite c is not paid
    return log_pi.clamp(min=-floor) - price + beta * torch.where(free, log_prior - gate, 0.0) - broken_cost * broken
