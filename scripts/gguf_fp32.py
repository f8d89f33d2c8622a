"""Writes a GGUF file again with every weight dequantised to fp32, for llama.cpp in scripts/bench_serve.py.

pip install gguf
python scripts/gguf_fp32.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2-135m-fp32.gguf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Write the file, and return the exit code: 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a .gguf file")
    parser.add_argument("out", type=Path, help="file to create; must not exist")
    args = parser.parse_args(arguments)
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} exists already: name a new file")
        part = args.out.with_name(f".{args.out.name}.part")
        try:
            dequantise(args.file, part)
            part.replace(args.out)
        finally:
            part.unlink(missing_ok=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"gguf_fp32: {error}", file=sys.stderr)
        return 2
    return 0


def dequantise(file: Path, out: Path) -> None:
    """Writes ``out``: the metadata of ``file``, and its tensors in fp32."""
    import gguf

    reader = gguf.GGUFReader(file)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    if architecture is None:
        raise ValueError(f"{file} names no architecture (general.architecture)")
    writer = gguf.GGUFWriter(out, architecture.contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE):
            continue
        kind, *inner = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=inner[-1] if inner else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
