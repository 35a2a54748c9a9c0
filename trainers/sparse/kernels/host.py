"""This machine's processor, and machine code for it by LLVM (llvmlite); no compiler is needed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from typing import Any

import llvmlite.binding as llvm

from trainers.sparse.kernels.builder import Code

_LOCK = threading.Lock()  # LLVM's set-up is not made for several threads at once


def _target_machine() -> Any:
    """Make a target machine for LLVM; a new one for each engine, which takes it over."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )


def lanes() -> int:
    """Float32 numbers in a vector register: 16 (AVX-512), 8 (AVX2) or 4 (SSE, NEON)."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") else 4


def registers() -> int:
    """Vector registers: 32, or 16 on x86 before AVX-512."""
    return 16 if "x86" in llvm.get_default_triple() and lanes() < 16 else 32


def processor() -> str:
    """Describe what the speed of a kernel depends on: kind of processor, size of vectors, version of LLVM."""
    version = ".".join(map(str, llvm.llvm_version_info))
    return f"{llvm.get_host_cpu_name()}, {lanes()} lanes, LLVM {version}"


def has_vnni() -> bool:
    """Return whether the processor multiplies 8-bit numbers in vectors of 16 sums (AVX-512 VNNI)."""
    return bool(llvm.get_host_cpu_features().get("avx512vnni"))


class Machine:
    """Functions compiled for this processor; they live as long as the object.

    Args:
        functions: finished :class:`~trainers.sparse.kernels.builder.Code`, in any order.
    """

    def __init__(self, functions: Iterable[Code]) -> None:
        functions = list(functions)
        defined = {code.name for code in functions}
        declared = {line for code in functions for line in code.declared}
        outside = sorted(line for line in declared if line.split("@")[1].split("(")[0] not in defined)
        text = "\n".join([*outside, *(code.finish() for code in functions)])
        with _LOCK:
            machine = _target_machine()
            module = llvm.parse_assembly(text)
            module.triple = machine.triple
            module.data_layout = str(machine.target_data)
            module.verify()
            passes = llvm.create_new_module_pass_manager()
            passes.add_sroa_pass()  # variables into registers
            passes.add_instruction_combine_pass()
            passes.add_simplify_cfg_pass()  # LLVM's usual list takes 0.4 s more and makes nothing faster
            options = llvm.create_pipeline_tuning_options(speed_level=2)
            passes.run(module, llvm.create_pass_builder(machine, options))
            self._engine = llvm.create_mcjit_compiler(module, machine)
            self._engine.finalize_object()
        self._names = defined

    def address(self, name: str) -> int:
        """Address of a function.

        Raises:
            KeyError: there is no function of this name.
        """
        if name not in self._names:
            raise KeyError(name)
        return int(self._engine.get_function_address(name))


def function(address: int, arguments: int) -> Any:
    """Make a Python function of a compiled one with ``arguments`` 64-bit arguments; calls release the GIL."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(address)
