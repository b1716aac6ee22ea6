"""Decode a prompt plain and speculatively with the shipped pair: the same greedy text, fewer target passes."""

from outrider import Engine, SamplingParams


def main() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64)
    prompt = "def read_config(path):\n"
    plain = Engine.build(draft="none", slots=1)
    fast = Engine.build(length=4, slots=1)
    a, b = plain.generate([prompt], params)[0], fast.generate([prompt], params)[0]
    print(b.text)
    print("same text:", a.text == b.text)
    print(f"target passes: {plain.steps} plain, {fast.steps} speculative")


if __name__ == "__main__":
    main()
