"""What the documents name is there: files, headings, flags, and commands."""

import re

import pytest
from conftest import ROOT

import sonic_demo
import sonic_training
from sonic import evaluation, lora, prepare, puppets
from sonic.flags import Parser

PAGES = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if path.name != "SPEC.md")
# Flags of other programs, and of our own that only developers call (scripts/, benchmarks/).
FOREIGN = {"--local-dir", "--include", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip"}
FOREIGN |= {"--main_process_port", "--multi_gpu", "--config_file", "--untrained", "--interval", "--calls", "--files"}
OWN_TOOLS = r"(python|\.venv/bin/python) (benchmarks|scripts)/\w+\.py|build_mini|tests/"


def headings(path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        file = (page.parent / file).resolve() if file else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def flags_of(*commands) -> set[str]:
    """Every flag of some command lines."""
    flags = set()

    def note(parser, *_):
        flags.update(parser._option_string_actions)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "print_help", note)
        for command in commands:
            with pytest.raises(SystemExit):
                command(["--help"])
    return flags


@pytest.fixture(scope="module")
def known() -> set[str]:
    modules = (puppets.parse_arguments, evaluation.main, lora.main, prepare.main)
    return flags_of(sonic_demo.parse, sonic_training.parse, *modules)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page, known):
    lines = [line for line in page.read_text().splitlines() if not re.search(OWN_TOOLS, line)]
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(lines)))
    assert {flag for flag in named - known - FOREIGN if not flag.startswith("--no_")} == set()  # --no_NAME is for any


def test_every_flag_is_listed():
    """docs/flags.md has those of both scripts; the thresholds of preparation and the page's limits have lists of their own."""
    text = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("flags", "data", "page"))
    flags = {flag for flag in flags_of(sonic_demo.parse, sonic_training.parse) if not flag.startswith("--no_")}
    assert flags - set(re.findall(r"--\w+", text)) == {"-h"}
