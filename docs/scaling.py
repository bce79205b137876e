"""What grows how: CPU seconds of one thread against lines, K, context, corpus and ranks; memory over updates.

    python docs/scaling.py            # about three minutes on one core

A small random model with the base's tokenizer. An exponent is the slope of a least-squares line through
log(seconds) against log(size): 1 is linear. Each size is measured three times, in turns; the least counts.
"""
import copy
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing import get_context, spawn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench
import elbo
import estep
import mstep
from elbo import ACTION, PROMPT, Trace
from model import GPT, GPTConfig, load_tokenizer

torch.set_num_threads(1)
ENC = load_tokenizer(ROOT / "base")
OPENERS = elbo.opener_mask(ENC)


def new_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=ENC.n_vocab, context=4096, eos_id=ENC.eot_token))


def programs(n: int, lines: int) -> list[elbo.Program]:
    body = "".join(f"    xs = [x + {i % 9} for x in xs]\n" for i in range(lines - 1))
    text = 'def f(xs):\n    """add"""\n', body + "    return xs\n"
    return [elbo.parse(ENC, *text, ENC.eot_token) for _ in range(n)]


def e_update(n: int, lines: int, K: int, think: float = 0.0):
    """think: share of lines with a rationale, of 8 tokens."""
    q, cfg = new_model(), estep.EStepConfig(e_rollouts=K, explore=think, max_rationale=8)
    cfg.rationales = "learned" if think else "never"
    pi, optimizer = copy.deepcopy(q).requires_grad_(False), torch.optim.Adam(q.parameters(), 0.0)
    seeds = list(range(n * K))
    return partial(estep.e_update, q, pi, optimizer, ENC, OPENERS, programs(n, lines), seeds, cfg)


def m_update(n: int, tokens: int):
    """n programs of so many tokens."""
    model, trace = new_model(), Trace()
    trace.add([1], PROMPT)
    trace.add([2] * (tokens - 1), ACTION, 0)
    return partial(mstep.m_update, model, torch.optim.Adam(model.parameters(), 0.0), [trace] * n)


def read(n: int):
    """Make n programs of the world and cut them into lines."""
    return lambda: [elbo.parse(ENC, p.prompt, p.solution, ENC.eot_token) for p in bench.world("train", n, 0)]


def of_rank(rank: int, ranks: int, port: int, out):
    """One rank's CPU seconds for 5 updates on its share of 32 programs."""
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=ranks)
    update = m_update(32 // ranks, 128)
    out.put(sum(seconds(update) for _ in range(5)))
    dist.destroy_process_group()


def seconds_of_ranks(ranks: int) -> float:
    """CPU seconds of all ranks together."""
    out, port = get_context("spawn").SimpleQueue(), 20000 + os.getpid() % 20000 + ranks
    spawn(of_rank, (ranks, port, out), nprocs=ranks)
    return sum(out.get() for _ in range(ranks))


def seconds(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def report(what: str, sizes: list[int], best: list[float]):
    slope, _ = np.polyfit(np.log(sizes), np.log(best), 1)
    cells = [what, ", ".join(map(str, sizes)), ", ".join(f"{t:.2f}" for t in best), f"{slope:.2f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    tables = {
        "E-step: lines per program, no rationales": (lambda n: e_update(4, n, 4), [8, 16, 32, 64]),
        "E-step: lines, a rationale at 1 in 4": (lambda n: e_update(4, n, 4, 0.25), [8, 16, 32, 64]),
        "E-step: K, versions of a program": (lambda n: e_update(4, 12, n, 0.25), [4, 8, 16, 32]),
        "M-step: programs of 128 tokens": (lambda n: m_update(n, 128), [16, 32, 64, 128]),
        "M-step: tokens of each of 4 programs": (lambda n: m_update(4, n), [256, 512, 1024, 2048]),
        "corpus: programs read and cut into lines": (read, [250, 500, 1000, 2000]),
    }
    print("| what grows | sizes | CPU seconds | exponent |", "|---|---|---|---|", sep="\n")
    for what, (make, sizes) in tables.items():
        works = [make(n) for n in sizes]
        times = [[seconds(work) for work in works] for _ in range(3)]
        report(what, sizes, np.min(times, axis=0).tolist())
    ranks = [1, 2, 4]
    report("M-step: ranks, all together", ranks, [seconds_of_ranks(n) for n in ranks])
    works, held = [e_update(4, 12, 4, 0.25), m_update(32, 128)], []
    for _ in range(30):
        for work in works:
            work()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    print("MB held after 2, 10, 20, 30 updates of both:", *(f"{held[i - 1]:.0f}" for i in (2, 10, 20, 30)))


if __name__ == "__main__":
    main()
