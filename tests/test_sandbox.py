"""The sandbox as a library: kinds of job, verdicts, values that travel, bad input, and crashes of our own side."""

import collections
import contextlib
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sandbox import MODULES, Asserts, Check, InvalidJob, Sandbox, Stdio, names_under_test, pack, first_difference, unpack  # noqa: E402

ADD = Asserts("def add(a, b): return a + b", ("assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add('a', 'b') == 'ab'"))


def same_output(printed, expected):
    return first_difference(printed, expected) == ""


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, timeout_s=5) as sandbox:
        yield sandbox


def verdict_of(sandbox, *args, kind=Asserts, **fields):
    return sandbox.run([kind(*args, **fields)])[0]


# ---- the three kinds of job ----

def test_tests_passed_counts_up_to_the_first_failure(sandbox):
    source = "def add(a, b): return a + b if a < 2 else 0"
    tests = (*ADD.tests, "assert add(1, 1) == 2")
    verdict = verdict_of(sandbox, source, tests)
    assert (verdict.passed, verdict.kind, verdict.tests_passed, verdict.tests) == (False, "wrong answer", 1, 4)
    assert "assert add(2, 2) == 4" in verdict.detail


def test_order_is_kept_and_jobs_are_read_lazily(sandbox):
    read = []

    def jobs():
        for number in range(40):
            read.append(number)
            time_s = random.Random(number).random() * 0.02
            yield Asserts(f"import time\ntime.sleep({time_s})\ndef f(): return {number}", (f"assert f() == {number}",) * (number + 1))

    verdicts = sandbox.iter(jobs())
    first = next(verdicts)
    assert first.tests == 1 and len(read) < 40
    assert [verdict.tests for verdict in verdicts] == list(range(2, 41)) and len(read) == 40


def test_a_slow_first_job_keeps_no_worker_idle(sandbox):
    started, read = time.monotonic(), []
    slow = SLEEPER._replace(source=SLEEPER.source.replace("0.9", "3"))
    jobs = (read.append(time.monotonic()) or (slow if number == 0 else ADD) for number in range(100))
    assert all(verdict.passed for verdict in sandbox.run(jobs))
    assert sum(when - started < 3 for when in read) > 50       # of 100, while the first one sleeps


def test_a_check_runs_its_prompt_on_both_sides(sandbox):
    prompt = "import math\n\ndef helper(x):\n    return x + 1\n\ndef f(x):\n    '''Adds.'''\n"
    test = "def check(candidate):\n    assert candidate(1) == helper(1)\n    assert math.isclose(candidate(1), 2.0)\n"
    for source in ("    return helper(x)\n", "\n\n    y = math.floor(x)\n    return y + 1", "def f(x):\n    return helper(x)\n", prompt + "    return 1 + x"):
        verdict = verdict_of(sandbox, source, test, "f", prompt, kind=Check)
        assert verdict.passed, (source, verdict)


def test_an_entry_point_may_be_a_method_and_keeps_its_instance(sandbox):
    source = "class Solution:\n    n = 0\n    def next(self):\n        self.n += 1\n        return self.n"
    test = "def check(candidate):\n    assert [candidate(), candidate()] == [1, 2]"
    assert verdict_of(sandbox, source, test, "Solution().next", kind=Check).passed


NODE = "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n"


def test_classes_of_the_prompt_travel_as_records(sandbox):
    source = NODE + "def f(node):\n    back = None\n    while node:\n        back, node = Node(node.value, back), node.next\n    return back"
    test = """
def check(candidate):
    nodes = None
    for value in range(3000):
        nodes = Node(value, nodes)
    back = candidate(nodes)
    for value in range(3000):
        assert type(back) is Node and back.value == value
        back = back.next
    ring = Node(1)
    ring.next = Node(2)
    assert back is None
"""
    for prelude in (NODE, "from dataclasses import dataclass\n" + NODE):
        assert verdict_of(sandbox, source, test, "f", prelude, kind=Check).passed


KINDS = """
from enum import Enum
from typing import NamedTuple
class Color(Enum):
    RED = 1
    BLUE = "b"
class Point(NamedTuple):
    x: int
    color: Color
class Slots:
    __slots__ = ("value", "unset")
    def __init__(self, value): self.value = value
"""


