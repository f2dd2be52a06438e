"""Builds the CUDA extension from ``csrc``: one recipe for ``setup.py``, the just-in-time build and the tests.

Host side only. It imports the standard library alone, so that ``setup.py`` can load this file by its path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

__all__ = [
    "SUFFIX",
    "BuildError",
    "CompilerError",
    "Recipe",
    "Toolkit",
    "ahead_of_time",
    "find_nvcc",
    "find_sources",
    "hash_sources",
    "parse_architectures",
]

# of an extension module for this interpreter
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
# Ampere, Hopper, Blackwell of data centres and of workstations, and whatever comes after them
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
# the kernels use instructions from here on
OLDEST = 80
# nvcc itself reads these
ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")


class BuildError(RuntimeError):
    """Why the extension can't be built, in words."""


class CompilerError(BuildError):
    """The compiler refuses the sources: it will do so again."""


def find_nvcc() -> Path | None:
    """The CUDA compiler: of ``CUDA_HOME``, on ``PATH``, in the nvidia packages of pip, or in /usr/local/cuda."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [Path(home) / "bin" / "nvcc" for home in homes]
    on_path = shutil.which("nvcc")
    found += [Path(on_path)] if on_path else []
    # pip's nvidia-cuda-nvcc of CUDA 13 lies in nvidia/cu13, headers and libraries beside it
    folders = [Path(entry) / "nvidia" for entry in sys.path if entry]
    found += [path for folder in folders for path in sorted(folder.glob("cu[0-9]*/bin/nvcc"), reverse=True)]
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in found if path.is_file() and os.access(path, os.X_OK)), None)


def find_sources() -> Path | None:
    """The folder ``csrc``: inside the package as installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "csrc", package.parent / "csrc")
    return next((folder for folder in folders if (folder / "bindings.cpp").is_file()), None)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler.

    Attributes:
        nvcc: the program.
        version: for example "13.0.88".
        codes: the GPU architectures that it knows, "80", "90" and so on, without their variants such as "90a".
    """

    nvcc: Path
    version: str
    codes: tuple[str, ...]

    @classmethod
    def find(cls) -> Toolkit:
        """The compiler of this machine.

        Raises:
            BuildError: there is none, or it does not answer.
        """
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("nvcc was not found: not in CUDA_HOME, on PATH, in pip's nvidia packages, /usr/local/cuda")
        version = re.search(r"V(\d+\.\d+\.\d+)", _answer(nvcc, "--version"))
        codes = re.findall(r"^sm_(\d+)$", _answer(nvcc, "--list-gpu-code"), re.MULTILINE)
        if version is None or not codes:
            raise BuildError(f"{nvcc} does not tell its version and architectures")
        return cls(nvcc, version[1], tuple(codes))

    def architectures(self, text: str | None = None) -> tuple[str, ...]:
        """What ``TORCH_CUDA_ARCH_LIST`` asks for, as "80", "90a" or "120+PTX".

        Args:
            text: "8.0;9.0+PTX", also with commas or spaces; None or empty takes the default, as far as this nvcc knows
                it. Architectures older than sm_80 are left out, since such lists serve other packages too.

        Raises:
            BuildError: not such a list, or nothing in it that this nvcc and the kernels can do.
        """
        wanted = parse_architectures(text or DEFAULT_ARCHITECTURES)
        wanted = [name for name in wanted if _number(name) >= OLDEST]
        if not text:
            known = [name for name in wanted if str(_number(name)) in self.codes]
            # an older nvcc leaves the last out, and with it the code for what comes after
            wanted = [*known[:-1], known[-1].removesuffix("+PTX") + "+PTX"] if known else []
        unknown = [name for name in wanted if str(_number(name)) not in self.codes]
        if unknown:
            raise BuildError(f"nvcc {self.version} does not know sm_{', sm_'.join(unknown)} of {text!r}")
        if not wanted:
            raise BuildError(f"no architecture from sm_{OLDEST} on in {text!r} that nvcc {self.version} knows")
        return tuple(wanted)

    def architectures_of(self, capabilities: Iterable[tuple[int, int]]) -> tuple[str, ...]:
        """What GPUs of these compute capabilities need: their own code, or PTX of the newest that this nvcc knows.

        Raises:
            BuildError: none of them is sm_80 or newer.
        """
        plain = sorted({int(code) for code in self.codes})
        needed: set[str] = set()
        for wanted in sorted({10 * major + minor for major, minor in capabilities}):
            older = [code for code in plain if OLDEST <= code <= wanted]
            if older:
                needed.add(str(wanted) if older[-1] == wanted else f"{older[-1]}+PTX")
        if not needed:
            raise BuildError(f"no GPU here from sm_{OLDEST} on that nvcc {self.version} knows")
        return tuple(sorted(needed, key=_number))


def hash_sources(folder: Path) -> str:
    """Of the names and contents of all sources."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in {".cu", ".cuh", ".cpp", ".h", ".hpp"}):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()[:16]


