"""The rotary embedding that a GGUF file describes, as the `rope_parameters` of a transformers configuration.

transformers reads the base of the rotary embedding and ignores its scaling. The scaling is in the metadata (linear,
YaRN) or in tensors (Llama 3.1's factors, LongRoPE), with the meaning that llama.cpp gives them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from serve_app.engines.files.gguf_header import GgufHeader
from serve_app.engines.files.model_files import SourceError

FACTORS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = frozenset((FACTORS, LONG_FACTORS, SHORT_FACTORS))

_TYPE, _FACTOR, _OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
_ORIGINAL_CONTEXT, _ATTENTION = "rope.scaling.original_context_length", "rope.scaling.attn_factor"
_BETAS = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
# The keys of each kind of scaling, beside those that say nothing about how positions are computed.
_KEYS = {None: (), "linear": (), "yarn": tuple(_BETAS.values()), "longrope": (_ATTENTION,)}
_ALWAYS = (_TYPE, _FACTOR, _ORIGINAL_CONTEXT, "rope.scaling.finetuned")
# The values with which other keys change nothing.
_NEUTRAL = {
    _ATTENTION: 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}

Parameters = dict[str, Any]


def scaling(header: GgufHeader) -> Parameters:
    """The scaling of the file's positions as `rope_parameters`; empty if they are not scaled.

    Raises SourceError for a scaling that transformers does not compute.
    """
    kind = header.value(_TYPE) or "linear"  # llama.cpp's default
    factor = header.number(_FACTOR) or header.number(_OLD_FACTOR) or 1.0
    found: Parameters = {}
    if TENSORS & header.tensors.keys():
        found = _by_tensors(header)
        if kind == "yarn" or factor != 1.0:
            raise _unsupported(header, f"{_origin(header)} and {header.key(_FACTOR)} together")
    elif kind == "yarn" and factor != 1.0:
        found = _yarn(header, factor)
    elif kind == "linear" and factor != 1.0:
        found = {"rope_type": "linear", "factor": factor}
    elif kind not in ("linear", "none"):
        raise _unsupported(header, f"{header.key(_TYPE)} {kind} without its factors")
    _refuse_other_keys(header, found.get("rope_type"))
    return found


def set_rope(config: PretrainedConfig, header: GgufHeader) -> None:
    """Give the configuration the base, the size and the scaling of the file's rotary embedding.

    Raises SourceError when the model has no rotary embedding that can be scaled so.
    """
    wanted = scaling(header)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        if wanted:
            raise _unsupported(header, _origin(header))
        return
    if "full_attention" in parameters:  # one set of parameters for each kind of layer
        if wanted and (config.model_type, wanted["rope_type"]) != ("gemma3_text", "linear"):
            raise _unsupported(header, _origin(header))
        parameters["full_attention"].update(wanted)  # llama.cpp, too, does not scale Gemma 3's layers with a window
        return
    parameters.update(_base_and_size(config, parameters, header), **wanted)
    if "short_factor" in wanted:
        _check_factors(config, parameters, header)
    if "original_max_position_embeddings" in wanted and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = wanted["original_max_position_embeddings"]
    if wanted:
        try:
            config.validate_rope()
        except (KeyError, ValueError) as error:  # Phi 3 takes LongRoPE only
            raise _unsupported(header, _origin(header)) from error


def check_rope(model: torch.nn.Module, header: GgufHeader) -> None:
    """Raises SourceError when no rotary embedding of the model applies the file's scaling."""
    wanted = scaling(header)
    kinds: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", ())
        kinds.update([kind] if isinstance(kind, str) else dict(kind).values())
    if wanted and wanted["rope_type"] not in kinds:
        raise _unsupported(header, _origin(header))


def _yarn(header: GgufHeader, factor: float) -> Parameters:
    betas = {name: header.number(key) for name, key in _BETAS.items()}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original_context(header),
        **{name: value for name, value in betas.items() if value is not None},
    }


def _by_tensors(header: GgufHeader) -> Parameters:
    attention = header.number(_ATTENTION)
    if FACTORS in header.tensors:
        # LongRoPE with the same factors for all lengths divides the frequencies as llama.cpp does.
        short = long = header.floats(FACTORS)
        original, attention = _context(header), attention or 1.0
    else:
        for name in (SHORT_FACTORS, LONG_FACTORS):
            if name not in header.tensors:
                raise _unsupported(header, f"{_origin(header)} without {name}")
        short, long, original = header.floats(SHORT_FACTORS), header.floats(LONG_FACTORS), _original_context(header)
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "factor": _context(header) / original,
        "original_max_position_embeddings": original,
        # transformers computes this factor of LongRoPE from the two lengths if the file does not have it.
        **({} if attention is None else {"attention_factor": attention}),
    }


def _refuse_other_keys(header: GgufHeader, kind: str | None) -> None:
    prefix = header.key("rope.scaling.")
    for key in header.metadata:
        name = key.removeprefix(header.key(""))
        if not key.startswith(prefix) or name in (*_ALWAYS, *_KEYS[kind]):
            continue
        if name not in _NEUTRAL or header.number(name) != _NEUTRAL[name]:
            raise _unsupported(header, key)


def _check_factors(config: PretrainedConfig, parameters: Parameters, header: GgufHeader) -> None:
    rotated = int(_head_size(config) * parameters.get("partial_rotary_factor", 1.0))
    for name in ("short_factor", "long_factor"):
        if (count := len(parameters[name])) != rotated // 2:
            raise SourceError(
                f"{header.path}: {_origin(header)} has {count} factors for {rotated} rotated elements of a head, which "
                "need one factor for each two; convert the file again"
            )


def _base_and_size(config: PretrainedConfig, parameters: Parameters, header: GgufHeader) -> Parameters:
    """The base, and the rotated share of a head, which transformers does not read for every architecture."""
    found: Parameters = {}
    if (base := header.number("rope.freq_base")) is not None:
        found["rope_theta"] = float(base)
    share = (header.number("rope.dimension_count") or _head_size(config)) / _head_size(config)
    if share != parameters.get("partial_rotary_factor", 1.0) and share <= 1.0 and not hasattr(config, "rotary_dim"):
        found["partial_rotary_factor"] = share
    return found


def _head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(header: GgufHeader) -> int:
    context = header.number("context_length")
    if not context:
        raise SourceError(f"{header.path} has no {header.architecture}.context_length; convert it again")
    return int(context)


def _original_context(header: GgufHeader) -> int:
    return int(header.number(_ORIGINAL_CONTEXT) or _context(header))


def _origin(header: GgufHeader) -> str:
    """The tensor or the key that scales the positions."""
    keys = [header.key(name) for name in (_TYPE, _FACTOR, _OLD_FACTOR)]
    return next(name for name in (*sorted(TENSORS), *keys) if name in header.tensors or name in header.metadata)


def _unsupported(header: GgufHeader, origin: str) -> SourceError:
    return SourceError(
        f"{header.path} scales its positions ({origin}) in a way that is not supported for this model; use the model's "
        "safetensors files"
    )
