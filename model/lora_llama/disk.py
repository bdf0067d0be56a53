"""The disk operations behind a training's files: written, on disk, and only then named.

A file or directory is first made under a hidden name beside its target, then brought onto the disk
(fsync of every file and directory), then renamed: whoever looks at the target's name, also after a
crash of the process or the machine, finds what was there before or all of the new.

Every OSError names the path.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk is found in `write` or `fsync`, whose errors name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_file(path: Path, content: bytes) -> None:
    """Makes a new file, and the directories above it; it is on the disk after `sync`."""
    if not path.parent.exists():
        make_directory(path.parent)
    # "x": a link that someone put at this name is not followed.
    with _naming(path), open(path, "xb") as file:
        file.write(content)


def append_file(path: Path, content: bytes) -> None:
    """Adds to the end of a file, which is made if it is not there."""
    with _naming(path), open(path, "ab") as file:
        file.write(content)


def sync(path: Path) -> None:
    """Brings a file's content, or a directory's names, onto the disk."""
    if os.name == "nt" and path.is_dir():
        return
    with _naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot sync a directory.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Brings everything below a directory onto the disk, and then its own names."""
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            sync_tree(entry)
        else:
            sync(entry)
    sync(directory)


def make_directory(path: Path) -> None:
    """Makes a directory, and those above it; its name is on the disk."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for directory in reversed(missing):
        os.mkdir(directory)
        sync(directory.parent)


def rename(source: Path, target: Path) -> None:
    """Gives a file or directory a new name in the same directory; the name is on the disk."""
    os.rename(source, target)
    sync(target.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in place of another, or none: all of it or nothing."""
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)
    try:
        write_file(staged, content)
        sync(staged)
        os.replace(staged, path)
    except Exception:
        # A full disk gets its room back.
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_tree(path: Path) -> None:
    """Removes a directory with all that is in it, or a file; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            remove_tree(entry)
        os.rmdir(path)
    else:
        os.unlink(path)
