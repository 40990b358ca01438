"""Run many programs in several processes, and sum up what they showed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import transformers

from .compare import Difference, differences
from .generate import draw_program
from .program import Program
from .run import NothingToReplace
from .shrink import shrink

CHUNK = 100


@dataclass
class Outcome:
    """Of one program: what it used, whether razor had something to do, and its first difference."""

    seed: int
    features: frozenset[str]
    replaced: bool = True
    error: str = ""
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


def _chunk(job: tuple[range, str | None, bool]) -> list[Outcome]:
    seeds, setting, shrinks = job
    return [look_at(seed, setting, shrinks) for seed in seeds]


def quiet() -> None:
    """One thread, and no log of Transformers."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def outcomes(first: int, programs: int, processes: int, setting: str | None, shrinks: bool) -> Iterator[Outcome]:
    """Of `programs` seeds from `first` on, in any order."""
    stop = first + programs
    jobs = [(range(i, min(i + CHUNK, stop)), setting, shrinks) for i in range(first, stop, CHUNK)]
    # Classes made by programs are kept by razor's caches: a process does not live forever.
    with get_context("spawn").Pool(processes, quiet, maxtasksperchild=10) as pool:
        for found in pool.imap_unordered(_chunk, jobs):
            yield from found


def summary(found: list[Outcome], seconds: float) -> str:
    """Programs, features and failures, as Markdown."""
    failed = [outcome for outcome in found if outcome.first is not None]
    lines = [
        f"# {len(found)} programs in {seconds:.0f} s",
        "",
        f"{sum(not o.replaced for o in found)} had nothing to replace; {sum('raises' in o.features for o in found)} raise"
        f" when dense; {len(failed)} failed.",
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
