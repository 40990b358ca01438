"""The end of a script that may be one of several processes."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Before there is a process group: it is the default argument of this module's functions, if it exists by then, and so
# would live as long as the interpreter. DistributedDataParallel imports the module otherwise.
if torch.distributed.is_available():
    import torch.distributed.nn.functional


@contextmanager
def process_group_outlives_models() -> Iterator[None]:
    """Decorate `main` with this: the process group that it starts is ended when all that `main` made is gone.

    Ended by `accelerator.end_training()` inside of `main`, the group would live on in the models that
    DistributedDataParallel wraps, and be destroyed with the last of them by a thread that holds Python's lock and waits
    for gloo's threads. If one of these is just dropping the tensors of the last collective, it waits for Python's lock,
    and the process never ends (seen with torch 2.13 in rank 1 of 2, whose last work is to gather predictions). Here
    the last reference is torch.distributed's own, which is dropped without Python's lock.
    """
    try:
        yield
    except BaseException as error:
        # Its traceback would keep main's models.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
