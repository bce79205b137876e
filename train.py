"""RA3 end to end: base model -> mid-training by NTP and by RA3 -> RLVR -> benchmarks, and the report.

    python train.py                                         # the embedded world, one process
    torchrun --standalone --nproc-per-node=2 train.py       # the same on two: same draws, same global batches
    python train.py --seeds 5                               # five seeds, means and standard errors in the report
    python train.py --ablations all --seeds 2               # figure 6 and more: c, return horizon, persistence, BRiTE, no RL
    python train.py --pretrain out/base                     # makes the base model that the others start from
    python train.py --resume --name NAME                    # goes on where a killed run stopped, with its settings
    python train.py --preset qwen2.5-1.5b --memory          # what a recipe for a real model needs; without --memory, runs it

A run leaves runs/<name>/: config.json, report.md and its figures, and for each seed a folder with metrics.jsonl and a model per stage.

Read it as: `Settings`, what can be set and why; `Run`, the plumbing all phases share (ranks, log, checkpoints, one optimizer
step); `Data` and `Scorer`; `mid_training` and `experiment`, the paper's story in order. The loop of each phase is in its own module
(`estep.e_step`, `mstep.m_step`, `rlvr.grpo`), the report at the end. Every random draw is seeded by what it is for, (seed, phase, step,
problem, sample), so neither the number of ranks nor a restart changes what is drawn.
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import bench
import elbo
import estep
import mstep
import rlvr
from model import GPT, SHAPES, GPTConfig, encode_prompt, find_model, load_pretrained, memory, read_config, save_tokenizer, write_whole
from sandbox import Sandbox


def option(default, why: str):
    return field(default=default, metadata={"help": why})


@dataclass
class Settings:
    name: str = option("", "folder under runs/; default: the time of the start")
    model: str = option("base", "folder or hub name of the base model; `base` ships with the code")
    seed: int = option(0, "first seed")
    seeds: int = option(1, "number of seeds; the report then shows means and standard errors")
    preset: str = option("world", "a recipe, see PRESETS; flags given beside it win")
    memory: bool = option(False, "print the memory that a GPU will need, and stop; needs no weights")
    resume: bool = option(False, "go on with the run called --name, with its settings; batch sizes and what else only changes memory and speed may be given anew")
    threads: int = option(0, "CPU threads per process; 0: all cores, shared among the ranks (more only get in each other's way)")
    ablations: str = option("", "variants of figure 6 and more to run instead of the main experiment: all, or some of ABLATIONS, such as c=0.2,BRiTE")
    pretrain: str = option("", "train the embedded world's base model from scratch into this folder, and stop")
    pretrain_tokens: int = option(7_000_000, "solution tokens of that: arithmetic appears after about 2M in a phase change")
    # data
    data: str = option("world", "experts' programs: world; benchmarks with solutions (leetcode:train,mbpp-docstring:train); or a corpus: a hub name, file or folder")
    column: str = option("text", "the corpus column that holds the programs")
    rounds: int = option(1, "of E-step and M-step, each with --experts programs of its own; a corpus is read on, and memory holds one round's")
    warm_data: str = option("", "commented programs to warm a cold base up on, before everything else: a corpus, or stdlib, which every machine has")
    warm_column: str = option("text", "the column of that corpus")
    warm_steps: int = option(0, "updates of that warm start, --m-programs each; real bases hardly ever write a comment by themselves")
    warm_density: float = option(0.1, "least share of lines with a comment of a program used for it")
    benchmark: str = option("world", "held-out problems: world, or benchmarks (humaneval, mbpp, leetcode:test ...)")
    rl_data: str = option("world", "RLVR's problems: world, or benchmarks (mbpp-docstring:train,leetcode:train ...)")
    data_dir: str = option("", "folder with the benchmarks as JSONL files; default: the hub")
    experts: int = option(2048, "expert programs: about three epochs of the M-step, the same for NTP and RA3")
    eval_problems: int = option(128, "held-out problems of the final scores: a standard error of about 4 points per seed")
    curve_problems: int = option(64, "of which are used for the curves on the way")
    samples: int = option(5, "samples per problem at temperature 1, for pass@1 and pass@5")
    max_new_tokens: int = option(224, "longest sampled program: three commented loops take about 180")
    time_limit: float = option(0.0, "CPU seconds that a sampled program may take; 0: what its benchmark allows, as in bench.py; endless loops use it all up")
    # E-step
    e_steps: int = option(30, "updates of q; the reward settles within them")
    e_programs: int = option(16, "programs per update; with the next, 128 rollouts")
    e_rollouts: int = option(8, "K, versions of each program; its baseline averages the K - 1 others")
    e_lr: float = option(2e-4, "Adam's; at 5e-4 the first updates already spoil the arithmetic, and rationales stop paying")
    e_anchor: float = option(0.1, "weight of the trust region on the action likelihoods; at 1 it slows q down, at 0 direct skill is lost")
    floor: float = option(3.0, "nats: a line's log-likelihood counts as no worse than minus this in the reward; inf: as it is")
    c: float = option(0.05, "cost of a rationale in nats (rewards are sums over a line); `inf`: never think, which is NTP")
    beta: float = option(0.1, "weight of the gate's part of the KL; 0 lets the gate close before rationales are good")
    p_think: float = option(0.5, "prior probability of a new rationale in that part")
    broken_cost: float = option(0.5, "nats that a malformed rationale costs, more than the best could win back by chance")
    horizon: int = option(6, "lines over which a rationale's effect is credited: a loop is 5 lines long")
    gamma: float = option(0.9, "discount per line in the return")
    explore: float = option(0.0, "share of gates that rollouts force open; for a cold base, whose gate would open too seldom to learn from")
    max_rationale: int = option(40, "longest rationale in tokens; eight worked-out terms take 31")
    max_comments: int = option(1, "comment lines of a rationale; the world's need one, while real code explains itself in blocks")
    rationales: str = option("learned", "where to think: learned; always (no persistence); first (BRiTE); never")
    # M-step
    m_steps: int = option(100, "updates")
    m_programs: int = option(64, "programs per update")
    equal_compute: bool = option(True, "also train NTP for as much compute as RA3 took in all")
    m_lr: float = option(3e-4, "AdamW's, times a warm-up over 10 steps, times a linear fall to a tenth over all; best for NTP of 1e-4, 3e-4 and 1e-3")
    row_tokens: int = option(256, "length of packed rows; a longer program has a row of its own length")
    # RLVR
    rl_steps: int = option(20, "GRPO updates")
    rl_problems: int = option(16, "problems per update")
    rl_group: int = option(8, "samples per problem")
    rl_lr: float = option(3e-5, "Adam's; at 1e-4 the base learns faster but what NTP has learnt falls apart, see the README")
    rl_pool: int = option(1024, "training problems with tests")
    clip_low: float = option(0.2, "1 - low is the least probability ratio that still earns")
    clip_high: float = option(0.28, "1 + high is the greatest; wider than low, so that rare tokens can grow")
    z_score: bool = option(False, "divide group advantages by their standard deviation")
    kl: float = option(0.0, "weight of the k3 KL to the model RLVR starts from")
    micro_batch: int = option(32, "sequences per forward pass in training; changes memory and speed, not the result (but for rounding)")
    sample_batch: int = option(256, "sequences that are sampled at a time, likewise")
    context: int = option(2 ** 20, "longest sequence in tokens, where the model itself allows more")
    checkpoint_blocks: bool = option(False, "keep only each block's input for the backward pass and compute the rest again: a third more time, much less memory")
    shard: bool = option(False, "weights, gradients and moments cut over the GPUs (torch's fully_shard); each keeps a bfloat16 replica to sample from")
    offload: bool = option(False, "weights and gradients in bfloat16; float32 copies and Adam's moments in main memory, 16 bytes per weight there")
    save_every: int = option(25, "updates between checkpoints")

    def check(self):
        """Raises ValueError, in one sentence, for a value that cannot work."""
        def need(ok: bool, flag: str, what: str):
            if not ok:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: {what}")
        for f in dataclasses.fields(self):
            if f.type is int and f.name not in ("seed", "threads", "rl_steps", "e_steps", "m_steps", "warm_steps"):
                need(getattr(self, f.name) >= 1, f.name, "must be at least 1")
            if f.name in ("rl_steps", "e_steps", "m_steps", "warm_steps", "seed", "threads"):
                need(getattr(self, f.name) >= 0, f.name, "must not be negative")
            if f.name.endswith("_lr"):
                need(0 < getattr(self, f.name) < 1, f.name, "a learning rate lies between 0 and 1")
        need(self.e_rollouts >= 2, "e_rollouts", "a baseline needs at least 2 versions of a program")
        need(self.rl_group >= 2, "rl_group", "a group needs at least 2 samples")
        need(self.experts >= max(self.e_programs, self.m_programs), "experts", "one update takes more; lower --e-programs and --m-programs too")
        need(self.rl_pool >= self.rl_problems, "rl_pool", "one update takes more; lower --rl-problems too")
        for name in ("c", "beta", "floor", "broken_cost", "e_anchor", "kl", "clip_low", "clip_high"):
            need(getattr(self, name) >= 0, name, "a penalty or weight is not negative")
        need(0 < self.p_think < 1, "p_think", "a probability strictly between 0 and 1 is needed")
        need(0 <= self.explore < 1, "explore", "a share below 1 is needed; to think everywhere, use --rationales always")
        need(bool(self.warm_data) == (self.warm_steps > 0), "warm_steps", "--warm-data and --warm-steps go together")
        need(0 <= self.time_limit < 3600, "time_limit", "0, or seconds within an hour")
        need(0 < self.gamma <= 1, "gamma", "a discount lies in (0, 1]")
        need(self.rationales in estep.MODES, "rationales", f"expected one of {', '.join(estep.MODES)}")
        need(self.ablations in ("", "all") or set(self.ablations.split(",")) <= set(ABLATIONS), "ablations", f"expected all, or some of {', '.join(ABLATIONS)}")
        need(not self.resume or bool(self.name), "resume", "say which run, with --name")
        need(not (self.shard and (self.offload or self.pretrain)), "shard", "cannot be had together with --offload or --pretrain")
        need(not self.shard or self.memory or int(os.environ.get("WORLD_SIZE", 1)) > 1, "shard",
             "needs several processes; start with torchrun --standalone --nproc-per-node=8")


# Recipes: what differs from the defaults above. That they fit their cards is predicted (`--preset NAME --memory`, and a test holds them to it) and, but for
# the last two, measured (`tests/bench_memory.py`). What they reach has not been; the weights of the E-step are those that SmolLM2 needed (README),
# its own learning rate too, the others are the usual ones at these sizes.
REAL = dict(
    data="codeparrot/codeparrot-clean", column="content",    # 5M Python files from GitHub, deduplicated; the hub serves them as a stream
    warm_data="codeparrot/codeparrot-clean", warm_column="content", warm_steps=50,     # real bases hardly comment, and to no use (the README has
    explore=0.3,                                             # SmolLM2's figures): without forced gates there would be nothing to learn from
    beta=1.0, p_think=0.2,                                   # the gate's KL as in the bound: with 0.1 and 0.5 SmolLM2's gate closed while its first
                                                             # rationales still cost 2 nats, for good; so it ends at 19% of lines
    e_anchor=1.0,                                            # at 0.1 SmolLM2's action likelihoods fell by 0.11 nats per token in 20 updates
    benchmark="mbpp-docstring",                              # held-out cross-entropy needs solutions, which LiveCodeBench lacks
    rl_data="leetcode:train", rl_pool=1024,
    eval_problems=400,                                       # a standard error of 2.5 points at most; two of the last hundred have very long prompts
    context=1536, row_tokens=1536,                           # LeetCode's longest prompt, 2,100 characters, and the answer; packed rows are filled
    max_new_tokens=512,                                      # 99 in 100 of LeetCode's solutions have at most 1,500 characters
    max_rationale=64, max_comments=4,                        # a sentence or two; a quarter of SmolLM2's comments go on in a second line
    horizon=16,                                              # real blocks are longer than the world's loops of 5 lines
    floor=math.inf,                                          # a line of real code costs about 11 nats (SmolLM2): a floor of 3 would hide them all,
    broken_cost=3.0,                                         # and chance may win back more than half a nat
    time_limit=3.0,                                          # a young policy's endless loops would take the sandbox longer than all the rest
    experts=8192,                                            # 200 updates of 64 programs read them one and a half times
    e_rollouts=4, e_programs=32,                             # as many rollouts as the world's, on more programs: real ones differ more
    e_steps=100, m_steps=200, rl_steps=100, rl_problems=32, save_every=20,
    sample_batch=64,                                         # what its cache takes would otherwise be the most of all
)
BILLION = dict(REAL, checkpoint_blocks=True, micro_batch=8,  # without, the E-step on one program's four versions would take 84 GB (Qwen2.5)
               e_lr=5e-6, m_lr=1e-5,                         # Adam moves a weight by about this much per update; weights are about 0.02
               rl_lr=1e-6)                                   # what GRPO is mostly run with; rewards are noisier than text
SMALL_CARD = dict(offload=True,                              # float32 weights, gradients and moments are 16 bytes per weight: 25 GB for 1.5B
                  micro_batch=2)                             # a row of 1,536 tokens has 2.8 GB of logits and their gradients when V = 152k
ROOM = 0.9e9                # bytes per GB of a card that a prediction may fill: the CUDA context and fragments take one or two GB
PRESETS: dict[str, dict] = {
    "world": {},
    # One GPU of 24 GB. Smaller models bear larger learning rates; 256 rollouts per update, as 24 were too noisy; fewer updates, for a first look.
    "smollm2-135m": dict(REAL, model="HuggingFaceTB/SmolLM2-135M", e_lr=1e-4, m_lr=5e-5, rl_lr=2e-5, experts=2048, e_programs=64, e_steps=30,
                         m_steps=60, rl_steps=20, rl_problems=16, eval_problems=128, max_new_tokens=256, micro_batch=4),
    # One GPU of 80 GB: float32 weights and moments, products in bfloat16.
    "qwen2.5-1.5b": dict(BILLION, model="Qwen/Qwen2.5-1.5B"),
    "llama-3.2-1b": dict(BILLION, model="meta-llama/Llama-3.2-1B"),
    # One GPU of 24 GB and 32 GB of main memory: what `OnCPU` says about precision, and two crossings of the bus per update, are the price.
    "qwen2.5-1.5b-24gb": dict(BILLION, model="Qwen/Qwen2.5-1.5B") | SMALL_CARD,
    "llama-3.2-1b-24gb": dict(BILLION, model="meta-llama/Llama-3.2-1B") | SMALL_CARD,
    # Eight GPUs of 80 GB: torchrun --standalone --nproc-per-node=8. A checkpoint takes rank 0 about 100 GB of main memory.
    "llama-3.1-8b": dict(BILLION, model="meta-llama/Llama-3.1-8B", shard=True, micro_batch=4, sample_batch=32),
}


def worst(s: Settings, cfg: GPTConfig) -> dict[str, tuple[int, int, bool]]:
    """Phase -> rows and length of its largest micro-batch, all sequences as long as can be; is there a frozen copy of the weights beside?"""
    longest = min(s.context, cfg.context)
    group = max(s.micro_batch // s.e_rollouts, 1) * s.e_rollouts                  # the E-step keeps a program's versions together
    return {"sampling": (s.sample_batch, longest, True), "estep": (group, longest, True), "mstep": (s.micro_batch, longest, False),
            "rlvr": (s.micro_batch, longest, s.kl > 0)}


def predict(s: Settings, cfg: GPTConfig, shards: int = 1) -> dict[str, dict[str, float]]:
    """Phase -> term -> predicted bytes on a GPU (`model.memory`), for the micro-batches of `worst`."""
    how = dict(precision="bfloat16" if s.offload else "autocast", recompute=s.checkpoint_blocks, shards=shards)
    return {phase: memory(cfg, phase, rows=rows, length=length, frozen=frozen, **how) for phase, (rows, length, frozen) in worst(s, cfg).items()}


def print_memory(s: Settings):
    cfg = SHAPES.get(s.model) or read_config(find_model(s.model, "config.json"))
    most, gpus = 0.0, int(os.environ.get("WORLD_SIZE", 8)) if s.shard else 1
    for phase, terms in predict(s, cfg, gpus).items():
        most = max(most, terms["total"])
        print(f"{phase:9}{terms['total'] / 1e9:6.1f} GB = " + " + ".join(f"{v / 1e9:.1f} {k}" for k, v in terms.items() if k != "total"))
    verdicts = (f"{'fits' if most <= ROOM * card else 'does not fit'} {card} GB" for card in (80, 24))
    print(f"at most {most / 1e9:.1f} GB on {f'each of {gpus} GPUs' if s.shard else 'a GPU'}: " + ", ".join(verdicts))


def parse_flags(argv: list[str] | None = None) -> Settings:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(Settings):
        flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        if f.type is bool:
            ap.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=f.metadata["help"])
        else:
            ap.add_argument(flag, type=f.type, default=f.default, help=text)
    given = ap.parse_args(argv)
    if given.preset not in PRESETS:
        raise ValueError(f"--preset {given.preset}: expected one of {', '.join(PRESETS)}")
    ap.set_defaults(**PRESETS[given.preset])         # and once more: what the command line says still wins
    if given.resume and (config := Path("runs") / given.name / "config.json").exists():
        ap.set_defaults(**json.loads(config.read_text())["settings"])
    return Settings(**vars(ap.parse_args(argv)))


# ---------------------------------------------------------------------------------------------- the plumbing of all phases


class Run:
    """One process's view of a run of one seed: ranks, folder, log, checkpoints, and the one way to take an optimizer step."""

    def __init__(self, settings: Settings, folder: Path, seed: int, enc=None):
        self.s, self.dir, self.seed, self.enc = settings, folder, seed, enc       # enc: the tokenizer, kept beside what is trained
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.resident: GPT | None = None             # see `use`
        self.replica: GPT | None = None              # see `shard`
        self.compute = 0                             # tokens this rank put through a model, a training token counting three times
        self.records: list[dict] = []
        self.path = folder / "metrics.jsonl"
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        marks = [json.loads(f.read_text())["log_bytes"] for f in [folder / "progress.json"] if f.exists()]
        if (folder / "state.pt").exists():
            marks.append(torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)["log_bytes"])
        if marks:                                    # what was logged after the last checkpoint will be logged again
            size = max(marks)
            self.records = [json.loads(line) for line in self.path.read_bytes()[:size].splitlines()]
            self.barrier()
            if self.rank == 0:
                os.truncate(self.path, size)
        elif self.rank == 0:
            self.path.unlink(missing_ok=True)
        self.barrier()

    def draw(self, what: str, *index: int) -> list[int]:
        """The seed of a random draw, named by what it is for."""
        return [self.seed, zlib.crc32(what.encode()), *index]

    def meter(self, model: GPT) -> GPT:
        """Count the tokens that go through this model, or through copies of it, in `compute`."""
        def count(module, args):
            self.compute += args[0].numel() * (3 if torch.is_grad_enabled() else 1)
        model._forward_pre_hooks.clear()             # that of another run
        model.register_forward_pre_hook(count)
        return model

    # ranks -----------------------------------------------------------------------------------------------------------

    def barrier(self):
        if self.ranks > 1:
            dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """Sum numbers over all ranks."""
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(t)
        return t.tolist()

    def mine(self, items: list) -> list:
        """This rank's share: every ranks-th item."""
        return items[self.rank::self.ranks]

    def gather_lists(self, items: list) -> list[list]:
        """Every rank's list."""
        shares: list = [items] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(shares, items)
        return shares

    def gather(self, items: list) -> list:
        """All ranks' shares, put back in order."""
        shares = self.gather_lists(items)
        return [shares[i % self.ranks][i // self.ranks] for i in range(sum(map(len, shares)))]

    # log and checkpoints ---------------------------------------------------------------------------------------------

    def log(self, **record):
        self.records.append(record)
        if self.rank == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")

    def commit(self):
        """From here on a restart keeps what has been logged."""
        if self.rank == 0:
            write_text(self.dir / "progress.json", json.dumps({"log_bytes": self.path.stat().st_size}))

    def once(self, key: str, work) -> dict:
        """The record called `key`: found in the log, or made by work() and logged."""
        for r in self.records:
            if r.get("key") == key:
                return r
        self.log(key=key, **work())
        self.commit()
        return self.records[-1]

    def done(self, stage: str) -> bool:
        return any(r.get("key") == f"cost/{stage}" for r in self.records)

    def stage(self, name: str, start: GPT, work) -> GPT:
        """Train a copy of `start` by work(model) and keep it in the folder of that name; a stage that is there is only loaded."""
        folder = self.dir / name
        if not self.done(name):
            self.use(None)                           # make room
            there = {id(p): torch.nn.Parameter(p.detach().to(self.device, copy=True)) for p in start.parameters()}
            model = self.meter(copy.deepcopy(start, there))          # its weights go straight to the device
            if self.s.shard:
                self.shard(model)
            began, before = time.time(), self.compute
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            work(model)
            # A crash between any two of these lines only repeats the end of the stage: the committed record is what says it is done.
            model = self.whole(model)
            if self.rank == 0:
                model.save_pretrained(folder)
                if self.enc is not None:
                    save_tokenizer(self.enc, folder)
            gpu = {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if self.device.type == "cuda" else {}
            self.log(key=f"cost/{name}", seconds=round(time.time() - began, 1), compute=int(self.sum(self.compute - before)[0]), **gpu)
            self.commit()
            if self.rank == 0:
                (self.dir / "state.pt").unlink(missing_ok=True)
            self.barrier()
        model = GPT.from_pretrained(folder, dtype=torch.bfloat16 if self.s.offload else torch.float32)
        model.n_vocab, model.limit, model.grad_checkpoint = start.n_vocab, start.limit, start.grad_checkpoint
        return model

    def steps(self, stage: str, model: GPT, optimizer, n: int, lr: float, warmup: int = 10, decay: float = 0.0):
        """Yield the steps still to do of 0..n-1, learning rate set: a linear warm-up times a linear fall by the share `decay`.

        State is saved on the way, and found again after a restart.
        """
        path, first = self.dir / "state.pt", 0
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if state["stage"] == stage:
                self.load_state(model, optimizer, state)
                first = state["step"]
                self.compute += state["compute"] / self.ranks
        before = self.compute - (state["compute"] / self.ranks if first else 0)
        bar = tqdm(range(first, n), initial=first, total=n, desc=f"seed {self.seed} {stage}", disable=self.rank > 0, mininterval=1.0)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warmup, 1.0) * (1 - decay * step / n)
            yield step
            if self.records and "show" in self.records[-1]:
                bar.set_postfix_str(self.records[-1]["show"], refresh=False)
            if (step + 1) % self.s.save_every == 0 and step + 1 < n:
                state = dict(stage=stage, step=step + 1, compute=self.sum(self.compute - before)[0], **self.state(model, optimizer))
                if self.rank == 0:
                    state["log_bytes"] = self.path.stat().st_size
                    write_whole(path, lambda tmp: save(state, tmp))
                del state                            # of a sharded model a whole copy, which would lie beside the next one
                self.barrier()

    # one model over many GPUs ----------------------------------------------------------------------------------------
    #
    # Each rank holds a part of every weight, with its gradient and moments; a block's are gathered when it computes. So all ranks must
    # compute in step, which rollouts, with their loops of any length, cannot. They have a replica, refreshed when it is asked for.

    def shard(self, model: GPT):
        """Cut the model over the ranks, in place: float32 parts, products in bfloat16 on a GPU, gradients summed in float32."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        cuda = self.device.type == "cuda"
        # fully_shard averages gradients. On the CPU older torch sums where it is told to (2.7 and 2.8 do, 2.13 does not).
        average, reduce = torch.zeros(1, device=self.device), getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce(average, torch.ones(self.ranks, device=self.device), op=dist.ReduceOp.AVG)
        if average.item() != 1.0:
            raise ValueError(f"--shard: torch {torch.__version__} sums gradients on {self.device.type} where it should average them; use GPUs, or a newer torch")
        self.replica = copy.deepcopy(model).to(torch.bfloat16 if cuda else torch.float32).requires_grad_(False)
        # Inputs are not to be cast: the rotary angles would lose the position.
        policy = MixedPrecisionPolicy(torch.bfloat16 if cuda else None, torch.float32, cast_forward_inputs=False)
        how = dict(mesh=init_device_mesh(self.device.type, (self.ranks,)), mp_policy=policy)
        model.float()
        for block in model.layers:
            fully_shard(block, **how)
        fully_shard(model, reshard_after_forward=False, **how)       # the embeddings stay: the E-step needs the logits' matrix once more

    @torch.no_grad()
    def actor(self, model: GPT) -> GPT:
        """The model to sample from and to evaluate: itself or, of one that is sharded, the replica with its present weights. All ranks must call."""
        if not self.s.shard:
            return model
        for mine, part in zip(self.replica.parameters(), model.parameters(), strict=True):
            mine.copy_(part.full_tensor())
        return self.replica

    def whole(self, model: GPT) -> GPT:
        """The model on one rank: itself or, of one that is sharded, a float32 copy in main memory (on rank 0). All ranks must call."""
        if not self.s.shard:
            return model
        weights = {}
        for name, part in model.state_dict().items():
            full = part.full_tensor()                # one at a time on the GPU
            if self.rank == 0:
                weights[name] = full.cpu()
        self.replica = None
        with torch.device("meta"):
            copied = GPT(model.config)
        if self.rank == 0:
            copied.load_state_dict(weights, assign=True)
        return copied

    def state(self, model: GPT, optimizer) -> dict:
        """What a checkpoint holds of both, whole also where they are sharded (on rank 0). All ranks must call."""
        if not self.s.shard:
            return dict(model=model.state_dict(), optimizer=optimizer.state_dict())
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))))

    def load_state(self, model: GPT, optimizer, state: dict):
        if not self.s.shard:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        else:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                           options=StateDictOptions(full_state_dict=True))

    def in_step(self, model: GPT, losses):
        """The losses and then, until all ranks are through, zeros that send one token through the model and so keep the others company.

        Nobody knows beforehand that the others are through too: each update ends with one such pass on all ranks.
        """
        losses = iter(losses)
        while True:
            loss = next(losses, None)                # a forward pass, in which all ranks take part
            left = loss is not None
            if not left:
                loss = 0.0 * model(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).sum()
            yield loss                               # a backward pass, likewise
            if not self.sum(left)[0]:
                return

    # sampling, and one optimizer step --------------------------------------------------------------------------------

    def use(self, model: GPT | None) -> GPT | None:
        """`model` on the device, to sample from. What was there for that before returns to main memory, where all models rest but the one in training."""
        if model is None or model.device != self.device:
            if self.resident is not None:
                self.resident.to("cpu")
            self.resident = model and model.to(self.device)
        return model

    def optimizer(self, kind, model: GPT, **options):
        return OnCPU(kind, model.parameters(), **options) if self.s.offload else kind(model.parameters(), **options)

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    def update(self, model: GPT, optimizer, losses, count: float, clip: float = 1.0) -> float:
        """One optimizer step on the sum of `losses` (scalars, made one by one) over the global `count`.

        Gradients are summed over ranks by hand rather than by DistributedDataParallel: a rank may then have any number of
        micro-batches, none included, and the result is that of one process. Returns the gradient norm before clipping.
        """
        optimizer.zero_grad(set_to_none=True)
        count = self.sum(count)[0]
        if not count:
            return 0.0                               # no rank has a signal: an optimizer would still move by its momentum
        if self.s.shard:                             # it averages the gradients of the ranks; what counts is their sum
            losses, count = self.in_step(model, losses), count / self.ranks
        for loss in losses:
            (loss / count).backward()
        params = list(model.parameters())
        if self.ranks > 1 and not self.s.shard:
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
            dist.all_reduce(flat)
            for p, g in zip(params, flat.split([p.numel() for p in params])):
                p.grad = g.view_as(p)
        norm = torch.nn.utils.clip_grad_norm_(params, clip)
        norm = (norm.full_tensor() if self.s.shard else norm).item()
        if not math.isfinite(norm):                  # a step would make all weights so, and nothing after it would complain
            raise ValueError(f"the gradient's norm is {norm}: training has diverged; start again with a lower learning rate")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)        # sampling comes next, and needs the room
        return norm


class OnCPU:
    """An optimizer of bfloat16 weights whose float32 copies of them, and moments, live in main memory: 16 bytes there, 4 on the device, per weight.

    At a learning rate of 1e-5 an update is less than half of the last place of a bfloat16 weight of 0.02: without the copies it would
    be rounded away. What remains inexact are the gradients, summed over micro-batches in bfloat16, and the copies' rounding at the end of a stage.
    """

    def __init__(self, kind, params, **options):
        self.params = list(params)
        self.exact = [p.detach().to("cpu", torch.float32, copy=True) for p in self.params]
        self.inner = kind(self.exact, **options)

    @property
    def param_groups(self) -> list[dict]:
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True):
        for p in (*self.params, *self.exact):
            p.grad = None

    @torch.no_grad()
    def step(self):
        for p, e in zip(self.params, self.exact):
            e.grad = None if p.grad is None else p.grad.to("cpu", torch.float32)
        self.inner.step()
        for p, e in zip(self.params, self.exact):
            p.copy_(e)

    def state_dict(self) -> dict:
        return dict(exact=self.exact, inner=self.inner.state_dict())

    def load_state_dict(self, state: dict):
        self.inner.load_state_dict(state["inner"])
        for e, saved in zip(self.exact, state["exact"], strict=True):
            e.copy_(saved)


def save(state: dict, path: Path):
    """torch.save straight to the file, without a second copy in memory; what torch says of a full disk hides the OSError, which is raised here."""
    try:
        with open(path, "wb") as f:
            torch.save(state, f)
    except RuntimeError as e:
        raise (e.__context__ if isinstance(e.__context__, OSError) else e) from None


def write_text(path: Path, text: str):
    write_whole(path, lambda tmp: tmp.write_text(text))


# --------------------------------------------------------------------------------------------------------- the experiment


@dataclass
class Data:
    """What all phases share: the tokenizer, its comment openers, and the problems."""
    enc: object
    openers: torch.Tensor
    experts: list[elbo.Program]                      # of the first round
    position: tuple[int, int]                        # where in their corpus the next round begins
    warm: list[elbo.Trace]                           # programs with their authors' comments
    heldout: list[elbo.Program]                      # the expert programs of the evaluation problems
    eval_problems: list[bench.Problem]
    rl_problems: list[bench.Problem]
    unfit: dict[str, str]                            # problems left out of RL, and why


def from_first(work):
    """work() of the first rank, on all ranks: what a clock or a folder may answer otherwise elsewhere, and what need not be done twice."""
    shared = [work() if not dist.is_initialized() or dist.get_rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def has_rl(s: Settings) -> bool:
    return s.rl_steps > 0 and not s.ablations


def load_data(s: Settings, model: GPT, enc, box: Sandbox, unfit: dict[str, str] | None = None) -> Data:
    """Experts' programs, held-out problems and RL problems: of the embedded world, or from files and the hub by name.

    unfit: the problems that an earlier start of the run found unfit for RL; otherwise they are run to find out.
    Raises ValueError, in one sentence, for data that cannot be read, is not Python, or has too few programs that fit the context.
    """
    def problems(name: str, n: int, kind: str, seed: int) -> list[bench.Problem]:
        found = bench.world(kind, n, seed) if name == "world" else bench.load(name, s.data_dir or None, limit=n)
        return [dataclasses.replace(p, timeout_s=s.time_limit) for p in found] if s.time_limit else found
    evaluation = problems(s.benchmark, s.eval_problems, "eval", 0)
    room = model.limit - s.max_new_tokens

    def size(p: bench.Problem) -> int:
        return len(encode_prompt(enc, p.prompt))
    for p in evaluation:
        if size(p) > room:
            raise ValueError(f"{s.benchmark}: the prompt of {p.id} has {size(p)} tokens, which with --max-new-tokens {s.max_new_tokens} exceeds the context of "
                             f"{model.limit}: raise --context, or lower --max-new-tokens or --eval-problems")
    rl = problems(s.rl_data, s.rl_pool, "train", 1) if has_rl(s) else []
    if unfit is None:
        unfit = {p.id: f"its prompt has more than {room} tokens" for p in rl if size(p) > room}
        fit = [p for p in rl if p.id not in unfit]
        unfit |= from_first(lambda: bench.unfit_for_rl(fit, box)) if s.rl_data != "world" else {}          # the world's are taken as they come
    rl = [p for p in rl if p.id not in unfit]
    if has_rl(s) and len(rl) < s.rl_problems:
        raise ValueError(f"{s.rl_data}: {len(rl)} problems are fit for RL, {len(unfit)} are not, but one update of RLVR takes {s.rl_problems}; lower --rl-problems")
    if not any(p.solution for p in evaluation):
        raise ValueError(f"{s.benchmark} has no solutions, which the held-out cross-entropy needs; choose a benchmark that has")
    warm, rows = mstep.read_commented(s, model, enc) if s.warm_data else ([], 0)
    experts, position = mstep.read_experts(s, model, enc, position=(rows if s.warm_data == s.data else 0, 0))   # not the same programs once more
    heldout = mstep.parse_all(s, model, enc, s.benchmark, mstep.solved(evaluation), 1)
    return Data(enc, elbo.opener_mask(enc).to(model.device), experts, position, warm, heldout, evaluation, rl, unfit)


def tries(s: Settings) -> list[int]:
    """The k of pass@k: 1 and 5, or what --samples allows."""
    return sorted({1, min(5, s.samples)})


def scores(s: Settings) -> list[str]:
    """What is known of a model: greedy accuracy and, at temperature 1, pass@k."""
    return ["greedy", *(f"pass@{k}" for k in tries(s))]


class Scorer:
    """Accuracy of a model on the held-out problems; every rank takes its share of them."""

    def __init__(self, run: Run, data: Data, box: Sandbox):
        self.run, self.data, self.box = run, data, box

    def attempt(self, model: GPT, k: int, temperature: float, problems: int) -> list[int]:
        """How many of k samples are right, for each of this rank's share of the first `problems`."""
        mine = self.run.mine(list(enumerate(self.data.eval_problems[:problems])))
        with self.run.autocast():
            _, passed = bench.attempt(self.run.use(model), self.data.enc, [p for _, p in mine for _ in range(k)],
                                      [self.run.draw("eval", i, j) for i, _ in mine for j in range(k)], self.box,
                                      max_new_tokens=self.run.s.max_new_tokens, temperature=temperature, batch_size=self.run.s.sample_batch)
        return [sum(part) for part in elbo.chunks(passed, k)]

    def greedy(self, model: GPT, problems: int | None = None) -> float:
        """Share of problems solved by the most likely program, on those of the curves or on as many as asked for."""
        right = self.attempt(model, 1, 0.0, problems or self.run.s.curve_problems)
        total, n = self.run.sum(sum(right), len(right))
        return total / n

    def full(self, model: GPT) -> dict:
        """Greedy accuracy and, at temperature 1, unbiased pass@1 and pass@5 (or what so many samples allow: see `tries`)."""
        k = self.run.s.samples
        right = self.attempt(model, k, 1.0, self.run.s.eval_problems)
        *sums, n = self.run.sum(*(sum(bench.pass_at_k(k, c, m) for c in right) for m in tries(self.run.s)), len(right))
        greedy = self.greedy(model, self.run.s.eval_problems)
        return dict(zip(scores(self.run.s), [greedy, *(x / n for x in sums)])) | {"problems": int(n)}


def think_table(data: Data, traces: list[elbo.Trace]) -> dict:
    """How often a rationale stands before each form of line (its constant written N), and programs before and after infusion."""
    seen: dict[str, list[int]] = {}
    for trace in traces:
        for t, z in enumerate(trace.thinks()):
            text = data.enc.decode(trace.of(t, elbo.ACTION)).split("\n")[0].strip()
            count = seen.setdefault(re.sub(r"(?<=x [-+<>] )\d+", "N", text), [0, 0])
            count[0], count[1] = count[0] + 1, count[1] + z

    def per_step(forms: list[str]) -> float:
        # A step of the world is one line, or a loop, which begins with `out = []` and has its constant in an `if`: a rationale may stand before either.
        return sum(seen[f][1] for f in forms) / max(sum(seen[f][0] for f in forms if not f.startswith("if ")), 1)
    needed = [f for f in seen if " N" in f or f == "out = []"]
    others = [f for f in seen if f.startswith("xs = ") and " N" not in f and f != "xs = out"]
    programs = [[data.enc.decode([x for x, k in zip(t.tokens, t.kind) if k in kinds]) for kinds in
                 ((elbo.PROMPT, elbo.ACTION), (elbo.PROMPT, elbo.ACTION, elbo.LATENT))] for t in traces[:6]]
    return dict(think=sum(z for _, z in seen.values()) / sum(n for n, _ in seen.values()), think_needed=per_step(needed),
                think_other=per_step(others), forms={form: [n, z / n] for form, (n, z) in sorted(sorted(seen.items(), key=lambda x: -x[1][0])[:20])}, programs=programs)


def rounds(run: Run, model: GPT, data: Data):
    """Yield, for each round, the suffix of its stages' names and the data with its expert programs, read on in the corpus."""
    yield "", data
    for n in range(1, run.s.rounds):
        start = run.once(f"corpus.{n + 1}", lambda: {"position": data.position})["position"]
        experts, position = mstep.read_experts(run.s, model, data.enc, n, start)
        data = dataclasses.replace(data, experts=experts, position=position)
        yield f".{n + 1}", data


def mid_training(run: Run, base: GPT, data: Data, scorer: Scorer) -> GPT:
    """From the base to RA3: E-step, infusion and M-step, each round on programs of its own."""
    s, model = run.s, base
    mode = "never" if math.isinf(s.c) else s.rationales                          # c = infinity: nothing is worth a rationale
    for tag, data in rounds(run, base, data):
        q = start = model
        if mode != "never":
            q = run.stage("estep" + tag, start, lambda m: estep.e_step(run, "estep" + tag, m, data))
            for name, writer in (("start", start), ("estep", q)):                # pi, the judge, is the start both times
                run.once(f"gain/{name}{tag}", lambda: estep.rationale_gain(
                    run, start, data, data.heldout, estep.infuse(run, writer, data, data.heldout, "heldout", mode, s.explore)))
        train = heldout = []
        if not run.done("ra3" + tag):                                            # else a resumed run would only throw them away
            run.meter(q)
            began, before = time.time(), run.compute
            train = estep.infuse(run, q, data, data.experts, "experts" + tag, mode)
            run.once("cost/infuse" + tag, lambda: dict(seconds=round(time.time() - began, 1), compute=int(run.sum(run.compute - before)[0])))
            heldout = estep.infuse(run, q, data, data.heldout, "heldout", mode)
            run.once("rationales" + tag, lambda: think_table(data, heldout))
        model = run.stage("ra3" + tag, q, lambda m: mstep.m_step(run, "ra3" + tag, m, data, train, heldout, s.m_steps, scorer.greedy))
    return model


def warm_up(run: Run, base: GPT, data: Data, box: Sandbox) -> GPT:
    """The base that all arms start from where --warm-data says so: trained on commented programs first."""
    scorer, heldout = Scorer(run, data, box), [p.trace() for p in data.heldout]
    return run.stage("warm", base, lambda m: mstep.m_step(run, "warm", m, data, data.warm, heldout, run.s.warm_steps, scorer.greedy))


def experiment(run: Run, base: GPT, data: Data, box: Sandbox):
    """The paper's story: base; mid-training by NTP and by RA3; RLVR from each of the three."""
    s, scorer, heldout = run.s, Scorer(run, data, box), [p.trace() for p in data.heldout]
    if s.warm_steps:
        run.once("eval/cold", lambda: scorer.full(base))
        base = warm_up(run, base, data, box)

    def ntp(name: str, n: int) -> GPT:
        model = base
        for tag, part in rounds(run, base, data):
            plain = [p.trace() for p in part.experts]
            model = run.stage(name + tag, model, lambda m: mstep.m_step(run, name + tag, m, data, plain, heldout, n, scorer.greedy))
        return model
    arms = {"base": base, "ra3": mid_training(run, base, data, scorer), "ntp": ntp("ntp", s.m_steps)}
    if s.equal_compute:                              # in tokens through the model, for RA3's E-step, infusion and M-step together
        spent = Counter()
        for r in run.records:
            if r.get("key", "").startswith("cost/"):
                spent[r["key"][5:].partition(".")[0]] += r["compute"]
        arms["ntp-long"] = ntp("ntp-long", round(s.m_steps * (spent["estep"] + spent["infuse"] + spent["ra3"]) / spent["ntp"]))
    for name, model in arms.items():
        run.once(f"eval/{name}", lambda: scorer.full(model))
    for name in ("base", "ntp", "ra3") if s.rl_steps else ():
        model = run.stage(f"rlvr-{name}", arms[name], lambda m: rlvr.grpo(run, f"rlvr-{name}", m, data, box, scorer.greedy))
        run.once(f"eval/rlvr-{name}", lambda: scorer.full(model))


WHOLE = 10_000                                                                   # lines: the return reaches to the program's end
ABLATIONS = {                                                                    # figure 6's c, and what else might matter: the flags that each changes
    **{f"c={c:g}": dict(c=c) for c in (0.0, 0.01, 0.05, 0.2, 1.0, math.inf)},
    "horizon=1": dict(horizon=1),
    "horizon=whole": dict(horizon=WHOLE, gamma=1.0),
    "no persistence": dict(rationales="always"),
    "BRiTE": dict(rationales="first", horizon=WHOLE, gamma=1.0, max_rationale=120),   # room for all of its steps
    "no RL": dict(e_steps=0),
}


def chosen(s: Settings) -> dict[str, dict]:
    """The ablations that --ablations names."""
    return {name: flags for name, flags in ABLATIONS.items() if s.ablations == "all" or name in s.ablations.split(",")}


def ablation(run: Run, base: GPT, data: Data, box: Sandbox):
    """One variant of mid-training, without RLVR. All variants of a seed have one warm-up, in a folder beside theirs."""
    scorer = Scorer(run, data, box)
    if run.s.warm_steps:
        base = warm_up(Run(run.s, run.dir.parent.parent / run.dir.name, run.seed, run.enc), base, data, box)
    model = mid_training(run, base, data, scorer)
    run.once("eval/ra3", lambda: scorer.full(model))


# ------------------------------------------------------------------------------------------------------------- the report


def mean_se(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for one value)."""
    v = np.asarray(values, dtype=float)
    return v.mean(), v.std(ddof=1) / len(v) ** 0.5 if len(v) > 1 else math.nan


def paired_p(a: list[float], b: list[float]) -> float:
    """One-sided p-value that a exceeds b, by the paired t-test over seeds (its tail integrated numerically); nan for one seed."""
    d = np.subtract(a, b)
    n = len(d)
    if n < 2 or d.std() == 0:
        return math.nan
    t, nu = d.mean() / (d.std(ddof=1) / n ** 0.5), n - 1
    x = (np.arange(20_000) + 0.5) / 20_000 * abs(t)
    pdf = math.gamma((nu + 1) / 2) / (math.gamma(nu / 2) * (nu * math.pi) ** 0.5) * (1 + x ** 2 / nu) ** (-(nu + 1) / 2)
    return 0.5 - pdf.mean() * t


def shown(values: list[float], digits: int) -> str:
    m, se = mean_se(values)
    return f"{m:.{digits}f}" + (f" ± {se:.{digits}f}" if not math.isnan(se) else "")


def percent(values: list[float]) -> str:
    return shown([100 * v for v in values], 1)


class Results:
    """The logs of one or more seeds of a run, side by side."""

    def __init__(self, folders: list[Path]):
        self.logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]

    def value(self, key: str, name: str) -> list:
        """One per seed; where each round has logged it, the last round's."""
        found = [self.records(key, log)[-1:] for log in self.logs]
        return [r[name] for rows in found for r in rows]

    def records(self, key: str, log: list[dict]) -> list[dict]:
        """The records `key`, `key`.2 ... of all rounds."""
        return [r for r in log if r.get("key", "").partition(".")[0] == key]

    def curve(self, phase: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) and values (seeds, n), the rounds of a phase one behind the other."""
        rows = []
        for log in self.logs:
            rows.append([])
            first, last, round_ = 0, 0, phase
            for r in log:
                if r.get("phase", "").partition(".")[0] == phase and name in r:
                    if r["phase"] != round_:
                        first, round_ = last + (phase == "estep"), r["phase"]        # the others log once more at the end
                    last = first + r["step"]
                    rows[-1].append((last, r[name]))
        n = min(map(len, rows))
        return np.array([s for s, _ in rows[0][:n]]), np.array([[v for _, v in row[:n]] for row in rows])


def plot(path: Path, title: str, ylabel: str, curves: dict[str, tuple[np.ndarray, np.ndarray]], xlabel: str = "updates"):
    """Means over seeds with a band of one standard error."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    for label, (x, y) in curves.items():
        ax.plot(x, y.mean(0), marker="." if len(x) < 20 else None, label=label)
        if len(y) > 1:
            se = y.std(0, ddof=1) / len(y) ** 0.5
            ax.fill_between(x, y.mean(0) - se, y.mean(0) + se, alpha=0.2)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    if len(curves) > 1:
        ax.legend(frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def heads(names: list[str]) -> str:
    return " | ".join(["greedy pass@1", *(f"{name} (T=1)" for name in names[1:])])


ARMS = {"cold": "base, before its warm-up", "base": "base", "ntp": "NTP", "ntp-long": "NTP, RA3's compute", "ra3": "RA3"}


def report(folder: Path, seeds: list[int], s: Settings) -> dict:
    """Write report.md and the figures of the main experiment; returns the numbers of its last line."""
    res, names = Results([folder / f"seed{seed}" for seed in seeds]), scores(s)
    rl = [a for a in ("base", "ntp", "ra3") if res.value(f"eval/rlvr-{a}", "greedy")]
    arms = [a for a in ARMS if res.value(f"eval/{a}", "greedy")]
    rows = [(ARMS[a], f"eval/{a}") for a in arms] + [(ARMS[a] + " + RLVR", f"eval/rlvr-{a}") for a in rl]
    table = ["| model | " + heads(names) + " |", "|---" * (1 + len(names)) + "|"]
    table += ["| " + " | ".join([label] + [percent(res.value(key, k)) for k in names]) + " |" for label, key in rows]
    text = [f"# {folder.name}: {len(seeds)} seed(s), {res.value('eval/ra3', 'problems')[0]} held-out problems", "",
            "Percent solved, mean ± standard error over seeds.", "", *table, ""]
    numbers: dict = {key.removeprefix("eval/"): {k: round(mean_se(res.value(key, k))[0], 4) for k in names} for _, key in rows}
    for a, b in (("ra3", b) for b in ("ntp", "ntp-long", "base") if b in arms):
        for k in ("greedy", "pass@1"):
            x, y = res.value(f"eval/{a}", k), res.value(f"eval/{b}", k)
            p = paired_p(x, y)
            text.append(f"- {k}: {ARMS[a]} - {ARMS[b]} = {percent(np.subtract(x, y))} points" + ("" if math.isnan(p) else f", p = {p:.2g} (paired t, one-sided)"))
            numbers[f"{a}-{b} {k}"] = round(float(np.mean(np.subtract(x, y))), 4)
    # Figures 1 and 2
    if res.value("cost/estep", "seconds"):
        plot(folder / "estep_reward.png", "E-step reward", "nats per line", {"reward": res.curve("estep", "reward")})
        plot(folder / "estep_think.png", "Think rate in the E-step", "share of lines", {"all lines": res.curve("estep", "think")})
        # The level of the reward is that of the programs drawn; here versions of one program are compared.
        plot(folder / "estep_uplift.png", "Return with a rationale minus without", "nats", {"lines where versions differ": res.curve("estep", "uplift")})
        text += ["", "## Figure 1: the E-step", "", "![reward](estep_reward.png) ![think rate](estep_think.png) ![what thinking earns](estep_uplift.png)", ""]
    think = {k: percent(res.value("rationales", k)) for k in ("think", "think_needed", "think_other")}
    where = f"; {think['think_needed']} per 100 steps with a constant to be worked out, {think['think_other']} per 100 without" if s.benchmark == "world" else ""
    text += [f"Held-out programs, infused by q: a rationale before {think['think']}% of lines{where}.", "", "| line | lines | think |", "|---|---|---|"]
    text += [f"| `{form}` | {n} | {z:.0%} |" for form, (n, z) in res.value("rationales", "forms")[0].items()]
    if any(res.value("gain/estep", "lines")):
        text += ["", "What a rationale is worth at the line before which it stands, to the model that the E-step started from (held-out programs, first seed):", "",
                 "| rationales by | lines | nats per line: without | with | with another program's | gain | gain of another's | own over another's |",
                 "|---|---|---|---|---|---|---|---|"]
        for writer, label in (("start", "the start"), ("estep", "q after the E-step")):
            for g in (r for r in res.records(f"gain/{writer}", res.logs[0]) if r["lines"]):
                nth = g["key"].removeprefix(f"gain/{writer}").replace(".", ", round ")
                nats = [f"{g[k]:.3f}" for k in ("without", "with", "shuffled")] + [f"{g[k]:+.3f} ± {g[k + '_se']:.3f}" for k in ("gain", "gain_shuffled", "gain_own")]
                text.append("| " + " | ".join([label + nth, str(g["lines"]), *nats]) + " |")
                numbers[f"gain {writer}"] = round(g["gain"], 4)
    text += ["", "## Figure 2: programs before and after infusion", ""]
    for before, after in res.value("rationales", "programs")[0][:4]:
        text += ["```python", before.replace("<|endoftext|>", "").rstrip(), "```", "", "```python", after.replace("<|endoftext|>", "").rstrip(), "```", ""]
    # Figures 3 to 5
    mid = ("ntp", "ra3")
    plot(folder / "mstep_nll.png", "Held-out cross-entropy, same action tokens", "nats per action token", {ARMS[a]: res.curve(a, "nll") for a in mid})
    plot(folder / "mid_accuracy.png", "Accuracy during mid-training", "greedy pass@1", {ARMS[a]: res.curve(a, "greedy") for a in mid})
    last = {a: res.curve(a, "nll")[1][:, -1] for a in ("ntp", "ntp-long", "ra3") if a in arms}
    text += ["## Figures 3 and 4: the M-step", "", "![cross-entropy](mstep_nll.png) ![accuracy](mid_accuracy.png)", "",
             "Action cross-entropy at the end, nats per token: " + ", ".join(f"{ARMS[a]} {shown(v, 4)}" for a, v in last.items()) + ".", ""]
    numbers |= {f"nll {a}": round(float(v.mean()), 5) for a, v in last.items()} | {k: round(float(np.mean(res.value("rationales", k))), 4) for k in think}
    if rl:
        curves = {ARMS[a]: res.curve(f"rlvr-{a}", "greedy") for a in rl}
        plot(folder / "rlvr.png", "RLVR on held-out problems", "greedy pass@1", curves)
        text += ["## Figure 5: RLVR", "", "![RLVR](rlvr.png)", "", "| from | mean of the curve | end of the curve |", "|---|---|---|"]
        text += [f"| {label} | {percent(y.mean(1))} | {percent(y[:, -1])} |" for label, (x, y) in curves.items()]
    costs = {r["key"][5:]: r for r in res.logs[0] if r.get("key", "").startswith("cost/")}
    text += ["", "## Cost (first seed)", "", "| stage | seconds | million tokens through the model (a training token counts three times) | GB of the GPU at most |", "|---|---|---|---|"]
    text += [f"| {k} | {r['seconds']:.0f} | {r['compute'] / 1e6:.1f} | {r.get('peak_gb', '-')} |" for k, r in costs.items()]
    write_text(folder / "report.md", "\n".join(text) + "\n")
    print("\n".join(table))
    return numbers


def report_ablations(folder: Path, seeds: list[int], s: Settings) -> dict:
    """Write report.md of the ablations; returns the numbers of its last line."""
    names, rates = scores(s), {"think": "lines with a rationale (%)"} | ({"think_needed": "rationales per 100 steps that need one"} if s.benchmark == "world" else {})
    text = ["| " + " | ".join(["variant", *rates.values(), "action cross-entropy (nats/token)", heads(names)]) + " |", "|---" * (2 + len(rates) + len(names)) + "|"]
    numbers, curves = {}, {}
    for name in chosen(s):
        res = Results([folder / slug(name) / f"seed{seed}" for seed in seeds])
        nll = res.curve("ra3", "nll")[1][:, -1]
        text.append("| " + " | ".join([name, *(percent(res.value("rationales", k)) for k in rates), f"{mean_se(nll)[0]:.4f}",
                                       *(percent(res.value("eval/ra3", k)) for k in names)]) + " |")
        numbers[name] = {k: round(mean_se(res.value("eval/ra3", k))[0], 4) for k in names}
        curves[name] = res.curve("ra3", "greedy")
    body = [f"# {folder.name}: ablations, {len(seeds)} seed(s)", "", *text, ""]
    penalties = {k for k in curves if k.startswith("c=")}
    for file, title, names in (("ablation_c", "The penalty c", penalties), ("ablation_other", "What makes the difference", curves.keys() - penalties | {f"c={s.c:g}"})):
        if some := {k: v for k, v in curves.items() if k in names}:
            plot(folder / f"{file}.png", title, "greedy pass@1", some)
            body.append(f"![{title}]({file}.png)")
    write_text(folder / "report.md", "\n".join(body) + "\n")
    print("\n".join(text))
    return numbers


def slug(name: str) -> str:
    return name.replace("=", "_").replace(" ", "_")


# ----------------------------------------------------------------------------------------------------------------- main


def versions() -> dict:
    """Where and with what a run was made."""
    def git(*args):
        try:
            return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
        except OSError:                              # no git here
            return ""
    return dict(commit=git("rev-parse", "HEAD") or None, changed=bool(git("status", "--porcelain")), python=platform.python_version(),
                torch=torch.__version__, numpy=np.__version__, cpus=os.cpu_count(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


FREE = ("micro_batch", "sample_batch", "checkpoint_blocks", "save_every", "data_dir")        # a run that ran out of memory may go on with less


def start_folder(s: Settings, unfit: dict[str, str]) -> Path:
    """Make runs/<name> with its config.json: settings, problems unfit for RL, versions.

    Of a run to be resumed, check that it is there and was started with the same settings (but for those FREE to change).
    """
    folder = Path("runs") / (s.name or time.strftime("%Y%m%d-%H%M%S"))
    config = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("name", "resume", "threads")}
    if s.resume:
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} holds no run to resume; leave out --resume to start one")
        old = json.loads((folder / "config.json").read_text())["settings"]
        for k, v in config.items():
            if k not in FREE and old.get(k) != v:
                raise ValueError(f"--{k.replace('_', '-')} {v}: {folder} was started with {old.get(k)}; resume with the same settings")
    elif folder.exists():
        raise ValueError(f"{folder} exists; go on with it by --resume, or choose another --name")
    else:
        text = json.dumps(dict(settings=config, unfit=unfit, **versions()), indent=1)
        folder.mkdir(parents=True)
        try:
            write_text(folder / "config.json", text)
        except OSError:
            folder.rmdir()                           # or neither a new start nor a resume would be possible
            raise
    return folder


def main(s: Settings):
    s.check()
    if s.model == "base" and not Path("base").exists():
        s.model = str(Path(__file__).parent / "base")        # it lies beside the code, wherever that is started from
    if s.memory:
        return print_memory(s)
    local, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(s.threads or max(1, len(os.sched_getaffinity(0)) // ranks))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    if ranks > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if s.pretrain:
        return mstep.pretrain(Run(s, Path(s.pretrain), s.seed), s.pretrain)
    first = ranks == 1 or dist.get_rank() == 0
    half = s.offload or (s.shard and torch.cuda.is_available())       # real bases are stored so: nothing is lost, and main memory is saved
    base, enc = load_pretrained(s.model, dtype=torch.bfloat16 if half else torch.float32)
    base.grad_checkpoint, base.limit = s.checkpoint_blocks, min(s.context, base.limit)
    s.row_tokens = min(s.row_tokens, base.limit)
    earlier = Path("runs") / s.name / "config.json"          # a resumed run goes on with the RL problems it had: verdicts near a time limit may differ
    unfit = from_first(lambda: json.loads(earlier.read_text()).get("unfit") if s.resume and earlier.exists() else None)
    variants, seeds = chosen(s) if s.ablations else {"": {}}, list(range(s.seed, s.seed + s.seeds))
    began = time.time()
    with Sandbox() as box:
        data = load_data(s, base, enc, box, unfit)   # before anything is written: bad data leaves nothing behind
        data.openers = data.openers.to(torch.device("cuda", local) if torch.cuda.is_available() else "cpu")
        if first and data.unfit:
            print(f"{s.rl_data}: {len(data.rl_problems)} problems are fit for RL; of {len(data.unfit)} the reference fails, a trivial program passes, or the prompt is too long")
        folder = from_first(lambda: start_folder(s, data.unfit))
        for name, flags in variants.items():
            for seed in seeds:
                run = Run(dataclasses.replace(s, **flags), folder / slug(name) / f"seed{seed}", seed, enc)
                (ablation if s.ablations else experiment)(run, base, data, box)
    if first:
        numbers = (report_ablations if s.ablations else report)(folder, seeds, s)
        print(f"{folder / 'report.md'}: tables and figures; {(time.time() - began) / 60:.1f} minutes")
        print(json.dumps(dict(run=str(folder), seeds=seeds, minutes=round((time.time() - began) / 60, 2), **numbers)))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse_flags())
    except (ValueError, OSError) as e:
        # What a user can mend is said in one sentence; anything else is our bug and deserves its traceback.
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
