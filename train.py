"""RA3 end to end: base model -> mid-training by NTP and by RA3 -> RLVR -> scores.

    python train.py --name main0                          # the embedded world, one process
    torchrun --standalone --nproc-per-node=2 train.py     # the same on two: same draws, same global batches
    python train.py --resume --name main0                 # goes on where a run stopped, with its settings
    python train.py --recipe qwen2.5-1.5b                 # a real model

A run leaves runs/<name>/: config.json, metrics.jsonl, infused.jsonl (the held-out programs as q infused them)
and a model per stage, in the Hugging Face layout.

Read it as: the settings; `experiment`, the paper's story in order; the loop of each phase around its update;
the data; `Run`, the plumbing that they share. Every random draw is seeded by what it is for, (seed, phase,
step, problem, sample): so neither the number of ranks nor a restart changes what is drawn.
"""
import argparse
import configparser
import copy
import ctypes
import dataclasses
import fcntl
import json
import math
import os
import re
import resource
import shlex
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Iterable, Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import bench
import elbo
import estep
import mstep
import rlvr
from bench import Problem
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
    micro_batch: Annotated[int, "packed rows (E-step: versions) per pass; for memory, not the result"] = 32
    sample_batch: Annotated[int, "sequences sampled at a time; changes memory, not the result"] = 256
    context: Annotated[int, "longest sequence in tokens, where the model allows more"] = 2 ** 20
    save_memory: Annotated[Literal["none", "recompute", "shard", "offload"],
                           "recompute blocks; then share float32 masters; then offload them"] = "none"
    save_every: Annotated[int, "updates between checkpoints"] = 25


@dataclass
class Settings:
    """All settings of a run, by phase. A flag of the command line is the name of a field."""
    run: RunConfig = field(default_factory=RunConfig)
    e: estep.EStepConfig = field(default_factory=estep.EStepConfig)
    m: mstep.MStepConfig = field(default_factory=mstep.MStepConfig)
    rl: rlvr.RLVRConfig = field(default_factory=rlvr.RLVRConfig)
    unfit: dict | None = None     # problems unfit for RL, and why, of a run to be resumed; None: to be found

    def flat(self) -> dict:
        """{flag: value}, fit for JSON: infinity is the text "inf"."""
        flags = vars(self.run) | vars(self.e) | vars(self.m) | vars(self.rl)
        return {name: "inf" if value == math.inf else value for name, value in flags.items()}

    def check(self):
        """Raises ValueError, in one sentence, for a value that cannot work."""
        run, values = self.run, self.flat()
        arms, update = set(run.arms.split(",")), max(self.e.e_programs, self.m.m_programs)

        def need(fact, name: str, expected: str):
            if not fact:
                raise ValueError(f"{flag(name)} {values[name]}: {expected}")
        for name, value in values.items():
            if type(value) in (int, float):
                least, most = RANGES.get(name, (int(type(value) is int), math.inf))
                need(least <= value <= most, name, f"expected a number from {least} to {most}")
        need(re.fullmatch(r"(\w[\w.+-]*)?", run.name), "name", "expected letters, digits, -, + and .")
        need(run.name or not run.resume, "resume", "say which run, with --name")
        need(arms <= {"ra3", "ntp", "ntp-long"}, "arms", "expected some of ra3,ntp,ntp-long")
        need("ntp-long" not in arms or len(arms) == 3, "arms", "ntp-long is measured by ra3 and ntp")
        need(run.experts >= update, "experts", f"one update takes {update}")
        need(bool(run.warm_data) == (run.warm_steps > 0), "warm_steps", "goes together with --warm-data")


# The least and the most of a flag. Others are at least 0, whole numbers at least 1.
RANGES = dict.fromkeys(("seed", "draws", "e_steps", "m_steps", "rl_steps", "warm_steps"), (0, math.inf))
RANGES |= dict.fromkeys(("e_lr", "m_lr", "rl_lr", "gamma"), (0, 1))
RANGES["explore"] = (0, 0.99)
RANGES |= dict.fromkeys(("e_rollouts", "rl_group"), (2, math.inf))       # a baseline is the mean of others
SAVINGS = get_args(get_type_hints(RunConfig)["save_memory"])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAY_CHANGE = {"name", "resume", "micro_batch", "sample_batch", "save_every", "data_dir"}   # at a resume
SHOWN = ("reward", "think", "loss", "signal", "tokens/s", "mfu", "padding", "peak_gb")     # on the bar
CURVE_PROBLEMS = 64           # held-out problems of the curves on the way
SAMPLES = 5                   # of each problem at temperature 1, for pass@1 and pass@5
RL_POOL = 1024                # RL problems that are looked at
TIME_LIMIT_S = 3.0            # CPU seconds of a sampled program: a young policy writes many endless loops

