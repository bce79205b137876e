"""A Llama-family GPT: the network, its KV cache and sampling, pretrained weights, the tokenizer.

One decoder serves every phase and every checkpoint of the project. RMSNorm before each block, rotary positions,
grouped-query attention, SwiGLU; query/key/value biases (Qwen2.5), normalised queries and keys (Qwen3), frequency
scaling (Llama-3.x) and tied embeddings are switches of the configuration. Modules carry the names of the Hugging Face
checkpoints, so loading and saving need no table of names, and what is trained here opens in `transformers` and vLLM.

    model = GPT.from_pretrained("base")             # or a folder, or a hub name such as "Qwen/Qwen2.5-1.5B"
    enc = load_tokenizer("base")                    # a tiktoken.Encoding
    out = generate(model, [enc.encode("def f(xs):")], max_new_tokens=64, temperature=0.8, seeds=[0])

Shapes: B rows, T new tokens, S cached positions, D width, H query heads, K key/value heads, C width of a head, V vocabulary.
"""
import json
import math
import os
import re
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
    context: int = 512                  # longest sequence, in tokens
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None    # Llama-3.1's: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    eos_id: int = 0                     # ends a document; also the padding, which no loss and no attention ever sees


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
        if store is not None:
            k, v = store(k, v)                                                                        # (B, S, K, C)
        groups = cfg.n_head // cfg.n_kv_head                                                          # query heads that share a key
        k, v = (t.repeat_interleave(groups, dim=2).transpose(1, 2) for t in (k, v))                   # (B, H, S, C)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None)
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
        self.apply(self._init)

    def _init(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def forward(self, tokens: Tensor, cache: "KVCache | None" = None, doc: Tensor | None = None) -> Tensor:
        """Logits of the token after each token: tokens (B, T) int64 -> (B, T, V).

        Rows are padded on the right; causality keeps the padding out of every real position.
        cache: tokens continue each row at its own `cache.length`; the caller then advances `length` by the tokens it keeps.
        doc:   (B, T) document numbers of a packed batch: a token sees its own document only, and positions restart there.
        Raises ValueError if a position lies beyond the configured context.
        """
        (B, T), dev = tokens.shape, tokens.device
        steps = torch.arange(T, device=dev)
        if cache is not None:
            pos = cache.length[:, None] + steps                                                       # (B, T)
            end = int(pos.max()) + 1
            mask = (torch.arange(end, device=dev) <= pos[..., None])[:, None]                         # (B, 1, T, S)
        elif doc is not None:
            same = doc[:, :, None] == doc[:, None, :]
            mask = (same & (steps[:, None] >= steps))[:, None]                                        # (B, 1, T, T)
            pos, end = steps - _first_of_document(doc), T
        else:
            pos, mask, end = steps[None], None, T
        if end > self.config.context:
            raise ValueError(f"a sequence of {end} tokens does not fit the model's context of {self.config.context}")
        freq = rope_frequencies(self.config).to(dev)
        angle = pos[..., None, None] * freq                                                           # (B or 1, T, 1, C/2)
        rope = angle.cos(), angle.sin()
        x = self.embed_tokens(tokens)                                                                 # (B, T, D)
        for i, block in enumerate(self.layers):
            store = cache.writer(i, pos, end) if cache is not None else None
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, store, use_reentrant=False)
            else:
                x = block(x, rope, mask, store)
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(self.norm(x), head)                                                           # (B, T, V)

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype: torch.dtype = torch.float32) -> "GPT":
        """A Llama-3.x, Qwen2.5, Qwen3 or SmolLM2 checkpoint: a local folder, or a name on the Hugging Face hub.

        The files are memory-mapped and become the parameters, tensor by tensor: a tensor that has the asked dtype and stays on the
        CPU is never copied, of the others there is one converted copy. Raises FileNotFoundError or OSError if the model cannot be
        had, ValueError if it cannot be used (see read_config), or if a tensor is missing, misshapen, or not ours.
        """
        from safetensors import SafetensorError, safe_open
        folder = find_model(name, "config.json", "*.safetensors", "*.safetensors.index.json")
        with torch.device("meta"):                                  # shapes without memory
            model = cls(read_config(folder))
        wanted, found = model.state_dict(), {}
        for file in weight_files(folder):
            try:
                with safe_open(file, "pt") as tensors:
                    for key in tensors.keys():
                        ours = key.removeprefix("model.")
                        if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and model.lm_head is None):
                            continue                                # what some checkpoints store though it follows from the rest
                        if ours not in wanted:
                            raise ValueError(f"{file} holds a tensor {key!r} that the architecture in config.json does not have")
                        if (shape := tuple(tensors.get_slice(key).get_shape())) != tuple(wanted[ours].shape):
                            raise ValueError(f"{file}: tensor {key!r} is {shape}, but config.json asks for {tuple(wanted[ours].shape)}")
                        found[ours] = tensors.get_tensor(key).to(device, dtype)
            except SafetensorError as e:
                raise ValueError(f"{file} is damaged ({e}): delete it and download or save it again") from None
        if missing := [k for k in wanted if k not in found]:
            raise ValueError(f"{folder} lacks {len(missing)} of {len(wanted)} tensors, the first being {hub_key(missing[0])!r}: "
                             "complete the download, or correct config.json")
        model.load_state_dict(found, assign=True)
        return model

    def save_pretrained(self, folder, dtype: torch.dtype | None = None):
        """Write config.json and model.safetensors as `transformers` and vLLM read them, in `dtype` (default: the model's own)."""
        from safetensors.torch import save_file
        config = write_config(self.config)
        tensors = {hub_key(k): v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in self.state_dict().items()}
        config["torch_dtype"] = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "model.safetensors", lambda tmp: save_file(tensors, tmp, metadata={"format": "pt"}))
        write_whole(folder / "config.json", lambda tmp: tmp.write_text(json.dumps(config, indent=2) + "\n"))


