"""Which tests see a GPU; imported before torch is."""


def wants_gpu(words):
    """Whether a command line of pytest selects the tests that need a GPU: -m gpu."""
    chosen = [word for flag, word in zip(words, words[1:]) if flag == "-m"]
    return bool(chosen) and "gpu" in chosen[-1].replace("not gpu", "").split()
