"""Tables and figures of one or more runs, drawn from their folders alone.

    python docs/report.py runs/main0                       # one run: into its own folder
    python docs/report.py runs/main?                       # five seeds: mean ± standard error
    python docs/report.py runs/main0 runs/c0.2 --out out   # different settings, side by side

Runs whose settings differ in their seed alone make a group. The first run's group is the reference; others
are called by the flags in which they differ from it. What a run has not logged, being unfinished or without
such a phase, is left out. Figures show the arms of one group or, of several groups, the RA3 of each.

Ends with the scores, the place of report.md, and one line of JSON. Shares are in percent everywhere.
"""
import argparse
import json
import re
import shlex
import sys
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from elbo import ACTION, LATENT, PROMPT, Trace
from model import load_tokenizer
from train import CURVE_PROBLEMS, MAY_CHANGE

# The rows of tables: {key of a record: title}.
ARMS = {
    "eval/cold": "base before its warm-up",
    "eval/base": "base",
    "eval/ntp": "NTP",
    "eval/ntp-long": "NTP, RA3's compute",
    "eval/ra3": "RA3",
    "eval/rlvr-base": "base + RLVR",
    "eval/rlvr-ntp": "NTP + RLVR",
    "eval/rlvr-ra3": "RA3 + RLVR",
}
DIFFERENCES = {"ra3-base": "RA3 - base", "ra3-ntp": "RA3 - NTP", "ra3-ntp-long": "RA3 - NTP, RA3's compute"}
# Their columns: {number of a record: title}, in percent where FORMATS names nothing else.
SCORES = {"greedy": "greedy pass@1", "pass@1": "pass@1 (T=1)", "pass@5": "pass@5 (T=1)"}
SCORES |= {"hard": "longer problems, pass@1 (T=1)", "nll": "nats per action token"}
RATES = {"think": "lines", "think_needed": "steps with a constant to work out", "think_other": "other steps"}
COST = {"seconds": "seconds", "tokens": "tokens through the model (in training: three times)"}
COST |= {"peak_gb": "GB so far, at most (GPU; without one, the process)"}
FORMATS = {"reward": ".2f", "uplift": ".2f", "nll": ".4f",
           "seconds": ".0f", "tokens": ",.0f", "peak_gb": ".2f"}
# {heading: (note, {file: (title, number, phases with RA3's last)})}; a note's braces: settings, numbers.
MID, RLVR = ["ntp", "ntp-long", "ra3"], ["rlvr-base", "rlvr-ntp", "rlvr-ra3"]
FIGURES = {
    "Figure 1: the E-step": ("Each point: {e_programs} training programs, {e_rollouts} versions of each.", {
        "estep_reward": ("reward, nats per line", "reward", ["estep"]),
        "estep_think": ("lines with a rationale", "think", ["estep"]),
        "estep_uplift": ("return with a rationale less without, nats", "uplift", ["estep"]),
    }),
    "Figures 3 and 4: the M-step": (
        "Cross-entropy on {programs} held-out programs, accuracy on the first {curve} held-out problems. One "
        "network plays q and pi, so RA3's M-step goes on from q: its curves begin where the E-step has "
        "ended, with q's rationales before the lines; NTP's begin at the base, without.", {
            "mstep_nll": ("nats per held-out action token", "nll", MID),
            "mid_accuracy": ("greedy pass@1 in mid-training", "greedy", MID),
        }),
    "Figure 5: RLVR": ("Accuracy on {rl_curve} held-out problems.", {
        "rlvr": ("greedy pass@1 in RLVR", "greedy", RLVR),
        "rlvr_sampled": ("pass@1 (T=1) in RLVR", "pass@1", RLVR),
    }),
}
# Which lines of the world are part of a step with a constant to be worked out, and which are another step.
STEPS = {"think_needed": r".* N|out = \[\]", "think_other": r"xs = (?!out$|.* N)"}
# The panels of figure 6, which lays groups side by side: {title: (key of the record, numbers)}.
PANELS = {
    "percent solved by RA3": ("eval/ra3", {"greedy": "greedy", "pass@1": "T = 1"}),
    "rationales per 100 steps": ("infused", {"think_needed": "with a constant", "think_other": "others"}),
}
COLOURS = {"base": "tab:gray", "ntp": "tab:blue", "ntp-long": "tab:cyan", "ra3": "tab:red",
           "estep": "tab:red"}
