"""Parsing the command line: whatever is refused is refused in one line."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, get_args, get_type_hints

import tyro
from tyro import _errors  # private, but the only way to a refusal before it is drawn; pyproject.toml pins tyro for it

from models.checks import check_text, near, shortened, wanted

_HIDDEN = get_args(tyro.conf.Suppress[int])[1]


def parse(parser: Any, arguments: Sequence[str], *, commands: Mapping[str, Any], prog: str, description: str) -> Any:
    """Parses a command line.

    Args:
      parser: what ``tyro.cli`` takes: the union of all commands.
      arguments: the command line.
      commands: the commands' dataclasses by name, whose fields are the options that an unknown one is compared with.
      prog: what the program is called.
      description: the first line of ``--help``.

    Returns:
      An instance of the command's dataclass.

    Raises:
      ValueError: with one line that names the option, the value seen and the values wanted.
      SystemExit: after ``--help``.
    """
    command = arguments[0] if arguments and arguments[0] in commands else None

    def refuse(event: _errors.ParseErrorEvent) -> NoReturn:
        raise ValueError(f"{_refusal(event, arguments, commands, command)}; see {help_of}")

    help_of = " ".join([prog, *([command] if command else []), "--help"])
    check_text(arguments)
    if command is not None:
        _refuse_repeated(arguments, commands[command])
    with _errors.on_parse_error(refuse):
        return tyro.cli(parser, prog=prog, args=list(arguments), description=description)


def given(arguments: Sequence[str], command: Any) -> tuple[str, ...]:
    """The options that a command line itself sets, whatever their values, by the names of their fields.

    Args:
      arguments: a command line that :func:`parse` takes.
      command: the command's dataclass.

    Examples:
      >>> from models.config import TrainConfig
      >>> given(["train", "--beta=0.5", "--no-rescale", "--num_layers", "3"], TrainConfig)
      ('beta', 'rescale', 'num_layers')
    """
    known = _spellings(command)
    names = (known.get(_spelling(argument)) for argument in arguments)
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _spelling(argument: str) -> str:
    """An option without its value, with hyphens."""
    return argument.partition("=")[0].replace("_", "-")


def _spellings(command: Any) -> dict[str, str]:
    """The names of a command's fields, by all that a command line may call them."""
    options = {option: option.removeprefix("--").replace("-", "_") for option in _options(command)}
    negated = {option.replace("--", "--no-", 1): name for option, name in options.items()}
    marked = get_type_hints(command, include_extras=True)
    aliases = {
        alias: field.name
        for field in dataclasses.fields(command)
        for mark in getattr(marked[field.name], "__metadata__", ())
        for alias in getattr(mark, "aliases", None) or ()
    }
    return negated | options | aliases


def _refuse_repeated(arguments: Sequence[str], command: Any) -> None:
    """Refuses an option that stands twice, of which the parser would drop the first without a word."""
    known, seen = _spellings(command), dict[str, str]()
    for spelling in map(_spelling, arguments):
        if spelling not in known:
            continue
        before = seen.get(known[spelling])
        if before == spelling:
            raise ValueError(f"{spelling} stands twice; give it once, with all of its values behind it")
        if before:
            raise ValueError(f"{before} and {spelling} exclude each other; give one of them")
        seen[known[spelling]] = spelling


def _refusal(
    event: _errors.ParseErrorEvent, arguments: Sequence[str], commands: Mapping[str, Any], command: str | None
) -> str:
    """Why a command line is refused."""
    match event:
        case _errors.UnrecognizedArgs(tokens=[token, *_]) | _errors.MissingArgs(unrecognized_tokens=[token, *_]):
            return _unknown(token, commands, command)
        case _errors.MissingArgs():
            names = [missing.arg.display_name() for missing in event.missing_arguments]
            return f"{', '.join(names)} must be given"
        case _errors.MissingSubcommand():
            return f"a command must be given: one of {', '.join(event.subcommand_spec.parser_from_name)}"
        case _errors.InvalidChoice():
            kind = event.argument.field.type  # its choices, in an option that may be left out, are in no order
            return f"{event.argument.display_name()} must be {wanted(kind)}, got {shortened(event.value)}"
        case _errors.BadValue() | _errors.InstantiationFailure() if event.argument is not None:
            argument = event.argument
            name = argument.display_name()
            seen = _values(arguments, argument.lowered.name_or_flags)
            return f"{name} must be {wanted(argument.field.type)}, got {' '.join(map(shortened, seen)) or 'nothing'}"
        case _errors.InstantiationFailure():
            return " ".join(str(event.message).split())
    return f"{type(event).__name__} in {shortened(' '.join(arguments))}"


def _unknown(token: str, commands: Mapping[str, Any], command: str | None) -> str:
    name = token.partition("=")[0]
    if command is None:
        if not name.startswith("-"):
            return f"unknown command {shortened(name)}; the commands are {', '.join(commands)}"
        return f"{shortened(name)} stands where a command must be: one of {', '.join(commands)}"
    if not name.startswith("-"):
        return f"{shortened(token)} belongs to no option of {command}"
    return f"unknown option {shortened(name)}{near(name, list(_options(commands[command])))}"


def _options(command: Any) -> Iterator[str]:
    """The options of a command: its fields but those that are hidden, and those of dataclasses among them."""
    kinds, marked = get_type_hints(command), get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):  # hints are those of class variables as well
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from _options(kinds[field.name])
        elif _HIDDEN not in getattr(marked[field.name], "__metadata__", ()):
            yield f"--{field.name.replace('_', '-')}"


def _values(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """What stands behind the last occurrence of an option."""
    found: list[str] = []
    inside = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            inside = name.replace("_", "-") in flags
            if inside:
                found = [value] if equals else []
        elif inside:
            found.append(argument)
    return found
