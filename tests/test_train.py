"""The whole, in small: two ranks against one, killed and resumed against uninterrupted, c = infinity against NTP, bad input."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bench
import elbo
import mstep
import train
from model import load_pretrained
from sandbox import Sandbox

ROOT = Path(__file__).parent.parent
SMALL = ("--experts 64 --eval-problems 4 --samples 2 --e-steps 4 --e-programs 4 --e-rollouts 4 --m-steps 4 --m-programs 16 --rl-steps 4 "
         "--rl-problems 4 --rl-group 4 --rl-pool 16 --max-new-tokens 120 --save-every 2 --threads 1 --no-equal-compute").split() + ["--model", str(ROOT / "base")]
STAGES = ("estep", "ra3", "ntp", "rlvr-base", "rlvr-ntp", "rlvr-ra3")


def command(*flags: str, ranks: int = 1, script: Path = ROOT / "train.py") -> list[str]:
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, str(script), *flags]


def run(folder: Path, *flags: str, ranks: int = 1, script: Path = ROOT / "train.py", **kw):
    return subprocess.run(command(*flags, ranks=ranks, script=script), cwd=folder, capture_output=True, text=True, timeout=250,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **kw)


def write_mbpp(folder: Path, **splits: list[dict]):
    (folder / "mbpp/full").mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"mbpp/full/{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One small run from start to end: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, *SMALL, "--name", "one")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs/one", done.stdout


def test_a_run_leaves_what_the_readme_promises(whole):
    folder, stdout = whole
    last = json.loads(stdout.splitlines()[-1])
    assert 0 <= last["ra3"]["greedy"] <= 1 and last["seeds"] == [0]
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["e_steps"] == 4 and config["torch"] == torch.__version__
    text = (folder / "report.md").read_text()
    for part in ("Figure 1", "Figure 2", "Figures 3 and 4", "Figure 5", "| RA3 + RLVR |"):
        assert part in text
    for figure in ("estep_reward", "estep_think", "estep_uplift", "mstep_nll", "mid_accuracy", "rlvr"):
        assert (folder / f"{figure}.png").stat().st_size > 1000 and f"{figure}.png" in text
    for stage in STAGES:
        model, enc = load_pretrained(folder / "seed0" / stage)            # with its tokenizer: it can be sampled from, here and elsewhere
        assert model.n_vocab == enc.n_vocab
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("state.pt"))


def test_two_ranks_train_as_one_does(whole, tmp_path):
    done = run(tmp_path, *SMALL, "--name", "two", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = whole[0] / "seed0", tmp_path / "runs/two/seed0"
    a, b = ([r for r in metrics(f) if "phase" in r] for f in (one, two))
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for k in set(x) - {"show", "phase"}:
            assert y[k] == pytest.approx(x[k], rel=2e-3, abs=2e-3), (x, y)
    start = load_file(ROOT / "base/model.safetensors")
    for stage in STAGES:
        u, v = load_file(one / stage / "model.safetensors"), load_file(two / stage / "model.safetensors")
        apart = sum((u[k].float() - v[k].float()).square().sum() for k in u) ** 0.5
        moved = sum((u[k].float() - start[k].float()).square().sum() for k in u) ** 0.5
        assert apart < 0.1 * moved, stage


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path):
    folder = tmp_path / "runs/cut"
    flags = [*SMALL, "--name", "cut"]
    for victim in ("estep", "rlvr-base"):
        process = subprocess.Popen(command(*flags), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        log = folder / "seed0/metrics.jsonl"
        while process.poll() is None and not (log.exists() and any(
                line.startswith(f'{{"phase": "{victim}", "step": 3') or line.startswith(f'{{"key": "cost/{victim}"') for line in log.read_text().splitlines())):
            time.sleep(0.02)
        assert process.poll() is None, f"the run ended before {victim} could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        flags = ["--name", "cut", "--resume", "--threads", "1"]           # all else it knows; batches cut otherwise would only change rounding
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    timeless = lambda rs: [{k: v for k, v in r.items() if k not in ("seconds", "compute")} for r in rs]
    assert timeless(metrics(folder / "seed0")) == timeless(metrics(whole[0] / "seed0"))
    for stage in STAGES:
        assert (folder / "seed0" / stage / "model.safetensors").read_bytes() == (whole[0] / "seed0" / stage / "model.safetensors").read_bytes(), stage


def test_an_infinite_penalty_is_next_token_prediction_exactly(tmp_path):
    done = run(tmp_path, *SMALL, "--name", "inf", "--c", "inf", "--rl-steps", "0", "--equal-compute")
    assert done.returncode == 0, done.stderr[-2000:]
    ra3, ntp = ((tmp_path / "runs/inf/seed0" / arm / "model.safetensors").read_bytes() for arm in ("ra3", "ntp"))
    assert ra3 == ntp
    assert "| NTP, RA3's compute |" in (tmp_path / "runs/inf/report.md").read_text()


def refused(folder: Path, monkeypatch, *flags: str) -> str:
    """What a run says that must not start. It leaves nothing behind."""
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*"))
    with pytest.raises((ValueError, OSError)) as e:
        train.main(train.parse_flags([*SMALL, *flags]))
    assert set(folder.rglob("*")) == before
    return str(e.value)


@pytest.mark.parametrize("flags, said", [
    (["--e-rollouts", "1"], "--e-rollouts 1: a baseline needs at least 2"),
    (["--experts", "0"], "--experts 0: must be at least 1"),
    (["--experts", "10"], "--experts 10"),
    (["--m-lr", "-1"], "--m-lr -1.0: a learning rate"),
    (["--c", "nan"], "--c nan"),
    (["--rationales", "sometimes"], "expected one of learned, always, first, never"),
    (["--ablations", "c=0.3"], "expected all, or some of c=0"),
    (["--warm-steps", "3"], "--warm-data and --warm-steps go together"),
    (["--resume"], "say which run, with --name"),
    (["--resume", "--name", "nothing"], "holds no run to resume"),
    (["--model", "/no/such/folder"], "/no/such/folder"),
    (["--data", "no/such/corpus.jsonl"], "no/such/corpus.jsonl"),
    (["--data", str(ROOT / "Makefile")], "Makefile"),
    (["--benchmark", "humanevil"], "humanevil"),
    (["--max-rationale", "500"], "programs fit the context"),
])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, flags, said):
    sentence = refused(tmp_path, monkeypatch, *flags)
    assert said in sentence and "\n" not in sentence


@pytest.mark.parametrize("name, text, said", [
    ("english.py", "This is no program, it is a letter.\n", "english.py"),
    ("empty.jsonl", "", "empty.jsonl"),
    ("broken.jsonl", '{"text": "x = 1"}\n{"text": \n', "broken.jsonl, line 2"),
    ("column.jsonl", '{"code": "x = 1"}\n', "no column 'text'"),
    ("few.jsonl", '{"text": "x = 1"}\n', "are needed"),
    ("long.jsonl", json.dumps({"text": "x = [" + "1, " * 3000 + "]\n"}), "long.jsonl"),
])
def test_bad_corpora_get_one_sentence_too(tmp_path, monkeypatch, name, text, said):
    (tmp_path / name).write_text(text)
    sentence = refused(tmp_path, monkeypatch, "--data", name)
    assert said in sentence and "\n" not in sentence


def test_a_checkpoint_of_another_shape_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for f in (ROOT / "base").iterdir():
        (folder / f.name).write_bytes(f.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    sentence = refused(tmp_path, monkeypatch, "--model", str(folder))
    assert "mlp" in sentence and "336" in sentence and "\n" not in sentence


def test_the_command_prints_the_sentence_and_ends_with_status_2(tmp_path):
    for flags, said in ((["--learning-speed", "3"], "unrecognized arguments: --learning-speed"), (["--gamma", "2"], "--gamma 2.0: a discount")):
        done = run(tmp_path, *flags)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        assert not list(tmp_path.rglob("*"))


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "runs" in refused(tmp_path, monkeypatch)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))   # no file may grow past it: as on a full disk
    done = run(tmp_path, *SMALL, "--name", "full", preexec_fn=limit)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "File too large" in done.stderr
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.safetensors"))


def test_problems_are_held_to_the_time_limit_and_to_the_context(tmp_path):
    """An RL problem whose reference is too slow, or whose prompt leaves no room, is left out by name; a held-out one of that kind is an error."""
    row = dict(text="Three.", test_list=["assert three() == 3"], test_setup_code="", challenge_test_list=[])
    rows = [row | dict(task_id=i, code=f"def three():\n    return {what}\n", text=text) for i, what, text in
            ((1, "3", "Three."), (2, "sum(1 for _ in range(10**9)) and 3", "Three."), (3, "3", "Three! " * 99), (4, "1 + 2", "Three."))]
    write_mbpp(tmp_path, train=rows, test=rows[:1], validation=rows[2:3])
    base, enc = load_pretrained(ROOT / "base")
    flags = ["--data-dir", str(tmp_path), "--rl-data", "mbpp-docstring:train", "--rl-problems", "2", "--rl-pool", "4", "--time-limit", "0.5", "--experts", "64"]
    with Sandbox(workers=2) as box:
        data = train.load_data(train.parse_flags([*flags, "--benchmark", "mbpp-docstring:test"]), base, enc, box)
        assert [p.id for p in data.rl_problems] == ["mbpp/1", "mbpp/4"] and {p.timeout_s for p in data.rl_problems + data.eval_problems} == {0.5}
        assert data.unfit.keys() == {"mbpp/2", "mbpp/3"} and "timeout" in data.unfit["mbpp/2"] and "more than 288 tokens" in data.unfit["mbpp/3"]
        data = train.load_data(train.parse_flags([*flags, "--benchmark", "mbpp-docstring:test"]), base, enc, box, {"mbpp/1": "an earlier start said so"})
        assert [p.id for p in data.rl_problems] == ["mbpp/2", "mbpp/3", "mbpp/4"]               # a resumed run goes on with the problems it had
        assert not train.load_data(train.parse_flags(["--rl-data", "no/such", "--rl-steps", "0"]), base, enc, box).rl_problems
        with pytest.raises(ValueError, match="mbpp/3 has .* tokens, which .* exceeds the context of 512: raise --context, or lower"):
            train.load_data(train.parse_flags([*flags, "--benchmark", "mbpp-docstring:validation"]), base, enc, box)


def test_ranks_agree_on_the_rl_problems_where_their_verdicts_would_not(tmp_path):
    """A verdict near a time limit may differ from rank to rank: the first rank's holds for all."""
    rows = [dict(text="Three.", test_list=["assert three() == 3"], test_setup_code="", challenge_test_list=[], task_id=i, code="def three():\n    return 3\n") for i in range(4)]
    write_mbpp(tmp_path, train=rows, test=rows)
    (tmp_path / "two.py").write_text(f"""
import sys
import torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
import bench, train
from model import load_pretrained
from sandbox import Sandbox
dist.init_process_group("gloo")
bench.unfit_for_rl = lambda problems, box: {{problems[dist.get_rank()].id: "too slow here"}}
s = train.parse_flags("--data-dir . --benchmark mbpp-docstring:test --rl-data mbpp-docstring:train --rl-problems 2 --experts 64".split())
with Sandbox(workers=1) as box:
    data = train.load_data(s, *load_pretrained({str(ROOT / "base")!r}), box)
open(f"rank{{dist.get_rank()}}", "w").write(f"{{sorted(data.unfit)}} {{[p.id for p in data.rl_problems]}}")
""")
    done = run(tmp_path, ranks=2, script=tmp_path / "two.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text() == "['mbpp/0'] ['mbpp/1', 'mbpp/2', 'mbpp/3']"


def test_experts_begin_where_the_warm_up_has_ended_and_rounds_say_when_nothing_is_left(tmp_path):
    texts = [f"x = {i}\n# twice {i}\ny = x + {i}\n" for i in range(40)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    base, enc = load_pretrained(ROOT / "base")
    corpus = str(tmp_path / "some.jsonl")
    flags = ["--data", corpus, "--warm-data", corpus, "--warm-steps", "3", "--m-programs", "4", "--e-programs", "4", "--experts", "16", "--rl-steps", "0"]
    s = train.parse_flags(flags)
    with Sandbox(workers=1) as box:
        data = train.load_data(s, base, enc, box)
    warm, expert = (enc.decode(t.tokens) for t in (data.warm[0], data.experts[0].trace()))
    assert len(data.warm) == 12 and "# twice 0\n" in warm and expert.endswith("x = 12\ny = x + 12\n<|endoftext|>")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "".join(f"y = x + {i}\n" for i in range(500))}) + "\n")
    pieces, _ = mstep.read_experts(train.parse_flags([*flags[4:], "--data", str(tmp_path / "long.jsonl")]), base, enc)
    assert 300 < max(map(len, pieces)) <= 2 * base.limit // 3              # the rest is for rationales
    with pytest.raises(ValueError, match="some.jsonl, round 3: 0 programs are there, 4 are needed; give more, or lower --rounds"):
        mstep.read_experts(s, base, enc, 2, (40, 0))


