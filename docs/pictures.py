"""Make the README's pictures from a finished run:  python docs/pictures.py out/demo

Shows the run again in a terminal of 100 columns, and opens its report with headless Chromium. Needs
`chromium`; overwrites docs/demo-*.png. Look at each picture afterwards.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

DOCS = Path(__file__).parent
PLACE = "~/ray_sql"
"""Stands for the folder that the run was made in."""
PAGE = """<body style="margin:0;background:#1b1e24">
<pre style="margin:0;padding:18px 22px;color:#d8dee9;font:14px/1.2 'DejaVu Sans Mono',monospace">
{code}</pre></body>"""


def terminal(run: Path) -> None:
    """Picture what a finished run shows: its scores, and where everything is."""
    command = ["ray-sql", "demo"]
    code = "import sys; from ray_sql.cli import main; main('finetune', sys.argv[1:])"
    flags = ["--config", str(run / "config.json"), "--no-overwrite", "--no-tracking.enabled"]
    colours = {"COLUMNS": "100", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        env=os.environ | colours,
        capture_output=True,
        text=True,
        check=True,
    )
    shown = done.stdout.replace(f"{run.parent.parent}/", f"{PLACE}/")
    start = re.search(r"[^\n]*execution accuracy", shown)
    assert start, f"the run shows no table of scores: {shown}"
    console = Console(record=True, width=100, file=StringIO())
    # the empty line of progress that a terminal overwrites
    table = re.sub(r"\n\s*\n", "\n", shown[start.start() :].rstrip())
    console.print(Text.from_ansi(f"$ {' '.join(command)}\n…\n{table}"))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "terminal.html"
        console.save_html(str(page), theme=MONOKAI, code_format=PAGE, inline_styles=True)
        lines = len(page.read_text().splitlines())
        shoot(page.as_uri(), "demo-terminal.png", 900, 17 * lines + 20)


def report(run: Path) -> None:
    """Picture the top of the run's report."""
    shoot((run / "report.html").as_uri(), "demo-report.png", 1200, 1000)


def shoot(address: str, name: str, width: int, height: int) -> None:
    """Write a picture of a page, with a new profile of the browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "install chromium"
    quiet = "disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
    flags = f"headless no-sandbox hide-scrollbars disable-component-update {quiet}".split()
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, *(f"--{flag}" for flag in flags), f"--user-data-dir={profile}"]
            + [f"--window-size={width},{height}", "--virtual-time-budget=30000"]
            + [f"--screenshot={DOCS / name}", address],
            check=True,
            capture_output=True,
        )
    picture = Image.open(DOCS / name)
    picture.save(DOCS / name, optimize=True)
    size = (DOCS / name).stat().st_size
    print(f"{DOCS / name}: {size / 1024:.0f} KiB")
    assert size < 300 * 1024, "too large for a page"


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    terminal(folder)
    report(folder)
