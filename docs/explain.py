"""One held-out program through the whole method: in the terminal, and as a page of HTML without a server.

    python docs/explain.py                                  # the shipped base is q and pi
    python docs/explain.py runs/main0 --problem 3           # q has learnt; pi is the model it began as

q writes K versions of the program. Beside each line t of a version stand

    think       q's probability of a rationale at the line's first decision point
    without     log pi(a_t | s_t) in nats, no rationale standing anywhere in the program
    with        log pi(a_t | s_t, z_t), this version's rationales standing where they do
    M-step      the same by RA3's model after its M-step, where the run has come so far
    reward      r_t: `with`, less the prices (`elbo.line_rewards`)
    return      G_t, the discounted rewards of the next lines (`estep.returns`)
    advantage   G_t less the mean of the other versions' (`estep.advantages`): moves the rationale's tokens
    weight      the version's in this piece of the posterior (`estep.posterior`): moves the gates
    text        log q of the rationale's tokens, and `+` after one update on these versions (`estep.e_update`)
    gates       log q of the gates that q chose, and `+` after it

Where the advantage is positive, `text+` should be above `text`; where a weight is large, `gates+` above
`gates`. Of several rounds of a run the first is shown. Colours: the prompt is gray, what q wrote green, the
expert's code blue.
"""
import argparse
import copy
import html
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench
import elbo
import estep
from elbo import ACTION, FREE, Program, Trace
from model import GPT, load_pretrained

KINDS = ("prompt", "latent", "action")
ANSI = {"prompt": "90", "latent": "32", "action": "34"}
STYLE = """body { font: 15px sans-serif; margin: 2em } td, th { padding: 0 .6em; text-align: right }
td:last-child { font-family: monospace; white-space: pre; text-align: left; padding-left: 2em }
.prompt { color: gray } .latent { color: green; font-weight: bold } .action { color: navy }"""


@dataclass
class Row:
    """A line of text as it is printed: its pieces, each with a kind and a remark, and a line's numbers."""
    pieces: list[tuple[str, str, str]] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)


@torch.no_grad()
def measure(model: GPT, traces: list[Trace], openers: Tensor) -> dict:
    """Log-likelihoods of the traces: of tokens, (B, T - 1); by line, (B, L); of each line's opening gate."""
    batch = elbo.collate(traces, model.device)
    L = int(batch.line.max()) + 1
    gate, token = elbo.score(elbo.logits_of(model, batch), batch, openers)
    new_line = batch.line[:, 1:] != batch.line[:, :-1]
    first = new_line & (batch.gate[:, 1:] == FREE)             # q's choice at a line's first decision point
    opening, free = (elbo.by_line(x, batch, L) for x in (gate * first, first.float()))
    gates, text = elbo.log_q_parts(gate, token, batch)
    parts = dict(gates=gates, text=text, log_pi=elbo.log_pi(token, batch))                  # (B, T-1) each
    by_line = {name: elbo.by_line(values, batch, L) for name, values in parts.items()}
    tokens = sum(parts.values())                                                                 # (B, T-1)
    return dict(batch=batch, token=token, tokens=tokens, opening=opening, free=free > 0, **by_line)


def explain(models: dict[str, GPT], enc, program: Program, cfg: estep.EStepConfig, seed: int):
    """K versions of a program, log-likelihoods of their tokens (K, T - 1), and {column: numbers (K, L)}.

    models: pi, q, and RA3's after its M-step, if there is one.
    """
    q, pi, K, L = models["q"], models["pi"], cfg.e_rollouts, len(program.lines)
    openers = elbo.opener_mask(enc).to(q.device)
    seeds = [[seed, k] for k in range(K)]
    traces = estep.rollout(q, enc, [program] * K, seeds, openers, cfg)
    ours, theirs = measure(q, traces, openers), measure(pi, traces, openers)
    judged = estep.judge(traces, ours["batch"], theirs["token"], cfg)         # (K, L) each
    G = estep.returns(judged["reward"], cfg.horizon, cfg.gamma)                             # (K, L)
    chosen = ours["opening"].exp()
    opened = torch.where(judged["think"], chosen, 1 - chosen)                                         # (K, L)
    columns = {"think": opened.masked_fill(~ours["free"], torch.nan)}
    columns["without"] = measure(pi, [program.trace()], openers)["log_pi"].expand(K, L)
    columns["with"] = judged["loglik"]
    if "M-step" in models:
        columns["M-step"] = measure(models["M-step"], traces, openers)["log_pi"]
    columns |= {"reward": judged["reward"], "return": G, "advantage": estep.advantages(G[None])[0]}
    columns["weight"] = estep.posterior(judged["reward"][None], judged["think"][None])[0]
    updated = copy.deepcopy(q)
    optimizer = torch.optim.Adam(updated.parameters(), lr=cfg.e_lr)
    estep.e_update(updated, pi, optimizer, enc, openers, [program], seeds, cfg)             # the same draws
    after = measure(updated, traces, openers)
    for name in ("text", "gates"):
        columns |= {name: ours[name], f"{name}+": after[name]}
    return traces, ours["tokens"], columns


def total_gain(columns: dict[str, Tensor]) -> float:
    """Advantages times the gain of the text, and K weights times that of the gates, in nats per version."""
    text, gates = (columns[f"{name}+"] - columns[name] for name in ("text", "gates"))                 # (K, L)
    weight = estep.GATE * len(gates) * columns["weight"]                                              # (K, L)
    return (columns["advantage"] * text + weight * gates).sum(1).mean().item()