def test_the_standard_library_has_a_column_of_its_own():
    """The recipes name another, that of the corpus they would warm up on."""
    s = train.parse_flags("--preset smollm2-135m --model base --warm-data stdlib --warm-steps 1 --m-programs 2".split())
    warm, rows = mstep.read_commented(s, *load_pretrained(ROOT / "base"))
    assert s.warm_column == "content" and len(warm) == 2 and rows > 0 and all(any(t.thinks()) for t in warm)


def test_a_diverged_step_is_not_taken(tmp_path):
    """One infinite gradient would make every weight nan, and sampling from those raises nothing."""
    model, _ = load_pretrained(ROOT / "base")
    run, before = train.Run(train.Settings(), tmp_path, 0), [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="norm is (nan|inf): training has diverged"):
        run.update(model, optimizer, [model(torch.zeros(1, 2, dtype=torch.int64)).sum() * float("inf")], 1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_an_existing_run_is_not_overwritten(whole, monkeypatch):
    where = whole[0].parent.parent
    assert "--resume" in refused(where, monkeypatch, "--name", "one")
    assert "was started with" in refused(where, monkeypatch, "--name", "one", "--resume", "--e-lr", "0.5")


def test_a_run_goes_on_with_its_own_settings_but_for_those_that_its_result_does_not_depend_on(whole, monkeypatch):
    monkeypatch.chdir(whole[0].parent.parent)
    s = train.parse_flags(["--resume", "--name", "one", "--micro-batch", "3"])
    assert (s.e_steps, s.micro_batch, s.rl_steps) == (4, 3, int(SMALL[SMALL.index("--rl-steps") + 1]))
    assert train.start_folder(s, {}) == Path("runs/one")


def test_a_loop_is_one_step_where_rationales_per_step_are_counted():
    enc = bench.train_tokenizer()
    program = elbo.parse(enc, "def f(xs):\n   ", " xs = [x + 3 for x in xs]\n    out = []\n    for x in xs:\n        if x > 4:\n            out.append(x)\n"
                         "    xs = out\n    xs = sorted(xs)\n    return xs\n", enc.eot_token)
    trace = elbo.Trace()
    for t, line in enumerate(program.lines):
        trace.add([1] if t in (0, 3) else [], elbo.LATENT, t)             # before the constant of the first step, and of the loop
        trace.add(line, elbo.ACTION, t)
    data = train.Data(enc, *[None] * 8)
    table = train.think_table(data, [trace])
    assert (table["think"], table["think_needed"], table["think_other"]) == (2 / 8, 1.0, 0.0)


def test_the_paired_t_test_agrees_with_known_values():
    """Student's t with 4 degrees of freedom: P(T > 2.132) = 0.05, P(T > 3.747) = 0.01."""
    for t, p in ((2.1318, 0.05), (3.7469, 0.01)):
        d = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).double()          # deviation such that mean / se = t
        d = d + t * d.std() / 5 ** 0.5
        assert train.paired_p(d.tolist(), [0.0] * 5) == pytest.approx(p, rel=1e-3)
    assert train.paired_p([0.0, 1.0], [1.0, 3.0]) > 0.5