def test_enums_named_tuples_and_slots_of_the_prompt_travel_as_what_they_are(sandbox):
    source = "def f(x): return [x, Color.RED, Point(1, Color.BLUE), Slots([x])]"
    test = """
def check(candidate):
    x, color, point, slots = candidate(Color.BLUE)
    assert x is Color.BLUE and color is Color.RED and type(slots) is Slots
    assert type(point) is Point and point.color is Color.BLUE and point == (1, Color.BLUE)
    assert slots.value == [x] and not hasattr(slots, "unset")
"""
    assert verdict_of(sandbox, source, test, "f", KINDS, kind=Check).passed
    for wrong in ("Color.BLUE", "1", "'RED'"):
        assert verdict_of(sandbox, source.replace("Color.RED", wrong), test, "f", KINDS, kind=Check).kind == "wrong answer"


def test_no_answer_changes_what_an_enum_is():
    """Its members are shared by all that the tests compare."""
    space = {"__name__": "tests"}
    exec(KINDS, space)
    red, blue = space["Color"]
    for body in ({"_value_": 2}, {"b": 7}, [1, 2]):
        with contextlib.suppress(Exception):
            unpack({"value": {"record": 0}, "records": [["Color", body]]}, space)
        assert (red.value, blue.value) == (1, "b") and not hasattr(blue, "b")


def test_a_match_travels_as_its_groups(sandbox):
    source = "import re\ndef f(text): return re.search('(a)(b)?c', text)"
    tests = ("assert f('xac') and f('xac') is not None", "assert not f('b') and f('b') is None", "assert list(f('xac')) == ['ac', 'a', None]")
    assert verdict_of(sandbox, source, tests).passed
    lie = "import re\nclass L(str):\n    def __eq__(self, other): return True\ndef f(text): return re.match('.*', L('q'))"
    for test in ("assert f('xac') == 'ac'", "assert f('xac') == True", "assert 'ac' in f('xac')", "assert not f('b')"):
        verdict = verdict_of(sandbox, lie, (test,))
        assert verdict.kind == "wrong answer", (test, verdict)


def test_a_class_that_only_the_program_knows_does_not_travel(sandbox):
    source = "class Yes:\n    def __eq__(self, other): return True\ndef f(): return Yes()"
    assert verdict_of(sandbox, source, ("assert f() == 1",)).kind == "exception"


def test_set_up_code_runs_beside_the_tests_and_only_its_imports_reach_the_program(sandbox):
    setup = "import math\nsecret = 41\n"
    assert verdict_of(sandbox, "def f(): return math.floor(3.5)", ("assert f() == 3",), setup).passed
    assert verdict_of(sandbox, "def f(): return secret", ("assert f() == 41",), setup).kind == "exception"
    assert verdict_of(sandbox, "def f(): return 42", ("assert f() == secret + 1", "assert math.pi > 3"), setup).passed


def test_mbpp_tests_may_use_a_module_that_only_the_program_imports(sandbox):
    assert verdict_of(sandbox, "import math\ndef f(): return 2 ** 0.5", ("assert math.isclose(f(), 1.4142135623730951)",)).passed


def test_a_problem_may_be_about_a_name_of_python(sandbox):
    reference, tests = "def sum(a, b):\n    return a + b\n", ("assert sum(10, 15) == 25",)
    assert names_under_test(reference, tests) == ("sum",)
    assert verdict_of(sandbox, reference, tests, "", ("sum",)).passed
    with pytest.raises(InvalidJob, match="never call"):          # without names, `sum` is Python's
        verdict_of(sandbox, reference, ("assert sum([10, 15]) == 25",))


def test_a_function_of_the_program_can_be_an_argument(sandbox):
    source = "def twice(f, x): return f(f(x))\ndef inc(x): return x + 1"
    assert verdict_of(sandbox, source, ("assert twice(inc, 1) == 3", "assert twice(str, 1) == '1'")).passed


def test_expected_exceptions(sandbox):
    test = "def check(candidate):\n    try:\n        candidate(-1)\n    except ValueError as error:\n        assert 'negative' in str(error)\n    else:\n        assert False\n"
    assert verdict_of(sandbox, "class Mine(ValueError): pass\ndef f(x): raise Mine('negative')", test, "f", kind=Check).passed
    key = test.replace("ValueError", "KeyError").replace("'negative' in str(error)", "error.args == ('negative',)")
    assert verdict_of(sandbox, "def f(x): raise KeyError('negative')", key, "f", kind=Check).passed
    assert verdict_of(sandbox, "def f(x): raise KeyError('negative')", test, "f", kind=Check).kind == "exception"
    assert verdict_of(sandbox, "def f(x): return 1", test, "f", kind=Check).kind == "wrong answer"
    both = test.replace("'negative' in str(error)", "error.args == ('negative', [x for x in range(-1, 0)])")
    assert verdict_of(sandbox, "def f(x): raise ValueError('negative', [x])", both, "f", kind=Check).passed
    assert verdict_of(sandbox, "def f(x): raise ValueError('negative', x)", both, "f", kind=Check).kind == "wrong answer"


