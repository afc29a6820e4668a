"""A compiled operator that was cut short or changed is built anew."""

from pathlib import Path

from jllm.train.distributed import operators


def test_only_what_was_built_is_kept(tmp_path: Path) -> None:
    library = tmp_path / "operator.so"

    def build() -> None:
        (tmp_path / "build.ninja").touch()
        library.write_bytes(b"built")
        operators.remember(tmp_path)

    (tmp_path / ".building").touch()
    for damage in (
        lambda: library.write_bytes(b"other"),
        lambda: library.write_bytes(b""),
        library.unlink,
        lambda: (tmp_path / "more.so").touch(),
        (tmp_path / ".sha256").unlink,
        lambda: (tmp_path / ".sha256").write_bytes(b""),
        lambda: (tmp_path / ".sha256").write_bytes(b"\xff"),
    ):
        build()
        operators.forget_changed(tmp_path)
        assert library.read_bytes() == b"built"
        damage()
        operators.forget_changed(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".building"]
