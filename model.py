"""A Llama-family GPT: the network, its KV cache and sampling, pretrained weights, the tokenizer.

One decoder serves every phase and every checkpoint of the project. RMSNorm before each block, rotary
positions, grouped-query attention, SwiGLU; query/key/value biases (Qwen2.5), normalised queries and keys
(Qwen3), frequency scaling (Llama-3.x) and tied embeddings are switches of the configuration. Modules carry
the names of the Hugging Face checkpoints: what is trained here opens in `transformers` and vLLM.

    model, enc = load_pretrained("base")        # or a folder, or a hub name such as "Qwen/Qwen2.5-1.5B"
    [out] = generate(model, [encode_prompt(enc, "def f(xs):")], max_new_tokens=64, temperature=0.8, seeds=[0])

    python model.py                             # continues a small problem with the shipped base
    python model.py --model Qwen/Qwen2.5-1.5B --prompt "def fibonacci(n):" --temperature 0.8

Shapes: B rows, T new tokens, S cached positions, D width, H query heads, K key/value heads, C width of a
head, V vocabulary.
"""
import argparse
import codecs
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# cuDNN's attention is torch's first choice on an H100. Under a mask it can give NaN gradients (torch 2.11,
# pytorch issue 196678), and it makes a plan for each new length, which takes longer than the attention.
torch.backends.cuda.enable_cudnn_sdp(False)
POSITIONS = 1024                        # of which there are logits at a time where memory is short

# ----------------------------------------------------------------------------------------------- the network


@dataclass
class GPTConfig:
    vocab_size: int = 512
    d_model: int = 96
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 2
    head_dim: int = 24
    d_ff: int = 256
    context: int = 512                  # longest sequence, in tokens, that the model was made for
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None    # Llama-3.1's, with the entries LLAMA3_SCALING
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    eos_id: int = 0                     # ends a document


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).type_as(x) * self.weight


