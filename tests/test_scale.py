"""What large models need: recipes, recomputed blocks, masters of bfloat16 weights, each rank's share of them."""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import elbo
import estep
import train
from elbo import ACTION, FREE, PROMPT, Trace, collate
from model import GPT, GPTConfig, load_pretrained
from mstep import Masters
from train import RECIPES, parse_flags

ROOT = Path(__file__).parent.parent


def test_flags_win_over_a_recipe_and_a_recipe_over_the_defaults():
    s = parse_flags(["--micro-batch", "7", "--recipe", "qwen2.5-1.5b", "--save-memory", "none"])
    assert (s.run.model, s.run.micro_batch, s.run.save_memory, s.e.gamma) == ("Qwen/Qwen2.5-1.5B", 7, "none", train.Settings().e.gamma)
    assert parse_flags(["--recipe", "world"]) == parse_flags([]) == train.Settings()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_work(recipe):
    flags = train.Settings().flat()
    assert set(RECIPES[recipe]) <= set(flags)
    s = parse_flags(["--recipe", recipe])
    s.check()
    assert recipe == "world" or s.run.context >= 2 * s.rl.max_new_tokens              # sampling leaves a prompt more than half of the context


def test_no_more_flags_than_a_reader_can_hold():
    assert len(train.Settings().flat()) <= 46


def test_an_unknown_recipe_is_one_sentence():
    with pytest.raises(ValueError, match="--recipe qwen: expected one of world, smollm2-135m, "):
        parse_flags(["--recipe", "qwen"])