def _first_of_document(doc: Tensor) -> Tensor:
    """Index at which each token's document begins: doc (B, T) -> (B, T)."""
    T = doc.shape[1]
    begins = torch.ones_like(doc, dtype=torch.bool)
    begins[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return torch.cummax(torch.arange(T, device=doc.device) * begins, dim=1).values


# ------------------------------------------------------------------------------------------------- KV cache and sampling


class KVCache:
    """Keys and values of the tokens seen, with a length per row: rolling a row back is lowering its length.

    k, v: (n_layer, B, S, K, C); length: (B,) int64.
    """

    def __init__(self, cfg: GPTConfig, rows: int, size: int, device, dtype):
        shape = (cfg.n_layer, rows, min(size, cfg.context), cfg.n_kv_head, cfg.head_dim)
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


def pad(rows: list[list[int]], value: int, device=None) -> Tensor:
    """Right-pad lists to a (B, T) int64 tensor."""
    width = max(map(len, rows))
    return torch.tensor([list(r) + [value] * (width - len(r)) for r in rows], dtype=torch.int64, device=device)


def pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw one token per row by inverting the distribution function at `uniform`; greedy at temperature 0.

    logits (B, V), uniform (B,) in [0, 1) -> (B,) int64. A row's draw depends on its own logits and its own uniform alone, so a
    sample does not change with the batch it is drawn in or with the number of ranks.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits.double() / temperature, -1).cumsum(-1)                                 # (B, V)
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
             stop_ids: tuple[int, ...] | None = None, stop=None, batch_size: int = 256, vocab: int | None = None) -> list[Sample]:
    """Continue each prompt until a token of stop_ids (default: end of document), until stop(tokens) is true, or max_new_tokens.

    seeds: one per prompt, anything `np.random.default_rng` takes. vocab: logits from there on are padding rows, never drawn.
    A row that finishes hands its slot to the next waiting prompt; when none waits, finished rows are dropped.
    Raises ValueError for an empty prompt or one that leaves no room in the context.
    """
    cfg, dev = model.config, model.device
    stop_ids = {cfg.eos_id} if stop_ids is None else set(stop_ids)
    for i, p in enumerate(prompts):
        if not p or len(p) >= cfg.context:
            raise ValueError(f"prompt {i} has {len(p)} tokens; between 1 and {cfg.context - 1} fit the model's context")
    out = [Sample() for _ in prompts]
    if not prompts:
        return out
    noise = [uniforms(s, max_new_tokens) for s in seeds]
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))      # pop() takes the shortest: neighbours pad little
    size = max(map(len, prompts)) + max_new_tokens
    dtype = torch.get_autocast_dtype(dev.type) if torch.is_autocast_enabled(dev.type) else model.embed_tokens.weight.dtype

    def prefill(ids):
        """Run the prompts of `ids` (all tokens but the last, which the decoding loop feeds) into a cache of their own."""
        body = [prompts[i][:-1] for i in ids]
        width = max(map(len, body))
        fresh = KVCache(cfg, len(ids), width, dev, dtype)
        if width:
            model(pad(body, cfg.eos_id, dev), cache=fresh)
        fresh.length = torch.tensor([len(b) for b in body], device=dev)
        return fresh

    rows = [waiting.pop() for _ in range(min(batch_size, len(waiting)))]        # the prompt in each slot
    cache = KVCache(cfg, len(rows), size, dev, dtype)
    cache.put(torch.arange(len(rows), device=dev), prefill(rows))
    last = torch.tensor([prompts[i][-1] for i in rows], device=dev)
    while rows:
        logits = model(last[:, None], cache=cache)[:, 0, :vocab].float()                              # (B, V)
        cache.length += 1
        u = torch.tensor([noise[i][len(out[i].tokens)] for i in rows], dtype=torch.float64)
        last = pick(logits, u.to(dev), temperature)                                                   # (B,)
        logp = torch.log_softmax(logits / (temperature or 1.0), -1).gather(-1, last[:, None])[:, 0].tolist()
        done = []
        for slot, (i, token, lp) in enumerate(zip(rows, last.tolist(), logp)):
            s = out[i]
            s.tokens.append(token)
            s.logprobs.append(lp)
            s.stopped = token in stop_ids or (stop is not None and stop(s.tokens))
            if s.stopped or len(s.tokens) == max_new_tokens or len(prompts[i]) + len(s.tokens) == cfg.context:
                done.append(slot)
        refill = done[:len(waiting)]
        if refill:
            ids = [waiting.pop() for _ in refill]
            slots = torch.tensor(refill, device=dev)
            cache.put(slots, prefill(ids))
            last[slots] = torch.tensor([prompts[i][-1] for i in ids], device=dev)
            for slot, i in zip(refill, ids):
                rows[slot] = i
        if gone := set(done[len(refill):]):
            keep = [slot for slot in range(len(rows)) if slot not in gone]
            index = torch.tensor(keep, dtype=torch.int64, device=dev)
            rows, last, cache = [rows[slot] for slot in keep], last[index], cache.select(index)
    return out


