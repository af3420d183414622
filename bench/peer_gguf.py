"""Converts a Hugging Face folder to GGUF by llama.cpp's own converter, in llama.cpp's environment.

    PYTHON bench/peer_gguf.py SOURCE_OF_LLAMA_CPP FOLDER OUT f32|bf16|q8_0

The converter knows a tokenizer by a hash; a random model's has none, so the question is answered here.
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    """Run the converter as a script."""
    source, folder, out, dtype = sys.argv[1:]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    from conversion import base

    for kind in vars(base).values():
        if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
            setattr(kind, "get_vocab_base_pre", lambda self, tokenizer: "gpt-2")  # noqa: B010
    script = f"{source}/convert_hf_to_gguf.py"
    sys.argv = [script, folder, "--outfile", out, "--outtype", dtype]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
