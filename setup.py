"""The one part of the build that pyproject.toml cannot say: optional C extensions, skipped where they do not compile."""

from setuptools import Extension, setup

FLAGS = ["-O3", "-ffp-contract=off"]

setup(
    ext_modules=[
        Extension(
            f"upparam._native.{name}",
            [f"src/upparam/_native/{name}.c"],
            depends=[f"src/upparam/_native/{header}.h" for header in headers],
            extra_compile_args=FLAGS,
            optional=True,
        )
        for name, headers in (
            ("tile", ("native", "tile_formats", "tile_layout", "tile_rows", "tile_kernels")),
            ("gram", ("native", "gram_kernels", "spaces_kernels")),
            ("spread", ("native",)),
            ("carry", ("native",)),
        )
    ]
)
