"""Fuzz the readers: every target of tests/fuzz/targets.py, by coverage with atheris where it is installed, else with our own mutator.

    python tools/fuzz.py [TARGET ...] --seconds 600 --findings DIR [--corpus DIR] [--own]

Run it in an environment of its own (`pip install atheris numpy ml_dtypes safetensors`); nothing else is needed. An execution fails when it
raises anything but an UpparamError, takes more than a second of processor time, or passes the memory limit. Inputs that fail are written
to DIR, one for each place in the source, and the run goes on; add them to tests/fuzz/findings, where the tests read them. One line of JSON
is printed for each target. Targets run in processes of their own, one after another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

MEMORY = 3 << 30
"""Bytes of address space one target may use; atheris itself takes the larger part of the first GiB."""
SLOW = 1.0


class Watch:
    """Runs one target, counts, times, and keeps what fails."""

    def __init__(self, target: str, findings: Path, seconds: float) -> None:
        from tests.fuzz.targets import run

        self.run, self.target, self.findings = run, target, findings
        self.executions, self.slowest, self.until = 0, 0.0, time.monotonic() + seconds
        self.kept: dict[str, int] = {}

    def __call__(self, data: bytes) -> None:
        begun = time.process_time()
        try:
            self.run(self.target, data)
        except Exception as problem:
            frame = traceback.extract_tb(problem.__traceback__)[-1]
            self.keep(f"{type(problem).__name__}-{Path(frame.filename).stem}-{frame.lineno}", data)
        taken = time.process_time() - begun
        self.slowest = max(self.slowest, taken)
        if taken > SLOW:
            self.keep("slow", data)
        self.executions += 1

    def keep(self, why: str, data: bytes) -> None:
        self.kept[why] = self.kept.get(why, 0) + 1
        if self.kept[why] == 1:
            name = f"{self.target}-{why}-{hashlib.sha256(data).hexdigest()[:8]}"
            (self.findings / name).write_bytes(data)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def report(self, engine: str, seconds: float) -> None:
        print(json.dumps({
            "target": self.target, "engine": engine, "executions": self.executions, "seconds": round(seconds), "slowest": round(self.slowest, 3),
            "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "findings": self.kept,
        }), flush=True)  # fmt: skip


def with_own(watch: Watch, seed: int) -> None:
    """Mutate the seeds, and what was mutated before."""
    from tests.fuzz.mutate import mutated
    from tests.fuzz.targets import seeds

    chance, pool = random.Random(seed), seeds(watch.target)
    for data in pool:
        watch(data)
    begun = time.monotonic()
    while not watch.over:
        for _ in range(256):
            data = mutated(chance.choice(pool), pool, chance)
            watch(data)
        pool[chance.randrange(len(pool))] = data if chance.random() < 0.05 else chance.choice(pool)
    watch.report("own", time.monotonic() - begun)


def with_atheris(target: str, findings: Path, seconds: float, corpus: Path, seed: int) -> None:
    """libFuzzer over instrumented readers."""
    import atheris

    with atheris.instrument_imports(include=["upparam"]):
        import upparam.operations.scan.files  # noqa: F401
    from tests.fuzz.mutate import WORDS
    from tests.fuzz.targets import seeds

    folder = corpus / target
    folder.mkdir(parents=True, exist_ok=True)
    for data in seeds(target):
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    words = corpus / "words"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in WORDS))
    watch = Watch(target, findings, seconds)
    begun = time.monotonic()

    def once(data: bytes) -> None:
        watch(data)
        if watch.over:
            watch.report("atheris", time.monotonic() - begun)
            sys.stdout.flush()
            import os

            os._exit(0)

    options = [
        "-max_len=16384",
        f"-dict={words}",
        f"-seed={seed}",
        "-timeout=60",
        "-rss_limit_mb=0",
        "-verbosity=0",
        "-print_final_stats=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], once)
    atheris.Fuzz()


def main() -> None:
    """Run each target in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--findings", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="where atheris keeps inputs that reach new code (default: a temporary folder)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--own", action="store_true", help="our own mutator even where atheris is installed")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    if not args.alone:
        from tests.fuzz.targets import TARGETS

        corpus = ["--corpus", str(args.corpus)] if args.corpus else []
        more = [
            "--seconds",
            str(args.seconds),
            "--findings",
            str(args.findings),
            "--seed",
            str(args.seed),
            *corpus,
            *(["--own"] if args.own else []),
        ]
        for target in args.targets or TARGETS:
            subprocess.run([sys.executable, __file__, "--alone", *more, target], check=False)
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    target = args.targets[0]
    try:
        import atheris  # noqa: F401
    except ImportError:
        args.own = True
    if args.own:
        with_own(Watch(target, args.findings, args.seconds), args.seed)
        return
    with tempfile.TemporaryDirectory() as folder:
        with_atheris(target, args.findings, args.seconds, args.corpus or Path(folder), args.seed)


if __name__ == "__main__":
    main()
