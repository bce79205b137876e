"""Makes the base model: a tokenizer of 416 tokens and a GPT of two layers, trained on the world's web code.

    python base/pretrain.py out/base
    torchrun --standalone --nproc-per-node=2 base/pretrain.py out/base     # the same on two processes
"""
import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
from tiktoken._educational import bpe_train
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import elbo  # noqa: E402
import mstep  # noqa: E402
from base.world import rows  # noqa: E402
from elbo import ACTION, PROMPT, Trace  # noqa: E402
from model import CHAR_OF, GPT, GPTConfig, encode_prompt, write_whole  # noqa: E402

# ------------------------------------------------------------------------------------------- the tokenizer


# How GPT-2 cuts a text into the pieces that no token reaches across, as tiktoken writes it.
GPT2_CUTS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def train_tokenizer(vocab_size: int = 416) -> tiktoken.Encoding:
    """Byte-pair encoding learnt from the world's own text, with GPT-2's pre-tokenizer."""
    text = "\n".join(row["prompt"] + row["solution"] for row in rows("web", 600, seed=0))
    ranks = bpe_train(text, vocab_size - 1, GPT2_CUTS, visualise=None)
    special = {"<|endoftext|>": vocab_size - 1}
    return tiktoken.Encoding("ra3-world", pat_str=GPT2_CUTS,
                             mergeable_ranks=ranks, special_tokens=special)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts of which a token is made: of its bytes, the neighbours that rank lowest are merged first.

    Raises ValueError for a token that no merge makes.
    """
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        made = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = made.index(min(made))
        if made[i] >= ranks[token]:
            raise ValueError(f"no merge makes the token {token!r}")
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def write_tokenizer(enc: tiktoken.Encoding, folder):
    """Write an encoding with GPT-2's pattern as tokenizer.json, which every other tool reads."""
    ranks = dict(sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]))
    shown = {token: "".join(CHAR_OF[b] for b in token) for token in ranks}
    merges = [[shown[part] for part in last_merge(token, ranks)] for token in ranks if len(token) > 1]
    vocab = {shown[token]: i for token, i in ranks.items()} | enc._special_tokens
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=i, content=token, **flags) for token, i in enc._special_tokens.items()]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer = dict(version="1.0", normalizer=None, pre_tokenizer=level, post_processor=None, decoder=level,
                     added_tokens=added, model=dict(type="BPE", vocab=vocab, merges=merges))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=next(iter(enc._special_tokens), None))
    for name, content in {"tokenizer.json": tokenizer, "tokenizer_config.json": config}.items():
        text = json.dumps(content, ensure_ascii=False) + "\n"
        write_whole(Path(folder, name), partial(Path.write_text, data=text, encoding="utf-8"))


# ----------------------------------------------------------------------------------------------- the model


class Optimizers(list):
    """Several optimizers that step as one."""

    def zero_grad(self, **options):
        for optimizer in self:
            optimizer.zero_grad(**options)

    def step(self):
        for optimizer in self:
            optimizer.step()

    def set_lr(self, share: float):
        """Set every learning rate to a share of its peak."""
        for optimizer in self:
            for group in optimizer.param_groups:
                peak = group.setdefault("peak", group["lr"])
                group["lr"] = peak * share


def make_optimizers(model: GPT) -> Optimizers:
    if not hasattr(torch.optim, "Muon"):                     # it comes with torch 2.9; base/ was made with it
        return Optimizers([torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.95))])
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and "embed" not in name else others).append(p)
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0)
    return Optimizers([muon, torch.optim.Adam(others, lr=3e-3, betas=(0.9, 0.95))])


def as_trace(enc: tiktoken.Encoding, row: dict) -> Trace:
    """A program as one action, whose tokens are all trained on."""
    out = Trace()
    out.add(encode_prompt(enc, row["prompt"]), PROMPT)
    out.add([*enc.encode_ordinary(row["solution"]), enc.eot_token], ACTION, 0)
    return out


def pretrain(folder, tokens: int, seed: int = 0, device="cpu", row_length: int = 256):
    """Train a model from scratch on programs that are all new, and write it to a folder every 500 steps.

    tokens: trained tokens over all ranks.
    """
    rank, ranks = mstep.ranks()
    enc = train_tokenizer()
    torch.manual_seed(seed)
    # Two layers, so that a chain of operations cannot be folded into one pass; wide enough for arithmetic.
    config = GPTConfig(vocab_size=enc.n_vocab, eos_id=enc.eot_token, n_layer=2,
                       d_model=128, n_head=4, n_kv_head=2, head_dim=32, d_ff=336)
    model = GPT(config).to(device)
    optimizers = make_optimizers(model)
    seen, step = 0, 0
    bar = tqdm(total=tokens, unit="token", unit_scale=True, mininterval=5.0, disable=rank > 0)
    while seen < tokens:
        programs = list(rows("web", 64, seed=step))[rank::ranks]
        traces = [as_trace(enc, row) for row in programs]
        batch = elbo.collate(traces, device, mstep.pack(traces, row_length))
        # Warm-up over 50 steps, constant, then down to nothing over the last 40%.
        optimizers.set_lr(min(1.0, (step + 1) / 50) * min(1.0, (1 - seen / tokens) / 0.4))
        loss, count = mstep.loss(model, batch), int(batch.scored.sum())
        mstep.optimize(model, optimizers, [loss], count)
        sums = mstep.total(dict(nats=loss.item(), tokens=count))
        seen, step = seen + int(sums["tokens"]), step + 1
        bar.update(int(sums["tokens"]))
        bar.set_postfix_str(f"loss {sums['nats'] / sums['tokens']:.3f}")
        if rank == 0 and (step % 500 == 0 or seen >= tokens):
            model.save_pretrained(folder)
            write_tokenizer(enc, folder)
    bar.close()


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Train the embedded world's base model from scratch.")
    parser.add_argument("out", type=Path, help="the folder to write it to")
    parser.add_argument("--tokens", type=int, default=7_000_000,
                        help="tokens to train on; arithmetic appears after about 2M, in a phase change")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--force", action="store_true", help="write over a model that is there")
    args = parser.parse_args(argv)
    if (args.out / "config.json").exists() and not args.force:
        sys.exit(f"pretrain.py: {args.out} holds a model already: name another folder, or add --force")
    local, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    cuda = torch.cuda.is_available()
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(local)
    pretrain(args.out, args.tokens, args.seed, f"cuda:{local}" if cuda else "cpu")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
