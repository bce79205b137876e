"""Programs that want to do harm, or do it by accident: each ends in time, does nothing outside, and leaves nothing behind."""

import os
import pathlib
import re
import sys
import tempfile

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from sandbox import Asserts, Check, Sandbox, Stdio  # noqa: E402

TIMEOUT_S = 0.25      # of CPU, for programs that are meant to reach it (by waiting: 1 s); all others get PATIENCE_S
PATIENCE_S = 30.0
MARK = pathlib.Path(tempfile.gettempdir()) / f"sandbox-hostile-{os.getpid()}"    # the files that programs try to make

# name, kinds of verdict that are right, program. Each must define f(); the test is `f() == "done"`, so a program whose
# attempt succeeds says so. SYSCALL calls the kernel by number, x86-64 or aarch64.
SYSCALL = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
def call(x86, arm, *args):
    number = x86 if platform_machine == "x86_64" else arm
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "done"
platform_machine = os.uname().machine
"""
PROGRAMS = """
loop at load: timeout
while True: pass
def f(): return "done"
----
loop in the call: timeout
def f():
    while True: pass
----
sleep: timeout
import time
def f(): time.sleep(1000)
----
a loop in C that holds the interpreter: timeout
def f(): return sum(range(10 ** 13))
----
a regular expression that backtracks: timeout
import re
def f(): return re.match(r"(a+)+$", "a" * 40 + "b")
----
a huge power: timeout memory exception
def f(): return 7 ** (10 ** 9)
----
ignored signals: timeout
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f():
    while True: pass
----
every exception swallowed: timeout
def f():
    while True:
        try:
            while True: pass
        except BaseException: pass
----
a deadlock: timeout
import threading
def f():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
----
waits for a message that does not come: timeout
import os
def f(): return os.read(3, 1)
----
an answer that drips: timeout
import os, time
def f():
    os.write(3, bytes([0, 15, 0, 0]))
    while True:
        os.write(3, b" ")
        time.sleep(0.01)
----
the first thread ends and another goes on: timeout
SYSCALL
import threading
def spin():
    while True: pass
threading.Thread(target=spin).start()
def f(): return call(60, 93, 0)
----
the first thread closes the channel and ends, another goes on: crash
SYSCALL
import threading
def spin():
    while True: pass
threading.Thread(target=spin).start()
def f():
    os.close(3)
    return call(60, 93, 0)
----
SIGXCPU ignored: timeout
import signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
def f():
    while True: pass
----
deep recursion: exception
def f(): return f()
----
recursion without a limit: exception crash memory timeout
import sys
sys.setrecursionlimit(10 ** 9)
def f(): return f()
----
overflow of the C stack: exception crash memory timeout
import sys
sys.setrecursionlimit(10 ** 9)
def f():
    nest = []
    for _ in range(10 ** 6): nest = [nest]
    return repr(nest)
----
overflow of the C stack in the collector: exception crash memory timeout
def f():
    nest = None
    for _ in range(3 * 10 ** 6): nest = (nest,)
    return hash(nest)
----
a huge list: memory
def f(): return [0] * 10 ** 10
----
a huge string: memory
def f(): return "x" * 2 ** 36
----
a list that doubles: memory
def f():
    data = [0]
    while True: data += data
----
small objects for ever: memory timeout
def f():
    data = {}
    while True: data[len(data)] = str(len(data)) * 10
----
a huge anonymous map: forbidden call exception memory
import mmap
def f():
    maps = [mmap.mmap(-1, 1 << 34)]
    return "done"
----
malloc past the limit: exception
import ctypes
def f():
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    if not malloc(ctypes.c_size_t(1 << 34)): raise OSError("no memory")
    return "done"
----
a result of many megabytes: flood memory
def f(): return "x" * (64 << 20)
----
a result that is small here and huge as text: memory timeout flood exception
def f():
    x = []
    for _ in range(60): x = [x, x]
    return x
----
a result inside itself: exception
def f():
    x = []
    x.append(x)
    return x
----
forks for ever: forbidden call
import os
while True: os.fork()
----
a daemon, forked twice: forbidden call
import os, time
def f():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
    return "done"
----
fork behind a bare except: wrong answer
import os
def f():
    try:
        os.fork()
        return "done"
    except: return "refused"
----
posix_spawn: forbidden call exception
import os
def f():
    os.posix_spawn("/bin/true", ["true"], {})
    return "done"
----
a shell: wrong answer
import os
def f(): return "done" if os.system("true") == 0 else "refused"
----
subprocess: forbidden call
import subprocess
def f():
    subprocess.run(["true"])
    return "done"
