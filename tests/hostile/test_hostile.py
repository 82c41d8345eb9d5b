"""Every hostile file gets its verdict, in time, and no command answers with a traceback."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import time

import pytest

from upparam.operations.scan import scan_file

from .corpus import hostile

CASES = hostile("/tmp/upparam-canary-that-must-not-exist")


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 150 and len({case.kind for case in CASES}) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(case, tmp_path):
    begun = time.process_time()
    report = scan_file(case.write(tmp_path))
    taken = time.process_time() - begun
    assert report.verdict.value == case.verdict, report.facts()
    assert taken < 5


def test_benign_files_are_no_alarm(tmp_path):
    from .benign import benign

    cases = benign()
    assert len(cases) >= 40
    wrong = {case.name: scan_file(case.write(tmp_path)).facts() for case in cases}
    assert {
        name: facts["findings"]
        for name, facts in wrong.items()
        if facts["verdict"] != next(case.verdict for case in cases if case.name == name)
    } == {}


def test_real_leftovers_are_no_alarm(corpus):
    for path in corpus.rglob("*"):
        if path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".npz"):
            report = scan_file(path)
            assert report.exit_code == 0, report.facts()


ATTACK = """
import sys, pickle, io
data = open(sys.argv[1], 'rb').read()
try:
    if data[:2] == b'PK':
        import zipfile
        archive = zipfile.ZipFile(io.BytesIO(data))
        data = archive.read(next(name for name in archive.namelist() if name.endswith('data.pkl')))
    class Loader(pickle.Unpickler):
        def persistent_load(self, name): return None
    stream = io.BytesIO(data)
    while True:
        Loader(stream).load()
except BaseException:
    pass
"""


@pytest.mark.parametrize("name", ["call-os.system.pkl", "stack-global-memo.pkl", "obj.pkl", "inst.pkl", "second-pickle.pkl", "no-stop.pkl", "nested-three-deep.pkl",
                                  "protocol-0.pkl", "bad-opcode-after.pkl", "renamed-model.safetensors", "list-of-map.pkl", "dropped.pkl", "marshal.pkl", "partial-called.pkl", "getattr-chain.pkl"])  # fmt: skip
def test_the_payloads_are_real(name, tmp_path):
    """Without this the corpus could be harmless by mistake: the plain unpickler does run these."""
    canary = tmp_path / "canary"
    case = next(case for case in hostile(str(canary)) if case.name == name)
    subprocess.run([sys.executable, "-c", ATTACK, case.write(tmp_path)], timeout=60, check=False, capture_output=True)
    assert canary.exists()


WATCH = """
import builtins, contextlib, io, json, os, pathlib, pickle, socket, subprocess, sys
import upparam.cli
from upparam.containers import open_all
from upparam.errors import UpparamError

folder, warm, canary = map(pathlib.Path, sys.argv[1:])
problems, seen, current, watching = [], [], '', False

def everything(path):
    global current
    current = path.name
    try:
        for file in open_all(path):
            for tensor in file.tensors.values():
                if tensor.nbytes < 1 << 20:
                    tensor.read()
    except UpparamError:
        pass
    except BaseException as problem:
        problems.append((path.name, 'open', repr(problem)[:300]))
    for command in (['scan', '--sarif', str(warm / 'out.sarif')], ['identify'], ['inspect'], ['inspect', '--salvage', str(warm / 'out.safetensors'), '--force'],
                    ['verify'], ['convert', '--to', 'peft', '-o', str(warm / 'out'), '--force']):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                code = upparam.cli.main([command[0], str(path), *command[1:]])
                if code not in (0, 1, 2, 3, 4):
                    problems.append((path.name, command[0], f'exit {code}'))
            except BaseException as problem:
                problems.append((path.name, command[0], repr(problem)[:300] + out.getvalue()[-300:]))

def hook(event, args):
    if not watching:
        return
    forbidden = ('exec', 'compile', 'import', 'pickle.find_class', 'marshal.loads', 'marshal.load', 'ctypes.dlopen', 'pty.spawn', 'subprocess.Popen', 'webbrowser.open',
                 'shutil.copyfile', 'code.__new__', 'function.__new__', 'os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'os.forkpty', 'os.putenv')
    if event in forbidden or event.startswith('socket.'):
        if event != 'import' or args[0].split('.')[0] not in ('upparam', 'numpy', 'encodings'):
            seen.append((current, event, str(args)[:200]))
    elif event == 'open' and isinstance(args[0], str) and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not args[0].startswith(str(warm)):
        seen.append((current, event, args[0]))

for path in sorted(warm.iterdir()):
    everything(path)
problems.clear()
'\\x1b'.encode('unicode_escape')

def trap(name):
    def inner(*args, **more):
        seen.append((current, name, ''))
        raise RuntimeError(name)
    return inner

pickle.load = pickle.loads = pickle.Unpickler = trap('pickle')
builtins.eval = builtins.exec = trap('eval or exec')
os.system = os.popen = subprocess.Popen = subprocess.run = socket.create_connection = trap('process or socket')
sys.addaudithook(hook)
watching = True
files = sorted(folder.iterdir())
for path in files:
    everything(path)
watching = False
print(json.dumps({'seen': seen[:20], 'problems': problems[:20], 'canary': canary.exists(), 'files': len(files)}))
"""


def test_nothing_is_executed_whatever_the_command(tmp_path):
    """Every command over every hostile file in a process where unpickling, exec, imports, processes, sockets and writes are watched."""
    from .benign import benign

    folder, warm, canary = tmp_path / "files", tmp_path / "warm", tmp_path / "canary"
    folder.mkdir()
    warm.mkdir()
    for case in benign():
        case.write(warm)
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (warm / f"packed{suffix}").write_bytes(pack((warm / "lone.bin").read_bytes()))
    (warm / "cut.pt").write_bytes((warm / "tied.bin").read_bytes()[:-500])
    for case in hostile(str(canary)):
        case.write(folder)
    done = subprocess.run([sys.executable, "-c", WATCH, folder, warm, canary], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["files"] >= 150
    assert told["canary"] is False and told["seen"] == [] and told["problems"] == []
