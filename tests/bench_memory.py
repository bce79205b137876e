"""What the recipes take on a GPU: the memory that torch allocates, and the speed.

    python tests/bench_memory.py                       # every recipe for one GPU that the card at hand can hold
    python tests/bench_memory.py qwen2.5-1.5b          # or those named

Weights are random, as memory and speed do not depend on them; nothing is downloaded. Each phase takes its worst micro-batch, all
sequences as long as the context, twice, and the optimizer's step; sampling is `generate` at the end of such sequences. Allocated is
what tensors hold; the CUDA context and fragments come on top (reserved). Without a GPU a tiny model runs, to see that the script does.
"""
import copy
import dataclasses
import gc
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import elbo  # noqa: E402
import estep  # noqa: E402
import mstep  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig, generate  # noqa: E402
from test_scale import openers, traces  # noqa: E402

SHAPES = {
    "HuggingFaceTB/SmolLM2-135M": GPTConfig(vocab_size=49_152, d_model=576, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, d_ff=1536),
    "Qwen/Qwen2.5-1.5B": GPTConfig(vocab_size=151_936, d_model=1536, n_layer=28, n_head=12, n_kv_head=2, head_dim=128, d_ff=8960,
                                   qkv_bias=True),
    "meta-llama/Llama-3.2-1B": GPTConfig(vocab_size=128_256, d_model=2048, n_layer=16, n_head=32, n_kv_head=8, head_dim=64, d_ff=8192),
}
CUDA = torch.cuda.is_available()


def measure(run: train.Run, cfg: GPTConfig, phase: str, rows: int) -> tuple[float, float, float]:
    """Allocated and reserved GB at the worst moment; tokens per second of a training step, or of decoding with a full cache."""
    length = cfg.context
    with run.device:
        model = GPT(cfg)
    model = model.bfloat16() if run.saving >= 2 else model
    model.grad_checkpoint = run.saving >= 1
    opening = openers(cfg.vocab_size).to(run.device)
    pi = copy.deepcopy(model).requires_grad_(False) if phase in ("sampling", "estep") else None
    optimizer = run.optimizer(torch.optim.Adam, model)
    programs = traces(rows, length, cfg.vocab_size, prompt=length // 10)     # 9 in 10 tokens are scored, more than in real ones

    def losses():
        for _ in range(2):
            part = programs[:1] if phase == "sampling" else programs
            if phase == "estep":
                batch = elbo.collate(part, run.device)
                gate, token, _, anchor = estep.likelihoods(model, pi, batch, opening)
                yield -elbo.log_q(gate, token, batch).sum() + anchor
            elif phase == "mstep":
                yield mstep.loss(model, elbo.collate(part, run.device))
            else:
                yield -elbo.token_logprobs(model, elbo.collate(part, run.device)).sum()

    def seconds(work, *args) -> float:
        began = time.time()
        work(*args)
        if CUDA:
            torch.cuda.synchronize()
        return time.time() - began

    def update():
        mstep.optimize(model, optimizer, losses(), rows * length)

    def answers(new: int):
        generate(model, [t.tokens[:length - 16] for t in programs], max_new_tokens=new, seeds=list(range(rows)), stop_ids=(), batch_size=rows)
    update()                                                 # the moments are there, and the kernels
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if phase == "sampling":
        answers(2)                                           # the kernels of this shape
        prompts = seconds(answers, 1)
        speed = 15 * rows / (seconds(answers, 16) - prompts)
    else:
        speed = 2 * rows * length / seconds(update)
    return torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9, speed


def main():
    single = [n for n, r in train.RECIPES.items() if r.get("model") in SHAPES]
    print(f"{torch.cuda.get_device_name() if CUDA else 'no GPU: a tiny model'}, torch {torch.__version__}")
    print("| recipe | phase | rows x tokens | allocated GB | reserved GB | tokens per second |", "|---|---|---|---|---|---|", sep="\n", flush=True)
    for name in sys.argv[1:] or single:
        s = train.parse_flags(["--recipe", name])
        cfg = dataclasses.replace(SHAPES[s.run.model], context=s.run.context)
        if not CUDA:
            cfg = GPTConfig(context=64)
        group = max(s.run.micro_batch // s.e.e_rollouts, 1) * s.e.e_rollouts         # the E-step keeps a program's versions together
        for phase, rows in dict(sampling=s.run.sample_batch, estep=group, mstep=s.run.micro_batch, rlvr=s.run.micro_batch).items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    allocated, reserved, speed = measure(train.Run(s, Path(folder)), cfg, phase, rows)
                    cells = [f"{allocated:.1f}", f"{reserved:.1f}", f"{speed:,.0f}"]
                except torch.OutOfMemoryError:
                    cells = ["out of memory", "-", "-"]
            print("| " + " | ".join([name, phase, f"{rows} x {cfg.context}", *cells]) + " |", flush=True)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
