"""The image sets of DomainBed, in its folder layout `SET/DOMAIN/CLASS/IMAGE`."""

import os
from typing import NamedTuple

from lpa_jax.data.image_files import EXTENSIONS, ImageFiles, open_image_files


class FolderSet(NamedTuple):
    """A set as DomainBed's download script leaves it.

    Attributes:
      folder: Its name within the data folder.
      domains: The domains' folders, in DomainBed's order.
      num_classes: C.
    """

    folder: str
    domains: tuple[str, ...]
    num_classes: int


FOLDER_SETS = {
    "VLCS": FolderSet("VLCS", ("Caltech101", "LabelMe", "SUN09", "VOC2007"), 5),
    "PACS": FolderSet("PACS", ("art_painting", "cartoon", "photo", "sketch"), 7),
    "OfficeHome": FolderSet("office_home", ("Art", "Clipart", "Product", "Real World"), 65),
    "TerraIncognita": FolderSet(
        "terra_incognita", ("location_100", "location_38", "location_43", "location_46"), 10
    ),
    "DomainNet": FolderSet(
        "domain_net", ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), 345
    ),
    "SVIRO": FolderSet(
        "sviro",
        (
            *("aclass", "escape", "hilux", "i3", "lexus"),
            *("tesla", "tiguan", "tucson", "x5", "zoe"),
        ),
        7,
    ),
}


def open_folder_set(
    name: str, data_dir: str | os.PathLike | None, image_size: int = 224
) -> tuple[ImageFiles, ...]:
    """Opens the domains of a set; images are stretched to squares, as DomainBed does.

    The classes are the class folders in alphabetical order. Files whose names start with a dot and
    Thumbs.db, which file managers leave, are no images; neither are files beside the domains'
    folders.

    Args:
      name: One of FOLDER_SETS.
      data_dir: The folder that holds the set's folder.
      image_size: S, pixels.

    Returns:
      One `ImageFiles` a domain, in the order of FOLDER_SETS.

    Raises:
      ValueError: Naming the folder: no data_dir or set, a missing or unknown domain, a wrong number
        of classes, a class that a domain lacks or that is empty, or a file that is no image.
    """
    layout = FOLDER_SETS[name]
    if data_dir is None:
        raise ValueError(f"data_dir must be the folder that holds {layout.folder}/, got None")
    root = os.path.join(data_dir, layout.folder)
    if not os.path.isdir(root):
        raise ValueError(
            f"dataset={name!r}: no folder {root!r} "
            f"(the layout is {layout.folder}/DOMAIN/CLASS/IMAGE in data_dir)"
        )
    found = _entries(root)[0]
    unknown = sorted(set(found) - set(layout.domains))
    if unknown:
        raise ValueError(
            f"dataset={name!r}: folder {os.path.join(root, unknown[0])!r} is none of its domains "
            f"{', '.join(layout.domains)}"
        )
    for domain in layout.domains:
        if domain not in found:
            raise ValueError(f"dataset={name!r}: no domain folder {os.path.join(root, domain)!r}")
    classes = _class_names(name, root, layout)
    return tuple(_open_domain(name, root, domain, classes, image_size) for domain in layout.domains)


def _class_names(name: str, root: str, layout: FolderSet) -> list[str]:
    of_domain = {}
    for domain in layout.domains:
        place = os.path.join(root, domain)
        of_domain[domain], files = _entries(place)
        if files:
            raise ValueError(
                f"dataset={name!r}: {os.path.join(place, files[0])!r} must be in a class "
                "folder, got it beside them"
            )
    classes = sorted(set().union(*of_domain.values()))
    for domain, present in of_domain.items():
        lacking = sorted(set(classes) - set(present))
        if lacking:
            raise ValueError(
                f"dataset={name!r}: domain {os.path.join(root, domain)!r} lacks class "
                f"{lacking[0]!r}, which other domains have"
            )
    if len(classes) != layout.num_classes:
        raise ValueError(
            f"dataset={name!r}: {root!r} has {len(classes)} classes, must have {layout.num_classes}"
        )
    return classes


def _open_domain(
    name: str, root: str, domain: str, classes: list[str], image_size: int
) -> ImageFiles:
    paths, labels = [], []
    for label, class_name in enumerate(classes):
        place = os.path.join(root, domain, class_name)
        folders, files = _entries(place)
        strange = [*folders, *(f for f in files if not f.lower().endswith(EXTENSIONS))]
        if strange:
            raise ValueError(
                f"dataset={name!r}: {os.path.join(place, strange[0])!r} is no image file "
                f"({' '.join(EXTENSIONS)})"
            )
        if not files:
            raise ValueError(f"dataset={name!r}: class folder {place!r} is empty")
        paths += [f"{domain}/{class_name}/{file}" for file in files]
        labels += [label] * len(files)
    return open_image_files(
        f"{name}/{domain}",
        root,
        paths,
        labels,
        len(classes),
        class_names=classes,
        image_size=image_size,
        fit="stretch",
    )


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted."""
    try:
        with os.scandir(folder) as found:
            entries = [e for e in found if not e.name.startswith(".") and e.name != "Thumbs.db"]
    except OSError as error:
        raise ValueError(f"folder {folder!r}: cannot be read ({error.strerror})") from None
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    return folders, sorted(entry.name for entry in entries if not entry.is_dir())
