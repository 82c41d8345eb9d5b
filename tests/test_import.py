"""Start-up: what importing costs is part of the promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import upparam


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())


def test_importing_loads_neither_numpy_nor_torch() -> None:
    assert not {"numpy", "torch", "rich", "ml_dtypes", "safetensors"} & loaded_after("import upparam")


def test_help_loads_neither_numpy_nor_torch() -> None:
    code = "import contextlib, io, upparam.cli\nwith contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): upparam.cli.main(['--help'])"
    assert not {"numpy", "torch", "rich"} & loaded_after(code)


def kohya_file(folder: Path) -> str:
    import numpy as np
    from safetensors.numpy import save_file

    path = f"{folder}/lora.safetensors"
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{stem}.lora_up.weight": np.ones((320, 4), np.float16), f"{stem}.lora_down.weight": np.ones((4, 320), np.float16)}, path)
    return path


def test_identify_needs_no_numpy(tmp_path: Path) -> None:
    path = kohya_file(tmp_path)
    code = f"import contextlib, io, upparam.cli\nwith contextlib.redirect_stdout(io.StringIO()): assert upparam.cli.main(['identify', {path!r}]) == 0"
    assert not {"numpy", "torch"} & loaded_after(code)


def test_converting_bits_loads_nothing_that_computes(tmp_path: Path) -> None:
    arguments = ["convert", kohya_file(tmp_path), "--to", "diffusers", "-o", f"{tmp_path}/out", "-q"]
    loaded = loaded_after(f"import upparam.cli\nassert upparam.cli.main({arguments!r}) == 0")
    assert (tmp_path / "out").exists() and "upparam.operations.convert" in loaded
    assert (
        not {"numpy", "torch", "tempfile", *(f"upparam.operations.{name}" for name in ("curing", "lowering", "spool", "advising"))} & loaded
    )


def test_combining_loads_numpy_only_to_compute() -> None:
    assert "numpy" not in loaded_after("import upparam.operations.combine, upparam.cli.combine")


@pytest.mark.parametrize("name", upparam.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(upparam, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        upparam.nothing_like_this  # noqa: B018


def test_blas_has_one_thread_before_numpy_comes() -> None:
    """Whatever a command imports first: threads of ours times threads of BLAS take three times the processor time."""
    code = """if True:
        import os, sys
        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name == "numpy":
                    print("numpy after", os.environ.get("OPENBLAS_NUM_THREADS"))
        sys.meta_path.insert(0, Watch())
        sys.argv = ["upparam", "merge", "absent", "absent", "-o", "out"]
        from upparam.cli import main
        main()"""
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False).stdout
    assert "numpy after 1\n" in told and "numpy after None" not in told
