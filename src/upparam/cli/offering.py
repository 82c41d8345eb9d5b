"""What refusals and findings advise, in the options of the command that was run: what only convert is told is said to be convert's."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable
from dataclasses import replace

from upparam.findings import Finding
from upparam.patterns import regex

_OPTION = regex(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*")
_QUOTED = regex(r"'upparam [^']*'")
_EITHER = ("--alpha or --scale", "--scale")
"""What may be known of a multiplier, and the one of both that each command has which asks for it at all."""
_DIALECT = ("choose another dialect", "bring it into another dialect with 'upparam convert'")
"""The same to who can choose by `--to`, and to who cannot."""
_FACTORS = "rank of the factors with --rank"
"""How a rank to read by is asked for: where `--rank` is one to be reached it is not that."""


def in_its_options(remedy: str, command: str) -> str:
    """The remedy, with what to do about those options that `command` has not.

    Options inside a whole command in quotes are that command's; what its name is given for needs no second word.
    """
    own, whole = _options(command), _options("convert")
    if command == "convert":
        return remedy
    if "--to" not in own:
        remedy = remedy.replace(*_DIALECT)
    told = {option for quoted in _QUOTED.findall(remedy) for option in _OPTION.findall(quoted)}
    if own.get("--scale") == whole["--scale"] and own.get("--alpha") != whole["--alpha"]:
        remedy = remedy.replace(*_EITHER)
    lacking = [
        option for option in dict.fromkeys(_OPTION.findall(_QUOTED.sub("", remedy)))
        if option not in told and option in whole
        and (option not in own or (option == "--rank" and _FACTORS in remedy and own[option] != whole[option]))
    ]  # fmt: skip
    if not lacking:
        return remedy
    return f"{remedy} (to 'upparam convert', and {command} what that writes: {command} has no such {' or '.join(lacking)})"


def findings_in_its_options(findings: Iterable[Finding], command: str) -> list[Finding]:
    """The findings, with what their messages and evidence advise."""
    return [
        replace(finding, message=in_its_options(finding.message, command), evidence=tuple(in_its_options(told, command) for told in finding.evidence))
        if any("--" in told for told in (finding.message, *finding.evidence)) else finding
        for finding in findings
    ]  # fmt: skip


def _options(command: str) -> dict[str, str | None]:
    """The options of a command, and what the help says of each."""
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"upparam.cli.{command}").add_arguments(parser)
    return {option: action.help for action in parser._actions for option in action.option_strings}