def test_a_shorter_context_is_kept_to(tmp_path, monkeypatch):
    """Prompt and answer of the world's problems fit 512 tokens, the base's own context, but not 230."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="of the context's 230 tokens"):
        train.main(parse_flags(["--context", "230", "--experts", "64", "--model", str(ROOT / "base")]))


def test_a_stage_keeps_the_runs_limits_and_writes_none_of_them(tmp_path):
    s = parse_flags(["--context", "200", "--save-memory", "recompute"])
    run, seen = train.Run(s, tmp_path, load_pretrained(ROOT / "base")[1]), []
    for _ in range(2):                                              # made, then found again
        folder = run.stage("ntp", ROOT / "base", lambda run, name, model: seen.append(model))
        model = run.load(folder)
        assert model.limit == 200 and model.grad_checkpoint and model.config.context == 512
        with pytest.raises(ValueError, match="201 tokens does not fit the model's context of 200"):
            model(torch.ones(1, 201, dtype=torch.int64))
    assert len(seen) == 1 and GPT.from_pretrained(folder).limit == 512


# ------------------------------------------------------------------------------------------------------- logits, in parts


def traces(rows: int, length: int, vocab: int, prompt: int = 1) -> list[Trace]:
    """Random programs: a prompt, then lines of 9 tokens, a decision point before each."""
    out = []
    for ids in torch.randint(50, vocab, (rows, length), generator=torch.Generator().manual_seed(0)).tolist():
        out.append(Trace())
        out[-1].add(ids[:prompt], PROMPT)
        for t, line in enumerate(elbo.chunks(ids[prompt:], 9)):
            out[-1].add(line, ACTION, t, FREE)
    return out


def openers(vocab: int) -> torch.Tensor:
    return torch.arange(vocab) < 50


def test_the_e_step_in_parts_is_the_e_step():
    """6 positions at a time (of 3 rows: 2) or all at once: the same terms and the same gradient."""
    torch.manual_seed(0)
    model, batch, seen = GPT(GPTConfig(vocab_size=80, n_layer=2)), collate(traces(3, 40, 80)), []
    pi = GPT(model.config).requires_grad_(False)
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        gate, token, pi_token, anchor = estep.likelihoods(model, pi, batch, openers(80), positions=6)
        (gate.sum() + 2 * token.sum() + 3 * anchor).backward()
        seen.append([gate, token, pi_token, anchor, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- bfloat16 weights, float32 masters


def test_masters_keep_the_updates_that_bfloat16_loses():
    """Thirty updates at 1e-5. Plain bfloat16 loses all but the small weights' updates; with masters, float32's path is followed."""
    torch.manual_seed(0)
    start = GPT(GPTConfig(vocab_size=64, n_layer=1)).bfloat16()

    def trained(model, optimizer, updates=30):
        for _ in range(updates):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(torch.arange(20)[None])[0].float(), torch.arange(1, 21)).backward()
            optimizer.step()
        return model.layers[0].mlp.up_proj.weight.detach().float()

    def adam(model):
        return torch.optim.Adam(model.parameters(), lr=1e-5)

    def masters(model):
        return Masters(torch.optim.Adam, model.parameters(), "cpu", lr=1e-5)
    begin = start.layers[0].mlp.up_proj.weight.detach().float()
    full, plain, model = copy.deepcopy(start).float(), copy.deepcopy(start), copy.deepcopy(start)
    reference, lossy, optimizer = trained(full, adam(full)), trained(plain, adam(plain)), masters(model)
    ours = trained(model, optimizer)
    apart = lambda w: float((w - reference).norm() / (reference - begin).norm())
    index = [n for n, _ in start.named_parameters()].index("layers.0.mlp.up_proj.weight")
    assert apart(lossy) > 0.5 > 0.1 > apart(optimizer.masters[index])
    assert torch.equal(ours, optimizer.masters[index].bfloat16().float())
    # Saved and found again, halfway: the weights follow from the state.
    half, again = copy.deepcopy(start), copy.deepcopy(start)
    first, second = masters(half), masters(again)
    trained(half, first, 15)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(again.embed_tokens.weight, half.embed_tokens.weight)
    assert torch.equal(trained(again, second, 15), ours)


TINY = ("--experts 16 --eval-problems 2 --e-steps 4 --e-programs 3 --e-rollouts 2 --m-steps 2 --m-programs 6 --rl-steps 1 --rl-problems 3 --rl-group 4 "
        "--max-new-tokens 80 --save-every 2 --micro-batch 2 --arms ra3").split() + ["--model", str(ROOT / "base")]
STAGES = ("estep", "ra3", "rlvr-ra3")


def test_ranks_that_share_the_masters_train_as_one_does_and_resume_exactly(tmp_path):
    """Three programs on two ranks, which own about half of the masters each."""
    def start(ranks, *flags):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
        done = subprocess.run([*launcher, str(ROOT / "train.py"), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=250,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    start(1, *TINY, "--name", "one", "--save-memory", "offload")
    start(2, *TINY, "--name", "two", "--save-memory", "shard")
    one, two, cut = (tmp_path / "runs" / name for name in ("one", "two", "cut"))
    begin = load_file(ROOT / "base/model.safetensors")
    for stage in STAGES:
        u, v = load_file(one / stage / "model.safetensors"), load_file(two / stage / "model.safetensors")
        apart = sum((u[k].float() - v[k].float()).square().sum() for k in u) ** 0.5
        moved = sum((u[k].float() - begin[k].float()).square().sum() for k in u) ** 0.5
        assert u["model.norm.weight"].dtype == torch.bfloat16 and 0 < moved and apart < 0.5 * moved, stage
    # Killed in the E-step, after the checkpoint of two updates.
    script = "import sys, train; loop = train.Run.log\n" \
             "def log(self, **r):\n    if r.get('step') == 3: sys.exit(7)\n    loop(self, **r)\n" \
             "train.Run.log = log; train.main(train.parse_flags(sys.argv[1:]))"
    (tmp_path / "killed.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + script)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "killed.py"), *TINY, "--name", "cut",
                    "--save-memory", "shard"], cwd=tmp_path, capture_output=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert sorted(f.name for f in cut.glob("state-*")) == ["state-estep-2.0.pt", "state-estep-2.1.pt"]
    start(2, "--name", "cut", "--resume")
    for stage in STAGES:
        assert (cut / stage / "model.safetensors").read_bytes() == (two / stage / "model.safetensors").read_bytes(), stage
    phases = lambda folder: [r for line in (folder / "metrics.jsonl").read_text().splitlines() if "phase" in (r := json.loads(line))]
    assert phases(cut) == phases(two)
