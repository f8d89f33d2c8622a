"""A Llama, or a model built like one, whose key/value cache compresses itself: Dynamic Memory Compression (DMC, arXiv
2403.09636), described here, or Dynamic Memory Sparsification (`eviction_dmc_llama`), as `config.dmc["method"]` says.

Every key/value head of every layer decides for each token whether to merge it into the newest entry of its
cache (a weighted mean of keys and of values) or to open a new entry. An entry that a later token did not merge
into is closed: it carries the rotary position of its newest token and never changes again.

Dimension letters: B batch, T new tokens, H key/value heads, G query heads per key/value head, D head size,
N closed entries of the longest head, F = 2 D + 1 (key, value and weight of an entry).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from .cache_dmc_llama import DmcCache, DmcLayerCache
from .configuration_dmc_llama import DmcLlamaConfig
from .entries_dmc_llama import mean, positions_of, rotate, states, take
from .eviction_dmc_llama import EvictingLayerCache, attend_and_evict
from .late_dmc_llama import LateLayerCache, attend_late
from .step_dmc_llama import Step, plan

_QUERIES = 1024  # queries that attend at once: bounds the memory of the scores in a long prompt
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # other ways to mark documents than position_ids


class DmcLlamaAttention(nn.Module):
    """Llama's attention over the entries that are left."""

    def __init__(self, config: DmcLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        hidden, queries = config.hidden_size, config.num_attention_heads
        size, bias = getattr(config, "head_dim", None) or hidden // queries, config.qkv_bias
        self.layer_idx, self.head_dim, self.heads = layer_idx, size, config.num_key_value_heads
        self.offset, self.dropout = float(config.dmc["offset"]), config.attention_dropout
        self.window, self.evicts = config.dmc.get("window"), config.dmc["method"] == "dms"
        self.q_proj = nn.Linear(hidden, queries * size, bias=bias)
        self.k_proj = nn.Linear(hidden, self.heads * size, bias=bias)
        self.v_proj = nn.Linear(hidden, self.heads * size, bias=bias)
        self.o_proj = nn.Linear(queries * size, hidden, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (LlamaRMSNorm(size, eps=config.rms_norm_eps) for _ in range(2))
        self.normed = config.qk_norm
        self.decision = None
        if config.dmc["decision"] == "head":
            ahead = config.dmc.get("decide") == "late"
            rows = 2 - self.evicts + ahead  # decision; weight (dmc); what a token adds to the decision `window` before it
            self.decision = nn.Linear(hidden, rows * self.heads, bias=ahead)

    def forward(self, hidden: Tensor, step: Step, cache: DmcCache | None) -> Tensor:
        """`[B, T, hidden]` to the same; fills the cache, where there is one."""
        split = (*hidden.shape[:2], -1, self.head_dim)
        query, key, value = (project(hidden).view(split) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.evicts:
            out = self._mark_and_attend(hidden, query, key, value, step, cache)
            return self.o_proj(out.transpose(1, 2).flatten(2).to(hidden.dtype))
        if self.decision is None:
            ahead, merge = (), key[..., 0].float()  # [B, H, T]
            weight = query[..., 0].float().unflatten(1, (self.heads, -1)).mean(2)
            query, key = (F.pad(x[..., 1:], (1, 0)) for x in (query, key))
        else:
            bias = None if self.decision.bias is None else self.decision.bias.float()
            logits = F.linear(hidden.float(), self.decision.weight.float(), bias)
            merge, weight, *ahead = logits.transpose(1, 2).split(self.heads, 1)
        if self.window is not None:
            layer = cache.layers[self.layer_idx] if cache is not None else LateLayerCache()
            out = attend_late(
                query,
                key,
                value,
                merge - self.offset,
                ahead[0] if ahead else None,
                torch.sigmoid(weight + self.offset),
                step,
                layer,
                window=self.window,
                dropout=self.dropout if self.training else 0.0,
            )
            return self.o_proj(out.transpose(1, 2).flatten(2).to(hidden.dtype))
        opens = (~(merge > self.offset) | step.starts[:, None]) & step.real[:, None]
        omega = torch.sigmoid(weight + self.offset) * step.real[:, None]
        layer = cache.layers[self.layer_idx] if cache is not None else DmcLayerCache()
        out = self._attend(query, key, value, opens, omega, step, layer)
        return self.o_proj(out.transpose(1, 2).flatten(2).to(hidden.dtype))

    def _mark_and_attend(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, step: Step, cache: DmcCache | None
    ) -> Tensor:
        """Dynamic Memory Sparsification. → `[B, H * G, T, D]`."""
        if self.decision is None:
            grouped = query.unflatten(1, (self.heads, -1))
            logits, ahead = grouped[:, :, 0, :, 0].float(), ()  # [B, H, T]
            read = torch.zeros_like(grouped, dtype=torch.bool)
            read[:, :, 0, :, 0] = True
            query = grouped.masked_fill(read, 0.0).flatten(1, 2)
        else:
            bias = None if self.decision.bias is None else self.decision.bias.float()
            rows = F.linear(hidden.float(), self.decision.weight.float(), bias)
            logits, *ahead = rows.transpose(1, 2).split(self.heads, 1)
            if ahead:  # the first token of a document is kept
                logits = logits.masked_fill(step.starts[:, None], float("-inf"))
        layer = cache.layers[self.layer_idx] if cache is not None else EvictingLayerCache()
        cos, sin = step.cos[:, None, 1:], step.sin[:, None, 1:]
        return attend_and_evict(
            rotate(query.float(), cos, sin) * self.head_dim**-0.5,
            rotate(key.float(), cos, sin).to(key.dtype),
            value,
            logits - self.offset,
            ahead[0] if ahead else torch.zeros_like(logits),
            step.order,
            step.begins,
            step.real,
            layer,
            window=self.window,
            dropout=self.dropout if self.training else 0.0,
        )

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, opens: Tensor, omega: Tensor, step: Step, layer: DmcLayerCache
    ) -> Tensor:
        """Query i sees the entries of its document closed by then and its own state. → `[B, H * G, T, D]`."""
        size, dtype = self.head_dim, query.dtype
        merged = states(torch.cat([key, value], -1), opens, omega, layer.tail)  # [B, H, T + 1, F]
        closes = opens & ~step.starts[:, None]  # nobody sees the last entry of a document that ended
        counts = closes.cumsum(-1)  # [B, H, T]: entries closed in this pass, up to each token
        index = positions_of(closes, counts)  # [B, H, M]
        closed = mean(merged.gather(2, index[..., None].expand(-1, -1, -1, merged.shape[-1])))
        cos, sin = (take(table[:, :-1], index) for table in (step.cos, step.sin))
        visible = counts if layer.lengths is None else counts + layer.lengths[..., None]
        hidden = None
        if step.restarts:  # entries before each token's document
            new = step.starts & (step.order > 0)
            hidden = torch.where(new[:, None], visible, 0).cummax(-1).values
        keys, values = rotate(closed[..., :size], cos, sin).to(dtype), closed[..., size:].to(dtype)
        layer.append(keys, values, counts[..., -1], merged[:, :, -1])
        own, cos, sin = mean(merged[:, :, 1:]), step.cos[:, None, 1:], step.sin[:, None, 1:]
        out = _attention(
            rotate(query.float(), cos, sin) * size**-0.5,
            layer.keys,
            layer.values,
            rotate(own[..., :size], cos, sin),
            own[..., size:],
            visible,
            hidden,
            self.dropout if self.training else 0.0,
        )
        if hidden is not None:
            layer.drop(hidden[..., -1])
        return out


class DmcLlamaDecoderLayer(nn.Module):
    """Llama's decoder layer."""

    def __init__(self, config: DmcLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DmcLlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, step: Step, cache: DmcCache | None) -> Tensor:
        """`[B, T, hidden]` to the same."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), step, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DmcLlamaPreTrainedModel(PreTrainedModel):
    """What loading and saving need to know."""

    config_class = DmcLlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["DmcLlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _is_stateful = True  # such a cache cannot be rolled back: rules assisted generation out


class DmcLlamaModel(DmcLlamaPreTrainedModel):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: DmcLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DmcLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DmcCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As Llama's; `attention_mask` has to be `[B, tokens so far]`, and `output_attentions` is rejected.

        A position that is not above the one before starts a new document, whose tokens see nothing of those before.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("output_attentions is not available: attention runs over entries, not over tokens")
        packed = [name for name in _PACKED if kwargs.get(name) is not None]
        if packed and position_ids is None:
            raise ValueError(f"{packed[0]} is not read here: pass position_ids that restart at each document of a packed batch")
        if past_key_values is not None and not isinstance(past_key_values, DmcCache):
            raise ValueError(f"past_key_values must be a DmcCache or None, got {type(past_key_values).__name__}")
        cache, method = past_key_values, self.config.dmc["method"]
        if cache is not None and cache.method != method:
            raise ValueError(f"past_key_values is a cache for {cache.method}, and this model is a {method} one: leave it out")
        if cache is not None and cache.window != self.config.dmc.get("window"):
            raise ValueError(
                f"past_key_values is a cache of window {cache.window}, and this model has {self.config.dmc.get('window')}: leave "
                "it out"
            )
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = self.new_cache()
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        step = plan(hidden, attention_mask, position_ids, cache, self.rotary_emb)
        steps = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, step=step, cache=cache)
            steps.append(hidden)
        if cache is not None:
            rotation = torch.stack([step.cos[:, -1], step.sin[:, -1]], 1)
            cache.advance(real=step.real, document=step.begins[:, -1], positions=step.newest, rotation=rotation)
        hidden = self.norm(hidden)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=cache, hidden_states=(*steps[:-1], hidden) if wanted else None
        )

    def new_cache(self) -> DmcCache:
        """An empty cache for this model."""
        return DmcCache(len(self.layers), self.config.dmc["method"], self.config.dmc.get("window"))


class DmcLlamaForCausalLM(DmcLlamaPreTrainedModel, GenerationMixin):
    """A causal language model; `generate(..., return_dict_in_generate=True).past_key_values` tells its ratio."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DmcLlamaConfig) -> None:
        super().__init__(config)
        self.model = DmcLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs) -> None:
        """A DmcCache where `generate` was given none: to prefill in chunks it needs the cache before the first pass."""
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic"):
            raise ValueError(f"cache_implementation {asked!r} cannot hold merged entries or evict tokens: leave it out")
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("prefill_chunk_size cuts input_ids into chunks, not inputs_embeds: leave one of the two out")
        generation_config.cache_implementation = None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.model.new_cache()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DmcCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As Llama's; see `DmcLlamaModel.forward` for what differs. Decisions are hard, in training mode too."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    visible: Tensor,
    hidden: Tensor | None,
    dropout: float,
) -> Tensor:
    """Softmax attention of each query over a head's first entries and over its own state.

    query `[B, H * G, T, D]` fp32, scaled; keys, values `[B, H, N, D]`; own_key, own_value `[B, H, T, D]` fp32;
    visible `[B, H, T]`: how many entries each query sees, but for the first hidden `[B, H, T]` of them, which are of other
    documents. → `[B, H * G, T, D]` fp32.
    """
    query = query.unflatten(1, (keys.shape[1], -1))  # [B, H, G, T, D]
    entry = torch.arange(keys.shape[2], device=keys.device)
    blocks = []
    for q, k, v, seen, unseen in zip(
        query.split(_QUERIES, 3),
        own_key.split(_QUERIES, 2),
        own_value.split(_QUERIES, 2),
        visible.split(_QUERIES, 2),
        (torch.zeros_like(visible) if hidden is None else hidden).split(_QUERIES, 2),
        strict=True,
    ):
        scores = (q.flatten(2, 3).to(keys.dtype) @ keys.mT).unflatten(2, q.shape[2:4]).float()
        masked = entry >= seen[:, :, None, :, None]
        if hidden is not None:
            masked = masked | (entry < unseen[:, :, None, :, None])
        scores = scores.masked_fill(masked, float("-inf"))
        own = (q * k[:, :, None]).sum(-1, keepdim=True)
        weights = F.dropout(torch.cat([scores, own], -1).softmax(-1), dropout, dropout > 0)
        past = (weights[..., :-1].flatten(2, 3).to(values.dtype) @ values).unflatten(2, q.shape[2:4])
        blocks.append(past.float() + weights[..., -1:] * v[:, :, None])
    return torch.cat(blocks, 3).flatten(1, 2)
