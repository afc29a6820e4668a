"""Greedy tokens by llama.cpp: `python greedy.py BASE.gguf ADAPTER.gguf|- COUNT ID ID ...` prints ids, a space between.

Run by an interpreter that has llama-cpp-python, which need not be the one of the tests; imports nothing else.
"""

import sys


def main() -> None:
    import llama_cpp

    base, adapter, count, *ids = sys.argv[1:]
    model = llama_cpp.Llama(
        base, n_ctx=64, n_batch=64, n_threads=1, lora_path=None if adapter == "-" else adapter, verbose=False,
        logits_all=True,
    )  # fmt: skip
    sequence = [int(each) for each in ids]
    for _ in range(int(count)):
        model.reset()
        model.eval(sequence)
        scores = model.scores[model.n_tokens - 1]
        sequence.append(int(scores.argmax()))
    print(*sequence)
    print(*scores)


if __name__ == "__main__":
    main()
