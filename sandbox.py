"""Run untrusted Python programs against tests, with a verdict that the program cannot forge.

    from sandbox import Asserts, Sandbox
    with Sandbox() as sandbox:
        [verdict] = sandbox.run([Asserts("def add(a, b): return a + b", ("assert add(1, 2) == 3",))])
    print(verdict.passed, verdict.kind, verdict.detail)

Linux on x86-64 or aarch64, Python 3.10 to 3.13, root or not, nothing to install. The processes:

    trainer ---socket---> tester: one for each worker. Runs the tests, and holds the expected values
    your process            |---fork---> zygote: forks the candidates, and watches all clocks
                                            |---fork---> candidate: one for each program. It answers the calls
                                                         of the tester, "name(arguments)", with values

A test-executed reward is as good as its harness: reinforcement learning finds every hole. The decisions:

1. Tests and program never share a process: what a program could read, patch or skip is not there. Values
   travel as tagged JSON of plain types: an object that lies in `__eq__` arrives as the plain value in it.
2. A fault (death, timeout, flood, broken protocol) is the verdict: no bare `except` in a test can forgive it.
3. The candidate can only compute: a seccomp-BPF allowlist, installed before the source is read, refuses every
   other system call (files, sockets, processes, signals). Without seccomp nothing runs.
4. Starting Python with its modules takes 200 ms, forking a warm one 1 ms. No process is a fork of the trainer
   (gigabytes of page tables, secrets), and the zygote is forked before any test is read.
5. A limit is CPU time, of program and tests; four times that in wall time ends those who sleep.
"""

import ast
import atexit
import builtins
import collections
import contextlib
import copyreg
import ctypes
import enum
import errno
import functools
import gc
import importlib
import itertools
import json
import linecache
import math
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import symtable
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from multiprocessing.connection import Connection, Pipe, wait
from typing import NamedTuple

MAX_MESSAGE = 16 << 20        # bytes of one value, or of one program's output; more is a "flood"
MAX_ITEMS = 1 << 20           # of an iterator that a program returns: it may have no end
MAX_THREADS = 256             # of a program; more is a "flood" too
TESTER_MB = 4096              # address space of the tests
PREPARE_S = 60.0              # CPU seconds that the tests of a job may take before they need the program
WALL_FACTOR = 4               # times its timeout_s in wall time ends a program that sleeps
LOOK_S = 0.02                 # between two looks at a program that runs
GRACE_S = 2.0                 # seconds that a tester has after the end of its program: a value may hold it up


# ---- The public face: three kinds of job, one kind of verdict ----

class Check(NamedTuple):
    """A function and `check(candidate)`: HumanEval, HumanEval+, LeetCode."""
    source: str                        # untrusted; continues the prelude if its first line is indented
    test: str                          # trusted; defines `check(candidate)`
    entry_point: str                   # what is tested: the expression `f`, or `Solution().twoSum`
    # Trusted, not secret (the prompt, the imports): runs beside the tests, and before `source`. Instances of
    # its classes (ListNode) can be arguments and results.
    prelude: str = ""
    timeout_s: float | None = None     # CPU seconds of program and tests; None: the sandbox's own


class Asserts(NamedTuple):
    """Functions and a list of assert statements: MBPP, MBPP+. They run in order, up to one that fails."""
    source: str                        # untrusted
    tests: tuple[str, ...]             # trusted statements, all in one namespace
    setup: str = ""                    # trusted, runs before them; of it the candidate gets the imports
    # What the tests may use of the program: `names_under_test(reference, tests)` where there is a reference.
    # Empty: the names in the tests that neither Python nor setup and tests define.
    names: tuple[str, ...] = ()
    timeout_s: float | None = None     # CPU seconds of program and tests; None: the sandbox's own


class Stdio(NamedTuple):
    """A program from stdin to stdout: LiveCodeBench, Codeforces. One process per case, up to a failure."""
    source: str                        # untrusted
    cases: tuple[tuple[str, str], ...]    # pairs (stdin, expected stdout): see `first_difference`
    prelude: str = ""                  # trusted, not secret (imports): runs before `source`, in its namespace
    timeout_s: float | None = None     # CPU seconds of each case; None: the sandbox's own


class Verdict(NamedTuple):
    """kind: "passed", "wrong answer", "exception", "timeout", "memory", "syntax", "crash" (the process died),
    "flood" (too much output, too many threads), "protocol" (no valid answer to a call) or "forbidden call" (a
    system call was refused, and it mattered). tests_passed of tests: statements of Asserts, cases of Stdio; a
    Check is one. seconds: of CPU, of program and tests, as `timeout_s` counts them."""
    passed: bool
    kind: str
    tests_passed: int
    tests: int
    seconds: float
    detail: str


class InvalidJob(ValueError):
    """The trusted half of a job is wrong: `reason` says how, and `index` which job it is."""

    def __init__(self, reason, index):
        super().__init__(f"job {index}: {reason}")
        self.reason, self.index = reason, index


