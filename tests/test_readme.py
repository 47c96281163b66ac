"""What README shows runs, and its commands are the two that it promises."""

import logging
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_influence.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_first_block_runs_and_prints_the_summary(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text(blocks("python")[0])
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100.0% of the trainable parameters are attributed" in done.stdout
    assert (tmp_path / "influence.h5").is_file()


def test_there_are_exactly_two_set_up_commands():
    assert len([line for block in blocks("sh") for line in block.splitlines() if line.strip()]) == 2


def shape_of(text: str) -> list[list[str]]:
    """Lines of words, without numbers and hashes, which differ from machine to machine."""
    return [
        re.sub(r"[0-9a-f]{16}…|-?\d[\d.,]*(e[+-]\d+)?(\+\w+)?", "#", line).split() for line in text.splitlines()
    ]


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_the_session_runs_and_prints_what_is_shown(tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")  # the example sets it; this puts it back
    shutil.copy(Path(__file__).parents[1] / "examples" / "command_line.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (session,) = blocks("console")
    for step in session.removeprefix("$ ").split("\n$ "):
        command, _, shown = step.partition("\n")
        program, *arguments = shlex.split(command)
        if program == "python":
            monkeypatch.setattr(sys, "argv", arguments)
            wrong = runpy.run_path(arguments[0], run_name="__main__")["wrong_labels"]().tolist()
            capsys.readouterr()
            continue
        assert program == "lightning-influence"
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert shape_of(printed) == shape_of(shown), command
        if "self_influence  " in printed:  # "all have a label that was made wrong"
            assert {int(line.split()[1]) for line in printed.splitlines()[1:]} <= set(wrong)
    assert (tmp_path / "influence.csv").is_file()


def test_linked_files_exist():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (root / target).is_file(), target
