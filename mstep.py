"""The M-step: fine-tuning on infused data (paper, section 3). Without latents it is next-token prediction.

With q fixed, max_pi E_q sum_t log pi(a_t | s_t, z_t) is next-token prediction on the programs that q has
infused. The rationales are trained on as well, since at test time the model must write them itself:

    loss = - 1/N sum over rationale and action tokens of log p(token | what stands before it)

with N their number over all ranks and micro-batches. On programs without latents the very same update is the
baseline, NTP. Below stand the optimizer step that all phases share (`optimize`, `Masters`), and the corpora
that programs are read from (`corpus`).
"""
import ast
import math
import sysconfig
import time
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import elbo
from bench import hub_rows, local_rows
from elbo import ACTION, PROMPT, Batch, Trace, chunks, strip_comments
from model import GPT, load_pretrained


@dataclass
class MStepConfig:
    """What the M-step can be told, with the reason for each default."""
    m_steps: Annotated[int, "updates of the M-step, and of next-token prediction"] = 60
    m_programs: Annotated[int, "programs per update of the M-step"] = 64
    m_lr: Annotated[float, "the M-step's learning rate; best for NTP of 1e-4, 3e-4, 1e-3"] = 3e-4


# ------------------------------------------------------------------------------------------------ the update


def m_update(model: GPT, optimizer, traces: list[Trace], micro_batch: int = 32) -> dict[str, float]:
    """One update of the model, in place, on this rank's share of the traces.

    micro_batch: packed rows per pass. Returns what to watch, over all ranks; loss: nats per trained token.
    """
    parts = chunks(packed_rows(traces, model.limit), micro_batch)
    batches = [elbo.collate(traces, model.device, rows) for rows in parts]
    trained, nats = sum(int(b.scored.sum()) for b in batches), []

    def losses():
        for batch in batches:
            out = loss(model, batch)
            nats.append(out.item())
            yield out
    norm = optimize(model, optimizer, losses(), trained)
    sums = total(dict(nats=sum(nats), trained=trained, tokens=3 * sum(len(t.tokens) for t in traces)))
    return dict(loss=sums["nats"] / sums["trained"], grad_norm=norm, tokens=sums["tokens"])


def loss(model, batch: Batch) -> Tensor:
    """Summed cross-entropy, in nats, of rationale and action tokens; divide by their number over all ranks.

    Documents begin with a prompt, so no token is predicted from the document before.
    """
    return -elbo.token_logprobs(model, batch).sum()


