"""The command `hf-backrazor`: what this machine has, what a model would save, and what fits into a given memory.

Each command is a module with `add_arguments(parser)`, `run(arguments)`, which returns plain data, and `show(data)`,
which turns them into text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from . import env, plan, report

COMMANDS = {"env": env, "report": report, "plan": plan}


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage text that would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the arguments)\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name."""
    parser = _Parser(prog="hf-backrazor", description="Back Razor for Hugging Face models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, details = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary[:1].lower() + summary[1:].rstrip("."),
            description=f"{summary}\n\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON, for programs")
    parsed = parser.parse_args(arguments)
    module = COMMANDS[parsed.command]
    try:
        data = module.run(parsed)
    except (OSError, ValueError) as error:
        # The first paragraph: what Transformers and the Hub add to it fills a screen.
        parser.exit(2, f"hf-backrazor {parsed.command}: {str(error).strip().splitlines()[0]}\n")
    sys.stdout.write((json.dumps(data, indent=2) if parsed.json else module.show(data)) + "\n")
