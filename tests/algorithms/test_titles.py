"""What algorithms are called in messages."""

from __future__ import annotations

from upparam.algorithms import ALGORITHMS, TITLES, called


def test_every_algorithm_has_a_title() -> None:
    assert set(TITLES) == set(ALGORITHMS)


def test_the_article_follows_the_sound() -> None:
    assert [called(name) for name in ("adalora", "ia3", "oft", "lora", "loha", "vera", "diag-oft", "norm")] == [
        "an AdaLoRA", "an IA3", "an OFT", "a LoRA", "a LoHa", "a VeRA", "a Diag-OFT", "a norm",
    ]  # fmt: skip
    assert called("of-a-plugin") == "an of-a-plugin"
