"""What a file is by its first bytes, where its name says something else."""

_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bz2"),
    (b"PAR1", "parquet"),
)
LOOKED_AT = 64


def found(head: bytes) -> str | None:
    """What a file is by its first bytes: UTF-16, UTF-32, gzip, zstd, xz, bz2 or parquet; None: none of them."""
    name = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if name == "bz2" and head[4:10] != b"1AY&SY":  # text may begin so
        name = None
    if name is None and len(head) >= 8:
        even, odd = head[::2].count(0), head[1::2].count(0)
        if max(even, odd) > len(head) // 4 and min(even, odd) <= len(head) // 16:
            name = "UTF-16"  # without a mark
    return name


def mistake(head: bytes) -> str | None:
    """What is wrong with a file of text that begins so; None: nothing that can be seen."""
    name = found(head)
    if name is None:
        return None
    if name.startswith("UTF"):
        return f"is {name}, not UTF-8; convert it, as with: iconv -f {name} -t UTF-8"
    return f"is {name}, which its name does not say; give it the suffix of {name}"
