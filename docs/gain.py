"""What rationales are worth to the model: a table, from the folder of one run alone.

    python docs/gain.py runs/main0                      # q's rationales in the held-out programs
    python docs/gain.py runs/main0 --by start ra3       # also those by models of the run, or by any folder's
    python docs/gain.py runs/main0 --by ra3 --bound     # also whether they are hidden by Jensen's inequality

The judge of q's is pi, the model that the E-step began with (`start`); other models judge their own. A judge
scores the lines that have a rationale, -log pi(a_t | s_t, z_t) in nats, in three versions of the program:
without rationales, with its own, and with one of another program in the place of each. The gain is what
rationales take off the first. What another's take off as well is owed to the form of a comment, not to what
it says. Of several rounds of a run the first is shown.
"""
import argparse
import json
import math
import re
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import elbo
import estep
from elbo import ACTION, FORCED, FREE, LATENT, PROMPT, Program, Trace
from model import GPT, Encoding, load_pretrained

HEAD = """| writer | lines | nats: without | with | another's | gain | another's gain | own over another's |
|---|---|---|---|---|---|---|---|"""

DRAWS = 16
BOUNDS = f"""
| log p of a program, nats | without | K = 1 | K = 4 | K = {DRAWS} | another's, K = {DRAWS} |
|---|---|---|---|---|---|"""


def compare_versions(judge: GPT, enc, programs: list[Program], infused: list[Trace], seed) -> list[Tensor]:
    """Nats of the n lines with a rationale: without it, with it, with another's, (3, n) per program.

    seed: of the choice of others' rationales. A program too long with these is left out.
    """
    openers = elbo.opener_mask(enc).to(judge.device)
    swapped, out = swap_rationales(enc, programs, infused, seed), []
    for program, own, other in zip(programs, infused, swapped):
        if len(other.tokens) <= judge.limit:
            versions = (program.trace(), own, other)
            nats = [line_nats(judge, version, openers) for version in versions]
            out.append(torch.stack(nats)[:, own.thinks()])                           # (3, L) -> (3, n)
    return out


@torch.no_grad()
def line_nats(judge: GPT, trace: Trace, openers: Tensor) -> Tensor:
    """-log pi(a_t | s_t, z_t) of every line, given its gate, in nats: (L,)."""
    batch = elbo.collate([trace], judge.device)
    _, token = elbo.score(elbo.logits_of(judge, batch), batch, openers)              # (1, T-1)
    log_pi = elbo.by_line(elbo.log_pi(token, batch), batch, len(trace.thinks()))     # (1, L)
    return -log_pi[0].cpu()


def mean_over_programs(values: list[Tensor]) -> tuple[float, float]:
    """The mean of all lines' values, and its standard error over programs. values: one (n,) per program.

    Lines of one program share its rationales, so they do not count as independent. Of one program it is nan.
    """
    lines = torch.cat(values)
    mean = lines.mean()
    sums = torch.tensor([(x - mean).sum() for x in values if len(x)])
    error = sums.std() * len(sums) ** 0.5 / len(lines)
    return mean.item(), error.item()


def swap_rationales(enc, programs: list[Program], infused: list[Trace], seed) -> list[Trace]:
    """The control: the same programs, thinking before the same lines, each rationale one of another program.

    Its comments get the indentation of their new place. A program keeps its own if no other has any.
    """
    said = [tokens_by_line(trace, LATENT) for trace in infused]
    rng, out = np.random.default_rng(seed), []
    for program, own in zip(programs, said):
        others = [tokens for other in said if other is not own for tokens in other.values()]
        others = others or list(own.values())
        out.append(Trace())
        out[-1].add(program.prompt, PROMPT)
        for t, line in enumerate(program.lines):
            drawn = others[rng.integers(len(others))] if t in own else []
            for comment in re.findall("#.*", enc.decode(drawn)):
                out[-1].add(elbo.rationale(enc, program, t, comment), LATENT, t, FORCED)
            out[-1].add(line, ACTION, t, FREE)
    return out


def rebuild_program(enc, trace: Trace) -> Program:
    """The expert's program of an infused one, as `elbo.parse` had made it."""
    [prompt] = tokens_by_line(trace, PROMPT).values()
    lines = list(tokens_by_line(trace, ACTION).values())
    # What stands before a line ends at its decision point, inside its indentation.
    before = map(enc.decode, [prompt, *lines[:-1]])
    closings = ["\n" + re.search(r"[ \t\f]*\Z", text)[0] for text in before]
    return Program(prompt, lines, closings)


def tokens_by_line(trace: Trace, kind: int) -> dict[int, list[int]]:
    out = defaultdict(list)
    for token, k, line in zip(trace.tokens, trace.kind, trace.line):
        if k == kind:
            out[line].append(token)
    return out


