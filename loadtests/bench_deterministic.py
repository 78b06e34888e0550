"""The price of deterministic mode: the same requests in deterministic and in fast mode, alternated.

Deterministic mode makes the bits of a token independent of its batch. On a CPU it costs what the restricted row counts
of the products cost: a layer proved for any count from 2 up pays nothing, one that is proved only for tiles of fixed
sizes (see serve_app/kernels/linear.py) computes in more and smaller products, and the padding of the last tile. So both
modes stand beside the floor of their own linears. Price: 1 - tokens/s deterministic / tokens/s fast, within a
repetition; the aim is at most 10 % in float32.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bench_engine import NUM_REQUESTS, REACHED, SPEED, Results, Run, alternated, at, bench, parser, rounded, row

AIM = 0.10
MODES = ("fast", "deterministic")
ANY = 1 << 30
"""kernels/linear.py's sign for "any number of rows from the one before it up"."""


def strategy(tiles: list[int]) -> str:
    """Linear.row_tiles in words."""
    if not tiles:
        return "as they come"
    if tiles[-1] == ANY:
        return f"any from {tiles[0]} rows up"
    return f"tiles of {', '.join(map(str, tiles))} rows"


def main() -> None:
    options = parser((__doc__ or "").splitlines()[0])
    arguments = options.parse_args()
    runs: list[Run] = [(mode, dtype) for dtype in arguments.dtype for mode in MODES]
    results = Results()
    with bench(arguments) as made:
        made.print_conditions()
        for repetition, (mode, dtype) in alternated(runs, arguments.repeat):
            answer = made.run(f"{mode}-{dtype}", "continuous", dtype, deterministic=mode == "deterministic")
            results.add((mode, dtype), repetition, answer)
        conditions = made.conditions()

    done = [run for run in runs if run in results.answers]
    rows = {run: row(results, run, run) for run in done}
    print(
        f"\n{'mode':16}{'dtype':10}{'tokens/s':>9}{'linears ms':>12}{'attention':>11}{'step':>8}{'of floor':>10}"
        f"{'padded rows':>13}{'equal':>8}"
    )
    num_requests = arguments.requests or NUM_REQUESTS[arguments.model]
    for run, r in rows.items():
        parts = r["parts_ms"]
        equal = f"{r['equal_sequences']:.0f}/{num_requests}"
        print(
            f"{run[0]:16}{run[1]:10}{r['tokens_per_s']:9.1f}{parts['linears'] + parts['head']:12.3f}"
            f"{parts['attention']:11.3f}{r['step_ms']:8.2f}{r['floor']['reached']:10.1%}{r['tile_waste']:13.2%}{equal:>8}"
        )
    print("equal: requests whose tokens are the same in every repetition (median over the repetitions)")

    prices: dict[str, Any] = {}
    for dtype in arguments.dtype:
        fast, deterministic = ((mode, dtype) for mode in MODES)
        if fast not in rows or deterministic not in rows:
            print(f"\n{dtype}: no price; {results.errors.get(deterministic) or results.errors.get(fast)}")
            continue
        price = 1 - results.ratio(deterministic, fast, SPEED)
        of_linears = results.ratio(deterministic, fast, at("floor", "s")) - 1
        verdict = ""
        if dtype == "float32":
            verdict = f" ({'reached' if price <= AIM else 'NOT reached'}: at most {AIM:.0%})"
        print(
            f"\n{dtype}: deterministic mode costs {price:.1%} of tokens/s{verdict}; its linears alone {of_linears:+.1%}"
        )
        for shape, tiles in rows[deterministic]["row_tiles"].items():
            print(f"  {shape:14} {strategy(tiles)}")
        prices[dtype] = {
            "price": price,
            "linears_alone": of_linears,
            "fast_tokens_per_s": results.median(fast, SPEED),
            "deterministic_tokens_per_s": results.median(deterministic, SPEED),
            "deterministic_of_its_floor": results.median(deterministic, REACHED),
            "padded_rows": rows[deterministic]["tile_waste"],
            "row_tiles": {shape: strategy(tiles) for shape, tiles in rows[deterministic]["row_tiles"].items()},
        }
    print(
        json.dumps(
            rounded(
                {
                    "bench": "deterministic",
                    "model": arguments.model,
                    "conditions": conditions,
                    "aim_float32": AIM,
                    "prices": prices,
                    "rows": [r | {"system": run[0]} for run, r in rows.items()],
                    "errors": {f"{mode}:{dtype}": error for (mode, dtype), error in results.errors.items()},
                }
            )
        )
    )
    if not prices:
        sys.exit(1)


if __name__ == "__main__":
    main()
