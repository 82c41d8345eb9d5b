"""The allowlist: what the globals of an honest weights file mean, worked out here instead of called.

Three tables. `DATA` maps a global to our own reading of its call (torch's and numpy's rebuild functions, plain collections). `INERT` names
classes that hold plain fields (training arguments, enums, dates): kept by name. `_constants()` are dtypes and storage classes, which are
values. Everything else is code. Sources: torch/_utils.py, torch/_tensor.py, torch/storage.py and torch/_weights_only_unpickler.py of
pytorch/pytorch; numpy/_core/multiarray.py and numpy/_core/numeric.py of numpy/numpy; joblib/numpy_pickle.py of joblib/joblib.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from upparam.containers.base import Opaque
from upparam.containers.symbols import (
    Array,
    ArrayType,
    Blob,
    Broken,
    Global,
    Record,
    Storage,
    StorageType,
    Trust,
    array,
    latin1,
    summary,
    view,
    whole_numbers,
)
from upparam.dtypes import DTYPES, DType
from upparam.errors import UpparamError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    from upparam.containers.machine import Machine

RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "numpy.core.multiarray": "numpy._core.multiarray",
           "numpy.core.numeric": "numpy._core.numeric", "torch.tensor": "torch._tensor"}  # fmt: skip
"""Old module names of what the tables hold (Python 2, numpy 1, torch before 1.8)."""

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_OPAQUE_STORAGES = ("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")
_TENSOR_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_OPAQUE_VALUES = (
    "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2", "complex32", "uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "int1", "int2", "int3", "int4", "int5", "int6", "int7", "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams", "strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "contiguous_format", "preserve_format", "channels_last",
)  # fmt: skip


@cache
def _constants() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in ("torch", "torch.cuda", "torch.storage"):
        found |= {f"{module}.{name}": StorageType(DTYPES[dtype]) for name, dtype in _STORAGES.items()}
        found |= {f"{module}.{name}": Opaque(f"torch.{name}") for name in _OPAQUE_STORAGES}
    found |= {f"{module}.{kind}Tensor": Opaque(f"torch.{kind}Tensor") for module in ("torch", "torch.cuda") for kind in _TENSOR_KINDS}
    found |= {f"torch.storage.{name}": StorageType(None) for name in ("UntypedStorage", "_UntypedStorage")}
    found |= {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
    found |= {f"torch.{name}": Opaque(f"torch.{name}") for name in _OPAQUE_VALUES}
    return found


def constant(name: Global) -> Any:
    """The value of a global that is one (a dtype, a storage class), else the global itself."""
    return _constants().get(name.qualname, name)


def _inert() -> frozenset[str]:
    groups = {
        "transformers.training_args": "TrainingArguments",
        "transformers.training_args_seq2seq": "Seq2SeqTrainingArguments",
        "transformers.trainer_utils": "IntervalStrategy SchedulerType HubStrategy SaveStrategy EvaluationStrategy FSDPOption IntervalStrategy ShardedDDPOption",
        "transformers.training_args_tf": "TFTrainingArguments",
        "transformers.training_args ": "OptimizerNames ParallelMode",
        "transformers.trainer_pt_utils": "AcceleratorConfig",
        "transformers.debug_utils": "DebugOption",
        "transformers.utils.generic": "ExplicitEnum",
        "transformers.generation.configuration_utils": "GenerationConfig",
        "transformers.integrations.deepspeed": "HfDeepSpeedConfig HfTrainerDeepSpeedConfig",
        "transformers.deepspeed": "HfDeepSpeedConfig HfTrainerDeepSpeedConfig",
        "accelerate.state": "PartialState AcceleratorState",
        "accelerate.utils.dataclasses": "DistributedType DeepSpeedPlugin ComputeEnvironment PrecisionType DynamoBackend",
        "trl.trainer.sft_config": "SFTConfig",
        "trl.trainer.dpo_config": "DPOConfig",
        "trl.trainer.reward_config": "RewardConfig",
        "trl.trainer.ppo_config": "PPOConfig",
        "trl.trainer.kto_config": "KTOConfig",
        "trl.trainer.orpo_config": "ORPOConfig",
        "trl.trainer.cpo_config": "CPOConfig",
        "trl.trainer.grpo_config": "GRPOConfig",
        "peft.utils.peft_types": "PeftType TaskType",
        "peft.tuners.lora": "LoraConfig",
        "peft.tuners.lora.config": "LoraConfig LoraRuntimeConfig LoftQConfig",
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "datetime": "datetime date time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "uuid": "UUID",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf.nodes": "AnyNode IntegerNode FloatNode StringNode BooleanNode",
        "typing": "Any",
        "numpy": "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool_ bool complex64 complex128 str_",
        "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
        "numpy.random._mt19937": "MT19937",
        "numpy.random._pcg64": "PCG64",
        "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
        "lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint",
        "torch._C": "Generator",
        "torch.optim.lr_scheduler": "LambdaLR",
        "builtins": "object int float str bool bytes",
    }
    return frozenset(f"{module.strip()}.{name}" for module, names in groups.items() for name in names.split())


INERT = _inert()
"""Classes known to hold plain fields. Loading one needs its library; it runs nothing that the file chooses."""

_CALLED = frozenset(
    {"numpy.random._pickle.__randomstate_ctor", "numpy.random._pickle.__generator_ctor", "numpy.random._pickle.__bit_generator_ctor"}
)
_MODULES_CALLED = ("pathlib", "datetime.", "decimal.", "fractions.", "uuid.", "numpy.", "argparse.", "types.", "peft.utils.peft_types.",
                   "transformers.trainer_utils.", "transformers.training_args.OptimizerNames", "transformers.training_args.ParallelMode",
                   "transformers.debug_utils.", "accelerate.utils.dataclasses.", "omegaconf.", "builtins.object")  # fmt: skip
"""Inert classes that may also be called (enums by value, dates by fields); the rest only made empty and filled."""


def trust(module: str, name: str) -> Trust:
    """How far a global is trusted."""
    qualname = f"{module}.{name}"
    if qualname in DATA or qualname in _constants():
        return Trust.DATA
    return Trust.INERT if qualname in INERT else Trust.CODE


def reconstruct(machine: Machine, name: Global, args: Any, how: str, new: bool) -> Any:
    """The stand-in for calling `name` with `args`: what the allowlist makes of it, else a Record and a noted use."""
    known = DATA.get(name.qualname)
    if known is not None and type(args) is tuple:
        machine.use(name, how, args)
        try:
            found = known(machine, *args)
        except TypeError as problem:
            if problem.__traceback__ is None or problem.__traceback__.tb_next is not None:
                raise
            raise machine.bad(f"{name.qualname} with arguments it does not take", found=summary(args)) from None
        if found is not NotImplemented:
            return found
        machine.accuse(name, how, args)
        return Record(name.qualname, args)
    use = machine.use(name, how, args)
    if use.trust is Trust.INERT and not new and name.qualname not in _CALLED and not name.qualname.startswith(_MODULES_CALLED):
        use.trust = Trust.CODE
    return Record(name.qualname, args if type(args) is tuple else (args,))


def build(machine: Machine, target: Any, state: Any) -> None:
    """The meaning of BUILD: state put into an object."""
    kind = type(target)
    if kind is Record:
        if target.qualname == _JOBLIB:
            _joblib_array(machine, target, state)
            return
        if type(state) is tuple and len(state) == 2:
            _check_slots(machine, state)
        target.state.append(state)
    elif kind is Array:
        _array_state(machine, target, state)
    elif kind is ArrayType:
        _type_state(machine, target, state)
    elif kind is Global:
        machine.accuse(target, "changed", state)
    elif kind in (dict, set, list, Tensor, Broken) or kind is Opaque:
        _check_slots(machine, state if type(state) is tuple and len(state) == 2 else (state,))
    else:
        raise machine.bad(f"a {kind.__name__.lower()} cannot be given a state")


def _check_slots(machine: Machine, state: tuple[Any, ...]) -> None:
    """BUILD sets the second half of a state by setattr: attributes such as __class__ are no fields."""
    if any(isinstance(part, dict) and any(str(key).startswith("__") for key in part) for part in state[1:]):
        machine.accuse(Global("builtins", "setattr", machine.opcode), "called", state)


def _guarded(make: Callable[[], Any]) -> Any:
    """A tensor, or Broken with the reason: one bad tensor must not hide the others, and its error should carry its name."""
    try:
        return make()
    except UpparamError as problem:
        return Broken(problem)


def _tensor(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, dtype: DType | None, extra: Any) -> Any:
    if isinstance(storage, Opaque) or (isinstance(storage, Storage) and dtype is None and storage.dtype is None):
        return Opaque("torch.Tensor", (f"elements of type {summary(storage)}",))
    if isinstance(storage, Broken):
        return storage
    if not isinstance(storage, Storage):
        raise machine.bad("a tensor without a storage", found=summary(storage))
    if type(offset) is not int or not whole_numbers(size) or not whole_numbers(stride):
        raise machine.bad("a tensor whose offset, shape or strides are not whole numbers", found=summary((offset, size, stride)))
    if isinstance(extra, dict) and (extra.get("conj") or extra.get("neg")):
        return Opaque("torch.Tensor", ("a conjugated or negated view",))
    chosen = dtype or storage.dtype
    assert chosen is not None
    return _guarded(lambda: view(storage, chosen, offset, tuple(size), tuple(stride), machine.budget))


def _rebuild_tensor(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any) -> Any:
    return _tensor(machine, storage, offset, size, stride, None, None)


def _rebuild_tensor_v2(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, grad: Any = None, hooks: Any = None, extra: Any = None) -> Any:  # fmt: skip
    return _tensor(machine, storage, offset, size, stride, None, extra)


def _rebuild_tensor_v3(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, extra: Any = None) -> Any:  # fmt: skip
    if not isinstance(dtype, DType):
        return Opaque("torch.Tensor", (f"elements of type {summary(dtype)}",))
    return _tensor(machine, storage, offset, size, stride, dtype, extra)


def _first(machine: Machine, data: Any, *rest: Any) -> Any:
    return data


def _from_type(machine: Machine, function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    if type(function) is not Global or type(args) is not tuple:
        raise machine.bad("a tensor subclass without its rebuild function", found=summary(function))
    found = reconstruct(machine, function, args, "called", False)
    if type(kind) is Global and kind.qualname not in DATA:
        return Record(kind.qualname, (found, state))
    return found


def _unread(what: str) -> Callable[..., Any]:
    def refuse(machine: Machine, *args: Any) -> Any:
        return Record(f"torch.Tensor ({what})", args)

    return refuse


def _from_numpy(machine: Machine, data: Any, *rest: Any) -> Any:
    if isinstance(data, Array):
        return data if data.found is None else data.found
    return data


def _meta(machine: Machine, dtype: Any, size: Any, *rest: Any) -> Any:
    return Opaque("torch.Tensor", ("on the meta device: a shape without data", summary(size)))


def _parameter(machine: Machine, data: Any = None, *rest: Any) -> Any:
    return Record("torch.nn.Parameter", ()) if data is None else data


def _device(machine: Machine, kind: Any, index: Any = None) -> Any:
    if not isinstance(kind, str):
        raise machine.bad("a device without a name", found=summary(kind))
    return kind if index is None else f"{kind}:{summary(index)}"


def _items(machine: Machine, value: Any) -> list[Any]:
    if type(value) not in (list, tuple, set, frozenset, dict):
        raise machine.bad("a collection made from something that is none", found=summary(value))
    machine.budget.take(len(value))
    return list(value)


def _size(machine: Machine, values: Any = ()) -> Any:
    return tuple(_items(machine, values))


def _set(machine: Machine, values: Any = ()) -> Any:
    return {machine.key(item) for item in _items(machine, values)}


def _frozenset(machine: Machine, values: Any = ()) -> Any:
    return frozenset(machine.key(item) for item in _items(machine, values))


def _list(machine: Machine, values: Any = ()) -> Any:
    return _items(machine, values)


def _dict(machine: Machine, values: Any = ()) -> Any:
    if type(values) is dict:
        machine.budget.take(len(values))
        return dict(values)
    found: dict[Any, Any] = {}
    for pair in _items(machine, values):
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise machine.bad("a mapping made from something else than pairs", found=summary(pair))
        found[machine.key(pair[0])] = pair[1]
    return found


def _defaultdict(machine: Machine, factory: Any = None, values: Any = ()) -> Any:
    if factory is not None and not (type(factory) is Global and factory.qualname in _FACTORIES):
        return NotImplemented
    return _dict(machine, values)


_FACTORIES = frozenset(f"builtins.{name}" for name in ("list", "dict", "set", "tuple", "int", "float", "str", "bool")) | {
    "collections.OrderedDict"
}


def _deque(machine: Machine, values: Any = (), length: Any = None) -> Any:
    return _items(machine, values)


def _complex(machine: Machine, real: Any = 0.0, imaginary: Any = 0.0) -> Any:
    if type(real) not in (int, float) or type(imaginary) not in (int, float):
        raise machine.bad("a complex number that is none", found=summary((real, imaginary)))
    return complex(float(real) if abs(real) < 1e308 else 0.0, float(imaginary) if abs(imaginary) < 1e308 else 0.0)


def _range(machine: Machine, *bounds: Any) -> Any:
    return Opaque("builtins.range", tuple(summary(bound) for bound in bounds))


def _slice(machine: Machine, *bounds: Any) -> Any:
    return Opaque("builtins.slice", tuple(summary(bound) for bound in bounds))


def _bytes(machine: Machine, value: Any = b"", encoding: Any = "latin-1") -> Any:
    """bytes() and bytearray() of bytes or of text with its encoding; a number of zero bytes is refused (it allocates)."""
    if isinstance(value, (bytes, Blob)):
        return value
    if isinstance(value, str):
        return _encode(machine, value, encoding)
    if type(value) in (list, tuple) and all(type(item) is int and 0 <= item < 256 for item in value):
        machine.budget.copy(len(value))
        return bytes(value)
    return NotImplemented


def _encode(machine: Machine, text: Any, encoding: Any = "utf-8") -> Any:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        return NotImplemented
    machine.budget.copy(len(text))
    return latin1(text) if encoding.startswith("latin") else text.encode("utf-8", "surrogatepass")


def _constructor(machine: Machine, kind: Any, base: Any = None, state: Any = None) -> Any:
    if type(kind) is not Global:
        return NotImplemented
    if kind.qualname in DATA and state in (None, [], {}, ()):
        return reconstruct(machine, kind, (), "made", True)
    return reconstruct(machine, kind, () if state is None else (state,), "made", True)


def _new(machine: Machine, kind: Any, *args: Any) -> Any:
    return machine.call(kind, args, "made", new=True)


def _array_start(machine: Machine, kind: Any = None, shape: Any = None, code: Any = None) -> Any:
    return Array()


def _array_state(machine: Machine, target: Array, state: Any) -> None:
    if type(state) is not tuple or len(state) not in (4, 5):
        raise machine.bad("an array's state of the wrong form", found=summary(state))
    shape, kind, fortran, data = state[-4:]
    if not isinstance(kind, ArrayType):
        raise machine.bad("an array without a dtype", found=summary(kind))
    if isinstance(data, list):
        target.found = Record("numpy.ndarray", (f"object array of shape {summary(shape)}", data))
        return
    if isinstance(data, str):
        machine.budget.copy(len(data))
    target.found = _guarded(lambda: array(data, kind, shape, bool(fortran), machine.budget))


def _from_buffer(machine: Machine, data: Any, kind: Any, shape: Any, order: Any) -> Any:
    if not isinstance(kind, ArrayType):
        raise machine.bad("an array without a dtype", found=summary(kind))
    return _guarded(lambda: array(data, kind, shape, order == "F", machine.budget))


def _array_type(machine: Machine, code: Any = "", align: Any = None, copy: Any = None, *rest: Any) -> Any:
    if isinstance(code, DType):
        return ArrayType(code.name)
    if type(code) is Global:
        return ArrayType(code.name.rstrip("_"))
    if not isinstance(code, str) or len(code) > 80:
        return Record("numpy.dtype", (code,))
    return ArrayType(code)


def _type_state(machine: Machine, target: ArrayType, state: Any) -> None:
    if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
        raise machine.bad("a numpy dtype's state of the wrong form", found=summary(state))
    target.order = state[1]


_NUMBERS = {"f": {2: "e", 4: "f", 8: "d"}, "i": {1: "b", 2: "h", 4: "i", 8: "q"}, "u": {1: "B", 2: "H", 4: "I", 8: "Q"}, "b": {1: "?"}}


def _scalar(machine: Machine, kind: Any, data: Any = None) -> Any:
    """A numpy scalar as the Python number it is; other kinds by name."""
    if not isinstance(kind, ArrayType):
        return Record("numpy.generic", (kind, data))
    raw = latin1(data) if isinstance(data, str) else data
    layout = _NUMBERS.get(kind.code[:1], {}).get(kind.dtype.itemsize if kind.dtype else 0)
    if layout is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(layout):
        return Record("numpy.generic", (kind.code, data))
    return struct.unpack((">" if kind.big_endian else "<") + layout, raw)[0]


_JOBLIB = "joblib.numpy_pickle.NumpyArrayWrapper"


def _joblib_wrapper(machine: Machine, *args: Any) -> Any:
    return Record(_JOBLIB, ())


def _joblib_array(machine: Machine, target: Record, state: Any) -> None:
    """joblib stores an array's bytes in the stream, right after the object that describes it."""
    from upparam.tensors import contiguous_strides

    kind = state.get("dtype") if isinstance(state, dict) else None
    shape: Any = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(kind, ArrayType) or not whole_numbers(shape):
        raise machine.bad("a joblib array without dtype and shape", found=summary(state))
    if kind.dtype is None:
        raise machine.bad("a joblib array of objects is another pickle inside this one; it is not read", found=kind.code)
    if state.get("numpy_array_alignment_bytes") is not None:
        machine.take(machine.take(1)[0])
    count = 1
    for size in shape:
        count *= max(size, 0)
    start, nbytes = machine.at, count * kind.dtype.itemsize
    machine.at += nbytes
    if machine.at > len(machine.data):
        raise machine.bad("the file ends inside an array", expected=f"{nbytes} bytes", found=len(machine.data) - start)
    storage = Storage(kind.dtype, machine.source, machine.base + start, nbytes, kind.big_endian)
    dtype = kind.dtype
    strides = contiguous_strides(shape[::-1])[::-1] if state.get("order") == "F" and len(shape) > 1 else None
    target.args = (_guarded(lambda: view(storage, dtype, 0, tuple(shape), strides, machine.budget)),)


DATA: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _from_numpy,
    "torch._utils._rebuild_xla_tensor": _from_numpy,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_qtensor": _unread("quantised"),
    "torch._utils._rebuild_sparse_tensor": _unread("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _unread("sparse"),
    "torch._utils._rebuild_nested_tensor": _unread("nested"),
    "torch._utils._rebuild_wrapper_subclass": _unread("a wrapper without data"),
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.nn.parameter.Buffer": _parameter,
    "torch.Tensor": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _first,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _defaultdict,
    "collections.deque": _deque,
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.tuple": _size,
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.complex": _complex,
    "builtins.range": _range,
    "builtins.slice": _slice,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _constructor,
    "copyreg.__newobj__": _new,
    "numpy.ndarray": _array_start,
    "numpy.dtype": _array_type,
    "numpy._core.multiarray._reconstruct": _array_start,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _from_buffer,
    _JOBLIB: _joblib_wrapper,
}
"""Our own reading of each trusted call: (machine, *arguments) -> stand-in, or NotImplemented for arguments that no data needs."""
