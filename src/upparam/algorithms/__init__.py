"""Algorithms: what dW is for a set of factors. One file a member, mathematics only."""

ALGORITHMS: dict[str, str] = {
    "lora": "upparam.algorithms.lora:LoRA",
    "expert-lora": "upparam.algorithms.experts:ExpertLoRA",
    "sparse-lora": "upparam.algorithms.sparse:SparseLoRA",
    "dora": "upparam.algorithms.dora:DoRA",
    "loha": "upparam.algorithms.loha:LoHa",
    "doha": "upparam.algorithms.dora:DoHa",
    "lokr": "upparam.algorithms.lokr:LoKr",
    "dokr": "upparam.algorithms.dora:DoKr",
    "glora": "upparam.algorithms.glora:GLoRA",
    "ia3": "upparam.algorithms.ia3:IA3",
    "diag-oft": "upparam.algorithms.oft:DiagOFT",
    "butterfly-oft": "upparam.algorithms.boft:ButterflyOFT",
    "t-lora": "upparam.algorithms.tlora:TLoRA",
    "adalora": "upparam.algorithms.adalora:AdaLoRA",
    "vera": "upparam.algorithms.vera:VeRA",
    "oft": "upparam.algorithms.oft:OFT",
    "boft": "upparam.algorithms.boft:BOFT",
    "full": "upparam.algorithms.full:Full",
    "norm": "upparam.algorithms.full:Norm",
}
"""Algorithm name to the class whose deltas carry it; each is a dataclass of Tensors, a `scaling` and plain values."""

TITLES: dict[str, str] = {
    "lora": "LoRA", "expert-lora": "LoRA of stacked experts", "sparse-lora": "LoRA + sparse remainder", "dora": "DoRA", "loha": "LoHa", "doha": "LoHa + DoRA", "lokr": "LoKr", "dokr": "LoKr + DoRA",
    "glora": "GLoRA", "ia3": "IA3", "diag-oft": "Diag-OFT", "butterfly-oft": "LyCORIS BOFT", "t-lora": "T-LoRA", "adalora": "AdaLoRA", "vera": "VeRA",
    "oft": "OFT", "boft": "BOFT", "full": "full", "norm": "norm",
}  # fmt: skip
"""Algorithm name to what its authors call it."""


def called(algorithm: str) -> str:
    """What a person would call one: its title after the article, `an AdaLoRA`, `a LoKr`."""
    title = TITLES.get(algorithm, algorithm)
    return f"{'an' if title[0].lower() in 'aeio' else 'a'} {title}"
