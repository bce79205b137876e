"""The M-step: fine-tuning on infused data (paper, section 3).

With q fixed, max_pi E_q sum_t log pi(a_t | s_t, z_t) is next-token prediction on the programs that q has infused. The rationales
are trained on as well, since at test time the model must write them itself. On programs without latents the very same
function is the baseline, next-token prediction (NTP).
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import elbo
from elbo import PROMPT, Batch, Trace, chunks
from model import GPT


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


def counted(batch: Batch) -> Tensor:
    """(B, T - 1) bool: the targets that the loss counts: rationales and actions. Documents begin with a prompt, so none is counted across them."""
    return batch.kind[:, 1:] != PROMPT


def loss(model, batch: Batch) -> Tensor:
    """Summed cross-entropy, in nats, of rationale and action tokens; divide by `counted` of all ranks and micro-batches."""
    keep = counted(batch)
    return F.cross_entropy(elbo.logits_of(model, batch)[keep].float(), batch.tokens[:, 1:][keep], reduction="sum")


@torch.no_grad()
def action_nll(model, batch: Batch, openers: Tensor) -> tuple[float, int]:
    """-sum of log pi(a_t | s_t, z_t) over action tokens, in nats, and their number: the same tokens with and without latents."""
    _, token = elbo.score(elbo.logits_of(model, batch), batch, openers)
    actions = batch.kind[:, 1:] == elbo.ACTION
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
            accuracy = {"greedy": evaluate(model)} if evaluate and (step % 50 == 0 or step == n) else {}
            run.log(phase=stage, step=step, nll=heldout_nll(run, model, data, heldout), **accuracy)

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
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

        run.update(model, optimizer, losses(), sum(int(counted(b).sum()) for b in batches))
    probe(n)
