"""The cells of a frontier: models x policies x codecs x budgets, from the registries of `dmc.cache`.

What is registered is measured: a policy or codec without recipes of its own here comes with its defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmc.cache import CODECS, POLICIES, codec, codec_class, policy, policy_class
from dmc.cache.codecs.former import current
from dmc.engine.llm import bounds
from dmc.model import read_config

Value = float | int | str | None

BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
CACHE_SETTINGS = ("page_size", "sink_tokens", "window", "exact_dtype")
"""What a choice of codec may carry in addition to the codec's own settings; see `dmc.cache.KVCache`."""


@dataclass(frozen=True)
class Choice:
    """A policy or a codec with its settings, ready to be made."""

    name: str
    settings: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        """The name as the command line writes it."""
        words = ",".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.settings)
        return f"{self.name}:{words}" if words else self.name


def choose(name: str, **settings: Value) -> Choice:
    """A `Choice`."""
    return Choice(name, tuple(settings.items()))


@dataclass(frozen=True)
class Cell:
    """One measurement of a frontier."""

    model: Path
    policy: Choice
    codec: Choice


RECIPES: dict[str, tuple[Choice, ...]] = {
    "dense": (choose("dense", dtype="bf16"),),
    "kivi": (choose("kivi", bits=2), choose("kivi", bits=4)),
    "rotated": (choose("rotated", bits=2), choose("rotated", bits=3), choose("rotated", bits=4)),
    "svd": (choose("svd", rank=16), choose("svd", rank=8)),
    "gear": (),  # the presets gear-4bit and gear-2bit are what it means
    "tcq": (),  # likewise
    "tcq-4bit": (choose("tcq-4bit", page_size=32), choose("tcq-4bit")),
    "tcq-3bit": (choose("tcq-3bit", page_size=32), choose("tcq-3bit")),
    "tcq-2bit": (choose("tcq-2bit", page_size=32), choose("tcq-2bit")),
    "eigen": (),  # needs the file that dmc calibrate makes of a model: asked for with --codecs
}
"""By the name of the codec: the published settings of each method, and TCQ's presets with short and long pages. The first
of each is the one that goes with retrofitted models."""
WITH_EVICTION = ("dense", "tcq-2bit")
"""Codecs that the default grid crosses with policies that evict, at every budget: none, and the one of fewest bytes."""


def codec_choices() -> list[Choice]:
    """Every registered codec, in the recipes that the default grid has of it."""
    return [choice for name in CODECS for choice in RECIPES.get(name, (choose(name),))]


def cells(
    models: Sequence[Path],
    *,
    policies: Sequence[Choice] | None = None,
    codecs: Sequence[Choice] | None = None,
    budgets: Sequence[float] = BUDGETS,
    max_entries: Sequence[int] = (),
) -> list[Cell]:
    """All measurements of a grid, those with the same model and policy one after the other.

    Args:
        models: directories, the base first.
        policies: None: all that a model can run. One with a setting "share" that does not give it is crossed with the
            budgets.
        codecs: crossed with every policy. None: all recipes where every token is kept, the first of each codec for
            retrofitted models, and the first of those in `WITH_EVICTION` for policies that evict by a budget.
        budgets: shares of the tokens.
        max_entries: hard budgets of policies with a window of recent tokens, each next to the cell without a bound.

    Raises:
        ValueError: if a name or setting is unknown or not allowed, a budget is out of range, a directory is not a model, no cell
            is left, or ``max_entries`` bounds none.
    """
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"budget {budget} must be above 0 and at most 1: a share of the tokens, such as 1/4")
    for choice in policies or ():
        later = ("max_entries",) if choice.name == "dmc" else ()  # needs the window, which each model has of its own
        policy(choice.name, **{name: value for name, value in choice.settings if name not in later})
    for choice in codecs or ():
        codec(choice.name, **codec_settings(choice)[0])
    codecs = codecs and [_of_today(choice) for choice in codecs]
    made = []
    for model in models:
        for chosen in _bounded(model, _policies(model, policies, budgets), max_entries):
            made += [Cell(model, chosen, stored) for stored in codecs or _codecs(chosen)]
    made = list(dict.fromkeys(made))
    if not made:
        names = ", ".join(str(choice) for choice in policies or ())
        raise ValueError(f"no model of these runs any of the policies {names}: retrofitted models run their own policy alone")
    if max_entries and not any("max_entries" in dict(cell.policy.settings) for cell in made):
        raise ValueError(
            "max_entries bounds the entries behind a window of recent tokens, and no policy of these has one: late merging (a "
            "model retrofitted with dmc.window), dms and gate have"
        )
    return made


def codec_settings(choice: Choice) -> tuple[dict[str, Value], dict[str, Value]]:
    """(settings of the codec, settings of the cache) of a choice of codec."""
    own = {name: value for name, value in choice.settings if name not in CACHE_SETTINGS}
    return own, {name: value for name, value in choice.settings if name in CACHE_SETTINGS}


def _of_today(choice: Choice) -> Choice:
    """The choice of codec under the name that its row is to have."""
    own, cache = codec_settings(choice)
    name, now, page, _ = current(choice.name, own)
    if (name, now) == (choice.name, own):
        return choice
    return choose(name, **now | ({} if page in (None, codec_class(name).page_size) else {"page_size": page}) | cache)


def runnable(model: Path) -> list[str]:
    """Names of the policies that make sense for a model: a retrofitted one runs what it was trained for, a plain one the rest.

    Raises:
        ValueError: if the directory holds no model.
    """
    config = read_config(model)
    return [name for name in POLICIES if name not in LEARNT] if config.method is None else [config.method]


NAMED = ("gate", "kvzap")
"""Policies that take part when they are asked for: they need a file that was made of the model."""

LEARNT = ("dmc", "dms")
"""Policies whose decisions a model must have been trained to make."""


def _policies(model: Path, policies: Sequence[Choice] | None, budgets: Sequence[float]) -> Iterator[Choice]:
    able, plain = runnable(model), read_config(model).method is None
    for choice in policies or [choose(name) for name in able if name not in NAMED]:
        if choice.name not in able and not (plain and choice.name not in POLICIES):  # of another package: a plain model's
            continue
        if "share" in policy_class(choice.name).settings() and not choice.settings:
            yield from (choose(choice.name, share=budget) for budget in budgets)
        else:
            yield choice


def _bounded(model: Path, chosen: Iterator[Choice], max_entries: Sequence[int]) -> Iterator[Choice]:
    """The choices, and those with a window of recent tokens under each hard budget as well."""
    config = read_config(model)
    for choice in chosen:
        own = dict(choice.settings)
        several = max_entries if "max_entries" not in own and bounds(choice.name, config) else ()
        for one in (choice, *(choose(choice.name, **own, max_entries=most) for most in several)):
            if "max_entries" in dict(one.settings):  # a number that is impossible is said before anything is measured
                trained = choice.name == config.method and config.window is not None
                given = {"window": config.window, **config.kept_first} if trained else {}
                policy(choice.name, **given | dict(one.settings))
            yield one


def _codecs(chosen: Choice) -> list[Choice]:
    """What the default grid crosses a policy with."""
    if "share" in dict(chosen.settings):
        names = [name for name in WITH_EVICTION if name in CODECS]
    elif chosen.name in (*LEARNT, *NAMED):
        names = list(CODECS)
    else:
        return codec_choices()
    return [choice for name in names for choice in RECIPES.get(name, (choose(name),))[:1]]