def test_a_cold_start_in_rounds_survives_a_kill(tmp_path):
    """A warm-up makes the base of every arm; each round trains on programs that no other has seen, also when the run is cut between them."""
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"x = {i}\ny = x + {i}\n"}) + "\n" for i in range(40)))
    web = [p.prompt + " " + p.solution.lstrip() for p in bench.world("web", 60, seed=9)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in web))
    flags = ["--model", str(ROOT / "base"), "--data", "corpus.jsonl", "--rounds", "2", "--experts", "20", "--m-programs", "20", "--m-steps", "2", "--e-steps", "1",
             "--e-programs", "2", "--e-rollouts", "2", "--rl-steps", "0", "--eval-problems", "2", "--samples", "1", "--no-equal-compute", "--threads", "1",
             "--warm-data", "web.jsonl", "--warm-steps", "1", "--explore", "0.5", "--max-new-tokens", "60"]
    done = run(tmp_path, *flags, "--name", "whole")
    assert done.returncode == 0, done.stderr[-2000:]
    whole = tmp_path / "runs/whole"
    log = metrics(whole / "seed0")
    assert [r["position"] for r in log if r.get("key", "").startswith("corpus.")] == [[19, 1]]
    assert {r["phase"] for r in log if "phase" in r} == {"warm", *(p + tag for p in ("estep", "ra3", "ntp") for tag in ("", ".2"))}
    assert {r["key"] for r in log if r.get("key", "").startswith("gain/") and r["lines"]} == {"gain/start", "gain/estep", "gain/start.2", "gain/estep.2"}
    x, y = train.Results([whole / "seed0"]).curve("ra3", "nll")
    assert x.tolist() == [0, 2, 2, 4] and y.shape == (1, 4)
    results = train.Results([whole / "seed0"])
    assert results.curve("estep", "reward")[0].tolist() == [0, 1]
    last = next(r for r in log if r.get("key") == "rationales.2")
    assert results.value("rationales", "think") == [last["think"]]
    report = (whole / "report.md").read_text()
    assert "base, before its warm-up" in report and "q after the E-step" in report
    # As if it had been killed in the second round: what came after is gone.
    cut = tmp_path / "runs/cut"
    shutil.copytree(whole, cut)
    text = (whole / "seed0/metrics.jsonl").read_bytes()
    (cut / "seed0/progress.json").write_text(json.dumps({"log_bytes": text.index(b"\n", text.index(b'"cost/estep.2"')) + 1}))
    done = run(tmp_path, *flags, "--name", "cut", "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("ra3.2", "ntp.2"):
        assert (cut / "seed0" / stage / "model.safetensors").read_bytes() == (whole / "seed0" / stage / "model.safetensors").read_bytes()


def test_ablations_run_by_name_and_report_side_by_side(tmp_path):
    web = [p.prompt + " " + p.solution.lstrip() for p in bench.world("web", 60, seed=9)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in web))
    flags = [*SMALL, "--name", "some", "--ablations", "no persistence,BRiTE,no RL", "--e-steps", "1", "--m-steps", "1", "--experts", "16",
             "--warm-data", "web.jsonl", "--warm-steps", "1", "--rl-data", "no/such/data", "--row-tokens", "4096"]     # no RLVR here; the context is 512
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    # Without E-step updates q is what mid-training started from: the one warm-up of all variants.
    assert (tmp_path / "runs/some/no_RL/seed0/estep/model.safetensors").read_bytes() == (tmp_path / "runs/some/seed0/warm/model.safetensors").read_bytes()
    assert [r["phase"] for r in metrics(tmp_path / "runs/some/seed0") if "phase" in r] == ["warm", "warm"]
    think = {name: train.Results([tmp_path / "runs/some" / train.slug(name) / "seed0"]).value("rationales", "think")[0] for name in ("no persistence", "BRiTE")}
    assert think["no persistence"] > 0.5 > think["BRiTE"] > 0           # rationales that break the format are cut out, hence not 1
    table = (tmp_path / "runs/some/report.md").read_text()
    assert "| no persistence |" in table and "| BRiTE |" in table and "| c=" not in table and "ablation_c.png" not in table
