"""What large models need: presets, recomputed blocks, the prediction of memory, sharding."""
import copy

import pytest
import torch

import train
from model import GPT, GPTConfig
from train import PRESETS, parse_flags


# ------------------------------------------------------------------------------------------------------------------ presets


def test_flags_win_over_a_preset_and_a_preset_over_the_defaults():
    s = parse_flags(["--micro-batch", "7", "--preset", "qwen2.5-1.5b", "--no-checkpoint-blocks"])
    assert (s.model, s.micro_batch, s.checkpoint_blocks, s.gamma) == ("Qwen/Qwen2.5-1.5B", 7, False, train.Settings().gamma)
    assert parse_flags(["--preset", "world"]) == parse_flags([]) == train.Settings()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_work(preset):
    s = parse_flags(["--preset", preset])
    s.check()                                                         # names that are no setting would have raised before
    # A row that is packed holds every program, and sampling leaves a prompt more than half of the context.
    assert preset == "world" or s.row_tokens == s.context >= 2 * s.max_new_tokens


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
