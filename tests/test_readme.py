"""What README shows runs, and its commands are the two that it promises."""

import re
import subprocess
import sys
from pathlib import Path

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


def test_linked_files_exist():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (root / target).is_file(), target
