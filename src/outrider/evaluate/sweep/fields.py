"""The fields of every kind of cell that measures decoding: bounded and checked when the plan is read, before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from outrider.errors import ConfigError
from outrider.evaluate.experiments.experiment import experiment_from
from outrider.models.dtypes import named_dtype
from outrider.verify import load_rule

Text = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
ONE = {"draft", "length", "rule", "allow_lossy"}
"""The fields of one configuration; the options of an arm."""
Option = str | int | float | bool | None


def check_rule(rule: str, allow_lossy: bool) -> None:
    """Raises ConfigError for a rule that there is not, or that changes the text where that is not allowed."""
    if rule != "auto" and not load_rule(rule).lossless and not allow_lossy:
        raise ConfigError(f"rule {rule!r} changes the distribution of the text: add allow_lossy: true beside it")


class Fields(BaseModel):
    """What every cell has. threads: that it computes with; None: one, or all of the machine's for a cell that measures speed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
    kind: str
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None

    def as_cell(self) -> dict[str, Any]:
        """Plain data with all defaults filled in: two spellings of a cell are one cell."""
        return self.model_dump(mode="json")


class Decoding(Fields):
    """A target on prompts. See the options of `outrider bench` of the same names."""

    target: Text | None = None
    dtype: Text = "auto"
    prompts: Text | None = None
    chat_template: bool = True
    count: Annotated[int, Field(ge=1, le=100_000)] = 16
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 64
    seed: Seed = 0

    @field_validator("dtype")
    @classmethod
    def dtype_is_known(cls, dtype: str) -> str:
        """As the cell will read it."""
        named_dtype(dtype)
        return dtype


class Drafted(Decoding):
    """One configuration of drafter and rule."""

    draft: Text = "auto"
    length: Annotated[int, Field(ge=0, le=64)] = 3
    rule: Text = "auto"
    allow_lossy: bool = False

    @model_validator(mode="after")
    def rule_may_be(self) -> Drafted:
        """Known, its options too, and allowed to change the text if it does."""
        check_rule(self.rule, self.allow_lossy)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that an arm may vary."""
        return {name: getattr(self, name) for name in sorted(ONE)}


class Bench(Drafted):
    """Tokens per step of one configuration or of several `arms` (metric: acceptance), or seconds of several, interleaved (metric:
    speed). base: the arm that others are compared with; None: the first."""

    kind: Literal["bench"]
    metric: Literal["acceptance", "speed"] = "acceptance"
    arms: dict[Text, dict[Text, Option]] | None = None
    base: Text | None = None
    batch: Annotated[int, Field(ge=1, le=1024)] = 1
    repeats: Count = 1
    warmup: Annotated[int, Field(ge=0, le=100)] = 1

    @model_validator(mode="after")
    def arms_fit(self) -> Bench:
        """Seconds are compared within one cell only: so a cell of seconds has several arms."""
        if self.metric == "speed" and (self.arms is None or len(self.arms) < 2):
            raise ValueError("metric speed compares arms within the cell: name at least two in `arms`")
        if self.arms is not None:
            if self.model_fields_set & ONE:
                raise ValueError("with `arms`, draft, length and rule belong into the arms")
            self.base = self.base or next(iter(self.arms), None)
            experiment_from({"arms": self.arms, "base": self.base}, "bench", "arms")
            lossy = any(o.get("allow_lossy") for o in self.arms.values())
            for options in self.arms.values():
                check_rule(str(options.get("rule") or "auto"), lossy)
        elif self.base is not None:
            raise ValueError("base names one of the `arms`, and there are none")
        return self

    def as_cell(self) -> dict[str, Any]:
        """Either the arms, or the one configuration: what the cell does not have is not part of its identity."""
        unused = {"arms", "base"} if self.arms is None else ONE
        return self.model_dump(mode="json", exclude=unused)

    @property
    def configurations(self) -> dict[str, dict[str, Any]]:
        """Name -> options of every arm, the base first."""
        return {"arm": self.options} if self.arms is None else {n: dict(o) for n, o in self.arms.items()}


class Predict(Decoding):
    """What a draft model is worth on the target's texts, without running it: see `outrider predict`."""

    kind: Literal["predict"]
    draft: Text = "auto"
    samples: Annotated[int, Field(ge=1, le=64)] = 1
    batch: Annotated[int, Field(ge=1, le=1024)] = 8
    rows: Annotated[int, Field(ge=0, le=100_000)] = 128


class Audit(Drafted):
    """Whether the texts of one configuration have the target's distribution: see `outrider audit`."""

    kind: Literal["audit"]
    samples: Annotated[int, Field(ge=1, le=1024)] = 2
    level: Annotated[float, Field(gt=0, lt=1)] = 0.01
    tolerance: Text = "auto"
    detect: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @field_validator("tolerance")
    @classmethod
    def tolerance_is_a_share(cls, tolerance: str) -> str:
        """A total variation, or "auto"."""
        if tolerance != "auto":
            try:
                share = float(tolerance)
            except ValueError:
                share = -1.0
            if not 0 <= share <= 1:
                raise ValueError("tolerance is auto or a total variation per token, 0 to 1")
        return tolerance


class Ab(Fields):
    """An experiment between configurations: the fields of an experiment file, under `experiment`. seed: replaces its seed."""

    kind: Literal["ab"]
    experiment: dict[str, Any]
    seed: Seed | None = None

    @model_validator(mode="after")
    def is_one(self) -> Ab:
        """Checked as `outrider ab` checks its file."""
        experiment_from(self.experiment, "ab", "experiment")
        return self