ini = configparser.ConfigParser(inline_comment_prefixes="#")
ini.read(Path(__file__).with_name("recipes.ini"))
RECIPES = {"world": {}} | {name: dict(ini[name]) for name in ini.sections()}


def parse_flags(argv: list[str] | None = None) -> Settings:
    """Settings from the command line, before the recipe's or a resumed run's, before the defaults.

    Raises ValueError for an unknown recipe, and for a flag of which the run to be resumed has another value.
    """
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
    s, earlier = Settings(), {}
    configs = (s.run, s.e, s.m, s.rl)
    for config in configs:
        group = ap.add_argument_group(type(config).__name__, config.__doc__)
        for name, hint in get_type_hints(type(config), include_extras=True).items():
            kind, default = hint.__origin__, getattr(config, name)
            how = dict(choices=get_args(kind)) if get_args(kind) else dict(type=kind)
            if kind is bool:
                how = dict(action="store_true")
            why = f"{hint.__metadata__[0]} (default: {default})".replace("%", "%%")
            group.add_argument(flag(name), help=why, default=default, **how)
    given = ap.parse_args(argv)
    if given.recipe not in RECIPES:
        raise ValueError(f"--recipe {given.recipe}: expected one of {', '.join(RECIPES)}")
    ap.set_defaults(**RECIPES[given.recipe])         # and once more: what the command line says still wins
    file = Path("runs") / given.name / "config.json"
    if given.resume and file.exists():
        try:
            config = json.loads(file.read_text())
            earlier, s.unfit = dict(config["settings"]), dict(config["unfit"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{file} is damaged: start again under another --name") from None
        ap.set_defaults(**earlier)
    given = vars(ap.parse_args(argv))
    for config in configs:
        vars(config).update({name: given[name] for name in vars(config)})
    if math.isinf(s.e.c):                            # no rationale is worth its price
        s.e.rationales = "never"
    for name, value in s.flat().items():
        if name not in MAY_CHANGE and value != (was := earlier.get(name, value)):
            raise ValueError(f"{flag(name)} {value}: {file.parent} was started with {was}, which stays")
    return s


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ----------------------------------------------------------------------------------------- the paper's story


def experiment(run: "Run", data: "Data"):
    """Base; mid-training by RA3 and by NTP; RLVR from each of the three. An arm is the name of its model."""
    s, base, arms = run.s, run.s.run.model, run.s.run.arms.split(",")
    if s.run.warm_steps:
        run.once("eval/cold", lambda: evaluate(run, base, data))
        heldout = [p.trace() for p in data.heldout]
        base = run.stage("warm", base, m_step, data, data.warm, heldout, s.run.warm_steps)
    models = {"base": base}
    if "ra3" in arms:
        models["ra3"] = mid_train(run, data, base, "ra3", s.m.m_steps, s.e)
    if "ntp" in arms:
        models["ntp"] = mid_train(run, data, base, "ntp", s.m.m_steps)
    if "ntp-long" in arms:                   # as many tokens through the model as RA3's phases together
        spent = sum(run.tokens(stage) for stage in ("estep", "infuse", "ra3"))
        steps = round(s.m.m_steps * spent / run.tokens("ntp"))
        models["ntp-long"] = mid_train(run, data, base, "ntp-long", steps)
    stages = {name: f"rlvr-{name}" for name in models if s.rl.rl_steps and name != "ntp-long"}
    for name, model in models.items():
        run.once(f"eval/{name}", lambda: evaluate(run, model, data, stages.get(name)))
    for name, stage in stages.items():
        model = run.stage(stage, models[name], grpo, data)
        run.once(f"eval/{stage}", lambda: evaluate(run, model, data, stage, s.rl.rl_steps))


def count_stages(s: Settings) -> int:
    """How many stages, infusions and evaluations `experiment` has."""
    arms = set(s.run.arms.split(","))
    in_round = len(arms) + ("ra3" in arms) * (1 if s.e.rationales == "never" else 2)
    rl = 1 + len(arms - {"ntp-long"}) if s.rl.rl_steps else 0
    return 2 * bool(s.run.warm_steps) + s.run.rounds * in_round + 1 + len(arms) + 2 * rl


def mid_train(run: "Run", data: "Data", model: str, name: str, m_steps: int, cfg=None):
    """RA3's E-step, infusion and M-step, each round on programs of its own; without cfg: the M-step alone."""
    for n in range(run.s.run.rounds):
        tag, experts = f".{n + 1}" if n else "", data.read_experts(n) if n else data.experts
        train, heldout = ([p.trace() for p in programs] for programs in (experts, data.heldout))
        q = model
        if cfg and cfg.rationales != "never":
            q = run.stage("estep" + tag, model, e_step, data, experts)
        if cfg and not run.done(f"cost/{name}{tag}"):          # a resumed run would only throw them away
            train, heldout = infuse(run, q, model, data, experts, cfg, tag)
        model = run.stage(name + tag, q, m_step, data, train, heldout, m_steps)
    return model


# ------------------------------------------------------------------------------------- a loop for each phase


def e_step(run: "Run", stage: str, q: GPT, data: "Data", experts: list[Program]):
    """Move q, which starts as the model itself, towards rationales that pay; pi is the frozen start."""
    cfg, pi = run.s.e, copy.deepcopy(q).requires_grad_(False)
    optimizer = run.optimizer(torch.optim.Adam, q, betas=(0.9, 0.99))
    for step in run.steps(stage, optimizer, cfg.e_steps, cfg.e_lr, warmup=5):
        picked, seeds = run.pick(stage, step, len(experts), cfg.e_programs, cfg.e_rollouts)
        programs = [experts[i] for i in picked]
        stats = estep.e_update(q, pi, optimizer, data.enc, data.openers, programs, seeds, cfg, **run.batches)
        run.log(phase=stage, step=step, **stats)


def infuse(run: "Run", q, pi, data: "Data", experts: list[Program], cfg, tag: str) -> tuple[list, list]:
    """Traces of the experts' programs, with what pays by pi (`estep.select`), and of the held-out ones."""
    model, cfg = run.load(q), dataclasses.replace(cfg, explore=0.0)
    pi = run.load(pi) if cfg.draws else None

    def draw(what: str, programs: list[Program]) -> list[Trace]:
        seeds = [run.draw("infuse " + what, i) for i in run.mine(range(len(programs)))]
        how = data.openers, cfg, run.s.run.sample_batch
        return estep.rollout(model, data.enc, run.mine(programs), seeds, *how)

    def draw_and_select() -> dict:
        names = ["experts" + tag + (f" {k}" if k else "") for k in range(max(cfg.draws, 1))]
        drawn = list(zip(*(draw(name, experts) for name in mstep.bar(names, "infuse"))))   # versions of each
        tokens = sum(estep.rollout_tokens(t) for versions in drawn for t in versions)
        for i, versions in zip(run.mine(range(len(experts))), drawn):
            if cfg.draws:
                tokens += len(experts[i]) + sum(len(t.tokens) for t in versions)                   # pi, once
                seed = run.draw("select" + tag, i)
                versions = [estep.select(pi, experts[i], versions, data.openers, cfg, seed)]
            train.append(versions[0])
        return mstep.total({"tokens": tokens})
    train: list[Trace] = []
    if not run.once("cost/infuse" + tag, draw_and_select):
        draw_and_select()                            # again, of a run that was stopped since
    drawn = train, draw("heldout", data.heldout)
    train, heldout = (run.gather([estep.without_broken(t) for t in traces]) for traces in drawn)
    text = "".join(json.dumps(vars(trace) | {"broken": []}) + "\n" for trace in heldout)
    if run.rank == 0:
        write_whole(run.dir / f"infused{tag}.jsonl", lambda tmp: tmp.write_text(text))
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
    for step in run.steps(stage, optimizer, n, run.s.m.m_lr, decay=0.9):
        if step % 25 == 0:
            probe(step)
        epoch, place = divmod(step, len(traces) // size)
        order = np.random.default_rng(run.draw("mstep", epoch)).permutation(len(traces))
        picked = [traces[i] for i in run.mine(order[place * size:][:size])]
        run.log(phase=stage, step=step, **mstep.m_update(model, optimizer, picked, micro_batch))
    probe(n)


def grpo(run: "Run", stage: str, model: GPT, data: "Data"):
    """RLVR by GRPO, with the scores on held-out problems on the way: `evaluate` has the first and last."""
    cfg = run.s.rl
    optimizer = run.optimizer(torch.optim.Adam, model, betas=(0.9, 0.99))
    for step in run.steps(stage, optimizer, cfg.rl_steps, cfg.rl_lr, warmup=5):
        if step and step % 10 == 0:
            run.log(phase=stage, step=step, **scores(run, model, data))
        picked, seeds = run.pick("rlvr", step, len(data.rl_problems), cfg.rl_problems, cfg.rl_group)
        problems = [data.rl_problems[i] for i in picked]
        stats = rlvr.rl_update(model, optimizer, data.enc, problems, seeds, data.box, cfg, **run.batches)
        run.log(phase=stage, step=step, **stats)


def accuracy(run: "Run", model: GPT, data: "Data", problems: list, samples: int = 1) -> dict[str, float]:
    """Unbiased pass@k on problems: one greedy sample of each, or several at temperature 1."""
    numbers, batch = run.mine(range(len(problems))), run.s.run.sample_batch
    asked, passed = [(i, j) for i in numbers for j in range(samples)], []
    for part in mstep.bar(elbo.chunks(asked, 4 * batch), "evaluate"):    # a batch would wait for its longest
        seeds = [run.draw("eval", i, j) for i, j in part]
        tries = [problems[i] for i, _ in part]
        passed += bench.attempt(model, data.enc, tries, seeds, data.box, temperature=float(samples > 1),
                                max_new_tokens=run.s.rl.max_new_tokens, batch_size=batch)[1]
    right = run.gather([sum(part) for part in elbo.chunks(passed, samples)])
    chances = {k: [bench.pass_at_k(samples, c, k) for c in right] for k in (1, samples)}
    return {f"pass@{k}": sum(p) / len(p) for k, p in chances.items()}


def scores(run: "Run", model: GPT, data: "Data") -> dict[str, float]:
    """Greedy accuracy and, at temperature 1, pass@1 and pass@5 on all held-out problems."""
    problems, greedy = data.eval_problems, accuracy(run, model, data, data.eval_problems)["pass@1"]
    return dict(greedy=greedy, **accuracy(run, model, data, problems, SAMPLES), problems=len(problems))


def evaluate(run: "Run", name, data: "Data", curve: str | None = None, step: int = 0) -> dict[str, float]:
    """A stage's scores; hard: pass@1 at temperature 1 on longer problems.

    curve: the stage of RLVR whose curve has them at `step`, its start or its end.
    """
    model = run.load(name)
    found = scores(run, model, data)
    if curve:
        run.log(phase=curve, step=step, **found)
    hard = {"hard": accuracy(run, model, data, data.hard, SAMPLES)["pass@1"]} if data.hard else {}
    return found | hard


# -------------------------------------------------------------------------------------------------- the data


class Data:
    """What all phases share. Raises ValueError, in one sentence, for data that is damaged or too little."""

    def __init__(self, s: Settings, base: GPT, enc, box: Sandbox):
        self.s, self.enc, self.box, self.eos = s, enc, box, base.config.eos_id
        self.limit = min(s.run.context, base.limit)
        self.openers = elbo.opener_mask(enc).to(DEVICE)                                            # (V,)
        run, new, self.unfit = s.run, s.rl.max_new_tokens, s.unfit or {}
        long = f"its prompt leaves less than {new} of the {self.limit} tokens"
        self.eval_problems = self.read_problems(run.benchmark, run.eval_problems, "eval", seed=0)
        world = run.benchmark == "world"
        self.hard = self.read_problems("world", run.eval_problems, "hard", seed=0) if world else []
        for p in self.eval_problems + self.hard:
            if not self.fits(p):
                raise ValueError(f"{run.benchmark}: {p.id}: {long}; lower --max-new-tokens")
        problems = self.read_problems(run.rl_data, RL_POOL, "train", seed=1) if s.rl.rl_steps else []
        if s.unfit is None:
            self.unfit = {p.id: long for p in problems if not self.fits(p)}
            if run.rl_data != "world":               # all of the world's are fit
                rest = [p for p in problems if self.fits(p)]
                self.unfit |= from_first(lambda: bench.unfit_for_rl(rest, box))
        self.rl_problems = [p for p in problems if p.id not in self.unfit]
        if s.rl.rl_steps and len(self.rl_problems) < s.rl.rl_problems:
            raise ValueError(f"{run.rl_data}: {len(self.rl_problems)} problems are fit for RL, "
                             f"{s.rl.rl_problems} are needed; lower --rl-problems")
        self.first_row = 0                           # of the experts' corpus
        self.warm = self.read_commented() if run.warm_steps else []
        self.heldout = self.parse(run.benchmark, self.eval_problems, 1)
        self.experts = self.read_experts(0)

    def size(self, text: str) -> int:
        return len(encode_prompt(self.enc, text))

    def fits(self, p: Problem) -> bool:
        """Does the prompt leave room for an answer?"""
        return self.size(p.prompt) <= self.limit - self.s.rl.max_new_tokens

    def read_problems(self, name: str, n: int, kind: str, seed: int) -> list[Problem]:
        folder = self.s.run.data_dir or None
        found = bench.world(kind, n, seed) if name == "world" else bench.load(name, folder, limit=n)
        return [dataclasses.replace(p, timeout_s=TIME_LIMIT_S) for p in found]

    def parse(self, name: str, problems: Iterable[Problem], least: int) -> list[Program]:
        """The problems' solutions as programs, of those that fit the context with room for a rationale."""
        out = []
        for p in problems:
            try:
                program = elbo.parse(self.enc, p.prompt, p.solution, self.eos) if p.solution else None
            except ValueError as e:
                raise ValueError(f"{name}: {p.id}: {e}") from None
            if program and len(program) + program.room(self.enc, self.s.e.max_rationale) <= self.limit:
                out.append(program)
        if len(out) < least:
            raise ValueError(f"{name}: {len(out)} programs fit {self.limit} tokens with a rationale, {least} "
                             "are needed; lower --e-programs, --m-programs or --rounds")
        return out

    def read_experts(self, n: int) -> list[Program]:
        """The expert programs of round n: of the world, of benchmarks with solutions, or of a corpus."""
        run, begin = self.s.run, n * self.s.run.experts
        end = begin + run.experts
        if run.data == "world":
            problems = bench.world("train", run.experts, seed=100 * n)
        elif re.split("[,:@]", run.data)[0] in bench.SOURCES:
            problems = bench.load(run.data, run.data_dir or None, limit=end)[begin:]
        else:                                        # a third of the context is left for rationales
            most = 2 * self.limit // 3 - 2
            corpus = mstep.corpus(run.data, run.column, most, self.size, start=self.first_row)
            problems = (Problem(f"row {row + 1}", "", text) for row, text in islice(corpus, begin, end))
        name = run.data + f", round {n + 1}" * (n > 0)
        return self.parse(name, problems, max(self.s.e.e_programs, self.s.m.m_programs))

    def read_commented(self) -> list[Trace]:
        """Programs with their authors' comments, at a tenth of their lines at least."""
        run, e, least, found = self.s.run, self.s.e, self.s.m.m_programs, []
        corpus = mstep.corpus(run.warm_data, run.column, self.limit - 2, self.size, comments=True)
        for row, text in mstep.bar(corpus, "read the warm-up's programs"):
            trace = elbo.parse_commented(self.enc, text, self.eos, e.max_rationale, e.max_comments)
            if np.mean(trace.thinks()) >= 0.1:
                found.append(trace)
            if len(found) == run.warm_steps * least:
                self.first_row = (row + 1) * (run.warm_data == run.data)    # the experts' programs are others
                break
        if len(found) < least:
            raise ValueError(f"--warm-data {run.warm_data}: {len(found)} programs have comments at a tenth "
                             f"of their lines, {least} are needed; lower --m-programs")
        return found


# -------------------------------------------------------------------------------- the plumbing of all phases


class Run:
    """One process's view of a run: its ranks, folder, log and checkpoints."""

    def __init__(self, s: Settings, folder: Path, enc=None, kept: torch.dtype | None = None):
        self.s, self.dir, self.enc, self.kept, self.device = s, folder, enc, kept, DEVICE
        self.rank, self.ranks = mstep.ranks()
        self.meter = mstep.Meter()
        self.batches = dict(micro_batch=s.run.micro_batch, sample_batch=s.run.sample_batch)
        self.saving = SAVINGS.index(s.run.save_memory)
        self.records = from_first(self.recover)

    def draw(self, what: str, *index: int) -> list[int]:
        """The seed of a random draw, named by what it is for."""
        return [self.s.run.seed, zlib.crc32(what.encode()), *index]

    def pick(self, what: str, step: int, n: int, k: int, draws: int) -> tuple[list, list]:
        """This rank's share of k of n things, drawn at each step, and seeds for their draws."""
        mine = self.mine(np.random.default_rng(self.draw(what, step)).choice(n, k, replace=False).tolist())
        return mine, [self.draw(what, step, i, j) for i in mine for j in range(draws)]

    def mine(self, items):
        """This rank's share: every ranks-th item."""
        return items[self.rank::self.ranks]

    def gather(self, items: list) -> list:
        """All ranks' shares, put back in order."""
        shares = [items] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(shares, items)
        return [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]

    def say(self, text: str):
        if self.rank == 0:
            print(text, flush=True)

    def load(self, name) -> GPT:
        """A model of a folder or the hub on this rank's device, in the precision that the run asks for."""
        model, _ = load_pretrained(name, self.device, torch.bfloat16 if self.saving >= 2 else torch.float32)
        model.limit, model.grad_checkpoint = min(self.s.run.context, model.limit), self.saving >= 1
        return model

    def optimizer(self, kind, model: GPT, **options) -> mstep.Masters:
        device = DEVICE if self.saving < 3 else "cpu"
        return mstep.Masters(kind, model.parameters(), device, fused=True, **options)

    def stage(self, name: str, start, loop, *args) -> Path:
        """Train a copy of `start` by loop(run, name, model, *args) and keep it in the folder `name`, once."""
        def train() -> dict:
            model = self.load(start)
            self.meter.watch(model)
            loop(self, name, model, *args)
            if self.rank == 0:
                # bfloat16 would lose small updates, 3 in 4 at 1e-5, to a stage that starts from this.
                model.save_pretrained(self.dir / name, self.kept if loop is grpo else None)
                save_tokenizer(self.enc, self.dir / name)
            tokens = sum(r.get("tokens", 0) for r in self.records if r.get("phase") == name)
            return dict(tokens=tokens)
        self.once(f"cost/{name}", train)
        return self.dir / name

    def steps(self, stage: str, optimizer, n: int, lr: float, warmup: int = 10, decay: float = 0):
        """Yield the steps still to do of 0..n-1, each to log its update; lr warms up, falls by `decay`."""
        first, last = 0, self.records[-1] if self.records else {}
        if last.get("phase") == stage:
            first = last["step"] + 1
            optimizer.load_state_dict(self.checkpoint(len(self.records)))
        bar = tqdm(range(first, n), stage, n, initial=first, disable=self.rank > 0, mininterval=1.0)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warmup, 1.0) * (1 - decay * step / n)
            self.meter.read()
            yield step
            last = self.records[-1]
            bar.set_postfix({name: last[name] for name in SHOWN if name in last}, refresh=False)
            if (step + 1) % self.s.run.save_every == 0 and step + 1 < n:
                name = f"state-{len(self.records)}.{self.rank}of{self.ranks}.pt"
                save(optimizer.state_dict(), self.dir / name)
                mstep.total({"saved": 1})                  # waits for all ranks
                states = self.dir.glob("state-*.pt") if self.rank == 0 else ()    # others would see them go
                files = sorted(states, key=lambda file: file.stat().st_mtime)
                for file in files[:-2 * self.ranks]:
                    file.unlink()                # but the last, and the one before it should that be damaged

    def log(self, **record):
        seen = self.meter.read(record.get("tokens", 0))
        if "grad_norm" in record:                          # an update
            record |= seen | {"peak_gb": peak_gb()}
        self.records.append(record)
        if self.rank == 0:
            self.file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self.file.flush()

    def once(self, key: str, work) -> bool:
        """Do a piece of the run and log what it returns as `key`, for good, unless that is there already."""
        if self.done(key):
            return False
        spent, n = [r.get("seconds", 0) for r in self.records if "key" in r], count_stages(self.s)
        left = f", about {np.mean(spent) * (n - len(spent)) / 60:.0f} minutes left" if spent else ""
        self.say(f"stage {len(spent) + 1} of {n}: {key.removeprefix('cost/')}{left}")
        began = time.time()
        self.log(key=key, **work(), seconds=round(time.time() - began, 1), peak_gb=peak_gb())
        if self.rank == 0:
            os.fsync(self.file.fileno())
            for file in self.dir.glob("state-*.pt"):
                file.unlink()
        mstep.total({"logged": 1})                         # waits for all ranks
        return True

    def done(self, key: str) -> bool:
        return any(r.get("key") == key for r in self.records)

    def tokens(self, stage: str) -> float:
        """Tokens that all rounds of a stage put through a model; a training token counts three times."""
        return sum(r["tokens"] for r in self.records if r.get("key", "").split(".")[0] == f"cost/{stage}")

    def recover(self) -> list[dict]:
        """The log, locked, cut back to its last whole checkpoint or finished piece of work."""
        path, records = self.dir / "metrics.jsonl", []
        self.file = open(path, "ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # until this process ends, in any way
        except OSError:
            raise ValueError(f"{self.dir} is being written by another process: wait, or stop it") from None
        lines = path.read_bytes().splitlines(keepends=True)
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                print(f"{path}: line {len(records) + 1} is damaged; going on from before it", file=sys.stderr)
                break
        while records and "key" not in records[-1] and not self.checkpoint(len(records)):
            records.pop()
        os.truncate(path, sum(map(len, lines[:len(records)])))
        return records

    def checkpoint(self, n: int) -> dict | None:
        """The state after n records of the log, all ranks' shares together; None unless all are whole."""
        files, state = list(self.dir.glob(f"state-{n}.*.pt")), {}
        if {file.name for file in files} != {f"state-{n}.{i}of{len(files)}.pt" for i in range(len(files))}:
            return None
        for file in files:
            try:
                fault = zipfile.ZipFile(file).testzip()                                # compares checksums
            except (OSError, zipfile.BadZipFile) as e:
                fault = e
            if fault:
                print(f"{file} is damaged ({fault}); going on from the one before it", file=sys.stderr)
                return None
            state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return state


def save(state: dict, file: Path):
    """torch.save, whole or not at all; raises the OSError of a full disk, which torch hides."""
    def write(tmp: Path):
        with open(tmp, "wb") as f:
            torch.save(state, f)
    try:
        write_whole(file, write)
    except RuntimeError as e:
        raise (e.__context__ or e) from None


def peak_gb() -> float:
    """The most memory that was held so far: by tensors on the GPU or, on a CPU, by the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)         # Linux counts in KB


def from_first(work):
    """What work() returns, or raises, on the first rank; a clock or a folder may answer others otherwise."""
    answer = [None]
    if mstep.ranks()[0] == 0:
        try:
            answer = [work()]
        except (ValueError, OSError) as e:
            answer = [e]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def start_folder(s: Settings, unfit: dict[str, str]) -> Path:
    """runs/<name>, made with its config.json (settings, unfit problems, versions) unless it is resumed."""
    folder = Path("runs") / (s.run.name or time.strftime("%Y%m%d-%H%M%S"))
    file = folder / "config.json"
    if s.run.resume:
        if not file.exists():
            raise ValueError(f"{folder} holds no run to resume; leave out --resume to start one")
    elif file.exists():
        raise ValueError(f"{folder} exists; go on with it by --resume, or choose another --name")
    else:
        where = shlex.quote(str(Path(__file__).parent))
        commit = os.popen(f"git -C {where} describe --always --dirty --abbrev=40 2>/dev/null").read().strip()
        gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
        made = dict(commit=commit, python=sys.version, torch=torch.__version__, cpus=os.cpu_count(), gpu=gpu)
        text = json.dumps(dict(settings=s.flat(), unfit=unfit, **made), indent=1)
        write_whole(file, lambda tmp: tmp.write_text(text))
    return folder


# ------------------------------------------------------------------------------------------------------ main


def main(s: Settings):
    s.check()
    if s.run.model == "base" and not Path("base").exists():
        s.run.model = str(Path(__file__).parent / "base")     # beside the code, wherever that is started from
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if ranks > 1:
        # PR_SET_PDEATHSIG: an orphan of torchrun would train on, beside the run that its user starts again.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    base, enc = load_pretrained(s.run.model, "meta", None)   # no weights, but their precision
    began = time.time()
    with Sandbox() as box:
        data = Data(s, base, enc, box)          # first of all: bad data leaves nothing behind
        folder = from_first(lambda: start_folder(s, data.unfit))
        run = Run(s, folder, enc, base.embed_tokens.weight.dtype)
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
