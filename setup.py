"""The one thing that pyproject.toml cannot say yet (setuptools calls its tables for it experimental): the compiled kernels.

optional: where no C compiler is, the install succeeds without them, and formats/ and rounding/ give the same bits more slowly.
"""

from setuptools import Extension, setup

KERNELS = [
    Extension(
        f"mtpress.formats.{name}",
        [f"src/mtpress/formats/{name}.c"],
        extra_compile_args=["-O3", "-ffp-contract=off"],  # the C code picks its instructions at run time: no -march
        depends=["src/mtpress/formats/_levels.h", "src/mtpress/formats/_nvfp4_search.h"],
        py_limited_api=True,
        optional=True,
    )
    for name in ("_nvfp4", "_int4", "_signround")
]

setup(ext_modules=KERNELS, options={"bdist_wheel": {"py_limited_api": "cp311"}})
