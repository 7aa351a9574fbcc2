"""Builds the wheel, installs it outside the checkout, and runs its demo.

A subpackage, a type stub or a file of the demo's base that the packaging forgets is there in the checkout and missing
in the wheel; only this finds it. The new environment sees the dependencies of the present one, so nothing is
downloaded again (but the build tool, where the present environment has an old one).

    python tests/wheel/check_wheel.py

Exit codes: 0 all is well; 1 the wheel is wrong; 2 it could not be built or installed; 3 its demo failed.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDERS: Final = {"server": "server", "client": "client", "common": "common", "protos/weft/v1": "v1"}
"""Folder in the checkout, and package below ``weft`` in the wheel."""
PROJECT_FILES: Final = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
SETUPTOOLS_MIN: Final = 77
DEMO_S: Final = 150.0
TOOL_S: Final = 120.0
STOP_S: Final = 40.0
"""The demo gives what it started twenty seconds to end."""
LINES_SHOWN: Final = 25

PROBE: Final = """
import importlib.metadata, sys
import weft.client, weft.common, weft.server, weft.v1
from weft.server.runfile import template
for package in (weft.client, weft.common, weft.server, weft.v1):
    assert package.__file__.startswith(sys.prefix), f"{package.__name__} is imported from {package.__file__}"
found = importlib.metadata.distribution("weft")
assert str(found.locate_file("")).startswith(sys.prefix), found.locate_file("")
assert {entry.name for entry in importlib.metadata.entry_points(group="weft.commands")} >= {"client", "server"}
template(name="probe", source="org/model")
"""


class CheckFailed(Exception):
    """What is wrong, and the exit code that says so."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    """Check; returns the exit code."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="weft-wheel-") as directory:
        try:
            check(Path(directory))
        except CheckFailed as failed:
            sys.stderr.write(f"wheel: {failed}\n")
            return failed.code
    say(f"all is well, {time.monotonic() - began:.0f} s")
    return 0


def check(directory: Path) -> None:
    """Do all of it below ``directory``; raises CheckFailed."""
    wheel = build(copy_sources(directory / "source"), directory / "dist")
    check_contents(wheel)
    python = install(wheel, directory / "venv")
    environment = clean_environment(directory)
    run([str(python), "-c", PROBE], cwd=directory, environment=environment, code=1)
    say("installed and imported from the wheel")
    weft = python.with_name("weft")
    run([str(weft), "--version"], cwd=directory, environment=environment, code=1)
    run_demo(weft, directory, environment)


def run_demo(weft: Path, directory: Path, environment: Mapping[str, str]) -> None:
    """Run the short demo; raises CheckFailed with the end of its logs."""
    began = time.monotonic()
    command = [str(weft), "demo", "--quick", "--dir", str(directory / "demo")]
    try:
        run(command, cwd=directory, environment=environment, code=3, limit_s=DEMO_S)
    except CheckFailed as failed:
        logs = [f"--- {log.name}\n{tail(log.read_bytes())}" for log in sorted(directory.glob("demo/logs/*"))]
        raise CheckFailed("\n".join([str(failed), *logs]), code=failed.code) from failed
    say(f"weft demo --quick ran from it in {time.monotonic() - began:.0f} s")


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stdout.write(f"wheel: {text}\n")
    sys.stdout.flush()


def copy_sources(to: Path) -> Path:
    """What a wheel is built from, and nothing else: earlier builds leave files behind that would be packed too."""
    to.mkdir()
    for name in PROJECT_FILES:
        shutil.copy2(ROOT / name, to / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def build(source: Path, dist: Path) -> Path:
    """Build the wheel; returns where it is."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(dist), str(source)]
    if has_build_tool():
        command.append("--no-isolation")
    run(command, cwd=source, environment=os.environ, code=2)
    (wheel,) = dist.glob("*.whl")
    say(f"built {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
    return wheel


def has_build_tool() -> bool:
    """Whether this environment has what the build needs."""
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= SETUPTOOLS_MIN
    except importlib.metadata.PackageNotFoundError:
        return False


def check_contents(wheel: Path) -> None:
    """Compare what is inside with the checkout; raises CheckFailed."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = {name for name in inside if name.split("/")[0].endswith(".dist-info")}
    wanted = expected_files()
    if lacking := sorted(wanted - inside):
        raise CheckFailed(f"{len(lacking)} files are missing, for example {lacking[0]}", code=1)
    if strange := sorted(inside - metadata - wanted):
        raise CheckFailed(f"{len(strange)} files do not belong in it, for example {strange[0]}", code=1)
    if not any(name.endswith("/licenses/LICENSE") for name in metadata):
        raise CheckFailed("the licence is missing", code=1)
    say(f"{len(wanted)} files, as in the checkout")


def expected_files() -> set[str]:
    """Names in the wheel of everything that is part of a package."""
    found = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and belongs(path):
                found.add(f"weft/{package}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def belongs(path: Path) -> bool:
    """Whether a file of a package folder goes into the wheel."""
    return path.suffix in {".py", ".pyi", ".proto"} or path.name == "py.typed" or path.parent.name == "base"


def install(wheel: Path, directory: Path) -> Path:
    """Make an environment with the wheel and this environment's dependencies; returns its interpreter."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(directory)
    python = directory / "bin" / "python"
    options = ["--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    run(command, cwd=directory, environment=os.environ, code=2)
    # A line in a .pth adds a path and does not run the .pth files there: the editable install stays unseen. It comes
    # after pip, which would otherwise find a weft there already.
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def clean_environment(directory: Path) -> Mapping[str, str]:
    """Environment variables that lead neither to the checkout nor to a network nor to somebody's home."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "WEFT_", "VIRTUAL_ENV"))
    }
    home = str(directory / "home")
    return kept | {"HOME": home, "WEFT_HOME": f"{home}/weft", "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}


def run(
    command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], code: int, limit_s: float = TOOL_S
) -> None:
    """Run a program quietly; raises CheckFailed with ``code`` and the end of its output when it fails."""
    program = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = program.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(
            f"{command[0]} took longer than {limit_s:.0f} s\n{stop(program)}", code=code
        ) from error
    if program.returncode:
        cause = f"{' '.join(command)[:200]} ended with {program.returncode}"
        raise CheckFailed(f"{cause}\n{tail(output)}", code=code)


def stop(program: subprocess.Popen[bytes]) -> str:
    """End a program as Ctrl-C does, so that it ends what it started; returns the last lines of what it said."""
    program.send_signal(signal.SIGINT)
    try:
        output, _ = program.communicate(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        program.kill()
        output, _ = program.communicate()
    return tail(output)


def tail(output: bytes) -> str:
    """The last lines of what a program said."""
    return "\n".join(output.decode(errors="replace").splitlines()[-LINES_SHOWN:])


if __name__ == "__main__":
    sys.exit(main())
