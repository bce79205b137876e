"""RA3 end to end: base model -> mid-training by NTP and by RA3 -> RLVR -> scores.

    python train.py                                       # the embedded world, one process
    torchrun --standalone --nproc-per-node=2 train.py     # the same on two: same draws, same global batches
    python train.py --seed 1 --name main1                 # another seed of it
    python train.py --c 0.2 --arms ra3 --rl-steps 0       # a point of figure 6
    python train.py --resume --name main1                 # goes on where a run stopped, with its settings
    python train.py --recipe qwen2.5-1.5b                 # a real model
    python docs/report.py runs/main?                      # tables and figures of one or more runs

A run leaves runs/<name>/: config.json, metrics.jsonl, infused.jsonl (the held-out programs as q infused them)
and a model per stage, in the Hugging Face layout.

Read it as: the settings, each phase's in its own module; `experiment`, the paper's story in order; the loop
of each phase around its update (`e_update`, `m_update`, `rl_update`); the data; `Run`, the plumbing that they
share: ranks, log, checkpoints. Every random draw is seeded by what it is for, (seed, phase, step, problem,
sample): so neither the number of ranks nor a restart changes what is drawn.
"""
import argparse
import copy
import ctypes
import dataclasses
import fcntl
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import bench
import elbo
import estep
import mstep
import rlvr
from elbo import Program, Trace
from model import GPT, encode_prompt, load_pretrained, save_tokenizer, write_whole
from sandbox import Sandbox

# -------------------------------------------------------------------------------------------------- settings


@dataclass
class RunConfig:
    """What concerns the run as a whole."""
    name: Annotated[str, "folder under runs/; empty: the time of the start"] = ""
    recipe: Annotated[str, "settings for a model and its hardware, of RECIPES; other flags win"] = "world"
    resume: Annotated[bool, "go on with the run called --name, with its own settings"] = False
    seed: Annotated[int, "seed of every draw of training; problems and base model stay"] = 0
    arms: Annotated[str, "what to train; ntp-long is NTP with RA3's compute"] = "ra3,ntp,ntp-long"
    model: Annotated[str, "folder or hub name of the base model; `base` ships with the code"] = "base"
    data: Annotated[str, "experts' programs: world, benchmarks (leetcode:train), or a corpus"] = "world"
    column: Annotated[str, "the corpus column that holds the programs"] = "text"
    rounds: Annotated[int, "rounds of E-step and M-step, each on --experts programs of its own"] = 1
    experts: Annotated[int, "expert programs; about three epochs of the M-step"] = 1280
    warm_data: Annotated[str, "commented corpus to warm a cold base up on; stdlib: Python's own"] = ""
    warm_steps: Annotated[int, "updates of the warm-up, before everything else"] = 0
    benchmark: Annotated[str, "held-out problems: world, or benchmarks (humaneval,mbpp)"] = "world"
    rl_data: Annotated[str, "RLVR's problems: world, or benchmarks (leetcode:train)"] = "world"
    data_dir: Annotated[str, "folder with the benchmarks as JSONL files; empty: the hub"] = ""
    eval_problems: Annotated[int, "held-out problems; 128: a standard error of 4 points a seed"] = 128
    micro_batch: Annotated[int, "sequences per training pass; changes memory, not the result"] = 32
    sample_batch: Annotated[int, "sequences sampled at a time; changes memory, not the result"] = 256
    context: Annotated[int, "longest sequence in tokens, where the model allows more"] = 2 ** 20
    save_memory: Annotated[Literal["none", "recompute", "shard", "offload"],
                           "each with those before it: recompute blocks in the backward pass; shard float32 "
                           "masters of bfloat16 weights over the ranks; move them to main memory"] = "none"
    save_every: Annotated[int, "updates between checkpoints"] = 25


