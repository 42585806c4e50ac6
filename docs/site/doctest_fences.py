"""Put doctests of docstrings in fences: Markdown would read `>>>` as a quotation."""

import re

import griffe

# A doctest ends at the next blank line.
_DOCTEST = re.compile(r"^([ \t]*)>>> .*(?:\n[ \t]*\S.*)*", flags=re.MULTILINE)


class DoctestFences(griffe.Extension):
    """The griffe extension that mkdocs.yml names."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the docstring of an object when it is read."""
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