# ------------------------------------------------------------------------------------- the Hugging Face layout of a model


def find_model(name, *patterns: str) -> Path:
    """The folder of a model: `name` itself if it is a folder, else the hub's snapshot of its files that match the patterns."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except errors.HFValidationError:
        raise FileNotFoundError(f"there is no folder {str(name)!r}, nor can a model on the hub have that name") from None
    except errors.GatedRepoError:
        raise PermissionError(f"the model {str(name)!r} is gated: accept its terms on its page on the hub, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(f"there is no folder {str(name)!r} and no such model on the hub: check the spelling, or, "
                                "if it is private, run `hf auth login`") from None
    except (OSError, errors.OfflineModeIsEnabled, RuntimeError) as e:
        why = str(e).strip().partition("\n")[0]
        raise OSError(f"there is no folder {str(name)!r}, and the hub could not be reached for a model of that name ({why}): "
                      "check the connection, or give the path of a downloaded folder") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that the index lists."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json: only safetensors can be read")
    files = [folder / f for f in sorted(set(read_json(index)["weight_map"].values()))]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{index} lists {file.name}, which is not there: complete the download")
    return files


def hub_key(ours: str) -> str:
    """Name in the checkpoint of a parameter of GPT."""
    return ours if ours.startswith("lm_head.") else "model." + ours


def read_json(file: Path) -> dict:
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: give the folder of a model in the Hugging Face layout")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:                                         # covers bad JSON and bad UTF-8
        raise ValueError(f"{file} is not valid JSON ({e}): download or save it again") from None


def write_whole(file: Path, write):
    """Let `write` fill a temporary neighbour of `file`, then put it in place at once: no reader ever sees half a file."""
    tmp = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(tmp)
        os.replace(tmp, file)
    finally:
        tmp.unlink(missing_ok=True)


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a config.json. Raises ValueError for anything this network does not compute: it must never be ignored."""
    file = folder / "config.json"
    c = read_json(file)
    kind = c.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"{file}: model_type {kind!r} is not supported; it must be llama (also SmolLM2), qwen2 or qwen3")
    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10_000.0), **(c.get("rope_scaling") or {})}  # transformers >= 5, or <
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for key, value, good in [("rope_type", rope_type, ("default", "llama3")), ("hidden_act", c.get("hidden_act", "silu"), ("silu",)),
                             ("attention_bias", bool(c.get("attention_bias")), (False,)), ("mlp_bias", bool(c.get("mlp_bias")), (False,)),
                             ("use_sliding_window", bool(c.get("use_sliding_window")), (False,)),
                             ("quantization_config", c.get("quantization_config"), (None,))]:
        if value not in good:
            raise ValueError(f"{file}: {key} = {value!r} is not supported, only {' or '.join(map(repr, good))}")
    scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    try:
        eos, heads = c["eos_token_id"], c["num_attention_heads"]
        return GPTConfig(
            vocab_size=c["vocab_size"], d_model=c["hidden_size"], n_layer=c["num_hidden_layers"], n_head=heads,
            n_kv_head=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            d_ff=c["intermediate_size"], context=c["max_position_embeddings"], rope_theta=float(rope["rope_theta"]),
            rope_scaling={k: rope[k] for k in scaling} if rope_type == "llama3" else None, norm_eps=c["rms_norm_eps"],
            qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", tie_embeddings=bool(c.get("tie_word_embeddings", False)),
            eos_id=eos[0] if isinstance(eos, list) else int(eos))
    except (KeyError, TypeError, IndexError) as e:
        raise ValueError(f"{file}: an entry is missing or of the wrong type ({e}); take config.json from the model's own page") from None


