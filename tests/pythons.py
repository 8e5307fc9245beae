"""Run the tests that depend on the version of Python under every other Python from 3.11 on of this machine.

    make test-pythons                                   # checkpoints and compilation, under each Python found
    make test-pythons PYTHONS="/path/to/python3.13"     # under these
    make test-pythons ARGS="-m 'not slow'"              # all tests but the slow ones

Each Python gets an environment in `.venvs/` with packages of its own. Without ARGS, one that differs from the project's
own Python only in the last number of its version takes the packages of `.venv`: some of those for documentation do not
support it, and no test of these needs them.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

RUNS = "kills or survive or images or workers or plateau"  # a resumed run of the language model is enough
TESTS = ["tests/checkpoints", "tests/equilibrium/test_works_under_compile.py", "-m", "not slow", "-k", f"not ({RUNS})"]
OLDEST = (3, 11)
Version = tuple[int, ...]


def version_of(python: Path) -> Version | None:
    """None: not a Python that runs."""
    code = "import sys; print(*sys.version_info[:3])"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return tuple(map(int, answer.stdout.split())) if answer.returncode == 0 else None


def found() -> dict[Version, Path]:
    """The interpreters by version: those of `PYTHONS`, or those on the path and of pyenv."""
    if names := os.environ.get("PYTHONS"):
        candidates = [Path(name) for name in names.split()]
        if wrong := [str(path) for path in candidates if not path.exists() or (version_of(path) or (0,)) < OLDEST]:
            sys.exit(f"PYTHONS must be paths of Python 3.11 or newer, got {' '.join(wrong)}")
    else:
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
        folders = [Path(folder) for folder in os.get_exec_path()]
        candidates = [*pyenv.glob("versions/*/bin/python3"), *(p for f in folders for p in sorted(f.glob("python3*")))]
        candidates = [path for path in candidates if path.name.removeprefix("python3").strip(".0123456789") == ""]
    versions = {version: path for path in candidates if (version := version_of(path)) and version >= OLDEST}
    return dict(sorted((version, path) for version, path in versions.items() if version != sys.version_info[:3]))


def environment(version: Version, python: Path, may_share: bool) -> Path:
    """The interpreter of the environment for this Python, made if need be."""
    shared = may_share and version[:2] == sys.version_info[:2]
    folder = Path(".venvs", ".".join(map(str, version)) + ("-shared" if shared else ""))
    inside, ready = folder / "bin/python", folder / ".ready"
    if ready.exists() and ready.stat().st_mtime >= Path("pyproject.toml").stat().st_mtime:
        return inside
    print(f"Setting up {folder} ...", flush=True)
    subprocess.run([python, "-m", "venv", *(["--without-pip"] if shared else []), folder], check=True)
    if shared:
        packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))
        link = next(folder.glob("lib/*/site-packages")) / "shared.pth"
        link.write_text(f"import site; site.addsitedir({str(packages)!r})\n")
    else:
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", ".[dev]"]
        subprocess.run([inside, *install], check=True)
    ready.touch()
    return inside


def main(arguments: list[str]) -> int:
    """The number of Pythons under which a test failed."""
    pythons, failed = found(), []
    for version, path in pythons.items():
        name = ".".join(map(str, version))
        print(f"Python {name}: pytest {shlex.join(arguments or TESTS)}", flush=True)
        options = ["-q", "--durations=3", "-n", "auto", "--dist", "loadgroup", *(arguments or TESTS)]
        inside = environment(version, path, may_share=not arguments)
        if subprocess.run([inside, "-m", "pytest", *options], check=False).returncode:
            failed.append(name)
    names = ", ".join(".".join(map(str, version)) for version in pythons) or "none but the project's own"
    print(f"Pythons: {names}. " + (f"Failed: {', '.join(failed)}" if failed else "All tests passed."))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
