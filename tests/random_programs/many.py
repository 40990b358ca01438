"""Run many programs in several processes, and sum up what they showed."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
import transformers

from .compare import Difference, differences
from .generate import draw_program
from .program import Program
from .run import NothingToReplace
from .shrink import shrink

# Programs that a process runs: the classes that they make stay in razor's caches.
CHUNK = 250


@dataclass
class Outcome:
    """Of one program: what it used, whether razor had something to do, and its first difference."""

    seed: int
    features: frozenset[str]
    replaced: bool = True
    first: Difference | None = None
    script: str = ""
    operators: str = ""


def key_of(difference: Difference) -> str:
    """What failures of the same kind have in common."""
    if "raises" in difference.kind or difference.kind == "another error":
        return f"{difference.kind}: {difference.name}: {re.sub('[0-9]+', 'N', difference.text)[:110]}"
    return f"{difference.kind}: {difference.name}" if difference.kind == "state" else difference.kind


def look_at(seed: int, setting: str | None = None, shrinks: bool = True) -> Outcome:
    """Run the program of a seed, and shrink it if it fails."""
    program = draw_program(seed, setting)
    outcome = Outcome(seed, program.features)
    try:
        found = differences(program)
    except NothingToReplace:
        outcome.replaced = False
        return outcome
    if found:
        outcome.first = found[0]
        if shrinks:
            program = shrink(program, lambda p: any(key_of(d) == key_of(found[0]) for d in differences(p)))
            outcome.first = differences(program)[0]
        outcome.script, outcome.operators = program.script(), _operators(program)
    return outcome


def _operators(program: Program) -> str:
    """A few words on what a small program is made of."""
    source = program.source()
    source = source.replace(source[source.index("def make()") : source.index("def compute(")], "")
    modules = re.findall(
        r"(?:nn\.(?!Module|Parameter)[A-Z]\w+|ACT2FN\[\"\w+\"\]|\b(?:Conv1D|LlamaRMSNorm|Llama|Bert|GPT2)(?=\())",
        source,
    )
    calls = re.findall(
        r"(?:F|torch)\.(?!randn|float|bfloat16|autocast)\w+|\.\w+_(?=\()|\w*checkpoint|[+*/]=|\] = ", source
    )
    changes = re.findall(r"register_\w+|\w+_norm(?=\()|requires_grad_", "".join((*program.before, *program.after)))
    words = [*re.findall(r"transformers\.(\w+)\._from", program.model), *modules, *calls, *changes]
    words += [line for line in program.compute if line not in ("y = model(x)", 'record("output", y)')]
    words += [program.procedure] * (program.procedure != "plain") + [program.setting] * (program.setting != "lossless")
    return ", ".join(dict.fromkeys(words))


def quiet() -> None:
    """One thread, and no log."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_backrazor").setLevel(logging.ERROR)


def _work(seeds: range, setting: str | None, shrinks: bool, results: Connection) -> None:
    quiet()
    for seed in seeds:
        results.send(seed)
        results.send(look_at(seed, setting, shrinks))


def outcomes(first: int, programs: int, processes: int, setting: str | None, shrinks: bool) -> Iterator[Outcome]:
    """Of `programs` seeds from `first` on, in any order; also of those that end the process that they run in."""
    context = get_context("spawn")
    stop = first + programs
    waiting = [range(i, min(i + CHUNK, stop)) for i in range(first, stop, CHUNK)][::-1]
    running: dict[Connection, tuple[BaseProcess, range]] = {}
    at: dict[Connection, int] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            seeds = waiting.pop()
            results, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(seeds, setting, shrinks, sender), daemon=True)
            process.start()
            sender.close()
            running[results], at[results] = (process, seeds), seeds.start
        for results in wait(list(running)):
            try:
                message = results.recv()
            except EOFError:
                process, seeds = running.pop(results)
                process.join()
                if process.exitcode:
                    seed = at[results]
                    # Not drawn here: it would end this process, too.
                    first = Difference("the process ends", f"exit code {process.exitcode}", "")
                    yield Outcome(seed, frozenset(), first=first, script=f"# --seed {seed}")
                    waiting += [range(seed + 1, seeds.stop)] * (seed + 1 < seeds.stop)
                continue
            if isinstance(message, int):
                at[results] = message
            else:
                yield message


def summary(found: list[Outcome], seconds: float) -> str:
    """Programs, features and failures, as Markdown."""
    failed = [outcome for outcome in found if outcome.first is not None]
    lines = [
        f"# {len(found)} programs in {seconds:.0f} s",
        "",
        f"{sum(not o.replaced for o in found)} had nothing to replace; "
        f"{sum('raises' in o.features for o in found)} raise when dense; {len(failed)} failed.",
        "",
    ]
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in failed:
        groups[key_of(outcome.first)].append(outcome)
    for key, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines += [f"## {len(members)} x {key}", ""]
        by_operators = Counter(o.operators for o in members)
        for operators, count in by_operators.most_common(25):
            example = min((o for o in members if o.operators == operators), key=lambda o: len(o.script))
            lines.append(
                f"- {count} x {operators}\n  (seed {example.seed}: {example.first.name}, {example.first.text})"
            )
        for outcome in sorted(members, key=lambda o: len(o.script))[:2]:
            body = outcome.script.split("procedures import *\n")[-1].strip()
            lines += ["", f"Seed {outcome.seed}:", "", "```python", body, "```"]
        lines.append("")
    coverage = Counter(feature for outcome in found if outcome.replaced for feature in outcome.features)
    lines += ["## Features", "", "| programs | feature |", "|---|---|"]
    lines += [f"| {count} | {feature} |" for feature, count in coverage.most_common()]
    return "\n".join(lines) + "\n"