def parse_architectures(text: str) -> list[str]:
    """ "8.0;9.0a 12.0+PTX" as ["80", "90a", "120+PTX"], sorted, each once.

    Raises:
        BuildError: anything else.
    """
    names = set()
    for item in re.split(r"[;,\s]+", text.strip("; ,\t\n")):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if found is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={text!r}: {item!r} is not of the form 8.0, 9.0a or 9.0+PTX")
        names.add("".join(part or "" for part in found.groups()))
    # 9.0+PTX holds 9.0
    return sorted((name for name in names if f"{name}+PTX" not in names), key=_number)


@dataclass(frozen=True)
class Recipe:
    """What to build, and how.

    Attributes:
        toolkit: the compiler.
        architectures: as ``Toolkit.architectures`` gives them.
        sources: the folder ``csrc``.
        strict: warnings are errors.
    """

    toolkit: Toolkit
    architectures: tuple[str, ...]
    sources: Path
    strict: bool = False

    @cached_property
    def source_hash(self) -> str:
        return hash_sources(self.sources)

    @property
    def flags(self) -> list[str]:
        """Of the compiler, for every file."""
        # pybind11 wants its classes hidden, and two extensions in one process must not share symbols
        flags = ["-O3", "-std=c++17", "-lineinfo", "--threads=4", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += self._targets
        if self.strict:
            flags += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Werror", "-Xptxas=-Werror"]
        # what ``build_info`` of the module answers
        told = " ".join([f"architectures {','.join(self.architectures)}", f"sources {self.source_hash}", *flags])
        return [*flags, f'-DFUSED_PO_FLAGS="{told}"']

    @property
    def _targets(self) -> list[str]:
        """Machine code of each architecture, and PTX where asked."""
        targets = []
        for name in self.architectures:
            code = name.removesuffix("+PTX")
            targets.append(f"-gencode=arch=compute_{code},code=sm_{code}")
            if name.endswith("+PTX"):
                targets.append(f"-gencode=arch=compute_{code},code=compute_{code}")
        return targets

    @property
    def key(self) -> str:
        """Changes with everything that the result depends on."""
        surroundings = [os.environ.get(name, "") for name in ENVIRONMENT]
        parts = [self.toolkit.version, SUFFIX, metadata.version("pybind11"), *self.flags, *surroundings]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def build(self, folder: Path, target: Path) -> None:
        """Compile and link the extension.

        Args:
            folder: for object files; what is up to date there is not compiled again.
            target: the module to write, whose name ends in ``SUFFIX``.

        Raises:
            BuildError: a tool or a header is missing, or the compiler fails, with its words.
            CompilerError: it refuses the sources.
        """
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self._ninja_file(target.resolve()), encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        call = [str(_find_ninja()), "-C", str(folder), *jobs]
        try:
            run = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        except OSError as error:
            raise BuildError(f"ninja does not run: {error}") from None
        if run.returncode:
            kind = CompilerError if _refuses(run.stdout) else BuildError
            raise kind(f"nvcc {self.toolkit.version} failed: {_gist(run.stdout)}")

    def _ninja_file(self, target: Path) -> str:
        includes = [part for folder in _include_folders() for part in ("-isystem", folder)]
        # pip's toolkit keeps its libraries in lib, where nvcc itself looks in lib64 alone
        libraries = f"-L{self.toolkit.nvcc.parent.parent / 'lib'}"
        lines = [
            f"nvcc = {_quoted([str(self.toolkit.nvcc)])}",
            f"flags = {_quoted([*self.flags, *includes])}",
            "rule compile",
            "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            # the CUDA runtime goes in: the module then needs no other library than the driver's
            f"  command = $nvcc -shared -cudart=static {_quoted([*self._targets, libraries])} $in -o $out",
        ]
        sources = sorted(path for path in self.sources.resolve().iterdir() if path.suffix in {".cu", ".cpp"})
        objects = [f"{path.name}.o" for path in sources]
        lines += [f"build {name}: compile {_path(path)}" for name, path in zip(objects, sources, strict=True)]
        return "\n".join([*lines, f"build {_path(target)}: link {' '.join(objects)}", ""])


def ahead_of_time(request: str | None, editable: bool) -> tuple[Recipe | None, str]:
    """What ``setup.py`` is to do.

    Args:
        request: ``FUSED_PO_BUILD_CUDA``; unset builds if nvcc is found, "1" always builds, "0" never does.
        editable: an editable install leaves the extension to the first use, unless asked.

    Returns:
        the recipe, or None, and a line that says what happens.

    Raises:
        BuildError: "1" without the tools, or a value that is neither.
    """
    if request not in (None, "", "0", "1"):
        raise BuildError(f"FUSED_PO_BUILD_CUDA={request!r}: expected 1, 0 or nothing")
    if request == "0":
        return None, "without the CUDA extension: FUSED_PO_BUILD_CUDA=0"
    if editable and request != "1":
        return None, "without the CUDA extension: an editable install builds it at its first use on a GPU"
    try:
        toolkit = Toolkit.find()
        sources = find_sources()
        if sources is None:
            raise BuildError("csrc is not there")
        _find_ninja()
        _include_folders()
        recipe = Recipe(toolkit, toolkit.architectures(os.environ.get("TORCH_CUDA_ARCH_LIST")), sources)
    except BuildError as error:
        if request == "1":
            raise
        return None, f"without the CUDA extension: {error}"
    return recipe, f"with the CUDA extension: nvcc {toolkit.version}, sm_{', sm_'.join(recipe.architectures)}"


def _answer(nvcc: Path, question: str) -> str:
    try:
        run = subprocess.run([nvcc, question], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from None
    return run.stdout


def _number(architecture: str) -> int:
    found = re.match(r"\d+", architecture)
    assert found, architecture
    return int(found[0])


def _find_ninja() -> Path:
    # beside the interpreter of an environment that is not activated, too
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    found = shutil.which("ninja", path=folders)
    if found is None:
        raise BuildError("ninja is not installed (pip install ninja)")
    return Path(found)


def _include_folders() -> list[str]:
    """Headers of Python and pybind11."""
    python = sysconfig.get_path("include")
    if not (Path(python) / "Python.h").is_file():
        raise BuildError(f"Python's headers are not installed: no Python.h in {python} (python3-dev)")
    found = importlib.util.find_spec("pybind11")
    if found is None or found.origin is None:
        raise BuildError("pybind11 is not installed (pip install pybind11)")
    return [python, str(Path(found.origin).parent / "include")]


def _refuses(log: str) -> bool:
    """Whether a log tells of the sources, and not of a full disk or of a process that was ended."""
    passing = (
        r"no space left|cannot allocate|out of memory|killed|terminated|quota|input/output error"
        # a library of the toolkit that is not installed
        r"|cannot find -l"
    )
    return re.search(r"\berror\b", log, re.IGNORECASE) is not None and not re.search(passing, log, re.IGNORECASE)


def _gist(log: str) -> str:
    """The compiler's own words out of a log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal|cannot find)\b", line, re.IGNORECASE)]
    return "\n".join(errors[:6] or lines[-6:])


def _quoted(arguments: Sequence[str]) -> str:
    """For a shell command in a ninja file."""
    return shlex.join(arguments).replace("$", "$$")


def _path(path: Path) -> str:
    """For a build statement in a ninja file."""
    return re.sub(r"([$: ])", r"$\1", str(path))
