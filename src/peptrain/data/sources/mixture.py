"""The order in which several sources take turns: one after another, or by weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peptrain.data.sources.base import Piece, Source, Taken


def furthest_behind(text_bytes: Sequence[int], weights: Sequence[float]) -> int:
    """The source whose share of the bytes so far falls shortest of its weight, the first of equals.

    No random number is drawn, so the order depends on nothing but the documents and the weights.
    No source gets ahead of its share by more than one document: it was not ahead when chosen.
    """
    total = sum(text_bytes)
    return max(range(len(weights)), key=lambda i: weights[i] * total - text_bytes[i])


def mixed(
    sources: Sequence[Source],
    weights: Sequence[float],
    taken: Sequence[Taken],
) -> Iterator[tuple[int, Piece]]:
    """Whole documents of the sources with the source's number, until the one whose turn it is ends.

    The shares are counted in bytes of text (UTF-8). `taken` says where each source goes on.
    """
    streams = [source.pieces(t.position) for source, t in zip(sources, taken, strict=True)]
    counts = [t.text_bytes for t in taken]
    inside = next((number for number, t in enumerate(taken) if t.inside), None)
    while True:
        number = furthest_behind(counts, weights) if inside is None else inside
        piece = next(streams[number], None)
        if piece is None:
            return
        counts[number] += len(piece.text.encode())
        inside = None if piece.ends else number
        yield number, piece


def one_after_another(
    sources: Sequence[Source], taken: Sequence[Taken]
) -> Iterator[tuple[int, Piece]]:
    """All documents of the sources in order, from the last one on of which any was taken."""
    positions = [t.position for t in taken]
    begun = [number for number, position in enumerate(positions) if position is not None]
    for number in range(begun[-1] if begun else 0, len(sources)):
        for piece in sources[number].pieces(positions[number]):
            yield number, piece
