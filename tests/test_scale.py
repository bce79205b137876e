"""What large models need: presets, recomputed blocks, the prediction of memory, sharding."""
import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import elbo
import estep
import mstep
import rlvr
import train
from elbo import ACTION, FREE, PROMPT, Trace, collate
from model import GPT, SHAPES, GPTConfig, generate, load_pretrained, memory, parameters
from train import PRESETS, parse_flags

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------------------------------------ presets


def test_flags_win_over_a_preset_and_a_preset_over_the_defaults():
    s = parse_flags(["--micro-batch", "7", "--preset", "qwen2.5-1.5b", "--no-checkpoint-blocks"])
    assert (s.model, s.micro_batch, s.checkpoint_blocks, s.gamma) == ("Qwen/Qwen2.5-1.5B", 7, False, train.Settings().gamma)
    assert parse_flags(["--preset", "world"]) == parse_flags([]) == train.Settings()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_work(preset, monkeypatch):
    s = parse_flags(["--preset", preset])
    monkeypatch.setenv("WORLD_SIZE", "8")
    s.check()                                                         # names that are no setting would have raised before
    # A row that is packed holds every program, and sampling leaves a prompt more than half of the context.
    assert preset == "world" or s.row_tokens == s.context >= 2 * s.max_new_tokens


