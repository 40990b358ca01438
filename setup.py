"""The optional C library; everything else is in pyproject.toml."""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

NATIVE = Path("hf_backrazor/kernels/native")

# Results have to be the torch code's to the bit: no contraction of products and sums to one rounding.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


class BuildWithOrWithoutOpenMP(build_ext):
    """Try with OpenMP first. No extension is no error: `optional` ones may fail to build."""

    def build_extension(self, ext: Extension) -> None:
        """See `build_ext`."""
        if platform.system() == "Windows":
            ext.extra_compile_args = ["/O2"]
            super().build_extension(ext)
            return
        ext.extra_compile_args, ext.extra_link_args = [*FLAGS, "-fopenmp"], ["-fopenmp", "-lm"]
        try:
            super().build_extension(ext)
        except (BaseError, CompileError, LinkError):
            ext.extra_compile_args, ext.extra_link_args = FLAGS, ["-lm"]
            super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "hf_backrazor.kernels._native",
            sources=sorted(str(path) for path in NATIVE.glob("*.c")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildWithOrWithoutOpenMP},
)
