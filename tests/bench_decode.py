"""What the CUDA graph of `model.Decoder` is worth: milliseconds per token of decoding, beside the same pass launched kernel by kernel.

    python tests/bench_decode.py                       # random weights of SmolLM2's shape, bfloat16 products, a cache of 512 tokens, 200 of them filled

Nothing is downloaded. Needs a GPU.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import GPT, SHAPES, Decoder, KVCache  # noqa: E402


def milliseconds(step, cache: KVCache, last: torch.Tensor, n: int = 100) -> float:
    for _ in range(3):                                              # a Decoder's first pass is launched, and recorded for the others
        step(last)
    torch.cuda.synchronize()
    began = time.time()
    for _ in range(n):
        step(last)
        cache.length += 1
    torch.cuda.synchronize()
    return 1000 * (time.time() - began) / n


@torch.no_grad()
def main():
    if not torch.cuda.is_available():
        sys.exit("bench_decode.py: needs a GPU")
    cfg = SHAPES["HuggingFaceTB/SmolLM2-135M"]
    with torch.device("cuda"):
        model = GPT(cfg)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", "| rows | recorded, ms per token | launched, ms per token |", "|---|---|---|", sep="\n")
    for rows in (1, 64, 256):
        ms = []
        for recorded in (True, False):
            with torch.autocast("cuda", torch.bfloat16):
                cache = KVCache(cfg, rows, 512, "cuda", torch.bfloat16)
                cache.length += 200
                step = Decoder(model, cache) if recorded else lambda last: model(last[:, None], cache=cache)[:, 0]
                ms.append(milliseconds(step, cache, torch.full((rows,), 5, device="cuda")))
        print(f"| {rows} | {ms[0]:.2f} | {ms[1]:.2f} |")


if __name__ == "__main__":
    main()
