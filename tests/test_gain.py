"""docs/gain.py: the control, the gain and its error against their definitions; a folder from end to end."""
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import elbo
import estep
import train
from elbo import ACTION, FREE, LATENT, NO_GATE, PROMPT, Program, Trace
from model import GPT, GPTConfig, load_pretrained, load_tokenizer, save_tokenizer

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("gain", ROOT / "docs/gain.py")
gain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gain)
EOS = 4


@pytest.fixture(scope="module")
def enc():
    """Four characters and the end of the document."""
    return tiktoken.Encoding("tiny", pat_str=r"[\s\S]", mergeable_ranks={b"#": 0, b"\n": 1, b"a": 2, b"x": 3},
                             special_tokens={"<|endoftext|>": EOS})


@pytest.fixture(scope="module")
def base_enc():
    return load_tokenizer(ROOT / "base")


def tiny(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=5, d_model=12, n_layer=1, n_head=2, n_kv_head=1, head_dim=6, d_ff=16,
                          context=64, eos_id=EOS))
    for p in model.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return model.double()


def infuse(enc, program: Program, comments: dict[int, list[str]]) -> Trace:
    """The program with these comments before these lines."""
    trace = Trace()
    trace.add(program.prompt, PROMPT)
    for t, line in enumerate(program.lines):
        for comment in comments.get(t, []):
            trace.add(elbo.rationale(enc, program, t, comment), LATENT, t, FREE)
        trace.add(line, ACTION, t, FREE)
    return trace


def tokens_of(trace: Trace, kind: int) -> list[int]:
    return [token for token, k in zip(trace.tokens, trace.kind) if k == kind]


# -------------------------------------------------------------------------------------- programs and controls

TASK = 'def f(xs):\n    """task"""\n'
LOOP = "    out = []\n    for x in xs:\n        if x > 4:\n            out.append(x)\n\n    return out\n"


@pytest.mark.parametrize("prompt, solution", [
    (TASK, LOOP),
    (TASK + "   ", LOOP[3:]),
    ("", "import re\n\ndef f(x):\n\n    y = '''\n  # no comment\n'''\n    return y\n"),
    ("Write f, don't ask.\n", "def f(x):\n\tif x:\n\t\treturn 1\n"),
    ("", "x = 1\n\x0c\x0cy = 2  # <|endoftext|>\nclass A:\n  s = 'é'; t = 3\n   \nz = A()\n"),
])
def test_a_program_is_rebuilt_from_its_trace(base_enc, prompt, solution):
    program = elbo.parse(base_enc, prompt, solution, base_enc.eot_token)
    everywhere = {t: ["# 1 + 2 = 3", "# y"] for t in range(0, len(program.lines), 2)}
    for comments in ({}, everywhere, {len(program.lines) - 1: ["# x"]}):
        assert gain.rebuild_program(base_enc, infuse(base_enc, program, comments)) == program


def test_the_control_swaps_what_is_said_and_nothing_else(enc):
    texts = ["x\na\n", "xx\n", "ax\nx\n"]
    programs = [elbo.parse(enc, "a\n", text, EOS) for text in texts]
    said = ["#a", "#x", "#xx"]
    infused = [infuse(enc, p, {0: [comment]}) for p, comment in zip(programs, said)]
    seen = set()
    for seed in range(20):
        swapped = gain.swap_rationales(enc, programs, infused, seed)
        for i, (own, other) in enumerate(zip(infused, swapped, strict=True)):
            assert other.thinks() == own.thinks()
            assert tokens_of(other, ACTION) == tokens_of(own, ACTION)
            latents = [tokens_of(trace, LATENT) for trace in infused]
            seen.add((i, latents.index(tokens_of(other, LATENT))))
    assert seen == {(i, j) for i in range(3) for j in range(3) if i != j}


