"""A Llama-family GPT: the network, its KV cache and sampling, pretrained weights, the tokenizer.

One decoder serves every phase and every checkpoint of the project. RMSNorm before each block, rotary positions,
grouped-query attention, SwiGLU; query/key/value biases (Qwen2.5), normalised queries and keys (Qwen3), frequency
scaling (Llama-3.x) and tied embeddings are switches of the configuration. Modules carry the names of the Hugging Face
checkpoints, so loading and saving need no table of names, and what is trained here opens in `transformers` and vLLM.

    model, enc = load_pretrained("base")            # or a folder, or a hub name such as "Qwen/Qwen2.5-1.5B"; enc is a tiktoken.Encoding
    out = generate(model, [encode_prompt(enc, "def f(xs):")], max_new_tokens=64, temperature=0.8, seeds=[0])

Shapes: B rows, T new tokens, S cached positions, D width, H query heads, K key/value heads, C width of a head, V vocabulary.
"""
import errno
import itertools
import json
import math
import os
import shutil
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# cuDNN's attention is torch's first choice on an H100 or H200. Under a mask it can give NaN gradients (torch 2.11, pytorch issue 196678), and it makes a
# plan for each new length, which takes longer than the attention.
torch.backends.cuda.enable_cudnn_sdp(False)

# ----------------------------------------------------------------------------------------------------------- the network


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
    rope_scaling: dict | None = None    # Llama-3.1's: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    eos_id: int = 0                     # ends a document

    @property
    def groups(self) -> int:
        """Query heads that share a key, G."""
        return self.n_head // self.n_kv_head


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).type_as(x) * self.weight


