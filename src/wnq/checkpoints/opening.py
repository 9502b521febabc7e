"""What to open and what to call it: files, folders, indices, names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from wnq.checkpoints.mapped import MAX_HEADER, MappedFile, at, parsed
from wnq.checkpoints.pickled import PickledFile
from wnq.checkpoints.source import Source, TensorInfo
from wnq.names import did_you_mean
from wnq.prepared import ORIGINAL

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

QUANTIZER_STATES = re.compile(
    r"(^|\.)(parametrizations\.weight\.\d+|weight_quantizer|(in|out)put_quantizer|output_module)\."
)
"""What a quantized model has beside the states of the float one."""

_NORMALIZATION = re.compile(r"(norm|^ln|^bn|_ln|_bn)(_?(\d+|[a-z]))?$", re.IGNORECASE)
_NOT_WEIGHTS = re.compile(r"(bias|_token|mask|pos_emb\w*|position\w*_emb\w*|position\w*_table)$|^(bias|running)_")


class Checkpoint:
    """Tensors by name; made by :func:`open_checkpoint`. Holds no file open."""

    def __init__(self, path: Path, sources: Mapping[str, tuple[Source, str]]) -> None:
        self.path = path
        """What was opened."""
        self._sources = dict(sources)
        self.tensors: tuple[TensorInfo, ...] = tuple(
            TensorInfo(name, info.shape, info.dtype, info.bytes, info.file)
            for name, (source, stored) in self._sources.items()
            for info in [source.stored[stored]]
        )
        """All tensors, in the order of the files."""

    @property
    def weights(self) -> tuple[TensorInfo, ...]:
        """The tensors worth quantizing, see :func:`is_weight`."""
        return tuple(info for info in self.tensors if is_weight(info))

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU and in its own type. Writing to it changes memory only, never the file.

        Raises:
            ValueError: there is no such tensor, or the file changed since it was opened.
            OSError: the file cannot be read.
        """
        if name not in self._sources:
            raise ValueError(f"{self.path} has no tensor {name!r}.{did_you_mean(name, self._sources)}")
        source, stored = self._sources[name]
        return source.read(stored)


def is_weight(info: TensorInfo) -> bool:
    """Say whether a tensor is worth quantizing: floating point, at least two dimensions, not empty, nothing else by its name.

    Something else is what belongs to a normalization (its layer is called ``…norm``, ``norm1``, ``ln_f``, ``bn2``, …), and what
    is called a bias, a mask, a token, a position embedding or a running statistic (``…bias``, ``cls_token``, ``pos_embed``, …).
    """
    if not info.dtype.is_floating_point or len(info.shape) < 2 or 0 in info.shape:
        return False
    *owners, last = info.name.split(".")
    return not (_NOT_WEIGHTS.search(last) or (owners and _NORMALIZATION.search(owners[-1])))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint, file or folder, whatever its format; see :mod:`wnq.checkpoints`.

    Raises:
        ValueError: it is missing, damaged, no checkpoint, a pickle with code, a packed wnq file, or without tensors.
    """
    path = Path(path)
    if path.is_dir():
        path, names = path, _in_folder(path)
    elif path.name.endswith(".index.json"):
        names = _indexed(path)
    elif path.suffix in SUFFIXES:
        names = _all_of([path])
    else:
        expected = "a missing file" if not path.exists() else f"a file ending in {path.suffix!r}"
        raise ValueError(
            f"cannot open {path}: expected a checkpoint ({', '.join(SUFFIXES)}, .index.json, or a folder with one), got {expected}."
        )
    public: dict[str, tuple[Source, str]] = {}
    for stored, source in names.items():
        name = re.sub(rf"(^|\.){re.escape(ORIGINAL)}$", r"\1weight", stored)
        if name == stored and QUANTIZER_STATES.search(stored):
            continue
        if name in public:
            raise ValueError(
                f"{path}: {stored!r} and {public[name][1]!r} both stand for {name!r}; the checkpoint is damaged."
            )
        public[name] = source, stored
    if not public:
        raise ValueError(f"{path} holds no tensors; expected the weights of a model by name.")
    return Checkpoint(path, public)


def _in_folder(folder: Path) -> dict[str, Source]:
    """Return the tensors of the first checkpoint in a folder: safetensors before pickles, the usual names before others."""
    for usual, pattern in [("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")]:
        if (folder / usual).is_file():
            return _all_of([folder / usual])
        index = folder / f"{usual}.index.json"
        indices = [index] if index.is_file() else sorted(folder.glob(f"{pattern}.index.json"))
        if len(indices) > 1:
            raise ValueError(
                f"{folder} holds {len(indices)} indices, {', '.join(p.name for p in indices)}; open one of them."
            )
        if indices:
            return _indexed(indices[0])
        if files := sorted(file for file in folder.glob(pattern) if file.is_file()):
            return _all_of(files)
    raise ValueError(
        f"{folder} holds no checkpoint; expected model.safetensors, *.safetensors or pytorch_model*.bin, or their index. "
        "Give the file itself if it has another name."
    )


def _all_of(files: list[Path]) -> dict[str, Source]:
    names: dict[str, Source] = {}
    origin: dict[str, Path] = {}
    for file in files:
        source = _source(file)
        for name in source.stored:
            if name in names:
                raise ValueError(
                    f"{file.name} and {origin[name].name} in {file.parent} both hold {name!r}; open one of them."
                )
            names[name], origin[name] = source, file
    return names


def _indexed(index: Path) -> dict[str, Source]:
    """Return the tensors that an index names, from shards that lie beside it."""
    with at(index) as file:
        content = parsed(index, file.read(MAX_HEADER))
    table = cast(Any, content).get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise ValueError(f"{index}: expected an index with a 'weight_map' from tensor names to files.")
    sources: dict[str, Source] = {}
    for file in sorted(set(table.values())):
        if Path(file).name != file or "\\" in file or ":" in file or "\0" in file or not file.endswith(SUFFIXES):
            raise ValueError(
                f"{index} names the shard {file!r}; expected the name of a weights file beside it, without a path."
            )
        if not (index.parent / file).is_file():
            raise ValueError(
                f"{index} names the shard {file!r}, which is missing; download or copy it into {index.parent}."
            )
        sources[file] = _source(index.parent / file)
    for name, file in table.items():
        if name not in sources[file].stored:
            raise ValueError(
                f"{index} says that {file} holds {name!r}, but it does not; the shard is damaged or another one."
            )
    return {name: sources[file] for name, file in table.items()}


def _source(file: Path) -> Source:
    return MappedFile(file) if file.suffix == ".safetensors" else PickledFile(file)
