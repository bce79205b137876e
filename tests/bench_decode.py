"""What the CUDA graph of `model.Decoder` is worth: milliseconds per token of decoding, beside the same pass launched kernel by kernel.

    python tests/bench_decode.py                       # random weights of SmolLM2's shape, bfloat16 products, a cache of 512 tokens, 200 of them filled

Nothing is downloaded. Needs a GPU.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import GPT, Decoder, GPTConfig, KVCache, autocast, new_cache  # noqa: E402


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
    cfg = GPTConfig(vocab_size=49_152, d_model=576, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, d_ff=1536)
    with torch.device("cuda"):
        model = GPT(cfg)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", "| rows | recorded, ms per token | launched, ms per token |", "|---|---|---|", sep="\n")
    for rows in (1, 64, 256):
        ms = []
        for recorded in (True, False):
            with autocast(model.device):
                cache = new_cache(model, rows, 512)
                cache.length += 200
                step = Decoder(model, cache) if recorded else lambda last: model(last[:, None], cache=cache)[:, 0]
                ms.append(milliseconds(step, cache, torch.full((rows,), 5, device="cuda")))
        print(f"| {rows} | {ms[0]:.2f} | {ms[1]:.2f} |")


if __name__ == "__main__":
    main()