def packed_rows(traces: list[Trace], limit: int) -> list[list[int]]:
    """The rows of `pack` for the length that pads least: one to two times the longest, at most `limit`."""
    sizes = [len(t.tokens) for t in traces]
    lengths = [min(max(sizes, default=0) * eighths // 8, limit) for eighths in range(8, 17)]

    def area(rows: list[list[int]]) -> int:                            # of a rank that has none: 0
        return len(rows) * max((sum(sizes[i] for i in row) for row in rows), default=0)
    return min((pack(traces, length) for length in lengths), key=area)


def pack(traces: list[Trace], length: int) -> list[list[int]]:
    """Rows of indices of traces, at most `length` tokens a row: first fit in order of decreasing length.

    Raises ValueError for a trace that is longer than a row.
    """
    rows, room = [], []
    for i in sorted(range(len(traces)), key=lambda i: -len(traces[i].tokens)):
        n = len(traces[i].tokens)
        if n > length:
            raise ValueError(f"a program of {n} tokens does not fit rows of {length} tokens")
        row = next((r for r, free in enumerate(room) if n <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(i)
        room[row] -= n
    return rows


@torch.no_grad()
def action_nll(model, traces: list[Trace], openers: Tensor, micro_batch: int = 32) -> float:
    """-log pi(a_t | s_t, z_t) per action token, in nats, over all ranks; with latents and without the same.

    A line's first token is scored given that it is no comment, so NTP's number is a little below its loss.
    """
    sums = dict(nats=0.0, actions=0)
    for part in bar(chunks(traces, micro_batch), "score"):
        batch = elbo.collate(part, openers.device)
        _, token = elbo.score(elbo.logits_of(model, batch), batch, openers)
        sums["nats"] -= elbo.log_pi(token, batch).sum().item()
        sums["actions"] += int((batch.kind == ACTION).sum())
    sums = total(sums)
    return sums["nats"] / sums["actions"]


# ---------------------------------------------------------------- one optimizer step, on any number of ranks


def ranks() -> tuple[int, int]:
    """The number of this process, and of all that train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(sums: dict[str, float]) -> dict[str, float]:
    """The sums of named numbers over all ranks."""
    if not dist.is_initialized():
        return dict(sums)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(sums, values.tolist()))


def bar(items, what: str):
    """The items, beside a progress bar on the first rank unless they are done within two seconds."""
    return tqdm(items, what, leave=False, delay=2, mininterval=1.0, disable=ranks()[0] > 0)


def optimize(model: GPT, optimizer, losses, count: float) -> float:
    """One optimizer step on the sum of `losses` (scalars, made one by one) over the count of all ranks.

    Gradients are summed here, not by DistributedDataParallel: a rank may have any number of micro-batches,
    none included. Returns the gradient's norm before clipping. Raises ValueError if it is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    count = total({"count": count})["count"]
    if not count:
        return 0.0                       # no rank has a signal: an optimizer would still move by its momentum
    for one in losses:
        (one / count).backward()
    params = list(model.parameters())
    if dist.is_initialized():
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for grads in chunks([p.grad for p in params], 16):     # each alone takes longer, all together memory
            flat = parameters_to_vector(grads)
            dist.all_reduce(flat)
            vector_to_parameters(flat, grads)
    norm = clip_grad_norm_(params, max_norm=1.0).item()
    if not math.isfinite(norm):        # a step would make all weights so, and nothing after it would complain
        raise ValueError(f"the gradient's norm is {norm}: training has diverged; start again with a lower "
                         "learning rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)        # sampling comes next, and needs the room
    return norm


# Dense bfloat16 FLOP/s of GPUs, by a part of their names.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


class Meter:
    """What a rank sees of a run's updates: tokens per second, padding and, on a known GPU, MFU."""
    weights = peak = began = positions = padding = 0

    def watch(self, model: GPT):
        gpu = torch.cuda.get_device_name() if model.device.type == "cuda" else ""
        self.peak = max((peak for name, peak in PEAKS.items() if name in gpu), default=0)
        self.weights = sum(p.numel() for p in model.parameters())
        model.register_forward_pre_hook(self.count)

    def count(self, model: GPT, inputs: tuple[Tensor]):
        """Before a pass of training: its positions, and the zeros behind the ends of its rows."""
        if torch.is_grad_enabled():
            self.positions += inputs[0].numel()
            self.padding += (inputs[0].flip(1).cumsum(1) == 0).sum()

    def read(self, tokens: float = 0) -> dict[str, float]:
        """Since the last reading, in which all ranks put `tokens` through a model, padding not counted."""
        now = time.time()
        rate = tokens / (now - self.began)
        padding = int(self.padding) / max(self.positions, 1)
        seen = {"tokens/s": round(rate), "padding": round(padding, 3)}
        if self.peak:                # 2 FLOP a weight and token; one of training counts thrice: the usual 6 N
            seen["mfu"] = round(2 * self.weights * rate / self.peak / ranks()[1], 3)
        self.began, self.positions, self.padding = now, 0, 0
        return seen


class Masters(torch.optim.Optimizer):
    """An optimizer with float32 masters of the weights, of which each rank owns a share (ZeRO-1).

    device: where masters and moments live, 12 bytes for each weight of the share ("cpu": in main memory);
    float32 weights there are their own masters. An update at 1e-5 is less than half of the last place of a
    bfloat16 weight of 0.02: it would be rounded away. Gradients are still summed in bfloat16.
    """

    def __init__(self, kind, params, device, **options):
        rank, n_ranks = ranks()
        self.params, load, self.owner, self.masters = list(params), [0] * n_ranks, {}, {}
        sizes = {n: p.numel() for n, p in enumerate(self.params)}
        for n in sorted(sizes, key=lambda n: -sizes[n]):                 # the largest first, to who has least
            self.owner[n] = load.index(min(load))
            load[self.owner[n]] += sizes[n]
            if self.owner[n] == rank:
                self.masters[n] = self.params[n].detach().to(device, torch.float32)
        self.inner = kind(list(self.masters.values()), **options)

    @property
    def param_groups(self) -> list[dict]:
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True):
        for p in [*self.params, *self.masters.values()]:
            p.grad = None

    @torch.no_grad()
    def step(self):
        for n, master in self.masters.items():
            grad = self.params[n].grad
            master.grad = None if grad is None else grad.to(master)
        self.inner.step()
        self.publish()

    @torch.no_grad()
    def publish(self):
        """The weights, on all ranks, are the masters rounded."""
        for n, p in enumerate(self.params):
            if n in self.masters:
                p.copy_(self.masters[n])
            if dist.is_initialized():
                dist.broadcast(p, self.owner[n])

    def state_dict(self) -> dict:
        """{number of a weight: its master, and what the optimizer keeps of it}, of this rank's share."""
        return {n: {"master": master, **self.inner.state[master]} for n, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        """From the shares of all ranks, of however many, in one dict."""
        inner = self.inner.state_dict()
        for i, (n, master) in enumerate(self.masters.items()):
            master.copy_(state[n]["master"])
            inner["state"][i] = {k: v for k, v in state[n].items() if k != "master"}
        self.inner.load_state_dict(inner)
        self.publish()


# --------------------------------------------------------------------------------------------------- corpora


def corpus(name: str, column: str = "text", limit: int = 8192, size: Callable[[str], int] = len, *,
           start: int = 0, comments: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (row, program) of a hub dataset, a file, or a folder of files.

    "stdlib" is the standard library of this Python, which every machine has. start: rows to pass over. A
    program longer than `limit`, as `size` measures, is cut between top-level statements; what is not Python 3
    is dropped, and comment lines too, unless `comments`. Raises ValueError for a name, file, row or column
    that is not there.
    """
    path = Path(name)
    if name == "stdlib":
        path, column = Path(sysconfig.get_paths()["stdlib"]), "text"
    if path.exists():
        rows = islice(local_rows(find_files(path)), start, None)
    else:
        rows = hub_rows(name, "train", start=start)
    for n, row in enumerate(rows, start):
        if column not in row:
            has = ", ".join(row)
            raise ValueError(f"{name}: row {n + 1} has no column {column!r}; its columns are {has}")
        text = row[column]
        for piece in pieces(text, limit, size, comments) if isinstance(text, str) else ():
            yield n, piece


def find_files(path: Path) -> list[Path]:
    """The data files of a folder, but for those in folders called test, tests or site-packages."""
    kinds = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".py")
    found = sorted(f for f in path.rglob("*") if f.name.endswith(kinds))
    skip = {"test", "tests", "site-packages"}
    return [path] if path.is_file() else [f for f in found if not skip & set(f.relative_to(path).parts)]


def pieces(text: str, limit: int, size: Callable[[str], int], comments: bool) -> list[str]:
    """A program, cut between top-level statements into texts of at most `limit`; [] if it is not Python."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip() + "\n"
    try:
        text = text if comments else strip_comments(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                  # of odd escapes in other people's strings
            tree = ast.parse(text)                           # the tokenizer alone takes English for Python
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    lines, out = text.split("\n"), [""]
    first = [min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", []))]) - 1 for s in tree.body]
    borders = [0, *sorted(set(first[1:])), len(lines)]    # what stands above the first statement goes with it
    for a, b in zip(borders, borders[1:]):
        part = "".join(line + "\n" for line in lines[a:b])
        if out[-1] and size(out[-1] + part) > limit:
            out.append("")
        out[-1] += part
    out = [part.strip("\n") + "\n" for part in out]
    return [part for part in out if tree.body and size(part) <= limit]


def demo():
    """Print what a program costs as it is (NTP) and infused, and what an update on both changes."""
    model, enc = load_pretrained(Path(__file__).parent / "base")
    head = 'def f(xs):\n    """add 3 * 4 - 5; list"""\n'
    body = "    xs = [x + 7 for x in xs]\n    return xs\n"
    traces, alone = [], 0.0
    for name, comment in {"NTP": "", "infused": "    # 3 * 4 = 12 - 5 = 7\n"}.items():
        trace = elbo.parse_commented(enc, head + comment + body, enc.eot_token, max_rationale=40)
        trace.kind = [kind if line > 1 else PROMPT for kind, line in zip(trace.kind, trace.line)]      # given
        nats = loss(model, elbo.collate([trace])).item()
        nll = action_nll(model, [trace], elbo.opener_mask(enc))
        print(f"{name}: {nats:.3f} nats for rationales and actions, {nll:.3f} per action token")
        traces.append(trace)
        alone += nats
    row = elbo.collate(traces, rows=pack(traces, length=99))
    packed = loss(model, row).item()
    m_update(model, torch.optim.AdamW(model.parameters(), 3e-4), traces)
    print(f"both: {packed:.3f} nats, after an update {loss(model, row):.3f}")
    print("check, packed into one row they cost the same:", math.isclose(packed, alone, rel_tol=1e-4))


if __name__ == "__main__":
    demo()