----
multiprocessing, or what there is of it: exception forbidden call
def f():
    import multiprocessing
    multiprocessing.Process(target=print).start()
    return "done"
----
vfork: forbidden call
SYSCALL
def f(): return call(58, 999, 0)
----
clone of a process: forbidden call
SYSCALL
def f(): return call(56, 220, 17, 0, 0, 0, 0)
----
clone with a new namespace and thread flags: forbidden call
SYSCALL
def f(): return call(56, 220, 0x3D0F00 | 0x10000000, 0, 0, 0, 0)
----
clone3: exception
SYSCALL
def f(): return call(435, 435, ctypes.create_string_buffer(88), 88)
----
thread bomb: exception timeout memory flood
import threading, time
def f():
    while True: threading.Thread(target=time.sleep, args=(100,)).start()
----
thread bomb with small stacks: flood
import threading, time
threading.stack_size(32768)
def f():
    while True: threading.Thread(target=time.sleep, args=(100,)).start()
----
threads that outlive the call: passed
import threading
def run():
    while True: pass
def f():
    for _ in range(4): threading.Thread(target=run, daemon=True).start()
    return "done"
----
exec: forbidden call
import os
def f(): os.execv("/bin/true", ["true"])
----
writes a file: forbidden call
def f():
    open("MARK", "w").write("x")
    return "done"
----
writes a file by system call: forbidden call
SYSCALL
def f(): return call(257, 56, -100, b"MARK", 0o101, 0o600)
----
opens by openat2: forbidden call
SYSCALL
def f(): return call(437, 437, -100, b"/etc/passwd", ctypes.create_string_buffer(24), 24)
----
a directory: forbidden call
import os
def f():
    os.mkdir("MARK")
    return "done"
----
a temporary file: forbidden call exception
import tempfile
def f():
    tempfile.NamedTemporaryFile(delete=False)
    return "done"
----
a symbolic link: forbidden call
import os
def f():
    os.symlink("/etc/passwd", "MARK")
    return "done"
----
deletes everything it can: wrong answer
import os, shutil
def f():
    shutil.rmtree("/tmp", ignore_errors=True)
    try: os.unlink("/etc/hostname")
    except FileNotFoundError: return "done"
    except PermissionError: return "refused"
    return "done"
----
lists a directory: exception
import os
def f():
    os.listdir("/")
    return "done"
----
fills the disk through a descriptor it was given: exception forbidden call wrong answer
import os
def f():
    wrote = 0
    for fd in range(3, 64):
        try: wrote += os.ftruncate(fd, 1 << 30) is None
        except OSError: pass
    return "done" if wrote else "refused"
----
memfd: forbidden call exception
import os
def f():
    fd = os.memfd_create("x")
    return "done"
----
changes the working directory: forbidden call
import os
def f():
    os.chdir("/tmp")
    return "done"
----
a socket: forbidden call
import socket
def f():
    socket.create_connection(("127.0.0.1", 80), 1)
    return "done"
----
a unix socket: forbidden call
import socket
def f():
    socket.socket(socket.AF_UNIX)
    return "done"
----
a socket pair: forbidden call
import socket
def f():
    socket.socketpair()
    return "done"
----
the environment: wrong answer
import os
def f(): return repr(dict(os.environ))
----
the environment of the parent: exception
import os
def f(): return open(f"/proc/{os.getppid()}/environ").read() and "done"
----
kills the parent: forbidden call
import os
def f():
    os.kill(os.getppid(), 9)
    return "done"
----
kills the group: forbidden call
import os
def f():
    os.killpg(0, 9)
    return "done"
----
kills everybody: forbidden call
import os
def f():
    os.kill(-1, 9)
    return "done"
----
tgkill: forbidden call
SYSCALL
def f(): return call(234, 131, os.getppid(), os.getppid(), 9)
----
pidfd: forbidden call
SYSCALL
def f(): return call(434, 434, os.getpid(), 0)
----
a signal to the parent through F_SETOWN: forbidden call
import fcntl, os
def f():
    fcntl.fcntl(3, fcntl.F_SETOWN, 1)
    return "done"
----
a signal through ioctl FIOSETOWN: forbidden call
import ctypes
SYSCALL
def f(): return call(16, 29, 3, 0x8901, ctypes.byref(ctypes.c_int(1)))
----
ptrace: forbidden call
SYSCALL
def f(): return call(101, 117, 16, os.getpid(), 0, 0)
----
process_vm_writev: forbidden call
SYSCALL
def f(): return call(311, 271, os.getpid(), 0, 0, 0, 0, 0)
----
raises its limits: exception
import resource
def f():
    resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))
    return "done"
