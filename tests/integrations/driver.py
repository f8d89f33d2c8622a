"""Runs cases of test_vllm.py in an environment with vLLM: a JSON list of cases on stdin, a JSON list of results in a file.

A case is a dict: "model", a directory; "engine", arguments of vllm.LLM; "prompts", lists of token ids; "tokens" to generate;
optionally "abort", how often a running request is aborted: after every so many steps. With "fails" the engine must not start, and
the result is what vLLM says; "version" is then the version of vLLM that the plugin of this process is made for.
"""

import json
import os
import sys

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
)


def main(out):
    results = []
    for case in json.load(sys.stdin):
        results.append(refused(case) if case.get("fails") else served(case))
        with open(out, "w") as file:  # what is done so far, should a case end the process
            json.dump(results, file)


def start(case):
    from vllm import LLM

    fixed = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 4 << 20,
        "skip_tokenizer_init": True,
    }
    return LLM(model=case["model"], **fixed | case.get("engine", {}))


def stop(llm):
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()


def refused(case):
    if "version" in case:
        import dmc_vllm

        dmc_vllm.VLLM = case["version"]
    try:
        stop(start(case))
    except Exception as error:
        return str(error)
    return None


def served(case):
    from vllm import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, original = [], Scheduler._preempt_request

    def preempt(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(self, request, *args, **kwargs)

    Scheduler._preempt_request = preempt
    try:
        llm = start(case)
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        params = SamplingParams(temperature=0, max_tokens=case["tokens"], ignore_eos=True, detokenize=False)
        tokens, most = run(llm.llm_engine, case, params, scheduler)
        stats = llm.collective_rpc("dmc_stats")  # of each rank
        llm.collective_rpc(check)
        pool = scheduler.kv_cache_manager.block_pool
        result = {
            "tokens": tokens,
            "stats": {name: sum(rank[name] for rank in stats) for name in stats[0]},
            "most_running": most,
            "preempted": len(preempted),
            "blocks": pool.num_gpu_blocks - 1,
            "free": pool.get_num_free_blocks(),  # one is vLLM's null block
        }
        stop(llm)
        return result
    finally:
        Scheduler._preempt_request = original


def check(worker):
    worker._arena.requests.cache.check_integrity()


def run(engine, case, params, scheduler):
    """Tokens of every request, those of an aborted one so far, and the largest number of requests that ran together."""
    tokens, most, steps, aborted = {}, 0, 0, set()
    for number, prompt in enumerate(case["prompts"]):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        tokens[str(number)] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        most, steps = max(most, len(scheduler.running)), steps + 1
        if case.get("abort") and steps % case["abort"] == 0:
            name = next((name for name in tokens if name not in aborted and 0 < len(tokens[name]) < params.max_tokens), None)
            if name is not None:
                engine.abort_request([name])
                aborted.add(name)
    return [tokens[str(number)] for number in range(len(tokens))], most


if __name__ == "__main__":
    main(sys.argv[1])
