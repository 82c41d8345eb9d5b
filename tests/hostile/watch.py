"""Run every command over every hostile file and watch what the process does. Prints what was seen as one line of JSON.

    python watch.py FOLDERS WARM CANARY    FOLDERS hold a hostile file each; WARM sound ones, whose reading imports what upparam imports late
    python watch.py --self-test            does each of the watched things; prints what was not seen

Watched: unpickling, torch.load, exec, eval, compile, imports (by statement, by name, of anything upparam's own sources do not import),
processes, sockets, and every change to a file outside WARM.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import io
import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import types

import upparam.cli
from upparam.containers import open_all
from upparam.errors import UpparamError

EVENTS = (
    "exec", "compile", "import", "pickle.find_class", "marshal.loads", "marshal.load", "ctypes.dlopen", "pty.spawn", "subprocess.Popen", "webbrowser.open",
    "shutil.copyfile", "code.__new__", "function.__new__", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.putenv",
    "os.startfile", "os.kill", "sys.setprofile", "sys.settrace",
)  # fmt: skip
READERS = (0, 1, 2, 4, 5, 9)
"""Places in `commands` of those that every file goes through (scan, identify, inspect, salvage, verify, convert); files in folders named all-* go through every command."""
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move")  # fmt: skip


class Watch:
    """What was seen, under the name of the file being read."""

    def __init__(self, allowed: pathlib.Path) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self.current, self.on, self.allowed = "", False, str(allowed)

    def note(self, what: str, detail: object = "") -> None:
        if self.on:
            self.seen.append((self.current, what, str(detail)[:200]))

    def hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in EVENTS or event.startswith("socket."):
            if event != "import" or args[0].split(".")[0] not in ("upparam", "numpy", "encodings"):
                self.note(event, args)
        elif event in WRITES and not all(str(path).startswith(self.allowed) for path in args[:2] if isinstance(path, (str, os.PathLike))):
            self.note(event, args)
        elif event == "open" and isinstance(args[0], str) and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            temporary = bool(args[2] & getattr(os, "O_TMPFILE", 0) == getattr(os, "O_TMPFILE", -1))
            if not args[0].startswith(self.allowed) and not temporary:
                self.note(event, args[0])

    def trap(self, name: str):
        def inner(*args: object, **more: object) -> None:
            self.note(name)
            raise RuntimeError(f"trapped {name}")

        return inner

    def set(self) -> None:
        """Replace what must never be called, and start to watch."""
        pickle.load = pickle.loads = pickle.Unpickler = self.trap("unpickling")
        torch = types.ModuleType("torch")
        torch.load = self.trap("torch.load")
        sys.modules["torch"] = torch
        builtins.eval = self.trap("eval")
        builtins.exec = self.trap("exec")
        os.system = os.popen = self.trap("os.system")
        subprocess.Popen = subprocess.run = self.trap("subprocess")
        socket.create_connection = self.trap("socket")
        real_import, by_name, known = builtins.__import__, importlib.import_module, statements()

        def importing(name, globals=None, locals=None, fromlist=(), level=0):
            asker = (globals or {}).get("__name__", "")
            if asker.split(".")[0] == "upparam" and level == 0 and name not in known:
                self.note("__import__", f"{asker} imports {name}")
            return real_import(name, globals, locals, fromlist, level)

        def import_module(name, package=None):
            if not name.startswith("upparam."):
                self.note("import_module", name)
            return by_name(name, package)

        builtins.__import__, importlib.import_module = importing, import_module
        sys.addaudithook(self.hook)
        self.on = True


def statements() -> set[str]:
    """Every module that an import statement of upparam's sources names."""
    found: set[str] = set()
    for path in pathlib.Path(upparam.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def commands(path: str, warm: pathlib.Path) -> list[list[str]]:
    """Every command with the file in every place that takes one."""
    base, peft = str(warm / "base.safetensors"), str(warm / "peft")
    out = ["-o", str(warm / "out"), "--force"]
    return [
        ["scan", path, "--sarif", str(warm / "out.sarif")], ["identify", path], ["inspect", path], ["inspect", path, "--hash", "--json"],
        ["inspect", path, "--salvage", str(warm / "out.safetensors"), "--force"], ["verify", path], ["verify", peft, "--base", path],
        ["assemble", path, "--to", "peft", *out], ["split", path, *out], ["convert", path, "--to", "peft", *out], ["bases", path],
        ["merge", base, path, *out], ["merge", path, peft, *out], ["merge", path, peft, "--dry-run"], ["unmerge", path, peft, *out], ["undo", path],
        ["extract", path, base, "--to", "peft", *out], ["extract", base, path, "--to", "peft", *out], ["combine", path, peft, *out],
        ["resize", path, "--rank", "1", *out], ["edit", path], ["edit", path, "--alpha", "1", *out], ["compare", path, peft], ["compare", path, base],
    ]  # fmt: skip


def everything(path: pathlib.Path, warm: pathlib.Path, problems: list) -> int:
    """Open the file and run all commands on it. What is no documented exit is a problem."""
    try:
        for file in open_all(path):
            for tensor in file.tensors.values():
                if tensor.nbytes < 1 << 20:
                    tensor.read()
    except UpparamError:
        pass
    except BaseException as problem:
        problems.append((path.name, "open", repr(problem)[:300]))
    runs = commands(str(path), warm)
    assert {words[0] for words in runs} >= set(upparam.cli.COMMANDS) - {"dialects"}, "a command that is not watched"
    runs = runs if path.parent.name.startswith("all") or path.is_relative_to(warm) else [runs[at] for at in READERS]
    for words in runs:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                code = upparam.cli.main(words)
                if code not in (0, 1, 2, 3, 4):
                    problems.append((path.name, words, f"exit {code}"))
            except BaseException as problem:
                problems.append((path.name, words, repr(problem)[:300] + out.getvalue()[-300:]))
    return len(runs)


def self_test() -> list[str]:
    """Do what is watched; the names of what was not seen."""
    watch = Watch(pathlib.Path("/allowed-nowhere"))
    here = {"__name__": "upparam.pretended"}
    real_exec, compiled = exec, compile("import this_is_not_in_the_sources", "x", "exec")
    deeds = {
        "unpickling": lambda: pickle.loads(b"N."), "torch.load": lambda: __import__("torch").load("x"), "eval": lambda: eval("1"), "exec": lambda: exec("1"),
        "os.system": lambda: os.system("true"), "subprocess": lambda: subprocess.run(["true"]), "socket": lambda: socket.create_connection(("127.0.0.1", 9)),
        "socket.__new__": lambda: socket.socket(), "__import__": lambda: real_exec(compiled, here), "import_module": lambda: importlib.import_module("json"),
        "compile": lambda: compile("1", "x", "eval"), "open": lambda: pathlib.Path("/tmp/upparam-watch").open("w").close(), "os.mkdir": lambda: pathlib.Path("/nonexistent-too/x").mkdir(),
        "os.remove": lambda: pathlib.Path("/nonexistent-too/x").unlink(), "import": lambda: __import__("this_is_not_there"),
    }  # fmt: skip
    watch.set()
    missing = []
    for name, deed in deeds.items():
        watch.seen.clear()
        with contextlib.suppress(BaseException):
            deed()
        if name not in {what for _, what, _ in watch.seen}:
            missing.append(name)
    watch.on = False
    pathlib.Path("/tmp/upparam-watch").unlink(missing_ok=True)
    return missing


def main() -> None:
    """Warm up, set the traps, read the hostile files, tell."""
    if sys.argv[1:] == ["--self-test"]:
        print(json.dumps(self_test()))
        return
    folder, warm, canary = map(pathlib.Path, sys.argv[1:])
    problems: list = []
    for path in [*sorted(warm.glob("*.*")), warm / "peft"]:
        everything(path, warm, problems)
    problems.clear()
    "\x1b\ud800".encode("unicode_escape")
    watch = Watch(warm)
    watch.set()
    files, runs = sorted(folder.glob("*/*")), 0
    for path in files:
        watch.current = path.name
        runs += everything(path, warm, problems)
    watch.on = False
    told = {"seen": watch.seen[:20], "problems": problems[:20], "canary": canary.exists(), "files": len(files), "runs": runs}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
