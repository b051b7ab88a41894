"""Opening weight files safely.

Two formats exist in a checkpoint directory: safetensors (one file, or shards with an index), which
the runtime reads (include/liveact/tensor_files.h), and `.pth`, which is a pickle. Both are mapped,
not read: opening a 28 GB checkpoint costs a header. Names, shapes and dtypes are known without
touching data, so a checkpoint can be refused before anything large is allocated, and no size that a
header claims is believed before it was compared with the size of the file.

Whatever is wrong with a file becomes one `InputError` of one line that names the file and, where
there is one, the tensor, what was expected and what was found.

NOTE: the tensors are private mappings of the files. Writing to one changes this process only, but
a file that is truncated while its tensors are in use kills the process (SIGBUS); replace
checkpoint files by renaming, never in place.
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import nn

from liveact import _core
from liveact.errors import InputError
from liveact.files import one_line, require_file

FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ZIP_MAGIC = b"PK\x03\x04"


# ------------------------------------------------------------------------------- safetensors


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of one or more safetensors files, by name; on the CPU, mapped by the runtime.

    A tensor stays valid after `close()`: it keeps the mapping of its file alive by itself. Writing
    to one changes this process only.

    Attributes:
        source: the file, or the index of the shards, that this was opened from.
    """

    def __init__(self, files: _core.TensorFiles) -> None:
        self.source = files.source
        self._stored: dict[str, _core.StoredTensor] = {name: files[name] for name in files.names}
        self._shapes = {name: tuple(stored.shape) for name, stored in self._stored.items()}
        self._dtypes = {n: SAFETENSORS_DTYPES[stored.dtype] for n, stored in self._stored.items()}
        self._file_of = {name: stored.file for name, stored in self._stored.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header; `KeyError` where there is no such tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor, from the header; `KeyError` where there is no such tensor."""
        return self._dtypes[name]

    def file_of(self, name: str) -> Path:
        """The file a tensor lies in; `KeyError` where there is no such tensor."""
        return self._file_of[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        shape, dtype = self._shapes[name], self._dtypes[name]
        if not self._stored:
            raise ValueError(f"{self.source}: expected open tensors, found them closed")
        if 0 in shape:  # torch makes none of an empty buffer
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._stored[name], dtype=dtype).view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def close(self) -> None:
        """Lets go of the files; names, shapes and tensors already taken stay usable."""
        self._stored = {}

    def __enter__(self) -> Tensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_tensor_file(path: Path) -> Tensors:
    """Opens one safetensors file; `InputError` if it is not one."""
    return Tensors(_core.TensorFiles(path))


def open_tensors(directory: Path, stem: str) -> Tensors:
    """Opens `<stem>.safetensors` in a directory, or the shards of `<stem>.safetensors.index.json`.

    The index says which shards there are and every tensor it names must be in the shard it
    names. Tensors of a shard that the index forgets are there all the same, as they are for the
    loader the released checkpoints were written for.

    Raises:
        InputError: neither or both exist; an index or a shard is malformed; a tensor is missing
            from its shard or in two shards.
    """
    return Tensors(_core.TensorFiles(directory, stem))


# --------------------------------------------------------------------------------------- .pth


class PthTensors(dict[str, torch.Tensor]):
    """The tensors of a `.pth` file, by name. A dict that can say what `Tensors` can say."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
        super().__init__(tensors)
        self.source = source

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; `KeyError` where there is no such tensor."""
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor; `KeyError` where there is no such tensor."""
        return self[name].dtype

    def file_of(self, name: str) -> Path:
        """The file, which is the same for all tensors."""
        return self.source


def _not_weights(path: Path, error: Exception) -> InputError:
    """For a file that torch cannot open: what it is, where that is known, else the error."""
    found = _core.other_form(path, "torch") or one_line(error)
    return InputError(f"{path}: expected a torch state dict, found {found}")


def load_pth(path: Path) -> PthTensors:
    """The state dict in a file of `torch.save`, mapped; no code in it is ever run.

    Files in torch's format of before version 1.6 cannot be mapped and are read instead.

    Raises:
        InputError: not such a file, damaged, not a dict of names to dense tensors, or something
            that only unpickling with code could load.
    """
    path = Path(path)
    if not path.exists() and (instead := _core.other_files(path.parent, path.stem, "torch")):
        raise InputError(f"{path}: expected a file, found nothing{instead}")
    path = require_file(path)
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        if is_zip:
            _check_pth_sizes(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except InputError:
        raise
    # Unpickling damaged bytes raises nearly anything, from KeyError to MemoryError.
    except Exception as error:
        raise _not_weights(path, error) from error
    _check_state(state, path)
    return PthTensors(state, path)


def _check_pth_sizes(path: Path) -> None:
    """Refuses a zipped `.pth` that claims more bytes than the file has, before allocating them.

    The pickle inside repeats sizes; loading onto the meta device reads the pickle only.
    """
    file_bytes = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise InputError(f"{path}: expected a torch state dict, found a TorchScript program")
    record_bytes = sum(record.file_size for record in records)
    if record_bytes > file_bytes:
        raise InputError(
            f"{path}: expected records of at most {file_bytes} bytes, found {record_bytes} bytes"
        )
    _check_state(torch.load(path, map_location="meta", weights_only=True), path)


def _check_state(state: object, path: Path) -> None:
    """Refuses what is not a dict of names to dense tensors that fit in the file."""
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a dict of tensors, found {type(state).__name__}")
    file_bytes = path.stat().st_size
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path}: expected names and tensors, found {name!r:.80}: {type(tensor).__name__}"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise InputError(f"{path}: tensor {name!r}: expected dense, found {tensor.layout}")
        tensor_bytes = max(tensor.untyped_storage().nbytes(), tensor.nbytes)
        if tensor_bytes > file_bytes:
            raise InputError(
                f"{path}: tensor {name!r}: expected at most the {file_bytes} bytes of the file, "
                f"found {tensor_bytes} bytes"
            )


# ------------------------------------------------------------------------- checking and using


class TensorSource(Protocol):
    """What `Tensors` and `PthTensors` have in common."""

    source: Path

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def file_of(self, name: str) -> Path: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str, /) -> torch.Tensor: ...


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensors(
    found: TensorSource,
    expected: Mapping[str, tuple[int, ...]],
    dtypes: Collection[torch.dtype],
    what: str,
    refuse_extra_prefix: tuple[str, ...] = (),
) -> None:
    """Refuses a checkpoint that is not the expected model; touches no data.

    Args:
        found: `Tensors` or `PthTensors`.
        expected: name → shape of every tensor that must be there.
        dtypes: the element types that are allowed.
        what: name of the model, for the message.
        refuse_extra_prefix: a tensor whose name starts so and is not expected is refused (more
            layers than the configuration says); any other tensor may be there unused.

    Raises:
        InputError: at the first difference; names the file, the tensor, expected and found.
    """
    for name, shape in expected.items():
        if name not in found:
            raise InputError(
                f"{found.source}: {what}: expected tensor {name!r} of shape {list(shape)}, "
                f"found {_core.other_names(set(found), name)}"
            )
        where = f"{found.file_of(name)}: {what}: tensor {name!r}"
        if found.shape(name) != tuple(shape):
            raise InputError(
                f"{where}: expected shape {list(shape)}, found {list(found.shape(name))}"
            )
        if found.dtype(name) not in dtypes:
            allowed = " or ".join(sorted(map(_dtype_name, dtypes)))
            raise InputError(
                f"{where}: expected dtype {allowed}, found {_dtype_name(found.dtype(name))}"
            )
    for name in found:
        if name.startswith(refuse_extra_prefix) and name not in expected:
            raise InputError(
                f"{found.file_of(name)}: {what}: expected no more than the {len(expected)} "
                f"tensors that the configuration gives, found tensor {name!r}"
            )


def assign_tensors(
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Makes `tensors` the parameters of a module built on the meta device, for inference.

    Converts one tensor at a time, and none that is already of this dtype and on this device, so
    that a mapped checkpoint stays mapped. `tensors` has every name of `module.state_dict()`.
    """
    # By identity, so that tied weights stay tied; the dict keeps the originals alive.
    converted: dict[int, torch.Tensor] = {}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return converted.setdefault(id(tensor), tensor.to(device=device, dtype=dtype))

    state = {name: convert(tensor) for name, tensor in tensors.items()}
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)
