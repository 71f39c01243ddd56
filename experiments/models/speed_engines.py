"""The engines that `speed.py` compares, each in a process of its own that waits its turn.

    python experiments/models/speed_engines.py ENGINE FOLDER PRECISION THREADS

ENGINE is jaxsys, offload, transformers or llama.cpp; FOLDER holds the model in the Hugging Face
form, and as `PRECISION.gguf` for llama.cpp. One JSON object a line comes in, and one goes out:

    {"do": "load"}                            -> {"load_s"}
    {"do": "run", "prompt": [..], "new": n}   -> {"prefill_s", "decode_s", "tokens"}
    {"do": "bandwidth", "bytes": n}           -> {"bytes_per_s"}         (jaxsys, offload)

`prefill_s` ends when the first new token is known, `decode_s` covers the `new` - 2 tokens from the
third on (jaxsys' first decode step may compile, so no engine's is counted).
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class Jaxsys:
    """The package as its users call it: `lm.load` and `generate`."""

    def __init__(self, folder: Path, precision: str, threads: int):
        import jax

        # XLA's pool has one thread for each core that the process may use.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        jax.config.update("jax_platforms", "cpu")
        self.folder, self.precision = folder, precision
        self.model: Any = None

    def load(self) -> None:
        """Read the model; in 8 bits, quantise it, head and embedding too."""
        import jax

        from jaxsys.evaluate import from_lm
        from jaxsys.models import lm
        from jaxsys.models.quantise import quantise

        self.model = None
        params, config = lm.load(self.folder)
        if self.precision == "int8":
            params = quantise(params, ("*.weight",))
        self.model = jax.block_until_ready(from_lm(params, config).params), config

    def run(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Continue the prompt greedily."""
        from jaxsys.evaluate import from_lm, generate

        assert self.model is not None
        found = generate(from_lm(*self.model), [prompt], max_tokens=new)
        return {
            "prefill_s": found.first_s,
            "decode_s": found.decode_s,
            "tokens": found.tokens[0],
        }

    def bandwidth(self, n_bytes: int) -> dict[str, Any]:
        """Time the fastest of ten f32 matrix-vector products, which read a matrix once."""
        import jax
        import jax.numpy as jnp

        rows = n_bytes // (4 * 4096)
        matrix, x = jnp.ones((rows, 4096)), jnp.ones(4096)
        product = jax.jit(lambda w, x: jax.lax.dot_general(w, x, (((1,), (0,)), ((), ()))))
        times = []
        for _ in range(12):
            begin_s = time.perf_counter()
            product(matrix, x).block_until_ready()
            times.append(time.perf_counter() - begin_s)
        return {"bytes_per_s": matrix.nbytes / min(times[2:])}


