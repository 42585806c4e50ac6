"""Fences the doctests of docstrings, which Markdown would read as quotations and links."""

import re

import griffe

# A doctest goes on to the next blank line.
_DOCTEST = re.compile(r"^([ \t]*)>>> .*(?:\n[ \t]*\S.*)*", flags=re.MULTILINE)


class DoctestFences(griffe.Extension):
    """Used by mkdocstrings, see mkdocs.yml."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrites the docstring of every object as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
