"""Compare draft lengths on held-out prompts: paired, interleaved, with an interval and the ledger."""

from outrider import Engine, SamplingParams
from outrider.assets import shipped_prompts
from outrider.build import companion
from outrider.evaluate.measure import Arm, run_arms
from outrider.evaluate.records import summarise
from outrider.telemetry.ledger import acceptance_length, ledger


def main() -> None:
    spec = Engine.build(length=4, slots=1)
    arms = [
        Arm("plain", companion(spec, "none", length=0)),
        Arm("length 2", companion(spec, length=2)),
        Arm("length 4", spec),
    ]
    prompts = [spec.encode(p) for p in shipped_prompts()[:3]]
    records = run_arms(arms, prompts, SamplingParams(max_tokens=24, ignore_eos=True), repeats=2)
    for arm in summarise(records, "plain"):
        book = ledger(arm.counts)
        ratio = f"{arm.speedup.value:.2f} ({arm.speedup.low:.2f} to {arm.speedup.high:.2f})" if arm.speedup else "base"
        print(
            f"{arm.name:9} {arm.tokens_per_second:7.1f} tokens/s  {ratio:22} tokens/step {acceptance_length(arm.counts):.2f}  "
            f"rejections predicted {book.predicted:.1f} observed {book.observed}"
        )


if __name__ == "__main__":
    main()
