"""Another engine for scripts/bench_serve.py, in a process of its own: requests on stdin, answers on stdout, JSON lines.

    python scripts/bench_peer.py vllm DIR --threads 1 --batch 8 --tokens 576 --dtype float32
    python scripts/bench_peer.py llama.cpp FILE.gguf --threads 1 --batch 8 --tokens 576

The first answer is {"version": ...}. A request {"prompts": [[token ids], ...], "new": n} generates n tokens greedily after every
prompt, all prompts together, and its answer has the wall and CPU seconds of this process, and the number of tokens that each
prompt got.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

Generate = Callable[[list[list[int]], int], list[int]]  # prompts, new tokens → number of tokens of each


def main() -> None:
    """Load the model, then answer until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["vllm", "vllm-eager", "llama.cpp"], help="vllm: with torch.compile, as it starts")
    parser.add_argument("model", help="model directory, or the .gguf file of llama.cpp")
    parser.add_argument("--threads", type=int, required=True, help="of the arithmetic")
    parser.add_argument("--batch", type=int, required=True, help="prompts at a time")
    parser.add_argument("--tokens", type=int, required=True, help="of a prompt and its new tokens")
    parser.add_argument("--dtype", default="float32", help="of vLLM's arithmetic; llama.cpp's is that of the file")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints does not go among the answers
    generate, version = (llama_cpp if options.engine == "llama.cpp" else vllm)(options)
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        made = generate(asked["prompts"], asked["new"])
        took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "made": made}
        print(json.dumps(took), file=answers, flush=True)


def vllm(options: argparse.Namespace) -> tuple[Generate, str]:
    """vLLM with a cache for all prompts, without shared prefixes: prompts come again."""
    os.environ.update(
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(options.threads),
        }
    )
    import torch
    import vllm

    torch.set_num_threads(options.threads)
    llm = vllm.LLM(
        model=options.model,
        dtype=options.dtype,
        enforce_eager=options.engine == "vllm-eager",
        max_model_len=options.tokens,
        max_num_seqs=options.batch,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2 << 30,
    )

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return generate, vllm.__version__


def llama_cpp(options: argparse.Namespace) -> tuple[Generate, str]:
    """llama.cpp's server, called in the process (package xllamacpp), with a cache in fp32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    room = -(-options.tokens // 256) * 256  # of a slot
    params.n_parallel, params.n_ctx = options.batch, options.batch * room
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_ram_mib, params.n_gpu_layers, params.verbosity = 0, 0, 0
    server, threads = xllamacpp.Server(params), ThreadPoolExecutor(options.batch)

    def one(prompt: list[int], new: int) -> int:
        asked = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return server.handle_completions(asked)["usage"]["completion_tokens"]

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        return list(threads.map(one, prompts, [new] * len(prompts)))

    return generate, f"xllamacpp {xllamacpp.__version__}"


if __name__ == "__main__":
    main()