class Sandbox(contextlib.AbstractContextManager):
    """A pool of workers. Use as a context manager, or call `close()`.

    workers: None means one per core that this process may use, shared between the ranks of torchrun here.
    memory_mb: MiB that a program may allocate. timeout_s: CPU seconds for a program whose job names none.
    Raises ValueError for a bad argument, RuntimeError where the sandbox cannot work (no Linux, no seccomp).
    """

    def __init__(self, workers: int | None = None, memory_mb: int = 512, timeout_s: float = 5.0):
        if sys.platform != "linux" or os.uname().machine not in ARCHITECTURES:
            raise RuntimeError(f"the sandbox needs Linux on {' or '.join(ARCHITECTURES)}")
        if workers is None:
            workers = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        for name, value in {"workers": workers, "memory_mb": memory_mb, "timeout_s": timeout_s}.items():
            kinds = (int, float) if name == "timeout_s" else int
            if not isinstance(value, kinds) or not 0 < value < 1e6:
                raise ValueError(f"Sandbox: {name} must be a positive number, not {value!r}")
        self.timeout_s, self._owner, self._running = timeout_s, os.getpid(), False
        self._workers = [_Worker(memory_mb) for _ in range(workers)]
        source = "import os\ndef probe():\n try: os.chdir('/')\n except PermissionError: return 'locked'"
        probe = Asserts(source, ("assert probe() == 'locked'",), timeout_s=PREPARE_S)
        for verdict in self.run([probe] * workers):
            if not verdict.passed:
                self.close()
                raise RuntimeError(f"the sandbox cannot work here: {verdict.kind}: {verdict.detail}")

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Ends every process of this sandbox. May be called twice."""
        if self._owner == os.getpid():
            while self._workers:
                self._workers.pop().close()

    def run(self, jobs: Iterable) -> list[Verdict]:
        """The verdicts of `jobs`, in their order. Raises what `iter` raises."""
        return list(self.iter(jobs))

    def iter(self, jobs: Iterable) -> Iterator[Verdict]:
        """Yields the verdicts of `jobs` in their order, each as soon as it and all before it are there.

        Raises TypeError for what is no job or has no tests, InvalidJob (a ValueError) for tests that do not
        compile or never call the candidate, RuntimeError if the sandbox is closed or busy.
        """
        if self._running or not self._workers or self._owner != os.getpid():
            raise RuntimeError("this Sandbox is busy, closed or of another process: open one per thread")
        self._running, busy = True, []
        todo, place, verdicts = enumerate(jobs), 0, {}     # the next to yield; those that came before it
        try:
            while True:
                idle = [worker for worker in self._workers if worker not in busy]
                for worker, (index, job) in zip(idle, todo):
                    if not isinstance(job, (Check, Asserts, Stdio)) or not job[1]:
                        raise TypeError(f"job {index} is no Check, Asserts or Stdio with tests: {job!r:.80}")
                    busy.append(worker)
                    worker.start(index, job._replace(timeout_s=job.timeout_s or self.timeout_s))
                if not busy:
                    return
                for worker in wait(busy):
                    if verdict := worker.finish():
                        verdicts[worker.index] = verdict
                        busy.remove(worker)
                while place in verdicts:
                    verdict = verdicts.pop(place)
                    if verdict.kind == "invalid":
                        raise InvalidJob(verdict.detail, place)
                    yield verdict
                    place += 1
        finally:
            self._running = False
            for worker in busy:        # left early: nobody waits for the answers that are still out
                worker.close()


class _Worker:
    """The trainer's end of one tester."""

    def __init__(self, memory_mb):
        self.memory_mb = memory_mb
        paths = [path for path in sys.path if os.path.isabs(path) and os.path.isdir(path)]
        # As a module, because Python keeps the bytecode of modules: compiling this file takes longer.
        code = f"""import importlib.machinery as machinery
machinery.SourceFileLoader("sandbox", {os.path.abspath(__file__)!r}).load_module()._tester_main(
    {os.getpid()}, {self.memory_mb}, {paths})"""
        # Some Pythons do not start without LD_LIBRARY_PATH. Threads: glibc reserves 64 MB for each otherwise.
        environment = {"LC_ALL": "C.UTF-8", "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
                       "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        self.channel, theirs = Pipe()
        with theirs:
            self.process = _patiently(lambda: subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.DEVNULL, stdout=theirs.fileno(),
                env=environment, cwd="/", start_new_session=True))

    def fileno(self):                  # for `wait`
        return self.channel.fileno()

    def start(self, index, job, tries=1):
        self.index, self.job, self.tries = index, job, tries
        if self.process.poll() is not None:
            self.close()
            self.__init__(self.memory_mb)      # a new process
        with contextlib.suppress(OSError):     # if it dies, `finish` will see that
            _send(self.channel, self.job._asdict())

    def finish(self) -> Verdict | None:
        """The verdict, when there is something to be read; None if the job has to be tried again."""
        told = {"kind": "crash", "detail": "its worker died twice", "tests_passed": 0, "seconds": 0.0}
        try:
            told = _receive(self.channel)
        except (EOFError, OSError):
            if self.process.wait() == -signal.SIGALRM:     # the zygote's doing
                told |= {"kind": "timeout", "seconds": self.job.timeout_s,
                         "detail": "a value that the program returned held the tests up"}
            elif self.tries == 1:
                return self.start(self.index, self.job, tries=2)
        tests = 1 if isinstance(self.job, Check) else len(self.job[1])
        return Verdict(passed=told["kind"] == "passed", tests=tests, **told)

    def close(self):
        """Ends the tester; the kernel ends its children."""
        self.channel.close()
        self.process.kill()
        self.process.wait()