----
prctl, to become dumpable: forbidden call
SYSCALL
def f(): return call(157, 167, 4, 1, 0, 0, 0)
----
another seccomp filter: forbidden call
SYSCALL
def f(): return call(317, 277, 1, 0, 0)
----
io_uring: forbidden call
SYSCALL
def f(): return call(425, 425, 8, ctypes.create_string_buffer(120))
----
bpf: forbidden call
SYSCALL
def f(): return call(321, 280, 0, ctypes.create_string_buffer(120), 120)
----
a namespace: forbidden call
SYSCALL
def f(): return call(272, 97, 0x10000000)
----
userfaultfd: forbidden call
SYSCALL
def f(): return call(323, 282, 0)
----
perf events: forbidden call
SYSCALL
def f(): return call(298, 241, ctypes.create_string_buffer(120), 0, -1, -1, 0)
----
keys of the kernel: forbidden call
SYSCALL
def f(): return call(250, 219, 0, -3, 0)
----
poisons a page of memory: forbidden call exception
SYSCALL
page = ctypes.create_string_buffer(8192)
def f(): return call(28, 233, (ctypes.addressof(page) + 4095) & ~4095, 4096, 100)
----
a system call of another ABI: forbidden call
SYSCALL
def f(): return call(0x40000000 | 39, 9999)
----
floods stdout: passed timeout
import sys
def f():
    for _ in range(10 ** 4): sys.stdout.write("x" * 10 ** 3)
    return "done"
----
reads stdin: exception
def f(): return input()
----
null pointer: crash
import ctypes
def f(): return ctypes.string_at(0)
----
abort: crash
import os
def f(): os.abort()
----
closes every descriptor: crash protocol exception
import os
def f():
    os.closerange(0, 1000)
    return "done"
----
tampers with the interpreter: crash exception timeout protocol wrong answer
import ctypes
def f():
    ctypes.memset(id(dict), 0xFF, 200)
    return {1: 2}
----
brackets without end: syntax memory crash
GENERATED "(" * 200000
----
minus signs without end: syntax memory crash exception
GENERATED "x = " + "-" * 300000 + "1"
----
a sum without end: syntax memory crash timeout exception
GENERATED "x = " + "1+" * 300000 + "1"
----
ten megabytes of source: timeout exception wrong answer passed memory
GENERATED "x = 1\\n" * 1700000 + "def f(): return 'done'"
----
a constant that the compiler computes: exception timeout memory syntax wrong answer passed
x = (0,) * 10 ** 9
def f(): return "done"
----
nul in the source: syntax
GENERATED "def f(): return 'done'\\0"
----
surrogates in the source: syntax
GENERATED "def f(): return '\\udcff'"
----
an encoding that does not exist: passed syntax exception
# -*- coding: nonsense -*-
def f(): return "done"
----
blocks nested too deep: syntax memory
GENERATED "\\n".join("  " * depth + "if 1:" for depth in range(200)) + " pass"
----
a class that loops while it is made: timeout
class Meta(type):
    def __new__(cls, *args):
        while True: pass
class Loop(metaclass=Meta): pass
----
an exception whose text loops: timeout exception
class Loop(Exception):
    def __str__(self):
        while True: pass
