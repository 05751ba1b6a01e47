"""What the command lines have in common: headings, files of settings, hints, exit codes (sonic/flags.py)."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

import sonic_demo
import sonic_training
from sonic import evaluation, lora, puppets
from sonic.config import SonicConfig
from sonic.flags import (
    Checked,
    Parser,
    UserError,
    config_from,
    flag,
    given,
    json_result,
    number,
    one_of,
    run,
)
from sonic.training_config import TrainingConfig


@dataclass(frozen=True)
class Kitchen(Checked):
    """Flags of every kind."""

    spoon: int = flag(3, "how many spoons of it", number(int, low=0), group="tools")
    fire: str = flag("no", "no, low or high", one_of("no", "low", "high"))
    salt: float = flag(0.0, "100 % salt", number(float, low=0), group="tastes")
    vegan: bool = flag(False, "without anything of animals")
    book: str | None = flag(None, "the recipe's file", group="tools")


def kitchen(read_other=lambda path: None):
    parser = Parser(
        "Cooks.\n\n    cook --spoon 4 --fire high --salt 3.25 --book recipes/soup.txt --vegan   # a soup", read_other
    )
    parser.group("what goes in").add_argument("--pots", type=int, nargs="+", default=[1], help="sizes of the pots")
    parser.add_config(Kitchen)
    return parser


def cooked(*arguments):
    return kitchen().parse_args([str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------------------------ help


def printed_help(parse, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_has_headings_and_defaults(monkeypatch, capsys):
    text = printed_help(cooked_list, 100, monkeypatch, capsys)
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["what goes in:", "tools:", "tastes:", "settings in a file:"]
    tools = text.split("tools:")[1].split("tastes:")[0]
    assert "--spoon N" in tools and "--book PATH" in tools and "--vegan" not in tools
    assert "(default: 3)" in text and "(default: 0.0)" in text and "(default: 1)" in text and "100 % salt" in text
    assert "--no_vegan" not in text and "None" not in text and "False" not in text


def cooked_list(arguments):
    return kitchen().parse_args(arguments)


def test_a_long_command_is_folded_and_can_be_copied(monkeypatch, capsys):
    assert "  cook --spoon 4 --fire high" in printed_help(cooked_list, 100, monkeypatch, capsys)
    text = printed_help(cooked_list, 50, monkeypatch, capsys)
    command = text.split("# a soup\n")[1].split("\n\n")[0]
    assert len(command.splitlines()) > 1 and max(map(len, text.splitlines())) <= 50
    joined = " ".join(command.replace("\\\n", " ").split())
    assert joined == "cook --spoon 4 --fire high --salt 3.25 --book recipes/soup.txt --vegan"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "parse",
    [sonic_demo.parse, sonic_training.parse, puppets.parse_arguments, evaluation.main, lora.main],
    ids=["demo", "training", "puppets", "evaluation", "lora"],
)
def test_help_of_every_command_fits_the_terminal(parse, columns, monkeypatch, capsys):
    lines = printed_help(parse, columns, monkeypatch, capsys).splitlines()
    assert lines[0].startswith("usage: ") and len(lines[0]) <= 80
    assert max(map(len, lines)) <= columns
    assert "  --config FILE" in "\n".join(lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "sonic.puppets", "--help"], "usage: python -m sonic.puppets --output"),
        (["-m", "sonic.puppets", "--zzzz"], "python -m sonic.puppets: there is no flag --zzzz"),
        (["sonic_demo.py", "--zzzz"], "sonic_demo.py: there is no flag --zzzz"),
    ],
)
def test_a_command_has_the_name_it_was_called_by(arguments, said):
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.stdout + ended.stderr).startswith(said)


def test_every_setting_has_a_heading():
    for config in (SonicConfig, TrainingConfig):
        first = next(iter(config.__dataclass_fields__.values()))
        assert first.metadata["group"]


# ----------------------------------------------------------------------------------------------------------- wrong flags


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--spon", "3"], "there is no flag --spon; did you mean --spoon?"),
        (["--spon=3"], "there is no flag --spon; did you mean --spoon?"),
        (["--zzzz"], "there is no flag --zzzz ("),
        (["--fire", "hihg"], "must be one of no, low, high, not 'hihg'; did you mean high?"),
        (["--fire", "HIGH"], "did you mean high?"),
        (["--fire", "qqqq"], "must be one of no, low, high, not 'qqqq' ("),
        (["--spoon", "2.5"], "must be a whole number at least 0, not '2.5'"),
        (["--config"], "--config"),
        (["soup"], "soup"),
    ],
)
def test_wrong_flags_are_one_line_with_the_nearest_right_one(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cooked(*arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "wrong", "right"),
    [
        (sonic_demo.parse, "--num-inference-steps", "--num_inference_steps"),
        (sonic_demo.parse, "--auido", "--audio"),
        (sonic_training.parse, "--learningrate", "--learning_rate"),
        (puppets.parse_arguments, "--outptu", "--output"),
    ],
)
def test_hints_of_the_commands(script, wrong, right, capsys):
    with pytest.raises(SystemExit):
        script([wrong, "1"])
    assert f"there is no flag {wrong}; did you mean {right}?" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- files of settings


def test_a_file_fills_flags_and_the_command_line_wins(tmp_path):
    file = tmp_path / "soup.yaml"
    file.write_text("# a soup\nspoon: 5\nfire: no\nsalt: 1e-2\nvegan: true\nbook: null\npots: [2, 3]\n")
    flags = cooked("--config", file)
    assert (flags.spoon, flags.fire, flags.salt, flags.vegan, flags.book, flags.pots) == (
        5,
        "no",
        0.01,
        True,
        None,
        [2, 3],
    )
    flags = cooked("--spoon", 7, f"--config={file}", "--no_vegan", "--pots", 9, "--fire", "low")
    assert (flags.spoon, flags.fire, flags.salt, flags.vegan, flags.pots) == (7, "low", 0.01, False, [9])
    assert config_from(Kitchen, flags) == Kitchen(spoon=7, fire="low", salt=0.01)


def test_an_empty_file_changes_nothing(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert cooked("--config", file).spoon == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("spon: 3", "there is no setting 'spon'; did you mean spoon?"),
        ("help: 3", "there is no setting 'help'"),
        ("spoon: many", "spoon must be a whole number at least 0, not 'many'"),
        ("spoon: [1, 2]", "spoon must be a whole number"),
        ("spoon: {a: 1}", "spoon must be one value"),
        ("fire: hgih", "fire must be one of no, low, high, not 'hgih'; did you mean high?"),
        ("vegan: yes", "vegan must be true or false, not 'yes'"),
        ("pots: [1, x]", "pots invalid literal"),
        ("- spoon", "must hold lines 'name: value'"),
        ("just words", "must hold lines 'name: value'"),
        ("spoon: 1\n  fire: [", "is no YAML file, line 2"),
        ("[" * 5000, "is no YAML file"),
    ],
)
def test_a_wrong_file_is_told_with_its_name_and_key(tmp_path, text, words):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        cooked("--config", file)
    assert "wrong.yaml" in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        cooked("--config", tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="is no file"):
        cooked("--config", tmp_path)
    (tmp_path / "noise.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="is no YAML file"):
        cooked("--config", tmp_path / "noise.yaml")


def test_without_pyyaml_config_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "soup.yaml").write_text("spoon: 5\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match="pip install"):
        cooked("--config", tmp_path / "soup.yaml")
    assert cooked("--spoon", 4).spoon == 4


def test_saved_settings_load_again(tmp_path):
    saved = tmp_path / "new" / "soup.yaml"
    first = cooked("--spoon", 4, "--book", "a: b #c", "--pots", 2, 5, "--vegan", "--save_config", saved)
    text = saved.read_text()
    assert "# tools" in text and "spoon: 4" in text and "salt: 0.0" in text and "config" not in text.split("\n", 1)[1]
    again = cooked("--config", saved)
    assert {**vars(again), "config": None, "save_config": None} == {**vars(first), "config": None, "save_config": None}
    assert [path.name for path in saved.parent.iterdir()] == ["soup.yaml"]
    with pytest.raises(UserError, match="--save_config cannot write"):
        cooked("--save_config", saved / "below.yaml")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "soup.bin").write_bytes(b"\xff\xfe")
    record = json.dumps({"settings": {"spoon": 8}, "by": "somebody"})
    assert kitchen(lambda path: record).parse_args(["--config", str(tmp_path / "soup.bin")]).spoon == 8


def test_required_flags_may_come_from_a_file(tmp_path):
    (tmp_path / "puppets.yaml").write_text("output: out\nspeech: voices\nhead_amplitude: [0.5, 1.5]\nclips: 2\n")
    flags = puppets.parse_arguments(["--config", str(tmp_path / "puppets.yaml"), "--clips", "3"])
    assert (str(flags.output), str(flags.speech), flags.head_amplitude, flags.clips) == ("out", "voices", [0.5, 1.5], 3)


def test_what_training_writes_is_a_settings_file(tmp_path):
    """config.json as sonic_training writes it (JSON is YAML)."""
    from dataclasses import asdict

    before = TrainingConfig(
        data_root="videos", p_mean=(1.4, -0.2), mixed_precision="bf16", ema_decay=0.999, compile=True
    )
    (tmp_path / "config.json").write_text(json.dumps(asdict(before), indent=1))
    assert sonic_training.parse(["--config", str(tmp_path / "config.json")]) == before
    changed = sonic_training.parse(["--config", str(tmp_path / "config.json"), "--no_compile", "--seed", "1"])
    assert (changed.compile, changed.seed, changed.p_mean) == (False, 1, (1.4, -0.2))


def test_saved_settings_of_both_scripts_load_again(tmp_path):
    for parse, more in (
        (sonic_demo.parse, ["--guidance_scale_audio", "1,3", "--crop", "none", "--image", "a.png", "b c.png"]),
        (sonic_training.parse, ["--data_root", "videos", "--mixed_precision", "no", "--p_mean", "1.4,-0.2"]),
    ):
        file = str(tmp_path / f"{len(more)}.yaml")
        first, again = parse([*more, "--save_config", file]), parse(["--config", file])
        if parse is sonic_demo.parse:
            first, again = ({**vars(flags), "config": None, "save_config": None} for flags in (first, again))
        assert first == again


def test_only_what_is_given(tmp_path, monkeypatch, capsys):
    """For flags that go over other settings: what nobody gave is not there, but --help and files know it."""

    def parse(arguments):
        parser = Parser("Cooks.")
        parser.add_config(Kitchen, only_given=True)
        return parser.parse_args([str(word) for word in arguments])

    assert given(Kitchen, parse([])) == {}
    assert given(Kitchen, parse(["--spoon", 3, "--vegan"])) == {"spoon": 3, "vegan": True}
    assert given(Kitchen, parse(["--salt", 1, "--save_config", tmp_path / "salt.yaml"])) == {"salt": 1.0}
    assert given(Kitchen, parse(["--config", tmp_path / "salt.yaml"])) == {"salt": 1.0}
    assert "(default: 3)" in printed_help(parse, 100, monkeypatch, capsys)


# ------------------------------------------------------------------------------------------------------- ends of a command


def refuse():
    raise UserError("no pot is large enough")


def interrupt():
    raise KeyboardInterrupt


def terminate():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("main", "code", "words"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (refuse, 2, "error: no pot is large enough"),
        (interrupt, 130, "interrupted"),
        (terminate, 143, "terminated"),
    ],
)
def test_exit_codes(main, code, words, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == code and capsys.readouterr().err.strip() == words
    assert signal.getsignal(signal.SIGTERM) is before


def test_json_result_is_alone_on_stdout(capsys):
    with json_result(True) as result:
        print("by the way")
        result["pots"] = 3
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"pots": 3} and printed.err == "by the way\n"
    with json_result(False) as result:
        print("by the way")
        result["pots"] = 3
    assert capsys.readouterr().out == "by the way\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [(UserError("no pot"), "no pot"), (KeyboardInterrupt(), "interrupted"), (OSError("full"), "OSError: full")],
)
def test_json_result_tells_what_ended_it(error, told, capsys):
    with pytest.raises(type(error)), json_result(True) as result:
        result["pots"] = 1
        raise error
    assert json.loads(capsys.readouterr().out) == {"pots": 1, "error": told}


def test_a_secret_is_not_written_down(tmp_path):
    import sonic_demo

    sonic_demo.parse(
        ["--gradio", "--auth", "me:open sesame", "--max_waiting", "3", "--save_config", str(tmp_path / "page.yaml")]
    )
    text = (tmp_path / "page.yaml").read_text()
    assert "sesame" not in text and "max_waiting: 3" in text
