"""A model of lm-eval's harness: `python -m outrider.integrations.lm_eval --model outrider --model_args target=PATH,draft=PATH ...`.

Log-likelihoods are those of the target, from one forward over each text; text is generated speculatively, in batches.
lm-eval has no plug-ins, so the command registers the model and then is lm-eval's own; in Python, import `OutriderLM` from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from outrider.build import build_engine
from outrider.conversations import rendered_text
from outrider.engine.prompt_scores import PromptScores, prompt_scores
from outrider.errors import ConfigError, RequestError
from outrider.models.tokenizer import PlainTokenizer, whole_tokenizer
from outrider.params import SamplingParams

try:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
    from lm_eval.api.registry import register_model  # type: ignore[import-not-found]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found]
except ImportError:
    raise ConfigError("this needs lm-eval: pip install lm_eval") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # type: ignore[import-not-found]

KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed"}
"""Settings of a task's generation that are read."""


@register_model("outrider")
class OutriderLM(TemplateLM):
    """target, draft, device and the other options: as for `Engine.build`. batch_size: sequences decoded together, "auto" for 8.
    max_gen_toks: the most tokens of a generated text where its task does not say. max_batch_size, of lm-eval's search for a batch
    size, means nothing here."""

    def __init__(
        self,
        target: Any = None,
        draft: Any = "auto",
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if device not in (None, "cuda:0"):  # which lm-eval's command says unasked: "auto" finds it where it is there
            options["device"] = device
        self.engine = build_engine(target, draft, slots=_slots(batch_size), **options)
        if self.engine.tokenizer is None:
            raise ConfigError(
                "lm-eval's tasks are text, and this target has no tokenizer: give one, or a folder with one"
            )
        self.tokenizer, loaded = self.engine.tokenizer, self.engine.loaded
        if isinstance(self.tokenizer, PlainTokenizer) and loaded and loaded.path and "tokenizer" not in options:
            self.tokenizer = whole_tokenizer(loaded.path)  # which knows the token that begins a text
        self.max_gen_toks, self.max_length = max_gen_toks, self.engine.max_length

    @property
    def eot_token_id(self) -> int:
        own = getattr(self.tokenizer, "eos_token_id", None)
        return own if isinstance(own, int) else min(self.engine.eos, default=0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which every token counts: the begin of a text, or the end of one where there is none."""
        own = getattr(self.tokenizer, "bos_token_id", None)
        return own if isinstance(own, int) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "outrider"))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. add_special_tokens: None for what the tokenizer adds, but no second begin before a text that has one."""
        if add_special_tokens is not None:
            return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))
        bare = list(self.tokenizer.encode(string, add_special_tokens=False))
        begun = bare[:1] == [getattr(self.tokenizer, "bos_token_id", None)]
        return bare if begun else list(self.tokenizer.encode(string))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return rendered_text(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        out = []
        for names, context, continuation in _bar(requests, "log-likelihoods", disable_tqdm):
            out.append(self._score(context, continuation))
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, out[-1])
        return out

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest. Too long: the newest
        tokens."""
        kept = [*context, *continuation][-self.max_length :]
        if not continuation or len(kept) <= len(continuation):
            raise RequestError(
                f"a continuation of {len(continuation)} tokens needs at least one before it, within {self.max_length}"
            )
        found = next(f for f in prompt_scores(self.engine.parts.target, kept, 0) if isinstance(f, PromptScores))
        own = slice(len(kept) - 1 - len(continuation), None)
        return sum(e.logprob for e in found.entries[own]), all(rank == 1 for rank in found.ranks[own])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        out = []
        for request in _bar(requests, "rolling log-likelihoods", disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
            out.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), out[-1])
        return out

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        params = [self._params(dict(request.args[1])) for request in requests]
        prompts = [
            self.tok_encode(request.args[0])[-(self.max_length - p.max_tokens) :]
            for request, p in zip(requests, params, strict=True)
        ]
        with _bar(None, "texts", disable_tqdm, total=1.0, bar_format="{desc}: {percentage:3.0f}%|{bar}|") as shown:
            results = self.engine.generate(prompts, params, progress=lambda share: shown.update(share - shown.n))
        out = [result.text for result in results]
        for request, text in zip(requests, out, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return out

    def _params(self, asked: dict[str, Any]) -> SamplingParams:
        """The sampling parameters of a task. RequestError for a setting that is not read."""
        unknown = sorted(set(asked) - KNOWN)
        if unknown:
            raise RequestError(f"the task sets {unknown[0]}, which is not applied here: override it with --gen_kwargs")
        stop, most = asked.get("until") or (), int(asked.get("max_gen_toks") or self.max_gen_toks)
        sampled = asked.get("do_sample", bool(asked.get("temperature")))
        more = {k: asked[k] for k in ("top_p", "top_k", "min_p", "seed") if asked.get(k) is not None} if sampled else {}
        return SamplingParams(
            temperature=float(asked.get("temperature", 1.0)) if sampled else 0.0,
            max_tokens=min(most, self.max_length - 1),
            stop=(stop,) if isinstance(stop, str) else tuple(s for s in stop if s),
            **more,
        )


def _slots(asked: int | str) -> int:
    """Sequences decoded together. ConfigError for another text than lm-eval's own."""
    if str(asked).isdigit():
        return int(asked)
    if str(asked).split(":")[0] != "auto":
        raise ConfigError(f"batch_size is a number of sequences or auto, got {asked!r}")
    return 8


def _bar(items: Iterable[Any] | None, text: str, off: bool, **how: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, desc=text, disable=off, **how)
