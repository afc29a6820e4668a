"""Memory that loading is done with, given back to the system: what was freed, and pages of mapped files.

The allocator keeps what is freed, and a process counts the pages of a mapped file as its own while it looks at them.
Guarantees: no value changes; pages of files are read again where somebody needs them. On Linux; elsewhere nothing
happens.
Cost: reading the process's list of mappings, about a millisecond for each tensor.
"""

import ctypes
import mmap
import re
from pathlib import Path

from torch import Tensor

_DONT_NEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(.*\.safetensors)")


def give_back(tensor: Tensor) -> None:
    """Give back what was freed, and the pages of a safetensors file that a tensor lies in."""
    mappings = Path("/proc/self/maps")
    if tensor.device.type != "cpu" or not mappings.exists():
        return
    library = ctypes.CDLL(None)
    start = tensor.data_ptr()
    for line in mappings.read_text(errors="replace").splitlines():
        found = _MAPPING.fullmatch(line)
        if found and int(found[1], 16) <= start < (mapped_end := int(found[2], 16)):
            page = mmap.PAGESIZE
            first = -(-start // page) * page  # what shares a page with a neighbour stays
            size = min(start + tensor.nbytes, mapped_end) // page * page - first
            if size > 0:
                library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _DONT_NEED)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def owned(tensor: Tensor) -> Tensor:
    """The same tensor in memory of its own, on CPU, where it may be a mapped file."""
    if tensor.device.type != "cpu":
        return tensor
    copy = tensor.clone()
    give_back(tensor)
    return copy