def test_another_programs_rationale_comes_whole_and_at_its_new_place(base_enc):
    programs = [elbo.parse(base_enc, TASK, LOOP, base_enc.eot_token) for _ in range(2)]
    comments = [{3: ["# 1 + 2 = 3", "# so # it is"]}, {0: ["# first"]}]
    infused = [infuse(base_enc, p, z) for p, z in zip(programs, comments)]
    swapped = gain.swap_rationales(base_enc, programs, infused, 0)
    want = [infuse(base_enc, programs[0], {3: ["# first"]}),
            infuse(base_enc, programs[1], {0: ["# 1 + 2 = 3", "# so # it is"]})]
    assert [trace.tokens for trace in swapped] == [trace.tokens for trace in want]
    assert [trace.line for trace in swapped] == [trace.line for trace in want]
    gates = [[gate != NO_GATE for gate in trace.gate] for trace in [*swapped, *want]]
    assert gates[:2] == gates[2:]
    assert "   # 1 + 2 = 3\n    # so # it is\n    out = []" in base_enc.decode(swapped[1].tokens)


def test_a_program_keeps_its_rationales_if_no_other_has_any(enc):
    programs = [elbo.parse(enc, "a\n", "x\na\n", EOS) for _ in range(2)]
    infused = [infuse(enc, programs[0], {}), infuse(enc, programs[1], {1: ["#a"]})]
    swapped = gain.swap_rationales(enc, programs, infused, 0)
    assert [trace.tokens for trace in swapped] == [trace.tokens for trace in infused]


# --------------------------------------------------------------------------------------------- nats and gains


@torch.no_grad()
def nats_by_hand(model: GPT, trace: Trace, t: int, opens: int = 0) -> float:
    """Token by token: -log p of line t, its first token given that no comment is opened there."""
    total = 0.0
    for i, (token, kind, line) in enumerate(zip(trace.tokens, trace.kind, trace.line)):
        if kind == ACTION and line == t:
            p = model(torch.tensor([trace.tokens[:i]]))[0, -1].double().softmax(-1)
            at_gate = trace.gate[i] == FREE
            total -= math.log(p[token] / (1 - p[opens] if at_gate else 1.0))
    return total


def test_the_gain_of_a_rationale_is_that_of_the_likelihoods(enc):
    model = tiny(3)
    texts = {"x\na\n": {0: ["#a"]}, "xx\na\nx\n": {0: ["#x", "#aa"], 2: ["#xa"]}, "x\n": {}}
    texts |= {"a\nax\n": {1: ["#"]}}
    programs = [elbo.parse(enc, "a\n", text, EOS) for text in texts]
    infused = [infuse(enc, program, said) for program, said in zip(programs, texts.values())]
    nats = gain.compare_versions(model, enc, programs, infused, 0)
    swapped = gain.swap_rationales(enc, programs, infused, 0)
    want = [[], [], []]
    for program, own, other in zip(programs, infused, swapped):
        for column, version in zip(want, (program.trace(), own, other)):
            column += [nats_by_hand(model, version, t) for t, think in enumerate(own.thinks()) if think]
    assert [x.shape for x in nats] == [(3, 1), (3, 2), (3, 0), (3, 1)]
    assert torch.cat(nats, 1).numpy() == pytest.approx(np.array(want), abs=1e-5)
    assert np.abs(np.subtract(want[1], want[2])).min() > 0.001         # all columns differ
    # The row shows their means; the gains are without - own, without - other, other - own.
    cells = gain.table_row("q", nats).strip("| ").split(" | ")
    without, own, other = np.mean(want, 1)
    assert cells[:2] == ["q", str(len(want[0]))]
    shown = [float(cell.split(" ± ")[0]) for cell in cells[2:]]
    gains = [without - own, without - other, other - own]
    assert shown == pytest.approx([without, own, other, *gains], abs=6e-4)
    _, error = gain.mean_over_programs([x[2] - x[1] for x in nats])
    assert cells[-1].endswith(f" ± {error:.3f}")


