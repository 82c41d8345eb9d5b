"""Fill the tables of docs/security.md: the hostile corpus through upparam and through other scanners.

    python tools/compare_scanners.py --peers PYTHON [--write]

PYTHON is an interpreter of an environment of its own with picklescan, fickling, modelscan and modelaudit-picklescan installed. Payloads in the
corpus create a canary file and do nothing else; each scanner runs in a process of its own with a time and a memory limit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import select
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hostile.asm import CODE, MALFORMED  # noqa: E402
from hostile.benign import benign  # noqa: E402
from hostile.corpus import hostile  # noqa: E402

LIMIT_SECONDS = 20
LIMIT_BYTES = 6 << 30
SERVE = """
import json, sys, time
print(version, flush=True)
for line in sys.stdin:
    begun = time.perf_counter()
    try:
        answer = check(line.rstrip('\\n'))
    except MemoryError:
        answer = 'crashed'
    except BaseException as problem:
        answer = 'error'
    sys.__stdout__.write('answer ' + json.dumps([answer, time.perf_counter() - begun]) + '\\n')
    sys.__stdout__.flush()
"""
SCANNERS = {
    "upparam": """
from upparam.operations.scan import scan_file
from upparam import __version__ as version
def check(path):
    report = scan_file(__import__('pathlib').Path(path))
    return {'carries code': 'flagged', 'malformed': 'malformed', 'clean data': 'safe', 'unknown': 'not looked at'}[report.verdict.value]
""",
    "picklescan": """
import logging; logging.disable(50)
from importlib.metadata import version as v; version = v('picklescan')
from picklescan.scanner import scan_file_path
def check(path):
    found = scan_file_path(path)
    return 'flagged' if found.issues_count else 'error' if found.scan_err else 'safe' if found.scanned_files else 'not looked at'
""",
    "fickling": """
import logging; logging.disable(50)
from importlib.metadata import version as v; version = v('fickling')
import zipfile, fickling
def check(path):
    found = fickling.scan_zip_archive(path) if zipfile.is_zipfile(path) else fickling.scan_file(path)
    found = found if isinstance(found, (list, tuple)) else list(found.values()) if isinstance(found, dict) else [found]
    if not found:
        return 'not looked at'
    if any(not one.is_safe and not getattr(one, 'error', None) for one in found):
        return 'flagged'
    return 'error' if any(getattr(one, 'error', None) for one in found) else 'safe'
""",
    "modelscan": """
import logging; logging.disable(50)
from importlib.metadata import version as v; version = v('modelscan')
from modelscan.modelscan import ModelScan
def check(path):
    scanner = ModelScan()
    scanner.scan(path)
    if scanner.issues.all_issues:
        return 'flagged'
    return 'error' if scanner.errors else 'safe' if scanner.scanned else 'not looked at'
""",
    "modelaudit-picklescan": """
import logging; logging.disable(50)
from importlib.metadata import version as v; version = v('modelaudit-picklescan')
import modelaudit_picklescan as scanner
def check(path):
    found = scanner.scan_file(path)
    return {'malicious': 'flagged', 'suspicious': 'flagged', 'clean': 'safe', 'safe': 'safe'}.get(found.verdict.value, 'error')
""",
    "torch.load(weights_only=True)": """
import torch, warnings; warnings.simplefilter('ignore')
version = torch.__version__
def check(path):
    torch.load(path, weights_only=True, map_location='cpu')
    return 'safe'
""",
}


class Worker:
    """One scanner in its own process, restarted when it hangs or dies."""

    def __init__(self, python: str, source: str, extra_path: str) -> None:
        self.python, self.source, self.extra_path = python, source, extra_path
        self.start()

    def start(self) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))

        self.process = subprocess.Popen(
            [self.python, "-W", "ignore", "-c", self.source + SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, bufsize=1, preexec_fn=limit, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": self.extra_path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.version = self.process.stdout.readline().strip()

    def ask(self, path: Path) -> tuple[str, float]:
        """(answer, seconds); 'hung' past the limit, 'crashed' when the process dies."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        for _ in range(1000):
            ready, _, _ = select.select([self.process.stdout], [], [], LIMIT_SECONDS)
            line = self.process.stdout.readline() if ready else None
            if not line:
                self.process.kill()
                self.process.wait()
                self.start()
                return ("hung", LIMIT_SECONDS) if line is None else ("crashed", 0.0)
            if line.startswith("answer "):
                answer, seconds = json.loads(line[7:])
                return answer, seconds
        return "error", 0.0


