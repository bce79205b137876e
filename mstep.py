"""The M-step: fine-tuning on infused data (paper, section 3).

With q fixed, max_pi E_q sum_t log pi(a_t | s_t, z_t) is next-token prediction on the programs that q has infused. The rationales
are trained on as well, since at test time the model must write them itself. On programs without latents the very same
function is the baseline, next-token prediction (NTP). The corpora that both learn from are read here (`Corpus`), and the embedded
world's base model is made here, by the same loss on web code (`pretrain`).
"""
import ast
import re
import sysconfig
import warnings
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import bench
import elbo
from bench import hub_rows, local_rows, plain
from elbo import ACTION, PROMPT, Batch, Program, Trace, chunks, strip_comments
from model import GPT, GPTConfig, encode_prompt, save_tokenizer


def pack(traces: list[Trace], length: int) -> list[list[int]]:
    """Group traces into rows of at most `length` tokens, first fit in order of decreasing length: lists of indices.

    Raises ValueError for a trace that is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(traces)), key=lambda i: -len(traces[i].tokens)):
        n = len(traces[i].tokens)
        if n > length:
            raise ValueError(f"a program of {n} tokens does not fit rows of {length} tokens; raise the context or drop it")
        for r, free in enumerate(room):
            if n <= free:
                rows[r].append(i)
                room[r] -= n
                break
        else:
            rows.append([i])
            room.append(length - n)
    return rows


def packed_batch(traces: list[Trace], rows: list[list[int]], device=None) -> Batch:
    """Join the traces of each row; `doc` keeps them apart in attention, and padding is a document of its own."""
    joined, docs = [], []
    for row in rows:
        one, doc = Trace(), []
        for n, i in enumerate(row):
            t = traces[i]
            one.tokens, one.kind, one.line, one.gate = one.tokens + t.tokens, one.kind + t.kind, one.line + t.line, one.gate + t.gate
            doc += [n] * len(t.tokens)
        joined.append(one)
        docs.append(doc)
    batch = elbo.collate(joined, device)
    T = batch.tokens.shape[1]
    batch.doc = torch.tensor([d + [len(r)] * (T - len(d)) for d, r in zip(docs, rows)], device=device)
    return batch


def loss(model, batch: Batch) -> Tensor:
    """Summed cross-entropy, in nats, of rationale and action tokens; divide by their number over all ranks and micro-batches.

    Documents begin with a prompt, so no token is predicted from the document before.
    """
    return F.cross_entropy(elbo.logits_of(model, batch).float(), batch.tokens[:, 1:][batch.scored], reduction="sum")


@torch.no_grad()
def action_nll(model, batch: Batch, openers: Tensor) -> tuple[float, int]:
    """-sum of log pi(a_t | s_t, z_t) over action tokens, in nats, and their number: the same tokens with and without latents.

    A line's first token is scored given that it is no comment, for NTP as for RA3: a little less than the usual loss of NTP.
    """
    _, token = elbo.score(elbo.logits_of(model, batch), batch, openers)
    actions = batch.kind[:, 1:] == ACTION
    return -elbo.log_pi(token, batch).sum().item(), int(actions.sum())


# --------------------------------------------------------------------------------------------------------------- the loop


def heldout_nll(run, model: GPT, data, traces: list[Trace]) -> float:
    """Cross-entropy of the action tokens of `traces`, in nats per token."""
    total = np.zeros(2)
    for part in chunks(run.mine(traces), run.s.micro_batch):
        with run.autocast():
            total += action_nll(model, elbo.collate(part, run.device), data.openers)
    nll, n = run.sum(*total)
    return nll / n


def m_step(run, stage: str, model: GPT, data, traces: list[Trace], heldout: list[Trace], n: int, evaluate=None):
    """n updates on `traces` (rationales and actions; or, on programs without latents, NTP). Trains `model` in place.

    On the way it logs the cross-entropy of held-out actions and, with evaluate(model) -> float, the accuracy.
    """
    s = run.s

    def probe(step):
        if step % 25 == 0 or step == n:
            actor = run.actor(model)
            accuracy = {"greedy": evaluate(actor)} if evaluate and (step % 50 == 0 or step == n) else {}
            run.log(phase=stage, step=step, nll=heldout_nll(run, actor, data, heldout), **accuracy)

    optimizer = run.optimizer(torch.optim.AdamW, model, betas=(0.9, 0.95), weight_decay=0.01)
    per_epoch = len(traces) // s.m_programs
    for step in run.steps(stage, model, optimizer, n, s.m_lr, decay=0.9):
        probe(step)
        order = np.random.default_rng(run.draw("mstep", step // per_epoch)).permutation(len(traces))
        picked = [traces[i] for i in order[step % per_epoch * s.m_programs:][:s.m_programs]]
        length = max(s.row_tokens, *(len(t.tokens) for t in picked))
        batches = [packed_batch(picked, rows, run.device) for rows in chunks(run.mine(pack(picked, length)), s.micro_batch)]

        def losses():
            for b in batches:
                with run.autocast():
                    total = loss(model, b)
                yield total

        run.update(model, optimizer, losses(), sum(int(b.scored.sum()) for b in batches))
    probe(n)


# ----------------------------------------------------------------------------------------------------------------- corpora


def standard_library() -> str:
    """The folder of the standard library of this Python: a corpus that every machine has."""
    return sysconfig.get_paths()["stdlib"]


@dataclass
class Corpus:
    """Python programs of a hub dataset, of a JSONL, Parquet or .py file, or of a folder of them (but for .py files in folders called
    test, tests or site-packages): iterate to read on.

        for program in Corpus("codeparrot/codeparrot-clean-valid", "content", limit=2048, size=lambda s: len(enc.encode_ordinary(s))):

    Comment lines are stripped (unless `comments`), what is not Python 3 is dropped, and a program longer than `limit` (as `size` measures: characters, or
    tokens as above) is cut between top-level statements. `dropped` counts what was left out. With `rank` of `ranks`, every ranks-th row
    is read. `position` says what has been handed out: save it, and a Corpus made with it reads on from there. Raises ValueError for a name,
    file, row or column that is not there, and if nothing in the whole corpus is Python.
    """
    name: str
    column: str = "text"
    limit: int = 8192
    size: Callable[[str], int] = len
    split: str = "train"
    subset: str | None = None
    rank: int = 0
    ranks: int = 1
    comments: bool = False                                                # keep comment lines, for a warm start
    position: tuple[int, int] = (0, 0)                                    # rows read, documents of the next row handed out
    dropped: Counter = field(default_factory=Counter)

    def rows(self, start: int) -> Iterator[dict]:
        path = Path(self.name)
        if not path.exists():
            return hub_rows(self.name, self.split, self.subset, start=start)
        files = [path] if path.is_file() else sorted(
            f for f in path.rglob("*") if f.suffix in (".jsonl", ".parquet")
            or f.suffix == ".py" and not {"site-packages", "test", "tests"} & set(f.relative_to(path).parts))
        if not files:
            raise ValueError(f"the folder {self.name!r} has no .py, .jsonl or .parquet file: give one that has, or a hub name")
        return islice(local_rows(files), start, None)

    def __iter__(self) -> Iterator[str]:
        start, skip = self.position
        n, found = start - 1, bool(start or skip)
        for n, row in enumerate(self.rows(start), start):
            if self.column not in row:
                raise ValueError(f"{self.name}: row {n + 1} has no column {self.column!r}; its columns are {', '.join(row)}")
            if n % self.ranks == self.rank:
                for i, text in enumerate(self.documents(row[self.column])):
                    found = True
                    if i >= skip:
                        self.position = (n, i + 1)
                        yield text
            self.position, skip = (n + 1, 0), 0
        if n < 0:
            raise ValueError(f"{self.name}: the dataset is empty; expected programs in its column {self.column!r}")
        if not found and self.ranks == 1:
            raise ValueError(f"{self.name}: nothing in it is a Python program that fits ({dict(self.dropped)}); "
                             f"expected Python 3 in the column {self.column!r}")

    def documents(self, text) -> list[str]:
        """The program, cut into pieces of at most `limit`; none if it is not Python."""
        try:
            text = plain(text) if self.comments else strip_comments(plain(text))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)                                    # the tokenizer alone takes English for Python
        except (ValueError, TypeError, SyntaxError, AttributeError, RecursionError, MemoryError):
            self.dropped["not Python"] += 1
            return []
        if not tree.body:
            self.dropped["empty"] += 1
            return []
        lines, out = text.splitlines(keepends=True), [""]
        begins = sorted({min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", []))]) - 1 for s in tree.body})
        for a, b in zip([0, *begins[1:]], [*begins[1:], len(lines)]):     # what stands above the first statement goes with it
            piece = "".join(lines[a:b])
            if out[-1] and self.size(out[-1] + piece) > self.limit:
                out.append("")
            out[-1] += piece
        kept = [s for s in (piece.strip("\n") + "\n" for piece in out) if self.size(s) <= self.limit]
        self.dropped["too long"] += len(out) - len(kept)
        return kept


def parse_all(s, model: GPT, enc, name: str, texts, least: int) -> list[Program]:
    """Programs of (where, prompt, solution), those that fit the model's context with room for a rationale.

    Raises ValueError for a text that is not Python, if there are fewer than `least`, or if fewer than that fit.
    """
    out, n = [], 0
    for n, (where, prompt, solution) in enumerate(texts, 1):
        try:
            p = elbo.parse(enc, prompt, solution, model.config.eos_id)
        except ValueError as e:
            raise ValueError(f"{name}: {where}: {e}") from None
        out += [p] if len(p) + p.room(enc, s.max_rationale) <= model.limit else []
    if n < least:
        raise ValueError(f"{name}: {n} programs are there, {least} are needed; give more, or lower --rounds, --experts, --e-programs or --m-programs")
    if len(out) < least:
        raise ValueError(f"{name}: {len(out)} of {n} programs fit the context of {model.limit} tokens with room for a rationale, "
                         f"{least} are needed; give more or shorter programs, or a model with a longer context")
    return out


def solved(problems: list[bench.Problem]) -> Iterator[tuple[str, str, str]]:
    """(id, prompt, solution) of the problems that have one."""
    return ((p.id, p.prompt, p.solution) for p in problems if p.solution)


def read_experts(s, model: GPT, enc, n: int = 0, position: tuple[int, int] = (0, 0)) -> tuple[list[Program], tuple[int, int]]:
    """The expert programs of round n, and the corpus position at which the next round begins: the memory holds one round's at a time.

    s: train.Settings. They are of the embedded world, of a benchmark with solutions, or of a corpus. Raises ValueError as `parse_all`.
    """
    least, name = max(s.e_programs, s.m_programs), s.data + (f", round {n + 1}" if n else "")
    if s.data == "world":
        return parse_all(s, model, enc, "world", solved(bench.world("train", s.experts, seed=100 * n)), s.experts), position
    if re.split("[,:@]", s.data)[0] in bench.SOURCES:
        problems = bench.load(s.data, s.data_dir or None, limit=(n + 1) * s.experts)[n * s.experts:]
        return parse_all(s, model, enc, name, solved(problems), least), position
    # A program takes two thirds of the context at most: the rest is for rationales.
    corpus = Corpus(s.data, s.column, limit=2 * model.limit // 3, size=lambda text: len(encode_prompt(enc, text)) + 2, position=tuple(position))
    texts = ((f"program {i}", "", text) for i, text in enumerate(islice(corpus, s.experts)))
    return parse_all(s, model, enc, name, texts, least), corpus.position


def read_commented(s, model: GPT, enc) -> tuple[list[Trace], int]:
    """Programs with their authors' comments as latents, for a warm start, and the number of rows of the corpus read for them.

    They are those with comments at `warm_density` of their lines at least.
    """
    name, column = (standard_library(), "text") if s.warm_data == "stdlib" else (s.warm_data, s.warm_column)
    corpus = Corpus(name, column, limit=s.row_tokens, size=lambda text: len(encode_prompt(enc, text)) + 2, comments=True)
    traces = (elbo.parse_commented(enc, text, model.config.eos_id, s.max_rationale, s.max_comments) for text in corpus)
    out = list(islice((t for t in traces if np.mean(t.thinks()) >= s.warm_density), s.warm_steps * s.m_programs))
    if len(out) < s.m_programs:
        raise ValueError(f"--warm-data {s.warm_data}: {len(out)} programs have comments at {s.warm_density:.0%} of their lines, "
                         f"{s.m_programs} are needed; lower --warm-density, or raise --row-tokens")
    row, documents = corpus.position
    return out, row + bool(documents)


# --------------------------------------------------------------------------------------------------------- the base model


def pretrain(run, folder: str):
    """The embedded world's base model, from scratch, on web code without end: its loss is that of the M-step, its data all new."""
    s = run.s
    enc = bench.train_tokenizer()
    torch.manual_seed(s.seed)
    # Two layers, so that a chain of operations cannot be folded into one forward pass; wide enough to know the arithmetic.
    model = GPT(GPTConfig(vocab_size=enc.n_vocab, d_model=128, n_layer=2, n_head=4, n_kv_head=2, head_dim=32, d_ff=336,
                          eos_id=enc.eot_token)).to(run.device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    if hasattr(torch.optim, "Muon"):                 # torch >= 2.9; ships with it; base/ was made with it
        optimizers = [(torch.optim.Muon(matrices, weight_decay=0.0), 0.01), (torch.optim.Adam(others, betas=(0.9, 0.95)), 3e-3)]
    else:
        optimizers = [(torch.optim.Adam(model.parameters(), betas=(0.9, 0.95)), 3e-3)]
    programs, seen, step = 64, 0, 0
    with tqdm(total=s.pretrain_tokens, unit="token", unit_scale=True, disable=run.rank > 0, mininterval=5.0) as bar:
        while seen < s.pretrain_tokens:
            web = run.mine(bench.world("web", programs, seed=step))
            traces = []
            for p in web:
                traces.append(Trace())
                traces[-1].add(encode_prompt(enc, p.prompt), PROMPT)
                traces[-1].add(enc.encode_ordinary(p.solution) + [enc.eot_token], ACTION, 0)
            batch = packed_batch(traces, pack(traces, s.row_tokens), run.device)
            done = seen / s.pretrain_tokens
            for optimizer, lr in optimizers:         # warm-up, constant, then down to nothing over the last 40%
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.4)
            n, nats = int(batch.scored.sum()), loss(model, batch)
            run.update(model, Optimizers(o for o, _ in optimizers), [nats], n)
            total, tokens = run.sum(nats.item(), n)
            seen, step = seen + int(tokens), step + 1
            bar.update(int(tokens))
            bar.set_postfix_str(f"loss {total / tokens:.3f}")
            if run.rank == 0 and (step % 500 == 0 or seen >= s.pretrain_tokens):
                model.save_pretrained(folder)
                save_tokenizer(enc, folder)


class Optimizers(list):
    """Several optimizers that step as one."""

    def zero_grad(self, **kw):
        for o in self:
            o.zero_grad(**kw)

    def step(self):
        for o in self:
            o.step()