def _patiently(act):
    """What `act()` returns. It is tried for some seconds: programs may have used up all processes."""
    for pause in (0.1, 0.3, 1, 3, 9):
        with contextlib.suppress(BlockingIOError):
            return act()
        time.sleep(pause)
    return act()


# ---- Messages and values ----

def _send(channel: Connection, message):
    channel.send_bytes(json.dumps(message).encode())


def _receive(channel: Connection, limit=None):
    """Raises EOFError or ConnectionError at the end, OSError above `limit` bytes, ValueError for no JSON."""
    return json.loads(channel.recv_bytes(limit))


# What travels as {tag: text or [item, ...]}: its types, and the ways there and back.
PLAIN = {
    "tuple": (tuple, list, tuple),
    "dict": (dict, lambda value: [list(pair) for pair in value.items()], dict),
    "str": (str, str.__str__, str),
    "int": (int, hex, lambda text: int(text, 16)),     # Python caps decimal digits
    "float": (float, float.__repr__, float),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "complex": (complex, str, complex),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "iterator": (Iterator, lambda value: list(itertools.islice(value, MAX_ITEMS)), iter),
    # It can be gone through, `set(candidate(x))` works, and `== [1, 2]` fails, as without a sandbox.
    "listing": ((range, KeysView, ValuesView, ItemsView, collections.deque, re.Match),
                lambda value: [value[0], *value.groups()] if isinstance(value, re.Match) else list(value),
                lambda items: dict(enumerate(items)).values()),
}
VALUED = (tuple, enum.Enum)    # a record of such a class is made of its value, others of their fields


def pack(value, classes=()) -> dict:
    """A plain value as a JSON-able dict. Raises TypeError for any other object.

    An instance of a subclass becomes the plain value in it. Records (instances of the `classes` named) go to
    a table and are referred to by their place in it: a linked list needs no nesting and may be a ring.
    """
    places, found = {}, []

    def walk(value):
        kind = type(value)
        if value is None or kind in (bool, str, float) or (kind is int and -2**63 < value < 2**63):
            return value
        if kind.__name__ in classes:
            if id(value) not in places:
                places[id(value)] = len(places)
                found.append(value)
            return {"record": places[id(value)]}
        if isinstance(value, list):
            return [walk(item) for item in value]
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return {"type": value.__name__}
        if kind is functools.partial:          # a name of the program
            return {"name": value.args[0]}
        for tag, (kinds, unmake, _) in PLAIN.items():
            if isinstance(value, kinds):
                body = unmake(value)
                return {tag: walk(body) if isinstance(body, list) else body}
        raise TypeError(f"{kind.__name__} is not a plain value")

    packed, records = walk(value), []
    for record in found:               # which grows on the way
        if isinstance(record, VALUED):
            body = [walk(item) for item in ([record.value] if isinstance(record, enum.Enum) else record)]
        else:
            names = [*getattr(record, "__dict__", ()), *copyreg._slotnames(type(record))]
            body = {name: walk(getattr(record, name)) for name in names if hasattr(record, name)}
        records.append([type(record).__name__, body])
    return {"value": packed, "records": records}


def unpack(packed: dict, classes=None, find_name=None):
    """The value of `pack`. `classes`: those of records, by name; `find_name`: what {"name": ...} stands for.

    Builds plain values only, whatever it is fed. Raises an Exception if that is not what `pack` makes.
    """
    @functools.cache
    def record(place):
        name, body = packed["records"][place]
        if issubclass(classes[name], VALUED):
            return classes[name](*map(build, body))
        return object.__new__(classes[name])

    def build(item):
        if type(item) is list:
            return [build(part) for part in item]
        if type(item) is not dict:
            return item
        ((tag, body),) = item.items()
        if tag == "record":
            return record(body)
        if tag == "type" and not body.startswith("_") and isinstance(getattr(builtins, body), type):
            return getattr(builtins, body)
        if tag == "name" and find_name is not None:
            return find_name(body)
        _, _, make = PLAIN[tag]
        return make(build(body))

    for place, (cls, fields) in enumerate(packed["records"]):
        for name, item in () if issubclass(classes[cls], VALUED) else fields.items():
            # A field comes before a method of its name: after `node.same = bool`, `node.same(7)` is true.
            of_class = [vars(base).get(name) for base in classes[cls].__mro__]
            kinds = {type(value) for value in of_class if callable(value) or hasattr(value, "__get__")}
            if name.startswith("__") or kinds - {types.MemberDescriptorType}:
                raise ValueError(f"a record with the reserved field {name}")
            object.__setattr__(record(place), name, build(item))
    return build(packed["value"])


