"""The Spark jobs on a standalone cluster, submitted as docs/spark.md says: machines that are switched off, a Python
without our packages, and files on an object store, where nothing can be renamed."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from jllm.data.dataset.describe import verify
from jllm.data.dataset.manifest import open_data_set
from jllm.data.shuffle.data_set import Resources, shuffle_set
from tests.data.raw2ids_runs import documents, raw2ids, rows_of, write_jsonl
from tests.data.sets import table_of
from tests.data.tokenizers_for_tests import make_byte_tokenizer
from tests.pages.session import kill_group
from tests.spark.standalone import ROOT, Cluster, finish, running, spark_home, wait_until

pytestmark = pytest.mark.slow
SIZE = float(os.environ.get("JLLM_TEST_SIZE", "1"))
DOCUMENTS = 400
PACKED = ("--archives", "build/spark/jllm-env.tar.gz#jllm-env", "--conf", "spark.executorEnv.PYTHONPATH=./jllm-env")
CODE = ("--py-files", "build/spark/jllm.zip")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("cluster") / "machines", workers=2) as cluster:
        yield cluster


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where somebody submits jobs from: the repository's jobs, the code in an archive, a tokenizer, and documents."""
    folder = tmp_path / "here"
    (folder / "build" / "spark").mkdir(parents=True)
    (folder / "spark_jobs").symlink_to(ROOT / "spark_jobs")
    with zipfile.ZipFile(folder / "build" / "spark" / "jllm.zip", "w") as archive:
        for path in sorted((ROOT / "jllm").rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                archive.write(path, path.relative_to(ROOT))
    make_byte_tokenizer(folder / "qwen3")
    (folder / "corpus").mkdir()
    texts = documents(DOCUMENTS)
    for number in range(4):
        write_jsonl(folder / "corpus" / f"part-{number}.jsonl", texts[number::4])
    return folder


def local(folder: Path) -> Path:
    """What the local command makes of the documents."""
    words = ["-i", folder / "corpus", "-o", folder / "local", "--tokenizer", folder / "qwen3", "-t", "pretrain"]
    raw2ids(*words, "--max_len", 64)
    return folder / "local"


RAW2IDS = ("spark_jobs/raw2ids.py", "--tokenizer", "./qwen3", "-t", "pretrain", "--max_len", "64")


def bag(folder: Path) -> Counter[tuple[int, ...]]:
    return Counter(map(tuple, rows_of(folder)))


def check(ids: Path, wanted: Path) -> None:
    """See to it that these are the local rows, whole, and that nothing of a task that died is left."""
    assert bag(ids) == bag(wanted)
    assert verify(open_data_set(ids)) == []
    assert not list(ids.rglob("_temporary*"))


def test_a_machine_that_is_switched_off_costs_nothing_but_time(cluster: Cluster, folder: Path) -> None:
    """In mid-job, while its task writes; then the shuffle of what was made, on the cluster as it is now."""
    # Many partitions, so that the machine that stays has work left when the other one goes.
    words = [*CODE, *RAW2IDS, "-i", "corpus/*.jsonl", "-o", "ids", "--partitions", 24]
    job = cluster.submit(folder, *words)
    try:
        wait_until(
            lambda: job.poll() is not None or bool(list((folder / "ids").rglob("*.parquet"))), "a task has written"
        )
        assert job.poll() is None, (folder / "err").read_text()[-3000:]
        kill_group(cluster.workers[0])
    finally:
        finish(job, folder)
    check(folder / "ids", local(folder))
    if SIZE < 2:  # the next test shuffles here, and `test_shuffle.py` from folder to folder
        return
    cluster.run(folder, *CODE, "spark_jobs/shuffle.py", "-d", "ids", "-o", "ids-sf", "-n", 3, "--seed", 9)
    limits = Resources(cores=1, memory=1 << 30)
    shuffle_set(open_data_set(folder / "ids"), folder / "wanted", blocks=3, seed=9, resources=limits)
    assert table_of(folder / "ids-sf").equals(table_of(folder / "wanted"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options of spark-submit with which `store://` is an object store in a folder."""
    home = spark_home()
    if shutil.which("javac") is None:
        pytest.skip("no Java compiler: install a JDK, not a JRE alone")
    folder = tmp_path_factory.mktemp("store")
    source = Path(__file__).with_name("ObjectStore.java")
    words = ["javac", "-nowarn", "-d", str(folder / "classes"), "-cp", f"{home}/jars/*", str(source)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    settings = {
        "spark.driver.extraClassPath": folder / "classes",
        "spark.executor.extraClassPath": folder / "classes",
        "spark.hadoop.fs.store.impl": "ObjectStore",
        "spark.hadoop.fs.store.root": folder / "objects",
    }
    return tuple(word for name, value in settings.items() for word in ("--conf", f"{name}={value}"))


def objects(store: tuple[str, ...], bucket: str) -> Path:
    return Path(store[-1].split("=")[1], bucket)


def fetch(place: Path, prefix: str, target: Path) -> Path:
    """Download the objects below a prefix."""
    from urllib.parse import unquote

    for path in place.glob("o-*"):
        key = unquote(path.name.removeprefix("o-"))
        if key.startswith(prefix + "/") and not key.endswith("/"):
            to = target / key.removeprefix(prefix + "/")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
    return target


def test_an_object_store_instead_of_folders(cluster: Cluster, folder: Path, store: tuple[str, ...]) -> None:
    """Input and output: the same rows, whole, the same blocks, and nothing else left in the store."""
    bucket = objects(store, "bucket")
    bucket.mkdir(parents=True)
    for path in (folder / "corpus").iterdir():
        shutil.copyfile(path, bucket / f"o-corpus%2F{path.name}")
    given = {path.name: path.read_bytes() for path in bucket.iterdir()}
    while sum(worker.poll() is None for worker in cluster.workers) < 2:
        cluster.add_worker()
    cluster.run(folder, *store, *CODE, *RAW2IDS, "-i", "store://bucket/corpus/*.jsonl", "-o", "store://bucket/ids")
    ids = fetch(bucket, "ids", folder / "ids")
    check(ids, local(folder))
    words = ["-d", "store://bucket/ids", "-o", "store://bucket/sf", "-n", 3, "--seed", 9]
    cluster.run(folder, *store, *CODE, "spark_jobs/shuffle.py", *words)
    shuffled = fetch(bucket, "sf", folder / "sf")
    limits = Resources(cores=1, memory=1 << 30)
    shuffle_set(open_data_set(ids), folder / "wanted", blocks=3, seed=9, resources=limits)
    assert table_of(shuffled).equals(table_of(folder / "wanted"))
    assert {name: (bucket / name).read_bytes() for name in given} == given, "the input is as it was"
    left = [path.name for path in bucket.iterdir() if "_temporary" in path.name or path.name.startswith("upload-")]
    assert not left


@pytest.mark.timeout(900)
@pytest.mark.skipif(SIZE < 2, reason="fetches and packs 130 MiB of packages: set JLLM_TEST_SIZE=2")
def test_executors_that_have_nothing_but_python(cluster: Cluster, folder: Path) -> None:
    """The archive of `tools/pack_for_spark.py` is all that they get beside it."""
    python = Path("/usr/bin") / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if not python.exists():
        pytest.skip(f"no {python}, a Python without packages")
    words = [sys.executable, str(ROOT / "tools" / "pack_for_spark.py"), "-o", "build/spark"]
    subprocess.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=600)
    while sum(worker.poll() is None for worker in cluster.workers) < 2:
        cluster.add_worker()
    # One executor, because each unpacks half a gigabyte.
    words = [*PACKED, "--conf", "spark.cores.max=1", *RAW2IDS, "-i", "corpus/*.jsonl", "-o", "ids"]
    cluster.run(folder, *words, python=str(python))
    check(folder / "ids", local(folder))