@pytest.mark.parametrize("source", [
    "print(int(input()) + 1)",
    "import sys\nfor line in sys.stdin: sys.stdout.write(str(int(line) + 1))",
    "import os\nprint(int(os.read(0, os.fstat(0).st_size)) + 1)",
    "import sys, threading\nthreading.Thread(target=lambda: print(int(input()) + 1)).start()",
    "import atexit, io, sys\nout = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(out.getvalue()))\nout.write(str(int(input()) + 1))",
    "import io, os, sys\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\nsys.stdout.write(str(int(input()) + 1))\nsys.exit(0)",
    "def main():\n    print(int(input()) + 1)\nif __name__ == '__main__':\n    main()\n    exit()",
    "import os\nprint(int(open(0).read()) + 1, flush=True)\nos._exit(0)",
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(int(input())).x + 1)",
])
def test_scripts_in_the_styles_of_contests(sandbox, source):
    verdict = verdict_of(sandbox, source, (("1\n", "2\n"), ("41\n", "42")), kind=Stdio)
    assert verdict.passed and verdict.tests_passed == 2, verdict
    assert verdict_of(sandbox, source, (("1\n", "2\n"), ("41\n", "43")), kind=Stdio).tests_passed == 1


def test_output_is_compared_by_token_with_a_tolerance_for_floats_only():
    assert same_output("1  2\n3", "1 2 3\n")
    assert same_output("0.3333333", "0.33333333333") and same_output("3", "3.0") and same_output("1e3", "1000.0")
    assert same_output("1.0000000000", "1") and same_output("20.0 -3. 0.0", "20 -3 0")      # two references of CodeContests print such
    for printed, expected in (("1000000007", "1000000008"), ("1.0000001", "1"), ("0.9999999", "1"), ("1000000007.5", "1000000007"), ("1e0", "1"),
                              ("1", "10"), ("1.", "10"), ("10.0", "1"), ("1.0.0", "1"), ("1..", "1"), ("-1.0", "1"), ("00.0", "0"), (".0", "0"), ("", "0"),
                              ("nan", "1.5"), ("inf", "1.5"), ("1e999", "1.5"), ("1 2", "1"),
                              ("", "1"), ("YES", "yes"), ("0.34", "0.33"), ("1_0.0", "10.0"), ("1.2.3", "1.2.4"), ("x" * 10**6, "1.5")):
        assert not same_output(printed, expected), (printed, expected)


def test_a_program_can_import_what_python_can(sandbox):
    source = textwrap.dedent(f"""
        import importlib, json
        def missing():
            names = []
            for name in {MODULES}:
                try:
                    importlib.import_module(name)
                except ImportError:
                    names.append(name)
            return sorted(names)
    """)
    natively = subprocess.run([sys.executable, "-I", "-S", "-c", source + f"import sys; sys.path += {sys.path}; print(json.dumps(missing()))"],
                              capture_output=True, text=True, check=True)
    missing = json.loads(natively.stdout)
    assert len(missing) < 12, "the lists have got out of hand"
    assert verdict_of(sandbox, source, (f"assert missing() == {missing}",)).passed


@pytest.mark.parametrize("source", [
    "import hashlib, base64, uuid\ndef f(): return hashlib.md5(b'a').hexdigest()[:4] + hashlib.blake2b(b'a').hexdigest()[:2] + str(uuid.uuid4())[:0]",
    "import datetime, calendar\ndef f(): return datetime.datetime.strptime('2024-02-29', '%Y-%m-%d').strftime('%d') + str(calendar.isleap(2024))",
    "import dataclasses, decimal, statistics\n@dataclasses.dataclass\nclass P:\n    x: int\ndef f(): return f'{P(2)} {decimal.Decimal(1) / 3:.3} {statistics.median([1, 3])}'",
    "import html, string, textwrap, pickle\ndef f(): return html.unescape('&eacute;') + textwrap.dedent('  a') + str(pickle.loads(pickle.dumps([1])))",
    "import unittest, logging, argparse, traceback\ndef f():\n    try: 1 / 0\n    except ZeroDivisionError: return traceback.format_exc().splitlines()[-1]",
])
def test_modules_that_are_imported_beforehand_work(sandbox, source):
    space = {}
    exec(source, space)
    assert verdict_of(sandbox, source, (f"assert f() == {space['f']()!r}",)).passed


def test_a_program_may_start_dozens_of_threads(sandbox):
    source = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
