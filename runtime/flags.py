"""Command-line flags from one frozen dataclass, which is the only source of truth.

    @dataclass(frozen=True)
    class Config:
        group_size: int = flag(16, "outputs for each question (G)")

    config = parse(Config, {"toy": {}, "gsm8k": {"group_size": 64}})

gives `--group-size`, and `--preset` chooses among the named sets of overrides; a flag wins over the
preset. `Machine` has the flags that the recipes share. It is no part of the method. Read next:
run.py.
"""

import argparse
import dataclasses
import difflib
import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C")
TAKES = {int: "a whole number", float: "a number", str: "text"}


class UserError(Exception):
    """The user's mistake. The message gives the value, what is allowed, and the fix."""


def flag(default: Any, help: str) -> Any:
    """A field of a recipe's Config, with its sentence for --help."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a recipe runs on, and how: none of it is the method, and most may change on resuming."""

    slots: int = flag(256, "outputs written at the same time; fewer need less memory")
    micro_tokens: int = flag(4096, "tokens of a micro-batch; fewer need less memory")
    device: str = flag("auto", "cpu, cuda or auto")
    dtype: Literal["float32", "float64", "bfloat16"] = flag(
        "float32", "of the weights that are trained"
    )
    optimizer: Literal["master", "rounding"] = flag(
        "master",
        "for bfloat16: states and a copy of the weights in fp32 (18 bytes a parameter), or all in"
        " bf16 with stochastic rounding (8)",
    )
    recompute: bool = flag(False, "compute each block again for its gradient: less memory, slower")
    offload: bool = flag(False, "reference and optimizer on the CPU while they are not needed")
    ep: int | None = flag(
        None, "spread the weights over the processes, the experts over so many; 0: all on each;"
        " none: spread what would fill more than half of the memory",
    )  # fmt: skip
    tp: int = flag(
        0, "so many processes draw the outputs of a dense model together, each with a part of it;"
        " 0: each has it whole",
    )  # fmt: skip
    threads: int = flag(0, "CPU threads; 0 leaves the choice to torch")
    timeout: float = flag(
        1800.0, "seconds that a process waits for the others before it takes them for lost"
    )

    def __post_init__(self):
        for name in ("slots", "micro_tokens"):
            if getattr(self, name) < 1:
                flag_name = name.replace("_", "-")
                raise UserError(f"--{flag_name} {getattr(self, name)}: at least 1")
        if self.timeout <= 0:
            raise UserError(f"--timeout {self.timeout}: more than 0")
        if self.optimizer == "rounding" and self.dtype != "bfloat16":
            raise UserError(f"--optimizer rounding is for --dtype bfloat16, not {self.dtype}")
        if self.tp > 1 and (self.offload or self.ep == 0):
            raise UserError(
                f"--tp {self.tp} is for a model that is spread: --ep 1, and no --offload"
            )
        if self.ep and self.offload:
            raise UserError("--ep and --offload: give one of them; a spread model stays in place")
        if self.offload:
            object.__setattr__(self, "ep", 0)


def nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def parse(config_class: type[C], presets: dict[str, dict], argv: Sequence[str] | None = None) -> C:
    """The config that the command line asks for. A mistake ends the program with one line and 2."""
    argv = sys.argv[1:] if argv is None else argv
    about = (sys.modules[config_class.__module__].__doc__ or "").strip().split("\n")[0]
    parser = _Parser(description=about, allow_abbrev=False)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    if presets:
        defaults |= _preset(parser, presets, argv)
    names = ["--help", "--preset"]
    own = inspect.get_annotations(config_class)  # a recipe's before those that it inherits
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name not in own):
        names += _add_flag(parser, field, get_type_hints(config_class)[field.name], defaults)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        bad = next((text for text in unknown if text.startswith("-")), None)
        if bad is None:
            parser.error(f"unexpected {unknown[0]!r}: every argument is a --flag; see --help")
        bad = bad.split("=")[0]
        parser.error(f"unknown flag {bad}{nearest(bad, names)} (--help lists them all)")
    values = vars(given)
    values.pop("preset", None)
    try:
        return config_class(**{**defaults, **values})
    except (UserError, ValueError) as error:  # from the config's own __post_init__
        parser.error(str(error))


def _preset(parser: argparse.ArgumentParser, presets: dict[str, dict], argv: Sequence[str]) -> dict:
    """The overrides of the chosen preset: read ahead, so that --help shows its defaults."""
    first = next(iter(presets))

    def known(name: str) -> str:
        if name not in presets:
            allowed = ", ".join(presets)
            raise argparse.ArgumentTypeError(
                f"{name!r} is not a preset{nearest(name, list(presets))} (there are {allowed})"
            )
        return name

    ahead = _Parser(add_help=False, allow_abbrev=False)
    for each in (ahead, parser):
        each.add_argument(
            "--preset", type=known, default=first, metavar="NAME",
            help=f"settings to start from: {', '.join(presets)} (default: {first})",
        )  # fmt: skip
    return presets[ahead.parse_known_args(argv)[0].preset]


def _add_flag(parser, field: dataclasses.Field, kind: Any, defaults: dict[str, Any]) -> list[str]:
    """Add the field's flag to the parser; its spellings are returned."""
    default = defaults[field.name]
    assert default is not dataclasses.MISSING, f"{field.name} needs a default; write it with flag()"
    name = "--" + field.name.replace("_", "-")
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    shown = str(default).lower() if kind is bool else default
    text = f"{field.metadata['help']} (default: {shown})"
    # SUPPRESS: the result has only what the user gave; the defaults are parse's.
    options = dict(dest=field.name, default=argparse.SUPPRESS, help=text.replace("%", "%%"))
    if kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        return [name, "--no-" + name[2:]]
    convert, takes = _reader(kind)

    def read(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            hint = nearest(text, get_args(kind)) if get_origin(kind) is Literal else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {takes}{hint}") from None

    metavar = {int: "N", float: "X", str: "TEXT"}.get(kind, field.name.upper())
    choices = next((k for k in (kind, *get_args(kind)) if get_origin(k) is Literal), None)
    if choices:
        metavar = "|".join(get_args(choices))
    parser.add_argument(name, type=read, metavar=metavar, **options)
    return [name]


def _reader(kind: Any) -> tuple[Callable[[str], Any], str]:
    """How a flag's text becomes its value (ValueError if it can't), and what the flag takes."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        (some,) = [each for each in inner if each is not types.NoneType]
        convert, takes = _reader(some)
        return (lambda text: None if text.lower() == "none" else convert(text)), takes + ", or none"
    if get_origin(kind) is tuple:  # tuple[X, ...]
        convert, takes = _reader(inner[0])
        plural = takes.replace("a ", "").replace("number", "numbers")
        many = f"{plural} with commas between"
        return (lambda text: tuple(convert(part) for part in text.split(",") if part)), many
    if get_origin(kind) is Literal:
        return (lambda text: inner[inner.index(text)]), f"one of {', '.join(inner)}"
    return kind, TAKES[kind]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, without the usage, and exit code 2."""
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")

    def _print_message(self, message: str, file=None) -> None:
        if os.environ.get("RANK", "0") == "0":  # under torchrun all ranks read the same flags
            super()._print_message(message, file)
