"""The whole, in small: two ranks against one, killed and resumed against uninterrupted, c = infinity against NTP, bad input."""
import contextlib
import gc
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import elbo
import mstep
import train
from model import load_pretrained
from sandbox import Sandbox

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
import watch  # noqa: E402

SMALL = ("--experts 64 --eval-problems 4 --e-steps 4 --e-programs 4 --e-rollouts 4 --m-steps 4 --m-programs 16 --rl-steps 4 --rl-problems 4 "
         "--rl-group 4 --max-new-tokens 120 --save-every 2 --arms ra3,ntp").split() + ["--model", str(ROOT / "base")]
STAGES = ("estep", "ra3", "ntp", "rlvr-base", "rlvr-ntp", "rlvr-ra3")


def command(*flags: str, ranks: int = 1, script: Path = ROOT / "train.py") -> list[str]:
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, str(script), *flags]


def run(folder: Path, *flags: str, ranks: int = 1, script: Path = ROOT / "train.py", **kw):
    return subprocess.run(command(*flags, ranks=ranks, script=script), cwd=folder, capture_output=True, text=True, timeout=250,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **kw)


def run_here(folder: Path, *flags: str) -> str:
    """A run in this process, without torch's start: what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.chdir(folder)
        train.main(train.parse_flags([*flags]))
    gc.collect()                                                          # the lock is held as long as the log is open
    return out.getvalue() + err.getvalue()


def write_mbpp(folder: Path, **splits: list[dict]):
    (folder / "mbpp/full").mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"mbpp/full/{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder: Path) -> list[dict]:
    """The log without what is the machine's: speed and memory, and the padding of batches cut otherwise."""
    seen = {"seconds", "tokens/s", "mfu", "padding", "peak_gb"}
    return [{k: v for k, v in r.items() if k not in seen} for r in metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One small run from start to end: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "runs/one", run_here(folder, *SMALL, "--name", "one")


def test_a_run_leaves_what_the_readme_promises(whole):
    folder, stdout = whole
    said = re.findall(r"^stage (\d+) of (\d+): (\S+?)(?:, about \d+ minutes left)?$", stdout, re.M)
    assert [int(n) for n, _, _ in said] == list(range(1, len(said) + 1)) and {total for _, total, _ in said} == {str(len(said))}
    assert [name for _, _, name in said][:4] == ["estep", "infuse", "ra3", "ntp"]
    assert stdout.splitlines()[0].startswith("runs/one: 64 expert programs, 4 held-out problems")    # at once: where it writes
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["e_steps"] == 4 and config["torch"] == torch.__version__
    for stage in STAGES:
        model, enc = load_pretrained(folder / stage)                      # with its tokenizer: it can be sampled from, here and elsewhere
        assert model.n_vocab == enc.n_vocab
        assert (folder / stage / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()    # others may read it
    infused = [json.loads(line) for line in (folder / "infused.jsonl").read_text().splitlines()]
    assert len(infused) == 4 and set(infused[0]) == {"tokens", "kind", "line", "gate", "broken"}
    keys = {r["key"] for r in metrics(folder) if "key" in r}
    assert keys == {"cost/infuse", *(f"cost/{s}" for s in STAGES), *(f"eval/{a}" for a in ("base", "ntp", "ra3", "rlvr-base", "rlvr-ntp", "rlvr-ra3"))}
    updates = [r for r in metrics(folder) if "grad_norm" in r]
    assert len(updates) == 4 * len(STAGES) and all(0 <= r["padding"] < 1 and r["peak_gb"] > 0 for r in updates)
    assert all((r["tokens/s"] > 0) == (r["tokens"] > 0) and "mfu" not in r for r in updates)
    for arm in ("base", "ntp", "ra3"):               # its curve in RLVR begins and ends with what is scored anyway
        curve = [r for r in results(folder) if r.get("phase") == f"rlvr-{arm}" and "greedy" in r]
        scores = [r for r in results(folder) if r.get("key") in (f"eval/{arm}", f"eval/rlvr-{arm}")]
        assert [r["step"] for r in curve] == [0, 4] and len(scores) == 2
        assert all(r.items() - {("phase", f"rlvr-{arm}"), ("step", r["step"])} <= s.items() for r, s in zip(curve, scores))
    assert not [f for f in folder.rglob("*") if f.name.startswith(".")] and not list(folder.rglob("state-*"))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_report_shows_the_run(whole):
    done = run(whole[0].parent.parent, str(whole[0]), script=ROOT / "docs/report.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 <= json.loads(done.stdout.splitlines()[-1])["ra3"]["greedy"] <= 100 and "| RA3 + RLVR |" in (whole[0] / "report.md").read_text()


def test_two_ranks_train_as_one_does(whole, tmp_path):
    done = run(tmp_path, *SMALL, "--name", "two", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = whole[0], tmp_path / "runs/two"
    a, b = ([r for r in results(f) if "phase" in r] for f in (one, two))
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for k in set(x) - {"phase"}:
            assert y[k] == pytest.approx(x[k], rel=2e-3, abs=2e-3), (x, y)
    start = load_file(ROOT / "base/model.safetensors")
    for stage in STAGES:
        u, v = load_file(one / stage / "model.safetensors"), load_file(two / stage / "model.safetensors")
        apart = sum((u[k].float() - v[k].float()).square().sum() for k in u) ** 0.5
        moved = sum((u[k].float() - start[k].float()).square().sum() for k in u) ** 0.5
        assert apart < 0.1 * moved, stage


def test_an_infinite_penalty_is_next_token_prediction_exactly(tmp_path):
    run_here(tmp_path, *SMALL, "--name", "inf", "--c", "inf", "--rl-steps", "0", "--arms", "ra3,ntp,ntp-long")
    ra3, ntp = ((tmp_path / "runs/inf" / arm / "model.safetensors").read_bytes() for arm in ("ra3", "ntp"))
    assert ra3 == ntp
    text = (tmp_path / "runs/inf/config.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["settings"]["c"] == "inf"                # JSON has no Infinity
    assert train.parse_flags(["--c", "inf"]).e.c == float("inf")


def test_equal_compute_depends_on_no_batch_size(whole, tmp_path):
    """Real tokens are counted, padding is not: batches cut otherwise change no number."""
    run_here(tmp_path, *SMALL, "--name", "b", "--rl-steps", "0", "--micro-batch", "5", "--sample-batch", "7")
    count = lambda folder: {r["key"]: r["tokens"] for r in metrics(folder) if r.get("key", "").startswith("cost/") and "rlvr" not in r["key"]}
    assert count(tmp_path / "runs/b") == count(whole[0]) and min(count(whole[0]).values()) > 0


def refused(folder: Path, monkeypatch, *flags: str) -> str:
    """What a run says that must not start. It leaves nothing behind."""
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*"))
    with pytest.raises((ValueError, OSError)) as e:
        train.main(train.parse_flags([*SMALL, *flags]))
    assert set(folder.rglob("*")) == before
    return str(e.value)


@pytest.mark.parametrize("flags, said", [
    (["--e-rollouts", "1"], "--e-rollouts 1: expected a number from 2 to inf"),
    (["--experts", "0"], "--experts 0: expected a number from 1 to inf"),
    (["--experts", "10"], "--experts 10: one update takes 16"),
    (["--m-lr", "-1"], "--m-lr -1.0: expected a number from 0 to 1"),
    (["--c", "nan"], "--c nan"),
    (["--e-steps", "-1"], "--e-steps -1: expected a number from 0"),
    (["--floor", "-1"], "--floor -1.0: expected a number from 0"),
    (["--explore", "1"], "--explore 1.0: expected a number from 0 to 0.99"),
    (["--name", "../evil"], "--name ../evil: expected letters"),
    (["--arms", "ra4"], "--arms ra4: expected some of ra3,ntp,ntp-long"),
    (["--warm-steps", "3"], "--warm-steps 3: goes together with --warm-data"),
    (["--resume"], "say which run, with --name"),
    (["--resume", "--name", "nothing"], "holds no run to resume"),
    (["--model", "/no/such/folder"], "/no/such/folder"),
    (["--data", "no/such/corpus.jsonl"], "no/such/corpus.jsonl"),
    (["--data", str(ROOT / "Makefile")], "Makefile"),
    (["--benchmark", "humanevil"], "humanevil"),
    (["--max-rationale", "500"], "programs fit 512 tokens with a rationale"),
])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, flags, said):
    sentence = refused(tmp_path, monkeypatch, *flags)
    assert said in sentence and "\n" not in sentence


@pytest.mark.parametrize("name, text, said", [
    ("english.py", "This is no program, it is a letter.\n", "english.py"),
    ("empty.jsonl", "", "empty.jsonl"),
    ("broken.jsonl", '{"text": "x = 1"}\n{"text": \n', "broken.jsonl, row 2"),
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
    for f in (ROOT / "base").glob("*.*"):
        (folder / f.name).write_bytes(f.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    sentence = refused(tmp_path, monkeypatch, "--model", str(folder))
    assert "mlp" in sentence and "336" in sentence and "\n" not in sentence


def test_the_command_prints_the_sentence_and_ends_with_status_2(tmp_path, monkeypatch, capsys):
    done = run(tmp_path, "--gamma", "2")
    assert done.returncode == 2 and "--gamma 2.0: expected" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    monkeypatch.chdir(tmp_path)
    for flags, said in ((["--learning-speed", "3"], "unrecognized arguments: --learning-speed"), (["--rationales", "sometimes"], "invalid choice: 'sometimes' (choose from")):
        with pytest.raises(SystemExit) as e:
            train.parse_flags(flags)
        assert e.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
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


def load_data(flags: list[str], box: Sandbox, unfit=None) -> train.Data:
    s = train.parse_flags(flags)
    s.unfit = unfit
    return train.Data(s, *load_pretrained(ROOT / "base"), box)


def test_problems_are_held_to_the_time_limit_and_to_the_context(tmp_path, monkeypatch):
    """An RL problem whose reference is too slow, or whose prompt leaves no room, is left out by name; a held-out one of that kind is an error."""
    row = dict(text="Three.", test_list=["assert three() == 3"], test_setup_code="", challenge_test_list=[])
    rows = [row | dict(task_id=i, code=f"def three():\n    return {what}\n", text=text) for i, what, text in
            ((1, "3", "Three."), (2, "sum(1 for _ in range(10**9)) and 3", "Three."), (3, "3", "Three! " * 99), (4, "1 + 2", "Three."))]
    write_mbpp(tmp_path, train=rows, test=rows[:1], validation=rows[2:3])
    monkeypatch.setattr(train, "TIME_LIMIT_S", 0.5)
    flags = ["--data-dir", str(tmp_path), "--rl-data", "mbpp-docstring:train", "--rl-problems", "2", "--experts", "64", "--benchmark"]
    with Sandbox(workers=2) as box:
        data = load_data([*flags, "mbpp-docstring:test"], box)
        assert [p.id for p in data.rl_problems] == ["mbpp/1", "mbpp/4"] and {p.timeout_s for p in data.rl_problems + data.eval_problems} == {0.5}
        assert data.unfit.keys() == {"mbpp/2", "mbpp/3"} and "timeout" in data.unfit["mbpp/2"] and "leaves less than 224 of the 512 tokens" in data.unfit["mbpp/3"]
        data = load_data([*flags, "mbpp-docstring:test"], box, {"mbpp/1": "an earlier start said so"})
        assert [p.id for p in data.rl_problems] == ["mbpp/2", "mbpp/3", "mbpp/4"]               # a resumed run goes on with the problems it had
        assert not load_data(["--rl-data", "no/such", "--rl-steps", "0"], box).rl_problems
        with pytest.raises(ValueError, match="mbpp/3: its prompt leaves less than 224 of the 512 tokens; lower --max-new-tokens"):
            load_data([*flags, "mbpp-docstring:validation"], box)


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
    data = train.Data(s, *load_pretrained({str(ROOT / "base")!r}), box)
open(f"rank{{dist.get_rank()}}", "w").write(f"{{sorted(data.unfit)}} {{[p.id for p in data.rl_problems]}}")
""")
    done = run(tmp_path, ranks=2, script=tmp_path / "two.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text() == "['mbpp/0'] ['mbpp/1', 'mbpp/2', 'mbpp/3']"


def test_experts_begin_where_the_warm_up_has_ended_and_rounds_say_when_nothing_is_left(tmp_path):
    texts = [f"x = {i}\n# twice {i}\ny = x + {i}\n" for i in range(40)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    corpus = str(tmp_path / "some.jsonl")
    flags = ["--data", corpus, "--warm-data", corpus, "--warm-steps", "3", "--m-programs", "4", "--e-programs", "4", "--experts", "16", "--rl-steps", "0"]
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "".join(f"y = x + {i}\n" for i in range(500))}) + "\n")
    with Sandbox(workers=1) as box:
        data = load_data(flags, box)
        warm, expert = (data.enc.decode(t.tokens) for t in (data.warm[0], data.experts[0].trace()))
        assert len(data.warm) == 12 and "# twice 0\n" in warm and expert.endswith("x = 12\ny = x + 12\n<|endoftext|>")
        pieces = load_data([*flags[6:], "--data", str(tmp_path / "long.jsonl")], box).experts
        assert 300 < max(map(len, pieces)) <= 2 * data.limit // 3          # the rest is for rationales
        second = data.read_experts(1)
        assert len(second) == 12 and data.enc.decode(second[0].trace().tokens).endswith("x = 28\ny = x + 28\n<|endoftext|>")
        with pytest.raises(ValueError, match="some.jsonl, round 3: 0 programs fit .*, 4 are needed; lower .*--rounds"):
            data.read_experts(2)
        # The standard library has a column of its own: recipes name another.
        data = load_data("--recipe smollm2-135m --model base --warm-data stdlib --warm-steps 1 --m-programs 2 --e-programs 2 --rl-steps 0 --benchmark world "
                         "--data world --experts 8 --eval-problems 2 --max-new-tokens 99".split(), box)
        assert len(data.warm) == 2 and all(any(t.thinks()) for t in data.warm)


def test_a_diverged_step_is_not_taken(tmp_path):
    """One infinite gradient would make every weight nan, and sampling from those raises nothing."""
    model, _ = load_pretrained(ROOT / "base")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="norm is (nan|inf): training has diverged"):
        mstep.optimize(model, optimizer, [model(torch.zeros(1, 2, dtype=torch.int64)).sum() * float("inf")], 1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_an_existing_run_is_not_overwritten(whole, monkeypatch):
    where = whole[0].parent.parent
    assert "--resume" in refused(where, monkeypatch, "--name", "one")
    assert "was started with" in refused(where, monkeypatch, "--name", "one", "--resume", "--e-lr", "0.5")


def test_a_run_goes_on_with_its_own_settings_but_for_those_that_its_result_does_not_depend_on(whole, monkeypatch):
    monkeypatch.chdir(whole[0].parent.parent)
    s = train.parse_flags(["--resume", "--name", "one", "--micro-batch", "3"])
    assert (s.e.e_steps, s.run.micro_batch, s.rl.rl_steps) == (4, 3, int(SMALL[SMALL.index("--rl-steps") + 1]))
    assert train.start_folder(s, {}) == Path("runs/one")


def test_a_program_that_thinks_before_every_line_and_one_that_thinks_once(tmp_path):
    """Ablations are runs with one flag each."""
    think = {}
    for mode in ("always", "first"):
        run_here(tmp_path, *SMALL, "--name", mode, "--rationales", mode, "--arms", "ra3", "--rl-steps", "0", "--e-steps", "1", "--m-steps", "1",
                 "--rl-data", "no/such/data", "--experts", "16")
        infused = [elbo.Trace(**json.loads(line)) for line in (tmp_path / "runs" / mode / "infused.jsonl").read_text().splitlines()]
        thinks = [z for t in infused for z in t.thinks()]
        think[mode] = sum(thinks) / len(thinks)
        assert not {r["phase"] for r in metrics(tmp_path / "runs" / mode) if "phase" in r} - {"estep", "ra3"}
    assert think["always"] > 0.5 > think["first"] > 0                       # rationales that break the format are cut out, hence not 1


def test_a_run_is_followed_into_tensorboard(whole, monkeypatch):
    """Every number of the log, a half-written line only when it is whole."""
    written, file = {}, whole[0] / "metrics.jsonl"
    writer = SimpleNamespace(SummaryWriter=lambda folder: SimpleNamespace(add_scalar=lambda name, value, step: written.update({(name, step): value})))
    text, waits = file.read_text(), []

    def sleep(seconds: float):
        waits.append(len(written))
        if len(waits) == 2:
            raise KeyboardInterrupt
        file.write_text(text)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    monkeypatch.setattr(watch.time, "sleep", sleep)
    file.write_text(text[:-9])
    with pytest.raises(KeyboardInterrupt):
        watch.main(whole[0], "tensorboard")
    numbers = sum(len(r.keys() - {"phase", "key", "step"}) for r in metrics(whole[0]))
    assert waits == [numbers - len(metrics(whole[0])[-1].keys() - {"key"}), numbers]