def test_a_shorter_context_is_kept_to(tmp_path, monkeypatch):
    """Prompt and answer of the world's problems fit 512 tokens, the base's own context, but not 230."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="exceeds the context of 230|fit the context with room for a rationale"):
        train.main(parse_flags(["--context", "230", "--experts", "64", "--threads", "1", "--model", str(ROOT / "base")]))


def test_a_shorter_context_is_the_runs_and_not_written_to_what_it_trains(tmp_path):
    base, enc = load_pretrained(ROOT / "base")
    base.limit = 200
    for _ in range(2):                                              # made, then found again
        model = train.Run(parse_flags([]), tmp_path, 0, enc).stage("ntp", base, lambda m: None)
        assert model.limit == 200 and model.config.context == 512
        with pytest.raises(ValueError, match="201 tokens does not fit the model's context of 200"):
            model(torch.ones(1, 201, dtype=torch.int64))
    assert GPT.from_pretrained(tmp_path / "ntp").limit == 512


def test_an_unknown_preset_is_one_sentence():
    with pytest.raises(ValueError, match="--preset qwen: expected one of world, smollm2-135m, "):
        parse_flags(["--preset", "qwen"])


def test_recomputed_blocks_outlive_a_stage_and_change_no_gradient(tmp_path):
    start, grads = GPT(GPTConfig(vocab_size=64)), []
    for flag in (True, False):
        start.grad_checkpoint = flag
        kept = train.Run(train.Settings(), tmp_path / str(flag), seed=0).stage("s", start, lambda m: None)
        assert kept.grad_checkpoint == flag == copy.deepcopy(kept).grad_checkpoint
        kept(torch.arange(12)[None]).logsumexp(-1).sum().backward()
        grads.append(kept.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*grads)


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
        gate, token, pi_token, anchor = estep.compare(model, pi, batch, openers(80), positions=6)
        (gate.sum() + 2 * token.sum() + 3 * anchor).backward()
        seen.append([gate, token, pi_token, anchor, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- bfloat16 weights, float32 elsewhere


def test_masters_in_main_memory_keep_the_updates_that_bfloat16_loses():
    """Thirty updates at 1e-5. Plain bfloat16 loses all but the small weights' updates; with masters, float32's path is followed."""
    torch.manual_seed(0)
    start = GPT(GPTConfig(vocab_size=64, n_layer=1)).bfloat16()

    def trained(model, make, updates=30, optimizer=None):
        optimizer = optimizer or make(model)
        for step in range(updates):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(torch.arange(20)[None])[0].float(), torch.arange(1, 21)).backward()
            optimizer.step()
        return model.layers[0].mlp.up_proj.weight.detach().float(), optimizer

    def adam(model):
        return torch.optim.Adam(model.parameters(), lr=1e-5)

    def masters(model):
        return train.OnCPU(torch.optim.Adam, model.parameters(), lr=1e-5)
    begin = start.layers[0].mlp.up_proj.weight.detach().float()
    reference, plain = trained(copy.deepcopy(start).float(), adam)[0], trained(copy.deepcopy(start), adam)[0]
    ours, optimizer = trained(copy.deepcopy(start), masters)
    apart = lambda w: float((w - reference).norm() / (reference - begin).norm())
    index = [n for n, _ in start.named_parameters()].index("layers.0.mlp.up_proj.weight")
    assert apart(plain) > 0.5 > 0.1 > apart(optimizer.exact[index])
    assert torch.equal(ours, optimizer.exact[index].bfloat16().float())
    # Saved and found again, halfway: the same weights in the end.
    model = copy.deepcopy(start)
    half = trained(model, masters, 15)[1]
    again = masters(copy.deepcopy(start))
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    other = copy.deepcopy(model)
    again.params = list(other.parameters())
    assert torch.equal(trained(other, None, 15, again)[0], ours)


def test_a_model_at_rest_makes_room_for_the_next(tmp_path):
    class Model:                                                      # only where it is, there being no second device here
        device = torch.device("cpu")

        def to(self, device):
            self.device = torch.device(device)
            return self
    run, a, b = train.Run(train.Settings(), tmp_path, seed=0), Model(), Model()
    run.device = torch.device("meta")
    assert [run.use(a).device.type, run.use(a).device.type, run.use(b).device.type, a.device.type] == ["meta", "meta", "meta", "cpu"]
    run.use(None)
    assert b.device.type == "cpu"


# ------------------------------------------------------------------------------------------------------------------ memory


class Peak(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at a time, at most: every operation, forward and backward, passes here."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, {}
        gc.collect()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := (storage := t.untyped_storage())._cdata) not in given and key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, key)
        return out

    def gone(self, key):
        self.now -= self.alive.pop(key)


BLOCKS, WORDS, WIDE = (GPTConfig(head_dim=16, **c) for c in (
    dict(vocab_size=128, d_model=64, n_layer=6, d_ff=160, qk_norm=True),              # blocks weigh most
    dict(vocab_size=4000, d_model=16, n_layer=1, d_ff=32, tie_embeddings=False),      # logits weigh most
    dict(vocab_size=3000, d_model=192, n_layer=2, d_ff=512)))                         # the embedding's gradient weighs most
FIXED = ("weights", "gradients", "Adam's moments", "frozen copy")


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("precision", ("float32", "autocast", "bfloat16"))
@pytest.mark.parametrize("phase", ("estep", "mstep", "rlvr"))
def test_a_training_step_takes_the_memory_that_is_predicted(phase, precision, recompute):
    rows, length, positions = 2, 96, 48
    for cfg in (BLOCKS, WORDS, WIDE):
        model = GPT(cfg).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
        model.grad_checkpoint = recompute
        pi = copy.deepcopy(model).requires_grad_(False)
        for p in model.parameters():                                  # there from the micro-batches before
            p.grad = torch.zeros_like(p)
        programs = traces(rows, length + 1, cfg.vocab_size)
        batch = mstep.packed_batch(programs, [[i] for i in range(rows)]) if phase == "mstep" else collate(programs)
        with Peak() as measured:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
                if phase == "estep":
                    gate, token, _, anchor = estep.compare(model, pi, batch, openers(cfg.vocab_size), positions)
                    loss = gate.sum() + token.sum() + anchor
                else:
                    loss = mstep.loss(model, batch) if phase == "mstep" else rlvr.token_logprobs(model, batch).sum()
            loss.backward()
        predicted = memory(cfg, phase, rows=rows, length=length, precision=precision, recompute=recompute, frozen=phase == "estep", positions=positions)
        assert predicted["total"] - sum(predicted.get(k, 0) for k in FIXED) == pytest.approx(measured.most, rel=0.1), (cfg, predicted)


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
def test_what_stays_takes_the_memory_that_is_predicted(precision):
    """Weights, gradients, optimizer states, exactly."""
    for cfg in (BLOCKS, WORDS, GPTConfig(qkv_bias=True)):
        model = GPT(cfg).to(getattr(torch, precision))
        optimizer = (train.OnCPU if precision == "bfloat16" else lambda kind, p: kind(p))(torch.optim.AdamW, model.parameters())
        model(torch.arange(9)[None]).sum().backward()
        optimizer.step()
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
        predicted = memory(cfg, "mstep", rows=1, length=9, precision=precision)
        assert predicted["weights"] == size(model.parameters()) and predicted["gradients"] == size(p.grad for p in model.parameters())
        moments = [v for state in (optimizer.inner if precision == "bfloat16" else optimizer).state.values() for v in state.values() if v.ndim]
        assert predicted.get("Adam's moments", 0) == (size(moments) if precision == "float32" else 0) and parameters(cfg)[0] * 8 == size(moments)


@pytest.mark.parametrize("precision", ("float32", "autocast", "bfloat16"))
def test_sampling_takes_no_more_memory_than_is_predicted(precision):
    _, enc = load_pretrained(ROOT / "base")
    programs = [elbo.parse(enc, p.prompt, p.solution, 0) for p in bench.world("train", 12, seed=0)]
    for cfg in (GPTConfig(vocab_size=enc.n_vocab, d_model=64, n_layer=6, d_ff=160, head_dim=16),
                GPTConfig(vocab_size=8000, d_model=16, n_layer=1, d_ff=32, head_dim=16)):
        model = GPT(cfg).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
            with Peak() as rollouts:
                longest = max(len(t.tokens) for t in estep.rollout(model, enc, programs, list(range(12)), openers(cfg.vocab_size), max_rationale=4))
            with Peak() as answers:
                generate(model, [p.prompt for p in programs], max_new_tokens=8, seeds=list(range(12)))
        length = max(len(p) + 8 * len(p.lines) for p in programs)     # as long as a rollout's cache can grow
        predicted = memory(cfg, "sampling", rows=12, length=length, precision=precision)
        predicted = predicted["total"] - sum(predicted.get(k, 0) for k in FIXED)
        assert longest <= length
        assert max(rollouts.most, answers.most) <= predicted <= 3 * rollouts.most


@pytest.mark.parametrize("name, published", [("HuggingFaceTB/SmolLM2-135M", 134_515_008), ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
                                             ("meta-llama/Llama-3.2-1B", 1_235_814_400), ("meta-llama/Llama-3.1-8B", 8_030_261_248)])
def test_real_models_have_as_many_weights_as_published(name, published):
    with torch.device("meta"):
        built = sum(p.numel() for p in GPT(SHAPES[name]).parameters())
    assert built == parameters(SHAPES[name])[0] == published


@pytest.mark.parametrize("preset, gpus, card", [("smollm2-135m", 1, 24), ("qwen2.5-1.5b", 1, 80), ("llama-3.2-1b", 1, 80), ("qwen2.5-1.5b-24gb", 1, 24),
                                                ("llama-3.2-1b-24gb", 1, 24), ("llama-3.1-8b", 8, 80)])
def test_every_preset_fits_its_card(preset, gpus, card):
    s = parse_flags(["--preset", preset])
    for phase, terms in train.predict(s, SHAPES[s.model], gpus).items():
        assert terms["total"] <= train.ROOM * card, (phase, terms)
    # The small card's measures are needed: without either, the prediction exceeds it.
    if card == 24 and gpus == 1 and s.offload:
        for flag in ("--no-offload", "--no-checkpoint-blocks"):
            wasteful = parse_flags(["--preset", preset, flag])
            assert max(terms["total"] for terms in train.predict(wasteful, SHAPES[s.model]).values()) > train.ROOM * card, flag


def test_the_prediction_is_printed_without_the_model(capsys):
    train.main(parse_flags(["--preset", "qwen2.5-1.5b", "--memory"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["sampling", "estep", "mstep", "rlvr"]
    assert "fits 80 GB, does not fit 24 GB" in lines[-1]


# ----------------------------------------------------------------------------------------------------------------- sharding

STORY = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import estep, mstep, rlvr, train
from model import load_pretrained
from sandbox import Sandbox

folder, flags = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
if "--shard" in flags:
    dist.init_process_group("gloo")
s = train.parse_flags(flags)
base, enc = load_pretrained(s.model)
base.grad_checkpoint = s.checkpoint_blocks
box = Sandbox(workers=1)
data = train.load_data(s, base, enc, box)
plain, heldout = [p.trace() for p in data.experts], [p.trace() for p in data.heldout]

def story(where, cut=None):
    run = train.Run(s, folder / where, 0)
    log = run.log
    def interrupted(**record):
        if record.get("step") == cut:
            raise KeyboardInterrupt
        log(**record)
    if cut is not None:
        run.log = interrupted
    q = run.stage("estep", base, lambda m: estep.e_step(run, "estep", m, data))
    run.stage("ra3", q, lambda m: mstep.m_step(run, "ra3", m, data, plain, heldout, s.m_steps))
    run.stage("rlvr", base, lambda m: rlvr.grpo(run, "rlvr", m, data, box, lambda m: 0.0))

story("whole")
if "--shard" in flags:
    try:
        story("cut", cut=3)
    except KeyboardInterrupt:
        assert (folder / "cut/state.pt").exists()
    story("cut")
box.close()
if "--shard" in flags:
    dist.destroy_process_group()
"""
TINY = ("--experts 16 --eval-problems 2 --e-steps 4 --e-programs 3 --e-rollouts 2 --m-steps 2 --m-programs 6 --rl-steps 1 --rl-problems 3 --rl-group 4 "
        "--rl-pool 8 --max-new-tokens 80 --save-every 2 --micro-batch 2 --checkpoint-blocks").split() + ["--model", str(ROOT / "base")]


