"""Builds the C++ core, ``fastmeta._core``; everything else stands in pyproject.toml.

The core needs no torch: pybind11 over raw pointers. Every unit in ``csrc/isa/`` is compiled for
its own instruction set and chosen at run time, so one build serves every processor.

No compiler: a pure-Python install, which says so when it is first used. A compiler that fails:
the build fails. What may be set in the environment:

    CXX, CXXFLAGS, LDFLAGS  as everywhere
    MAX_JOBS                how many compilers run at once
    FASTMETA_WERROR=1       warnings are errors, as in CI
    FASTMETA_SANITIZE=...   "address,undefined" or "thread" (built on std::thread, because the
                            thread sanitizer cannot see through OpenMP's barriers)
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
COMMON = [
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
ISA_FLAGS: dict[str, list[str]] = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [*AVX512, "-mfma", "-mprefer-vector-width=512"],
}
X86 = ("x86_64", "amd64")
Units = dict[Path, tuple[Path, list[str]]]  # source -> object, and the flags of its own
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None where there is none."""
    chosen = os.environ.get("CXX")
    known = [sysconfig.get_config_var("CXX") or "c++", "c++", "g++", "clang++"]
    for name in [chosen] if chosen else known:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    return None


def run(command: list[str]) -> None:
    """Runs one compiler command; a failure ends the build and shows what the compiler said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode:
        raise CompileError(f"exit status {done.returncode} of: {shlex.join(command)}")


class Toolchain:
    """One compiler, what it targets and can do, and the flags that follow."""

    def __init__(self, cxx: list[str]) -> None:
        self.cxx = cxx
        self.sanitizers = os.environ.get("FASTMETA_SANITIZE", "")
        self.x86 = self._target().split("-")[0].lower() in X86
        self.threads = self._thread_flags()

    def _target(self) -> str:
        done = subprocess.run([*self.cxx, "-dumpmachine"], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{shlex.join(self.cxx)} -dumpmachine failed:\n{done.stderr}")
        return done.stdout.strip()

    def _thread_flags(self) -> list[str]:
        """OpenMP, so that torch.set_num_threads governs the core; else std::thread."""
        standard = ["-pthread", "-fopenmp-simd", "-DFASTMETA_STD_THREADS"]
        if "thread" in self.sanitizers.split(","):
            return standard
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(OPENMP_PROBE)
            command = [*self.cxx, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return ["-fopenmp"]
        print("fastmeta: this compiler has no OpenMP; the core is built on std::thread")
        return standard

    def _sanitize_flags(self) -> list[str]:
        if not self.sanitizers:
            return []
        return [f"-fsanitize={self.sanitizers}", "-fno-sanitize-recover=all"]

    def compile_flags(self) -> list[str]:
        import pybind11

        flags = [*COMMON, *self.threads]
        flags += ["-O1", "-g", "-fno-omit-frame-pointer"] if self.sanitizers else ["-O3"]
        flags += self._sanitize_flags()
        if self.x86:
            flags.append("-DFASTMETA_X86=1")
        if os.environ.get("FASTMETA_WERROR", "0") not in ("", "0"):
            flags.append("-Werror")
        paths = sysconfig.get_paths()
        system = dict.fromkeys([pybind11.get_include(), paths["include"], paths["platinclude"]])
        flags += [f"-I{CSRC}", *(f"-isystem{path}" for path in system)]
        return flags + shlex.split(os.environ.get("CXXFLAGS", ""))

    def link_flags(self) -> list[str]:
        shared = ["-shared"]
        if sys.platform == "darwin":
            shared = ["-bundle", "-undefined", "dynamic_lookup"]
        flags = [*shared, *self.threads, *self._sanitize_flags()]
        return flags + shlex.split(os.environ.get("LDFLAGS", ""))

    def sources(self) -> dict[Path, list[str]]:
        """Every unit, and the flags of its own."""
        plain = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("ops/*.cpp")])
        if CSRC / "module.cpp" not in plain:
            raise CompileError(f"{CSRC / 'module.cpp'} is missing: is this the whole source?")
        isas = ISA_FLAGS if self.x86 else {"baseline": ISA_FLAGS["baseline"]}
        units = {CSRC / "isa" / f"{isa}.cpp": flags for isa, flags in isas.items()}
        return {source: [] for source in plain} | units


def find_ninja() -> str | None:
    """The ninja of the build environment, or of the machine."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=ninja.BIN_DIR)


def ninja_script(tools: Toolchain, units: Units, folder: Path, output: Path) -> str:
    """The build as ninja reads it: headers come from depfiles, changed flags rebuild."""

    def path(value: Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def words(values: list[str]) -> str:
        return shlex.join(values).replace("$", "$$")

    lines = [
        f"builddir = {path(folder)}",
        f"cxx = {words(tools.cxx)}",
        f"flags = {words(tools.compile_flags())}",
        f"link_flags = {words(tools.link_flags())}",
        "rule compile",
        "  command = $cxx $flags $own -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $link_flags -o $out",
    ]
    for source, (target, flags) in units.items():
        lines += [f"build {path(target)}: compile {path(source)}", f"  own = {words(flags)}"]
    targets = " ".join(path(target) for target, _ in units.values())
    return "\n".join([*lines, f"build {path(output)}: link {targets}", ""])


def compile_all(tools: Toolchain, units: Units, output: Path, jobs: int) -> None:
    """The same without ninja: every unit, every time."""
    compiler = [*tools.cxx, *tools.compile_flags()]
    commands = [
        [*compiler, *flags, "-c", str(source), "-o", str(target)]
        for source, (target, flags) in units.items()
    ]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))
    targets = [str(target) for target, _ in units.values()]
    run([*tools.cxx, *targets, *tools.link_flags(), "-o", str(output)])


class BuildCore(build_ext):
    """Compiles the units in parallel, each with its own flags, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        tools = Toolchain(find_compiler() or [])
        # A folder of its own for each kind of build; absolute, as ninja's log names it.
        suffix = "-" + tools.sanitizers.replace(",", "-") if tools.sanitizers else ""
        folder = Path(self.build_temp + suffix).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        units = {
            source: (folder / source.with_suffix(".o"), flags)
            for source, flags in tools.sources().items()
        }
        for target in [output, *(target for target, _ in units.values())]:
            target.parent.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS", "")
        if ninja := find_ninja():
            script = folder / "build.ninja"
            script.write_text(ninja_script(tools, units, folder, output))
            run([ninja, "-f", str(script), *(["-j", jobs] if jobs else [])])
        else:
            compile_all(tools, units, output, int(jobs or os.cpu_count() or 1))


def core() -> list[Extension]:
    """The extension, or nothing (so that the wheel is a pure one) where there is no compiler."""
    if find_compiler() is None:
        print("fastmeta: no C++ compiler was found; installing without the C++ core")
        return []
    return [Extension("fastmeta._core", sources=[])]


def packages() -> list[str]:
    """fastmeta and, from the top-level folder, fastmeta.kernels; no other top-level package."""
    own = find_packages(include=["fastmeta", "fastmeta.*"], exclude=["fastmeta.kernels*"])
    return [*own, *(f"fastmeta.{name}" for name in find_packages(include=["kernels*"]))]


setup(packages=packages(), ext_modules=core(), cmdclass={"build_ext": BuildCore})
