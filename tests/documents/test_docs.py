"""The pages of the documentation stay true: their code runs, their commands parse, they build."""

import ast
import inspect
import re
import subprocess
import sys

import pytest

import lpa_jax
from lpa_jax import penalties, perturbations
from tests.helpers import commands
from tests.helpers.paths import DOCS, ROOT

CONFIG = DOCS / "site" / "mkdocs.yml"
PAGES = [pytest.param(path, id=path.stem) for path in sorted(DOCS.glob("*.md"))]
NAMED = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("results/**/README.md"))]
NAMED = [*NAMED, ROOT / "CONTRIBUTING.md"]


def blocks(path, language):
    """The fenced blocks of a page in one language."""
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def registries(monkeypatch):
    """The registries, restored after a test."""
    for package in (perturbations, penalties):
        registry = package.base._REGISTRY
        monkeypatch.setattr(registry, "factories", dict(registry.factories))


def with_python():
    """The pages with Python. Some are quick; -m slow runs the others, seconds each."""
    quick = ("index", "datasets", "paper", "your_own_perturbation")
    for page in PAGES:
        (path,) = page.values
        if blocks(path, "python"):
            marks = () if path.stem in quick else pytest.mark.slow
            yield pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", list(with_python()))
def test_all_python_of_a_page_runs_in_one_go(path, registries):
    namespace = {"__name__": path.stem}
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec"), namespace)


@pytest.mark.parametrize("path", PAGES)
def test_every_command_of_a_page_has_flags_that_exist(path, tmp_path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ").replace(" ...\n", "\n")
    for command in re.findall(r"^ *((?:\w+=\S+ )*python -m experiments\..*)$", text, re.MULTILINE):
        commands.check(command, tmp_path)


@pytest.mark.parametrize("path", NAMED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_that_a_page_names_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    for module in re.findall(r"python -m experiments\.(\w+)", text):
        assert module == "NAME" or (ROOT / "experiments" / f"{module}.py").exists(), module
    for name in re.findall(r"`((?:docs|experiments|lpa_jax|results|tests)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", NAMED, ids=lambda path: str(path.relative_to(ROOT)))
def test_headings_that_a_page_links_to_exist(path):
    text = path.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", text):
        page = path.parent / target if target else path
        titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert heading in slugs, (target, heading)


def test_the_comparison_with_the_paper_names_the_defaults_of_lpa():
    text = (DOCS / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]* \| `(\w+)` \| (`\"\w+\"`|[\d.]+)", text, re.MULTILINE)
    stated = {option: ast.literal_eval(default.strip("`")) for option, default in rows}
    signature = inspect.signature(lpa_jax.lpa).parameters
    assert stated == {option: signature[option].default for option in stated}
    assert {"radius", "negative_scale", "mode", "scale"} <= set(stated)


def test_every_test_that_the_reliability_page_names_exists():
    table = (
        (DOCS / "reliability.md").read_text(encoding="utf-8").split("## Which test shows what")[1]
    )
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    defined = re.findall(r"^def (test_\w+)", "\n".join(sources), re.MULTILINE)
    named = re.findall(r"`([a-z]+(?:_[a-z]+)+)`", table)
    assert len(named) > 15
    for name in named:
        assert name == "domain_generalization" or any(name in test for test in defined), name


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ +- .*: (\w+\.md)$", CONFIG.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


def test_every_public_name_has_a_place_in_the_reference():
    import lpa_jax

    named = re.findall(r"^::: (lpa_jax[\w.]*)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    for name in lpa_jax.__all__:
        value = getattr(lpa_jax, name)
        place = getattr(value, "__module__", None) or value.__name__
        assert any(
            page in (f"lpa_jax.{name}", place) or page.startswith(f"{place}.") for page in named
        ), name


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    for package in ("mkdocs", "mkdocstrings", "material", "latex2mathml"):
        pytest.importorskip(package, reason=f"{package} is in the extra docs")
    build = ["-m", "mkdocs", "build", "--strict", "-f", CONFIG, "-d", tmp_path / "site"]
    done = subprocess.run(
        [sys.executable, *build], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="lpa_jax.class_perturbation"' in reference
    first = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "<math" in first and "$`" not in first and "```math" not in first
    loaded = re.findall(r"""<(?:script|link|img)[^>]* (?:src|href)=["']?(https?:[^"' >]*)""", first)
    assert loaded == [], "a page loads nothing from elsewhere"
