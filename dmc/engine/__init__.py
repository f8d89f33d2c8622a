"""Generation and scoring over the compressed cache."""

from dmc.engine.llm import LLM, total_stats
from dmc.engine.params import SamplingParams
from dmc.engine.sampler import TokenLogprob
from dmc.engine.scoring import Score
from dmc.engine.sequence import Output
from dmc.engine.stats import Stats

__all__ = ["LLM", "Output", "SamplingParams", "Score", "Stats", "TokenLogprob", "total_stats"]
