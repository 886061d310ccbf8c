"""Build: CMake and Ninja make the core (lib/libflashmask.so), setuptools makes the Paddle op (_C.so) on top of it.

Environment variables:
  MAX_JOBS               how many compilers run at once (default: Ninja's choice)
  FLASHMASK_CUDA         1 or 0: build the CUDA kernels or not (default: if Paddle has CUDA and nvcc is found)
  FLASHMASK_CUDA_ARCHS, FLASHMASK_HEAD_DIMS, FLASHMASK_CUDA_DTYPES
                         narrow the CUDA kernels, for instance "90", "64;128" and "bf16" (custom_ops/cuda.cmake)
  FLASHMASK_CMAKE_ARGS   more arguments for CMake, split as a shell would
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "paddle_flashmask"


def find_tool(name: str, bin_dir_attribute: str) -> str:
    """Path of `name`, from the pip package of that name if there is one, else from PATH."""
    try:
        module = __import__(name)
        candidate = Path(getattr(module, bin_dir_attribute)) / name
        if candidate.exists():
            return str(candidate)
    except (ImportError, AttributeError):
        pass
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"Building paddle-flashmask needs {name}, which was not found: pip install cmake ninja")
    return found


def import_paddle():
    try:
        import paddle
    except ImportError as error:
        raise SystemExit(
            f"paddle-flashmask is built against the installed PaddlePaddle, which cannot be imported ({error}). "
            "Install it first (pip install paddlepaddle==3.3.0), then: pip install . --no-build-isolation"
        ) from error
    return paddle


def find_nvcc() -> str | None:
    """Path of nvcc: in $CUDA_HOME, on PATH, or where CUDA's installer puts it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [
        *(os.path.join(home, "bin", "nvcc") for home in homes),
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((path for path in candidates if path and os.path.exists(path)), None)


def cuda_include_dirs(nvcc: str) -> list[str]:
    """The toolkit's headers. nvcc itself is asked, for it may be a link or a script anywhere."""
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", listing, re.MULTILINE)
    if top is None:
        raise SystemExit(f"{nvcc} --dryrun does not say where its toolkit is:\n{listing}")
    include = Path(top.group(1)).resolve() / "include"
    # Paddle's headers include Thrust, which CUDA 13 keeps in a folder of its own.
    return [str(include), str(include / "cccl")]