ORIGIN = ["seed", "commit", "python", "torch", "cpus", "gpu"]
# Settings that change no arm's result, or only by the draws.
NOT_COMPARED = MAY_CHANGE | {"seed", "arms"}


@dataclass
class Run:
    """The folder of one run, read."""
    folder: Path
    config: dict                   # settings, commit, versions
    records: dict                  # {key: numbers}, such as eval/ra3 and cost/estep
    curves: dict                   # {(phase, number): {updates done: value}}

    @cached_property
    def enc(self):
        return load_tokenizer(next(self.folder.glob("*/tokenizer.json")).parent)

    def infused(self) -> list[Trace]:
        """The held-out programs with q's rationales, of the last round."""
        files = sorted(self.folder.glob("infused*.jsonl"), key=lambda file: (len(file.name), file.name))
        return [Trace(**json.loads(line)) for file in files[-1:] for line in file.open()]


def read_run(folder: Path) -> Run:
    """Raises ValueError if the folder holds no run."""
    run = Run(folder, {}, defaultdict(dict), defaultdict(dict))
    try:
        run.config = json.loads((folder / "config.json").read_text())
        # The last line may still be in writing.
        log = re.findall(r".*\n", (folder / "metrics.jsonl").read_text())
        records = [json.loads(line) for line in log]
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder} holds no run that can be read: {e}") from None
    done: Counter = Counter()                      # updates of a phase, its rounds one behind the other
    for record in records:
        run.records[record.get("key", "")].update(record)
        phase = record.get("phase", "").partition(".")[0]
        for name, value in record.items():
            if value is not None:
                run.curves[phase, name][done[phase]] = value
        if "nll" in record:
            run.records["eval/" + phase]["nll"] = record["nll"]
        done[phase] += "grad_norm" in record       # other records stand between updates
    ra3 = run.records["eval/ra3"]
    for key in DIFFERENCES:
        other = run.records[key.replace("ra3-", "eval/")]
        both = [name for name in SCORES if name in ra3 and name in other]
        run.records[key] = {name: ra3[name] - other[name] for name in both}
    return run


def group_by_settings(runs: list[Run]) -> dict[str, list[Run]]:
    """{flags unlike the first run's: runs that have them}. Raises ValueError where a seed stands twice."""
    groups = defaultdict(list)
    for run in runs:
        settings, reference = run.config["settings"], runs[0].config["settings"]
        changed = [name for name in settings.keys() - NOT_COMPARED if settings[name] != reference.get(name)]
        label = " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in sorted(changed))
        if settings["seed"] in [other.config["settings"]["seed"] for other in groups[label]]:
            raise ValueError(f"{run.folder}: another of the runs has its settings and its seed")
        groups[label].append(run)
    return groups


def text_of(enc, trace: Trace, kinds: tuple, lines) -> str:
    """The text of the trace's tokens of these kinds and lines."""
    places = zip(trace.tokens, trace.kind, trace.line)
    text = enc.decode([token for token, kind, line in places if kind in kinds and line in lines])
    special = "|".join(map(re.escape, enc._special_tokens))
    return re.sub(special, "", text).rstrip()


def count_forms(run: Run) -> list[list]:
    """Rows of line (constants written N), number, share with a rationale; the RATES become a record."""
    places, thinks, world = Counter(), Counter(), run.config["settings"]["benchmark"] == "world"
    for trace in run.infused():
        for t, rationale in enumerate(trace.thinks()):
            first = text_of(run.enc, trace, (ACTION,), [t]).strip().partition("\n")[0]
            form = re.sub(r"(?<=x [-+<>] )\d+", "N", first)
            steps = [name for name, pattern in STEPS.items() if world and re.match(pattern, form)]
            thinks.update(["think", f"`{form}`", *steps] if rationale else [])
            # A loop is one step: a rationale may stand before its first line, or before the `if`.
            places.update(["think", f"`{form}`", *([] if form.startswith("if ") else steps)])
    share = {name: thinks[name] / n for name, n in places.items()}
    run.records["infused"] = {name: share[name] for name in RATES if name in share}
    commonest = [name for name, _ in places.most_common() if name not in RATES]
    return [[name, places[name], f"{share[name]:.0%}"] for name in commonest[:20]]


