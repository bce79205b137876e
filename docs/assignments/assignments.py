"""Make a student's copy of this repository, and grade one.

    python docs/assignments/assignments.py copy OUT                  # the exercises blanked, all else whole
    python docs/assignments/assignments.py grade COPY                # points, and the first fact that fails
    python docs/assignments/assignments.py grade COPY --only returns --json results.json    # for Gradescope
    python docs/assignments/assignments.py leaderboard runs/mine     # a line for the open exercise

An exercise (exercises.py) is one or two functions, found by name. What a student wrote is compared with what
this repository computes, on inputs drawn from a seed. Of a student's file only the bodies of these functions
are read. All else is this repository's, so a mistake costs once.

    grader, this process: draws the inputs, computes the reference's answers, compares
       |---> server: has imported the modules; sees no answer of the reference
                |---fork---> a child per exercise: puts the student's bodies in, draws the same inputs, gives
                             up every right (`lock`), and only then calls them; answers are JSON in a file

So a child can compute, and write to that file: the worst that it can do, whatever it prints, patches or
forges, is to answer wrongly. (The right bodies are no secret, they stand in this repository. Whether a
student has written them no grader can say.) Needs Linux with seccomp, as sandbox.py does.
"""
import argparse
import ast
import importlib
import itertools
import json
import math
import os
import resource
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
from exercises import EXERCISES, MODULES, Draw, Exercise

import sandbox

COPIED = ("*.py", "base/*", "docs/*.py", "docs/*.md", "docs/assignments/README.md",
          "LICENSE", "README.md", "constraints.txt", "pyproject.toml", "recipes.ini")
# What a student's function may import beside what the modules have: a locked process finds no file.
IMPORTED = ("bisect collections copy functools heapq itertools math numpy.random operator random "
            "statistics").split()
MEMORY_MB = 2048           # that a child may allocate beside the modules
ANSWER_MB = 4              # size of its answers
GRACE_S, PATIENCE = 2, 4   # its CPU seconds: these, and so many times those of the reference
WALL_S = 50                # its wall time, should it sleep
BUDGET = 3_000_000         # tokens of the open exercise; RA3 takes 6.7M by default

# ------------------------------------------------------------------------------------------- a student's copy


def definitions(source: str) -> dict[str, ast.FunctionDef]:
    """The functions of a module, by name. Raises SyntaxError, ValueError if it is not Python."""
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def blank(source: str, messages: dict[str, str]) -> str:
    """The source with the bodies of these functions replaced by an exception, their docstrings kept."""
    lines, functions = source.split("\n"), definitions(source)
    for name in sorted(messages, key=lambda name: -functions[name].lineno):     # from the end: lines stay put
        docstring = functions[name].body[0]
        text = f"    raise NotImplementedError({json.dumps(messages[name])})"
        lines[docstring.end_lineno:functions[name].end_lineno] = [text]
    return "\n".join(lines)


def make_copy(out: Path):
    """Write the repository with its exercises blanked. Raises ValueError if something is there already."""
    if out.exists():
        raise ValueError(f"{out} exists: choose another name")
    for file in [file for pattern in COPIED for file in ROOT.glob(pattern) if file.is_file()]:
        target = out / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    for name in MODULES:
        tasks = [(key, task) for key, task in EXERCISES.items() if task.module == name]
        messages = {f: f"exercise {key}: {task.hint}" for key, task in tasks for f in task.functions}
        file = out / f"{name}.py"
        file.write_text(blank(file.read_text(), messages))
    print(f"{out}: {len(EXERCISES)} exercises; {out / 'docs/assignments/README.md'} says what to write")


# ----------------------------------------------------------- a student's functions, in a process of their own


def put_in(exercise: Exercise, source: str):
    """Give the exercise's functions the bodies that they have in a student's source, and run nothing of it.

    Signature, defaults and decorators are the reference's. Raises SyntaxError, ValueError if the source is
    not Python or has no such function.
    """
    module = MODULES[exercise.module]
    ours, theirs = definitions(Path(module.__file__).read_text()), definitions(source)
    for name in exercise.functions:
        if name not in theirs:
            raise ValueError(f"{exercise.module}.py has no function {name}")
        ours[name].body, reference = theirs[name].body, getattr(module, name)
        code = compile(ast.Module([ours[name]], []), f"{exercise.module}.py", "exec")
        exec(code, vars(module))
        for other in MODULES.values():               # where the reference has been imported to
            for key in [key for key, value in vars(other).items() if value is reference]:
                setattr(other, key, getattr(module, name))


