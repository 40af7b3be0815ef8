"""What runs inside a sandbox; started as a script by `sandbox.py`, it imports the standard library alone.

    sandbox_inside.py LIMITS script            programs with standard input and output, one process for each input
    sandbox_inside.py LIMITS serve             a program whose functions another sandbox calls
    sandbox_inside.py LIMITS test READ WRITE   tests, which call the functions of a `serve` over these two pipes

Tests and programs never share a process, nor even a sandbox: a program sees the arguments that its functions are
called with, but neither the tests nor what they expect, and it has no part in the verdict.
"""

import builtins
import collections
import importlib
import json
import operator
import os
import re
import resource
import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

MAX_OPEN = 64


def drop_rights(limits: dict[str, Any]) -> None:
    """Become an unprivileged user where the sandbox was made by root, and take on the limits; for good."""
    if limits["uid"]:
        os.setgroups([])
        os.setresgid(limits["uid"], limits["uid"], limits["uid"])
        os.setresuid(limits["uid"], limits["uid"], limits["uid"])
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["file_mb"] << 20,
        resource.RLIMIT_NOFILE: MAX_OPEN,
        resource.RLIMIT_AS: limits["memory_mb"] << 20,
    }
    if limits["alone"]:  # elsewhere the limit would count all processes of the user
        wanted[resource.RLIMIT_NPROC] = limits["processes"] + 1  # this one
    for what, most in wanted.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with suppress(ValueError):  # macOS knows some limits only by name
            resource.setrlimit(what, (most, most))


