"""Checks of vLLM's settings before the engine starts, and the settings that follow from the model.

A model that was not retrofitted is vLLM's own. The plugin serves it in vLLM's place if it gets settings in additional_config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from dmc.families import families
from dmc_vllm.settings import given, read

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER = "dmc_vllm.worker.DmcWorker"


def architectures() -> dict[str, str]:
    """Names of plain models' classes, as in their config.json, and those of the exports of the same families."""
    return {f"{family.title}ForCausalLM": f"Dmc{family.title}ForCausalLM" for family in families().values()}


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
            (
                cache.enable_prefix_caching,
                "prefix caching shares blocks of tokens, and merged entries are none: give --no-enable-prefix-caching",
            ),
            (
                vllm_config.kv_transfer_config is not None,
                "KV connectors move blocks of tokens, and merged entries are none: leave out --kv-transfer-config",
            ),
            (
                vllm_config.speculative_config is not None,
                "speculative decoding takes tokens back, and merged tokens cannot be taken back: leave out --speculative-config",
            ),
            (vllm_config.lora_config is not None, "LoRA adapters are not supported with DMC models: leave out --enable-lora"),
            (
                parallel.pipeline_parallel_size * parallel.decode_context_parallel_size > 1,
                "dmc-vllm serves DMC models with tensor parallelism alone: leave out pipeline and context parallelism",
            ),
            (cache.cache_dtype != "auto", "DMC models have their own KV cache: leave out --kv-cache-dtype"),
            (cache.user_specified_block_size, "the block size follows from the cap: leave out --block-size"),
            (parallel.worker_cls not in ("auto", WORKER), f"DMC models need the worker {WORKER}: leave out --worker-cls"),
        ):
            if wrong:
                raise ValueError(sentence)
        cache.block_size, cache.user_specified_block_size = read(vllm_config).reservation.tokens_per_block, True
        parallel.worker_cls = WORKER


def plain_checks(own: type[VerifyAndUpdateConfig], architecture: str, wrong: str | None) -> type[VerifyAndUpdateConfig]:
    """Checks of a model that was not retrofitted.

    Args:
        own: vLLM's.
        architecture: name of its class, as in its config.json.
        wrong: sentence to reject the plugin's settings with, in another version of vLLM; None: the version is right.
    """

    class PlainChecks(own):
        """vLLM's checks, and those of the plugin if it has settings in additional_config."""

        plain = True

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            """Gives the model to the plugin if that has settings.

            Raises:
                ValueError: if it has settings and does not support the model, or see `Checks`.
            """
            own.verify_and_update_config(vllm_config)
            if given(vllm_config) is None:
                return
            if wrong is not None:
                raise ValueError(wrong)
            known = architectures()
            if architecture not in known:
                raise ValueError(
                    f"additional_config has dmc, and dmc-vllm does not serve {architecture}: leave it out, or take one of "
                    f"{', '.join(known)}"
                )
            vllm_config.model_config.hf_config.architectures = [known[architecture]]
            Checks.verify_and_update_config(vllm_config)

    return PlainChecks


def register(wrong: str | None = None) -> None:
    """Registers the checks, and the model class by its name, which vLLM imports when it is needed; may be called again.

    Args:
        wrong: sentence to reject the plugin's settings with, in another version of vLLM; None: the version is right.
    """
    exports = list(architectures().values()) if wrong is None else []
    MODELS_CONFIG_MAP.update(dict.fromkeys(exports, Checks))
    for name in exports:
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, "dmc_vllm.model:DmcForCausalLM")
    for name in ModelRegistry.get_supported_archs():
        own = MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)
        if own is not Checks and not hasattr(own, "plain"):
            MODELS_CONFIG_MAP[name] = plain_checks(own, name, wrong)