def f(n):
    together = Barrier(n, timeout=20)
    with ThreadPoolExecutor(n) as pool:
        return sorted(pool.map(lambda x: together.wait() * 0 + x, range(n)))
"""
    assert verdict_of(sandbox, source, ("assert f(40) == list(range(40))",)).passed     # stacks of 8 MB, of 512 MB


@pytest.mark.parametrize("source", [
    "import sys\nprint(3)\nsys.stdout.close()",
    "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')\nprint(3)",
    "out = open(1, 'w')\nout.write('3\\n')",
    "import os\nout = os.fdopen(1, 'w')\nprint(3, file=out)",
    "import sys\nprint(3)\nsys.exit(False)",
    "import sys\nprint(3)\nsys.stdout = None",
    "import io, os\nclass Late(io.IOBase):\n    def flush(self): os.write(1, b'3\\n')\nlate = Late()",
    "try: open('input.txt')\nexcept FileNotFoundError: print(3)",
    "assert open(0).read() == '' and __file__\nprint(3)",
    "import sys\nsys.stdin.read()\nsys.stdin.seek(0)\nsys.stdin.tell()\nprint(3)",
    "import resource, sys, threading\nresource.setrlimit(resource.RLIMIT_STACK, (-1, -1))\nsys.setrecursionlimit(10**6)\n"
    "threading.stack_size(2**29)\ndef deep(n): return n and deep(n - 1)\nthreading.Thread(target=lambda: print(3 + deep(20000))).start()",
    "import sys\nclass Tee:\n    def write(self, text): sys.__stdout__.write(text)\n    def flush(self): pass\nsys.stdout = Tee()\nprint(3)",
])
def test_a_script_ends_as_in_an_interpreter(sandbox, source, tmp_path):
    (tmp_path / "script.py").write_text(source)
    natively = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, stdin=subprocess.DEVNULL, cwd=tmp_path)
    assert natively.stdout == b"3\n"
    assert verdict_of(sandbox, source, (("", "3\n"),), kind=Stdio).passed


def test_a_script_finds_its_prelude(sandbox):
    assert verdict_of(sandbox, "from __future__ import annotations\nprint(gcd(4, 6))", (("", "2\n"),), "from math import *", kind=Stdio).passed


# ---- values ----

VALUES = [None, True, 0, -1, 2**63, -2**200, 10**5000, 1.5, float("inf"), -0.0, 1e-320, 1 + 2j, "", "é\udcff\0", b"\xff", [], [1, [2, [3]]], (), (1,), ((),),
          set(), {1, (2, 3)}, frozenset({"a"}), {}, {1: 2, (3,): [4], None: {}, True: "x"}, {"tuple": [1]}, {"int": "0x1"}, [{"value": 1}], int, ValueError, print.__class__]


@pytest.mark.parametrize("value", VALUES[:-1], ids=lambda value: repr(value)[:30] if not isinstance(value, int) else type(value).__name__)
def test_plain_values_survive_the_journey(value):
    back = unpack(json.loads(json.dumps(pack(value))))
    assert back == value and type(back) is type(value)
    assert repr(back)[:4000] == repr(value)[:4000] if not isinstance(value, int) else True


def test_nan_survives_the_journey():
    assert math.isnan(unpack(json.loads(json.dumps(pack(float("nan"))))))


@pytest.mark.parametrize("value", [print, object(), VALUES[-1], (x for x in [print]), {1: print}.values(), lambda: 0, math, Exception("x"), [object()], {1: print}])
def test_other_objects_do_not_travel(value):
    with pytest.raises(TypeError, match="not a plain value"):
        pack(value)


def test_what_can_be_gone_through_travels_as_its_like(sandbox):
    """`set(f())` and `list(f())` are true of it, `f() == [...]` is not, as without a sandbox."""
    for value in (range(2, 9, 3), {1: 2, (3,): 4}.keys(), {1: 2, (3,): 4}.items(), {1: [2]}.values(), collections.deque([1, [2]]), range(0)):
        back = unpack(json.loads(json.dumps(pack(value))))
        assert list(back) == list(value) and bool(back) == bool(value)
        assert not back == list(value) and not list(value) == back and back != list(value) and [back] != [list(value)]
    source = "import itertools\ndef f(x): return (y for y in x)\ndef g(): return itertools.count(5)\ndef h(x): return filter(None, x)"
    tests = ("assert list(f([1, 2])) == [1, 2]", "assert f([1]) != [1]", "found = g()\nassert next(found) == 5 and next(found) == 6", "assert set(h([0, 1])) == {1}",
             "assert max(f(range(7))) == 6")
    assert verdict_of(sandbox, source, tests).passed


@pytest.mark.parametrize("source, test", [
    ("", "try:\n    f(lambda: 0)\nexcept TypeError: pass\nelse: assert False"),
    ("def f(x): return 0", "try:\n    f(object())\nexcept TypeError: pass\nelse: assert False"),
    ("def f(): return print", "try:\n    f()\nexcept TypeError: pass\nelse: assert False"),
    ("", "assert callable(f)\ntry: f(0)\nexcept TypeError: pass"), ("", "assert f.__doc__\ntry: f(0)\nexcept TypeError: pass"),
    ("", "try:\n    f(-1)\nexcept Exception: pass\nelse: assert False"),
])
def test_what_goes_wrong_on_the_way_is_no_exception_of_the_programs(sandbox, source, test):
    """A test that expects an error must not be content with one of the sandbox's own, or with a program that is not there."""
    assert not verdict_of(sandbox, source, (test,), names=("f",)).passed
    assert verdict_of(sandbox, "def f(x=0): 'Raises.'; raise TypeError(x)", (test.replace("lambda: 0", "0").replace("object()", "0"),), names=("f",)).passed