@dataclass
class Settings:
    """All settings of a run, by phase. A flag of the command line is the name of a field."""
    run: RunConfig = field(default_factory=RunConfig)
    e: estep.EStepConfig = field(default_factory=estep.EStepConfig)
    m: mstep.MStepConfig = field(default_factory=mstep.MStepConfig)
    rl: rlvr.RLVRConfig = field(default_factory=rlvr.RLVRConfig)

    def flat(self) -> dict:
        """{flag: value}, fit for JSON: infinity is the text "inf"."""
        flags = [pair for config in dataclasses.asdict(self).values() for pair in config.items()]
        return {name: "inf" if value == math.inf else value for name, value in flags}

    def check(self):
        """Raises ValueError, in one sentence, for a value that cannot work."""
        values, run, e = self.flat(), self.run, self.e
        arms = set(run.arms.split(","))
        rules = []
        for name, value in values.items():
            least = 0 if name in ("seed", "draws") or name.endswith("_steps") else 1
            rules.append((name, type(value) is not int or value >= least, f"must be at least {least}"))
            rules.append((name, not name.endswith("_lr") or 0 < value < 1, "expected a rate between 0 and 1"))
            rules.append((name, type(value) is not float or value >= 0, "must not be negative"))
        rules += [
            ("name", re.fullmatch(r"(\w[\w.+-]*)?", run.name), "expected letters, digits, -, + and ."),
            ("resume", run.name or not run.resume, "say which run, with --name"),
            ("arms", arms <= {"ra3", "ntp", "ntp-long"}, "expected some of ra3,ntp,ntp-long"),
            ("arms", "ntp-long" not in arms or len(arms) == 3, "ntp-long is measured by ra3 and ntp"),
            ("experts", run.experts >= max(e.e_programs, self.m.m_programs), "one update takes more"),
            ("warm_steps", bool(run.warm_data) == (run.warm_steps > 0), "goes together with --warm-data"),
            ("e_rollouts", e.e_rollouts >= 2, "a baseline needs at least 2 versions of a program"),
            ("rl_group", self.rl.rl_group >= 2, "a group needs at least 2 samples"),
            ("c", e.c >= 0, "a price is not negative"),
            ("p_think", 0 < e.p_think < 1, "a probability strictly between 0 and 1 is needed"),
            ("explore", e.explore < 1, "a share below 1 is needed; --rationales always thinks everywhere"),
            ("gamma", 0 < e.gamma <= 1, "a discount lies in (0, 1]")]
        for name, fact, expected in rules:
            if not fact:
                raise ValueError(f"--{name.replace('_', '-')} {values[name]}: {expected}")


SAVINGS = get_args(get_type_hints(RunConfig)["save_memory"])
MAY_CHANGE = ("name", "resume", "micro_batch", "sample_batch", "save_every", "data_dir")   # at a resume
CURVE_PROBLEMS = 64           # held-out problems of the curves on the way
SAMPLES = 5                   # of each problem at temperature 1, for pass@1 and pass@5
RL_POOL = 1024                # RL problems that are looked at
TIME_LIMIT_S = 3.0            # CPU seconds of a sampled program: a young policy writes many endless loops

# Recipes: what differs from the defaults. None has been run to its end (docs/recipes.md says what has). The
# weights of the E-step are those that SmolLM2 was found to need, learning rates the usual ones at these
# sizes.
REAL = dict(
    data="codeparrot/codeparrot-clean",                # 5M Python files from GitHub, deduplicated, streamed
    column="content",
    warm_data="codeparrot/codeparrot-clean",           # real bases hardly comment, and to no use: a warm-up,
    warm_steps=50,
    explore=0.3,                                       # and forced gates, or there is little to learn from
    beta=1.0, p_think=0.2,                             # with 0.1 and 0.5 SmolLM2's gate closed for good
    e_anchor=1.0,                                      # at 0.1 actions lost 0.11 nats per token
    benchmark="mbpp-docstring",                        # held-out cross-entropy needs solutions
    rl_data="leetcode:train",
    eval_problems=400,                                 # a standard error of 2.5 points at most
    context=1536,                                      # LeetCode's longest prompt and its answer
    max_new_tokens=512,                                # 99 in 100 of LeetCode's solutions
    max_rationale=64, max_comments=4,                 # a quarter of SmolLM2's comments are longer than a line
    horizon=16,                                        # real blocks are longer than the world's loops
    c=0.05, draws=0,
    floor=math.inf,                                    # a real line costs 11 nats: a floor of 3 would hide it
    broken_cost=3.0,                                   # and chance may win back more than half a nat
    experts=8192,                                      # 200 updates of 64 read them one and a half times
    e_rollouts=4, e_programs=32,                       # real programs differ more than the world's
    e_steps=100, m_steps=200, rl_steps=100, rl_problems=32, save_every=20,
    sample_batch=64,                                   # or the cache would be the most of all
)
BILLION = dict(REAL, save_memory="recompute", micro_batch=8,
               e_lr=5e-6, m_lr=1e-5,                  # Adam moves a weight, about 0.02, by so much per update
               rl_lr=1e-6)                             # what GRPO is mostly run with
