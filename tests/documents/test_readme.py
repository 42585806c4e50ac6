"""The README's code runs as it stands, and its commands are those that CI uses."""

import pathlib
import re

import lpa_jax

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 5
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["delta"].shape == (4, 32)
    assert "sign_flip" in lpa_jax.perturbations.names()
    lpa_jax.perturbations.base._REGISTRY.factories.pop("sign_flip")


def test_the_test_command_is_the_one_ci_extracts():
    after_marker = README.split("<!-- test-command -->\n```sh\n")[1]
    command = after_marker.splitlines()[0]
    assert command.startswith("python3 -m venv")
    assert command.endswith("-m pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_file_and_module_that_the_readme_names_exists():
    for path in re.findall(r"`((?:lpa_jax|experiments)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m experiments\.(\w+)", README):
        assert (ROOT / "experiments" / f"{module}.py").exists(), module
