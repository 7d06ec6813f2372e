"""Train an MLP, an ordinary nn.Module, on small synthetic images with each method.

    python examples/mlp.py [STEPS]

Each of the ten classes is a fixed pattern of 16 x 16 pixels, shifted at random, with noise added.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peptrain as pt

SIDE, CLASSES, WIDTH, ROWS = 16, 10, 256, 128
SHAPE = {"rank": 16, "exclude": "4"}
"""Settings for methods that have these fields. "4" is the output layer, which stays dense."""
patterns = torch.randn(CLASSES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def batch(seed: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Draw images [rows, 256] and their classes [rows]."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (rows,), generator=draw)
    shifts = torch.randint(3, (rows, 2), generator=draw).tolist()
    moved = [torch.roll(patterns[c], s, (0, 1)) for c, s in zip(y.tolist(), shifts, strict=True)]
    noise = torch.randn(rows, SIDE, SIDE, generator=draw)
    return (torch.stack(moved) + noise).flatten(1), y


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(SIDE * SIDE, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    )


def accuracy(model: nn.Module) -> float:
    x, y = batch(seed=10**6, rows=2000)
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main(steps: int) -> None:
    print("method    trainable   accuracy")
    for name, method in pt.METHODS.items():
        model = mlp()
        own = {k: v for k, v in SHAPE.items() if k in method.__dataclass_fields__}
        training = pt.adapt(model, method(**own), steps=steps, fresh=True)
        for step in range(steps):
            x, y = batch(step)
            F.cross_entropy(model(x), y).backward()
            training.step()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        plain = training.dense() if method.has_dense_equivalent else model
        print(f"{name:8s}  {trainable:9,d}   {accuracy(plain):8.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 300)
