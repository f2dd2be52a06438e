"""The CUDA extension as this process finds it: built ahead of time, or just in time into the user's cache folder."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from fused_po.kernels.build import SUFFIX, BuildError, CompilerError, Recipe, Toolkit, find_sources, hash_sources

__all__ = ["build_cached", "cache_folder", "load_extension", "load_from"]

NAME = "fused_po._cuda"
# how long to wait for another process's build, and for a sign that there is one
LOCK_SECONDS = 900.0
SIGN_SECONDS = 30.0
# after this long a compiler that refused is asked again
FORGET_SECONDS = 24 * 3600.0

logger = logging.getLogger("fused_po")


def cache_folder() -> Path:
    """Where built extensions are kept: ``FUSED_PO_CACHE``, or fused_po in ``XDG_CACHE_HOME``, by default ~/.cache.

    Raises:
        BuildError: it would be in a home directory that is not there.
    """
    own = os.environ.get("FUSED_PO_CACHE")
    try:
        if own:
            return Path(own).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_po"
    except RuntimeError as error:
        raise BuildError(f"there is no place for it ({error}): set FUSED_PO_CACHE to a folder") from None


def load_extension(capabilities: Sequence[tuple[int, int]]) -> ModuleType:
    """The extension module, built first where that is needed and possible.

    Args:
        capabilities: compute capabilities of the GPUs that a build is for, such as (9, 0).

    Returns:
        the module built ahead of time, if it is there and of the sources that are there; else one of the cache.

    Raises:
        BuildError: neither can be had, with the reason in words.
    """
    missing = "it was not built ahead of time"
    if importlib.util.find_spec(NAME) is not None:
        try:
            module = importlib.import_module(NAME)
        except ImportError as error:
            raise BuildError(f"the extension can't be loaded ({error})") from None
        if not _outdated(module):
            return module
        missing = "the one built ahead of time is of other sources"
    if os.environ.get("FUSED_PO_JIT") == "0":
        raise BuildError(f"{missing}, and FUSED_PO_JIT=0 turns building it now off")
    try:
        return load_from(build_cached(_recipe(capabilities)))
    except (ImportError, OSError) as error:
        raise BuildError(f"{missing}, and building it now failed: {error}") from None
    except BuildError as error:
        raise BuildError(f"{missing}, and can't be built now: {error}") from None


def build_cached(recipe: Recipe) -> Path:
    """The module of a recipe in the cache folder, built if it is not there.

    Processes that want the same build wait for one of them. A build that fails leaves nothing behind but a compiler's
    refusal of the sources, which is told again without another try for ``FORGET_SECONDS``.

    Raises:
        BuildError: the build failed, or the folder can't be written or locked.
    """
    folder = cache_folder() / recipe.key
    module = folder / f"_cuda{SUFFIX}"
    if module.is_file():
        return module
    refusal = folder.with_suffix(".refused")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _tell_again(refusal)
        with _locked(folder):
            if module.is_file():
                return module
            _tell_again(refusal)
            names = ", ".join(f"sm_{name}" for name in recipe.architectures)
            logger.warning(
                "fused_po: compiling the CUDA kernels for %s into %s, once; FUSED_PO_JIT=0 turns this off",
                names,
                folder,
            )
            # on the same file system, so that the last step is a rename
            work = Path(tempfile.mkdtemp(prefix=f"{recipe.key}-", dir=folder.parent))
            try:
                recipe.build(work / "objects", work / "result" / module.name)
                (work / "result").rename(folder)
            except CompilerError as error:
                refusal.write_text(str(error), encoding="utf-8")
                raise
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"the cache folder {folder.parent} can't be used: {error}") from None
    return module


def _tell_again(refusal: Path) -> None:
    """Raises what the compiler said before, while that is remembered."""
    try:
        if time.time() - refusal.stat().st_mtime < FORGET_SECONDS:
            said = refusal.read_text(encoding="utf-8")
            raise CompilerError(f"{said}\n(remembered: without {refusal} it is tried again)")
    except FileNotFoundError:
        return
    refusal.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone with a build, if the file system has locks.

    Raises:
        BuildError: it has none: it says so, or it never gives one though nobody builds.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_suffix(".lock"))
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock.acquire(timeout=SIGN_SECONDS)
            break
        except NotImplementedError as error:
            raise BuildError(f"the file system of {folder.parent} has no locks ({error}): set FUSED_PO_CACHE") from None
        except Timeout:
            building = any(folder.parent.glob(f"{folder.name}-*"))
            if building and time.monotonic() < end:
                continue
            waited = "another process builds and does not end" if building else "nobody builds"
            lock_file = folder.with_suffix(".lock")
            raise BuildError(f"{lock_file} can't be locked though {waited}: set FUSED_PO_CACHE") from None
    try:
        yield
    finally:
        lock.release()


def load_from(path: Path) -> ModuleType:
    """Import the extension from a file.

    Raises:
        ImportError: it is not such a module, or of another Python.
    """
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _recipe(capabilities: Sequence[tuple[int, int]]) -> Recipe:
    sources = find_sources()
    if sources is None:
        raise BuildError("its sources are not there")
    toolkit = Toolkit.find()
    return Recipe(toolkit, toolkit.architectures_of(capabilities), sources)


def _outdated(module: ModuleType) -> bool:
    """In a checkout the sources may have moved on since ``setup.py build_ext --inplace``."""
    sources = find_sources()
    built = re.search(r"sources (\w+)", module.build_info().get("flags", ""))
    return sources is not None and built is not None and built[1] != hash_sources(sources)
