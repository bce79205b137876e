"""Each module shows its idea when it is run, and the check with which it ends holds."""
import pytest
import torch

import elbo
import estep
import mstep
import rlvr


@pytest.mark.parametrize("module, shown", [
    (elbo, ["log pi", "log-likelihood"]),
    (estep, ["rewards, returns, advantages", "gradient: norm"]),
    (mstep, ["NTP: ", "infused: ", "after an update"]),
    (rlvr, ["advantage +", "clipped loss"]),
])
def test_a_module_that_is_run_shows_its_idea_and_the_check_holds(module, shown, capsys):
    torch.manual_seed(0)
    module.demo()
    printed = capsys.readouterr().out
    assert all(text in printed for text in shown)
    check = printed.splitlines()[-1]
    assert check.startswith("check, ") and check.endswith(": True")