def rope_frequencies(cfg: GPTConfig, device="cpu") -> Tensor:
    """Angular frequency of each rotated pair, (C/2,), in radians per position, with Llama-3.1's scaling."""
    pair = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=device)            # (C/2,)
    freq = cfg.rope_theta ** (-pair / cfg.head_dim)
    if cfg.rope_scaling is None:
        return freq
    factor, low, high, original = (cfg.rope_scaling[name] for name in LLAMA3_SCALING)
    # Waves longer than the original context are stretched by `factor`; fast ones stay; a ramp joins them.
    turns = original * freq / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * (ramp + (1 - ramp) / factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split layout: x (B, T, heads, C), cos and -sin with sin (B or 1, T, 1, C)."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg, D, C = cfg, cfg.d_model, cfg.head_dim
        self.q_proj = nn.Linear(D, cfg.n_head * C, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(D, cfg.n_kv_head * C, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(D, cfg.n_kv_head * C, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_head * C, D, bias=False)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(C, cfg.norm_eps), RMSNorm(C, cfg.norm_eps)

    def forward(self, x: Tensor, rope, mask: Tensor | None, store) -> Tensor:
        B, T, _ = x.shape
        H, K, C = self.cfg.n_head, self.cfg.n_kv_head, self.cfg.head_dim
        q, k, v = (project(x).view(B, T, -1, C) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if store is None:
            if mask is not None:        # a GPU's kernels that take a mask cannot share keys among heads
                k, v = (x.repeat_interleave(H // K, dim=2) for x in (k, v))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))                               # (B, H or K, T, C)
            how = dict(is_causal=True, enable_gqa=True) if mask is None else dict(attn_mask=mask)
            y = F.scaled_dot_product_attention(q, k, v, **how)
        else:
            # Few queries, a long cache: copying its keys for each head takes half of the time of decoding. So
            # the heads that share a key stand in line as further queries of that key.
            k, v = store(k, v).transpose(2, 3)                                             # (B, K, S, C)
            q = q.view(B, T, K, H // K, C).transpose(1, 2).reshape(B, K, -1, C)            # (B, K, T*H/K, C)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = y.view(B, K, T, H // K, C).transpose(2, 3).flatten(1, 2)                   # (B, H, T, C)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                            # (B, T, D)


class MLP(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, rope, mask: Tensor | None, store) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, store)
        return x + self.mlp(self.post_attention_layernorm(x))


def autocast(device: torch.device):
    """bfloat16 products on a GPU, of any weights, whose casts last as long as the outermost such context."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


class GPT(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.config = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.grad_checkpoint = False    # recompute blocks in the backward pass: more time, less memory
        self.n_vocab = cfg.vocab_size   # tokens that exist; Qwen's matrices have more rows, never drawn
        self.limit = cfg.context        # longest sequence that will be put in; a run may lower it
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of products, of attention and of the cache."""
        return torch.bfloat16 if self.device.type == "cuda" else self.embed_tokens.weight.dtype

    def forward(self, tokens: Tensor, cache: "KVCache | None" = None, doc: Tensor | None = None,
                at: Tensor | None = None, head: bool = True) -> Tensor:
        """Logits of the token after each token: tokens (B, T) int64 -> (B, T, V), V = n_vocab.

        Rows are padded on the right; causality keeps the padding out of every real position.
        cache: tokens continue each row at its own `cache.length`, which the caller then advances.
        doc:   (B, T) document numbers of a packed batch: a token sees its own document only.
        at:    (B, T) bool: only the logits after these tokens, (N, V), as logits outweigh all the rest.
        head:  False returns the last hidden states, (B, T, D) or (N, D), which `unembed` makes logits.
        Raises ValueError if a position lies beyond the model's limit.
        """
        T, dev = tokens.shape[1], tokens.device
        pos = torch.arange(T, device=dev)[None]            # relative: they do not restart with each document
        seen, end = None, T
        if cache is not None:
            pos = cache.length[:, None] + pos                                              # (B, T)
            # A CUDA graph that is being recorded cannot look at lengths.
            recording = dev.type == "cuda" and torch.cuda.is_current_stream_capturing()
            end = cache.kv.shape[3] if recording else int(pos.max()) + 1
            seen = torch.arange(end, device=dev) <= pos[..., None]                         # (B, T, S)
            seen = seen.repeat_interleave(self.config.n_head // self.config.n_kv_head, dim=1)  # (B, T*H/K, S)
        elif doc is not None:
            seen = (doc[:, :, None] == doc[:, None, :]).tril()                             # (B, T, T)
        # Numbers, made once: of bools each layer would make its own, and keep them for the backward pass.
        mask = None if seen is None else torch.where(seen, 0.0, -torch.inf).to(self.dtype)[:, None]
        if end > self.limit:
            raise ValueError(f"a sequence of {end} tokens does not fit the model's context of {self.limit}")
        angle = pos[..., None, None] * rope_frequencies(self.config, dev)              # (B or 1, T, 1, C/2)
        cos, sin = angle.cos(), angle.sin()
        rope = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)                    # (B or 1, T, 1, C)
        with autocast(dev):
            x = self.embed_tokens(tokens)                                                  # (B, T, D)
            for i, block in enumerate(self.layers):
                store = partial(cache.store, i, pos, end) if cache else None
                recompute = self.grad_checkpoint and torch.is_grad_enabled()
                run = partial(checkpoint, block, use_reentrant=False) if recompute else block
                x = run(x, rope, mask, store)
            x = self.norm(x)
            x = x if at is None else x[at]                                             # (B, T, D) or (N, D)
            return self.unembed(x) if head else x

    def unembed(self, x: Tensor) -> Tensor:
        """Last hidden states (..., D), what forward(head=False) returns -> logits (..., V)."""
        with autocast(x.device):
            # A slice of the weights would be cast anew each time: autocast remembers whole parameters.
            return F.linear(x, (self.lm_head or self.embed_tokens).weight)[..., :self.n_vocab]

    def in_parts(self, part, *tensors: Tensor) -> list[Tensor]:
        """The tensors that part(*tensors) returns; where memory is short, of POSITIONS entries at a time.

        For logits: with a vocabulary of 150k they take more than all the rest, some 30 bytes an entry. In
        parts no more than POSITIONS x V are there at a time; the backward pass makes them again.
        """
        if not self.grad_checkpoint:
            return part(*tensors)
        parts = zip(*(x.split(POSITIONS) for x in tensors))
        made = [checkpoint(part, *some, use_reentrant=False) for some in parts]
        return [torch.cat(x, -1) for x in zip(*made)]

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype: torch.dtype = torch.float32) -> "GPT":
        """A Llama-3.x, Qwen2.5, Qwen3 or SmolLM2 checkpoint: a local folder, or a name on the hub.

        Files are memory-mapped and tensors converted one by one: there is never a second copy of the weights.
        Raises OSError if the model cannot be had, ValueError if it is damaged or not what config.json says.
        """
        folder = find_model(name, "*.json", "*.safetensors")
        with torch.device("meta"):                   # shapes without memory
            model = cls(read_config(folder))
        skip = ("rotary_emb.inv_freq", *["lm_head.weight"] * model.config.tie_embeddings)
        tensors = {name.removeprefix("model."): tensor.to(device, dtype)
                   for name, tensor in read_tensors(folder) if not name.endswith(skip)}
        with explain(folder):
            model.load_state_dict(tensors, assign=True)
        return model

    def save_pretrained(self, folder, dtype: torch.dtype | None = None):
        """Write config.json and model.safetensors as `transformers` and vLLM read them, in `dtype`."""
        dtype = dtype or self.embed_tokens.weight.dtype
        tensors = {name if name == "lm_head.weight" else "model." + name: weight.to("cpu", dtype)
                   for name, weight in self.state_dict().items()}
        config = json.dumps(write_config(self.config, dtype), indent=2) + "\n"
        save = partial(save_file, tensors, metadata={"format": "pt"})
        try:
            write_whole(Path(folder, "model.safetensors"), save)
        except SafetensorError as e:                 # which is what a full disk looks like there
            raise OSError(f"{folder} cannot be written: {e}") from None
        write_whole(Path(folder, "config.json"), partial(Path.write_text, data=config))


# ------------------------------------------------------------------------------------- KV cache and sampling


@dataclass
class KVCache:
    """Keys and values of the tokens seen, a length per row: rolling a row back is lowering its length."""
    kv: Tensor                          # (n_layer, 2, B, S, K, C)
    length: Tensor                      # (B,) int64

    def store(self, layer: int, pos: Tensor, end: int, k: Tensor, v: Tensor) -> Tensor:
        """Store a layer's new k and v (B, T, K, C) at pos (B, T); returns all so far, (2, B, end, K, C)."""
        rows = torch.arange(len(pos), device=pos.device)[:, None]
        self.kv[layer][:, rows, pos] = torch.stack([k, v]).to(self.kv.dtype)
        return self.kv[layer, :, :, :end]

    def select(self, rows) -> "KVCache":
        """A new cache that holds the given rows, a list or (R,) int64 (repeated ones are copied)."""
        return KVCache(self.kv[:, :, rows], self.length[rows])

    def shrink(self, live: list[bool]) -> tuple["KVCache", list[int]]:
        """Move the live rows to the front: their part of the cache, and the new order of all rows.

        On a GPU only where half have ended: to record a smaller batch anew takes as long as some tokens.
        """
        n, order = sum(live), list(range(len(live)))
        if n == len(live) or (self.kv.is_cuda and n > len(live) / 2):
            return self, order
        free, moved = [b for b in order[:n] if not live[b]], [b for b in order[n:] if live[b]]
        for a, b in zip(free, moved):
            order[a], order[b] = b, a
        to, of = free + moved, moved + free
        self.kv[:, :, to], self.length[to] = self.kv[:, :, of], self.length[of]
        return KVCache(self.kv[:, :, :n], self.length[:n]), order


def new_cache(model: GPT, rows: int, size: int) -> KVCache:
    """An empty cache of `size` tokens a row, in the precision in which the model computes."""
    cfg, dev = model.config, model.device
    kv = torch.zeros(cfg.n_layer, 2, rows, size, cfg.n_kv_head, cfg.head_dim, dtype=model.dtype, device=dev)
    return KVCache(kv, torch.zeros(rows, dtype=torch.int64, device=dev))


class Decoder:
    """One token more for each row of a cache: decode(last) is model(last[:, None], cache=cache)[:, 0].

    On a GPU the pass is recorded once, as a CUDA graph, and replayed: a small model's thousand kernels take
    longer to launch than to run. A recording is bound to its cache's tensors: change `cache.length` in place.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache, self.graph = model, cache, None

    def __call__(self, last: Tensor) -> Tensor:
        if self.graph is not None:
            self.last.copy_(last)
            self.graph.replay()
            return self.logits
        logits = self.model(last[:, None], cache=self.cache)[:, 0]                         # (B, V)
        if last.is_cuda:                # the pass above has also made autocast's copies of the weights
            self.last, graph = last.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):          # on a stream of its own, after emptying the allocator
                self.logits = self.model(self.last[:, None], cache=self.cache)[:, 0]
            self.graph = graph          # only now: a recording that failed must not be replayed
        return logits


def pad(rows: list, value: int, device=None) -> Tensor:
    """Right-pad lists to a (B, T) int64 tensor."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value).to(device)


def pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw one token per row by inverting the distribution function at `uniform`; greedy at temperature 0.

    logits (B, V) float, uniform (B,) in [0, 1) -> (B,) int64. A row's draw depends on its own logits and
    uniform alone, so a sample does not change with the batch it is drawn in or with the number of ranks.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits / temperature, -1).cumsum(-1, dtype=torch.float64)          # (B, V)
    u = uniform.to(cdf)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@dataclass
class Sample:
    tokens: list[int] = field(default_factory=list)      # what was generated, the stop token included
    logprobs: list[float] = field(default_factory=list)  # of each under the distribution it was drawn from
    stopped: bool = False                                # False: cut off at max_new_tokens


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], *, max_new_tokens: int, seeds: list,
             temperature: float = 1.0, stop_ids: tuple[int, ...] | None = None, stop=None, finished=None,
             batch_size: int = 256) -> list[Sample]:
    """Continue each prompt until a token of stop_ids (default: end of document), stop(tokens) or the limit.

    seeds: one per prompt, anything `np.random.default_rng` takes, best what the sample is for: (seed, phase,
    step, problem, sample). Each token takes one uniform number, see `pick`. A row that finishes hands its
    slot to the next prompt that waits. finished(i, sample) is called when that of prompt i has ended. Raises
    ValueError for an empty prompt, one that leaves no room, or one without a seed.
    """
    limit, dev = model.limit, model.device
    stop_ids = {model.config.eos_id} if stop_ids is None else set(stop_ids)
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < limit:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; between 1 and {limit - 1} fit")
    if len(seeds) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts, but {len(seeds)} seeds: each needs its own")
    out, rngs = [Sample() for _ in prompts], [np.random.default_rng(seed) for seed in seeds]
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))    # the shortest goes first: pop()
    rows = [None] * min(batch_size, len(prompts))                            # the prompt in each slot
    with autocast(dev):
        cache = new_cache(model, len(rows), min(max(map(len, prompts), default=0) + max_new_tokens, limit))
        decode = Decoder(model, cache)
        while True:
            free = [slot for slot, i in enumerate(rows) if i is None]
            if free and waiting:
                free = free[:len(waiting)]
                for slot in free:
                    rows[slot] = waiting.pop()
                prefill(model, cache, free, [prompts[rows[slot]] for slot in free])
            elif len(free) == len(rows):
                return out
            elif free:
                fewer, order = cache.shrink([i is not None for i in rows])
                if fewer is not cache:
                    rows, cache = [rows[slot] for slot in order[:len(fewer.length)]], fewer
                    decode = Decoder(model, cache)
            # Who has finished rides along, fed with anything; its cache does not advance.
            last = [0 if i is None else (out[i].tokens or prompts[i])[-1] for i in rows]
            logits = decode(torch.tensor(last, device=dev)).float()                        # (B, V)
            cache.length += torch.tensor([i is not None for i in rows], device=dev)
            noise = [0.0 if i is None else rngs[i].random() for i in rows]
            tokens = pick(logits, torch.tensor(noise, dtype=torch.float64, device=dev), temperature)
            logprobs = torch.log_softmax(logits / (temperature or 1.0), -1).gather(-1, tokens[:, None])
            for slot, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs[:, 0].tolist())):
                if rows[slot] is None:
                    continue
                sample = out[rows[slot]]
                sample.tokens.append(token)
                sample.logprobs.append(logprob)
                sample.stopped = token in stop_ids or bool(stop and stop(sample.tokens))
                room = min(max_new_tokens, limit - len(prompts[rows[slot]]))
                if sample.stopped or len(sample.tokens) == room:
                    if finished:
                        finished(rows[slot], sample)
                    rows[slot] = None


