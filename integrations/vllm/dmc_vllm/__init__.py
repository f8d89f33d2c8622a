"""Serves models with a compressed cache in vLLM: a plugin that vLLM finds by its entry point `vllm.general_plugins`.

A request's heads hold as many entries as their decisions leave, and not one per token. So vLLM's scheduler reserves blocks for
a compressed request (`dmc_vllm.reservation`), and the entries are in `dmc.cache.KVCache`, whose pages are in vLLM's KV memory
(`dmc_vllm.arena`). A model of this plugin is vLLM's Llama with another attention module (`dmc_vllm.model`).
"""

from __future__ import annotations

from contextlib import nullcontext, suppress

VLLM = "0.32"
"""Minor version of vLLM that this plugin is made for."""


def register() -> None:
    """Registers configurations, models and settings checks; vLLM calls it once or more in each of its processes.

    In another version of vLLM retrofitted models and settings of the plugin raise a ValueError, and other models are served as
    before.
    """
    import vllm

    from dmc_vllm import config

    wrong = wrong_version(vllm.__version__)
    config.register(wrong)
    with nullcontext() if wrong is None else suppress(ImportError):  # a version that has no such checks
        from dmc_vllm import checks

        checks.register(wrong)
    if wrong is None:
        from dmc_vllm import spec

        spec.register()
        _hide_llvmlite_attributes()


def wrong_version(found: str) -> str | None:
    """The sentence that says that vLLM has another version; None if it is the right one."""
    if found == VLLM or found.startswith(f"{VLLM}."):
        return None
    return f"dmc-vllm is made for vLLM {VLLM}, and {found} is installed: install vLLM {VLLM}, or a dmc-vllm for {found}"


def _hide_llvmlite_attributes() -> None:
    """Lets vLLM's CPU build start in a process that has numba loaded.

    That build looks for kernels in ``vars()`` of every global of every module. llvmlite's library object, a global, returns a
    function for any name, so its ``__dict__`` is no dictionary, and vLLM ends with an AttributeError.
    """
    from llvmlite.binding import ffi

    wrapper = type(ffi.lib)
    found = wrapper.__getattr__
    if getattr(found, "hides_names", False):
        return

    def get(self: object, name: str) -> object:
        if name == "__dict__":
            raise AttributeError(name)
        return found(self, name)

    get.hides_names = True
    wrapper.__getattr__ = get
