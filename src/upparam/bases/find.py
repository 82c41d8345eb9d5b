"""From what a user names to a base: a path on disk, an inventory's name, or a model id that an inventory knows."""

from __future__ import annotations

from pathlib import Path

from upparam.bases.base import Base
from upparam.errors import UsageError


def find_base(name: str) -> Base:
    """The base a user named. A path that exists wins. Raises UsageError for a name nothing answers to."""
    if Path(name).exists():
        from upparam.bases.header import base_from_path

        return base_from_path(Path(name))
    from upparam.bases import inventory

    known = inventory.resolve(name)
    if known is None:
        guesses = near(name)
        remedy = f"perhaps {listed(guesses)}; 'upparam bases' lists the names" if guesses else "'upparam bases' lists the names"
        raise UsageError("no such base: neither a path nor a known name", found=f"'{name}'", remedy=remedy)
    return inventory.load(known)


def near(name: str) -> list[str]:
    """Known bases that someone who typed `name` may have meant, best first: those of a family of that name, and names spelled alike."""
    from difflib import get_close_matches

    from upparam.bases.inventory import known

    typed = _letters(name.rsplit("/", 1)[-1])
    if not typed:
        return []
    spelled: dict[str, str] = {}
    for base, fact in known().items():
        for one in (base, *fact.ids):
            spelled.setdefault(_letters(one.rsplit("/", 1)[-1]), base)
    found = [spelled[typed]] if typed in spelled else []
    found += [base for base, fact in known().items() if _letters(fact.family).startswith(typed)]
    found += [base for letters, base in spelled.items() if letters.startswith(typed)]
    found += [spelled[letters] for letters in get_close_matches(typed, spelled, n=5, cutoff=0.75)]
    return list(dict.fromkeys(found))


def listed(names: list[str], most: int = 6) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _letters(name: str) -> str:
    """Letters and digits alone: how a name sounds when dashes, dots and spaces are forgotten."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