def test_arguments_may_have_any_name(sandbox):
    assert verdict_of(sandbox, "def f(self, x): return self + x", ("assert f(self=1, x=2) == 3",)).passed


def test_details_can_be_printed(sandbox):
    detail = verdict_of(sandbox, r"def f(): raise ValueError('\udcff\x1b[31m')", ("f()",)).detail
    assert detail.isprintable() and detail.encode() and "[31m" in detail


def test_subclasses_become_plain_values():
    import enum

    class Text(str):
        def __str__(self): return "lie"

    Color = enum.IntEnum("Color", "RED")
    Point = collections.namedtuple("Point", "x y")
    for value, plain in ((Text("a"), "a"), (Color.RED, 1), (Point(1, 2), (1, 2)), (collections.Counter("aab"), {"a": 2, "b": 1}), (bytearray(b"a"), b"a")):
        back = unpack(json.loads(json.dumps(pack(value))))
        assert back == plain and type(back) in (str, int, tuple, dict, bytes, bytearray)


@pytest.mark.parametrize("packed", [
    {}, {"value": 1}, [], {"value": {"tuple": 1}, "records": []}, {"value": {"set": [[1]]}, "records": []}, {"value": {"exec": "x"}, "records": []},
    {"value": {"type": "print"}, "records": []}, {"value": {"name": "x"}, "records": []}, {"value": {"int": "zz"}, "records": []}, {"value": {}, "records": []},
    {"value": {"tuple": [], "set": []}, "records": []}, {"value": {"record": 0}, "records": [["Sandbox", {}]]}, {"value": {"record": 5}, "records": []},
    {"value": {"dict": [[1]]}, "records": []}, {"value": {"bytes": "x"}, "records": []},
])
def test_what_is_no_value_is_refused(packed):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, IndexError)):
        unpack(packed)


# ---- bad input ----

@pytest.mark.parametrize("fields, message", [
    ({"workers": 0}, "workers must be"), ({"workers": 1.5}, "workers must be"), ({"timeout_s": -1}, "timeout_s must be"), ({"memory_mb": "1"}, "memory_mb must be"),
])
def test_a_bad_setting_gets_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message):
        Sandbox(**fields)


@pytest.mark.parametrize("job, error, message", [
    ("source", TypeError, "job 1 is no Check, Asserts or Stdio with tests: 'source'"),
    (Stdio("x = 1", ()), TypeError, "job 1 is no Check, Asserts or Stdio with tests"),      # every program would pass
    (Asserts("x = 1", ()), TypeError, "job 1 is no"),
    (Asserts("x = 1", "assert f()"), ValueError, "job 1: its tests fail"),
    (Asserts("x = 1", ("assert (",)), ValueError, "job 1: its tests fail before they call the candidate: SyntaxError"),
    (Check("x = 1", "import not_there", "f"), ValueError, "No module named 'not_there'"),
    (Check("x = 1", "def chekc(candidate): pass", "f"), ValueError, "NameError: name 'check'"),
    (Check("def f(): pass", "def check(candidate): pass", "f"), ValueError, "job 1: its tests never call the candidate"),
    (Check("def f(): pass", "async def check(candidate): assert candidate()", "f"), ValueError, "never call"),
    (Check("def f(): pass", "def check(candidate): yield candidate()", "f"), ValueError, "never call"),
    (Asserts("x = 1", ("assert pow(2, 3) == 8",)), ValueError, "never call"),
])
def test_a_bad_job_gets_one_sentence(sandbox, job, error, message):
    with pytest.raises(error, match=message):
        sandbox.run([ADD, job, ADD])
    assert sandbox.run([ADD])[0].passed