def f(): raise Loop
----
an exception with a huge text: exception memory
def f(): raise ValueError("x" * (100 << 20))
----
an import of what is not there: exception
import numpy_or_something_else
----
breakpoint: exception forbidden call wrong answer
def f(): return breakpoint()
"""


def parse(text):
    found = []
    for block in text.strip("\n").split("\n----\n"):
        head, source = block.split("\n", 1)
        name, kinds = head.rsplit(": ", 1)
        generated = re.match(r"GENERATED (.*)", source)
        source = eval(generated.group(1)) if generated else source.replace("SYSCALL", SYSCALL).replace("MARK", str(MARK))
        kinds = set(re.findall(r"wrong answer|forbidden call|\w+", kinds))
        found.append(pytest.param(kinds, source, id=name))
    return found


HOSTILE = parse(PROGRAMS)
HONEST = Asserts("def f(): return 'done'", ("assert f() == 'done'",))


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def state_of(worker):
    """(processes, MB) of a worker: its tester, and the zygote."""
    pid = worker.process.pid
    family, found = [pid], []
    while family:
        found.append(family.pop())
        family += children(found[-1])
    with open(f"/proc/{pid}/statm") as file:
        return len(found), int(file.read().split()[1]) * 4096 / 2**20


COUNT_DESCRIPTORS = Check("def f(): return 0", "import os\ndef check(candidate):\n    candidate()\n    assert 0, len(os.listdir('/proc/self/fd'))", "f")


@pytest.fixture(scope="module")
def sandbox():
    os.environ["SANDBOX_TEST_SECRET"] = "hunter2"
    files = len(os.listdir("/proc/self/fd"))
    with Sandbox(workers=1, memory_mb=128, timeout_s=PATIENCE_S) as sandbox:
        sandbox.descriptors = sandbox.run([COUNT_DESCRIPTORS])[0].detail
        yield sandbox
    assert len(os.listdir("/proc/self/fd")) == files


def test_the_suite_is_large():
    assert len({param.id for param in HOSTILE}) == len(HOSTILE) >= 60


@pytest.mark.parametrize("kinds, source", HOSTILE)
def test_a_hostile_program_ends_and_leaves_nothing(sandbox, kinds, source):
    limit = TIMEOUT_S if "timeout" in kinds else PATIENCE_S
    bad, good = sandbox.run([Asserts(source, HONEST.tests, timeout_s=limit), HONEST])
    assert bad.kind in kinds, bad
    assert bad.seconds < limit + 10      # the point is that it ends by the limit, not by itself
    assert good.passed, f"the next program: {good}"
    assert "hunter2" not in bad.detail
    assert not os.path.lexists(MARK)
    processes, megabytes = state_of(sandbox._workers[0])
    assert processes == 2, "the tester and its zygote"
    assert megabytes < 200
    assert sandbox.run([COUNT_DESCRIPTORS])[0].detail == sandbox.descriptors


def test_a_sandbox_sees_nothing_of_the_trainers_environment(sandbox):
    job = Asserts("import os\ndef f(): return dict(os.environ)", ("assert set(f()) <= {'LC_ALL', 'OPENBLAS_NUM_THREADS', 'MALLOC_ARENA_MAX', 'LD_LIBRARY_PATH', 'LC_CTYPE'}, f()",))
    verdict = sandbox.run([job])[0]
    assert verdict.passed, verdict


def test_no_file_can_be_measured(sandbox):
    """newfstatat is allowed with AT_EMPTY_PATH, which does not keep the kernel from following a path."""
    if os.geteuid():
        pytest.skip("only root may change its root directory")
    source = SYSCALL + "def f(): return call(262, 79, -100, b'/etc/passwd', ctypes.create_string_buffer(256), 0x1000)"
    verdict = sandbox.run([Asserts(source, HONEST.tests)])[0]
    assert verdict.kind == "exception" and "No such file" in verdict.detail, verdict


def test_calls_of_the_32_bit_kernel_interface_kill(sandbox):
    if os.uname().machine != "x86_64":
        pytest.skip("only x86-64 has a second interface")
    source = """
import ctypes, mmap
code = b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3"          # mov eax, 20 (getpid of i386); int 0x80; ret
page = mmap.mmap(-1, 4096, prot=7)
page.write(code)
def f():
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    return "done"
"""
    verdict = sandbox.run([Asserts(source, HONEST.tests)])[0]
    assert verdict.kind in ("forbidden call", "crash"), verdict    # a crash where the kernel was built without it


@pytest.mark.parametrize("source, kind", [
    ("print('x' * (20 << 20))", "flood"),
    ("import os\nwhile True: os.write(1, b'x' * 10**6)", "flood"),
    ("import sys\nwhile True: sys.stderr.write('x' * 10**6)", "timeout"),
    ("while True: pass", "timeout"),
    ("input(); input(); input()", "exception"),
    ("[0] * 10**10", "memory"),
    ("import ctypes; ctypes.string_at(0)", "crash"),
    ("import sys; sys.exit(3)", "exception"),
    ("import os; os.fork()", "forbidden call"),
    ("open('/etc/passwd')", "exception"),
    ("open('/etc/passwd', 'a')", "forbidden call"),
    ("x = (", "syntax"),
    ("import os\nos.write(3, b'x' * 100)", "flood"),     # it announces a longer message
    ("import os\nos.write(3, b'\\xff' * 100)", "flood"),
    ("import os\nos.write(3, b'\\0\\0\\0\\2{}')", "protocol"),
    ("print(4)", "wrong answer"),
    ("import threading\nthreading.Thread(target=lambda: threading.Event().wait()).start()\nprint(3)", "timeout"),
])
def test_a_hostile_script_ends_and_leaves_nothing(sandbox, source, kind):
    limit = TIMEOUT_S if kind == "timeout" else PATIENCE_S
    bad, good = sandbox.run([Stdio(source, (("1\n", "3\n"),), timeout_s=limit), HONEST])
    assert bad.kind == kind, bad
    assert good.passed
    assert state_of(sandbox._workers[0])[0] == 2
    assert sandbox.run([COUNT_DESCRIPTORS])[0].detail == sandbox.descriptors
