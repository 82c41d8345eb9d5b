"""The one part of the build that pyproject.toml cannot say: an optional C extension, skipped where it does not compile."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "upparam._native.tile",
            ["src/upparam/_native/tile.c"],
            depends=["src/upparam/_native/tile_kernels.h"],
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ]
)
