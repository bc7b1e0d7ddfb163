"""`mkdocs build --strict`: every link holds, each instrument has its page, nothing comes from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from examples import EXAMPLES

import devmon.instruments

ROOT = Path(__file__).parents[2]
LOADED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?(https?:|//)[^>]*>""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it; skipped where the extra `docs` is missing, which CI is refused."""
    if importlib.util.find_spec("material") is None and not os.environ.get("CI"):
        pytest.skip("pip install 'devmon[docs]' brings mkdocs-material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_instrument_has_a_page_with_the_figures_it_makes(site: Path) -> None:
    assert {path.stem for path in (site / "instruments").glob("*.html")} == {*devmon.instruments.__all__, "index"}
    for name in (name for lines in EXAMPLES.values() for name in lines):
        page = (site / "instruments" / f"{name}.html").read_text()
        figures = re.findall(r'src="(figures/[^"]+\.svg)"', page)
        assert figures, name
        for figure in figures:
            assert (site / "instruments" / figure).read_text().startswith("<svg"), figure


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(devmon.instruments.__all__) + 25
    loaded = [(page.name, match[0]) for page in pages for match in LOADED.finditer(page.read_text())]
    assert [found for found in loaded if 'rel="canonical"' not in found[1]] == []
    assert not [
        path for path in site.rglob("*.css") if re.search(r"@import[^;]*//|url\(['\"]?(https?:)?//", path.read_text())
    ]


def test_marks_of_pages_are_filled_and_docstrings_are_text(site: Path) -> None:
    page = (site / "reports.html").read_text()
    assert "It opens with what happened, in one sentence" in page  # the section of the README
    assert "made:" not in (site / "glossary.html").read_text()
    assert "SAMPLER REJECTED" in (site / "glossary.html").read_text()
    assert "benchmarks/llc_hard.json" in (site / "how_well.html").read_text()
    assert "A[q, q - p + 1]" in (site / "instruments" / "InductionHeads.html").read_text()
    for name in ("LoopMonitor", "Trajectory", "log_spaced"):
        assert f'id="{name.lower()}"' in (site / "reference" / "devmon.html").read_text()
    assert "learns induction" in (site / "demo_report.html").read_text()
    assert "<svg" in (site / "notebooks" / "demo.html").read_text()
    assert (site / "notebooks" / "demo.ipynb").is_file()
    commands = (site / "reference" / "commands.html").read_text()
    assert "devmon measure" in commands
    assert "--dry-run" in commands