def shown(values: list, spec: str) -> str:
    """Mean ± standard error; nothing of no values."""
    if len(values) < 2:
        return "".join(format(value, spec) for value in values)
    return f"{mean(values):{spec}} ± {standard_error(values):{spec}}"


def standard_error(values: list) -> float:
    """Of the mean; 0 where there are fewer than two."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def table(head: list, rows: list[list]) -> list[str]:
    """A table in Markdown, or nothing of no rows."""
    rows = rows and [head, ["---"] * len(head), *rows]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return ["", *lines, ""] if rows else []


def summary(first: str, rows: dict, columns: dict, groups: dict, numbers: dict):
    """A table of means over each group's runs, which are put into `numbers` too."""
    body = []
    for label, runs in groups.items():
        for key, title in rows.items():
            records = [run.records[key] for run in runs]
            found = {name: [record[name] for record in records if name in record] for name in columns}
            if any(found.values()):
                cells = [shown(values, FORMATS.get(name, ".1%")) for name, values in found.items()]
                body.append([f"{title} {label}".strip(), *cells, max(map(len, found.values()))])
                means = {name: mean(values) for name, values in found.items() if values}
                means = {name: round(x if name in FORMATS else 100 * x, 4) for name, x in means.items()}
                numbers[f"{key} {label}".strip().removeprefix("eval/")] = means
    return table([first, *columns.values(), "runs"], body)


def figure(file: Path, groups: dict, title: str, name: str, phases: list) -> str:
    """Curves, mean and standard error over runs; returns the figure in Markdown, or nothing of no curves."""
    ax = Figure(figsize=(5, 3.4), layout="constrained").subplots()
    for i, (label, runs) in enumerate(groups.items()):
        for phase in phases if len(groups) == 1 else phases[-1:]:
            curves = [run.curves[phase, name] for run in runs if run.curves[phase, name]]
            if curves:
                steps = sorted(set.intersection(*map(set, curves)))                  # that all have logged
                values = np.array([[curve[step] for step in steps] for curve in curves])         # (runs, n)
                error = values.std(0, ddof=len(curves) > 1) / len(curves) ** 0.5
                colour = COLOURS[phase.removeprefix("rlvr-")] if len(groups) == 1 else f"C{i + 3}"  # C3: red
                arm = ARMS.get("eval/" + phase, "RA3")
                ax.errorbar(steps, values.mean(0), error, color=colour, label=f"{arm} {label}")
    if not ax.lines:
        return ""
    ax.set(xlabel="updates", title=title)
    ax.yaxis.set_major_formatter(f"{{x:{FORMATS.get(name, '.0%')}}}")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    ax.figure.savefig(file, dpi=130)
    return f"![{title}]({file.name})"


def side_by_side(file: Path, groups: dict) -> str:
    """A picture of several groups, one above the other: means and standard errors over their runs."""
    fig = Figure(figsize=(9, 1.2 + 0.3 * len(groups)), layout="constrained")
    for ax, (title, (key, names)) in zip(fig.subplots(1, 2, sharey=True), PANELS.items()):
        for name, label in names.items():
            for y, runs in enumerate(groups.values()):
                found = [100 * run.records[key][name] for run in runs if name in run.records[key]]
                how = dict(color=f"C{list(names).index(name)}", label=None if y else label)
                ax.errorbar(mean(found or [np.nan]), y, xerr=standard_error(found), fmt="o", **how)
        ax.set(title=title, yticks=range(len(groups)), yticklabels=[label or "default" for label in groups])
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    fig.axes[0].invert_yaxis()
    fig.savefig(file, dpi=130)
    return f"![settings side by side]({file.name})"


