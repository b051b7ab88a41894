"""`python -m benchmarks block`: measures, prints a table, writes JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks import block


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("block", help="one steady block of the DiT beside plain PyTorch")
    p.add_argument("--device", default="cpu", help="cpu")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp8"))
    p.add_argument("--repeat", type=int, default=1, help="steady blocks to take the median of")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error(f"--repeat: expected 1 or more, got {options.repeat}")
    result = block.measure(options.device, options.precision, options.repeat, options.seed)
    block.print_table(result, Console())
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
