"""What the engines are made of, fetched once into a folder: Flink itself, and Beam's job servers for Flink and Spark.

    ENGINES/flink-1.19.3/              bin, conf, lib, plugins
    ENGINES/flink-job-server.jar       what Beam's driver talks to
    ENGINES/spark-job-server.jar       the same, with Spark inside

Versions and hashes stand in `requirements.txt` and `pom.xml` beside this file. pip holds what it fetches to the hashes,
Maven to the checksums of its repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from scorer.errors import ConfigurationError, StorageError

FOLDER_VARIABLE = "HARDNESS_ENGINES"
FLINK_VERSION = "1.19.3"
_HERE = Path(__file__).parent
_REQUIREMENTS, _POM = _HERE / "requirements.txt", _HERE / "pom.xml"
_LEAST_JAVA = 11
_UNWANTED_JARS = ("flink-table", "flink-scala", "flink-cep")
"""For SQL and Scala; Beam needs none of them."""
_WHEEL_TAGS = ("--python-version", "3.11", "--abi", "cp311", "--platform", "manylinux2014_x86_64")
"""The wheel is for one Python and one machine; its scripts and its configuration do not mind others."""

console = Console(stderr=True, highlight=False)


def engines_folder() -> Path:
    """`$HARDNESS_ENGINES`, or `.engines` in the current folder."""
    return Path(os.environ.get(FOLDER_VARIABLE) or ".engines").absolute()


def flink_home() -> Path:
    """Flink's own folder.

    Raises:
        ConfigurationError: it was not fetched yet.
    """
    return _require(engines_folder() / f"flink-{FLINK_VERSION}")


def job_server(engine: str) -> Path:
    """The jar of Beam's job server for 'flink' or 'spark'.

    Raises:
        ConfigurationError: it was not fetched yet.
    """
    return _require(engines_folder() / f"{engine}-job-server.jar")


def require_java() -> str:
    """Path of a Java that is new enough: that of $JAVA_HOME, else of $PATH.

    Raises:
        ConfigurationError: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=os.path.join(home, "bin") if home else None)
    if java is None:
        raise ConfigurationError("no java in $JAVA_HOME or $PATH: Flink and Spark need Java 11 or 17")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    if found is None or int(found[1]) < _LEAST_JAVA:
        raise ConfigurationError(f"{java} is too old for Flink and Spark, which need Java 11 or 17: {said.strip()}")
    return java


def fetch(engine: str) -> None:
    """Fetches what an engine needs, unless it is there; what is there is whole, and of the versions pinned.

    Args:
        engine: 'flink' or 'spark'.

    Raises:
        ConfigurationError: Java or Maven is missing.
        StorageError: something could not be fetched.
    """
    require_java()
    folder = engines_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if engine == "flink":
        _once(folder / f"flink-{FLINK_VERSION}", _REQUIREMENTS, _fetch_flink)
    _once(folder / f"{engine}-job-server.jar", _POM, lambda target: _build_job_server(engine, target))


def _require(path: Path) -> Path:
    if not path.exists():
        raise ConfigurationError(
            f"{path} is missing: run `make engines` first, or say where it is by ${FOLDER_VARIABLE}"
        )
    return path


def _once(target: Path, pins: Path, make: Callable[[Path], None]) -> None:
    """Makes a file or folder under another name first; whatever was made of other pins goes."""
    stamp = target.with_name(f".{target.name}.{sha256(pins.read_bytes()).hexdigest()[:16]}")
    if target.exists() and stamp.exists():
        console.print(f"{target} is there", soft_wrap=True)
        return
    _remove(target)
    with TemporaryDirectory(dir=target.parent, prefix=".fetching-") as scratch:
        made = Path(scratch, target.name)
        make(made)
        made.rename(target)
    for old in target.parent.glob(f".{target.name}.*"):
        old.unlink()
    stamp.touch()
    console.print(f"{target} is ready", soft_wrap=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fetch_flink(target: Path) -> None:
    downloads = target.with_name("downloads")
    console.print(f"Flink {FLINK_VERSION}: 233 MB from the Python package index")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(downloads)]
    wheel, sdist = (line for line in _REQUIREMENTS.read_text().splitlines() if line.startswith("apache-flink"))
    for line, flags in ((wheel, [*_WHEEL_TAGS, "--only-binary=:all:"]), (sdist, ["--no-binary=:all:"])):
        pins = target.with_name("pins.txt")
        pins.write_text(line)
        if subprocess.run([*pip, *flags, "-r", str(pins)], check=False).returncode:
            raise StorageError(f"pip could not fetch {line.split()[0]}: see above; run `make engines` again")
    for path, data, mode in (*_of_wheel(downloads), *_of_sdist(downloads)):
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        file.chmod(mode)


def _of_wheel(downloads: Path) -> Iterator[tuple[str, bytes, int]]:
    """Scripts and configuration: path in the distribution, content, mode."""
    (path,) = downloads.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            parts = name.split("/")
            if parts[0] == "pyflink" and parts[1] in ("bin", "conf") and parts[-1]:
                yield "/".join(parts[1:]), wheel.read(name), 0o755 if parts[1] == "bin" else 0o644


def _of_sdist(downloads: Path) -> Iterator[tuple[str, bytes, int]]:
    """Jars, likewise."""
    (path,) = downloads.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        for member in sdist:
            parts = member.name.split("/")[1:]
            wanted = parts[:1] == ["deps"] and len(parts) > 2 and parts[1] in ("bin", "lib", "plugins")
            if wanted and member.isfile() and not parts[-1].startswith(_UNWANTED_JARS):
                content = sdist.extractfile(member)
                assert content is not None
                yield "/".join(parts[1:]), content.read(), 0o644


def _build_job_server(engine: str, target: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise ConfigurationError(
            "no mvn in $PATH: Beam's job servers are put together by Apache Maven (Debian: apt install maven); or pass "
            f"a released one, --{engine}_job_server_jar beam-runners-{engine}-…-job-server-….jar"
        )
    folder = target.with_name("job-server")
    folder.mkdir()
    shutil.copy(_POM, folder / "pom.xml")
    command = [maven, "--batch-mode", "--activate-profiles", engine, "package"]
    lines: list[str] = []
    files = 0
    title = f"Beam's job server for {engine.capitalize()}, by Maven"
    with (
        console.status(title) as status,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if "Downloaded from" in line:
                files += 1
                status.update(f"{title}: {files} files fetched")
            elif "Downloading from" not in line and "Progress" not in line:
                lines.append(line)
    if process.returncode:
        console.print("".join(lines[-30:]), markup=False)
        raise StorageError("Maven could not build the job server: see above; run `make engines` again")
    (built,) = (folder / "target").glob("job-server-*.jar")
    built.rename(target)
