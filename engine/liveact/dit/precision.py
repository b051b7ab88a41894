"""Which format each product of the DiT runs in: a name, or a policy file.

A name is the same for all: `fp32`, `bf16`, or `fp8` (operands in fp8, bf16 between the layers).
`auto` is `fp8`, but the products that cost the most accuracy and no time are in bf16 where the
device has memory for that. A policy says fp8 or bf16 for every product of every layer, and keeps
the error it was chosen by. `liveact calibrate` writes one; it is JSON, made to be read and edited
by hand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liveact import _core
from liveact.errors import InputError
from liveact.files import read_json

PRECISIONS = ("fp32", "auto", "fp8", "bf16")
AUTO = "auto"
# What `auto` has in bf16 where it fits: computed once per prompt and picture, and read by all
# tokens, so that its error does not average out (docs/precision.md).
ROOMY_PRODUCT = "cross_kv"
FORMATS = ("fp8", "bf16")  # of one product in a policy
SUMS = ("fast", "full")  # of the fp8 products of a policy, see docs/precision.md
ACTIVATIONS = "bf16"  # between the products of a policy, as in the released code
PRODUCTS: tuple[str, ...] = tuple(_core.products())

# Product -> the linears of a layer that it is made of. Attention has none.
PRODUCT_LINEARS = {product: _core.product_linears()[product] for product in PRODUCTS}

_VERSION = 1
_VERSION_KEY = "liveact_precision_policy"
_KEYS = (_VERSION_KEY, "activations", "sums", "measured", "layers")
_MAX_POLICY_BYTES = 2**24


@dataclass(frozen=True)
class Choice:
    """The format of one product. error: relative, of fp8 against bf16; None where not measured."""

    format: str
    error: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PrecisionPolicy:
    """One choice per product and layer. name: for messages. measured: how, in free form. sums: of
    fp8 products, one of SUMS."""

    layers: tuple[Mapping[str, Choice], ...]
    name: str = field(default="policy", compare=False)
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)
    sums: str = SUMS[0]

    def __str__(self) -> str:
        choices = [choice for layer in self.layers for choice in layer.values()]
        narrow = sum(choice.format == "fp8" for choice in choices)
        full = ", full sums" if self.sums == "full" else ""
        return f"{self.name} ({narrow} of {len(choices)} in fp8{full})"

    @classmethod
    def read(cls, path: Path) -> PrecisionPolicy:
        """Raises InputError naming the file, the layer and the product."""
        if path.is_file() and path.stat().st_size > _MAX_POLICY_BYTES:
            found = path.stat().st_size
            raise InputError(f"{path}: expected at most {_MAX_POLICY_BYTES} bytes, found {found}")
        return cls.from_json(read_json(path), str(path), path.name)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str, name: str) -> PrecisionPolicy:
        """where: the file, for messages."""
        if _VERSION_KEY not in raw:
            raise InputError(f"{where}: expected a precision policy ({_VERSION_KEY}), found none")
        expected: tuple[tuple[str, Any], ...] = (
            (_VERSION_KEY, _VERSION),
            ("activations", ACTIVATIONS),
        )
        for key, value in expected:
            if raw.get(key) != value or isinstance(raw[key], bool):
                raise InputError(f"{where}: expected {key} to be {value!r}, found {raw.get(key)!r}")
        _only(raw, _KEYS, where)
        layers, measured = raw.get("layers"), raw.get("measured", {})
        if not isinstance(layers, list) or not layers:
            raise InputError(f"{where}: expected a list layers, found {layers!r:.80}")
        if not isinstance(measured, dict):
            raise InputError(f"{where}: expected an object measured, found {measured!r:.80}")
        sums = raw.get("sums", SUMS[0])
        if sums not in SUMS:
            raise InputError(f"{where}: expected sums {' or '.join(SUMS)}, found {sums!r:.80}")
        return cls(
            tuple(_read_layer(layer, f"{where}: layer {i}") for i, layer in enumerate(layers)),
            name,
            measured,
            sums,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            _VERSION_KEY: _VERSION,
            "activations": ACTIVATIONS,
            "sums": self.sums,
            "measured": dict(self.measured),
            "layers": [
                {
                    product: {"format": c.format}
                    | ({} if c.error is None else {"error": float(f"{c.error:.3g}")})
                    for product, c in layer.items()
                }
                for layer in self.layers
            ],
        }

    def text(self) -> str:
        """What a policy file has in it: one line per product."""
        return "".join(_lines(self.to_json())) + "\n"

    def core(self) -> dict[str, Any]:
        """What `_core.Model` and `_core.required_bytes` take."""
        formats = [{product: c.format for product, c in layer.items()} for layer in self.layers]
        return {"activations": ACTIVATIONS, "sums": self.sums, "layers": formats}


Precision = str | PrecisionPolicy


def _only(raw: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    if extra := [key for key in raw if key not in keys]:
        raise InputError(f"{where}: expected only {', '.join(keys)}, found {extra[0]!r:.80}")


def _read_layer(raw: object, where: str) -> dict[str, Choice]:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected an object, found {raw!r:.80}")
    _only(raw, PRODUCTS, where)
    return {product: _read_choice(raw.get(product), f"{where}: {product}") for product in PRODUCTS}


def _read_choice(raw: object, where: str) -> Choice:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected an object with a format, found {raw!r:.80}")
    _only(raw, ("format", "error"), where)
    if raw.get("format") not in FORMATS:
        found = raw.get("format")
        raise InputError(f"{where}: expected format {' or '.join(FORMATS)}, found {found!r:.80}")
    error = raw.get("error")
    if error is not None and (
        isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error < math.inf
    ):
        raise InputError(f"{where}: expected error to be 0 or more, found {error!r:.80}")
    return Choice(raw["format"], None if error is None else float(error))


def _lines(value: Any, indent: str = "") -> Iterator[str]:
    """JSON with an object or list of plain values on one line."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, dict | list) for item in nested):
        yield json.dumps(value)
        return
    is_object = isinstance(value, dict)
    deeper = indent + "  "
    yield "{" if is_object else "["
    for i, item in enumerate(value.items() if is_object else value):
        yield f"{',' if i else ''}\n{deeper}"
        if is_object:
            yield f"{json.dumps(item[0])}: "
        yield from _lines(item[1] if is_object else item, deeper)
    yield f"\n{indent}{'}' if is_object else ']'}"


