"""Best-fit-decreasing bin packing: documents into rows of a token budget, little left empty."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Gather documents into bins of at most `capacity` tokens by best-fit decreasing.

    Longest first; each document goes into the fullest open bin that still has room for it, so a
    bin opens only when no other could take the document: asymptotically at most 11/9 of the fewest
    possible bins (Johnson et al., SIAM J. Comput. 3, 1974). Equal lengths keep their order: the
    result depends on nothing but the arguments.

    Args:
        lengths: tokens of each document, none negative.
        capacity: tokens of a bin, positive.

    Returns:
        Bins in the order in which they opened, each the indices of its documents, longest first.
        A document longer than `capacity` stands alone.

    >>> pack([3, 9, 5, 2, 12], capacity=10)
    [[4], [1], [2, 0, 3]]
    """
    assert capacity > 0
    assert all(length >= 0 for length in lengths)
    bins: list[list[int]] = []
    open_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room = capacity - length
            bins.append([index])
            chosen = len(bins) - 1
        else:
            room = rooms[at] - length
            chosen = open_by_room[rooms[at]].pop()
            bins[chosen].append(index)
            if not open_by_room[rooms[at]]:
                del open_by_room[rooms.pop(at)]
        if room > 0:
            if room not in open_by_room:
                open_by_room[room] = []
                insort(rooms, room)
            open_by_room[room].append(chosen)
    return bins
