"""The one thing that pyproject.toml cannot say yet (setuptools calls its tables for it experimental): the compiled kernel.

optional: where no C compiler is, the install succeeds without it, and formats/nvfp4.py gives the same bits more slowly.
"""

from setuptools import Extension, setup

KERNEL = Extension(
    "mtpress.formats._nvfp4",
    ["src/mtpress/formats/_nvfp4.c"],
    extra_compile_args=["-O3", "-ffp-contract=off"],  # the C code picks its instructions at run time: no -march
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[KERNEL], options={"bdist_wheel": {"py_limited_api": "cp311"}})