class Lines:
    """JSON values, one in a line, over a pair of file descriptors."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd
        self._rest = b""

    def read(self) -> Any:
        """The next value.

        Raises:
            EOFError: there is none.
        """
        while b"\n" not in self._rest:
            chunk = os.read(self.read_fd, 1 << 16)
            if not chunk:
                raise EOFError("the other side is gone")
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def write(self, value: Any) -> None:
        left = memoryview(json.dumps(value).encode() + b"\n")
        while left:
            left = left[os.write(self.write_fd, left) :]


# ---------------------------------------------------------------------- programs with input and output


def scripts(limits: dict[str, Any]) -> str:
    """Answer `{"program", "stdin"}` with `{"status", "code", "stdout", "stderr"}` until there are no more.

    Returns:
        In a new process for each of them: the program to run.
    """
    lines = Lines(0, 1)
    while True:
        try:
            job = lines.read()
        except EOFError:
            os._exit(0)
        files = [_unnamed_file() for _ in range(3)]
        os.write(files[0], job["stdin"].encode("utf-8", "surrogatepass"))
        os.lseek(files[0], 0, os.SEEK_SET)
        child = os.fork()
        if child == 0:
            for number, file in enumerate(files):
                os.dup2(file, number)
            os.closerange(3, MAX_OPEN)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; too much output ends a program
            return job["program"]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if limits["alone"]:
            with suppress(ProcessLookupError):  # nothing was left
                os.kill(-1, signal.SIGKILL)
        stdout, stderr = (_output_of(file, limits) for file in files[1:])
        for file in files:
            os.close(file)
        too_long = max(len(stdout), len(stderr)) > limits["output_kb"] << 10
        status = "output" if too_long else "error" if code else "ok"
        lines.write({"status": status, "code": code, "stdout": stdout, "stderr": stderr})


def _unnamed_file() -> int:
    file = os.open(".unnamed", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    os.unlink(".unnamed")
    return file


def _output_of(file: int, limits: dict[str, Any]) -> str:
    return os.pread(file, (limits["output_kb"] << 10) + 1, 0).decode("utf-8", "replace")


def run_as_main(program: str) -> None:
    """Run a program as Python runs a script."""
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    sys.argv = ["solution.py"]
    exec(compile(program, "solution.py", "exec"), module.__dict__)


# ---------------------------------------------------------------------- calls between two sandboxes

TEXTUAL = {  # types whose values travel as text, and what reads it
    "decimal.Decimal": "Decimal",
    "fractions.Fraction": "Fraction",
    "datetime.date": "date.fromisoformat",
    "datetime.datetime": "datetime.fromisoformat",
}
COLLECTIONS: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
DICTIONARIES = (dict, collections.OrderedDict, collections.Counter, collections.defaultdict)
MAX_JSON_INT = 1 << 63  # larger numbers travel in hexadecimal
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "isinstance": lambda kind, value: isinstance(value, kind),
    **{f.__name__: f for f in (len, iter, next, str, repr, hash, bool, abs)},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "contains", "eq", "lt", "le", "gt", "ge")},
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "neg")},
}


class ProgramEnded(BaseException):
    """The program ended its process."""


class Peer:
    """One side of a pair that calls each other's functions.

    Plain values travel as copies, and lose the methods that a program gave to them; any other object stays where it is
    and the other side gets a `Remote`.
    """

    def __init__(self, lines: Lines, operations: dict[str, Callable[..., Any]]) -> None:
        self.lines, self.operations = lines, operations
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def ask(self, operation: str, *arguments: Any, **named: Any) -> Any:
        """Have the other side do something, and return or raise its result."""
        sent = [self.encode(value) for value in arguments]
        self.lines.write({"do": operation, "with": sent, "named": {k: self.encode(v) for k, v in named.items()}})
        while "do" in (answer := self.lines.read()):
            self.answer(answer)
        if "gone" in answer:
            raise ProgramEnded
        if "error" in answer:
            raise _exception(answer["error"], answer["text"])
        for position, changed in answer["changed"]:
            _replace(arguments[position], self.decode(changed))
        return self.decode(answer["value"])

    def answer(self, request: dict[str, Any]) -> None:
        """Do what the other side asked for."""
        try:
            arguments = [self.decode(value) for value in request["with"]]
            before = [self._content(value) for value in arguments]
            named = {name: self.decode(value) for name, value in request["named"].items()}
            value = self.encode(self.operations[request["do"]](*arguments, **named))
            after = [self._content(value) for value in arguments]
            changed = [[place, new] for place, new in enumerate(after) if new != before[place]]
            reply = {"value": value, "changed": changed}
        except BaseException as error:  # SystemExit, too: whatever a program does is an answer
            names = [kind.__name__ for kind in type(error).__mro__]
            reply = {"error": names, "text": repr(error)[:300]}
        self.lines.write(reply)

    def _content(self, value: Any) -> Any:
        return self.encode(value) if type(value) in (list, dict, set, collections.deque) else None

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and abs(value) < MAX_JSON_INT):
            return value
        if kind is int:
            return ["int", hex(value)]
        if kind in COLLECTIONS.values():
            return [kind.__name__, [self.encode(entry) for entry in value]]
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return ["tuple", [self.encode(entry) for entry in value]]
        if kind in DICTIONARIES:
            return ["dict", [[self.encode(key), self.encode(entry)] for key, entry in value.items()]]
        if kind in (bytes, bytearray):
            return [kind.__name__, value.hex()]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is range:
            return ["range", value.start, value.stop, value.step]
        return self._encode_other(value, f"{kind.__module__}.{kind.__qualname__}")

    def _encode_other(self, value: Any, kind: str) -> Any:
        if kind in TEXTUAL:
            return ["text", kind, str(value)]
        if kind == "numpy.ndarray" and value.dtype.kind in "biufcSU":
            return ["array", value.dtype.str, self.encode(value.tolist())]
        if kind.startswith("numpy.") and hasattr(value, "item"):
            return self.encode(value.item())
        if isinstance(value, type) and value in vars(builtins).values():
            return ["type", value.__name__]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if type(value) is Remote:
            return ["yours", object.__getattribute__(value, "_number")]
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return ["object", self.numbers[id(value)]]

    def decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        match value:
            case ["int", digits]:
                return int(digits, 16)
            case [("list" | "tuple" | "set" | "frozenset" | "deque") as kind, entries]:
                return COLLECTIONS[kind](self.decode(entry) for entry in entries)
            case ["dict", entries]:
                return {self.decode(key): self.decode(entry) for key, entry in entries}
            case ["bytes", digits]:
                return bytes.fromhex(digits)
            case ["bytearray", digits]:
                return bytearray.fromhex(digits)
            case ["complex", real, imaginary]:
                return complex(real, imaginary)
            case ["range", start, stop, step]:
                return range(start, stop, step)
            case ["text", kind, text]:
                module = importlib.import_module(kind.split(".")[0])
                return operator.attrgetter(TEXTUAL[kind])(module)(text)
            case ["array", kind, entries]:
                return importlib.import_module("numpy").array(self.decode(entries), dtype=kind)
            case ["type", name] if isinstance(found := getattr(builtins, name), type):
                return found
            case ["module", name] if name in sys.stdlib_module_names or name == "numpy":
                return importlib.import_module(name)
            case ["yours", number]:
                return self.objects[number]
            case ["object", number]:
                return Remote(self, number)
        raise TypeError(f"not a value: {value!r:.40}")


class Remote:
    """An object of the other side. It equals no plain value, whatever its own `__eq__` says."""

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask("call", self, *arguments, **named)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._peer.ask("iter", self)
        while True:
            try:
                yield self._peer.ask("next", iterator)
            except StopIteration:
                return

    def __eq__(self, other: object) -> bool:
        return type(other) is Remote and self._peer.ask("eq", self, other) is True

    def __instancecheck__(self, value: Any) -> bool:
        return self._peer.ask("isinstance", self, value) is True


def _forward(name: str) -> Callable[..., Any]:
    return lambda self, *arguments: self._peer.ask(name, self, *arguments)


for _name in OPERATIONS.keys() - {"call", "getattr", "setattr", "isinstance", "iter", "eq"}:
    setattr(Remote, f"__{_name}__", _forward(_name))


def _replace(old: Any, new: Any) -> None:
    """Give a list, dictionary, set or deque the content that a function left in its copy."""
    old.clear()
    if isinstance(old, list | collections.deque):
        old.extend(new)
    else:
        old.update(new)


def _exception(names: list[str], text: str) -> Exception:
    """The nearest of Python's own exceptions, so that a test can expect it."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind(text) if not issubclass(kind, UnicodeError) else ValueError(text)
    return RuntimeError(text)