# ---- The tester: runs the (trusted) tests ----

TOLD_KINDS = ("syntax", "memory", "forbidden call")    # of a verdict, that the candidate's own word decides
ENDED = ("crash", "")                                  # a fault whose kind and detail the zygote knows
_compile = functools.lru_cache(maxsize=64)(compile)    # a batch holds many programs for few problems
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class _Tester:
    """Runs one job after the other, each against a fresh candidate (a script: one per case)."""

    def __init__(self, trainer: Connection, zygote: socket.socket):
        self.trainer, self.zygote = trainer, zygote
        with contextlib.suppress(ValueError):      # a lower one holds already
            resource.setrlimit(resource.RLIMIT_AS, (TESTER_MB << 20,) * 2)     # `[0] * candidate()`

    def serve(self):
        while True:
            job, began = _receive(self.trainer), time.process_time()
            self.passed, self.seconds = 0, 0.0
            for case in job.get("cases", [None]):
                self.calls, self.classes = 0, {}
                self.fault = self.raised = None
                kind, detail = self.run_tests(job) if case is None else self.run_script(job, *case)
                if kind != "passed":
                    break
            self.seconds += time.process_time() - began
            _send(self.trainer, {"kind": kind, "detail": detail, "tests_passed": self.passed,
                                 "seconds": self.seconds})

    def order(self, limit_s, fds=()):
        """Has the zygote watch the CPU seconds from now on and, given descriptors, start a candidate."""
        socket.send_fds(self.zygote, [struct.pack("d", limit_s)], fds)

    def start_candidate(self, limit_s, files=()):
        self.candidate, theirs = Pipe()
        with theirs:
            self.order(limit_s, [theirs.fileno(), *files])

    def end_candidate(self):
        """(kind, detail) of its end; the kind of a good end is ""."""
        self.order(0.0)
        kind, detail, seconds = json.loads(self.zygote.recv(1024))
        self.seconds += seconds
        return kind, detail

    def run_tests(self, job):
        """(kind, detail) of a Check or Asserts."""
        self.order(PREPARE_S)
        sys.modules["tests"] = types.ModuleType("tests")    # where dataclasses look themselves up
        space, depth = vars(sys.modules["tests"]), sys.getrecursionlimit()
        verdict = self.try_tests(job, _plan_tests(job), space)
        sys.setrecursionlimit(depth)   # a prelude may raise it, for the program
        space.clear()                  # functions hold their namespace, and so each other
        ended, how = self.end_candidate()
        if ended in ("timeout", "flood"):
            return ended, how
        if self.fault == ENDED:
            return "forbidden call" if ended == "forbidden call" else "crash", how
        return self.fault or verdict

    def try_tests(self, job, plan, space):
        texts = [plan["shared"], *plan["steps"]]
        for n, text in enumerate(texts):       # where `traceback` looks for lines
            linecache.cache[f"<test {n}>"] = 0, None, text.splitlines(), ""
        try:
            shared, early, *steps = [_compile(text, f"<test {n}>", "exec") for n, text in enumerate(texts)]
            exec(shared, space)
            classes = [value for value in space.values() if isinstance(value, type)]
            self.classes = {cls.__name__: cls for cls in classes if cls.__module__ == "tests"}
            exec(early, space)
            space.update({name: importlib.import_module(name) for name in plan["modules"]})
        except Exception as error:
            return "invalid", f"its tests fail before they call the candidate: {_line(error)}"
        self.start_candidate(job["timeout_s"])
        for name, expression in plan["names"].items():
            space[name] = functools.partial(self.call, expression)
        kind, detail = "passed", ""
        try:
            # The program is there when its top level has run, and has defined what will be tested.
            program = plan["shared"], job["source"], plan["needed"]
            self.ask({"call": "", "classes": list(self.classes)}, [program, {}])
            for place, step in enumerate(steps):
                exec(step, space)
                self.passed = place            # the first step is no test
        except BaseException as error:
            kind, detail = "exception", _line(error)
            if error is not self.raised:
                line = traceback.extract_tb(error.__traceback__)[-1].line
                kind, detail = "wrong answer", _line(f"{_line(error, 100).rstrip(': ')} in: {line}")
        if self.calls == 0 and kind != "exception":
            return "invalid", "its tests never call the candidate: every program would do as well"
        return kind, detail

    def call(self, name, /, *args, **kwargs):
        self.calls += 1
        return self.ask({"call": name}, [args, kwargs])

    def ask(self, request, arguments=()):
        """What the candidate answers; raises its exception, which a test may expect. All else is a fault."""
        ticket = os.urandom(8).hex()   # nobody can have answered before having read it
        try:
            _send(self.candidate, pack(arguments, self.classes) | request | {"ticket": ticket})
            answer = _receive(self.candidate, MAX_MESSAGE)
            if answer.pop("ticket", None) != ticket:
                raise ValueError("an answer to another question")
            if "error" not in answer:
                return unpack(answer, self.classes)
            *told, args = answer["error"]
            kind, name, text = map(str, told)
            cls = getattr(builtins, name)
            # StopIteration would end a test's `for got in map(candidate, inputs)` as if all had been well.
            fatal = not issubclass(cls, Exception) or issubclass(cls, (StopIteration, StopAsyncIteration))
            self.raised = None if fatal else cls(*unpack(args))
        except (EOFError, ConnectionError):
            self.fail(*ENDED)
        except OSError:
            self.fail("flood", f"a message of more than {MAX_MESSAGE >> 20} MB")
        except Exception as error:     # not JSON, too deep, too large a number ...
            self.fail("protocol", _line(error))
        if kind != "exception" or fatal:
            self.fail(kind if kind in TOLD_KINDS else "exception", _line(f"{name}: {text}"))
        raise self.raised

    def fail(self, kind, detail):
        """The first fault stands: after it nothing that the tests do can make another verdict."""
        self.fault = self.fault or (kind, detail)
        raise SystemExit               # `except Exception` lets it through

    def run_script(self, job, given, expected):
        """(kind, detail) of one case of a Stdio."""
        with open(os.memfd_create("stdin"), "w+b") as stdin, open(os.memfd_create("stdout"), "w+b") as stdout:
            stdin.write(given.encode("utf-8", "surrogatepass"))
            stdin.seek(0)
            self.start_candidate(job["timeout_s"], [stdin.fileno(), stdout.fileno()])
            told = "protocol", "the program wrote to the sandbox's own channel"
            try:                       # the usual end is ENDED, without an answer
                self.ask({"prelude": job["prelude"], "source": job["source"]})
            except BaseException as error:
                told = self.fault or ("exception", _line(error))
            kind, detail = self.end_candidate()
            stdout.seek(0)
            printed = stdout.read()
        if len(printed) >= MAX_MESSAGE:
            return "flood", f"more than {MAX_MESSAGE >> 20} MB on stdout"
        if told != ENDED or kind:
            return told if told != ENDED else (kind, detail)
        difference = first_difference(printed.decode("utf-8", "replace"), expected)
        self.passed += not difference
        return ("wrong answer", difference) if difference else ("passed", "")