def programs(run: Run, n: int) -> list[str]:
    """n held-out programs, each as the expert wrote it and as q infused it."""
    text = []
    for trace in run.infused()[:n]:
        for kinds in ((PROMPT, ACTION), (PROMPT, ACTION, LATENT)):
            text += ["```python", text_of(run.enc, trace, kinds, trace.line), "```", ""]
    return text


def describe_runs(runs: list[Run]) -> list[str]:
    """Where and with what each run was made; the command that makes the first again."""
    rows, settings = [], runs[0].config["settings"]
    for run in runs:
        known = run.config | run.config["settings"]
        rows.append([run.folder, *(str(known.get(name)).partition(" (")[0] for name in ORIGIN)])
    flags = [(f"--{name.replace('_', '-')}", str(settings[name])) for name in settings]
    flags = [shlex.join(flag) for flag in flags if flag[0] not in ("--name", "--resume")]
    command = textwrap.fill(" ".join(["python train.py", *flags]), 100, break_on_hyphens=False)
    return [*table(["run", *ORIGIN], rows), "```", command.replace("\n", " \\\n    "), "```"]


def write_report(runs: list[Run], out: Path) -> dict:
    """Write report.md and its figures, print the scores; returns the main numbers."""
    groups, numbers, first = group_by_settings(runs), {}, runs[0]
    forms = [count_forms(run) for run in runs][0]
    stages = {key: key.removeprefix("cost/") for key in first.records if key.startswith("cost/")}
    problems = first.records["eval/base"].get("problems", first.config["settings"]["eval_problems"])
    counts = dict(curve=min(CURVE_PROBLEMS, problems), programs=len(first.infused()) or "the")
    counts["rl_curve"] = max(first.curves["rlvr-base", "problems"].values(), default=counts["curve"])
    scores = summary("model", ARMS, SCORES, groups, numbers)
    sections = {"Scores": [f"Held-out problems: {problems}. Means ± standard errors over runs.", *scores]}
    sections["Differences in points"] = summary("models", DIFFERENCES, SCORES, groups, numbers)
    for heading, (note, drawn) in FIGURES.items():
        drawn = [figure(out / f"{file}.png", groups, *how) for file, how in drawn.items()]
        note = note.format(**first.config["settings"], **counts)
        sections[heading] = [note, "", *drawn] if any(drawn) else []
    if len(groups) > 1:
        sections["Figure 6: settings side by side"] = [side_by_side(out / "settings.png", groups)]
    sections["Where q thinks: share of held-out lines with a rationale"] = [
        *summary("rationales by", {"infused": "q"}, RATES, groups, numbers),
        *table(["line", "lines", "with a rationale"], forms)]
    sections["Figure 2: programs before and after infusion"] = programs(first, 4)
    sections["Cost"] = summary("stage", stages, COST, groups, {})
    sections["Runs"] = describe_runs(runs)
    text = [f"# {', '.join(run.folder.name for run in runs)}"]
    for heading, body in sections.items():
        text += ["", f"## {heading}", "", *body] if any(body) else []
    (out / "report.md").write_text("\n".join(text) + "\n")
    print(*scores, f"{out / 'report.md'}: tables and figures", sep="\n")
    return numbers


def main(argv: list[str] | None = None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    ap.add_argument("--out", type=Path, help="where to write; default: the only run, or report-... beside")
    args = ap.parse_args(argv)
    runs, out = [read_run(folder) for folder in args.runs], args.out
    if not out:
        names = "-".join(["report", *(run.folder.name for run in runs)])
        out = runs[0].folder if len(runs) == 1 else runs[0].folder.parent / names
    out.mkdir(parents=True, exist_ok=True)
    numbers = write_report(runs, out)
    seeds = sorted({run.config["settings"]["seed"] for run in runs})
    print(json.dumps({"runs": [str(run.folder) for run in runs], "seeds": seeds, **numbers}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"report.py: {e}")
