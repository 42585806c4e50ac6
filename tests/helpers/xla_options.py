"""XLA's options for the suite, most of whose time is the compilation of small programs."""

import importlib.util
import mmap
import pathlib

# Without the emitters that go through MLIR, and as one LLVM module each, programs compile in half
# the time.
QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def known(options=QUICK):
    """As the value of XLA_FLAGS, without those that the installed XLA lacks: it aborts at such."""
    package = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent
    found = []
    for library in package.glob("libjax_common.*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            found += [name for name in options if text.find(name.encode() + b"\0") >= 0]
    return " ".join(f"--{name}={options[name]}" for name in found)