SMALL_CARD = dict(save_memory="offload", micro_batch=2)        # float32 state would be 25 GB for 1.5B
QWEN, LLAMA = dict(BILLION, model="Qwen/Qwen2.5-1.5B"), dict(BILLION, model="meta-llama/Llama-3.2-1B")
RECIPES: dict[str, dict] = {
    "world": {},
    # One GPU of 24 GB. Smaller models bear larger learning rates; 24 rollouts per update were too noisy.
    "smollm2-135m": dict(
        REAL, model="HuggingFaceTB/SmolLM2-135M", e_lr=1e-4, m_lr=5e-5, rl_lr=2e-5, experts=2048,
        e_programs=64, e_steps=30, m_steps=60, rl_steps=20, rl_problems=16, eval_problems=128,
        max_new_tokens=256, micro_batch=4),
    # One GPU of 80 GB: float32 weights and moments, products in bfloat16.
    "qwen2.5-1.5b": QWEN,
    "llama-3.2-1b": LLAMA,
    # One GPU of 24 GB and 32 GB of main memory: two crossings of the bus per update.
    "qwen2.5-1.5b-24gb": QWEN | SMALL_CARD,
    "llama-3.2-1b-24gb": LLAMA | SMALL_CARD,
    # Eight GPUs of 80 GB: torchrun --standalone --nproc-per-node=8.
    "llama-3.1-8b": dict(BILLION, model="meta-llama/Llama-3.1-8B", save_memory="shard", micro_batch=4,
                         sample_batch=32),
}


def parse_flags(argv: list[str] | None = None) -> Settings:
    """Settings from the command line, before the recipe's or those of a resumed run, before the defaults.

    Raises ValueError for an unknown recipe.
    """
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
    configs = {f.name: f.default_factory for f in dataclasses.fields(Settings)}
    for config in configs.values():
        group = ap.add_argument_group(config.__name__, config.__doc__)
        for name, hint in get_type_hints(config, include_extras=True).items():
            (why,), kind, default = hint.__metadata__, hint.__origin__, getattr(config, name)
            how = dict(choices=get_args(kind)) if get_args(kind) else dict(type=kind)
            if kind is bool:
                how = dict(action="store_true")
            text = f"{why} (default: {default})".replace("%", "%%")
            group.add_argument("--" + name.replace("_", "-"), help=text, default=default, **how)
    given = ap.parse_args(argv)
    if given.recipe not in RECIPES:
        raise ValueError(f"--recipe {given.recipe}: expected one of {', '.join(RECIPES)}")
    ap.set_defaults(**RECIPES[given.recipe])         # and once more: what the command line says still wins
    earlier = Path("runs") / given.name
    if given.resume and (earlier / "config.json").exists():
        ap.set_defaults(**read_config(earlier)["settings"])
    flags, phases = vars(ap.parse_args(argv)), {}
    for phase, config in configs.items():
        phases[phase] = config(**{name: flags[name] for name in config.__dataclass_fields__})
    return Settings(**phases)


# ----------------------------------------------------------------------------------------- the paper's story


def experiment(run: "Run", data: "Data"):
    """Base; mid-training by RA3 and by NTP; RLVR from each of the three. An arm is the name of its model."""
    s, base, heldout = run.s, run.s.run.model, [p.trace() for p in data.heldout]
    if s.run.warm_steps:
        run.once("eval/cold", lambda: final(run, base, data))
        base = run.stage("warm", base, m_step, data, data.warm, heldout, s.run.warm_steps)
    arms, wanted = {"base": base}, s.run.arms.split(",")

    def ntp(name: str, steps: int):
        model = base
        for tag, experts in rounds(run, data):
            model = run.stage(name + tag, model, m_step, data, [p.trace() for p in experts], heldout, steps)
        return model
    if "ra3" in wanted:
        arms["ra3"] = ra3(run, base, data)
    if "ntp" in wanted:
        arms["ntp"] = ntp("ntp", s.m.m_steps)
    if "ntp-long" in wanted:                 # as many tokens through the model as RA3's phases together
        spent = sum(run.tokens(stage) for stage in ("estep", "infuse", "ra3"))
        arms["ntp-long"] = ntp("ntp-long", round(s.m.m_steps * spent / run.tokens("ntp")))
    for name, model in arms.items():
        run.once(f"eval/{name}", lambda: final(run, model, data))
    arms.pop("ntp-long", None)
    for name, model in arms.items() if s.rl.rl_steps else ():
        model = run.stage(f"rlvr-{name}", model, grpo, data)
        run.once(f"eval/rlvr-{name}", lambda: final(run, model, data))


def ra3(run: "Run", base: str, data: "Data"):
    """RA3's mid-training: E-step, infusion and M-step, each round on programs of its own."""
    s, model = run.s, base
    how = dataclasses.replace(s.e, rationales="never") if math.isinf(s.e.c) else s.e       # worth nothing
    for tag, experts in rounds(run, data):
        q = model
        if how.rationales != "never":
            q = run.stage("estep" + tag, model, e_step, data, experts)
        train, heldout = [], []
        if not run.done("ra3" + tag):                # else a resumed run would only throw them away
            train, heldout = infuse(run, model, q, data, experts, how, tag)
        model = run.stage("ra3" + tag, q, m_step, data, train, heldout, s.m.m_steps)
    return model


