"""Parses a command line into a command, its own arguments, and the settings of a run."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from rove.config.schema import Run
from rove.errors import RoveError, nearest


@dataclass(frozen=True)
class Argument:
    """One `add_argument` call."""

    name: str
    help: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A sub-command. With `settings`, it takes `--key value` for any key of a run besides its own options."""

    handler: Callable[[argparse.Namespace, list[str]], int | None]
    help: str
    arguments: tuple[Argument, ...] = ()
    settings: bool = False

    @property
    def flags(self) -> set[str]:
        return {"--help", *(a.name for a in self.arguments if a.name.startswith("--"))}


_SETTINGS_HELP = "Any setting of the run can be given as --key value, e.g. --rollout.num_envs 32."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RoveError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def parse(
    commands: Mapping[str, Command], words: list[str]
) -> tuple[Command, argparse.Namespace, list[str]] | None:
    """Return the command that `words` name, its own arguments, and the settings of a run beside them; None
    where help was asked for, and has been printed. Raises RoveError on words that it does not know."""
    name = words[0] if words else "--help"
    if not name.startswith("-") and name not in commands:
        raise RoveError(f"Unknown command {name!r}. {nearest(name, commands)}")
    parser = build_parser(commands)
    try:
        if name.startswith("-"):
            parser.parse_args([name])
        command = commands[name]
        own, settings = _split(command, words[1:])
        return command, parser.parse_args([name, *own]), settings
    except SystemExit:  # argparse has printed the help
        return None


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Build the parser of all commands and their own arguments; it knows no settings."""
    parser = _Parser(
        prog="rove",
        description="Train vision-language-action robot policies by reinforcement learning.",
        epilog="Start with: rove recipes",
        allow_abbrev=False,
    )
    added = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in commands.items():
        usage = " ".join([f"rove {name}", *_usage(command)])
        sub = added.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            usage=usage,
            epilog=_SETTINGS_HELP if command.settings else None,
            allow_abbrev=False,
        )
        for argument in command.arguments:
            sub.add_argument(argument.name, help=argument.help, **argument.options)
    return parser


def _usage(command: Command) -> Iterable[str]:
    optional = []
    for argument in command.arguments:
        name = str(argument.options.get("metavar", argument.name.lstrip("-").upper()))
        if not argument.name.startswith("--"):
            yield f"[{name}]" if "nargs" in argument.options else name
        elif argument.options.get("required"):
            yield f"{argument.name} {name}"
        else:
            optional.append(f"[{argument.name} {name}]")
    yield from optional if len(optional) < 3 else ["[options]"]
    if command.settings:
        yield "[--key value …]"


def _split(command: Command, words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the settings; refuses an option that is close to one of the command's."""
    own: list[str] = []
    settings: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag in command.flags:
            own.append(word)
            continue
        top_level = flag[2:] in {f.name for f in fields(Run)}
        meant = difflib.get_close_matches(flag, command.flags, n=1, cutoff=0.75)
        if not command.settings or (meant and not top_level and "." not in flag):
            raise RoveError(f"Unknown option {flag}. {nearest(flag, command.flags)}")
        settings.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            settings.append(words.pop(0))
    return own, settings