class Offload(Jaxsys):
    """The same package's `jaxsys.offload` on a CPU alone, placed from the mapped file."""

    def load(self) -> None:
        """Map the model; in 8 bits, quantise what `place_model` quantises."""
        import jax

        from jaxsys.offload.engine import make_engine
        from jaxsys.offload.load import open_model, place_model, tensor_bytes
        from jaxsys.offload.parts import parts_of
        from jaxsys.offload.place import cpu_plan, find_devices

        self.model = None
        int8 = self.precision == "int8"
        config, tensors, _ = open_model(self.folder)
        plan = cpu_plan(parts_of(config, sizes=tensor_bytes(tensors, int8=int8)))
        placed = place_model(self.folder, plan, find_devices("none"), int8=int8)
        jax.block_until_ready(placed.tree)
        self.model = make_engine(placed)

    def run(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Continue the prompt greedily."""
        from jaxsys.offload.generate import generate

        assert self.model is not None
        found = generate(self.model, [prompt], max_tokens=new)
        return {
            "prefill_s": found.first_s,
            "decode_s": found.decode_s,
            "tokens": found.tokens[0],
        }


class Transformers:
    """PyTorch on CPU with transformers' own cache, in the shortest loop that gives the tokens."""

    def __init__(self, folder: Path, precision: str, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.folder, self.model = folder, None
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]

    def load(self) -> None:
        """Read the model."""
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model = None
        gc.collect()
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        self.model = model.eval()

    def run(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Continue the prompt greedily."""
        import torch

        assert self.model is not None
        with torch.inference_mode():
            begin_s = time.perf_counter()
            out = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens, prefill_s = [int(token)], time.perf_counter() - begin_s
            for i in range(1, new):
                if i == 2:
                    begin_s = time.perf_counter()
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(token))
        decode_s = time.perf_counter() - begin_s
        return {"prefill_s": prefill_s, "decode_s": decode_s, "tokens": tokens}


class LlamaCpp:
    """llama.cpp through its C functions, fed with token ids."""

    def __init__(self, folder: Path, precision: str, threads: int):
        import llama_cpp

        self.c, self.threads, self.model, self.context = llama_cpp, threads, None, None
        self.path = str(folder / f"{precision}.gguf").encode()
        # Keys and values in the precision of the weights, 8 bits excepted.
        self.cache_type = {"float32": 0, "bfloat16": 30, "int8": 1}[precision]
        # The callback must outlive the library's use of it.
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()

    def load(self) -> None:
        """Map the file and make a context."""
        c = self.c
        if self.context is not None:
            c.llama_free(self.context)
            c.llama_model_free(self.model)
        self.model = c.llama_model_load_from_file(self.path, c.llama_model_default_params())
        settings = c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = 512
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.type_k = settings.type_v = self.cache_type
        self.context = c.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {self.path!r}")
        self.vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def _next(self, tokens: list[int]) -> int:
        c, n = self.c, len(tokens)
        ids = (c.llama_token * n)(*tokens)
        if c.llama_decode(self.context, c.llama_batch_get_one(ids, n)):
            raise RuntimeError("llama.cpp could not decode")
        logits = c.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def run(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Continue the prompt greedily."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        begin_s = time.perf_counter()
        tokens = [self._next(prompt)]
        prefill_s = time.perf_counter() - begin_s
        for i in range(1, new):
            if i == 2:
                begin_s = time.perf_counter()
            tokens.append(self._next(tokens[-1:]))
        decode_s = time.perf_counter() - begin_s
        return {"prefill_s": prefill_s, "decode_s": decode_s, "tokens": tokens}


ENGINES = {
    "jaxsys": Jaxsys,
    "offload": Offload,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}


def write_gguf(path: Path, params: dict[str, Any], config: Any, precision: str) -> None:
    """Write a Llama or Mixtral for llama.cpp, without a vocabulary; gains and routers in float32.

    Rotary pairs become adjacent rows, and the experts of a layer one tensor.
    """
    import gguf
    from gguf.quants import quantize

    kinds = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
    kind = gguf.GGMLQuantizationType[kinds[precision]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.expert_width or config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_vocab_size(config.vocab_size)
    if config.experts:
        writer.add_expert_count(config.experts)
        writer.add_expert_used_count(config.experts_per_token)
    writer.add_tokenizer_model("no_vocab")
    for name, array in gguf_tensors(params, config):
        exact = array.ndim == 1 or "ffn_gate_inp" in name
        if exact or precision == "float32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(params: dict[str, Any], config: Any):
    """Give each tensor under GGUF's name, float32."""
    from jaxsys.core.tree import flatten
    from jaxsys.models.lm.gguf import INSIDE, OUTSIDE

    flat = {name: np.asarray(x, np.float32) for name, x in flatten(params).items()}
    for name, hf in OUTSIDE.items():
        if hf in flat:
            yield name, flat[hf]
    for i in range(config.layers):
        prefix = f"model.layers.{i}."
        for name, hf in INSIDE.items():
            array = flat.get(f"{prefix}{hf}.weight")
            if array is not None:
                rotary = name in ("attn_q", "attn_k")
                yield f"blk.{i}.{name}.weight", _adjacent(array, config) if rotary else array
        moe = f"{prefix}block_sparse_moe."
        if config.experts:
            yield f"blk.{i}.ffn_gate_inp.weight", flat[f"{moe}gate.weight"]
            for name, hf in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                experts = [flat[f"{moe}experts.{e}.{hf}.weight"] for e in range(config.experts)]
                yield f"blk.{i}.ffn_{name}_exps.weight", np.stack(experts)


def _adjacent(array: np.ndarray, config: Any) -> np.ndarray:
    """Undo `jaxsys.models.lm.gguf.halves`."""
    pairs = array.reshape(-1, 2, config.head_width // 2, array.shape[1])
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(array.shape)


def main() -> None:
    # The libraries may print; what the other side reads goes to a copy of standard output.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[sys.argv[1]](Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    for line in sys.stdin:
        task = json.loads(line)
        if task["do"] == "load":
            begin_s = time.perf_counter()
            engine.load()
            found = {"load_s": time.perf_counter() - begin_s}
        elif task["do"] == "run":
            found = engine.run(task["prompt"], task["new"])
        else:
            assert isinstance(engine, Jaxsys)
            found = engine.bandwidth(task["bytes"])
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