def rounds(run: "Run", data: "Data"):
    """Yield, for each round, the suffix of its stages' names and its expert programs."""
    yield "", data.experts
    for n in range(1, run.s.run.rounds):
        yield f".{n + 1}", data.read_experts(n)


# ------------------------------------------------------------------------------------- a loop for each phase


def e_step(run: "Run", stage: str, q: GPT, data: "Data", experts: list[Program]):
    """Move q, which starts as the model itself, towards rationales that pay; pi is the frozen start."""
    cfg, pi = run.s.e, copy.deepcopy(q).requires_grad_(False)
    optimizer = run.optimizer(torch.optim.Adam, q, betas=(0.9, 0.99))
    for step in run.steps(stage, q, optimizer, cfg.e_steps, cfg.e_lr, warmup=5):
        picked = run.mine(run.choose(stage, step, len(experts), cfg.e_programs))
        seeds = [run.draw(stage, step, i, k) for i in picked for k in range(cfg.e_rollouts)]
        programs = [experts[i] for i in picked]
        stats = estep.e_update(q, pi, optimizer, data.enc, data.openers, programs, seeds, cfg, **run.batches)
        run.log(phase=stage, step=step, **stats)


def infuse(run: "Run", pi: str, q: str, data: "Data", experts: list[Program], cfg, tag: str) -> tuple[list, list]:
    """Traces of the experts' and the held-out programs, with rationales drawn from q that keep the format."""
    model, began, cfg = run.load(q), time.time(), dataclasses.replace(cfg, explore=0.0)

    def draw(what: str, programs: list[Program]) -> list[Trace]:
        numbers = run.mine(range(len(programs)))
        seeds = [run.draw("infuse " + what, i) for i in numbers]
        mine = [programs[i] for i in numbers]
        return estep.rollout(model, data.enc, mine, seeds, data.openers, cfg, run.s.run.sample_batch)
    heldout, drawn = draw("heldout", data.heldout), [draw("experts" + tag + f" {k}" * (k > 0), experts) for k in range(max(cfg.draws, 1))]
    cost = mstep.total({"tokens": sum(estep.rollout_tokens(t) for part in drawn for t in part)})
    train = drawn[0]
    if cfg.draws:
        pi, numbers = run.load(pi), run.mine(range(len(experts)))
        train = [estep.select(pi, [experts[i].trace(), *vs], data.openers, cfg, run.draw("select" + tag, i)) for i, *vs in zip(numbers, *drawn)]
    run.once("cost/infuse" + tag, lambda: dict(seconds=round(time.time() - began, 1), **cost))
    train, heldout = (run.gather([estep.without_broken(t) for t in traces]) for traces in (train, heldout))
    if run.rank == 0:
        lines = [json.dumps(vars(trace) | {"broken": []}) + "\n" for trace in heldout]
        write_text(run.dir / f"infused{tag}.jsonl", "".join(lines))
    return train, heldout