def run(peers: str) -> Iterator[tuple[str, str, dict[str, list[tuple[str, str, float]]], int]]:
    """(scanner, version, answers by group, canaries) for every scanner."""
    packages = str(next(Path(sys.prefix).glob("lib/python*/site-packages")))
    for name, source in SCANNERS.items():
        with tempfile.TemporaryDirectory() as folder:
            canary = Path(folder) / "canary"
            files = Path(folder) / "files"
            files.mkdir()
            ours = name == "upparam" or name.startswith("torch")
            worker = Worker(sys.executable if ours else peers, source, str(ROOT / "src") if ours else packages)
            answers: dict[str, list[tuple[str, str, float]]] = {"code": [], "malformed": [], "benign": []}
            executed = 0
            warm = files / "warm.pkl"
            warm.write_bytes(b"\x80\x02}.")
            worker.ask(warm)
            for case in [*hostile(str(canary)), *benign()]:
                group = "code" if case.verdict == CODE else "malformed" if case.verdict == MALFORMED else "benign"
                if name.startswith("torch") and not case.name.endswith((".pt", ".pth", ".bin", ".ckpt", ".pkl")):
                    continue
                path = case.write(files)
                answer, seconds = worker.ask(path)
                executed += canary.exists()
                canary.unlink(missing_ok=True)
                path.unlink()
                answers[group].append((case.name, answer, seconds))
            worker.process.kill()
            yield name, worker.version, answers, executed


def table(results: list[tuple[str, str, dict[str, list[tuple[str, str, float]]], int]]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| scanner | carries code: caught | gave up | not looked at | **called safe** | malformed: caught or refused | **called safe** | hung or crashed | benign: **false alarms** | gave up | executed | median ms/file |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, version, answers, executed in results:
        code, bad, good = (Counter(answer for _, answer, _ in answers[group]) for group in ("code", "malformed", "benign"))
        refuses = name.startswith("torch")
        caught = code["flagged"] + (code["malformed"] + code["error"] if refuses else 0)
        given_up = 0 if refuses else code["error"] + code["malformed"]
        alarms = good["flagged"] + good["malformed"] + (good["error"] if refuses else 0)
        stopped = sum(counter["hung"] + counter["crashed"] for counter in (code, bad, good))
        times = sorted(seconds for group in answers.values() for _, _, seconds in group)
        lines.append(
            f"| {name} {version} | {caught} of {sum(code.values())} | {given_up} | {code['not looked at']} | {code['safe']} "
            f"| {bad['flagged'] + bad['malformed'] + bad['error']} of {sum(bad.values())} | {bad['safe']} | {stopped} "
            f"| {alarms} of {sum(good.values())} | {0 if refuses else good['error']} | {executed} | {times[len(times) // 2] * 1000:.2f} |"
        )
    return "\n".join(lines)


def classes() -> str:
    """The corpus by class, as Markdown."""
    kinds: dict[str, Counter[str]] = {}
    for case in hostile("/canary"):
        kinds.setdefault(case.kind, Counter())[case.verdict] += 1
    lines = ["| class | files | verdicts |", "|---|---|---|"]
    lines += [
        f"| {kind} | {sum(counts.values())} | {', '.join(f'{count} {verdict}' for verdict, count in counts.items())} |"
        for kind, counts in sorted(kinds.items())
    ]
    return "\n".join(lines)


def misses(results: list[tuple[str, str, dict[str, list[tuple[str, str, float]]], int]]) -> str:
    """What each scanner called safe although it carries code."""
    lines = []
    for name, version, answers, _ in results:
        missed = [case for case, answer, _ in answers["code"] if answer == "safe"]
        if missed:
            lines.append(f"- **{name} {version}** ({len(missed)}): {', '.join(f'`{case}`' for case in missed)}")
    return "\n".join(lines) or "none"


def main() -> None:
    """Run and print, or write the tables between their marks in docs/security.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, metavar="PYTHON")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    results = list(run(args.peers))
    parts = {"comparison": table(results), "misses": misses(results), "classes": classes()}
    for name, answers in ((name, answers) for name, _, answers, _ in results if name == "upparam"):
        wrong = [
            case
            for group, good in (("code", "flagged"), ("malformed", "malformed"))
            for case, answer, _ in answers[group]
            if answer != good
        ]
        print(f"{name}: {len(wrong)} wrong verdicts {wrong}", file=sys.stderr)
    page = ROOT / "docs" / "security.md"
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        assert found, f"docs/security.md has no end mark for {name}"
        text = before + start + part + "\n" + end + after
    if args.write:
        page.write_text(text, encoding="utf-8")
    else:
        print("\n\n".join(parts.values()))
    print(f"Python {sys.version.split()[0]}, numpy {importlib.metadata.version('numpy')}", file=sys.stderr)


if __name__ == "__main__":
    main()
