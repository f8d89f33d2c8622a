"""`LLM` as a model class of the lm-evaluation-harness: its tasks, scored through the compressed cache.

Log-likelihoods: the context without its last token is prefilled, exact attention among itself, and its full pages are
encoded; the last context token and the continuation then go through the decode step, so that every token that is scored
is predicted by a query that reads encoded pages (`dmc.evaluation.continuations`). Generation is the engine's own: its
first token follows from the prefill, which is exact; every later one from encoded pages. Rolling log-likelihoods have
one token of context a window, so that whole texts go through the decode step: honest, and slow.

What is cut, and where, is as in the harness's own class for Hugging Face models. Two things differ for tokenizers such as
Llama 2's: rolling log-likelihoods do not score BOS (see `CompressedLM.loglikelihood_rolling`), and generated texts keep
their first space.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from dmc.engine import LLM, SamplingParams
from dmc.evaluation.chat import choose_template
from dmc.evaluation.continuations import Request, follow
from dmc.evaluation.harness_args import llm_of
from dmc.evaluation.measure import cache_settings
from dmc.evaluation.provenance import model_hash
from dmc.evaluation.usage import Usage

_DEFAULT_MAX_TOKENS = 256  # the harness's own, for tasks that do not say
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_IGNORED = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}  # as generation is anyway


@register_model("dmc")
class CompressedLM(TemplateLM):
    """A model for `lm_eval.simple_evaluate`, and for lm-eval's command as ``--model dmc`` (`dmc.evaluation.harness`).

    Args:
        llm: with an empty cache and a tokenizer. Requests run in batches of its ``max_batch``.
        seed: of requests that sample.
        progress: whether a bar with the remaining time is drawn on stderr, if that is a terminal.

    Attributes:
        usage: of the cache, by all requests so far.

    Raises:
        ValueError: if the directory has no tokenizer, or neither tokenizer nor model has an end token.
    """

    def __init__(self, llm: LLM, *, seed: int = 0, progress: bool = True) -> None:
        super().__init__()
        self.llm, self.seed, self.progress, self.usage = llm, seed, progress, Usage()
        self.tokenizer = llm.tokenizer.inner
        ends = [self.tokenizer.eos_token_id, *llm.model.config.eos_token_ids]
        self._template: str | None = None
        self._end = next((token for token in ends if token is not None), None)
        if self._end is None:
            raise ValueError(f"{llm.path} names no end token, which lm-eval needs: add eos_token to its tokenizer_config.json")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> CompressedLM:
        """The model that ``--model_args`` describe; see `dmc.evaluation.harness_args.llm_of`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> CompressedLM:
        """The same from a table of arguments; ``additional_config`` is what the harness's own flags say."""
        return cls(llm_of(arg_dict, additional_config or {}))

    def get_model_info(self) -> dict:
        """What the harness writes into its results: the model, its cache, and what the cache held so far."""
        cache = self.llm.cache
        return {
            "dmc_model_hash": model_hash(self.llm.path),
            "dmc_policy": cache.policy.name,
            "dmc_codec": cache.codec_name,
            "dmc_settings": cache_settings(self.llm),
            "dmc_cache": self.usage.as_dict(),
        }

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """Token that stands for an empty context."""
        start = self.tokenizer.bos_token_id
        return self._end if start is None else start

    @property
    def max_length(self) -> int:
        """Tokens that can go into the model."""
        return self.llm.model.config.positions

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which the harness tells its cached requests apart."""
        return str(self.llm.path.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Chooses the template that `apply_chat_template` uses, and returns it.

        Args:
            chat_template: True for the tokenizer's own or its default one, the name of one of several, or False for none.

        Raises:
            ValueError: if the tokenizer has no template, or none of this name.
        """
        self._template = choose_template(self.tokenizer, chat_template) if chat_template else None
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation, by the template that `chat_template` chose, else the tokenizer's own.

        Args:
            chat_history: messages with "role" and "content".
            add_generation_prompt: True if an answer follows; False if the last message is the beginning of the answer.

        Raises:
            ValueError: if there is no template, or it rejects the messages, such as those of a system.
        """
        template = self._template or choose_template(self.tokenizer, True)
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # templates raise what they like
            roles = ", ".join(message["role"] for message in chat_history)
            raise ValueError(f"the model's chat template rejects a task's messages ({roles}): {error}") from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Tokens of a text. With None the tokenizer adds its special tokens, unless the text begins with BOS already, as that
        of a chat template may.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the model allows, each after one token of context.

        The context of the first window is BOS, or the end token if the tokenizer has no BOS, whether or not the tokenizer adds
        BOS to texts. BOS itself is never scored. Later windows begin with the last token of the window before, without BOS.
        The harness's own class for Hugging Face models differs for tokenizers that add BOS: it scores that BOS after another
        one, as the first token of the text.
        """
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += own
            owners += [number] * len(own)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow contexts, cut before the first stop text."""
        sequences = []
        for number, request in enumerate(requests):
            context, settings = request.args
            params = self._params(settings, number)
            room = self.max_length - params.max_tokens
            if room < 1:
                raise ValueError(
                    f"a task asks for {params.max_tokens} generated tokens, which leaves no room for a prompt in the model's "
                    f"{self.max_length} positions"
                )
            sequences += self.llm.sequences(self.tok_encode(context)[-room:], params)
        with self._bar("generating", len(sequences), disable_tqdm) as bar:
            self._run(sequences, bar)
        texts = []
        for request, sequence in zip(requests, sequences, strict=True):
            output = sequence.output()
            if output.finish_reason == "memory":
                raise ValueError("kv_memory is too small for what a task generates; give it more")
            self.usage.add(output.stats)
            texts.append(output.text)
            self.cache_hook.add_partial("generate_until", request.args, output.text)
        return texts

    def _run(self, sequences: Sequence, bar: tqdm) -> None:
        engine = self.llm.engine
        for sequence in sequences:
            engine.add(sequence)
        try:
            while engine.busy:
                bar.update(sum(sequence.finish_reason is not None for sequence in engine.step()))
        finally:
            engine.abort()

    def _params(self, settings: dict, number: int) -> SamplingParams:
        """Parameters of one request, from a task's ``generation_kwargs``."""
        own = normalize_gen_kwargs(copy.deepcopy(settings), _DEFAULT_MAX_TOKENS)
        until = handle_stop_sequences(own.pop("until", None), eos=self.tokenizer.decode(self._end))
        most, sample = own.pop("max_gen_toks"), own.pop("do_sample", False)
        sampling = {name: own.pop(name) for name in _SAMPLING if own.get(name) is not None}
        unknown = [name for name, value in own.items() if _IGNORED.get(name) != value]
        if unknown:
            raise ValueError(
                f"a task asks for {unknown[0]}={own[unknown[0]]!r} in generation, which is not supported; what is: do_sample, "
                f"until, max_gen_toks, {', '.join(_SAMPLING)}"
            )
        if not sample:
            sampling = {"temperature": 0.0} | {name: sampling[name] for name in ("repetition_penalty",) if name in sampling}
        return SamplingParams(
            max_tokens=most,
            stop=[text for text in until if text],
            stop_token_ids=(self._end,),
            seed=self.seed + number,
            **sampling,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """(pair of texts, context, continuation) → (log-likelihood, whether greedy generation gives the continuation)."""
        asked = []
        for texts, context, continuation in requests:
            if not continuation:
                raise ValueError(
                    f"the tokens of {texts[0][-20:] + texts[1]!r} end where those of its context do, so that {texts[1]!r} "
                    "cannot be scored separately: let the choices begin with a space or a new line"
                )
            room = self.max_length + 1 - len(continuation)  # the last token is not fed
            if room < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's {self.max_length} positions"
                )
            asked.append(Request(context[-room:], continuation))
        with self._bar("scoring", len(asked), disable_tqdm) as bar:
            scored = follow(self.llm, asked, bar.update)
        answers = [(each.logprob, each.greedy) for each in scored]
        for (texts, *_), each, answer in zip(requests, scored, answers, strict=True):
            self.usage.add(each.stats)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _bar(self, what: str, total: int, off: bool) -> tqdm:
        hidden = True if off or not self.progress else None  # None: if stderr is not a terminal
        return tqdm(desc=what, total=total, unit=" requests", dynamic_ncols=True, disable=hidden)
