"""Names from tables of choices, and the user's own by dotted path or file."""

import importlib
import importlib.util
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from stepcredit.errors import UserError, did_you_mean

log = logging.getLogger("stepcredit")
_told: set[str] = set()  # code of the user's own that the log has named
_folders: list[str] = []  # where it is looked for, beside the current folder
_used: set[str] = set()  # the folders that it came from, the current one among them
FORMS = "a dotted path (my_module.f) or a file (my_file.py:f)"


def by_name(option: str, name: str, table: Mapping[str, Callable[..., Any] | str]) -> Callable[..., Any]:
    """The function that `table` lists under `name` (itself or its dotted path), or the user's own.

    That one is named by its dotted path, or by a file and its name there: `my_module.f`, `./my_file.py:f`. Both are
    looked for in the current folder and in those of `search_in`; modules also where Python looks.

    Raises:
        UserError: naming `option`, when there is no such function, or its module fails.
    """
    found = table.get(name)
    if callable(found):
        return found
    if isinstance(found, str):
        module, _, attribute = found.rpartition(".")
        try:
            function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise UserError(f"{option}: cannot import '{name}' ({error})") from error
        return function
    if "." not in name and ":" not in name:
        raise UserError(f"{option}: '{name}' is not known; {did_you_mean(name, table)}, or give {FORMS}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    importlib.invalidate_caches()
    own, attributes = _from_file(option, name) if _is_file(name) else _from_module(option, name)
    chosen = _attribute(option, name, own, attributes)
    if name not in _told:
        _told.add(name)
        log.info("%s: code of your own, %s from %s", option, name, getattr(own, "__file__", "this program"))
    if not callable(chosen):
        raise UserError(f"{option}: '{name}' is a {type(chosen).__name__}, not a function")
    try:
        inspect.signature(chosen)
    except (TypeError, ValueError) as error:
        raise UserError(f"{option}: '{name}' does not say what arguments it takes; put a function around it") from error
    return chosen


def search_in(*folders: str | Path) -> None:
    """Look for code of the user's own in these folders, too; processes that start later do as well."""
    for folder in folders:
        place = str(Path(folder).resolve())
        if place not in _folders:
            _folders.append(place)
        if place not in sys.path:
            sys.path.append(place)


def used_folders() -> list[str]:
    """The folders that code of the user's own came from so far: a run that goes on elsewhere looks there."""
    return sorted(_used)


def located(option: str, name: str) -> str:
    """A name by which any process finds the same code: files with their whole path.

    Raises:
        UserError: there is no such file.
    """
    if not _is_file(name):
        return name
    path, _, attribute = name.rpartition(":")
    return f"{_file(option, path)}:{attribute}"


def module_of(name: str) -> str | None:
    """The module of a dotted path; None for a file."""
    return None if _is_file(name) else name.replace(":", ".").rpartition(".")[0]


# ---------------------------------------------------------------------- code of the user's own


def _is_file(name: str) -> bool:
    return ".py:" in name or name.endswith(".py")


def _from_file(option: str, name: str) -> tuple[ModuleType, list[str]]:
    given, colon, attribute = name.rpartition(":")
    path = _file(option, given if colon else name)
    module_name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        search_in(path.parent)  # what it imports from beside it
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"{option}: '{path}' is no file of Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise UserError(_failure(option, name, error)) from error
    if not colon or not attribute:
        raise UserError(f"{option}: '{name}' does not name a function; {_functions(sys.modules[module_name])}")
    return sys.modules[module_name], attribute.split(".")


def _file(option: str, given: str) -> Path:
    for folder in [os.getcwd(), *_folders]:
        path = Path(folder, given)
        if path.is_file():
            if not Path(given).is_absolute():
                _used.add(folder)
            return path.resolve()
    raise UserError(f"{option}: there is no file '{given}'{_looked('' if Path(given).is_absolute() else given)}")


def _looked(given: str = "-") -> str:
    return f" in {', '.join([os.getcwd(), *_folders])} (--code-folders FOLDER adds one)" if given else ""


def _from_module(option: str, name: str) -> tuple[ModuleType, list[str]]:
    """The module of a dotted path, and what is named inside it, which may be a class and its method."""
    parts = name.replace(":", ".").split(".")
    if not all(part.isidentifier() for part in parts):
        file = f"{name.rpartition('.')[0]}.py:{parts[-1]}"
        hint = f"; did you mean {file}?" if Path(file.rpartition(":")[0]).is_file() else ""
        raise UserError(f"{option}: '{name}' is neither {FORMS.replace(' or ', ' nor ')}{hint}")
    for number in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:number])
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                continue
            raise UserError(_failure(option, name, error)) from error
        except (Exception, SystemExit) as error:
            raise UserError(_failure(option, name, error)) from error
        _note_folder(module)
        return module, parts[number:]
    raise UserError(
        f"{option}: cannot import '{name}': there is no module '{parts[0]}'{_looked()}, nor is it installed"
    )


def _note_folder(module: ModuleType) -> None:
    if not getattr(module, "__file__", None):
        return
    path = Path(str(module.__file__)).resolve()
    depth = module.__name__.count(".") + (path.name == "__init__.py")
    folder = str(path.parents[depth])
    if folder in {os.getcwd(), *_folders}:
        _used.add(folder)


def _attribute(option: str, name: str, module: ModuleType, attributes: list[str]) -> Any:
    found: Any = module
    for attribute in attributes:
        try:
            found = getattr(found, attribute)
        except Exception as error:
            place = getattr(module, "__file__", None) or f"module '{module.__name__}'"
            beside = Path(f"{module.__name__}.py")
            hint = _functions(module, attribute)
            if beside.is_file() and beside.resolve() != Path(str(place)).resolve():
                hint = f"for the file here write ./{beside}:{'.'.join(attributes)}"
            raise UserError(f"{option}: cannot import '{name}': {place} has no '{attribute}'; {hint}") from error
    return found


def _functions(module: ModuleType, wanted: str = "") -> str:
    names = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return did_you_mean(wanted, names) if names else "it has no function"


def _failure(option: str, name: str, error: BaseException) -> str:
    """An error of the user's module, with its file and line, in one line."""
    if isinstance(error, SyntaxError) and error.filename:
        place, what = f"{error.filename}, line {error.lineno}", error.msg
    else:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename != __file__ and "importlib" not in frame.filename
        ]
        near = [frame for frame in frames if Path(frame.filename).parent == Path(frames[0].filename).parent]
        place = f"{near[-1].filename}, line {near[-1].lineno}" if near else "its module"
        what = " ".join(str(error).split())
    what = "it ends the program" if isinstance(error, SystemExit) else what
    return f"{option}: '{name}' fails when it is imported: {place}: {type(error).__name__}: {what}"[:500]
