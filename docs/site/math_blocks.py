"""Set fenced blocks of the language math as MathML, which browsers draw without a script."""

import re

from latex2mathml.converter import convert

_BLOCK = re.compile(r"^```math\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"\$`([^`\n]+)`\$")


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """The hook that mkdocs.yml names: GitHub reads the same ```math and $`...`$ itself."""
    text = _BLOCK.sub(lambda found: _mathml(found[1], "block"), markdown)
    return _INLINE.sub(lambda found: _mathml(found[1], "inline"), text)


def _mathml(latex: str, display: str) -> str:
    # The converter knows align*, and sets no space behind a logarithm. The span keeps Markdown from
    # reading a line that begins with mathematics as a block.
    latex = latex.strip().replace("{aligned}", "{align*}").replace(r"\log ", r"\log\, ")
    mathml = convert(latex, display=display).replace("\n", " ")
    return mathml if display == "block" else f"<span>{mathml}</span>"
