"""Stream a sampled text and mark where each token came from."""

from outrider import Engine, SamplingParams


def main() -> None:
    engine = Engine.build(length=4, slots=1)
    marks = {"accepted": "", "corrected": "~", "bonus": "+", "sampled": ""}
    for event in engine.stream("class Parser:\n", SamplingParams(temperature=0.8, seed=1, max_tokens=80)):
        print(event.text, end="", flush=True)
        print("".join(marks[o] for o in event.origins), end="")
    print(f"\n{engine.counts.accepted} of {engine.counts.emitted} tokens were drafted")


if __name__ == "__main__":
    main()