def write_config(cfg: GPTConfig) -> dict:
    """The config.json of a GPTConfig: the inverse of read_config."""
    if cfg.qkv_bias and cfg.qk_norm:
        raise ValueError("a model with both qkv_bias and qk_norm has no counterpart on the hub: save it with torch.save")
    kind, name = ("qwen3", "Qwen3") if cfg.qk_norm else ("qwen2", "Qwen2") if cfg.qkv_bias else ("llama", "Llama")
    return dict(
        architectures=[f"{name}ForCausalLM"], model_type=kind, vocab_size=cfg.vocab_size, hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head,
        head_dim=cfg.head_dim, hidden_act="silu", max_position_embeddings=cfg.context, rms_norm_eps=cfg.norm_eps,
        rope_theta=cfg.rope_theta, rope_scaling={"rope_type": "llama3", **cfg.rope_scaling} if cfg.rope_scaling else None,
        tie_word_embeddings=cfg.tie_embeddings, eos_token_id=cfg.eos_id, bos_token_id=None)


# ----------------------------------------------------------------------------------------------------------- the tokenizer

# Pre-tokenizers: a text is cut into pieces by a pattern, and no token reaches across a cut. The same cuts with and without digits apart:
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
TIKTOKEN_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"    # the same cuts, faster

# Byte-level BPE writes each byte as a printable character: itself if it has a shape, else the next one from U+0100 on.
SHAPED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
SHAPELESS = [b for b in range(256) if b not in SHAPED]
BYTE_OF = {chr(b): b for b in SHAPED} | {chr(256 + i): b for i, b in enumerate(SHAPELESS)}
CHAR_OF = {b: c for c, b in BYTE_OF.items()}


