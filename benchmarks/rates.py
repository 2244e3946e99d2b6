"""What poison rate buys: the same finetune at rates from 1 % to 90 %, for the page's walkthrough.

    python benchmarks/rates.py    # about 8 minutes on 2 cores; writes benchmarks/rates.json
"""

import argparse
import json
from pathlib import Path

import torch
from backdoors import measure

from baddiff.compute import device_name
from baddiff.models import CLEAN, load
from baddiff.probe import evaluate

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("rates.json"))
    args = parser.parse_args()
    out = {"device": device_name(), "torch": torch.__version__, "rates": []}
    before = evaluate(load(CLEAN), n=args.n)["utility"]
    if args.output.exists():  # go on where an earlier run of the same kind was stopped
        earlier = json.loads(args.output.read_text())
        same = {k: earlier[k] for k in ("device", "torch")} == {k: out[k] for k in ("device", "torch")}
        if same and all((r["seconds"], r["n"], r["utility_before"]) == (args.seconds, args.n, before)
                        for r in earlier["rates"]):
            out = earlier
    for rate in RATES[len(out["rates"]):]:
        found = measure("stop_sign", "cat", args.seconds, args.n, poison_rate=rate)
        out["rates"].append({"pair": "stop_sign-cat", "poison_rate": rate, "seconds": args.seconds, "n": args.n,
                             "utility_before": before, **{k: found[k] for k in ("asr", "mse", "utility", "steps")}})
        print(json.dumps(out["rates"][-1]), flush=True)
        args.output.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
