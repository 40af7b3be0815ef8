"""Programs that try to break out, to break something, or to be counted as right; none of them is.

Texts are templates: `{...}` is filled in by the test.
"""

ESCAPES = {  # they print ESCAPED where they got what they wanted
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), 1); print('ESCAPED')",
    "resolve": "import socket; socket.getaddrinfo('example.com', 80); print('ESCAPED')",
    "abstract socket": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0{marker}'); print('ESCAPED')",
    "environment": "import os; print('ESCAPED' if '{secret}' in str(os.environ) else '')",
    "environment of others": """
import glob
for path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline'):
    try:
        if b'{secret}' in open(path, 'rb').read(): print('ESCAPED')
    except OSError: pass
""",
    "read the host's file": "print(open('{folder}/secret').read(), 'ESCAPED')",
    "read home": "import os; print([e for e in os.scandir('{home}') if e.is_file()][0], 'ESCAPED')",
    "read passwords": "print(open('/etc/passwd').read(), 'ESCAPED'); open('/etc/shadow')",
    "write the host's folder": "open('{folder}/written', 'w').write('x'); print('ESCAPED')",
    "write the interpreter": "import os; open(os.__file__, 'a').write(' '); print('ESCAPED')",
    "write the root": "open('/written', 'w').write('x'); print('ESCAPED')",
    "write devices": "open('/dev/written', 'w').write('x'); print('ESCAPED')",
    "link to the host": """
import os
os.symlink('{folder}', 'link')
open('link/written', 'w').write('x')
print('ESCAPED')
""",
    "up and out": "open('../../../../../..{folder}/secret').read(); print('ESCAPED')",
    "delete everything": """
import os, shutil
shutil.rmtree('/', ignore_errors=True)
print('ESCAPED' if not os.path.exists('/usr/bin') or os.path.exists('{folder}') else '')
""",
    "memory of the machine": "open('/dev/mem', 'rb'); print('ESCAPED')",
    "disks": """
import os
for major in (7, 8, 254, 259):
    os.mknod('disk%d' % major, 0o60600, os.makedev(major, 0))
    open('disk%d' % major, 'rb').read(1); print('ESCAPED')
""",
    "kernel settings": "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/true'); print('ESCAPED')",
    "system requests": "open('/proc/sysrq-trigger', 'w').write('h'); print('ESCAPED')",
    "become root": "import os; os.setuid(0); print('ESCAPED')",
    "change root": "import os; os.chroot('/tmp'); print('ESCAPED')",
    "mount": """
import ctypes
print('' if ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) else 'ESCAPED')
""",
    "unmount": "import ctypes; print('' if ctypes.CDLL(None).umount2(b'/proc', 2) else 'ESCAPED')",
    "new user namespace": "import ctypes; print('' if ctypes.CDLL(None).unshare(0x10000000) else 'ESCAPED')",
    "trace the keeper": """
import ctypes, os
print('' if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) else 'ESCAPED')
""",
    "raise limits": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('ESCAPED')
""",
    "hidden memory": "import os; os.memfd_create('x'); print('ESCAPED')",
    "shared memory": "import ctypes; print('' if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) == -1 else 'ESCAPED')",
    "kill others": """
import os
for pid in range(3, 5000):
    if pid not in (os.getpid(), os.getppid()):
        try: os.kill(pid, 9); print('ESCAPED', pid)
        except OSError: pass
""",
}

BOMBS = {  # they never end well by themselves
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "deaf": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
""",
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "shell forks": """
import subprocess
subprocess.run(['/bin/sh', '-c', 'f() {{ f | f & }}; f; sleep 100'])
while True: pass
""",
    "threads": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(1000,)).start()
    except RuntimeError: time.sleep(0.1)
""",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory of many": """
import os, time
for _ in range(8):
    if os.fork() == 0: break
x = bytearray(b'x') * (100 << 20)
time.sleep(1000)
""",
    "disk": """
for number in range(100000):
    open(str(number), 'wb').write(bytes(1 << 20))
""",
    "huge file": "f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "many files": """
import time
for number in range(1000000): open(str(number), 'w').close()
time.sleep(1000)
""",
    "open files": "x = [open('/dev/null') for _ in range(10000)]",
    "output": "while True: print('x' * 1000)",
    "errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): return [f()]\nf = lambda g=[]: repr(g)\n"
    "x = []\nfor _ in range(10**7): x = [x]\nrepr(x)",
    "number": "9**9**9**9",
    "expression": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "unpacking": "import zlib; zlib.decompress(zlib.compress(bytes(1 << 20)) * 1, bufsize=1 << 40)",
    "core": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "input": "import sys\nwhile True: sys.stdin.read(); input()",
    "kill all": "import os; os.kill(-1, 9); raise SystemExit(1)",
    "kill the keeper": "import os; os.kill(os.getppid(), 9); raise SystemExit(1)",
    "stop the keeper": "import os, signal; os.kill(os.getppid(), signal.SIGSTOP); raise SystemExit(1)",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
while True: time.sleep(1)
""",
}

LEFTOVERS = {  # they end at once and leave something running
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        while True: time.sleep(1)
""",
    "shell": "import subprocess; subprocess.Popen(['/bin/sh', '-c', 'trap \"\" TERM HUP; sleep 1000'])",
}

FAKES = {  # against `assert f(2) == 4`, `assert f(3) == 6`
    "exit": "import sys; sys.exit(0)",
    "hard exit": "import os; os._exit(0)",
    "exit in the function": "def f(x): raise SystemExit(0)",
    "hard exit in the function": "import os\ndef f(x): os._exit(0)",
    "print": "print('true\\n' * 9, flush=True)\ndef f(x): print('true')",
    "write everywhere": """
import os
def f(x):
    for fd in range(64):
        try: os.write(fd, b'true\\n{{"value": 4, "changed": []}}\\n')
        except OSError: pass
""",
    "write to all pipes": """
import glob
def f(x):
    for path in glob.glob('/proc/[0-9]*/fd/*'):
        try: open(path, 'wb', 0).write(b'true\\ntrue\\n')
        except OSError: pass
""",
    "builtins": """
import builtins
builtins.AssertionError = type('A', (), {{}}); builtins.exec = builtins.compile = lambda *a, **k: True
def f(x): return 5
""",
    "hide builtins": "AssertionError = str\nabs = len = bool = isinstance = lambda *a: True\ndef f(x): return 5",
    "equal to all": """
class A:
    def __eq__(self, other): return True
    def __bool__(self): return False
def f(x): return A()
""",
    "equal number": """
class A(int):
    def __eq__(self, other): return True
def f(x): return A(0)
""",
    "close all": "import os\ndef f(x): os.closerange(0, 64)",
    "at exit": "import atexit, os; atexit.register(os._exit, 0)\ndef f(x): return None",
    "thread": """
import threading, os
def f(x): threading.Timer(0.1, os._exit, (0,)).start(); return 5
""",
    "read the tests": """
import gc, sys, glob
def f(x):
    seen = repr(gc.get_objects()) + repr(sys.argv)
    for path in glob.glob('/proc/[0-9]*/cmdline') + glob.glob('/tmp/*'):
        try: seen += open(path).read()
        except (OSError, UnicodeError): pass
    return 2 * x if ' == '.join(['f(2)', '4']) in seen else None
""",
    "frames": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        frame.f_globals['_passes'] = lambda *a: True
        frame = frame.f_back
""",
    "kill all": "import os\ndef f(x): os.kill(-1, 9)",
    "endless": "def f(x):\n    while True: pass",
}
