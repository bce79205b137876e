"""A Llama-family GPT: the network, its KV cache and sampling, pretrained weights, the tokenizer.

One decoder serves every phase and every checkpoint of the project. RMSNorm before each block, rotary
positions, grouped-query attention, SwiGLU; query/key/value biases (Qwen2.5), normalised queries and keys
(Qwen3), frequency scaling (Llama-3.x) and tied embeddings are switches of the configuration. Modules carry
the names of the Hugging Face checkpoints: what is trained here opens in `transformers` and vLLM.

    model, enc = load_pretrained("base")        # or a folder, or a hub name such as "Qwen/Qwen2.5-1.5B"
    [out] = generate(model, [encode_prompt(enc, "def f(xs):")], max_new_tokens=64, temperature=0.8, seeds=[0])

On a GPU products are bfloat16 (`autocast`), whatever the weights are kept in.

Shapes: B rows, T new tokens, S cached positions, D width, H query heads, K key/value heads, C width of a
head, V vocabulary.
"""
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

# cuDNN's attention is torch's first choice on an H100. Under a mask it can give NaN gradients (torch 2.11,
# pytorch issue 196678), and it makes a plan for each new length, which takes longer than the attention.
torch.backends.cuda.enable_cudnn_sdp(False)

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


def rope_frequencies(cfg: GPTConfig) -> Tensor:
    """Angular frequency of each rotated pair, (C/2,), in radians per position, with Llama-3.1's scaling."""
    freq = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)    # (C/2,)
    if cfg.rope_scaling:
        factor, low, high, original = (cfg.rope_scaling[name] for name in LLAMA3_SCALING)
        # Waves longer than the original context are stretched by `factor`; fast ones stay; a ramp joins them.
        turns = original * freq / (2 * math.pi)
        ramp = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (ramp + (1 - ramp) / factor)
    return freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout: x (B, T, heads, C), cos and sin (B or 1, T, 1,
    C/2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


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
        q = self.q_proj(x).view(B, T, H, C)
        k = self.k_proj(x).view(B, T, K, C)
        v = self.v_proj(x).view(B, T, K, C)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if store is None:
            k, v = (t.repeat_interleave(H // K, dim=2).transpose(1, 2) for t in (k, v))    # (B, H, T, C)
            q = q.transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        else:
            # Few queries, a long cache: copying its keys for each head takes half of the time of decoding. So
            # the heads that share a key stand in line as further queries of that key.
            k, v = (t.transpose(1, 2) for t in store(k, v))                                # (B, K, S, C)
            q = q.view(B, T, K, H // K, C).transpose(1, 2).reshape(B, K, -1, C)           # (B, K, T * H/K, C)
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
    """bfloat16 products on a GPU. Its casts of the weights last as long as the outermost such context."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


class GPT(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.config = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        # recompute each block in the backward pass: a third more time, less memory
        self.grad_checkpoint = False
        # tokens that exist: Qwen's matrices have more rows, which are not drawn
        self.n_vocab = cfg.vocab_size
        self.limit = cfg.context        # longest sequence that will be put in; a run may lower it
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
        steps, mask, end = torch.arange(T, device=dev), None, T
        pos = steps[None]               # relative: they need not restart with each document
        if cache is not None:
            pos = cache.length[:, None] + steps                                            # (B, T)
            # A CUDA graph that is being recorded cannot look at lengths.
            recording = dev.type == "cuda" and torch.cuda.is_current_stream_capturing()
            end = cache.k.shape[2] if recording else int(pos.max()) + 1
            seen = torch.arange(end, device=dev) <= pos[..., None]                         # (B, T, S)
            shared = self.config.n_head // self.config.n_kv_head
            mask = seen.repeat_interleave(shared, dim=1)[:, None]                         # (B, 1, T * H/K, S)
        elif doc is not None:
            same = doc[:, :, None] == doc[:, None, :]
            mask = (same & (steps[:, None] >= steps))[:, None]                             # (B, 1, T, T)
        if end > self.limit:
            raise ValueError(f"a sequence of {end} tokens does not fit the model's context of {self.limit}")
        if self.freq is None or self.freq.device != dev:
            self.freq = rope_frequencies(self.config).to(dev)
        angle = pos[..., None, None] * self.freq                                         # (B or 1, T, 1, C/2)
        rope = angle.cos(), angle.sin()
        with autocast(dev):
            x = self.embed_tokens(tokens)                                                  # (B, T, D)
            for i, block in enumerate(self.layers):
                store = cache.writer(i, pos, end) if cache is not None else None
                if self.grad_checkpoint and torch.is_grad_enabled():
                    x = checkpoint(block, x, rope, mask, store, use_reentrant=False)
                else:
                    x = block(x, rope, mask, store)
            x = self.norm(x)
            x = x if at is None else x[at]                                               # (B, T, D) or (N, D)
            return self.unembed(x) if head else x

    def unembed(self, x: Tensor) -> Tensor:
        """Last hidden states (..., D), what forward(head=False) returns -> logits (..., V)."""
        with autocast(x.device):
            return F.linear(x, (self.lm_head or self.embed_tokens).weight[:self.n_vocab])

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype: torch.dtype = torch.float32) -> "GPT":
        """A Llama-3.x, Qwen2.5, Qwen3 or SmolLM2 checkpoint: a local folder, or a name on the Hugging Face
        hub.

        Files are memory-mapped and tensors converted one by one: there is never a second copy of the weights.
        Raises OSError if the model cannot be had, ValueError if it is damaged or not the network that
        config.json says.
        """
        from safetensors import SafetensorError, safe_open
        folder = find_model(name, "*config.json", "*.safetensors", "*.safetensors.index.json")
        with torch.device("meta"):                   # shapes without memory
            model = cls(read_config(folder))
        files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
        if index.exists() and not files[0].exists():
            files = [folder / f for f in sorted(set(read_json(index).get("weight_map", {}).values()))]
        wanted = {hub_key(k): list(v.shape) for k, v in model.state_dict().items()}
        found = {}
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    for key in tensors.keys():
                        want, have = wanted.get(key), tensors.get_slice(key).get_shape()
                        if want == have:
                            found[key] = tensors.get_tensor(key).to(device, dtype)
                        elif want or not key.endswith(("rotary_emb.inv_freq", "lm_head.weight")):
                            want = want or "none of that name"       # but for two that follow from the rest
                            raise ValueError(f"{file}: {key} is {have}, but config.json asks for {want}")
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{file} cannot be read ({e}): download it again, as safetensors") from None
        missing = [k for k in wanted if k not in found]
        if missing:
            raise ValueError(f"{folder}: {len(missing)} of {len(wanted)} tensors are missing "
                             f"({missing[0]}): complete the download")
        model.load_state_dict({k: found[hub_key(k)] for k in model.state_dict()}, assign=True)
        return model

    def save_pretrained(self, folder, dtype: torch.dtype | None = None):
        """Write config.json and model.safetensors as `transformers` and vLLM read them, in `dtype` (its own).
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        def write(tmp: Path):
            try:
                save_file(weights, tmp, metadata={"format": "pt"})
            except SafetensorError as e:             # which is what a full disk looks like there
                raise OSError(f"{folder} cannot be written: {e}") from None
        weights = {hub_key(k): v.detach().to("cpu", dtype).contiguous() for k, v in self.state_dict().items()}
        config = write_config(self.config, dtype or self.embed_tokens.weight.dtype)
        write_whole(Path(folder) / "model.safetensors", write)
        text = json.dumps(config, indent=2) + "\n"
        write_whole(Path(folder) / "config.json", lambda tmp: tmp.write_text(text))


# ------------------------------------------------------------------------------------- KV cache and sampling


class KVCache:
    """Keys and values of the tokens seen, with a length per row: rolling a row back is lowering its length.

    k, v: (n_layer, B, S, K, C); length: (B,) int64.
    """

    def __init__(self, cfg: GPTConfig, rows: int, size: int, device, dtype):
        shape = (cfg.n_layer, rows, size, cfg.n_kv_head, cfg.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)

    def writer(self, layer: int, pos: Tensor, end: int):
        """A function that stores this layer's new (B, T, K, C) at pos (B, T) and returns all up to `end`."""
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


def new_cache(model: GPT, rows: int, size: int) -> KVCache:
    """An empty cache, in the precision in which the model computes."""
    dtype = torch.bfloat16 if model.device.type == "cuda" else model.embed_tokens.weight.dtype
    return KVCache(model.config, rows, size, model.device, dtype)


class Decoder:
    """One token more for every row of a cache: decode(last) is `model(last[:, None], cache=cache)[:, 0]`, (B,
    V).

    On a GPU the pass is recorded once, as a CUDA graph, and replayed: a small model's thousand kernels take
    longer to launch than to run. A recording is bound to its cache's tensors: change `cache.length` in place
    only.
    """
    aside = None                        # the stream to record on; a new one each time would cost memory

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache, self.graph = model, cache, None

    def __call__(self, last: Tensor) -> Tensor:
        if self.graph is not None:
            self.last.copy_(last[:, None])
            self.graph.replay()
            return self.logits
        logits = self.model(last[:, None], cache=self.cache)[:, 0]                         # (B, V)
        if last.is_cuda:
            # After a pass like any other, which has made autocast's copies of the weights. What the allocator
            # holds unused cannot be given back in a recording, which would run out of memory.
            torch.cuda.empty_cache()
            self.last, graph = last[:, None].clone(), torch.cuda.CUDAGraph()
            aside = Decoder.aside = Decoder.aside or torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                graph.capture_begin()
                try:
                    self.logits = self.model(self.last, cache=self.cache)[:, 0]
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = graph          # only now: a recording that failed must not be replayed
        return logits


def pad(rows: list, value: int, device=None) -> Tensor:
    """Right-pad lists to a (B, T) int64 tensor."""
    width = max(map(len, rows))
    padded = [[*row, *[value] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device)


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


def uniforms(seed, n: int) -> np.ndarray:
    """n numbers in [0, 1) from a generator seeded by what they are for: (seed, phase, step, problem, sample).
    """
    return np.random.default_rng(seed).random(n)


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], *, max_new_tokens: int, seeds: list,
             temperature: float = 1.0, stop_ids: tuple[int, ...] | None = None, stop=None,
             batch_size: int = 256) -> list[Sample]:
    """Continue each prompt until a token of stop_ids (default: end of document), stop(tokens), or
    max_new_tokens.

    seeds: one per prompt, anything `np.random.default_rng` takes. A row that finishes hands its slot to the
    next waiting prompt; when none waits, finished rows are dropped. Raises ValueError for an empty prompt or
    one that leaves no room in the context.
    """
    stop_ids = {model.config.eos_id} if stop_ids is None else set(stop_ids)
    for i, p in enumerate(prompts):
        if not 0 < len(p) < model.limit:
            raise ValueError(f"prompt {i} has {len(p)} tokens; between 1 and {model.limit - 1} fit")
    if len(seeds) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts, but {len(seeds)} seeds: each needs its own")
    out = [Sample() for _ in prompts]
    noise = [uniforms(s, max_new_tokens) for s in seeds]
    # pop() takes the shortest: little padding
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

    def finished(i: int) -> bool:
        s = out[i]
        s.stopped = s.tokens[-1] in stop_ids or (stop is not None and stop(s.tokens))
        return s.stopped or len(s.tokens) == max_new_tokens or len(prompts[i]) + len(s.tokens) == model.limit
    with autocast(model.device):
        rows = [waiting.pop() for _ in range(min(batch_size, len(waiting)))]   # the prompt in each slot
        if rows:
            size = max(map(len, prompts)) + max_new_tokens
            cache = new_cache(model, len(rows), min(size, model.limit))
            last = prefill(model, cache, list(range(len(rows))), [prompts[i] for i in rows])
            live, decode = [True] * len(rows), Decoder(model, cache)
        while rows:
            logits = decode(torch.tensor(last, device=model.device)).float()               # (B, V)
            cache.length += torch.tensor(live, device=model.device)  # who has finished rides along, and stays
            u = [noise[i][len(out[i].tokens)] if on else 0.0 for i, on in zip(rows, live)]
            # (B,)
            drawn = pick(logits, torch.tensor(u, dtype=torch.float64, device=model.device), temperature)
            logp = torch.log_softmax(logits / (temperature or 1.0), -1).gather(-1, drawn[:, None])    # (B, 1)
            last, logp, ready = drawn.tolist(), logp[:, 0].tolist(), []
            for slot, i in enumerate(rows):
                if live[slot]:
                    out[i].tokens.append(last[slot])
                    out[i].logprobs.append(logp[slot])
                    live[slot] = not finished(i)
                    ready += [slot] * (not live[slot])
            ready = ready[:len(waiting)]                                       # slots for those who wait
            for slot in ready:
                rows[slot], live[slot] = waiting.pop(), True
            if ready:
                fed = prefill(model, cache, ready, [prompts[rows[slot]] for slot in ready])
                for slot, token in zip(ready, fed):
                    last[slot] = token
            # A smaller cache is copied and, on a GPU, recorded anew, which takes as long as some tokens.
            if sum(live) <= (len(rows) // 2 if model.device.type == "cuda" else len(rows) - 1):
                keep = [slot for slot, on in enumerate(live) if on]
                cache = cache.select(torch.tensor(keep, dtype=torch.int64, device=model.device))
                rows, last = [rows[slot] for slot in keep], [last[slot] for slot in keep]
                live, decode = [True] * len(keep), Decoder(model, cache)
    return out


def prefill(model: GPT, cache: KVCache, slots: list[int], prompts: list[list[int]]) -> list[int]:
    """Run prompts into slots of a cache, all tokens but the last, which are returned: decoding feeds them.

    What prompts share is run once: the samples of a group are one prompt, few-shot prompts share examples
    (633 of 736 tokens of MBPP's: two to three times as fast, 64 new tokens, SmolLM2-135M on a CPU).
    """
    unique = {body: n for n, body in enumerate(dict.fromkeys(tuple(p[:-1]) for p in prompts))}
    prefix = os.path.commonprefix(list(unique))
    fresh = new_cache(model, 1, max(map(len, unique)))

    def extend(cache: KVCache, parts: list):
        if any(parts):
            text = pad(parts, 0, model.device)                                             # (B, T)
            model(text, cache=cache, at=torch.zeros_like(text, dtype=torch.bool))          # without logits
        cache.length += torch.tensor([len(part) for part in parts], device=model.device)
    extend(fresh, [prefix])
    fresh = fresh.select(torch.zeros(len(unique), dtype=torch.int64, device=model.device))
    extend(fresh, [body[len(prefix):] for body in unique])
    copies = torch.tensor([unique[tuple(p[:-1])] for p in prompts], device=model.device)
    cache.put(torch.tensor(slots, device=model.device), fresh.select(copies))
    return [p[-1] for p in prompts]


# ------------------------------------------------------------------------ the Hugging Face layout of a model


def find_model(name, *patterns: str) -> Path:
    """The folder of a model: `name` itself if it is one, else the hub's snapshot of files that match the
    patterns.
    """
    if Path(name).is_dir():
        if (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists():
            raise ValueError(f"{name} is an adapter (LoRA): merge it into its model, and give that folder")
        return Path(name)
    from huggingface_hub import errors, snapshot_download
    nowhere = f"there is no folder {str(name)!r}"
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise PermissionError(f"the model {str(name)!r} is gated: accept its terms on its hub page, then run "
                              "`hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FileNotFoundError(f"{nowhere} and no such model on the hub: check the spelling (private ones "
                                "need `hf auth login`)") from None
    except Exception as e:                           # the many ways of a network to fail
        if isinstance(e, OSError) and e.filename:
            raise                                    # it is the disk
        reason = str(e).strip().partition("\n")[0]
        raise OSError(f"{nowhere}, and the hub did not answer for a model of that name ({reason}): check the "
                      "connection, or give the path of a downloaded folder") from None


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError or ValueError, with the file's name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where an object should be")
        return content
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} has no {file.name}: give the folder of a model in the "
                                "Hugging Face layout") from None
    except ValueError as e:
        raise ValueError(f"{file} is not valid JSON ({e}): download or save it again") from None


def write_whole(file: Path, write):
    """Let `write` fill a temporary neighbour of `file`, then put it in place: no reader ever sees half a
    file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(tmp)
        mask = os.umask(0)
        os.umask(mask)
        tmp.chmod(0o666 & ~mask)                     # safetensors makes files that nobody else may read
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())               # else a power failure could leave the name without the content
        os.replace(tmp, file)
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)                             # and the name itself
        os.close(folder)
    finally:
        tmp.unlink(missing_ok=True)


def hub_key(ours: str) -> str:
    """The checkpoint's name of a parameter of GPT."""
    return ours if ours.startswith("lm_head.") else "model." + ours


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
    c = {"hidden_act": "silu", "rope_theta": 10_000.0, "tie_word_embeddings": False, **read_json(file)}
    try:
        # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling.
        rope = c.get("rope_parameters") or {"rope_theta": c["rope_theta"], **(c.get("rope_scaling") or {})}
        c["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        for key, values in SUPPORTED.items():
            if c.get(key) not in values:
                known = " or ".join(map(repr, values))
                raise ValueError(f"{file}: {key} {c.get(key)!r} is not supported, only {known}")
        c["num_key_value_heads"] = c.get("num_key_value_heads") or c["num_attention_heads"]
        c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        ends = c.get("eos_token_id")
        if ends is None and (folder / "generation_config.json").exists():
            ends = read_json(folder / "generation_config.json").get("eos_token_id")
        if ends is None:
            raise ValueError(f"{file}: eos_token_id is missing: set it to the token that ends a text")
        c["eos_token_id"] = ends[0] if isinstance(ends, list) else int(ends)
        scaling = {k: rope[k] for k in LLAMA3_SCALING} if c["rope_type"] == "llama3" else None
        return GPTConfig(**{ours: c[theirs] for ours, theirs in HUB_NAMES.items()}, rope_scaling=scaling,
                         rope_theta=float(rope["rope_theta"]), qkv_bias=c["model_type"] == "qwen2",
                         qk_norm=c["model_type"] == "qwen3")
    except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as e:
        raise ValueError(f"{file}: an entry is missing or of a wrong type ({e}): take it from the model's "
                         "own page") from None


def write_config(cfg: GPTConfig, dtype: torch.dtype) -> dict:
    """The config.json of a GPTConfig: the inverse of read_config."""
    if cfg.qkv_bias and cfg.qk_norm:
        raise ValueError("no family on the hub has both qkv_bias and qk_norm: such a model cannot be saved")
    family = "Qwen3" if cfg.qk_norm else "Qwen2" if cfg.qkv_bias else "Llama"
    return dict({theirs: getattr(cfg, ours) for ours, theirs in HUB_NAMES.items()},
                architectures=[f"{family}ForCausalLM"], model_type=family.lower(), hidden_act="silu",
                rope_theta=cfg.rope_theta, bos_token_id=None, torch_dtype=str(dtype).removeprefix("torch."),
                rope_scaling={"rope_type": "llama3", **cfg.rope_scaling} if cfg.rope_scaling else None)


# --------------------------------------------------------------------------------------------- the tokenizer

# A text is first cut into pieces by a pattern; no token reaches across a cut. GPT-2's cuts, the same as
# tiktoken writes them, and with every digit apart (SmolLM2), where a run of spaces also ends at a digit.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_TIKTOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# tokenizer.json shows a byte as one character: its own if that is visible, the others from U+0100 on.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
HIDDEN = sorted(set(range(256)) - set(VISIBLE))
BYTE_OF = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}
CHAR_OF = {b: c for c, b in BYTE_OF.items()}

# Files that go with a model from folder to folder; vLLM looks into the last for all tokens that end a text.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class HubEncoding(tiktoken.Encoding):
    """An Encoding that does what some tokenizers do beside BPE: normalise Unicode (Qwen), drop bytes
    (SmolLM2).

    size: ids of the tokenizer, those above stand for unknown bytes; nfc: whether it normalises; bos: what it
    sets before every document (Llama-3), see `encode_prompt`; source: its tokenizer.json.
    """

    def __init__(self, name: str, *, size: int, nfc: bool, bos: list[int], source: Path, **bpe):
        super().__init__(name, **bpe)
        self.size, self.nfc, self.bos, self.source, self.max_token_value = size, nfc, bos, source, size - 1

    def __getstate__(self):                          # for pickle: the arguments of __init__
        mine = dict(size=self.size, nfc=self.nfc, bos=self.bos, source=self.source)
        return super().__getstate__() | mine

    def encode(self, text: str, **special) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return [t for t in super().encode(text, **special) if t < self.size]

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode(text, disallowed_special=())


def load_tokenizer(name) -> HubEncoding:
    """The tokenizer.json of a model, byte-level BPE, as a tiktoken.Encoding with the same tokens.

    tiktoken joins the two neighbours whose union has the lowest id, `tokenizers` the two whose merge comes
    first. They agree if the merges are in the order of the ids and make every token, which is checked. Its
    added tokens are tiktoken's special tokens; real code contains such strings, so encode with
    `encode_ordinary`, which never reads them as tokens. Raises OSError if there is no such file, ValueError
    if it is of another kind.
    """
    file = find_model(name, *TOKENIZER_FILES) / "tokenizer.json"
    spec = read_json(file)

    def need(fact, otherwise):
        if not fact:
            raise ValueError(f"{file}: {otherwise} is not supported, only byte-level BPE as of SmolLM2, "
                             "Llama-3 and Qwen")
    try:
        bpe, added, normalizer = spec["model"], spec["added_tokens"], spec.get("normalizer")
        odd = bpe.get("byte_fallback") or bpe.get("continuing_subword_prefix")
        need(bpe["type"] == "BPE" and not odd, f"its kind of {bpe['type']} model")
        need(normalizer in (None, {"type": "NFC"}), f"the normalizer {normalizer}")
        pattern = split_pattern(spec["pre_tokenizer"])
        need(pattern, f"the pre_tokenizer {spec['pre_tokenizer']}")
        greedy = any(t.get(k) for t in added for k in ("lstrip", "rstrip", "single_word"))
        need(not greedy, "an added token that swallows its neighbours")
        special = {t["content"]: t["id"] for t in added}
        ranks = {bytes(BYTE_OF[c] for c in t): i for t, i in bpe["vocab"].items() if t not in special}
        bos = beginning(spec.get("post_processor"))
        made = [bpe["vocab"][m.replace(" ", "") if isinstance(m, str) else "".join(m)] for m in bpe["merges"]]
    except (KeyError, TypeError, AttributeError) as e:
        need(False, f"an entry ({type(e).__name__}: {e})")
    need(made == sorted(made), "a vocabulary in another order than its merges")
    merged = set(made)
    orphans = [t for t, i in ranks.items() if len(t) > 1 and i not in merged]
    if bpe.get("ignore_merges"):    # Llama-3, like tiktoken, takes a piece that is a token as it is
        orphans = [t for t in orphans if any(t[:i] in ranks and t[i:] in ranks for i in range(1, len(t)))]
    need(not orphans, f"a token that no merge makes ({orphans[:1]})")
    size = 1 + max([*ranks.values(), *special.values()])
    # tiktoken wants a rank for every byte
    unknown = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    ranks |= {b: size + i for i, b in enumerate(unknown)}
    return HubEncoding(str(name), size=size, nfc=normalizer is not None, bos=bos, source=file,
                       pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def split_pattern(pre: dict) -> str | None:
    """The pattern of a pre_tokenizer's pieces: GPT-2's, the same with Digits, or one of its own; None:
    neither.
    """
    *first, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space") or len(first) > 1:
        return None
    if last.get("use_regex", True):
        digits = [{"type": "Digits", "individual_digits": True}]
        return GPT2 if not first else GPT2_DIGITS if first == digits else None
    own = first[0] if first else {}
    return own["pattern"].get("Regex") if own.get("behavior") == "Isolated" and not own["invert"] else None


def beginning(post: dict | None) -> list[int]:
    """The ids of the special tokens that a post_processor sets before a text."""
    parts = post["processors"] if post and post["type"] == "Sequence" else [post] if post else []
    out = []
    for part in parts:
        if part["type"] == "TemplateProcessing":
            for piece in itertools.takewhile(lambda piece: "SpecialToken" in piece, part["single"]):
                out += part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return out


def encode_prompt(enc: tiktoken.Encoding, text: str) -> list[int]:
    """Tokens of the beginning of a document: after Llama-3's <|begin_of_text|>; others have none."""
    return [*getattr(enc, "bos", ()), *enc.encode_ordinary(text)]


def load_pretrained(name, device="cpu", dtype: torch.dtype = torch.float32) -> tuple[GPT, HubEncoding]:
    """A model and its tokenizer. Raises what the two loaders raise; ValueError if the two do not fit
    together.
    """
    enc, model = load_tokenizer(name), GPT.from_pretrained(name, device, dtype)
    if enc.n_vocab > model.n_vocab:
        raise ValueError(f"the tokenizer of {name} has {enc.n_vocab} tokens, its model {model.n_vocab}: "
                         "they do not belong together")
    model.n_vocab = enc.n_vocab
    return model, enc


def save_tokenizer(enc: HubEncoding, folder):
    """Copy the files of a loaded tokenizer, for load_tokenizer and every other tool."""
    for name in TOKENIZER_FILES:
        file = enc.source.with_name(name)
        if file.exists():
            write_whole(Path(folder) / name, lambda tmp, file=file: shutil.copyfile(file, tmp))