def rows_of(enc, trace: Trace, log_p: list[float], numbers: list[list[float]]) -> list[Row]:
    """The text of a trace, row by row; a line's numbers stand where its action begins."""
    rows, next_line, special = [Row()], 0, set(enc._special_tokens.values())
    for i, (token, kind, line) in enumerate(zip(trace.tokens, trace.kind, trace.line)):
        remark = f"log p = {log_p[i - 1]:.2f}" if kind else ""
        for n, text in enumerate("" if token in special else enc.decode([token]).split("\n")):
            rows += [Row()] if n else []
            rows[-1].pieces.append((text, KINDS[kind], remark))
            if kind == ACTION and line == next_line and text.strip():
                rows[-1].numbers, next_line = numbers[line], line + 1
    return rows


def shown(number: float, column: str) -> str:
    """Nothing of nan, where q had no choice."""
    text = format(round(number, 2) + 0.0, ".0%" if column == "think" else ".2f")           # no -0.00
    return text.replace("nan%", "")


def as_text(versions: list[list[Row]], columns: list[str], colours: bool) -> str:
    head, out = "".join(f"{name:>10}" for name in columns), []
    for k, rows in enumerate(versions):
        out += ["", f"version {k + 1}", head]
        for row in rows:
            cells = "".join(f"{shown(x, name):>10}" for x, name in zip(row.numbers, columns))
            code = [f"\033[{ANSI[kind]}m{text}\033[0m" if colours else text for text, kind, _ in row.pieces]
            out.append(f"{cells:{len(head)}}   {''.join(code)}".rstrip())
    return "\n".join(out)


def as_html(title: str, versions: list[list[Row]], columns: list[str]) -> str:
    """All versions as one page; a pointer on a token shows its likelihood."""
    out = ["<!doctype html>", "<meta charset='utf-8'>", f"<title>{html.escape(title)}</title>",
           f"<style>{STYLE}</style>", f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(__doc__)}</pre>"]
    for k, rows in enumerate(versions):
        out += [f"<h2>Version {k + 1}</h2>", "<table>", "<tr><th>" + "<th>".join([*columns, ""])]
        for row in rows:
            cells = [shown(x, name) for x, name in zip(row.numbers, columns)] or [""] * len(columns)
            spans = [f"<span class='{kind}' title='{remark}'>{html.escape(text)}</span>"
                     for text, kind, remark in row.pieces]
            out.append("<tr><td>" + "<td>".join([*cells, "".join(spans)]))
        out.append("</table>")
    return "\n".join(out) + "\n"


def read_run(run: Path | None) -> tuple[dict, estep.EStepConfig, dict]:
    """Where the models are, the E-step's settings, the run's. Raises OSError or ValueError if it has none."""
    base, cfg = ROOT / "base", estep.EStepConfig()
    if run is None:
        return dict(pi=base, q=base), cfg, dict(benchmark="world", context=2 ** 20)
    settings = json.loads((run / "config.json").read_text())["settings"]
    known = {name: settings.get(name, default) for name, default in vars(cfg).items()}
    known |= {name: float("inf") for name, value in known.items() if value == "inf"}
    start = base if settings["model"] == "base" else settings["model"]
    folders = dict(pi=run / "warm" if settings["warm_steps"] else start, q=run / "estep")
    if (run / "ra3").exists():
        folders["M-step"] = run / "ra3"
    return folders, estep.EStepConfig(**known), settings


def held_out(settings: dict, i: int) -> bench.Problem:
    """Problem i, from 0, of those that a run is evaluated on. Raises ValueError if there is none."""
    name = settings["benchmark"]
    found = (bench.world("eval", i + 1, seed=0) if name == "world" else
             bench.load(name, settings["data_dir"] or None, limit=i + 1))
    if len(found) != i + 1 or not found:
        raise ValueError(f"--problem {i}: {name} has no such problem")
    return found[i]


def main(argv: list[str] | None = None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", nargs="?", type=Path, help="folder of a run whose E-step is done")
    ap.add_argument("--problem", type=int, default=0, help="which of the held-out problems")
    ap.add_argument("--out", type=Path, help="the page; default: explain.html in the run's folder or runs/")
    args = ap.parse_args(argv)
    folders, cfg, settings = read_run(args.run)
    device, models = "cuda" if torch.cuda.is_available() else "cpu", {}
    for name, folder in folders.items():
        models[name], enc = load_pretrained(folder, device)
        models[name].limit = min(settings["context"], models[name].limit)
    problem = held_out(settings, args.problem)
    program = elbo.parse(enc, problem.prompt, problem.solution, models["q"].config.eos_id)
    traces, log_p, columns = explain(models, enc, program, cfg, args.problem)
    numbers = torch.stack(list(columns.values()), -1).tolist()                              # (K, L, columns)
    versions = [rows_of(enc, *version) for version in zip(traces, log_p.tolist(), numbers)]
    title = f"{problem.id}, as {args.run or 'the base'} infuses it"
    out = args.out or (args.run or Path("runs")) / "explain.html"
    out.parent.mkdir(exist_ok=True)
    out.write_text(as_html(title, versions, list(columns)), encoding="utf-8")
    print(title, as_text(versions, list(columns), sys.stdout.isatty()), "", sep="\n")
    print(f"The update gained {total_gain(columns):+.4f} nats of its objective a version. Page: {out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"explain.py: {e}")
