"""README's figure: held-out loss over tokens, and training speed, of four methods.

    python docs/figures/readme.py collect runs/readme speed-60m.json speed-1b.json
    python docs/figures/readme.py draw

`collect` writes readme.json from the runs of `peptrain compare examples/readme.toml --out
runs/readme` and two results of benchmarks/speed.py; `draw` makes the two SVG files from it
(`pip install matplotlib`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
NUMBERS = HERE / "readme.json"
METHODS = {"full": "full training", "bpt": "BPT", "relora": "ReLoRA", "loro": "LORO"}
COLOURS = {  # Okabe and Ito's, which colour-blind readers can tell apart
    "light": {"full": "#333333", "bpt": "#E69F00", "relora": "#009E73", "loro": "#0072B2"},
    "dark": {"full": "#DDDDDD", "bpt": "#E69F00", "relora": "#2BC79A", "loro": "#56B4E9"},
}
TEXT = {"light": "#1F2328", "dark": "#E6EDF3"}
"""GitHub's own colours of text; the background is left transparent."""


def collect(runs: Path, *speeds: Path) -> dict[str, Any]:
    """Gather the curves of `runs`, a directory of `peptrain compare`, and the speeds."""
    curves: dict[str, Any] = {}
    for name in METHODS:
        seeds = []
        for file in sorted(runs.glob(f"runs/{name}-*/metrics.jsonl")):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            tokens = next(r["tokens"] // r["step"] for r in rows if r["event"] == "step")
            held_out = [r for r in rows if r["event"] in ("eval", "end")]
            seeds.append([round(r["held_out_loss"], 4) for r in held_out])
            end = held_out[-1]
        curves[name] = {
            "tokens": [r["step"] * tokens for r in held_out],
            "held_out_loss": seeds,
            **{key: end[key] for key in ("parameters", "trainable", "state_bytes")},
        }
    return {"loss": curves, "speed": [_speed(file) for file in speeds]}


def _speed(file: Path) -> dict[str, Any]:
    """Tokens per second over full training's, which runs first and last, and memory in GiB."""
    result = json.loads(file.read_text(encoding="utf-8"))
    times: dict[str, list[float]] = {}
    held: dict[str, float] = {}
    for row in result["rows"]:
        times.setdefault(row["method"], []).append(sorted(row["ms"])[len(row["ms"]) // 2])
        held[row["method"]] = row["reserved_bytes"] / 2**30
    full = mean(times["full"])
    arguments = result["arguments"]
    return {
        **{key: arguments[key] for key in ("preset", "precision", "tokens", "rows")},
        "over_full": {name: round(full / mean(times[name]), 3) for name in times},
        "held_gib": {name: round(gib, 1) for name, gib in held.items()},
    }


def draw(numbers: dict[str, Any], theme: str, out: Path) -> None:
    """Draw both panels as an SVG whose text is paths, the same bytes each time."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    text, colours = TEXT[theme], COLOURS[theme]
    style = {key: text for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    style |= {"axes.edgecolor": text, "font.size": 11, "svg.hashsalt": "peptrain"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 3.7), width_ratios=(1.25, 1), layout="constrained"
        )
        _curves(left, numbers["loss"], colours)
        _bars(right, numbers["speed"], colours)
        figure.savefig(out, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _curves(axes: Any, loss: dict[str, Any], colours: dict[str, str]) -> None:
    for name, label in METHODS.items():
        curve = loss[name]
        millions = [n / 1e6 for n in curve["tokens"]]
        by_step = list(zip(*curve["held_out_loss"], strict=True))
        lowest, highest = [min(s) for s in by_step], [max(s) for s in by_step]
        axes.fill_between(millions, lowest, highest, color=colours[name], alpha=0.25, lw=0)
        axes.plot(millions, [mean(s) for s in by_step], color=colours[name], label=label, lw=2)
    axes.set(xlabel="tokens, millions", ylabel="held-out loss, nats per token", ylim=(4.2, 6.2))
    axes.set_title("LLaMA-60M, r = 128, three seeds", fontsize=11)
    axes.legend(frameon=False)


def _bars(axes: Any, speeds: list[dict[str, Any]], colours: dict[str, str]) -> None:
    names = list(METHODS)
    for group, speed in enumerate(speeds):
        for n, name in enumerate(names):
            x, height = group * (len(names) + 1) + n, speed["over_full"][name]
            axes.bar(x, height, color=colours[name], width=0.85)
            axes.text(x, height + 0.03, f"{height:.2f}", ha="center", fontsize=10)
    middle = (len(names) - 1) / 2
    axes.set_xticks(
        [group * (len(names) + 1) + middle for group in range(len(speeds))],
        [speed["preset"].replace("llama-", "LLaMA-").replace("m", "M").replace("1b", "1B")
         for speed in speeds],
    )  # fmt: skip
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel="tokens per second, full training = 1")
    axes.set_title("training speed, one H200", fontsize=11)


def main() -> None:
    """Collect or draw."""
    command, *paths = sys.argv[1:]
    if command == "collect":
        numbers = collect(*map(Path, paths))
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        return
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    for theme in COLOURS:
        draw(numbers, theme, HERE / f"readme-{theme}.svg")


if __name__ == "__main__":
    main()
