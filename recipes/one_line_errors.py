"""What a wrong argument, data set, column or model looks like: one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


def stop(message: str) -> NoReturn:
    """End the recipe with one line on stderr and exit code 2."""
    # Every process of a launch meets the same mistake; the first one speaks for all. The launcher's variable
    # is read because arguments are checked before there is an Accelerator to ask.
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def stop_on_error(what: str) -> Iterator[None]:
    """Turn whatever a library raises inside the block into one line that starts with `what`.

    Meant for the few calls whose failures are the user's to mend (loading a model or a data set): libraries
    raise many unrelated types there, and tracebacks hide the cause. Never put around training itself.
    """
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        stop(f"{what}: {lines[0] if lines else type(error).__name__}")