def _plan_tests(job) -> dict:
    """Check and Asserts in one form. `shared` runs on both sides. `steps` run here: one before the program,
    then, with `names` bound to expressions of the program, a set-up and the tests."""
    if "test" in job:
        entry = job["entry_point"]
        steps = [job["test"] + "\ncheck", "", "check(candidate)"]    # there must be a check
        return {"shared": job["prelude"], "steps": steps, "modules": [], "needed": [entry],
                "names": {"candidate": entry, entry: entry}}
    text = "\n".join([job["setup"], *job["tests"]])
    imports = re.findall(r"^(?:import|from) .+", job["setup"], re.MULTILINE)
    shared = "".join(f"try: {line}\nexcept ImportError: pass\n" for line in imports)
    # MBPP's tests use math, and rely on the program's `import math`. Theirs is the real one.
    modules = set(re.findall(r"(?<![\w.])[a-z]+(?=\.)", text)) & sys.stdlib_module_names
    words = job["names"] or set(re.findall(r"(?<![\w.])[^\W\d]\w*", text)) - set(dir(builtins)) - modules
    return {"shared": shared, "steps": ["", job["setup"], *job["tests"]], "modules": modules,
            "needed": job["names"], "names": {word: word for word in words}}


def names_under_test(reference: str, tests: Iterable[str]) -> tuple[str, ...]:
    """The names that `reference` (trusted!) defines and `tests` use: `Asserts.names` for its problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # an invalid escape is not worth a line on stderr
        symbols = symtable.symtable(reference, "<reference>", "exec").get_symbols()
        nodes = ast.walk(ast.parse("\n".join(tests)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    return tuple(sorted(used & {name.get_name() for name in symbols if name.is_assigned()}))


def _line(error, limit=200):
    """One line of text, for people."""
    text = error if isinstance(error, str) else traceback.format_exception_only(error)[-1]
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text[:4 * limit].split())[:limit])


def first_difference(printed: str, expected: str) -> str:
    """Where an output is wrong, token by token; "" if nowhere. Where a float is expected, any number within
    1e-6 (absolute or relative) will do. Whole numbers are exact; 20.00 is 20, as judges have it."""
    got, want = printed.split(), expected.split()
    for place, (token, right) in enumerate(zip(got, want)):
        if token != right and not _is_close(token, right):
            return f"token {place + 1} is {token[:60]!r}, expected {right[:60]!r}"
    return "" if len(got) == len(want) else f"{len(got)} tokens, expected {len(want)}"


def _is_close(token, expected):
    if max(len(token), len(expected)) > 400 or not (_NUMBER.fullmatch(token) and _NUMBER.fullmatch(expected)):
        return False
    if expected.lstrip("+-").isdigit():
        return re.fullmatch(re.escape(expected) + r"\.0*", token) is not None
    return math.isclose(float(token), float(expected), rel_tol=1e-6, abs_tol=1e-6)


# ---- The zygote: forks the candidates, watches the clocks ----

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
libc = ctypes.PyDLL(None)

# What a program may import, with all that these import, as no file can be opened later; what is not installed
# is passed over. numpy and sortedcontainers: judges have them.
MODULES = """
    argparse array asyncio base64 bisect calendar cmath codecs colorsys concurrent.futures.thread contextvars
    copy csv dataclasses datetime decimal difflib doctest encodings.ascii encodings.cp1252 encodings.cp437
    encodings.hex_codec encodings.idna encodings.latin_1 encodings.punycode encodings.raw_unicode_escape
    encodings.rot_13 encodings.unicode_escape encodings.utf_16 encodings.utf_32 encodings.utf_8_sig
    fileinput fractions glob graphlib gzip hashlib heapq hmac html ipaddress locale lzma mmap numpy pathlib
    pickle platform pprint queue secrets shlex sortedcontainers statistics string tempfile textwrap timeit
    unittest.mock urllib.parse uuid zlib __future__ _colorize _strptime
