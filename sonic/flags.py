"""Command lines out of dataclasses: every field of a configuration is a flag with help, a default and a checked value."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(ValueError):
    """Something the person at the keyboard can mend. The scripts print its one sentence and exit with code 2."""


def number(kind: type, low: float | None = None, high: float | None = None, above: float | None = None) -> Callable:
    """A check that turns text or a number into `kind` within [low, high] or beyond `above`, and raises ValueError otherwise."""
    bounds = [f"at least {low}" if low is not None else "", f"above {above}" if above is not None else ""]
    bounds += [f"at most {high}" if high is not None else ""]
    wanted = (
        f"{'a whole number' if kind is int else 'a number'} {' and '.join(bound for bound in bounds if bound)}".strip()
    )

    def check(value):
        try:
            result = kind(value)
            fits = math.isfinite(float(value)) and result == float(value)  # 2.5 is no whole number
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits or (low is not None and result < low) or (high is not None and result > high):
            raise ValueError(f"must be {wanted}, not {value!r}")
        if above is not None and result <= above:
            raise ValueError(f"must be {wanted}, not {value!r}")
        return result

    return check


def one_of(*choices: str) -> Callable:
    """A check that lets only these words through."""

    def check(value):
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}")
        return value

    return check


def flag(default: Any, help: str, check: Callable = str) -> Any:
    """A dataclass field that is also a command-line flag. A default of False makes a switch, None means: not given."""
    return dataclasses.field(default=default, metadata={"help": help, "check": check})


class Checked:
    """A dataclass of flags that holds only values that its checks let through, however it was made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.default is False:
                if not isinstance(value, bool):
                    raise UserError(f"{field.name} must be True or False, not {value!r}")
                continue
            try:
                object.__setattr__(self, field.name, field.metadata["check"](value))
            except ValueError as error:
                raise UserError(f"{field.name} {error}") from None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence and exit code 2."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists all flags)", file=sys.stderr)
        raise SystemExit(2)

    def add_config(self, config: type, only_given: bool = False) -> None:
        """One flag for each field of a dataclass made of `flag`s. `only_given` leaves the others out of what is parsed."""
        for field in dataclasses.fields(config):
            name, help = f"--{field.name}", field.metadata["help"].replace("%", "%%")
            if field.default is False:
                absent = argparse.SUPPRESS if only_given else False
                self.add_argument(name, action="store_true", default=absent, help=help)
                continue
            if field.default not in (dataclasses.MISSING, None, ""):
                help += f" (default: {field.default})"
            required = field.default is dataclasses.MISSING
            default = argparse.SUPPRESS if only_given else None if required else field.default
            self.add_argument(
                name, type=_argument(field.metadata["check"]), default=default, required=required, help=help
            )


def _argument(check: Callable) -> Callable:
    """argparse hides the text of a ValueError, but shows that of its own error."""

    def convert(text: str):
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def config_from(config: type, arguments: argparse.Namespace) -> Any:
    """The dataclass, filled from the parsed flags of the same names."""
    return config(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(config)})


def given(config: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """The parsed flags of a dataclass that was added with `only_given`, by name."""
    return {
        name: value for name, value in vars(arguments).items() if name in {f.name for f in dataclasses.fields(config)}
    }


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main`: a UserError becomes its one sentence and exit code 2, Ctrl-C exit code 130."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code or 0)