def test_the_bound_by_k_samples_is_that_of_the_likelihoods(enc):
    model, draws = tiny(3), []
    programs = [elbo.parse(enc, "a\n", text, EOS) for text in ("x\na\n", "xx\na\n")]
    for k in range(gain.DRAWS):
        said = [{0: ["#" + "ax"[k % 2] * (k // 4 + 1)]}, {1: ["#x" + "a" * (k % 3)]} if k % 5 else {}]
        draws.append([infuse(enc, *pair) for pair in zip(programs, said)])
    columns = gain.bounds(model, enc, programs, draws, [0])
    others = [gain.swap_rationales(enc, programs, draw, [0, k]) for k, draw in enumerate(draws)]
    for i, program in enumerate(programs):
        def p(trace: Trace) -> float:
            return math.exp(-sum(nats_by_hand(model, trace, t) for t in range(len(program.lines))))
        own, other = ([p(draw[i]) for draw in some] for some in (draws, others))
        fours = [sum(own[a:a + 4]) / 4 for a in range(0, 16, 4)]
        want = [math.log(p(program.trace())), np.log(own).mean(), np.log(fours).mean(),
                math.log(sum(own) / 16), math.log(sum(other) / 16)]
        assert [x[i].item() for x in columns] == pytest.approx(want, abs=1e-5)
        assert want[1] < want[2] - 1e-4 < want[3] - 2e-4 and abs(want[3] - want[4]) > 1e-4


def test_each_model_writes_and_judges_its_own(tmp_path, capsys):
    folder, rows = tmp_path / "r", []
    write_run(folder, 3)
    torch.manual_seed(0)
    other = GPT.from_pretrained(ROOT / "base")
    other.embed_tokens.weight.data += 0.05 * torch.randn_like(other.embed_tokens.weight)
    other.save_pretrained(folder / "ra3")
    save_tokenizer(load_tokenizer(ROOT / "base"), folder / "ra3")
    for names in (["start", "ra3"], [str(folder / "ra3")]):
        capsys.readouterr()
        gain.main([str(folder), "--by", *names, "--bound", "--limit", "2"])
        rows.append([line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()])
    (head, _, q, start, ra3, _, below, _, *bounds), (_, _, same_q, ra3_again, _, _, _, bound_again) = rows
    assert [row[0] for row in (q, start, ra3, *bounds)] == ["q", "start", "ra3", "start", "ra3"]
    assert q == same_q and q[1:] == start[1:] != ra3[1:] and len(start) == len(head)
    assert ra3[1:] == ra3_again[1:] and bounds[1][1:] == bound_again[1:] != bounds[0][1:]
    numbers = [float(cell.split(" ± ")[0]) for cell in bounds[0][1:]]
    assert numbers[1] <= numbers[2] <= numbers[3] and len(bounds[0]) == len(below)


def test_a_program_too_long_with_anothers_rationale_is_left_out(enc):
    model = tiny(3)
    programs = [elbo.parse(enc, "a\n", text, EOS) for text in ("x\na\n", "xxxxxxxx\n", "a\n")]
    said = ["#aaaaaa", "#x", "#a"]
    infused = [infuse(enc, p, {0: [comment]}) for p, comment in zip(programs, said)]
    lengths = [len(trace.tokens) for trace in gain.swap_rationales(enc, programs, infused, 1)]
    model.limit = max(lengths) - 1
    assert len(gain.compare_versions(model, enc, programs, infused, 1)) == sum(n < max(lengths) for n in lengths) == 2
    model.limit = max(lengths)
    assert len(gain.compare_versions(model, enc, programs, infused, 1)) == 3


def test_a_standard_error_over_programs():
    """One line a program: the textbook's. Equal lines of a program are one; of equal groups, their means."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=12))
    mean, error = gain.mean_over_programs(list(x[:, None]))
    assert (mean, error) == (pytest.approx(x.mean().item()), pytest.approx(x.std().item() / 12 ** 0.5))
    repeated = [value.repeat(7) for value in x]
    assert gain.mean_over_programs([*repeated, x[:0]]) == (pytest.approx(mean), pytest.approx(error))
    groups = x.view(4, 3)
    assert gain.mean_over_programs(list(groups))[1] == pytest.approx(groups.mean(1).std().item() / 2)


def test_a_standard_error_of_programs_of_unequal_length():
    # Mean 2; residuals sum to -2, 1 and 1; over three programs and five lines.
    values = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]), torch.tensor([3.0])]
    mean, error = gain.mean_over_programs(values)
    assert (mean, error) == (2.0, pytest.approx(math.sqrt(6 * 3 / 2) / 5))


# --------------------------------------------------------------------------------------------- a run's folder


def write_run(folder: Path, n: int, warm_steps: int = 0):
    """What train.infuse leaves of n held-out programs, infused by the base itself."""
    s = train.Settings()
    s.run.model, s.run.seed, s.run.warm_steps = str(ROOT / "base"), 3, warm_steps
    s.run.context, s.run.sample_batch = 150, 7
    s.e.explore, s.e.max_rationale, s.e.max_comments, s.e.rationales = 0.5, 12, 2, "always"
    s.e.draws = 0
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"settings": s.flat(), "unfit": {}}))
    enc = load_tokenizer(ROOT / "base")
    problems = train.bench.world("eval", n, 0)
    heldout = [elbo.parse(enc, p.prompt, p.solution, enc.eot_token) for p in problems]
    data = SimpleNamespace(enc=enc, openers=elbo.opener_mask(enc), heldout=heldout)
    train.infuse(train.Run(s, folder, enc), s.run.model, s.run.model, data, [], s.e, "")


def read_traces(folder: Path) -> list[Trace]:
    return [Trace(**json.loads(line)) for line in (folder / "infused.jsonl").read_text().splitlines()]


def print_table(capsys, *args: str) -> list[list[str]]:
    """The cells of the table's rows."""
    capsys.readouterr()
    gain.main([*args])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == rows[0].count("|")
    return [row.strip("| ").split(" | ") for row in rows]


def test_the_start_draws_what_training_draws(tmp_path, capsys, monkeypatch):
    """Where q is the start itself, the two rows are the same, and so is what the sampler was asked for."""
    asked, sample = [], estep.rollout

    def rollout(model, enc, programs, seeds, openers, cfg, size):
        how = (cfg.rationales, cfg.explore, cfg.max_rationale, cfg.max_comments)
        asked.append([programs, seeds, openers.tolist(), how, model.limit, size] if programs else [])
        return sample(model, enc, programs, seeds, openers, cfg, size)
    monkeypatch.setattr(estep, "rollout", rollout)
    folder = tmp_path / "r"
    write_run(folder, 12)
    q, start = print_table(capsys, str(folder), "--by", "start")
    experts, heldout, again = asked
    assert experts == [] and heldout == again
    assert (q[0], start[0]) == ("q", "start") and q[1:] == start[1:]
    traces = read_traces(folder)
    assert int(q[1]) == sum(sum(trace.thinks()) for trace in traces) < sum(len(t.thinks()) for t in traces)
    assert print_table(capsys, str(folder)) == [q]
    # Rationales that q has not written do not concern the start's row.
    lines = (folder / "infused.jsonl").read_text().splitlines(keepends=True)
    bare = [gain.rebuild_program(load_tokenizer(ROOT / "base"), trace).trace() for trace in traces[:6]]
    lines[:6] = [json.dumps(vars(trace) | {"broken": []}) + "\n" for trace in bare]
    (folder / "infused.jsonl").write_text("".join(lines))
    fewer, same = print_table(capsys, str(folder), "--by", "start")
    assert int(fewer[1]) < int(q[1]) and same == start


def test_the_judge_is_the_warm_base_where_there_was_a_warm_up(tmp_path, monkeypatch):
    loaded = []

    def load(name, device):
        loaded.append(name)
        return load_pretrained(ROOT / "base", device)
    monkeypatch.setattr(gain, "load_pretrained", load)
    for name, steps in (("cold", 0), ("warmed", 5)):
        write_run(tmp_path / name, 6, warm_steps=steps)
        gain.main([str(tmp_path / name)])
    assert loaded == [str(ROOT / "base"), tmp_path / "warmed/warm"]


@pytest.mark.filterwarnings("ignore:std")
def test_of_no_rationales_the_number_alone_is_shown(enc):
    programs = [elbo.parse(enc, "a\n", "x\na\n", EOS) for _ in range(2)]
    infused = [program.trace() for program in programs]
    row = gain.table_row("q", gain.compare_versions(tiny(3), enc, programs, infused, 0))
    assert row.startswith("| q | 0 | nan | nan | nan | +nan ± nan |")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(OSError, match="nothing/config.json"):
        gain.main([str(tmp_path / "nothing")])
