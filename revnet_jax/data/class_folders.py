"""Finds the image files of each class; every file belongs to exactly one class of one split."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from revnet_jax.data.dataset import DataError, shorten
from revnet_jax.data.image_file import SUFFIXES


def find_images(split_dirs: Sequence[Path]) -> list[dict[str, list[str]]]:
    """Returns for every split a dictionary from class name, in sorted order, to sorted image paths.

    A class is a folder in a split's folder. The first split must have all classes; the others may
    lack some. Images are found at any depth; names that start with "." are skipped. Every folder is
    visited once, under its own name.

    A split's folder, a class folder and an image may be symbolic links. No file may be reachable
    as two classes or splits: inside a class folder, a link to another folder must stay in that
    class (its images are found without the link), and no link may lead to a folder that contains
    it. Copies and hard links are not detected.

    Raises:
      DataError: a link leads outside its class, a file with an image suffix is not a regular file,
        a folder has no images, or the first split lacks a class. The message names the path.
    """
    _check_apart(split_dirs)
    classes = [_classes(split_dir) for split_dir in split_dirs]
    _check_known(split_dirs, classes)
    search = _Search([os.path.realpath(split_dir) for split_dir in split_dirs])
    found = [
        {name: search.images(os.path.join(split_dir, name)) for name in names}
        for split_dir, names in zip(split_dirs, classes, strict=True)
    ]
    search.check_linked_images()
    return found


def _check_apart(split_dirs: Sequence[Path]) -> None:
    # In both orders, because either folder may be the link. If neither is, they lie side by side.
    for one, other in itertools.permutations(split_dirs, 2):
        real, real_other = os.path.realpath(one), os.path.realpath(other)
        if os.path.islink(one) and (_is_in(real, real_other) or _is_in(real_other, real)):
            raise _astray(str(one), real, f"is {other}, holds it, or is in it")


def _classes(split_dir: Path) -> list[str]:
    with os.scandir(split_dir) as entries:
        visible = sorted(entries, key=lambda entry: entry.name)
    visible = [entry for entry in visible if not entry.name.startswith(".")]
    # Before `is_dir`, which is False for a broken link: its class would be passed over.
    for entry in visible:
        _check_leads_somewhere(entry)
    names = [entry.name for entry in visible if entry.is_dir()]
    if not names:
        raise DataError(
            f"{split_dir}: got no class folders, expected one folder of images a class; check dir"
        )
    return names


def _check_known(split_dirs: Sequence[Path], classes: Sequence[Sequence[str]]) -> None:
    for split_dir, names in zip(split_dirs, classes, strict=True):
        unknown = sorted(set(names) - set(classes[0]))
        if unknown:
            raise DataError(
                f"{split_dir / unknown[0]} is a class without training images: expected the "
                f"folders of {split_dirs[0]} ({shorten(classes[0])}); rename it or add training "
                "images"
            )


class _Search:
    """Searches class folders, and remembers which class each folder and linked image belongs to."""

    def __init__(self, real_splits: list[str]):
        self._real_splits = real_splits
        self._owners: dict[str, str] = {}  # real path of a folder or linked image -> class folder
        self._linked_images: list[tuple[str, str]] = []  # (link, class folder)

    def images(self, class_dir: str) -> list[str]:
        """Returns the sorted paths of the images in a class folder."""
        root = os.path.realpath(class_dir)
        # A linked class may lie anywhere but where a search of its folder would meet another class,
        # or where a search of another class would meet it.
        if os.path.islink(class_dir):
            for real_split in self._real_splits:
                if _is_in(root, real_split) or _is_in(real_split, root):
                    raise _astray(class_dir, root, "holds other classes or belongs to one")
        images: list[str] = []
        linked_folders: list[str] = []
        pending = [(class_dir, root)]
        while pending:
            folder, real = pending.pop()
            # Two classes that link to one folder, or to a folder and one inside it, meet here.
            owner = self._owners.setdefault(real, class_dir)
            if owner != class_dir:
                raise _astray(class_dir, real, f"is in {owner} too")
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    _check_leads_somewhere(entry)
                    if not entry.is_dir():
                        if entry.name.lower().endswith(SUFFIXES):
                            images.append(self._image(entry, class_dir))
                    # Not followed: it must lead into this class, where its images are found anyway.
                    elif entry.is_symlink():
                        linked_folders.append(entry.path)
                    else:
                        # No link, so the real path is that of its parent with its name.
                        pending.append((entry.path, os.path.join(real, entry.name)))
        for link in linked_folders:
            self._check_linked_folder(link, class_dir)
        if not images:
            raise DataError(
                f"{class_dir}: got no images, expected files ending in {', '.join(SUFFIXES)}; "
                "add images or remove the folder"
            )
        # scandir has no defined order, and a resumed run has to read the images in the same one.
        return sorted(images)

    def _image(self, entry: os.DirEntry[str], class_dir: str) -> str:
        if not entry.is_file():
            raise DataError(
                f"{entry.path}: got a pipe, socket or device, expected an image file; remove it"
            )
        if entry.is_symlink():
            self._linked_images.append((entry.path, class_dir))
        return entry.path

    def _check_linked_folder(self, link: str, class_dir: str) -> None:
        """Raises DataError if a linked folder is outside of its class.

        Runs after the search, when all folders of the class have been visited by their own names.
        """
        target = os.path.realpath(link)
        if _is_in(os.path.realpath(os.path.dirname(link)), target):
            raise _astray(link, target, "holds the link")
        if self._owners.get(target) != class_dir:
            raise _astray(link, target, f"is not searched for {class_dir}")

    def check_linked_images(self) -> None:
        """Raises DataError if a linked image belongs to another class.

        Runs after all classes, because a link may lead into one that is searched later.
        """
        for link, class_dir in self._linked_images:
            target = os.path.realpath(link)
            # The class of the folder that the image lies in, or else the first class that links to
            # it.
            owner = self._owners.get(os.path.dirname(target))
            owner = owner or self._owners.setdefault(target, class_dir)
            if owner != class_dir:
                raise _astray(link, target, f"is an image of {owner}")


def _check_leads_somewhere(entry: os.DirEntry[str]) -> None:
    # `exists` follows links: it is False for a missing target, and for links in a circle.
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise DataError(
            f"{entry.path}: got a link to {os.readlink(entry.path)}, which does not exist or leads "
            "back to the link; mend or remove it"
        )


def _is_in(real: str, folder: str) -> bool:
    # With a separator at the end, so that /data/cats2 is not in /data/cats.
    return os.path.join(real, "").startswith(os.path.join(folder, ""))


def _astray(link: str, target: str, why: str) -> DataError:
    return DataError(
        f"{link}: got a link to {target}, which {why}; expected every image in one class of one "
        "split; remove the link, or put a copy of what is meant in its place"
    )
