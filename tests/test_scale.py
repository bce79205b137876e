"""What large models need: recipes, recomputed blocks, masters of bfloat16 weights, each rank's share of them."""
import copy
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import elbo
import estep
import model as model_module
import train
from elbo import ACTION, FREE, PROMPT, Trace, collate
from model import GPT, GPTConfig, load_pretrained, save_tokenizer
from mstep import Masters
from test_train import results, run, run_here
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
    assert len(train.Settings().flat()) <= 45


def test_an_unknown_recipe_is_one_sentence():
    with pytest.raises(ValueError, match="--recipe qwen: expected one of world, smollm2-135m, "):
        parse_flags(["--recipe", "qwen"])


def test_a_shorter_context_is_kept_to(tmp_path, monkeypatch):
    """Prompt and answer of the world's problems fit 512 tokens, the base's own context, but not 230."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="leaves less than 224 of the 230 tokens"):
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


def test_in_parts_the_e_step_and_likelihoods_are_what_they_are_at_once(monkeypatch):
    """6 positions at a time, of programs that share a row, or all at once: the same terms and the same gradient, and no more logits than that."""
    torch.manual_seed(0)
    monkeypatch.setattr(model_module, "POSITIONS", 6)
    model, batch, seen, made = GPT(GPTConfig(vocab_size=80, n_layer=2)), collate(traces(3, 40, 80), rows=[[0, 2], [1]]), [], []
    pi, unembed = GPT(model.config).requires_grad_(False), model.unembed
    monkeypatch.setattr(model, "unembed", lambda x: made.append(len(x)) or unembed(x))
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        gate, token, pi_token, anchor = estep.likelihoods(model, pi, batch, openers(80))
        logp = elbo.token_logprobs(model, batch)
        (gate.sum() + 2 * token.sum() + 3 * anchor + logp.square().sum()).backward()
        seen.append([gate, token, pi_token, anchor, logp, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert made[:2] == [117, 117] and sorted(made[2:]) == [3] * 4 + [6] * 76    # E-step and likelihoods, each forward and backward


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


def write_bfloat16(folder: Path) -> str:
    """The base model in bfloat16, as real ones are kept."""
    model, enc = load_pretrained(ROOT / "base")
    model.save_pretrained(folder, torch.bfloat16)
    save_tokenizer(enc, folder)
    return str(folder)


TINY = ("--experts 16 --eval-problems 2 --e-steps 4 --e-programs 3 --e-rollouts 2 --m-steps 2 --m-programs 6 --rl-steps 0 --max-new-tokens 80 --save-every 2 "
        "--micro-batch 2 --arms ra3").split()
STAGES = ("estep", "ra3")
KILLED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
log = train.Run.log
def killed(self, **record):
    if record.get("step") == 3:
        sys.exit(7)
    log(self, **record)
train.Run.log = killed
train.main(train.parse_flags(sys.argv[1:]))
"""


def test_ranks_that_share_the_masters_train_as_one_does_and_resume_exactly(tmp_path):
    """Three programs on two ranks, which own about half of the masters each."""
    base = write_bfloat16(tmp_path / "base")
    flags = [*TINY, "--model", base]
    run_here(tmp_path, *flags, "--name", "one", "--save-memory", "offload")
    (tmp_path / "killed.py").write_text(KILLED)                     # in the E-step, after the checkpoint of two updates
    run(tmp_path, *flags, "--name", "cut", "--save-memory", "shard", ranks=2, script=tmp_path / "killed.py")
    one, two, cut = (tmp_path / "runs" / name for name in ("one", "two", "cut"))
    assert sorted(f.name for f in cut.glob("state-*")) == ["state-2.0of2.pt", "state-2.1of2.pt"]
    for name, how in (("two", [*flags, "--save-memory", "shard"]), ("cut", ["--resume"])):
        done = run(tmp_path, *how, "--name", name, ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
    begin = load_file(Path(base) / "model.safetensors")
    for stage in STAGES:
        u, v = load_file(one / stage / "model.safetensors"), load_file(two / stage / "model.safetensors")
        apart = sum((u[k].float() - v[k].float()).square().sum() for k in u) ** 0.5
        moved = sum((u[k].float() - begin[k].float()).square().sum() for k in u) ** 0.5
        assert u["model.norm.weight"].dtype == torch.bfloat16 and 0 < moved and apart < 0.5 * moved, stage
        assert (cut / stage / "model.safetensors").read_bytes() == (two / stage / "model.safetensors").read_bytes(), stage
    phases = lambda folder: [r for r in results(folder) if "phase" in r]
    assert phases(cut) == phases(two)


def test_what_a_stage_may_start_from_is_kept_whole_and_what_is_last_in_the_bases_precision(tmp_path, monkeypatch):
    """Seven stages of a bfloat16 model would else take twice the disk; rounded, small updates would be lost to the next stage."""
    enc, seen = load_pretrained(ROOT / "base")[1], []

    def loop(run, name, model):
        seen.append(copy.deepcopy(model.state_dict()))
        for p in model.parameters():
            p.data += 1e-3 * torch.randn_like(p)
        seen.append(copy.deepcopy(model.state_dict()))
    run = train.Run(parse_flags([]), tmp_path, enc, torch.bfloat16)
    first = run.stage("ra3", write_bfloat16(tmp_path / "bf16"), lambda *args: loop(*args))
    monkeypatch.setattr(train, "grpo", loop)
    last = run.stage("rlvr-ra3", first, train.grpo)
    _, trained, start, end = seen
    assert all(torch.equal(start[k], trained[k]) and start[k].dtype == torch.float32 for k in start)
    assert any(not torch.equal(v, v.bfloat16().float()) for v in trained.values())
    kept = load_file(last / "model.safetensors")
    assert all(torch.equal(kept["model." + k], end[k].bfloat16()) for k in end)
    assert json.loads((last / "config.json").read_text())["torch_dtype"] == "bfloat16"
    (tmp_path / "plain").mkdir()
    run = train.Run(parse_flags([]), tmp_path / "plain", enc, torch.float32)
    assert load_file(run.stage("rlvr-ra3", first, train.grpo) / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_masters_may_be_shared_anew_at_a_restart():
    """The shares of two ranks make the state of one, and the other way round."""
    torch.manual_seed(0)
    start = GPT(GPTConfig(vocab_size=64, n_layer=1))

    def masters(model, rank, n):
        with mock.patch("mstep.ranks", lambda: (rank, n)):
            return Masters(torch.optim.Adam, model.parameters(), "cpu", lr=1e-2)
    models = [copy.deepcopy(start) for _ in range(3)]
    whole, *shares = [masters(model, rank, n) for model, (rank, n) in zip(models, [(0, 1), (0, 2), (1, 2)])]
    assert {*shares[0].masters} | {*shares[1].masters} == {*whole.masters} and not {*shares[0].masters} & {*shares[1].masters}
    for model, optimizer in zip(models, [whole, *shares]):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    again = masters(copy.deepcopy(start), 0, 1)
    again.load_state_dict(shares[0].state_dict() | shares[1].state_dict())
    for a, b in ((again, whole), *((share, whole) for share in shares)):
        b = b.state_dict()
        if a is not again:
            a.load_state_dict(copy.deepcopy(b))
        for n, mine in a.state_dict().items():
            assert mine.keys() == b[n].keys() == {"master", "step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(mine[k], b[n][k]) for k in mine)