""".split()


def _tester_main(trainer_pid, memory_mb, paths):
    """Where the process of the tester begins: its stdin is /dev/null, its stdout the channel."""
    alive, trainer = os.pidfd_open(trainer_pid), Connection(os.dup(1))
    os.dup2(0, 1)
    sys.path += [path for path in paths if path not in sys.path]
    # Once, what every program would have to do otherwise.
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    warnings.simplefilter("ignore")    # an invalid escape in somebody's source is not worth a line on stderr
    compile("", "<first>", "exec")     # the first one makes the types of syntax trees, which takes 2 ms
    builtins.exit = builtins.quit = sys.exit    # `site` defines them, and -S leaves it out
    random.seed(0)                     # every program finds the same numbers: a verdict can be had again
    gc.collect()
    gc.freeze()                        # the collector would touch, and so copy, every page in every child
    signal.signal(signal.SIGALRM, signal.SIG_DFL)      # the zygote sends it
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    zygote, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.dup2(1, 2)                      # tests may print
    fork_child(_Zygote(os.getpid(), theirs, alive, memory_mb).serve)
    theirs.close()
    _Tester(trainer, zygote).serve()


def fork_child(run, *args) -> int:
    """Calls `run(*args)` in a child, which ends with this process; returns its pid."""
    # Not `os.fork`: it lets `threading` and others put themselves in order, which doubles the price.
    def fork():
        pid = libc.fork()
        if pid < 0:
            raise BlockingIOError("no process left")
        return pid

    parent, pid = os.getpid(), _patiently(fork)
    if pid == 0:
        try:
            # The kernel kills this process when its parent ends, even while it holds the GIL.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == parent:
                run(*args)
        finally:
            os._exit(1)
    return pid


class _Zygote:
    """Forks a candidate when the tester orders one, and ends those who use up their time."""

    def __init__(self, tester, orders, trainer, memory_mb):
        self.tester, self.orders, self.trainer = tester, orders, trainer
        self.candidate, self.limit_s, self.fault = 0, 0.0, None
        self.seccomp = build_filter(os.uname().machine)
        with open("/proc/self/statm") as file:
            self.memory_bytes = int(file.read().split()[0]) * resource.getpagesize() + (memory_mb << 20)

    def serve(self):
        while True:
            ready = wait([self.orders, self.trainer], LOOK_S if self.limit_s else None)
            if self.trainer in ready:          # it has ended, even if a fork of it holds its sockets
                os.kill(self.tester, signal.SIGKILL)
            elif ready:
                self.obey()
            else:
                self.look()

    def obey(self):
        message, fds, _, _ = socket.recv_fds(self.orders, 64, 3)
        [self.limit_s] = struct.unpack("d", message)
        if fds:
            self.candidate = fork_child(_run_candidate, fds, self.memory_bytes, self.seccomp)
        for fd in fds:
            os.close(fd)
        if self.limit_s:
            self.fault, self.start = None, self.clocks()
        else:
            self.orders.send(json.dumps(self.end_candidate()).encode())

    def clocks(self):
        """Seconds of CPU, and of wall time without those that the first threads waited for a core."""
        cpu, wall = 0.0, time.monotonic()
        for pid in filter(None, (self.tester, self.candidate)):
            cpu += time.clock_gettime(~pid << 3 | 2)       # of another process: see clock_getcpuclockid
            with contextlib.suppress(OSError), open(f"/proc/{pid}/schedstat") as file:
                wall -= int(file.read().split()[1]) / 1e9
        return cpu, wall

    def look(self):
        cpu, wall = [now - then for now, then in zip(self.clocks(), self.start)]
        if self.fault:
            if wall > self.end_s:      # a legal but nasty value holds the tests up
                os.kill(self.tester, signal.SIGALRM)
            return
        if cpu >= self.limit_s or wall >= WALL_FACTOR * self.limit_s:
            self.fault = "timeout", f"still running after {cpu:.2f} s of CPU, {wall:.2f} s with its sleep"
        elif os.stat(f"/proc/{self.candidate or 'self'}/task").st_nlink > MAX_THREADS + 2:
            self.fault = "flood", f"more than {MAX_THREADS} threads"
        self.end_s = wall + GRACE_S
        if self.fault and self.candidate:
            os.kill(self.candidate, signal.SIGKILL)

    def end_candidate(self):
        """Kills it if it lives. (kind, detail, CPU seconds) of its end; the kind of a good end is ""."""
        if not self.candidate:
            return "", "", 0.0
        os.kill(self.candidate, signal.SIGKILL)
        _, status, usage = os.wait4(self.candidate, 0)
        self.candidate, code = 0, os.waitstatus_to_exitcode(status)
        kind = "forbidden call" if code == -signal.SIGSYS else "crash" if code < 0 else "exception"
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        detail = f"the process ended with {how}, using {usage.ru_maxrss >> 10} MB"
        return *(self.fault or (kind if code else "", detail)), usage.ru_utime + usage.ru_stime


# ---- The candidate ----

def _run_candidate(fds, memory_bytes, seccomp):
    """Gives up every right, and only then reads the program."""
    channel, *files = fds
    # Only root may do so; else newfstatat's AT_EMPTY_PATH with a path gives the size of any file.
    with contextlib.suppress(PermissionError):
        os.chdir("/proc/self/fdinfo")  # a directory that holds nothing of anybody else's
        os.chroot(".")
    for standard, fd in enumerate(files):
        os.dup2(fd, standard)          # under sys.stdin and sys.stdout, which have not been used
    os.dup2(channel, 3)
    os.closerange(4, 64)
    # Root without capabilities: what seccomp lets through (madvise, say) must not do more than for a user.
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0,
              resource.RLIMIT_FSIZE: MAX_MESSAGE}      # stdout's; there is no other file that grows
    for limit, value in limits.items():
        with contextlib.suppress(ValueError):      # a lower one holds already
            resource.setrlimit(limit, (value, value))
    if not install_filter(seccomp):
        os._exit(1)
    channel = Connection(3)
    (_run_script if files else _serve_calls)(channel, _receive(channel))


def _describe(error, kind="exception"):
    """[kind, nearest builtin exception class, text, its packed arguments]: what the tester is told."""
    kind = getattr(error, "kind", kind)
    if isinstance(error, MemoryError):
        kind = "memory"
    elif isinstance(error, PermissionError) and error.errno == errno.EPERM:
        kind = "forbidden call"
    cls = next(cls for cls in type(error).__mro__ if cls.__module__ == "builtins")
    text, args = "", pack(())
    with contextlib.suppress(BaseException):
        text = str(error)[:10_000]
        args = pack((text,))
        if str(cls(*error.args)) == text:
            args = pack(error.args)
    return [kind, cls.__name__, text, args]


def _execute(space, *sources):
    for source in sources:
        try:
            code = compile(source, "<program>", "exec")
        except BaseException as error:
            error.kind = "syntax"      # for `_describe`
            raise
        exec(code, space)


def _serve_calls(channel, request):
    space = vars(sys.modules.setdefault("program", types.ModuleType("program")))
    find_name = functools.cache(lambda name: eval(name, space))    # makes the one in `Solution().f` once
    classes = request["classes"]

    def load(prelude, source, names):
        if source.lstrip("\r\n")[:1] in (" ", "\t"):
            prelude, source = "", f"{prelude}\n{source}"
        _execute(space, prelude, source)
        for name in names:
            find_name(name)

    while True:
        kind = "value"                 # an error on its way: not one that the program raised
        try:
            args, kwargs = unpack(request, space, find_name)
            function = find_name(request["call"]) if request["call"] else load     # the first call
            kind = "exception"
            value = function(*args, **kwargs)
            kind = "value"
            _send(channel, pack(value, classes) | {"ticket": request["ticket"]})
        except BaseException as error:
            _send(channel, {"error": _describe(error, kind), "ticket": request["ticket"]})
        request = _receive(channel)


def _run_script(channel, request):
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.modules["__main__"].__file__ = "/program.py"
    real_size = threading.stack_size   # contestants ask for a deep stack: they get what the memory allows
    threading.stack_size = lambda size=0: real_size(min(size, 128 << 20))
    resource.setrlimit = lambda *limits: None
    code = error = None
    try:
        _execute(vars(sys.modules["__main__"]), request["prelude"], request["source"])
    except SystemExit as end:
        code = end.code                # None is 0, a text is 1
    except BaseException as problem:
        error = _describe(problem)
    try:                               # as at the end of an interpreter: wait for threads, run atexit, flush
        threading._shutdown()
        atexit._run_exitfuncs()
        with contextlib.suppress(Exception):
            sys.stdout.flush()         # if it has not been replaced or closed
        del sys.modules["__main__"]
        gc.collect()                   # other writers flush when they go
        with contextlib.suppress(ValueError):
            sys.__stdout__.flush()     # unless its buffer has been detached or closed
    except BaseException as problem:
        error = error or _describe(problem)
    if error:
        _send(channel, {"error": error, "ticket": request["ticket"]})
    os._exit(code & 255 if isinstance(code, int) else int(code is not None))


# The system calls that a candidate may make, with their numbers on x86-64 and aarch64. All others get EPERM.
SYSCALLS = """
    read 0 63, write 1 64, readv 19 65, writev 20 66, close 3 57, fstat 5 80, lseek 8 62, poll 7 -,
    select 23 -, ppoll 271 73, pselect6 270 72, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214,
    mremap 25 216, madvise 28 233, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
    sigaltstack 131 132, restart_syscall 219 128, futex 202 98, set_robust_list 273 99, rseq 334 293,
    membarrier 324 283, sched_yield 24 124, exit 60 93, exit_group 231 94, nanosleep 35 101,
    clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -,
    times 100 153, getrusage 98 165, getrandom 318 278, getpid 39 172, gettid 186 178, getuid 102 174,
    geteuid 107 175, getgid 104 176, getegid 108 177, uname 63 160, sched_getaffinity 204 123,
    getrlimit 97 163, getcwd 79 17, clone 56 220, clone3 435 435, prlimit64 302 261, newfstatat 262 79,
    openat 257 56
