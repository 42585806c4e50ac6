"""Where numbers were made: versions, system, and the revision of this project."""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess

SOURCES = ("experiments", "lpa_jax")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "tensorflow-datasets")


@functools.cache
def environment() -> dict[str, str]:
    """Versions of what matters, and the git revision of this project, as the process began."""
    versions = {"git revision": git_revision(), "Python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions | {"system": platform.platform()}


def git_revision() -> str:
    """Commit of the project's folder, marked if files differ from it; unknown without git."""
    folder = pathlib.Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603 (no shell, no argument from outside)
            ["git", "-C", folder, *arguments],  # noqa: S607 (git where the user has it)
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
        return git("rev-parse", "HEAD") + (", files changed since" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
