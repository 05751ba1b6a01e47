"""Command lines out of dataclasses: every field of a configuration is a flag with help, a default and a checked value.

Every command of the project ends with one of these exit codes: 0 done; 1 some of it failed, or a mistake of ours, with a
traceback; 2 wrong flags or input, told in one sentence; 130 stopped by Ctrl-C; 143 stopped by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from sonic.files import whole_file
from sonic.stopping import Terminated, signals_raise


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

    check.metavar = "N" if kind is int else "X"
    return check


def one_of(*choices: str) -> Callable:
    """A check that lets only these words through."""

    def check(value):
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}{did_you_mean(value, choices)}")
        return value

    check.metavar = "WORD"
    return check


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, if one is near."""
    near = get_close_matches(str(word).lower(), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def flag(default: Any, help: str, check: Callable = str, group: str | None = None, secret: bool = False) -> Any:
    """A dataclass field that is also a command-line flag. A default of False makes a switch, None means: not given.

    `group` is the heading of --help under which the flag stands; without it, that of the flag above. A `secret`
    is not written down by --save_config.
    """
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "group": group, "secret": secret})


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


class _Help(argparse.HelpFormatter):
    """Prose fills the terminal's width, and so do commands (the indented lines); switches show one name; defaults are told."""

    def __init__(self, prog: str):
        super().__init__(prog)
        self._max_help_position = min(34, self._width // 3)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            if paragraph.startswith(" "):
                commands = paragraph.replace("\\\n", " ").splitlines()
                paragraphs.append("\n".join(_fold(" ".join(command.split()), width) for command in commands))
            else:
                paragraphs.append(super()._fill_text(paragraph, width, indent))
        return "\n\n".join(paragraphs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0] if action.option_strings else action.dest
        if action.nargs == 0 or not action.option_strings:
            return name
        return f"{name} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_help_string(self, action: argparse.Action) -> str:
        none = action.default in (None, "", argparse.SUPPRESS) or action.default is False
        told = none or "default" in (action.help or "")
        return action.help if told else f"{action.help} (default: {_as_typed(action.default)})"


def _fold(command: str, width: int) -> str:
    """A command and its comment, indented; where they are too long, the comment comes first and the command in several lines."""
    command, mark, comment = (part.strip() for part in command.partition(" #"))
    line = f"  {command}  # {comment}" if mark else f"  {command}"
    if len(line) <= width:
        return line
    tied = re.sub(" (?!-)", "\xa0", command)  # a flag stays with its value
    lines = textwrap.wrap(tied, width - 2, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
    return f"  # {comment}\n" * bool(mark) + " \\\n".join(lines).replace("\xa0", " ")


def _as_typed(value: Any) -> str:
    """A value as one would write it behind a flag."""
    if isinstance(value, list | tuple):
        return (" " if isinstance(value, list) else ",").join(map(str, value))
    return str(value)


class _Switch(argparse.Action):
    """--name turns on; --no_name turns off again what a --config file has turned on."""

    def __init__(self, option_strings: list[str], dest: str, default: bool = False, help: str | None = None, **_):
        off = [f"--no_{name.removeprefix('--')}" for name in option_strings if name.startswith("--")]
        super().__init__([*option_strings, *off], dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def _called() -> str:
    """What the person at the keyboard has typed: `sonic_demo.py`, or `python -m sonic.prepare`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name if module is None else f"python -m {module.name.removesuffix('.__main__')}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence and exit code 2, and whose flags may come from a file.

    The file of --config is YAML: names of flags, and the values that one would type. `read_other` gives the text of such a
    file that is no text itself (a video that holds its settings), and None for a file that is.
    """

    def __init__(self, description: str, read_other: Callable[[Path], str | None] = lambda path: None):
        super().__init__(_called(), description=description, formatter_class=_Help, allow_abbrev=False, add_help=False)
        self.register("action", "store_true", _Switch)
        self._read_other = read_other
        self._secrets: set[str] = set()

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists all flags)", file=sys.stderr)
        raise SystemExit(2)

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The heading of that title, made when it is first named: --help shows headings in this order."""
        for group in self._action_groups:
            if group.title == title:
                return group
        return self.add_argument_group(title)

    def add_config(self, config: type, only_given: bool = False) -> None:
        """One flag for each field of a dataclass made of `flag`s. `only_given` leaves the others out of what is parsed."""
        title = "settings"
        self._secrets |= {field.name for field in dataclasses.fields(config) if field.metadata["secret"]}
        for field in dataclasses.fields(config):
            title = field.metadata["group"] or title
            name, help, check = f"--{field.name}", field.metadata["help"].replace("%", "%%"), field.metadata["check"]
            group = self.group(title)
            if field.default is False:
                absent = argparse.SUPPRESS if only_given else False
                group.add_argument(name, action="store_true", default=absent, help=help)
                continue
            required = field.default is dataclasses.MISSING
            default = None if required else field.default
            if only_given and default not in (None, ""):
                help += f" (default: {_as_typed(default)})"
            group.add_argument(
                name,
                type=_argument(check),
                default=argparse.SUPPRESS if only_given else default,
                required=required,
                help=help,
                metavar="PATH" if check is str else getattr(check, "metavar", "VALUE"),
            )

    def format_help(self) -> str:
        # A usage line of sixty flags says nothing: what must be given, and that there are more.
        needed = [action for action in self._actions if action.required]
        words = [_Help(self.prog)._format_action_invocation(action) for action in needed]
        self.usage = " ".join(["%(prog)s", *words, "[FLAGS]"])
        return super().format_help()

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        """The flags: of the command line, else of --config's file, else their defaults. UserError: that file is wrong."""
        args = sys.argv[1:] if args is None else list(args)
        if "--config" not in self._option_string_actions:
            group = self.group("settings in a file")
            group.add_argument(
                "--config",
                metavar="FILE",
                help="YAML or JSON with names of flags and their values, such as --save_config writes; flags given beside it "
                "win, --no_NAME turns a switch of it off",
            )
            group.add_argument("--save_config", metavar="FILE", help="write the settings of this call there, as YAML")
            group.add_argument("--help", "-h", action="help", help="show this, and stop")
        self._refuse_unknown(args)
        if not {"-h", "--help"} & set(args):
            before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            before.error = self.error
            before.add_argument("--config")
            file = before.parse_known_args(args)[0].config
            if file is not None:
                self._fill_from(Path(file))
        flags = super().parse_args(args, namespace)
        if flags.save_config is not None:
            self._save(flags, Path(flags.save_config))
        return flags

    def _refuse_unknown(self, args: list[str]) -> None:
        """argparse would complain of a missing flag before it names the one that is spelt wrong."""
        for word in args:
            name = word.partition("=")[0]
            if word == "--":
                return
            if name.startswith("--") and name not in self._option_string_actions:
                near = did_you_mean(name.replace("-", "_").replace("__", "--", 1), self._option_string_actions)
                self.error(f"there is no flag {name}{near}")

    def _flags(self) -> dict[str, argparse.Action]:
        """What a file can set: every flag by its name, but not those that are about files and help."""
        own = ("config", "save_config", "help")
        return {action.dest: action for action in self._actions if action.option_strings and action.dest not in own}

    def _fill_from(self, path: Path) -> None:
        """Makes a file's values the defaults. UserError: names the file and the key that is wrong."""
        flags = self._flags()
        for name, value in read_settings(path, self._read_other).items():
            if name not in flags:
                raise UserError(f"'{path}': there is no setting '{name}'{did_you_mean(name, flags)}")
            if value in ("", "null", "~"):
                continue
            try:
                self.set_defaults(**{name: _converted(flags[name], value)})
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise UserError(f"'{path}': {name} {error}") from None
            flags[name].required = False

    def _save(self, flags: argparse.Namespace, path: Path) -> None:
        """Writes what has been given or has a default, under the headings of --help."""
        lines, savable = (
            [f"# {self.prog} --config {path.name}"],
            {name: action for name, action in self._flags().items() if name not in self._secrets},
        )
        for group in self._action_groups:
            values = {
                action.dest: getattr(flags, action.dest)
                for action in group._group_actions
                if action.dest in savable
                and action.dest not in self._secrets
                and getattr(flags, action.dest, None) not in (None, "")
            }
            if values:
                lines.append(f"\n# {group.title}")
                # What JSON writes, YAML reads; and a word such as `no` stays a word.
                lines += [
                    f"{name}: {json.dumps(value, ensure_ascii=False, default=str)}" for name, value in values.items()
                ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--save_config cannot write '{path}' ({error.strerror}): give another file") from None


def read_settings(path: Path, read_other: Callable[[Path], str | None] = lambda path: None) -> dict[str, Any]:
    """A settings file as names and texts (or lists of texts). Where there is a part `settings`, that part alone is meant.

    UserError: it cannot be read, or is no YAML with one value, or one list of them, behind each name.
    """
    if not path.is_file():
        raise UserError(f"--config '{path}' is no file: give a YAML or JSON file of settings")
    try:
        import yaml
    except ImportError:
        raise UserError("--config needs PyYAML: pip install PyYAML") from None
    try:
        text = read_other(path) or path.read_text(encoding="utf-8-sig")
        # With all values as texts, a file means what the command line means: `no` is no boolean, 1e-5 is a number.
        content = yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}: {error.problem}" if mark else ""
        raise UserError(f"'{path}' is no YAML file{where}") from None
    if isinstance(content, dict) and isinstance(content.get("settings"), dict):
        content = content["settings"]
    if content in (None, ""):
        content = {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"'{path}' must hold lines 'name: value', the names being those of flags")
    for name, value in content.items():
        if not all(isinstance(one, str) for one in (value if isinstance(value, list) else [value])):
            raise UserError(f"'{path}': {name} must be one value, or a list of them")
    return content


def _converted(action: argparse.Action, value: str | list[str]) -> Any:
    """A file's value as the command line would have it. ValueError or ArgumentTypeError: the flag does not take it."""
    if isinstance(action, _Switch):
        if value not in ("true", "false"):
            raise ValueError(f"must be true or false, not {value!r}")
        return value == "true"
    convert = action.type or str
    if action.nargs is not None:
        return [convert(one) for one in (value if isinstance(value, list) else [value])]
    return convert(",".join(value) if isinstance(value, list) else value)


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
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(arguments).items() if name in names}


@contextlib.contextmanager
def json_result(wanted: bool, prints: bool = True) -> Iterator[dict]:
    """Gives a dict to fill. If `wanted`, it is what stdout gets, as one JSON object at the end; all else goes to stderr.

    What ends the work early is in it too, as `error`. Of several processes only one `prints` it.
    """
    result: dict = {}
    if not wanted:
        yield result
        return
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield result
    except (UserError, KeyboardInterrupt) as error:
        result["error"] = str(error) or "interrupted"
        raise
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        if prints:
            print(json.dumps(result, ensure_ascii=False, default=str), flush=True)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and ends with an exit code: that of `main`, 2 for a UserError, which is printed as its one
    sentence, 130 for Ctrl-C and 143 for SIGTERM, both without a traceback."""
    try:
        with signals_raise():
            code = main()
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Terminated:
        print("terminated", file=sys.stderr)
        code = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    raise SystemExit(code or 0)
