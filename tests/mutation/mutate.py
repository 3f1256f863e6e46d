"""Mutation testing of `passes/`: `make mutate`. mutmut chooses the mutants; we run them in a way of our own.

mutmut's own runner starts the suite and captures the models again for every mutant, and it skips decorated functions,
which all operators of the dialect are. Here the tests of `tests/passes` run once, under coverage. Every mutant is then
a fork of that process, with the tiny models already captured: one function gets new code, and the tests that run its
line are repeated until one fails. Module constants, argument defaults and the types given to `cast` are not mutated.

Results are lines of JSON in `build/mutation/results.jsonl`. Mutants that have a result do not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import signal
import sys
import time
import types
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest
from _pytest.runner import runtestprotocol
from find_mutants import Mutant, in_order, mutants_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build/mutation/results.jsonl"
# Files that run while models are captured: their mutants capture the models again.
CAPTURING = {"clean_up.py", "set_device.py"}
SECONDS, BYTES = 20, 4 << 30  # limits of CPU time and memory, on top of what the unmutated tests used


def functions(folder: Path) -> dict[tuple[str, str, int], list[types.FunctionType]]:
    """Find the function objects of a folder by file, name and first line."""
    found: dict[tuple[str, str, int], list[types.FunctionType]] = defaultdict(list)
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__code__.co_filename.startswith(f"{folder}/"):
            code = thing.__code__
            found[code.co_filename, code.co_name, code.co_firstlineno].append(thing)
    return found


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


class Mutate:
    """A plugin whose loop runs the tests once unmutated, then the tests of each mutant in a fork."""

    def __init__(self, options: argparse.Namespace, known: dict[str, dict[str, Any]]) -> None:
        self.options, self.known = options, known
        self.seconds: dict[str, float] = {}
        self.built: dict[Any, Any] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
        """Remember the captured models, which are a session fixture."""
        result = yield
        if fixturedef.argname == "_built":
            self.built = result
        return result

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        coverage_of = coverage.Coverage(data_file=None, source=["passes"], messages=False)
        coverage_of.start()
        for item, following in zip(session.items, [*session.items[1:], session.items[0]], strict=True):
            coverage_of.switch_context(item.nodeid)
            started = time.process_time()
            reports = runtestprotocol(item, nextitem=following, log=False)
            self.seconds[item.nodeid] = time.process_time() - started
            if failed := [report.longreprtext for report in reports if report.failed]:
                raise SystemExit(f"{item.nodeid} fails unmutated:\n{failed[0]}")
        coverage_of.stop()
        say(f"{len(session.items)} tests in {sum(self.seconds.values()):.0f} s of the CPU")
        self.data = coverage_of.get_data()
        self.functions = functions(ROOT / "passes")
        files = [
            mutants_of(path) for path in sorted((ROOT / "passes").glob(self.options.only)) if path.stem != "__init__"
        ]
        chosen = in_order(files, self.options.seed, self.options.first)[: self.options.most or None]
        say(f"{sum(map(len, files))} mutants, {len(chosen)} of them chosen")
        gc.freeze()
        if (control := self.result(None, session.items))["status"] != "survived":
            raise SystemExit(f"a fork without a mutant does not pass: {control['by']}")
        for mutant in chosen:
            key = mutant.key()
            wanted = self.options.again or [None]
            if self.known.get(key, {}).get("status") not in wanted:
                continue
            if self.options.until and time.time() > self.options.until:
                say("the time is over")
                break
            tests = self.tests(session, mutant)
            if self.options.of and not tests:  # the other tests' result remains valid
                continue
            self.known[key] = self.result(mutant, tests) | {"key": key}
            with RESULTS.open("a") as file:
                file.write(json.dumps(self.known[key]) + "\n")
        report([self.known[key] for mutant in chosen if (key := mutant.key()) in self.known])
        return True

    def tests(self, session: pytest.Session, mutant: Mutant) -> list[pytest.Item]:
        """Return tests that run a mutant's lines, up to the limit: the file's own tests first, then the quickest."""
        contexts = self.data.contexts_by_lineno(str(mutant.path))
        wanted = {name for line in range(mutant.lines[0], mutant.lines[1] + 1) for name in contexts.get(line, ())}
        own = f"test_{mutant.path.stem}"
        items = [item for item in session.items if item.nodeid in wanted]
        items.sort(key=lambda item: (not item.path.name.startswith(own), self.seconds[item.nodeid]))
        return items[: self.options.tests]

    def result(self, mutant: Mutant | None, tests: list[pytest.Item]) -> dict[str, Any]:
        """Run tests on a mutant, or on the unchanged code."""
        reader, writer = os.pipe()
        started = time.time()
        child = os.fork()
        if child == 0:
            os.close(reader)
            self.child(mutant, tests, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read().decode()
        status, usage = os.wait4(child, 0)[1:]
        verdict, _, by = said.partition(" ")
        if os.WIFSIGNALED(status):
            stopped = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
            verdict, by = ("timeout" if stopped else "killed"), f"signal {os.WTERMSIG(status)}"
        elif verdict not in ("killed", "survived", "invalid"):
            raise SystemExit(f"a fork ended without a verdict: {said} {mutant and mutant.diff()}")
        if verdict == "survived" and not tests:
            verdict = "no tests"
        shown: dict[str, Any] = {
            "status": verdict,
            "by": by,
            "tests": len(tests),
            "wall": round(time.time() - started, 2),
        }
        shown["seconds"] = round(usage.ru_utime + usage.ru_stime, 2)
        if mutant is None:
            return shown
        return shown | {
            "file": mutant.path.name,
            "function": mutant.function[0],
            "line": mutant.lines[0],
            "diff": mutant.diff(),
        }

    def child(self, mutant: Mutant | None, tests: list[pytest.Item], writer: int) -> None:
        """Run the tests on the mutant; never returns."""
        said = "error"
        try:
            limit = SECONDS + int(sum(self.seconds[item.nodeid] for item in tests))
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES,) * 2)
            if mutant is not None and not self.change(mutant):
                said, tests = "invalid", []
            else:
                said = "survived"
            for item, following in zip(tests, [*tests[1:], *tests[-1:]], strict=True):
                reports = runtestprotocol(item, nextitem=following, log=False)
                if any(report.failed for report in reports):
                    said = f"killed {item.nodeid}"
                    break
        except BaseException as error:
            said = f"error {error!r}"
        finally:
            os.write(writer, said.encode())
            os._exit(0)

    def change(self, mutant: Mutant) -> bool:
        """Give a function its mutated code; return False if the mutant is not valid Python."""
        try:
            module = compile(mutant.source(), str(mutant.path), "exec", dont_inherit=True)
            (code,) = [code for code in codes(module) if (code.co_name, code.co_firstlineno) == mutant.function]
            for function in self.functions[str(mutant.path), *mutant.function]:
                function.__code__ = code
        except (SyntaxError, ValueError):
            return False
        if mutant.path.name in CAPTURING:
            self.built.clear()
        return True


def say(text: str) -> None:
    sys.__stderr__.write(text + "\n")
    sys.__stderr__.flush()


def report(results: list[dict[str, Any]]) -> None:
    """Show survivors, and figures by file; timeouts count as killed, mutants that do not compile are left out."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in sorted(results, key=lambda result: (result["file"], result["line"])):
        counts[result["file"]][result["status"]] += 1
        counts["all"][result["status"]] += 1
        if result["status"] in ("survived", "no tests"):
            say(f"{result['file']}:{result['line']} {result['status']} ({result['tests']} tests)\n{result['diff']}")
    for name, count in counts.items():
        killed, valid = count["killed"] + count["timeout"], count.total() - count["invalid"]
        say(f"{name:28} {killed:5} of {valid:5} killed, {100 * killed / max(valid, 1):5.1f} %  {dict(count)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*.py", help="files of passes/, as a pattern")
    parser.add_argument("--of", nargs="*", help="files of tests, in place of tests/passes")
    parser.add_argument("-k", default="", help="which tests, as of pytest")
    parser.add_argument("--seed", type=int, default=0, help="of the order of mutants")
    parser.add_argument("--first", type=int, default=20, help="so many of every file come first")
    parser.add_argument("--most", type=int, default=0, help="stop after so many; 0 for all")
    parser.add_argument("--tests", type=int, default=40, help="run at most so many tests on a mutant")
    parser.add_argument("--until", type=float, default=0, help="start no mutant after this time, in seconds of Unix")
    parser.add_argument("--again", nargs="*", default=[], help="run those alone that were: survived, 'no tests'")
    options = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {result["key"]: result for result in map(json.loads, lines)}
    arguments = [
        *(options.of or ["tests/passes"]),
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:timeout",
        "--capture=no",
        "--no-header",
        "-k",
        options.k,
    ]
    sys.exit(pytest.main(arguments, plugins=[Mutate(options, known)]))


if __name__ == "__main__":
    main()