def test_a_closed_or_busy_sandbox_says_so():
    with Sandbox(workers=1) as sandbox:
        verdicts = sandbox.iter([ADD] * 3)
        next(verdicts)
        with pytest.raises(RuntimeError, match="one per thread"):
            sandbox.run([ADD])
        verdicts.close()
        assert sandbox.run([ADD])[0].passed
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run([ADD])
    sandbox.close()


def test_without_seccomp_nothing_runs(tmp_path):
    """Fail closed: the same file, with a filter that the kernel refuses, then with one that allows everything."""
    code = (ROOT / "sandbox.py").read_text()
    use = "import sandbox\ntry:\n    sandbox.Sandbox(workers=1)\nexcept RuntimeError as error:\n    print('refused:', error)\n"
    (tmp_path / "use.py").write_text(use)
    for old, new in (("PR_SET_SECCOMP, 2, seccomp", "PR_SET_SECCOMP, 77, seccomp"), ("[*program, REFUSE]", "[*program, ALLOW]")):
        assert code.count(old) == 1
        (tmp_path / "sandbox.py").write_text(code.replace(old, new))
        printed = subprocess.run([sys.executable, tmp_path / "use.py"], capture_output=True, text=True, timeout=60).stdout
        assert printed.startswith("refused: the sandbox cannot work here"), printed


# ---- crashes of our own side ----

def descendants(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            found = [int(child) for child in file.read().split()]
    except OSError:
        return []
    return found + [pid for child in found for pid in descendants(child)]


def alive(pids):
    def running(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
        except OSError:
            return False
    return [pid for pid in pids if running(pid)]


def wait_until_gone(pids, seconds=20):
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pids)


SLEEPER = Asserts("import time\ndef f():\n    time.sleep(0.9)\n    return 1", ("assert f() == 1",), timeout_s=10)


@pytest.mark.parametrize("victim", ["zygote", "tester", "candidate"])
@pytest.mark.parametrize("when", ["idle", "busy", "twice"])
def test_a_killed_process_costs_at_most_a_retry(victim, when):
    with Sandbox(workers=1) as sandbox:
        everything = set()

        def pid_of_victim():
            while True:
                tester = sandbox._workers[0].process.pid
                below = descendants(tester)
                time.sleep(0.2)                      # a probe of a new worker would have ended
                if below and below == descendants(tester) and len(below) == (1 if when == "idle" else 2):
                    everything.update([tester, *below])
                    return {"tester": tester, "zygote": below[0], "candidate": below[-1]}[victim]

        def kill():
            killed = set()
            for _ in range(2 if when == "twice" else 1):
                while (pid := pid_of_victim()) in killed:
                    time.sleep(0.01)
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)

        if when == "idle":
            if victim == "candidate":
                pytest.skip("an idle sandbox has no candidate")
            kill()
            verdicts = sandbox.run([ADD, ADD])
        else:
            jobs = [SLEEPER, SLEEPER, ADD] if victim == "candidate" and when == "twice" else [SLEEPER, ADD]
            killer = threading.Thread(target=kill)
            killer.start()
            verdicts = sandbox.run(jobs)
            killer.join()
        first, last = verdicts[0], verdicts[-1]
        assert last.passed
        # a candidate's death is its own; a tester's or zygote's is ours: the job is tried again, once
        assert first.kind == ("crash" if victim == "candidate" or when == "twice" else "passed"), first
    assert wait_until_gone(everything)


TRAINER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell starts background jobs with it ignored
sys.path.insert(0, {root!r})
from sandbox import Asserts, Sandbox
if __name__ == "__main__":
    sandbox = Sandbox(workers=2)
    if {fork}:
        if os.fork() == 0:                      # such as a data loader: outlives us, must not keep the workers
            time.sleep(30)
            os._exit(0)
    print(*[worker.process.pid for worker in sandbox._workers], flush=True)
    sandbox.run([
        Asserts("def f():\\n    while True: pass", ("assert f()",), timeout_s=100),
        Asserts("def f(): return 10 ** 13", ("assert sum(range(f()))",), timeout_s=100),
    ])