def prefill(model: GPT, cache: KVCache, slots: list[int], prompts: list[list[int]]):
    """Run prompts into slots of a cache, all tokens but the last, which is what decoding is fed first.

    What prompts share is run once: the samples of a group are one prompt, few-shot prompts share examples
    (633 of 736 tokens of MBPP's: two to three times as fast, 64 new tokens, SmolLM2-135M on a CPU).
    """
    bodies = [tuple(prompt[:-1]) for prompt in prompts]
    unique = {body: n for n, body in enumerate(dict.fromkeys(bodies))}
    prefix = os.path.commonprefix(list(unique))
    fresh = new_cache(model, 1, max(map(len, unique)))
    for parts in ([prefix], [body[len(prefix):] for body in unique]):
        fresh = fresh.select([0] * len(parts))
        if any(parts):
            model(pad(parts, 0, model.device), cache=fresh, head=False)
        fresh.length += torch.tensor([len(part) for part in parts], device=model.device)
    fresh = fresh.select([unique[body] for body in bodies])
    cache.kv[:, :, slots, :fresh.kv.shape[3]] = fresh.kv
    cache.length[slots] = fresh.length


# ------------------------------------------------------------------------ the Hugging Face layout of a model


def find_model(name, *patterns: str) -> Path:
    """The folder of a model: `name` itself, or the hub's snapshot of its files that match the patterns."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=list(patterns)))
        except Exception as e:                       # the many ways of a network, or of a disk, to fail
            raise OSError(f"there is no folder {str(name)!r}, and the hub has given no model of that name "
                          f"({type(e).__name__}: {shorten(str(e), 200)}): check the spelling and the "
                          "connection; for one that is gated or private accept its terms there, and run "
                          "`hf auth login`") from None
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(f"{name} is an adapter (LoRA), not a model: merge it into its base model first")
    return folder


@contextmanager
def explain(source: Path):
    """Make whatever goes wrong with a file of a model a ValueError of one sentence, which names it."""
    try:
        yield
    except Exception as e:                           # libraries have many kinds, and texts of many lines
        reason = shorten(f"{type(e).__name__}: {e}", 300)
        raise ValueError(f"{source} cannot be used as part of a model in the Hugging Face layout ({reason}); "
                         "if it is damaged, download it again") from None


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises ValueError."""
    with explain(file):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def write_whole(file: Path, write):
    """Let write(path) fill a neighbour of `file`, then put it in place: no reader ever sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        tmp.touch()
        mode = tmp.stat().st_mode
        write(tmp)
        tmp.chmod(mode)                              # safetensors makes files that nobody else may read
        sync(tmp)                                    # or a power failure leaves the name without the content
        os.replace(tmp, file)
        sync(file.parent)
    finally:
        tmp.unlink(missing_ok=True)


def sync(path: Path):
    """Wait until a file's content, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def read_tensors(folder: Path):
    """Yields (name, tensor) of a checkpoint of one file or several, mapped, not read. Raises ValueError."""
    whole = folder / "model.safetensors"
    for file in [whole] if whole.exists() else sorted(folder.glob("model-*-of-*.safetensors")):
        with explain(file):
            yield from load_file(file).items()


