"""The M-step: fine-tuning on infused data (paper, section 3).

With q fixed, max_pi E_q sum_t log pi(a_t | s_t, z_t) is next-token prediction on the programs that q has infused. The rationales
are trained on as well, since at test time the model must write them itself. On programs without latents the very same
function is the baseline, next-token prediction (NTP).
"""
import torch
import torch.nn.functional as F
from torch import Tensor

import elbo
from elbo import PROMPT, Batch, Trace


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
    doc = None if batch.doc is None else batch.doc[:, :-1]
    logits = model(batch.tokens[:, :-1], doc=doc)                                                       # (B, T-1, V)
    keep = counted(batch)
    return F.cross_entropy(logits[keep].float(), batch.tokens[:, 1:][keep], reduction="sum")


@torch.no_grad()
def action_nll(model, batch: Batch, openers: Tensor) -> tuple[float, int]:
    """-sum of log pi(a_t | s_t, z_t) over action tokens, in nats, and their number: the same tokens with and without latents."""
    _, token = elbo.score(model, batch, openers)
    actions = batch.kind[:, 1:] == elbo.ACTION
    return -elbo.log_pi(token, batch).sum().item(), int(actions.sum())
