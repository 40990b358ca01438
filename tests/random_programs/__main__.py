"""Run many programs, or one; see the package."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time

from .compare import differences
from .generate import draw_program
from .many import key_of, outcomes, quiet, summary
from .program import SETTINGS
from .run import execute, razor
from .shrink import shrink


def show(seed: int, setting: str | None, shrinks: bool) -> None:
    """Print the program of a seed, and where razor differs."""
    program = draw_program(seed, setting)
    print(program.script())
    if (error := execute(program).error) is not None:
        print(f"dense raises {type(error).__name__}: {error}")
    if (error := execute(program, razor).error) is not None:
        print(f"razor raises {type(error).__name__}: {error}")
    found = differences(program)
    for difference in found:
        print(f"{difference.kind}: {difference.name}: {difference.text}")
    if found and shrinks:
        program = shrink(program, lambda p: any(key_of(d) == key_of(found[0]) for d in differences(p)))
        print(f"\n# The same, smaller:\n\n{program.script()}")
        for difference in differences(program):
            print(f"{difference.kind}: {difference.name}: {difference.text}")
    if not found:
        print("no difference")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_programs", description=__doc__)
    parser.add_argument("--seed", type=int, help="show one program")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--setting", choices=list(SETTINGS), help="the same for all programs")
    parser.add_argument("--no-shrink", action="store_true", help="leave failing programs as they are")
    parser.add_argument("--summary", default="random_programs.md", help="file to write to")
    arguments = parser.parse_args()
    quiet()
    if arguments.seed is not None:
        show(arguments.seed, arguments.setting, not arguments.no_shrink)
        return
    start, found = time.monotonic(), []
    drawn = outcomes(
        arguments.first, arguments.programs, arguments.processes, arguments.setting, not arguments.no_shrink
    )
    # What an interrupt leaves is summed up, too.
    with contextlib.suppress(KeyboardInterrupt):
        for outcome in drawn:
            found.append(outcome)
            if outcome.first is not None:
                print(json.dumps([outcome.seed, key_of(outcome.first), outcome.operators]), flush=True)
            if len(found) % 1000 == 0:
                print(f"{len(found)} programs", file=sys.stderr, flush=True)
    with open(arguments.summary, "w", encoding="utf-8") as file:
        file.write(summary(found, time.monotonic() - start))
    failures = sum(outcome.first is not None for outcome in found)
    print(f"{len(found)} programs, {failures} failures: {arguments.summary}")


if __name__ == "__main__":
    main()
