"""docs/explain.py: its numbers against each other, its text against the program, runs and their settings."""
import html
import importlib.util
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import bench
import elbo
import estep
from model import load_pretrained, load_tokenizer

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("explain", ROOT / "docs/explain.py")
explain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(explain)
CFG = estep.EStepConfig(e_rollouts=4, horizon=3, gamma=0.5, explore=0.3)


def test_the_numbers_beside_a_line_are_what_their_names_say():
    q, enc = load_pretrained(ROOT / "base")
    p = bench.world("eval", 1, 0)[0]
    program = elbo.parse(enc, p.prompt, p.solution, enc.eot_token)
    traces, log_p, columns = explain.explain({"q": q, "pi": q}, enc, program, CFG, seed=0)
    assert {"think", "without", "with", "reward", "return", "advantage", "weight", "text", "text+", "gates", "gates+"} == columns.keys()
    assert any(any(trace.thinks()) for trace in traces)
    for k, trace in enumerate(traces):
        with torch.no_grad():
            at = q(torch.tensor([trace.tokens]))[0].log_softmax(-1)                        # (T, V)
        mass = at.exp()[:, elbo.opener_mask(enc)].sum(-1)                                  # (T,)
        tokens = [at[i - 1, token].item() for i, token in enumerate(trace.tokens)]
        for t in range(len(program.lines)):
            here = [i for i, line in enumerate(trace.line) if line == t and trace.kind[i] != elbo.PROMPT]
            think, free = columns["think"][k, t], trace.gate[here[0]] == elbo.FREE
            assert think == pytest.approx(mass[here[0] - 1].item(), abs=1e-4) if free else think.isnan()
            whole = (columns["text"] + columns["gates"] + columns["with"])[k, t].item()          # gates forced open are nobody's
            if all(trace.gate[i] != elbo.FORCED for i in here):
                assert whole == pytest.approx(sum(tokens[i] for i in here), abs=1e-3)
                assert log_p[k, [i - 1 for i in here]].sum() == pytest.approx(whole, abs=1e-3)
            assert columns["return"][k, t] == pytest.approx(
                sum(0.5 ** j * r for j, r in enumerate(columns["reward"][k, t:t + 3].tolist())), abs=1e-5)
            others = [columns["return"][j, t].item() for j in range(4) if j != k]
            assert columns["advantage"][k, t] == pytest.approx(
                columns["return"][k, t].item() - sum(others) / 3, abs=1e-5)
        if not any(trace.thinks()):
            assert torch.allclose(columns["with"][k], columns["without"][k], atol=1e-4)
    assert explain.total_gain(columns) > 0


def text_of(page: str) -> list[str]:
    """The rows of code of all tables of a page, or of a print without colours."""
    rows = re.findall(r"<td>(<span.*)", page)
    return [html.unescape(re.sub("<[^>]*>", "", row)) for row in rows]


def test_the_page_and_the_terminal_show_the_programs(tmp_path, capsys):
    page = tmp_path / "page.html"
    explain.main(["--problem", "1", "--out", str(page)])
    p, printed = bench.world("eval", 2, 0)[1], capsys.readouterr().out
    versions = "\n".join(text_of(page.read_text())).split(p.prompt.split("\n")[0])[1:]
    assert len(versions) == estep.EStepConfig().e_rollouts
    for version in versions:
        assert elbo.strip_comments("def f(xs):" + version).rstrip() == (p.prompt + p.solution).rstrip()
        for line in filter(None, version.split("\n")):
            assert line in printed
    assert "\033" not in printed and printed.count("version ") == len(versions)
    assert "\033[32m #" in explain.as_text([[explain.Row([(" #", "latent", "")])]], [], colours=True)


def test_a_lines_numbers_stand_once_where_its_action_begins():
    enc = load_tokenizer(ROOT / "base")
    trace = elbo.parse_commented(enc, "x = (1 <\n     2)\n# why\ny = x\n", enc.eot_token, 40)
    rows = explain.rows_of(enc, trace, list(range(1, len(trace.tokens))), [[0.5], [0.25]])
    assert ["".join(text for text, _, _ in row.pieces) for row in rows] == ["x = (1 <", "     2)", "# why", "y = x", ""]
    assert [row.numbers for row in rows] == [[0.5], [], [], [0.25], []]
    remarks = [remark for row in rows for _, _, remark in row.pieces if remark]
    assert remarks[0] == "log p = 1.00" and remarks[-1] == f"log p = {len(trace.tokens) - 2}.00"         # all but the end of text
    page = explain.as_html("a < b", [rows], ["think"])
    assert "<td>50%<td>" in page and "a &lt; b" in page and "&lt;</span>" in page and "<</span>" not in page


def write_run(folder: Path, **settings) -> Path:
    folder.mkdir()
    start = dict(model="base", warm_steps=0, benchmark="world", context=2 ** 20, data_dir="")
    (folder / "config.json").write_text(json.dumps({"settings": start | asdict(CFG) | settings}))
    for stage in ("warm", "estep", "ra3"):
        shutil.copytree(ROOT / "base", folder / stage, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


def test_a_run_is_shown_with_its_own_settings_and_models(tmp_path, capsys):
    run = write_run(tmp_path / "r", floor="inf", warm_steps=1)
    folders, cfg, _ = explain.read_run(run)
    assert folders == {"pi": run / "warm", "q": run / "estep", "M-step": run / "ra3"}
    assert cfg.floor == float("inf") and cfg.explore == 0.3
    explain.main([str(run)])
    assert capsys.readouterr().out.count("M-step") == 4 and (run / "explain.html").stat().st_size > 5000


@pytest.mark.parametrize("flags", [["--problem", "-1"], ["nowhere"]])
def test_what_is_not_there_is_refused(flags):
    with pytest.raises((ValueError, OSError)):
        explain.main(flags)