def rope_frequencies(cfg: GPTConfig) -> Tensor:
    """Angular frequency of each rotated pair, (C/2,), in radians per position, with Llama-3.1's scaling if asked for."""
    freq = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)              # (C/2,)
    if cfg.rope_scaling:
        s = cfg.rope_scaling
        # Slow waves, longer than the original context allowed, are stretched by `factor`; fast ones stay; a ramp joins them.
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        ramp = ramp.clamp(0, 1)
        freq = freq * (ramp + (1 - ramp) / s["factor"])
    return freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout: x (B, T, heads, C), cos and sin (B or 1, T, 1, C/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.cfg = cfg
        D, H, K, C = cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.q_proj = nn.Linear(D, H * C, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(D, K * C, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(D, K * C, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(H * C, D, bias=False)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(C, cfg.norm_eps), RMSNorm(C, cfg.norm_eps)

    def forward(self, x: Tensor, rope, mask: Tensor | None, store) -> Tensor:
        (B, T, _), cfg = x.shape, self.cfg
        q = self.q_proj(x).view(B, T, cfg.n_head, cfg.head_dim)                                       # (B, T, H, C)
        k = self.k_proj(x).view(B, T, cfg.n_kv_head, cfg.head_dim)                                    # (B, T, K, C)
        v = self.v_proj(x).view(B, T, cfg.n_kv_head, cfg.head_dim)
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if store is None:
            k, v = (t.repeat_interleave(cfg.groups, dim=2).transpose(1, 2) for t in (k, v))           # (B, H, T, C)
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None)
        else:
            # Few queries, a long cache: to copy its keys for each head would cost more than all the rest (measured: half of
            # the time of decoding). Instead the heads that share a key stand in line as further queries of that key.
            k, v = (t.transpose(1, 2) for t in store(k, v))                                           # (B, K, S, C)
            q = q.view(B, T, cfg.n_kv_head, cfg.groups, -1).transpose(1, 2).reshape(B, cfg.n_kv_head, T * cfg.groups, -1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = y.view(B, cfg.n_kv_head, T, cfg.groups, -1).transpose(2, 3).flatten(1, 2)             # (B, H, T, C)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                                       # (B, T, D)


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


class GPT(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.config = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.grad_checkpoint = False    # recompute each block in the backward pass: a third more time, far less memory
        self.n_vocab = cfg.vocab_size   # tokens that exist: Qwen's matrices have more rows, which must be neither drawn nor scored
        self.limit = cfg.context        # longest sequence that will be put in: a run may lower it, for its memory's sake
        self.freq = None                # rope_frequencies; no buffer, which `.to(torch.bfloat16)` would round
        self.apply(self._init)

    def _init(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def forward(self, tokens: Tensor, cache: "KVCache | None" = None, doc: Tensor | None = None, at: Tensor | None = None,
                head: bool = True) -> Tensor:
        """Logits of the token after each token: tokens (B, T) int64 -> (B, T, V), V = n_vocab.

        Rows are padded on the right; causality keeps the padding out of every real position.
        cache: tokens continue each row at its own `cache.length`; the caller then advances `length` by the tokens it keeps.
        doc:   (B, T) document numbers of a packed batch: a token sees its own document only.
        at:    (B, T) bool: only the logits that follow these tokens, (N, V); with 150k tokens they weigh more than all the rest.
        head:  False returns the last hidden states, (B, T, D) or (N, D), which `unembed` makes logits.
        Raises ValueError if a position lies beyond the model's limit.
        """
        (_, T), dev = tokens.shape, tokens.device
        steps = torch.arange(T, device=dev)
        if cache is not None:
            pos = cache.length[:, None] + steps                                                       # (B, T)
            end = cache.k.shape[2] if recording(dev) else int(pos.max()) + 1                          # a recording cannot look at lengths
            seen = torch.arange(end, device=dev) <= pos[..., None]                                    # (B, T, S)
            mask = seen.repeat_interleave(self.config.groups, dim=1)[:, None]                         # (B, 1, T * G, S), see Attention
        elif doc is not None:
            same = doc[:, :, None] == doc[:, None, :]
            mask = (same & (steps[:, None] >= steps))[:, None]                                        # (B, 1, T, T)
            pos, end = steps[None], T       # rotary positions are relative: they need not restart with each document
        else:
            pos, mask, end = steps[None], None, T
        if end > self.limit:
            raise ValueError(f"a sequence of {end} tokens does not fit the model's context of {self.limit}")
        if self.freq is None or self.freq.device != dev:
            self.freq = rope_frequencies(self.config).to(dev)
        angle = pos[..., None, None] * self.freq                                                      # (B or 1, T, 1, C/2)
        rope = angle.cos(), angle.sin()
        x = self.embed_tokens(tokens)                                                                 # (B, T, D)
        for i, block in enumerate(self.layers):
            store = cache.writer(i, pos, end) if cache is not None else None
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, store, use_reentrant=False)
            else:
                x = block(x, rope, mask, store)
        x = self.norm(x)                                                                              # (B, T, D)
        if at is not None:
            x = x[at]                                                                                 # (N, D)
        return self.unembed(x) if head else x                                                         # (B, T, V) or (N, V)

    def unembed(self, x: Tensor) -> Tensor:
        """Last hidden states (..., D), what forward(head=False) returns -> logits (..., V)."""
        return F.linear(x, (self.lm_head or self.embed_tokens).weight[:self.n_vocab])

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype: torch.dtype = torch.float32) -> "GPT":
        """A Llama-3.x, Qwen2.5, Qwen3 or SmolLM2 checkpoint: a local folder, or a name on the Hugging Face hub.

        The files are memory-mapped. A tensor of the asked dtype that stays on the CPU becomes the parameter as it is mapped; any
        other is converted one by one: there is never a second copy of the weights. Raises OSError if the model cannot be had,
        ValueError if it is damaged, is not of these families, or if a tensor is missing, misshapen or not the network's.
        """
        from safetensors import SafetensorError, safe_open
        folder = find_model(name, "config.json", "*.safetensors", "*.safetensors.index.json")
        with torch.device("meta"):                                  # shapes without memory
            model = cls(read_config(folder))
        index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
        sharded = index.exists() and not whole.exists()
        files = [folder / f for f in sorted(set(read_json(index).get("weight_map", {}).values()))] if sharded else [whole]
        wanted, found = {hub_key(k): list(v.shape) for k, v in model.state_dict().items()}, {}
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    for key in tensors.keys():
                        if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and model.lm_head is None):
                            continue                                # some checkpoints store what follows from the rest
                        have, want = tensors.get_slice(key).get_shape(), wanted.get(key)
                        if have != want:
                            raise ValueError(f"{file}: the tensor {key} is {have}, but config.json asks for {want or 'none of that name'}")
                        found[key] = tensors.get_tensor(key).to(device, dtype)
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{file} cannot be read ({e}): download or save it again, as safetensors") from None
        if missing := [k for k in wanted if k not in found]:
            raise ValueError(f"{folder}: {len(missing)} of {len(wanted)} tensors are missing, first {missing[0]}: complete the download")
        model.load_state_dict({k: found[hub_key(k)] for k in model.state_dict()}, assign=True)
        return model

    def save_pretrained(self, folder, dtype: torch.dtype | None = None):
        """Write config.json and model.safetensors as `transformers` and vLLM read them, in `dtype` (default: the model's own)."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        def write(tmp: Path):
            try:
                save_file(weights, tmp, metadata={"format": "pt"})
            except SafetensorError as e:                                # which is what a full disk looks like there
                raise OSError(f"{folder} cannot be written: {e}") from None
        weights = {hub_key(k): v.detach().to("cpu", dtype).contiguous() for k, v in self.state_dict().items()}
        config = write_config(self.config, dtype or self.embed_tokens.weight.dtype)
        write_whole(Path(folder) / "model.safetensors", write)
        write_whole(Path(folder) / "config.json", lambda tmp: tmp.write_text(json.dumps(config, indent=2) + "\n"))


# ------------------------------------------------------------------------------------------------- KV cache and sampling


class KVCache:
    """Keys and values of the tokens seen, with a length per row: rolling a row back is lowering its length.

    k, v: (n_layer, B, S, K, C); length: (B,) int64.
    """

    def __init__(self, cfg: GPTConfig, rows: int, size: int, device, dtype):
        shape = (cfg.n_layer, rows, size, cfg.n_kv_head, cfg.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)

    def writer(self, layer: int, pos: Tensor, end: int):
        """A function that stores this layer's new (B, T, K, C) at pos (B, T) and returns all positions up to `end`."""
        rows = torch.arange(pos.shape[0], device=pos.device)[:, None]

        def store(k: Tensor, v: Tensor):
            self.k[layer][rows, pos], self.v[layer][rows, pos] = k.to(self.k.dtype), v.to(self.v.dtype)
            return self.k[layer, :, :end].type_as(k), self.v[layer, :, :end].type_as(v)
        return store

    def select(self, rows: Tensor) -> "KVCache":
        """A new cache that holds the given rows, (R,) int64 (repeated ones are copied)."""
        new = object.__new__(KVCache)
        new.k, new.v, new.length = self.k[:, rows], self.v[:, rows], self.length[rows]
        return new

    def put(self, rows: Tensor, other: "KVCache"):
        """Overwrite the given rows with those of another cache (of no greater size)."""
        size = other.k.shape[2]
        self.k[:, rows, :size], self.v[:, rows, :size], self.length[rows] = other.k, other.v, other.length


def recording(device: torch.device) -> bool:
    """Is a CUDA graph being recorded?"""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Decoder:
    """One token more for every row of a cache: decode(last) is `model(last[:, None], cache=cache)[:, 0]`, last (B,) -> (B, V).

    On a GPU the pass is recorded once, as a CUDA graph, and replayed: a small model's thousand kernels take longer to launch than to run.
    A recording is bound to its cache's tensors: change `cache.length` in place only, and make another Decoder for another cache.
    """
    aside = None                                                     # the stream to record on, as the default one cannot; a new one each time would cost memory

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache, self.graph = model, cache, None

    def __call__(self, last: Tensor) -> Tensor:
        if self.graph is not None:
            for count in self.model._forward_pre_hooks.values():     # a replay would pass by who counts the tokens
                count(self.model, (self.last,))
            self.last.copy_(last[:, None])
            self.graph.replay()
            return self.logits
        logits = self.model(last[:, None], cache=self.cache)[:, 0]                                    # (B, V)
        if last.is_cuda:
            # After a pass like any other: it has made autocast's copies of the weights, which made in a recording would hold nothing yet.
            # What the allocator holds unused, of a training step or of deleted recordings, cannot be given back during a recording: it would run out.
            torch.cuda.empty_cache()
            self.last, graph = last[:, None].clone(), torch.cuda.CUDAGraph()
            aside = Decoder.aside = Decoder.aside or torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                graph.capture_begin()
                try:
                    self.logits = self.model.forward(self.last, cache=self.cache)[:, 0]
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = graph                                       # only now: a recording that failed must not be replayed
        return logits


def pad(rows: list, value: int, device=None) -> Tensor:
    """Right-pad lists to a (B, T) int64 tensor."""
    width = max(map(len, rows))
    return torch.tensor([list(r) + [value] * (width - len(r)) for r in rows], dtype=torch.int64, device=device)


def pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw one token per row by inverting the distribution function at `uniform`; greedy at temperature 0.

    logits (B, V) float32, uniform (B,) in [0, 1) -> (B,) int64. A row's draw depends on its own logits and its own uniform alone, so a
    sample does not change with the batch it is drawn in or with the number of ranks.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits / temperature, -1).cumsum(-1, dtype=torch.float64)                     # (B, V)
    u = uniform.to(cdf)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@dataclass
class Sample:
    tokens: list[int] = field(default_factory=list)     # what was generated, the stop token included
    logprobs: list[float] = field(default_factory=list)  # of each token under the distribution it was drawn from
    stopped: bool = False                               # False: cut off at max_new_tokens


def uniforms(seed, n: int) -> np.ndarray:
    """n numbers in [0, 1) from a generator seeded by what they are for, e.g. (seed, phase, step, problem, sample)."""
    return np.random.default_rng(seed).random(n)


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], *, max_new_tokens: int, seeds: list, temperature: float = 1.0,
             stop_ids: tuple[int, ...] | None = None, stop=None, batch_size: int = 256) -> list[Sample]:
    """Continue each prompt until a token of stop_ids (default: end of document), until stop(tokens) is true, or max_new_tokens.

    seeds: one per prompt, anything `np.random.default_rng` takes.
    A row that finishes hands its slot to the next waiting prompt; when none waits, finished rows are dropped (on a GPU half of them at a time).
    Raises ValueError for an empty prompt or one that leaves no room in the context.
    """
    cfg, dev = model.config, model.device
    stop_ids = {cfg.eos_id} if stop_ids is None else set(stop_ids)
    for i, p in enumerate(prompts):
        if not p or len(p) >= model.limit:
            raise ValueError(f"prompt {i} has {len(p)} tokens; between 1 and {model.limit - 1} fit the model's context")
    if len(seeds) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts, but {len(seeds)} seeds: each prompt needs its own")
    out = [Sample() for _ in prompts]
    if not prompts:
        return out
    # A cache has one width for all its rows: an outlier (MBPP has a prompt six times as long as the others) would fill the memory with padding.
    room = 2 * (sorted(map(len, prompts))[len(prompts) // 2] + max_new_tokens)
    apart = [i for i, p in enumerate(prompts) if len(p) + max_new_tokens > room]
    if apart:
        rest = [i for i in range(len(prompts)) if i not in set(apart)]
        width = max(len(prompts[i]) for i in apart) + max_new_tokens
        for ids, rows in ((rest, batch_size), (apart, max(1, batch_size * room // width // 2))):
            done = generate(model, [prompts[i] for i in ids], max_new_tokens=max_new_tokens, seeds=[seeds[i] for i in ids], temperature=temperature,
                            stop_ids=tuple(stop_ids), stop=stop, batch_size=rows)
            for i, sample in zip(ids, done):
                out[i] = sample
        return out
    noise = [uniforms(s, max_new_tokens) for s in seeds]
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))      # pop() takes the shortest: neighbours pad little
    size = min(model.limit, max(map(len, prompts)) + max_new_tokens)
    dtype = torch.get_autocast_dtype(dev.type) if torch.is_autocast_enabled(dev.type) else model.embed_tokens.weight.dtype

    def extend(cache, parts):
        """Append tokens to each row of a cache."""
        if any(parts):
            text = pad(parts, cfg.eos_id, dev)                                                        # (B, T)
            model(text, cache=cache, at=torch.zeros_like(text, dtype=torch.bool))                     # a cache needs no logits
        cache.length += torch.tensor([len(p) for p in parts], device=dev)

    def prefill(ids):
        """Run the prompts of `ids` (all tokens but the last, which the decoding loop feeds) into a cache of their own."""
        body = [tuple(prompts[i][:-1]) for i in ids]
        unique = {b: n for n, b in enumerate(dict.fromkeys(body))}              # the samples of a group share their prompt,
        prefix = os.path.commonprefix(list(unique))                             # few-shot prompts share their examples: run those once
        fresh = KVCache(cfg, 1, max(map(len, body)), dev, dtype)
        extend(fresh, [prefix])
        fresh = fresh.select(torch.zeros(len(unique), dtype=torch.int64, device=dev))
        extend(fresh, [b[len(prefix):] for b in unique])
        return fresh.select(torch.tensor([unique[b] for b in body], device=dev))

    rows = [waiting.pop() for _ in range(min(batch_size, len(waiting)))]        # the prompt in each slot
    cache = KVCache(cfg, len(rows), size, dev, dtype)
    cache.put(torch.arange(len(rows), device=dev), prefill(rows))
    last = torch.tensor([prompts[i][-1] for i in rows], device=dev)
    decode, live = Decoder(model, cache), [True] * len(rows)
    while any(live):
        logits = decode(last).float()                                                                 # (B, V)
        cache.length += torch.tensor(live, device=dev)                      # who has finished and rides along stays where he is
        u = torch.tensor([noise[i][len(out[i].tokens)] if on else 0.0 for i, on in zip(rows, live)], dtype=torch.float64)
        last = pick(logits, u.to(dev), temperature)                                                   # (B,)
        logp = torch.log_softmax(logits / (temperature or 1.0), -1).gather(-1, last[:, None])[:, 0].tolist()
        done = []
        for slot, (i, token, lp) in enumerate(zip(rows, last.tolist(), logp)):
            if not live[slot]:
                continue
            s = out[i]
            s.tokens.append(token)
            s.logprobs.append(lp)
            s.stopped = token in stop_ids or (stop is not None and stop(s.tokens))
            if s.stopped or len(s.tokens) == max_new_tokens or len(prompts[i]) + len(s.tokens) == model.limit:
                done.append(slot)
        refill = done[:len(waiting)]
        if refill:
            ids = [waiting.pop() for _ in refill]
            slots = torch.tensor(refill, device=dev)
            cache.put(slots, prefill(ids))
            last[slots] = torch.tensor([prompts[i][-1] for i in ids], device=dev)
            for slot, i in zip(refill, ids):
                rows[slot] = i
        for slot in done[len(refill):]:
            live[slot] = False
        # A smaller cache is copied and, on a GPU, recorded anew, which takes as long as some tokens.
        if sum(live) <= (len(rows) // 2 if dev.type == "cuda" else len(rows) - 1):
            keep = [slot for slot, on in enumerate(live) if on]
            index = torch.tensor(keep, dtype=torch.int64, device=dev)
            rows, last, cache, live = [rows[slot] for slot in keep], last[index], cache.select(index), [True] * len(keep)
            decode = Decoder(model, cache)
    return out


# ------------------------------------------------------------------------------------------------- how much memory it takes

# The shapes of the models that train.PRESETS names, from their config.json: their memory can be predicted before they are downloaded.
# Nothing but shapes: the frequencies of the positions and the ids of special tokens are left at their defaults.
SHAPES = {
    "HuggingFaceTB/SmolLM2-135M": GPTConfig(vocab_size=49_152, d_model=576, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, d_ff=1536, context=8192),
    "Qwen/Qwen2.5-1.5B": GPTConfig(vocab_size=151_936, d_model=1536, n_layer=28, n_head=12, n_kv_head=2, head_dim=128, d_ff=8960, context=131_072,
                                   qkv_bias=True),
    "meta-llama/Llama-3.2-1B": GPTConfig(vocab_size=128_256, d_model=2048, n_layer=16, n_head=32, n_kv_head=8, head_dim=64, d_ff=8192, context=131_072),
    "meta-llama/Llama-3.1-8B": GPTConfig(vocab_size=128_256, d_model=4096, n_layer=32, n_head=32, n_kv_head=8, head_dim=128, d_ff=14_336, context=131_072,
                                         tie_embeddings=False),
}


def parameters(cfg: GPTConfig) -> tuple[int, int, int]:
    """Numbers of weights: of the whole model, of one block, of the embedding (or of the unembedding, which is as large)."""
    D, H, K, C = cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim
    block = 2 * D * H * C + 2 * D * K * C + 3 * D * cfg.d_ff + 2 * D + cfg.qkv_bias * (H + 2 * K) * C + cfg.qk_norm * 2 * C
    embedding = cfg.vocab_size * D
    return (1 if cfg.tie_embeddings else 2) * embedding + cfg.n_layer * block + D, block, embedding


def memory(cfg: GPTConfig, phase: str, *, rows: int, length: int, precision: str = "autocast", recompute: bool = False, frozen: bool = False,
           shards: int = 1, positions: int = 1024) -> dict[str, float]:
    """Predicted memory of one device, in bytes: each term, and the `total` at the worst moment, for `rows` sequences of `length` tokens.

    phase: "estep", "mstep", "rlvr": a micro-batch in training; "sampling": rollouts between the updates, rows at a time.
    precision: "float32"; "autocast": float32 weights, bfloat16 products; "bfloat16": --offload, with the moments elsewhere.
    recompute: --checkpoint-blocks. frozen: a second, constant copy of the weights (pi, the KL's reference). shards: --shard over so many.
    Not counted: what the allocator loses to fragments and the CUDA context (one or two GB). Raises ValueError for another phase or precision.

    The terms follow the code line by line; tests compare them with what is really allocated on the CPU. CUDA's fused kernels keep less.
    """
    if phase not in ("estep", "mstep", "rlvr", "sampling") or precision not in ("float32", "autocast", "bfloat16"):
        raise ValueError(f"no prediction for phase {phase!r} in precision {precision!r}")
    D, H, K, C, F_, L, V = cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.d_ff, cfg.n_layer, cfg.vocab_size
    (P, block, embedding), N, tied = parameters(cfg), rows * length, cfg.tie_embeddings
    weight = 2 if precision == "bfloat16" else 4                    # bytes of a weight and of its gradient
    value = 4 if precision == "float32" else 2                      # of a result of a matrix product
    out = {"weights": weight * P / shards}
    if precision != "bfloat16":
        out["Adam's moments"] = 8 * P / shards                      # two, float32
    if shards > 1:
        weight, precision = 2, "bfloat16"                           # fully_shard gathers in bfloat16: from here on all is as in that
        out["replica to sample from"] = 2 * P
    if frozen:
        out["frozen copy"] = weight * P
    # Autocast makes a bfloat16 copy of each weight of a product, and keeps it as long as the graph or its block lasts.
    casts, head = (2 * L * block, 2 * embedding) if precision == "autocast" else (0, 0)

    if phase == "sampling":
        if casts:
            out["bfloat16 copies"] = casts
        out["KV cache"] = 2 * (2 * L * N * K * C * value)           # keys and values; twice, while `select` drops finished rows
        # All rows from their first token, as a rollout begins. In attention: the mask as bool, also for each query head of a key, and that as
        # numbers. In the MLP: silu(gate), up and their product.
        forward = N * (D * (2 * weight + value) + max(3 * F_ * value, length * (1 + (1 + value) * H / K) + 4 * H * C * value))
        # A softmax and its product or sum in float64: of 256 gates at a time, or of the next token of each row.
        logits = 16 * V * max(256, rows) + head
        out |= {"forward pass" if forward >= logits else "logits": max(forward, logits)}         # one after the other
        return out | {"total": sum(out.values())}

    out["gradients"] = (4 if shards > 1 else weight) * P / shards
    if shards > 1:      # the embeddings stay gathered with their gradients, in bfloat16 and, to be summed, float32; of blocks the current, the next
        out["gathered weights and gradients"] = 8 * (1 if tied else 2) * embedding + 12 * block
    # What a block keeps of each token for its backward pass. Both norms: their input (the residual stream) and their result before its weight;
    # inputs of the matrix products, which autocast casts once per product; q, k, v (k and v per query head) and attention's result;
    # gate, silu(gate), up and their product; two inverse norms, and the logarithm of attention's denominator per head.
    norms, inputs = {"float32": (16, 8), "autocast": (16, 10), "bfloat16": (12, 4)}[precision]
    token = (norms + inputs) * D + value * (4 * H * C + 4 * F_) + 4 * H + 8 + cfg.qk_norm * (H + K) * (8 * C + 4)
    if phase == "mstep":
        token += value * length                                     # the mask that keeps packed documents apart, as numbers
    kept = N * (12 * D + L * (weight * D if recompute else token))  # 12 D: the last norm
    again = N * token + casts / L if recompute else 0
    # Logits and what is made of them. Cross-entropy: log-softmax, its gradient, the logits' gradient, float32. The E-step: logits of q and
    # pi, log-softmaxes of both over the line and of each at its gate (every 8th token or so), their difference, weighted.
    gradient = weight * embedding
    if phase == "estep" and recompute:      # some positions at a time; the weighting is not made again; in the backward pass, with the sum of
        before = V * min(N, max(positions, rows)) * (2 * value + 23)                # the unembedding's gradients so far, and pi's states
        after = before + head + gradient * (N > positions) + 3 * N * D * weight
    elif phase == "estep":
        before = after = V * N * (2 * value + 27) + head
    else:
        before, after = V * N * 8 + head, V * N * 12 + head         # in the forward and in the backward pass
    logits = max(before + casts, after) if recompute else after + casts             # recomputed blocks' copies go with the forward pass
    # Later in the backward pass, with the logits gone: the unembedding's gradient, twice (that of its first n_vocab rows, then of all); a
    # block made again beside it, where it waits for the embedding's; in the end both and their sum, with the activations gone.
    later = max(2 * gradient + (0 if recompute else casts), again + gradient * tied, 3 * gradient * tied - kept)
    out |= {"activations": kept, "logits" if logits >= later else "gradients on their way": max(logits, later)}  # the worst moment
    return out | {"total": sum(out.values())}


# ------------------------------------------------------------------------------------- the Hugging Face layout of a model


def find_model(name, *patterns: str) -> Path:
    """The folder of a model: `name` itself if it is one, else the hub's snapshot of those of its files that match the patterns."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import errors, snapshot_download
    nowhere = f"there is no folder {str(name)!r}"
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise PermissionError(f"the model {str(name)!r} is gated: accept its terms on its hub page, then run `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FileNotFoundError(f"{nowhere} and no such model on the hub: check the spelling (private ones need `hf auth login`)") from None
    except Exception as e:                                          # the many ways of a network to fail
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise                                                   # it is the disk
        raise OSError(f"{nowhere}, and the hub did not answer for a model of that name ({str(e).strip().partition(chr(10))[0]}): "
                      "check the connection, or give the path of a downloaded folder") from None


def read_json(file: Path) -> dict:
    try:
        if not isinstance(content := json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError(f"a {type(content).__name__} where an object should be")
        return content
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} has no {file.name}: give the folder of a model in the Hugging Face layout") from None
    except ValueError as e:
        raise ValueError(f"{file} is not valid JSON ({e}): download or save it again") from None


def write_whole(file: Path, write):
    """Let `write` fill a temporary neighbour of `file`, then put it in place at once: no reader ever sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(tmp)
        os.replace(tmp, file)
    finally:
        tmp.unlink(missing_ok=True)


def hub_key(ours: str) -> str:
    """The checkpoint's name of a parameter of GPT."""
    return ours if ours.startswith("lm_head.") else "model." + ours


# What config.json calls the fields of GPTConfig, and the further entries of Llama-3's rope_scaling.
HUB_NAMES = dict(vocab_size="vocab_size", d_model="hidden_size", n_layer="num_hidden_layers", n_head="num_attention_heads",
                 n_kv_head="num_key_value_heads", head_dim="head_dim", d_ff="intermediate_size", context="max_position_embeddings",
                 norm_eps="rms_norm_eps", tie_embeddings="tie_word_embeddings", eos_id="eos_token_id")
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a config.json. Raises ValueError for whatever this network does not compute: it must not be passed over."""
    file = folder / "config.json"
    c = {"hidden_act": "silu", "rope_theta": 10_000.0, "tie_word_embeddings": False, **read_json(file)}
    known = dict(model_type=("llama", "qwen2", "qwen3"), hidden_act=("silu",), attention_bias=(None, False), mlp_bias=(None, False),
                 use_sliding_window=(None, False), quantization_config=(None,), rope_type=("default", "llama3"))
    try:
        rope = c.get("rope_parameters") or {"rope_theta": c["rope_theta"], **(c.get("rope_scaling") or {})}    # transformers 5, or older
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        for key, values in known.items():
            if (value := {**c, "rope_type": rope_type}.get(key)) not in values:
                raise ValueError(f"{file}: {key} {value!r} is not supported, only {' or '.join(map(repr, values))}")
        c["num_key_value_heads"] = c.get("num_key_value_heads") or c["num_attention_heads"]
        c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        c["eos_token_id"] = c["eos_token_id"][0] if isinstance(c["eos_token_id"], list) else int(c["eos_token_id"])
        return GPTConfig(**{ours: c[theirs] for ours, theirs in HUB_NAMES.items()}, rope_theta=float(rope["rope_theta"]),
                         rope_scaling={k: rope[k] for k in LLAMA3_SCALING} if rope_type == "llama3" else None,
                         qkv_bias=c["model_type"] == "qwen2", qk_norm=c["model_type"] == "qwen3")
    except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as e:
        raise ValueError(f"{file}: an entry is missing or of a wrong type ({e}): take config.json from the model's own page") from None


def write_config(cfg: GPTConfig, dtype: torch.dtype) -> dict:
    """The config.json of a GPTConfig: the inverse of read_config."""
    if cfg.qkv_bias and cfg.qk_norm:
        raise ValueError("no family on the hub has both qkv_bias and qk_norm: such a model cannot be saved in its layout")
    family = "Qwen3" if cfg.qk_norm else "Qwen2" if cfg.qkv_bias else "Llama"
    return dict({theirs: getattr(cfg, ours) for ours, theirs in HUB_NAMES.items()},
                architectures=[f"{family}ForCausalLM"], model_type=family.lower(), hidden_act="silu", rope_theta=cfg.rope_theta,
                rope_scaling={"rope_type": "llama3", **cfg.rope_scaling} if cfg.rope_scaling else None,
                bos_token_id=None, torch_dtype=str(dtype).removeprefix("torch."))


# ----------------------------------------------------------------------------------------------------------- the tokenizer

# A text is first cut into pieces by a pattern; no token reaches across a cut. GPT-2's cuts, the same as tiktoken writes them, and
# the same with every digit apart (SmolLM2), where a run of spaces also ends at a digit, so that no digit is joined to a space.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_TIKTOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# tokenizer.json shows a byte as one character: its own if that is visible, the others from U+0100 on.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_OF = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(VISIBLE)))}
CHAR_OF = {b: c for c, b in BYTE_OF.items()}


# Files that go with tokenizer.json from folder to folder: `transformers` wants the first, vLLM looks into the second for all tokens that end a text.
BESIDE = ("tokenizer_config.json", "generation_config.json")


class HubEncoding(tiktoken.Encoding):
    """An Encoding that does what some tokenizers do beside BPE: normalise Unicode (Qwen), drop bytes they do not know (SmolLM2).

    size: ids of the tokenizer, those above stand for unknown bytes; nfc: whether it normalises; bos: what it sets before every
    document (Llama-3), see `encode_prompt`; source: its tokenizer.json.
    """

    def __init__(self, name: str, *, size: int, nfc: bool, bos: list[int], source: Path, **bpe):
        super().__init__(name, **bpe)
        self.size, self.nfc, self.bos, self.source, self.max_token_value = size, nfc, bos, source, size - 1

    def __getstate__(self):                                         # for pickle: the arguments of __init__
        return {**super().__getstate__(), "size": self.size, "nfc": self.nfc, "bos": self.bos, "source": self.source}

    def encode_ordinary(self, text: str) -> list[int]:
        return [t for t in super().encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text) if t < self.size]

    def encode(self, text: str, **special) -> list[int]:
        return [t for t in super().encode(unicodedata.normalize("NFC", text) if self.nfc else text, **special) if t < self.size]


def load_tokenizer(name) -> tiktoken.Encoding:
    """The tokenizer.json of a model (a local folder or a hub name), byte-level BPE, as a tiktoken.Encoding with the same tokens.

    tiktoken joins the two neighbours whose union has the lowest id, `tokenizers` the two whose merge comes first. They agree if
    the merges are in the order of the ids and make every token, which is checked. Its added tokens are tiktoken's special
    tokens; real code does contain such strings (SmolLM2 has <filename>), so encode a corpus with `encode_ordinary`, which never
    reads them as tokens. Raises OSError if there is no such file, ValueError if it is of another kind.
    """
    file = find_model(name, "tokenizer.json", *BESIDE) / "tokenizer.json"
    spec = read_json(file)

    def need(fact, otherwise):
        if not fact:
            raise ValueError(f"{file}: {otherwise} is not supported, only byte-level BPE such as that of SmolLM2, Llama-3 and Qwen")
    try:
        bpe, added, normalizer = spec["model"], spec["added_tokens"], spec.get("normalizer")
        plain = bpe["type"] == "BPE" and not bpe.get("byte_fallback") and not bpe.get("continuing_subword_prefix")
        need(plain, f"its kind of {bpe['type']} model")
        need(normalizer in (None, {"type": "NFC"}), f"the normalizer {normalizer}")
        need(pattern := cuts(spec["pre_tokenizer"]), f"the pre_tokenizer {spec['pre_tokenizer']}")
        need(not any(t.get(k) for t in added for k in ("lstrip", "rstrip", "single_word")), "an added token that swallows its neighbours")
        special = {t["content"]: t["id"] for t in added}
        ranks = {bytes(BYTE_OF[c] for c in t): i for t, i in bpe["vocab"].items() if t not in special}
        bos = [i for t in begins(spec.get("post_processor")) for i in t]
        made = [bpe["vocab"][m.replace(" ", "") if isinstance(m, str) else "".join(m)] for m in bpe["merges"]]
    except (KeyError, TypeError, AttributeError) as e:
        need(False, f"an entry ({type(e).__name__}: {e})")
    need(made == sorted(made), "a vocabulary in another order than its merges")
    merged = set(made)
    orphans = [t for t, i in ranks.items() if len(t) > 1 and i not in merged]
    if bpe.get("ignore_merges"):    # Llama-3, like tiktoken, takes a piece that is a token as it is; no other way may lead to an orphan
        orphans = [t for t in orphans if any(t[:i] in ranks and t[i:] in ranks for i in range(1, len(t)))]
    need(not orphans, f"a token that no merge makes ({orphans[:1]})")
    size = 1 + max([*ranks.values(), *special.values()])
    unknown = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]       # tiktoken wants a rank for every byte
    ranks |= {b: size + i for i, b in enumerate(unknown)}
    return HubEncoding(str(name), size=size, nfc=normalizer is not None, bos=bos, source=file,
                       pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def encode_prompt(enc: tiktoken.Encoding, text: str) -> list[int]:
    """Tokens of the beginning of a document: after Llama-3's <|begin_of_text|>, without which it predicts badly; others have none."""
    return [*getattr(enc, "bos", ()), *enc.encode_ordinary(text)]


def begins(post: dict | None) -> list[list[int]]:
    """The ids of the special tokens that a post_processor sets before a text."""
    parts = post["processors"] if post and post["type"] == "Sequence" else [post] if post else []
    return [part["special_tokens"][piece["SpecialToken"]["id"]]["ids"] for part in parts if part["type"] == "TemplateProcessing"
            for piece in itertools.takewhile(lambda piece: "SpecialToken" in piece, part["single"])]


def load_pretrained(name, device="cpu", dtype: torch.dtype = torch.float32) -> tuple[GPT, tiktoken.Encoding]:
    """A model and its tokenizer, by folder or hub name. Raises what the two loaders raise; ValueError if the two do not fit together."""
    enc, model = load_tokenizer(name), GPT.from_pretrained(name, device, dtype)
    if enc.n_vocab > model.n_vocab:
        raise ValueError(f"the tokenizer of {name} has {enc.n_vocab} tokens, its model {model.n_vocab}: they do not belong together")
    model.n_vocab = enc.n_vocab
    return model, enc


def cuts(pre: dict) -> str | None:
    """The pattern of a pre_tokenizer's pieces: GPT-2's, the same with Digits, or one of its own; None if it works in another way."""
    *first, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space") or len(first) > 1:
        return None
    if last.get("use_regex", True):
        return GPT2 if not first else GPT2_DIGITS if first[0] == {"type": "Digits", "individual_digits": True} else None
    split = first[0] if first else {}
    return split["pattern"].get("Regex") if split.get("behavior") == "Isolated" and not split["invert"] else None


def save_tokenizer(enc: tiktoken.Encoding, folder):
    """Write tokenizer.json (and BESIDE it what other tools want), for load_tokenizer and every other tool.

    An encoding that came from load_tokenizer has its files copied; another is one of this project's own making: ValueError if it
    does not cut its text as GPT-2 does, or has a token that no merge makes.
    """
    folder = Path(folder)
    if isinstance(enc, HubEncoding):
        for file in (enc.source, *map(enc.source.with_name, BESIDE)):
            if file.exists():
                write_whole(folder / file.name, lambda tmp: shutil.copyfile(file, tmp))
        return
    if enc._pat_str not in (GPT2, GPT2_TIKTOKEN):
        raise ValueError(f"the encoding {enc.name!r} cannot be saved: it does not cut its text with GPT-2's pattern")
    ranks = dict(sorted(enc._mergeable_ranks.items(), key=lambda item: item[1]))
    show = {t: "".join(CHAR_OF[b] for b in t) for t in ranks}
    merges = []
    for token in (t for t in ranks if len(t) > 1):
        parts = [bytes([b]) for b in token]                         # merge what ranks lowest until the last merge is the token's own
        while len(parts) > 2 and (pairs := [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]) and min(pairs) < ranks[token]:
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) != 2:
            raise ValueError(f"the encoding {enc.name!r} cannot be saved: no merge makes its token {token!r}")
        merges.append([show[p] for p in parts])
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec = dict(version="1.0", normalizer=None, pre_tokenizer=level, post_processor=None, decoder=level,
                added_tokens=[dict(id=i, content=t, **flags) for t, i in sorted(enc._special_tokens.items(), key=lambda item: item[1])],
                model=dict(type="BPE", vocab={show[t]: i for t, i in ranks.items()} | enc._special_tokens, merges=merges))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=next(iter(enc._special_tokens), None))
    for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        write_whole(folder / name, lambda tmp: tmp.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8"))