"""
THREAD_FLAGS = 0x3D0F00                # what pthread_create passes to clone; anything else would be a process
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}    # with the kernel's names for them


def install_filter(instructions: ctypes.Array) -> bool:
    """Allows this process, for good, only what the filter of `build_filter` does; False if Linux refuses."""
    seccomp = struct.pack("HP", len(instructions) // 8, ctypes.addressof(instructions))    # struct sock_fprog
    return not (libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, 2, seccomp, 0, 0))


def build_filter(machine: str) -> ctypes.Array:
    """The instructions of the seccomp filter, of 8 bytes each, for a machine of ARCHITECTURES."""
    # (operation, instructions to skip if true, if false, operand): see linux/bpf_common.h.
    LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
    NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16             # where they are
    KILL, ALLOW = (RETURN, 0, 0, 0x80000000), (RETURN, 0, 0, 0x7FFF0000)
    REFUSE, NO_FILE, NO_CALL = [
        (RETURN, 0, 0, 0x50000 | number) for number in (errno.EPERM, errno.ENOENT, errno.ENOSYS)]

    def when(operation, value, word, then):
        """`then` if the operation is true of a word of the arguments: each has a low and a high one."""
        return [(LOAD, 0, 0, ARGUMENTS + 4 * word), (operation, 0, 1, value), then]

    ALL, AT_EMPTY_PATH = 0xFFFFFFFF, 0x1000
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    rules = {
        "clone": [*when(ANY_BIT, ALL, 1, REFUSE), *when(EQUAL, THREAD_FLAGS, 0, ALLOW), REFUSE],
        "clone3": [NO_CALL],                               # glibc falls back to clone
        # No new limit: it only reads.
        "prlimit64": [*when(ANY_BIT, ALL, 4, REFUSE), *when(ANY_BIT, ALL, 5, REFUSE), ALLOW],
        "newfstatat": [*when(ANY_BIT, AT_EMPTY_PATH, 6, ALLOW), NO_FILE],    # it is fstat, in glibc >= 2.33
        "openat": [*when(ANY_BIT, writing, 4, REFUSE), NO_FILE],       # `try: open("input.txt")` is common
    }
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, ARCHITECTURES[machine]), KILL, (LOAD, 0, 0, NUMBER)]
    for line in SYSCALLS.split(","):
        name, *numbers = line.split()
        number, rule = numbers[list(ARCHITECTURES).index(machine)], rules.get(name, [ALLOW])
        if number != "-":
            program += [(EQUAL, 0, len(rule), int(number)), *rule]
    return ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in [*program, REFUSE]))


def main():
    """Shows what becomes of an honest, a wrong, a cheating and an endless program."""
    test = "def check(candidate):\n    assert candidate([3, 1, 2]) == [1, 2, 3]"
    programs = [
        "def order(items):\n    return sorted(items)",
        "def order(items):\n    return items",
        "class Yes(list):\n    def __eq__(self, other): return True\norder = Yes",
        "def order(items):\n    while True: pass",
    ]
    print(f"The test, which no program sees:\n\n{test}\n")
    jobs = [Check(source, test, "order") for source in programs]
    with Sandbox(workers=2, timeout_s=0.5) as sandbox:
        for job, verdict in zip(jobs, sandbox.iter(jobs)):
            print(f"{job.source}\n\n-> {verdict.kind}, {verdict.seconds:.4f} s of CPU. {verdict.detail}\n")


if __name__ == "__main__":
    main()
