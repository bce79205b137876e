"""What it gains to score the expert's lines in one pass: rollouts against decoding the same rollouts token by token.

    python tests/bench_rollout.py

Both use the same model, batch and KV cache; the peer is only the forward passes that token-by-token decoding cannot avoid.
"""
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import bench  # noqa: E402
import elbo  # noqa: E402
import estep  # noqa: E402
from model import GPT, load_tokenizer, new_cache, pad  # noqa: E402


@torch.no_grad()
def token_by_token(model: GPT, traces: list[elbo.Trace]):
    """Prompts in one pass, then one token of every program at a time."""
    prompts = [[x for x, k in zip(t.tokens, t.line) if k < 0] for t in traces]
    rest = pad([[x for x, k in zip(t.tokens, t.line) if k >= 0] for t in traces], model.config.eos_id)
    length = torch.tensor([len(p) for p in prompts])
    cache = new_cache(model, len(traces), int(length.max()) + rest.shape[1])
    model(pad(prompts, model.config.eos_id), cache=cache)
    cache.length = length
    for i in range(rest.shape[1]):
        model(rest[:, i:i + 1], cache=cache)
        cache.length += 1


def main():
    torch.set_num_threads(1)
    model, enc = GPT.from_pretrained(ROOT / "base"), load_tokenizer(ROOT / "base")
    experts = [elbo.parse(enc, p.prompt, p.solution, model.config.eos_id) for p in bench.world("train", 16, seed=0)]
    openers, ratios = elbo.opener_mask(enc), []
    for repeat in range(5):
        start = time.perf_counter()
        seeds = [[repeat, i] for i in range(128)]
        traces = estep.rollout(model, enc, [p for p in experts for _ in range(8)], seeds, openers, estep.EStepConfig())
        middle = time.perf_counter()
        token_by_token(model, traces)
        end = time.perf_counter()
        ratios.append((end - middle) / (middle - start))
        print(f"rollouts {middle - start:.2f} s, token by token {end - middle:.2f} s, ratio {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f} over {len(ratios)} runs; 16 programs x 8 versions, "
          f"{sum(t.kind.count(elbo.LATENT) for t in traces) / 128:.0f} of {sum(len(t.tokens) for t in traces) / 128:.0f} tokens are rationales")


if __name__ == "__main__":
    main()
