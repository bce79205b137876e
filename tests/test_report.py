"""docs/report.py on small run folders written here: every number recomputed by hand."""
import importlib.util
import json
import math
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.axes import Axes

import elbo
import train
from model import load_tokenizer

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("report", ROOT / "docs/report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
ENC = load_tokenizer(ROOT / "base")
SETTINGS = train.Settings().flat() | {"arms": "ra3,ntp"}
SCORES = {"greedy": 0.5, "pass@1": 0.4, "pass@5": 0.6, "problems": 72}


def evaluation(arm: str, **scores) -> dict:
    return {"key": f"eval/{arm}", **SCORES, **scores}


def mid_training(arm: str, nll: list[float], updates: int = 2) -> list[dict]:
    """A probe before every `updates` updates, and one at the end, as train.py logs them."""
    log = []
    for i, value in enumerate(nll):
        log.append({"phase": arm, "step": i * updates, "nll": value, "greedy": value / 2})
        if i + 1 < len(nll):
            steps = range(i * updates, (i + 1) * updates)
            log += [{"phase": arm, "step": step, "loss": 1.0, "grad_norm": 1.0} for step in steps]
    return log


def write_run(folder: Path, log: list[dict], traces=(), **settings) -> Path:
    folder.mkdir(parents=True)
    config = {"settings": SETTINGS | settings, "unfit": {}, "commit": "abc123",
              "python": "3.11.7 (main, May  9)", "torch": "2.13", "cpus": 2, "gpu": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    if traces:
        lines = [json.dumps(asdict(trace) | {"broken": []}) + "\n" for trace in traces]
        (folder / "infused.jsonl").write_text("".join(lines))
        (folder / "ra3").mkdir()
        shutil.copy(ROOT / "base/tokenizer.json", folder / "ra3")
    return folder


def infuse(solution: str, comments: dict[int, str]) -> elbo.Trace:
    """A program of the world with these comments before these lines."""
    program = elbo.parse(ENC, "def f(xs):\n    \"\"\"task\"\"\"\n   ", solution, ENC.eot_token)
    trace = elbo.Trace()
    trace.add(program.prompt, elbo.PROMPT)
    for t, line in enumerate(program.lines):
        if t in comments:
            trace.add(elbo.rationale(ENC, program, t, comments[t]), elbo.LATENT, t)
        trace.add(line, elbo.ACTION, t)
    return trace


def run_report(capsys, *folders: Path, out: Path | None = None) -> tuple[dict, str, str]:
    """The numbers, report.md, and what was printed."""
    report.main([*map(str, folders), *(["--out", str(out)] if out else [])])
    printed = capsys.readouterr().out
    where = Path(printed.splitlines()[-2].partition(":")[0])
    return json.loads(printed.splitlines()[-1]), where.read_text(), printed


PROGRAM = """ xs = [x + 3 for x in xs]
    out = []
    for x in xs:
        if x > 4:
            out.append(x)
    xs = out
    xs = sorted(xs)
    xs = [x - 2 for x in xs]
    return xs
"""


@pytest.fixture
def whole(tmp_path):
    log = []
    for i in range(3):
        stats = {"reward": 0.1 * i, "think": 0.1 * i, "uplift": 0.2, "grad_norm": 1}
        log.append({"phase": "estep", "step": i, **stats})
    log += [{"key": "cost/estep", "seconds": 12.4, "tokens": 1234567, "peak_gb": 0.0}]
    for arm, end in (("ra3", 0.02), ("ntp", 0.1), ("ntp-long", 0.08)):
        log += mid_training(arm, [0.3, end])
    log += [evaluation("base"), evaluation("ra3", greedy=0.875)]
    log += [evaluation("ntp", greedy=0.75), evaluation("ntp-long")]
    for arm in ("base", "ntp", "ra3"):
        log += [{"phase": f"rlvr-{arm}", "step": 0, "greedy": 0.5},
                {"phase": f"rlvr-{arm}", "step": 0, "reward": 0.4, "grad_norm": 1},
                {"phase": f"rlvr-{arm}", "step": 1, "greedy": 0.6}, evaluation(f"rlvr-{arm}")]
    traces = [infuse(PROGRAM, {0: "# 1 + 2 = 3", 3: "# 2 + 2 = 4"}), infuse(PROGRAM, {6: "# sort"})]
    return write_run(tmp_path / "main0", log, traces)


def test_one_run_is_shown_in_its_own_folder_with_all_figures(whole, capsys):
    numbers, text, printed = run_report(capsys, whole)
    assert "| RA3 | 87.5% | 40.0% | 60.0% |  | 0.0200 | 1 |" in printed and "| RA3 + RLVR | 50.0%" in printed
    for part in ("Figure 1", "Figure 2", "Figures 3 and 4", "Figure 5", "Cost", "Held-out problems: 72."):
        assert part in text
    assert f"| {whole} | 0 | abc123 | 3.11.7 | 2.13 | 2 | None |" in text
    command = text.split("```\n")[-2].replace("\\\n", " ")
    config = json.loads((whole / "config.json").read_text())
    assert train.parse_flags(shlex.split(command)[2:]).flat() == config["settings"]
    for figure in ("estep_reward", "estep_think", "estep_uplift", "mstep_nll", "mid_accuracy", "rlvr"):
        assert (whole / f"{figure}.png").stat().st_size > 1000 and f"({figure}.png)" in text
    assert numbers["ra3"] == {"greedy": 87.5, "pass@1": 40, "pass@5": 60, "nll": 0.02}
    assert numbers["ra3-ntp"] == pytest.approx({"greedy": 12.5, "pass@1": 0, "pass@5": 0, "nll": -0.08})
    assert numbers["seeds"] == [0] and numbers["runs"] == [str(whole)]
    assert "| estep | 12 | 1,234,567 |" in text


def test_rationales_are_counted_per_line_and_per_step_of_which_a_loop_is_one(whole, capsys):
    numbers, text, _ = run_report(capsys, whole)
    # Two programs of 9 lines; each has three steps with a constant (add, the loop, subtract) and one without.
    rates = {"think": 300 / 18, "think_needed": 200 / 6, "think_other": 100 / 2}
    assert numbers["infused"] == pytest.approx(rates, abs=1e-4)
    assert "| `xs = [x + N for x in xs]` | 2 | 50% |" in text and "| `return xs` | 2 | 0% |" in text
    assert "| `out = []` | 2 | 0% |" in text and "| `if x > N:` | 2 | 50% |" in text


def test_steps_are_those_of_the_world_alone(whole, capsys):
    config = json.loads((whole / "config.json").read_text())
    config["settings"]["benchmark"] = "mbpp"
    (whole / "config.json").write_text(json.dumps(config))
    assert run_report(capsys, whole)[0]["infused"].keys() == {"think"}


def test_programs_stand_before_and_after_infusion_without_special_tokens(whole, capsys):
    _, text, _ = run_report(capsys, whole)
    first, second = text.split("```python\n")[1:3]
    assert first.startswith('def f(xs):\n    """task"""\n    xs = [x + 3') and "#" not in first
    assert "    # 1 + 2 = 3\n    xs = [x + 3" in second and "        # 2 + 2 = 4\n        if x > 4:" in second
    assert "<|endoftext|>" not in text


def test_of_several_rounds_curves_follow_one_another_and_the_last_infusion_counts(tmp_path, capsys):
    log = mid_training("ra3", [0.3, 0.2]) + mid_training("ra3.2", [0.15, 0.1])
    folder = write_run(tmp_path / "r", log, [infuse(PROGRAM, {})])
    second = asdict(infuse(PROGRAM, {0: "# x"})) | {"broken": []}
    (folder / "infused.2.jsonl").write_text(json.dumps(second) + "\n")
    assert report.read_run(folder).curves["ra3", "nll"] == {0: 0.3, 2: 0.15, 4: 0.1}
    numbers, _, _ = run_report(capsys, folder)
    assert numbers["ra3"] == {"nll": 0.1} and numbers["infused"]["think"] == pytest.approx(100 / 9, abs=1e-4)


def test_seeds_are_one_group_and_differences_are_taken_within_a_run(tmp_path, capsys):
    ra3, ntp = [0.9, 1.0, 0.8], [0.5, 0.7, 0.3]
    folders = []
    for i, (a, b) in enumerate(zip(ra3, ntp)):
        log = [evaluation("ra3", greedy=a), evaluation("ntp", greedy=b)]
        no_matter = {"micro_batch": i + 1, "arms": "ra3,ntp" + i * ",ntp-long"}
        folders.append(write_run(tmp_path / f"s{i}", log, seed=i, **no_matter))
    numbers, text, printed = run_report(capsys, *folders)
    assert (tmp_path / "report-s0-s1-s2/report.md").exists() and numbers["seeds"] == [0, 1, 2]
    error = 100 * math.sqrt(0.02 / 2 / 3)                       # deviations 0, 0.1, -0.1; n - 1 = 2; n = 3
    assert f"| RA3 | 90.0% ± {error:.1f}% | 40.0% ± 0.0% " in printed
    # Gaps of 0.4, 0.3 and 0.5: less spread than either arm's own.
    assert numbers["ra3-ntp"]["greedy"] == pytest.approx(40)
    assert f"| RA3 - NTP | 40.0% ± {error:.1f}%" in text


def test_settings_that_differ_make_groups_named_by_their_flags(tmp_path, capsys):
    log = [*mid_training("ra3", [0.3, 0.1]), evaluation("ra3")]
    runs = [write_run(tmp_path / "a", log), write_run(tmp_path / "b", log, seed=1)]
    runs += [write_run(tmp_path / "h", [evaluation("ra3", greedy=0.25)], horizon=1)]
    runs += [write_run(tmp_path / "n", [evaluation("ra3", greedy=0.125)], c="inf", horizon=1)]
    numbers, text, printed = run_report(capsys, *runs, out=tmp_path / "out")
    assert "| RA3 | 50.0% ± 0.0% " in printed and "| RA3 --horizon 1 | 25.0% " in printed
    assert numbers["ra3 --c inf --horizon 1"]["greedy"] == 12.5 and numbers["ra3"]["greedy"] == 50
    assert (tmp_path / "out/mstep_nll.png").exists() and "Figure 5" not in text


def test_several_settings_stand_in_one_picture_with_means_and_errors(tmp_path, capsys, monkeypatch):
    drawn = {}

    def errorbar(ax, x, y, xerr, label, **how):
        drawn[ax.get_title() or len(ax.figure.axes), len(drawn)] = [x, y, xerr, label]
    runs = [write_run(tmp_path / f"c{c}s{s}", [evaluation("ra3", greedy=0.5 + c + s / 10)], c=c, seed=s) for c in (0.1, 0.2) for s in (0, 2)]
    run_report(capsys, *runs, out=tmp_path / "out")
    assert (tmp_path / "out/settings.png").exists() and "![settings side by side]" in (tmp_path / "out/report.md").read_text()
    monkeypatch.setattr(Axes, "errorbar", errorbar)
    groups = report.group_by_settings([report.read_run(run) for run in runs])
    report.side_by_side(tmp_path / "x.png", groups)
    first, second = list(drawn.values())[:2]
    assert first == pytest.approx([70.0, 0, 10.0, "greedy"]) and second == pytest.approx([80.0, 1, 10.0, None])


def test_what_is_not_there_is_left_out(tmp_path, capsys):
    first = {"phase": "estep", "step": 0, "reward": -0.5, "think": 0.1, "grad_norm": 1}
    folder = write_run(tmp_path / "young", [first])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"phase": "estep", "st')                       # still in writing
    numbers, text, _ = run_report(capsys, folder)
    assert numbers.keys() == {"runs", "seeds"} and "estep_reward" in text
    assert "uplift" not in text and "Figure 2" not in text and "| model |" not in text


def test_a_value_that_is_null_is_left_out(tmp_path):
    log = [{"phase": "estep", "step": i, "reward": [None, -0.5][i], "grad_norm": 1} for i in range(2)]
    assert report.read_run(write_run(tmp_path / "r", log)).curves["estep", "reward"] == {1: -0.5}


def test_runs_of_different_length_are_shown_as_far_as_all_have_come(tmp_path, monkeypatch):
    drawn = {}

    def errorbar(ax, steps, middle, error, label, **how):
        drawn[label.strip()] = [*steps, *middle, *error]
    monkeypatch.setattr(Axes, "errorbar", errorbar)
    logs = [mid_training("ra3", [0.3, 0.2, 0.1]), mid_training("ra3", [0.5, 0.4])]
    runs = [write_run(tmp_path / f"s{i}", log, seed=i) for i, log in enumerate(logs)]
    groups = report.group_by_settings([report.read_run(run) for run in runs])
    report.figure(tmp_path / "x.png", groups, "title", "nll", ["ntp", "ra3"])
    # Means of 0.3 and 0.5, 0.2 and 0.4; standard error sqrt(0.02 / 2) = 0.1.
    assert drawn == {"RA3": pytest.approx([0, 2, 0.4, 0.3, 0.1, 0.1])}


def test_each_arm_has_its_colour_in_all_figures(whole, capsys, monkeypatch):
    drawn = {}

    def errorbar(ax, steps, middle, error, label, color):
        drawn.setdefault(label.strip().removesuffix(" + RLVR"), set()).add(color)
        ax.plot(steps, middle)
    monkeypatch.setattr(Axes, "errorbar", errorbar)
    run_report(capsys, whole)
    assert drawn.keys() == {"base", "NTP", "NTP, RA3's compute", "RA3"}
    assert all(len(colours) == 1 for colours in drawn.values()) and len(set.union(*drawn.values())) == 4


def test_a_figure_says_how_many_problems_its_points_are_of(whole, capsys):
    _, text, _ = run_report(capsys, whole)
    assert "Cross-entropy on 2 held-out programs, accuracy on the first 64 held-out problems." in text
    assert "Each point: 16 training programs, 8 versions of each." in text
    assert "Accuracy on 64 held-out problems." in text and "rlvr_sampled" not in text
    log = (whole / "metrics.jsonl").read_text()
    (whole / "metrics.jsonl").write_text(log.replace('"problems": 72', '"problems": 9'))
    (whole / "infused.jsonl").unlink()
    with open(whole / "metrics.jsonl", "a") as f:
        f.write('{"phase": "rlvr-base", "step": 1, "pass@1": 0.5, "problems": 8}\n')
    _, text, _ = run_report(capsys, whole)
    assert "Accuracy on 8 held-out problems." in text and "(rlvr_sampled.png)" in text
    assert "Cross-entropy on the held-out programs, accuracy on the first 9 held-out problems." in text


@pytest.mark.parametrize("kind", ["no folder", "no log", "damaged"])
def test_what_is_no_run_is_named(tmp_path, kind):
    folder = tmp_path / "x"
    if kind != "no folder":
        write_run(folder, [])
        (folder / "metrics.jsonl").unlink()
    if kind == "damaged":
        (folder / "metrics.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="x holds no run"):
        report.main([str(folder)])
    assert not (folder / "report.md").exists()


def test_the_same_seed_twice_is_refused(tmp_path):
    runs = [write_run(tmp_path / name, [evaluation("ra3")]) for name in "ab"]
    with pytest.raises(ValueError, match="its settings and its seed"):
        report.main([*map(str, runs), "--out", str(tmp_path)])