# ---------------------------------------------------------------------- the side of the program

NO_MORE_CALLS = 77  # exit code


def serve() -> None:
    """Serve a program's functions; in a new process each time that it ends its own."""
    pipes = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    while True:
        child = os.fork()
        if child == 0:
            _serve(Peer(Lines(*pipes), {**OPERATIONS, "load": _load}))
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == NO_MORE_CALLS:
            return
        Lines(*pipes).write({"gone": True})


def _serve(peer: Peer) -> None:
    try:
        while True:
            peer.answer(peer.lines.read())
    except EOFError:
        os._exit(NO_MORE_CALLS)
    except BaseException:  # its pipes are closed, or what they bring is no request
        os._exit(1)


def _load(program: str) -> dict[str, Any]:
    """The names that a program defines."""
    sys.modules["solution"] = module = types.ModuleType("solution")
    exec(compile(program, "solution.py", "exec"), module.__dict__)
    return {name: value for name, value in module.__dict__.items() if not name.startswith("__")}


# ---------------------------------------------------------------------- the side of the tests


def test(read_fd: int, write_fd: int) -> None:
    """Answer `{"program", "setup", "tests"}` with a line for each test: whether it passed."""
    host = Lines(0, os.dup(1))
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    job = host.read()
    peer = Peer(Lines(read_fd, write_fd), {"call": _call_back})
    names: dict[str, Any] | None = None
    for case in job["tests"]:
        passed = False
        try:
            if names is None:
                names = {"__name__": "tests"} | _visible_names(peer.ask("load", job["program"]), job["tests"])
                exec(compile(job["setup"], "setup.py", "exec"), names)
            passed = _passes(case, names)
        except EOFError:
            return
        except ProgramEnded:
            names = None  # loaded again for the next test
        except BaseException:  # whatever a test raises, it failed
            passed = False
        host.write(passed)


def _visible_names(names: dict[str, Any], tests: list[Any]) -> dict[str, Any]:
    """What tests see of a program: names that hide builtins only where they are all that is tested."""
    own = {name: value for name, value in names.items() if not hasattr(builtins, name)}
    used = set(re.findall(r"\w+", " ".join(case if isinstance(case, str) else case["function"] for case in tests)))
    return names if used.isdisjoint(own) else own


def _passes(case: Any, names: dict[str, Any]) -> bool:
    if isinstance(case, str):
        exec(compile(case, "test.py", "exec"), names)
        return True
    name = case["function"]
    function = names[name] if name in names else getattr(names["Solution"](), name)
    return any(_same(function(*json.loads(case["arguments"])), json.loads(right)) for right in case["expected"])


def _same(value: Any, right: Any) -> bool:
    """Equality where a tuple is as good as a list, and floats may differ by 1e-6 of their size."""
    if isinstance(value, list | tuple) and isinstance(right, list):
        return len(value) == len(right) and all(map(_same, value, right))
    if isinstance(value, dict) and isinstance(right, dict):
        texts = {str(key): entry for key, entry in value.items()}  # JSON has no other keys
        return texts.keys() == right.keys() and all(_same(texts[key], right[key]) for key in right)
    if isinstance(value, float) and isinstance(right, int | float):
        return value == right or abs(value - right) <= 1e-6 * max(1.0, abs(right))
    return bool(value == right)


def _call_back(function: Any, *arguments: Any, **named: Any) -> Any:
    """A program may call the functions that a test hands to it, and do nothing else with the test's objects."""
    if not isinstance(function, types.FunctionType | types.BuiltinFunctionType | type):
        raise TypeError(f"'{type(function).__name__}' object is not callable")
    return function(*arguments, **named)


def main() -> None:
    limits, role, *pipes = json.loads(sys.argv[1]), *sys.argv[2:]
    drop_rights(limits)
    if role == "script":
        run_as_main(scripts(limits))
    elif role == "serve":
        serve()
    else:
        test(*map(int, pipes))


if __name__ == "__main__":
    main()
