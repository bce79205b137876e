"""A run that is stopped, killed or damaged goes on exactly; two writers, orphans, signals."""
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import bench
import train
from test_train import ROOT, SMALL, STAGES, command, metrics, results, run, run_here, whole  # noqa: F401


def same(a: Path, b: Path, stages=STAGES):
    """Are two runs equal, bit for bit, but for speed and memory?"""
    assert results(a) == results(b)
    for stage in stages:
        assert (a / stage / "model.safetensors").read_bytes() == (b / stage / "model.safetensors").read_bytes(), stage


def start_until(folder: Path, flags: list[str], phase: str, step: int) -> subprocess.Popen:
    """A run that has just logged this step of this phase."""
    process = subprocess.Popen(command(*flags), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    log = folder / "runs/cut/metrics.jsonl"
    while process.poll() is None and not (log.exists() and f'"phase": "{phase}", "step": {step}' in log.read_text()):
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be stopped"
    return process


def damage(file: Path, how: str):
    data = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": data[:len(data) // 2], "zeros": data[:len(data) // 2] + bytes(len(data) - len(data) // 2),
                      "overwritten": data[:9000] + b"Z" * 400 + data[9400:]}[how])


def test_stopped_damaged_and_resumed_equals_uninterrupted(whole, tmp_path):
    """Killed in the E-step, after whose last update but one a checkpoint is damaged; terminated in the M-step; interrupted in RLVR."""
    folder, flags = tmp_path / "runs/cut", [*SMALL, "--name", "cut", "--save-every", "1"]
    for phase, number in (("estep", signal.SIGKILL), ("ra3", signal.SIGTERM), ("rlvr-base", signal.SIGINT)):
        process = start_until(tmp_path, flags, phase, 2)
        kept = lambda: sorted(f.name for f in folder.glob("state-*.pt"))
        while phase == "estep" and process.poll() is None and kept() != ["state-2.0of1.pt", "state-3.0of1.pt"]:
            time.sleep(0.01)                                                      # the fourth update takes longer than a look
        if phase == "estep":                                                      # a second writer is refused, and changes nothing
            process.send_signal(signal.SIGSTOP)
            busy = run(tmp_path, "--name", "cut", "--resume")
            assert busy.returncode == 2 and "runs/cut is being written by another process" in busy.stderr.splitlines()[-1]
        process.send_signal(number)
        said = process.communicate()[1]
        if number != signal.SIGKILL:
            assert process.returncode == 130 and "Traceback" not in said
            assert said.splitlines()[-1] == "train.py: stopped; go on with --resume --name cut"
        flags = ["--name", "cut", "--resume"]                                     # all else it knows
        if phase == "estep":
            assert kept() == ["state-2.0of1.pt", "state-3.0of1.pt"]
            damage(folder / "state-3.0of1.pt", "overwritten")
        elif phase == "ra3":
            assert "state-3.0of1.pt is damaged" in said
    run_here(tmp_path, *flags)
    same(folder, whole[0])


def test_every_kind_of_damage_is_seen(tmp_path, capsys):
    run, files = train.Run(train.Settings(), tmp_path), [tmp_path / f"state-2.{rank}of2.pt" for rank in range(2)]
    for rank, file in enumerate(files):
        train.save({rank: {"master": torch.arange(9000.0)}}, file)
    whole_file = files[1].read_bytes()
    assert run.checkpoint(2).keys() == {0, 1} and not run.checkpoint(1) and not run.checkpoint(22)
    for how in ("empty", "truncated", "zeros", "overwritten"):
        files[1].write_bytes(whole_file)
        damage(files[1], how)
        assert not run.checkpoint(2) and "state-2.1of2.pt is damaged" in capsys.readouterr().err, how
    files[1].unlink()                                                             # killed before the second rank had saved
    assert not run.checkpoint(2)


def test_a_damaged_log_is_cut_back_to_what_is_whole(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "runs/cut")
    log = tmp_path / "runs/cut/metrics.jsonl"
    data = log.read_bytes()
    log.write_bytes(data[:-600] + bytes(600))                                     # as a power failure leaves it
    assert "metrics.jsonl: line" in run_here(tmp_path, "--name", "cut", "--resume")
    same(tmp_path / "runs/cut", whole[0])


@pytest.mark.parametrize("text", ("", "{}", "[]", '{"settings": 3, "unfit": {}}'))
def test_a_damaged_config_is_named(whole, tmp_path, monkeypatch, text):
    shutil.copytree(whole[0], tmp_path / "runs/cut")
    (tmp_path / "runs/cut/config.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/cut/config.json is damaged"):
        train.main(train.parse_flags(["--name", "cut", "--resume"]))


def test_ranks_end_with_their_launcher(tmp_path):
    """kill -9 of torchrun leaves no orphans that train on."""
    process = subprocess.Popen(command(*SMALL, "--name", "cut", "--e-steps", "500", ranks=2), cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    process.stdout.readline()                                                 # its first line: where it writes
    alive = lambda: subprocess.run(["pgrep", "-f", f"train.py.*{tmp_path.name}|train.py.*--e-steps 500"], capture_output=True, text=True).stdout.split()
    assert len(alive()) >= 2
    process.kill()
    process.wait()
    for _ in range(100):
        if not alive():
            break
        time.sleep(0.1)
    assert not alive()


def test_a_cold_start_in_rounds_survives_a_kill(tmp_path):
    """A warm-up makes the base of every arm; each round trains on programs that no other has seen, also when the run is cut between them."""
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"x = {i}\ny = x + {i}\n"}) + "\n" for i in range(40)))
    web = [p.prompt + " " + p.solution.lstrip() for p in bench.world("web", 60, seed=9)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in web))
    flags = ["--model", str(ROOT / "base"), "--data", "corpus.jsonl", "--rounds", "2", "--experts", "20", "--m-programs", "20", "--m-steps", "2", "--e-steps", "1",
             "--e-programs", "2", "--e-rollouts", "2", "--rl-steps", "0", "--eval-problems", "2", "--arms", "ra3,ntp", "--warm-data", "web.jsonl",
             "--warm-steps", "1", "--explore", "0.5", "--max-new-tokens", "60"]
    said = run_here(tmp_path, *flags, "--name", "whole")
    assert said.count("\nstage ") == int(said.rpartition(" of ")[2].partition(":")[0]) == 13
    whole = tmp_path / "runs/whole"
    stages = {"warm", *(p + tag for p in ("estep", "ra3", "ntp") for tag in ("", ".2"))}
    assert {r["phase"] for r in metrics(whole) if "phase" in r} == stages and (whole / "infused.2.jsonl").exists()
    assert {r["key"] for r in metrics(whole) if r.get("key", "").startswith("eval/")} == {"eval/cold", "eval/base", "eval/ra3", "eval/ntp"}
    # As if it had been killed in the second round: what came after is gone.
    cut = tmp_path / "runs/cut"
    shutil.copytree(whole, cut)
    text = (whole / "metrics.jsonl").read_bytes()
    (cut / "metrics.jsonl").write_bytes(text[:text.index(b"\n", text.index(b'"cost/estep.2"')) + 1])
    run_here(tmp_path, "--name", "cut", "--resume")
    same(cut, whole, stages)