class HubEncoding(tiktoken.Encoding):
    """tiktoken's Encoding with what `tokenizers` does around it: Unicode normalisation (Qwen), and silence on unknown bytes (SmolLM2).

    size: the number of ids of the tokenizer; ids from there on stand for bytes that it lacks, and are dropped.
    """

    def __init__(self, name: str, *, size: int, nfc: bool, source: Path, **parts):
        super().__init__(name, **parts)
        self.size, self.nfc, self.source, self.max_token_value = size, nfc, source, size - 1

    def __getstate__(self):
        return {**super().__getstate__(), "size": self.size, "nfc": self.nfc, "source": self.source}

    def _normal(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode_ordinary(self, text: str) -> list[int]:
        return [t for t in super().encode_ordinary(self._normal(text)) if t < self.size]

    def encode(self, text: str, **special) -> list[int]:
        return [t for t in super().encode(self._normal(text), **special) if t < self.size]


def load_tokenizer(name) -> tiktoken.Encoding:
    """The byte-level BPE in a model's tokenizer.json: a local folder or a hub name -> a tiktoken.Encoding with the same tokens.

    tiktoken joins the neighbours whose union has the lowest id, `tokenizers` those whose merge comes first; they agree when each
    token is made by merges, in the order of the ids, which is checked. Added tokens are special ones for tiktoken, which reads
    them in a text only if asked (allowed_special="all"). Raises ValueError for a tokenizer of another kind.
    """
    file = find_model(name, "tokenizer.json", "tokenizer_config.json") / "tokenizer.json"
    spec = read_json(file)

    def no(what):
        raise ValueError(f"{file}: {what} is not supported; the tokenizer must be byte-level BPE as in GPT-2, Llama-3, Qwen or SmolLM2")
    try:
        bpe, added = spec["model"], spec["added_tokens"]
        if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
            no(f"a model of type {bpe.get('type')!r} with byte_fallback, prefixes or suffixes")
        normalizer = (spec.get("normalizer") or {}).get("type")
        if normalizer not in (None, "NFC"):
            no(f"normalizer {normalizer!r}")
        pattern = _pattern(spec["pre_tokenizer"]) or no("this pre_tokenizer")
        for token in added:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                no(f"the added token {token['content']!r}, which swallows its surroundings,")
        special = {token["content"]: token["id"] for token in added}
        merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
        order = [bpe["vocab"][a + b] for a, b in merges]
        vocab = {token: i for token, i in bpe["vocab"].items() if i not in set(special.values())}
        ranks = {bytes(BYTE_OF[c] for c in token): i for token, i in vocab.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        if isinstance(e, ValueError) and str(e).startswith(str(file)):
            raise
        no(f"an entry ({type(e).__name__}: {e})")
    if any(a > b for a, b in zip(order, order[1:])):
        no("a vocabulary whose ids do not follow the order of its merges")
    made = set(order)
    for token, i in ranks.items():
        if len(token) > 1 and i not in made and not (bpe.get("ignore_merges") and not any(token[:k] in ranks and token[k:] in ranks for k in range(1, len(token)))):
            no(f"the token {token!r}, which no merge makes,")
    size = 1 + max([*ranks.values(), *special.values()])
    lacking = [b for b in range(256) if bytes([b]) not in ranks]
    ranks |= {bytes([b]): size + i for i, b in enumerate(lacking)}
    return HubEncoding(str(name), size=size, nfc=normalizer == "NFC", source=file, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _pattern(pre: dict) -> str | None:
    """The pattern that makes a pre_tokenizer's cuts; None if it is none of the three kinds known."""
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    *first, last = parts
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not first:
            return GPT2_PATTERN
        return DIGITS_PATTERN if len(first) == 1 and first[0] == {"type": "Digits", "individual_digits": True} else None
    if len(first) == 1 and first[0]["type"] == "Split" and first[0]["behavior"] == "Isolated" and not first[0].get("invert"):
        return first[0]["pattern"].get("Regex")
    return None


def save_tokenizer(enc: tiktoken.Encoding, folder):
    """Write an encoding as tokenizer.json (and the tokenizer_config.json that `transformers` wants), which load_tokenizer reads back.

    One that came from load_tokenizer is copied as it was; another must cut its text as GPT-2 does, else ValueError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(enc, HubEncoding):
        for source in (enc.source, enc.source.with_name("tokenizer_config.json")):
            if source.exists() and source.resolve() != (folder / source.name).resolve():
                write_whole(folder / source.name, lambda tmp: shutil.copyfile(source, tmp))
        return
    if enc._pat_str not in (GPT2_PATTERN, TIKTOKEN_GPT2_PATTERN):
        raise ValueError(f"the encoding {enc.name!r} does not cut its text with GPT-2's pattern, the only one that can be saved")
    ranks, special = enc._mergeable_ranks, enc._special_tokens
    show = lambda token: "".join(CHAR_OF[b] for b in token)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _bpe(ranks, token, rank)
            if len(parts) != 2:
                raise ValueError(f"the encoding {enc.name!r} cannot be saved: no merge of lower rank makes its token {token!r}")
            merges.append([show(p) for p in parts])
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    spec = dict(
        version="1.0", truncation=None, padding=None, normalizer=None, pre_tokenizer=level, post_processor=None, decoder=level,
        added_tokens=[dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                      for t, i in sorted(special.items(), key=lambda item: item[1])],
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
                   byte_fallback=False, ignore_merges=False, vocab={show(t): i for t, i in ranks.items()} | special, merges=merges))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=next(iter(special), None), clean_up_tokenization_spaces=False)
    write_whole(folder / "tokenizer.json", lambda tmp: tmp.write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"))
    write_whole(folder / "tokenizer_config.json", lambda tmp: tmp.write_text(json.dumps(config, indent=1) + "\n"))


def _bpe(ranks: dict[bytes, int], token: bytes, below: int) -> list[bytes]:
    """Byte-pair encoding of `token` with the merges of rank under `below` only."""
    parts = [bytes([b]) for b in token]
    while True:
        joined = [ranks.get(a + b, below) for a, b in zip(parts, parts[1:])]
        if not joined or min(joined) >= below:
            return parts
        i = joined.index(min(joined))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