def infuse(model: GPT, enc, programs: list[Program], settings: dict, draws: int) -> list[list[Trace]]:
    """Draws of the programs with the model's rationales, the first with the seeds of train.py's draw by q."""
    names = ("rationales", "max_rationale", "max_comments")
    cfg = estep.EStepConfig(**{name: settings[name] for name in names})
    purpose, openers = zlib.crc32(b"infuse heldout"), elbo.opener_mask(enc)
    numbers = [[i, *[k] * bool(k)] for k in range(draws) for i in range(len(programs))]
    seeds = [[settings["seed"], purpose, *number] for number in numbers]
    traces = estep.rollout(model, enc, programs * draws, seeds, openers, cfg, settings["sample_batch"])
    return elbo.chunks([estep.without_broken(trace) for trace in traces], len(programs))


def bounds(model: GPT, enc, programs: list[Program], draws: list[list[Trace]], seed) -> list[Tensor]:
    """log p of each program's actions by the model, in nats, (P,) each: without rationales; the bound

        log p(a) >= E log 1/K sum_k prod_t pi(a_t | s_t, z_t^k)          (Burda et al., arXiv 1509.00519)

    by K = 1, 4 and all 16 draws of its own rationales; by all, each rationale one of another program. K = 1
    is J of Theorem 3.1 with p(z) = q(z). It grows with K where some draws tell what most do not.
    """
    openers = elbo.opener_mask(enc).to(model.device)

    def log_p(traces: list[Trace]) -> Tensor:                                        # (P,)
        return torch.stack([-line_nats(model, trace, openers).sum() for trace in traces])

    def bound(log_p: Tensor, k: int) -> Tensor:                                      # (P, DRAWS) -> (P,)
        return (log_p.unflatten(1, (-1, k)).logsumexp(2) - math.log(k)).mean(1)
    others = [swap_rationales(enc, programs, draw, [*seed, k]) for k, draw in enumerate(draws)]
    own, other = (torch.stack(list(map(log_p, some)), 1) for some in (draws, others))         # (P, DRAWS)
    plain = log_p([program.trace() for program in programs])
    return [plain, bound(own, 1), bound(own, 4), bound(own, DRAWS), bound(other, DRAWS)]


def table_row(writer: str, nats: list[Tensor]) -> str:
    """Means ± standard errors, in nats per line, of what `compare_versions` returns."""
    without, own, other = zip(*nats)
    cells = [writer, str(sum(map(len, own)))]
    cells += [f"{torch.cat(version).mean():.3f}" for version in (without, own, other)]
    for worse, better in ((without, own), (without, other), (other, own)):
        mean, error = mean_over_programs([a - b for a, b in zip(worse, better)])
        cells.append(f"{mean:+.3f} ± {error:.3f}")
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path, help="folder of a run whose E-step is done")
    ap.add_argument("--by", nargs="+", default=[], metavar="MODEL",
                    help="start, a model of the run, or a folder: its own rationales, judged by itself")
    ap.add_argument("--bound", action="store_true", help=f"log p by {DRAWS} draws of each of those models")
    ap.add_argument("--limit", type=int, help="only the first so many programs")
    args = ap.parse_args(argv)
    settings = json.loads((args.run / "config.json").read_text())["settings"]
    infused = [Trace(**json.loads(line)) for line in (args.run / "infused.jsonl").open()][:args.limit]
    start = args.run / "warm" if settings["warm_steps"] else settings["model"]

    def load(name) -> tuple[GPT, Encoding]:
        model, enc = load_pretrained(name, "cuda" if torch.cuda.is_available() else "cpu")
        model.limit = min(settings["context"], model.limit)
        return model, enc
    seed, rows = [settings["seed"], zlib.crc32(b"shuffled")], []
    judge, enc = load(start)
    programs = [rebuild_program(enc, trace) for trace in infused]
    print(HEAD, table_row("q", compare_versions(judge, enc, programs, infused, seed)), sep="\n")
    for name in args.by:
        own = args.run / name
        judge, enc = load(start if name == "start" else own if own.exists() else name)
        draws = infuse(judge, enc, programs, settings, DRAWS if args.bound else 1)
        print(table_row(name, compare_versions(judge, enc, programs, draws[0], seed)), flush=True)
        if args.bound:
            columns = bounds(judge, enc, programs, draws, seed)
            cells = ["{:.2f} ± {:.2f}".format(*mean_over_programs(list(x[:, None]))) for x in columns]
            rows.append("| " + " | ".join([name, *cells]) + " |")
    if rows:
        print(BOUNDS, *rows, sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"gain.py: {e}")
