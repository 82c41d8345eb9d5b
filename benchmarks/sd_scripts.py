"""kohya's sd-scripts as a peer, from a checkout: its merge, and a checkpoint it can load.

    python benchmarks/sd_scripts.py CHECKOUT checkpoint OUT.safetensors
    python benchmarks/sd_scripts.py CHECKOUT merge --sd_model ... (the arguments of its networks/merge_lora.py)

The merge is the checkout's own, unchanged. Modules that it imports on the way and that merging never calls (image loading, sampling
pipelines) are stood in for where they are not installed or do not go with the transformers of today, and CLIPTextModel gets back the level
`text_model` that transformers 5 took away.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import diffusers
import numpy as np
import torch
import transformers

UNUSED = ("torchvision", "torchvision.transforms", "cv2", "imagesize", "library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion")


def prepare(checkout: Path) -> None:
    """Make the checkout's modules importable."""
    sys.path[:0] = [str(checkout), str(checkout / "networks")]
    # looked up now: what the libraries import on first use must not meet the stand-ins
    for library, name in ((diffusers, "StableDiffusionPipeline"), (transformers, "CLIPTokenizer"), (transformers, "AutoModel")):
        getattr(library, name)
    plain = transformers.CLIPTextModel

    class Nested(torch.nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()
            self.text_model = plain(config)
            self.config = config

        @classmethod
        def _from_config(cls, config: object) -> Nested:
            return cls(config)

    sys.modules["transformers"].CLIPTextModel = Nested  # by now another object than the one imported above
    absent = [name for name in UNUSED if name.startswith("library") or find_spec(name.partition(".")[0]) is None]
    sys.modules.update({name: MagicMock() for name in absent})


def checkpoint(out: Path) -> None:
    """Every tensor of a Stable Diffusion 1.5 checkpoint as the peer writes it (UNet, text encoder, VAE), fp16, filled with noise."""
    from library import model_util
    from library.original_unet import UNet2DConditionModel
    from merge_inputs import Noise, write

    with torch.device("meta"):
        unet = UNet2DConditionModel(**model_util.create_unet_diffusers_config(False, False))
        vae = diffusers.AutoencoderKL(**model_util.create_vae_diffusers_config())
        config = transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        text = model_util.CLIPTextModel(config)
    parts = {
        "model.diffusion_model.": model_util.convert_unet_state_dict_to_sd(False, unet.state_dict()),
        "first_stage_model.": model_util.convert_vae_state_dict(vae.state_dict()),
        "cond_stage_model.transformer.": text.state_dict(),
    }
    shapes = {prefix + name: tuple(tensor.shape) for prefix, state in parts.items() for name, tensor in state.items()}
    write(out, shapes, Noise(np.float16, 0.03, 3))


def main() -> None:
    folder, what, *rest = sys.argv[1:]
    prepare(Path(folder).resolve())
    if what == "checkpoint":
        checkpoint(Path(rest[0]))
        return
    script = Path(folder).resolve() / "networks" / "merge_lora.py"
    sys.argv = [str(script), *rest]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