def lock(seconds: float):
    """Leave this process nothing but to compute, for so many CPU seconds more, and to write what is open."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = dict(RLIMIT_CPU=math.ceil(used.ru_utime + used.ru_stime + seconds), RLIMIT_CORE=0,
                  RLIMIT_AS=pages * resource.getpagesize() + (MEMORY_MB << 20), RLIMIT_FSIZE=ANSWER_MB << 20)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    seccomp = sandbox.build_filter(os.uname().machine)
    sandbox.libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))        # root without capabilities
    if not sandbox.install_filter(seccomp):
        raise RuntimeError("this machine has no seccomp, without which no student's code is run")


def plain(value):
    """Tensors and tuples as lists: what JSON can carry."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def describe(error: BaseException, source: str, file: str) -> str:
    """An exception in words, with the last line of the student's file that it came through."""
    if isinstance(error, NotImplementedError):
        return "NotImplementedError: it is not written yet"
    if isinstance(error, SyntaxError):
        return f"SyntaxError: line {error.lineno} of {file}: {error.msg}"
    text, lines = f"{type(error).__name__}: {error}"[:500], source.split("\n")
    for frame in reversed(traceback.extract_tb(error.__traceback__, limit=-50)):
        if frame.filename == file:
            return f"{text} (line {frame.lineno} of {file}: {lines[frame.lineno - 1].strip()[:100]})"
    return text


def call_student(folder: str, name: str, seed: int, seconds: float, answers: str):
    """Be the child: write a line of JSON for each fact, {"value"} or, the last, {"error"}. Never returns."""
    exercise, source = EXERCISES[name], ""
    file = f"{exercise.module}.py"
    os.closerange(3, 4096)
    channel, null = open(answers, "w"), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)                      # functions may print
    try:
        source = (Path(folder) / file).open().read(1 << 20)
        put_in(exercise, source)
        facts = list(exercise.facts(Draw(seed, name)))
        lock(seconds)
        for fact in facts:
            print(json.dumps({"value": plain(fact.answer())}), file=channel, flush=True)
    except BaseException as e:
        print(json.dumps({"error": describe(e, source, file)}), file=channel, flush=True)
    finally:
        os._exit(0)


def serve():
    """Fork a child for each line of stdin, the arguments of `call_student`; print how it ended."""
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    for job in sys.stdin:
        child = os.fork()
        if child == 0:
            call_student(*json.loads(job))
        in_time = signal.sigtimedwait([signal.SIGCHLD], WALL_S)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.sigtimedwait([signal.SIGCHLD], 0)     # that of the kill, which is not the next child's
        killed = not in_time or code in (-signal.SIGXCPU, -signal.SIGKILL)
        ends = "it takes many times what the reference takes" if killed else f"its process has ended ({code})"
        print(json.dumps(ends), flush=True)


# -------------------------------------------------------------------------------------------------- the grade


def difference(got, want, place: str = "the answer") -> str:
    """Where an answer first differs from the reference's, in words; "" if nowhere."""
    kind = type(want)
    if kind in (list, dict):
        if type(got) is not kind or (kind is list and len(got) != len(want)):
            entries = f"{len(got)} entries" if type(got) is list else repr(got)[:60]
            return f"{place} is {entries}, should be {len(want)} entries"
        for key in want if kind is dict else range(len(want)):
            found = difference(got[key], want[key], f"{place}[{key!r}]")
            if found:
                return found
        return ""
    numbers = type(got) in (int, float, bool) and kind is float
    same = math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-5) if numbers else got == want
    if numbers:
        got, want = round(got, 6), round(want, 6)
    return "" if same else f"{place} is {repr(got)[:60]}, should be {want!r}"


def compare(line: bytes, want) -> str:
    """What is wrong with a line of a child's, in words; "" if nothing."""
    try:
        answer = json.loads(line)
        if "error" in answer:
            return f"it raises {answer['error']}"[:800]
        return difference(answer["value"], want)
    except KeyError as e:
        return f"there is no {e} in the answer"
    except (ValueError, TypeError, RecursionError, OverflowError):
        return "there is no valid answer"


