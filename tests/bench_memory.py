"""What the recipes take on a GPU: the memory that `model.memory` predicts beside what torch allocates, and the speed.

    python tests/bench_memory.py                       # every recipe for one GPU that the card at hand can hold
    python tests/bench_memory.py qwen2.5-1.5b          # or those named

Weights are random, as memory and speed do not depend on them; nothing is downloaded. Each phase takes its worst micro-batch, all sequences as
long as the context, twice, and the optimizer's step; sampling is `generate` at the end of such sequences. Allocated is what tensors hold; the CUDA context and fragments come on top (reserved).
"""
import copy
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
import rlvr  # noqa: E402
import train  # noqa: E402
from model import GPT, SHAPES, generate  # noqa: E402
from test_scale import openers, traces  # noqa: E402


def measure(run: train.Run, phase: str, rows: int, length: int, frozen: bool) -> tuple[float, float, float]:
    """Allocated and reserved GB at the worst moment, and tokens per second: of a training step, or of decoding with a full cache."""
    s, cfg = run.s, SHAPES[run.s.model]
    with run.device:
        model = GPT(cfg)
    if s.offload:
        model = model.bfloat16()
    model.grad_checkpoint = s.checkpoint_blocks
    opening = openers(cfg.vocab_size).to(run.device)
    pi = copy.deepcopy(model).requires_grad_(False) if frozen else None
    optimizer = run.optimizer(torch.optim.Adam, model)
    programs = traces(rows, length + 1, cfg.vocab_size, prompt=length // 10)     # 9 in 10 tokens are scored, more than in real ones

    def losses():
        for _ in range(2):
            part = programs[:1] if phase == "sampling" else programs
            batch = mstep.packed_batch(part, [[i] for i in range(rows)], run.device) if phase == "mstep" else elbo.collate(part, run.device)
            with run.autocast():
                if phase == "estep":
                    gate, token, _, anchor = estep.compare(model, pi, batch, opening)
                    yield -elbo.log_q(gate, token, batch).sum() + anchor
                else:
                    yield mstep.loss(model, batch) if phase == "mstep" else -rlvr.token_logprobs(model, batch).sum()

    def update():
        run.update(model, optimizer, losses(), rows * length)
        torch.cuda.synchronize()

    def answers(new: int):
        with run.autocast():
            generate(model, [t.tokens[:length - 16] for t in programs], max_new_tokens=new, seeds=list(range(rows)), stop_ids=(), batch_size=rows)
        torch.cuda.synchronize()

    def seconds(work, *args) -> float:
        began = time.time()
        work(*args)
        return time.time() - began

    update()                                                 # the moments are there, and the kernels
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
    if not torch.cuda.is_available():
        sys.exit("bench_memory.py: there is no CUDA GPU here; `python train.py --preset NAME --memory` prints the predictions")
    card = torch.cuda.get_device_properties(0).total_memory / 1e9
    print(f"{torch.cuda.get_device_name()}, {card:.0f} GB, torch {torch.__version__}", flush=True)
    print("| preset | phase | rows x tokens | predicted GB | allocated GB | reserved GB | tokens per second |", "|---|---|---|---|---|---|---|", sep="\n", flush=True)
    for name in sys.argv[1:] or [n for n, p in train.PRESETS.items() if p.get("model") in SHAPES and not p.get("shard")]:
        s = train.parse_flags(["--preset", name])
        cfg = SHAPES[s.model]
        predicted = train.predict(s, cfg)
        for phase, (rows, length, frozen) in train.worst(s, cfg).items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    allocated, reserved, speed = measure(train.Run(s, Path(folder), 0), phase, rows, length, frozen)
                    cells = [f"{allocated:.1f}", f"{reserved:.1f}", f"{speed:,.0f}"]
                except torch.OutOfMemoryError:
                    cells = ["out of memory", "-", "-"]
            print("| " + " | ".join([name, phase, f"{rows} x {length}", f"{predicted[phase]['total'] / 1e9:.1f}", *cells]) + " |", flush=True)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
