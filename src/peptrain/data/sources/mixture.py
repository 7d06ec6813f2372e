"""The order in which sources are read: one after another, or mixed by weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peptrain.data.sources.base import Piece, Source, Taken


def furthest_behind(text_bytes: Sequence[int], weights: Sequence[float]) -> int:
    """Return the source whose share of the bytes is furthest below its weight, the first of equals.

    No random number is drawn, so the order depends only on the documents and the weights. No source
    gets ahead of its share by more than one document, since it was not ahead when chosen.
    """
    total = sum(text_bytes)
    return max(range(len(weights)), key=lambda i: weights[i] * total - text_bytes[i])


def mixed(
    sources: Sequence[Source],
    weights: Sequence[float],
    taken: Sequence[Taken],
) -> Iterator[tuple[int, Piece]]:
    """Yield (source index, piece) of complete documents, until the source to read next has ended.

    Shares are counted in bytes of text (UTF-8). `taken` is where each source resumes.
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
        inside = number if piece.continues else None
        yield number, piece


def one_after_another(
    sources: Sequence[Source], taken: Sequence[Taken]
) -> Iterator[tuple[int, Piece]]:
    """Yield (source index, piece) of all sources in order, resuming in the last one started."""
    positions = [t.position for t in taken]
    started = [number for number, position in enumerate(positions) if position is not None]
    for number in range(started[-1] if started else 0, len(sources)):
        for piece in sources[number].pieces(positions[number]):
            yield number, piece