# What config.json calls the fields of GPTConfig, and the further entries of Llama-3's rope_scaling.
HUB_NAMES = dict(
    vocab_size="vocab_size", d_model="hidden_size", n_layer="num_hidden_layers", n_head="num_attention_heads",
    n_kv_head="num_key_value_heads", head_dim="head_dim", d_ff="intermediate_size",
    context="max_position_embeddings", norm_eps="rms_norm_eps", tie_embeddings="tie_word_embeddings",
    eos_id="eos_token_id")
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SUPPORTED = dict(
    model_type=("llama", "qwen2", "qwen3"), hidden_act=("silu",), attention_bias=(None, False),
    mlp_bias=(None, False), use_sliding_window=(None, False), quantization_config=(None,),
    rope_type=("default", "llama3"))


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a config.json. Raises ValueError for whatever this network does not compute."""
    file = folder / "config.json"
    hub = {"hidden_act": "silu", "rope_theta": 10_000.0, "tie_word_embeddings": False}
    others = (folder / f"{name}_config.json" for name in ("tokenizer", "generation"))
    for spec in [*filter(Path.exists, others), file]:          # what a later one says wins; null says nothing
        hub |= {key: value for key, value in read_json(spec).items() if value is not None}
    with explain(file):
        # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling.
        rope = {**hub, **hub.get("rope_scaling", {}), **hub.get("rope_parameters", {})}
        hub["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        for key, values in SUPPORTED.items():
            if hub.get(key) not in values:
                known = " or ".join(map(repr, values))
                raise ValueError(f"{key} {hub.get(key)!r} is not supported, only {known}")
        hub.setdefault("num_key_value_heads", hub["num_attention_heads"])
        hub.setdefault("head_dim", hub["hidden_size"] // hub["num_attention_heads"])
        ends = hub.get("eos_token_id")
        if ends is None and "eos_token" in hub:
            text = hub["eos_token"]                                # or an object that holds it
            text = text["content"] if isinstance(text, dict) else text
            ends = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(text)
        if ends is None:
            raise ValueError("eos_token_id is missing, and no other file says what ends a document")
        hub["eos_token_id"] = ends[0] if isinstance(ends, list) else int(ends)
        cfg = GPTConfig(**{ours: hub[theirs] for ours, theirs in HUB_NAMES.items()})
        cfg.rope_theta = float(rope["rope_theta"])
        if hub["rope_type"] == "llama3":
            cfg.rope_scaling = {key: rope[key] for key in LLAMA3_SCALING}
    cfg.qkv_bias, cfg.qk_norm = hub["model_type"] == "qwen2", hub["model_type"] == "qwen3"
    return cfg


def write_config(cfg: GPTConfig, dtype: torch.dtype) -> dict:
    """The config.json of a GPTConfig: the inverse of read_config."""
    family = "Qwen3" if cfg.qk_norm else "Qwen2" if cfg.qkv_bias else "Llama"
    scaling = {"rope_type": "llama3", **cfg.rope_scaling} if cfg.rope_scaling else None
    return {theirs: getattr(cfg, ours) for ours, theirs in HUB_NAMES.items()} | dict(
        architectures=[f"{family}ForCausalLM"], model_type=family.lower(), hidden_act="silu",
        rope_theta=cfg.rope_theta, rope_scaling=scaling, bos_token_id=None,
        torch_dtype=str(dtype).removeprefix("torch."))


# --------------------------------------------------------------------------------------------- the tokenizer

# tokenizer.json shows a byte as one character: its own if that is visible, the others from U+0100 on.
HIDDEN = [b for b in range(256) if chr(b) == " " or not chr(b).isprintable()]
CHAR_OF = {b: chr(256 + HIDDEN.index(b)) if b in HIDDEN else chr(b) for b in range(256)}
BYTE_OF = {char: b for b, char in CHAR_OF.items()}

# Files that go with a model from folder to folder; vLLM looks into the last for all tokens that end a text.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class Encoding:
    """A tokenizer.json, byte-level BPE, with the methods of a `tiktoken.Encoding` that are called here.

    n_vocab: the highest token + 1. eot_token: <|endoftext|>, None if there is none. bos: what the tokenizer
    sets before a document (Llama-3's <|begin_of_text|>), see `encode_prompt`. source: the file.
    Raises ValueError if the file is damaged, of another kind, or if the tokenizer changes its text.
    """

    def __init__(self, source: Path):
        self.source, spec = source, read_json(source) | {"truncation": None, "padding": None}
        with explain(source):
            special = self._special_tokens = {token["content"]: token["id"] for token in spec["added_tokens"]}
            self._mergeable_ranks = {bytes(BYTE_OF[char] for char in text): i
                                     for text, i in spec["model"]["vocab"].items() if text not in special}
            self._with_special = Tokenizer.from_str(json.dumps(spec))
            self._ordinary = Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
            self._bytes = {i: text for text, i in self._mergeable_ranks.items()}
            self._bytes |= {i: text.encode() for text, i in special.items()}
            code = "Def f(x):\n    return x\n"
            if self.decode(self.encode_ordinary(code)) != code:
                raise ValueError("only byte-level BPE, as of SmolLM2, Llama-3 and Qwen, is supported")
        self.n_vocab, self.eot_token = max(self._bytes) + 1, special.get("<|endoftext|>")
        probe = self._with_special.encode("x")
        self.bos = probe.ids[:probe.special_tokens_mask.index(0)]

    def encode_ordinary(self, text: str) -> list[int]:
        """The tokens of a text. What looks like a special token, as in real code, is text like any other."""
        text = text.encode("utf-8", "replace").decode()          # JSON may hold half of a surrogate pair
        return self._ordinary.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, allowed_special="all") -> list[int]:
        """The tokens of a text that holds special tokens as text, as a chat template writes them."""
        return self._with_special.encode(text, add_special_tokens=False).ids

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self._bytes.get(token, b"")           # a few ids may stand for nothing

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """The exact bytes of tokens, which may begin or end within a character."""
        return b"".join(map(self.decode_single_token_bytes, tokens))

    def decode(self, tokens: list[int]) -> str:
        return self.decode_bytes(tokens).decode("utf-8", "replace")


def load_tokenizer(name) -> Encoding:
    """The tokenizer of a model: a folder, a hub name. Raises OSError if there is none; as Encoding."""
    return Encoding(find_model(name, "*config.json", *TOKENIZER_FILES) / "tokenizer.json")


def encode_prompt(enc, text: str) -> list[int]:
    """Tokens of the beginning of a document: after Llama-3's <|begin_of_text|>; others have none."""
    return [*getattr(enc, "bos", ()), *enc.encode_ordinary(text)]


def load_pretrained(name, device="cpu", dtype: torch.dtype = torch.float32) -> tuple[GPT, Encoding]:
    """A model and its tokenizer. Raises what the two loaders raise; ValueError if they do not fit."""
    enc, model = load_tokenizer(name), GPT.from_pretrained(name, device, dtype)
    if enc.n_vocab > model.n_vocab:
        raise ValueError(f"the tokenizer of {name} has {enc.n_vocab} tokens, its model {model.n_vocab}: "
                         "they do not belong together")
    model.n_vocab = enc.n_vocab
    return model, enc


def save_tokenizer(enc: Encoding, folder):
    """Copy the files of a loaded tokenizer, for load_tokenizer and every other tool."""
    for name in TOKENIZER_FILES:
        file = enc.source.with_name(name)
        if file.exists():
            write_whole(Path(folder, name), partial(shutil.copyfile, file))


# ------------------------------------------------------------------------------------------ the command line

PROBLEM = 'def f(xs):\n    """add 3 * 4 - 5; above 7 + 2; total"""\n'


@torch.no_grad()
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Continue a program, token by token.")
    parser.add_argument("--model", default=Path(__file__).parent / "base", help="a folder, or a hub name")
    parser.add_argument("--prompt", help="else what stands in stdin or, at a terminal, a small problem")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="where it ends at the latest")
    args = parser.parse_args(argv)
    from bench import meet_at_decision
    text = args.prompt or (PROBLEM if sys.stdin.isatty() else sys.stdin.read())
    # White space belongs to the tokens that follow it. Whole lines end where training cuts programs; after a
    # colon the model chooses its indentation.
    whole = text.rstrip(" \t").endswith("\n") and not text.rstrip().endswith(":")
    text = meet_at_decision(text)[0] if whole and text.strip() else text.rstrip()
    characters = codecs.getincrementaldecoder("utf-8")("replace")    # a token may be half a character

    def show(tokens: list[int]):
        print(characters.decode(enc.decode_bytes(tokens[-1:])), end="", flush=True)
    try:
        model, enc = load_pretrained(args.model, "cuda" if torch.cuda.is_available() else "cpu")
        prompt = encode_prompt(enc, text)
        print(enc.decode(prompt), end="", flush=True)
        [sample] = generate(model, [prompt], max_new_tokens=args.max_new_tokens, seeds=[args.seed],
                            temperature=args.temperature, stop=show)
    except (OSError, ValueError) as e:
        parser.error(str(e))
    tokens = torch.tensor(prompt + sample.tokens, device=model.device)                   # (T,)
    logits = model(tokens[None])[0, len(prompt) - 1:-1].float() / (args.temperature or 1.0)
    nats = F.cross_entropy(logits, tokens[len(prompt):], reduction="none").cpu()
    gap = (nats + torch.tensor(sample.logprobs)).abs().max()
    print(f"\n\n{len(prompt)} tokens in, {len(sample.tokens)} out, {nats.mean():.2f} nats each; "
          f"with a cache and in one pass without they differ by {gap:.1e} at most", file=sys.stderr)


if __name__ == "__main__":
    main()
