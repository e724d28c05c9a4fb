"""Compiling a kernel to machine code, in a process for that alone: `native_jobs` starts it, `native_code` calls what it made.

The code is that of numba, for this processor; what is added is one function that takes its arguments from a frame of words.
"""

import importlib
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.np import arrayobj, numpy_support

from . import native
from .native_code import ENTRY, Argument
from .native_symbols import PREFIX

_WORD = ir.IntType(64)


def compile_kernel(module: str, name: str, *signature: str) -> bytes:
    """The object file of the kernel `name` of `module`, for arguments of these kinds (`Argument`). Not in a process that runs kernels."""
    native.compile_for_kernels_only()
    kernel = getattr(importlib.import_module(module), name)
    return _object_file(kernel, tuple(_type_of(Argument.parse(text)) for text in signature))


def _type_of(argument: Argument) -> Any:
    of_one = numpy_support.from_dtype(np.dtype(argument.dtype))
    return of_one if argument.dimensions < 0 else types.Array(of_one, argument.dimensions, "C")


def _object_file(kernel: Any, signature: tuple[Any, ...]) -> bytes:
    """An object file of the kernel with all that it calls, in the large code model, with the function ENTRY."""
    kernel.compile(signature)
    compiled = kernel.overloads[signature]
    module = compiled.library._final_module.clone()
    module.link_in(llvm.parse_assembly(str(_entry(kernel.targetctx, compiled.fndesc))))
    for each in (*module.functions, *module.global_variables):
        if not each.is_declaration and each.name != ENTRY:
            each.linkage = "internal"
    _link_generated(module)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static",
        codemodel="large",
    )
    return bytes(machine.emit_object(module))


def _link_generated(module: Any) -> None:
    """Put in the functions that are ours, not those of a library."""
    if not any(function.name.startswith(PREFIX) for function in module.functions):
        return
    from .native_calls import GENERATED

    for name, assembly in GENERATED.items():
        if any(function.name == name for function in module.functions):
            module.link_in(llvm.parse_assembly(assembly()))
            module.get_function(name).linkage = "internal"


def _entry(context: Any, described: Any) -> Any:
    """The module with the function ENTRY: it calls the kernel that is described."""
    module = context.create_module("entry")
    kind = context.call_conv.get_function_type(described.restype, described.argtypes)
    callee = ir.Function(module, kind, described.llvm_func_name)
    entry = ir.Function(module, ir.FunctionType(ir.IntType(32), (_WORD.as_pointer(),)), ENTRY)
    builder = ir.IRBuilder(entry.append_basic_block())
    frame = _Frame(builder, entry.args[0])
    arguments = [_argument(context, builder, frame, each) for each in described.argtypes]
    status, result = context.call_conv.call_function(builder, callee, described.restype, described.argtypes, arguments)
    results = _results(builder, described.restype, result)
    for number, (kind, value) in enumerate(results):
        frame.put(number, value, getattr(kind, "signed", False))
    builder.ret(
        builder.select(status.is_ok, ir.Constant(status.code.type, len(results)), ir.Constant(status.code.type, -1))
    )
    return module


class _Frame:
    """The words that a kernel is called with, taken one after the other."""

    def __init__(self, builder: Any, address: Any) -> None:
        self._builder, self._address, self._taken = builder, address, 0

    def take(self) -> Any:
        self._taken += 1
        return self._builder.load(self._place(self._taken - 1))

    def put(self, number: int, value: Any, is_signed: bool) -> None:
        if value.type.width < _WORD.width:
            value = (self._builder.sext if is_signed else self._builder.zext)(value, _WORD)
        self._builder.store(value, self._place(number))

    def _place(self, number: int) -> Any:
        return self._builder.gep(self._address, [ir.Constant(_WORD, number)])


def _argument(context: Any, builder: Any, frame: _Frame, kind: Any) -> Any:
    if not isinstance(kind, types.Array):
        word = frame.take()
        return word if kind == types.int64 else builder.trunc(word, context.get_value_type(kind))
    data, shape = _data_and_shape(builder, frame.take(), kind.ndim)
    strides = [ir.Constant(_WORD, kind.dtype.bitwidth // 8)]
    for extent in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], extent))
    array = context.make_array(kind)(context, builder)
    arrayobj.populate_array(  # type: ignore[no-untyped-call, unused-ignore]
        array,
        data=builder.inttoptr(data, array.data.type),
        shape=shape,
        strides=strides,
        itemsize=strides[-1],
        meminfo=None,
    )
    return array._getvalue()


def _data_and_shape(builder: Any, fields: Any, dimensions: int) -> tuple[Any, list[Any]]:
    """Of an array whose fields begin there: the address of its data, the number of dimensions, and the address of these."""

    def load(address: Any, number: int) -> Any:
        words = builder.inttoptr(address, _WORD.as_pointer())
        return builder.load(builder.gep(words, [ir.Constant(_WORD, number)]))

    extents = load(fields, 2)
    return load(fields, 0), [load(extents, number) for number in range(dimensions)]


def _results(builder: Any, kind: Any, result: Any) -> list[tuple[Any, Any]]:
    """Type and value of each."""
    if kind == types.none:
        return []
    if not hasattr(kind, "types"):
        return [(kind, result)]
    return [(each, builder.extract_value(result, number)) for number, each in enumerate(kind.types)]