"""


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_the_trainer(how, fork):
    """Even while a test holds the worker's interpreter, so that no Python of ours can run there."""
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER.format(root=str(ROOT), fork=fork)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        end = time.monotonic() + 20
        while time.monotonic() < end and len([pid for worker in workers for pid in descendants(worker)]) < 4:
            time.sleep(0.02)
        time.sleep(0.3)
        others = [pid for pid in descendants(trainer.pid) if pid not in workers and pid not in [pid for worker in workers for pid in descendants(worker)]]
        everything = workers + [pid for worker in workers for pid in descendants(worker)]
        assert len(everything) == 6 and alive(everything) == everything
        trainer.send_signal(how)
        trainer.wait(20)
        assert wait_until_gone(everything)
        assert len(alive(others)) == fork
        for pid in others:
            os.kill(pid, signal.SIGKILL)
    finally:
        trainer.kill()
        trainer.stdout.close()


def test_a_value_that_holds_the_worker_up_costs_only_its_own_verdict(sandbox):
    nasty = Asserts("def f(): return 10 ** 13", ("assert sum(range(f())) == 1",), timeout_s=0.5)
    slow_test = Asserts("def f(): return 10 ** 13", ("while f(): pass",), timeout_s=0.5)
    swallow = Check("def f(): return 1", "def check(candidate):\n    while True:\n        try:\n            while candidate(): pass\n        except: pass\n", "f", timeout_s=0.5)
    verdicts = sandbox.run([nasty, ADD, slow_test, ADD, swallow, ADD])
    assert [verdict.kind for verdict in verdicts] == ["timeout", "passed"] * 3


BURN = "import time\ndef f(seconds):\n    start = time.process_time()\n    while time.process_time() - start < seconds: pass\n    return 1"


def test_a_limit_is_cpu_time_so_a_busy_machine_changes_no_verdict():
    core = {min(os.sched_getaffinity(0))}
    with Sandbox(workers=1, timeout_s=0.6) as sandbox:
        worker = sandbox._workers[0].process.pid
        for pid in (worker, *descendants(worker)):
            os.sched_setaffinity(pid, core)
        rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, core)) for _ in range(2)]
        try:
            started = time.monotonic()
            quick = sandbox.run([Asserts(BURN, ("assert f(0.5)",))])[0]
            wall = time.monotonic() - started
            slow = sandbox.run([Asserts(BURN, ("assert f(9)",))])[0]
        finally:
            for rival in rivals:
                rival.kill()
                rival.wait()
    cpu = float(re.search(r"after ([\d.]+) s of CPU", slow.detail)[1])
    assert slow.kind == "timeout" and 0.6 <= cpu < 0.9 and 0.6 <= slow.seconds < 0.9, slow
    assert quick.passed, quick
    if wall <= 0.6:                         # the scheduler's choice, not ours
        pytest.skip("the rivals did not slow the program down: nothing was shown")


def test_a_core_that_is_shared_with_many_changes_no_verdict():
    core = {min(os.sched_getaffinity(0))}
    with Sandbox(workers=1, timeout_s=0.6) as sandbox:
        zygote = sandbox._workers[0].process.pid
        for pid in (zygote, *descendants(zygote)):
            os.sched_setaffinity(pid, core)
        rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True,    # the kernel shares by sessions
                                   preexec_fn=lambda: os.sched_setaffinity(0, core)) for _ in range(9)]
        try:
            started = time.monotonic()
            verdict = sandbox.run([Asserts(BURN, ("assert f(0.4)",))])[0]
            wall = time.monotonic() - started
        finally:
            for rival in rivals:
                rival.kill()
                rival.wait()
    assert verdict.passed, verdict
    assert 0.4 <= verdict.seconds < 0.6, verdict
    if wall <= 2.4:
        pytest.skip("the rivals did not slow the program down: nothing was shown")


def test_a_worker_that_cannot_be_started_at_once_is_tried_again(monkeypatch):
    real, failures = subprocess.Popen, [BlockingIOError(11, "Resource temporarily unavailable")] * 2

    def popen(*args, **kwargs):
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    with Sandbox(workers=1) as sandbox:
        os.kill(sandbox._workers[0].process.pid, signal.SIGKILL)
        monkeypatch.setattr(subprocess, "Popen", popen)
        assert sandbox.run([ADD])[0].passed and not failures


def test_a_fork_that_fails_is_tried_again(tmp_path):
    """The same file, with a fork that fails at first, as where there are as many processes as there can be."""
    code = (ROOT / "sandbox.py").read_text()
    assert code.count("pid = libc.fork()") == 1
    failing = "tries = iter(range(99))\n" + code.replace("pid = libc.fork()", "pid = libc.fork() if next(tries) % 3 == 2 else -1")
    (tmp_path / "sandbox.py").write_text(failing)
    use = "import sandbox\nwith sandbox.Sandbox(workers=1) as box: print(box.run([sandbox.Asserts('def f(): return 1', ('assert f() == 1',))])[0].kind)"
    printed = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, timeout=60).stdout
    assert printed == "passed\n"


