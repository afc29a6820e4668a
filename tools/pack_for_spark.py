"""Pack what Spark executors need into one archive: the data commands' packages and jllm itself.

    python tools/pack_for_spark.py [--output build/spark] [--platform manylinux_2_28_x86_64]

Writes `jllm-env.tar.gz`, for `--archives jllm-env.tar.gz#jllm-env` with `PYTHONPATH=./jllm-env`, and `jllm.zip`, for
`--py-files` where the packages are installed on the cluster already. The executors' Python must be of the same minor
version as the one that runs this; with `--platform`, their machine may be another. docs/spark.md shows the commands.
"""

import dataclasses
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from jllm import children
from jllm.errors import UserError
from jllm.options import command, option

ROOT = Path(__file__).parents[1]
EXECUTOR_EXTRA = "pandas>=2.2"
"""pyspark itself comes with the cluster; its Arrow functions need pandas."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Options of the tool."""

    output: Path = option(Path("build/spark"), "-o", help="folder for the archives", metavar="FOLDER")
    platform: str | None = option(None, help="platform tag of the executors' wheels  [default: this machine's]")


def install(target: Path, config: PackConfig) -> None:
    """Install jllm and the packages of its data commands into a folder.

    Raises:
        UserError: pip failed.
    """
    arguments = ["--target", str(target), "--constraint", str(ROOT / "constraints.txt"), "--no-compile"]
    if config.platform:
        # Wheels for another platform can be fetched, not built; jllm itself is pure Python and is copied below.
        arguments += ["--platform", config.platform, "--only-binary", ":all:"]
    names = [*requirements(), EXECUTOR_EXTRA]
    done = subprocess.run(children.python("-m", "pip", "install", "--quiet", *arguments, *names), check=False)
    if done.returncode:
        raise UserError("pip could not install the packages; its messages are above")
    shutil.copytree(ROOT / "jllm", target / "jllm", ignore=shutil.ignore_patterns("__pycache__"))


def requirements() -> list[str]:
    """What setup.py asks for without extras."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(children.python("setup.py", "--quiet", "egg_info", "--egg-base", folder), cwd=ROOT, check=True)
        lines = next(Path(folder).glob("*.egg-info/requires.txt")).read_text(encoding="utf-8").splitlines()
    plain = lines[: next((index for index, line in enumerate(lines) if line.startswith("[")), len(lines))]
    return [line for line in plain if line]


@command(PackConfig, name="pack_for_spark")
def main(config: PackConfig) -> None:
    """Pack jllm and its packages for Spark executors."""
    config.output.mkdir(parents=True, exist_ok=True)
    archive = config.output / "jllm-env.tar.gz"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "env")
        install(target, config)
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for path in sorted(target.iterdir()):
                tar.add(path, arcname=path.name)
        code = Path(folder, "code")
        shutil.copytree(ROOT / "jllm", code / "jllm", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.make_archive(str(config.output / "jllm"), "zip", code)
    print(f"{archive}: {archive.stat().st_size >> 20} MiB, and {config.output / 'jllm.zip'}; see docs/spark.md")


if __name__ == "__main__":
    main()