def read_precision(given: str | Path) -> Precision:
    """A name, or the policy in a file. Raises InputError."""
    if given in PRECISIONS:
        return str(given)
    if not os.path.isfile(given):
        names = ", ".join(PRECISIONS)
        raise InputError(f"precision: expected {names} or a policy file, found {str(given)!r}")
    return PrecisionPolicy.read(Path(given))


def auto_policy(num_layers: int, roomy: str) -> PrecisionPolicy:
    """`auto` with ROOMY_PRODUCT in the format `roomy`, bf16 or fp8."""
    layer = {p: Choice(roomy if p == ROOMY_PRODUCT else "fp8") for p in PRODUCTS}
    return PrecisionPolicy((layer,) * num_layers, f"{AUTO}, {ROOMY_PRODUCT} in {roomy}")


def core_precision(precision: Precision) -> str | dict[str, Any]:
    """What the runtime takes: anything but `auto`, which is a policy by then."""
    return precision if isinstance(precision, str) else precision.core()


def format_of(precision: Precision, layer: int, product: str) -> str:
    """The widest format that the operands of a product may get: fp32, bf16 or fp8."""
    if isinstance(precision, PrecisionPolicy):
        return precision.layers[layer][product].format
    if precision == AUTO:
        return "bf16" if product == ROOMY_PRODUCT else "fp8"
    return precision


def check_layers(precision: Precision, num_layers: int) -> None:
    """Raises InputError where a policy is for another number of layers."""
    if not isinstance(precision, str) and len(precision.layers) != num_layers:
        raise InputError(
            f"{precision.name}: expected {num_layers} layers as in the checkpoint, "
            f"found {len(precision.layers)}"
        )


# ------------------------------------------------------------------- of a converted checkpoint

CONVERTED_KEY = "_converted"  # in config.json: what `liveact convert` did
CONVERTED_VERSION = 1


def converted_precision(directory: Path) -> Precision | None:
    """What a checkpoint was converted to; None for one as released, or without a DiT.

    Raises InputError.
    """
    path = directory / "config.json"
    record = read_json(path).get(CONVERTED_KEY) if path.exists() else None
    if record is None:
        return None
    if not isinstance(record, dict) or record.get("version") != CONVERTED_VERSION:
        raise InputError(
            f"{path}: expected {CONVERTED_KEY} of version {CONVERTED_VERSION}, found {record!r:.80}"
        )
    precision = record.get("precision")
    if isinstance(precision, dict):
        return PrecisionPolicy.from_json(precision, str(path), directory.name)
    if precision not in (AUTO, "fp8"):
        raise InputError(
            f"{path}: expected precision auto, fp8 or a policy, found {precision!r:.80}"
        )
    return str(precision)


def choose_precision(
    given: str | Path | PrecisionPolicy | None, checkpoint: Path | None
) -> Precision | None:
    """What was asked for, else what the checkpoint was converted to, else None."""
    if given is None:
        return None if checkpoint is None else converted_precision(checkpoint)
    return given if isinstance(given, PrecisionPolicy) else read_precision(given)
