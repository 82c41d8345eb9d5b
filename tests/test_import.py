"""Start-up: what importing costs is part of the promise."""

from __future__ import annotations

import subprocess
import sys

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


def test_identify_needs_no_numpy(tmp_path: object) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    path = f"{tmp_path}/lora.safetensors"
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{stem}.lora_up.weight": np.ones((320, 4), np.float16), f"{stem}.lora_down.weight": np.ones((4, 320), np.float16)}, path)
    code = f"import contextlib, io, upparam.cli\nwith contextlib.redirect_stdout(io.StringIO()): assert upparam.cli.main(['identify', {path!r}]) == 0"
    assert not {"numpy", "torch"} & loaded_after(code)


@pytest.mark.parametrize("name", upparam.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(upparam, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        upparam.nothing_like_this  # noqa: B018
