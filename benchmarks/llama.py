"""llama.cpp as a peer: our Mamba's weights as a GGUF file, and its own library's calls, without a server between.

The wheel `xllamacpp` holds the library with its C names; BENCHMARK_LLAMA names another build of it (libllama.so), such
as one for this processor: the wheel is built for any that has AVX2, and has no AVX-512 code (`computes_with` asks).
Structures are passed as it makes them; the only field written is the first of its context's, the context length.
"""

import ctypes
import hashlib
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Missing
from bestiary import LanguageModel

FILES = Path("runs/benchmarks/models")
FORMS = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_0": 2}
"""GGUF's numbers of file types."""


class _Structure(ctypes.Structure):
    """Room for one of llama.cpp's parameter structures, whatever it holds."""

    _fields_ = (("words", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (("n_tokens", ctypes.c_int32), *((f"pointer{i}", ctypes.c_void_p) for i in range(6)))


def write_gguf(model: LanguageModel, form: str, folder: Path = FILES) -> Path:
    """A Mamba of ours as a file that llama.cpp reads; what has rows of no whole blocks of 32 stays in f32.

    One that is there already is taken: its name tells the weights.
    """
    import gguf

    mixers = [block.mixer for block in model.blocks]
    first: Any = mixers[0]
    kind = getattr(gguf.GGMLQuantizationType, form.upper())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"mamba-{len(mixers)}x{model.config.d_model}-{key(model)}-{form}.gguf"
    if path.exists():
        return path
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "mamba")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(model.config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(mixers))
    writer.add_ssm_conv_kernel(first.conv.weight.shape[1])
    writer.add_ssm_inner_size(first.d_inner)
    writer.add_ssm_state_size(first.d_state)
    writer.add_ssm_time_step_rank(first.dt_rank)
    writer.add_layer_norm_rms_eps(model.config.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_file_type(FORMS[form])

    def exact(name: str, tensor: Tensor) -> None:
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().float().numpy()))

    def rounded(name: str, tensor: Tensor) -> None:
        if form == "f32" or tensor.shape[1] % 32:
            return exact(name, tensor)
        array = np.ascontiguousarray(tensor.detach().float().numpy())
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    rounded("token_embd.weight", model.embedding.weight)
    exact("output_norm.weight", model.norm.weight)
    for i, (block, mixer) in enumerate(zip(model.blocks, mixers)):
        at: Any = mixer
        exact(f"blk.{i}.attn_norm.weight", block.norm.weight)
        for name, linear in (
            ("ssm_in", at.in_proj),
            ("ssm_x", at.x_proj),
            ("ssm_dt", at.dt_proj),
            ("ssm_out", at.out_proj),
        ):
            rounded(f"blk.{i}.{name}.weight", linear.weight)
        for name, tensor in (("ssm_conv1d.weight", at.conv.weight), ("ssm_conv1d.bias", at.conv.bias)):
            exact(f"blk.{i}.{name}", tensor)
        exact(f"blk.{i}.ssm_dt.bias", at.dt_proj.bias)
        exact(f"blk.{i}.ssm_a", -at.A_log.exp())
        exact(f"blk.{i}.ssm_d", at.D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"wrote {path}, {part.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
    return part.replace(path)


def key(model: LanguageModel) -> str:
    """Tells models apart: a hash of the configuration and of some numbers of every weight."""
    digest = hashlib.sha256(model.config.to_json().encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:: max(1, tensor.numel() // 256)].float().numpy().tobytes())
    return digest.hexdigest()[:12]


class Llama:
    """A model that llama.cpp loaded: tokens in, the logits after the last of them out."""

    def __init__(self, path: Path, vocabulary: int, *, context: int = 1024, threads: int | None = None):
        self.library, self.vocabulary = library(), vocabulary
        get, pointer = self.library, ctypes.c_void_p
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(get, name).restype = _Structure
        get.llama_model_load_from_file.restype = get.llama_init_from_model.restype = pointer
        get.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Structure]
        get.llama_init_from_model.argtypes = [pointer, _Structure]
        get.llama_set_n_threads.argtypes = [pointer, ctypes.c_int32, ctypes.c_int32]
        get.llama_batch_get_one.restype, get.llama_batch_get_one.argtypes = _Batch, [pointer, ctypes.c_int32]
        get.llama_decode.argtypes = [pointer, _Batch]
        get.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        get.llama_get_logits_ith.argtypes = [pointer, ctypes.c_int32]
        get.llama_get_memory.restype, get.llama_get_memory.argtypes = pointer, [pointer]
        get.llama_memory_clear.argtypes = [pointer, ctypes.c_bool]
        self.silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
        get.llama_log_set(self.silence, None)
        get.llama_backend_init()
        model = get.llama_model_load_from_file(str(path).encode(), get.llama_model_default_params())
        parameters = get.llama_context_default_params()
        parameters.words[0] = context
        self.context = get.llama_init_from_model(model, parameters) if model else None
        if not self.context:
            raise Missing(f"llama.cpp does not load {path}")
        get.llama_n_ctx.restype, get.llama_n_ctx.argtypes = ctypes.c_uint32, [pointer]
        if get.llama_n_ctx(self.context) < context:  # the field written was another
            raise Missing("this build of llama.cpp has other structures than those known here")
        threads = torch.get_num_threads() if threads is None else threads
        get.llama_set_n_threads(self.context, threads, threads)

    def forget(self) -> None:
        """Begin anew."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def read(self, tokens: list[int]) -> None:
        """Compute on, up to the logits after the last token."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if self.library.llama_decode(self.context, self.library.llama_batch_get_one(array, len(tokens))):
            raise Missing("llama.cpp refuses a batch")

    def logits(self) -> Tensor:
        """What `read` left."""
        found = self.library.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(found, (self.vocabulary,)).copy())


@cache
def library() -> ctypes.CDLL:
    """llama.cpp's own."""
    named = os.environ.get("BENCHMARK_LLAMA")
    if named:
        return ctypes.CDLL(named)
    try:
        import xllamacpp
    except ImportError as error:
        raise Missing("xllamacpp is not installed") from error
    folder = Path(xllamacpp.__file__).parent
    return ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))


def computes_with() -> str:
    """The widest instructions that the library was built with, as it says itself; nothing where it is not in use."""
    if not library.cache_info().currsize:
        return ""
    told = {"AVX512": "avx512", "AVX2": "avx2", "NEON": "neon"}
    found = [name for name, at in told.items() if getattr(library(), f"ggml_cpu_has_{at}")()]
    return found[0] if found else "plain C"