def test_two_sharded_ranks_train_as_one_process_does(tmp_path):
    """Three programs on two ranks: micro-batches of unequal number. And interrupted at the E-step's last update, they go on to the same bits."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    (tmp_path / "story.py").write_text(STORY)
    for start, folder, flags in (([sys.executable], "one", []),
                                 ([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "two", ["--shard"])):
        done = subprocess.run([*start, str(tmp_path / "story.py"), str(tmp_path / folder), *TINY, *flags], cwd=tmp_path, capture_output=True, text=True,
                              env=environment, timeout=250)
        if "sums gradients on cpu where it should average them" in done.stderr:
            pytest.skip("this torch cannot shard on a CPU")
        assert done.returncode == 0, done.stderr[-3000:]
    one, two, cut = (tmp_path / folder for folder in ("one/whole", "two/whole", "two/cut"))
    a, b, c = ([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines() if "phase" in line] for f in (one, two, cut))
    assert len(a) == len(b) and b == c
    for x, y in zip(a, b):
        for k in set(x) - {"show", "phase"}:
            assert y[k] == pytest.approx(x[k], rel=2e-3, abs=2e-3), (x, y)
    begin = load_file(ROOT / "base/model.safetensors")
    for stage in ("estep", "ra3", "rlvr"):
        u, v, w = (load_file(f / stage / "model.safetensors") for f in (one, two, cut))
        apart = sum((u[k] - v[k]).square().sum() for k in u) ** 0.5
        moved = sum((u[k] - begin[k]).square().sum() for k in u) ** 0.5
        assert 0 < moved and apart < 0.1 * moved, stage
        assert all(torch.equal(v[k], w[k]) for k in u), stage


def test_sharding_needs_several_processes():
    for flags, said in ((["--shard"], "needs several processes"), (["--shard", "--offload"], "cannot be had together")):
        with pytest.raises(ValueError, match=said):
            parse_flags(flags).check()
