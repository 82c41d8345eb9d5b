"""The one part of the build that pyproject.toml cannot say: optional C extensions, skipped where they do not compile."""

from setuptools import Extension, setup

FLAGS = ["-O3", "-ffp-contract=off"]

setup(
    ext_modules=[
        Extension(
            f"upparam._native.{name}",
            [f"src/upparam/_native/{name}.c"],
            depends=["src/upparam/_native/native.h", *([f"src/upparam/_native/{name}_kernels.h"] if kernels else [])],
            extra_compile_args=FLAGS,
            optional=True,
        )
        for name, kernels in (("tile", True), ("gram", True), ("spread", False), ("carry", False))
    ]
)
