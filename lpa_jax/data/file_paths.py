"""From paths as people write them to files on disk, checked without opening them."""

import functools
import os
import unicodedata
from collections.abc import Callable, Sequence


def resolve(paths: Sequence[str], root: str, named: Callable[[int], str]) -> tuple[str, ...]:
    """The paths of files within a folder, as the folders spell them.

    Understands `./`, `//`, absolute paths below the root, Windows separators and names in another
    Unicode form. Each folder is listed once: half a million single look-ups take minutes on a
    network disk.

    Args:
      paths: As people wrote them, [N].
      root: The folder that holds all files.
      named: The number of a path -> what errors call it.

    Returns:
      Paths relative to the root with / between folders, [N].

    Raises:
      ValueError: There is no such root, a path leads out of it, or files are missing.
    """
    given, root = root, os.path.realpath(root)
    if not os.path.isdir(root):
        raise ValueError(f"root must be a folder, got {given!r}")
    listings: dict[str, dict[str, bool]] = {}
    forms = functools.cache(_by_normal_form)

    def is_there(index: int, path: str) -> bool:
        folder, _, file = path.rpartition("/")
        if folder not in listings:
            listings[folder] = _listing(root, folder, named(index), given)
        is_link = listings[folder].get(file)
        if is_link:
            target = os.path.join(root, path)
            _check_within(root, target, named(index), given)
            return os.path.isfile(target)
        return is_link is not None

    found, missing = [], []
    for index, written in enumerate(paths):
        path = _inner(written, (root, os.path.abspath(given)))
        if path is None:
            raise ValueError(f"{named(index)}: must be a path within {given!r}")
        if not is_there(index, path):
            path = _spelt_otherwise(path, root, forms)
        if path is None or not is_there(index, path):
            missing.append(index)
        elif not _is_utf8(path):
            raise ValueError(f"{named(index)}: must have a name in UTF-8")
        else:
            found.append(path)
    if missing:
        raise ValueError(
            f"{named(missing[0])}: no such file in {given!r} "
            f"({len(missing)} of {len(paths)} files are missing)"
        )
    return tuple(found)


def _inner(path: str, roots: tuple[str, ...]) -> str | None:
    """A path relative to the root without `.` and empty parts; None if it leads out of the root."""
    for root in roots:
        path = path.removeprefix(root.rstrip("/") + "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in path or os.path.isabs(path):
        return None
    return "/".join(parts)


def _spelt_otherwise(path: str, root: str, forms: Callable[[str], dict[str, str]]) -> str | None:
    """The path with / for Windows separators and each name in the Unicode form of its folder."""
    path = _inner(path.replace("\\", "/"), ())
    if path is None or path.isascii():
        return path
    names: list[str] = []
    for part in path.split("/"):
        name = forms(os.path.join(root, *names)).get(unicodedata.normalize("NFC", part))
        if name is None:
            return None
        names.append(name)
    return "/".join(names)


def _by_normal_form(folder: str) -> dict[str, str]:
    try:
        return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder)}
    except OSError:
        return {}


def _is_utf8(text: str) -> bool:
    """Whether a name can be written in UTF-8, as results and logs are."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listing(root: str, folder: str, name: str, given: str) -> dict[str, bool]:
    """The files of a folder: {name: whether it is a link}; none if there is no such folder."""
    place = os.path.join(root, folder)
    _check_within(root, place, name, given)
    try:
        with os.scandir(place) as entries:
            return {
                entry.name: entry.is_symlink()
                for entry in entries
                if entry.is_symlink() or entry.is_file()
            }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"folder {place!r}: cannot be read ({error.strerror})") from None


def _check_within(root: str, place: str, name: str, given: str) -> None:
    target = os.path.realpath(place)
    if os.path.commonpath([root, target]) != root:
        raise ValueError(f"{name}: leads through a link out of {given!r} to {target!r}")