def test_programs_that_wait_end_by_wall_time_and_tests_count_too(sandbox):
    wait = "import time\ndef f(seconds):\n    time.sleep(seconds)\n    return 1"
    busy = "import time\nstart = time.process_time()\nwhile time.process_time() - start < 9: f(0)"
    short, long, test = sandbox.run([Asserts(source, (line,), timeout_s=0.3) for source, line in ((wait, "assert f(0.5)"), (wait, "assert f(60)"), (wait, busy))])
    assert short.passed, short
    wall = float(re.search(r"CPU, ([\d.]+) s with its sleep", long.detail)[1])
    assert long.kind == "timeout" and 1.2 <= wall < 10 and long.seconds < 0.3, long
    assert test.kind == "timeout" and 0.3 <= test.seconds < 2, test


def test_an_error_that_cannot_be_printed_is_a_wrong_answer_not_a_dead_worker(sandbox):
    before = [worker.process.pid for worker in sandbox._workers]
    verdict = verdict_of(sandbox, "def f(): return 10 ** 5000", ("assert {1: 2}[f()] == 2",))
    assert (verdict.kind, verdict.detail[:8]) == ("wrong answer", "KeyError")
    assert [worker.process.pid for worker in sandbox._workers] == before


def test_a_test_that_a_value_makes_huge_runs_out_of_memory_not_the_machine(sandbox):
    verdicts = sandbox.run([Asserts("def f(): return 10 ** 10", ("assert [0] * f() == 1",)), ADD])
    assert [verdict.passed for verdict in verdicts] == [False, True] and "MemoryError" in verdicts[0].detail


def test_a_tester_gives_its_memory_back():
    big = "kept = 'x' * f()", "def use(): return kept", "small = [str(n) for n in range(2 * 10 ** 6)]", "assert len(use()) > 10 ** 8", "assert 0"
    with Sandbox(workers=1) as sandbox:
        tester = sandbox._workers[0].process.pid
        assert sandbox.run([Asserts("def f(): return 4 * 10 ** 8", big, timeout_s=60)])[0].tests_passed == 4
        assert sandbox.run([ADD])[0].passed and sandbox._workers[0].process.pid == tester
        with open(f"/proc/{tester}/statm") as file:
            assert int(file.read().split()[1]) * 4096 < 200 << 20


def test_leaving_early_does_not_mix_up_the_next_answers(sandbox):
    for verdict in sandbox.iter([ADD, SLEEPER, SLEEPER, SLEEPER]):
        break
    assert [verdict.tests for verdict in sandbox.run([ADD, ADD])] == [3, 3]


def test_the_thread_that_opened_a_sandbox_may_end():
    opened = []
    thread = threading.Thread(target=lambda: opened.append(Sandbox(workers=1)))
    thread.start()
    thread.join()
    with opened[0] as sandbox:
        before = sandbox._workers[0].process.pid
        assert sandbox.run([ADD])[0].passed and sandbox._workers[0].process.pid == before


def test_a_fork_cannot_use_its_parents_sandbox(sandbox):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sandbox.run([ADD])
        except RuntimeError as error:
            status = 0 if "another process" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sandbox.run([ADD])[0].passed


def test_nothing_is_left_after_close():
    with Sandbox(workers=2) as sandbox:
        pids = [pid for worker in sandbox._workers for pid in (worker.process.pid, *descendants(worker.process.pid))]
        assert len(pids) == 4
    assert wait_until_gone(pids)


def test_random_programs_of_broken_bytes_never_pass_and_never_hang(sandbox):
    """Fuzz: an honest program with random characters changed, and random bytes on the channel."""
    draw = random.Random(7)
    honest = "import os\ndef add(a, b):\n    return a + b - 1\n"
    jobs = []
    for _ in range(60):
        text = list(honest)
        for _ in range(3):
            text[draw.randrange(len(text))] = chr(draw.choice([draw.randrange(128), draw.randrange(0x110000)]))
        jobs.append(Asserts("".join(text), ("assert add(1, 2) == 3.5",), timeout_s=1))
        noise = bytes([0, 0, 0, draw.randrange(60)]) + bytes(draw.randrange(256) for _ in range(40))
        jobs.append(Asserts(f"import os\ndef add(a, b):\n    os.write(3, {noise!r})\n    return 3", ("assert add(1, 2) == 3.5",), timeout_s=1))
    assert not any(verdict.passed for verdict in sandbox.run(jobs))