def decide_cuda(paddle) -> tuple[str, str]:
    """The nvcc to build the CUDA kernels with, empty for none, and why."""
    asked = os.environ.get("FLASHMASK_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"FLASHMASK_CUDA must be 0 or 1; got {asked!r}")
    if asked == "0":
        return "", "FLASHMASK_CUDA=0"
    nvcc = find_nvcc()
    if paddle.is_compiled_with_cuda() and nvcc:
        return nvcc, f"PaddlePaddle is built with CUDA {paddle.version.cuda()} and nvcc is {nvcc}"
    why = (
        "nvcc was not found" if paddle.is_compiled_with_cuda() else "the installed PaddlePaddle is a build without CUDA"
    )
    if asked == "1":
        raise SystemExit(f"FLASHMASK_CUDA=1, but {why}")
    return "", why


def cache_is_good(cache: str, source_dir: Path, nvcc: str) -> bool:
    """Whether CMake would go on from the text of an earlier build's CMakeCache.txt, with `nvcc` (empty for none)."""
    if f"CMAKE_HOME_DIRECTORY:INTERNAL={source_dir}\n" not in cache:
        return False  # the tree was moved or copied: CMake would refuse its own cache
    # With another compiler CMake begins anew and forgets all options, FLASHMASK_CUDA too.
    compiler = re.search("^CMAKE_CUDA_COMPILER:[A-Z]+=(.*)$", cache, re.MULTILINE)
    return not nvcc or compiler is None or compiler[1] == nvcc


class BuildExt(build_ext):
    """Puts lib/libflashmask.so, _C.so and _build_info.py into the package (in the source tree if it is editable)."""

    def run(self) -> None:
        self.paddle = import_paddle()
        self.nvcc, why = decide_cuda(self.paddle)
        self.with_cuda = bool(self.nvcc)
        # An up-to-date _C.so may be one for another Paddle, and file dates do not tell. It compiles in seconds.
        self.force = True
        print(f"paddle-flashmask: CUDA kernels {'on' if self.with_cuda else 'off'}: {why}", flush=True)
        super().run()

    def build_extensions(self) -> None:
        self.build_core()
        self.complete_binding(self.extensions[0])
        super().build_extensions()
        self.write_build_info()

    def get_ext_filename(self, fullname: str) -> str:
        # Paddle loads the file by path. It is no Python module, so it carries no Python ABI in its name.
        return os.path.join(*fullname.split(".")) + ".so"

    def extra_outputs(self) -> list[str]:
        """Built files other than the extension, relative to the folder above the package."""
        return [f"{PACKAGE}/lib/libflashmask.so", f"{PACKAGE}/_build_info.py"]

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *(os.path.join(self.build_lib, name) for name in self.extra_outputs())]

    def get_output_mapping(self) -> dict[str, str]:
        mapping = dict(super().get_output_mapping())
        if self.inplace:
            mapping.update({os.path.join(self.build_lib, name): name for name in self.extra_outputs()})
        return mapping

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for name in self.extra_outputs():
            target = ROOT / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replaced, not written into: a process may have the old library mapped.
            target.unlink(missing_ok=True)
            shutil.copy2(os.path.join(self.build_lib, name), target)

    def build_core(self) -> None:
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        ninja = find_tool("ninja", "BIN_DIR")
        build_dir = Path(self.build_temp).resolve() / "core"
        cache = build_dir / "CMakeCache.txt"
        source_dir = ROOT / "custom_ops"
        if cache.exists() and not cache_is_good(cache.read_text(), source_dir, self.nvcc):
            shutil.rmtree(build_dir)
        build_dir.mkdir(parents=True, exist_ok=True)
        cuda_compiler = [f"-DCMAKE_CUDA_COMPILER={self.nvcc}"] if self.with_cuda else []
        configure = [
            cmake,
            "-S",
            str(source_dir),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DFLASHMASK_CUDA={'ON' if self.with_cuda else 'OFF'}",
            *cuda_compiler,
            *shlex.split(os.environ.get("FLASHMASK_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", "")
        build = [cmake, "--build", str(build_dir), *(["--parallel", jobs] if jobs else [])]
        for command in (configure, build):
            print(shlex.join(command), flush=True)
            result = subprocess.run(command)
            if result.returncode != 0:
                raise SystemExit(f"Building the core failed with status {result.returncode}: {shlex.join(command)}")
            if self.with_cuda and "FLASHMASK_CUDA:BOOL=ON\n" not in cache.read_text():
                raise SystemExit(f"CMake did not keep FLASHMASK_CUDA=ON in {cache}: delete {build_dir} and build again")
        target = Path(self.build_lib) / PACKAGE / "lib"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_dir / "libflashmask.so", target)

    def complete_binding(self, extension: Extension) -> None:
        """Adds what only a build knows: where Paddle's headers and libraries are, and the core just built."""
        from paddle.utils.cpp_extension import CppExtension

        paddle_extension = CppExtension(sources=extension.sources)
        for attribute in ("include_dirs", "library_dirs", "extra_compile_args", "extra_link_args"):
            getattr(extension, attribute).extend(getattr(paddle_extension, attribute))
        if self.with_cuda:
            # Headers only: the binding takes a stream from Paddle and calls nothing of the CUDA runtime.
            extension.define_macros.append(("PADDLE_WITH_CUDA", None))
            extension.include_dirs += cuda_include_dirs(self.nvcc)
        # Paddle's OpenMP runtime comes before the core's libgomp, so that the core's OpenMP calls go to Paddle's: one
        # pool of threads in the process, and Paddle's number of them. (Two pools wait actively for each other's cores.)
        openmp = "libiomp5.so"
        if any(os.path.exists(os.path.join(folder, openmp)) for folder in extension.library_dirs):
            extension.extra_link_args += ["-Wl,--no-as-needed", f"-l:{openmp}", "-Wl,--as-needed"]
        extension.library_dirs.append(os.path.join(self.build_lib, PACKAGE, "lib"))
        extension.extra_link_args.append("-lflashmask")
        # Paddle's own folders need no rpath: `import paddle` has its libraries in the process already.
        extension.runtime_library_dirs.append("$ORIGIN/lib")

    def write_build_info(self) -> None:
        paddle = self.paddle
        lines = [
            '"""Written by setup.py: the PaddlePaddle that _C.so was built against."""',
            "",
            f"PADDLE_VERSION = {paddle.version.full_version!r}",
            f"PADDLE_COMMIT = {paddle.version.commit!r}",
            f"PADDLE_CUDA = {paddle.version.cuda()!r}",
            f"CUDA_KERNELS = {self.with_cuda!r}",
            "",
        ]
        Path(self.build_lib, PACKAGE, "_build_info.py").write_text("\n".join(lines))


if not sys.platform.startswith("linux"):
    raise SystemExit(f"paddle-flashmask builds on Linux; this is {sys.platform}")

setup(
    ext_modules=[
        Extension(
            f"{PACKAGE}._C",
            sources=["custom_ops/paddle/flashmask_binding.cc"],
            depends=["custom_ops/paddle/checks.h", "custom_ops/flashmask/flashmask.h"],
            include_dirs=["custom_ops/flashmask"],
            # Paddle 2.6 and 3.x are built with the new std::string.
            extra_compile_args=["-O2", "-std=c++17", "-D_GLIBCXX_USE_CXX11_ABI=1"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
