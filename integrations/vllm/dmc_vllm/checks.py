"""Checks of vLLM's settings before the engine starts, and the settings that follow from the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from dmc.families import families
from dmc_vllm.settings import read

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER = "dmc_vllm.worker.DmcWorker"


def architectures() -> list[str]:
    """Names of the exported models' classes, as in their config.json."""
    return [f"Dmc{family.title}ForCausalLM" for family in families().values()]


class Checks(VerifyAndUpdateConfig):
    """vLLM calls it once, when its settings are complete."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Checks the settings, and sets worker and block size.

        Raises:
            ValueError: if a setting is not supported, or the model cannot be served; one sentence.
        """
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        for wrong, sentence in (
            (cache.enable_prefix_caching,
             "prefix caching shares blocks of tokens, and merged entries are none: give --no-enable-prefix-caching"),
            (vllm_config.kv_transfer_config is not None,
             "KV connectors move blocks of tokens, and merged entries are none: leave out --kv-transfer-config"),
            (vllm_config.speculative_config is not None,
             "speculative decoding takes tokens back, and merged tokens cannot be taken back: leave out --speculative-config"),
            (vllm_config.lora_config is not None, "LoRA adapters are not supported with DMC models: leave out --enable-lora"),
            (parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.decode_context_parallel_size > 1,
             "dmc-vllm serves DMC models on one device: leave out tensor, pipeline and context parallelism"),
            (cache.cache_dtype != "auto", "DMC models have their own KV cache: leave out --kv-cache-dtype"),
            (cache.user_specified_block_size, "the block size follows from the cap: leave out --block-size"),
            (parallel.worker_cls not in ("auto", WORKER), f"DMC models need the worker {WORKER}: leave out --worker-cls"),
        ):
            if wrong:
                raise ValueError(sentence)
        cache.block_size, cache.user_specified_block_size = read(vllm_config).reservation.tokens_per_block, True
        parallel.worker_cls = WORKER


def register() -> None:
    """Registers the checks, and the model class by its name, which vLLM imports when it is needed; may be called again."""
    MODELS_CONFIG_MAP.update(dict.fromkeys(architectures(), Checks))
    for name in architectures():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, "dmc_vllm.model:DmcForCausalLM")