class Grader:
    """Grades exercises one by one; a context manager, since it keeps a server."""

    def __enter__(self):
        """Start the server."""
        command = [sys.executable, "-I", __file__, "serve"]        # -I, cwd: nothing of a student is imported
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
                                       env=environment, text=True)
        return self

    def __exit__(self, *error):
        self.server.stdin.close()
        self.server.wait()

    def grade(self, folder: Path, name: str, seed: int) -> str:
        """The first fact that fails, and a hint; "" if all hold."""
        facts = list(EXERCISES[name].facts(Draw(seed, name)))
        began = time.process_time()
        right = [plain(fact.answer()) for fact in facts]
        seconds = GRACE_S + PATIENCE * (time.process_time() - began)
        with tempfile.TemporaryDirectory() as place:
            answers = Path(place) / "answers"
            job = [str(folder.resolve()), name, seed, seconds, str(answers)]
            print(json.dumps(job), file=self.server.stdin, flush=True)
            ended = json.loads(self.server.stdout.readline())
            lines = answers.read_bytes().splitlines() if answers.exists() else []
        for fact, want, line in itertools.zip_longest(facts, right, lines[:len(facts)]):
            problem = ended if line is None else compare(line, want)
            if problem:
                return f"{fact.text}: {problem}\nHint: {EXERCISES[name].hint}"
        return ""


def grade(grader: Grader, folder: Path, names: list[str], seed: int) -> dict:
    """Grade and print; returns what Gradescope reads as results.json."""
    tests = []
    for name in names:
        problem, points = grader.grade(folder, name, seed), EXERCISES[name].points
        score = 0 if problem else points
        tests.append(dict(name=name, score=score, max_score=points, output=problem or "all facts hold"))
        print(f"{score:3} of {points:3}  {name}", *problem.splitlines(), sep="\n            ", flush=True)
    score, best = (sum(test[key] for test in tests) for key in ("score", "max_score"))
    print(f"{score:3} of {best:3}; inputs of seed {seed}")
    return dict(score=score, tests=tests, output=f"inputs of seed {seed}")


# ------------------------------------------------------------------------------------------ the open exercise


def leaderboard(run: Path, budget: int) -> str:
    """The best arm of a run within the budget, as a row of a table. Raises ValueError if there is none.

    An arm's cost is all that was put through a model on its way, in tokens, trained ones three times.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records, found = {line["key"]: line for line in lines if "key" in line}, []
    for arm, stages in {"ra3": {"warm", "estep", "infuse", "ra3"}, "ntp": {"warm", "ntp"}}.items():
        for name, used in {arm: stages, f"rlvr-{arm}": stages | {f"rlvr-{arm}"}}.items():
            costs = [record["tokens"] for key, record in records.items()        # estep.2 is its second round
                     if key.startswith("cost/") and key[5:].partition(".")[0] in used]
            if f"eval/{name}" in records and sum(costs) <= budget:
                found.append((records[f"eval/{name}"]["pass@1"], name, sum(costs)))
    if not found:
        raise ValueError(f"{run}: no arm within {budget:,} tokens has been evaluated")
    rate, name, tokens = max(found)
    return f"| {run.name} | {name} | {rate:.1%} | {tokens:,.0f} |"


def main(argv: list[str] | None = None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("copy", help="make a student's copy")
    sub.add_argument("out", type=Path)
    sub = commands.add_parser("grade", help="grade a copy")
    sub.add_argument("copy", type=Path)
    sub.add_argument("--only", choices=EXERCISES, help="one exercise alone")
    sub.add_argument("--json", type=Path, help="where to write Gradescope's results.json")
    sub.add_argument("--seed", type=int, help="of the inputs; default: a new one")
    sub = commands.add_parser("leaderboard", help="the open exercise: a row for a run")
    sub.add_argument("run", type=Path)
    sub.add_argument("--budget", type=int, default=BUDGET, help="tokens through the model")
    commands.add_parser("serve", help="used by `grade`")
    args = ap.parse_args(argv)
    if args.command == "copy":
        make_copy(args.out)
    elif args.command == "serve":
        serve()
    elif args.command == "leaderboard":
        print(leaderboard(args.run, args.budget))
    elif not args.copy.is_dir():
        raise ValueError(f"{args.copy} is no folder")
    else:
        seed = secrets.randbelow(10**6) if args.seed is None else args.seed
        with Grader() as grader:
            results = grade(grader, args.copy, [args.only] if args.only else list(EXERCISES), seed)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"assignments.py: {e}")