def m_step(run: "Run", stage: str, model: GPT, data: "Data", traces: list[Trace], heldout: list, n: int):
    """n updates on `traces`: rationales and actions or, on programs without latents, NTP."""
    size, micro_batch = run.s.m.m_programs, run.s.run.micro_batch
    optimizer = run.optimizer(torch.optim.AdamW, model, betas=(0.9, 0.95), weight_decay=0.01)

    def probe(step: int):
        curve = {"nll": mstep.action_nll(model, run.mine(heldout), data.openers, micro_batch)}
        if step % 50 == 0 or step == n:
            curve["greedy"] = accuracy(run, model, data, data.eval_problems[:CURVE_PROBLEMS])["pass@1"]
        run.log(phase=stage, step=step, **curve)
    for step in run.steps(stage, model, optimizer, n, run.s.m.m_lr, decay=0.9):
        if step % 25 == 0:
            probe(step)
        epoch, place = divmod(step, len(traces) // size)
        order = np.random.default_rng(run.draw("mstep", epoch)).permutation(len(traces))
        picked = [traces[i] for i in run.mine(order[place * size:][:size])]
        run.log(phase=stage, step=step, **mstep.m_update(model, optimizer, picked, micro_batch))
    probe(n)


def grpo(run: "Run", stage: str, model: GPT, data: "Data"):
    """RLVR by GRPO, with the accuracy on held-out problems on the way."""
    cfg = run.s.rl
    optimizer = run.optimizer(torch.optim.Adam, model, betas=(0.9, 0.99))
    for step in run.steps(stage, model, optimizer, cfg.rl_steps, cfg.rl_lr, warmup=5):
        if step % 10 == 0:
            run.log(phase=stage, step=step, **evaluate(run, model, data))
        picked = run.mine(run.choose("rlvr", step, len(data.rl_problems), cfg.rl_problems))
        seeds = [run.draw("rlvr", step, i, k) for i in picked for k in range(cfg.rl_group)]
        problems = [data.rl_problems[i] for i in picked]
        stats = rlvr.rl_update(model, optimizer, data.enc, problems, seeds, data.box, cfg, **run.batches)
        run.log(phase=stage, step=step, **stats)
    run.log(phase=stage, step=cfg.rl_steps, **evaluate(run, model, data))


def accuracy(run: "Run", model: GPT, data: "Data", problems: list, samples: int = 1) -> dict[str, float]:
    """Unbiased pass@k on problems: one greedy sample of each, or several at temperature 1."""
    numbers = run.mine(range(len(problems)))
    seeds = [run.draw("eval", i, j) for i in numbers for j in range(samples)]
    tries = [problems[i] for i in numbers for _ in range(samples)]
    _, passed = bench.attempt(model, data.enc, tries, seeds, data.box, temperature=float(samples > 1),
                              max_new_tokens=run.s.rl.max_new_tokens, batch_size=run.s.run.sample_batch)
    right = [sum(part) for part in elbo.chunks(passed, samples)]
    sums = {f"pass@{k}": sum(bench.pass_at_k(samples, c, k) for c in right) for k in {1, samples}}
    sums = mstep.total(sums | {"problems": len(right)})
    n = sums.pop("problems")
    return {k: value / n for k, value in sums.items()}


def evaluate(run: "Run", model: GPT, data: "Data", hard: bool = False) -> dict[str, float]:
    """Greedy accuracy and, at temperature 1, pass@1 and pass@5 on all held-out problems; hard: on those too
    that are beyond what was trained on."""
    problems = data.eval_problems
    scores = dict(accuracy(run, model, data, problems, SAMPLES), problems=len(problems))
    scores["greedy"] = accuracy(run, model, data, problems)["pass@1"]
    if hard and data.hard_problems:
        scores["hard"] = accuracy(run, model, data, data.hard_problems, SAMPLES)["pass@1"]
    return scores


def final(run, name, data):
    model = run.load(name)
    run.say(f"{Path(name).name} on {len(data.eval_problems)} held-out problems")
    return evaluate(run, model, data, hard=True)


# -------------------------------------------------------------------------------------------------- the data


class Data:
    """What all phases share: tokenizer, comment openers, programs and problems, the sandbox.

    unfit: problems that an earlier start found unfit for RL, and why; None: they are run to find out. Raises
    ValueError, in one sentence, for data that cannot be read, is not Python, or is too little.
    """

    def __init__(self, s: Settings, base: GPT, enc, box: Sandbox, unfit: dict[str, str] | None = None):
        self.s, self.enc, self.box, self.limit, self.eos = s, enc, box, base.limit, base.config.eos_id
        self.openers = elbo.opener_mask(enc).to(own_device())                                           # (V,)
        run, room = s.run, self.limit - s.rl.max_new_tokens
        self.eval_problems = self.problems(run.benchmark, run.eval_problems, "eval", 0)
        self.hard_problems = self.problems("world", run.eval_problems, "hard", 0) if run.benchmark == "world" else []
        for p in self.eval_problems:
            if self.size(p.prompt) > room:
                raise ValueError(f"{run.benchmark}: beside {p.id} less than {s.rl.max_new_tokens} of the "
                                 f"{self.limit} tokens are left: lower --max-new-tokens")
        rl = self.problems(run.rl_data, RL_POOL, "train", 1) if s.rl.rl_steps else []
        if unfit is None:
            long = [p.id for p in rl if self.size(p.prompt) > room]
            unfit = dict.fromkeys(long, f"its prompt has more than {room} tokens")
            if run.rl_data != "world":               # all of the world's are fit
                rest = [p for p in rl if p.id not in unfit]
                unfit |= from_first(lambda: bench.unfit_for_rl(rest, box))
        self.unfit, self.rl_problems = unfit, [p for p in rl if p.id not in unfit]
        if s.rl.rl_steps and len(self.rl_problems) < s.rl.rl_problems:
            raise ValueError(f"{run.rl_data}: {len(self.rl_problems)} problems are fit for RL, "
                             f"{s.rl.rl_problems} are needed; lower --rl-problems")
        self.first_row = 0                           # of the experts' corpus
        self.warm = self.read_commented() if run.warm_steps else []
        self.heldout = self.parse(run.benchmark, solutions(self.eval_problems), 1)
        self.experts = self.read_experts(0)

    def size(self, text: str) -> int:
        return len(encode_prompt(self.enc, text))

    def problems(self, name: str, n: int, kind: str, seed: int) -> list[bench.Problem]:
        if name == "world":
            found = bench.world(kind, n, seed)
        else:
            found = bench.load(name, self.s.run.data_dir or None, limit=n)
        return [dataclasses.replace(p, timeout_s=TIME_LIMIT_S) for p in found]

    def parse(self, name: str, texts, least: int) -> list[Program]:
        """Programs of (where, prompt, solution) that fit the context with room for a rationale."""
        out, n = [], 0
        for where, prompt, solution in texts:
            n += 1
            try:
                program = elbo.parse(self.enc, prompt, solution, self.eos)
            except ValueError as e:
                raise ValueError(f"{name}: {where}: {e}") from None
            if len(program) + program.room(self.enc, self.s.e.max_rationale) <= self.limit:
                out.append(program)
        if len(out) < least:
            raise ValueError(f"{name}: {len(out)} of {n} programs fit {self.limit} tokens with a rationale, "
                             f"{least} are needed; lower --e-programs, --m-programs or --rounds")
        return out

    def read_experts(self, n: int) -> list[Program]:
        """The expert programs of round n: of the world, of benchmarks with solutions, or of a corpus."""
        run, begin = self.s.run, n * self.s.run.experts
        end = begin + run.experts
        if run.data == "world":
            texts = solutions(bench.world("train", run.experts, seed=100 * n))
        elif re.split("[,:@]", run.data)[0] in bench.SOURCES:
            texts = solutions(bench.load(run.data, run.data_dir or None, limit=end)[begin:])
        else:                                        # a third of the context is left for rationales
            most = 2 * self.limit // 3 - 2
            corpus = mstep.corpus(run.data, run.column, most, self.size, start=self.first_row)
            texts = ((f"row {row + 1}", "", text) for row, text in islice(corpus, begin, end))
        name = run.data + f", round {n + 1}" * (n > 0)
        return self.parse(name, texts, max(self.s.e.e_programs, self.s.m.m_programs))

    def read_commented(self) -> list[Trace]:
        """Programs with their authors' comments, at a tenth of their lines at least."""
        run, e, n, out = self.s.run, self.s.e, self.s.m.m_programs, []
        for row, text in mstep.corpus(run.warm_data, run.column, self.limit - 2, self.size, comments=True):
            trace = elbo.parse_commented(self.enc, text, self.eos, e.max_rationale, e.max_comments)
            if np.mean(trace.thinks()) >= 0.1:
                out.append(trace)
            if len(out) == run.warm_steps * n:
                self.first_row = (row + 1) * (run.warm_data == run.data)    # the experts' programs are others
                break
        if len(out) < n:
            raise ValueError(f"--warm-data {run.warm_data}: {len(out)} programs have comments at a tenth "
                             f"of their lines, {n} are needed; lower --m-programs")
        return out


def solutions(problems: list[bench.Problem]) -> list[tuple[str, str, str]]:
    """(id, prompt, solution) of the problems that have one."""
    return [(p.id, p.prompt, p.solution) for p in problems if p.solution]


# -------------------------------------------------------------------------------- the plumbing of all phases


class Run:
    """One process's view of a run: its ranks, folder, log and checkpoints."""

    def __init__(self, s: Settings, folder: Path, enc=None):
        self.s, self.dir, self.enc, self.device = s, folder, enc, own_device()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.batches = dict(micro_batch=s.run.micro_batch, sample_batch=s.run.sample_batch)
        self.saving = SAVINGS.index(s.run.save_memory)
        self.records = from_first(self.recover)

    def draw(self, what: str, *index: int) -> list[int]:
        """The seed of a random draw, named by what it is for."""
        return [self.s.run.seed, zlib.crc32(what.encode()), *index]

    def choose(self, what: str, step: int, n: int, k: int) -> list[int]:
        """k of n things, drawn anew at every step."""
        return np.random.default_rng(self.draw(what, step)).choice(n, k, replace=False).tolist()

    def mine(self, items):
        """This rank's share: every ranks-th item."""
        return items[self.rank::self.ranks]

    def gather(self, items: list) -> list:
        """All ranks' shares, put back in order."""
        shares: list = [items] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(shares, items)
        return [shares[i % self.ranks][i // self.ranks] for i in range(sum(map(len, shares)))]

    def say(self, text: str):
        if self.rank == 0:
            print(text, flush=True)

    # models and stages

    def load(self, name) -> GPT:
        """A model of a folder or the hub on this rank's device, in the precision that the run asks for."""
        model, _ = load_pretrained(name, self.device, torch.bfloat16 if self.saving >= 2 else torch.float32)
        model.limit, model.grad_checkpoint = min(self.s.run.context, model.limit), self.saving >= 1
        return model

    def optimizer(self, kind, model: GPT, **options):
        if self.saving < 2:
            return kind(model.parameters(), **options)
        return mstep.Masters(kind, model.parameters(), "cpu" if self.saving == 3 else self.device, **options)

    def stage(self, name: str, start, loop, *args) -> Path:
        """Train a copy of `start` by loop(run, name, model, *args) and keep it in the folder `name`, once."""
        folder = self.dir / name
        if not self.done(name):
            model, began = self.load(start), time.time()
            loop(self, name, model, *args)
            if self.rank == 0:
                model.save_pretrained(folder)
                save_tokenizer(self.enc, folder)
            tokens = sum(r.get("tokens", 0) for r in self.records if r.get("phase") == name)
            cost = dict(seconds=round(time.time() - began, 1), tokens=tokens,
                        peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2))      # of all stages so far
            self.once(f"cost/{name}", lambda: cost)  # a crash before this only repeats the end of the stage
            self.delete_checkpoints(but=0)
            barrier()
        return folder

    # log

    def log(self, **record):
        record = {k: None if v != v else v for k, v in record.items()}         # JSON has no nan
        self.records.append(record)
        if self.rank == 0:
            self.file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self.file.flush()

    def once(self, key: str, work):
        """Log the record work() as `key`, for good, unless it is there."""
        if not any(r.get("key") == key for r in self.records):
            self.log(key=key, **work())
            if self.rank == 0:
                os.fsync(self.file.fileno())

    def done(self, stage: str) -> bool:
        return any(r.get("key") == f"cost/{stage}" for r in self.records)

    def tokens(self, stage: str) -> float:
        """Tokens that all rounds of a stage put through a model; a training token counts three times."""
        key = re.compile(rf"cost/{stage}(\.\d+)?")
        return sum(r["tokens"] for r in self.records if key.fullmatch(r.get("key", "")))

    # checkpoints

    def steps(self, stage: str, model: GPT, optimizer, n: int, lr: float, warmup: int = 10, decay: float = 0):
        """Yield the steps still to do of 0..n-1, learning rate set: a linear warm-up times a fall by `decay`.

        Each step must log what its update returns. State is saved on the way, and found after a restart.
        """
        shared = isinstance(optimizer, mstep.Masters)   # each rank saves its share, from which weights follow
        last = self.records[-1] if self.records else {}
        first = last["step"] + 1 if last.get("phase") == stage else 0

        def state_file(step: int) -> Path:
            return self.dir / f"state-{stage}-{step}.{self.rank if shared else 0}.pt"
        if first:
            state = torch.load(state_file(first), map_location="cpu", weights_only=True, mmap=True)
            optimizer.load_state_dict(state["optimizer"])
            if not shared:
                model.load_state_dict(state["model"])
        bar = tqdm(range(first, n), stage, n, initial=first, disable=self.rank > 0, mininterval=1.0)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warmup, 1.0) * (1 - decay * step / n)
            began = time.time()
            yield step
            shown = {k: v for k, v in self.records[-1].items() if k in ("reward", "think", "loss", "signal")}
            speed = self.records[-1].get("tokens", 0) / (time.time() - began)
            bar.set_postfix(shown | {"tokens/s": round(speed)}, refresh=False)
            if (step + 1) % self.s.run.save_every == 0 and step + 1 < n:
                if shared or self.rank == 0:
                    state = dict(optimizer=optimizer.state_dict())
                    state |= {} if shared else dict(model=model.state_dict())
                    save(state, state_file(step + 1))
                barrier()
                self.delete_checkpoints(but=2)

    def delete_checkpoints(self, but: int):
        """Delete all checkpoints but the newest: the last, and the one before it should that be damaged."""
        shares = self.ranks if self.saving >= 2 else 1
        files = sorted(self.dir.glob("state-*.pt"), key=lambda file: -file.stat().st_mtime)
        for file in files[but * shares:] if self.rank == 0 else ():
            file.unlink()

    def recover(self) -> list[dict]:
        """The log up to its last whole checkpoint or finished piece of work; the file is cut back to there.

        Raises ValueError if another process writes it.
        """
        path, records, ends = self.dir / "metrics.jsonl", [], [0]
        self.file = open(path, "ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # until this process ends, in any way
        except OSError:
            raise ValueError(f"{self.dir} is being written by another process: wait, or stop it") from None
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                records.append(json.loads(line))
                ends.append(ends[-1] + len(line))
            except ValueError:
                print(f"{path}: line {len(ends)} is damaged; going on from before it", file=sys.stderr)
                break
        while records and "key" not in records[-1] and not self.has_checkpoint(records[-1]):
            records.pop()
        os.truncate(path, ends[len(records)])
        return records

    def has_checkpoint(self, record: dict) -> bool:
        """Is there a checkpoint of the state after this record's update, undamaged?"""
        files = sorted(self.dir.glob(f"state-{record['phase']}-{record['step'] + 1}.*.pt"))
        for file in files if "grad_norm" in record else ():
            try:
                fault = zipfile.ZipFile(file).testzip()                  # compares checksums
            except (OSError, zipfile.BadZipFile) as e:
                fault = e
            if fault:
                print(f"{file} is damaged ({fault}); going on from the one before it", file=sys.stderr)
                return False
        return "grad_norm" in record and len(files) == (self.ranks if self.saving >= 2 else 1)


def save(state: dict, file: Path):
    """torch.save, whole or not at all; raises the OSError of a full disk, which torch hides."""
    def write(tmp: Path):
        with open(tmp, "wb") as f:
            torch.save(state, f)
    try:
        write_whole(file, write)
    except RuntimeError as e:
        raise (e.__context__ or e) from None


def write_text(path: Path, text: str):
    write_whole(path, lambda tmp: tmp.write_text(text))


def barrier():
    if dist.is_initialized():
        dist.barrier()


def from_first(work):
    """What work() returns, or raises, on the first rank; a clock or a folder may answer others otherwise."""
    shared = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            shared[0] = work()
        except (ValueError, OSError) as e:
            shared[1] = e
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    if shared[1] is not None:
        raise shared[1]
    return shared[0]


def own_device() -> torch.device:
    return torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")


def versions() -> dict:
    """Where and with what a run was made."""
    folder = shlex.quote(str(Path(__file__).parent))
    commit = os.popen(f"git -C {folder} describe --always --dirty --abbrev=40 2>/dev/null").read().strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(commit=commit, python=sys.version, torch=torch.__version__, cpus=os.cpu_count(), gpu=gpu)


def read_config(folder: Path) -> dict:
    """The config.json of a run. Raises ValueError, with its name, if it is damaged."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        return dict(settings=dict(config["settings"]), unfit=dict(config["unfit"]))
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is damaged: start again under another --name") from None


def start_folder(s: Settings, unfit: dict[str, str]) -> Path:
    """Make runs/<name> with its config.json: settings, problems unfit for RL, versions.

    Of a run to be resumed, check that it is there, and its settings the same, but for those that MAY_CHANGE.
    """
    folder, config = Path("runs") / (s.run.name or time.strftime("%Y%m%d-%H%M%S")), s.flat()
    if s.run.resume:
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} holds no run to resume; leave out --resume to start one")
        old = read_config(folder)["settings"]
        for k in config.keys() - set(MAY_CHANGE):
            if old.get(k) != config[k]:
                flag = k.replace("_", "-")
                raise ValueError(f"--{flag} {config[k]}: {folder} was started with {old.get(k)}, which stays")
    elif (folder / "config.json").exists():
        raise ValueError(f"{folder} exists; go on with it by --resume, or choose another --name")
    else:
        text = json.dumps(dict(settings=config, unfit=unfit, **versions()), indent=1, allow_nan=False)
        write_text(folder / "config.json", text)
    return folder


# ------------------------------------------------------------------------------------------------------ main


def main(s: Settings):
    s.check()
    if s.run.model == "base" and not Path("base").exists():
        s.run.model = str(Path(__file__).parent / "base")     # beside the code, wherever that is started from
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if ranks > 1:
        # PR_SET_PDEATHSIG: an orphan of torchrun would train on, beside the run that its user starts again.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    base, enc = load_pretrained(s.run.model, "meta")         # no weights: stages load what they train
    base.limit = min(s.run.context, base.limit)
    earlier = Path("runs") / s.run.name
    resumed = s.run.resume and (earlier / "config.json").exists()
    unfit = from_first(lambda: read_config(earlier)["unfit"] if resumed else None)
    began = time.time()
    with Sandbox() as box:
        data = Data(s, base, enc, box, unfit)   # first of all: bad data leaves nothing behind
        folder = from_first(lambda: start_folder(s, data.unfit))
        run = Run(s, folder, enc)
        run.say(f"{folder}: {len(data.experts)} expert programs, {len(data.eval_problems)} held-out problems,"
                f" {len(data.rl_problems)} for RL ({len(data.unfit)} unfit)")
        try:
            experiment(run, data)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; go on with --resume --name {folder.name}") from None
    run.say(f"{folder}: {(time.time() - began) / 60:.1f} minutes; python docs/report.py {folder} shows it")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(parse_flags())
    except (ValueError, OSError, KeyboardInterrupt) as e:
        # What a user can mend is said in one sentence; anything else is our bug and deserves its traceback.
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(130 if isinstance(e, KeyboardInterrupt) else 2)
